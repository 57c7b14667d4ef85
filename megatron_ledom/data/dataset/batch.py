"""Batches of one data-parallel rank. The samples of a step depend only on the step, never on the layout.

Shape letters: b micro-batch, s positions of a sample on this rank, T all positions of a sample.
"""

import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from megatron_ledom.config.schema import RunConfig
from megatron_ledom.parallel.groups import ParallelGroups

Batch = dict[str, torch.Tensor]
"""tokens, labels, loss_mask, position_ids [b, s]. With isolated documents also attention_mask: the document of each position [b, T].
With `train.auxiliary.kind` also sample: all tokens and the last label [b, T + 1]."""

FIELDS = ("tokens", "labels", "loss_mask", "position_ids")


class MicroBatchSampler:
    """Sample ids of each micro-batch of one data-parallel rank. It can begin at any sample, without any history.

    A global batch begins where the one before it ends. Within it, micro-batch m of rank r is the micro_batch_size samples from
    position (m * data_parallel_size + r) * micro_batch_size. Every global batch has whole rounds of micro-batches of all ranks, so
    the order of the samples is the same for every size, and for a schedule of sizes.
    """

    def __init__(self, first: int, last: int, micro_batch_size: int, rank: int, num_ranks: int) -> None:
        self.first, self.last = first, last
        self.micro_batch_size, self.rank, self.num_ranks = micro_batch_size, rank, num_ranks

    def __iter__(self) -> Iterator[list[int]]:
        stride = self.micro_batch_size * self.num_ranks
        for start in range(self.first, self.last, stride):
            mine = start + self.rank * self.micro_batch_size
            yield list(range(mine, mine + self.micro_batch_size))

    def __len__(self) -> int:
        return (self.last - self.first) // (self.micro_batch_size * self.num_ranks)


def batch_iterators(
    config: RunConfig, dataset: Any, first: int, last: int, groups: ParallelGroups, device: torch.device, eod_id: int
) -> list[Iterator[Batch]]:
    """Return an iterator of micro-batches for each model chunk of this rank, over the samples [first, last) of all ranks."""
    return [_batches(config, dataset, first, last, groups, device, eod_id) for _ in range(groups.virtual_stages)]


def _batches(
    config: RunConfig, dataset: Any, first: int, last: int, groups: ParallelGroups, device: torch.device, eod_id: int
) -> Iterator[Batch]:
    data = groups.data
    sampler = MicroBatchSampler(first, last, config.train.micro_batch_size, data.rank(), data.size())
    workers = config.data.num_workers
    loader: DataLoader[Batch] = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=_outlive_sigterm,
        generator=torch.Generator(),  # the loader draws a seed when it starts, which must not change the state of dropout
    )
    for sample in loader:
        batch = {name: sample[name] for name in FIELDS}
        documents = document_numbers(batch["tokens"], eod_id) if config.data.reset_attention_mask else None
        whole = {}
        if config.train.auxiliary.kind is not None:
            whole["sample"] = torch.cat([batch["tokens"], batch["labels"][:, -1:]], 1)
        batch = context_part(batch, groups.context.rank(), groups.context.size())
        if documents is not None:
            whole["attention_mask"] = documents  # for the positions of all ranks, because attention spans the whole sequence
        yield {name: value.to(device, non_blocking=True) for name, value in {**batch, **whole}.items()}


def _outlive_sigterm(worker: int) -> None:
    """Ignore SIGTERM. A batch system sends it to every process, but the reader must work until its rank has saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def document_numbers(tokens: torch.Tensor, eod_id: int) -> torch.Tensor:
    """Return the number of each position's document in its sample, from 0 [b, s]. An eod is the last position of its document."""
    ends = (tokens == eod_id).to(torch.int32)
    return ends.cumsum(1, dtype=torch.int32) - ends


def context_part(batch: Batch, rank: int, num_ranks: int) -> Batch:
    """Return the positions of a context-parallel rank: chunks `rank` and `2 num_ranks - 1 - rank` of 2 num_ranks, for balance."""
    if num_ranks == 1:
        return batch
    parts = {name: value.chunk(2 * num_ranks, 1) for name, value in batch.items()}
    return {name: torch.cat([part[rank], part[2 * num_ranks - 1 - rank]], 1) for name, part in parts.items()}
