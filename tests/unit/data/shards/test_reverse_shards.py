"""ledom reverse-shards: a forward shard becomes the reverse one that preprocessing would have written, and back."""

import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ledom.data.shards.rewriting import ReverseSettings, reverse_shards
from megatron_ledom.data.shards.shard import Counts, InputFile, ShardReader, check_shard
from megatron_ledom.direction import Direction, concatenate_documents_reference, reverse_into
from megatron_ledom.errors import DataError, MismatchError, UsageError
from megatron_ledom.storage.hashes import sha256_of
from tests.support.forked import run_forked
from tests.support.legible import (
    EOD_ID,
    VOCAB_SIZE,
    file_bytes,
    foreign_shard,
    legible_ids,
    legible_provenance,
    legible_shard,
    legible_tokenizer,
)
from tests.support.paths import ROOT

DOCUMENTS = [legible_ids(document, 3 + document) for document in range(7)]
FORWARD = legible_provenance(Direction.FORWARD)
CLOSED = [[[*document, EOD_ID]] for document in DOCUMENTS]
BARE = [[document] for document in DOCUMENTS]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_forked([ROOT / "tools/reverse_shards.py", *arguments])


def write_reversed(*prefixes: str, output: Path, **settings: object) -> str:
    reverse_shards(ReverseSettings(input=list(prefixes), output_prefix=str(output), **settings))  # type: ignore[arg-type]
    return str(output)


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    return str(legible_tokenizer(tmp_path / "tokenizer"))


@given(
    documents=st.lists(st.lists(st.integers(0, EOD_ID - 1), max_size=40), max_size=8),
    is_closed=st.booleans(),
    stored=st.sampled_from(["uint16", "int32", "int64"]),
    dtype=st.sampled_from(["uint16", "int32"]),
)
def test_reversed_documents_equal_the_reference(documents: list[list[int]], is_closed: bool, stored: str, dtype: str) -> None:
    documents = [[*document, EOD_ID] for document in documents] if is_closed else documents
    contents = [document[:-1] if is_closed else document for document in documents]
    expected = concatenate_documents_reference(contents, Direction.REVERSE, EOD_ID)
    ids = np.array([number for document in documents for number in document], stored)
    lengths = np.array([len(document) for document in documents], np.int64)
    reversed_ids = np.empty(len(expected), dtype)
    options = {"is_closed": is_closed, "eod_id": EOD_ID, "vocab_size": VOCAB_SIZE}
    assert reverse_into(ids, lengths, reversed_ids, **options) == -1
    assert reversed_ids.tolist() == expected
    wrong_end = EOD_ID - 1 if is_closed else EOD_ID
    negative = VOCAB_SIZE if stored == "uint16" else -1
    for position, wrong in ((0, VOCAB_SIZE), (len(ids) // 2, negative), (len(ids) - 1, wrong_end)):
        if len(ids):
            damaged = ids.copy()
            damaged[position] = wrong
            assert reverse_into(damaged, lengths, reversed_ids, **options) == position


def test_arrays_that_do_not_fit_are_refused() -> None:
    options = {"is_closed": True, "eod_id": 9, "vocab_size": 10}
    ids, out = np.array([1, 9, 2, 9], np.int32), np.empty(4, np.int32)
    for lengths in ([2, 1], [2, 3], [5, -1]):
        with pytest.raises(ValueError, match="add up"):
            reverse_into(ids, np.array(lengths, np.int64), out, **options)
    with pytest.raises(ValueError, match="wrong size"):
        reverse_into(ids, np.array([2, 2], np.int64), np.empty(5, np.int32), **options)
    with pytest.raises(TypeError):
        reverse_into(ids[::2], np.array([2], np.int64), np.empty(2, np.int32), **options)
    with pytest.raises(TypeError):
        reverse_into(ids.astype(np.int16), np.array([2, 2], np.int64), out, **options)


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_a_reversed_shard_is_the_one_preprocessing_writes_and_reversing_twice_is_the_identity(
    tmp_path: Path, dtype: str
) -> None:
    source = InputFile(path="x.jsonl", num_bytes=9, sha256="b" * 64)
    counts = Counts(text_bytes=77, skipped={"no_tokens": 2}, input_files=[source], tokenizer_path="t", eod_token="<eod>")
    forward = legible_shard(tmp_path / "forward", DOCUMENTS, FORWARD, dtype, counts)
    reverse = legible_shard(tmp_path / "reverse", DOCUMENTS, legible_provenance(), dtype, counts)
    done = run("--input", forward, "--output-prefix", str(tmp_path / "reversed"))
    assert done.returncode == 0, done.stderr
    assert file_bytes(str(tmp_path / "reversed")) == file_bytes(reverse)
    again = write_reversed(str(tmp_path / "reversed"), output=tmp_path / "again")
    assert file_bytes(again) == file_bytes(forward)
    for prefix, twin in ((str(tmp_path / "reversed"), reverse), (again, forward)):
        found, expected = check_shard(prefix), check_shard(twin)
        found.created_at = expected.created_at
        assert found == expected


def test_several_inputs_become_one_shard_in_the_given_order(tmp_path: Path) -> None:
    parts = [legible_shard(tmp_path / f"x-0000{i}-of-00002", DOCUMENTS[3 * i : 3 * i + 3], FORWARD) for i in range(2)]
    reversed_shard = write_reversed(str(tmp_path / "x-*-of-00002"), output=tmp_path / "reversed")
    assert file_bytes(reversed_shard) == file_bytes(legible_shard(tmp_path / "whole", DOCUMENTS[:6]))
    with pytest.raises(DataError, match="missing: 1"):
        write_reversed(parts[0], output=tmp_path / "other")


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
@pytest.mark.parametrize(("documents", "words"), [(CLOSED, "documents end with eod"), (BARE, "documents without eod")])
def test_a_foreign_shard_is_reversed_whatever_its_type_and_eods(
    tmp_path: Path, tokenizer: str, dtype: str, documents: list[list[list[int]]], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    foreign = foreign_shard(tmp_path / "foreign", documents, dtype)
    reversed_shard = write_reversed(foreign, output=tmp_path / "reversed", tokenizer=tokenizer)
    assert file_bytes(reversed_shard) == file_bytes(legible_shard(tmp_path / "reverse", DOCUMENTS))
    manifest = check_shard(reversed_shard)
    assert (manifest.direction, manifest.eod_token, manifest.text_bytes) == (Direction.REVERSE, "<eod>", 0)
    assert [(file.path, file.sha256) for file in manifest.input_files] == [(f"{foreign}.bin", sha256_of(f"{foreign}.bin"))]
    assert f"read as forward ids of tokenizer, {words} '<eod>' = 1000 (like the first documents)" in caplog.text


def test_a_shard_of_stock_megatron_is_reversed(tmp_path: Path, tokenizer: str) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "stock.bin"), dtype=np.int32)
    for document in DOCUMENTS[:3]:
        builder.add_document([*document, EOD_ID], [len(document) + 1])
    builder.add_document([*DOCUMENTS[3], *DOCUMENTS[4], EOD_ID], [len(DOCUMENTS[3]), len(DOCUMENTS[4]) + 1])
    builder.end_document()  # a document without sequences, which older tools write for an empty text
    builder.finalize(str(tmp_path / "stock.idx"))
    command = ["--input", str(tmp_path / "stock"), "--output-prefix", str(tmp_path / "reversed"), "--tokenizer", tokenizer]
    done = run(*command, "--text-bytes", "99")
    assert done.returncode == 0, done.stderr
    whole = legible_shard(tmp_path / "whole", [*DOCUMENTS[:3], DOCUMENTS[3] + DOCUMENTS[4]])
    assert file_bytes(str(tmp_path / "reversed")) == file_bytes(whole)
    manifest = check_shard(str(tmp_path / "reversed"))
    assert (manifest.skipped, manifest.text_bytes) == ({"no_tokens": 1}, 99)


def test_a_foreign_reverse_shard_becomes_forward(tmp_path: Path, tokenizer: str) -> None:
    foreign = foreign_shard(tmp_path / "foreign", [[[*document[::-1], EOD_ID]] for document in DOCUMENTS])
    reversed_shard = write_reversed(
        foreign, output=tmp_path / "reversed", tokenizer=tokenizer, from_direction=Direction.REVERSE
    )
    assert file_bytes(reversed_shard) == file_bytes(legible_shard(tmp_path / "forward", DOCUMENTS, FORWARD))


def test_narrow_ids_of_one_byte_are_read(tmp_path: Path, tokenizer: str) -> None:
    reversed_shard = write_reversed(
        foreign_shard(tmp_path / "bytes", [[[1, 2, 3]], [[7]]], "uint8"), output=tmp_path / "t", tokenizer=tokenizer
    )
    assert ShardReader(reversed_shard).ids.tolist() == [3, 2, 1, EOD_ID, 7, EOD_ID]


@pytest.mark.parametrize(
    ("documents", "eod", "words"),
    [
        ([*CLOSED[:2], *BARE[2:]], "auto", "document 0 of .*foreign.bin ends with eod 1000, document 2 of .* does not"),
        ([*CLOSED[:2], *BARE[2:]], "keep", "document 2 ends with id 204, expected eod 1000"),
        ([*BARE[:5], *CLOSED[5:]], "append", "document 5 ends with eod 1000, expected documents without eod"),
        ([*CLOSED[:3], [[300, EOD_ID, 302, EOD_ID]]], "auto", "document 3 has eod 1000 at its id 1 of 4"),
        ([*BARE[:3], [[300, 1001]]], "auto", "document 3 has id 1001, outside the 1,001 ids"),
        ([*BARE[:3], [[-1, 301]]], "auto", "document 3 has id -1, outside"),
        ([[[70_000 + 65_536]]], "auto", "document 0 has id 135536, outside"),
        ([[[EOD_ID]], []], "auto", "has no document with a token"),
    ],
)
def test_an_invalid_document_is_refused_with_its_number(
    tmp_path: Path, tokenizer: str, documents: list[list[list[int]]], eod: str, words: str
) -> None:
    foreign = foreign_shard(tmp_path / "foreign", documents, "int64")
    with pytest.raises(DataError, match=words):
        write_reversed(foreign, output=tmp_path / "reversed", tokenizer=tokenizer, eod=eod)
    assert not list(tmp_path.glob("reversed*"))


@pytest.mark.parametrize(
    ("suffix", "offset", "content", "words"),
    [
        (".bin", 8, None, "has 8 bytes, its index needs 168, so every later document is shifted"),
        (".idx", 20, None, "truncated: it has 20 bytes"),
        (".idx", 100, None, "truncated: it has 100 bytes, 7 sequences need 182"),
        (".idx", 0, b"X", "does not begin like a Megatron index"),
        (".idx", 17, b"\7", "is for ids of type float32"),
        (".idx", 34, b"\4", "sequence 1 does not begin where the one before it ends"),
        (".idx", 34 + 3, b"\xff", "sequence 0 has a negative length"),
        (".idx", 34 + 12 * 7 + 16, b"\7", "document 3 begins before the previous one"),
        (".idx", 34 + 12 * 7 + 56, b"\6", "end at sequence 6 of 7"),
    ],
)
def test_a_damaged_foreign_shard_is_refused(
    tmp_path: Path, tokenizer: str, suffix: str, offset: int, content: bytes | None, words: str
) -> None:
    foreign = foreign_shard(tmp_path / "foreign", BARE)
    with open(foreign + suffix, "r+b") as stream:
        stream.seek(offset)
        stream.write(content or b"")
        if content is None:
            stream.truncate()
    with pytest.raises(DataError, match=words):
        write_reversed(foreign, output=tmp_path / "reversed", tokenizer=tokenizer)


def test_a_damaged_shard_of_ours_gets_no_new_hash(tmp_path: Path) -> None:
    forward = legible_shard(tmp_path / "forward", DOCUMENTS, FORWARD)
    with open(f"{forward}.bin", "r+b") as stream:
        stream.write(np.array([5], np.uint16).tobytes())
    with pytest.raises(DataError, match=r"forward.bin does not have the sha256"):
        write_reversed(forward, output=tmp_path / "reversed")
    assert not list(tmp_path.glob("reversed*"))


def test_a_stop_signal_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = legible_shard(tmp_path / "forward", DOCUMENTS, FORWARD)
    monkeypatch.setattr(
        "megatron_ledom.data.shards.reordering.reverse_into", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)
    )
    with pytest.raises(KeyboardInterrupt):
        write_reversed(forward, output=tmp_path / "reversed")
    assert not list(tmp_path.glob("reversed*"))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_wrong_usage_is_refused(tmp_path: Path, tokenizer: str) -> None:
    forward = legible_shard(tmp_path / "forward", DOCUMENTS, FORWARD)
    foreign = foreign_shard(tmp_path / "foreign", BARE)
    done = run("--input", foreign, "--output-prefix", str(tmp_path / "reversed"))
    assert done.returncode == 2
    assert "has no manifest; name the tokenizer of its ids by --tokenizer" in done.stderr
    with pytest.raises(UsageError, match="has none; reverse them with two commands"):
        write_reversed(forward, foreign, output=tmp_path / "reversed", tokenizer=tokenizer)
    with pytest.raises(MismatchError, match="is forward by its manifest"):
        write_reversed(forward, output=tmp_path / "reversed", from_direction=Direction.REVERSE)
    with pytest.raises(MismatchError, match="use the same tokenizer"):
        write_reversed(forward, output=tmp_path / "reversed", tokenizer=tokenizer)
    with pytest.raises(UsageError, match="--eod-token is empty"):
        write_reversed(forward, output=tmp_path / "reversed", tokenizer=tokenizer, eod_token="")
    with pytest.raises(UsageError, match="needs --tokenizer"):
        write_reversed(forward, output=tmp_path / "reversed", eod_token="<eod>")
    with pytest.raises(UsageError, match="omit --eod append"):
        write_reversed(forward, output=tmp_path / "reversed", eod="append")
    with pytest.raises(UsageError, match="is one of the inputs"):
        write_reversed(forward, output=tmp_path / "forward", overwrite=True)


def test_documents_that_begin_with_bos_are_not_reversed(tmp_path: Path) -> None:
    """Reversing would move the BOS of a document to just before its eod."""
    forward = legible_shard(tmp_path / "forward", DOCUMENTS, FORWARD, counts=Counts(text_bytes=1, bos_token="999"))
    with pytest.raises(
        UsageError, match=r"begin with '999', which reversing would move to just before their eod.*preprocess the text"
    ):
        reverse_shards(ReverseSettings(input=[forward], output_prefix=str(tmp_path / "reversed")))
    assert not list(tmp_path.glob("reversed*"))
