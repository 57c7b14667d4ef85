"""What the logits gate compares, what it asks for, what it has seen. It runs in `verify`, which is imported only to run it."""

import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig

from megatron_ledom.checkpoint.manifest import CheckpointManifest
from megatron_ledom.model.dtypes import PARAMS_DTYPES

log = logging.getLogger(__name__)

MAX_LOGIT_DIFFERENCE = 1e-4
"""fp32, absolute: what is allowed however little rounding does to the model."""
MIN_COSINE, MAX_KL = 0.999, 0.01
"""bf16, likewise: mean cosine of the logits of a position, mean divergence in nats."""
MAX_MEDIAN_KL = 1e-5
"""bf16, likewise, of the median position: a few positions where rounding tips a model over do not hide the others."""
NOISE_FACTOR = 4
"""Beyond that, how many times the stock model's own rounding error both sides may differ. Two exact computations whose roundings
are independent differ by about twice as much as one of them is off: 0.35 to 2.2 times was measured."""
How = Literal["auto", "whole", "layers"]
SKIPPED = (
    "the logits gate is skipped (--no-verify): nobody has compared what the two models compute; shapes and the tokenizer"
    " were checked"
)


@dataclass(frozen=True, slots=True)
class Gate:
    """What a passed gate has seen."""

    how: str
    positions: int
    largest_logit_difference: float
    """fp32, absolute."""
    bf16: dict[str, float] | None
    """Mean cosine, mean and median KL divergence in nats, share of equal argmax; the same, `stock_...`, of stock bf16 against
    stock fp32. None for fp32 weights."""
    limits: dict[str, float]
    """What was allowed for each figure."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Conversion:
    """Both sides of a conversion, in either direction."""

    checkpoint: str
    manifest: CheckpointManifest
    folder: str
    """With the Hugging Face weights; a config.json need not be there."""
    hf_config: PreTrainedConfig
    held: torch.dtype
    """Type that holds the folder's weights exactly."""

    @property
    def stored(self) -> torch.dtype:
        """Type of the checkpoint's weights."""
        return PARAMS_DTYPES[self.manifest.run_config(self.checkpoint).model.params_dtype]


def pass_gate(pair: Conversion, how: How | None) -> Gate | None:
    """Run the gate as `check_logits` does; with `how` None say that it is skipped."""
    if how is None:
        log.warning("%s", SKIPPED)
        return None
    from megatron_ledom.convert.verify import check_logits  # megatron-core and both models: seconds that only the gate needs

    return check_logits(pair, how)


def verification(gate: Gate | None) -> dict[str, Any] | None:
    """A gate's figures and limits for a card; None when it was skipped."""
    if gate is None:
        return None
    return {
        "how": gate.how,
        "positions": gate.positions,
        "largest_logit_difference": gate.largest_logit_difference,
        "bf16": gate.bf16,
        "seconds": gate.seconds,
        "limits": gate.limits,
    }
