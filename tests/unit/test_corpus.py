"""Reading: the same texts from every form, bounded batches, and each bad record named."""

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from megatron_ledom.data.corpus import SourceFile, expand_inputs, read_texts, share_of_task, texts_of
from megatron_ledom.errors import DataError, UsageError
from tests.legible import legible_documents, write_jsonl

TEXTS = [*legible_documents(9, 30), "", "Grüße,\n\t日本 👍", '"quoted" \\ {}']


def write_all_forms(folder: Path) -> list[Path]:
    """The same documents as plain, gzip (two members), zstd (two frames) and Parquet (several row groups)."""
    plain = write_jsonl(folder / "a.jsonl", TEXTS)
    content = plain.read_bytes()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(content[:700]) + gzip.compress(content[700:]) + b"\0" * 9)
    pack = zstandard.ZstdCompressor().compress
    (folder / "a.jsonl.zst").write_bytes(pack(content[:500]) + pack(content[500:]))
    table = pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS})
    parquet.write_table(table, folder / "a.parquet", row_group_size=4)
    return sorted(folder.iterdir())


def skim(path: Path, key: str = "text") -> tuple[list[str], dict[str, int], list[str]]:
    """All texts, what was skipped, and the messages."""
    skipped: Counter[str] = Counter()
    messages: list[str] = []
    texts = []
    for batch in SourceFile(path).batches(key, batch_bytes=64):
        texts += texts_of(batch, key, "skip", skipped, messages)
    return texts, dict(skipped), messages


@pytest.mark.parametrize("batch_bytes", [1, 100, 1 << 20])
def test_every_form_gives_the_same_texts(tmp_path: Path, batch_bytes: int) -> None:
    for path in write_all_forms(tmp_path):
        source, texts = SourceFile(path), []
        for batch in source.batches("text", batch_bytes):
            texts += texts_of(batch, "text", "fail", Counter(), [])
        assert texts == TEXTS, path
        assert source.record().num_bytes == path.stat().st_size
        assert len(source.record().sha256) == 64


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second\n")
    (tmp_path / "a.txt").write_text("first\n\nstill first\n")
    (tmp_path / "c.txt").write_text("")
    assert list(read_texts(expand_inputs([str(tmp_path / "*.txt")]), "text")) == ["first\n\nstill first\n", "second\n", ""]


def test_a_batch_is_bounded_and_ends_with_a_line(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["x" * 50] * 4000)
    batches = list(SourceFile(path).batches("text", 10_000))
    assert [batch.first for batch in batches][:2] == [1, 1 + batches[0].lines.count(b"\n")]
    assert all(batch.lines.endswith(b"\n") for batch in batches)
    assert max(len(batch.lines) for batch in batches) < 20_000


def test_blank_lines_a_missing_last_newline_crlf_and_a_byte_order_mark_are_no_trouble(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "1"}\r\n\r\n  \n{"text": "2"}')
    assert skim(path) == (["1", "2"], {}, [])


@pytest.mark.parametrize(
    ("line", "reason", "words"),
    [
        (b'{"text": "no end}', "malformed_json", "malformed JSON"),
        (b'{"text": "\\ud800"}', "malformed_json", "malformed JSON"),
        (b'{"text": "\xff"}', "invalid_utf8", "invalid UTF-8"),
        (b'{"body": "x", "id": 1}', "missing_text_key", "no key 'text' among body, id"),
        (b"{}", "missing_text_key", "among no keys"),
        (b'{"text": null}', "text_is_not_a_string", "holds NoneType"),
        (b'["text"]', "not_an_object", "a JSON list"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path: Path, line: bytes, reason: str, words: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "1"}\n\n' + line + b'\n{"text": "4"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:3: .*--on-error skip") as error:
        list(read_texts([path], "text"))
    assert words in str(error.value)
    texts, skipped, messages = skim(path)
    assert (texts, skipped) == (["1", "4"], {reason: 1})
    assert messages[0].startswith(f"{path}:3: ")


def test_bad_texts_in_parquet_and_text_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": pyarrow.array([b"1", None, b"\xff"], pyarrow.binary())}), path)
    assert skim(path)[:2] == (["1"], {"text_is_not_a_string": 1, "invalid_utf8": 1})
    with pytest.raises(DataError, match=r"a\.parquet: row 2: the text is null"):
        list(read_texts([path], "text"))
    with pytest.raises(DataError, match=r"no column 'body' but text; name one by --text-key"):
        list(read_texts([path], "body"))
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(DataError, match=r"a\.txt: invalid UTF-8 \(invalid start byte at byte 3\)"):
        list(read_texts([tmp_path / "a.txt"], "text"))


def test_a_parquet_column_of_numbers_is_refused(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="holds int64, not text"):
        list(read_texts([tmp_path / "a.parquet"], "text"))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_truncated_and_damaged_files_are_named(tmp_path: Path, suffix: str) -> None:
    path = next(path for path in write_all_forms(tmp_path) if path.name.endswith(suffix))
    content = path.read_bytes().rstrip(b"\0")
    path.write_bytes(content[:-5])
    with pytest.raises(DataError, match=rf"a{suffix} is (truncated|damaged)"):
        list(read_texts([path], "text"))
    path.write_bytes(b"not compressed at all, and longer than a header")
    with pytest.raises(DataError, match=rf"a{suffix} is damaged"):
        list(read_texts([path], "text"))


def test_inputs_are_sorted_and_taken_once(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt", "[x].jsonl"):
        (tmp_path / name).touch()
    found = expand_inputs([str(tmp_path / "*.jsonl"), str(tmp_path / "a.jsonl"), str(tmp_path / "[x].jsonl")])
    assert [path.name for path in found] == ["[x].jsonl", "a.jsonl", "b.jsonl"]


def test_inputs_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").touch()
    for pattern, words in [("*.jsonl", "matches no file"), ("a.csv", "ending that is not known"), (".", "is a folder")]:
        with pytest.raises(UsageError, match=words):
            expand_inputs([os.path.join(tmp_path, pattern)])


@given(sizes=st.lists(st.integers(0, 1000), min_size=1, max_size=30), data=st.data())
def test_tasks_share_all_files_as_neighbours_and_none_is_idle(sizes: list[int], data: st.DataObject) -> None:
    num_tasks = data.draw(st.integers(1, len(sizes)))
    shares = [share_of_task(sizes, task, num_tasks) for task in range(num_tasks)]
    assert [index for share in shares for index in share] == list(range(len(sizes)))
    assert all(len(share) > 0 for share in shares)
    largest = max(sum(sizes[index] for index in share) for share in shares)
    assert largest <= sum(sizes) / num_tasks + 2 * max(sizes)


def test_more_tasks_than_files_is_refused() -> None:
    with pytest.raises(UsageError, match="4 tasks for 3 input files; use --num-tasks 3 or fewer"):
        share_of_task([1, 2, 3], 0, 4)
    for task_id, num_tasks in ((3, 3), (-1, 3), (0, 0)):
        with pytest.raises(UsageError, match=r"--task-id|--num-tasks"):
            share_of_task([1, 2, 3], task_id, num_tasks)


def test_text_keys_other_than_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "x", "text": 3}) + "\n")
    assert list(read_texts([tmp_path / "a.jsonl"], "body")) == ["x"]
