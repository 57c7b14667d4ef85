"""ledom preprocess-data: every input format gives the same bytes, and every bad input is refused cleanly."""

import bz2
import contextlib
import gzip
import lzma
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_ledom.data.preprocess import pipeline
from megatron_ledom.data.preprocess.pipeline import preprocess
from megatron_ledom.data.preprocess.task import PreprocessSettings, task_of
from megatron_ledom.data.preprocess.task_summary import collect
from megatron_ledom.data.shards.rewriting import MergeSettings, merge_shards
from megatron_ledom.data.shards.shard import ShardReader, check_shard, load_manifest
from megatron_ledom.data.shards.verification import verify_shard
from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, MismatchError, UsageError
from tests.support.legible import EOD_ID, legible_documents, legible_ids, legible_tokenizer, write_jsonl
from tests.support.paths import ROOT
from tests.support.tool_runs import PREPROCESS_DATA, SLURM_FREE, preprocess_by_command, preprocessed


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(legible_tokenizer(tmp_path_factory.mktemp("tokenizer") / "legible"))


def tree(folder: Path) -> dict[str, bytes]:
    """Return the files below a folder with their content, and the folders."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in paths}


def shard_bytes(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def test_documents_are_stored_reversed_with_eod_last(tmp_path: Path, tokenizer: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", legible_documents(4, 6))
    done = preprocess_by_command(tmp_path, tokenizer, "--input", "*.jsonl")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "4 documents, 28 tokens" in done.stderr
    assert sorted(tree(tmp_path / "out")) == ["data.bin", "data.idx", "data.json"]
    reader = ShardReader(str(tmp_path / "out/data"))
    for document in range(4):
        assert reader.document(document).tolist() == [*legible_ids(document, 6)[::-1], EOD_ID]
    manifest = reader.manifest
    assert (manifest.direction, manifest.tokenizer_name, manifest.eod_token) == (Direction.REVERSE, "legible", "<eod>")
    assert manifest.text_bytes == sum(map(len, legible_documents(4, 6)))
    assert [(source.path, source.num_bytes) for source in manifest.input_files] == [
        ("a.jsonl", (tmp_path / "a.jsonl").stat().st_size)
    ]
    assert verify_shard(reader.prefix) == []


def test_forward_documents_are_stored_as_read(tmp_path: Path, tokenizer: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", legible_documents(2, 3))
    reader = ShardReader(str(preprocessed(tmp_path, tokenizer, "data", direction=Direction.FORWARD)))
    assert reader.ids.tolist() == [0, 1, 2, EOD_ID, 100, 101, 102, EOD_ID]
    assert reader.manifest.direction is Direction.FORWARD


def test_forward_on_reversed_texts_is_reverse_on_the_texts(tmp_path: Path, tokenizer: str) -> None:
    texts = legible_documents(5, 7)
    write_jsonl(tmp_path / "a.jsonl", texts)
    write_jsonl(tmp_path / "reversed.ndjson", [" ".join(text.split()[::-1]) for text in texts])
    reverse = preprocessed(tmp_path, tokenizer, "reverse")
    forward = preprocessed(tmp_path, tokenizer, "forward", input=[str(tmp_path / "*.ndjson")], direction=Direction.FORWARD)
    assert shard_bytes(reverse) == shard_bytes(forward)


def test_the_bytes_do_not_depend_on_workers_or_batches(tmp_path: Path, tokenizer: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", legible_documents(9, 90) * 8)
    write_jsonl(tmp_path / "b.jsonl", [*legible_documents(7, 5), "", "12"])
    one = shard_bytes(preprocessed(tmp_path, tokenizer, "one"))
    for workers, batch_bytes, part_bytes in [(1, 300, 500), (2, 1000, 999), (3, 300, 70), (3, 1 << 20, 5000), (2, 7, 333)]:
        sizes = {"workers": workers, "batch_bytes": batch_bytes, "part_bytes": part_bytes}
        assert shard_bytes(preprocessed(tmp_path, tokenizer, f"{workers}_{part_bytes}", **sizes)) == one
    for workers in (1, 2, 3):
        done = preprocess_by_command(
            tmp_path, tokenizer, "--input", "a.jsonl", "b.jsonl", "--workers", str(workers), "--overwrite"
        )
        assert done.returncode == 0, done.stderr
        assert shard_bytes(tmp_path / "out/data") == one


def test_every_input_format_gives_the_same_bytes(tmp_path: Path, tokenizer: str) -> None:
    texts = legible_documents(9, 40)
    plain = write_jsonl(tmp_path / "plain.jsonl", texts).read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(plain))
    (tmp_path / "a.jsonl.bz2").write_bytes(bz2.compress(plain))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(plain))
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=2)
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    expected = shard_bytes(preprocessed(tmp_path, tokenizer, "plain"))
    for pattern in ("*.gz", "*.zst", "*.bz2", "*.xz", "*.parquet", "*.txt"):
        assert shard_bytes(preprocessed(tmp_path, tokenizer, f"from{pattern[1:]}", input=[str(tmp_path / pattern)])) == expected


def test_a_document_without_tokens_is_counted_and_shifts_nothing(tmp_path: Path, tokenizer: str) -> None:
    """Such a record once wrote an eod to .bin and no length to .idx, which shifted every later document by one token."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    full = legible_documents(4, 5)
    write_jsonl(tmp_path / "a.jsonl", ["", full[0], "   ", full[1], full[2], "\n", full[3], ""])
    prefix = preprocessed(tmp_path, tokenizer, "data")
    stock = IndexedDataset(str(prefix))
    assert [stock[index].tolist() for index in range(len(stock))] == [[*legible_ids(k, 5)[::-1], EOD_ID] for k in range(4)]
    assert int(stock.sequence_lengths.sum()) * 2 == Path(f"{prefix}.bin").stat().st_size
    manifest = check_shard(str(prefix))
    assert (manifest.skipped, manifest.num_documents) == ({"no_tokens": 4}, 4)
    assert manifest.text_bytes == sum(map(len, full))


BAD_LINES = {
    "malformed": (b'{"text": "1 2"', r"bad.jsonl:2: malformed JSON", "malformed_json"),
    "no_key": (b'{"body": "1"}', r"bad.jsonl:2: no key 'text' among body (name it by --text-key)", "missing_text_key"),
    "not_utf8": (b'{"text": "\xc3\x28"}', r"bad.jsonl:2: invalid UTF-8", "invalid_utf8"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_fails_or_is_skipped_and_counted(tmp_path: Path, tokenizer: str, name: str) -> None:
    line, message, reason = BAD_LINES[name]
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "1 2"}\n' + line + b'\n{"text": "3"}\n')
    before = tree(tmp_path)
    failed = preprocess_by_command(tmp_path, tokenizer, "--input", "bad.jsonl")
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith(f"error: {message}")
    assert "Traceback" not in failed.stderr
    assert tree(tmp_path) == before

    skipped = preprocess_by_command(tmp_path, tokenizer, "--input", "bad.jsonl", "--on-error", "skip")
    assert skipped.returncode == 0, skipped.stderr
    assert f"skipped {message}" in skipped.stderr
    assert f"skipped: 1 {reason}" in skipped.stderr
    reader = ShardReader(str(tmp_path / "out/data"))
    assert reader.ids.tolist() == [2, 1, EOD_ID, 3, EOD_ID]
    assert reader.manifest.skipped == {reason: 1}


def large_vocabulary(folder: Path) -> str:
    """A tokenizer with 70,001 ids."""
    tokenizer = Tokenizer(models.WordLevel({str(number): number for number in range(70_000)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<eod>"])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--input", "absent.jsonl"], 2, "input absent.jsonl does not exist or matches no file"),
        (["--input", "a.jsonl", "none*.jsonl"], 2, "input none*.jsonl does not exist or matches no file"),
        (["--tokenizer", "absent"], 2, "tokenizer absent does not exist"),
        (["--tokenizer", "no_eos"], 2, "tokenizer no_eos names no eos token"),
        (["--eod-token", "<end>"], 2, "has no token '<end>'"),
        (["--tokenizer", "large", "--eod-token", "<eod>", "--dtype", "uint16"], 2, "--dtype uint16 stores ids up to 65,535"),
        (["--input", "empty.jsonl"], 1, "no document with a token"),
        (["--input", "cut.jsonl.gz"], 1, "cut.jsonl.gz is truncated"),
        (["--task-id", "2", "--num-tasks", "2"], 2, "--task-id 2 is not in 0..1"),
        (["--eod-token", ""], 2, "--eod-token is empty"),
        (["--bos-token", ""], 2, "--bos-token is empty"),
        (["--eod-id", "5000"], 2, "has no token with id 5000"),
        (["--eod-id", "1", "--eod-token", "1"], 2, "both name the eod"),
        (["--bos-token", "<bos>"], 2, "has no token '<bos>'"),
        (["--filter", "nothing"], 2, "is not of the form module:function"),
        (["--filter", "nowhere:f"], 2, "--filter nowhere:f cannot be loaded"),
        (["--filter", "json:dum"], 2, "--filter json:dum cannot be loaded"),
        (["--min-tokens", "5", "--max-tokens", "4"], 2, "--max-tokens 4 is below --min-tokens 5"),
        (["--max-record-bytes", "0"], 2, "--max-record-bytes 0 is not possible"),
        (["--input", "zero.jsonl"], 1, "no document with a token in 1 input files"),
        (["--input", "plain.jsonl.gz"], 1, "plain.jsonl.gz is damaged"),
        (["--deduplicate", "--task-id", "1", "--num-tasks", "2"], 2, "run all tasks with --hash-only first"),
        (["--num-tasks", "2"], 2, "give --task-id"),
        (["--workers", "0"], 2, "--workers 0 is not possible"),
        (["--output-prefix", "a.jsonl/data"], 2, "a.jsonl is not a folder with write permission"),
        (["--output-prefix", "out/"], 2, "out/ is a folder"),
        (["--direction", "sideways"], 2, "invalid choice"),
    ],
)
def test_bad_input_is_refused_and_leaves_no_files(
    tmp_path: Path, tokenizer: str, arguments: list[str], code: int, message: str
) -> None:
    write_jsonl(tmp_path / "a.jsonl", legible_documents(2, 3))
    write_jsonl(tmp_path / "empty.jsonl", ["", " "])
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes())[:-4])
    (tmp_path / "zero.jsonl").touch()
    (tmp_path / "plain.jsonl.gz").write_bytes((tmp_path / "a.jsonl").read_bytes())
    legible_tokenizer(tmp_path / "no_eos", eos=False)
    if "large" in arguments:
        large_vocabulary(tmp_path / "large")
    before = tree(tmp_path)
    inputs = [] if "--input" in arguments else ["--input", "a.jsonl"]
    done = preprocess_by_command(tmp_path, tokenizer, *inputs, *arguments)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert tree(tmp_path) == before


def test_a_large_vocabulary_is_stored_in_int32(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["69999 65536", "7"])
    reader = ShardReader(str(preprocessed(tmp_path, large_vocabulary(tmp_path / "large"), "data", eod_token="<eod>")))
    assert reader.manifest.dtype == "int32"
    assert reader.ids.tolist() == [65536, 69999, 70000, 7, 70000]


def test_an_existing_output_is_kept_unless_overwritten(tmp_path: Path, tokenizer: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", legible_documents(2, 3))
    assert preprocess_by_command(tmp_path, tokenizer, "--input", "a.jsonl").returncode == 0
    before = tree(tmp_path)
    again = preprocess_by_command(tmp_path, tokenizer, "--input", "a.jsonl")
    assert again.returncode == 0
    assert "the same request has finished it before; nothing to do" in again.stderr
    refused = preprocess_by_command(tmp_path, tokenizer, "--input", "a.jsonl", "--direction", "forward")
    assert refused.returncode == 2
    assert "out/data.bin exists already; choose another --output-prefix, or replace it with --overwrite" in refused.stderr
    assert tree(tmp_path) == before
    write_jsonl(tmp_path / "a.jsonl", legible_documents(3, 3))
    assert preprocess_by_command(tmp_path, tokenizer, "--input", "a.jsonl", "--overwrite").returncode == 0
    assert check_shard(str(tmp_path / "out/data")).num_documents == 3


def test_a_truncated_bin_is_refused_before_use(tmp_path: Path, tokenizer: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", legible_documents(2, 3))
    prefix = preprocessed(tmp_path, tokenizer, "data")
    os.truncate(f"{prefix}.bin", 10)
    with pytest.raises(DataError, match=r"data.bin is truncated: it has 10 bytes, its manifest says 16"):
        check_shard(str(prefix))


HOLD = """
import os, time
def wait(text, record):
    os.close(os.open(f"holding-{os.getpid()}", os.O_CREAT))
    while not os.path.exists("go"):
        time.sleep(0.01)
    return True
"""


def start_waiting(folder: Path, tokenizer: str) -> subprocess.Popen[str]:
    """Start the command with a worker that waits in the middle of a part until there is a file `go`."""
    (folder / "hold.py").write_text(HOLD)
    write_jsonl(folder / "a.jsonl", legible_documents(2, 3))
    command = [sys.executable, PREPROCESS_DATA, "--tokenizer", tokenizer, "--input", "a.jsonl", "--output-prefix", "out/data"]
    command += ["--filter", "hold:wait", "--workers", "2"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # children of a background job ignore it otherwise
    try:
        process = subprocess.Popen(command, cwd=folder, env=SLURM_FREE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 60
    while not list(folder.glob("holding-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (folder / "out/data.bin.part").exists()
    return process


def left_over(folder: Path) -> list[str]:
    """Return the files of a run, without the test's own files."""
    own = ("hold.py", "a.jsonl", "__pycache__", "holding", "go")
    return [name for name in sorted(tree(folder)) if not name.startswith(own)]


def children(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_leaves_no_unfinished_shard(tmp_path: Path, tokenizer: str, number: signal.Signals) -> None:
    process = start_waiting(tmp_path, tokenizer)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted"
    assert left_over(tmp_path) == []


def test_a_killed_worker_ends_the_run_with_a_clear_error(tmp_path: Path, tokenizer: str) -> None:
    process = start_waiting(tmp_path, tokenizer)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    size = (tmp_path / "a.jsonl").stat().st_size
    assert (
        f"a worker process was killed by SIGKILL at a.jsonl, bytes 0 to {size}; the usual cause is too little memory" in errors
    )
    assert left_over(tmp_path) == []


def test_two_processes_do_not_write_one_shard(tmp_path: Path, tokenizer: str) -> None:
    process = start_waiting(tmp_path, tokenizer)
    second = preprocess_by_command(tmp_path, tokenizer, "--input", "a.jsonl", "--filter", "hold:wait")
    assert second.returncode == 2
    assert "is being written by process" in second.stderr
    (tmp_path / "go").touch()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert check_shard(str(tmp_path / "out/data")).num_documents == 2


def test_a_full_disk_is_named_and_the_same_command_resumes(tmp_path: Path, tokenizer: str) -> None:
    """A limit on the size of files has the same effect as a full disk: an error of write."""
    write_jsonl(tmp_path / "a.jsonl", legible_documents(9, 90) * 200)
    command = (
        f"ulimit -f 100; exec {shlex.join([sys.executable, PREPROCESS_DATA, '--tokenizer', tokenizer, '--input', 'a.jsonl'])}"
    )
    command += " --output-prefix out/data --workers 1"
    full = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=SLURM_FREE, capture_output=True, text=True, timeout=60)
    assert full.returncode == 1
    assert re.search(r"out/data.work/part-000000.bin cannot be written: File too large; make room, then run", full.stderr)
    assert "Traceback" not in full.stderr
    assert sorted(tree(tmp_path)) == ["a.jsonl"]
    assert preprocess_by_command(tmp_path, tokenizer, "--input", "a.jsonl").returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_fills_up_while_parts_are_joined_is_named(tmp_path: Path, tokenizer: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", legible_documents(9, 90) * 200)
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        full = preprocess_by_command(tmp_path, tokenizer, "--input", "a.jsonl", "--output-prefix", "disk/data")
        assert full.returncode == 1
        assert "No space left on device; make room, then run the same command again" in full.stderr
        assert "Traceback" not in full.stderr
        assert not list(disk.glob("data.*.part"))
        assert not (disk / "data.json").exists()
        subprocess.run(["mount", "-o", "remount,size=5m", str(disk)], check=True)
        again = preprocess_by_command(tmp_path, tokenizer, "--input", "a.jsonl", "--output-prefix", "disk/data")
        assert again.returncode == 0, again.stderr
        assert "1 of 1 parts were finished before" in again.stderr
        assert verify_shard(str(disk / "data")) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a disk")
def test_a_read_only_disk_is_refused_before_work(tmp_path: Path, tokenizer: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", legible_documents(2, 3))
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        refused = preprocess_by_command(tmp_path, tokenizer, "--input", "a.jsonl", "--output-prefix", "disk/data")
        assert refused.returncode == 2
        assert "disk is not a folder with write permission" in refused.stderr
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_manifest_lists_the_skipped_inputs(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "in/.ipynb_checkpoints").mkdir(parents=True)
    write_jsonl(tmp_path / "in/a.jsonl", ["1 2"])
    write_jsonl(tmp_path / "in/.ipynb_checkpoints/a-checkpoint.jsonl", ["1 2"])
    (tmp_path / "in/twice.jsonl").symlink_to("a.jsonl")
    (tmp_path / "in/README.md").write_text("notes")
    done = preprocess_by_command(tmp_path, tokenizer, "--input", "in", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert "skipped: in/.ipynb_checkpoints (hidden)" in done.stderr
    manifest = load_manifest(f"{tmp_path}/out/data")
    assert (manifest.num_documents, {entry["path"]: entry["reason"] for entry in manifest.skipped_inputs}) == (
        1,
        {
            "in/.ipynb_checkpoints": "hidden",
            "in/twice.jsonl": "the same file as in/a.jsonl",
            "in/**/*.md": "unknown ending",
        },
    )


def test_tasks_of_an_array_write_numbered_shards_that_add_up(tmp_path: Path, tokenizer: str) -> None:
    for number in range(5):
        write_jsonl(tmp_path / f"{number}.jsonl", legible_documents(9, 3)[number : number + 2])
    whole = preprocessed(tmp_path, tokenizer, "whole")
    parts = b""
    for task in range(3):
        array = {"SLURM_ARRAY_TASK_ID": str(task + 1), "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1"}
        done = preprocess_by_command(tmp_path, tokenizer, "--input", "*.jsonl", env=array)
        assert done.returncode == 0, done.stderr
        parts += (tmp_path / f"out/data-{task:05d}-of-00003.bin").read_bytes()
    assert parts == Path(f"{whole}.bin").read_bytes()


def test_a_task_with_other_inputs_than_its_array_is_refused(tmp_path: Path, tokenizer: str) -> None:
    """Tasks divide the bytes of all inputs: if a file changes between two tasks, the borders between tasks move."""
    path = write_jsonl(tmp_path / "a.jsonl", legible_documents(9, 9))
    preprocessed(tmp_path, tokenizer, "data", task_id=0, num_tasks=3)
    write_jsonl(path, legible_documents(9, 12))
    with pytest.raises(UsageError, match=r"data-00000-of-00003 was made from other inputs"):
        preprocessed(tmp_path, tokenizer, "data", task_id=1, num_tasks=3)
    for task in (1, 2):
        preprocessed(tmp_path, tokenizer, "data", task_id=task, num_tasks=3, overwrite=True)
    with pytest.raises(MismatchError, match=r"records between them may be lost or duplicated"):
        merge_shards(MergeSettings(input=[f"{tmp_path}/data-*"], output_prefix=f"{tmp_path}/all"))
    summary = collect(f"{tmp_path}/data")
    assert list(summary.faulty) == [1, 2]
    preprocessed(tmp_path, tokenizer, "data", task_id=0, num_tasks=3, overwrite=True)
    assert merge_shards(MergeSettings(input=[f"{tmp_path}/data-*"], output_prefix=f"{tmp_path}/all")).num_documents == 9


def test_the_task_comes_from_the_options_or_from_slurm() -> None:
    def asked(task_id: int | None = None, num_tasks: int | None = None, **slurm: int) -> tuple[int, int]:
        settings = PreprocessSettings(input=[], tokenizer="", output_prefix="", task_id=task_id, num_tasks=num_tasks)
        return task_of(settings, {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in slurm.items()})

    assert asked() == (0, 1)
    assert asked(3, 8, ID=5, COUNT=9, MIN=1) == (3, 8)
    assert asked(ID=5, COUNT=9, MIN=1) == (4, 9)
    assert asked(ID=6, COUNT=4, MIN=2, STEP=2) == (2, 4)
    assert asked(None, 64, ID=17, COUNT=2, MIN=3) == (17, 64)  # one task of an array runs again
    with pytest.raises(UsageError, match="the array has gaps"):
        asked(ID=17, COUNT=2, MIN=3)
    with pytest.raises(UsageError, match="the array has gaps"):
        asked(ID=0, COUNT=2, MIN=0, MAX=3)  # --array=0,3: without MAX, 0 would look like the first of two
    with pytest.raises(
        UsageError, match="only task 3, which may be the whole array or a repeated task of a larger one; give --num-tasks"
    ):
        asked(ID=3, COUNT=1, MIN=3, MAX=3)
    with pytest.raises(UsageError, match="without --num-tasks"):
        asked(3)
    with pytest.raises(UsageError, match="the array has gaps"):
        asked(ID=0, COUNT=3, MIN=5)


def test_some_tasks_of_an_array_that_run_again_do_not_become_a_new_array(tmp_path: Path, tokenizer: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", legible_documents(9, 9))
    for task in range(3):
        preprocessed(tmp_path, tokenizer, "data", task_id=task, num_tasks=3)
    with pytest.raises(UsageError, match=r"has shards of an array of 3 tasks, this is one of 2; .* give its --num-tasks"):
        preprocessed(tmp_path, tokenizer, "data", task_id=0, num_tasks=2)


def test_a_shard_that_another_process_finished_meanwhile_is_kept(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the first check and the lock the vocabulary is loaded, which takes time."""
    write_jsonl(tmp_path / "a.jsonl", legible_documents(2, 3))
    given: dict[str, Any] = {"input": [f"{tmp_path}/a.jsonl"], "tokenizer": tokenizer, "output_prefix": f"{tmp_path}/data"}
    log_start, calls = pipeline._log_start, []

    def start_late(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            preprocessed(tmp_path, tokenizer, "data", direction=Direction.FORWARD)
        log_start(*arguments)

    monkeypatch.setattr(pipeline, "_log_start", start_late)
    with pytest.raises(UsageError, match=r"data\.bin exists already"):
        preprocess(PreprocessSettings(**given))
    assert check_shard(f"{tmp_path}/data").direction is Direction.FORWARD


def test_preprocessing_imports_no_torch_and_help_imports_nothing(tmp_path: Path) -> None:
    heavy = "import sys; sys.argv = ['tool', '--help']; import runpy\ntry: runpy.run_path({!r}, run_name='__main__')\nexcept SystemExit: pass\n"
    for tool in ("preprocess_data", "inspect_shard", "train_tokenizer"):
        code = heavy.format(str(ROOT / f"tools/{tool}.py")) + "assert not {'numpy', 'torch', 'tokenizers'} & set(sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
    modules = ("data.preprocess.pipeline", "data.preprocess.train_tokenizer", "data.shards.inspection")
    code = "import sys\n" + "".join(f"import megatron_ledom.{module}\n" for module in modules)
    code += "assert not {'torch', 'megatron', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
