"""Muon trains the same model in every layout that megatron-core offers it, resumes bit for bit and is resharded.

The Newton-Schulz iterations are in fp32 here. In bf16, their default, layouts agree to its rounding only.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.tiny_runs import TinyData, curve, read_metrics, read_tensors, run_each_on_ranks, run_on_ranks, start_ranks

pytest.importorskip("emerging_optimizers", reason="emerging-optimizers needs Python 3.12")

STEPS, HALF = 20, 10
TOLERANCE = 1e-6
MUON = (
    "optimizer.optimizer=muon",
    "optimizer.muon_fp32_matmul_prec=highest",
    "optimizer.muon_extra_scale_factor=0.2",
    "model.num_layers=4",
    f"train.train_iters={STEPS}",
    f"checkpoint.save_interval={HALF}",
)
TP, PP, VPP = (f"parallel.{name}_model_parallel_size" for name in ("tensor", "pipeline", "virtual_pipeline"))
LAYOUTS = {
    "TP2 with sequence parallel": (2, [f"{TP}=2", "parallel.sequence_parallel=true"]),
    "PP2 of 2 chunks": (2, [f"{PP}=2", f"{VPP}=2"]),
    "DP2 with overlap": (2, ["parallel.overlap_grad_reduce=true"]),
}
RESHARDED = [("TP2 with sequence parallel", "PP2 of 2 chunks"), ("DP2 with overlap", "TP2 with sequence parallel")]
SLOW = {
    "TP2 PP2 with shared products": (4, [f"{TP}=2", f"{PP}=2", "optimizer.muon_tp_mode=distributed"]),
    "TP2 with shared products": (2, [f"{TP}=2", "optimizer.muon_tp_mode=distributed"]),
    "CP2": (2, ["parallel.context_parallel_size=2"]),
    "PP4": (4, [f"{PP}=4"]),
    "TP2 PP2": (4, [f"{TP}=2", f"{PP}=2"]),
    "TP2 DP2": (4, [f"{TP}=2"]),
}
BF16 = ("model.params_dtype=bf16", "optimizer.muon_fp32_matmul_prec=medium")


def train_each(data: TinyData, folder: Path, layouts: dict[str, tuple[int, list[str]]], *more: str) -> None:
    """Train each layout in its folder; layouts with the same number of ranks share one launch."""
    for num_ranks in sorted({count for count, _ in layouts.values()}):
        runs = {folder / name: [*MUON, *layout, *more] for name, (count, layout) in layouts.items() if count == num_ranks}
        run_each_on_ranks(data.config, runs, num_ranks=num_ranks)


@pytest.fixture(scope="module")
def whole(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run of one process."""
    run_dir = tmp_path_factory.mktemp("muon") / "whole"
    run_on_ranks(data.config, run_dir, *MUON)
    return run_dir


def check_equal(run_dir: Path, whole: Path) -> None:
    """Check that every step has the loss and the gradient norm of the run of one process."""
    found, expected = read_metrics(run_dir), read_metrics(whole)
    assert [record["iteration"] for record in found] == list(range(1, STEPS + 1))
    for one, other in zip(curve(found), curve(expected), strict=True):
        assert one == pytest.approx(other, rel=TOLERANCE)


def test_layouts_train_with_muon_as_one_process_and_reshard(data: TinyData, tmp_path: Path, whole: Path) -> None:
    """The first layout of each pair trains the first half, and the second one resumes it."""
    halves = {" to ".join(pair): pair for pair in RESHARDED}
    train_each(data, tmp_path, {name: LAYOUTS[first] for name, (first, _) in halves.items()}, f"train.exit_interval={HALF}")
    train_each(data, tmp_path, {name: LAYOUTS[second] for name, (_, second) in halves.items()})
    for name in halves:
        check_equal(tmp_path / name, whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more_layouts_train_with_muon_as_one_process(data: TinyData, tmp_path: Path, whole: Path, name: str) -> None:
    train_each(data, tmp_path, {name: SLOW[name]})
    check_equal(tmp_path / name, whole)


@pytest.mark.parametrize(
    "layout", [pytest.param([f"{PP}=4"], id="PP4"), pytest.param([f"{TP}=2", f"{PP}=2"], id="TP2 PP2", marks=pytest.mark.slow)]
)
def test_two_halves_with_muon_equal_the_whole_run_bit_for_bit(data: TinyData, tmp_path: Path, layout: list[str]) -> None:
    """In bf16, where main weights are saved too. The middle stages of PP4 have no matrix of AdamW: one of its groups is empty."""
    command, halves = [*MUON, *BF16, *layout], f"train.exit_interval={HALF}"
    run_each_on_ranks(data.config, {tmp_path / "whole": command, tmp_path / "halves": [*command, halves]}, num_ranks=4)
    run_on_ranks(data.config, tmp_path / "halves", *command, num_ranks=4)
    assert curve(read_metrics(tmp_path / "halves")) == curve(read_metrics(tmp_path / "whole"))
    found, wanted = read_tensors(tmp_path / "halves"), read_tensors(tmp_path / "whole")
    assert found.keys() == wanted.keys()
    assert any("momentum_buffer" in key for key in wanted)
    assert any("exp_avg_sq.embedding" in key for key in wanted)
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []


def note_matrices() -> None:
    """Write the names of the matrices of which this rank has a momentum into the run folder, after each step."""
    from megatron_ledom.training import trainer

    advance = trainer.TrainState.advance

    def noting(state: trainer.TrainState) -> None:
        advance(state)
        parts = getattr(state.optimizer.chained_optimizers[0], "chained_optimizers", state.optimizer.chained_optimizers[:1])
        kept = {id(main) for part in parts for main, values in part.optimizer.state.items() if "momentum_buffer" in values}
        weights = state.model[0].named_parameters()
        names = [name for name, weight in weights if id(getattr(weight, "main_param", weight)) in kept]
        assert len(names) == len(kept)
        Path(state.config.run_dir, f"matrices-{torch.distributed.get_rank()}.json").write_text(json.dumps(names))

    trainer.TrainState.advance = noting  # type: ignore[method-assign]


def matrices_of_ranks(run_dir: Path) -> list[set[str]]:
    """Return the names that `note_matrices` wrote, of each of two ranks."""
    return [set(json.loads((run_dir / f"matrices-{rank}.json").read_text())) for rank in range(2)]


LAYER_WISE = [*BF16[:1], "parallel.use_distributed_optimizer=true"]
OVERLAP = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true", "parallel.bucket_size=20000"]


def test_the_layer_wise_optimizer_trains_as_the_ordinary_one_and_resumes(data: TinyData, tmp_path: Path) -> None:
    """In bf16 losses of DP2 are equal to the last bit; sums of squares for the gradient norm have another order. Each matrix has its
    momentum on one of the ranks.

    The first half is resumed bit for bit by the same ranks, and also by one rank. The moving average has whole matrices too.
    """
    common, half = [*MUON, *LAYER_WISE, "optimizer.ema_decay=0.9"], f"train.exit_interval={HALF}"
    runs = {
        "ordinary": [*MUON, *BF16[:1], "optimizer.ema_decay=0.9"],
        "whole": common,
        "halves": [*common, half],
        "overlap": [*common, *OVERLAP],
    }
    run_each_on_ranks(data.config, {tmp_path / name: words for name, words in runs.items()}, num_ranks=2, hook=note_matrices)
    all_of_them = matrices_of_ranks(tmp_path / "ordinary")[0]
    assert len(all_of_them) == 4 * 4  # of a layer, times layers
    assert matrices_of_ranks(tmp_path / "ordinary")[1] == all_of_them
    for name in ("whole", "overlap"):
        first, second = matrices_of_ranks(tmp_path / name)
        assert first
        assert second
        assert first.isdisjoint(second)
        assert first | second == all_of_them
    shutil.copytree(tmp_path / "halves", tmp_path / "fewer")
    run_each_on_ranks(data.config, {tmp_path / "halves": common}, num_ranks=2)
    run_each_on_ranks(data.config, {tmp_path / "fewer": common}, num_ranks=1)
    ordinary, whole = (read_metrics(tmp_path / name) for name in ("ordinary", "whole"))
    assert [record["lm_loss"] for record in whole] == [record["lm_loss"] for record in ordinary]
    assert [norm for _, norm in curve(whole)] == pytest.approx([norm for _, norm in curve(ordinary)], rel=TOLERANCE)
    assert curve(read_metrics(tmp_path / "halves")) == curve(whole)
    for name in ("overlap", "fewer"):
        for one, other in zip(curve(read_metrics(tmp_path / name)), curve(whole), strict=True):
            assert one == pytest.approx(other, rel=1e-5), name
    found, wanted, plain = (read_tensors(tmp_path / name) for name in ("halves", "whole", "ordinary"))
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []
    momenta = [key for key in wanted if "momentum_buffer" in key]
    averages = [key for key in wanted if key.startswith("ema.")]
    assert momenta
    assert len(averages) == len([key for key in plain if key.startswith("ema.")])
    for key in [*momenta, *averages]:
        torch.testing.assert_close(wanted[key], plain[key], rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param([f"{TP}=2"], id="TP2 DP2"),
        pytest.param([f"{PP}=2"], id="PP2 DP2"),
        pytest.param(["parallel.context_parallel_size=2"], id="CP2 DP2"),
        pytest.param([], id="DP4"),
    ],
)
def test_the_layer_wise_optimizer_in_more_layouts(data: TinyData, tmp_path: Path, layout: list[str]) -> None:
    """With DP4 of one layer each rank has one matrix."""
    few = [*MUON, "train.train_iters=6", *([] if layout else ["model.num_layers=1"])]
    runs = {"ordinary": [*few, *BF16[:1], *layout], "layer_wise": [*few, *LAYER_WISE, *layout]}
    run_each_on_ranks(data.config, {tmp_path / name: words for name, words in runs.items()}, num_ranks=4)
    ordinary, found = (curve(read_metrics(tmp_path / name)) for name in runs)
    for one, other in zip(found, ordinary, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_a_resume_with_another_optimizer_is_refused(data: TinyData, tmp_path: Path, whole: Path) -> None:
    ranks = start_ranks(data.config, whole, f"train.train_iters={STEPS + 1}", "model.num_layers=4")
    assert ranks.wait() != [0]
    assert "has the state of optimizer.optimizer=muon, which adam cannot load" in ranks.output()
