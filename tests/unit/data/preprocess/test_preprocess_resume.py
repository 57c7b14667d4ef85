"""Killed preprocessing: finished parts are kept, the same command resumes, and the bytes equal those of an undisturbed run."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.data.preprocess.pipeline import preprocess
from megatron_ledom.data.preprocess.task import PreprocessSettings
from megatron_ledom.data.shards.shard import check_shard
from megatron_ledom.data.shards.verification import verify_shard
from megatron_ledom.errors import DataError, UsageError
from tests.support.legible import legible_documents, legible_tokenizer, write_jsonl

NUM_KILLS = 5
NUM_KILLS_SLOW = 50
RUN = """
import json, logging, os, signal, sys
from megatron_ledom.data.preprocess.pipeline import preprocess
from megatron_ledom.data.preprocess.task import PreprocessSettings
logging.basicConfig(level=logging.INFO, format="%(message)s")
settings, die_at, die_in = json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
parent, calls, rename = os.getpid(), [], os.replace
def replace(*names):
    calls.append(names)
    if len(calls) == die_at and (os.getpid() == parent) == (die_in == "parent"):
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(*names)
os.replace = replace
preprocess(PreprocessSettings(**settings))
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(legible_tokenizer(tmp_path_factory.mktemp("tokenizer") / "legible"))


def settings_in(folder: Path, tokenizer: str, name: str, **changes: Any) -> dict[str, Any]:
    """Return the settings of a run over folder/*.jsonl in many parts."""
    given = {"input": [f"{folder}/*.jsonl"], "tokenizer": tokenizer, "output_prefix": f"{folder}/out/{name}"}
    return {**given, "workers": 2, "part_bytes": 20_000, **changes}


def start(settings: dict[str, Any], die_at: int = 0, die_in: str = "parent") -> subprocess.Popen[str]:
    """Start the run in its own process. The process or a worker can be made to die before its nth renaming of a file."""
    command = [sys.executable, "-c", RUN, json.dumps(settings), str(die_at), die_in]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def shard_bytes(prefix: str) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def check_killed_at_random(folder: Path, tokenizer: str, num_kills: int, **changes: Any) -> None:
    """Kill the run a number of times, let it finish, and compare with an undisturbed run."""
    before = time.monotonic()
    quiet = start(settings_in(folder, tokenizer, "quiet", **changes))
    assert quiet.wait(timeout=120) == 0
    duration = time.monotonic() - before
    expected = shard_bytes(f"{folder}/out/quiet")
    seed = random.randrange(1 << 32)
    print(f"kills by random.Random({seed})")
    moments = random.Random(seed)
    killed = num_resumed = round_number = 0
    while killed < num_kills:
        settings, was_killed = settings_in(folder, tokenizer, f"killed{round_number}", **changes), True
        while was_killed:
            process = start(settings)
            time.sleep(moments.uniform(0.2, 1.1) * duration)
            if killed < num_kills:
                process.kill()  # it may have just ended
            _, errors = process.communicate(timeout=120)
            num_resumed += "parts were finished before" in errors
            assert process.returncode in (0, -signal.SIGKILL), errors
            was_killed = process.returncode != 0
            killed += was_killed
        prefix = settings["output_prefix"]
        assert shard_bytes(prefix) == expected
        assert verify_shard(prefix) == []
        assert sorted(path.name for path in Path(prefix).parent.glob(f"killed{round_number}.*")) == [
            f"killed{round_number}{suffix}" for suffix in (".bin", ".idx", ".json")
        ]
        round_number += 1
    assert num_resumed, "no kill left finished parts: the test kills too early"


def write_corpus(folder: Path, copies: int) -> None:
    for number in range(3):
        write_jsonl(folder / f"{number}.jsonl", legible_documents(9, 90 - number) * copies)


def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path: Path, tokenizer: str) -> None:
    write_corpus(tmp_path, 300)
    check_killed_at_random(tmp_path, tokenizer, NUM_KILLS)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"shuffle_seed": 3, "deduplicate": True}], ids=["plain", "shuffled"])
def test_killed_many_times_it_ends_with_the_same_bytes(tmp_path: Path, tokenizer: str, changes: dict[str, Any]) -> None:
    write_corpus(tmp_path, 300)
    check_killed_at_random(tmp_path, tokenizer, NUM_KILLS_SLOW, **changes)


def test_workers_killed_at_their_renamings_lose_one_part(tmp_path: Path, tokenizer: str) -> None:
    write_corpus(tmp_path, 2)
    quiet = settings_in(tmp_path, tokenizer, "quiet", part_bytes=4000)
    assert start(quiet).wait(timeout=60) == 0
    settings = settings_in(tmp_path, tokenizer, "killed", part_bytes=4000, workers=1)
    for die_at in (2, 3, 2):  # the first renaming that is counted is that of plan.json, if there is none yet
        process = start(settings, die_at, "worker")
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "a worker process was killed by SIGKILL" in errors
    assert start(settings).wait(timeout=60) == 0
    assert shard_bytes(settings["output_prefix"]) == shard_bytes(quiet["output_prefix"])


def interrupted(folder: Path, tokenizer: str, **changes: Any) -> dict[str, Any]:
    """Return the settings of a run that has finished some parts and then found a bad record."""
    write_corpus(folder, 2)
    with (folder / "2.jsonl").open("a") as file:
        file.write("{\n")
    settings = settings_in(folder, tokenizer, "a", part_bytes=4000, workers=1, **changes)
    with pytest.raises(DataError, match=r"2\.jsonl:19: malformed JSON"):
        preprocess(PreprocessSettings(**settings))
    assert list((folder / "out/a.work").glob("part-*.json"))
    return settings


def test_finished_parts_serve_a_run_that_skips_what_failed(tmp_path: Path, tokenizer: str) -> None:
    settings = {**interrupted(tmp_path, tokenizer), "on_error": "skip"}
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/a.work").glob("part-*.json")}
    again = start(settings)
    _, errors = again.communicate(timeout=60)
    assert again.returncode == 0, errors
    assert f"{len(parts)} of" in errors
    assert check_shard(settings["output_prefix"]).skipped == {"malformed_json": 1}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"direction": "forward"}, "direction was 'reverse' and is 'forward'"),
        ({"text_key": "body"}, "text_key was 'text' and is 'body'"),
        ({"eod_token": "999"}, "eod_token was '<eod>' and is '999'"),
        ({"dtype": "int32"}, "dtype was 'uint16' and is 'int32'"),
        ({"min_tokens": 2}, "min_tokens was 1 and is 2"),
        ({"shuffle_seed": 1}, "shuffle_seed was None and is 1"),
    ],
)
def test_another_request_than_the_unfinished_one_is_refused_with_the_differences(
    tmp_path: Path, tokenizer: str, change: dict[str, Any], words: str
) -> None:
    settings = interrupted(tmp_path, tokenizer)
    with pytest.raises(UsageError, match=re.escape(words)):
        preprocess(PreprocessSettings(**{**settings, **change}))


def test_overwriting_resumes_from_its_own_parts_and_discards_those_of_another_request(tmp_path: Path, tokenizer: str) -> None:
    """A batch system may start a job with --overwrite again and again, and the job must finish."""
    settings = {**interrupted(tmp_path, tokenizer), "on_error": "skip", "overwrite": True}
    parts = {path.name: path.stat().st_ino for path in (tmp_path / "out/a.work").glob("part-*.bin")}
    process = start(settings, die_at=2)  # after plan.json, before .bin gets its name
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    after = {path.name: path.stat().st_ino for path in (tmp_path / "out/a.work").glob("part-*.bin")}
    assert all(after[name] == inode for name, inode in list(parts.items())[:1])
    again = start({**settings, "direction": "forward"}, die_at=2)
    _, errors = again.communicate(timeout=60)
    assert "were finished before" not in errors
    assert again.returncode == -signal.SIGKILL
    last = start({**settings, "direction": "forward"})
    _, errors = last.communicate(timeout=60)
    assert (last.returncode, "were finished before" in errors) == (0, True), errors
    assert check_shard(settings["output_prefix"]).direction == "forward"


FILTER = "def keep(text, record):\n    return {}\n"


def test_an_edited_filter_is_another_request(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "chosen.py").write_text(FILTER.format(True))
    settings = interrupted(tmp_path, tokenizer, filter="chosen:keep")
    (tmp_path / "chosen.py").write_text(FILTER.format("'7' in text"))
    with pytest.raises(UsageError, match="filter_source was"):
        preprocess(PreprocessSettings(**settings))


@pytest.mark.parametrize("shuffle_seed", [None, 3])
def test_a_part_that_a_power_failure_destroyed_is_made_again(tmp_path: Path, tokenizer: str, shuffle_seed: int | None) -> None:
    settings = {**interrupted(tmp_path, tokenizer, shuffle_seed=shuffle_seed), "on_error": "skip"}
    part = tmp_path / "out/a.work/part-000000.bin"
    size = part.stat().st_size
    part.write_bytes(bytes(size))
    (tmp_path / "out/a.work/part-000001.len").unlink()
    (tmp_path / "out/a.work/part-000002.json").write_bytes(b"")
    assert preprocess(PreprocessSettings(**settings)) is not None
    quiet = settings_in(tmp_path, tokenizer, "quiet", on_error="skip", shuffle_seed=shuffle_seed)
    preprocess(PreprocessSettings(**quiet))
    assert shard_bytes(settings["output_prefix"]) == shard_bytes(quiet["output_prefix"])


def test_parts_that_skipped_bad_records_do_not_serve_a_run_that_must_not(tmp_path: Path, tokenizer: str) -> None:
    settings = interrupted(tmp_path, tokenizer)
    process = start({**settings, "on_error": "skip"}, die_at=2)  # the first renaming is that of plan.json
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(UsageError, match="on_error was 'skip' and is 'fail'"):
        preprocess(PreprocessSettings(**settings))


def test_a_changed_input_or_tokenizer_is_refused_by_name(tmp_path: Path, tokenizer: str) -> None:
    settings = interrupted(tmp_path, tokenizer)
    first = tmp_path / "0.jsonl"
    state = first.stat()
    os.utime(first, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    with pytest.raises(UsageError, match=r"0\.jsonl has changed since .same size, written again"):
        preprocess(PreprocessSettings(**settings))
    os.utime(first, ns=(state.st_atime_ns, state.st_mtime_ns))
    with first.open("a") as file:
        file.write("\n")
    with pytest.raises(
        UsageError, match=rf"0\.jsonl has changed since .{state.st_size:,} bytes then, {state.st_size + 1:,} now"
    ):
        preprocess(PreprocessSettings(**settings))
    with first.open("rb+") as file:
        file.truncate(state.st_size)
    os.utime(first, ns=(state.st_atime_ns, state.st_mtime_ns))
    new = write_jsonl(tmp_path / "3.jsonl", ["1"])
    with pytest.raises(UsageError, match=r"the input .*3\.jsonl is new"):
        preprocess(PreprocessSettings(**settings))
    new.unlink()
    other = legible_tokenizer(tmp_path / "other")
    stored = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(stored.replace('"5": 5,', '"five": 5,'))
    with pytest.raises(UsageError, match=r"tokenizer was '[0-9a-f]{40}"):
        preprocess(PreprocessSettings(**{**settings, "tokenizer": str(other)}))
    (tmp_path / "2.jsonl").unlink()
    with pytest.raises(UsageError, match=r"2\.jsonl is no longer among the inputs"):
        preprocess(PreprocessSettings(**settings))
    assert preprocess(PreprocessSettings(**{**settings, "overwrite": True})) is not None
