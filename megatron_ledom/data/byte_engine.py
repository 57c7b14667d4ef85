"""Byte-level BPE encoding from a `tokenizer.json` in C++, with the ids of the `tokenizers` library.

The splitting patterns of GPT-2, cl100k (Llama-3, Qwen) and o200k are scanners of their own (`csrc/helpers/split_patterns.h`), and
the words they cut are encoded apart and remembered (`byte_encoder.h`). A tokenizer.json with any part that is not known here to
the last option is refused by `why_not_bytes`; another engine then has to encode it.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from megatron_ledom._helpers import ByteEncoder, not_nfc
from megatron_ledom.data.engines import FlatIds
from megatron_ledom.data.piece_engine import CACHE_BYTES, CachedEngine
from megatron_ledom.errors import UsageError
from megatron_ledom.tokenizers.tiktoken_ranks import CL100K_PATTERN, O200K_PATTERN, R50K_PATTERN

GPT2 = "gpt2"
PATTERNS = {
    R50K_PATTERN: GPT2,
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": GPT2,
    CL100K_PATTERN: "cl100k",
    CL100K_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}"): "cl100k_1",  # Qwen: every digit alone
    O200K_PATTERN: "o200k",
}
"""The scanner of each splitting pattern."""

PARTS = {
    "version",
    "truncation",
    "padding",
    "added_tokens",
    "normalizer",
    "pre_tokenizer",
    "post_processor",
    "decoder",
    "model",
}
MODEL_OPTIONS = {  # and what they may be; None: anything
    "type": ("BPE",),
    "vocab": None,
    "merges": None,
    "unk_token": None,  # there is a token for every byte
    "fuse_unk": None,
    "ignore_merges": (False, True, None),
    "dropout": (None,),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (False, None),
}
TOKEN_OPTIONS = {"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"}


class Reference(Protocol):
    """An engine that is right on every text."""

    def encode(self, texts: Sequence[str]) -> FlatIds:
        """Ids of all texts and where each begins."""


class CachedByteEngine(CachedEngine):
    """Encodes with the object of a tokenizer.json, one for which `why_not_bytes` is None.

    Texts that are not in NFC, where the tokenizer asks for that, are normalised by the `tokenizers` library; those of them that
    spell a token which is not special are encoded by `reference`. The engine may be used from several threads, which take turns.
    """

    name = "cached bytes (csrc)"

    def __init__(self, stored: dict[str, Any], reference: Reference, cache_bytes: int = CACHE_BYTES) -> None:
        reason = why_not_bytes(stored)
        if reason is not None:
            raise UsageError(f"it {reason}")
        model = stored["model"]
        added, self._cut = _added_tokens(stored)
        self._reference = reference
        self._is_normalized = stored.get("normalizer") is not None
        self._encoder = ByteEncoder(
            vocab=model["vocab"],
            merges=model["merges"],
            pattern=_scanner(stored["pre_tokenizer"]),
            whole_units=bool(model.get("ignore_merges")),
            added=added,
            cache_bytes=cache_bytes,
        )

    def encode(self, texts: Sequence[str]) -> FlatIds:
        """Ids of all texts one after the other [total] in text order, and where each begins [texts + 1].

        Nothing is added, and a special token spelled out in a text is ordinary text; another added token is itself.
        """
        odd = not_nfc(texts) if self._is_normalized else []
        if not odd:
            return super().encode(texts)
        from tokenizers import normalizers

        given, normalize, left = list(texts), normalizers.NFC().normalize_str, []
        for index in odd:
            normal = normalize(given[index])
            if any(token in text for token in self._cut for text in (given[index], normal)):
                left.append(index)
            else:
                given[index] = normal
        parts, begin = [], 0
        for index in left:
            parts += [super().encode(given[begin:index]), self._reference.encode([given[index]])]
            begin = index + 1
        return _joined([*parts, super().encode(given[begin:])])


def _joined(parts: Sequence[FlatIds]) -> FlatIds:
    if len(parts) == 1:
        return parts[0]
    ends = np.cumsum([0, *(len(ids) for ids, _ in parts)])
    offsets = [np.zeros(1, np.int64), *(at[1:] + end for (_, at), end in zip(parts, ends[:-1], strict=True))]
    return np.concatenate([ids for ids, _ in parts]), np.concatenate(offsets)


def why_not_bytes(stored: dict[str, Any]) -> str | None:
    """Why the object of a tokenizer.json cannot be encoded here, as the end of "it ..."; None if it can."""
    model, normalizer, processor = stored.get("model"), stored.get("normalizer"), stored.get("post_processor")
    if unknown := sorted(set(stored) - PARTS):
        return f"has the unknown part {unknown[0]}"
    if not isinstance(model, dict) or model.get("type") != "BPE":
        return "is not a BPE model"
    if not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
        return "has no vocabulary or no merges"
    for option, value in model.items():
        allowed = MODEL_OPTIONS.get(option, ())
        if allowed is not None and value not in allowed:
            return f"has the model option {option}={str(value)[:40]}"
    if normalizer is not None and normalizer != {"type": "NFC"}:
        return f"has the normaliser {str(normalizer)[:60]}"
    if _scanner(stored.get("pre_tokenizer")) is None:
        return "has a pre-tokenizer that is not known here"
    if not _adds_specials_only(processor):
        return f"has the post-processor {str(processor)[:60]}"
    return _why_not_added(stored)


def _scanner(pre_tokenizer: Any) -> str | None:
    """The name of the scanner that splits as a pre-tokenizer does; None if there is none."""
    if not isinstance(pre_tokenizer, dict):
        return None
    if pre_tokenizer.get("type") != "Sequence":
        return GPT2 if _is_byte_level(pre_tokenizer, use_regex=True) else None
    steps = pre_tokenizer.get("pretokenizers")
    if not isinstance(steps, list) or len(steps) != 2 or not _is_byte_level(steps[1], use_regex=False):
        return None
    pattern = steps[0].get("pattern")
    how = {key: value for key, value in steps[0].items() if key != "pattern"}
    keeps_all = (
        {"type": "Split", "behavior": "Isolated", "invert": False},
        {"type": "Split", "behavior": "Removed", "invert": True},
    )
    if how not in keeps_all or not isinstance(pattern, dict) or set(pattern) != {"Regex"}:
        return None
    return PATTERNS.get(pattern["Regex"])


def _is_byte_level(step: dict[str, Any], *, use_regex: bool) -> bool:
    options = {"use_regex": True, "trim_offsets": True, **step}
    options["trim_offsets"] = True  # says nothing about ids
    return options == {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _adds_specials_only(processor: Any) -> bool:
    """Whether a post-processor does nothing when no specials are asked for."""
    if not isinstance(processor, dict):
        return processor is None
    if processor.get("type") == "Sequence":
        return all(_adds_specials_only(step) for step in processor.get("processors") or [None])
    if processor.get("type") == "TemplateProcessing":
        return [next(iter(step)) for step in processor["single"]].count("Sequence") == 1
    return processor.get("type") == "ByteLevel"


def _why_not_added(stored: dict[str, Any]) -> str | None:
    """The same for the added tokens: those that are not special are cut out of texts."""
    tokens = stored.get("added_tokens") or []
    cut = [token for token in tokens if not token.get("special")]
    for token in tokens:
        if set(token) != TOKEN_OPTIONS:
            return f"has the added token {token.get('content')!r} with unknown options"
    for token in cut:
        if token["single_word"] or token["lstrip"] or token["rstrip"]:
            return f"has the added token {token['content']!r}, found in some places only"
        if token["normalized"] and stored.get("normalizer") is not None and not token["content"].isascii():
            return f"has the added token {token['content']!r}, which is normalised"
    if len({token["normalized"] for token in cut}) > 1:
        return "has added tokens of two kinds, found before and after normalising"
    return None


def _added_tokens(stored: dict[str, Any]) -> tuple[list[tuple[str, int, bool]], list[str]]:
    """(content, id, whether it is left as text) of the tokens that are looked for in texts; and those that are cut out."""
    tokens = [token for token in stored.get("added_tokens") or [] if token["content"]]
    cut = [token for token in tokens if not token["special"]]
    if not cut:
        return [], []
    together = [token for token in tokens if token["normalized"] == cut[0]["normalized"]]
    return [(token["content"], token["id"], token["special"]) for token in together], [token["content"] for token in cut]
