"""What turns texts into ids: several libraries that do the same at very different speeds, and the choice among them.

`Tokenizer.use_fastest_engine` tries them from the fastest on; the first whose ids equal the reference's on real samples of the
corpus and on texts that tell tokenizers apart is taken. The reference is `tokenizers` for a tokenizer.json and `sentencepiece`
for a .model.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_ledom.errors import DataError

FlatIds = tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]
"""Ids of all texts one after the other [total] in text order, and where each text begins [texts + 1]."""


class Engine(Protocol):
    """Encodes. No specials are added; a special token spelled out in a text is ordinary text."""

    name: str
    """Library and version, for the log."""

    def encode(self, texts: Sequence[str]) -> FlatIds:
        """Ids of the texts; see FlatIds."""


class ReferenceEngine(Engine, Protocol):
    """Knows the vocabulary, too."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids in text order, without specials."""

    def vocab(self) -> dict[str, int]:
        """The id of every token, added ones included."""


def flat(documents: Sequence[Sequence[int]]) -> FlatIds:
    """Lists of ids as one array with offsets."""
    offsets = np.zeros(len(documents) + 1, np.int64)
    np.cumsum([len(document) for document in documents], out=offsets[1:])
    ids = np.empty(int(offsets[-1]), np.uint32)
    for index, document in enumerate(documents):
        ids[offsets[index] : offsets[index + 1]] = document
    return ids, offsets


class HubEngine:
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
        """Ids of each text; see Engine."""
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return flat([encoding.ids for encoding in encodings])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; see ReferenceEngine."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def vocab(self) -> dict[str, int]:
        """The id of every token; see ReferenceEngine."""
        return dict(self.tokenizer.get_vocab(with_added_tokens=True)) if self._vocab is None else self._vocab


class PieceEngine:
    """The `sentencepiece` library on a .model."""

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        self.name = f"sentencepiece {sentencepiece.__version__}"
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    def encode(self, texts: Sequence[str]) -> FlatIds:
        """Ids of each text; see Engine."""
        return flat(self.processor.encode(list(texts), out_type=int, num_threads=1))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; see ReferenceEngine."""
        return str(self.processor.decode(list(ids)))

    def vocab(self) -> dict[str, int]:
        """The id of every token; see ReferenceEngine."""
        return {self.processor.id_to_piece(index): index for index in range(self.processor.vocab_size())}


class FastokensEngine:
    """The `fastokens` library on a tokenizer.json."""

    def __init__(self, tokenizer_json: str) -> None:
        for name in ("RAYON_NUM_THREADS", "FASTOKENS_BPE_THREADS"):
            os.environ[name] = "1"  # one thread a worker; and threads do not survive a fork
        import fastokens

        self.name = f"fastokens {_version('fastokens')}"
        self.tokenizer = fastokens.Tokenizer.from_json_str(tokenizer_json)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def encode(self, texts: Sequence[str]) -> FlatIds:
        """Ids of each text; see Engine."""
        ids, offsets = self.tokenizer.encode_batch_flat(list(texts), split_special_tokens=True)
        return np.frombuffer(ids, np.uint32), np.frombuffer(offsets, np.int64)


class GigatokenEngine:
    """The `gigatoken` library on a tokenizer.json. Its cache of words is not bounded."""

    def __init__(self, tokenizer_json: str) -> None:
        import gigatoken

        self.name = f"gigatoken {_version('gigatoken')}"
        self.tokenizer = gigatoken.Tokenizer.from_json(tokenizer_json)

    def encode(self, texts: Sequence[str]) -> FlatIds:
        """Ids of each text; see Engine."""
        if not texts:
            return flat([])
        layout = self.tokenizer.encode_batch(list(texts), parallel=False).layout
        return np.asarray(layout.content.data), np.asarray(layout.offsets.data).astype(np.int64)


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def fast_engines(
    tokenizer_json: bytes, stored: dict[str, Any] | None, model: bytes | None, reference: Engine
) -> Iterator[tuple[str, Callable[[], Engine]]]:
    """(name, how to make it) of every engine there is besides the references, the fastest first; making one may raise.

    `stored` is the object of the tokenizer.json, where it was that which was loaded; `model` the SentencePiece form, if any.
    """
    if model is not None:
        from megatron_ledom.data.piece_engine import CachedPieceEngine

        yield "cached pieces", lambda: CachedPieceEngine(model)
    if stored is not None:
        from megatron_ledom.data.byte_engine import CachedByteEngine

        yield "cached bytes", lambda: CachedByteEngine(stored, reference)
    yield "fastokens", lambda: FastokensEngine(tokenizer_json.decode())
    yield "gigatoken", lambda: GigatokenEngine(tokenizer_json.decode())


def first_difference(engine: Engine, reference: Engine, texts: Sequence[str]) -> str | None:
    """The first text whose ids differ between two engines, None if none does."""
    found, expected = engine.encode(texts), reference.encode(texts)
    if np.array_equal(found[1], expected[1]) and np.array_equal(found[0], expected[0]):
        return None
    for text in texts:
        if not np.array_equal(engine.encode([text])[0], reference.encode([text])[0]):
            return text
    return texts[0]  # only together do they differ
