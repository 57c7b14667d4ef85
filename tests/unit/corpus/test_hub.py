"""Sources in a hub: commits are pinned, builds and copies read them, and a branch that moves changes nothing."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ledom.corpus.build import BuildSettings, build
from megatron_ledom.corpus.fetch import FetchSettings, fetch
from megatron_ledom.corpus.listing import lock_path, read_listing
from megatron_ledom.corpus.pin import PinSettings, pin
from megatron_ledom.corpus.plan import CorpusPlanSettings, plan_corpus
from megatron_ledom.data.shards.shard import check_shard
from megatron_ledom.errors import ConfigError, DataError, UsageError
from tests.support.corpus_recipes import source, write_recipe
from tests.support.legible import legible_documents
from tests.support.stand_in_hub import Failure, StandInHub, stand_in_hub

ADDRESS = "hf://datasets/org/web"


def lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


@pytest.fixture
def hub() -> Iterator[StandInHub]:
    """Return a hub with two files of ten documents."""
    with stand_in_hub() as running, running.used_here():
        texts = legible_documents(10, 6)
        running.commit(
            "datasets/org/web", {"data/a.jsonl.gz": gzip.compress(lines(texts), mtime=0), "data/b.jsonl": lines(texts[:4])}
        )
        yield running


def recipe_in(folder: Path, tokenizer: str, **keys: object) -> str:
    return write_recipe(folder / "recipe.yaml", tokenizer, {"web": source(ADDRESS, ["data/*"], **keys)})


def test_a_pinned_source_is_built_at_its_commit_after_the_branch_has_moved(
    hub: StandInHub, tmp_path: Path, tokenizer: str
) -> None:
    recipe = recipe_in(tmp_path, tokenizer)
    with pytest.raises(ConfigError, match=r"sources\.web\.revision is null, not a commit"):
        build(BuildSettings(recipe=recipe, workers=1))
    first = hub.repo("datasets/org/web").branches["main"]
    assert pin(PinSettings(recipe=recipe)) == lock_path(recipe)
    stored = read_listing(lock_path(recipe)).sources["web"]
    assert stored.revision == first
    assert [(file.path, len(file.blob_id or "")) for file in stored.files or []] == [
        ("data/a.jsonl.gz", 64),
        ("data/b.jsonl", 40),
    ]
    hub.commit("datasets/org/web", {"data/b.jsonl": lines(["1 2 3"]), "data/c.jsonl": lines(["4 5 6"])})
    build(BuildSettings(recipe=recipe, workers=1))
    manifest = check_shard(str(tmp_path / "out/web"))
    assert manifest.num_documents == 14
    assert (manifest.source["address"], manifest.source["revision"]) == (ADDRESS, first)
    assert {file.path for file in manifest.input_files} == {
        f"{ADDRESS}@{first}/data/{name}" for name in ("a.jsonl.gz", "b.jsonl")
    }


def test_a_plan_of_a_branch_says_what_a_build_needs(hub: StandInHub, tmp_path: Path, tokenizer: str) -> None:
    recipe, stored = recipe_in(tmp_path, tokenizer, revision="main"), str(tmp_path / "listing.json")
    now = plan_corpus(CorpusPlanSettings(recipe=recipe, write_listing=stored))
    assert now.sources[0].num_files == 2
    hub.failures.append(Failure(times=None, status=500))
    later = plan_corpus(CorpusPlanSettings(recipe=recipe, listing=stored))  # asks nobody
    assert later.sources == now.sources


def test_copies_are_verified_resumed_and_built_to_the_same_bytes(hub: StandInHub, tmp_path: Path, tokenizer: str) -> None:
    recipe, copies = recipe_in(tmp_path, tokenizer), tmp_path / "copies"
    with pytest.raises(UsageError, match=r"recipe\.lock\.json does not exist, .* run `ledom corpus pin RECIPE` first"):
        fetch(FetchSettings(recipe=recipe, to=str(copies)))
    pin(PinSettings(recipe=recipe))
    hub.failures.append(Failure(on="content", path="data/b.jsonl", wrong=True, times=None))
    with pytest.raises(DataError, match=r"data/b\.jsonl.*hash"):
        fetch(FetchSettings(recipe=recipe, to=str(copies), threads=1))
    assert [path.name for path in (copies / "web").rglob("*") if path.is_file()] == ["a.jsonl.gz"]
    hub.failures.clear()
    assert fetch(FetchSettings(recipe=recipe, to=str(copies))) == len(lines(legible_documents(10, 6)[:4]))
    assert fetch(FetchSettings(recipe=recipe, to=str(copies))) == 0
    build(BuildSettings(recipe=recipe, workers=1, overrides=[f"output={tmp_path / 'streamed'}"]))
    hub.failures.append(Failure(times=None, status=500))
    build(BuildSettings(recipe=recipe, workers=1, copies=str(copies)))
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"out/web{ending}").read_bytes() == (tmp_path / f"streamed/web{ending}").read_bytes()
    assert check_shard(str(tmp_path / "out/web")).source == check_shard(str(tmp_path / "streamed/web")).source
    (copies / "web/data/b.jsonl").unlink()
    with pytest.raises(UsageError, match=r"b\.jsonl is missing, the listing has \d+ bytes .*; run `ledom corpus fetch` again"):
        build(BuildSettings(recipe=recipe, workers=1, copies=str(copies)))


def test_a_sample_of_a_hub_source_reads_the_chosen_files_only(hub: StandInHub, tmp_path: Path, tokenizer: str) -> None:
    recipe = recipe_in(tmp_path, tokenizer, sample=0.5)
    pin(PinSettings(recipe=recipe))
    build(BuildSettings(recipe=recipe, workers=1))
    assert len(check_shard(str(tmp_path / "out/web")).input_files) == 1


def test_a_repository_or_branch_that_is_not_there_is_named(hub: StandInHub, tmp_path: Path, tokenizer: str) -> None:
    with pytest.raises(UsageError, match=r"sources\.web: .*org/web has no such revision; it has main"):
        pin(PinSettings(recipe=recipe_in(tmp_path, tokenizer, revision="v9")))
    with pytest.raises(UsageError, match=r"sources\.web: .*no repository datasets/org/wob"):
        pin(PinSettings(recipe=recipe_in(tmp_path, tokenizer), overrides=["sources.web.address=hf://datasets/org/wob"]))


def test_pinning_one_source_keeps_the_others(hub: StandInHub, tmp_path: Path, tokenizer: str) -> None:
    hub.commit("datasets/org/code", {"x.jsonl": lines(["1 2"])})
    sources = {"web": source(ADDRESS, ["data/*"]), "code": source("hf://datasets/org/code", ["*.jsonl"])}
    recipe = write_recipe(tmp_path / "recipe.yaml", tokenizer, sources)
    pin(PinSettings(recipe=recipe))
    before = read_listing(lock_path(recipe)).sources
    hub.commit("datasets/org/code", {"x.jsonl": lines(["3 4"])})
    hub.commit("datasets/org/web", {"data/c.jsonl": lines(["3 4"])})
    pin(PinSettings(recipe=recipe, source=["code"]))
    after = read_listing(lock_path(recipe)).sources
    assert after["web"] == before["web"]
    assert after["code"].revision != before["code"].revision
