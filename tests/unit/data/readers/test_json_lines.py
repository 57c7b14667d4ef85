"""JSON lines whose text is valid although another key is not, and JSON files that are not lines."""

import gzip
import json
import sys
from decimal import Decimal
from pathlib import Path

import pyarrow
import pytest
from pyarrow import ipc

from megatron_ledom.data.readers.input_files import expand_inputs
from megatron_ledom.data.readers.json_lines import MOST_NESTED
from megatron_ledom.data.readers.records import ReadSettings, RecordReader
from megatron_ledom.errors import DataError, UsageError
from tests.support.corpus_reading import skim, whole

DEEP = b"[" * 5000 + b"]" * 5000
ODD = [
    b"NaN",
    b"-Infinity",
    b"1e999",
    b'"\\udc80"',
    b'"\xff"',
    b"1" * 30,
    b"1" * 5000,
    b"-" + b"9" * 5000,
    DEEP,
    b'{"a": ' * 2000 + b"1" + b"}" * 2000,
]


def test_a_text_is_read_whatever_another_key_contains(tmp_path: Path) -> None:
    """The other key may come before or after the text, at the top level or nested."""
    path = tmp_path / "a.jsonl"
    lines = [b'{"text": "one", "k": %b}\n{"k": [0, {"z": %b}], "text": "t\\u00e9xt"}\n' % (odd, odd) for odd in ODD]
    path.write_bytes(b"".join(lines))
    limit = sys.getrecursionlimit()
    assert skim(path) == (["one", "téxt"] * len(ODD), {}, [])
    assert skim(path, keep_records=True, on_error="fail")[0] == ["one", "téxt"] * len(ODD)
    assert sys.getrecursionlimit() == limit


def test_a_nested_text_next_to_an_odd_value_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": {"b": "one", "score": NaN}}\n')
    assert skim(tmp_path / "a.jsonl", "a.b")[0] == ["one"]


def test_an_integer_of_any_length_keeps_its_value_for_a_filter(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "1", "n": %b, "score": NaN}\n' % (b"7" * 5000))
    reader = RecordReader(whole(tmp_path / "a.jsonl"), ReadSettings(keep_records=True))
    (record,) = [record for batch in reader.batches() for record in batch.records]
    assert record["n"] == Decimal("7" * 5000)


@pytest.mark.parametrize(
    ("line", "reason", "words"),
    [
        (b'{"text": "\\ud800", "k": NaN}', "malformed_json", "lone surrogate '\\ud800' at character 0"),
        (b'{"text": "ab\xff", "k": NaN}', "invalid_utf8", "invalid UTF-8"),
        (b'{"text": NaN}', "text_is_not_a_string", "has type float"),
        (b'{"text": "one", "k": nan}', "malformed_json", "malformed JSON"),
        (b'{"text": "one", "k": NaN', "malformed_json", "malformed JSON"),
        (b'{"text": "one", "k": ' + b"[" * 5000, "malformed_json", "malformed JSON"),
        (b'{"text": "one", "k": ' + b"[" * MOST_NESTED + b"]" * MOST_NESTED + b"}", "malformed_json", "more than 20,000 deep"),
        (b"NaN", "not_an_object", "a JSON float"),
    ],
)
def test_a_line_that_both_readers_refuse_is_a_bad_one(tmp_path: Path, line: bytes, reason: str, words: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "1"}\n' + line + b'\n{"text": "3"}\n')
    texts, skipped, messages = skim(tmp_path / "a.jsonl")
    assert (texts, skipped) == (["1", "3"], {reason: 1})
    assert words in messages[0]


RECORDS = [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
@pytest.mark.parametrize(
    ("content", "found"),
    [
        (json.dumps(RECORDS), "JSON arrays"),
        (json.dumps(RECORDS, indent=2), "JSON arrays"),
        ("\ufeff\n " + json.dumps(RECORDS, indent=2), "JSON arrays"),
        (json.dumps(["one", "two"], indent=1), "JSON arrays"),
        (json.dumps([{"text": "x" * 2000}]), "JSON arrays"),
        ('["one",\n "two"]', "JSON arrays"),
        (json.dumps(RECORDS[0], indent=2), r"JSON objects over several lines \(pretty-printed\)"),
    ],
)
@pytest.mark.parametrize("on_error", ["skip", "fail"])
def test_json_that_is_not_lines_is_refused_with_a_command_to_convert_it(
    tmp_path: Path, name: str, content: str, found: str, on_error: str
) -> None:
    """Also with --on-error skip, which skipped the whole file; also if its one line is longer than a record may be."""
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    for batch_bytes in (16, 1 << 20):
        with pytest.raises(DataError, match=rf"{name} contains {found}, expected one object per line; .*jq -c"):
            skim(path, on_error=on_error, batch_bytes=batch_bytes, max_record_bytes=1000)


@pytest.mark.parametrize(
    "content",
    [
        b'{"text":"first",\n "b":2}\n{"text":"sec",\n "b":2}\n',
        b'\xef\xbb\xbf\n{"text":"first"\r\n,"b":NaN}\r\n',
        b'{"text":"%b",\n "b":[1,\n 2]}\n' % (b"x" * 600),
        b'{"text":"1",\n"b":"%b",\n"c":1}\n' % (b"x" * 600),
        b'["a",\n"b"]\n',
    ],
)
@pytest.mark.parametrize("batch_bytes", [700, 1 << 20])
def test_json_over_several_lines_is_refused_although_its_first_key_is_on_the_first_line(
    tmp_path: Path, content: bytes, batch_bytes: int
) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jsonl contains JSON (objects over several lines|arrays).*jq -c"):
        skim(tmp_path / "a.jsonl", batch_bytes=batch_bytes)


@pytest.mark.parametrize(
    "first", [b'{"text": "cut', b'{"text": "cut",', b'{"text":', b'{"a": [', b'{"text": "x"}}', DEEP[:5000]]
)
def test_a_broken_first_line_is_one_bad_record(tmp_path: Path, first: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(first + b'\n{"text": "one"}\n{"text": "two"}\n')
    texts, skipped, _ = skim(tmp_path / "a.jsonl", batch_bytes=1 << 20)
    assert (texts, skipped) == (["one", "two"], {"malformed_json": 1})
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "cut",\n')
    assert skim(tmp_path / "a.jsonl")[1] == {"malformed_json": 1}


def save_to_disk(folder: Path) -> None:
    """Write the files that `datasets.Dataset.save_to_disk` writes."""
    folder.mkdir(parents=True)
    table = pyarrow.table({"text": ["one", "two"]})
    with ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table)
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}, indent=2))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}, indent=2))


def test_a_folder_of_save_to_disk_is_refused_with_the_files_to_give(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "one")
    with pytest.raises(UsageError, match=r"input .*one was written by save_to_disk .*give --input '.*one/\*\.arrow'"):
        expand_inputs([str(tmp_path / "one")])
    (path,) = expand_inputs([str(tmp_path / "one/*.arrow")])
    assert skim(Path(path.path))[0] == ["one", "two"]
    for part in ("test", "train"):
        save_to_disk(tmp_path / "many" / part)
    (tmp_path / "many/dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    with pytest.raises(UsageError, match=r"give --input '.*many/test/\*\.arrow' '.*many/train/\*\.arrow'"):
        expand_inputs([str(tmp_path / "many")])


def test_files_that_only_share_a_name_with_save_to_disk_are_read(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"text": "one"}\n')
    assert len(expand_inputs([str(tmp_path)])) == 1
