"""The hub of the tests answers the real client of `huggingface_hub` as the public hub does."""

from collections.abc import Iterator
from typing import Any

import pytest
from huggingface_hub import HfApi, HfFileSystem
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.file_download import get_hf_file_metadata
from huggingface_hub.utils import _http

from tests.support.stand_in_hub import Failure, StandInHub, stand_in_hub

SET = "datasets/org/texts"
PLAIN, LARGE = b"".join(b'{"text": "%d"}\n' % number for number in range(500)), bytes(range(256)) * 40


@pytest.fixture
def hub() -> Iterator[StandInHub]:
    with stand_in_hub() as hub:
        hub.commit(SET, {"a.jsonl": PLAIN, "data/b.parquet": LARGE, "data/c.txt": b"c"})
        yield hub


def read(path: str, **options: Any) -> bytes:
    with HfFileSystem().open(path, "rb", **options) as stream:
        return bytes(stream.read(10**9))


def test_files_revisions_and_ranges(hub: StandInHub) -> None:
    first = hub.repo(SET).branches["main"]
    second = hub.commit(SET, {"a.jsonl": b"new"})
    hub.page_size = 1
    with hub.used_here():
        store = HfFileSystem()
        assert [store.info(f"{SET}@{revision}/a.jsonl")["size"] for revision in (first, "main")] == [len(PLAIN), 3]
        assert HfApi().dataset_info("org/texts").sha == second
        assert store.find(f"{SET}@{first}") == [f"{SET}@{first}/{name}" for name in ("a.jsonl", "data/b.parquet", "data/c.txt")]
        assert store.glob(f"{SET}/data/*.parquet") == [f"{SET}/data/b.parquet"]
        assert read(f"{SET}@{first}/a.jsonl") == PLAIN
        assert read(f"{SET}@{first}/data/b.parquet", block_size=1000) == LARGE
        assert store.cat_file(f"{SET}/data/b.parquet", start=300, end=600) == LARGE[300:600]
        metadata = get_hf_file_metadata(f"{hub.url}/{SET}/resolve/{first}/data/b.parquet")
        assert (metadata.commit_hash, metadata.size) == (first, len(LARGE))
        assert metadata.etag == store.info(f"{SET}/data/b.parquet")["lfs"]["sha256"]


def test_tokens_gates_and_missing_sets_are_refused_as_on_the_hub(hub: StandInHub) -> None:
    hub.tokens |= {"hf_good", "hf_other"}
    hub.repo(SET).gated_for = {"hf_good"}
    hub.commit("datasets/org/private", {"a.txt": b"a"})
    hub.repo("datasets/org/private").readers = {"hf_good"}
    with hub.used_here("hf_good"):
        assert read(f"{SET}/data/b.parquet") == LARGE
        assert read("datasets/org/private/a.txt") == b"a"
        with pytest.raises(FileNotFoundError, match="revision not found"):
            HfFileSystem().info(f"{SET}@absent/a.jsonl")
        with pytest.raises(FileNotFoundError):
            HfFileSystem().info(f"{SET}/absent.jsonl")
    assert not hub.leaks
    for token in ("hf_other", None):
        with hub.used_here(token):
            with pytest.raises(GatedRepoError):
                read(f"{SET}/a.jsonl")
            with pytest.raises(GatedRepoError):
                HfApi().auth_check("org/texts", repo_type="dataset")
            with pytest.raises(RepositoryNotFoundError):
                HfApi().dataset_info("org/private")
    hub.expired.add("hf_good")
    for token, message in (("hf_good", "is expired"), ("hf_unknown", "Invalid credentials")):
        with hub.used_here(token), pytest.raises(HfHubHTTPError, match=message):
            HfApi().dataset_info("org/texts")


def test_failures_come_by_their_plan(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    with hub.used_here():
        hub.failures = [
            Failure(on="tree", status=429, headers={"Retry-After": "0"}, times=2),
            Failure(on="content", path="*.jsonl", skip=2, break_after=1000),
            Failure(on="content", path="*.jsonl", break_after=-1),
            Failure(on="resolve", path="*.parquet", status=503),
        ]
        assert read(f"{SET}/a.jsonl", block_size=2000, cache_type="none") == PLAIN
        assert read(f"{SET}/data/b.parquet") == LARGE
        assert [failure.met for failure in hub.failures] == [2, 0, 1, 1]
        assert [seen.status for seen in hub.requests if seen.on == "content"] == [0, 206, 206]
        store = HfFileSystem()
        hub.failures = [Failure(on="content", skip=1, break_after=1000)]
        with store.open(f"{SET}/a.jsonl", block_size=2000) as stream:
            assert b"".join(iter(lambda: stream.read(700), b"")) == PLAIN
        assert hub.failures[0].met == 1
        hub.failures = [
            Failure(on="content", short=10),
            Failure(on="content", wrong=True),
            Failure(on="content", ignore_range=True),
        ]
        url = f"{hub.url}/{SET}/resolve/main/a.jsonl"
        ask = lambda: _http.get_session().get(url, headers={"Range": "bytes=5-99"})  # noqa: E731
        assert ask().content == PLAIN[5:15]
        assert ask().content == bytes(byte ^ 1 for byte in PLAIN[5:100])
        assert (ask().status_code, ask().content) == (200, PLAIN[5:100])
