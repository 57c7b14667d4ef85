"""A byte-level BPE tokenizer, trained on a module of the Python library."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.support.source_texts import TEXT


def byte_level_bpe(vocab_size: int, added: Sequence[AddedToken], normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """Return a tokenizer of `vocab_size` tokens, and the added ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_tokens(list(added))
    return tokenizer


def write_byte_level_bpe(
    folder: Path, vocab_size: int, added: Sequence[AddedToken], normalizer: normalizers.Normalizer | None = None
) -> str:
    """Write the tokenizer.json of `byte_level_bpe` into a new folder and return its path."""
    folder.mkdir()
    byte_level_bpe(vocab_size, added, normalizer).save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")
