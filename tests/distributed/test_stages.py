"""Runs of a stage file: in turn by one command, and after any kill in the right stage, bit for bit as started one by one."""

import signal
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from megatron_ledom.checkpoint.folder import latest_checkpoint
from megatron_ledom.checkpoint.manifest import load_manifest
from tests.support.tiny_runs import Ranks, TinyData, curve, read_metrics, read_tensors, run_command, run_on_ranks, start_ranks

STAGES: dict[str, list[str]] = {
    "base": ["train.train_iters=8"],
    "anneal": ["train.train_iters=12", "train.seed=7", "train.global_batch_size=4", "parallel.tensor_model_parallel_size=2"],
    "longer": [
        "train.train_iters=4",
        "data.seq_length=64",
        "model.rope_scaling=yarn",
        "model.rope_scaling_factor=2",
        "model.rope_scaling_original_max_position=32",
    ],
}
COMMON = [
    "checkpoint.save_interval=3",
    "data.allow_repeats=true",
    "parallel.distributed_timeout_minutes=2",
    "train.watchdog_seconds=60",
]


@dataclass(frozen=True)
class Stages:
    """The stage file of a test, and the folder of its runs."""

    data: TinyData
    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / "stages.yaml"

    def run(self, name: str) -> Path:
        return self.folder / name

    def write(self) -> "Stages":
        self.folder.mkdir()
        entries = [
            {"config": str(self.data.config), "overrides": [f"run_dir={self.run(name)}", *COMMON, *overrides]}
            for name, overrides in STAGES.items()
        ]
        self.file.write_text(yaml.safe_dump({"stages": entries}), encoding="utf-8")
        return self

    def start(self, num_ranks: int = 2, *more: str) -> Ranks:
        """Start the command. The processes of further stages are forks of a warm Python if `sys.executable` is one."""
        body = partial(train, ["--stages", str(self.file), *more], sys.executable)
        return start_ranks(self.data.config, self.run("command"), num_ranks=num_ranks, instead=body)

    def progress(self) -> str:
        return run_command("--stages", str(self.file), "--progress").stdout.strip()

    def num_launches(self, name: str) -> int:
        launches = self.run(name) / "launches.jsonl"
        return len(launches.read_text().splitlines()) if launches.exists() else 0

    def last_iteration(self, name: str) -> int:
        metrics = self.run(name) / "metrics.jsonl"
        return len(read_metrics(self.run(name))) if metrics.exists() else 0


def train(arguments: list[str], executable: str) -> None:
    """Run the command as one rank, as its own process would."""
    from megatron_ledom import errors, pretrain

    sys.executable = executable
    sys.argv = ["pretrain", *arguments]
    sys.orig_argv = [executable, "-m", "megatron_ledom.pretrain", *arguments]
    errors.run_command(pretrain.main)


@pytest.fixture(scope="module")
def by_hand(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs of the stages, each started by a command of its own."""
    folder, before = tmp_path_factory.mktemp("by_hand"), []
    for name, overrides in STAGES.items():
        run_on_ranks(data.config, folder / name, *COMMON, *overrides, *before, num_ranks=2)
        before = [f"init_from={folder / name}"]
    return folder


@pytest.fixture
def stages(data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: Path) -> Stages:
    monkeypatch.setattr(sys, "executable", str(python))
    return Stages(data, tmp_path / "stages").write()


def check_same(stages: Stages, by_hand: Path) -> None:
    """Check that losses, norms and all tensors of every stage are those of the run started by hand."""
    for name in STAGES:
        assert curve(read_metrics(stages.run(name))) == curve(read_metrics(by_hand / name)), name
        found, expected = read_tensors(stages.run(name)), read_tensors(by_hand / name)
        assert found.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == [], name


def test_one_command_trains_all_stages_as_by_hand(stages: Stages, by_hand: Path) -> None:
    assert stages.progress() == "0 24"
    ranks = stages.start()
    assert ranks.wait() == [0, 0], ranks.output()
    check_same(stages, by_hand)
    assert stages.progress() == "24 24"
    manifest = load_manifest(str(latest_checkpoint(str(stages.run("longer") / "checkpoints"))))
    assert [Path(record["path"]).parts[-3:] for record in manifest.started_from] == [
        ("base", "checkpoints", "iter_0000008"),
        ("anneal", "checkpoints", "iter_0000012"),
    ]
    again = stages.start()
    assert again.wait() == [0, 0]
    assert "is complete at iteration 4" in again.output()


def test_stops_and_kills_in_any_stage_resume_in_it(stages: Stages, by_hand: Path) -> None:
    """SIGTERM in the first stage ends with 0, but the second begins only when the first is complete; then SIGKILL in it."""
    ranks = stages.start()
    ranks.wait_until(lambda: stages.last_iteration("base") >= 2)
    ranks.send(signal.SIGTERM, rank=1)
    assert ranks.wait() == [0, 0], ranks.output()
    done = stages.last_iteration("base")
    assert 2 <= done < 8
    assert not stages.run("anneal").exists()
    assert stages.progress() == f"{done} 24"
    run_on_ranks(stages.data.config, stages.run("base"), *COMMON, *STAGES["base"], num_ranks=2)
    assert stages.progress() == "8 24"
    for rank in (0, 1):
        ranks = stages.start()
        ranks.wait_until(lambda number=rank + 1: stages.num_launches("anneal") == number)
        ranks.wait_until(lambda: (stages.run("anneal") / "checkpoints/latest").exists())
        ranks.send(signal.SIGKILL, rank=rank)
        ranks.send(signal.SIGKILL, rank=1 - rank)
        assert ranks.wait() == [-signal.SIGKILL] * 2
        assert 8 < int(stages.progress().split()[0]) < 20
        assert not stages.run("longer").exists()
    assert stages.start().wait() == [0, 0]
    check_same(stages, by_hand)


def test_a_signal_at_the_end_of_a_stage_does_not_begin_the_next(stages: Stages) -> None:
    """The signal comes after the last step: the stage is complete, and the launch ends."""
    body = partial(train_with_late_signal, ["--stages", str(stages.file)], sys.executable)
    ranks = start_ranks(stages.data.config, stages.run("command"), num_ranks=2, instead=body)
    assert ranks.wait() == [0, 0], ranks.output()
    assert stages.progress() == "8 24"
    assert not stages.run("anneal").exists()


def train_with_late_signal(arguments: list[str], executable: str) -> None:
    """Run the command as one rank; rank 1 gets SIGTERM when its training is over."""
    import os

    from megatron_ledom.training import trainer

    whole = trainer.train

    def and_signal(*parts: object) -> None:
        whole(*parts)  # type: ignore[arg-type]
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.train = and_signal  # type: ignore[assignment]
    train(arguments, executable)


def test_a_stop_signal_survives_the_change_of_the_process(tmp_path: Path) -> None:
    """It is blocked until the new process handles it, and one that has been received is sent again."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys\n"
        "from types import SimpleNamespace\n"
        "from megatron_ledom.training.resilience import StopRequest\n"
        "from megatron_ledom.training.stages import replace_process, take_place\n"
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()\n"  # blocks no signal
        "stop, place = StopRequest(), take_place()\n"
        "if place.stage is None:\n"
        "    stop.received = signal.SIGUSR1\n"
        "    replace_process(SimpleNamespace(title='', number=2), 5.5, 1, stop)\n"
        "print(sys.argv[1:], place.stage, place.since, place.replacements, 'LEDOM_STAGE' in os.environ, stop.name())\n"
    )
    done = run_script(script)
    assert done == "['an argument'] 2 5.5 1 False SIGUSR1"


def run_script(script: Path) -> str:
    import os
    import subprocess

    from tests.support.paths import ROOT

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, script, "an argument"], env=environment, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_check_and_dry_run_describe_every_stage(stages: Stages) -> None:
    done = run_command("--stages", str(stages.file), "--check", "2")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("stage ")]
    assert lines == ["stage 1 of 3 (base): next", "stage 2 of 3 (anneal): to come", "stage 3 of 3 (longer): to come"]
    done = run_command("--stages", str(stages.file), "--dry-run", "parallel.world_size=2")
    assert done.returncode == 0, done.stderr
    assert f"init_from: {stages.run('base')}/checkpoints/iter_0000008" in done.stdout
    assert "# stage 3 of 3 (longer)" in done.stdout


def test_a_later_stage_that_does_not_fit_is_refused_at_the_first_start(stages: Stages) -> None:
    content = yaml.safe_load(stages.file.read_text())
    content["stages"][2]["overrides"].append("model.hidden_size=48")
    stages.file.write_text(yaml.safe_dump(content))
    ranks = stages.start()
    assert ranks.wait() == [1, 1]
    assert "stage 3 of 3 (longer): stage 2 of 3 (anneal) has another architecture: model.hidden_size=48" in ranks.output()
    assert not stages.run("base").exists()


def test_a_run_that_is_not_of_the_file_is_not_taken_as_a_complete_stage(stages: Stages) -> None:
    run_on_ranks(stages.data.config, stages.run("longer"), *COMMON, *STAGES["longer"], num_ranks=2)
    done = run_command("--stages", str(stages.file), "--progress")
    assert done.returncode == 1
    assert "has started without init_from" in done.stderr
