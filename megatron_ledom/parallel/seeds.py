"""Random states. Nothing random depends on history: each is a function of the run's seed and of what it is for."""

import torch
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_ledom.parallel.groups import ParallelGroups

STEP_STRIDE = 100_000_007
"""Distance between the seeds of two iterations; larger than any rank's offset, and prime."""


def seed_iteration(seed: int, iteration: int, groups: ParallelGroups) -> None:
    """Set every random state for one iteration, so that dropout after a resume equals the uninterrupted run's.

    Ranks of one pipeline stage and data-parallel replica share a state; megatron-core adds the tensor-parallel rank
    where it must differ.
    """
    base = (seed + iteration * STEP_STRIDE) % 2**31 + 100 * groups.pipeline.rank() + 7919 * groups.data_and_context.rank()
    torch.manual_seed(base)
    model_parallel_cuda_manual_seed(base)
