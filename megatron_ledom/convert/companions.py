"""What stands beside the weights of an exported folder: tokenizer, generation config, the cards, and config.json, the last."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig

from megatron_ledom.convert.hf_config import build_generation_config, read_object
from megatron_ledom.convert.hf_folder import write_synced
from megatron_ledom.data.tokenizer import without_local
from megatron_ledom.errors import DataError, MismatchError
from megatron_ledom.provenance import Provenance, vocabulary_hash

log = logging.getLogger(__name__)

TOKENIZER = "tokenizer"
"""Folder in a run folder."""
CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"


def run_tokenizer(checkpoint: str, provenance: Provenance) -> str:
    """The folder of the run's copy of its tokenizer. Raises DataError without one, MismatchError if it is another one."""
    folder = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(checkpoint))), TOKENIZER)
    if not os.path.isdir(folder):
        raise DataError(
            f"{folder} is missing, so the export would have no tokenizer: set data.tokenizer in the run's config and start the run"
            " once more (it copies the tokenizer and goes on), or copy the tokenizer folder there"
        )
    file = Path(folder, "tokenizer.json")
    found = vocabulary_hash(file.read_bytes()) if file.is_file() else "none"
    if found != provenance.tokenizer_sha256:
        raise MismatchError(
            f"{file} has hash {found[:12]}, the run was trained with {provenance.tokenizer_sha256[:12]}: the export's ids would"
            " mean other texts; put the tokenizer there that the shards were made with"
        )
    return folder


def write_companions(folder: str, tokenizer: str, provenance: Provenance) -> None:
    """Everything but weights, cards and config.json. Raises DataError when stock transformers would not stop at the eod."""
    build_generation_config(provenance).save_pretrained(folder)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    if (config := Path(folder, TOKENIZER_CONFIG)).is_file():  # a run of an earlier release may hold paths in it
        kept = json.dumps(without_local(read_object(str(config))), indent=2, ensure_ascii=False)
        write_synced(str(config), kept.encode())
    loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if loaded.eos_token_id != provenance.eod_id:
        raise DataError(
            f"the tokenizer in {tokenizer} has eos id {loaded.eos_token_id}, the run was trained with eod {provenance.eod_id}:"
            " generation would never stop; put the run's own tokenizer there"
        )


def write_config(folder: str, name: str, hf_config: PreTrainedConfig) -> None:
    """What becomes config.json, without which no folder loads: call it when all else is written and checked."""
    write_synced(os.path.join(folder, name), hf_config.to_json_string().encode())


def write_cards(folder: str, name: str, card: dict[str, Any]) -> None:
    """The verification card: `name` as JSON, VERIFICATION.md for people."""
    write_synced(os.path.join(folder, name), (json.dumps(card, indent=2, allow_nan=False) + "\n").encode())
    write_synced(os.path.join(folder, "VERIFICATION.md"), _as_markdown(card).encode())


def _as_markdown(card: dict[str, Any]) -> str:
    gate = card["verification"]
    lines = ["# How this conversion was verified", ""]
    if gate is None:
        lines += [
            "**It was not**: the logits gate was skipped with `--no-verify`. Nobody has compared what both models compute.",
            "",
        ]
    else:
        lines += [
            f"Logits of the megatron-core model and of stock transformers were compared {gate['how'].replace('_', ' ')} at"
            f" {gate['positions']} positions of fixed and random ids.",
            "",
            "| figure | value | limit |",
            "|---|---|---|",
            f"| largest difference of a logit, fp32 | {gate['largest_logit_difference']:.3g} |"
            f" {gate['limits']['largest_logit_difference']:g} |",
        ]
        for key, value in (gate["bf16"] or {}).items():
            lines.append(f"| {key.replace('_', ' ')}, bf16 | {value:.6g} | {gate['limits'].get(key, 'none')} |")
        lines.append("")
    lines += ["| | |", "|---|---|"]
    shown = [(key, value) for key, value in card.items() if isinstance(value, str | int | float | None)]
    lines += [f"| {key.replace('_', ' ')} | {value} |" for key, value in shown]
    for title in ("versions", "files"):
        lines += ["", f"| {title} | |", "|---|---|", *(f"| {key} | {value} |" for key, value in card[title].items())]
    return "\n".join(lines) + "\n"
