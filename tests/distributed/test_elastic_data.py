"""Real ranks train on the same samples in the same steps, in any layout and after any change of it."""

import json
import os
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megatron_ledom.config.load import load_config
from megatron_ledom.data.blends.sources import load_sources
from megatron_ledom.data.dataset.blend_samples import build_train_dataset
from megatron_ledom.data.dataset.sample_index import prepare_indices
from megatron_ledom.direction import Direction
from megatron_ledom.platform.launch import ALONE
from tests.support.plain_llama import plain_lr
from tests.support.tiny_runs import TinyData, read_metrics, start_ranks, write_shard

BATCH = 8


def note_samples() -> None:
    """Write the tokens of every sample that the model of this rank gets, by step, into the run folder."""
    from megatron_ledom.training import trainer

    run_dir = next(text.partition("=")[2] for text in sys.argv if text.startswith("run_dir="))
    forward, advance, iteration = trainer.forward_step, trainer.TrainState.advance, [0]
    path = os.path.join(run_dir, f"seen-{os.getpid()}.jsonl")

    def noting_forward(z_loss_coeff, batches, model):  # type: ignore[no-untyped-def]
        batch = next(batches)
        with open(path, "a", encoding="utf-8") as file:
            for tokens in batch["tokens"].tolist():
                file.write(json.dumps([iteration[0], tokens]) + "\n")
        return forward(z_loss_coeff, iter([batch]), model)

    def noting_advance(state):  # type: ignore[no-untyped-def]
        advance(state)
        iteration[0] = state.iteration

    def noting_load(state, checkpoint):  # type: ignore[no-untyped-def]
        load(state, checkpoint)
        iteration[0] = state.iteration

    from megatron_ledom.training import state as state_module

    load = state_module.load_checkpoint
    state_module.load_checkpoint = noting_load
    trainer.forward_step = noting_forward
    trainer.TrainState.advance = noting_advance  # type: ignore[method-assign]


@pytest.fixture
def blend(data: TinyData, tmp_path: Path) -> list[str]:
    """Overrides for two sources without equal samples; the smaller one is read more than once."""
    numbers = np.random.default_rng(3)
    shards = []
    for name, count in (("large", 150), ("small", 12)):
        texts = [numbers.integers(0, 1000, int(length)).tolist() for length in numbers.integers(5, 100, count)]
        shards.append(write_shard(tmp_path / name, texts, Direction.REVERSE, data.folder / "legible"))
    return [f"data.train_blend=[[2,{shards[0]}],[1,{shards[1]}]]", "data.allow_repeats=true", "train.train_iters=12"]


def expected_samples(data: TinyData, tmp_path: Path, overrides: list[str]) -> list[tuple[int, ...]]:
    """Return the tokens of every sample of the run in order, read in this process."""
    config = load_config(str(data.config), overrides)
    sources = load_sources(config)
    drawn = sources.train.interleave.counts(sources.train.num_samples).tolist()
    assert drawn[1] > sources.train.sources[1].samples_available(config.data.seq_length)
    prepare_indices(config, sources, str(tmp_path / "cache"), ALONE)
    dataset = build_train_dataset(config, sources, str(tmp_path / "cache"))
    return [tuple(dataset[number]["tokens"].tolist()) for number in range(len(dataset))]


def run(data: TinyData, run_dir: Path, *overrides: str, num_ranks: int) -> dict[int, list[tuple[int, ...]]]:
    """Run one launch; return the tokens of the samples of each step, over all ranks."""
    ranks = start_ranks(data.config, run_dir, *overrides, num_ranks=num_ranks, hook=note_samples)
    assert ranks.wait() == [0] * num_ranks, ranks.output()
    steps = defaultdict(list)
    for file in run_dir.glob("seen-*.jsonl"):
        for line in file.read_text().splitlines():
            step, tokens = json.loads(line)
            steps[step].append(tuple(tokens))
        file.unlink()
    return dict(steps)


def test_a_run_resumed_in_other_layouts_misses_and_repeats_no_sample(data: TinyData, tmp_path: Path, blend: list[str]) -> None:
    """The layouts are DP4, then DP2 with another micro-batch and reading processes, then one rank; each launch resumes the run."""
    expected = expected_samples(data, tmp_path, blend)
    assert len(expected) == 12 * BATCH
    assert len(set(expected)) == len(expected)  # also when the small source is read again, because it is cut differently
    run_dir, seen = tmp_path / "run", {}
    for num_ranks, settings in (
        (4, ["train.exit_interval=5"]),
        (2, ["train.micro_batch_size=2", "data.num_workers=2", "train.exit_interval=9"]),
        (1, ["train.micro_batch_size=4"]),
    ):
        seen |= run(data, run_dir, *blend, *settings, num_ranks=num_ranks)
    assert sorted(seen) == list(range(12))
    for step, samples in seen.items():
        assert sorted(samples) == sorted(expected[step * BATCH : (step + 1) * BATCH])


def test_a_changed_batch_size_continues_with_the_next_sample(data: TinyData, tmp_path: Path, blend: list[str]) -> None:
    """Four steps of 8 samples, then eight of 4: fewer samples than in twelve steps of 8, but consecutive ones."""
    expected = expected_samples(data, tmp_path, blend)
    run_dir = tmp_path / "run"
    first = run(data, run_dir, *blend, "train.exit_interval=4", num_ranks=1)
    rest = run(data, run_dir, *blend, "train.global_batch_size=4", num_ranks=2)
    found = [sorted(first[step]) for step in range(4)] + [sorted(rest[step]) for step in range(4, 12)]
    borders = [*range(0, 32, 8), *range(32, 65, 4)]
    assert found == [sorted(expected[begin:end]) for begin, end in pairwise(borders)]
    config = load_config(str(data.config), blend)
    rates = [record["lr"] for record in read_metrics(run_dir)]
    assert rates == pytest.approx([plain_lr(config, done) for done in range(1, 13)])  # the schedule counts iterations
