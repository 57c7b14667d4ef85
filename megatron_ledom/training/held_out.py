"""The content of held-out sets and tasks, kept in the run folder, so that a curve over restarts is of one set."""

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
"""The sha256 of each file of a task, by task and file."""


def check_held_out(config: RunConfig, sources: "Sources", tasks: TaskHashes, *, is_new: bool) -> None:
    """Refuse sets and tasks whose content is not what the run was evaluated on before; new ones join, others may go.

    With `data.allow_changed_data` it warns instead. is_new: the run starts from scratch, so there is no earlier curve. Call on
    rank 0, which holds the run folder. Raises MismatchError, or what `write_file` raises.
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
            f"{', '.join(changed)}: the content is not what this run was evaluated on before ({path}), so the figures before and"
            " after would be of different texts; restore the old files, give the new ones another name, or go on all the same"
            " with data.allow_changed_data=true"
        )
    for name in changed:
        log.warning("OTHER HELD-OUT DATA than before, by data.allow_changed_data=true: %s", name)
    write_json(path, {**known, **found})


def _content(blend: "Blend") -> list[list[Any]]:
    """Return the values that decide the samples of a set besides the config."""
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
        f"{path} is damaged: it cannot be told whether the held-out data are those of before; delete it if they are, and start again"
    )
