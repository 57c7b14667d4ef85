"""Tokenizers as the data path needs them: flat ids of many texts, no specials added, and a hash that says which ids mean what.

No torch and no transformers here: preprocessing starts in a second. Two engines do the work, `tokenizers` for a
`tokenizer.json` and `sentencepiece` for a `.model`; the ids of both are the same by the check in `sentencepiece_bpe.convert`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import orjson

from megatron_ledom.data import sentencepiece_bpe
from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.provenance import Provenance, vocabulary_hash

LOCAL_CODE = ("auto_map", "tokenizer_file", "name_or_path")  # what a copied tokenizer_config.json must not carry along


class Engine(Protocol):
    """What encodes and decodes."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, text order, no specials added; a special token spelled out in a text is ordinary text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids in text order, without specials."""

    def vocab(self) -> dict[str, int]:
        """The id of every token, added ones included."""


class HubEngine:
    """The `tokenizers` library on a tokenizer.json."""

    def __init__(self, tokenizer_json: str, where: str) -> None:
        from tokenizers import Tokenizer as HubTokenizer

        try:
            self.tokenizer = HubTokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"{where} is not a tokenizer.json of the tokenizers library ({error})") from error
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; see Engine."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; see Engine."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def vocab(self) -> dict[str, int]:
        """The id of every token; see Engine."""
        return dict(self.tokenizer.get_vocab(with_added_tokens=True))


class PieceEngine:
    """The `sentencepiece` library on a .model."""

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; see Engine."""
        ids: list[list[int]] = self.processor.encode(list(texts), out_type=int, num_threads=1)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; see Engine."""
        return str(self.processor.decode(list(ids)))

    def vocab(self) -> dict[str, int]:
        """The id of every token; see Engine."""
        return {self.processor.id_to_piece(index): index for index in range(self.processor.vocab_size())}


class Tokenizer:
    """A loaded tokenizer; made by `load_tokenizer`."""

    def __init__(
        self, *, name: str, path: str, files: dict[str, bytes], config: dict[str, Any], engine: Engine, eod_token: str | None
    ) -> None:
        self.name = name
        """For people; two tokenizers with one name can differ, so comparisons use `sha256`."""
        self.path = path
        """Where it was loaded from, as given."""
        self._files = files
        self._config = config
        self._engine = engine
        self.sha256 = vocabulary_hash(files["tokenizer.json"])
        """See `vocabulary_hash`."""
        vocab = engine.vocab()
        if not vocab:
            raise DataError(f"tokenizer {path} has no tokens; give another one with --tokenizer")
        self.vocab_size: int = max(vocab.values()) + 1
        """Highest id + 1, added tokens included; ids below it may be unused."""
        self.eod_token: str = eod_token or eos_of(config, path)
        """The token that says "the text begins here" to a reverse model, "the text ends here" to a forward one."""
        if self.eod_token not in vocab:
            raise UsageError(f"tokenizer {path} has no token {self.eod_token!r} to end documents with; name one by --eod-token")
        self.eod_id: int = vocab[self.eod_token]

    def encode_batch(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """Ids of all texts one after the other [total] in text order, and where each begins [texts + 1].

        Nothing is added (no BOS, no EOS), and a special token spelled out in a text is encoded as ordinary text, so a
        special eod stands in no document.
        """
        documents = self._engine.encode(texts)
        offsets = np.zeros(len(documents) + 1, np.int64)
        np.cumsum([len(document) for document in documents], out=offsets[1:])
        ids = np.empty(int(offsets[-1]), np.uint32)
        for index, document in enumerate(documents):
            ids[offsets[index] : offsets[index + 1]] = document
        return ids, offsets

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        """The text of ids [length] in text order; specials are left out."""
        return self._engine.decode(ids.tolist() if isinstance(ids, np.ndarray) else ids)

    def provenance(self, direction: Direction) -> Provenance:
        """What a shard, checkpoint or export made with this tokenizer records."""
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
        config = {key: value for key, value in self._config.items() if key not in LOCAL_CODE}
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
            (target / f"{name}.part").write_bytes(content)
            (target / f"{name}.part").replace(target / name)


def eos_of(config: dict[str, Any], path: str) -> str:
    """The eos token a tokenizer_config.json names; refused when it names none."""
    eos = config.get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    if not isinstance(eos, str) or not eos:
        raise UsageError(f"tokenizer {path} names no eos token to end documents with; name one of its tokens by --eod-token")
    return eos


def load_tokenizer(path: str, eod_token: str | None = None) -> Tokenizer:
    """Load a Hugging Face folder, a `tokenizer.json` or a SentencePiece `.model`; a folder's tokenizer.json goes before its .model.

    The eod is `eod_token`, else the eos that tokenizer_config.json in the same folder names, else the eos of a .model.
    """
    file = _vocabulary_file(path)
    name = file.parent.resolve().name if file.stem == "tokenizer" else file.stem
    config = _config_beside(file)
    content = file.read_bytes()
    files, engine = _from_model(content, str(file), config) if file.suffix == ".model" else _from_json(content, str(file))
    return Tokenizer(name=name, path=path, files=files, config=config, engine=engine, eod_token=eod_token)


def _vocabulary_file(path: str) -> Path:
    given = Path(path)
    if not given.exists():
        raise UsageError(
            f"tokenizer {path} does not exist; give a Hugging Face folder, a tokenizer.json or a SentencePiece .model"
        )
    if given.is_dir():
        for name in ("tokenizer.json", "tokenizer.model"):
            if (given / name).is_file():
                return given / name
        raise UsageError(f"folder {path} holds neither tokenizer.json nor tokenizer.model; give a folder or file with one")
    if given.suffix not in (".json", ".model"):
        raise UsageError(
            f"tokenizer {path} is neither a folder, a tokenizer.json nor a SentencePiece .model; give one of these"
        )
    return given


def _config_beside(file: Path) -> dict[str, Any]:
    beside = file.parent / "tokenizer_config.json"
    if not beside.is_file():
        return {}
    try:
        config = orjson.loads(beside.read_bytes())
    except orjson.JSONDecodeError as error:
        raise DataError(f"{beside} is not JSON ({error}); repair it or fetch it again") from error
    if not isinstance(config, dict):
        raise DataError(f"{beside} holds no JSON object; repair it or fetch it again")
    return config


def _from_json(content: bytes, where: str) -> tuple[dict[str, bytes], Engine]:
    try:
        stored = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON ({error}); repair it or fetch it again") from error
    if not isinstance(stored, dict) or "model" not in stored:
        raise DataError(f"{where} is not a tokenizer.json: it holds no model; give the file the tokenizers library writes")
    return {"tokenizer.json": content}, HubEngine(content.decode(), where)


def _from_model(content: bytes, where: str, config: dict[str, Any]) -> tuple[dict[str, bytes], Engine]:
    converted = sentencepiece_bpe.convert(content, where)
    engine = PieceEngine(content)
    for role in ("bos", "eos"):
        index = getattr(engine.processor, f"{role}_id")()
        if index >= 0:
            config.setdefault(f"{role}_token", engine.processor.id_to_piece(index))
    return {"tokenizer.json": converted.encode(), "tokenizer.model": content}, engine
