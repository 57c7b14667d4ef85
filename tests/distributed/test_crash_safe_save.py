"""Saves that fail leave the last checkpoint whole: after a kill at any step, a full disk, a killed writer, signals to all.

The state is one tensor and a number, saved by the writer that training uses; each save has forked ranks of its own.
"""

import itertools
import multiprocessing
import os
import random
import resource
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ledom.checkpoint.folder import latest_checkpoint
from megatron_ledom.checkpoint.manifest import load_manifest
from megatron_ledom.platform.core_fixes import CORRECTIONS
from megatron_ledom.platform.processes import JOB_SIGNALS
from megatron_ledom.storage.hashes import content_problems, size_problems
from megatron_ledom.training.resilience import STOP_SIGNALS
from tests.distributed import hazards
from tests.support.crashes import Steps
from tests.support.tiny_runs import TinyData, read_tensors, start_ranks

BIG = 4_000_000
"""Elements of a tensor whose writing takes a while."""


def save(config_file: str, folder: str, iteration: int, *, elements: int = 1000, **how: Any) -> None:
    """Save, as one rank, a tensor of `elements` per rank, all equal to `iteration`."""
    import torch.distributed as dist
    from megatron.core.dist_checkpointing import ShardedTensor

    from megatron_ledom.checkpoint.manifest import CheckpointManifest
    from megatron_ledom.checkpoint.writing import CheckpointWriter
    from megatron_ledom.config.load import load_config
    from megatron_ledom.config.schema import CheckpointConfig, ParallelConfig
    from megatron_ledom.data.blends.sources import load_sources
    from megatron_ledom.parallel.groups import start_distributed, stop_distributed
    from megatron_ledom.platform.device import prepare_platform

    if "without" in how:
        hazards.without(how["without"])
    config = load_config(config_file, [])
    provenance = load_sources(config).provenance
    groups = start_distributed(prepare_platform(1), ParallelConfig())
    rank, world = dist.get_rank(), dist.get_world_size()
    settings = CheckpointConfig(keep_last=1, async_save=how.get("async_save", True))
    writer = CheckpointWriter(folder, settings, groups.data_and_context)
    tensor = torch.full((elements,), float(iteration))
    weights = ShardedTensor.from_rank_offsets("weights", tensor, (0, rank, world))
    state = {"weights": weights, "step": iteration, "settings": "x" * how.get("common_bytes", 0)}
    position = {"iteration": iteration, "consumed_train_samples": 0, "consumed_train_tokens": 0}
    manifest = CheckpointManifest.describe(config, provenance, [], world, **position)
    if "die_at" in how:
        Steps(how["die_at"], folder)
    if how.get("full_disk_on_rank") == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (how.get("disk_bytes", 3000), resource.RLIM_INFINITY))
    if how.get("signals"):
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
            signal.signal(number, lambda *_: None)
    writer.save(manifest, state, {})
    tensor.fill_(-1.0)  # training continues
    if how.get("signals"):
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
            os.killpg(0, number)
    if how.get("kill_writer_of_rank") == rank:
        (process,) = multiprocessing.active_children()
        process.kill()
    writer.poll()
    writer.finish()
    stop_distributed()


def saved(data: TinyData, run: Path, iteration: int, num_ranks: int = 1, **how: Any) -> tuple[list[int], str]:
    """Save in separate processes; return their exit codes and output."""
    act = partial(save, str(data.config), str(run / "checkpoints"), iteration, **how)
    ranks = start_ranks(data.config, run / f"save{iteration}", num_ranks=num_ranks, instead=act)
    return ranks.wait(), ranks.output()


def check_whole(run: Path, num_ranks: int = 1) -> int:
    """Check every byte of the latest checkpoint, and return its iteration."""
    checkpoint = latest_checkpoint(str(run / "checkpoints"))
    assert checkpoint is not None
    manifest = load_manifest(checkpoint)
    assert size_problems(checkpoint, manifest.files) == content_problems(checkpoint, manifest.files) == []
    assert {name for name in os.listdir(checkpoint) if name != "manifest.json"} == set(manifest.files)
    weights = read_tensors(run)["weights"]
    assert torch.equal(weights, torch.full((weights.numel(),), float(manifest.iteration)))
    return manifest.iteration


def names(run: Path) -> list[str]:
    return sorted(os.listdir(run / "checkpoints"))


@pytest.mark.parametrize(
    ("async_save", "stride"),
    [(True, 6), pytest.param(True, 1, marks=pytest.mark.slow), pytest.param(False, 1, marks=pytest.mark.slow)],
)
def test_killed_at_any_step_of_a_save_the_last_checkpoint_is_whole(
    data: TinyData, tmp_path: Path, async_save: bool, stride: int
) -> None:
    """Stride 1 tests each step; the quick test takes every sixth from a random one on."""
    start = tmp_path / "start"
    assert saved(data, start, 1)[0] == [0]
    first = random.randrange(1, stride + 1)
    print("first step:", first)
    found = set()
    for step in itertools.count(first, stride):
        run = tmp_path / f"killed_at_{step}"
        shutil.copytree(start, run)
        codes, output = saved(data, run, 2, die_at=step, async_save=async_save)
        if codes == [0]:
            break
        assert codes == [-signal.SIGKILL], output
        found.add(check_whole(run))
        if (step - first) // stride % 3 == 0:
            codes, output = saved(data, run, 3)
            assert codes == [0], output
            assert check_whole(run) == 3
            assert names(run) == ["iter_0000003", "latest"]
    assert found == {1, 2}
    assert step > 25
    assert check_whole(run) == 2
    assert names(run) == ["iter_0000002", "latest"]


@pytest.mark.parametrize("async_save", [True, False])
def test_a_full_disk_on_one_rank_is_an_error_on_all_and_keeps_the_previous_checkpoint(
    data: TinyData, tmp_path: Path, async_save: bool
) -> None:
    assert saved(data, tmp_path, 1, num_ranks=2)[0] == [0, 0]
    codes, output = saved(data, tmp_path, 2, num_ranks=2, full_disk_on_rank=1, async_save=async_save)
    assert codes == [1, 1], output
    assert output.count("error: checkpoint 2 was not saved; the earlier ones are unchanged: rank 1:") == 2
    assert "__1_0.distcp cannot be written: File too large; make room, then run the same command again" in output
    assert check_whole(tmp_path) == 1
    assert names(tmp_path) == ["iter_0000001", "latest"]
    assert saved(data, tmp_path, 2, num_ranks=2)[0] == [0, 0]
    assert check_whole(tmp_path) == 2


def test_a_full_disk_for_the_common_state_is_an_error_on_all_ranks(data: TinyData, tmp_path: Path) -> None:
    """Without the correction, which megatron-core needs before 0.19, only the first rank knows."""
    for name, without in {"corrected": {}, "stock": {"without": "common state"}}.items():
        sizes = {"common_bytes": 100_000, "disk_bytes": 50_000}
        codes, output = saved(data, tmp_path / name, 1, num_ranks=2, full_disk_on_rank=0, **sizes, **without)
        told = output.count("common.pt cannot be written: File too large; make room, then run the same command again")
        if name == "corrected" or not CORRECTIONS["common state"].is_needed():
            assert (codes, told) == ([1, 1], 2), output
        else:
            assert told == 0, output
            assert all(code != 0 for code in codes)


def test_a_writer_that_is_killed_is_an_error_with_its_cause(data: TinyData, tmp_path: Path) -> None:
    assert saved(data, tmp_path, 1, num_ranks=2)[0] == [0, 0]
    codes, output = saved(data, tmp_path, 2, num_ranks=2, kill_writer_of_rank=1, elements=BIG)
    assert codes == [3, 3], output
    assert "rank 1: the process that wrote this rank's part of" in output
    assert "was killed by SIGKILL; often memory ran out" in output
    assert check_whole(tmp_path) == 1


def test_a_writer_ignores_every_signal_that_stops_a_run() -> None:
    assert set(STOP_SIGNALS) < set(JOB_SIGNALS)


def test_signals_to_all_processes_of_a_job_do_not_end_a_save(data: TinyData, tmp_path: Path) -> None:
    codes, output = saved(data, tmp_path, 1, signals=True, elements=BIG)
    assert codes == [0], output
    assert check_whole(tmp_path) == 1


def test_signals_end_a_save_whose_results_are_in_a_process(data: TinyData, tmp_path: Path) -> None:
    """Without the correction the same signals end megatron-core's process for the results."""
    codes, output = saved(data, tmp_path, 1, signals=True, elements=BIG, without="save results in memory")
    assert codes != [0], output
    assert latest_checkpoint(str(tmp_path / "checkpoints")) is None
