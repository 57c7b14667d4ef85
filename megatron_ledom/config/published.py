"""The config of a run as strangers may read it: no folders of the machine, no free text, no resolved secret."""

import dataclasses
import os
import re
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from megatron_ledom.config.load import to_dict
from megatron_ledom.config.schema import RunConfig

NAMED = ("run_dir", "data.tokenizer", "data.train_blend", "data.valid_blend", "data.valid_sets", "data.test_sets")
"""Keys that hold paths whose last part says something about the model."""


def published(config: RunConfig) -> dict[str, Any]:
    """Return every key of the run with its value; of the paths in NAMED the last part, and no other text that a user may choose."""
    values = to_dict(config)
    for key in text_keys():
        section, _, name = key.rpartition(".")
        keys = values[section] if section else values
        keys[name] = _last_parts(keys[name]) if key in NAMED else None
    return values


def text_keys() -> Iterator[str]:
    """Every key that can hold a text of the user's, as `section.key`."""
    for section, kind in get_type_hints(RunConfig).items():
        if kind is str:
            yield section
        elif dataclasses.is_dataclass(kind):
            hints = get_type_hints(kind)
            names = [field.name for field in dataclasses.fields(kind)]
            yield from (f"{section}.{name}" for name in names if _holds_text(hints[name]))


def _holds_text(hint: Any) -> bool:
    """True for a type that has str in it; a Literal has values, not types."""
    return hint is str or any(_holds_text(inner) for inner in get_args(hint) if not isinstance(inner, str))


def _last_parts(value: Any) -> Any:
    if isinstance(value, str):
        return os.path.basename(re.split(r"[?#]", value)[0].rstrip("/"))
    if isinstance(value, list):
        return [_last_parts(item) for item in value]
    if isinstance(value, dict):
        return {key: _last_parts(item) for key, item in value.items()}
    return value
