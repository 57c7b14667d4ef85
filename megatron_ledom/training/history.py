"""What a run folder keeps of every step: `steps.jsonl`, `bad_steps.jsonl` and `skip_iterations.json`, written by rank 0.

`steps.jsonl` has one line an iteration, so that a resumed run scores its steps against the same window as the uninterrupted one,
and a replay has loss and gradient norm of any step to compare with. Lines behind the iteration that a run goes on from are
dropped; `bad_steps.jsonl` is never cut.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO

import torch.distributed as dist

from megatron_ledom.training.anomalies import PastStep

STEPS, BAD_STEPS, SKIP_PLAN = "steps.jsonl", "bad_steps.jsonl", "skip_iterations.json"
Record = dict[str, Any]


@dataclass(slots=True)
class SkipPlan:
    """Iterations that a run leaves out after a return to a checkpoint, and how often it returned to each."""

    iterations: list[int] = field(default_factory=list)
    roll_backs: dict[str, int] = field(default_factory=dict)
    """By the iteration of the checkpoint."""


class RunHistory:
    """The steps of one run folder. Every method is called on every rank; rank 0 alone reads and writes files."""

    def __init__(self, run_dir: str, skip_iterations: Iterable[int]) -> None:
        self.run_dir = run_dir
        self.by_hand = frozenset(skip_iterations)
        self.plan = SkipPlan()
        self._skipped_updates = 0
        self._steps: TextIO | None = None

    def go_on_from(self, iteration: int, num_steps: int) -> list[PastStep]:
        """Forget what was done after `iteration`; returns the last `num_steps` before, the same on every rank."""
        found: list[Any] = [None, None, None]
        if dist.get_rank() == 0:
            self.close()
            path = os.path.join(self.run_dir, STEPS)
            drop_after(path, iteration)
            past = read_steps(self.run_dir)
            found = [past[-num_steps:], sum(step.skipped for step in past), load_skip_plan(self.run_dir)]
            self._steps = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed in close()
        dist.broadcast_object_list(found)
        steps: list[PastStep] = found[0]
        self._skipped_updates, self.plan = found[1], found[2]
        return steps

    @property
    def left_out(self) -> frozenset[int]:
        """The iterations of which nothing is computed: those of the config and those that returns to a checkpoint added."""
        return self.by_hand.union(self.plan.iterations)

    def num_skipped(self, iteration: int) -> int:
        """Iterations up to this one that updated nothing."""
        return self._skipped_updates + sum(other <= iteration for other in self.left_out)

    def write(self, step: PastStep) -> None:
        """One iteration that counts, with its update or without."""
        self._skipped_updates += step.skipped
        if self._steps is not None:
            values = {**asdict(step), "lm_loss": plain(step.lm_loss), "grad_norm": plain(step.grad_norm)}
            self._steps.write(json.dumps(values) + "\n")
            self._steps.flush()

    def write_bad(self, record: Record) -> None:
        """A step that was no ordinary one, for diagnosis and replay; it is on disk when this returns."""
        if dist.get_rank() == 0:
            append_record(os.path.join(self.run_dir, BAD_STEPS), record)

    def plan_skips(self, iterations: Iterable[int], checkpoint: int) -> None:
        """Add iterations that are left out from now on, after one more return to the checkpoint of an iteration."""
        self.plan.iterations = sorted({*self.plan.iterations, *iterations})
        self.plan.roll_backs[str(checkpoint)] = self.num_roll_backs(checkpoint) + 1
        if dist.get_rank() == 0:
            path = os.path.join(self.run_dir, SKIP_PLAN)
            with open(path + ".part", "w", encoding="utf-8") as file:
                json.dump(asdict(self.plan), file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(path + ".part", path)

    def num_roll_backs(self, checkpoint: int) -> int:
        """How often the run returned to the checkpoint of this iteration."""
        return self.plan.roll_backs.get(str(checkpoint), 0)

    def sync(self) -> None:
        """Bring the steps to disk, as before a checkpoint that counts on them."""
        if self._steps is not None:
            os.fsync(self._steps.fileno())

    def close(self) -> None:
        """Close the file of steps."""
        if self._steps is not None:
            self._steps.close()
            self._steps = None


def read_steps(run_dir: str) -> list[PastStep]:
    """Every step of a run folder, in order; none of a run that kept none."""
    steps = [json.loads(line) for line in complete_lines(os.path.join(run_dir, STEPS))]
    return [PastStep(**{**step, "lm_loss": float(step["lm_loss"]), "grad_norm": float(step["grad_norm"])}) for step in steps]


def read_bad_steps(run_dir: str) -> list[Record]:
    """Every bad step of a run folder, oldest first, those that a return to a checkpoint undid too."""
    return [json.loads(line) for line in complete_lines(os.path.join(run_dir, BAD_STEPS))]


def load_skip_plan(run_dir: str) -> SkipPlan:
    """What returns to a checkpoint have put on the list of iterations to leave out."""
    try:
        with open(os.path.join(run_dir, SKIP_PLAN), encoding="utf-8") as file:
            return SkipPlan(**json.load(file))
    except FileNotFoundError:
        return SkipPlan()


def complete_lines(path: str) -> list[str]:
    """The lines of a file that a kill may have cut in its last one; none if there is no file."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [line for line in file if line.endswith("\n")]


def append_record(path: str, record: Record) -> None:
    """Add a line; it is on disk when this returns. What a kill left of a last line goes: a record would be lost by joining it."""
    with open(path, "a+b") as file:
        file.seek(0)
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def drop_after(path: str, iteration: int) -> None:
    """Lines of iterations that a kill or a return undid are dropped, a torn last line too: each iteration stands once."""
    if not os.path.exists(path):
        return
    kept = [line for line in complete_lines(path) if json.loads(line)["iteration"] <= iteration]
    with open(path + ".part", "w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".part", path)


def plain(value: float) -> float | str:
    """A number for JSON, which has no NaN and no infinity: those become the texts that `float` reads."""
    return value if math.isfinite(value) else str(value)
