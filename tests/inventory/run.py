"""Run every command of the table in a work folder, two at a time, with any checkout and interpreter."""

import os
import shlex
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from tests.inventory.commands import STEPS, Step
from tests.inventory.inputs import write_inputs

AT_ONCE = 2
SECONDS = 300
"""A command that takes longer counts as hanging."""
KEPT = ("HOME", "LANG", "LC_ALL", "PATH", "TMPDIR", "LD_LIBRARY_PATH")
"""Variables that commands inherit; others, such as SLURM's, could change their results."""


@dataclass(frozen=True, slots=True)
class Place:
    """The checkout of the commands, their interpreter, and the folder in which they run."""

    folder: Path
    checkout: Path
    python: Path

    def environment(self, hash_seed: str | None) -> Mapping[str, str]:
        """Return the environment: one thread, no GPU, no network, the checkout's modules before installed ones."""
        kept = {name: os.environ[name] for name in KEPT if name in os.environ}
        fixed = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        fixed |= {"PYTHONPATH": str(self.checkout), "PYTHONIOENCODING": "utf-8", "PYTHONWARNINGS": "ignore", "COLUMNS": "200"}
        return {**kept, **fixed, **({} if hash_seed is None else {"PYTHONHASHSEED": hash_seed})}


@dataclass(frozen=True, slots=True)
class Done:
    """The exit code, output and time of a finished command."""

    code: int
    stdout: str
    stderr: str
    seconds: float


def command_line(command: str, place: Place) -> list[str]:
    """Return the command line of a tool of the checkout, of the trainer, or of the trainer under torchrun."""
    words = shlex.split(command)
    ranks = words.pop(0) if words[0].isdigit() else ""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks] if ranks else []
    is_trainer = words[0] == "pretrain"
    program = ["-m", "megatron_ledom.pretrain"] if is_trainer else [str(place.checkout / "tools" / f"{words[0]}.py")]
    return [str(place.python), *launcher, *program, *words[1:]]


def check_checkout(place: Place, environment: Mapping[str, str]) -> None:
    """Raise RuntimeError if the interpreter would import the modules of another checkout."""
    code = "import megatron_ledom; print(megatron_ledom.__file__)"
    done = subprocess.run(
        [str(place.python), "-c", code], env=environment, cwd="/", capture_output=True, text=True, check=False
    )
    if done.returncode or not Path(done.stdout.strip()).is_relative_to(place.checkout):
        raise RuntimeError(f"megatron_ledom comes from {done.stdout.strip()}, not from {place.checkout}\n{done.stderr}")


def run_step(step: Step, place: Place, environment: Mapping[str, str]) -> Done:
    """Run one command to its end; a hanging one fails."""
    start = time.monotonic()
    words = command_line(step.command, place)
    try:
        done = subprocess.run(
            words,
            cwd=place.folder,
            env=environment,
            capture_output=True,
            timeout=SECONDS,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        code, stdout, stderr = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as error:
        code, stdout, stderr = -1, error.stdout or b"", (error.stderr or b"") + b"\nthe command hangs"
    decoded = [stream.decode("utf-8", "replace") for stream in (stdout, stderr)]
    return Done(code, decoded[0], decoded[1], time.monotonic() - start)


def with_needs(names: Collection[str]) -> list[Step]:
    """Return the named steps and all steps that they need, in the order of the table."""
    needs = {step.name: step.needs for step in STEPS}
    chosen: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in chosen:
            chosen.add(name)
            waiting += needs[name]
    return [step for step in STEPS if step.name in chosen]


def run_all(place: Place, steps: Sequence[Step], keep: Callable[[Step, Done], None], hash_seed: str | None = None) -> None:
    """Write the inputs and run every step after its needs. Calls `keep` when a step ends, before any step that needs it."""
    environment = place.environment(hash_seed)
    check_checkout(place, environment)
    write_inputs(place.folder)
    done: set[str] = set()
    waiting = list(steps)
    running: dict[Future[Done], Step] = {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        while waiting or running:
            ready = [step for step in waiting if done.issuperset(step.needs)]
            if not (ready or running):
                raise RuntimeError(f"none of these steps can begin: {[step.name for step in waiting]}")
            for step in ready[: AT_ONCE - len(running)]:
                waiting.remove(step)
                running[pool.submit(run_step, step, place, environment)] = step
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                step = running.pop(future)
                keep(step, future.result())
                done.add(step.name)
