"""Runs whose global batch size changes: the same samples in order, on any ranks, and exact after a stop at any change."""

import json
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ledom.config.load import load_config
from megatron_ledom.data.blends.sources import load_sources
from megatron_ledom.data.dataset.blend_samples import build_train_dataset
from megatron_ledom.data.dataset.sample_index import prepare_indices
from megatron_ledom.platform.launch import ALONE
from tests.support.injected_errors import inject
from tests.support.plain_llama import plain_lr
from tests.support.seen_samples import run_and_note
from tests.support.tiny_runs import (
    TinyData,
    curve,
    read_metrics,
    read_tensors,
    run_each_on_ranks,
    run_on_ranks,
    start_ranks,
    start_tool,
)

SIZES = [4, 4, 4, 6, 6, 8, 8]
"""Of the iterations, by hand: the second size holds from sample 384 / 32 = 12, the third from 640 / 32 = 20, first met at 24."""
BORDERS = [sum(SIZES[:number]) for number in range(len(SIZES) + 1)]
BASE = (f"train.train_iters={len(SIZES)}", "model.num_layers=4", "train.eval_interval=4", "train.eval_iters=2")
LISTED = (*BASE, "train.batch_size_schedule=[[0,4],[384,6],[640,8]]")
RAMPED = (*BASE, "train.rampup_batch_size=[4,2,24]")
"""Steps of 12 samples: 4 up to sample 12, 6 up to 24, then 8; the same sizes."""
LAYOUTS = {
    "data": (
        "parallel.use_distributed_optimizer=true",
        "parallel.overlap_grad_reduce=true",
        "parallel.overlap_param_gather=true",
    ),
    "pipeline": ("parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"),
}


def of(data: TinyData, settings: tuple[str, ...], *more: str) -> list[str]:
    return [*settings, f"data.valid_blend=[[1.0,{data.shard('reverse_valid')}]]", *more]


@pytest.fixture(scope="module")
def whole(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of one process, with a ramp-up."""
    run_dir = tmp_path_factory.mktemp("ramped") / "run"
    run_on_ranks(data.config, run_dir, *of(data, RAMPED))
    return run_dir


def test_a_stop_at_each_change_of_the_batch_is_exact_and_the_samples_are_those_of_a_constant_batch(
    data: TinyData, tmp_path: Path, whole: Path
) -> None:
    """The list gives the sizes of the ramp-up, so it must give the same run, bit for bit."""
    config = load_config(str(data.config), of(data, BASE))
    sources = load_sources(config)
    prepare_indices(config, sources, str(tmp_path / "cache"), ALONE)
    constant = build_train_dataset(config, sources, str(tmp_path / "cache"))
    expected = [tuple(constant[number]["tokens"].tolist()) for number in range(BORDERS[-1])]
    seen: dict[int, Any] = {}
    for stop in (3, 5, len(SIZES)):
        seen |= run_and_note(
            data, tmp_path / "run", *of(data, LISTED, f"train.exit_interval={stop}", "data.num_workers=1"), num_ranks=1
        )
        assert len(read_metrics(tmp_path / "run")) == stop
    wanted = [[*part] for part in (expected[first:last] for first, last in pairwise(BORDERS))]
    assert [seen[step][-SIZES[step] :] for step in range(len(SIZES))] == wanted  # after those of a validation
    records, uninterrupted = read_metrics(tmp_path / "run"), read_metrics(whole)
    assert curve(records) == curve(uninterrupted)
    for key in ("global_batch_size", "consumed_train_samples", "consumed_train_tokens", "lr", "validation"):
        assert [record.get(key) for record in records] == [record.get(key) for record in uninterrupted], key
    assert [record["global_batch_size"] for record in records] == SIZES
    assert [record["consumed_train_samples"] for record in records] == BORDERS[1:]
    assert [record["consumed_train_tokens"] for record in records] == [32 * count for count in BORDERS[1:]]
    assert [record["lr"] for record in records] == pytest.approx([plain_lr(config, done) for done in range(1, len(SIZES) + 1)])
    tensors, others = read_tensors(tmp_path / "run"), read_tensors(whole)
    assert tensors.keys() == others.keys()
    assert not [name for name, tensor in tensors.items() if not torch.equal(tensor, others[name])]


def test_two_ranks_equal_one_in_every_phase(data: TinyData, tmp_path: Path, whole: Path) -> None:
    runs = {tmp_path / name: of(data, RAMPED, *settings) for name, settings in LAYOUTS.items()}
    one = read_metrics(whole)
    for found in run_each_on_ranks(data.config, runs, num_ranks=2).values():
        assert [record["global_batch_size"] for record in found] == SIZES
        for mine, other in zip(curve(found), curve(one), strict=True):
            assert mine == pytest.approx(other, rel=2e-5)
        losses = [next(iter(records[-1]["validation"].values()))["lm_loss"] for records in (found, one)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_returns_skips_and_replays_know_the_batch_of_their_iteration(data: TinyData, tmp_path: Path) -> None:
    """Iteration 5 is bad: the run returns to iteration 4 and skips it. Iteration 6 is skipped by the config."""
    run_dir, error = tmp_path / "run", "nan:5"
    command = (*RAMPED, "train.on_nonfinite=roll_back", "checkpoint.save_interval=2", "train.skip_iterations=[6]")
    records = run_on_ranks(data.config, run_dir, *command, hook=partial(inject, error))
    assert [record["iteration"] for record in records] == [1, 2, 3, 4, 7]  # skipped ones have no record
    assert [record["consumed_train_samples"] for record in records] == [*BORDERS[1:5], BORDERS[7]]
    bad = [json.loads(line) for line in (run_dir / "bad_steps.jsonl").read_text().splitlines()]
    assert [(one["iteration"], one["first_sample"], one["last_sample"]) for one in bad] == [(5, 18, 23)]
    arguments = ["--run", str(run_dir), "--iteration", "5"]
    replay = start_tool("tools/replay_step.py", arguments, tmp_path / "replay.log", hook=partial(inject, error))
    assert replay.wait() == [0], replay.output()
    assert "equal bit for bit" in replay.output()
    assert "samples 18 to 23" in replay.output()


def test_a_changed_schedule_continues_with_the_next_sample_and_another_length_is_refused(
    data: TinyData, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run_on_ranks(data.config, run_dir, *LISTED, "train.exit_interval=3")
    longer = ["data.seq_length=64", "data.allow_changed_data=true"]
    refused = start_ranks(data.config, run_dir, *LISTED, *longer)
    assert refused.wait() == [2]
    assert "train.batch_size_schedule would count the tokens up to" in refused.output()
    records = run_on_ranks(
        data.config, run_dir, *BASE, "train.batch_size_schedule=[[0,2],[512,16]]", "train.global_batch_size=16"
    )
    assert [record["consumed_train_samples"] for record in records] == [4, 8, 12, 14, 16, 32, 48]
