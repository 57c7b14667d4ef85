"""The data card and the publication of a corpus."""

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_ledom.cli.main import run
from megatron_ledom.corpus.build import BuildSettings, build
from megatron_ledom.corpus.card import CardSettings, write_card
from megatron_ledom.corpus.listing import list_sources, lock_path, write_listing
from megatron_ledom.corpus.publish import PublishSettings, publish
from megatron_ledom.corpus.recipe import load_recipe
from megatron_ledom.corpus.skipped_files import files_skipped
from megatron_ledom.data.shards.shard import check_shard
from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.storage.hashes import sha256_of
from megatron_ledom.storage.locks import output_folder_lock
from tests.support.corpus_recipes import two_sources
from tests.support.legible import legible_documents, write_jsonl

REPORT = {
    "documents_in": 50,
    "documents_out": 40,
    "removed": {"near duplicate": 7, "too short": 3},
    "languages": {"en": 39, "de": 1},
}


@pytest.fixture
def recipe(tmp_path: Path, tokenizer: str) -> str:
    """Return a recipe whose sources are built, with 10 duplicates in one of them."""
    path = two_sources(tmp_path, tokenizer, filters={"deduplicate": True}, summary="A corpus of numbers.")
    write_jsonl(tmp_path / "web/3.jsonl", legible_documents(10, 5))
    values = Path(path).read_text(encoding="utf-8")
    Path(path).write_text(values.replace("licence: MIT\n", "licence: MIT\n    language: fr\n"), encoding="utf-8")
    build(BuildSettings(recipe=path, workers=1))
    return path


def tables(card: str) -> dict[str, dict[str, list[str]]]:
    """Return heading -> first cell -> other cells of every row of its table."""
    found: dict[str, dict[str, list[str]]] = {}
    heading = ""
    for line in card.splitlines():
        if line.startswith("## "):
            heading = line[3:]
        elif line.startswith("| "):
            first, *others = [cell.strip() for cell in line.strip("|").split("|")]
            found.setdefault(heading, {})[first] = others
    return found


def test_a_card_has_sources_counts_removed_documents_and_hashes(recipe: str, tmp_path: Path) -> None:
    path = write_card(CardSettings(recipe=recipe))
    assert path == tmp_path / "out/README.md"
    card = path.read_text(encoding="utf-8")
    head = yaml.safe_load(card.split("---")[1])
    assert (head["license"], head["license_name"]) == ("other", "licences-of-the-sources")
    assert head["license_link"] == "LICENSE.md"
    assert head["size_categories"] == ["n<1K"]
    found = tables(card)
    assert found["Counts"]["web"][:3] == ["general", "30", "210"]
    assert found["Counts"]["all"][1:3] == ["40", "310"]
    assert found["Sources"]["code"][2:5] == ["MIT", "1", "ours: a choice of this project"]
    assert found["Domains"] == {"domain": ["documents", "tokens"], "general": ["30", "210"], "code": ["10", "100"]}
    assert found["Removed documents"]["web"] == ["build", "duplicate", "10"]
    manifest = check_shard(str(tmp_path / "out/web"))
    assert found["Files"]["web"] == [manifest.bin_sha256, manifest.idx_sha256]


def test_a_card_takes_the_report_of_filters_that_ran_before(recipe: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text(json.dumps(REPORT), encoding="utf-8")
    card = write_card(CardSettings(recipe=recipe, report=[f"web={report}"])).read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("---")[1])["language"] == ["de", "en", "fr"]
    assert tables(card)["Languages"] == {"language": ["documents"], "en": ["39"], "fr": ["10"], "de": ["1"]}
    assert "| web | filters before the build | near duplicate | 7 |" in card
    assert "Measured for web, as stated by the recipe for the others." in card


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents_out": 41}, r"50 documents less the removed 10 are not 41"),
        (
            {"documents_in": 910, "documents_out": 900, "languages": {}},
            r"documents_out is 900, the build read 40 documents of web",
        ),
        ({"languages": {"en": 30}}, r"its languages have 30 documents, documents_out is 40"),
        ({"removed": [3]}, r"expected JSON with documents_in, documents_out, removed"),
    ],
)
def test_a_report_that_does_not_add_up_is_refused(change: dict[str, Any], message: str, recipe: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text(json.dumps({**REPORT, **change}), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        write_card(CardSettings(recipe=recipe, report=[f"web={report}"]))
    with pytest.raises(UsageError, match="is not of the form SOURCE=FILE, with a source of web, code"):
        write_card(CardSettings(recipe=recipe, report=[f"wbe={report}"]))


def test_publishing_asks_and_writes_nothing_without_a_yes(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "published"
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(UsageError, match=r"nothing was written: there is no terminal to ask on; .* give --yes"):
        publish(PublishSettings(recipe=recipe, to=str(place)))
    terminal = io.StringIO("n\n")
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    with pytest.raises(UsageError, match="nothing was written, as you answered"):
        publish(PublishSettings(recipe=recipe, to=str(place)))
    assert not place.exists()
    assert "  code: MIT. none" in capsys.readouterr().out


def test_a_published_folder_has_usable_shards_card_and_recipe(recipe: str, tmp_path: Path) -> None:
    place = tmp_path / "published"
    run(["corpus", "publish", recipe, "--to", str(place), "--yes"])
    assert {path.name for path in place.iterdir()} == {
        *(f"{name}{ending}" for name in ("web", "code") for ending in (".bin", ".idx", ".json")),
        *("README.md", "LICENSE.md", "recipe.yaml"),
    }
    assert "- **code** " in (place / "LICENSE.md").read_text(encoding="utf-8")
    assert check_shard(str(place / "web")) == check_shard(str(tmp_path / "out/web"))
    assert load_recipe(str(place / "recipe.yaml")) == load_recipe(recipe)
    with pytest.raises(UsageError, match="exists already; name a new folder"):
        publish(PublishSettings(recipe=recipe, to=str(place), yes=True))
    with pytest.raises(UsageError, match="is not a dataset of the hub"):
        publish(PublishSettings(recipe=recipe, to="hf://datasets/only-a-name", yes=True))


def test_the_published_recipe_is_the_one_that_was_built(recipe: str, tmp_path: Path) -> None:
    place, child = tmp_path / "published", tmp_path / "child.yaml"
    child.write_text("base: recipe.yaml\nsummary: A corpus with a base.\n", encoding="utf-8")
    changes = ["shuffle_seed=7", "sources.web.text_key=text", f"output={tmp_path}/other"]
    build(BuildSettings(recipe=str(child), overrides=changes, workers=1))
    publish(PublishSettings(recipe=str(child), overrides=changes, to=str(place), yes=True))
    found = load_recipe(str(place / "recipe.yaml"))
    assert found == load_recipe(str(child), changes)
    assert (found.summary, found.shuffle_seed) == ("A corpus with a base.", 7)
    card = (place / "README.md").read_text(encoding="utf-8")
    assert f"SHA-256 {sha256_of(place / 'recipe.yaml')}" in card
    assert "shuffle_seed=7" in card


def test_a_damaged_shard_or_one_that_is_being_written_is_not_published(recipe: str, tmp_path: Path) -> None:
    place, shard = tmp_path / "published", tmp_path / "out/code.idx"
    with output_folder_lock(tmp_path / "out"), pytest.raises(UsageError, match=r"out is being written by process"):
        publish(PublishSettings(recipe=recipe, to=str(place), yes=True))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError):
        publish(PublishSettings(recipe=recipe, to=str(place), yes=True))
    (tmp_path / "out/web.bin").write_bytes(bytes((tmp_path / "out/web.bin").stat().st_size))
    with pytest.raises(DataError, match=r"web\.bin has the SHA-256 \w{64}, its manifest has \w{64}: the shard is damaged"):
        publish(PublishSettings(recipe=recipe, to=str(place), yes=True))
    assert not place.exists()


def test_a_card_names_choices_filters_and_the_skipped_files(tmp_path: Path, tokenizer: str) -> None:
    recipe = two_sources(tmp_path, tokenizer, filters={"min_tokens": 2})
    (tmp_path / "web/notes.xyz").write_text("not read", encoding="utf-8")
    changes = ["sources.web.sample=0.34", "sources.web.files=['.']"]
    build(BuildSettings(recipe=recipe, overrides=changes, workers=1))
    card = write_card(CardSettings(recipe=recipe, overrides=changes)).read_text(encoding="utf-8")
    assert "- filters of web: min_tokens=2\n" in card
    assert "__pydantic" not in card
    assert "- choice of web: files=['.'], text_key=text, sample=0.34" in card
    read = [Path(file.path).name for file in check_shard(str(tmp_path / "out/web")).input_files]
    others = sorted({"0.jsonl", "1.jsonl", "2.jsonl"} - set(read))
    assert f"| web | not chosen by sample=0.34 | 2 | {', '.join(others)} |" in card
    assert re.search(r"\| web \| unknown ending \| 1 \| \S*/web/\S*\.xyz \|", card)
    loaded = load_recipe(recipe, changes)
    write_listing(list_sources(loaded, list(loaded.sources), {}), lock_path(recipe), "--write-listing")
    assert files_skipped(loaded, "web", recipe, [])[0] == ("not chosen by sample=0.34", 2, others)
