"""Who is to blame when nothing moves: what each rank reports of itself, and the sentence that follows from all reports."""

import json
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from traceback import FrameSummary

ENGINE_FOLDERS = ("/torch/", "/megatron/", "/megatron_ledom/")
WAITING_CALLS = (".wait()", ".item()", ".synchronize(", "float(total")
"""Calls, in the engine's files, in which a rank waits for others or, on a GPU, for its device."""
MOST_NAMED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """Where one rank's main thread is."""

    rank: int
    host: str
    pid: int
    iteration: int
    doing: str
    steps: int
    """Pieces of work done since the start, to compare ranks that all wait."""
    seconds: float
    """Since the last of them."""
    is_waiting: bool
    """For other ranks, in a collective."""
    stack: str

    def place(self) -> str:
        """One line."""
        where = f"rank {self.rank} ({self.host}, pid {self.pid})"
        return f"{where}: iteration {self.iteration}, {self.doing}, without progress for {self.seconds:.0f} s"

    def to_json(self) -> str:
        """For the store."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "RankReport":
        """From the store."""
        return cls(**json.loads(text))


def is_waiting(stack: Sequence[FrameSummary]) -> bool:
    """Whether the innermost call of a main thread is one in which a rank waits for the others."""
    if not stack:
        return False
    innermost = stack[-1]
    if "/torch/distributed/" in innermost.filename:
        return True
    in_engine = any(folder in innermost.filename for folder in ENGINE_FOLDERS)
    return in_engine and any(call in (innermost.line or "") for call in WAITING_CALLS)


def verdict(reports: dict[int, RankReport], places: dict[int, str], world_size: int, folder: str) -> str:
    """The ranks that hang, with their stacks: silent ones, else those outside every collective, else the least advanced."""
    silent = sorted(set(range(world_size)) - reports.keys())
    outside = [report for report in reports.values() if not report.is_waiting]
    longest = max(report.seconds for report in reports.values())
    lines = [f"no progress for {longest:.0f} s (train.watchdog_seconds)."]
    lines += [f"rank {rank} ({_where(places.get(rank))}) hangs: it does not answer" for rank in silent[:MOST_NAMED]]
    if not silent and outside:
        lines += _named(outside)
    elif not silent:
        lines.append("every rank waits for others, or for its device; the least advanced one:")
        lines += _named([min(reports.values(), key=lambda report: (report.iteration, report.steps, report.rank))])
    waiting = [report.rank for report in reports.values() if report.is_waiting]
    if waiting and len(waiting) < world_size:
        lines.append(f"{len(waiting)} of {world_size} ranks wait for others: {_numbers(waiting)}")
    lines.append(
        f"The stacks of all ranks that answered are in {folder}. This run ends; the same command goes on from the last checkpoint."
        " If a step was only slow, raise train.watchdog_seconds."
    )
    return "\n".join(lines)


def _named(reports: list[RankReport]) -> list[str]:
    return [f"{report.place().replace(':', ' hangs:', 1)}\n{report.stack.rstrip()}" for report in reports[:MOST_NAMED]]


def _where(place: str | None) -> str:
    """Host and pid and, when it is on this machine, the state of the process."""
    if place is None:
        return "place not known"
    host, pid = place.split()
    if host != socket.gethostname():
        return f"{host}, pid {pid}"
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return f"{host}, pid {pid}"
    state = next((line.split(maxsplit=1)[1] for line in status.splitlines() if line.startswith("State:")), "")
    return f"{host}, pid {pid}, state {state}"


def _numbers(ranks: list[int]) -> str:
    shown = ", ".join(str(rank) for rank in sorted(ranks)[:MOST_NAMED])
    return shown + (", ..." if len(ranks) > MOST_NAMED else "")
