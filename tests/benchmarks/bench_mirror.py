"""Step time without and with a copy to `checkpoint.mirror` under way, and how long the calls of the step itself take.

    python tests/benchmarks/bench_mirror.py [--folder /tmp] [--layers 6 --hidden-size 512] [--rounds 5] [--seconds 8]

One process trains; a round measures three ways in a random order, each for some seconds:

alone     nothing else runs
mirror    the process of `checkpoint.mirror` copies checkpoints to a folder, and the step calls `Uploader.add` and `poll`
control   a program without any code of the mirror hashes and copies the same files with the same priority, and the step calls nothing

A step that waits for the mirror would show in the time of the calls, and in mirror being slower than control. What control itself
adds is the price of sharing cores and disk, which a node with idle cores does not pay.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from comparison_runs import mean_and_interval

from megatron_ledom.checkpoint.folder import finished_checkpoints
from megatron_ledom.config.load import config_from_dict
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.direction import Direction
from megatron_ledom.mirror.contents import Claim, check_mirror
from megatron_ledom.mirror.process import NICENESS
from megatron_ledom.mirror.uploader import Uploader
from megatron_ledom.provenance import Provenance

VOCAB_SIZE = 8_005
WAYS = ("alone", "mirror", "control")
CHECKPOINTS = 3
START_SECONDS = 120.0
CONTROL = """
import hashlib, os, shutil, sys
from concurrent.futures import ThreadPoolExecutor
os.nice(int(sys.argv[1]))
def both(path):
    with open(path, "rb") as file:
        hashlib.file_digest(file, "sha256")
    with open(path, "rb") as file, open(f"{sys.argv[2]}/{os.path.basename(path)}", "wb") as copy:
        shutil.copyfileobj(file, copy, 16 << 20)
        os.fsync(copy.fileno())
with ThreadPoolExecutor(4) as threads:
    while True:
        list(threads.map(both, sys.argv[3:]))
"""


@dataclass
class Measured:
    """One way in one round."""

    steps: list[float] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)
    """Seconds of the calls before each step."""
    calls_cpu: list[float] = field(default_factory=list)
    """CPU seconds of these calls: the rest of their time they waited, for the scheduler of a busy machine or for a disk."""
    cpu_seconds: float = 0.0
    """Of the other process, while the steps were measured."""
    wall_seconds: float = 0.0
    copied_bytes: int = 0


def cpu_of(pid: int) -> float:
    """Return the CPU seconds that a process has used."""
    values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK")


class Mirroring:
    """Copies the same checkpoints again and again, each time to an empty folder."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.config, self.folder, self.number = config, folder, 0
        self.uploader: Uploader | None = None

    def restart(self) -> Uploader:
        """Return an uploader to another empty folder; the time of its start is not that of a step."""
        self.close()
        (Path(self.config.run_dir) / "mirror_run_id").unlink(missing_ok=True)
        self.number += 1
        mirror = str(self.folder / f"mirror_{self.number}")
        config = replace(self.config, checkpoint=replace(self.config.checkpoint, mirror=mirror, mirror_keep_last=None))
        check_mirror(config, may_adopt=True)
        self.uploader = Uploader(config, Claim.of(config))
        return self.uploader

    def close(self) -> None:
        """End the process, and delete its copies."""
        if self.uploader is not None:
            self.uploader.close()
            self.uploader = None
        for old in self.folder.glob("mirror_*"):
            subprocess.run(["rm", "-rf", old], check=True)


@contextmanager
def control(files: list[str], folder: Path) -> Iterator[int]:
    """Run the control program for the block; yields its process id."""
    target = folder / "control"
    target.mkdir(exist_ok=True)
    process = subprocess.Popen([sys.executable, "-c", CONTROL, str(NICENESS), str(target), *files])
    time.sleep(0.5)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def measure_steps(step: Callable[[], None], seconds: float, before: Callable[[], None] | None = None) -> Measured:
    """Train for some seconds."""
    found, end = Measured(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begun, used = time.perf_counter(), time.thread_time()
        if before is not None:
            before()
        called = time.perf_counter()
        found.calls_cpu.append(time.thread_time() - used)
        step()
        found.calls.append(called - begun)
        found.steps.append(time.perf_counter() - begun)
    return found


def wait_for_files(folder: Path) -> None:
    """Wait until a copy has begun: the start of its process, which imports fsspec, is not measured."""
    end = time.perf_counter() + START_SECONDS
    while not any((folder / "checkpoints").rglob("*")) and time.perf_counter() < end:
        time.sleep(0.02)


def measure_mirror(step: Callable[[], None], seconds: float, mirroring: Mirroring) -> Measured:
    """Train for some seconds in which a copy is always under way."""
    whole = Measured()
    while sum(whole.steps) < seconds:
        uploader = mirroring.restart()
        uploader.add(finished_checkpoints(uploader.folder))
        uploader.poll()
        assert uploader._process is not None
        pid = uploader._process.pid
        wait_for_files(Path(uploader.address))
        used, begun = cpu_of(pid), time.perf_counter()
        while len(uploader.mirrored) < CHECKPOINTS and sum(whole.steps) < seconds:

            def calls() -> None:
                """Make the calls of a step of the trainer."""
                uploader.add(finished_checkpoints(uploader.folder))  # noqa: B023  called at once
                uploader.poll()  # noqa: B023

            part = measure_steps(step, 0.0001, calls)
            whole.steps += part.steps
            whole.calls += part.calls
            whole.calls_cpu += part.calls_cpu
        whole.cpu_seconds += cpu_of(pid) - used
        whole.wall_seconds += time.perf_counter() - begun
        whole.copied_bytes += sum(file.stat().st_size for file in Path(uploader.address).rglob("*") if file.is_file())
    mirroring.close()
    return whole


def measure_control(step: Callable[[], None], seconds: float, files: list[str], folder: Path) -> Measured:
    """Train for some seconds beside the control program."""
    with control(files, folder) as pid:
        used, begun = cpu_of(pid), time.perf_counter()
        found = measure_steps(step, seconds)
        found.cpu_seconds, found.wall_seconds = cpu_of(pid) - used, time.perf_counter() - begun
    return found


def main() -> None:
    """Measure all rounds and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="folder for checkpoints and copies; default: the system's temporary folder")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each way in each round")
    parser.add_argument("--threads", type=int, default=1, help="threads of the training")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        measure(arguments, Path(folder))


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Build a model, save its checkpoints, and measure each way in each round."""
    step, config = prepare(arguments, folder)
    checkpoints = [
        Path(config.run_dir, "checkpoints", name) for name in finished_checkpoints(f"{config.run_dir}/checkpoints").values()
    ]
    files = [str(file) for checkpoint in checkpoints for file in checkpoint.iterdir() if file.is_file()]
    size = sum(os.stat(file).st_size for file in files) / len(checkpoints)
    print(
        f"{size / 2**20:.0f} MiB per checkpoint, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}", flush=True
    )
    mirroring, order = Mirroring(config, folder), random.Random(1)
    medians: dict[str, list[float]] = {way: [] for way in WAYS}
    calls, calls_cpu = list[float](), list[float]()
    for number in range(1, arguments.rounds + 1):
        for way in order.sample(WAYS, len(WAYS)):
            if way == "alone":
                found = measure_steps(step, arguments.seconds)
            elif way == "mirror":
                found = measure_mirror(step, arguments.seconds, mirroring)
                calls += found.calls
                calls_cpu += found.calls_cpu
            else:
                found = measure_control(step, arguments.seconds, files, folder)
            medians[way].append(statistics.median(found.steps))
            print(f"round {number} {way:8}{describe(found)}", flush=True)
    report(medians)
    report_calls(calls, calls_cpu)


def describe(found: Measured) -> str:
    """Return the numbers of one way in one round."""
    text = f"{len(found.steps)} steps, median {1e3 * statistics.median(found.steps):.1f} ms, longest {1e3 * max(found.steps):.1f} ms"
    if found.wall_seconds:
        text += f"; the other process used {found.cpu_seconds / found.wall_seconds:.2f} of a core"
    if found.copied_bytes:
        text += f", {found.copied_bytes / 2**20 / found.wall_seconds:.0f} MiB/s"
        text += f"; calls median {1e6 * statistics.median(found.calls):.0f} us, longest {1e3 * max(found.calls):.2f} ms"
    return text


def report(medians: dict[str, list[float]]) -> None:
    """Print the medians of all rounds, and paired differences with their 95 % interval."""
    for way, values in medians.items():
        print(f"{way}: median of the rounds {1e3 * statistics.median(values):.1f} ms")
    for one, other in (("control", "alone"), ("mirror", "alone"), ("mirror", "control")):
        percent = [100 * (first / second - 1) for first, second in zip(medians[one], medians[other], strict=True)]
        if len(percent) > 1:
            print(f"{one} against {other}, percent of a step, paired by round: {mean_and_interval(percent)}")


def report_calls(calls: list[float], calls_cpu: list[float]) -> None:
    """Print the time of the calls of all steps."""
    for name, values in (("wall", sorted(calls)), ("CPU", sorted(calls_cpu))):
        print(
            f"calls of add and poll in {len(values)} steps, {name} time: median {1e6 * statistics.median(values):.0f} us,"
            f" 99th percentile {1e6 * values[int(0.99 * len(values))]:.0f} us, longest {1e3 * values[-1]:.2f} ms"
        )


def prepare(arguments: argparse.Namespace, folder: Path) -> tuple[Callable[[], None], RunConfig]:
    """Return a function that trains a step, and the config of a run folder with some checkpoints."""
    from megatron_ledom.checkpoint.manifest import CheckpointManifest
    from megatron_ledom.checkpoint.store import CheckpointStore
    from megatron_ledom.hardware_check.speed import random_batches
    from megatron_ledom.model.builder import build_model_chunks, checkpoint_metadata, wrap_for_training
    from megatron_ledom.model.layer_specs import choose_layers
    from megatron_ledom.parallel.groups import start_distributed
    from megatron_ledom.platform.device import prepare_platform
    from megatron_ledom.training.optimizer import build_optimizer, build_scheduler
    from megatron_ledom.training.step_policy import Action, Verdict
    from megatron_ledom.training.trainer import train_step

    width = arguments.hidden_size
    values: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": {
            "num_layers": arguments.layers,
            "hidden_size": width,
            "ffn_hidden_size": 4 * width,
            "num_attention_heads": width // 64,
            "params_dtype": "fp32",
        },
        "data": {"seq_length": arguments.seq_length},
        "train": {"train_iters": 1000, "global_batch_size": 1, "seed": 1, "num_threads": arguments.threads},
        "optimizer": {"lr_warmup_iters": 1},
        "checkpoint": {"async_save": False, "keep_last": None},
    }
    config = config_from_dict(values, "benchmark")
    groups = start_distributed(prepare_platform(config.train.num_threads), config.parallel)
    model = wrap_for_training(config, build_model_chunks(config, VOCAB_SIZE, groups, choose_layers(config)))
    optimizer = build_optimizer(config, model, groups)
    scheduler = build_scheduler(config, optimizer)
    batches = [random_batches(config, VOCAB_SIZE, torch.device("cpu"))]
    provenance = Provenance(
        direction=Direction.REVERSE, tokenizer_name="none", tokenizer_sha256="0" * 64, vocab_size=VOCAB_SIZE, eod_id=0
    )
    store = CheckpointStore(f"{config.run_dir}/checkpoints", checkpoint_metadata(groups), config.checkpoint)

    def step() -> None:
        """Train one step."""
        train_step(config, model, optimizer, batches, groups, lambda *_: Verdict(Action.UPDATE), global_batch_size=1)
        scheduler.step(increment=1)

    for iteration in range(1, CHECKPOINTS + 1):
        step()
        position = {"iteration": iteration, "consumed_train_samples": 0, "consumed_train_tokens": 0}
        store.save(CheckpointManifest.describe(config, provenance, [], 1, **position), model, optimizer, scheduler)
        store.finish()
    return step, config


if __name__ == "__main__":
    main()
