"""Joint tokenization of two adjacent texts, and token healing of a text that a model continues.

Three properties of real tokenizers make this necessary:
- `encode(a) + encode(b) != encode(a + b)`: SentencePiece puts a dummy space before a text, and merges cross any boundary.
  Therefore a span is scored on the ids of the whole text.
- One character may be several tokens (byte fallback, byte-level BPE). Therefore generated ids are joined as bytes.
- The ids next to the cut, where a model continues a text, depend on the text that will follow there: "Paris" may become the
  end of the piece " Paris". Therefore `JointTokenizer.heal_prompt` trims these ids (token healing). The model chooses them
  again, and `TokenHealer` restricts it to ids that spell the trimmed bytes.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megatron_ledom.direction import Direction, to_model_order
from megatron_ledom.errors import DataError
from megatron_ledom.tokenizers.added_tokens import name_of
from megatron_ledom.tokenizers.end_token import json_with_special
from megatron_ledom.tokenizers.reader import TokenizerFiles, read_tokenizer
from megatron_ledom.tokenizers.sentencepiece_bpe import TEXT_START, is_dummy_prefix
from megatron_ledom.tokenizers.surfaces import steps_of, surfaces_of

NEIGHBOURS = (" ", "a", "e", "s", "\n")  # sample characters beyond the cut; an id that none of them changes is not trimmed


@dataclass(frozen=True, slots=True)
class HealedPrompt:
    """A text that is prepared for token healing.

    tokens: the ids that stay, in model order. trimmed: the bytes of the trimmed ids, between `tokens` and the cut; the model
    must spell them again before it writes new text. bridge: a space that was added at the cut of a text too short to keep any id.
    """

    tokens: list[int]
    trimmed: bytes
    bridge: bytes = b""


class JointTokenizer:
    """The tokenizer of a model folder, without the special ids that its template would add.

    specials_are_text: encode a special token that is spelled out in a text as ordinary text, as the shards of this package do.
    Then no prompt can contain an eod. A stock model's prompt may need special tokens.
    """

    def __init__(self, backend: Tokenizer, *, specials_are_text: bool = True) -> None:
        self.leading_ids = _leading_ids(backend)
        self._whole = _plain_copy(json.loads(backend.to_str()))
        self._middle = _plain_copy(_without_dummy_prefix(json.loads(backend.to_str())))
        self._whole.encode_special_tokens = self._middle.encode_special_tokens = specials_are_text
        self.special_ids = {id_ for id_, token in backend.get_added_tokens_decoder().items() if token.special}
        self.vocab = self._whole.get_vocab(with_added_tokens=True)
        self.surfaces = surfaces_of(json.loads(self._whole.to_str()), self.vocab)
        self._alone = _without_prefix_alone(json.loads(backend.to_str()))
        self._spells_all_bytes = len({s for s in (self.surfaces or {}).values() if len(s) == 1}) == 256
        self.has_dummy_prefix = self._whole.encode("a").ids != self._middle.encode("a").ids

    @classmethod
    def from_pretrained(cls, folder: Path, *, specials_are_text: bool = True) -> "JointTokenizer":
        """Load the tokenizer of a folder as every command does; see `tokenizers.reader`."""
        return cls.of_files(read_tokenizer(str(folder)), specials_are_text=specials_are_text)

    @classmethod
    def of_files(cls, files: TokenizerFiles, *, specials_are_text: bool = True) -> "JointTokenizer":
        """Return the tokenizer of files that were read already."""
        stored = _with_eos_as_text(files) if specials_are_text else files.as_stock_reads()
        try:
            backend = Tokenizer.from_str(json.dumps(stored))
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"{files.path} is not a tokenizer of the tokenizers library ({error})") from error
        return cls(backend, specials_are_text=specials_are_text)

    @property
    def content(self) -> str:
        """The definition of the tokenizer as JSON; tokenizers with equal `content` give equal ids."""
        return str(self._whole.to_str())

    def encode(self, text: str) -> list[int]:
        """Return the ids of a whole text in text order, without BOS and eod."""
        _check_text(text)
        return self._ids(text, at_start=True)

    def split(self, preceding: str, following: str) -> tuple[list[int], int]:
        """Encode `preceding + following` once; return the ids in text order and the number that belong to `preceding`.

        An id belongs to `preceding` if its last character does, so an id that crosses the boundary belongs to `following`.
        The dummy prefix belongs to the first character. All ids of one character are on the same side.
        """
        _check_text(preceding + following)
        if preceding + following in self._alone:
            text_ids = self._ids(preceding + following, at_start=True)
            return text_ids, 0 if following else len(text_ids)
        encoding = self._whole.encode(preceding + following, add_special_tokens=False)
        boundary = len(preceding)
        if not boundary:
            return list(encoding.ids), 0
        beyond = (index for index, (_, end) in enumerate(encoding.offsets) if end > boundary)
        return list(encoding.ids), next(beyond, len(encoding.ids))

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Return for each id of `split` the first and the end position of its characters; ids of one character share them."""
        if text in self._alone:
            return [(0, 0), (0, len(text))]
        return list(self._whole.encode(text, add_special_tokens=False).offsets)

    def heal_prompt(self, text: str, direction: Direction) -> HealedPrompt:
        """Prepare `text` for token healing: keep the ids that no continuation changes, and return the others as bytes.

        The cut is the beginning of the text for a reverse model and its end for a forward model. If no id would stay and the
        text of a reverse model begins with a letter or a digit, the text is assumed to begin with a whole word. A tokenizer
        without an id for every byte cannot heal: all ids stay.
        """
        _check_text(text)
        reverse = direction is Direction.REVERSE
        text_ids = self._ids(text, at_start=not reverse)
        spelled = self.spell(text_ids)
        expected = (b" " if self.has_dummy_prefix and not reverse else b"") + text.encode()
        if not self._spells_all_bytes or spelled != expected:
            return HealedPrompt(to_model_order(text_ids, direction), b"")
        readings = [text_ids]
        for neighbour in NEIGHBOURS:
            extended = neighbour + text if reverse else text + neighbour
            readings.append(self._ids(extended, at_start=not reverse))
        fixed = _common_length([to_model_order(reading, direction) for reading in readings])
        tokens = to_model_order(text_ids, direction)
        if fixed:
            trimmed = self.spell(text_ids[: len(text_ids) - fixed] if reverse else text_ids[fixed:])
            return HealedPrompt(tokens[:fixed], trimmed)
        if reverse and text[:1].isalnum():
            word_ids = self._ids(" " + text, at_start=False)
            return HealedPrompt(to_model_order(word_ids, direction), b"", bridge=b" ")
        return HealedPrompt(tokens, b"")

    def spell(self, text_ids: list[int]) -> bytes:
        """Return the bytes that ids in text order spell; the dummy prefix is a space. Needs `surfaces`."""
        surfaces = self.surfaces or {}
        return b"".join(surfaces.get(id_, b"") for id_ in text_ids)

    def decode(self, text_ids: list[int]) -> str:
        """Return the text that the tokenizer itself decodes from ids in text order, without special ids."""
        return str(self._whole.decode(text_ids, skip_special_tokens=True))

    def token_text(self, id_: int) -> str:
        """Return the characters of one id, with its spaces; bytes that are no whole character are U+FFFD."""
        return self.decode([id_]) if self.surfaces is None else self.spell([id_]).decode("utf-8", "replace")

    def _ids(self, text: str, *, at_start: bool) -> list[int]:
        if at_start and text in self._alone:
            return [*self._ids(" ", at_start=False), self.vocab[text]]
        return list((self._whole if at_start else self._middle).encode(text, add_special_tokens=False).ids)


class TokenHealer:
    """Token healing: the ids that may be written next while trimmed bytes of the given text are still to be spelled."""

    def __init__(self, tokenizer: JointTokenizer, direction: Direction, stop_ids: list[int]) -> None:
        self._reverse = direction is Direction.REVERSE
        banned = tokenizer.special_ids | set(stop_ids)
        self._surfaces = {id_: s for id_, s in (tokenizer.surfaces or {}).items() if s and id_ not in banned}
        self.allowed = lru_cache(maxsize=1024)(self._allowed)

    def _allowed(self, trimmed: bytes) -> list[int]:
        """Return the ids that spell a part of `trimmed` next to the kept ids, or all of `trimmed` and more."""
        if self._reverse:
            return [i for i, s in self._surfaces.items() if trimmed.endswith(s) or s.endswith(trimmed)]
        return [i for i, s in self._surfaces.items() if trimmed.startswith(s) or s.startswith(trimmed)]

    def rest(self, trimmed: bytes, token: int) -> bytes:
        """Return the part of `trimmed` that remains after `token` was written next to the kept ids.

        None remains after an id that spells nothing: it is the padding of a row that was given up.
        """
        if token not in self._surfaces:
            return b""
        length = len(self._surfaces[token])
        return trimmed[: max(0, len(trimmed) - length)] if self._reverse else trimmed[length:]

    def count_healing(self, tokens: list[int], trimmed: bytes) -> int:
        """Return the number of `tokens` (model order), from the first on, that only spell `trimmed`."""
        count = 0
        while trimmed and count < len(tokens) and len(self._surfaces[tokens[count]]) <= len(trimmed):
            trimmed = self.rest(trimmed, tokens[count])
            count += 1
        return count


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"a text contains half of a surrogate pair ({error.object[error.start]!r}); pass whole characters only"
        ) from error


def _common_length(readings: list[list[int]]) -> int:
    """Return the number of ids, from the first on, in which all lists agree."""
    columns = enumerate(zip(*readings, strict=False))
    return next((index for index, column in columns if len(set(column)) > 1), min(map(len, readings)))


def _without_prefix_alone(state: dict[str, Any]) -> frozenset[str]:
    """Return the added tokens that a tokenizer.json converted from SentencePiece encodes without the dummy prefix.

    SentencePiece itself puts the prefix before a text that is one such token (`sentencepiece_bpe.prefix_texts_only`).
    """
    patterns = [str((step.get("pattern") or {}).get("Regex", "")) for step in steps_of(state["normalizer"])]
    if not any(pattern.startswith(TEXT_START) and r"\z" in pattern for pattern in patterns):
        return frozenset()
    return frozenset(token["content"] for token in state["added_tokens"] if token["normalized"] and not token["special"])


def _leading_ids(backend: Tokenizer) -> list[int]:
    """Return the special ids, such as BOS, that the tokenizer's own template puts before a text."""
    with_template, without = backend.encode("a").ids, backend.encode("a", add_special_tokens=False).ids
    starts = (i for i in range(len(with_template)) if with_template[i : i + len(without)] == without)
    return list(with_template[: next(starts, 0)])


def _with_eos_as_text(files: TokenizerFiles) -> dict[str, Any]:
    eos = name_of(files.config.get("eos_token"))
    return (eos and json_with_special(files.stored, eos)) or files.stored


def _plain_copy(state: dict[str, Any]) -> Tokenizer:
    """Return a tokenizer without template, padding, truncation and trimmed offsets."""
    return Tokenizer.from_str(json.dumps({**state, "post_processor": None, "padding": None, "truncation": None}))


def _without_dummy_prefix(state: dict[str, Any]) -> dict[str, Any]:
    """Return the same tokenizer for the middle of a text, without the dummy prefix."""
    normalizers = [step for step in steps_of(state["normalizer"]) if not is_dummy_prefix(step)]
    for step in steps_of(state["pre_tokenizer"]):
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
            step.pop("add_prefix_space", None)
        elif step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
    return {**state, "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None}
