"""Multi-token prediction: every layout trains it as one process, a run resumes with it, and an export is without it."""

from pathlib import Path

import numpy as np
import pytest

from megatron_ledom.convert.hf_export import export_hf
from tests.support.tiny_runs import Record, TinyData, read_metrics, read_tensors, run_each_on_ranks, run_on_ranks

STEPS, HALF = 6, 3
FIRST_STEP, ANY_STEP = 1e-6, 1e-5
"""Relative tolerances in fp32: other layouts add in another order."""
MODEL = (
    *("model.num_layers=4", f"train.train_iters={STEPS}", f"checkpoint.save_interval={HALF}", f"train.eval_interval={STEPS}"),
    "train.eval_iters=2",
)
MODULES = ("model.mtp_num_layers=2", "model.mtp_loss_scaling_factor=0.5")
FACTOR = "model.mtp_loss_scaling_factor"
OTHER_FACTORS = (0.25, 1.0)
LAYOUTS = {
    "TP2 with sequence parallel": ("tensor_model_parallel_size=2", "sequence_parallel=true"),
    "PP2": ("pipeline_model_parallel_size=2",),
    "PP2 of 2 chunks": ("pipeline_model_parallel_size=2", "virtual_pipeline_model_parallel_size=2"),
    "DP2 with distributed optimizer": ("use_distributed_optimizer=true", "overlap_grad_reduce=true"),
    "full recompute": ("recompute_granularity=full", "recompute_method=uniform", "recompute_num_layers=1"),
}


def settings(data: TinyData, *more: str) -> list[str]:
    return [*MODEL, f"data.valid_sets={{held_out: [[1.0,{data.shard('reverse_valid')}]]}}", *more]


def numbers(record: Record) -> list[float]:
    return [record["lm_loss"], record["grad_norm"], *record["mtp_loss"].values()]


def check_equal(found: list[Record], expected: list[Record], first: int = 1) -> None:
    assert [record["iteration"] for record in found] == list(range(1, STEPS + 1))
    for record, wanted in zip(found[first - 1 :], expected[first - 1 :], strict=True):
        assert numbers(record) == pytest.approx(numbers(wanted), rel=FIRST_STEP if record["iteration"] == 1 else ANY_STEP)
    held_out, wanted_held_out = (one[-1]["validation"]["held_out"]["lm_loss"] for one in (found, expected))
    assert held_out == pytest.approx(wanted_held_out, rel=ANY_STEP)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("multi_token")


@pytest.fixture(scope="module")
def alone(data: TinyData, folder: Path) -> dict[Path, list[Record]]:
    """Runs in one process: without modules, and with them."""
    runs = {
        folder / "plain": settings(data),
        folder / "one": settings(data, *MODULES),
    }
    first = ("train.train_iters=1", "optimizer.lr_warmup_iters=0", MODULES[0])
    runs |= {folder / f"factor_{factor}": settings(data, *first, f"{FACTOR}={factor}") for factor in OTHER_FACTORS}
    runs[folder / "unmasked"] = settings(data, *first, MODULES[1], "data.eod_mask_loss=false")
    return run_each_on_ranks(data.config, runs, num_ranks=1)


@pytest.fixture(scope="module")
def layouts(data: TinyData, folder: Path) -> dict[Path, list[Record]]:
    runs = {
        folder / name.replace(" ", "_"): settings(data, *MODULES, *(f"parallel.{setting}" for setting in layout))
        for name, layout in LAYOUTS.items()
    }
    runs[folder / "resumed"] = settings(
        data, *MODULES, "parallel.pipeline_model_parallel_size=2", f"train.exit_interval={HALF}"
    )
    return run_each_on_ranks(data.config, runs, num_ranks=2)


def test_the_modules_train_with_the_model_and_their_losses_are_reported(alone: dict[Path, list[Record]], folder: Path) -> None:
    plain, found = alone[folder / "plain"], alone[folder / "one"]
    assert found[0]["lm_loss"] == plain[0]["lm_loss"]  # the modules change no weight of the model at the start
    assert found[0]["grad_norm"] != plain[0]["grad_norm"]
    assert found[-1]["lm_loss"] != plain[-1]["lm_loss"]
    assert all("mtp_loss" not in record for record in plain)
    assert [list(record["mtp_loss"]) for record in found] == [["1", "2"]] * STEPS
    assert all(found[-1]["mtp_loss"][module] < found[0]["mtp_loss"][module] for module in ("1", "2"))
    assert any(name.startswith("mtp.") for name in read_tensors(folder / "one"))


def test_the_gradient_is_that_of_the_language_loss_plus_factor_times_that_of_the_modules(
    alone: dict[Path, list[Record]], folder: Path
) -> None:
    """So its squared norm is a polynomial of degree 2 in the factor, which three factors decide and the fourth has to meet."""
    names = {0.0: "plain", 0.5: "one", **{factor: f"factor_{factor}" for factor in OTHER_FACTORS}}
    squares = {factor: alone[folder / name][0]["grad_norm"] ** 2 for factor, name in names.items()}
    known = [0.0, *OTHER_FACTORS]
    expected = np.polyval(np.polyfit(known, [squares[factor] for factor in known], 2), 0.5)
    assert squares[0.5] == pytest.approx(expected, rel=1e-4)
    assert squares[1.0] != pytest.approx(squares[0.0], rel=1e-2)


def test_masked_tokens_do_not_count_in_the_losses_of_the_modules(alone: dict[Path, list[Record]], folder: Path) -> None:
    every, found = (alone[folder / name][0] for name in ("unmasked", "one"))
    for module in ("1", "2"):
        assert every["mtp_loss"][module] != pytest.approx(found["mtp_loss"][module], rel=1e-6)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_trains_as_one_process(
    alone: dict[Path, list[Record]], layouts: dict[Path, list[Record]], folder: Path, name: str
) -> None:
    check_equal(layouts[folder / name.replace(" ", "_")], alone[folder / "one"])


def test_a_run_resumes_in_another_layout(
    data: TinyData, alone: dict[Path, list[Record]], layouts: dict[Path, list[Record]], folder: Path
) -> None:
    assert len(layouts[folder / "resumed"]) == HALF
    run_on_ranks(data.config, folder / "resumed", *settings(data, *MODULES))
    check_equal(read_metrics(folder / "resumed"), alone[folder / "one"])


def test_an_export_is_without_the_modules(
    alone: dict[Path, list[Record]], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    check = export_hf(str(folder / "one"), str(folder / "exported"))  # with the parity check
    assert check is not None
    assert "without the modules of model.mtp_num_layers=2" in caplog.text
    assert "mtp" not in (folder / "exported/config.json").read_text(encoding="utf-8")
