"""Texts to train and test tokenizers: sources of the Python library, and lines in many scripts."""

import inspect
import json
import statistics
import sysconfig
import textwrap
from pathlib import Path

from megatron_ledom.tokenizers.sentencepiece_bpe import ODD_TEXTS

TEXT = inspect.getsource(textwrap)
TEXTS = [inspect.getsource(module) for module in (textwrap, statistics, inspect, json)]


def library_files(num_files: int) -> list[str]:
    """Return source files of the Python library, always the same ones."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [path.read_text(encoding="utf-8") for path in paths[:: max(1, len(paths) // num_files)]]
    assert len(texts) >= num_files
    return texts


FILES = library_files(40)
MULTILINGUAL = [text for text in ODD_TEXTS if not text.isascii()] * 20
