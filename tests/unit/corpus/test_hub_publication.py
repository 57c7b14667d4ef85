"""Publication in a hub, with the real client against a replacement on loopback that keeps its repositories."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from megatron_ledom.corpus.build import BuildSettings, build
from megatron_ledom.corpus.licences import licence_metadata
from megatron_ledom.corpus.publish import PublishSettings, publish
from megatron_ledom.errors import DataError, LedomError, UsageError
from tests.support.corpus_recipes import two_sources
from tests.support.hub_commits import card_errors
from tests.support.stand_in_hub import Failure, Files, StandInHub, stand_in_hub

TOKEN, NAME = "hf_test", "datasets/org/corpus"
TO = f"hf://{NAME}"


@pytest.fixture
def hub() -> Iterator[StandInHub]:
    """Return an empty hub that knows the token of this process."""
    with stand_in_hub() as running, running.used_here(TOKEN):
        running.tokens.add(TOKEN)
        yield running


@pytest.fixture
def recipe(tmp_path: Path, tokenizer: str) -> str:
    path = two_sources(tmp_path, tokenizer)
    build(BuildSettings(recipe=path, workers=1))
    return path


def stored(hub: StandInHub) -> Files:
    """Return the files of the repository, without the one that the hub makes."""
    repo = hub.repo(NAME)
    files = repo.commits[repo.branches["main"]]
    return {name: content for name, content in files.items() if name != ".gitattributes"}


def test_a_corpus_is_one_commit_of_a_private_repository(
    hub: StandInHub, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = publish(PublishSettings(recipe=recipe, to=TO, yes=True))
    assert (hub.repo(NAME).readers, len(hub.repo(NAME).commits)) == ({TOKEN}, 2)  # with the first commit of the hub
    assert set(stored(hub)) == set(files) >= {"README.md", "LICENSE.md", "recipe.yaml", "web.bin", "code.json"}
    assert stored(hub)["web.bin"] == (tmp_path / "out/web.bin").read_bytes()
    assert stored(hub)["README.md"].startswith(b"---\npretty_name: test\n")
    assert "to hf://datasets/org/corpus, private, a new repository" in capsys.readouterr().out


def test_a_public_repository_that_exists_is_refused_without_public(
    hub: StandInHub, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.commit(NAME, {".gitattributes": b""})
    with pytest.raises(UsageError, match=r"org/corpus exists and is public, so everyone could read .* or give --public"):
        publish(PublishSettings(recipe=recipe, to=TO, yes=True))
    assert not stored(hub)
    publish(PublishSettings(recipe=recipe, to=TO, yes=True, public=True))
    assert "to hf://datasets/org/corpus, public, which exists" in capsys.readouterr().out
    assert "web.bin" in stored(hub)


def test_files_of_a_repository_that_exists_are_replaced_with_the_option_only(
    hub: StandInHub, recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repo(NAME).readers = {TOKEN}
    before = hub.commit(NAME, {"README.md": b"mine", "old.bin": b"1", "old.idx": b"2"})
    with pytest.raises(UsageError, match=r"has 3 files already \(README\.md, old\.bin, old\.idx.*give --replace"):
        publish(PublishSettings(recipe=recipe, to=TO, yes=True))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(UsageError, match="nothing was written"):
        publish(PublishSettings(recipe=recipe, to=TO, replace=True))
    assert (
        "to hf://datasets/org/corpus, private, which exists\n2 files there are removed: old.bin, old.idx"
        in capsys.readouterr().out
    )
    assert hub.repo(NAME).branches["main"] == before
    files = publish(PublishSettings(recipe=recipe, to=TO, yes=True, replace=True))
    assert set(stored(hub)) == set(files)
    assert len(hub.repo(NAME).commits) == 2


def test_a_damaged_shard_makes_no_repository(hub: StandInHub, recipe: str, tmp_path: Path) -> None:
    content = bytearray((tmp_path / "out/web.bin").read_bytes())
    content[10] ^= 1
    (tmp_path / "out/web.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"web\.bin has the SHA-256 \w{64}, its manifest has \w{64}: the shard is damaged"):
        publish(PublishSettings(recipe=recipe, to=TO, yes=True))
    assert not hub.repos


def test_a_refusal_of_the_hub_is_reported_without_the_token(hub: StandInHub, recipe: str) -> None:
    hub.failures.append(Failure(on="write", status=403, times=None))
    with pytest.raises(LedomError, match=r"the hub did not take hf://datasets/org/corpus .* may write there") as raised:
        publish(PublishSettings(recipe=recipe, to=TO, yes=True))
    assert TOKEN not in str(raised.value)
    assert not hub.repos


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        (["MIT", "MIT"], {"license": "mit"}),
        (["ODC-By-1.0"], {"license": "odc-by"}),
        (["GPL-3.0-or-later"], {"license": "gpl-3.0"}),
        (["various (see NOTICE)"], {"license": "other", "license_name": "various-see-notice", "license_link": "LICENSE.md"}),
        (["MIT", "odc-by"], {"license": "other", "license_name": "licences-of-the-sources", "license_link": "LICENSE.md"}),
    ],
)
def test_a_licence_is_one_that_the_hub_takes(licences: list[str], expected: dict[str, str]) -> None:
    assert licence_metadata(licences) == expected
    assert not card_errors(f"---\n{yaml.safe_dump(expected)}---\n")
