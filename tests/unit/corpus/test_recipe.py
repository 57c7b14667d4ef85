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


def test_wanted_tokens_must_add_up_to_those_of_the_run(tmp_path: Path) -> None:
    def problem(tokens: int | None, *keys: dict[str, Any]) -> str:
        sources = {f"s{number}": source("a", ["*"], **one) for number, one in enumerate(keys)}
        path = write_recipe(tmp_path / "recipe.yaml", "t", sources, tokens=tokens)
        try:
            load_recipe(path)
        except ConfigError as error:
            return str(error)
        return ""

    advice = "change tokens or share of the sources, or set tokens to"
    shares = problem(150, {"share": 0.4}, {"share": 0.1})
    assert "the sources want 75 tokens (s0 60, s1 15), tokens=150 is the whole run" in shares
    assert f"{advice} 75" in shares
    assert f"{advice} 160" in problem(200, {"tokens": 120}, {"tokens": 40})
    assert "want 120 tokens" in problem(200, {"tokens": 20}, {"share": 0.5})
    assert "want 199 tokens" in problem(200, {"tokens": 120}, {"tokens": 79})
    assert "and nothing is left for s1" in problem(200, {"tokens": 200}, {})
    assert "s0.share=0.001 of tokens=100 is no token" in problem(100, {"share": 0.001}, {"tokens": 100})
    fitting: list[tuple[int | None, list[dict[str, Any]]]] = [
        (200, [{"tokens": 100}, {"share": 0.5}]),
        (100, [{"share": 1 / 3}, {"share": 1 / 3}, {"share": 1 / 3}]),
        (435373905853, [{"share": 0.653}, {"share": 0.347}]),
        (None, [{"tokens": 120}, {"tokens": 40}]),
        (200, [{"tokens": 120}, {}]),
    ]
    for tokens, keys in fitting:
        assert problem(tokens, *keys) == ""


def test_a_null_of_a_source_switches_a_filter_of_the_recipe_off(tmp_path: Path) -> None:
    sources = {
        "off": source("a", ["*"], filters={"min_tokens": None, "decontaminate": None}),
        "other": source("b", ["*"], filters={"min_tokens": 9}),
        "same": source("c", ["*"]),
    }
    filters = {"min_tokens": 5, "decontaminate": ["items"], "deduplicate": True}
    path = write_recipe(tmp_path / "recipe.yaml", "t", sources, filters=filters)

    def found(*overrides: str) -> list[tuple[int | None, list[str] | None, bool | None]]:
        recipe = load_recipe(path, overrides)
        every = [recipe.filters_of(one) for one in recipe.sources.values()]
        return [(one.min_tokens, one.decontaminate, one.deduplicate) for one in every]

    assert found() == [(None, None, True), (9, ["items"], True), (5, ["items"], True)]
    assert found("sources.same.filters.min_tokens=null", "sources.other.filters.deduplicate=false") == [
        (None, None, True),
        (9, ["items"], False),
        (None, ["items"], True),
    ]


def test_names_whose_files_would_be_others_are_refused(tmp_path: Path) -> None:
    sources = {name: source("a", ["*"], tasks=2) for name in ("web", "web-00000-of-00002", "Recipe.lock")}
    path = write_recipe(tmp_path / "recipe.yaml", "t", sources)
    with pytest.raises(ConfigError) as raised:
        load_recipe(path)
    assert "sources.web-00000-of-00002 has a name like that of one shard of an array; rename it" in str(raised.value)
    assert "sources.Recipe.lock would be Recipe.lock.json, which a published corpus has for its listing" in str(raised.value)


def test_shipped_recipes_build_enough_and_not_ten_times_what_they_want() -> None:
    for path in SHIPPED:
        recipe = load_recipe(str(path))
        for name, one in recipe.sources.items():
            if one.expected.tokens is not None:
                built = one.expected.tokens * (one.sample or 1)
                assert (recipe.wanted(one) or 0) <= built < 2 * (recipe.wanted(one) or built), (path, name)
