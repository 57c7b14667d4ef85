"""The comparisons of the checks that train, their settings, and their reasons to skip. The rehearsal on a CPU runs them whole."""

import math
from pathlib import Path

import pytest
import torch
import yaml

from megatron_ledom.config.checks import check_config
from megatron_ledom.config.gpu_checks import FP8_NEEDS
from megatron_ledom.config.load import load_config
from megatron_ledom.errors import VerificationError
from megatron_ledom.hardware_check import golden, layouts, nodes, resume, scores, transformer_engine
from megatron_ledom.hardware_check.check import Outcome, Setting, Status
from megatron_ledom.hardware_check.curves import Difference, Record, compare, compare_each
from megatron_ledom.hardware_check.training_runs import CONFIG, NO_TIME
from megatron_ledom.inference import CandidateScore


def records(count: int = 10) -> list[Record]:
    return [{"iteration": step, "lm_loss": 6 - 0.1 * step, "grad_norm": 2 + 0.1 * step} for step in range(1, count + 1)]


def changed(key: str, factor: float, step: int = 7) -> list[Record]:
    """Return the records with a value of one step multiplied."""
    return [{**record, key: record[key] * factor if record["iteration"] == step else record[key]} for record in records()]


def setting(tmp_path: Path, device: str = "cpu", num_gpus: int = 2) -> Setting:
    return Setting(device=device, num_gpus=num_gpus, seconds=60, folder=str(tmp_path))


def test_compare_returns_the_largest_relative_differences() -> None:
    assert compare(records(), records()) == Difference(0, 0)
    found = compare(changed("lm_loss", 1.001), records())
    assert found.loss == pytest.approx(1e-3)
    assert found.grad_norm == 0
    assert compare(changed("grad_norm", 0.99, step=1), records()).grad_norm == pytest.approx(1e-2)


@pytest.mark.parametrize("found", [[], records(9), records()[1:]])
def test_compare_refuses_other_steps(found: list[Record]) -> None:
    with pytest.raises(VerificationError, match="records of the iterations"):
        compare(found, records())


@pytest.mark.parametrize("value", [math.nan, math.inf, "nan"])
def test_a_value_that_is_no_number_exceeds_every_tolerance(value: float | str) -> None:
    found = [{**record, "lm_loss": value if record["iteration"] == 3 else record["lm_loss"]} for record in records()]
    assert compare(found, records()).exceeds(Difference(1e9, 1e9))


@pytest.mark.parametrize("module", [golden, layouts])
@pytest.mark.parametrize(("key", "factor"), [("lm_loss", 1.0001), ("grad_norm", 1.001)])
def test_a_small_change_exceeds_the_tolerance_of_fp32(module: object, key: str, factor: float) -> None:
    differences, problems = compare_each({"one": changed(key, factor), "same": records()}, records(), module.TOLERANCE)  # type: ignore[attr-defined]
    assert set(differences) == {"one", "same"}
    assert len(problems) == 1
    assert problems[0].startswith("one: losses differ by")


def reported(found: dict[str, list[Record]], failures: dict[str, str], left: dict[str, str]) -> Outcome:
    return layouts.report(found, records(), failures, left, "gloo")


def test_layouts_pass_with_numbers_and_reasons() -> None:
    outcome = reported({"TP2": records(), "PP2": changed("lm_loss", 1 + 1e-7)}, {}, {"CP2": NO_TIME, "TP8 SP": "needs 8 ranks"})
    assert outcome.status is Status.PASSED
    assert outcome.numbers["layouts"]["PP2"]["loss_difference"] == pytest.approx(1e-7)
    assert outcome.numbers["skipped_layouts"] == {"CP2": NO_TIME, "TP8 SP": "needs 8 ranks"}
    assert "without time for CP2" in outcome.reason
    assert "TP8" not in outcome.reason


@pytest.mark.parametrize(
    ("found", "failures", "left", "named"),
    [
        ({"TP2": changed("lm_loss", 1.001), "PP2": records()}, {}, {}, "1 of 2 layouts failed: TP2: losses differ by 1.0e-03"),
        ({"TP2": records()}, {"PP2": "ended with the exit codes [3, 75]"}, {}, "PP2 ended with the exit codes"),
        ({}, {}, {"TP2": NO_TIME}, "no layout ended within the time limit"),
    ],
)
def test_layouts_fail(found: dict[str, list[Record]], failures: dict[str, str], left: dict[str, str], named: str) -> None:
    outcome = reported(found, failures, left)
    assert outcome.status is Status.FAILED
    assert named in outcome.reason


def test_layouts_are_chosen_by_the_number_of_ranks(tmp_path: Path) -> None:
    chosen, left = layouts.choose(setting(tmp_path, "cuda", 4))
    assert {layout.num_ranks for layout in chosen.values()} == {2, 4}
    assert left["TP8 SP"] == "needs 8 ranks, there are 4"
    assert not set(chosen) & set(left)
    assert set(layouts.choose(setting(tmp_path, "cuda", 8))[0]) == set(layouts.LAYOUTS)
    assert max(layout.num_ranks for layout in layouts.choose(setting(tmp_path, "cpu", 8))[0].values()) == 2


@pytest.mark.parametrize(("num_gpus", "sizes"), [(1, []), (2, [2]), (4, [2, 4]), (8, [2, 8, 4])])
def test_layouts_of_all_gpus_run_before_those_of_half_of_them(tmp_path: Path, num_gpus: int, sizes: list[int]) -> None:
    """If the time is short, the least informative ones get none."""
    for names in (layouts.LAYOUTS, transformer_engine.ENGINE_LAYOUTS):
        chosen, left = layouts.choose(setting(tmp_path, "cuda", num_gpus), names)
        assert layouts.launches_of(chosen) == sizes
        assert {*chosen, *left} == set(names)
        assert all(
            reason == f"needs {layouts.LAYOUTS[name].num_ranks} ranks, there are {num_gpus}" for name, reason in left.items()
        )


def test_one_gpu_skips_layouts_with_a_reason(tmp_path: Path) -> None:
    outcome = layouts.check_layouts(setting(tmp_path, "cuda", 1))
    assert outcome.status is Status.SKIPPED
    assert "this machine has 1" in outcome.reason
    assert outcome.numbers["skipped_layouts"]["TP2"] == "needs 2 ranks, there are 1"


SETTINGS = {
    **{f"layout {name}": (layout.num_ranks, layout.overrides()) for name, layout in layouts.LAYOUTS.items()},
    **{
        f"fp8 {recipe}": (1, [*transformer_engine.WIDTHS, transformer_engine.ENGINE, *transformer_engine.fp8_overrides(recipe)])
        for recipe in FP8_NEEDS
    },
    **{
        f"transformer_engine {name}": (
            layouts.LAYOUTS[name].num_ranks,
            [*transformer_engine.WIDTHS, transformer_engine.ENGINE, *layouts.LAYOUTS[name].overrides()],
        )
        for name in transformer_engine.ENGINE_LAYOUTS
    },
    "bf16": (1, [*transformer_engine.WIDTHS, transformer_engine.ENGINE]),
    "resume": (2, [*resume.SETTINGS, *(f"parallel.{one}" for one in layouts.DISTRIBUTED)]),
    "16 nodes": (16, ["train.micro_batch_size=1", *(f"parallel.{one}" for one in layouts.DISTRIBUTED)]),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_a_check_are_valid(tmp_path: Path, name: str) -> None:
    """Those of fp8 and of eight ranks run only on GPUs, so a wrong key would be found there first."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"run_dir": str(tmp_path / "run"), **CONFIG}))
    num_ranks, overrides = SETTINGS[name]
    shard = f"data.train_blend=[[1.0,{tmp_path}/shard]]"
    check_config(load_config(str(path), [shard, "model.vocab_size=320", *overrides]), num_ranks)


def test_a_cpu_skips_transformer_engine_with_a_reason(tmp_path: Path) -> None:
    for check in (transformer_engine.check_transformer_engine, transformer_engine.check_fp8):
        outcome = check(setting(tmp_path))
        assert outcome.status is Status.SKIPPED
        assert "needs a CUDA device" in outcome.reason


@pytest.mark.parametrize(
    ("found", "failures", "status", "named"),
    [
        ({"delayed": changed("lm_loss", 1.01)}, {}, Status.PASSED, "delayed: losses differ by 1.0e-02"),
        ({"delayed": changed("lm_loss", 1.05)}, {}, Status.FAILED, "delayed: losses differ by 5.0e-02"),
        ({"delayed": records()}, {"blockwise": "ended with the exit codes [1]"}, Status.FAILED, "blockwise ended with"),
        ({}, {}, Status.FAILED, "no run with fp8 recipes"),
        ({"delayed": records()}, {}, Status.PASSED, "without time for tensorwise"),
    ],
)
def test_fp8_outcome(found: dict[str, list[Record]], failures: dict[str, str], status: Status, named: str) -> None:
    outcome = transformer_engine.judge(
        "fp8 recipes", found, records(), transformer_engine.FP8_TOLERANCE, failures, {"tensorwise": NO_TIME}
    )
    assert outcome.status is status
    assert named in outcome.reason


def test_one_node_and_a_step_skip_the_run_over_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_NUM_NODES", "SLURM_STEP_ID", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    outcome = nodes.check_nodes(setting(tmp_path))
    assert outcome.status is Status.SKIPPED
    assert "not in a SLURM job of several nodes" in outcome.reason
    for name in ("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"):
        monkeypatch.setenv(name, "0")
    for name, value in {
        "JOB_ID": "7",
        "NTASKS": "1",
        "TASKS_PER_NODE": "1",
        "JOB_NODELIST": "n1",
        "JOB_NUM_NODES": "2",
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    outcome = nodes.check_nodes(setting(tmp_path))
    assert outcome.status is Status.SKIPPED
    assert "inside srun" in outcome.reason


def test_first_different_step_compares_every_bit() -> None:
    assert resume.first_different_step(records(), records()) is None
    assert resume.first_different_step(changed("lm_loss", 1 + 2**-52, step=4), records()) == 4
    assert resume.first_different_step(records(5), records()) == 6
    assert resume.first_different_step(records(), records(9)) == 10


def test_first_different_tensor_compares_every_bit() -> None:
    one = {"a": torch.ones(3), "b": torch.zeros(2)}
    assert resume.first_different_tensor(one, {name: tensor.clone() for name, tensor in one.items()}) is None
    other = {**one, "b": torch.tensor([0.0, 1e-38])}
    assert resume.first_different_tensor(one, other) == "1 of 2 tensors differ, first b"
    assert "only one checkpoint has the tensor b" in str(resume.first_different_tensor({"a": one["a"]}, one))


def scored(*rewards: float, reverse: float | None = -3.0) -> list[list[CandidateScore]]:
    return [[CandidateScore(-2.0, reverse, 4, 5, reward) for reward in rewards]]


@pytest.mark.parametrize(
    ("found", "texts", "named"),
    [
        (scored(-1, -2), ["same"], ""),
        (scored(-2, -1), ["same"], "the rankings are [[1, 0]], expected [[0, 1]]"),
        (scored(-1, -2, reverse=-3.1), ["same"], "scores differ by 1.0e-01 nats"),
        (scored(-1, -2, reverse=math.nan), ["same"], "scores differ by nan nats"),
        (scored(-1, -2, reverse=None), ["same"], "scores differ by inf nats"),
        (scored(-1, -2), ["other"], "the generated text is 'other', expected 'same'"),
    ],
)
def test_scores_outcome(found: list[list[CandidateScore]], texts: list[str], named: str) -> None:
    outcome = scores.judge(found, scored(-1, -2), texts, ["same"], "cuda")
    assert (outcome.status is Status.FAILED) == bool(named)
    assert named in outcome.reason
