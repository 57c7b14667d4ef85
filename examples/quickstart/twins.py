"""Train a reverse model and its forward twin at the same time; one run is stopped once and resumed."""

import json
import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import ROOT, QuickstartError, check_exit, ledom, run_all, show
from tqdm import tqdm

from megatron_ledom.config.load import load_config

DIRECTIONS = ("reverse", "forward")
MOST_THREADS = 8
"""More threads do not help a model this small."""
POLL_SECONDS = 0.1
REPORT_SECONDS = 20.0
"""Time between two lines about each twin, if there is no terminal for progress bars."""


@dataclass(frozen=True, slots=True)
class Resume:
    """Iterations at which the reverse run was stopped by SIGTERM and at which it resumed."""

    stopped_at: int
    resumed_at: int


class Training:
    """One `ledom train`, followed through its metrics.jsonl."""

    bar: "tqdm[Any]"
    reported: float
    """Time of the last line printed."""
    process: "subprocess.Popen[bytes] | None" = None
    log: Path

    def __init__(self, name: str, config_file: Path, overrides: list[str]) -> None:
        config = load_config(str(config_file), overrides)
        self.command = ledom("train", "--config", config_file, *overrides)
        self.train_iters = config.train.train_iters
        self.tokens_per_iteration = config.train.global_batch_size * config.data.seq_length
        self.metrics, self.name, self.starts = Path(config.run_dir, "metrics.jsonl"), name, 0

    def begin(self, bar_position: int) -> None:
        """Show the progress bar and start."""
        total, name = self.train_iters * self.tokens_per_iteration, f"train {self.name}"
        self.bar = tqdm(total=total, desc=name, unit="tok", unit_scale=True, position=bar_position, disable=None)
        self.began = self.reported = time.monotonic()
        self.start()

    def start(self) -> None:
        """Start the command, or start it again."""
        self.starts += 1
        suffix = "" if self.starts == 1 else f"_start_{self.starts}"
        self.log = Path("quickstart/logs", f"train_{self.name.replace(' ', '_')}{suffix}.log")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(self.command, stdout=file, stderr=subprocess.STDOUT)

    def records(self) -> list[dict[str, Any]]:
        """Return the complete lines of metrics.jsonl so far."""
        return read_metrics(self.metrics)

    def iteration(self) -> int:
        """Return the last iteration in the log, and move the progress bar there."""
        records = self.records()
        iteration = int(records[-1]["iteration"]) if records else 0
        if records:
            loss = f"{records[-1]['lm_loss']:.3f}"
            self.bar.set_postfix(iteration=f"{iteration}/{self.train_iters}", loss=loss, refresh=False)
            if self.bar.disable:
                self.report(iteration, loss)
        self.bar.update(iteration * self.tokens_per_iteration - self.bar.n)
        return iteration

    def report(self, iteration: int, loss: str) -> None:
        """Print now and then the information of a progress bar."""
        now = time.monotonic()
        if now - self.reported < REPORT_SECONDS:
            return
        self.reported = now
        left = tqdm.format_interval((now - self.began) * (self.train_iters - iteration) / iteration)
        print(f"train {self.name}: iteration {iteration} of {self.train_iters}, loss {loss}, {left} left", flush=True)

    def is_running(self) -> bool:
        """Return True while the process runs. Raises QuickstartError if it failed."""
        assert self.process is not None
        code = self.process.poll()
        if code is not None:
            check_exit(self.command, code, self.log)
        return code is None

    def stop(self) -> None:
        """Send SIGTERM and wait for the exit. Raises QuickstartError if its code is not 0."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        check_exit(self.command, self.process.wait(), self.log)

    def close(self) -> None:
        """Remove the progress bar, and end the process if it still runs."""
        if self.process is None:
            return
        self.bar.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a metrics.jsonl."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def choose_overrides() -> list[str]:
    """Return the settings that depend on the machine: its fastest number type, and half of its cores for each twin."""
    from megatron_ledom.platform.device import preferred_params_dtype, prepare_platform
    from megatron_ledom.platform.launch import ALONE

    return [f"model.params_dtype={preferred_params_dtype(prepare_platform(None, ALONE))}", choose_threads()]


def choose_threads() -> str:
    """Return the setting that gives each twin half of the cores."""
    return f"train.num_threads={min(MOST_THREADS, max(1, len(os.sched_getaffinity(0)) // 2))}"


def train_twins(overrides: list[str]) -> Resume:
    """Train both on text at the same time. Raises QuickstartError if one fails or the reverse run does not resume."""
    configs = {direction: ROOT / "examples/configs" / f"quickstart_{direction}.yaml" for direction in DIRECTIONS}
    trainings = [Training(direction, config_file, overrides) for direction, config_file in configs.items()]
    stopped_at = train_all(trainings, stopped=trainings[0])
    return check_resumed(stopped_at, trainings[0])


def train_all(trainings: list[Training], stopped: Training | None = None) -> int | None:
    """Run all at the same time. Stop `stopped` after a third of its iterations, start it again, and return its iteration then.

    Raises QuickstartError if one fails.
    """
    for training in trainings:
        show(training.command)
    stopped_at: int | None = None
    try:
        for position, training in enumerate(trainings):
            training.begin(position)
        while any(training.is_running() for training in trainings):
            for training in trainings:
                if training.iteration() >= training.train_iters // 3 and training is stopped and stopped_at is None:
                    stopped_at = _stop_and_start_again(training)
            time.sleep(POLL_SECONDS)
        for training in trainings:
            if training.iteration() != training.train_iters:
                raise QuickstartError(f"{training.metrics} ends at {training.iteration()} of {training.train_iters} iterations")
        return stopped_at
    finally:
        for training in trainings:
            training.close()


def export_twins(folder: Path) -> None:
    """Export the runs of a folder at the same time."""
    places = [("--load", folder / "runs" / direction, "--save", folder / "models" / direction) for direction in DIRECTIONS]
    run_all([ledom("convert-checkpoint", "mcore-to-hf", *names) for names in places])


def _stop_and_start_again(training: Training) -> int:
    """Send SIGTERM, wait for the exit, and start the same command again. Returns the iteration that was saved."""
    training.stop()
    latest = training.metrics.parent.joinpath("checkpoints/latest").read_text().strip()
    stopped_at = int(latest.removeprefix("iter_"))
    tqdm.write(f"the {training.name} run got SIGTERM and saved at iteration {stopped_at}; the same command resumes it")
    training.start()
    return stopped_at


def check_resumed(stopped_at: int | None, training: Training) -> Resume:
    """Check that the run was stopped before its end, resumed at that iteration, and logged each iteration once."""
    if stopped_at is None or stopped_at >= training.train_iters:
        raise QuickstartError(f"the {training.name} run ended before it could be stopped and resumed")
    found = re.search(r"resumed from \S+ at iteration (\d+)", training.log.read_text())
    if found is None or int(found[1]) != stopped_at:
        raise QuickstartError(f"{training.log} does not report that the run resumed at iteration {stopped_at}")
    iterations = [record["iteration"] for record in training.records()]
    if iterations != sorted(set(iterations)):
        raise QuickstartError(f"{training.metrics} does not have each iteration once")
    return Resume(stopped_at, int(found[1]))
