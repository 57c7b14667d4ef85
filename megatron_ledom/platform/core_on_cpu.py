"""Patches that let megatron-core run on a machine without CUDA. With CUDA none of them is applied.

megatron-core, 0.16 to 0.19, uses CUDA by name in its training path: streams, `device="cuda"`, pinned memory, the CUDA random state
and tensor type names. This module replaces each with its CPU equivalent until the process ends, so that the rest of the
package and megatron-core itself are the same on both kinds of machine.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import optimizer as core_optimizer
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.optimizer import optimizer as core_optimizer_classes
from megatron.core.tensor_parallel import layers as core_layers
from megatron.core.tensor_parallel import random as core_random

from megatron_ledom.platform.core_versions import Correction, apply_needed
from megatron_ledom.platform.cpu_ops import find_cpu_ops

CPU = torch.device("cpu")
FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "zeros_like", "empty_like")


class _NoStream:
    """Replaces a CUDA stream or event; on a CPU everything runs in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


class _WeightGradients:
    """Replaces the CUDA extension that adds a weight's gradient to its fp32 sum without a temporary tensor."""

    ELEMENTS = 1 << 16  # elements of a bf16 gradient converted at once; they fit in the cache

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: torch.Tensor, gradients: torch.Tensor, main_grad: torch.Tensor) -> None:
        """Compute main_grad [out, in] += gradients [n, out]^T @ inputs [n, in]."""
        if inputs.dtype == main_grad.dtype:
            main_grad.addmm_(gradients.t(), inputs)
            return
        sums, more = main_grad.view(-1), torch.mm(gradients.t(), inputs).view(-1)
        kernels = find_cpu_ops().module
        if kernels is not None and more.dtype == torch.bfloat16 and sums.dtype == torch.float32:
            kernels.add_into(True, sums.data_ptr(), more.data_ptr(), sums.numel())
            return
        for start in range(0, sums.numel(), _WeightGradients.ELEMENTS):
            part = slice(start, start + _WeightGradients.ELEMENTS)
            sums[part].add_(more[part])


def _replace_weight_gradients() -> None:
    core_layers.fused_weight_gradient_mlp_cuda = _WeightGradients  # absent without CUDA
    core_layers._grad_accum_fusion_available = True


def _replace_cuda_calls() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.empty_cache = lambda: None
    cuda.Stream = cuda.Event = _NoStream
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _NoStream()
    cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()
    cuda.manual_seed = torch.default_generator.manual_seed  # torch.manual_seed would call this again, in an endless loop
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _replace_cuda_devices() -> None:
    """Make tensor factories accept `device="cuda"`. They are patched, because a TorchFunctionMode is off in the backward pass."""

    def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(factory)
        def _build(*args: Any, **kwargs: Any) -> torch.Tensor:
            if str(kwargs.get("device")).startswith("cuda"):
                kwargs["device"] = CPU
            kwargs.pop("pin_memory", None)
            return factory(*args, **kwargs)

        return _build

    # The first device context stores the factories that all later ones redirect. It must store the originals; otherwise
    # `with torch.device("meta")`, which transformers uses to load a model, leaves garbage in buffers.
    with torch.device(CPU):
        torch.empty(0)
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]


class _CpuRandomStates(core_random.CudaRNGStatesTracker):  # type: ignore[misc]
    """Tracks the random state of the CPU generator, so that dropout repeats with every kind of recomputation."""

    _current_state_name: str

    @contextlib.contextmanager
    def fork(self, name: str = core_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        """Use the named random state of the generator in the context."""
        outer, outer_name = torch.get_rng_state(), self._current_state_name
        torch.set_rng_state(self.states_[name])
        self._current_state_name = name
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outer)
            self._current_state_name = outer_name


def _replace_random_state() -> None:
    core_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    core_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    core_random.CudaRNGStatesTracker = _CpuRandomStates


@contextlib.contextmanager
def _cuda_type_names() -> Iterator[None]:
    """Give CPU tensors CUDA type names in the context: the optimizer compares with 'torch.cuda.FloatTensor'."""
    original = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the type name of a CUDA tensor, also if the context is nested."""
        answer = original(self, *args, **kwargs)
        named = args or kwargs or answer.startswith("torch.cuda.")  # by an outer context
        return answer if named else answer.replace("torch.", "torch.cuda.")

    torch.Tensor.type = type_name  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.type = original  # type: ignore[method-assign]


def _with_cuda_type_names(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _cuda_type_names():
            return function(*args, **kwargs)

    return call


def _replace_optimizer_parts() -> None:
    for build in ("_get_megatron_optimizer_based_on_param_groups", "_get_megatron_emerging_optimizer"):
        if hasattr(core_optimizer, build):  # the second, for Muon, is new in 0.19
            setattr(core_optimizer, build, _with_cuda_type_names(getattr(core_optimizer, build)))
    clip = _with_cuda_type_names(clip_grads.clip_grad_by_total_norm_fp32)
    clip_grads.clip_grad_by_total_norm_fp32 = core_optimizer_classes.clip_grad_by_total_norm_fp32 = clip
    for name in ("load_parameter_state_from_dp_reshardable", "load_parameter_state_from_fully_reshardable"):
        load = getattr(distrib_optimizer.DistributedOptimizer, name)  # writes into views of fp32 leaves
        setattr(distrib_optimizer.DistributedOptimizer, name, torch.no_grad()(load))


_PROOF = "tests/distributed/test_hazards.py::test_a_run_on_a_cpu_needs_each_replacement"
REPLACEMENTS = {
    "cuda calls": Correction(_replace_cuda_calls, _PROOF),
    "cuda devices": Correction(_replace_cuda_devices, _PROOF),
    "random state": Correction(_replace_random_state, _PROOF),
    "optimizer parts": Correction(_replace_optimizer_parts, _PROOF),
    "weight gradients": Correction(_replace_weight_gradients, _PROOF),
}


@functools.cache
def install_core_on_cpu() -> None:
    """Replace every CUDA call of megatron-core's training path with its CPU equivalent, once per process."""
    apply_needed(REPLACEMENTS)
