"""Every layout trains the same model as one process: loss and gradient norm of every step agree.

The gradient norm is the stricter test. It detects weights without their tensor-parallel attributes (as megatron-core's
`perform_initialization=False` makes them): the losses then agree until clipping acts, but the norm is wrong from step 1.
"""

from pathlib import Path

import pytest

from tests.support.tiny_runs import Record, TinyData, curve, read_metrics, run_command, run_each_on_ranks, run_on_ranks

STEPS = 10
FIRST_STEP, ANY_STEP = 1e-6, 1e-5
"""Relative tolerances in fp32: other layouts add in another order."""

LAYOUTS = {
    "TP2": (2, ["tensor_model_parallel_size=2"]),
    "TP2 with sequence parallel": (2, ["tensor_model_parallel_size=2", "sequence_parallel=true"]),
    "TP2 with PP2": (4, ["tensor_model_parallel_size=2", "pipeline_model_parallel_size=2"]),
    "PP2": (2, ["pipeline_model_parallel_size=2"]),
    "PP2 of 2 chunks": (2, ["pipeline_model_parallel_size=2", "virtual_pipeline_model_parallel_size=2"]),
    "CP2": (2, ["context_parallel_size=2"]),
    "DP2": (2, []),
    "DP2 with distributed optimizer": (
        2,
        ["use_distributed_optimizer=true", "overlap_grad_reduce=true", "overlap_param_gather=true"],
    ),
}
MODEL = (
    "model.num_layers=4",
    f"train.train_iters={STEPS}",
    f"checkpoint.save_interval={STEPS}",
    f"train.eval_interval={STEPS // 2}",
    "train.eval_iters=2",
)


def validated(data: TinyData) -> list[str]:
    return [*MODEL, f"data.valid_blend=[[1.0,{data.shard('reverse_valid')}]]"]


@pytest.fixture(scope="module")
def one_process(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    return run_on_ranks(data.config, tmp_path_factory.mktemp("one") / "run", *validated(data))


@pytest.fixture(scope="module")
def trained(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Record]]:
    """The records of each layout; layouts with the same number of ranks share one launch."""
    folder, found = tmp_path_factory.mktemp("layouts"), {}
    for num_ranks in sorted({count for count, _ in LAYOUTS.values()}):
        runs = {
            folder / name.replace(" ", "_"): [*validated(data), *(f"parallel.{setting}" for setting in layout)]
            for name, (count, layout) in LAYOUTS.items()
            if count == num_ranks
        }
        found |= run_each_on_ranks(data.config, runs, num_ranks=num_ranks)
    return {name: found[folder / name.replace(" ", "_")] for name in LAYOUTS}


def differences(found: list[Record], expected: list[Record]) -> list[float]:
    """Return the larger relative difference of loss and gradient norm, for each step."""
    pairs = zip(curve(found), curve(expected), strict=True)
    return [max(abs(a / b - 1) for a, b in zip(one, other, strict=True)) for one, other in pairs]


def check_equal(found: list[Record], expected: list[Record]) -> None:
    assert [record["iteration"] for record in found] == list(range(1, STEPS + 1))
    different = differences(found, expected)
    assert different[0] <= FIRST_STEP
    assert max(different) <= ANY_STEP
    for record, wanted in zip(found, expected, strict=True):
        assert record.get("validation", {}).keys() == wanted.get("validation", {}).keys()
        for name, result in wanted.get("validation", {}).items():
            assert record["validation"][name]["lm_loss"] == pytest.approx(result["lm_loss"], rel=ANY_STEP)
    assert sum("validation" in record for record in expected) == 2


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_trains_as_one_process(trained: dict[str, list[Record]], one_process: list[Record], name: str) -> None:
    check_equal(trained[name], one_process)


def test_the_command_under_torchrun_trains_as_one_process(data: TinyData, tmp_path: Path, one_process: list[Record]) -> None:
    run_dir, layout = tmp_path / "run", "parallel.pipeline_model_parallel_size=2"
    done = run_command("--config", str(data.config), f"run_dir={run_dir}", *validated(data), layout, num_ranks=2)
    assert done.returncode == 0, done.stderr[-6000:]
    check_equal(read_metrics(run_dir), one_process)


def test_the_comparison_sees_a_step_that_differs(one_process: list[Record]) -> None:
    changed = [dict(record) for record in one_process]
    changed[7]["grad_norm"] *= 1.0001
    with pytest.raises(AssertionError):
        check_equal(changed, one_process)
