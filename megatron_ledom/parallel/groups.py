"""Process groups and random states of a run. Only this module uses megatron-core's global group state.

Random states do not depend on earlier steps: each is a function of the run's seed and of its purpose.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_ledom.config.schema import ParallelConfig
from megatron_ledom.parallel.rendezvous import Rendezvous, StopSignal
from megatron_ledom.platform.device import Platform
from megatron_ledom.platform.launch import Launch, read_launch


@dataclass(frozen=True, slots=True)
class ParallelGroups:
    """The process groups of this rank."""

    collection: ProcessGroupCollection
    tensor: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    context: dist.ProcessGroup
    data: dist.ProcessGroup
    data_and_context: dist.ProcessGroup
    virtual_stages: int
    """Number of model chunks of this rank; 1 without the interleaved schedule."""

    def has_first_stage(self, chunk: int) -> bool:
        """Return True if this rank's model chunk has the embedding."""
        return self.pipeline.rank() == 0 and chunk == 0

    def has_last_stage(self, chunk: int) -> bool:
        """Return True if this rank's model chunk has the output layer and the loss."""
        return self.pipeline.rank() == self.pipeline.size() - 1 and chunk == self.virtual_stages - 1


def start_distributed(
    platform: Platform, parallel: ParallelConfig, launch: Launch | None = None, stop: StopSignal = lambda: None
) -> ParallelGroups:
    """Join the process group of all launched ranks and make the tensor, pipeline, context and data groups.

    launch: this rank and the rendezvous address; by default read from the launcher's variables.
    stop: returns the name of a received stop signal; called while ranks are missing.
    Raises StoppedWaiting after a signal, TransientError with the missing ranks at the timeout.
    """
    launch = launch or read_launch()
    _join(platform, launch, timedelta(minutes=parallel.distributed_timeout_minutes), stop)
    parallel_state.initialize_model_parallel(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
        create_gloo_process_groups=False,
        **(nccl_options(parallel) if platform.backend == "nccl" else {}),
    )
    collection = ProcessGroupCollection.use_mpu_process_groups()
    return ParallelGroups(
        collection=collection,
        tensor=collection.tp,
        pipeline=collection.pp,
        context=collection.cp,
        data=parallel_state.get_data_parallel_group(),
        data_and_context=parallel_state.get_data_parallel_group(with_context_parallel=True),
        virtual_stages=parallel.virtual_pipeline_model_parallel_size or 1,
    )


def _join(platform: Platform, launch: Launch, timeout: timedelta, stop: StopSignal) -> None:
    """Join the process group of all ranks."""
    alone = launch.init_method is None
    dist.init_process_group(
        platform.backend,
        store=dist.HashStore() if alone else Rendezvous(launch, timeout, stop).store(),  # type: ignore[attr-defined]
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timeout,
        device_id=platform.device if platform.device.type == "cuda" and not alone else None,
    )


def nccl_options(parallel: ParallelConfig) -> dict[str, Any]:
    """Return the settings of NCCL's communicators; gloo has none. Not yet run on hardware."""
    return {
        "nccl_communicator_config_path": parallel.nccl_communicator_config_path,
        "high_priority_stream_groups": list(parallel.high_priority_stream_groups),
        "use_sharp": parallel.use_sharp,
    }


def wait_for_all_ranks() -> None:
    """Wait until every rank has called this function."""
    dist.barrier()


def stop_distributed() -> None:
    """Leave all process groups, if there are any."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


STEP_STRIDE = 100_000_007
"""Distance between the seeds of two iterations: a prime, larger than the offset of any rank."""


def seed_iteration(seed: int, iteration: int, groups: ParallelGroups) -> None:
    """Set every random state for one iteration, so that dropout after a resume equals that of an uninterrupted run.

    Ranks that differ only in their tensor-parallel rank share a state; megatron-core adds that rank where states must differ.
    """
    base = (seed + iteration * STEP_STRIDE) % 2**31 + 100 * groups.pipeline.rank() + 7919 * groups.data_and_context.rank()
    torch.manual_seed(base)
    model_parallel_cuda_manual_seed(base)
