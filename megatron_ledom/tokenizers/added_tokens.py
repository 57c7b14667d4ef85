"""Tokens that a folder declares outside the vocabulary of its tokenizer, and the ids that stock transformers gives them.

Stock transformers (5.x) reads `added_tokens_decoder` of tokenizer_config.json. Without that key it reads
special_tokens_map.json and added_tokens.json. It adds the tokens that the tokenizer lacks in the order of their ids, then the
named special tokens. Each gets the next free id; the ids in the file are ignored. This module refuses a file with other ids.
"""

import logging
from pathlib import Path
from typing import Any

from megatron_ledom.errors import DataError
from megatron_ledom.tokenizers.json_objects import read_object

logger = logging.getLogger(__name__)
ADDED, CONFIG, SPECIALS_MAP = "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"
DECODER, EXTRA, ADDITIONAL = "added_tokens_decoder", "extra_special_tokens", "additional_special_tokens"
ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
OTHER_ROLES = (
    *("image", "video", "audio", "boi", "eoi", "boa", "eoa", "bov", "eov", "vision_bos", "vision_eos"),
    *("image_start", "image_end", "image_break", "audio_start", "audio_end", "audio_bos", "audio_eos"),
    *("vision_start", "vision_end", "video_start", "video_end", "begin_image", "end_image"),
    *("eod", "eot", "eom", "sot", "bot", "prefix", "middle", "suffix", "fill", "end_of_word", "think", "tool_call"),
)
"""Other roles that published tokenizers name as `<role>_token`."""
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
Token = dict[str, Any]
"""An entry of `added_tokens` in a tokenizer.json, without its id."""


def read_config(folder: Path) -> dict[str, Any]:
    """Return tokenizer_config.json with the keys that stock transformers reads from special_tokens_map.json, or {}."""
    config = read_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if DECODER not in config and (folder / SPECIALS_MAP).is_file():
        named = read_object(folder / SPECIALS_MAP)
        config |= {
            key: value for key, value in named.items() if key != ADDITIONAL
        }  # stock transformers reads ADDITIONAL from tokenizer_config.json only
    return config


def add_tokens(stored: dict[str, Any], config: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[Token]]:
    """Add to a tokenizer.json `stored` the tokens that other files of its folder declare.

    Returns the tokenizer.json (a new object if a token was added), and the tokens that have an id in the vocabulary itself but
    that stock transformers cuts out of a text. A special token without an id is added only if the model in the folder has an
    embedding row for its new id; otherwise it is removed from `config`. Raises DataError if the folder gives a token another id
    than stock transformers.
    """
    added = list(stored.get("added_tokens") or [])
    vocab = vocabulary(stored)
    num_model = len(_model_vocabulary(stored))
    inside: list[Token] = []
    num_before = len(added)
    _check_extra(config, folder)
    for index, token, file in _declared(config, folder):
        content = token["content"]
        expected = vocab.get(content, _next_id(added, num_model))
        if index != expected:
            raise DataError(
                f"{file} gives {content!r} the id {index}, but stock transformers gives it {expected}, so the model would use the wrong"
                " embedding rows; correct the id there, or put a complete tokenizer.json into the folder"
            )
        if content not in vocab:
            added.append({"id": index, **token})
            vocab[content] = index
        elif all(content != known["content"] for known in added):
            inside.append({"id": index, **token})
    rows = _rows(folder)
    _drop_unknown_roles(config, vocab, folder)
    known = {token["content"] for token in [*added, *inside]}
    for name, token in _named(config):
        content = token["content"]
        if content in known:
            continue
        known.add(content)
        index = vocab.get(content, _next_id(added, num_model))
        if content in vocab:
            inside.append({"id": index, **token})
        elif rows is not None and index < rows:
            added.append({"id": index, **token})
        else:
            _skip_token(config, name, content, folder)
    return (stored if len(added) == num_before else {**stored, "added_tokens": added}), inside


def vocabulary(stored: dict[str, Any]) -> dict[str, int]:
    """Return the id of every token of a tokenizer.json, with added tokens: as the tokenizers library does, but much faster."""
    vocab = _model_vocabulary(stored)
    found = dict(vocab) if isinstance(vocab, dict) else {piece: index for index, (piece, _) in enumerate(vocab)}
    return found | {token["content"]: token["id"] for token in stored.get("added_tokens") or ()}


def _model_vocabulary(stored: dict[str, Any]) -> Any:
    return stored["model"].get("vocab") or ()


def name_of(value: Any) -> str | None:
    """Return the text of a special token, which a config stores as a text or as an object with `content`; None otherwise."""
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) and found else None


def _declared(config: dict[str, Any], folder: Path) -> list[tuple[int, Token, Path]]:
    """Return (id, token, file) of the tokens whose ids the folder declares, in the order of the ids."""
    found: list[tuple[int, Token, Path]] = []
    if DECODER in config:
        file = folder / CONFIG
        entries = config[DECODER]
        roles = {token["content"] for key, token in _named(config) if key != EXTRA}
        if not isinstance(entries, dict):
            raise DataError(f"{file}: {DECODER} is a {type(entries).__name__}, expected an object of id: token; correct it")
        for index, entry in entries.items():
            content = entry.get("content") if isinstance(entry, dict) else None
            if not str(index).isdecimal() or not isinstance(content, str) or not content:
                raise DataError(
                    f"{file}: {DECODER} has {index!r}: {entry!r}, expected an id and an object with content; correct it"
                )
            found.append((int(index), _token(content, entry, special=content in roles), file))
    elif (file := folder / ADDED).is_file():
        specials = {token["content"] for _, token in _named(config)}
        for content, index in read_object(file).items():
            if type(index) is not int or index < 0 or not content:
                raise DataError(f"{file} gives {content!r} the id {index!r}, expected a whole number of at least 0; correct it")
            found.append((index, _token(content, {}, special=content in specials), file))
    return sorted(found, key=lambda item: item[0])


def _named(config: dict[str, Any]) -> list[tuple[str, Token]]:
    """Return (key, token) of the special tokens that a config names, in the order in which stock transformers adds them."""
    others = _other_roles(config)
    extra = config.get(EXTRA) or config.get(ADDITIONAL) or []
    values = [(key, config.get(key)) for key in (*ROLES, *others)]
    values += [(EXTRA, value) for value in (extra.values() if isinstance(extra, dict) else extra)]
    found = [(key, name_of(value), value) for key, value in values]
    return [
        (key, _token(content, value if isinstance(value, dict) else {}, special=True))
        for key, content, value in found
        if content
    ]


def _other_roles(config: dict[str, Any]) -> list[str]:
    """Return the keys, apart from ROLES, that stock transformers reads as roles of special tokens."""
    return [key for key in config if key.endswith("_token") and key not in ROLES and isinstance(config[key], str)]


def unknown_roles(config: dict[str, Any]) -> list[str]:
    """Return the keys that end like the role of a special token but are not a known role, such as hf_token."""
    return [key for key in _other_roles(config) if key.removesuffix("_token") not in OTHER_ROLES]


def _drop_unknown_roles(config: dict[str, Any], vocab: dict[str, int], folder: Path) -> None:
    """Remove keys such as hf_token from `config`. Their values may be secrets, which no message or export may contain."""
    for key in unknown_roles(config):
        if config[key] not in vocab:
            logger.warning(
                "%s: skipped %s: it is not a known role of a special token, and its value is not a token of the tokenizer",
                folder,
                key,
            )
            del config[key]


def _check_extra(config: dict[str, Any], folder: Path) -> None:
    for key in (EXTRA, ADDITIONAL):
        value = config.get(key)
        if value is not None and not isinstance(value, list | dict):
            raise DataError(
                f"{folder / CONFIG}: {key} is a {type(value).__name__}, expected a list of tokens or an object of role: token;"
                " correct it"
            )


def _token(content: str, flags: dict[str, Any], *, special: bool) -> Token:
    """Return an entry with the defaults of the tokenizers library: only special tokens are found before normalising."""
    special = special or bool(flags.get("special", False))
    default = {"normalized": not special, "special": special}
    return {"content": content, **{name: bool({**default, **flags, "special": special}.get(name, False)) for name in FLAGS}}


def _next_id(added: list[Token], num_model: int) -> int:
    return max([num_model, *(int(token["id"]) + 1 for token in added)])


def _rows(folder: Path) -> int | None:
    """Return the number of embedding rows of the model in the folder; None without a model."""
    if not (folder / "config.json").is_file():
        return None
    config = read_object(folder / "config.json")
    inner = config.get("text_config")
    found = config.get("vocab_size", inner.get("vocab_size") if isinstance(inner, dict) else None)
    return found if type(found) is int else None


def _skip_token(config: dict[str, Any], name: str, content: str, folder: Path) -> None:
    logger.warning(
        "%s: skipped %s %r: it is not a token of the tokenizer, and the folder has no model with a row for it",
        folder,
        name,
        content,
    )
    if name == EXTRA:
        used = config.get(EXTRA) or config.pop(ADDITIONAL)
        config.pop(ADDITIONAL, None)  # not read if the other key exists, which may become empty here
        if isinstance(used, dict):
            config[EXTRA] = {role: value for role, value in used.items() if name_of(value) != content}
        else:
            config[EXTRA] = [value for value in used if name_of(value) != content]
    elif name != "eos_token":  # a missing eod has its own error, or another eod was chosen
        config.pop(name)
