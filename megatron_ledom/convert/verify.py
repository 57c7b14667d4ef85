"""The logits gate: an export counts only when it computes what the trained model computes."""

import logging
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from megatron_ledom.errors import VerificationError

log = logging.getLogger(__name__)

MAX_LOGIT_DIFFERENCE = 1e-4
ROWS, SEED = 4, 20250701


def check_logits(core_model: Any, folder: str, vocab_size: int, seq_length: int) -> float:
    """Compare the stock model in `folder` with the megatron-core model, both fp32, on fixed and random ids.

    Returns the largest absolute difference of a logit; raises VerificationError above MAX_LOGIT_DIFFERENCE.
    """
    ids = _probe_ids(vocab_size, min(seq_length, 128))
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    device = next(core_model.parameters()).device
    expected = core_model(ids.to(device), positions.to(device), None)[:, :, :vocab_size].float().cpu()
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    with torch.no_grad():
        found = stock(ids).logits
    difference = float((found - expected).abs().max())
    if not difference <= MAX_LOGIT_DIFFERENCE:
        position = int((found - expected).abs().amax((0, 2)).argmax())
        raise VerificationError(
            f"the export's logits differ from the trained model's by {difference:.3g} (at most {MAX_LOGIT_DIFFERENCE:g} is allowed,"
            f" largest at position {position}): nothing was written; a weight is mapped wrongly or the checkpoint is damaged"
        )
    log.info("logits gate passed: largest difference %.3g over %d positions", difference, ids.numel())
    return difference


def _probe_ids(vocab_size: int, length: int) -> torch.Tensor:
    """[ROWS, length]: one row of ascending ids, the others random from a fixed seed."""
    generator = torch.Generator().manual_seed(SEED)
    random_rows = torch.randint(0, vocab_size, (ROWS - 1, length), generator=generator)
    return torch.cat([torch.arange(length)[None] % vocab_size, random_rows])
