"""Hooks that remove one guard of this package in the ranks of a run, so that a test sees the error that it prevents."""

import os
import tempfile
from contextlib import nullcontext
from typing import Any

from megatron_ledom.platform.core_versions import Correction


def without(name: str) -> None:
    """Remove one correction of megatron-core, by its name in `core_fixes.CORRECTIONS` or `core_on_cpu.REPLACEMENTS`."""
    from megatron_ledom.platform import core_fixes, core_on_cpu

    table = core_fixes.CORRECTIONS if name in core_fixes.CORRECTIONS else core_on_cpu.REPLACEMENTS
    del table[name]


def _change_core_config(**changes: Any) -> None:
    from megatron_ledom.model import builder

    build = builder.build_core_config

    def changed(config: Any) -> Any:
        core_config = build(config)
        for name, value in changes.items():
            assert hasattr(core_config, name)
            setattr(core_config, name, value)
        return core_config

    builder.build_core_config = changed  # type: ignore[assignment]


def batched_p2p() -> None:
    """Let interleaved stages communicate as those of the plain pipeline do, megatron-core's default."""
    _change_core_config(overlap_p2p_comm=False, batch_p2p_comm=True)


def deallocated_outputs() -> None:
    """Let stages free an output once they have sent it, as megatron-core's documentation recommends."""
    _change_core_config(deallocate_pipeline_outputs=True)


def stale_weights() -> None:
    """Read weights without waiting for those that other ranks have updated."""
    from megatron_ledom.callbacks import validation as validate
    from megatron_ledom.checkpoint import store

    store.gathered_weights = validate.gathered_weights = lambda model: nullcontext()  # type: ignore[assignment]


def _sharding(kind: str | None) -> None:
    from megatron_ledom.model import builder
    from megatron_ledom.training import state

    metadata = builder.checkpoint_metadata

    def changed(groups: Any) -> dict[str, Any]:
        values = metadata(groups)
        values.pop("distrib_optim_sharding_type")
        return values if kind is None else {**values, "distrib_optim_sharding_type": kind}

    state.checkpoint_metadata = changed  # type: ignore[assignment]


def default_sharding() -> None:
    """Leave megatron-core's default format for the distributed optimizer's state."""
    _sharding(None)


def data_parallel_sharding() -> None:
    """Save the distributed optimizer's state as the ranks store it."""
    _sharding("dp_reshardable")


def no_compiler() -> None:
    """Simulate a machine without a C++ compiler and without a cache of compiled code."""
    from torch._inductor import config

    config.cpp.cxx = ("no-such-compiler",)  # type: ignore[assignment]
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()


def fused_activation() -> None:
    """Use SwiGLU as one function, which is compiled at its first call, on a machine without a compiler."""
    no_compiler()
    _change_core_config(bias_activation_fusion=True)


_INTERLEAVED = "tests/distributed/test_hazards.py::test_interleaved_stages_train_another_model_without_the_guard"
GUARDS = {
    "no batched p2p": Correction(batched_p2p, _INTERLEAVED),
    "outputs kept": Correction(deallocated_outputs, _INTERLEAVED, before=(0, 18)),
}
"""Settings of `model.builder` that avoid an error of megatron-core. `apply` removes the guard."""
