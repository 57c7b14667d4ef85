"""The parity check: a conversion fails unless the logits of both models agree.

Small models are compared whole, others one layer at a time. The comparison in fp32 decides. bf16 weights are compared in bf16
too, because the model will be used in bf16. If weights have outliers, rounding alone changes the logits a lot. The limit is then
a multiple of the effect of rounding on the stock model for the same ids.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from transformers import PreTrainedConfig

from megatron_ledom.checkpoint.manifest import CheckpointManifest
from megatron_ledom.config.derived import padded_vocab_size
from megatron_ledom.convert.diagnosis import explain, walk
from megatron_ledom.convert.stock_side import StockSide
from megatron_ledom.errors import VerificationError
from megatron_ledom.model.arithmetic import count_parameters
from megatron_ledom.model.dtypes import PARAMS_DTYPES

if TYPE_CHECKING:
    from megatron_ledom.convert.core_side import CoreSide

log = logging.getLogger(__name__)

MAX_LOGIT_DIFFERENCE = 1e-4
"""Limit of the absolute difference in fp32 for models on which rounding has little effect."""
MIN_COSINE, MAX_KL = 0.999, 0.01
"""Limits in bf16, as means over positions: cosine similarity of the logits, and KL divergence in nats."""
MAX_MEDIAN_KL = 1e-5
"""Limit of the median KL divergence in bf16, in nats, which a few positions with large rounding errors do not change."""
NOISE_FACTOR = 4
"""Allowed difference of the models as a multiple of the rounding error of the stock model, where that is above the limits.
Two correct computations with independent rounding differ by about twice the error of one; 0.35 to 2.2 times was measured."""
VerifyMode = Literal["auto", "whole", "layers"]
SKIPPED = (
    "the parity check is skipped (--no-verify): the logits of the two models were not compared; only shapes and the tokenizer"
    " were checked"
)
ROWS, SEED, LENGTH = 4, 20250701, 128
WHOLE_BELOW = 2**29
"""Largest size of both models in fp32, in bytes, at which they are compared whole. It is half of the memory that a conversion
may use in addition to its imports and its largest file."""


@dataclass(frozen=True, slots=True)
class ParityCheck:
    """The results of a passed parity check, as in export.json and import.json."""

    how: str
    positions: int
    largest_logit_difference: float
    """Absolute difference in fp32."""
    bf16: dict[str, float] | None
    """Mean cosine, mean and median KL divergence in nats, fraction of positions with equal argmax. None for fp32 weights.
    `stock_...`: the same values for the stock model in bf16, compared with fp32."""
    seconds: float
    limits: dict[str, float]
    """Limit of each value."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """The two models of a conversion: the checkpoint and the Hugging Face folder."""

    checkpoint: str
    manifest: CheckpointManifest
    folder: str
    """Folder with the Hugging Face weights. It needs no config.json."""
    hf_config: PreTrainedConfig
    folder_dtype: torch.dtype
    """Type that represents the weights of the folder exactly."""
    ema: bool = False
    """True if the folder has the moving average of the checkpoint's weights."""

    @property
    def checkpoint_dtype(self) -> torch.dtype:
        """Type of the weights in the checkpoint."""
        return PARAMS_DTYPES[self.manifest.run_config(self.checkpoint).model.params_dtype]


def run_parity_check(pair: Conversion, how: VerifyMode | None) -> ParityCheck | None:
    """Run `check_logits`; with `how` None, log that the check is skipped and return None."""
    if how is None:
        log.warning("%s", SKIPPED)
        return None
    return check_logits(pair, how)


def check_logits(pair: Conversion, how: VerifyMode) -> ParityCheck:
    """Compare the stock model of a folder with the megatron-core model of a checkpoint on fixed and random ids.

    `auto` compares whole models if both together have at most WHOLE_BELOW bytes in fp32. Raises VerificationError with the
    first layer and weight that differ and the likely cause.
    """
    started = time.monotonic()
    config, vocab_size = pair.manifest.run_config(pair.checkpoint), pair.manifest.provenance.vocab_size
    if how == "auto":
        padded = padded_vocab_size(vocab_size, config.model.make_vocab_size_divisible_by)
        how = "whole" if 8 * count_parameters(config.model, padded) <= WHOLE_BELOW else "layers"
    ids = probe_ids(vocab_size, min(config.data.seq_length, LENGTH))
    expected, found = _logits(pair, ids, torch.float32, how)
    difference, limit = _check_fp32(pair, ids, how, expected, found)
    positions = {"whole": "whole models", "layers": "layer by layer"}[how]
    log.info("parity check passed: largest difference %.3g in fp32 over %d positions, %s", difference, ids.numel(), positions)
    bf16, limits = None, {"largest_logit_difference": limit}
    if pair.checkpoint_dtype is torch.bfloat16:
        bf16, allowed = _check_bf16(*_logits(pair, ids, torch.bfloat16, how), found)
        limits |= allowed
    return ParityCheck(positions, ids.numel(), difference, bf16, round(time.monotonic() - started, 2), limits)


def _check_fp32(
    pair: Conversion, ids: torch.Tensor, how: str, expected: torch.Tensor, found: torch.Tensor
) -> tuple[float, float]:
    """Return the largest difference of logits [B, S, V] and its limit. Raises VerificationError with the likely cause."""
    by_position = (found - expected).abs().amax(-1)
    difference, limit = float(by_position.max()), MAX_LOGIT_DIFFERENCE
    if difference <= limit:
        return difference, limit
    noise = (found - _stock_logits(pair, ids, torch.float64, how)).abs().amax(-1)
    limit = max(limit, NOISE_FACTOR * float(noise.max()))
    median, median_limit = float(by_position.median()), NOISE_FACTOR * float(noise.median())
    if difference <= limit and median <= median_limit:
        log.warning(
            "the logits differ by %.3g in fp32; rounding to fp32 alone changes those of the stock model by %.3g",
            difference,
            noise.max(),
        )
        return difference, limit
    cause = _explain(pair, ids, how)
    raise VerificationError(
        f"the logits differ by {difference:.3g} in fp32 (limit {limit:.3g}), at the median position by {median:.3g}"
        f" (rounding to fp32 alone: {noise.median():.3g}); nothing was written; {cause}"
    )


def _check_bf16(expected: torch.Tensor, found: torch.Tensor, exact: torch.Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """Return the similarity of core and stock logits in bf16, and its limits.

    The limits depend on the effect of bf16 on the stock model, whose logits in fp32 are `exact`. Raises VerificationError.
    """
    similarity, own = _similarity(expected, found), _similarity(exact, found)
    limits = {
        "mean_cosine": min(MIN_COSINE, 1 - NOISE_FACTOR * (1 - own["mean_cosine"])),
        "mean_kl_nats": max(MAX_KL, NOISE_FACTOR * own["mean_kl_nats"]),
        "median_kl_nats": max(MAX_MEDIAN_KL, NOISE_FACTOR * own["median_kl_nats"]),
    }
    values = similarity | {f"stock_{name}": value for name, value in own.items()}
    log.info("in bf16: %s", ", ".join(f"{name} {value:.6g}" for name, value in values.items()))
    above = [name for name in ("mean_kl_nats", "median_kl_nats") if not similarity[name] <= limits[name]]
    below = [] if similarity["mean_cosine"] >= limits["mean_cosine"] else ["mean_cosine"]
    if above or below:
        problems = ", ".join(f"{name} {similarity[name]:.6g} (limit {limits[name]:.6g})" for name in (*below, *above))
        raise VerificationError(
            f"the logits agree in fp32 but not in bf16: {problems}; bf16 alone changes the logits of the stock model by"
            f" {own['mean_kl_nats']:.6g} nats on the same ids (cosine {own['mean_cosine']:.6g}), so rounding does not explain it;"
            " nothing was written; use fp32 for this model"
        )
    return values, limits


def probe_ids(vocab_size: int, length: int) -> torch.Tensor:
    """Return ids [ROWS, length]: one row of ascending ids, then random rows with a fixed seed; one begins with the last id."""
    generator = torch.Generator().manual_seed(SEED)
    random_rows = torch.randint(0, vocab_size, (ROWS - 1, length), generator=generator)
    random_rows[0, 0] = vocab_size - 1
    return torch.cat([torch.arange(length)[None] % vocab_size, random_rows])


def _logits(pair: Conversion, ids: torch.Tensor, dtype: torch.dtype, how: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits [B, S, V] of the core model and of the stock model."""
    with _sides(pair, dtype, how) as (core, stock):
        if how == "layers":
            return walk(core, stock, ids)[:2]
        return core.forward(ids), stock.forward(ids)


def _stock_logits(pair: Conversion, ids: torch.Tensor, dtype: torch.dtype, how: str) -> torch.Tensor:
    """Return the logits [B, S, V] of the stock model."""
    with torch.no_grad():
        stock = _stock_side(pair, dtype, how)
        if how == "whole":
            return stock.forward(ids)
        hidden = stock.embed(ids)
        for index in range(stock.config.num_hidden_layers):
            with stock.layer(index) as layer:
                hidden = stock.run_layer(layer, hidden)
        return stock.head(stock.final_norm(hidden))


def _explain(pair: Conversion, ids: torch.Tensor, how: str) -> str:
    with _sides(pair, torch.float32, how) as (core, stock):
        return explain(core, stock, walk(core, stock, ids)[2])


@contextmanager
def _sides(pair: Conversion, dtype: torch.dtype, how: str) -> Iterator[tuple["CoreSide", StockSide]]:
    """Yield both models, without gradients."""
    from megatron_ledom.convert.core_side import core_side  # importing megatron-core takes seconds

    with core_side(pair.checkpoint, pair.manifest, dtype=dtype, whole=how == "whole", ema=pair.ema) as core:
        yield core, _stock_side(pair, dtype, how)


def _stock_side(pair: Conversion, dtype: torch.dtype, how: str) -> StockSide:
    vocab_size = pair.manifest.provenance.vocab_size
    return StockSide(
        *(pair.folder, pair.hf_config, vocab_size),
        folder_dtype=pair.folder_dtype,
        dtype=dtype,
        checkpoint_dtype=pair.checkpoint_dtype,
        whole=how == "whole",
    )


def _similarity(expected: torch.Tensor, found: torch.Tensor) -> dict[str, float]:
    cosine = torch.nn.functional.cosine_similarity(found, expected, dim=-1)
    ours, theirs = found.log_softmax(-1), expected.log_softmax(-1)
    divergence = (theirs.exp() * (theirs - ours)).sum(-1)
    return {
        "mean_cosine": float(cosine.mean()),
        "mean_kl_nats": float(divergence.mean()),
        "median_kl_nats": float(divergence.median()),
        "argmax_agreement": float((found.argmax(-1) == expected.argmax(-1)).float().mean()),
    }
