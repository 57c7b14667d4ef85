"""examples/corpus/clean with the real datatrove: what goes, that every document goes once, and resuming after a kill.

`make install-datatrove` installs datatrove into a folder of the environment; without it these tests are skipped.
"""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_ledom.errors import UsageError
from megatron_ledom.storage.locks import output_folder_lock
from tests.support.paths import ROOT
from tests.support.planted_pages import FRENCH, JUNK, NEAR_DUPLICATES, page

FOLDER = Path(os.environ.get("DATATROVE", Path(sys.prefix) / "datatrove"))
SCRIPT = ROOT / "examples/corpus/clean/clean.py"
SURE = ("exact copy", "other case and white space", "1 % other words", "other paragraph order")
"""Kinds of near-duplicates that MinHash finds with a probability of nearly 1 at the length of these pages."""
pytestmark = pytest.mark.skipif(not (FOLDER / "datatrove").is_dir(), reason=f"{FOLDER} is absent: make install-datatrove")


def command(output: Path, *inputs: Path, options: tuple[str, ...] = ()) -> list[str]:
    """Return the command line that cleans some files."""
    return [sys.executable, str(SCRIPT), "--input", *map(str, inputs), "--output", str(output), "--workers", "1", *options]


def environment() -> dict[str, str]:
    """Return the environment in which datatrove is found."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(FOLDER)]), "OMP_NUM_THREADS": "1"}


def cleaned(output: Path, *inputs: Path, options: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
    """Clean some files."""
    return subprocess.run(
        command(output, *inputs, options=options), env=environment(), capture_output=True, text=True, check=False
    )


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """Return the documents below a folder, file by file."""
    return [json.loads(line) for path in sorted(folder.rglob("*.gz")) for line in gzip.open(path)]


def write_corpus(folder: Path) -> dict[str, Path]:
    """Write a corpus in four formats: 60 pages, copies of 8 of them, junk, a French page, and two pages without an id."""
    chance = random.Random(7)
    pages = [{"id": f"page/{number}", "text": page(number), "source": "web"} for number in range(60)]
    kinds = [(kind, number) for number, kind in enumerate([*SURE, *SURE])]
    copies = [
        {"id": f"copy/{number}", "text": NEAR_DUPLICATES[kind](page(number), chance), "of": number, "kind": kind}
        for kind, number in kinds
    ]
    junk = [{"id": f"junk/{kind}", "text": make(chance), "url": None} for kind, make in JUNK.items()]
    french = {"id": "french", "text": FRENCH * 8, "tags": ["a", "b"]}
    paths = {name: folder / f"part_{name}" for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.txt")}
    paths["a.jsonl"].write_text("".join(json.dumps(document) + "\n" for document in [*pages[:30], *junk, french]))
    with gzip.open(paths["b.jsonl.gz"], "wt") as file:
        file.writelines(json.dumps(document) + "\n" for document in [*copies, {"text": page(1000), "source": "book"}])
    pq.write_table(pa.Table.from_pylist(pages[30:]), paths["c.parquet"])
    paths["d.txt"].write_text(page(2000))
    return paths


OPTIONS = ("--tasks", "4", "--domain-key", "source", "--keep-languages", "en")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the files of a corpus, and as `out` the folder with the cleaned one."""
    folder = tmp_path_factory.mktemp("corpus")
    paths = write_corpus(folder)
    done = cleaned(folder / "out", *paths.values(), options=OPTIONS)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((folder / "out/report.json").read_text())
    return paths | {"out": folder / "out"}


def test_junk_and_near_duplicates_go_and_every_document_is_kept_or_dropped_once(corpus: dict[str, Path]) -> None:
    paths, output = corpus, corpus["out"]
    report = json.loads((output / "report.json").read_text())
    kept, dropped = lines_of(output / "documents"), lines_of(output / "dropped")

    num_documents = 60 + 8 + len(JUNK) + 1 + 2
    assert (report["documents_in"], report["documents_out"]) == (num_documents, len(kept)) == (num_documents, 62)
    assert len(dropped) == num_documents - 62
    assert report["languages"] == {"en": 62}
    assert report["domains"] == Counter(document.get("source", "unknown") for document in kept)
    assert report["removed"] == Counter(document["removed_because"] for document in dropped)
    ids = [document["id"] for document in [*kept, *dropped]]
    assert len(set(ids)) == num_documents

    reasons = {document["id"]: document["removed_because"] for document in dropped}
    assert {name for name in reasons if name.startswith("junk/")} == {f"junk/{kind}" for kind in JUNK}
    assert reasons["french"] == "language"
    assert reasons["junk/empty"] == "empty"
    assert reasons["junk/one paragraph ten times"].startswith("gopher_repetition/dup")
    assert reasons["junk/lorem ipsum"] == "c4/lorem_ipsum"
    duplicates = {name for name, reason in reasons.items() if reason == "near_duplicate"}
    assert len(duplicates) == 8
    for number in range(8):
        assert len(duplicates & {f"copy/{number}", f"page/{number}"}) == 1

    of_input = {document["id"]: document for document in (json.loads(line) for line in paths["a.jsonl"].open())}
    for document in kept:
        document["text"] = " ".join(document["text"].split())  # C4's filter joins the lines again, without blank ones
        if (before := of_input.get(document["id"])) is not None:
            assert before | {"text": " ".join(before["text"].split())} == {name: document[name] for name in before}
    pages = [int(document["id"].split("/")[1]) for document in kept if document["id"].startswith("page/")]
    assert pages == sorted(pages), "the order of the input"
    assert {document["text"] for document in kept} >= {" ".join(page(number).split()) for number in (8, 30, 59, 1000, 2000)}


def test_a_killed_cleaning_resumes_and_a_lost_document_is_refused(corpus: dict[str, Path], tmp_path: Path) -> None:
    """Kills it in its first step, stops it before its last step, takes a document away, brings it back, and compares the results."""
    inputs, whole = [path for name, path in corpus.items() if name != "out"], corpus["out"]
    output = tmp_path / "killed"
    work = output / "work"
    with subprocess.Popen(command(output, *inputs, options=OPTIONS), env=environment(), stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (work / "logs/filters").exists():
            time.sleep(0.01)
        with pytest.raises(UsageError, match="killed"), output_folder_lock(output):
            pass
        process.send_signal(signal.SIGKILL)
    assert not (output / "report.json").exists()
    others = cleaned(output, *inputs, options=("--tasks", "5"))
    assert (others.returncode, "tasks was 4 and is 5" in others.stderr) == (2, True)

    (work / "counts").write_text("in the way of the last step")
    stopped = cleaned(output, *inputs, options=OPTIONS)
    assert stopped.returncode == 1, stopped.stderr
    (work / "counts").unlink()
    documents = sorted((work / "documents").iterdir())
    content = documents[-1].read_bytes()
    documents[-1].write_bytes(gzip.compress(b"".join(gzip.decompress(content).splitlines(keepends=True)[:-1])))
    refused = cleaned(output, *inputs, options=OPTIONS)
    assert (refused.returncode, "filters: 4 tasks, 4 of them finished before" in refused.stderr) == (1, True)
    assert "83 documents were read, and 82 are in" in refused.stderr
    assert not (output / "report.json").exists()

    documents[-1].write_bytes(content)
    for path in (work / "logs/count").rglob("completions/*"):
        path.unlink()
    resumed = cleaned(output, *inputs, options=OPTIONS)
    assert resumed.returncode == 0, resumed.stderr
    assert (output / "report.json").read_bytes() == (whole / "report.json").read_bytes()
    for name in ("documents", "dropped"):
        assert lines_of(output / name) == lines_of(whole / name)
    assert not work.exists()
