"""The one reader of tokenizers: preprocessing, training, conversion, inference and evaluation all take their ids from here.

A folder's tokenizer.json goes before its tokenizer.model, which is converted exactly; tokens that other files of the folder declare
are added as stock transformers adds them. No code of a folder is ever run, and no question about it is asked.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.provenance import vocabulary_hash
from megatron_ledom.tokenizers import sentencepiece_bpe, tiktoken_ranks
from megatron_ledom.tokenizers.added_tokens import (
    ADDED,
    CONFIG,
    SPECIALS_MAP,
    add_tokens,
    name_of,
    read_config,
    unknown_roles,
    vocabulary,
)
from megatron_ledom.tokenizers.end_token import model_with_control
from megatron_ledom.tokenizers.json_objects import as_bytes, parse_object

JSON, MODEL = "tokenizer.json", "tokenizer.model"
END_NAMES = ("eod", "endoftext")
OTHER_FORMATS = ("vocab.json", "vocab.txt")
"""Files of stock tokenizer classes that transformers reads without code of the folder."""


@dataclass(kw_only=True, slots=True)
class TokenizerFiles:
    """The content of a tokenizer's files."""

    name: str
    """For people: the folder's or the file's."""
    path: str
    """As it was given."""
    content: bytes
    """The tokenizer.json, with the tokens that other files declare."""
    stored: dict[str, Any]
    """The object of `content`."""
    config: dict[str, Any]
    """tokenizer_config.json, with what special_tokens_map.json adds to it; its bos and eos are those of a .model if it has none."""
    inside: list[dict[str, Any]]
    """Added tokens, as in a tokenizer.json, that have their id from the vocabulary; stock transformers cuts them out of a text."""
    model: bytes | None
    """The SentencePiece form; None where added tokens that are not special give other ids than it does."""
    is_converted: bool
    """A .model was read, and `content` is its conversion."""
    is_extended: bool
    """`content` has tokens that other files of the folder declare."""
    sha256: str
    """See `vocabulary_hash`."""

    def special_id(self, role: str) -> int | None:
        """Return the id of the special token that the config names for `role`, such as bos; None if there is none."""
        name = name_of(self.config.get(f"{role}_token"))
        return None if name is None else vocabulary(self.stored).get(name)

    def as_stock_reads(self) -> dict[str, Any]:
        """Return the tokenizer.json in which all tokens that stock transformers cuts out of a text are added tokens."""
        added = [*(self.stored.get("added_tokens") or ()), *self.inside]
        whole = [token["content"] for token in added] if self.is_converted else []
        return sentencepiece_bpe.prefix_texts_only({**self.stored, "added_tokens": added}, whole)


def other_ends(vocab: Mapping[str, int], ids: Iterable[int]) -> dict[str, int]:
    """Return the tokens that are named like the end of a document, with their ids, if one of them is none of `ids`."""
    named = {token: id_ for token, id_ in sorted(vocab.items()) if token.strip("<|>").lower() in END_NAMES}
    return named if set(named.values()) - set(ids) else {}


def read_tokenizer(path: str, *, add_specials: bool = False, eod: str | int | None = None) -> TokenizerFiles:
    """Read a Hugging Face folder, a `tokenizer.json`, a SentencePiece `.model` or tiktoken ranks (`.tiktoken`).

    With `add_specials` the five specials of the original are appended behind the vocabulary and <EOD> becomes the eos.
    `eod`, a token or its id, is the one that ends documents, by default the eos: of a .model it becomes a control piece, so that
    its spelling is text.
    Raises DataError or UsageError for what cannot be read exactly.
    """
    file = _vocabulary_file(path)
    config = read_config(file.parent)
    original, model = _original(file, config, add_specials=add_specials, eod=eod)
    parsed = _parsed(original, str(file))
    stored, inside = add_tokens(parsed, config, file.parent)
    is_converted, is_extended = file.suffix == ".model", stored is not parsed
    words = [token["content"] for token in stored.get("added_tokens") or () if not token.get("special")]
    if is_converted:
        stored = _with_bos(sentencepiece_bpe.prefix_texts_only(stored, words if is_extended else []), config)
    elif add_specials:
        stored = _with_specials(stored, str(file))
    if add_specials:
        config["eos_token"] = sentencepiece_bpe.EOD_TOKEN
    return TokenizerFiles(
        name=file.parent.resolve().name if file.stem == "tokenizer" or file.name in OTHER_FORMATS else file.stem,
        path=path,
        content=original if stored is parsed else as_bytes(stored),
        stored=stored,
        config=config,
        inside=inside,
        model=model if not words or (is_converted and not is_extended) else None,
        is_converted=is_converted,
        is_extended=is_extended,
        sha256=vocabulary_hash(stored),
    )


def _original(file: Path, config: dict[str, Any], *, add_specials: bool, eod: str | int | None) -> tuple[bytes, bytes | None]:
    """The tokenizer.json of the vocabulary alone, and the SentencePiece form if there is one; may complete `config`."""
    if file.suffix == ".model":
        model = file.read_bytes()
        model = sentencepiece_bpe.append_specials(model) if add_specials else model
        model = model_with_control(model, str(file), name_of(config.get("eos_token")) if eod is None else eod)
        return _from_model(model, str(file), config), model
    if file.name in OTHER_FORMATS:
        return _from_stock_class(file.parent, config), None
    if file.suffix == ".tiktoken":
        return _ranks_as_json(file, config), None
    beside = file.with_name(MODEL)
    return file.read_bytes(), beside.read_bytes() if file.name == JSON and beside.is_file() else None


def _vocabulary_file(path: str) -> Path:
    given = Path(path)
    if not given.exists():
        raise UsageError(
            f"tokenizer {path} does not exist; give a Hugging Face folder, a tokenizer.json, a SentencePiece .model or a .tiktoken"
        )
    if given.is_dir():
        for name in (JSON, MODEL, ADDED, CONFIG, SPECIALS_MAP, *OTHER_FORMATS):
            if (given / name).is_symlink() and not (given / name).exists():
                raise DataError(
                    f"{given / name} is a link to a file that is not there; fetch the folder again, it is not whole"
                )
        for name in (JSON, MODEL, *OTHER_FORMATS):
            if (given / name).is_file():
                return given / name
        raise UsageError(f"folder {path} holds neither {JSON} nor {MODEL}; give a folder or file with one")
    if given.suffix not in (".json", ".model", ".tiktoken"):
        raise UsageError(
            f"tokenizer {path} is neither a folder, a tokenizer.json, a SentencePiece .model nor a .tiktoken; give one of these"
        )
    return given


def _parsed(content: bytes, where: str) -> dict[str, Any]:
    stored = parse_object(content, where)
    if not isinstance(stored.get("model"), dict):
        raise DataError(
            f"{where} is not a tokenizer.json of the tokenizers library: it holds no model; give the file the tokenizers library writes"
        )
    return stored


def _from_model(content: bytes, where: str, config: dict[str, Any]) -> bytes:
    """The exact conversion of a .model; its bos and eos become those of a config that names none."""
    converted = sentencepiece_bpe.convert(content, where)
    proto = sentencepiece_bpe.parse_model(content, where)
    if proto.normalizer_spec.add_dummy_prefix and config.get("add_prefix_space") is False:
        raise DataError(
            f"{where} puts a space in front of every text, the tokenizer_config.json beside it says add_prefix_space=false: it is not"
            f" clear which ids were trained; put the {JSON} of the model there"
        )
    for role, index in (("bos", proto.trainer_spec.bos_id), ("eos", proto.trainer_spec.eos_id)):
        if 0 <= index < len(proto.pieces):
            config.setdefault(f"{role}_token", proto.pieces[index].piece)
    return converted.encode()


def _with_bos(stored: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """A template that puts the bos in front, where the config says so: stock transformers makes one for a .model."""
    bos = name_of(config.get("bos_token"))
    if not config.get("add_bos_token") or bos is None:
        return stored
    text = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    ids = {bos: {"id": bos, "ids": [vocabulary(stored)[bos]], "tokens": [bos]}}
    pair = [*text, {"Sequence": {"id": "B", "type_id": 1}}]
    template = {"type": "TemplateProcessing", "single": text, "pair": pair, "special_tokens": ids}
    return {**stored, "post_processor": template}


def _ranks_as_json(file: Path, config: dict[str, Any]) -> bytes:
    encoding = tiktoken_ranks.encoding_of(file, config)
    if len(encoding.special_tokens) == 1:
        config.setdefault("eos_token", next(iter(encoding.special_tokens)))
    return tiktoken_ranks.convert(file, encoding).encode()


def _from_stock_class(folder: Path, config: dict[str, Any]) -> bytes:
    """The tokenizer.json of a folder whose vocabulary is in a stock class's own files, as transformers converts it."""
    from transformers import AutoTokenizer

    try:
        not_added = dict.fromkeys(unknown_roles(config))  # their values may be secrets
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **not_added)
        content = loaded.backend_tokenizer.to_str() if getattr(loaded, "is_fast", False) else None
    except Exception as error:  # transformers raises many kinds
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{folder} has no tokenizer that can be read: {first[:200]}; put its {JSON} there") from error
    if content is None:
        raise DataError(f"the tokenizer of {folder} has no form of the tokenizers library; put a {JSON} there")
    return str(content).encode()


def _with_specials(stored: dict[str, Any], where: str) -> dict[str, Any]:
    """The five specials behind everything a tokenizer.json has."""
    vocab = vocabulary(stored)
    if there := sorted(set(vocab) & set(sentencepiece_bpe.SPECIALS)):
        raise UsageError(f"tokenizer {where} has {', '.join(there)} already; leave --add-specials out")
    first = max(vocab.values(), default=-1) + 1
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    new = [{"id": first + k, "content": token, **flags} for k, token in enumerate(sentencepiece_bpe.SPECIALS)]
    return {**stored, "added_tokens": [*(stored.get("added_tokens") or []), *new]}
