"""Corrections of megatron-core for every machine. Each docstring states the correction, then the problem without it.

`CORRECTIONS` lists them, each with the versions that need it and the test that proves it.
"""

import functools
import io
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import optimizer as core_optimizer
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.optimizer import optimizer as core_optimizer_classes
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import mappings
from megatron.core.utils import local_multi_tensor_l2_norm
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from megatron_ledom.errors import LedomError, cannot_write
from megatron_ledom.platform.adam import GroupStepAdam, find_apex
from megatron_ledom.platform.core_state import SaveResults, restricted_module
from megatron_ledom.platform.core_versions import Correction, apply_needed, replace_results_queue, replace_save_common
from megatron_ledom.storage.files import write_synced

_LOAD_BYTES = DefaultLoadPlanner.load_bytes


def _run_no_code_of_checkpoints() -> None:
    """Load only tensors and plain objects from checkpoints.

    torch unpickles a checkpoint's list of tensors, and objects among the tensors, and so runs any code that a file names.
    Now a restricted reader loads the list, and torch's `weights_only` loader the objects.
    """
    filesystem.pickle = restricted_module()  # type: ignore[assignment, attr-defined]
    DefaultLoadPlanner.load_bytes = _load_bytes_restricted  # type: ignore[method-assign]


def _load_bytes_restricted(self: Any, read_item: Any, value: io.BytesIO) -> None:
    """Load the bytes with `weights_only` first, as for common.pt, because torch's own method accepts everything.

    Transformer Engine's layers keep their state as bytes in a BytesIO, which they load with `weights_only` as well.
    """
    with torch.serialization.safe_globals([io.BytesIO]):
        torch.load(value, map_location="cpu", weights_only=True)
    value.seek(0)
    _LOAD_BYTES(self, read_item, value)


def _fix_torch_adam() -> None:
    """Replace torch's AdamW and unusable apex: the distributed optimizer can save the state of the former but not load it.

    Without Transformer Engine and apex, megatron-core uses torch's AdamW, which keeps `step` with the parameters; loading
    expects it in the groups. megatron-core also uses any package called apex: NVIDIA's without a GPU, or another one.
    """
    from_apex = core_optimizer.Adam.__module__.partition(".")[0] == "apex"
    if core_optimizer.USING_PYTORCH_OPTIMIZER or (from_apex and not (find_apex().usable and torch.cuda.is_available())):
        core_optimizer.Adam = distrib_optimizer.Adam = GroupStepAdam
        core_optimizer.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True


def _join_tensors_of_a_gradient() -> None:
    """Compute norm and clipping for all tensors at once.

    Without Transformer Engine and apex, megatron-core waits for the GPU after the norm of each tensor, and clipping copies each
    tensor. torch's foreach kernels process a list of tensors in a few launches, without waiting.
    """
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = norm_of_all
        clip_grads.multi_tensor_scale_impl = core_optimizer_classes.multi_tensor_scale_impl = scale_all


def use_optimizer_kernels(
    adam: type[GroupStepAdam] | None, norm: Callable[..., Any] | None, scale: Callable[..., Any] | None
) -> str:
    """Give megatron-core our Adam, norm and scaling in place of torch's. Returns the kernels of its optimizer, for the log."""
    if adam is not None and core_optimizer.Adam is GroupStepAdam:
        core_optimizer.Adam = distrib_optimizer.Adam = adam
    if norm is not None and clip_grads.l2_norm_impl is norm_of_all:
        clip_grads.l2_norm_impl = norm
        clip_grads.multi_tensor_scale_impl = core_optimizer_classes.multi_tensor_scale_impl = scale
    in_use = {"adamw": core_optimizer.Adam, "norm": clip_grads.l2_norm_impl, "scale": clip_grads.multi_tensor_scale_impl}
    return " ".join(f"{name}={_maker(function)}" for name, function in in_use.items())


def _maker(function: Any) -> str:
    """Return the origin of a function or class: `cuda` for our kernels, `torch`, or the name of another package."""
    if function in (GroupStepAdam, norm_of_all, scale_all):
        return "torch"
    package = str(getattr(function, "__module__", "")).partition(".")[0]
    return "cuda" if package == "megatron_ledom" else package


def norm_of_all(
    chunk_size: int, noop_flag: torch.Tensor, tensor_lists: list[list[torch.Tensor]], per_tensor: bool
) -> tuple[torch.Tensor, None]:
    """Return the norm of all tensors [1], and None in place of the norm of each, as apex's multi_tensor_l2norm does."""
    norms = torch._foreach_norm(tensor_lists[0])
    return torch.linalg.vector_norm(torch.stack(norms).float()).view(1), None


def scale_all(chunk_size: int, noop_flag: torch.Tensor, tensor_lists: list[list[torch.Tensor]], scale: float) -> None:
    """Set the second list to the first times `scale`, as apex's multi_tensor_scale does."""
    sources, targets = tensor_lists
    if any(source is not target for source, target in zip(sources, targets, strict=True)):
        torch._foreach_copy_(targets, sources)
    if scale != 1.0:
        torch._foreach_mul_(targets, float(scale))


def _keep_save_results_in_memory() -> None:
    """Replace the queue for the results of a save, so that a save after SIGTERM does not hang for ever.

    The queue runs in its own process, which the first save starts. Batch systems send SIGTERM to all processes of a job, and
    the signal ends the process of the queue.
    """
    replace_results_queue(SaveResults)


def _agree_on_common_state() -> None:
    """Report an error of `common.pt` to all ranks: otherwise the others wait until the timeout if rank 0 cannot write it."""
    replace_save_common(save_common)


def save_common(common_state: dict[str, Any], folder: str) -> None:
    """Write the small state that is equal on all ranks: on disk on return, or an error on every rank.

    Rank 0 writes through a Python file, because torch's own file loses the reason of an error.
    """
    failure: list[LedomError | None] = [None]
    if dist.get_rank() == 0:
        path = os.path.join(folder, COMMON_STATE_FNAME)
        content = io.BytesIO()
        torch.save(common_state, content)
        try:
            write_synced(path, content.getvalue())
        except OSError as error:
            failure = [cannot_write(error, path)]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise failure[0]


def _fix_padded_buckets() -> None:
    """Save the distributed optimizer's state without a shift if several buckets are padded.

    The gathered tensor of a save omits the padding at the end of each bucket, but the parameters' offsets in
    `param_index_map` include it. So every parameter after the first padded bucket is saved from a wrong position, without an
    error. During a save the offsets are now those without padding.
    """
    original = DistributedOptimizer.sharded_param_state_fully_reshardable

    @functools.wraps(original)
    def _without_padding(self: Any, *args: Any, **kwargs: Any) -> Any:
        kept = [buffer.param_index_map for buffer in self.buffers]
        for buffer in self.buffers:
            dropped, padding_before = 0, []
            for bucket in buffer.buckets:
                padding_before.append(dropped)
                dropped += bucket.grad_data.numel() - bucket.numel_unpadded
            buffer.param_index_map = {
                param: (start - padding_before[index], end - padding_before[index], index)
                for param, (start, end, index) in buffer.param_index_map.items()
            }
        try:
            return original(self, *args, **kwargs)
        finally:
            for buffer, index_map in zip(self.buffers, kept, strict=True):
                buffer.param_index_map = index_map

    DistributedOptimizer.sharded_param_state_fully_reshardable = _without_padding


def _reduce_every_memory_layout() -> None:
    """Return the sum of tensor-parallel ranks also for a tensor that is not contiguous.

    Before 0.19 megatron-core sums a contiguous copy of such a tensor and returns the tensor itself: this rank's own values,
    without an error.
    """
    original = mappings._reduce
    mappings._reduce = lambda input_, group: original(input_.contiguous(), group)


_HAZARDS = "tests/distributed/test_hazards.py"
CORRECTIONS = {
    "padded buckets": Correction(
        _fix_padded_buckets, f"{_HAZARDS}::test_optimizer_state_of_padded_buckets_is_saved_at_its_position"
    ),
    "sums of all memory layouts": Correction(
        _reduce_every_memory_layout, f"{_HAZARDS}::test_ranks_sum_a_tensor_that_is_not_contiguous", before=(0, 19)
    ),
    "torch's Adam": Correction(
        _fix_torch_adam, f"{_HAZARDS}::test_the_distributed_optimizer_cannot_load_the_state_of_torchs_adam"
    ),
    "joined gradient tensors": Correction(  # without it a run is slower, not wrong
        _join_tensors_of_a_gradient,
        "tests/unit/platform/test_core_fixes.py::test_the_optimizer_uses_joined_kernels",
    ),
    "save results in memory": Correction(
        _keep_save_results_in_memory,
        "tests/distributed/test_crash_safe_save.py::test_signals_end_a_save_whose_results_are_in_a_process",
    ),
    "common state": Correction(
        _agree_on_common_state,
        "tests/distributed/test_crash_safe_save.py::test_a_full_disk_for_the_common_state_is_an_error_on_all_ranks",
        before=(0, 19),
    ),
    "restricted unpickling": Correction(
        _run_no_code_of_checkpoints,
        "tests/distributed/test_crafted_checkpoints.py::test_a_crafted_checkpoint_runs_code_without_the_correction",
    ),
}


@functools.cache
def install_core_fixes() -> None:
    """Make the corrections that the installed megatron-core needs, once per process."""
    apply_needed(CORRECTIONS)
