"""tools/inspect_shard.py: what a shard holds, in reading order, and its faults."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ledom.data.inspection import InspectSettings, inspect_shard
from megatron_ledom.data.preprocess import PreprocessSettings, preprocess
from megatron_ledom.direction import Direction
from megatron_ledom.errors import MismatchError, UsageError, VerificationError
from tests.legible import legible_documents, legible_tokenizer, write_jsonl

ROOT = Path(__file__).parents[2]


@pytest.fixture
def shard(tmp_path: Path) -> str:
    """Documents of 2, 3 and 7 words, eods not counted."""
    return make(tmp_path, Direction.REVERSE)


def make(folder: Path, direction: Direction) -> str:
    texts = [legible_documents(3, length)[index] for index, length in enumerate((2, 3, 7))]
    settings = PreprocessSettings(
        input=[str(write_jsonl(folder / "a.jsonl", texts))],
        tokenizer=str(legible_tokenizer(folder / "tokenizer")),
        output_prefix=str(folder / "data"),
        direction=direction,
        workers=1,
    )
    preprocess(settings)
    return settings.output_prefix


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/inspect_shard.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_shows_manifest_statistics_and_text_in_reading_order(shard: str) -> None:
    done = run(shard, "--show", "2", "--verify")
    assert done.returncode == 0, done.stderr
    for words in (
        "direction  reverse",
        "documents  3",
        "tokens     15",
        "mean 5.0, median 4, max 8",
        "verified   all 15 tokens",
    ):
        assert words in done.stdout
    shown = done.stdout.split("--- document ")
    assert shown[1].splitlines()[:2] == ["0, 3 tokens ---", "0 1"]
    assert shown[2].splitlines()[:2] == ["1, 4 tokens ---", "100 101 102"]
    assert len(shown) == 3


def test_a_forward_shard_reads_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect_shard(InspectSettings(prefix=make(tmp_path, Direction.FORWARD), show=9))
    assert "200 201 202 203 204 205 206" in capsys.readouterr().out


def test_a_fault_exits_with_one_and_is_named(shard: str) -> None:
    with open(f"{shard}.bin", "r+b") as stream:
        stream.write(b"\7\0")
    done = run(shard, "--verify")
    assert done.returncode == 1
    assert "data.bin has not the sha256 of its manifest" in done.stderr
    os.truncate(f"{shard}.bin", 10)
    done = run(shard)
    assert done.returncode == 1
    assert "data.bin is truncated" in done.stderr
    assert run(f"{shard}x").returncode == 2


def test_verify_prints_the_report_before_the_fault(shard: str, capsys: pytest.CaptureFixture[str]) -> None:
    with open(f"{shard}.idx", "r+b") as stream:
        stream.seek(50)
        stream.write(b"\7\0")
    with pytest.raises(VerificationError, match="idx"):
        inspect_shard(InspectSettings(prefix=shard, verify=True))
    assert "documents  3" in capsys.readouterr().out


def test_another_tokenizer_is_refused_and_a_moved_one_is_asked_for(shard: str, tmp_path: Path) -> None:
    other = legible_tokenizer(tmp_path / "other")
    stored = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(stored.replace('"5": 5', '"5": 6').replace('"6": 6', '"6": 5'))
    with pytest.raises(MismatchError, match="is not the one of the shard"):
        inspect_shard(InspectSettings(prefix=shard, show=1, tokenizer=str(other)))
    (tmp_path / "tokenizer").rename(tmp_path / "moved")
    with pytest.raises(UsageError, match="name it by --tokenizer"):
        inspect_shard(InspectSettings(prefix=shard, show=1))
    inspect_shard(InspectSettings(prefix=shard, show=1, tokenizer=str(tmp_path / "moved")))
