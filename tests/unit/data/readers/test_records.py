"""Reading records: the same texts from every format, bounded batches, and a message for each bad record."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from megatron_ledom.data.readers import byte_ranges, streams
from megatron_ledom.data.readers.byte_ranges import ByteRange, InputPath, byte_ranges_of_task, parts_of
from megatron_ledom.data.readers.input_files import expand_inputs
from megatron_ledom.data.readers.records import ReadSettings, RecordReader, read_texts
from megatron_ledom.data.readers.streams import LineReader
from megatron_ledom.errors import DataError
from tests.support.corpus_reading import skim, source, warc_of, whole
from tests.support.legible import legible_documents, write_jsonl
from tests.support.paths import ROOT

TEXTS = [*legible_documents(9, 30), "", "Grüße,\n\t日本 👍", '"quoted" \\ {}']


def write_all_forms(folder: Path) -> list[Path]:
    """Write the same documents as JSON lines in every compression (several members or frames), Parquet and both Arrow formats."""
    plain = write_jsonl(folder / "a.jsonl", TEXTS)
    content = plain.read_bytes()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(content[:700]) + gzip.compress(content[700:]) + b"\0" * 9)
    pack = zstandard.ZstdCompressor().compress
    (folder / "a.jsonl.zst").write_bytes(pack(content[:500]) + pack(content[500:]))
    (folder / "a.jsonl.bz2").write_bytes(bz2.compress(content[:300]) + bz2.compress(content[300:]))
    (folder / "a.jsonl.xz").write_bytes(lzma.compress(content[:400]) + lzma.compress(content[400:]))
    table = pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS})
    parquet.write_table(table, folder / "a.parquet", row_group_size=4)
    with pyarrow.ipc.new_file(folder / "a.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=5)
    with pyarrow.ipc.new_stream(folder / "b.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=5)
    return sorted(folder.iterdir())


def texts_in(byte_range: ByteRange, **settings: object) -> list[str]:
    reader = RecordReader(byte_range, ReadSettings(**settings))  # type: ignore[arg-type]
    return [text for batch in reader.batches() for text in batch.texts]


@pytest.mark.parametrize("batch_bytes", [1, 100, 1 << 20])
def test_every_format_gives_the_same_texts(tmp_path: Path, batch_bytes: int) -> None:
    for path in write_all_forms(tmp_path):
        reader = RecordReader(whole(path), ReadSettings(batch_bytes=batch_bytes))
        assert [text for batch in reader.batches() for text in batch.texts] == TEXTS, path
        record = reader.record()
        assert (record.path, record.num_bytes, record.first_byte) == (str(path), path.stat().st_size, 0)
        if path.suffix not in (".parquet", ".arrow"):
            assert record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("batch_bytes", [7, 1 << 20])
def test_a_record_belongs_to_the_byte_range_in_which_it_begins(tmp_path: Path, batch_bytes: int) -> None:
    """Wherever a file is cut, each record is read once, in order. Includes cuts at a newline and just after it."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "1"}\n\n{"text": "22"}\n{"text": "333"}\r\n{"text": "4"}')
    size = path.stat().st_size
    for first in range(size + 1):
        for second in range(first, size + 1):
            cuts = [(0, first), (first, second), (second, size)]
            found = [texts_in(ByteRange(source(path), *cut), batch_bytes=batch_bytes) for cut in cuts if cut[0] < cut[1]]
            assert list(chain(*found)) == ["1", "22", "333", "4"], cuts


@pytest.mark.parametrize("compression", ["gz", "zst", "bz2", "xz"])
def test_a_large_compressed_file_is_shared_between_its_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    monkeypatch.setattr(byte_ranges, "COMPRESSED_PART_BYTES", 1 << 16)
    rows = np.random.default_rng(0).integers(0, 1 << 62, (12_000, 2)).tolist()
    texts = [f"{number} {row}" for number, row in enumerate(rows)]
    content = write_jsonl(tmp_path / "a.jsonl", texts).read_bytes()
    compress = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress, "bz2": bz2.compress, "xz": lzma.compress}
    path = tmp_path / f"b.jsonl.{compression}"
    path.write_bytes(compress[compression](content))
    found = []
    for task in range(3):
        parts = parts_of(byte_ranges_of_task([source(path)], task, 3))
        assert parts
        found += [text for part in parts for byte_range in part for text in texts_in(byte_range)]
    assert found == texts


def test_byte_ranges_of_a_table_share_its_groups(tmp_path: Path) -> None:
    for path in write_all_forms(tmp_path):
        if path.suffix in (".parquet", ".arrow"):
            found = [
                [text for byte_range in byte_ranges_of_task([source(path)], task, 3) for text in texts_in(byte_range)]
                for task in range(3)
            ]
            assert list(chain(*found)) == TEXTS
            assert path.name == "b.arrow" or sum(map(bool, found)) > 1


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second\n")
    (tmp_path / "a.txt").write_text("first\n\nstill first\n")
    (tmp_path / "c.txt").write_text("")
    assert list(read_texts(expand_inputs([str(tmp_path / "*.txt")]), "text")) == ["first\n\nstill first\n", "second\n", ""]


def test_the_byte_order_mark_of_a_text_file_is_not_text(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbfmarked \xef\xbb\xbf inside"
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(content))
    for name in ("a.txt", "b.txt.gz"):
        assert list(read_texts([source(tmp_path / name)], "text")) == ["marked \ufeff inside"]


def test_a_batch_is_bounded_and_ends_with_a_line(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["x" * 50] * 4000)
    blocks = list(LineReader(whole(path), 10_000).blocks())
    assert [block.first for block in blocks][:2] == [0, len(blocks[0].lines) - 1]
    assert all(block.lines[-1] == b"" for block in blocks)  # whole lines
    assert max(sum(map(len, block.lines)) for block in blocks) < 20_000


def test_blank_lines_a_missing_last_newline_crlf_and_a_byte_order_mark_are_accepted(tmp_path: Path) -> None:
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
        (b'{"text": null}', "text_is_not_a_string", "has type NoneType"),
        (b'["text"]', "not_an_object", "a JSON list"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path: Path, line: bytes, reason: str, words: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "1"}\n\n' + line + b'\n{"text": "4"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:3: .*--on-error skip") as error:
        list(read_texts([source(path)], "text"))
    assert words in str(error.value)
    texts, skipped, messages = skim(path)
    assert (texts, skipped) == (["1", "4"], {reason: 1})
    assert messages[0].startswith(f"{path}:3: ")


def test_bad_texts_in_parquet_and_text_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": pyarrow.array([b"1", None, b"\xff"], pyarrow.binary())}), path)
    assert skim(path)[:2] == (["1"], {"text_is_not_a_string": 1, "invalid_utf8": 1})
    with pytest.raises(DataError, match=r"a\.parquet: row 2: the text is null"):
        list(read_texts([source(path)], "text"))
    with pytest.raises(DataError, match=r"no column 'body', only text; name one by --text-key"):
        list(read_texts([source(path)], "body"))
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(DataError, match=r"a\.txt: invalid UTF-8 \(invalid start byte at byte 3\)"):
        list(read_texts([source(tmp_path / "a.txt")], "text"))


def test_a_parquet_column_of_numbers_is_refused(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has type int64, expected text"):
        list(read_texts([source(tmp_path / "a.parquet")], "text"))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".jsonl.bz2", ".jsonl.xz", ".parquet", ".arrow"])
def test_truncated_and_damaged_files_are_named(tmp_path: Path, suffix: str) -> None:
    path = next(path for path in write_all_forms(tmp_path) if path.name.endswith(suffix))
    content = path.read_bytes().rstrip(b"\0")
    path.write_bytes(content[:-5])
    with pytest.raises(DataError, match=rf"a{suffix} is (truncated|damaged)"):
        list(read_texts([source(path)], "text"))
    path.write_bytes(b"not compressed at all, and longer than a header")
    with pytest.raises(DataError, match=rf"a{suffix} is damaged"):
        list(read_texts([source(path)], "text"))


def test_text_keys_other_than_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "x", "text": 3}) + "\n")
    assert list(read_texts([source(tmp_path / "a.jsonl")], "body")) == ["x"]


def test_a_nested_text_key_names_a_field_of_a_field(tmp_path: Path) -> None:
    lines = [{"a": {"b": "1"}}, {"a.b": "2", "a": {"b": "no"}}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(read_texts([source(tmp_path / "a.jsonl")], "a.b")) == ["1", "2"]
    table = pyarrow.table({"a": [{"b": "1", "c": 0}, {"b": "2", "c": 0}]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert list(read_texts([source(tmp_path / "a.parquet")], "a.b")) == ["1", "2"]
    (tmp_path / "bad.jsonl").write_text('{"a": {"c": 1}}\n{"a": 3}\n')
    texts, skipped, messages = skim(tmp_path / "bad.jsonl", "a.b")
    assert (texts, skipped) == ([], {"missing_text_key": 2})
    assert "no key 'a.b' among c" in messages[0]
    assert "no key 'a.b' among a int" in messages[1]
    with pytest.raises(DataError, match=r"column 'a' has no field 'x', only b, c"):
        list(read_texts([source(tmp_path / "a.parquet")], "a.x"))


def test_a_wrong_ending_is_recognized_by_the_first_bytes(tmp_path: Path) -> None:
    plain = write_jsonl(tmp_path / "a.jsonl", TEXTS).read_bytes()
    parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "g.parquet")
    for name, content, words in [
        ("b.jsonl.gz", plain, "it is not compressed"),
        ("c.jsonl.zst", gzip.compress(plain), "it begins like .gz"),
        ("d.jsonl.gz", zstandard.ZstdCompressor().compress(plain), "it begins like .zst"),
        ("e.jsonl", gzip.compress(plain), "it begins like .gz"),
        ("f.txt", gzip.compress(plain), "it begins like .gz"),
        ("g.jsonl", (tmp_path / "g.parquet").read_bytes(), "it begins like .parquet"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=words):
            list(read_texts([source(tmp_path / name)], "text"))


def test_a_nul_byte_is_text_if_json_allows_it_and_a_bad_record_if_not(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\\u0000b"}\n{"text": "a\x00b"}\n')
    texts, skipped, messages = skim(tmp_path / "a.jsonl")
    assert (texts, skipped) == (["a\0b"], {"malformed_json": 1})
    assert ":2: malformed JSON" in messages[0]


def test_a_record_above_the_limit_is_named_and_never_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "1"}\n' + b'{"text": "' + b"x" * 5_000_000 + b'"}\n{"text": "3"}\n' + b"y" * 70_000)
    limits = {"max_record_bytes": 60_000}
    texts, skipped, messages = skim(path, **limits)
    assert (texts, skipped) == (["1", "3"], {"too_large": 2})
    assert messages[0].startswith(f"{path}:2: a record of 5,000,012 bytes, more than the limit of 60,000")
    assert messages[1].startswith(f"{path}:4: a record of 70,000 bytes")
    reader = LineReader(whole(path), 64, 60_000)
    assert max(len(reader._pending) for _ in reader.blocks()) < 60_000 + 2 * 64
    with pytest.raises(DataError, match=r"a\.jsonl:2: a record of 5,000,012 bytes.*--max-record-bytes"):
        texts_in(whole(path), **limits)
    (tmp_path / "a.txt").write_bytes(b"x" * 100)
    assert skim(tmp_path / "a.txt", max_record_bytes=99)[1] == {"too_large": 1}


def test_a_line_far_into_a_file_is_named_by_its_number_in_the_file(tmp_path: Path) -> None:
    lines = [b'{"text": "%d"}' % number for number in range(50)]
    lines[40] = b"{"
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    for start in range(0, 500, 7):
        with pytest.raises(DataError, match=r"a\.jsonl:41: malformed"):
            texts_in(ByteRange(source(path), start, path.stat().st_size))


def test_the_text_records_of_web_archives_are_documents(tmp_path: Path) -> None:
    pytest.importorskip("fastwarc", reason="the warc extra is not installed")
    archive = warc_of(("warcinfo", b"made by a test"), *(("conversion", text.encode()) for text in TEXTS))
    (tmp_path / "a.warc.wet").write_bytes(archive)
    (tmp_path / "a.warc.wet.gz").write_bytes(gzip.compress(archive[:400]) + gzip.compress(archive[400:]))
    for path in sorted(tmp_path.iterdir()):
        assert texts_in(whole(path)) == TEXTS
    (tmp_path / "a.warc.wet.gz").write_bytes(gzip.compress(archive)[:-6])
    with pytest.raises(DataError, match="is truncated"):
        texts_in(whole(tmp_path / "a.warc.wet.gz"))
    (tmp_path / "pages.warc").write_bytes(warc_of(("response", b"HTTP/1.1 200 OK\r\n\r\n<html>")))
    with pytest.raises(DataError, match="contains 1 web pages but no text"):
        texts_in(whole(tmp_path / "pages.warc"))


def test_the_record_limit_does_not_depend_on_batches(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["x" * length for length in (900, 990, 1100, 5)])
    for batch_bytes in (1, 64, 2000, 1 << 20):
        reader = RecordReader(whole(path), ReadSettings(on_error="skip", batch_bytes=batch_bytes, max_record_bytes=1002))
        found = [text for batch in reader.batches() for text in batch.texts]
        assert [len(text) for text in found] == [900, 990, 5]
        assert dict(reader.skipped) == {"too_large": 1}


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz"])
def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b'{"text": "1"}\n' * 10)
    byte_range = whole(path)
    path.write_bytes(b'{"text": "1"}\n' * 5)
    with pytest.raises(DataError, match=r"ends at byte 70, it had 140 when this run began|is damaged"):
        texts_in(byte_range)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.arrow"])
def test_a_file_replaced_while_it_is_read_is_an_error(tmp_path: Path, name: str) -> None:
    """Also if the size is the same: the corpus would mix the old and the new content."""
    write_all_forms(tmp_path)
    byte_range = whole(tmp_path / name)
    batches = RecordReader(byte_range, ReadSettings(batch_bytes=1)).batches()
    next(batches)
    os.utime(byte_range.source.path, ns=(1, 1))
    with pytest.raises(DataError, match=rf"{name} was written to since this run began: .*wait until it is complete"):
        list(batches)
    with pytest.raises(DataError, match=rf"{name} was written to since this run began"):
        texts_in(byte_range)


def test_a_few_compressed_bytes_are_not_decompressed_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    bomb = b'{"text": "' + b"x" * 400_000_000 + b'"}\n{"text": "2"}\n'
    path.write_bytes(zstandard.ZstdCompressor(level=1).compress(bomb))
    del bomb
    assert path.stat().st_size < 60_000
    code = "import resource, sys; from pathlib import Path; from tests.support.corpus_reading import skim\n"
    code += "print(skim(Path(sys.argv[1]), max_record_bytes=1_000_000)[:2], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, check=True)
    found, _, peak = done.stdout.strip().rpartition(" ")
    assert found == "(['2'], {'too_large': 1})"
    base = subprocess.run(
        [sys.executable, "-c", code, str(write_jsonl(tmp_path / "b.jsonl", ["2"]))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(peak) - int(base.stdout.split()[-1]) < 200_000  # KB; decompressed at once it would be above 400,000


def test_damaged_web_archives_are_named(tmp_path: Path) -> None:
    pytest.importorskip("fastwarc", reason="the warc extra is not installed")
    archive = warc_of(("conversion", b"one two"), ("conversion", b"three four"))
    (tmp_path / "a.wet").write_bytes(archive[:-8])
    with pytest.raises(DataError, match=r"a\.wet is truncated: its text record 2 ends too early"):
        texts_in(whole(tmp_path / "a.wet"))
    (tmp_path / "b.wet").write_bytes(archive)
    assert skim(tmp_path / "b.wet", max_record_bytes=8)[:2] == (["one two"], {"too_large": 1})


def test_a_column_of_lists_is_refused(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": [["a"], ["b"]]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"has type list<.*>, expected text"):
        list(read_texts([source(tmp_path / "a.parquet")], "text"))


def test_many_bad_lines_far_into_a_file_do_not_read_it_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "1"}\n' * 1000 + b"{\n" * 50)
    reads: list[int] = []
    monkeypatch.setattr(LineReader, "_lines_before", lambda self: reads.append(1) or 1000)
    reader = RecordReader(ByteRange(source(path), 14_000, path.stat().st_size), ReadSettings(on_error="skip"))
    assert [text for batch in reader.batches() for text in batch.texts] == []
    assert (len(reads), reader.messages[9]) == (
        1,
        f"{path}:1010: malformed JSON (unexpected end of data: line 1 column 2 (char 1))",
    )


def test_naming_a_line_of_every_part_reads_the_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(b"x" * (n % 7) + b"\n" for n in range(1000)) + b"open")
    content, reads = path.read_bytes(), []
    whole_read = streams.raw_blocks

    def counted(file: InputPath, start: int, end: int, size: int = 1 << 20) -> Iterator[bytes]:
        reads.append(end - start)
        return whole_read(file, start, end, size)

    monkeypatch.setattr(streams, "raw_blocks", counted)
    starts = [*range(0, len(content), 97), len(content) - 1, 5, 50]  # the last two begin again
    for start in starts:
        reader = LineReader(ByteRange(source(path), start, len(content)), 1 << 20)
        before = content[:start].count(b"\n") + (start > 0 and content[start - 1] != 10)
        assert reader.name_line(3) == f"{path}:{before + 4}"
    assert sum(reads) == len(content) - 1 + 50
