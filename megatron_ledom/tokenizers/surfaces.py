"""The bytes that each id of a tokenizer spells, and where words begin, read from its tokenizer.json."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from megatron_ledom.reversal_units import WordPieces

WORD_MARK = "▁"  # SentencePiece's visible space


def steps_of(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield the single steps of a normalizer, pre-tokenizer or decoder; nested sequences are flattened."""
    if step is None:
        return
    if step["type"] != "Sequence":
        yield step
        return
    for inner in next(value for value in step.values() if isinstance(value, list)):
        yield from steps_of(inner)


def surfaces_of(stored: Mapping[str, Any], vocab: Mapping[str, int]) -> dict[int, bytes] | None:
    """Return the bytes of each id for byte-level and SentencePiece-like tokenizers; None for others, which only `decode`.

    stored: the object of the tokenizer.json. vocab: all of its tokens with their ids.
    """
    steps = list(steps_of(stored.get("decoder")))
    kinds = {step["type"] for step in steps}
    added = {token["id"]: token["content"] for token in stored.get("added_tokens") or []}
    if "ByteLevel" in kinds:
        alphabet = _byte_alphabet()
        read = {id_: bytes(alphabet.get(c, 0x3F) for c in piece) for piece, id_ in vocab.items()}
    elif "Metaspace" in kinds or any(s["type"] == "Replace" and s["pattern"] == {"String": WORD_MARK} for s in steps):
        has_bytes = "ByteFallback" in kinds
        read = {id_: _piece_bytes(piece, has_bytes) for piece, id_ in vocab.items()}
    else:
        return None
    return read | {id_: content.encode() for id_, content in added.items()}


def word_pieces(surfaces: Mapping[int, bytes], vocab_size: int) -> WordPieces:
    """Return where words begin, for each id below `vocab_size`. surfaces: the bytes of each id."""
    begins, blank, capital, joins = (np.zeros(vocab_size, np.bool_) for _ in range(4))
    for id_, spelled in surfaces.items():
        text = spelled.decode("utf-8", "replace")
        word = text.lstrip()
        begins[id_] = len(word) < len(text)
        blank[id_] = text != "" and not word
        capital[id_] = word[:1].isupper() or word[:1].istitle()
        joins[id_] = word[-1:].isalnum()
    return WordPieces(begins, blank, capital, joins)


def _piece_bytes(piece: str, has_bytes: bool) -> bytes:
    if has_bytes and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(WORD_MARK, " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each visible character that byte-level BPE writes for the 256 bytes (GPT-2's table)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(others)}
