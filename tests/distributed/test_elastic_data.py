"""Real ranks train on the same samples in the same steps, in any layout and after any change of it."""

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
from tests.support.seen_samples import run_and_note as run
from tests.support.tiny_runs import TinyData, read_metrics, write_shard

BATCH = 8


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
