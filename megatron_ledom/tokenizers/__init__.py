"""Tokenizers: one reader of their files for all commands, exact conversions to tokenizer.json, and encoders."""

from typing import TYPE_CHECKING

from megatron_ledom.lazy import lazy_exports

if TYPE_CHECKING:
    from megatron_ledom.tokenizers.corpus_tokenizer import load_tokenizer

__all__ = ["load_tokenizer"]

__getattr__ = lazy_exports(
    __name__,
    {
        "megatron_ledom.tokenizers.corpus_tokenizer": ["load_tokenizer"],
    },
)
