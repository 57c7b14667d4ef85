"""The state file of alerts: what has been told about each run, and the messages that are not delivered yet.

It is written before a message is sent, and again after that. A watcher that is killed in between sends the message once more, with the
same id: every message is delivered at least once.
"""

import json
import logging
import os
from dataclasses import dataclass, field, fields
from typing import Any

from megatron_ledom.monitoring.alert_events import Known, as_values
from megatron_ledom.storage.files import publish, write_whole

log = logging.getLogger(__name__)

VERSION = 1


@dataclass(slots=True)
class Pending:
    """A message, and the names of the channels that have not taken it."""

    message: dict[str, Any]
    channels: list[str]


@dataclass(slots=True)
class AlertState:
    """Content of the state file."""

    path: str
    runs: dict[str, Known] = field(default_factory=dict)
    """Absolute path of a run folder -> what is known about it."""
    pending: list[Pending] = field(default_factory=list)
    """In the order of the events."""
    has_warned: bool = False

    def of(self, run: str) -> Known:
        """Return what is known about a run."""
        return self.runs.setdefault(os.path.abspath(run), Known())

    def save(self) -> None:
        """Replace the file. If that is not possible, log it once: the watcher works from memory."""
        values = {
            "version": VERSION,
            "runs": {run: as_values(known) for run, known in self.runs.items()},
            "pending": [{"message": each.message, "channels": each.channels} for each in self.pending],
        }
        try:
            write_whole(self.path, json.dumps(values, indent=1).encode())
        except OSError as error:
            if not self.has_warned:
                log.warning(
                    "%s cannot be written (%s): alerts are still sent, but a watcher that is started again would repeat them",
                    self.path,
                    error.strerror,
                )
            self.has_warned = True
        else:
            self.has_warned = False


def load_state(path: str) -> AlertState:
    """Return the content of a state file; an empty one if there is none. A damaged file is moved aside and logged."""
    state = AlertState(path)
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
        if values["version"] != VERSION:
            raise ValueError(f"its version is {values['version']!r}, expected {VERSION}")
        names = {each.name for each in fields(Known)}
        state.runs = {
            run: Known(**{name: value for name, value in known.items() if name in names})
            for run, known in values["runs"].items()
        }
        state.pending = [Pending(each["message"], list(each["channels"])) for each in values["pending"]]
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        aside = f"{path}.damaged"
        publish(path, aside)
        log.error("%s is damaged (%s) and was moved to %s: events since its last change may be told again", path, error, aside)
        return AlertState(path)
    return state
