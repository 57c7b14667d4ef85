"""Two hundred sources of odd kinds in one recipe, and builds that are killed at random moments."""

import gzip
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_ledom.corpus.build import BuildSettings, build
from megatron_ledom.corpus.listing import list_sources, lock_path, write_listing
from megatron_ledom.corpus.recipe import load_recipe
from megatron_ledom.data.shards.shard import check_shard
from megatron_ledom.data.shards.verification import verify_shard
from megatron_ledom.errors import VerificationError
from tests.support.corpus_recipes import source, write_recipe
from tests.support.legible import legible_documents, write_jsonl

NUM_SOURCES = 200
DOCUMENTS = legible_documents(5, 8)
LINES = b"".join(json.dumps({"text": text, "meta": {"id": 1}}).encode() + b"\n" for text in DOCUMENTS)
NUM_KILLS = 3


def nested_table(path: Path) -> None:
    rows = [{"doc": {"body": text, "tags": [{"name": "a"}]}, "other": None} for text in DOCUMENTS]
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_odd_source(folder: Path, number: int) -> tuple[dict[str, Any], int | None]:
    """Write the files of a source of one of ten kinds. Return its keys and its number of documents; None if it must fail."""
    folder.mkdir()
    keys: dict[str, Any] = {}
    expected: int | None = 5
    match number % 10:
        case 0:
            (folder / "a.jsonl.zst").write_bytes(zstandard.compress(LINES))
        case 1:
            nested_table(folder / "a.parquet")
            keys["text_key"] = "doc.body"
        case 2:
            (folder / "empty.jsonl").touch()
            (folder / "full.jsonl").write_bytes(LINES)
        case 3:
            (folder / "empty.jsonl").touch()
            expected = None
        case 4:
            (folder / "vanishes.jsonl").write_bytes(LINES)
            (folder / "stays.jsonl").write_bytes(LINES)
            expected = None
        case 5:
            (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + LINES.rstrip(b"\n"))
        case 6:
            (folder / "a.jsonl.gz").write_bytes(gzip.compress(LINES) + gzip.compress(LINES))
            expected = 10
        case 7:
            (folder / "bad.jsonl").write_bytes(LINES + b'{"text": 3}\n{"tex\n')
            keys["filters"] = {"on_error": "skip"}
        case 8:
            for index, text in enumerate(DOCUMENTS):
                (folder / f"deep/{index}").mkdir(parents=True)
                (folder / f"deep/{index}/[ {index}] ö.txt").write_text(text, encoding="utf-8")
            keys["files"] = ["**/*.txt"]
        case 9:
            pq.write_table(pa.Table.from_pylist([{"q": text, "a": "7"} for text in DOCUMENTS]), folder / "a.parquet")
            keys["text_template"] = "{q}\n{a}"
    return keys, expected


def test_two_hundred_odd_sources_are_built_or_named(tmp_path: Path, tokenizer: str) -> None:
    sources, expected = {}, {}
    for number in range(NUM_SOURCES):
        name = f"s{number:03d}"
        keys, expected[name] = write_odd_source(tmp_path / name, number)
        sources[name] = source(str(tmp_path / name), **{"files": ["*.*"], **keys})
    recipe = write_recipe(tmp_path / "recipe.yaml", tokenizer, sources)
    loaded = load_recipe(recipe)
    write_listing(list_sources(loaded, list(sources), {}), lock_path(recipe), "--write-listing")
    for path in tmp_path.glob("*/vanishes.jsonl"):
        path.unlink()
    with pytest.raises(VerificationError) as raised:
        build(BuildSettings(recipe=recipe, workers=1))
    failed = [name for name in sources if expected[name] is None]
    assert f"{len(failed)} of {NUM_SOURCES} sources failed ({', '.join(failed)})" in str(raised.value)
    for name, number in expected.items():
        if number is None:
            assert not (tmp_path / f"out/{name}.json").exists()
        else:
            assert check_shard(str(tmp_path / f"out/{name}")).num_documents == number, name
    assert not list((tmp_path / "out").glob("*.work"))
    vanished, empty = "s004", "s003"
    (tmp_path / vanished / "vanishes.jsonl").write_bytes(LINES)
    (tmp_path / empty / "empty.jsonl").write_bytes(LINES)
    write_listing(list_sources(loaded, list(sources), {}), lock_path(recipe), "--write-listing")
    made = build(BuildSettings(recipe=recipe, source=[vanished, empty], workers=1))
    assert {name: manifests[0].num_documents for name, manifests in made.items()} == {vanished: 10, empty: 5}


RUN = "import sys; from megatron_ledom.cli.main import main; sys.argv = ['ledom', *sys.argv[1:]]; main()"


def start(recipe: str, output: Path) -> "subprocess.Popen[bytes]":
    """Start a build in a process of its own."""
    command = [sys.executable, "-c", RUN, "corpus", "build", recipe, "--set", f"output={output}", "--workers", "2"]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def test_a_build_killed_at_random_moments_ends_with_the_same_bytes(tmp_path: Path, tokenizer: str) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        for number in range(3):
            write_jsonl(tmp_path / f"{name}/{number}.jsonl", legible_documents(9, 80 + number) * 300)
    sources = {name: source(str(tmp_path / name), ["*.jsonl"]) for name in ("a", "b", "c")}
    recipe = write_recipe(tmp_path / "recipe.yaml", tokenizer, sources, filters={"deduplicate": False})
    before = time.monotonic()
    assert start(recipe, tmp_path / "quiet").wait(timeout=120) == 0
    seconds = time.monotonic() - before
    seed = random.randrange(1 << 32)
    print(f"kills by random.Random({seed})")
    moments, killed = random.Random(seed), 0
    while killed < NUM_KILLS:
        process = start(recipe, tmp_path / "killed")
        time.sleep(moments.uniform(0.3, 1.0) * seconds)
        process.kill()
        killed += 1
        if process.wait(timeout=60) == 0:
            break
        assert process.returncode == -signal.SIGKILL
    assert start(recipe, tmp_path / "killed").wait(timeout=120) == 0
    for name in sources:
        for ending in (".bin", ".idx"):
            assert (tmp_path / f"killed/{name}{ending}").read_bytes() == (tmp_path / f"quiet/{name}{ending}").read_bytes()
        assert not verify_shard(str(tmp_path / f"killed/{name}"))
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {
        f"{name}{ending}" for name in sources for ending in (".bin", ".idx", ".json")
    }
