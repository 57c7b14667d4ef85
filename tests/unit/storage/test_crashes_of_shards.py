"""A kill at any step of making a shard or a tokenizer leaves none, the old one, or a whole new one; see `test_crashes`."""

import json
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.data.preprocess.pipeline import preprocess
from megatron_ledom.data.preprocess.task import PreprocessSettings
from megatron_ledom.data.preprocess.train_tokenizer import TrainTokenizerSettings, train_tokenizer
from megatron_ledom.data.shards.rewriting import MergeSettings, ReverseSettings, merge_shards, reverse_shards
from megatron_ledom.data.shards.shard import SUFFIXES, check_shard
from megatron_ledom.data.shards.verification import verify_shard
from megatron_ledom.errors import LedomError
from megatron_ledom.finetune.pairs import PairSettings, prepare_pairs
from tests.support.crashes import LOSSES, Job, Loss, Report, check_every_crash, every_loss
from tests.support.legible import legible_documents, legible_ids, legible_shard, legible_tokenizer, write_jsonl

States = set[tuple[str, ...]]


def shard_of_many_parts(tokenizer: str, inputs: str, folder: Path, report: Report) -> None:
    settings = PreprocessSettings(
        input=[inputs], tokenizer=tokenizer, output_prefix=f"{folder}/shard", workers=1, part_bytes=3000
    )
    assert preprocess(settings) is not None
    report()


def kept_shard(states: States, old: bytes | None, folder: Path) -> int:
    """Check that files without a manifest do not load as a shard. old: the ids of an intact shard that does not count."""
    named = tuple(suffix for suffix in SUFFIXES if (folder / f"shard{suffix}").exists())
    states.add(named)
    if named == SUFFIXES:
        check_shard(f"{folder}/shard")
        assert verify_shard(f"{folder}/shard") == []
        return int((folder / "shard.bin").read_bytes() != old)
    with pytest.raises(LedomError):
        check_shard(f"{folder}/shard")
    return 0


SLOW = ("power failure", "power failure, removals lost")
"""Losses that are quick to try with the shorter jobs below."""


@pytest.mark.parametrize(
    "loss",
    [pytest.param(loss, id=name, marks=[pytest.mark.slow] if name in SLOW else []) for name, loss in LOSSES.items()],
)
def test_preprocessing_killed_at_any_step_ends_with_the_same_shard(loss: Loss, tmp_path: Path) -> None:
    """Steps of its workers count as well."""
    tokenizer = str(legible_tokenizer(tmp_path / "tokenizer"))
    write_jsonl(tmp_path / "in.jsonl", legible_documents(9, 90) * 2)
    states: States = set()
    act = partial(shard_of_many_parts, tokenizer, str(tmp_path / "in.jsonl"))
    job = Job(act=act, kept=partial(kept_shard, states, None), steps=30)
    check_every_crash(job, tmp_path, loss, changing=("shard.json",))
    assert states == {(), (".bin",), (".bin", ".idx"), SUFFIXES}


def merged(source: Path, prefix: str) -> None:
    merge_shards(MergeSettings(input=[f"{source}/a", f"{source}/b"], output_prefix=prefix, overwrite=True))


def reversed_shard(source: Path, prefix: str) -> None:
    reverse_shards(ReverseSettings(input=[f"{source}/a", f"{source}/b"], output_prefix=prefix, overwrite=True))


def pairs(source: Path, prefix: str) -> None:
    settings = PairSettings(
        input=[f"{source}/pairs.jsonl"], tokenizer=f"{source}/tokenizer", output_prefix=prefix, seq_length=8, overwrite=True
    )
    prepare_pairs(settings)


MAKERS: dict[str, tuple[Callable[[Path, str], None], int]] = {
    "merged": (merged, 12),
    "reversed": (reversed_shard, 12),
    "pairs": (pairs, 15),
}
"""Functions that write a shard, each with its least number of steps."""


def write_inputs(source: Path, first: int) -> None:
    """Write the inputs of all functions; their sizes do not depend on the first document."""
    legible_tokenizer(source / "tokenizer")
    for number, name in enumerate("ab"):
        legible_shard(source / name, [legible_ids(first + number, 5)])
    # a prompt has `first` words: other targets in the same number of packed samples
    lines = [{"question": " ".join(["7"] * first), "answer": " ".join(["8"] * (6 - first))} for _ in range(2)]
    (source / "pairs.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def replaced_shard(name: str, root: Path, states: States) -> Job:
    """Replace a shard by one with exactly the same sizes, which would pass the cheap check."""
    make, steps = MAKERS[name]
    for first in (1, 3):
        write_inputs(root / f"inputs-{first}", first)
    (root / "old").mkdir()
    make(root / "inputs-1", f"{root}/old/shard")

    def act(folder: Path, report: Report) -> None:
        make(root / "inputs-3", f"{folder}/shard")
        report()

    def before(folder: Path) -> None:
        shutil.copytree(root / "old", folder, dirs_exist_ok=True)

    kept = partial(kept_shard, states, (root / "old/shard.bin").read_bytes())
    return Job(act=act, kept=kept, before=before, steps=steps)


@pytest.fixture
def _temporary_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let the test's folder contain the files that killed processes leave elsewhere."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


@every_loss
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.usefixtures("_temporary_files")
def test_a_shard_is_the_old_one_or_the_new_one_or_does_not_load(name: str, loss: Loss, tmp_path: Path) -> None:
    states: States = set()
    check_every_crash(replaced_shard(name, tmp_path, states), tmp_path, loss, changing=("shard.json",))
    assert states == {(".bin", ".idx"), SUFFIXES}


def only_close(stream: Any) -> None:
    stream.close()


def only_rename(source: Path, target: Path) -> None:
    source.replace(target)


def only_remove(path: Path) -> None:
    path.unlink(missing_ok=True)


NAMES_LOST, REMOVALS_LOST = Loss(True, loses_names=True), Loss(True, loses_removals=True)


@pytest.mark.parametrize(
    ("name", "forces", "instead", "loss"),
    [
        ("merged", "data.shards.shard.close_synced", only_close, NAMES_LOST),
        ("reversed", "data.shards.shard.publish", only_rename, NAMES_LOST),
        ("pairs", "finetune.pairs.close_synced", only_close, NAMES_LOST),
        ("merged", "data.shards.shard.withdraw", only_remove, REMOVALS_LOST),
        ("pairs", "finetune.pairs.withdraw", only_remove, REMOVALS_LOST),
    ],
)
@pytest.mark.usefixtures("_temporary_files")
def test_a_shard_that_is_not_forced_to_the_disk_is_lost(
    name: str, forces: str, instead: Any, loss: Loss, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(f"megatron_ledom.{forces}", instead)
    with pytest.raises((AssertionError, LedomError, FileNotFoundError)):
        check_every_crash(replaced_shard(name, tmp_path, set()), tmp_path, loss, changing=("shard.json",))


@every_loss
def test_a_trained_tokenizer_is_whole_or_missing(loss: Loss, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", ["a b ab abc"] * 3)
    names = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")

    def act(folder: Path, report: Report) -> None:
        if not (folder / "new").exists():  # or it is refused
            train_tokenizer(TrainTokenizerSettings(input=[f"{tmp_path}/in.jsonl"], vocab_size=263, output=f"{folder}/new"))
        report()

    def kept(folder: Path) -> int:
        if not (folder / "new").exists():
            return 0
        whole = tmp_path / "quiet/new"
        assert {path.name for path in (folder / "new").iterdir()} == set(names)
        assert all((folder / "new" / name).read_bytes() == (whole / name).read_bytes() for name in names)
        return 1

    check_every_crash(Job(act=act, kept=kept, steps=12), tmp_path, loss)
