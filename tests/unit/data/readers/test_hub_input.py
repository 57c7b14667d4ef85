"""hf:// inputs against a hub on this machine: pinned commits, failures that pass, refused tokens, and no secret in any output."""

import gzip
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pyarrow
import pytest
from huggingface_hub import constants
from pyarrow import parquet

from megatron_ledom.data.preprocess.pipeline import preprocess
from megatron_ledom.data.preprocess.task import PreprocessSettings
from megatron_ledom.data.readers import remote, remote_stream
from megatron_ledom.data.readers.byte_ranges import ByteRange
from megatron_ledom.data.readers.input_files import expand_inputs
from megatron_ledom.data.readers.records import ReadSettings, RecordReader, read_texts
from megatron_ledom.data.readers.remote import without_secrets
from megatron_ledom.data.shards.shard import load_manifest
from megatron_ledom.errors import UNFORESEEN, DataError, LedomError, TransientError, UsageError
from tests.support.legible import legible_documents, legible_tokenizer
from tests.support.paths import ROOT
from tests.support.stand_in_hub import SIGNATURE, Failure, StandInHub, stand_in_hub

SET = "datasets/org/texts"
TEXTS = legible_documents(9, 60) * 20
LINES = b"".join(orjson.dumps({"text": text}) + b"\n" for text in TEXTS)
OTHER = LINES.replace(b"1", b"2")
SECRET = "hf_secretsecretsecret"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    """A hub with one set, which this process uses without a token and without waiting between two tries."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with stand_in_hub() as hub, hub.used_here():
        hub.commit(SET, {"a.jsonl": LINES, "README.md": b"about"})
        yield hub


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(legible_tokenizer(tmp_path_factory.mktemp("tokenizer") / "legible"))


def shard(prefix: Path, tokenizer: str, *inputs: str, **changes: Any) -> bytes:
    settings = {"input": list(inputs), "tokenizer": tokenizer, "output_prefix": str(prefix), "workers": 1, "part_bytes": 5000}
    preprocess(PreprocessSettings(**{**settings, **changes}))
    return Path(f"{prefix}.bin").read_bytes()


def texts_of(*inputs: str) -> list[str]:
    return list(read_texts(expand_inputs(inputs)))


def test_failures_that_pass_do_not_change_the_shard(tmp_path: Path, tokenizer: str, hub: StandInHub) -> None:
    files = tmp_path / "files"
    files.mkdir()
    (files / "a.jsonl").write_bytes(LINES)
    (files / "b.jsonl.gz").write_bytes(gzip.compress(LINES))
    parquet.write_table(pyarrow.table({"text": TEXTS}), files / "c.parquet", row_group_size=50)
    hub.commit(SET, {path.name: path.read_bytes() for path in files.iterdir()})
    expected = shard(tmp_path / "local", tokenizer, str(files))
    assert shard(tmp_path / "remote", tokenizer, f"hf://{SET}", workers=2) == expected
    busy, asked = {"Retry-After": "0"}, {"ratelimit": '"resolvers";r=0;t=0'}
    hub.failures = [
        Failure(on="info", status=503),
        Failure(on="info", skip=1, break_after=-1),
        Failure(on="tree", status=429, headers=busy),
        *(Failure(on="resolve", path=name, skip=1, status=429, headers=asked) for name in ("a.jsonl", "c.parquet")),
        *(Failure(on="content", path=name, skip=2, break_after=1000) for name in ("a.jsonl", "c.parquet")),
        *(Failure(on="content", path=name, skip=2, short=10) for name in ("a.jsonl", "c.parquet")),
        *(Failure(on="content", path=name, skip=2, ignore_range=True) for name in ("a.jsonl", "c.parquet")),
        Failure(on="content", path="b.jsonl.gz", break_after=700),
        Failure(on="content", path="b.jsonl.gz", wait_seconds=0, status=500),
        Failure(on="content", path="*", skip=8, status=403),
    ]
    assert shard(tmp_path / "failing", tokenizer, f"hf://{SET}", workers=2) == expected
    assert [failure.met for failure in hub.failures] == [1] * len(hub.failures)
    assert not hub.leaks


def test_a_revision_becomes_its_commit(hub: StandInHub, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    commit = hub.repo(SET).branches["main"]
    hub.repo(SET).branches["v1"] = commit
    hub.commit(SET, {"a.jsonl": OTHER})
    now = hub.repo(SET).branches["main"]
    found = {
        pattern: [source.path for source in expand_inputs([f"hf://{SET}{pattern}"])]
        for pattern in ("", "/a.jsonl", "@main/*.jsonl", "@v1/a.jsonl", f"@{commit}")
    }
    old, new = [[f"hf://{SET}@{each}/a.jsonl"] for each in (commit, now)]
    assert found == {"": new, "/a.jsonl": new, "@main/*.jsonl": new, "@v1/a.jsonl": old, f"@{commit}": old}
    caplog.clear()
    expand_inputs([f"hf://{SET}/a.jsonl", f"hf://{SET}/*.jsonl"])
    assert [record.message for record in caplog.records if "is commit" in record.message] == [
        f"hf://{SET}: main is commit {now}, and these files are read; to name them later: hf://{SET}@{now}"
    ]


def broken_off(prefix: Path, tokenizer: str, hub: StandInHub, *inputs: str) -> None:
    """Leave work of which some parts are finished."""
    skip = 70 if inputs[0].startswith("http") else 36
    hub.failures = [Failure(on="content", skip=skip, status=451, times=None)]
    with pytest.raises(DataError, match="cannot be read"):
        shard(prefix, tokenizer, *inputs)
    hub.failures = []
    assert list(Path(f"{prefix}.work").glob("part-*.json"))


def test_work_on_a_branch_that_has_moved_is_refused_and_resumes_at_the_old_commit(
    tmp_path: Path, tokenizer: str, hub: StandInHub
) -> None:
    expected = shard(tmp_path / "expected", tokenizer, f"hf://{SET}")
    old = hub.repo(SET).branches["main"]
    broken_off(tmp_path / "resumed", tokenizer, hub, f"hf://{SET}")
    new = hub.commit(SET, {"a.jsonl": OTHER})
    with pytest.raises(UsageError, match=rf"was at commit {old} and is at {new}.*write @{old} after the name"):
        shard(tmp_path / "resumed", tokenizer, f"hf://{SET}")
    with pytest.raises(UsageError, match=f"expected was made from another commit .*{old} and is at {new}"):
        shard(tmp_path / "expected", tokenizer, f"hf://{SET}")
    array = PreprocessSettings(input=[f"hf://{SET}@{old}"], tokenizer=tokenizer, output_prefix=f"{tmp_path}/array", num_tasks=2)
    preprocess(replace(array, task_id=0))
    with pytest.raises(UsageError, match=rf"all tasks must divide the same inputs \(.* {old} and is at {new}"):
        preprocess(replace(array, task_id=1, input=[f"hf://{SET}"]))
    assert shard(tmp_path / "resumed", tokenizer, f"hf://{SET}@{old}") == expected
    manifest = load_manifest(str(tmp_path / "resumed"))
    assert {file.path for file in manifest.input_files} == {f"hf://{SET}@{old}/a.jsonl"}


@pytest.mark.parametrize("kind", ["hf", "http"])
def test_a_file_that_was_replaced_by_one_of_equal_size_is_refused(
    kind: str, tmp_path: Path, tokenizer: str, hub: StandInHub
) -> None:
    commit = hub.repo(SET).branches["main"]
    address = f"hf://{SET}@{commit}/a.jsonl" if kind == "hf" else f"{hub.url}/{SET}/resolve/main/a.jsonl"
    broken_off(tmp_path / "resumed", tokenizer, hub, address)
    (source,) = expand_inputs([address])
    hub.repo(SET).commits[commit]["a.jsonl"] = OTHER  # a mirror, or a store that is no repository
    with pytest.raises(UsageError, match=r"has changed since .same size, written again"):
        shard(tmp_path / "resumed", tokenizer, address)
    with pytest.raises(DataError, match=r"another (hash|version).*start over with --overwrite"):
        list(read_texts([source]))


def test_a_file_that_changes_while_it_is_read_is_refused(hub: StandInHub) -> None:
    commit = hub.repo(SET).branches["main"]
    for address in (f"hf://{SET}@{commit}/a.jsonl", f"{hub.url}/{SET}/resolve/main/a.jsonl"):
        hub.repo(SET).commits[commit]["a.jsonl"] = LINES
        (source,) = expand_inputs([address])

        def read(source: Any = source) -> None:
            blocks = remote_stream.opened_remote(source, 1000, source.num_bytes)
            for stream in blocks:
                assert stream.read(500) == LINES[:500]
                hub.repo(SET).commits[commit]["a.jsonl"] = OTHER
                stream.read(5000)

        with pytest.raises(DataError, match="start over with --overwrite"):
            read()


def test_damaged_bytes_of_a_large_file_are_found(hub: StandInHub) -> None:
    hub.commit(SET, {"c.txt": b"text"})
    hub.lfs.append("*.txt")
    hub.failures = [Failure(on="content", path="c.txt", skip=1, wrong=True)]
    (source,) = expand_inputs([f"hf://{SET}/c.txt"])
    reader = RecordReader(ByteRange(source, 0, source.num_bytes), ReadSettings())
    assert [text for batch in reader.batches() for text in batch.texts] == ["udyu"]
    with pytest.raises(DataError, match=r"c.txt arrived with the SHA-256 .*, the hub names .*run the same command again"):
        reader.record()


def test_work_resumes_after_a_failure_that_outlasts_the_tries(
    tmp_path: Path, tokenizer: str, hub: StandInHub, caplog: pytest.LogCaptureFixture
) -> None:
    expected = shard(tmp_path / "expected", tokenizer, f"hf://{SET}")
    hub.failures = [Failure(on="content", skip=36, status=503, times=None)]
    with pytest.raises(TransientError, match=r"a.jsonl cannot be read: .*503.* \(9 tries in .*finished work is kept") as caught:
        shard(tmp_path / "resumed", tokenizer, f"hf://{SET}")
    assert caught.value.exit_code == UNFORESEEN
    hub.failures, hub.requests = [], []
    assert shard(tmp_path / "resumed", tokenizer, f"hf://{SET}") == expected
    resumed, hub.requests = hub.count("content"), []
    shard(tmp_path / "whole", tokenizer, f"hf://{SET}")
    assert resumed < hub.count("content")


def test_a_retry_after_that_is_too_long_ends_at_once(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    hub.failures = [Failure(on="info", skip=0, times=None, status=429, headers={"Retry-After": "7"})]
    with pytest.raises(TransientError, match="429"):
        expand_inputs([f"hf://{SET}"])
    assert waits
    assert min(waits) >= 7
    waits.clear()
    hub.failures = [Failure(on="info", times=None, status=429, headers={"Retry-After": "90000"})]
    with pytest.raises(TransientError, match="1 tries"):
        expand_inputs([f"hf://{SET}"])
    assert not waits


def test_a_broken_read_continues_at_the_byte_where_it_broke(hub: StandInHub) -> None:
    (source,) = expand_inputs([f"hf://{SET}/a.jsonl"])
    hub.requests.clear()
    hub.failures = [Failure(on="content", break_after=1000), Failure(on="content", short=500)]
    assert list(read_texts([source])) == TEXTS
    last = len(LINES) - 1
    assert [seen.range for seen in hub.requests if seen.on == "content"][:3] == [f"bytes={at}-{last}" for at in (0, 1000, 1500)]


def test_a_whole_file_in_place_of_a_range_is_not_taken_for_the_range(hub: StandInHub) -> None:
    (source,) = expand_inputs([f"hf://{SET}/a.jsonl"])
    hub.failures = [Failure(on="content", ignore_range=True)]
    for stream in remote_stream.opened_remote(source, 1000, source.num_bytes):
        stream.seek(500)
        assert stream.read(700) == LINES[500:1200]
    assert hub.failures[0].met == 1


def test_a_short_page_in_place_of_the_whole_file_is_not_taken_for_its_start(hub: StandInHub) -> None:
    (source,) = expand_inputs([f"hf://{SET}/a.jsonl"])
    hub.failures = [Failure(on="content", ignore_range=True, wrong=True, short=540)]
    assert list(read_texts([source])) == TEXTS
    assert hub.failures[0].met == 1


def test_a_gated_set_is_noticed_even_if_its_first_file_is_empty(hub: StandInHub) -> None:
    hub.commit("datasets/org/gated", {"a.jsonl": b"", "b.jsonl": LINES})
    hub.repo("datasets/org/gated").gated_for = {"hf_owner"}
    with pytest.raises(UsageError, match="datasets/org/gated is gated"):
        expand_inputs(["hf://datasets/org/gated"])


def test_a_bucket_is_refused_before_any_request(hub: StandInHub) -> None:
    with pytest.raises(UsageError, match=r"buckets/org/name/a.jsonl is in a bucket, which has no commits.*give a dataset"):
        expand_inputs(["hf://buckets/org/name/a.jsonl"])
    assert not hub.requests


@pytest.mark.parametrize("on", ["info", "tree"])
def test_a_token_of_another_form_is_hidden_by_its_value(on: str, hub: StandInHub, caplog: pytest.LogCaptureFixture) -> None:
    token = "plain-secret-value"
    hub.tokens.add(token)
    hub.failures = [
        Failure(on=on, status=503, message=f"busy for {token}"),
        Failure(on=on, status=400, message=f"not for {token}", times=None),
    ]
    with hub.used_here(token), pytest.raises(UsageError, match=r"not for \*\*\*") as caught:
        expand_inputs([f"hf://{SET}"])
    assert token not in str(caught.value) + caplog.text


def test_a_token_that_expires_is_read_again(hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.tokens |= {"hf_before", "hf_after"}
    hub.repo(SET).readers = hub.tokens
    (tmp_path / "token").write_text("hf_before")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    (source,) = expand_inputs([f"hf://{SET}/a.jsonl"])
    hub.expired.add("hf_before")
    monkeypatch.setattr(time, "sleep", lambda seconds: (tmp_path / "token").write_text("hf_after"))
    assert list(read_texts([source])) == TEXTS
    hub.expired.add("hf_after")
    hub.requests.clear()
    with pytest.raises(DataError, match=r"refuses the credentials .*is expired.*renew them, then run the same command again"):
        list(read_texts([source]))
    assert hub.count("resolve") == 1 + remote.MOST_REFUSALS


@pytest.mark.parametrize(
    ("address", "token", "message"),
    [
        (f"{SET}@v9/a.jsonl", None, "datasets/org/texts has no such revision; it has main; check the part after @"),
        (f"{SET}/absent.jsonl", None, "does not exist or matches no file"),
        (
            "datasets/org/absent",
            None,
            "has no repository datasets/org/absent, or it is private and this command, without a token,",
        ),
        ("datasets/org/absent", SECRET, "or it is private and the token in HF_TOKEN may not see it"),
        ("datasets/org/private", None, "has no repository datasets/org/private, or it is private"),
        (
            "datasets/org/gated",
            None,
            "datasets/org/gated is gated, and this command, without a token, has no access .*ask for access",
        ),
        ("datasets/org/gated", SECRET, "datasets/org/gated is gated, and the token in HF_TOKEN has no access"),
        (SET, "hf_expiredexpired", "refuses the token in HF_TOKEN .*is expired.*make a new token"),
        (SET, "hf_unknownunknown", "refuses the token in HF_TOKEN .*Invalid credentials"),
        ("texts", None, "not an address of a repository .*expected hf://datasets/ORG/NAME@REVISION/PATH"),
    ],
)
def test_errors_say_what_to_do_before_any_work(
    address: str, token: str | None, message: str, hub: StandInHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    hub.tokens |= {SECRET, "hf_expiredexpired", "hf_owner"}
    hub.expired.add("hf_expiredexpired")
    for name in ("private", "gated"):
        hub.commit(f"datasets/org/{name}", {"a.jsonl": LINES})
    hub.repo("datasets/org/private").readers = hub.repo("datasets/org/gated").gated_for = {"hf_owner"}
    with hub.used_here(token), pytest.raises(UsageError, match=message) as caught:
        shard(tmp_path / "out", "/no/tokenizer", f"hf://{address}")
    assert (token or "no token") not in str(caught.value) + caplog.text
    assert hub.count("content") == 0
    assert not list(tmp_path.iterdir())


def test_offline_mode_is_named(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="unset HF_HUB_OFFLINE"):
        expand_inputs([f"hf://{SET}"])


@pytest.mark.parametrize("ending", ["success", "transient", "refused"])
def test_no_output_has_a_token_or_a_signature(ending: str, tmp_path: Path, tokenizer: str) -> None:
    with stand_in_hub() as hub:
        hub.commit(SET, {"a.jsonl.gz": gzip.compress(LINES), "b.jsonl": LINES})
        hub.tokens.add(SECRET)
        hub.repo(SET).readers = {SECRET}
        hub.failures = [Failure(on="content", path="a*", skip=1, break_after=100), Failure(on="content", path="b*", status=503)]
        if ending != "success":
            status = 404 if ending == "refused" else 503
            hub.failures = [Failure(on="content", path="a*", skip=1, status=status, times=None)]
        program = (
            "import sys; from megatron_ledom.data.readers import remote; remote.WAITS_SECONDS = (0,);"
            " from huggingface_hub.utils import _http; _http.time.sleep = lambda seconds: None;"
            " from megatron_ledom.cli.main import main; from megatron_ledom.errors import run_command; run_command(main)"
        )
        arguments = [
            "preprocess-data",
            "--input",
            f"hf://{SET}",
            "--tokenizer",
            tokenizer,
            "--output-prefix",
            f"{tmp_path}/out",
        ]
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            env={**hub.environment(HF_TOKEN=SECRET), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            timeout=120,
        )
        assert hub.count("content") >= 2
    assert done.returncode == {"success": 0, "transient": UNFORESEEN, "refused": 1}[ending], done.stderr.decode()
    assert b"a.jsonl.gz" in done.stderr
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()) + done.stdout + done.stderr
    assert SECRET.encode() not in written
    assert SIGNATURE.encode() not in written


def test_addresses_with_credentials_are_refused_without_showing_them() -> None:
    for address in (
        "https://user:password9@host/a.jsonl",
        "http://token9@host/a.jsonl",
        "https://host/a.jsonl?X-Amz-Signature=password9",
        "https://host/get?token=password9&name=a.jsonl",
        "s3://user:password9@bucket/a.jsonl",
    ):
        with pytest.raises(UsageError, match="contains credentials") as caught:
            expand_inputs([address])
        assert "9" not in str(caught.value)
    shown = without_secrets(
        f"GET https://u:p9@host/a?X-Amz-Signature=9 failed with 'Bearer {SECRET}' and {SECRET}; hf://datasets/o/n@v9"
    )
    assert shown == "GET https://***@host/a?*** failed with 'Bearer ***' and hf_***; hf://datasets/o/n@v9"


def test_a_large_file_takes_few_requests(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_ledom.data.readers.remote_stream.REMOTE_READ_BYTES", 1 << 20)
    many = b"".join(orjson.dumps({"text": f"{number} " * 50}) + b"\n" for number in range(20000))
    hub.commit(SET, {"a.jsonl": None, "b.jsonl.gz": gzip.compress(many, 0)})
    assert len(texts_of(f"hf://{SET}")) == 20000
    assert hub.count("content") <= 2 + len(many) // (1 << 20) + 1


def test_every_error_is_one_of_ours(hub: StandInHub) -> None:
    (source,) = expand_inputs([f"hf://{SET}/a.jsonl"])
    for status in (400, 404, 410, 451):
        hub.failures = [Failure(on="content", status=status, times=None)]
        with pytest.raises(LedomError, match=str(status)):
            list(read_texts([source]))
