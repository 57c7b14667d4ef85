"""Tokenizers as the data path needs them: flat ids of many texts, no specials added, and a hash that says which ids mean what.

The token that ends documents must come of no text: a document would end in its middle. Spelled out in a text it is text. A
tokenizer.json does that for special tokens only, so an eod of another kind is made a special token before texts are encoded; hash
and exported files stay those of the tokenizer as it is. See `end_token`. Where a tokenizer makes the eod of its spelling all the
same, packing finds it and the record is a bad one.

No torch and no transformers here: preprocessing starts in a second (tiktoken ranks excepted, which transformers converts).
"""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.provenance import Provenance
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

logger = logging.getLogger(__name__)
LOCAL = ("auto_map", "name_or_path", "token", "use_auth_token")
"""Keys that a copied tokenizer_config.json must not carry along, as all that end in `_file`: code, paths and secrets."""
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
CHAT_TEMPLATE, CHAT_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
"""A file and a folder of them, where stock transformers reads them."""


class Tokenizer:
    """A loaded tokenizer; made by `load_tokenizer`."""

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
        """For people; two tokenizers with one name can differ, so comparisons use `sha256`."""
        self.path = path
        """Where it was loaded from, as given."""
        self._files = files | _read_chat_templates(path)
        self._config = config
        self.sha256 = sha256
        """See `vocabulary_hash`."""
        vocab = encoder.vocab()
        if not vocab:
            raise DataError(f"tokenizer {path} has no tokens; give another one with --tokenizer")
        self.vocab_size: int = max(vocab.values()) + 1
        """Highest id + 1, added tokens included; ids below it may be unused."""
        self._vocab = vocab
        if eod_id is not None:
            eod_token = next((token for token, index in vocab.items() if index == eod_id), None)
            if eod_token is None:
                raise UsageError(
                    f"tokenizer {path} has no token with id {eod_id} to end documents with; name one by --eod-token"
                )
        self.eod_token: str = eod_token or _eos_of(config, path)
        """The token that says "the text begins here" to a reverse model, "the text ends here" to a forward one."""
        if self.eod_token not in vocab:
            raise UsageError(f"tokenizer {path} has no token {self.eod_token!r} to end documents with; name one by --eod-token")
        self.eod_id: int = vocab[self.eod_token]
        given = EncoderSources(encoder, files["tokenizer.json"], stored, model)
        _check_is_reserved(given, self.eod_token, self.eod_id, path)
        self._sources = _with_eod_as_text(given, self.eod_token)
        self.is_eod_made_text: bool = self._sources is not given
        """The tokenizer as it is would read a spelled eod as the eod."""
        self._reference = self._sources.reference
        self._encoder: Encoder = self._reference

    def token_id(self, token: str) -> int:
        """The id of a token. Raises UsageError if there is none."""
        if token not in self._vocab:
            raise UsageError(f"tokenizer {self.path} has no token {token!r}; name one of its tokens")
        return self._vocab[token]

    def encode_batch(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """Ids of all texts one after the other [total] in text order, and where each begins [texts + 1].

        Nothing is added (no BOS, no EOS), and a special token spelled out in a text is encoded as ordinary text. So is the eod,
        unless the model itself has a piece with its spelling: then packing refuses it.
        """
        return self._encoder.encode(texts)

    def use_fastest_encoder(self, samples: Sequence[str]) -> str:
        """Encode with the fastest encoder whose ids equal the reference's on `samples` and on odd texts; what was chosen and why."""
        texts = [*ODD_TEXTS, f"a{self.eod_token} {self.eod_token}\n", *samples]
        forms, self._sources = self._sources, replace(self._sources, stored=None)  # large, and of no more use
        passed_over = []
        for name, make in fast_encoders(forms.tokenizer_json, forms.stored, forms.model, self._reference):
            try:
                encoder = make()
                text = first_difference(encoder, self._reference, texts)
            except ImportError:
                passed_over.append(f"{name} is not installed")
                continue
            except Exception as error:  # a library that cannot load this tokenizer; each has errors of its own
                passed_over.append(f"{name} cannot be used ({_first_line(error)})")
                continue
            if text is None:
                self._encoder = encoder
                break
            passed_over.append(f"{name} gives other ids on {text[:40]!r}")
        checked = "" if self._encoder is self._reference else f", equal to {self._reference.name} on {len(texts)} texts"
        return "; ".join([f"{self._encoder.name}{checked}", *passed_over])

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        """The text of ids [length] in text order; specials are left out."""
        return self._reference.decode(ids.tolist() if isinstance(ids, np.ndarray) else ids)

    def provenance(self, direction: Direction) -> Provenance:
        """Return what a shard, checkpoint or export made with this tokenizer records."""
        return Provenance(
            direction=direction,
            tokenizer_name=self.name,
            tokenizer_sha256=self.sha256,
            vocab_size=self.vocab_size,
            eod_id=self.eod_id,
        )

    def save(self, folder: str | Path) -> None:
        """Write a folder that stock transformers loads offline, with the same `sha256` and with eod as its eos.

        The post-processor is left out: training adds no BOS or EOS, so the exported tokenizer must not either.
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
            write_whole(path, content, is_shared=True)  # tasks of an array may write the same folder at once


def load_tokenizer(
    path: str, eod_token: str | None = None, *, eod_id: int | None = None, add_specials: bool = False
) -> Tokenizer:
    """Load a tokenizer; for `path` and `add_specials` see `tokenizers.reader.read_tokenizer`, which every command shares.

    The eod is `eod_token` or the token `eod_id`, else the eos that the folder names, else the eos of a .model. With
    `add_specials` the eod, if not named, is <EOD>.
    """
    if eod_token == "":
        raise UsageError("--eod-token is empty; name a token of the tokenizer, or leave it out for the tokenizer's eos")
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
            "tokenizer %s: documents end with its eos %r (id %d), and it has %s, too; name the one to use with --eod-token",
            *(path, tokenizer.eod_token, tokenizer.eod_id, ", ".join(f"{token} = {id_}" for token, id_ in others.items())),
        )
    return tokenizer


def _eos_of(config: dict[str, Any], path: str) -> str:
    """The eos token a tokenizer_config.json names; refused when it names none."""
    eos = name_of(config.get("eos_token"))
    if eos is None:
        raise UsageError(f"tokenizer {path} names no eos token to end documents with; name one of its tokens by --eod-token")
    return eos


def _read_chat_templates(tokenizer: str) -> dict[str, bytes]:
    """Return the content of each template file beside a tokenizer (its folder, or a file in it), by its path in the folder."""
    folder = Path(tokenizer) if Path(tokenizer).is_dir() else Path(tokenizer).parent
    files = [folder / CHAT_TEMPLATE, *sorted((folder / CHAT_TEMPLATES).glob("*.jinja"))]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.is_file()}


def without_local(config: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer_config.json without what concerns one machine or person only, see LOCAL."""
    return {key: value for key, value in config.items() if key not in LOCAL and not key.endswith("_file")}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


@dataclass(frozen=True, slots=True)
class EncoderSources:
    """The reference encoder that texts are encoded with, and the forms of which faster encoders are made."""

    reference: ReferenceEncoder
    tokenizer_json: bytes
    stored: dict[str, Any] | None
    """The object of the tokenizer.json, where it was that which was loaded."""
    model: bytes | None
    """The SentencePiece form, if any."""


def _with_eod_as_text(sources: EncoderSources, eod: str) -> EncoderSources:
    """Return encoders for which a spelled eod is text; the same object where it is so already."""
    if isinstance(sources.reference, SentencePieceEncoder):
        return sources  # the reader of the .model saw to it
    stored = json_with_special(sources.stored or orjson.loads(sources.tokenizer_json), eod)
    if stored is None:
        return sources
    content = orjson.dumps(stored)
    encoder = HubEncoder(content, "the tokenizer with its eod as a special token", sources.reference.vocab())
    return EncoderSources(encoder, content, stored if sources.stored else None, sources.model)


def _check_is_reserved(sources: EncoderSources, eod: str, eod_id: int, path: str) -> None:
    """Refuse an eod that is an ordinary piece of the vocabulary: texts become it.

    In a list of whole words, which may hold its specials among them, it is the records that show it.
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
            f"tokenizer {path}: {eod!r} = {eod_id} is an ordinary piece, which texts become, so documents would end in their middle;"
            " name a special token by --eod-token (ledom preprocess-data --add-specials adds one)"
        )


def _is_merged(model: dict[str, Any], token: str) -> bool:
    """Return whether BPE makes the token of bytes or characters."""
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
