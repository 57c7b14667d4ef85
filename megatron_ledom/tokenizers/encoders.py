"""Encoders turn texts into ids. They give the same ids at very different speeds.

`Tokenizer.use_fastest_encoder` tries the encoders, fastest first. It takes the first one whose ids equal those of the
reference on samples of the corpus and on unusual texts. The reference is `tokenizers` for a tokenizer.json and `sentencepiece`
for a .model.

The two cached encoders are the C++ of `csrc/helpers`. They cut a text into units, mostly words, encode each unit on its own and
cache the result.
- Cached pieces: SentencePiece BPE (`piece_encoder.h`). If no piece of the vocabulary contains character b directly after
  character a, no merge crosses that boundary, so a text may be cut there. This holds for BPE models that do not change the
  text.
- Cached bytes: byte-level BPE of a tokenizer.json (`byte_encoder.h`). The splitting patterns of GPT-2, cl100k (Llama-3, Qwen)
  and o200k have their own scanners (`split_patterns.h`).
`why_not_cached` and `why_not_bytes` return the reason if a model has any option that these encoders do not implement. Another
encoder is then used.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.tokenizers.sentencepiece_bpe import SPACE, parse_model
from megatron_ledom.tokenizers.tiktoken_ranks import CL100K_PATTERN, O200K_PATTERN, R50K_PATTERN

FlatIds = tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]
"""Ids of all texts one after the other [total] in text order, and where each text begins [texts + 1]."""
CACHE_BYTES = 64 << 20
"""Memory of a process's cache of units. A full cache is emptied."""
MAX_PIECES = 1_000_000
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
    "added_tokens",
    "decoder",
    "model",
    "normalizer",
    "padding",
    "post_processor",
    "pre_tokenizer",
    "truncation",
    "version",
}
MODEL_OPTIONS = {  # and their permitted values; None: any
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


class Encoder(Protocol):
    """Encodes texts as ids. Adds no specials, and encodes a special token spelled out in a text as ordinary text."""

    name: str
    """Library and version, for the log."""

    def encode(self, texts: Sequence[str]) -> FlatIds:
        """Return the ids of the texts; see FlatIds."""


class ReferenceEncoder(Encoder, Protocol):
    """An encoder that also decodes and has the vocabulary."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids in text order, without specials."""

    def vocab(self) -> dict[str, int]:
        """Return the id of every token, added ones included."""


def fast_encoders(
    tokenizer_json: bytes, stored: dict[str, Any] | None, model: bytes | None, reference: Encoder
) -> Iterator[tuple[str, Callable[[], Encoder]]]:
    """Yield (name, constructor) of every encoder except the references, fastest first. A constructor may raise.

    `stored` is the object of the tokenizer.json, if a tokenizer.json was loaded. `model` is the SentencePiece form, if any.
    """
    if model is not None:
        yield "cached pieces", lambda: CachedPieceEncoder(model)
    if stored is not None:
        yield "cached bytes", lambda: CachedByteEncoder(stored, reference)
    yield "fastokens", lambda: FastokensEncoder(tokenizer_json.decode())
    yield "gigatoken", lambda: GigatokenEncoder(tokenizer_json.decode())


def first_difference(encoder: Encoder, reference: Encoder, texts: Sequence[str]) -> str | None:
    """Return the first text whose ids differ between two encoders; None if no text differs."""
    found, expected = encoder.encode(texts), reference.encode(texts)
    if np.array_equal(found[1], expected[1]) and np.array_equal(found[0], expected[0]):
        return None
    for text in texts:
        if not np.array_equal(encoder.encode([text])[0], reference.encode([text])[0]):
            return text
    return texts[0]  # they differ only in one batch


def flat(documents: Sequence[Sequence[int]]) -> FlatIds:
    """Return lists of ids as one array with offsets."""
    offsets = np.zeros(len(documents) + 1, np.int64)
    np.cumsum([len(document) for document in documents], out=offsets[1:])
    ids = np.empty(int(offsets[-1]), np.uint32)
    for index, document in enumerate(documents):
        ids[offsets[index] : offsets[index + 1]] = document
    return ids, offsets


class HubEncoder:
    """The `tokenizers` library on a tokenizer.json."""

    def __init__(self, tokenizer_json: bytes, where: str, vocab: dict[str, int] | None = None) -> None:
        import tokenizers

        self.name = f"tokenizers {tokenizers.__version__}"
        try:
            self.tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"{where} is not a tokenizer.json of the tokenizers library ({error})") from error
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True
        self._vocab = vocab

    def encode(self, texts: Sequence[str]) -> FlatIds:
        """Return the ids of each text; see Encoder."""
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return flat([encoding.ids for encoding in encodings])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; see ReferenceEncoder."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def vocab(self) -> dict[str, int]:
        """Return the id of every token; see ReferenceEncoder."""
        return dict(self.tokenizer.get_vocab(with_added_tokens=True)) if self._vocab is None else self._vocab


class SentencePieceEncoder:
    """The `sentencepiece` library on a .model."""

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        self.name = f"sentencepiece {sentencepiece.__version__}"
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    def encode(self, texts: Sequence[str]) -> FlatIds:
        """Return the ids of each text; see Encoder."""
        return flat(self.processor.encode(list(texts), out_type=int, num_threads=1))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; see ReferenceEncoder."""
        return str(self.processor.decode(list(ids)))

    def vocab(self) -> dict[str, int]:
        """Return the id of every token; see ReferenceEncoder."""
        return {self.processor.id_to_piece(index): index for index in range(self.processor.vocab_size())}


class FastokensEncoder:
    """The `fastokens` library on a tokenizer.json."""

    def __init__(self, tokenizer_json: str) -> None:
        for name in ("RAYON_NUM_THREADS", "FASTOKENS_BPE_THREADS"):
            os.environ[name] = "1"  # one thread per worker; threads do not survive a fork
        import fastokens

        self.name = f"fastokens {_version('fastokens')}"
        self.tokenizer = fastokens.Tokenizer.from_json_str(tokenizer_json)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def encode(self, texts: Sequence[str]) -> FlatIds:
        """Return the ids of each text; see Encoder."""
        ids, offsets = self.tokenizer.encode_batch_flat(list(texts), split_special_tokens=True)
        return np.frombuffer(ids, np.uint32), np.frombuffer(offsets, np.int64)


class GigatokenEncoder:
    """The `gigatoken` library on a tokenizer.json. Its cache of words has no limit."""

    def __init__(self, tokenizer_json: str) -> None:
        import gigatoken

        self.name = f"gigatoken {_version('gigatoken')}"
        self.tokenizer = gigatoken.Tokenizer.from_json(tokenizer_json)

    def encode(self, texts: Sequence[str]) -> FlatIds:
        """Return the ids of each text; see Encoder."""
        if not texts:
            return flat([])
        layout = self.tokenizer.encode_batch(list(texts), parallel=False).layout
        return np.asarray(layout.content.data), np.asarray(layout.offsets.data).astype(np.int64)


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


class CachedEncoder:
    """Base of the two encoders of `csrc/helpers`. `_encoder` is the C++ object."""

    _encoder: Any

    def encode(self, texts: Sequence[str]) -> FlatIds:
        """Return the ids of the texts; see Encoder."""
        ids: npt.NDArray[np.uint32]
        offsets: npt.NDArray[np.int64]
        ids, offsets = self._encoder.encode(texts)
        return ids, offsets

    def statistics(self) -> dict[str, int]:
        """Return counts since the start, and the state of the cache.

        units: encoded units; misses: those that were not in the cache; steps: merging steps; clears: times that the cache was
        emptied; cached: units in the cache now; cache_bytes: maximum memory of the cache.
        """
        found: dict[str, int] = self._encoder.statistics()
        return found


class CachedPieceEncoder(CachedEncoder):
    """A cached encoder of the SentencePiece `.model` file `model`, for which `why_not_cached` must return None.

    The ids equal those of the library. Several threads may share the encoder; they wait for one another.
    """

    name = "cached pieces (csrc)"

    def __init__(self, model: bytes, cache_bytes: int = CACHE_BYTES) -> None:
        reason = why_not_cached(model)
        if reason is not None:
            raise UsageError(f"this SentencePiece model {reason}; encode with the sentencepiece library")
        from megatron_ledom._helpers import PieceEncoder

        proto = parse_model(model, "the model")
        self._encoder = PieceEncoder(
            pieces=[piece.piece.encode() for piece in proto.pieces],
            scores=[piece.score for piece in proto.pieces],
            types=[piece.type for piece in proto.pieces],
            byte_fallback=proto.trainer_spec.byte_fallback,
            dummy_prefix=proto.normalizer_spec.add_dummy_prefix,
            cache_bytes=cache_bytes,
        )


def why_not_cached(model: bytes) -> str | None:
    """Return why CachedPieceEncoder cannot use a `.model` file, as the end of "this model ..."; None if it can."""
    proto = parse_model(model, "the model")
    trainer, normalizer, kinds = proto.trainer_spec, proto.normalizer_spec, proto.SentencePiece
    types = [piece.type for piece in proto.pieces]
    num_bytes = types.count(kinds.BYTE)
    found = [
        (trainer.model_type != trainer.BPE, "is not a BPE model"),
        (bool(normalizer.precompiled_charsmap), f"normalises text ({normalizer.name})"),
        (normalizer.remove_extra_whitespaces, "removes extra whitespace"),
        (not normalizer.escape_whitespaces, f"does not write spaces as {SPACE}"),
        (trainer.treat_whitespace_as_suffix, "puts the space at the end of a word"),
        (kinds.USER_DEFINED in types, "has user-defined pieces, which are matched before merging"),
        (kinds.UNUSED in types, "has unused pieces, which are split in a way that depends on the whole text"),
        (num_bytes != (256 if trainer.byte_fallback else 0), f"has {num_bytes} byte pieces"),
        (types.count(kinds.UNKNOWN) != 1, f"has {types.count(kinds.UNKNOWN)} unknown pieces"),
        (len(types) > MAX_PIECES, f"has more than {MAX_PIECES:,} pieces"),
    ]
    return next((reason for applies, reason in found if applies), None) or _confusable(proto)


def _confusable(proto: Any) -> str | None:
    """Return the reason if merging can produce the spelling of a reserved piece: only the library gives it the reserved id."""
    normal = {piece.piece for piece in proto.pieces if piece.type == proto.SentencePiece.NORMAL}
    for piece in proto.pieces:
        if piece.type != proto.SentencePiece.NORMAL and (len(piece.piece) < 2 or piece.piece in normal):
            return f"has the reserved piece {piece.piece!r}, which a text can become"
    return None


class CachedByteEncoder(CachedEncoder):
    """A cached encoder of the object of a tokenizer.json, for which `why_not_bytes` must return None.

    If the tokenizer requires NFC, the `tokenizers` library normalises the texts that are not in NFC. `reference` encodes
    those of them that contain an added token that is not special. Several threads may share the encoder; they wait for one
    another.
    """

    name = "cached bytes (csrc)"

    def __init__(self, stored: dict[str, Any], reference: Encoder, cache_bytes: int = CACHE_BYTES) -> None:
        reason = why_not_bytes(stored)
        if reason is not None:
            raise UsageError(f"it {reason}")
        from megatron_ledom._helpers import ByteEncoder, not_nfc

        model = stored["model"]
        added, self._cut = _added_tokens(stored)
        self._reference = reference
        self._find_odd = not_nfc if stored.get("normalizer") is not None else None
        self._encoder = ByteEncoder(
            vocab=model["vocab"],
            merges=model["merges"],
            pattern=_scanner(stored["pre_tokenizer"]),
            whole_units=bool(model.get("ignore_merges")),
            added=added,
            cache_bytes=cache_bytes,
        )

    def encode(self, texts: Sequence[str]) -> FlatIds:
        """Return the ids of the texts; see Encoder. An added token that is not special gets its own id."""
        odd = self._find_odd(texts) if self._find_odd is not None else []
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
    """Return why CachedByteEncoder cannot use the object of a tokenizer.json, as the end of "it ..."; None if it can."""
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
        return "has an unknown pre-tokenizer"
    if not _adds_specials_only(processor):
        return f"has the post-processor {str(processor)[:60]}"
    return _why_not_added(stored)


def _scanner(pre_tokenizer: Any) -> str | None:
    """Return the name of the scanner that splits like a pre-tokenizer; None if there is none."""
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
    options["trim_offsets"] = True  # does not change ids
    return options == {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _adds_specials_only(processor: Any) -> bool:
    """Return True if a post-processor does nothing but add specials."""
    if not isinstance(processor, dict):
        return processor is None
    if processor.get("type") == "Sequence":
        return all(_adds_specials_only(step) for step in processor.get("processors") or [None])
    if processor.get("type") == "TemplateProcessing":
        return [next(iter(step)) for step in processor["single"]].count("Sequence") == 1
    return processor.get("type") == "ByteLevel"


def _why_not_added(stored: dict[str, Any]) -> str | None:
    """Return why the added tokens cannot be used, as the end of "it ..."; None if they can."""
    tokens = stored.get("added_tokens") or []
    cut = [token for token in tokens if not token.get("special")]
    for token in tokens:
        if set(token) != TOKEN_OPTIONS:
            return f"has the added token {token.get('content')!r} with unknown options"
    for token in cut:
        if token["single_word"] or token["lstrip"] or token["rstrip"]:
            return f"has the added token {token['content']!r}, found in some positions only"
        if token["normalized"] and stored.get("normalizer") is not None and not token["content"].isascii():
            return f"has the added token {token['content']!r}, which is normalised"
    if len({token["normalized"] for token in cut}) > 1:
        return "has added tokens of two kinds, found before and after normalising"
    return None


def _added_tokens(stored: dict[str, Any]) -> tuple[list[tuple[str, int, bool]], list[str]]:
    """Return (content, id, True to encode it as text) of the tokens to find in texts, and the contents of those to cut out."""
    tokens = [token for token in stored.get("added_tokens") or [] if token["content"]]
    cut = [token for token in tokens if not token["special"]]
    if not cut:
        return [], []
    together = [token for token in tokens if token["normalized"] == cut[0]["normalized"]]
    return [(token["content"], token["id"], token["special"]) for token in together], [token["content"] for token in cut]
