"""A tiny folder like that of the published reverse 7B: stock Llama, tokenizer.model, code for it, no tokenizer.json."""

import json
import os
import pty
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from megatron_ledom.tokenizers.sentencepiece_bpe import EOD_TOKEN, ODD_TEXTS, SPECIALS, train
from tests.support.tiny_models import CORPUS, FRAGMENTS, random_text, tiny_config

NUM_PIECES = 420
EOD_ID = NUM_PIECES + SPECIALS.index(EOD_TOKEN)
"""Corresponds to 64002 in the published folder."""
NUM_ROWS = 448
"""The published folder has 64,256 rows for 64,005 ids."""
CODE = """
import pathlib
pathlib.Path({mark!r}).touch()
from transformers import LlamaConfig as OwnConfig
from transformers import LlamaForCausalLM as OwnModel
from transformers import LlamaTokenizer as OwnTokenizer
"""


@cache
def sentencepiece_model() -> bytes:
    """Return a SentencePiece BPE of 420 pieces and the five specials."""
    return train([*CORPUS, *FRAGMENTS, "  two  spaces\n\n   three   of them"] * 3, NUM_PIECES)


def published_folder(folder: Path, *, with_code: bool = True, **changed: Any) -> Path:
    """Write the folder. If any of its code runs, it creates a file `ran` there. `changed`: keys of config.json."""
    torch.manual_seed(7)
    model = LlamaForCausalLM(tiny_config(NUM_ROWS, bos_token_id=1, eos_token_id=2))
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    tokenizer: dict[str, Any] = {
        "tokenizer_class": "OwnTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    config = json.loads((folder / "config.json").read_text()) | changed
    if with_code:
        (folder / "tokenization_own.py").write_text(CODE.format(mark=str(folder / "ran")))
        tokenizer["auto_map"] = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
        config["auto_map"] = {
            "AutoConfig": "tokenization_own.OwnConfig",
            "AutoModelForCausalLM": "tokenization_own.OwnModel",
            "AutoTokenizer": ["tokenization_own.OwnTokenizer", None],
        }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def texts(num: int) -> list[str]:
    """Return texts in many scripts, with spaces and newlines at their ends and special tokens spelled out."""
    rng = random.Random(0)
    leading = ["", " ", "  ", "\n", "\n\n ", "\t"]
    return [*ODD_TEXTS, *(rng.choice(leading) + random_text(rng) for _ in range(num - len(ODD_TEXTS)))]


@contextmanager
def terminal_that_answers_yes() -> Iterator[Any]:
    """Yield a pseudo terminal, as a text file to read, at which a user has answered `y` to every prompt."""
    master, slave = pty.openpty()
    os.write(master, b"y\n" * 8)
    with os.fdopen(slave, encoding="utf-8") as terminal:
        yield terminal
    os.close(master)
