"""Run the steps of the study in parallel, each once, and again only if its commands, inputs or code have changed."""

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from commands import ROOT, check_exit, show

from megatron_ledom.storage.files import write_file
from megatron_ledom.storage.hashes import sha256_of
from megatron_ledom.storage.locks import POLL_SECONDS, Lock

Work = Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Commands, or a function, that read `inputs` and write `outputs` (files and folders).

    settings: those of the function.
    """

    name: str
    outputs: Sequence[Path]
    inputs: Sequence[Path] = ()
    commands: Sequence[list[str]] = ()
    work: Work | None = None
    settings: Any = field(default=None)
    resumes: bool = False
    """True: a killed command resumes. False: its unfinished outputs are removed first."""
    check: Work | None = None
    """Raises an error if the commands ended well but did not finish."""


def steps_for(stages: Sequence[Sequence[Step]], wanted: Sequence[Step]) -> list[list[Step]]:
    """Return the stages with only the wanted steps and those whose outputs they need, directly or not."""
    read, kept = [path for step in wanted for path in step.inputs], list[list[Step]]()
    names = {step.name for step in wanted}
    for steps in reversed(stages):
        needed = [step for step in steps if step.name in names or any(map(_overlap, product(step.outputs, read)))]
        read += [path for step in needed for path in step.inputs]
        kept.insert(0, needed)
    return [steps for steps in kept if steps]


def _overlap(paths: tuple[Path, Path]) -> bool:
    """Return True if two paths are equal, or one is a folder above the other."""
    one, other = paths
    return one == other or one in other.parents or other in one.parents


class Runner:
    """Runs steps and writes a note of each to `folder`: its key, commands, hashes of its inputs, and seconds.

    A step runs again if the Python code of the package or its tools has changed. A step that is a function, or runs a
    script of this folder or of the quickstart, also runs again if a file of the two has changed.
    """

    def __init__(self, folder: Path, at_once: int) -> None:
        self.notes, self.logs, self.at_once = folder / "steps", folder / "logs", at_once
        folders = (Path(__file__).parent, Path(__file__).parents[1] / "quickstart")  # whose functions the study uses
        self.code = {path.name: hash_of(path) for folder in folders for path in sorted(folder.glob("*.py"))}
        sources = sorted(path for top in ("megatron_ledom", "tools") for path in (ROOT / top).rglob("*.py"))
        digest = hashlib.sha256("".join(hash_of(path) for path in sources).encode()).hexdigest()
        self.package = f"{version('megatron-ledom')}, sources {digest[:16]}"
        self.names: list[str] = []
        for path in (self.notes, self.logs):
            path.mkdir(parents=True, exist_ok=True)
        self.lock = _locked(folder / "lock")

    def run(self, steps: Sequence[Step]) -> None:
        """Run independent steps, one per core. Raises the first error after all have ended."""
        self.names += [step.name for step in steps]
        with ThreadPoolExecutor(self.at_once) as pool:
            futures = [pool.submit(self._run, step) for step in steps]
            try:
                while futures:
                    futures[0].result()
                    del futures[0]
            finally:
                del futures  # an error refers to this frame; the cycle would keep the runner and its lock alive

    def _run(self, step: Step) -> None:
        note = self.notes / f"{step.name}.json"
        inputs = {str(path): hash_of(path) for path in step.inputs}
        request = {"commands": step.commands, "settings": step.settings, "inputs": inputs}
        runs_study_code = step.work is not None or any(
            Path(part).name in self.code for command in step.commands for part in command
        )
        request |= {"package": self.package, "code": self.code if runs_study_code else None}
        key = hashlib.sha256(json.dumps(request, sort_keys=True, default=str).encode()).hexdigest()
        found = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
        if found.get("key") == key and found.get("is_done") and all(path.exists() for path in step.outputs):
            return
        if found.get("key") != key or not step.resumes:  # a tool that resumes must not find the outputs of another request
            for path in step.outputs:
                _remove(path)
        seconds = found.get("seconds", 0.0) if found.get("key") == key else 0.0
        _write(note, {"key": key, "is_done": False, "seconds": seconds, **request})
        print(f"--- {step.name}", flush=True)
        started = time.perf_counter()
        try:
            self._work(step)
        finally:
            seconds += time.perf_counter() - started
            _write(note, {"key": key, "is_done": False, "seconds": seconds, **request})
        _write(note, {"key": key, "is_done": True, "seconds": seconds, **request})

    def _work(self, step: Step) -> None:
        if step.work is not None:
            step.work()
        log = self.logs / f"{step.name}.log"
        for command in step.commands:
            show(command)
            with log.open("ab") as file:
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                held = (self.lock.fileno(),)  # keeps the lock until the command ends, even if this process is killed
                done = subprocess.run(
                    command, check=False, stdout=file, stderr=subprocess.STDOUT, env=environment, pass_fds=held
                )
            code = done.returncode
            check_exit(command, code, log)
        if step.check is not None:
            step.check()

    def all_notes(self) -> dict[str, dict[str, Any]]:
        """Return the note of each step of this study, by name."""
        return {name: json.loads((self.notes / f"{name}.json").read_text(encoding="utf-8")) for name in sorted(self.names)}


def _locked(path: Path) -> Lock:
    """Take the lock. Wait for another study in the same folder, and for running commands of a killed one."""
    lock, is_reported = Lock(str(path)), False
    while not lock.take():
        if not is_reported:
            print(f"a study, or a step of a killed study, is still running in {path.parent}; waiting for its end", flush=True)
        is_reported = True
        time.sleep(POLL_SECONDS)
    return lock


def hash_of(path: Path) -> str:
    """Return the sha256 of a file, or of the names and hashes of all files in a folder."""
    if not path.is_dir():
        return sha256_of(path)
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file():
            digest.update(f"{file.relative_to(path)} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


def _remove(path: Path) -> None:
    """Remove an output and the unfinished files that a tool writes next to it."""
    for found in [path, *path.parent.glob(f"{path.name}.part*"), *path.parent.glob(f"{path.name}.spent.json")]:
        shutil.rmtree(found) if found.is_dir() else found.unlink(missing_ok=True)


def _write(path: Path, content: dict[str, Any]) -> None:
    write_file(path, json.dumps(content, indent=1, default=str))
