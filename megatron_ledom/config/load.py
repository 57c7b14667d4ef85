"""Read and write a RunConfig: YAML with one `base:`, dotted overrides, and one error that lists all problems.

OmegaConf parses and merges, pydantic checks types; this file combines them. `published` returns a config that may
be published: without folders of the machine, free text and resolved secrets.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from megatron_ledom.config.problems import config_keys, describe_problems, first_line, refuse_secrets
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.config.shipped import config_path, shipped_configs
from megatron_ledom.errors import ConfigError
from megatron_ledom.storage.files import write_whole

REQUIRED_SECTIONS = ("model", "train")
SINGLE_KEYS = ("run_dir", "init_from", "init_state")
"""Keys of RunConfig that are not sections."""
_ADAPTER: TypeAdapter[RunConfig] = TypeAdapter(RunConfig)


def load_config(path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the config of a YAML file, merged over its `base:`, with `overrides` (`section.key=value`) applied last.

    `path` can also be the name of a config that comes with the package, such as `ledom_7b`. Raises ConfigError, which lists
    every problem by its dotted key. Relations between sections are checked by `checks.check_config`.
    """
    values = merged_values(config_path(path), overrides)
    return config_from_dict(values, f"{path} with its overrides" if overrides else path)


def merged_values(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the plain values of a YAML file, merged over its `base:`, with `overrides` applied last. Raise ConfigError."""
    layers = [_load_file(path, ()), *[_parse_override(text) for text in overrides]]
    try:
        merged = OmegaConf.merge(*layers)
        refuse_secrets(OmegaConf.to_container(merged, resolve=False), str(path))
        values = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {first_line(error)}; write the value itself") from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def config_from_dict(values: dict[str, Any], where: str) -> RunConfig:
    """Return the config of plain `values`, as `to_dict` returns them; `where` names their source in errors."""
    sections = {str(key): value for key, value in values.items()}
    for section in REQUIRED_SECTIONS:
        sections.setdefault(section, {})
    prepared = {key: {} if value is None and key not in SINGLE_KEYS else value for key, value in sections.items()}
    try:
        return _ADAPTER.validate_json(json.dumps(whole_numbers(prepared)), strict=True)
    except ValidationError as error:
        raise ConfigError(describe_problems(error, prepared, where)) from error


def merged_yaml(path: str) -> str:
    """Return a config as YAML, merged over its `base:`, with only the keys that the files set."""
    return str(OmegaConf.to_yaml(_load_file(config_path(path), ())))


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Return every key of the config with its value, as plain numbers, texts, lists and dicts."""
    plain: dict[str, Any] = _ADAPTER.dump_python(config, mode="json")
    return plain


def to_yaml(config: RunConfig) -> str:
    """Return the resolved config as YAML, which `load_config` reads back to an equal config."""
    return str(OmegaConf.to_yaml(OmegaConf.create(to_dict(config))))


def save_config(config: RunConfig, path: str) -> None:
    """Write the resolved config as YAML; the file appears whole or not at all."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    write_whole(path, to_yaml(config).encode())


def _load_file(path: Path, loaded_by: tuple[Path, ...]) -> DictConfig:
    """Return a file merged over its base. `loaded_by` lists the files that led here, to refuse a cycle."""
    if path.resolve() in loaded_by:
        chain = " -> ".join(str(file) for file in (*loaded_by, path.resolve()))
        raise ConfigError(f"base: the files are based on each other ({chain}); remove one `base:`")
    content = _read_yaml(path, loaded_by)
    base = content.pop("base", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise ConfigError(f"base={base!r} in {path} is not a path; expected one YAML file, relative to {path.parent}/")
    merged = OmegaConf.merge(_load_file(path.parent / base, (*loaded_by, path.resolve())), content)
    assert isinstance(merged, DictConfig)
    return merged


def _read_yaml(path: Path, loaded_by: tuple[Path, ...]) -> DictConfig:
    as_base = f" (the base of {loaded_by[-1]})" if loaded_by else ""
    try:
        content = OmegaConf.load(path)
    except FileNotFoundError as error:
        names = "" if loaded_by else f", or one of {', '.join(shipped_configs())}"
        raise ConfigError(f"{path}{as_base} does not exist; give the path of a YAML file{names}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}{as_base} cannot be read: {error}") from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}{as_base} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{path}{as_base} contains a list or a text; expected sections such as `model:` with keys below")
    return content


def _parse_override(text: str) -> DictConfig:
    key, equals, _ = text.partition("=")
    if not equals or not key.strip("."):
        raise ConfigError(f"override {text!r} is not of the form section.key=value, for example train.train_iters=100")
    if key == "base":
        raise ConfigError(f"override {text!r}: base can only be set in a file; pass another --config instead")
    if key.startswith("-"):
        raise ConfigError(f"override {text!r} is not of the form section.key=value; remove the leading dashes")
    try:
        return OmegaConf.from_dotlist([text])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"override {text!r}: the value is not valid YAML: {' '.join(str(error).split())}") from error


def whole_numbers(value: Any) -> Any:
    """Turn floats without a fraction into ints: YAML reads `2e3` as a float. Float fields accept ints as well."""
    if isinstance(value, dict):
        return {str(key): whole_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [whole_numbers(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


NAMED = (
    *("run_dir", "init_from", "data.tokenizer", "data.train_blend", "data.valid_blend", "data.valid_sets", "data.test_sets"),
    "train.auxiliary.teacher",
)
"""Keys with paths whose last part describes the model."""


def published(config: RunConfig) -> dict[str, Any]:
    """Return every key of the config with its value, but without the user's texts; paths in NAMED keep only their last part."""
    values = to_dict(config)
    for key in text_keys():
        *sections, name = key.split(".")
        keys = values
        for section in sections:
            keys = keys[section]
        keys[name] = _last_parts(keys[name]) if key in NAMED else None
    return values


def text_keys() -> Iterator[str]:
    """Yield every key whose value can be a text of the user, as `section.key`."""
    yield from (key for key, hint in config_keys().items() if _accepts_text(hint))


def _accepts_text(hint: Any) -> bool:
    """Return True for a type that contains str; a Literal has values, not types."""
    return hint is str or any(_accepts_text(inner) for inner in get_args(hint) if not isinstance(inner, str))


def _last_parts(value: Any) -> Any:
    if isinstance(value, str):
        return os.path.basename(re.split(r"[?#]", value)[0].rstrip("/"))
    if isinstance(value, list):
        return [_last_parts(item) for item in value]
    if isinstance(value, dict):
        return {key: _last_parts(item) for key, item in value.items()}
    return value
