"""The sample index: megatron-core's own arrays, named by content, built once, and rebuilt if damaged."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_ledom.config.load import load_config
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.data.blends.sources import Sources, load_sources
from megatron_ledom.data.dataset import blend_samples, sample_index
from megatron_ledom.data.dataset.blend_samples import ShardVocabulary, build_train_dataset
from megatron_ledom.data.dataset.build_once import build_once, node
from megatron_ledom.data.dataset.sample_index import SampleIndex, build_arrays, index_spec, prepare_indices
from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, LedomError, TransientError, UsageError
from megatron_ledom.platform.launch import ALONE, Launch
from megatron_ledom.storage.hashes import sha256_of
from tests.support.tiny_runs import TinyData, documents, write_shard, write_tiny_data


@pytest.fixture
def own(tmp_path: Path) -> TinyData:
    """Shards that a test may damage."""
    return write_tiny_data(tmp_path / "own")


def opened(data: TinyData, cache: Path, *overrides: str) -> tuple[RunConfig, Sources]:
    config = load_config(str(data.config), [f"data.path_to_cache={cache}", *overrides])
    sources = load_sources(config)
    prepare_indices(config, sources, str(cache), ALONE)
    return config, sources


def two_sources(data: TinyData) -> str:
    return f"data.train_blend=[[3,{data.shard('reverse_train')}],[1,{data.shard('reverse_valid')}]]"


def stock(prefix: str, seq_length: int, seed: int, chosen: range, cache: Path) -> GPTDataset:
    """Return the dataset that megatron-core itself builds from a shard."""
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend_per_split=[([prefix], None), None, None],
        path_to_cache=str(cache),
        tokenizer=ShardVocabulary(1000),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=True,
        create_attention_mask=False,
    )
    indices = np.arange(chosen.start, chosen.stop, dtype=np.int32)
    return GPTDataset(IndexedDataset(prefix), prefix, indices, None, Split.train, config)


@pytest.mark.parametrize("split", ["null", "[8,1,1]"])
def test_the_first_pass_is_what_megatron_core_makes(data: TinyData, tmp_path: Path, split: str) -> None:
    config, sources = opened(data, tmp_path / "cache", f"data.split={split}", "train.eval_iters=1")
    source = sources.train.sources[0]
    assert source.documents.last == (400 if split == "null" else 320)
    _, arrays = SampleIndex(index_spec(config, sources.train), str(tmp_path / "cache")).part(0, 0)
    chosen = range(source.documents.first, source.documents.last)
    expected = stock(source.prefix, 32, 42, chosen, tmp_path / "stock")
    for found, wanted in zip(arrays, (expected.document_index, expected.sample_index, expected.shuffle_index), strict=True):
        assert np.array_equal(found, wanted)
    found_samples = build_train_dataset(config, sources, str(tmp_path / "cache"))
    for number in range(0, len(found_samples), 17):
        assert all((found_samples[number][key] == value).all() for key, value in expected[number].items())


def test_later_passes_are_complete_shuffled_separately_and_come_after_the_first(data: TinyData, tmp_path: Path) -> None:
    config, sources = opened(data, tmp_path / "cache", "train.train_iters=200", "data.allow_repeats=true")
    index = SampleIndex(index_spec(config, sources.train), str(tmp_path / "cache"))
    (part, first), (_, second) = index.part(0, 0), index.part(0, 1)
    assert part.num_samples < sources.train.num_samples
    assert sorted(first[0]) == sorted(second[0]) == list(range(400))
    assert sorted(first[2]) == sorted(second[2]) == list(range(part.num_samples))
    assert not np.array_equal(first[0], second[0])
    samples = build_train_dataset(config, sources, str(tmp_path / "cache"))
    once = [tuple(samples[number]["tokens"].tolist()) for number in range(part.num_samples)]
    fewer = build_train_dataset(*opened(data, tmp_path / "cache"), str(tmp_path / "cache"))
    assert [tuple(fewer[number]["tokens"].tolist()) for number in range(len(fewer))] == once[: len(fewer)]


def test_a_longer_run_and_another_folder_begin_with_the_same_samples(data: TinyData, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in data.folder.glob("reverse_*.*"):
        os.link(file, moved / file.name)
    blend = f"data.train_blend=[[3,{moved / 'reverse_train'}],[1,{moved / 'reverse_valid'}]]"
    one = build_train_dataset(*opened(data, tmp_path / "a", two_sources(data)), str(tmp_path / "a"))
    before = sorted((tmp_path / "a").iterdir())
    other = build_train_dataset(*opened(data, tmp_path / "a", blend, "train.train_iters=21"), str(tmp_path / "a"))
    assert sorted((tmp_path / "a").iterdir()) == before  # the content is the same, and so is the index
    for number in range(len(one)):
        assert (one[number]["tokens"] == other[number]["tokens"]).all()


def test_workers_write_the_same_file(data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, sources = opened(data, tmp_path / "alone", two_sources(data))
    monkeypatch.setattr(sample_index, "DOCUMENTS_A_WORKER", 10)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    used = []
    monkeypatch.setattr(sample_index, "ordered_map", lambda *given: used.append(given[2]) or original(*given))
    opened(data, tmp_path / "together", two_sources(data))
    name = Path(index_spec(config, sources.train).path("")).name
    assert used == [3]
    assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "together" / name).read_bytes()


original = sample_index.ordered_map


def rewrite(data: TinyData) -> None:
    """Make the shard again with other documents of the same lengths: equal sizes, equal .idx, other .bin."""
    prefix = Path(data.shard("reverse_train"))
    texts = [[number ^ 1 for number in text] for text in documents(400, 1)]
    for suffix in (".bin", ".idx", ".json"):
        prefix.with_suffix(suffix).unlink()
    write_shard(prefix, texts, Direction.REVERSE, data.folder / "legible")


def test_a_rewritten_shard_never_gets_the_old_index(own: TinyData, tmp_path: Path) -> None:
    shard = own.shard("reverse_train")
    times = {suffix: os.stat(shard + suffix) for suffix in (".bin", ".idx", ".json")}
    opened(own, tmp_path / "cache")
    rewrite(own)
    for suffix, before in times.items():  # dates and sizes are the same as before
        os.utime(shard + suffix, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(shard + ".bin").st_size == times[".bin"].st_size
    opened(own, tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.index"))) == 2


@pytest.mark.parametrize("is_built", [False, True])
def test_a_replaced_idx_is_refused_with_and_without_an_existing_index(own: TinyData, tmp_path: Path, is_built: bool) -> None:
    if is_built:
        opened(own, tmp_path / "cache")
    path = Path(own.shard("reverse_train") + ".idx")
    content = bytearray(path.read_bytes())
    content[34:38], content[38:42] = content[38:42], content[34:38]  # swap the lengths of the first two documents
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"node {node()}: .*reverse_train.idx does not have the sha256 of its manifest"):
        opened(own, tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.index*"))) == int(is_built)


@pytest.mark.parametrize("damage", [lambda content: content[:-4], lambda content: content[:-1] + b"\xff", lambda content: b""])
def test_a_damaged_index_is_rebuilt(
    data: TinyData, tmp_path: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    config, sources = opened(data, tmp_path / "cache")
    path = Path(index_spec(config, sources.train).path(str(tmp_path / "cache")))
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    opened(data, tmp_path / "cache")
    assert path.read_bytes() == whole
    if len(damage(whole)) == len(whole):
        assert "is damaged and will be rebuilt" in caplog.text


def test_a_damaged_index_is_replaced_and_never_deleted_while_another_node_builds(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes find the damage. The second gets the lock when the first has already replaced the file."""
    config, sources = opened(data, tmp_path / "cache")
    path = Path(index_spec(config, sources.train).path(str(tmp_path / "cache")))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\xff")
    rebuilt = []

    def build_after_the_other_node(*arguments: Any, **how: Any) -> None:
        assert path.exists()
        (tmp_path / "new").write_bytes(whole)
        rebuilt.append(os.stat(os.rename(tmp_path / "new", path) or path).st_ino)
        build_once(*arguments, **how)

    monkeypatch.setattr(sample_index, "build_once", build_after_the_other_node)
    opened(data, tmp_path / "cache")
    assert [os.stat(path).st_ino] == rebuilt


def test_bytes_that_another_process_changed_never_get_a_checksum(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal = sample_index._seal

    def seal_zeros(plan: Any, path: str, written: Any) -> None:
        os.truncate(path, 0)
        os.truncate(path, plan.num_bytes)
        seal(plan, path, written)

    monkeypatch.setattr(sample_index, "_seal", seal_zeros)
    with pytest.raises(DataError, match=rf"node {node()}: .*\.part has changed since the part for .* was written"):
        opened(data, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.index*"))


def test_only_the_first_rank_of_a_node_builds_with_any_launcher(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """srun sets no LOCAL_RANK."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(sample_index, "build_once", partial(build_once, patience_seconds=0.3))
    config = load_config(str(data.config))
    second = Launch(rank=9, world_size=16, local_rank=1, local_world_size=8, init_method=None)
    with pytest.raises(DataError, match="the first rank of the node should"):
        prepare_indices(config, load_sources(config), str(tmp_path / "cache"), second)
    assert not list((tmp_path / "cache").glob("*.index"))


def test_files_of_a_killed_builder_are_removed_and_those_of_a_living_one_are_not(data: TinyData, tmp_path: Path) -> None:
    config = load_config(str(data.config))
    path = index_spec(config, load_sources(config).train).path(str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    gone, other_node, living = (Path(f"{path}.{who}.part") for who in (f"{node()}.99999999", "n7.99999999", f"{node()}.1"))
    for part in (gone, other_node, living):
        part.touch()
    opened(data, tmp_path / "cache")
    assert [part.exists() for part in (gone, other_node, living)] == [False, True, True]


def test_a_folder_that_cannot_be_written_is_named_with_its_node(data: TinyData, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match=rf"node {node()}: .* cannot be written to .*file/cache .*set data.path_to_cache"):
        opened(data, tmp_path / "file/cache")


def test_no_more_files_are_open_than_allowed(data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one shard open at a time the samples are the same."""
    config, sources = opened(data, tmp_path / "cache", two_sources(data))
    every = build_train_dataset(config, sources, str(tmp_path / "cache"))
    monkeypatch.setattr(blend_samples, "most_open_shards", lambda: 1)
    one = build_train_dataset(config, sources, str(tmp_path / "cache"))
    before = len(os.listdir("/proc/self/fd"))
    for number in range(40):
        assert (every[number]["tokens"] == one[number]["tokens"]).all()
    every._source.cache_clear()
    kept = 1  # megatron-core's cache of its last look-ups keeps the other shard's .idx mapped
    assert len(os.listdir("/proc/self/fd")) - before <= blend_samples.FILES_A_SHARD + kept


@pytest.mark.parametrize(("happens", "error"), [("gone", TransientError), ("another file", DataError)])
def test_a_shard_that_cannot_be_opened_while_training(own: TinyData, tmp_path: Path, happens: str, error: type) -> None:
    """A file server that is away for a while justifies a new start; a replaced file does not."""
    samples = build_train_dataset(*opened(own, tmp_path / "cache"), str(tmp_path / "cache"))
    index = Path(own.shard("reverse_train") + ".idx")
    if happens == "gone":
        index.unlink()
    else:
        index.write_bytes(b"nothing" * 100)
    with pytest.raises(LedomError, match="was intact when the run started and cannot be opened now") as raised:
        samples[0]
    assert type(raised.value) is error


def _build_forever(lock: str, begun: Any) -> None:
    def build(note: Any) -> None:
        note("half of it")
        begun.set()
        time.sleep(600)

    build_once(lock, lambda: False, build, may_build=True)


def test_when_the_builder_is_killed_another_one_takes_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    context = multiprocessing.get_context("fork")
    begun, lock, done = context.Event(), str(tmp_path / "cache/lock"), tmp_path / "done"
    builder = context.Process(target=_build_forever, args=(lock, begun))
    builder.start()
    try:
        assert begun.wait(30)
        looks = []

        def is_done() -> bool:
            looks.append(1)
            if len(looks) == 5:
                assert builder.pid is not None
                os.kill(builder.pid, signal.SIGKILL)
                builder.join()
            return done.exists()

        build_once(lock, is_done, lambda note: done.touch(), may_build=True)
    finally:
        builder.kill()
        builder.join()
    assert done.exists()
    assert len(looks) > 5  # it waited while the other one was alive


def test_waiting_processes_fail_if_nobody_builds(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"node {node()}: .*cache lacks the sample index and no process has built it for 0 s"):
        build_once(str(tmp_path / "cache/lock"), lambda: False, lambda note: None, may_build=False, patience_seconds=0.3)


def test_waiting_processes_wait_as_long_as_somebody_builds(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    begun, lock = context.Event(), str(tmp_path / "cache/lock")
    builder = context.Process(target=_build_forever, args=(lock, begun))
    builder.start()
    try:
        assert begun.wait(30)
        end = time.monotonic() + 1.0
        build_once(lock, lambda: time.monotonic() > end, lambda note: None, may_build=False, patience_seconds=0.3)
    finally:
        builder.kill()
        builder.join()


def test_an_idx_of_other_lengths_than_its_manifest_is_refused_while_building(own: TinyData, tmp_path: Path) -> None:
    config = load_config(str(own.config))
    source = load_sources(config).train.sources[0]
    path = Path(source.prefix + ".idx")
    content = bytearray(path.read_bytes())
    content[34] += 1
    path.write_bytes(content)
    with pytest.raises(LedomError, match="does not match its manifest"):
        build_arrays(source, 32, 42, 0)
    assert sha256_of(str(path)) != source.manifest.idx_sha256
