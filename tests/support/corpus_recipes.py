"""Recipes of a corpus for tests: legible documents in a folder, and the YAML that names them."""

import re
from pathlib import Path
from typing import Any

import yaml

from tests.support.legible import legible_documents, write_jsonl
from tests.support.paths import ROOT

TUTORIAL = ROOT / "docs/tutorials/corpus_recipe.md"

TUTORIAL_COMMANDS = {
    "ledom corpus plan examples/corpus/small.yaml": "tests/unit/corpus/test_small_recipe.py",
    "ledom corpus make examples/corpus/small.yaml": "tests/unit/corpus/test_small_recipe.py",
    "ledom train --config run_small.yaml": "tests/unit/corpus/test_small_recipe.py",
    "ledom corpus plan mine.yaml": "tests/unit/corpus/test_tutorial.py",
    "ledom corpus make mine.yaml": "tests/unit/corpus/test_tutorial.py",
    "ledom corpus pin examples/corpus/ledom_435b.yaml": "tests/unit/corpus/test_hub.py",
    "ledom corpus plan examples/corpus/ledom_435b.yaml --listing examples/corpus/ledom_435b.listing.json": "tests/unit/corpus/test_plan.py",
    "bash examples/slurm/corpus.sbatch": "tests/unit/examples/test_slurm_scripts.py",
    "ledom corpus blend examples/corpus/small.yaml --output corpus/small/blend.yaml": "tests/unit/corpus/test_blend.py",
    "ledom corpus card examples/corpus/small.yaml": "tests/unit/corpus/test_card.py",
    "ledom corpus publish examples/corpus/small.yaml --to published/small --yes": "tests/unit/corpus/test_card.py",
}
"""Command of docs/tutorials/corpus_recipe.md -> the test that runs the same or a similar command."""


def tutorial_file(first_line: str) -> str:
    """Return the file that a text block of the tutorial shows, by its first line."""
    blocks = re.findall(r"```text\n(.*?)```", TUTORIAL.read_text(encoding="utf-8"), re.DOTALL)
    [found] = [block for block in blocks if block.startswith(f"{first_line}\n")]
    return str(found)


def source(address: str, files: list[str], **keys: Any) -> dict[str, Any]:
    """Return the keys of a source."""
    known = {"licence": "CC0-1.0", "terms": "none", "domain": "general", "origin": "ours"}
    return {"address": address, "files": files, **known, **keys}


def write_recipe(path: Path, tokenizer: str, sources: dict[str, Any], **keys: Any) -> str:
    """Write a recipe whose output is the folder `out` beside it, and return its path."""
    values = {"name": "test", "output": str(path.parent / "out"), "tokenizer": tokenizer, "sources": sources, **keys}
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return str(path)


def two_sources(folder: Path, tokenizer: str, **keys: Any) -> str:
    """Write two sources, web of 30 documents in 3 files and code of 10 in one, and their recipe; return its path."""
    (folder / "web").mkdir(parents=True)
    (folder / "code").mkdir()
    for number in range(3):
        write_jsonl(folder / f"web/{number}.jsonl", legible_documents(10, 5 + number))
    write_jsonl(folder / "code/all.jsonl", legible_documents(10, 9))
    sources = {
        "web": source(str(folder / "web"), ["*.jsonl"], tokens=120),
        "code": source(str(folder / "code"), ["**/*.jsonl"], tokens=40, domain="code", licence="MIT"),
    }
    return write_recipe(folder / "recipe.yaml", tokenizer, sources, **keys)
