"""A shard that is replaced while a run reads it is never used, whichever of its files changes."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_ledom.config.load import load_config
from megatron_ledom.data.blends.sources import load_sources
from megatron_ledom.data.dataset.blend_samples import BlendSamples, build_held_out_datasets, build_train_dataset
from megatron_ledom.data.dataset.sample_index import prepare_indices
from megatron_ledom.data.shards.shard import load_manifest
from megatron_ledom.data.shards.shard_files import ShardFiles
from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError
from megatron_ledom.platform.launch import ALONE
from tests.support.legible import legible_shard
from tests.support.tiny_runs import TinyData, documents, write_shard, write_tiny_data

SAMPLES_A_PASS = 640
"""More than one pass over the training shard; the second pass opens it again."""


@pytest.fixture
def own(tmp_path: Path) -> TinyData:
    """Shards that a test may damage."""
    return write_tiny_data(tmp_path / "own")


def opened(data: TinyData, *overrides: str) -> tuple[BlendSamples, BlendSamples]:
    """Return the samples of a run of more than one pass, and those of its validation set."""
    valid = data.shard("reverse_valid")
    keys = ["train.train_iters=160", "data.allow_repeats=true", f"data.valid_sets={{v: [[1.0, {valid}]]}}", *overrides]
    config = load_config(str(data.config), keys)
    sources, cache = load_sources(config), str(data.folder / "cache")
    prepare_indices(config, sources, cache, ALONE)
    held_out = build_held_out_datasets(config, sources, sources.valid, cache)["v"]
    return build_train_dataset(config, sources, cache), held_out


def other_shard(prefix: str) -> None:
    """Replace the shard at `prefix` by an intact one with the same number of documents, of other lengths."""
    count = load_manifest(prefix).num_documents
    aside = Path(prefix).with_name("aside")
    write_shard(aside, documents(count, 9), Direction.REVERSE, Path(prefix).parent / "legible")
    for ending in (".bin", ".idx", ".json"):
        aside.with_suffix(ending).replace(prefix + ending)


def other_ids(prefix: str) -> None:
    """Write other ids of the same lengths to a new file."""
    path = Path(f"{prefix}.bin")
    ids = np.fromfile(path, np.uint16)
    path.unlink()
    (ids[::-1].copy()).tofile(path)


def other_ids_in_place(prefix: str) -> None:
    """Write other ids of the same lengths to the mapped file itself."""
    with open(f"{prefix}.bin", "r+b") as stream:
        stream.write(np.full(50, 7, np.uint16).tobytes())


@pytest.mark.parametrize("change", [other_shard, other_ids, other_ids_in_place])
@pytest.mark.parametrize("held_out", [False, True])
def test_a_shard_replaced_during_a_run_ends_it_by_name(own: TinyData, change: Callable[[str], None], held_out: bool) -> None:
    samples = opened(own)[held_out]
    prefix = own.shard("reverse_valid" if held_out else "reverse_train")
    assert len(samples[0]["tokens"]) == 32
    change(prefix)
    for number in (0, len(samples) - 1):
        with pytest.raises(DataError, match=rf"the shard {prefix} .* it was replaced during the run .*restore the old shard"):
            samples[number]


def test_a_shard_replaced_before_it_is_first_opened_ends_the_run(own: TinyData) -> None:
    samples, _ = opened(own)
    other_shard(own.shard("reverse_train"))
    with pytest.raises(DataError, match=r"reverse_train .*replaced during the run"):
        samples[0]


def test_a_shard_copied_again_without_a_change_is_accepted(own: TinyData, caplog: pytest.LogCaptureFixture) -> None:
    samples, _ = opened(own)
    before = samples[0]["tokens"].tolist()
    path = Path(own.shard("reverse_train") + ".bin")
    shutil.copy(path, path.with_suffix(".copy"))
    path.with_suffix(".copy").replace(path)
    assert samples[0]["tokens"].tolist() == before
    assert len(samples[len(samples) - 1]["tokens"]) == 32
    assert caplog.text.count("written again during the run, with the same content") == 1


def test_targets_of_pairs_are_checked_too(tmp_path: Path) -> None:
    prefix = legible_shard(tmp_path / "pairs", [[1] * 5, [2] * 5])
    manifest = load_manifest(prefix)
    Path(f"{prefix}.targets").write_bytes(b"\1" * 12)
    manifest.pairs, manifest.targets_sha256 = {"seq_length": 6}, "0" * 64
    files = ShardFiles.of(prefix, manifest)
    files.check()
    Path(f"{prefix}.targets").write_bytes(b"\2" * 12)
    with pytest.raises(DataError, match=r"pairs\.targets had 12 bytes"):
        files.check()
