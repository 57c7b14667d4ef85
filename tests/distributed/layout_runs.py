"""Run many layouts of a tiny model, several in one launch, and compare each with one process."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.layouts import GLOBAL_BATCH, Layout
from tests.distributed.traffic import count_traffic, read_traffic
from tests.support.tiny_runs import Record, TinyData, curve, run_each_on_ranks

STEPS = {"fp32": 20, "bf16": 8}
FIRST_STEP = {"fp32": 1e-6, "bf16": 5e-4}
"""Relative tolerances of loss and gradient norm at step 1: other layouts add in another order."""
ANY_STEP = {"fp32": 1e-5, "bf16": 5e-3}
LOSS_OF_ANY_STEP = {"fp32": 1e-5, "bf16": 5e-4}
MODEL = (
    "model.num_attention_heads=8",
    f"train.global_batch_size={GLOBAL_BATCH}",
    "data.allow_repeats=true",
    "parallel.distributed_timeout_minutes=2",
    "train.watchdog_seconds=100",
)
"""The model has heads for eight tensor-parallel ranks, more than its two key-value heads."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The differences between a layout's run and one process."""

    first: float
    """Relative difference at step 1, the larger of loss and gradient norm."""
    worst: float
    """Largest such difference of all steps."""
    worst_loss: float
    """Largest relative difference of a loss."""
    traffic: dict[str, int]
    """Bytes that the busiest rank sends per step, by kind and operation."""


def prepare_ranks() -> None:
    """Count, as a hook of ranks, the bytes they send, and save no checkpoints, which have their own tests."""
    from megatron_ledom.training import trainer

    trainer.save_checkpoint = lambda state: None
    count_traffic()


def settings(dtype: str, steps: int | None = None) -> list[str]:
    """Return the overrides of all runs of a data type; `steps` instead of STEPS."""
    return [*MODEL, f"model.params_dtype={dtype}", f"train.train_iters={steps or STEPS[dtype]}"]


def differences(found: Sequence[Record], expected: Sequence[Record]) -> list[tuple[float, float]]:
    """Return the relative differences of loss and gradient norm, for each step."""
    pairs = zip(curve(found), curve(expected), strict=True)
    return [(abs(one[0] / other[0] - 1), abs(one[1] / other[1] - 1)) for one, other in pairs]


def run_layouts(
    data: TinyData, folder: Path, layouts: Sequence[Layout], dtype: str = "fp32", seconds: float = 120, steps: int | None = None
) -> dict[Layout, list[Record]]:
    """Run layouts of one number of ranks in `folder / dtype / layout.name`, and return their records."""
    folder = folder / dtype
    folder.mkdir(parents=True, exist_ok=True)
    runs = {folder / layout.name: [*settings(dtype, steps), *layout.overrides()] for layout in layouts}
    (num_ranks,) = {layout.num_ranks for layout in layouts}
    records = run_each_on_ranks(data.config, runs, num_ranks=num_ranks, hook=prepare_ranks, seconds=seconds)
    return {layout: records[folder / layout.name] for layout in layouts}


def run_references(
    data: TinyData, folder: Path, layouts: Sequence[Layout], dtype: str = "fp32", steps: int | None = None
) -> dict[int, list[Record]]:
    """Run one process without recompute, and return its records by number of layers."""
    references = {}
    for layers in sorted({layout.num_layers for layout in layouts}):
        (folder / dtype).mkdir(parents=True, exist_ok=True)
        run_dir = folder / dtype / f"one process of {layers} layers"
        overrides = [*settings(dtype, steps), f"model.num_layers={layers}"]
        references[layers] = run_each_on_ranks(data.config, {run_dir: overrides}, num_ranks=1, hook=prepare_ranks)[run_dir]
    return references


def compare(found: Sequence[Record], expected: Sequence[Record], run_dir: Path) -> Outcome:
    """Return the differences between a run and one process."""
    assert [record["iteration"] for record in found] == [record["iteration"] for record in expected]
    different = differences(found, expected)
    worst_loss = max(loss for loss, _ in different)
    return Outcome(max(different[0]), max(map(max, different)), worst_loss, read_traffic(run_dir))


def violations(layout: Layout, outcome: Outcome, dtype: str) -> list[str]:
    """Return the tolerances that a layout exceeds."""
    limits = {
        "step 1": (outcome.first, FIRST_STEP),
        "any step": (outcome.worst, ANY_STEP),
        "any loss": (outcome.worst_loss, LOSS_OF_ANY_STEP),
    }
    exceeded = {name: value for name, (value, limit) in limits.items() if not value <= limit[dtype]}
    return [f"{layout.name} in {dtype}, {name}: {value:.1e}" for name, value in exceeded.items()]
