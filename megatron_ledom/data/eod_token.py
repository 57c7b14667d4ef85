"""The token that ends documents must come of no text: a document would end in its middle.

Spelled out in a text it is text. A tokenizer.json does that for special tokens only and SentencePiece for control pieces only, so
an eod of another kind is given that kind before texts are encoded; hash and exported files stay those of the tokenizer as it is.
Where a tokenizer makes the eod of its spelling all the same, packing finds it and the record is a bad one.
"""

import re
from dataclasses import dataclass
from typing import Any

import orjson

from megatron_ledom.data.engines import HubEngine, PieceEngine, ReferenceEngine
from megatron_ledom.errors import UsageError
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
    model = encoders.model
    if isinstance(encoders.engine, PieceEngine):
        changed = model_with_control(model or b"", eod)
        if changed is None:
            return encoders
        stored = json_with_special(orjson.loads(encoders.tokenizer_json), eod)
        content = encoders.tokenizer_json if stored is None else orjson.dumps(stored)
        return Encoders(PieceEngine(changed), content, None, changed)
    stored = json_with_special(encoders.stored or orjson.loads(encoders.tokenizer_json), eod)
    if stored is None:
        return encoders
    content = orjson.dumps(stored)
    engine = HubEngine(content, "the tokenizer with its eod as a special token", encoders.engine.vocab())
    model = model and (model_with_control(model, eod) or model)
    return Encoders(engine, content, stored if encoders.stored else None, model)


def json_with_special(stored: dict[str, Any], token: str) -> dict[str, Any] | None:
    """Return the object of a tokenizer.json with an added token made a special one; None where it needs no change."""
    added = stored.get("added_tokens") or []
    if not any(entry.get("content") == token and not entry.get("special") for entry in added):
        return None
    return {
        **stored,
        "added_tokens": [{**entry, "special": True} if entry.get("content") == token else entry for entry in added],
    }


def model_with_control(model: bytes, piece: str) -> bytes | None:
    """Return a SentencePiece model with a user-defined piece made a control piece; None where it needs no change."""
    proto = parse_model(model, "the model")
    found = [entry for entry in proto.pieces if entry.piece == piece and entry.type == proto.SentencePiece.USER_DEFINED]
    for entry in found:
        entry.type = proto.SentencePiece.CONTROL
    return bytes(proto.SerializeToString(deterministic=True)) if found else None


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
