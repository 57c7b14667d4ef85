"""Muon trains the same model in every layout that megatron-core offers it, resumes bit for bit and is resharded.

The Newton-Schulz iterations are in fp32 here. In bf16, their default, layouts agree to its rounding only.
"""

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


def test_a_resume_with_another_optimizer_is_refused(data: TinyData, tmp_path: Path, whole: Path) -> None:
    ranks = start_ranks(data.config, whole, f"train.train_iters={STEPS + 1}", "model.num_layers=4")
    assert ranks.wait() != [0]
    assert "has the state of optimizer.optimizer=muon, which adam cannot load" in ranks.output()
