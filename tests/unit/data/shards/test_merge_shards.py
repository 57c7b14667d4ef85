"""ledom merge-shards: several shards become the one that a single task would have written; mismatches are refused."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_ledom.data.shards import indexed_files
from megatron_ledom.data.shards.prefixes import array_list, check_tasks_complete, expand_prefixes
from megatron_ledom.data.shards.rewriting import MergeSettings, merge_shards
from megatron_ledom.data.shards.shard import Counts, InputFile, ShardReader, check_shard
from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, MismatchError, UsageError
from tests.support.forked import run_forked
from tests.support.legible import file_bytes, legible_ids, legible_provenance, legible_shard
from tests.support.paths import ROOT

DOCUMENTS = [legible_ids(document, 3 + document) for document in range(7)]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_forked([ROOT / "tools/merge_shards.py", *arguments])


def merge(*prefixes: str, output: Path, overwrite: bool = False) -> str:
    merge_shards(MergeSettings(input=list(prefixes), output_prefix=str(output), overwrite=overwrite))
    return str(output)


def array(folder: Path, tasks: int = 3) -> list[str]:
    """The shards of an array whose tasks have 3, 3 and 1 documents."""
    counts = [
        Counts(
            text_bytes=100 + task,
            skipped={"no_tokens": task, "bad_json": 1} if task else {},
            input_files=[InputFile(path=f"{task}.jsonl", num_bytes=9, sha256=f"{task}" * 64)],
            tokenizer_path="tokenizer",
            eod_token="<eod>",
        )
        for task in range(tasks)
    ]
    return [
        legible_shard(folder / f"x-{task:05d}-of-{tasks:05d}", DOCUMENTS[3 * task : 3 * task + 3], counts=counts[task])
        for task in range(tasks)
    ]


def test_the_command_writes_the_bytes_that_one_task_would_have_written(tmp_path: Path) -> None:
    array(tmp_path)
    done = run("--input", str(tmp_path / "x-*-of-00003"), "--output-prefix", str(tmp_path / "new/all"))
    assert done.returncode == 0, done.stderr
    merged = check_shard(str(tmp_path / "new/all"))
    whole = legible_shard(tmp_path / "whole", DOCUMENTS)
    assert file_bytes(str(tmp_path / "new/all")) == file_bytes(whole)
    assert (merged.bin_sha256, merged.idx_sha256) == (check_shard(whole).bin_sha256, check_shard(whole).idx_sha256)
    assert merged.provenance == legible_provenance()
    assert (merged.text_bytes, merged.skipped) == (303, {"bad_json": 2, "no_tokens": 3})
    assert [file.path for file in merged.input_files] == ["0.jsonl", "1.jsonl", "2.jsonl"]
    assert (merged.tokenizer_path, merged.eod_token) == ("tokenizer", "<eod>")
    assert "7 documents" in done.stderr
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_any_block_size_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    parts = [legible_shard(tmp_path / name, DOCUMENTS[a:b], dtype=dtype) for name, a, b in [("a", 0, 4), ("b", 4, 7)]]
    whole = file_bytes(legible_shard(tmp_path / "whole", DOCUMENTS, dtype=dtype))
    for chunk in (1, 2, 5):
        monkeypatch.setattr(indexed_files, "CHUNK_DOCUMENTS", chunk)
        assert file_bytes(merge(*parts, output=tmp_path / f"merged{chunk}")) == whole


@pytest.mark.parametrize("block_bytes", [1, 8, 30, 10_000])
def test_blocks_contain_every_document_once_in_order(tmp_path: Path, block_bytes: int) -> None:
    prefix = legible_shard(tmp_path / "a", DOCUMENTS)
    blocks, ids = [], []
    for block in indexed_files.IndexedFiles(prefix).blocks(block_bytes=block_bytes):
        blocks.append(block)
        ids.append(block.ids.copy())  # its memory is reused
    assert np.concatenate(ids).tolist() == ShardReader(prefix).ids.tolist()
    assert [block.first for block in blocks] == np.cumsum([0, *(len(block.lengths) for block in blocks)])[:-1].tolist()
    assert all(block.ids.nbytes <= block_bytes or len(block.lengths) == 1 for block in blocks)


def test_shards_are_merged_in_the_given_order(tmp_path: Path) -> None:
    a, b = legible_shard(tmp_path / "a", DOCUMENTS[:2]), legible_shard(tmp_path / "b", DOCUMENTS[2:])
    reader = ShardReader(merge(b, a, output=tmp_path / "ba"))
    assert reader.document(0).tolist()[0] == DOCUMENTS[2][-1]
    assert reader.document(5).tolist()[0] == DOCUMENTS[0][-1]


def test_a_missing_task_is_refused_by_number(tmp_path: Path) -> None:
    prefixes = array(tmp_path)
    Path(f"{prefixes[1]}.json").rename(tmp_path / "kept.json")
    with pytest.raises(DataError, match=r"x-00001-of-00003.* the manifest .* does not"):
        merge(str(tmp_path / "x-*"), output=tmp_path / "all")
    for suffix in (".bin", ".idx"):
        Path(f"{prefixes[1]}{suffix}").unlink()
    done = run("--input", str(tmp_path / "x-*-of-00003"), "--output-prefix", str(tmp_path / "all"))
    assert done.returncode == 1
    assert "of the 3 tasks of" in done.stderr
    assert "missing: 1; run them again (sbatch --array=1)" in done.stderr
    assert not list(tmp_path.glob("all*"))


def test_numbers_are_listed_in_the_syntax_of_slurm() -> None:
    assert array_list([7, 3, 8, 9, 63]) == "3,7-9,63"
    with pytest.raises(DataError, match="missing: 0-2,4-62;"):
        check_tasks_complete(["x-00003-of-00064", "x-00063-of-00064"])
    with pytest.raises(UsageError, match="arrays of 2 and of 4 tasks"):
        check_tasks_complete(["x-00000-of-00002", "x-00001-of-00002", "x-00000-of-00004"])


def test_differences_are_refused_by_name(tmp_path: Path) -> None:
    first = legible_shard(tmp_path / "first", DOCUMENTS[:2])
    others = {
        "other is forward, the shard .*first is reverse": (legible_provenance(Direction.FORWARD), "uint16"),
        "other was made with tokenizer legible": (legible_provenance(sha256="b" * 64), "uint16"),
        "other has eod 999": (replace(legible_provenance(), eod_id=999), "uint16"),
        "other has int32 ids, the shard .*first uint16": (legible_provenance(), "int32"),
    }
    for number, (words, (provenance, dtype)) in enumerate(others.items()):
        other = legible_shard(tmp_path / f"{number}other", DOCUMENTS[2:], provenance, dtype)
        with pytest.raises(MismatchError, match=words):
            merge(first, other, output=tmp_path / "all")
    assert not list(tmp_path.glob("all*"))


def test_a_shard_with_two_paths_is_not_merged_with_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = legible_shard(tmp_path / "a", DOCUMENTS)
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"link{suffix}").symlink_to(f"a{suffix}")
    monkeypatch.chdir(tmp_path)
    for other in ("a", "./a", "link"):
        with pytest.raises(UsageError, match=f"{other} is named more than once, once as "):
            merge_shards(MergeSettings(input=[shard, other], output_prefix="merged"))


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_damaged_input_makes_no_shard_that_looks_intact(tmp_path: Path, suffix: str) -> None:
    a, b = legible_shard(tmp_path / "a", DOCUMENTS[:2]), legible_shard(tmp_path / "b", DOCUMENTS[2:])
    with open(f"{b}{suffix}", "r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\1")
    with pytest.raises(DataError, match=rf"b{suffix}.*sha256|document 5 begins before|end at sequence"):
        merge(a, b, output=tmp_path / "all")
    assert not list(tmp_path.glob("all*"))


def test_wrong_usage_is_refused(tmp_path: Path) -> None:
    a, b = legible_shard(tmp_path / "a", DOCUMENTS[:2]), legible_shard(tmp_path / "b", DOCUMENTS[2:])
    with pytest.raises(UsageError, match="named more than once"):
        merge(a, a, output=tmp_path / "all")
    with pytest.raises(UsageError, match="is one of the inputs"):
        merge(a, b, output=tmp_path / "b", overwrite=True)
    with pytest.raises(UsageError, match=r"there is no shard .*c"):
        merge(a, str(tmp_path / "c"), output=tmp_path / "all")
    with pytest.raises(UsageError, match=r"give the prefix .*a"):
        expand_prefixes([f"{a}.bin"])
    legible_shard(tmp_path / "all", DOCUMENTS[:1])
    assert run("--input", a, b, "--output-prefix", str(tmp_path / "all")).returncode == 2
    assert len(ShardReader(merge(a, b, output=tmp_path / "all", overwrite=True))) == 7


def test_documents_with_and_without_bos_are_not_merged(tmp_path: Path) -> None:
    with_bos = legible_shard(tmp_path / "a", DOCUMENTS, counts=Counts(text_bytes=1, bos_token="999"))
    without = legible_shard(tmp_path / "b", DOCUMENTS)
    with pytest.raises(MismatchError, match=r"begin with no bos, those of .*a with 999; preprocess both"):
        merge_shards(MergeSettings(input=[with_bos, without], output_prefix=str(tmp_path / "ab")))
