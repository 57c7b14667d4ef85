"""The reader of tokenizer files that all commands share, so that all of them get the same ids.

If a folder has both a tokenizer.json and a tokenizer.model, the tokenizer.json is read. A .model is converted exactly. Tokens
that other files of the folder declare are added as stock transformers adds them. The code of a folder is never run, and the
user is never prompted to allow it.
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
"""Files of stock tokenizer classes, which transformers reads without code of the folder."""


@dataclass(kw_only=True, slots=True)
class TokenizerFiles:
    """The content of a tokenizer's files."""

    name: str
    """A name for people: that of the folder or the file."""
    path: str
    """The path as given."""
    content: bytes
    """The tokenizer.json, including the tokens that other files declare."""
    stored: dict[str, Any]
    """The object of `content`."""
    config: dict[str, Any]
    """tokenizer_config.json with the additions of special_tokens_map.json. If it names no bos or eos, those of a .model."""
    inside: list[dict[str, Any]]
    """Added tokens, as in a tokenizer.json, with ids of the vocabulary. Stock transformers cuts them out of a text."""
    model: bytes | None
    """The SentencePiece form; None if added tokens that are not special change the ids."""
    is_converted: bool
    """True if a .model was read; `content` is its conversion."""
    is_extended: bool
    """True if other files of the folder declare tokens of `content`."""
    sha256: str
    """See `vocabulary_hash`."""

    def special_id(self, role: str) -> int | None:
        """Return the id of the special token that the config names for a role such as bos; None without one."""
        name = name_of(self.config.get(f"{role}_token"))
        return None if name is None else vocabulary(self.stored).get(name)

    def as_stock_reads(self) -> dict[str, Any]:
        """Return the tokenizer.json with every token that stock transformers cuts out of a text as an added token."""
        added = [*(self.stored.get("added_tokens") or ()), *self.inside]
        whole = [token["content"] for token in added] if self.is_converted else []
        return sentencepiece_bpe.prefix_texts_only({**self.stored, "added_tokens": added}, whole)


def other_ends(vocab: Mapping[str, int], ids: Iterable[int]) -> dict[str, int]:
    """Return the tokens named like an end of a document, with their ids, if any of these ids is not in `ids`."""
    named = {token: id_ for token, id_ in sorted(vocab.items()) if token.strip("<|>").lower() in END_NAMES}
    return named if set(named.values()) - set(ids) else {}


def read_tokenizer(path: str, *, add_specials: bool = False, eod: str | int | None = None) -> TokenizerFiles:
    """Read a Hugging Face folder, a `tokenizer.json`, a SentencePiece `.model` or tiktoken ranks (`.tiktoken`).

    `add_specials` appends the five specials of LEDOM to the vocabulary and makes <EOD> the eos. `eod`, a token or its id, ends
    documents; by default it is the eos. In a .model it becomes a control piece, so that its spelling in a text is text.
    Raises DataError or UsageError if the tokenizer cannot be read exactly.
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
    """Return the tokenizer.json of the vocabulary alone, and the SentencePiece form or None. May add entries to `config`."""
    if file.suffix == ".model":
        model = file.read_bytes()
        model = sentencepiece_bpe.append_specials(model) if add_specials else model
        model = model_with_control(model, str(file), name_of(config.get("eos_token")) if eod is None else eod)
        return _from_model(model, str(file), config), model
    if file.name in OTHER_FORMATS:
        return _from_stock_class(file.parent, config), None
    if file.suffix == ".tiktoken":
        return _ranks_as_json(file, config), None
    model_file = file.with_name(MODEL)
    return file.read_bytes(), model_file.read_bytes() if file.name == JSON and model_file.is_file() else None


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
                    f"{given / name} is a link to a file that does not exist; the folder is incomplete, download it again"
                )
        for name in (JSON, MODEL, *OTHER_FORMATS):
            if (given / name).is_file():
                return given / name
        raise UsageError(f"folder {path} contains neither {JSON} nor {MODEL}; give a folder that has one of them, or the file")
    if given.suffix not in (".json", ".model", ".tiktoken"):
        raise UsageError(
            f"tokenizer {path} is neither a folder, a tokenizer.json, a SentencePiece .model nor a .tiktoken; give one of these"
        )
    return given


def _parsed(content: bytes, where: str) -> dict[str, Any]:
    stored = parse_object(content, where)
    if not isinstance(stored.get("model"), dict):
        raise DataError(
            f"{where} is not a tokenizer.json of the tokenizers library: it has no model; give a file that the tokenizers library wrote"
        )
    return stored


def _from_model(content: bytes, where: str, config: dict[str, Any]) -> bytes:
    """Return the exact conversion of a .model. A config without bos or eos gets those of the .model."""
    converted = sentencepiece_bpe.convert(content, where)
    proto = sentencepiece_bpe.parse_model(content, where)
    if proto.normalizer_spec.add_dummy_prefix and config.get("add_prefix_space") is False:
        raise DataError(
            f"{where} puts a space before every text, but the tokenizer_config.json next to it has add_prefix_space=false, so it is"
            f" unclear which ids were trained; put the {JSON} of the model there"
        )
    for role, index in (("bos", proto.trainer_spec.bos_id), ("eos", proto.trainer_spec.eos_id)):
        if 0 <= index < len(proto.pieces):
            config.setdefault(f"{role}_token", proto.pieces[index].piece)
    return converted.encode()


def _with_bos(stored: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer.json that adds the bos if the config requires it, as stock transformers does for a .model."""
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
    """Return the tokenizer.json of a folder with the files of a stock tokenizer class, as transformers converts it."""
    from transformers import AutoTokenizer

    try:
        not_added = dict.fromkeys(unknown_roles(config))  # their values may be secrets
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **not_added)
        content = loaded.backend_tokenizer.to_str() if getattr(loaded, "is_fast", False) else None
    except Exception as error:  # transformers raises many kinds
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{folder} has no readable tokenizer: {first[:200]}; put its {JSON} there") from error
    if content is None:
        raise DataError(f"the tokenizer of {folder} cannot be converted to the tokenizers library; put a {JSON} there")
    return str(content).encode()


def _with_specials(stored: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a tokenizer.json with the five specials after its last id."""
    vocab = vocabulary(stored)
    if there := sorted(set(vocab) & set(sentencepiece_bpe.SPECIALS)):
        raise UsageError(f"tokenizer {where} already has {', '.join(there)}; omit --add-specials")
    first = max(vocab.values(), default=-1) + 1
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    new = [{"id": first + k, "content": token, **flags} for k, token in enumerate(sentencepiece_bpe.SPECIALS)]
    return {**stored, "added_tokens": [*(stored.get("added_tokens") or []), *new]}
