"""Plans: from a stored listing without network, with nothing invented."""

import json
import os
import socket
from pathlib import Path

import pytest
import yaml

from megatron_ledom.cli.main import run
from megatron_ledom.corpus.listing import (
    ListedFile,
    Listing,
    SourceListing,
    check_present,
    list_source,
    listing_text,
    read_listing,
)
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
    tasks = [*overrides, "sources.web.tasks=4"]
    assert plan_corpus(
        CorpusPlanSettings(recipe=recipe, overrides=tasks, listing=str(tmp_path / "listing.json"))
    ).disk_bytes == (32_000, 8_000)
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
    with pytest.raises(
        MismatchError, match=rf"sources\.web\.revision is 'main', .* lists the files of '{COMMIT}', .* for None"
    ):
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
    assert rows["all"][3:5] == [">=420,863,621,177", "435,373,905,853"]
    assert rows["dclm_01"][2:8] == ["unknown", "unknown", "288,703,527,564", "259,833,174,808", "59.68%", "0.900"]
    assert "841.73 GB of shards for the others; unknown for code_000, code_002; 2 bytes per token, assumed" in shown
    assert "9.28 to encode" in shown
    assert "tokens=435,373,905,853, " in shown
    base = yaml.safe_load((ROOT / "examples/configs/ledom_base.yaml").read_text(encoding="utf-8"))
    wanted = {Path(prefix).name: tokens for tokens, prefix in base["data"]["train_blend"]}
    assert {name: source.tokens for name, source in load_recipe(str(folder / "ledom_435b.yaml")).sources.items()} == wanted


def test_stated_numbers_that_the_listing_contradicts_are_not_believed(tmp_path: Path, tokenizer: str) -> None:
    recipe = two_sources(tmp_path, tokenizer)
    size = (tmp_path / "code/all.jsonl").stat().st_size
    stated = ["sources.code.expected.files=5", "sources.code.expected.tokens=1000000"]
    plan = plan_corpus(CorpusPlanSettings(recipe=recipe, overrides=stated))
    code = plan.sources[1]
    assert (code.tokens, code.basis) == (round(size * 0.95 / 3.4), "estimated")
    shown = describe(plan)
    assert "WARNING: sources.code.expected.files=5, the listing has 1" in shown
    assert f"code: 1,000,000 tokens are stated, its bytes give ~{code.tokens:,}" in shown
    far = plan_corpus(CorpusPlanSettings(recipe=recipe, overrides=stated[1:]))
    assert far.sources[1].tokens == 1_000_000
    assert "WARNING: sources.code: its bytes give" in describe(far)
    fits = [f"sources.code.expected.bytes={size}", f"sources.code.expected.tokens={code.tokens}"]
    assert "WARNING" not in describe(plan_corpus(CorpusPlanSettings(recipe=recipe, overrides=fits)))


def test_two_sources_of_the_same_files_are_named(tmp_path: Path, tokenizer: str) -> None:
    recipe = two_sources(tmp_path, tokenizer)
    (tmp_path / "link").symlink_to(tmp_path / "web")
    same = [f"sources.code.address={tmp_path / 'link'}", "sources.code.files=['[01].jsonl']"]
    shown = describe(plan_corpus(CorpusPlanSettings(recipe=recipe, overrides=same)))
    assert f"WARNING: web and code both read {tmp_path / 'web/0.jsonl'} and 1 more, so its text would be there twice" in shown
    hub, listing = hub_recipe(tmp_path), tmp_path / "listing.json"
    stored = json.loads(listing.read_text(encoding="utf-8"))
    for one in stored["sources"].values():
        one |= {"address": "hf://datasets/o/web", "patterns": ["*.parquet"], "files": None}
    listing.write_text(json.dumps(stored), encoding="utf-8")
    unlisted = [
        f"sources.{name}.{key}" for name in ("web", "math") for key in ("address=hf://datasets/o/web", "files=['*.parquet']")
    ]
    shown = describe(plan_corpus(CorpusPlanSettings(recipe=hub, overrides=unlisted, listing=str(listing))))
    assert "WARNING: web and math both read hf://datasets/o/web/*.parquet" in shown


def test_the_disk_follows_from_the_type_of_the_ids(tmp_path: Path, tokenizer: str) -> None:
    recipe = two_sources(tmp_path, tokenizer)

    def disk(*overrides: str) -> int:
        return plan_corpus(CorpusPlanSettings(recipe=recipe, overrides=overrides)).disk_bytes[0]

    large = ("tokenizer=nowhere", "tokenizer_vocab_size=65500")
    assert disk() * 2 == disk("dtype=int32") == disk(*large) == disk("estimates.bytes_per_id=4")
    assert disk("tokenizer=nowhere", "tokenizer_vocab_size=65499") == disk("dtype=uint16") == disk()
    with pytest.raises(UsageError, match="--dtype uint16 stores ids up to 65,535"):
        disk("tokenizer=nowhere", "tokenizer_vocab_size=70000", "dtype=uint16")


def test_the_disk_names_its_peak_and_what_is_not_counted(tmp_path: Path, tokenizer: str) -> None:
    recipe = two_sources(tmp_path, tokenizer)
    known = ["sources.code.expected.documents=10", "tokens=160", "sources.web.tasks=2"]
    plan = plan_corpus(CorpusPlanSettings(recipe=recipe, overrides=known))
    total, largest = plan.disk_bytes
    shown = describe(plan)
    assert f"{largest:,} bytes more for the largest shard, if one task runs at a time" in shown
    assert f"up to {total:,} bytes more if all tasks of all arrays run at once" in shown
    assert "without the .idx of web: 20 bytes for each document" in shown
    assert "2 sources, tokens=160, listed now" in shown


def test_a_listing_of_another_branch_or_another_limit_is_refused(tmp_path: Path, tokenizer: str) -> None:
    recipe, listing = hub_recipe(tmp_path), tmp_path / "listing.json"
    stored = json.loads(listing.read_text(encoding="utf-8"))
    stored["sources"]["web"]["asked"] = "main"
    listing.write_text(json.dumps(stored), encoding="utf-8")

    def plan(*overrides: str) -> None:
        plan_corpus(CorpusPlanSettings(recipe=recipe, overrides=overrides, listing=str(listing)))

    plan("sources.web.revision=main")
    plan(f"sources.web.revision={COMMIT}")
    for other in ("v9", COMMIT[:7]):
        message = rf"revision is '{other}', .* lists the files of '{COMMIT}', looked up for 'main'; .*ledom corpus pin"
        with pytest.raises(MismatchError, match=message):
            plan(f"sources.web.revision={other}")
    text = {"prose": source("installed-packages", ["prose.jsonl"], most_bytes=20000)}
    recipe = write_recipe(tmp_path / "text.yaml", tokenizer, text)
    plan_corpus(CorpusPlanSettings(recipe=recipe, write_listing=str(tmp_path / "text.json")))
    listing = tmp_path / "text.json"
    plan()
    with pytest.raises(MismatchError, match=r"sources\.prose\.most_bytes was 20000 when .* and is 5000; .*corpus pin"):
        plan("sources.prose.most_bytes=5000")


def test_a_local_file_that_changed_at_the_same_size_is_found(tmp_path: Path, tokenizer: str) -> None:
    recipe = two_sources(tmp_path, tokenizer)
    loaded = load_recipe(recipe)
    stored = tmp_path / "listing.json"
    plan_corpus(CorpusPlanSettings(recipe=recipe, write_listing=str(stored)))
    listed = read_listing(stored).of("web", loaded.sources["web"], "L")
    check_present("web", loaded.sources["web"], listed, list_source("web", loaded.sources["web"], None), "L")
    path = tmp_path / "web/1.jsonl"
    before, size = path.stat().st_mtime_ns, path.stat().st_size
    path.write_bytes(path.read_bytes().replace(b"1", b"2"))
    os.utime(path, ns=(before + 1, before + 1))
    assert path.stat().st_size == size
    with pytest.raises(DataError, match=r"sources\.web: 1\.jsonl was changed after L was made, at the same size .*corpus pin"):
        check_present("web", loaded.sources["web"], listed, list_source("web", loaded.sources["web"], None), "L")
