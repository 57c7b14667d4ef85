"""Blends, splits and held-out sets: the samples of each source, and bits per byte of the right text."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ledom.config.load import load_config
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.data.blends.plan import MOST_ROWS, PlannedSource, describe_sources
from megatron_ledom.data.blends.sources import Sources, describe_blend, load_sources, split_shard
from megatron_ledom.data.shards.shard import ShardReader, load_manifest
from megatron_ledom.data.shards.targets import counted_bytes_per_token
from megatron_ledom.direction import Direction
from megatron_ledom.errors import ConfigError, MismatchError
from tests.support.tiny_runs import TinyData, documents, write_shard


def opened(data: TinyData, *overrides: str) -> tuple[RunConfig, Sources]:
    config = load_config(str(data.config), overrides)
    return config, load_sources(config)


def both(data: TinyData, *weights: float) -> str:
    return f"[[{weights[0]},{data.shard('reverse_train')}],[{weights[1]},{data.shard('reverse_valid')}]]"


def edited(prefix: str, text_bytes: int) -> None:
    path = Path(prefix + ".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "text_bytes": text_bytes}))


@pytest.mark.parametrize("ratios", [(98, 1, 1), (0.5, 0.5, 0), (1, 2, 3), (7, 0, 1), (1, 0, 0)])
def test_a_split_takes_every_document_once_and_counts_its_tokens(data: TinyData, ratios: tuple[float, ...]) -> None:
    prefix = data.shard("reverse_train")
    lengths = ShardReader(prefix).lengths
    parts = split_shard(prefix, load_manifest(prefix), ratios)
    assert [part.first for part in parts] == [0, *[part.last for part in parts[:-1]]]
    assert parts[-1].last == len(lengths)
    for part, ratio in zip(parts, ratios, strict=True):
        assert part.num_tokens == lengths[part.first : part.last].sum()
        assert part.last - part.first == pytest.approx(len(lengths) * ratio / sum(ratios), abs=1)


def test_a_split_run_trains_on_the_train_part_and_holds_the_others_out(data: TinyData) -> None:
    config, sources = opened(data, "data.split=[70,20,10]", "train.eval_iters=3")
    train, valid, test = sources.train.sources[0], sources.valid["valid"].sources[0], sources.test["test"].sources[0]
    assert [part.documents.first for part in (train, valid, test)] == [0, 280, 360]
    assert [part.documents.last for part in (train, valid, test)] == [280, 360, 400]
    assert sources.train.num_samples == 160
    assert sources.valid["valid"].num_samples == 3 * config.train.global_batch_size
    _, without = opened(data, "data.split=[70,30,0]")
    assert (list(without.valid), list(without.test)) == (["valid"], [])


def test_named_sets_are_blends_and_each_shard_of_valid_blend_is_its_own_set(data: TinyData) -> None:
    sets = f"{{mixed: {both(data, 3, 1)}}}"
    blend = f"data.valid_blend=[[1,{data.shard('reverse_valid')}]]"
    _, sources = opened(data, blend, f"data.valid_sets={sets}", f"data.test_sets={{last: {both(data, 1, 1)}}}")
    assert list(sources.valid) == [data.shard("reverse_valid"), "mixed"]
    assert [source.weight for source in sources.valid["mixed"].sources] == [0.75, 0.25]
    assert list(sources.test) == ["last"]
    assert sources.valid["mixed"].num_samples % 8 == 0


def test_bytes_of_a_blend_are_those_of_the_samples_it_draws(data: TinyData, tmp_path: Path) -> None:
    """One source with 4 bytes per id and one with 1: three samples of four from the first give (3 * 4 + 1) / 4 bytes per id."""
    shards = []
    for name, ratio in (("wide", 4), ("narrow", 1)):
        prefix = write_shard(tmp_path / name, documents(100, 1), Direction.REVERSE, data.folder / "legible")
        edited(prefix, ratio * load_manifest(prefix).num_tokens)
        shards.append(prefix)
    config, sources = opened(data, f"data.valid_sets={{two: [[3,{shards[0]}],[1,{shards[1]}]]}}", "train.eval_iters=4")
    blend = sources.valid["two"]
    assert blend.num_samples == 32
    assert blend.interleave.counts(32).tolist() == [24, 8]
    assert blend.bytes_per_token(config.data) == pytest.approx((3 * 4 + 1) / 4)


def test_a_marker_is_no_text_where_the_loss_does_not_count_it(data: TinyData, tmp_path: Path) -> None:
    """With eod_mask_loss the loss counts every id but the marker; without it the marker as well."""
    prefix = write_shard(tmp_path / "shard", documents(100, 1), Direction.REVERSE, data.folder / "legible")
    manifest = load_manifest(prefix)
    marked = replace(manifest, reading={"unit": "token", "marker_id": 5})
    for counted, found in ((True, manifest), (False, manifest), (False, marked)):
        assert counted_bytes_per_token(found, "all", eod_mask_loss=counted) == manifest.text_bytes / manifest.num_tokens
    expected = manifest.text_bytes / (manifest.num_tokens - manifest.num_documents)
    assert counted_bytes_per_token(marked, "all", eod_mask_loss=True) == expected


def test_the_table_before_training_lists_the_samples_of_each_source(data: TinyData) -> None:
    config, sources = opened(data, f"data.train_blend={both(data, 3, 1)}")
    table = [line.split() for line in describe_blend(config, sources).splitlines()]
    assert table[0] == ["source", "tokens", "weight", "share", "drawn", "epochs", "samples"]
    counts = sources.train.interleave.counts(160).tolist()
    assert [row[-1] for row in table[1:]] == [str(counts[0]), str(counts[1]), "160"]
    stored = load_manifest(data.shard("reverse_train")).num_tokens
    assert table[1][1:6] == [f"{stored:,}", "3", "75.00%", f"{counts[0] * 32:,}", f"{counts[0] * 32 / stored:.4f}"]


def test_a_stated_direction_must_be_that_of_the_shard(data: TinyData) -> None:
    train, valid = data.shard("reverse_train"), data.shard("reverse_valid")
    stated, plain = (opened(data, f"data.train_blend=[{entry}]")[1] for entry in (f"[1,{train},reverse]", f"[1,{train}]"))
    assert stated.train_shards() == plain.train_shards()
    sets = f"data.valid_sets={{own: [[1,{data.shard('forward_valid')},reverse]]}}"
    with pytest.raises(
        MismatchError, match=r"data.valid_sets.own says that .*forward_valid is reverse, but its manifest says forw"
    ):
        opened(data, sets)
    chosen = ["data.direction=both", f"data.train_blend=[[1,{train},reverse],[1,{valid},forward]]"]
    expected = (
        rf"data.train_blend says that the shard {valid} is forward, but its manifest says reverse; correct or omit the direction in"
        " data.train_blend, or name a forward shard, which ledom reverse-shards makes of a reverse one"
    )
    with pytest.raises(MismatchError, match=expected):
        opened(data, *chosen)


def test_a_table_of_many_shards_has_a_row_for_each_array() -> None:
    names = [f"web-{number:05d}-of-00064" for number in range(64)] + ["books"]
    rows = describe_sources([PlannedSource(name, 100, 1, 1 / 65, 50.0, 5, 10) for name in names], 65 * 50).splitlines()
    assert len(names) > MOST_ROWS
    assert len(rows) == 4
    assert rows[1].split() == ["web-*-of-00064", "(64", "shards)", "6,400", "64", "98.46%", "3,200", "0.5000", "320"]
    assert rows[2].split() == ["books", "100", "1", "1.54%", "50", "0.5000", "5"]


def test_a_run_that_draws_one_sample_too_many_is_refused(data: TinyData) -> None:
    """The count is exact: the last iteration that fits is accepted, the next one is refused."""
    available = (load_manifest(data.shard("reverse_train")).num_tokens - 1) // 32
    opened(data, f"train.train_iters={available // 8}")
    with pytest.raises(ConfigError, match=rf"has {available:,}, so it would be read"):
        opened(data, f"train.train_iters={available // 8 + 1}")
    _, sources = opened(data, f"train.train_iters={available // 8 + 1}", "data.allow_repeats=true")
    assert sources.train.num_samples > available


def test_a_source_without_a_sample_is_named(data: TinyData, tmp_path: Path) -> None:
    tiny = write_shard(tmp_path / "tiny", [[1, 2, 3]], Direction.REVERSE, data.folder / "legible")
    blend = f"data.train_blend=[[1,{data.shard('reverse_train')}],[1,{tiny}]]"
    with pytest.raises(ConfigError, match=r"tiny has 4 tokens to train on, less than one sample of data.seq_length=32"):
        opened(data, blend, "data.allow_repeats=true")
    with pytest.raises(ConfigError, match=r"the held-out set small has 0 samples of 32 tokens by its weights"):
        opened(data, f"data.valid_sets={{small: [[1,{tiny}]]}}")


def test_a_shard_whose_held_out_part_rounds_to_nothing_does_not_empty_the_set(
    data: TinyData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    few = write_shard(tmp_path / "few", documents(4, 1), Direction.REVERSE, data.folder / "legible")
    blend = f"data.train_blend=[[3,{data.shard('reverse_train')}],[1,{few}]]"
    _, sources = opened(data, blend, "data.split=[9,1,0]", "data.allow_repeats=true", "train.eval_iters=2")
    assert len(sources.train.sources) == 2
    assert [(source.prefix, source.weight) for source in sources.valid["valid"].sources] == [(data.shard("reverse_train"), 1.0)]
    assert sources.valid["valid"].num_samples == 16
    assert f"the held-out set valid skips 1 shards that are too short for one sample: {few}" in caplog.text
    with pytest.raises(ConfigError, match="the held-out set valid has 0 samples of 32 tokens"):
        opened(data, f"data.train_blend=[[1,{few}]]", "data.split=[9,1,0]", "data.allow_repeats=true")
    with pytest.raises(
        ConfigError, match="few has 0 tokens to train on, less than one sample"
    ):  # data.seq_length tokens are needed, 0 are not enough
        opened(data, blend, "data.split=[1,9,0]", "data.allow_repeats=true", "train.eval_iters=1")


def test_a_run_with_a_changed_batch_size_is_checked_for_its_further_samples(data: TinyData) -> None:
    config, sources = opened(data)
    assert sources.of_samples(config, 161).train.num_samples == 161
    with pytest.raises(ConfigError, match="it would be read"):
        sources.of_samples(config, 10_000)
