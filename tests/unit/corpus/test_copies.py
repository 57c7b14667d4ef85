"""Copies of `ledom corpus fetch`: of the pinned version, with the verified bytes, inside their folder."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ledom.corpus.build import BuildSettings, build
from megatron_ledom.corpus.copies import copy_path
from megatron_ledom.corpus.fetch import FetchSettings, fetch
from megatron_ledom.corpus.listing import lock_path
from megatron_ledom.corpus.pin import PinSettings, pin
from megatron_ledom.data.shards.shard import check_shard
from megatron_ledom.errors import DataError, UsageError
from tests.support.corpus_recipes import source, two_sources, write_recipe
from tests.support.stand_in_hub import StandInHub, stand_in_hub

ADDRESS = "hf://datasets/org/web"
FIRST, SECOND = (b'{"text": "%s"}\n' % text for text in (b"1 2 3", b"7 8 9"))


@pytest.fixture
def hub() -> Iterator[StandInHub]:
    """Return a hub with one file."""
    with stand_in_hub() as running, running.used_here():
        running.commit("datasets/org/web", {"a.jsonl": FIRST})
        yield running


def hub_recipe(folder: Path, tokenizer: str, **more: object) -> str:
    return write_recipe(folder / "recipe.yaml", tokenizer, {"web": source(ADDRESS, ["*.jsonl"]), **more})


def test_a_copy_of_another_commit_with_equal_size_is_replaced(hub: StandInHub, tmp_path: Path, tokenizer: str) -> None:
    recipe, copies = hub_recipe(tmp_path, tokenizer), str(tmp_path / "copies")
    pin(PinSettings(recipe=recipe))
    assert fetch(FetchSettings(recipe=recipe, to=copies)) == len(FIRST)
    second = hub.commit("datasets/org/web", {"a.jsonl": SECOND})
    pin(PinSettings(recipe=recipe))
    with pytest.raises(
        UsageError, match=r"a\.jsonl is a copy of version \w{40}, the listing has \w{40}.*run `ledom corpus fetch`"
    ):
        build(BuildSettings(recipe=recipe, copies=copies, workers=1))
    assert fetch(FetchSettings(recipe=recipe, to=copies)) == len(SECOND)
    build(BuildSettings(recipe=recipe, copies=copies, workers=1))
    assert (tmp_path / "copies/web/a.jsonl").read_bytes() == SECOND
    assert check_shard(str(tmp_path / "out/web")).source["revision"] == second


def test_a_damaged_copy_is_refused_by_a_build_and_replaced_by_fetch(hub: StandInHub, tmp_path: Path, tokenizer: str) -> None:
    recipe, copies = hub_recipe(tmp_path, tokenizer), str(tmp_path / "copies")
    pin(PinSettings(recipe=recipe))
    fetch(FetchSettings(recipe=recipe, to=copies))
    (tmp_path / "copies/web/a.jsonl").write_bytes(SECOND)
    with pytest.raises(UsageError, match=r"a\.jsonl has the SHA-256 \w{64}, the verified copy had \w{64}"):
        build(BuildSettings(recipe=recipe, copies=copies, workers=1))
    assert fetch(FetchSettings(recipe=recipe, to=copies)) == len(FIRST)
    assert fetch(FetchSettings(recipe=recipe, to=copies)) == 0
    assert (tmp_path / "copies/web/a.jsonl").read_bytes() == FIRST


def test_copies_of_local_files_are_replaced_after_a_change(tmp_path: Path, tokenizer: str) -> None:
    recipe, copies = two_sources(tmp_path, tokenizer), str(tmp_path / "copies")
    pin(PinSettings(recipe=recipe))
    fetch(FetchSettings(recipe=recipe, to=copies))
    changed = tmp_path / "code/all.jsonl"
    changed.write_bytes(changed.read_bytes().replace(b"1", b"2"))
    (tmp_path / "copies/code/all.jsonl").unlink()
    with pytest.raises(DataError, match=r"all\.jsonl was changed after it was listed; list it again"):
        fetch(FetchSettings(recipe=recipe, to=copies))
    pin(PinSettings(recipe=recipe))
    assert fetch(FetchSettings(recipe=recipe, to=copies)) == changed.stat().st_size
    assert (tmp_path / "copies/code/all.jsonl").read_bytes() == changed.read_bytes()


def test_the_tasks_of_a_source_together_read_every_copy(tmp_path: Path, tokenizer: str) -> None:
    recipe, copies = two_sources(tmp_path, tokenizer), str(tmp_path / "copies")
    pin(PinSettings(recipe=recipe))
    fetch(FetchSettings(recipe=recipe, to=copies))
    damaged = tmp_path / "copies/web/1.jsonl"
    damaged.write_bytes(damaged.read_bytes().replace(b"1", b"2"))
    refused = 0
    for task in range(3):
        given = BuildSettings(
            recipe=recipe, overrides=["sources.web.tasks=3"], source=["web"], task_id=task, copies=copies, workers=1
        )
        try:
            build(given)
        except UsageError as error:
            refused += "1.jsonl has the SHA-256" in str(error)
    assert refused == 1


@pytest.mark.parametrize("path", ["/etc/x", "a//etc/x", "../x", "a/../../x", "./x", ""])
def test_a_path_that_would_leave_the_folder_of_the_copies_is_refused(path: str, tmp_path: Path, tokenizer: str) -> None:
    with pytest.raises(DataError, match=r"sources\.web: the file .* has an absolute part"):
        copy_path("copies", "web", path)
    recipe = two_sources(tmp_path, tokenizer)
    stored = json.loads(pin(PinSettings(recipe=recipe)).read_text(encoding="utf-8"))
    stored["sources"]["web"]["files"][0][0] = path
    lock_path(recipe).write_text(json.dumps(stored), encoding="utf-8")
    for work in (
        lambda: fetch(FetchSettings(recipe=recipe, to=str(tmp_path / "copies"))),
        lambda: build(BuildSettings(recipe=recipe, source=["web"], copies=str(tmp_path / "copies"), workers=1)),
    ):
        with pytest.raises(DataError, match=r"has an absolute part"):
            work()
    assert not (tmp_path / "copies").exists()


def test_a_recipe_with_installed_packages_is_built_from_copies_of_the_others(
    hub: StandInHub, tmp_path: Path, tokenizer: str
) -> None:
    with_prose = {"prose": source("installed-packages", ["prose.jsonl"], most_bytes=20_000, filters={"on_error": "skip"})}
    recipe, copies = hub_recipe(tmp_path, tokenizer, **with_prose), str(tmp_path / "copies")
    pin(PinSettings(recipe=recipe))
    fetch(FetchSettings(recipe=recipe, to=copies))
    build(BuildSettings(recipe=recipe, copies=copies, workers=1))
    assert check_shard(str(tmp_path / "out/prose")).num_documents > 0
