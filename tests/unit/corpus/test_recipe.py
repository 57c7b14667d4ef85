"""Recipes: every problem is found before anything is read, and named with its key."""

from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.corpus.recipe import load_recipe
from megatron_ledom.errors import ConfigError
from tests.support.corpus_recipes import source, write_recipe
from tests.support.paths import ROOT

COMMIT = "a" * 40
SHIPPED = sorted((ROOT / "examples/corpus").glob("*.yaml"))


def problem_of(folder: Path, change: dict[str, Any], **keys: Any) -> str:
    """Return the message for a recipe of one source with some keys changed."""
    sources = {"web": {**source("hf://datasets/o/n", ["*.jsonl"], revision=COMMIT), **change}}
    path = write_recipe(folder / "recipe.yaml", "tokenizer", sources, **keys)
    with pytest.raises(ConfigError) as raised:
        load_recipe(path)
    return str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"licens": "MIT"}, "sources.web.licens is not a key; did you mean sources.web.licence?"),
        (
            {"filters": {"min_token": 3}},
            "sources.web.filters.min_token is not a key; did you mean sources.web.filters.min_tokens?",
        ),
        ({"expected": {"size": 3}}, "sources.web.expected.size is not a key; expected one of files, bytes, documents, tokens"),
        ({"files": "*.jsonl"}, 'sources.web.files="*.jsonl" is not possible; expected a list of texts'),
        ({"files": [3]}, "sources.web.files=[3] is not possible; expected a list of texts"),
        ({"files": []}, "sources.web.files is empty"),
        ({"files": ["../*.jsonl"]}, "sources.web.files has '../*.jsonl'; expected patterns below the address"),
        ({"origin": "paper"}, "is not possible; expected one of original, inferred, ours"),
        ({"tokens": 0}, "sources.web.tokens=0 is not possible; expected a whole number above 0 or null"),
        ({"tokens": 5, "share": 0.5}, "sources.web has both tokens=5 and share=0.5; give one of them"),
        ({"share": 0.5}, "sources.web.share=0.5 needs the tokens of the run; set tokens"),
        ({"sample": 1.5}, "sources.web.sample=1.5 is above 1"),
        ({"address": "hf://datasets/o/n/data"}, "is not a dataset of the hub; expected hf://datasets/OWNER/NAME"),
        ({"address": "s3://b/f"}, f"sources.web.revision='{COMMIT}' is of no use with s3://b/f"),
        ({"address": "installed-package", "revision": None}, "did you mean installed-packages?"),
        (
            {"address": "installed-packages", "revision": None},
            "files has '*.jsonl'; of installed-packages there are prose.jsonl",
        ),
        ({"filters": {"action": "remove"}}, "expected one of report, drop, cut or null"),
    ],
)
def test_a_problem_of_a_source_is_named_with_its_key(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in problem_of(tmp_path, change)


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    message = problem_of(tmp_path, {"licens": "MIT", "tokens": -1}, directoin="forward")
    assert "has 3 problems:" in message
    assert "directoin is not a key; did you mean direction?" in message


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", "tokenizer", {"web": {"address": "a", "files": ["*"]}})
    with pytest.raises(ConfigError, match=r"sources\.web\.licence is missing; expected text; set it in the file or with --set"):
        load_recipe(path)


def test_names_that_are_one_file_on_some_disks_are_refused(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", "t", {name: source("a", ["*"]) for name in ("web", "Web")})
    with pytest.raises(ConfigError, match="differ only in case"):
        load_recipe(path)
    path = write_recipe(tmp_path / "recipe.yaml", "t", {"a/b": source("a", ["*"])})
    with pytest.raises(ConfigError, match="the name becomes a file name"):
        load_recipe(path)


def test_set_changes_a_key_of_one_source(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", "t", {name: source("a", ["*"]) for name in ("web", "code")})
    recipe = load_recipe(path, ["sources.web.tokens=7", "filters.min_tokens=3", "sources.code.filters.min_tokens=5"])
    assert (recipe.sources["web"].tokens, recipe.sources["code"].tokens) == (7, None)
    assert [recipe.filters_of(one).min_tokens for one in recipe.sources.values()] == [3, 5]
    with pytest.raises(ConfigError, match=r"sources\.wbe\.address is missing"):
        load_recipe(path, ["sources.wbe.tokens=7"])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_names_licence_terms_and_origin_of_every_source(path: Path) -> None:
    recipe = load_recipe(str(path))
    assert recipe.sources
    for one in recipe.sources.values():
        assert one.licence
        assert len(one.terms) > 20
