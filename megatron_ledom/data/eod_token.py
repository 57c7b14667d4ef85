"""The token that ends documents must come of no text: a document would end in its middle.

Spelled out in a text it is text. A tokenizer.json does that for special tokens only, so an eod of another kind is made a special
token before texts are encoded; hash and exported files stay those of the tokenizer as it is. See `tokenizers.end_token`.
Where a tokenizer makes the eod of its spelling all the same, packing finds it and the record is a bad one.
"""

import re
from dataclasses import dataclass
from typing import Any

import orjson

from megatron_ledom.data.engines import HubEngine, PieceEngine, ReferenceEngine
from megatron_ledom.errors import UsageError
from megatron_ledom.tokenizers.end_token import json_with_special
from megatron_ledom.tokenizers.sentencepiece_bpe import SPACE, parse_model

BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True, slots=True)
class Encoders:
    """What texts are encoded with: the reference engine, and the forms of which faster engines are made."""

    engine: ReferenceEngine
    tokenizer_json: bytes
    stored: dict[str, Any] | None
    """The object of the tokenizer.json, where it was that which was loaded."""
    model: bytes | None
    """The SentencePiece form, if any."""


def with_eod_as_text(encoders: Encoders, eod: str) -> Encoders:
    """Return encoders for which a spelled eod is text; the same object where it is so already."""
    if isinstance(encoders.engine, PieceEngine):
        return encoders  # the reader of the .model saw to it
    stored = json_with_special(encoders.stored or orjson.loads(encoders.tokenizer_json), eod)
    if stored is None:
        return encoders
    content = orjson.dumps(stored)
    engine = HubEngine(content, "the tokenizer with its eod as a special token", encoders.engine.vocab())
    return Encoders(engine, content, stored if encoders.stored else None, encoders.model)


def check_is_reserved(encoders: Encoders, eod: str, eod_id: int, path: str) -> None:
    """Refuse an eod that is an ordinary piece of the vocabulary: texts become it.

    In a list of whole words, which may hold its specials among them, it is the records that show it.
    """
    if isinstance(encoders.engine, PieceEngine):
        proto = parse_model(encoders.model or b"", path)
        kinds = proto.SentencePiece
        is_ordinary = any(entry.piece == eod and entry.type in (kinds.NORMAL, kinds.BYTE) for entry in proto.pieces)
    else:
        stored = encoders.stored or orjson.loads(encoders.tokenizer_json)
        if any(entry.get("content") == eod for entry in stored.get("added_tokens") or []):
            return
        is_ordinary = stored["model"].get("type") != "WordLevel" and (
            _is_merged(stored["model"], eod) or _comes_of_text(encoders.engine, eod, eod_id)
        )
    if is_ordinary:
        raise UsageError(
            f"tokenizer {path}: {eod!r} = {eod_id} is an ordinary piece, which texts become, so documents would end in their middle;"
            " name a special token by --eod-token (tools/preprocess_data.py --add-specials adds one)"
        )


def _is_merged(model: dict[str, Any], token: str) -> bool:
    """Whether BPE makes the token of bytes or characters."""
    if model.get("type") != "BPE":
        return False
    if len(token) == 1 or (model.get("byte_fallback") and BYTE_PIECE.fullmatch(token)):
        return True
    merges = model.get("merges") or []
    return any((merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge)) == token for merge in merges)


def _comes_of_text(engine: ReferenceEngine, token: str, token_id: int) -> bool:
    spelled = {token, token.replace(SPACE, " "), engine.decode([token_id])}
    texts = [before + text + after for text in sorted(spelled) for before in ("", "a", " ") for after in ("", "a", " ")]
    return bool((engine.encode(texts)[0] == token_id).any())
