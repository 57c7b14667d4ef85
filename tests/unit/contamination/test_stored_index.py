"""An index in a folder: the same results as a new one, built once, never that of other items, code, or a damaged one."""

import errno
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xxhash

from megatron_ledom.contamination.item_table import ItemTable
from megatron_ledom.contamination.items import EvaluationItem
from megatron_ledom.contamination.report import ContaminationCounts, report_of
from megatron_ledom.contamination.search import Decontamination, Searcher
from megatron_ledom.contamination.settings import Match, SearchSettings
from megatron_ledom.contamination.stored_index import PREFIX, open_index
from megatron_ledom.errors import DataError, LedomError, TransientError, UsageError
from megatron_ledom.evaluation.known_items import known_decontamination
from tests.support.evaluation_sets import write_sets
from tests.support.paths import ROOT
from tests.support.tool_runs import run_tool


def sentences(chance: random.Random, count: int) -> str:
    syllables = ["ba", "ce", "di", "fa", "gu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "zu"]
    words = ["".join(chance.choices(syllables, k=chance.randrange(1, 4))) for _ in range(count)]
    return " ".join(f"{word}{chance.choice(['', '', '', ',', '.', chr(10)])}" for word in words)


def own_items(folder: Path, count: int = 24) -> str:
    chance = random.Random(3)
    path = folder / "own.jsonl"
    rows = [
        {
            "question": f"{sentences(chance, 20)} {1000 + n} of $x = 3{n}$?",
            "answer": sentences(chance, n),
            "choices": ["é", ""][: n % 3],
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def report(search: Decontamination, texts: list[str]) -> tuple[object, dict[str, object]]:
    searcher, counts = Searcher(search), ContaminationCounts(documents=len(texts))
    found = searcher.search(texts)
    for number, passages in found.items():
        counts.add_document(str(number), texts[number], passages)
    return found, report_of(counts, searcher, search)


@pytest.mark.parametrize("match", ["either", "both", "any"])
def test_a_stored_index_finds_the_same_in_every_kind_of_planted_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, match: Match
) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests/benchmarks")
    bench = importlib.import_module("bench_decontaminate")
    monkeypatch.setattr(bench, "LONG_PAGE_CHARACTERS", 20_000)
    paths = [own_items(tmp_path), str(write_sets(tmp_path / "sets"))]
    settings = SearchSettings(match=match, ignore_numbers=match == "any", telling_words=2)
    new = known_decontamination(settings, paths)
    first = known_decontamination(settings, paths, str(tmp_path / "index"))
    stored = known_decontamination(settings, paths, str(tmp_path / "index"))
    assert list(stored.items) == list(new.items)
    assert stored.request() == first.request() == new.request()
    chance = random.Random(4)
    texts = [document["text"] for document in bench.planted([*new.items][:24], [sentences(chance, 1500) for _ in range(60)], 3)]
    found, written = report(new, texts)
    assert len(found) >= (12 if match != "both" else 0)  # type: ignore[arg-type]
    assert report(first, texts) == report(stored, texts) == (found, written)


def test_another_job_reads_no_items_and_maps_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    sets, folder = write_sets(tmp_path / "sets"), tmp_path / "a/b"
    known_decontamination(SearchSettings(), [str(sets)], str(folder))
    assert " built in " in caplog.text
    (name,) = os.listdir(folder)
    before = (folder / name).stat()
    command = "import sys; from megatron_ledom.contamination.settings import SearchSettings; "
    command += "from megatron_ledom.evaluation import known_items; known_items._items_of_files = None; "
    command += "found = known_items.known_decontamination(SearchSettings(), [sys.argv[1]], sys.argv[2]); "
    command += "print(len(found.items), sys.argv[2] in open('/proc/self/maps').read(), 'pyarrow' in sys.modules)"
    sets.rename(tmp_path / "moved")  # folders and dates make no difference
    done = subprocess.run(
        [sys.executable, "-c", command, tmp_path / "moved", folder], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[1:] == ["True", "False"]
    assert (folder / name).stat() == before


def test_other_items_names_code_or_settings_have_another_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, folder = own_items(tmp_path), str(tmp_path / "index")

    def number_of_indexes(settings: SearchSettings, *paths: str) -> int:
        found = known_decontamination(settings, paths, folder)
        assert found.items_sha256 == known_decontamination(settings, paths).items_sha256
        return len(os.listdir(folder))

    assert number_of_indexes(SearchSettings(), path) == 1
    assert number_of_indexes(SearchSettings(action="cut", threshold=0.9, telling_words=0), path) == 1
    for number, changes in enumerate(({"ngram": 9}, {"min_words": 7}, {"match": "any"}, {"ignore_numbers": True})):
        assert number_of_indexes(SearchSettings(**changes), path) == 2 + number  # type: ignore[arg-type]
    stat = os.stat(path)
    Path(path).write_text(Path(path).read_text().replace("1000", "1001", 1))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the same size and date
    assert number_of_indexes(SearchSettings(), path) == 6
    Path(path).rename(tmp_path / "other.jsonl")
    assert number_of_indexes(SearchSettings(), str(tmp_path / "other.jsonl")) == 7
    monkeypatch.setattr("megatron_ledom.contamination.stored_index.FORMAT", 0)
    assert number_of_indexes(SearchSettings(), str(tmp_path / "other.jsonl")) == 8


def test_any_flipped_byte_and_any_cut_is_noticed_and_the_index_built_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, folder = own_items(tmp_path, 6), tmp_path / "index"
    good = known_decontamination(SearchSettings(), [path], str(folder))
    (file,) = folder.iterdir()
    key, content = open_key(path), file.read_bytes()
    chance = random.Random(5)
    places = [*range(40), *chance.sample(range(40, len(content)), 40), len(content) - 1]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << chance.randrange(8)
        file.write_bytes(damaged)
        assert open_index(str(file), key, SearchSettings()) is None, place
    for size in (0, 7, 32, 33, 200, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        assert open_index(str(file), key, SearchSettings()) is None, size
    file.write_bytes(content + b"\0")
    assert open_index(str(file), key, SearchSettings()) is None
    caplog.clear()
    again = known_decontamination(SearchSettings(), [path], str(folder))
    assert caplog.text.count("is damaged (it has") >= 1
    assert file.read_bytes() == content
    assert list(again.items) == list(good.items)
    file.write_bytes(content)
    assert open_index(str(file), f"{key[:-1]}x", SearchSettings()) is None


def edited(content: bytes, edit: Callable[[dict[str, Any], dict[str, npt.NDArray[Any]]], None]) -> bytes:
    """Return the file of an index after an edit of its header and arrays (in place), with a correct checksum."""
    magic, header_bytes, _, _ = PREFIX.unpack(content[: PREFIX.size])
    header = json.loads(content[PREFIX.size : PREFIX.size + header_bytes])
    body = bytearray(content[PREFIX.size + header_bytes :])
    arrays = {
        name: np.frombuffer(body, dtype, int(np.prod(shape)), start).reshape(shape)
        for name, (dtype, shape, start) in header["arrays"].items()
    }
    edit(header, arrays)
    written = json.dumps(header).encode()
    written += b" " * (-(PREFIX.size + len(written)) % 64)
    digest = xxhash.xxh3_64_intdigest(written + body)
    return PREFIX.pack(magic, len(written), PREFIX.size + len(written) + len(body), digest) + written + body


WRONG_NUMBERS: dict[str, list[tuple[Any, int]]] = {
    "part_texts": [(0, -1), (-1, 10**6), (0, 7)],
    "num_words": [(0, -5), (0, 0), (0, 2**31 - 1)],
    "places": [((0, 1), -5), ((0, 1), 2**31 - 1), ((0, 1), 60), ((0, 0), -1), ((0, 0), 10**6)],
    "starts": [(0, 1), (1, 2**31 - 1), (-1, 0)],
    "firsts": [(0, 1), (1, 1), (1, -(2**62)), (-1, 10**6)],
    "offsets": [(1, -1), (1, 2**62), (-1, 0)],
    "sets": [(0, -1), (0, 1)],
    "slots": [((0, 1), 10**6)],
    "table": [(0x1000, 2**32 - 1)],
}
WRONG_HEADERS: list[Callable[[dict[str, Any]], Any]] = [
    lambda header: header.update(sets=[3]),
    lambda header: header.update(sets=None),
    lambda header: header.update(pool=3),
    lambda header: header.update(lengths=[9]),
    lambda header: header.update(lengths=[-1]),
    lambda header: header["arrays"].pop("places"),
    lambda header: header["arrays"].update(places=["<i4", [4], 0]),
    lambda header: header["arrays"].update(table=["<u4", [8], 0]),
    lambda header: header["arrays"].update(numbers=["<i8", [1], 0]),
    lambda header: header["arrays"].update(bytes=["O", [1], 0]),
    lambda header: header["arrays"].update(bytes=7),
    lambda header: header.update(arrays=[]),
]


def test_numbers_out_of_range_are_noticed_also_with_a_correct_checksum(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, folder = own_items(tmp_path, 6), tmp_path / "index"
    known_decontamination(SearchSettings(), [path], str(folder))
    (file,) = folder.iterdir()
    key, content = open_key(path), file.read_bytes()
    file.write_bytes(edited(content, lambda header, arrays: None))
    assert open_index(str(file), key, SearchSettings()) is not None

    def is_refused(edit: Callable[[dict[str, Any], dict[str, npt.NDArray[Any]]], None]) -> bool:
        caplog.clear()
        file.write_bytes(edited(content, edit))
        return open_index(str(file), key, SearchSettings()) is None and len(caplog.records) == 1

    for name, changes in WRONG_NUMBERS.items():
        for place, value in changes:

            def put(header: Any, arrays: Any, name: str = name, place: Any = place, value: int = value) -> None:
                arrays[name][place] = value

            assert is_refused(put), (name, place, value)
    for number, change in enumerate(WRONG_HEADERS):
        assert is_refused(lambda header, arrays, change=change: change(header)), number  # type: ignore[misc]
    caplog.clear()
    known_decontamination(SearchSettings(), [path], str(folder))
    assert file.read_bytes() == content


def test_texts_of_many_words_and_of_none_are_in_range(tmp_path: Path) -> None:
    path, folder = tmp_path / "own.jsonl", str(tmp_path / "index")
    words = "1a" * 40, "\ufdfa" * 20, "\u00bd" * 20, "\u3042" * 20, "\U0001f600" * 20, "\u33c2" * 20, "x"
    rows = [{"question": text, "answer": "!?" * number} for number, text in enumerate(words)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    known_decontamination(SearchSettings(), [str(path)], folder)
    assert open_index(str(next((tmp_path / "index").iterdir())), open_key(str(path)), SearchSettings()) is not None


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EIO, TransientError), (errno.ESTALE, TransientError), (errno.EACCES, UsageError)]
)
def test_an_index_that_cannot_be_read_is_named_with_the_kind_of_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[LedomError]
) -> None:
    path, folder = own_items(tmp_path, 6), tmp_path / "index"
    known_decontamination(SearchSettings(), [path], str(folder))

    def failing(name: str, *_: object) -> None:
        raise OSError(number, os.strerror(number), name)

    monkeypatch.setattr(np, "memmap", failing)
    with pytest.raises(kind, match=r"the index .*\.items cannot be read") as raised:
        known_decontamination(SearchSettings(), [path], str(folder))
    assert type(raised.value) is kind


def test_an_index_that_goes_while_it_is_opened_is_built_and_a_folder_in_its_place_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder = own_items(tmp_path, 6), tmp_path / "index"
    known_decontamination(SearchSettings(), [path], str(folder))
    (file,) = folder.iterdir()
    memmap = np.memmap

    def late(name: str, *arguments: Any) -> Any:
        monkeypatch.setattr(np, "memmap", memmap)
        os.unlink(name)
        return memmap(name, *arguments)

    monkeypatch.setattr(np, "memmap", late)
    assert len(known_decontamination(SearchSettings(), [path], str(folder)).items) == 6
    assert file.is_file()
    file.unlink()
    file.mkdir()
    with pytest.raises(UsageError, match="cannot be read"):
        known_decontamination(SearchSettings(), [path], str(folder))


HOLD = """
import sys
from megatron_ledom.storage.locks import Lock, hold
with hold(Lock(sys.argv[1]), "index", ""):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_job_that_waits_too_long_for_another_builder_may_start_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, folder = own_items(tmp_path, 6), tmp_path / "index"
    known_decontamination(SearchSettings(), [path], str(folder))
    (file,) = folder.iterdir()
    file.unlink()
    monkeypatch.setattr("megatron_ledom.contamination.stored_index.PATIENCE_SECONDS", 0.2)
    command = [sys.executable, "-c", HOLD, f"{file}.lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as builder:
        assert builder.stdout is not None
        assert builder.stdout.readline() == "held\n"
        with pytest.raises(TransientError, match=rf"is being written by process {builder.pid} .*start again") as raised:
            known_decontamination(SearchSettings(), [path], str(folder))
        builder.communicate()
    assert raised.value.exit_code == 3
    Path(f"{file}.lock").mkdir()
    with pytest.raises(UsageError, match="name a path that you may write to"):
        known_decontamination(SearchSettings(), [path], str(folder))


KEYS = """
import sys
from pathlib import Path
from megatron_ledom import _helpers
from megatron_ledom.contamination.settings import SearchSettings
from megatron_ledom.evaluation import known_items
known_items.stored_decontamination = lambda folder, key, settings, read: key
def key(): return known_items.known_decontamination(SearchSettings(), [sys.argv[1]], "unused")
package = Path(known_items.__file__).parents[1]
keys = {key()}
for name in [Path(_helpers.__file__).name, *sys.argv[2:]]:
    with open(package / name, "ab") as file:
        file.write(b"#")
    assert key() not in keys, name
    keys.add(key())
"""
CODE = (
    *(
        f"contamination/{name}.py"
        for name in ("item_index", "item_table", "items", "normalization", "settings", "stored_index")
    ),
    *(f"evaluation/tasks/{name}.py" for name in ("benchmarks", "loading", "prompts", "task")),
    *("evaluation/known_items.py", "evaluation/code/execution.py"),
)


def test_an_edit_of_any_code_that_makes_an_index_gives_another_key(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "megatron_ledom", tmp_path / "megatron_ledom", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", KEYS, own_items(tmp_path), *CODE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def open_key(path: str) -> str:
    """Return the key of the index of a file of items, as its header has it."""
    (file,) = (Path(path).parent / "index").iterdir()
    header = file.read_bytes()[32:]
    return str(json.JSONDecoder().raw_decode(header.decode("latin-1"))[0]["key"])


BUILD = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s")
from megatron_ledom.contamination.settings import SearchSettings
from megatron_ledom.evaluation.known_items import known_decontamination
print(known_decontamination(SearchSettings(), [sys.argv[1]], sys.argv[2]).items_sha256)
"""


def test_processes_that_start_together_build_once(tmp_path: Path) -> None:
    path, folder = own_items(tmp_path), tmp_path / "index"
    command = [sys.executable, "-c", BUILD, path, str(folder)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate() for process in started]
    assert len({output for output, _ in outputs}) == 1
    assert sum(log.count(" built in ") for _, log in outputs) == 1
    assert sum(log.count(": stored index of 24 items") for _, log in outputs) == 3
    assert [entry.suffix for entry in folder.iterdir()] == [".items"]


def test_a_killed_builder_leaves_nothing_that_is_used(tmp_path: Path) -> None:
    path, folder = own_items(tmp_path), tmp_path / "index"
    kill = "import os, signal; os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)\n"
    assert subprocess.run([sys.executable, "-c", kill + BUILD, path, str(folder)], capture_output=True).returncode == -9
    assert not list(folder.glob("*.items"))
    known_decontamination(SearchSettings(), [path], str(folder))
    assert [entry.suffix for entry in folder.iterdir()] == [".items"]


def test_a_folder_that_cannot_be_made_and_a_torn_text_are_named(tmp_path: Path) -> None:
    path = own_items(tmp_path)
    with pytest.raises(UsageError, match=r"--index-folder .*own\.jsonl/x cannot be made"):
        known_decontamination(SearchSettings(), [path], f"{path}/x")
    with pytest.raises(DataError, match="item 3 of s has half of a surrogate pair"):
        ItemTable.of([EvaluationItem(set="s", number=3, question="\ud800")])


def test_a_table_of_items_gives_them_back() -> None:
    items = [
        EvaluationItem(set="b", number=0, question="é", answer="", choices=("", "two")),
        EvaluationItem(set="a", number=7, question="", answer="one"),
        EvaluationItem(set="b", number=1, question="\0x"),
    ]
    table = ItemTable.of(items)
    assert (list(table), table[-1], table[1:], len(table), table.sets) == (items, items[2], items[1:], 3, ["b", "a"])
    with pytest.raises(IndexError):
        table[3]
    assert list(ItemTable.of([])) == []
    assert asdict(table[0]) == asdict(items[0])


def test_both_commands_take_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = own_items(tmp_path), tmp_path / "index"
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": json.loads(Path(path).read_text().split("\n")[5])["question"]}) + "\n"
    )
    command = ["--input", tmp_path / "a.jsonl", "--items", path, "--workers", 1, "--telling-words", 0]
    for name in ("first", "second"):
        assert run_tool(monkeypatch, "decontaminate", *command, "--output", tmp_path / name, "--index-folder", folder) == 0
    assert run_tool(monkeypatch, "decontaminate", *command, "--output", tmp_path / "plain") == 0
    reports = {(tmp_path / name / "contamination.json").read_text() for name in ("first", "second", "plain")}
    assert len(reports) == 1
    assert len(os.listdir(folder)) == 1
    capsys.readouterr()
    preprocess = [
        "--input",
        tmp_path / "a.jsonl",
        "--tokenizer",
        "none",
        "--output-prefix",
        tmp_path / "p",
        "--index-folder",
        folder,
    ]
    assert run_tool(monkeypatch, "preprocess_data", *preprocess) == 2
    assert "need --decontaminate PATH" in capsys.readouterr().err
