"""The samples of a step: the same for any layout, and found at once from any position."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ledom.config.load import load_config
from megatron_ledom.data.dataset.batch import MicroBatchSampler, batch_iterators
from tests.support.legible import EOD_ID
from tests.support.tiny_runs import TinyData

SIZES = st.sampled_from([1, 2, 3, 4])


def steps(first: int, last: int, micro_batch_size: int, ranks: int, accumulation: int) -> list[list[int]]:
    """Return the sample ids of each step, of all ranks and micro-batches together."""
    samplers = [list(MicroBatchSampler(first, last, micro_batch_size, rank, ranks)) for rank in range(ranks)]
    assert {len(one) for one in samplers} == {len(MicroBatchSampler(first, last, micro_batch_size, 0, ranks))}
    micro_batches = list(zip(*samplers, strict=True))
    parts = [micro_batches[start : start + accumulation] for start in range(0, len(micro_batches), accumulation)]
    return [[sample for every in part for one in every for sample in one] for part in parts]


@settings(deadline=None)
@given(micro_batch_size=SIZES, ranks=SIZES, accumulation=SIZES, before=st.integers(0, 10**12), num_steps=st.integers(1, 5))
def test_a_step_is_the_next_samples_in_order_for_any_layout(
    micro_batch_size: int, ranks: int, accumulation: int, before: int, num_steps: int
) -> None:
    """After any number of consumed samples, even if it is not a multiple of this batch size."""
    batch = micro_batch_size * ranks * accumulation
    found = steps(before, before + num_steps * batch, micro_batch_size, ranks, accumulation)
    assert found == [list(range(before + step * batch, before + (step + 1) * batch)) for step in range(num_steps)]


@settings(deadline=None)
@given(layouts=st.lists(st.tuples(SIZES, SIZES, SIZES, st.integers(1, 3)), min_size=1, max_size=5))
def test_a_run_that_changes_its_layout_skips_nothing_and_repeats_nothing(layouts: list[tuple[int, ...]]) -> None:
    consumed, seen = 0, []
    for micro_batch_size, ranks, accumulation, num_steps in layouts:
        last = consumed + num_steps * micro_batch_size * ranks * accumulation
        seen += [sample for step in steps(consumed, last, micro_batch_size, ranks, accumulation) for sample in step]
        consumed = last
    assert seen == list(range(consumed))


class Ids(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Dataset whose sample k is the number k. It records the requested samples."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __getitem__(self, sample: int) -> dict[str, torch.Tensor]:
        self.asked.append(sample)
        return dict.fromkeys(("tokens", "labels", "loss_mask", "position_ids"), torch.tensor([sample]))


def groups(rank: int, ranks: int) -> Any:
    def group(rank: int, size: int) -> Any:
        return SimpleNamespace(rank=lambda: rank, size=lambda: size)

    return SimpleNamespace(data=group(rank, ranks), context=group(0, 1), virtual_stages=1)


def test_a_resume_reads_its_first_batch_and_nothing_before_it(data: TinyData) -> None:
    config, dataset, far = load_config(str(data.config), ["train.micro_batch_size=2"]), Ids(), 10**12
    batches = batch_iterators(config, dataset, far, far + 16, groups(1, 2), torch.device("cpu"), EOD_ID)[0]
    assert next(batches)["tokens"].flatten().tolist() == [far + 2, far + 3]
    assert dataset.asked == [far + 2, far + 3]


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_reading_processes_changes_nothing(data: TinyData, workers: int, tmp_path: Path) -> None:
    found = []
    for num_workers in (0, workers):
        config = load_config(str(data.config), ["train.micro_batch_size=2", f"data.num_workers={num_workers}"])
        batches = batch_iterators(config, Ids(), 24, 64, groups(0, 2), torch.device("cpu"), EOD_ID)[0]
        found.append([batch["tokens"].flatten().tolist() for batch in batches])
    assert found[0] == found[1] == [[start, start + 1] for start in range(24, 64, 4)]
