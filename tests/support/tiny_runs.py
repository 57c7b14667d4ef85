"""Training runs small enough for tests: legible shards, a model of width 32, and ranks that start in a second.

Ranks are forked from one process that has imported everything, which saves some ten seconds per run. They run
`megatron_ledom.pretrain`; `run_command` runs the whole command instead, and torchrun, in a Python that starts quickly.
"""

import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from megatron_ledom.checkpoint.folder import latest_checkpoint
from megatron_ledom.data.preprocess.encode_parts import concatenate_documents
from megatron_ledom.data.shards.shard import Counts, ShardWriter
from megatron_ledom.direction import Direction
from megatron_ledom.tokenizers.corpus_tokenizer import load_tokenizer
from tests.support.forked import become, fork_context
from tests.support.legible import legible_ids, legible_tokenizer
from tests.support.paths import ROOT
from tests.support.warm_python import shared_python

SECONDS = 240
"""Longest time of a run: after it the ranks are killed, and the test fails with their log."""

Record = dict[str, Any]
Hook = Callable[[], None]


def documents(num_documents: int, seed: int) -> list[list[int]]:
    """Return documents as text-order ids: document k is legible document k modulo 10, cut to a random length."""
    lengths = np.random.default_rng(seed).integers(5, 100, num_documents)
    return [legible_ids(number % 10, int(length)) for number, length in enumerate(lengths)]


def write_shard(prefix: Path, texts: list[list[int]], direction: Direction, tokenizer: Path) -> str:
    """Write a shard of documents given as text-order ids, and return its prefix."""
    loaded = load_tokenizer(str(tokenizer))
    packed, lengths = concatenate_documents(
        np.array([number for text in texts for number in text], np.uint32),
        np.cumsum([0, *map(len, texts)]),
        direction=direction,
        eod_id=loaded.eod_id,
        vocab_size=loaded.vocab_size,
        dtype="uint16",
    )
    with ShardWriter(str(prefix), loaded.provenance(direction), "uint16") as writer:
        writer.append(packed, lengths)
        counts = Counts(text_bytes=4 * sum(map(len, texts)), tokenizer_path=str(tokenizer), eod_token=loaded.eod_token)
        writer.finalize(counts)
    return str(prefix)


@dataclass(frozen=True, slots=True)
class TinyData:
    """Shards of the same documents in both directions, their tokenizer, and the config of a tiny run over them."""

    folder: Path

    @property
    def config(self) -> Path:
        """YAML of a reverse run of two layers in fp32."""
        return self.folder / "tiny.yaml"

    def shard(self, name: str) -> str:
        """Return the prefix of `reverse_train`, `reverse_valid`, `forward_train` or `forward_valid`."""
        return str(self.folder / name)


def write_tiny_data(folder: Path) -> TinyData:
    """Write tokenizer, four shards and the config into `folder`."""
    data = TinyData(folder)
    tokenizer = legible_tokenizer(folder / "legible")
    for direction in Direction:
        write_shard(folder / f"{direction}_train", documents(400, 1), direction, tokenizer)
        write_shard(folder / f"{direction}_valid", documents(30, 2), direction, tokenizer)
    values = {
        "run_dir": str(folder / "run"),
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "ffn_hidden_size": 64,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "params_dtype": "fp32",
        },
        "data": {
            "seq_length": 32,
            "train_blend": [[1.0, data.shard("reverse_train")]],
            "path_to_cache": str(folder / "index_cache"),
        },
        "optimizer": {"lr": 3e-3, "min_lr": 3e-4, "lr_warmup_iters": 2},
        "train": {"train_iters": 20, "global_batch_size": 8, "micro_batch_size": 1, "num_threads": 1},
        "logging": {"log_interval": 1, "tensorboard": False, "peak_tflops": 1.0},
    }
    data.config.write_text(yaml.safe_dump(values), encoding="utf-8")
    return data


def read_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of the latest checkpoint by name, with those of the optimizer."""
    checkpoint = latest_checkpoint(str(run_dir / "checkpoints"))
    assert checkpoint is not None
    stored = _load_state_dict_from_keys(checkpoint_id=checkpoint)
    return {name: value for name, value in flatten_state_dict(stored)[0].items() if isinstance(value, torch.Tensor)}


def read_metrics(run_dir: Path) -> list[Record]:
    """Return the records of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def curve(records: Sequence[Record]) -> list[tuple[float, float]]:
    """Return (loss, gradient norm) of each record."""
    return [(record["lm_loss"], record["grad_norm"]) for record in records]


def check_same_run(found: Path, expected: Path) -> None:
    """Check that every iteration is there once, and that losses, norms, validations and final state are equal to the last bit."""
    records, wanted = read_metrics(found), read_metrics(expected)
    assert [record["iteration"] for record in records] == list(range(1, len(wanted) + 1))
    assert curve(records) == curve(wanted)
    assert [record.get("validation") for record in records] == [record.get("validation") for record in wanted]
    tensors, wanted_tensors = read_tensors(found), read_tensors(expected)
    assert tensors.keys() == wanted_tensors.keys()
    assert any("exp_avg_sq" in name for name in tensors)
    assert not [name for name, tensor in tensors.items() if not torch.equal(tensor, wanted_tensors[name])]


class Ranks:
    """The running ranks of one launch."""

    def __init__(self, processes: list[Any], log: Path) -> None:
        self.processes, self.log = processes, log

    def wait(self, seconds: float | None = None) -> list[int]:
        """Wait until all ranks have ended and return their exit codes; kill them after `seconds`, by default SECONDS."""
        end = time.monotonic() + (SECONDS if seconds is None else seconds)
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        for process in self.processes:
            if process.is_alive():
                os.killpg(process.pid, signal.SIGKILL)  # the ranks catch SIGTERM
            process.join()
        return [process.exitcode for process in self.processes]

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """Wait until `is_so` returns True."""
        end = time.monotonic() + SECONDS
        while not is_so():
            alive = all(process.is_alive() for process in self.processes)
            assert alive or is_so(), f"a rank ended early:\n{self.output()}"
            assert time.monotonic() < end, f"not within {SECONDS} s:\n{self.output()}"
            time.sleep(0.02)

    def send(self, number: signal.Signals, rank: int = 0) -> None:
        """Send a signal to one rank and to every process it has started, as a batch system does."""
        os.killpg(self.processes[rank].pid, number)

    def output(self) -> str:
        """Return the end of the ranks' output."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-6000:]


def start_ranks(
    config: Path, run_dir: Path, *overrides: str, num_ranks: int = 1, hook: Hook | None = None, instead: Hook | None = None
) -> Ranks:
    """Start `num_ranks` ranks of a run, or of `instead`, and return at once. Each rank first calls `hook`.

    `hook` and `instead` must be functions of a module.
    """
    log = config.parent / f"{run_dir.parent.name}-{run_dir.name}.log"
    if instead is not None:
        return start_processes(num_ranks, log, _run_instead, instead, free_port())
    arguments = ["--config", str(config), f"run_dir={run_dir}", *overrides]
    return start_processes(num_ranks, log, _train_each, [arguments], [free_port()], hook)


def as_srun_starts_it() -> None:
    """Change this rank's environment from torchrun's to srun's variables; the last hook of a rank.

    MASTER_ADDR and MASTER_PORT stay until the rendezvous address is read, because there is no SLURM to ask for it.
    """
    from megatron_ledom import pretrain

    read = pretrain.read_launch

    def read_and_delete() -> Any:
        launch = read()
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
        return launch

    rank, world_size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        del os.environ[name]
    step = {"JOB_ID": "1", "STEP_ID": "0", "NODEID": "0", "PROCID": rank, "LOCALID": rank}
    step |= {"STEP_NUM_TASKS": world_size, "STEP_TASKS_PER_NODE": world_size, "STEP_NODELIST": "n1"}
    os.environ.update({f"SLURM_{name}": value for name, value in step.items()})
    pretrain.read_launch = read_and_delete


def start_tool(tool: str, arguments: Sequence[str], log: Path, *, num_ranks: int = 1, hook: Hook | None = None) -> Ranks:
    """Start `num_ranks` ranks of a script, a path from the project's root, and return at once. Each first calls `hook`."""
    return start_processes(num_ranks, log, _run_tool, tool, list(arguments), free_port(), hook)


def start_processes(num_ranks: int, log: Path, body: Callable[..., None], *arguments: Any) -> Ranks:
    """Start ranks that call `body`, a function of a module, and return at once."""
    log.write_text("")
    launch = {"WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    context = fork_context()
    processes = []
    for rank in range(num_ranks):
        environment = {name: str(value) for name, value in {**launch, "RANK": rank, "LOCAL_RANK": rank}.items()}
        process = context.Process(target=_be_rank, args=(environment, str(log), body, arguments))
        process.start()
        processes.append(process)
    return Ranks(processes, log)


def run_on_ranks(config: Path, run_dir: Path, *overrides: str, num_ranks: int = 1, hook: Hook | None = None) -> list[Record]:
    """Run to the end, assert that every rank exits with 0, and return the records of metrics.jsonl."""
    ranks = start_ranks(config, run_dir, *overrides, num_ranks=num_ranks, hook=hook)
    codes = ranks.wait()
    assert codes == [0] * num_ranks, f"exit codes {codes}:\n{ranks.output()}"
    return read_metrics(run_dir)


def run_each_on_ranks(
    config: Path, runs: dict[Path, list[str]], *, num_ranks: int, hook: Hook | None = None, seconds: float | None = None
) -> dict[Path, list[Record]]:
    """Run several runs one after the other in one launch of ranks: overrides by run folder -> records by run folder."""
    log = next(iter(runs)).with_suffix(".log")
    arguments = [["--config", str(config), f"run_dir={run_dir}", *overrides] for run_dir, overrides in runs.items()]
    ranks = start_processes(num_ranks, log, _train_each, arguments, free_ports(len(runs)), hook)
    codes = ranks.wait(min(len(runs), 2) * SECONDS if seconds is None else seconds)
    assert codes == [0] * num_ranks, f"exit codes {codes}:\n{ranks.output()}"
    return {run_dir: read_metrics(run_dir) for run_dir in runs}


def run_command(*arguments: str, num_ranks: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run the training command: under torchrun with `num_ranks`, without torchrun if it is None."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"] if num_ranks else []
    command = [str(shared_python()), *torchrun, "-m", "megatron_ledom.pretrain", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS)


def free_port() -> int:
    """Return a port that is free now."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Return different ports that are free now, from the range that the system does not use for outgoing connections.

    Every process of pytest-xdist has a range of its own.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().randrange(20_000, 21_500) + 1_500 * worker  # independent of seeds in tests
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            ports.append(port)
        ports = list(dict.fromkeys(ports))
    return ports


def _be_rank(environment: dict[str, str], log: str, body: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Call `body` as one rank, with its output in `log`."""
    become(None, environment, [log, log])
    body(*arguments)


def _train_each(runs: list[list[str]], ports: list[int], hook: Hook | None) -> None:
    """Train one run after the other, as the command does; each has its own port, since the last one may still be closing."""
    from megatron_ledom import errors, pretrain

    sys.argv = ["pretrain", *runs[0]]  # a hook may read it
    if hook is not None:
        hook()
    for index, (arguments, port) in enumerate(zip(runs, ports, strict=True)):
        os.environ["MASTER_PORT"] = str(port)
        sys.argv = ["pretrain", *arguments]
        if index + 1 < len(runs):
            pretrain.main()
        else:
            errors.run_command(pretrain.main)


def _run_instead(instead: Hook, port: int) -> None:
    from megatron_ledom import errors

    os.environ["MASTER_PORT"] = str(port)
    errors.run_command(instead)


def _run_tool(tool: str, arguments: list[str], port: int, hook: Hook | None) -> None:
    if hook is not None:
        hook()
    os.environ["MASTER_PORT"] = str(port)
    sys.argv = [tool, *arguments]
    runpy.run_path(str(ROOT / tool), run_name="__main__")
