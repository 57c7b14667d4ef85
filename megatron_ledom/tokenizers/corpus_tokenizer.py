"""Tokenizers for preprocessing and training: ids of many texts in one array, no specials added, and a hash of the vocabulary.

No text may encode to the eod, because a document would end in its middle. If a text contains the spelling of the eod, the
spelling is encoded as ordinary text. A tokenizer.json does so for special tokens only, so an eod that is not special is made
special before texts are encoded; the hash and the exported files do not change. See `end_token`. If a tokenizer still produces
the eod from a text, the check of the ids finds it and counts the record as bad.

This module imports neither torch nor transformers, so preprocessing starts within a second. Only tiktoken ranks need
transformers.
"""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from megatron_ledom.direction import Direction, Unit
from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.provenance import Provenance
from megatron_ledom.reversal_units import WordPieces
from megatron_ledom.storage.files import write_whole
from megatron_ledom.tokenizers.added_tokens import name_of, vocabulary
from megatron_ledom.tokenizers.encoders import (
    Encoder,
    HubEncoder,
    ReferenceEncoder,
    SentencePieceEncoder,
    fast_encoders,
    first_difference,
)
from megatron_ledom.tokenizers.end_token import json_with_special
from megatron_ledom.tokenizers.reader import JSON, MODEL, other_ends, read_tokenizer
from megatron_ledom.tokenizers.sentencepiece_bpe import ODD_TEXTS, SPACE, parse_model
from megatron_ledom.tokenizers.surfaces import surfaces_of, word_pieces

logger = logging.getLogger(__name__)
LOCAL = ("auto_map", "name_or_path", "token", "use_auth_token")
"""Keys (code, paths, secrets) that are removed from a copied tokenizer_config.json, like all that end in `_file`."""
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
CHAT_TEMPLATE, CHAT_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
"""The file and the folder of chat templates that stock transformers reads."""


class Tokenizer:
    """A loaded tokenizer. Use `load_tokenizer` to get one."""

    def __init__(
        self,
        *,
        name: str,
        path: str,
        files: dict[str, bytes],
        config: dict[str, Any],
        encoder: ReferenceEncoder,
        eod_token: str | None,
        eod_id: int | None,
        model: bytes | None,
        stored: dict[str, Any] | None,
        sha256: str,
    ) -> None:
        self.name = name
        """A name for people. Two tokenizers can share a name, so comparisons use `sha256`."""
        self.path = path
        """The path from which it was loaded, as given."""
        self._files = files | _read_chat_templates(path)
        self._config = config
        self.sha256 = sha256
        """See `vocabulary_hash`."""
        vocab = encoder.vocab()
        if not vocab:
            raise DataError(f"tokenizer {path} has no tokens; give another one with --tokenizer")
        self.vocab_size: int = max(vocab.values()) + 1
        """Highest id + 1, with added tokens. Ids below it may be unused."""
        self._vocab = vocab
        if eod_id is not None:
            eod_token = next((token for token, index in vocab.items() if index == eod_id), None)
            if eod_token is None:
                raise UsageError(
                    f"tokenizer {path} has no token with id {eod_id} to end documents with; choose one with --eod-token"
                )
        self.eod_token: str = eod_token or _eos_of(config, path)
        """The token that means "the text begins here" to a reverse model and "the text ends here" to a forward model."""
        if self.eod_token not in vocab:
            raise UsageError(
                f"tokenizer {path} has no token {self.eod_token!r} to end documents with; choose one with --eod-token"
            )
        self.eod_id: int = vocab[self.eod_token]
        given = EncoderSources(encoder, files["tokenizer.json"], stored, model)
        _check_is_reserved(given, self.eod_token, self.eod_id, path)
        self._sources = _with_eod_as_text(given, self.eod_token)
        self.is_eod_forced_to_text: bool = self._sources is not given
        """True if the tokenizer was changed to encode the spelling of the eod as text."""
        self._reference = self._sources.reference
        self._encoder: Encoder = self._reference

    def token_id(self, token: str) -> int:
        """Return the id of a token. Raises UsageError if it has none."""
        if token not in self._vocab:
            raise UsageError(f"tokenizer {self.path} has no token {token!r}; name one of its tokens")
        return self._vocab[token]

    def token_of(self, token_id: int) -> str:
        """Return the token of an id; empty if it has none."""
        return next((token for token, index in self._vocab.items() if index == token_id), "")

    def encode_batch(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """Return the ids of all texts in one array [total] in text order, and the offset of each text [texts + 1].

        Adds no BOS or EOS. A special token spelled out in a text is encoded as ordinary text. So is the eod, unless the model
        itself has a piece with its spelling; preprocessing refuses such a text.
        """
        return self._encoder.encode(texts)

    def use_fastest_encoder(self, samples: Sequence[str]) -> str:
        """Choose the fastest encoder whose ids equal the reference's on `samples` and on unusual texts.

        Returns a line for the log: the chosen encoder, and why each faster one was not chosen.
        """
        texts = [*ODD_TEXTS, f"a{self.eod_token} {self.eod_token}\n", *samples]
        forms, self._sources = self._sources, replace(self._sources, stored=None)  # large, and no longer needed
        passed_over = []
        for name, make in fast_encoders(forms.tokenizer_json, forms.stored, forms.model, self._reference):
            try:
                encoder = make()
                text = first_difference(encoder, self._reference, texts)
            except ImportError:
                passed_over.append(f"{name} is not installed")
                continue
            except Exception as error:  # the library cannot load this tokenizer; each raises its own errors
                passed_over.append(f"{name} cannot be used ({_first_line(error)})")
                continue
            if text is None:
                self._encoder = encoder
                break
            passed_over.append(f"{name} gives other ids on {text[:40]!r}")
        checked = "" if self._encoder is self._reference else f", equal to {self._reference.name} on {len(texts)} texts"
        return "; ".join([f"{self._encoder.name}{checked}", *passed_over])

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        """Return the text of ids [length] in text order, without specials."""
        return self._reference.decode(ids.tolist() if isinstance(ids, np.ndarray) else ids)

    @cached_property
    def word_pieces(self) -> WordPieces | None:
        """Ids with which words begin; None if the pieces do not show it."""
        surfaces = surfaces_of(orjson.loads(self._files[JSON]), self._vocab)
        return None if surfaces is None else word_pieces(surfaces, self.vocab_size)

    def provenance(self, direction: Direction) -> Provenance:
        """Return the provenance that shards, checkpoints and exports of this tokenizer record."""
        return Provenance(
            direction=direction,
            tokenizer_name=self.name,
            tokenizer_sha256=self.sha256,
            vocab_size=self.vocab_size,
            eod_id=self.eod_id,
        )

    def save(self, folder: str | Path) -> None:
        """Write a folder that stock transformers loads offline, with the same `sha256` and with eod as its eos.

        The post-processor is removed: training adds no BOS or EOS, so the exported tokenizer must not add them either.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        stored = {**orjson.loads(self._files["tokenizer.json"]), "post_processor": None, "truncation": None, "padding": None}
        config = without_local(self._config)
        config |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.eod_token,
            "clean_up_tokenization_spaces": False,
        }
        files = {
            **self._files,
            "tokenizer.json": orjson.dumps(stored, option=orjson.OPT_INDENT_2),
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode(),
        }
        for name, content in files.items():
            path = target / name
            path.parent.mkdir(exist_ok=True)
            write_whole(path, content, is_shared=True)  # array tasks may write the same folder at the same time


def load_tokenizer(
    path: str, eod_token: str | None = None, *, eod_id: int | None = None, add_specials: bool = False
) -> Tokenizer:
    """Load a tokenizer. For `path` and `add_specials` see `tokenizers.reader.read_tokenizer`.

    The eod is `eod_token` or the token `eod_id`. Without either it is the eos that the folder names, else the eos of a .model;
    with `add_specials` it is <EOD>.
    """
    if eod_token == "":
        raise UsageError("--eod-token is empty; name a token of the tokenizer, or omit the option to use the tokenizer's eos")
    read = read_tokenizer(path, add_specials=add_specials, eod=eod_token if eod_id is None else eod_id)
    files = {JSON: read.content}
    encoder: ReferenceEncoder
    if read.is_converted and not read.is_extended and read.model is not None:
        files[MODEL] = read.model
        encoder = SentencePieceEncoder(read.model)
    else:
        encoder = HubEncoder(read.content, path, vocabulary(read.stored))
    tokenizer = Tokenizer(
        name=read.name,
        path=path,
        files=files,
        config=read.config,
        encoder=encoder,
        eod_token=eod_token,
        eod_id=eod_id,
        model=read.model,
        stored=None if read.is_converted else read.stored,
        sha256=read.sha256,
    )
    others = other_ends(vocabulary(read.stored), [tokenizer.eod_id])
    if others and eod_token is None and eod_id is None:
        logger.warning(
            "tokenizer %s: documents end with its eos %r (id %d), but it also has %s; choose one with --eod-token",
            *(path, tokenizer.eod_token, tokenizer.eod_id, ", ".join(f"{token} = {id_}" for token, id_ in others.items())),
        )
    return tokenizer


def word_pieces_of(tokenizer: Tokenizer, unit: Unit) -> WordPieces:
    """Return where the words of a tokenizer's ids begin. Raises UsageError if its pieces do not show it."""
    pieces = tokenizer.word_pieces
    if pieces is None or not pieces.begins.any():
        raise UsageError(
            f"--unit {unit} needs a tokenizer whose pieces begin with the space before a word (byte-level BPE or SentencePiece), and"
            f" those of {tokenizer.path} do not; use --unit token or segment"
        )
    return pieces


def _eos_of(config: dict[str, Any], path: str) -> str:
    """Return the eos token of a tokenizer_config.json. Raises UsageError if it names none."""
    eos = name_of(config.get("eos_token"))
    if eos is None:
        raise UsageError(
            f"tokenizer {path} names no eos token to end documents with; choose one of its tokens with --eod-token"
        )
    return eos


def _read_chat_templates(tokenizer: str) -> dict[str, bytes]:
    """Return the chat template files in the folder of a tokenizer: path in the folder -> content."""
    folder = Path(tokenizer) if Path(tokenizer).is_dir() else Path(tokenizer).parent
    files = [folder / CHAT_TEMPLATE, *sorted((folder / CHAT_TEMPLATES).glob("*.jinja"))]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.is_file()}


def without_local(config: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer_config.json without the keys of LOCAL, which concern one machine or person only."""
    return {key: value for key, value in config.items() if key not in LOCAL and not key.endswith("_file")}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


@dataclass(frozen=True, slots=True)
class EncoderSources:
    """The reference encoder, and the forms of the tokenizer from which faster encoders are built."""

    reference: ReferenceEncoder
    tokenizer_json: bytes
    stored: dict[str, Any] | None
    """The object of the tokenizer.json, if a tokenizer.json was loaded."""
    model: bytes | None
    """The SentencePiece form, if any."""


def _with_eod_as_text(sources: EncoderSources, eod: str) -> EncoderSources:
    """Return sources that encode the spelling of the eod as text; the same object if they do so already."""
    if isinstance(sources.reference, SentencePieceEncoder):
        return sources  # the reader of the .model has made the eod a control piece
    stored = json_with_special(sources.stored or orjson.loads(sources.tokenizer_json), eod)
    if stored is None:
        return sources
    content = orjson.dumps(stored)
    encoder = HubEncoder(content, "the tokenizer with its eod as a special token", sources.reference.vocab())
    return EncoderSources(encoder, content, stored if sources.stored else None, sources.model)


def _check_is_reserved(sources: EncoderSources, eod: str, eod_id: int, path: str) -> None:
    """Raise UsageError if the eod is an ordinary piece of the vocabulary, because texts would encode to it.

    A WordLevel vocabulary may contain its specials as words, so only the records show whether texts encode to it.
    """
    if isinstance(sources.reference, SentencePieceEncoder):
        proto = parse_model(sources.model or b"", path)
        kinds = proto.SentencePiece
        is_ordinary = any(entry.piece == eod and entry.type in (kinds.NORMAL, kinds.BYTE) for entry in proto.pieces)
    else:
        stored = sources.stored or orjson.loads(sources.tokenizer_json)
        if any(entry.get("content") == eod for entry in stored.get("added_tokens") or []):
            return
        is_ordinary = stored["model"].get("type") != "WordLevel" and (
            _is_merged(stored["model"], eod) or _comes_of_text(sources.reference, eod, eod_id)
        )
    if is_ordinary:
        raise UsageError(
            f"tokenizer {path}: {eod!r} = {eod_id} is an ordinary piece: texts encode to it, so documents would end in their middle;"
            " choose a special token with --eod-token (ledom preprocess-data --add-specials adds one)"
        )


def _is_merged(model: dict[str, Any], token: str) -> bool:
    """Return True if BPE can produce the token from bytes or characters."""
    if model.get("type") != "BPE":
        return False
    if len(token) == 1 or (model.get("byte_fallback") and BYTE_PIECE.fullmatch(token)):
        return True
    merges = model.get("merges") or []
    return any((merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge)) == token for merge in merges)


def _comes_of_text(encoder: ReferenceEncoder, token: str, token_id: int) -> bool:
    spelled = {token, token.replace(SPACE, " "), encoder.decode([token_id])}
    texts = [before + text + after for text in sorted(spelled) for before in ("", "a", " ") for after in ("", "a", " ")]
    return bool((encoder.encode(texts)[0] == token_id).any())
