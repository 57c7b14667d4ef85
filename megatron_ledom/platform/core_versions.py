"""Everything that differs between the supported versions of megatron-core. No other module compares versions.

`SUPPORTED` lists the pairs of Python and megatron-core that CI tests. 0.17 and newer need Python 3.12. 0.17 and 0.18 work there
too; they are tested by hand.
"""

import functools
import importlib.util
import logging
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from megatron_ledom.errors import UsageError

SUPPORTED = {(3, 11): "0.16.1", (3, 12): "0.19.2", (3, 13): "0.19.2"}
"""Python -> the megatron-core that the tests run with. `constraints/` pins it."""
OLDEST, TOO_NEW = (0, 16, 1), (0, 20)
"""The oldest megatron-core that works, and the first one that nobody has tried."""
MUON_CORE = (0, 19)
"""First megatron-core whose Muon this package uses: earlier ones build it otherwise, and have no settings of the coefficients."""
MUON_PACKAGE, MUON_TOO_NEW = (0, 3), (0, 4)
"""The tested version of emerging-optimizers, which has the Newton-Schulz iterations, and the first that nobody has tried."""
ANNOUNCED = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",  # 0.19; DECISIONS.md says what HybridModel would change
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",  # 0.17
    "megatron.core.dist_checkpointing.strategies.common": "load_common is deprecated",  # 0.19
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",  # 0.18
}
"""Logger -> start of a message about a later version of megatron-core, on which the user of a run cannot act."""


@dataclass(frozen=True, slots=True)
class Correction:
    """A change of megatron-core: the function that makes it, the versions that need it, and the proof that they still do.

    proof: id of a test that removes the correction, and then sees the problem in the versions that need it.
    before: the first version that does not need it; TOO_NEW if every supported version does.
    """

    apply: Callable[[], None]
    proof: str
    before: tuple[int, ...] = TOO_NEW

    def is_needed(self) -> bool:
        """Return True if the installed version needs the correction."""
        return core_version() < self.before


def apply_needed(corrections: dict[str, Correction]) -> None:
    """Make the corrections that the installed version needs, in order."""
    for correction in corrections.values():
        if correction.is_needed():
            correction.apply()


@functools.cache
def core_version() -> tuple[int, ...]:
    """Return the installed version as numbers, such as (0, 19, 2). Raises UsageError if megatron-core is not installed."""
    try:
        text = metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        raise UsageError(f"megatron-core is not installed; {_how_to_install()}") from None
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def check_core() -> None:
    """Raise UsageError if megatron-core cannot be used here. Call before importing it: its own error would not say why."""
    found = core_version()
    if not OLDEST <= found < TOO_NEW:
        newest = f"{TOO_NEW[0]}.{TOO_NEW[1] - 1}"
        raise UsageError(f"found megatron-core {_text(found)}, expected {_text(OLDEST)} to {newest}; {_how_to_install()}")
    if found >= (0, 18) and importlib.util.find_spec("triton") is None:
        raise UsageError(
            f"megatron-core {_text(found)} imports the package triton without requiring it, and triton is not installed: pip install"
            " triton; a CUDA build of torch brings it"
        )


def check_muon() -> None:
    """Raise UsageError if optimizer.optimizer=muon cannot be used here: it needs megatron-core 0.19 and emerging-optimizers."""
    if core_version() < MUON_CORE:
        python = ".".join(map(str, sys.version_info[:2]))
        raise UsageError(
            f"optimizer.optimizer=muon needs megatron-core {_text(MUON_CORE)} or newer, found {_text(core_version())} on Python {python};"
            " use Python 3.12 or newer, which has it, or optimizer.optimizer=adam"
        )
    try:
        found = tuple(int(part) for part in re.findall(r"\d+", metadata.version("emerging-optimizers"))[:2])
    except metadata.PackageNotFoundError:
        found = ()
    if not MUON_PACKAGE <= found < MUON_TOO_NEW:
        raise UsageError(
            f"optimizer.optimizer=muon needs the package emerging-optimizers {_text(MUON_PACKAGE)}, found {_text(found) or 'none'}: pip"
            " install 'megatron-ledom[muon]', or use optimizer.optimizer=adam"
        )


def core_text() -> str:
    """Return the installed version as a text for messages, such as "megatron-core 0.19.2"."""
    return f"megatron-core {_text(core_version())}"


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _how_to_install() -> str:
    tested = SUPPORTED.get(sys.version_info[:2])
    if tested is None:
        pythons = ", ".join(f"{major}.{minor}" for major, minor in SUPPORTED)
        return f"use one of Python {pythons}, on which this package is tested"
    return f"this package is tested with {tested} on this Python: pip install megatron-core=={tested}"


def quiet_announcements() -> None:
    """Suppress megatron-core's messages about its own later versions. Its other warnings stay."""
    for logger, text in ANNOUNCED.items():
        logging.getLogger(logger).addFilter(functools.partial(_says_other, text))


def _says_other(text: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(text)


def frees_sent_outputs() -> bool:
    """Return True if a pipeline stage may free an output once it is sent (`deallocate_pipeline_outputs`).

    Before 0.18 interleaved stages with overlapped communication freed memory that was still being sent, and so trained on
    the numbers of other tensors.
    """
    return core_version() >= (0, 18)


def save_options() -> dict[str, str]:
    """Return the options of `dist_checkpointing.save` that select megatron-core's own asynchronous writer.

    From 0.17 the default is the writer of nvidia-resiliency-ext, another package.
    """
    return {} if core_version() < (0, 17) else {"async_strategy": "mcore"}


def replace_results_queue(queue: Callable[[], Any]) -> None:
    """Make megatron-core's writer build its queue of results by `queue`."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if core_version() < (0, 17):
        filesystem_async._get_write_results_queue = queue
    else:
        filesystem_async.get_write_results_queue = lambda mp_mode="spawn": queue()


def replace_save_common(write: Callable[[dict[str, Any], str], None]) -> None:
    """Make `dist_checkpointing.save` write the state that is equal on all ranks by `write(state, folder)`, as common.pt.

    0.16 has a class for it, 0.17 and 0.18 a function. Not for 0.19, which stores that state among the tensors, where earlier
    versions do not find it: there, `take_common_state` removes it again and the caller writes it.
    """
    from megatron.core.dist_checkpointing import serialization

    if core_version() < (0, 17):
        from megatron.core.dist_checkpointing.strategies import base, common

        strategy = common.TorchCommonSaveStrategy("torch", 1)
        strategy.save_common = write
        base.register_default_strategy(base.StrategyAction.SAVE_COMMON, "torch", 1, strategy)
    else:
        serialization.save_common = write


def needs_common_file() -> bool:
    """Return True if a load needs common.pt. 0.19 also finds the common state among the tensors."""
    return core_version() < (0, 19)


def take_common_state(sharded_state: dict[str, Any]) -> dict[str, Any] | None:
    """Remove and return the common state that 0.19 puts among the tensors of a save; None in earlier versions."""
    if core_version() < (0, 19):
        return None
    common: dict[str, Any] = sharded_state.pop("common_state").data
    return common


def mlp_submodules(layer: Any) -> Any:
    """Return the submodules of the MLP of a layer's spec: from 0.18 they are an argument of a partial."""
    mlp = layer.submodules.mlp
    return mlp.submodules if core_version() < (0, 18) else mlp.keywords["submodules"]


def mtp_loss_key() -> str:
    """Return the key of the losses in megatron-core's tracker of multi-token prediction."""
    return "values" if core_version() < (0, 17) else "loss_values"
