"""`ledom decontaminate`: report, new files in the same format, and the same result after a kill or with other workers."""

import bz2
import gzip
import json
import lzma
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_ledom.contamination.items import EvaluationItem
from megatron_ledom.contamination.search import Decontamination
from megatron_ledom.contamination.settings import Action, SearchSettings
from megatron_ledom.data.decontaminate.command import DecontaminateSettings, decontaminate
from megatron_ledom.errors import DataError, UsageError
from tests.support.legible import legible_documents
from tests.support.tool_runs import run_tool

PAGES = legible_documents(9, 99)
ITEM = EvaluationItem(set="own", number=0, question=PAGES[4][120:200], answer=PAGES[7])
CONTAMINATED = [4, 7]
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
UNPACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.decompress,
    ".zst": lambda content: zstandard.ZstdDecompressor().decompressobj().decompress(content),
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}
RUN = """
import json, os, signal, sys
from megatron_ledom.contamination.items import EvaluationItem
from megatron_ledom.contamination.search import Decontamination
from megatron_ledom.contamination.settings import SearchSettings
from megatron_ledom.data.decontaminate.command import DecontaminateSettings, decontaminate
given, die_at = json.loads(sys.argv[1]), int(sys.argv[2])
parent, calls, rename = os.getpid(), [], os.replace
def replace(*names):
    calls.append(names)
    if len(calls) == die_at and os.getpid() != parent:
        os.kill(parent, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(*names)
os.replace = replace
items = [EvaluationItem(**item) for item in given.pop("items")]
search = Decontamination(SearchSettings(action=given.pop("action"), telling_words=0), items)
decontaminate(DecontaminateSettings(**given, decontamination=search))
"""


def settings(folder: Path, name: str, action: Action = "drop", **changes: Any) -> DecontaminateSettings:
    given = {"input": [f"{folder}/in"], "output": f"{folder}/{name}", "workers": 2}
    search = Decontamination(SearchSettings(action=action, telling_words=0), changes.pop("items", [ITEM]))
    return DecontaminateSettings(**{**given, **changes}, decontamination=search)


def line(number: int) -> bytes:
    return b'{"id": %d,  "text":"%s", "score": 1.50}' % (number, PAGES[number].encode())


def write_inputs(folder: Path, ending: str = "", files: int = 1) -> list[bytes]:
    lines = [line(number) for number in range(9)]
    for file in range(files):
        path = folder / f"in/{'sub/' * (file % 2)}{file}.jsonl{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PACK[ending](b"".join(one + b"\n" for one in lines)))
    return lines


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("ending", PACK)
def test_untouched_lines_stay_byte_for_byte_in_every_compression(tmp_path: Path, ending: str) -> None:
    lines = write_inputs(tmp_path, ending)
    report = decontaminate(settings(tmp_path, "out"))
    written = UNPACK[ending]((tmp_path / f"out/0.jsonl{ending}").read_bytes())
    assert written.splitlines() == [one for number, one in enumerate(lines) if number not in CONTAMINATED]
    assert report["documents"] == {"searched": 9, "contaminated": 2, "pieces_of_cut_documents": 0}
    assert report["sets"] == {"own": {"items": 1, "searched": 1, "touched": 1, "question": 1, "answer": 1, "both": 0}}
    assert [example["where"] for example in report["items"][0]["examples"]] == [
        f"{tmp_path}/in/0.jsonl{ending}:5",
        f"{tmp_path}/in/0.jsonl{ending}:8",
    ]
    assert json.loads((tmp_path / "out/contamination.json").read_text()) == report


def test_a_cut_document_becomes_its_pieces_with_its_other_fields(tmp_path: Path) -> None:
    text = f"{PAGES[1]} {PAGES[2]} {PAGES[4]} {PAGES[5]} {PAGES[6]}"
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.jsonl").write_text(json.dumps({"meta": {"text": text}, "id": 7}) + "\n")
    report = decontaminate(settings(tmp_path, "out", "cut", text_key="meta.text"))
    records = [json.loads(one) for one in (tmp_path / "out/0.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == [7, 7]
    assert report["documents"]["pieces_of_cut_documents"] == 2
    assert all(record["meta"]["text"] in text and ITEM.question not in record["meta"]["text"] for record in records)


def test_parquet_rows_keep_their_columns_schema_and_compression(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    text = f"{PAGES[1]} {PAGES[2]} {PAGES[4]} {PAGES[5]} {PAGES[6]}"
    rows = pa.table(
        {"id": pa.array(range(4), pa.int16()), "text": pa.array([PAGES[0], PAGES[7], text, PAGES[3]], pa.large_string())}
    )
    pq.write_table(rows, tmp_path / "in/a.parquet", compression="zstd", row_group_size=2)
    decontaminate(settings(tmp_path, "dropped"))
    dropped = pq.read_table(tmp_path / "dropped/a.parquet")
    assert dropped.schema == rows.schema
    assert dropped.to_pydict() == {"id": [0, 3], "text": [PAGES[0], PAGES[3]]}
    assert pq.ParquetFile(tmp_path / "dropped/a.parquet").metadata.row_group(0).column(1).compression == "ZSTD"
    decontaminate(settings(tmp_path, "cut", "cut"))
    assert pq.read_table(tmp_path / "cut/a.parquet").column("id").to_pylist() == [0, 2, 2, 3]


def test_a_report_writes_no_files_and_reads_formats_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text(PAGES[7])
    report = decontaminate(settings(tmp_path, "out", "report"))
    assert report["documents"]["contaminated"] == 1
    assert [*tree(tmp_path / "out")] == ["contamination.json"]
    with pytest.raises(UsageError, match=r"a\.txt is not one; use --action report"):
        decontaminate(settings(tmp_path, "new", "drop"))


@pytest.mark.parametrize("action", ["report", "drop"])
def test_the_number_of_workers_does_not_change_a_byte(tmp_path: Path, action: Action) -> None:
    write_inputs(tmp_path, files=5)
    for name, workers in (("one", 1), ("three", 3)):
        decontaminate(settings(tmp_path, name, action, workers=workers, part_bytes=700))
    assert tree(tmp_path / "one") == tree(tmp_path / "three")


@pytest.mark.parametrize("die_at", [2, 3, 4, 5, 7])
def test_a_killed_command_resumes_and_ends_with_the_same_files(tmp_path: Path, die_at: int) -> None:
    write_inputs(tmp_path, files=3)
    decontaminate(settings(tmp_path, "quiet"))
    given = {"input": [f"{tmp_path}/in"], "output": f"{tmp_path}/out", "workers": 1, "action": "drop"}
    item = {"set": "own", "number": 0, "question": ITEM.question, "answer": ITEM.answer}
    command = [sys.executable, "-c", RUN, json.dumps({**given, "items": [item]})]
    assert subprocess.run([*command, str(die_at)], check=False, timeout=60).returncode == -signal.SIGKILL
    assert not (tmp_path / "out/contamination.json").exists()
    again = subprocess.run([*command, "0"], check=False, timeout=60, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert tree(tmp_path / "out") == tree(tmp_path / "quiet")


def test_unfinished_and_finished_work_of_other_items_is_refused(tmp_path: Path) -> None:
    write_inputs(tmp_path, files=2)
    (tmp_path / "in/z.jsonl").write_bytes(line(0) + b"\n{\n")
    with pytest.raises(DataError, match=r"z\.jsonl:2: malformed JSON"):
        decontaminate(settings(tmp_path, "out", workers=1))
    other = [EvaluationItem(set="own", number=0, question=PAGES[3])]
    with pytest.raises(
        UsageError, match=r"unfinished work .* was made with different settings \(decontamination\.items_sha256"
    ):
        decontaminate(settings(tmp_path, "out", workers=1, items=other))
    (tmp_path / "in/z.jsonl").unlink()
    decontaminate(settings(tmp_path, "out", overwrite=True))
    before = tree(tmp_path / "out")
    decontaminate(settings(tmp_path, "out"))
    with pytest.raises(UsageError, match=r"contamination\.json was made from other inputs, items or options"):
        decontaminate(settings(tmp_path, "out", items=other))
    assert tree(tmp_path / "out") == before
    decontaminate(settings(tmp_path, "out", items=other, overwrite=True))
    assert tree(tmp_path / "out") != before


def test_files_of_others_and_inputs_are_never_overwritten(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/0.jsonl").write_text("mine")
    with pytest.raises(UsageError, match=r"out/0\.jsonl exists; name another --output"):
        decontaminate(settings(tmp_path, "out"))
    with pytest.raises(UsageError, match=r"would replace the input .*0\.jsonl; name another folder"):
        decontaminate(settings(tmp_path, "in", overwrite=True))
    assert (tmp_path / "out/0.jsonl").read_text() == "mine"


def test_no_new_file_replaces_an_input_the_report_or_another_new_file(tmp_path: Path) -> None:
    write_inputs(tmp_path, files=2)  # in/0.jsonl, in/sub/1.jsonl
    (tmp_path / "in/1.jsonl").write_bytes(line(0) + b"\n")
    before = tree(tmp_path / "in")
    with pytest.raises(UsageError, match=r"new file of .*in/1\.jsonl would replace the input .*in/sub/1\.jsonl"):
        decontaminate(settings(tmp_path, "in/sub", overwrite=True))
    assert tree(tmp_path / "in") == before
    (tmp_path / "in/contamination.json").write_bytes(line(0) + b"\n")
    with pytest.raises(UsageError, match="would replace the report"):
        decontaminate(settings(tmp_path, "out", input=[f"{tmp_path}/in/contamination.json"]))


def test_a_link_keeps_its_own_name(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    (tmp_path / "links").mkdir()
    (tmp_path / "in/0.jsonl").rename(tmp_path / "in/4f2a")
    (tmp_path / "links/train.jsonl").symlink_to("../in/4f2a")
    decontaminate(settings(tmp_path, "out", input=[f"{tmp_path}/links"]))
    assert set(tree(tmp_path / "out")) == {"train.jsonl", "contamination.json"}


def test_a_new_file_that_is_lost_is_written_again_or_named(tmp_path: Path) -> None:
    write_inputs(tmp_path, files=2)
    (tmp_path / "in/z.jsonl").write_bytes(line(0) + b"\n{\n")
    with pytest.raises(DataError, match="malformed JSON"):
        decontaminate(settings(tmp_path, "out", workers=1))
    (tmp_path / "out/0.jsonl").unlink()
    (tmp_path / "out/sub/1.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match="malformed JSON"):
        decontaminate(settings(tmp_path, "out", workers=1))
    assert {len(tree(tmp_path / "out")[name].splitlines()) for name in ("0.jsonl", "sub/1.jsonl")} == {7}
    (tmp_path / "in/z.jsonl").unlink()
    decontaminate(settings(tmp_path, "out", overwrite=True))
    (tmp_path / "out/0.jsonl").unlink()
    with pytest.raises(UsageError, match=r"0\.jsonl, which is missing; bring it back"):
        decontaminate(settings(tmp_path, "out"))


def test_files_of_an_earlier_corpus_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_inputs(tmp_path, files=2)
    decontaminate(settings(tmp_path, "out"))
    assert "did not write" not in caplog.text
    (tmp_path / "in/0.jsonl").rename(tmp_path / "in/new.jsonl")
    decontaminate(settings(tmp_path, "out", overwrite=True))
    assert "has 1 files that this command did not write, such as" in caplog.text
    assert "out/0.jsonl" in caplog.text


def test_a_search_of_nothing_is_an_error(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    with pytest.raises(DataError, match=r"found no document in 1 input files .*check --text-key txt"):
        decontaminate(settings(tmp_path, "out", text_key="txt", on_error="skip", check=True))
    assert not (tmp_path / "out/contamination.json").exists()
    short = [EvaluationItem(set="own", number=0, question="Two words")]
    with pytest.raises(UsageError, match="none of the 1 items has 8 words"):
        decontaminate(settings(tmp_path, "new", items=short))


def test_other_fields_of_a_cut_line_keep_their_values(tmp_path: Path) -> None:
    text = f"{PAGES[1]} {PAGES[2]} {PAGES[4]} {PAGES[5]} {PAGES[6]}"
    fields = [
        b'"id": 123456789012345678901234567890',
        b'"x": NaN',
        b'"x": "\\ud800"',
        b'"x": "\xff"',
        b'"x": ' + b"[" * 1500 + b"]" * 1500,
    ]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.jsonl").write_bytes(b"".join(b'{"text": "%s", %s}\n' % (text.encode(), other) for other in fields))
    with pytest.raises(DataError, match=r"0\.jsonl:5: it nests too deep"):
        decontaminate(settings(tmp_path, "out", "cut"))
    report = decontaminate(settings(tmp_path, "skipped", "cut", on_error="skip"))
    assert report["skipped"] == {"malformed_json": 1}
    written = (tmp_path / "skipped/0.jsonl").read_bytes().splitlines()
    assert len(written) == 8
    for one, value in zip(written[::2], (b"123456789012345678901234567890", b"NaN", b'"\\ud800"', b'"\\udcff"'), strict=True):
        assert one.endswith(b":" + value + b"}")


def test_many_items_with_one_phrase_do_not_slow_the_search(tmp_path: Path) -> None:
    phrase = "Answer the following multiple choice question by giving the letter of the right answer. "
    items = [EvaluationItem(set="own", number=n, question=f"{phrase} {PAGES[n % 9]} {n}") for n in range(300)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.jsonl").write_text(json.dumps({"text": phrase * 3000 + PAGES[8]}) + "\n")
    report = decontaminate(settings(tmp_path, "out", "report", items=items))
    assert report["documents"]["contaminated"] == 1
    assert {item["item"] % 9 for item in report["items"]} == {8}


def test_bad_records_are_named_or_counted(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    with (tmp_path / "in/0.jsonl").open("ab") as file:
        file.write(b'{"id": 3}\n')
    with pytest.raises(DataError, match=r"0\.jsonl:10: no key 'text'"):
        decontaminate(settings(tmp_path, "out"))
    report = decontaminate(settings(tmp_path, "out", on_error="skip", overwrite=True))
    assert report["skipped"] == {"missing_text_key": 1}
    assert len((tmp_path / "out/0.jsonl").read_bytes().splitlines()) == 7


def test_exit_codes_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_inputs(tmp_path)
    items = tmp_path / "own.jsonl"
    items.write_text(json.dumps({"question": ITEM.question, "answer": ITEM.answer}) + "\n")
    command = [
        "--input",
        f"{tmp_path}/in",
        "--items",
        items,
        "--output",
        f"{tmp_path}/out",
        "--workers",
        1,
        "--telling-words",
        0,
    ]
    assert run_tool(monkeypatch, "decontaminate", *command) == 0
    assert "2 of 9 documents are contaminated" in capsys.readouterr().out
    assert run_tool(monkeypatch, "decontaminate", *command, "--check") == 1
    assert "2 documents have evaluation items" in capsys.readouterr().err
    assert run_tool(monkeypatch, "decontaminate", *command, "--threshold", "2") == 2
    assert run_tool(monkeypatch, "decontaminate", *command, "--ngram", "13") == 2
    assert os.listdir(tmp_path / "out") == ["contamination.json"]
