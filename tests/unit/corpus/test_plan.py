"""Plans: from a stored listing without network, with nothing invented."""

import json
import socket
from pathlib import Path

import pytest
import yaml

from megatron_ledom.cli.main import run
from megatron_ledom.corpus.listing import ListedFile, Listing, SourceListing, listing_text, read_listing
from megatron_ledom.corpus.plan import CorpusPlanSettings, describe, plan_corpus
from megatron_ledom.corpus.recipe import load_recipe
from megatron_ledom.errors import DataError, MismatchError, UsageError
from tests.support.corpus_recipes import source, two_sources, write_recipe
from tests.support.paths import ROOT

COMMIT = "b" * 40


def hub_recipe(folder: Path) -> str:
    """Return the recipe of two sources of the hub, of which one has a listing of two files and the other none."""
    sources = {
        "web": source("hf://datasets/o/web", ["**/*.jsonl.zst"], tokens=1000, text_per_byte=3.4),
        "math": source("hf://datasets/o/math", ["*.parquet"], tokens=500, origin="inferred"),
    }
    path = write_recipe(folder / "recipe.yaml", "tokenizer", sources)
    files = [ListedFile("a/0.jsonl.zst", 3000, "1" * 40), ListedFile("a/1.jsonl.zst", 1000, "2" * 40)]
    listing = Listing(
        {
            "web": SourceListing("hf://datasets/o/web", COMMIT, ["**/*.jsonl.zst"], files),
            "math": SourceListing("hf://datasets/o/math", None, ["*.parquet"], None),
        },
        "2026-01-02T03:04:05+00:00",
    )
    (folder / "listing.json").write_text(listing_text(listing), encoding="utf-8")
    return path


def test_a_plan_needs_no_network_with_a_stored_listing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = hub_recipe(tmp_path)
    run(["corpus", "plan", recipe, "--listing", str(tmp_path / "listing.json")])
    shown = capsys.readouterr().out
    assert "listing.json, made 2026-01-02T03:04:05+00:00" in shown
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line}
    assert rows["web"][1:8] == ["general", "2", "4,000", "~4,000", "1,000", "66.67%", "0.250"]
    assert rows["math"][1:8] == ["general", "unknown", "unknown", "unknown", "500", "33.33%", "unknown"]
    assert rows["all"][1:5] == [">=2", ">=4,000", ">=4,000", "1,500"]
    assert "unknown: the files of math are not in the listing" in shown
    assert "not pinned: math" in shown
    assert "inferred: our reading of what the original LEDOM used (math)" in shown
    assert "8,000 bytes of shards" in shown


def test_disk_and_core_hours_follow_from_the_estimates(tmp_path: Path) -> None:
    recipe = hub_recipe(tmp_path)
    overrides = ["estimates.bytes_per_id=4", "estimates.bytes_per_token=1.7", "estimates.tokens_per_core_second=1000"]
    plan = plan_corpus(CorpusPlanSettings(recipe=recipe, overrides=overrides, listing=str(tmp_path / "listing.json")))
    assert plan.sources[0].tokens == 8000
    assert plan.disk_bytes == (32_000, 32_000)
    assert plan.core_hours == pytest.approx(8 / 3600)


def test_published_numbers_replace_estimates_in_proportion_to_the_files_that_are_read(tmp_path: Path) -> None:
    recipe, listing = hub_recipe(tmp_path), str(tmp_path / "listing.json")
    stated = ["sources.web.expected.tokens=9000", "sources.web.expected.documents=40", "sources.web.sample=0.5"]
    [web] = plan_corpus(CorpusPlanSettings(recipe=recipe, overrides=stated, listing=listing, source=["web"])).sources
    share = (web.num_bytes or 0) / 4000
    assert share in (0.25, 0.75)
    assert (web.tokens, web.documents, web.basis) == (9000 * share, 40 * share, "stated")
    sizes = ["sources.math.expected.tokens=600", "sources.math.expected.bytes=5000", "sources.math.expected.files=3"]
    [math] = plan_corpus(CorpusPlanSettings(recipe=recipe, overrides=sizes, listing=listing, source=["math"])).sources
    assert (math.num_files, math.num_bytes, math.tokens) == (3, 5000, 600)


def test_a_written_listing_gives_the_same_plan_without_the_files(tmp_path: Path, tokenizer: str) -> None:
    recipe, stored = two_sources(tmp_path, tokenizer), str(tmp_path / "listing.json")
    now = plan_corpus(CorpusPlanSettings(recipe=recipe, write_listing=stored))
    for path in [*(tmp_path / "web").iterdir(), *(tmp_path / "code").iterdir()]:
        path.unlink()
    later = plan_corpus(CorpusPlanSettings(recipe=recipe, listing=stored))
    assert later.sources == now.sources
    assert now.sources[0].num_files == 3
    with pytest.raises(UsageError, match=r"sources\.web: input .*web/\*\.jsonl does not exist or matches no file"):
        plan_corpus(CorpusPlanSettings(recipe=recipe))


def test_a_source_that_would_be_read_more_than_once_is_named(tmp_path: Path, tokenizer: str) -> None:
    recipe = two_sources(tmp_path, tokenizer)
    shown = describe(plan_corpus(CorpusPlanSettings(recipe=recipe, overrides=["sources.code.tokens=100000"])))
    assert "read more than once: code; lower its tokens" in shown or "read more than once: code;" in shown


def test_a_listing_that_does_not_fit_the_recipe_is_refused(tmp_path: Path) -> None:
    recipe, listing = hub_recipe(tmp_path), tmp_path / "listing.json"

    def plan(*overrides: str) -> None:
        plan_corpus(CorpusPlanSettings(recipe=recipe, overrides=overrides, listing=str(listing)))

    with pytest.raises(MismatchError, match=r"sources\.web\.address was 'hf://datasets/o/web' when .* and is"):
        plan("sources.web.address=hf://datasets/o/other")
    with pytest.raises(MismatchError, match=rf"sources\.web\.revision is '{'c' * 40}', .* lists the files of '{COMMIT}'"):
        plan(f"sources.web.revision={'c' * 40}")
    plan(f"sources.web.revision={COMMIT}")
    plan("sources.web.revision=main")
    with pytest.raises(UsageError, match=r"the listing nowhere\.json does not exist"):
        read_listing("nowhere.json")
    listing.write_text(json.dumps({"format_version": 2}), encoding="utf-8")
    with pytest.raises(DataError, match="has format version 2, this package reads 1"):
        plan()


def test_the_plan_of_the_435b_recipe_needs_no_network(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network is used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    folder = ROOT / "examples/corpus"
    run(["corpus", "plan", str(folder / "ledom_435b.yaml"), "--listing", str(folder / "ledom_435b.listing.json")])
    shown = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line}
    assert rows["all"][3:5] == ["722,668,628,110", "435,373,905,853"]
    assert rows["dclm_01"][2:8] == ["unknown", "unknown", "288,703,527,564", "259,833,174,808", "59.68%", "0.900"]
    assert "1.45 TB of shards" in shown
    assert "15.93 to encode" in shown
    base = yaml.safe_load((ROOT / "examples/configs/ledom_base.yaml").read_text(encoding="utf-8"))
    wanted = {Path(prefix).name: tokens for tokens, prefix in base["data"]["train_blend"]}
    assert {name: source.tokens for name, source in load_recipe(str(folder / "ledom_435b.yaml")).sources.items()} == wanted
