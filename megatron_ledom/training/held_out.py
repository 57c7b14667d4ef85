"""Record the content of held-out sets and tasks in the run folder, so that metrics before and after a restart are of the same data."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ledom.config.schema import RunConfig
from megatron_ledom.errors import MismatchError
from megatron_ledom.storage.files import write_json

if TYPE_CHECKING:
    from megatron_ledom.data.blends.sources import Blend, Sources

log = logging.getLogger(__name__)

FILE = "held_out.json"

TaskHashes = dict[str, dict[str, str]]
"""sha256 of each file of a task, by task and file."""


def check_held_out(config: RunConfig, sources: "Sources", tasks: TaskHashes, *, is_new: bool) -> None:
    """Refuse sets and tasks whose content has changed since the run last used them; added and removed ones are allowed.

    With `data.allow_changed_data` a change is only a warning. is_new: the run starts from scratch, so there is no earlier
    curve. Call on rank 0, after it has locked the run folder. Raises MismatchError, or the errors of `write_file`.
    """
    found: dict[str, Any] = {
        **{f"validation set {name}": _content(blend) for name, blend in sources.valid.items()},
        **{f"test set {name}": _content(blend) for name, blend in sources.test.items()},
        **{f"task {name}": files for name, files in tasks.items()},
    }
    path = Path(config.run_dir, FILE)
    known: dict[str, Any] = _read(path) if path.is_file() and not is_new else {}
    changed = [name for name, content in json.loads(json.dumps(found)).items() if known.get(name, content) != content]
    if changed and not config.data.allow_changed_data:
        raise MismatchError(
            f"{', '.join(changed)}: the content has changed since this run last used it ({path}), so metrics before and after"
            " would be of different texts; restore the old files, give the new ones another name, or accept the change with"
            " data.allow_changed_data=true"
        )
    for name in changed:
        log.warning("OTHER HELD-OUT DATA than before, allowed by data.allow_changed_data=true: %s", name)
    write_json(path, {**known, **found})


def _content(blend: "Blend") -> list[list[Any]]:
    """Return the values that, with the config, decide the samples of a set."""
    return [
        [source.manifest.content_sha256, source.manifest.idx_sha256, source.documents.first, source.documents.last]
        for source in blend.sources
    ]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
        if isinstance(found, dict):
            return found
    except (ValueError, RecursionError):
        pass
    raise MismatchError(
        f"{path} is damaged, so the held-out data cannot be compared with those used before. If they are the same, delete it and"
        " start again"
    )
