"""The token that ends documents, spelled out in a text, has to be text.

A tokenizer.json leaves special tokens in a text as text, and SentencePiece control pieces; it cuts out other added tokens and
user-defined pieces. One of these that ends documents is therefore given the kind that stays text.
"""

from typing import Any

from megatron_ledom.tokenizers.sentencepiece_bpe import parse_model, without_word


def json_with_special(stored: dict[str, Any], token: str) -> dict[str, Any] | None:
    """Return the object of a tokenizer.json with an added token made a special one; None where it needs no change."""
    added = stored.get("added_tokens") or []
    if not any(entry.get("content") == token and not entry.get("special") for entry in added):
        return None
    special = [{**entry, "special": True} if entry.get("content") == token else entry for entry in added]
    return without_word({**stored, "added_tokens": special}, token)


def model_with_control(model: bytes, where: str, eod: str | int | None) -> bytes:
    """Return a SentencePiece model in which the piece `eod`, by name or id, is a control piece if it was a user-defined one.

    Without a name it is the model's own eos.
    """
    proto = parse_model(model, where)
    eod = proto.trainer_spec.eos_id if eod is None else eod
    is_eod = [eod in (entry.piece, index) for index, entry in enumerate(proto.pieces)]
    found = [entry for entry, here in zip(proto.pieces, is_eod, strict=True) if here and entry.type == entry.USER_DEFINED]
    for entry in found:
        entry.type = entry.CONTROL
    return bytes(proto.SerializeToString(deterministic=True)) if found else model
