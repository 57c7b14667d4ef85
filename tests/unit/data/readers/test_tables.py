"""Tables of other programs: small files that are large in memory, invalid values, flipped bits, ambiguous columns."""

import bz2
import datetime
import lzma
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import compute, feather, ipc, parquet

from megatron_ledom.data.readers.records import ReadSettings, RecordReader
from megatron_ledom.data.readers.table_sizes import batch_sizes, row_bytes
from megatron_ledom.errors import DataError
from tests.support.corpus_reading import skim, warc_of, whole
from tests.support.paths import ROOT

LARGE = "x" * (8 << 20)
GOOD = [f"text {number}" for number in range(5)]
TABLE = {"text": [*GOOD, *[LARGE] * 12]}
"""96 MiB in memory. 12 of its records are above every limit in these tests."""
LIMIT = 100_000

PEAK = """
import sys
from pathlib import Path
import pyarrow.parquet, pyarrow.compute
from megatron_ledom.errors import DataError
from tests.support.corpus_reading import skim
def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024
open("/proc/self/clear_refs", "w").write("5")  # reset the peak
before = memory("VmRSS")
for path in sys.argv[3:]:
    texts, skipped, _ = skim(Path(path), sys.argv[1], max_record_bytes=100_000, keep_records=sys.argv[2] == "1", batch_bytes=1 << 20)
    print(texts == [f"text {number}" for number in range(5)] * (len(texts) // 5), skipped)
print(memory("VmHWM") - before)
"""


def read_in_a_process(*paths: Path, key: str = "text", keep_records: bool = False) -> tuple[set[str], float]:
    """Return the messages about the files, and the peak memory of reading them, in MiB."""
    arguments = [key, str(int(keep_records)), *map(str, paths)]
    done = subprocess.run([sys.executable, "-c", PEAK, *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    *said, peak = done.stdout.splitlines()
    return set(said), float(peak)


@pytest.mark.parametrize("keep_records", [False, True])
def test_a_few_bytes_of_parquet_do_not_unfold_in_memory(tmp_path: Path, keep_records: bool) -> None:
    """A dictionary stores a text once for all its rows, a delta encoding only the difference from the previous text."""
    table = pyarrow.table({"text": [*GOOD, *[LARGE] * 50]})
    parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    encoding = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    parquet.write_table(table, tmp_path / "b.parquet", compression="zstd", **encoding)
    assert all(path.stat().st_size < 2000 for path in tmp_path.iterdir())
    said, peak = read_in_a_process(tmp_path / "a.parquet", tmp_path / "b.parquet", keep_records=keep_records)
    assert said == {"True {'too_large': 50}"}
    assert peak < 250, "all rows at once take 1,200 MiB and more"


def test_a_few_bytes_of_another_column_do_not_unfold_for_a_filter(tmp_path: Path) -> None:
    other = [{"a": [LARGE]}] * 40
    parquet.write_table(pyarrow.table({"text": GOOD * 8, "other": other}), tmp_path / "a.parquet", compression="zstd")
    repeated = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 40, pyarrow.int32()), pyarrow.array([LARGE]))
    table = pyarrow.table({"text": GOOD * 8, "other": repeated})
    with ipc.new_file(tmp_path / "b.arrow", table.schema) as file:
        file.write_table(table)
    said, peak = read_in_a_process(tmp_path / "a.parquet", tmp_path / "b.arrow", keep_records=True)
    assert said == {"True {}"}
    assert peak < 250, "all rows at once take 800 MiB and more"


def references(count: int, of_map: bool = False) -> pyarrow.Array:
    """Return three rows with a text of 10 kB: once, `count` times, once."""
    bounds = pyarrow.array([0, 1, 1 + count, 2 + count], pyarrow.int32())
    indices = pyarrow.array([0] * (count + 2), pyarrow.int32())
    values = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array(["x" * 10_000]))
    if of_map:
        return pyarrow.MapArray.from_arrays(bounds, pyarrow.array(["k"] * (count + 2)), values)
    return pyarrow.ListArray.from_arrays(bounds, values)


def test_many_references_in_one_row_to_one_text_are_a_bad_record_and_are_never_unfolded(tmp_path: Path) -> None:
    texts = {"text": [*GOOD[:1], "row of the list", *GOOD[1:2]]}
    for name, other in (("a", references(60_000)), ("b", references(60_000, of_map=True))):
        table = pyarrow.table({**texts, "other": pyarrow.StructArray.from_arrays([other], ["inner"]) if name == "a" else other})
        if name == "a":
            write_arrow_file(tmp_path / "a.arrow", table)
        parquet.write_table(table, tmp_path / f"{name}.parquet")
    paths = sorted(tmp_path.iterdir())
    assert all(path.stat().st_size < 4000 for path in paths)
    for path in paths:
        kept, skipped, messages = skim(path, keep_records=True, max_record_bytes=LIMIT)
        assert (kept, skipped) == (GOOD[:2], {"too_large": 1})
        assert "row 2: its columns take 60" in messages[0]
        assert len(skim(path, max_record_bytes=LIMIT)[0]) == 3, "without a filter nobody reads the list"
    _, peak = read_in_a_process(*paths, keep_records=True)
    assert peak < 100, "the row takes 600 MiB and more"


def test_a_list_of_many_values_keeps_them_for_a_filter(tmp_path: Path) -> None:
    tags = [["a", None, "a"], [], None, ["bcd"] * 3]
    table = pyarrow.table({"text": ["1", "2", "3", "4"], "tags": tags})
    parquet.write_table(table, tmp_path / "a.parquet")
    reader = RecordReader(whole(tmp_path / "a.parquet"), ReadSettings(keep_records=True))
    assert [record["tags"] for batch in reader.batches() for record in batch.records] == tags


TEXTS_OF_ROWS = pyarrow.array(["a", "bcd", None, "ef"])
PAIRS = [["a", "bb"], None, ["ccc"], ["d", None]]


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (TEXTS_OF_ROWS, [1, 3, 0, 2]),
        (TEXTS_OF_ROWS.cast(pyarrow.string_view()), [1, 3, 0, 2]),
        (TEXTS_OF_ROWS.cast(pyarrow.large_binary()), [1, 3, 0, 2]),
        (TEXTS_OF_ROWS.dictionary_encode(), [1, 3, 0, 2]),
        (compute.run_end_encode(pyarrow.array(["aa", "aa", None, "b"])), [2, 2, 0, 1]),
        (pyarrow.StructArray.from_arrays([TEXTS_OF_ROWS, TEXTS_OF_ROWS], ["a", "b"]), [2, 6, 0, 4]),
        (pyarrow.array(PAIRS), [19, 0, 11, 17]),
        (pyarrow.array(PAIRS, pyarrow.large_list(pyarrow.string())), [19, 0, 11, 17]),
        (pyarrow.array(PAIRS, pyarrow.list_view(pyarrow.string())), [19, 0, 11, 17]),
        (pyarrow.array([["a", "bb"], None, ["c", "c"], ["d", None]], pyarrow.list_(pyarrow.string(), 2)), [19, 0, 18, 17]),
        (
            pyarrow.array([[("k", "vv")], None, [], [("a", "b")]], pyarrow.map_(pyarrow.string(), pyarrow.string())),
            [11, 0, 0, 10],
        ),
        (pyarrow.array([1, None, 3, 4]), [8, 8, 8, 8]),
    ],
)
def test_bytes_of_rows_count_each_value_at_any_depth(array: pyarrow.Array, expected: list[int]) -> None:
    """Also for a slice, whose inner arrays are not cut."""
    assert row_bytes(array).tolist() == expected
    assert row_bytes(array.slice(1, 2)).tolist() == expected[1:3]
    assert row_bytes(array.slice(0, 0)).tolist() == []


def view_table() -> pyarrow.Table:
    """Return a column of string views, twelve of them of one large text."""
    buffers = pyarrow.array([*GOOD, LARGE]).cast(pyarrow.string_view()).buffers()
    views = bytes(buffers[1])[:96]
    shown = pyarrow.py_buffer(views[:80] + views[80:96] * 12)
    return pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string_view(), 17, [None, shown, *buffers[2:]])})


def test_views_of_one_text_do_not_unfold(tmp_path: Path) -> None:
    table = view_table()
    with ipc.new_stream(tmp_path / "a.arrow", table.schema) as stream:
        stream.write_table(table)
    said, peak = read_in_a_process(tmp_path / "a.arrow")
    assert said == {"True {'too_large': 12}"}
    assert peak < 100


def write_plain_parquet(path: Path, table: pyarrow.Table) -> None:
    parquet.write_table(table, path, compression="zstd", use_dictionary=False)


def write_arrow_file(path: Path, table: pyarrow.Table) -> None:
    with ipc.new_file(path, table.schema, options=ipc.IpcWriteOptions(compression="zstd")) as file:
        file.write_table(table)


def write_arrow_stream(path: Path, table: pyarrow.Table) -> None:
    with ipc.new_stream(path, table.schema, options=ipc.IpcWriteOptions(compression="zstd")) as file:
        file.write_table(table)


def write_feather(path: Path, table: pyarrow.Table) -> None:
    feather.write_feather(table, path, compression="zstd")


def write_dictionaries(path: Path, table: pyarrow.Table) -> None:
    whole = table.column("text").combine_chunks()
    write_arrow_file(path, pyarrow.table({"text": GOOD[:1], "other": pyarrow.DictionaryArray.from_arrays([0], whole)}))


@pytest.mark.parametrize(
    ("write", "name", "part"),
    [
        (write_plain_parquet, "a.parquet", "column 'text' of row group 1"),
        (write_arrow_file, "a.arrow", "message 1"),
        (write_arrow_stream, "a.arrow", "message 1"),
        (write_feather, "a.feather", "message 1"),
        (write_dictionaries, "a.arrow", "message 1"),
    ],
)
def test_a_page_or_batch_that_is_far_too_large_decompressed_is_refused(
    tmp_path: Path, write: Callable[[Path, pyarrow.Table], None], name: str, part: str
) -> None:
    path = tmp_path / name
    write(path, pyarrow.table(TABLE))
    with pytest.raises(DataError, match=rf"{name}: {part} of [\d,]+ stored bytes takes 100,\d+,\d+ bytes in memory"):
        skim(path, max_record_bytes=LIMIT)


def test_a_compressed_table_of_ordinary_text_is_read_and_its_size_is_known(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["one two three " * 200] * 3, "id": [1, 2, 3]})
    for write, name in ((write_arrow_file, "a.arrow"), (write_feather, "a.feather"), (write_plain_parquet, "a.parquet")):
        write(tmp_path / name, table)
        assert skim(tmp_path / name)[0] == table.column("text").to_pylist()
    with pyarrow.memory_map(str(tmp_path / "a.arrow")) as file:
        file.seek(8)
        ((stored, unfolded),) = batch_sizes(file)
    assert stored < 500
    assert unfolded == 3 * 2800 + 4 * 4 + 3 * 8


@pytest.mark.parametrize(("ending", "compress"), [("bz2", bz2.compress), ("xz", lzma.compress)])
def test_a_few_compressed_bytes_of_a_web_archive_do_not_unfold(
    tmp_path: Path, ending: str, compress: Callable[[bytes], bytes]
) -> None:
    pytest.importorskip("fastwarc", reason="the warc extra is not installed")
    path = tmp_path / f"a.wet.{ending}"
    texts = [("conversion", text.encode()) for text in GOOD]
    path.write_bytes(compress(warc_of(*texts, *[("conversion", LARGE.encode() * 2)] * 6)))
    said, peak = read_in_a_process(path)
    assert said == {"True {'too_large': 6}"}
    assert peak < 60, "all of it is 100 MiB"


def test_a_flipped_bit_is_found_by_the_checksum_of_its_page(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    options = {"write_page_checksum": True, "compression": "none", "use_dictionary": False, "write_statistics": False}
    parquet.write_table(pyarrow.table({"text": ["one", "unique text", "three"]}), path, **options)
    path.write_bytes(path.read_bytes().replace(b"unique text", b"wnique text"))
    with pytest.raises(DataError, match=r"a\.parquet is damaged or not Parquet \(.*CRC"):
        skim(path)


def stamp(value: int, zone: str | None = None) -> pyarrow.Array:
    return pyarrow.array([0, value, 0], pyarrow.int64()).cast(pyarrow.timestamp("us", zone))


def broken_text() -> pyarrow.Array:
    return pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())


@pytest.mark.parametrize(
    ("other", "bad", "words"),
    [
        (broken_text(), [1], "UnicodeDecodeError"),
        (stamp(10**18), [1], "OverflowError"),
        (stamp(0, "Mars/Olympus"), [0, 1, 2], "Mars/Olympus"),
        (pyarrow.StructArray.from_arrays([broken_text()], ["url"]), [1], "UnicodeDecodeError"),
        (pyarrow.array([0, 2**62, 0]).cast(pyarrow.duration("s")), [1], "OverflowError"),
    ],
)
@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_value_of_another_column_that_cannot_be_read_costs_its_own_row_only(
    tmp_path: Path, other: pyarrow.Array, bad: list[int], words: str, form: str
) -> None:
    """Without a filter, which alone reads that column, no row is lost."""
    path, table = tmp_path / f"a.{form}", pyarrow.table({"text": ["1", "2", "3"], "other": other})
    if form == "parquet":
        parquet.write_table(table, path)
    else:
        with ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    assert skim(path)[:2] == (["1", "2", "3"], {})
    texts, skipped, messages = skim(path, keep_records=True)
    assert texts == [text for number, text in enumerate(["1", "2", "3"]) if number not in bad]
    assert skipped == {"unreadable_column": len(bad)}
    assert f"row {bad[0] + 1}: column 'other' cannot be read" in messages[0]
    assert words in messages[0]
    with pytest.raises(DataError, match=rf"a\.{form}: .*row {bad[0] + 1}: column 'other' cannot be read"):
        skim(path, keep_records=True, on_error="fail")


def test_columns_of_one_name_are_refused_where_they_are_read(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["1"])] * 3, names=["text", "id", "id"])
    parquet.write_table(table, tmp_path / "a.parquet")
    assert skim(tmp_path / "a.parquet")[0] == ["1"]
    for settings in ({"key": "id"}, {"keep_records": True}):
        with pytest.raises(DataError, match=r"a\.parquet has more than one column 'id'"):
            skim(tmp_path / "a.parquet", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["text", "text.item", "text.element", "text.0", "id.x"])
def test_a_column_that_is_not_text_and_has_no_fields_is_named(tmp_path: Path, key: str) -> None:
    moments = [datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)]
    parquet.write_table(pyarrow.table({"text": [["a"]], "id": moments}), tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match=r"a\.parquet: column .* has type (list<|timestamp).*name (one|another one) by --text-key"
    ):
        skim(tmp_path / "a.parquet", key)


@pytest.mark.parametrize("is_delta", [True, False])
def test_a_list_whose_values_repeat_is_refused_before_it_is_decoded(tmp_path: Path, is_delta: bool) -> None:
    values = [["y" * 20_000] * 4_000] if is_delta else [[7] * 10_000_000]
    path, name = tmp_path / "a.parquet", "more.list.element"
    encoding = {"column_encoding": {name: "DELTA_BYTE_ARRAY"}, "use_dictionary": False} if is_delta else {}
    parquet.write_table(pyarrow.table({"text": ["short"], "more": values}), path, compression="zstd", **encoding)
    assert path.stat().st_size < 200_000
    with pytest.raises(DataError, match=r"column 'more\.list\.element' of row group 1"):
        skim(path, keep_records=True, max_record_bytes=1_000_000)
    assert skim(path)[0] == ["short"]
