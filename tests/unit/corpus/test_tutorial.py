"""The recipe of local files in docs/tutorials/corpus_recipe.md, and the tables of keys in docs/reference/file_formats.md."""

import gzip
import json
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.cli.main import run
from megatron_ledom.corpus.recipe import Estimates, Expected, Filters, Recipe, Source
from megatron_ledom.data.shards.shard import check_shard
from tests.support.corpus_recipes import tutorial_file
from tests.support.paths import ROOT
from tests.support.source_texts import FILES

TABLES = {"Recipe": Recipe, "Source": Source, "Filter": Filters, "Expected": Expected, "Estimate": Estimates}
"""Heading of a table of keys -> the dataclass."""
QUESTION = "How many minutes does a train need for nine miles at three miles a minute?"


def test_the_recipe_of_local_files_makes_shards_without_the_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(tutorial_file("name: mine"), encoding="utf-8")
    texts = [text[:4000] for text in FILES]
    for folder in ("text/manuals/python", "text/web"):
        Path(folder).mkdir(parents=True)
    manuals, web = ([json.dumps({"text": text}) for text in part] for part in (texts[:20], texts[20:]))
    web += [json.dumps({"text": f"A page. {QUESTION} The answer is three."}), web[0], "no JSON"]
    Path("text/manuals/python/all.jsonl").write_text("\n".join(manuals), encoding="utf-8")
    Path("text/web/0.jsonl.gz").write_bytes(gzip.compress("\n".join(web).encode()))
    Path("own_questions.jsonl").write_text(json.dumps({"question": QUESTION}) + "\n", encoding="utf-8")
    run(["corpus", "plan", "mine.yaml"])
    assert re.search(r"^all +2 ", capsys.readouterr().out, re.MULTILINE)
    changes = ["--set", "tokenizer_vocab_size=500", "--set", "sources.web.tokens=1000"]
    assert not run(["corpus", "make", "mine.yaml", *changes, "--workers", "1"])
    skipped = check_shard("corpus/mine/web").skipped
    assert {key: count for key, count in skipped.items() if count} == {"contaminated": 1, "duplicate": 1, "malformed_json": 1}
    assert check_shard("corpus/mine/manuals").num_documents == 20
    assert "contaminated" in Path("corpus/mine/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", TABLES)
def test_every_key_of_a_recipe_is_in_the_reference_with_its_default(name: str) -> None:
    page = (ROOT / "docs/reference/file_formats.md").read_text(encoding="utf-8")
    [section] = re.findall(rf"^### {name} keys\n(.*?)^##", page, re.MULTILINE | re.DOTALL)
    rows = {key: default.strip("`") for key, default in re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section, re.MULTILINE)}
    assert rows == {field.name: shown_default(field.name, field) for field in fields(TABLES[name])}


def shown_default(name: str, field: Any) -> str:
    """Return the default of a key as the tables show it."""
    if field.default_factory is not MISSING:
        return "below" if name == "estimates" else "none"
    if field.default is MISSING:
        return "required"
    return {None: "null", "": "empty"}.get(field.default, str(field.default))
