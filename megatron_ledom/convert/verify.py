"""The logits gate: a conversion counts only when both sides compute the same.

Whole models where both are small, else one layer of each at a time. fp32 decides; for bf16 weights the
two are compared in bf16 as well, as they will be used.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_ledom.config.derived import padded_vocab_size
from megatron_ledom.convert.core_side import CoreSide, core_side
from megatron_ledom.convert.diagnosis import explain, walk
from megatron_ledom.convert.gate import MAX_KL, MAX_LOGIT_DIFFERENCE, MIN_COSINE, Conversion, Gate, How
from megatron_ledom.convert.stock_side import StockSide
from megatron_ledom.errors import VerificationError
from megatron_ledom.model.arithmetic import count_parameters

log = logging.getLogger(__name__)

ROWS, SEED, LENGTH = 4, 20250701, 128
WHOLE_BELOW = 2**29
"""Bytes: beside the imports, half of what a conversion may take besides its largest file."""


def check_logits(pair: Conversion, how: How) -> Gate:
    """Compare the stock model of a folder with the megatron-core model of a checkpoint on fixed and random ids.

    `auto` takes whole models when both in fp32 have at most WHOLE_BELOW bytes together. Raises VerificationError that names
    the first layer and weight that differ, and the likely cause.
    """
    started = time.monotonic()
    config, vocab_size = pair.manifest.run_config(pair.checkpoint), pair.manifest.provenance.vocab_size
    if how == "auto":
        padded = padded_vocab_size(vocab_size, config.model.make_vocab_size_divisible_by)
        how = "whole" if 8 * count_parameters(config.model, padded) <= WHOLE_BELOW else "layers"
    ids = probe_ids(vocab_size, min(config.data.seq_length, LENGTH))
    expected, found = _logits(pair, ids, torch.float32, how)
    difference = float((found - expected).abs().max())
    if not difference <= MAX_LOGIT_DIFFERENCE:
        cause = _explain(pair, ids, how)
        raise VerificationError(
            f"the logits differ by {difference:.3g} (at most {MAX_LOGIT_DIFFERENCE:g} is allowed, in fp32), nothing was written;"
            f" {cause}"
        )
    bf16 = None
    if pair.stored is torch.bfloat16:
        bf16 = _likeness(*_logits(pair, ids, torch.bfloat16, how))
    gate = Gate({"whole": "whole models", "layers": "layer by layer"}[how], ids.numel(), difference, bf16, 0.0)
    log.info("logits gate passed: largest difference %.3g in fp32 over %d positions, %s", difference, ids.numel(), gate.how)
    if bf16 is not None:
        log.info("in bf16: %s", ", ".join(f"{name} {value:.6g}" for name, value in bf16.items()))
        if not (bf16["mean_cosine"] >= MIN_COSINE and bf16["mean_kl_nats"] <= MAX_KL):
            raise VerificationError(
                f"the logits agree in fp32 (to {difference:.3g}) but not in bf16: {bf16}, expected a cosine of at least {MIN_COSINE}"
                f" and a divergence of at most {MAX_KL}; nothing was written: keep such a model in fp32"
            )
    return Gate(gate.how, gate.positions, difference, bf16, round(time.monotonic() - started, 2))


def probe_ids(vocab_size: int, length: int) -> torch.Tensor:
    """[ROWS, length]: one row of ascending ids, the others random from a fixed seed, the last id among them."""
    generator = torch.Generator().manual_seed(SEED)
    random_rows = torch.randint(0, vocab_size, (ROWS - 1, length), generator=generator)
    random_rows[0, 0] = vocab_size - 1
    return torch.cat([torch.arange(length)[None] % vocab_size, random_rows])


def _logits(pair: Conversion, ids: torch.Tensor, dtype: torch.dtype, how: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, S, V] of the core and of the stock model."""
    with _sides(pair, dtype, how) as (core, stock):
        if how == "layers":
            return walk(core, stock, ids)[:2]
        return core.forward(ids), stock.forward(ids)


def _explain(pair: Conversion, ids: torch.Tensor, how: str) -> str:
    with _sides(pair, torch.float32, how) as (core, stock):
        return explain(core, stock, walk(core, stock, ids)[2])


@contextmanager
def _sides(pair: Conversion, dtype: torch.dtype, how: str) -> Iterator[tuple[CoreSide, StockSide]]:
    """Both models; no gradients."""
    whole, vocab_size = how == "whole", pair.manifest.provenance.vocab_size
    with core_side(pair.checkpoint, pair.manifest, dtype=dtype, whole=whole) as core:
        stock = StockSide(pair.folder, pair.hf_config, vocab_size, held=pair.held, dtype=dtype, stored=pair.stored, whole=whole)
        yield core, stock


def _likeness(expected: torch.Tensor, found: torch.Tensor) -> dict[str, float]:
    cosine = torch.nn.functional.cosine_similarity(found, expected, dim=-1)
    ours, theirs = found.log_softmax(-1), expected.log_softmax(-1)
    divergence = (theirs.exp() * (theirs - ours)).sum(-1)
    return {
        "mean_cosine": float(cosine.mean()),
        "mean_kl_nats": float(divergence.mean()),
        "argmax_agreement": float((found.argmax(-1) == expected.argmax(-1)).float().mean()),
    }
