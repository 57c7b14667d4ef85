"""Ensure that the spelling of the eod in a text is encoded as ordinary text.

Special tokens and SentencePiece control pieces are not recognised in a text. Other added tokens and user-defined pieces are
recognised and cut out. An eod of this kind is therefore changed to a special token or a control piece.
"""

from typing import Any

from megatron_ledom.tokenizers.sentencepiece_bpe import parse_model, without_word


def json_with_special(stored: dict[str, Any], token: str) -> dict[str, Any] | None:
    """Return the object of a tokenizer.json with an added token made special; None if no change is needed."""
    added = stored.get("added_tokens") or []
    if not any(entry.get("content") == token and not entry.get("special") for entry in added):
        return None
    special = [{**entry, "special": True} if entry.get("content") == token else entry for entry in added]
    return without_word({**stored, "added_tokens": special}, token)


def model_with_control(model: bytes, where: str, eod: str | int | None) -> bytes:
    """Return a SentencePiece model in which the piece `eod` is a control piece if it was user-defined.

    `eod` is a piece or its id; by default the eos of the model.
    """
    proto = parse_model(model, where)
    eod = proto.trainer_spec.eos_id if eod is None else eod
    is_eod = [eod in (entry.piece, index) for index, entry in enumerate(proto.pieces)]
    found = [entry for entry, here in zip(proto.pieces, is_eod, strict=True) if here and entry.type == entry.USER_DEFINED]
    for entry in found:
        entry.type = entry.CONTROL
    return bytes(proto.SerializeToString(deterministic=True)) if found else model
