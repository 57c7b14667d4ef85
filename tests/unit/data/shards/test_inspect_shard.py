"""ledom inspect-shard: the content of a shard in text order, and every problem that a test can plant."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_ledom.data.preprocess.pipeline import preprocess
from megatron_ledom.data.preprocess.task import PreprocessSettings
from megatron_ledom.data.shards import verification
from megatron_ledom.data.shards.index_file import HEADER
from megatron_ledom.data.shards.inspection import COUNTED_BELOW, InspectSettings, LengthCounts, inspect_shards
from megatron_ledom.data.shards.verification import verify_shard
from megatron_ledom.direction import Direction
from megatron_ledom.errors import MismatchError, UsageError, VerificationError
from megatron_ledom.storage.hashes import sha256_of
from tests.support.forked import run_forked
from tests.support.legible import EOD_TOKEN, legible_documents, legible_ids, legible_shard, legible_tokenizer, write_jsonl
from tests.support.paths import ROOT

DOCUMENTS = [legible_ids(document, 3 + document) for document in range(5)]
"""Stored lengths 4, 5, 6, 7, 8; document d begins at id 0, 4, 9, 15, 22 of 30."""


@pytest.fixture
def shard(tmp_path: Path) -> str:
    """A shard of documents with 2, 3 and 7 words, without eods."""
    texts = [legible_documents(3, length)[index] for index, length in enumerate((2, 3, 7))]
    return make(tmp_path, Direction.REVERSE, texts, legible_tokenizer(tmp_path / "tokenizer"))


@pytest.fixture
def plain(tmp_path: Path) -> str:
    """A shard of `DOCUMENTS`, with no tokenizer on the disk."""
    return legible_shard(tmp_path / "plain", DOCUMENTS)


def make(folder: Path, direction: Direction, texts: list[str], tokenizer: Path) -> str:
    settings = PreprocessSettings(
        input=[str(write_jsonl(folder / "a.jsonl", texts))],
        tokenizer=str(tokenizer),
        output_prefix=str(folder / f"data_{direction}"),
        direction=direction,
        workers=1,
    )
    preprocess(settings)
    return settings.output_prefix


def bpe_tokenizer(folder: Path, text: str) -> Path:
    """A byte-level BPE, whose tokens of a text depend on the order of its characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=[EOD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOD_TOKEN}))
    return folder


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_forked([ROOT / "tools/inspect_shard.py", *arguments])


def change(path: str, offset: int, values: np.ndarray | bytes) -> None:
    with open(path, "r+b") as stream:
        stream.seek(offset)
        stream.write(bytes(values))


def change_manifest(prefix: str, **values: Any) -> None:
    stored = json.loads(Path(f"{prefix}.json").read_text())
    Path(f"{prefix}.json").write_text(json.dumps({**stored, **values}))


def rehash(prefix: str) -> None:
    """Make the manifest fit the damaged files, as if they were damaged before they were hashed."""
    change_manifest(prefix, bin_sha256=sha256_of(f"{prefix}.bin"), idx_sha256=sha256_of(f"{prefix}.idx"))


def test_the_command_shows_manifest_statistics_and_text_in_text_order(shard: str) -> None:
    done = run(shard, "--show", "2", "--verify")
    assert done.returncode == 0, done.stderr
    for words in (
        "direction  reverse",
        "documents  3",
        "tokens     15",
        "min 3, mean 5.0, median 4, max 8 tokens per document; p5 3, p25 3, p75 8, p95 8, p99 8; 0.00% over 8,192",
        "verified   all 15 tokens",
        "direction  cannot be determined from the ids: of 3 documents",  # every word of the legible tokenizer is a token
    ):
        assert words in done.stdout
    shown = done.stdout.split("--- document ")
    assert shown[1].splitlines()[:2] == ["0, 3 tokens ---", "0 1"]
    assert shown[2].splitlines()[:2] == ["1, 4 tokens ---", "100 101 102"]
    assert len(shown) == 3


def test_control_characters_of_a_text_do_not_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "a\x1b]0;owned\x07b\x1b[2J\r\x9bc\u202ed\te\nf 👩\u200d👧"
    prefix = make(tmp_path, Direction.REVERSE, [text], bpe_tokenizer(tmp_path / "bpe", text))
    capsys.readouterr()
    inspect_shards(InspectSettings(prefixes=[prefix], show=1))
    shown = capsys.readouterr().out
    assert "a\\x1b]0;owned\\x07b\\x1b[2J\\r\\x9bc\\u202ed\te\nf 👩\u200d👧" in shown
    assert not set(shown) & set("\x1b\x07\r\x9b\u202e")


def test_a_forward_shard_reads_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = legible_tokenizer(tmp_path / "tokenizer")
    inspect_shards(InspectSettings(prefixes=[make(tmp_path, Direction.FORWARD, ["200 201 202"], tokenizer)], show=9))
    assert "\n200 201 202\n" in capsys.readouterr().out


def test_the_histogram_has_a_bar_for_each_doubling_of_the_length(shard: str, capsys: pytest.CaptureFixture[str]) -> None:
    inspect_shards(InspectSettings(prefixes=[shard]))
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if " to " in line]
    assert rows == [["2", "to", "3", "1", "#" * 40], ["4", "to", "7", "1", "#" * 40], ["8", "to", "15", "1", "#" * 40]]


@given(
    lengths=st.lists(st.integers(2, 20) | st.integers(2, 3 * COUNTED_BELOW), min_size=1, max_size=50), cut=st.integers(0, 50)
)
def test_statistics_are_those_of_numpy_over_all_lengths(lengths: list[int], cut: int) -> None:
    counts, other = LengthCounts(), LengthCounts()
    counts.add(np.array(lengths[:cut], np.int32))
    other.add(np.array(lengths[cut:], np.int32))
    counts.merge(other)
    said = counts.describe()
    percentiles = np.percentile(lengths, [5, 25, 50, 75, 95, 99], method="inverted_cdf")
    p5, p25, median, p75, p95, p99 = (f"{int(value):,}" for value in percentiles)
    assert f"min {min(lengths):,}, mean {np.mean(lengths):,.1f}, median {median}, max {max(lengths):,} " in said
    assert f"p5 {p5}, p25 {p25}, p75 {p75}, p95 {p95}, p99 {p99}" in said
    assert f"{np.mean(np.array(lengths) > 8192):.2%} over 8,192" in said
    edges, documents = counts.bins()
    assert documents == np.histogram(lengths, edges)[0].tolist()
    assert sum(documents) == len(lengths)


def test_a_plot_of_the_lengths_is_written(shard: str, plain: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    inspect_shards(InspectSettings(prefixes=[shard, plain], histogram=str(tmp_path / "lengths.png")))
    assert (tmp_path / "lengths.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(UsageError, match=r"not a \.png file"):
        inspect_shards(InspectSettings(prefixes=[shard], histogram="lengths.pdf"))
    with pytest.raises(UsageError, match=r"folder of --histogram .* does not exist"):
        inspect_shards(InspectSettings(prefixes=[shard], histogram=str(tmp_path / "no/lengths.png")))


def test_a_missing_matplotlib_is_named(shard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match="needs matplotlib, which is not installed"):
        inspect_shards(InspectSettings(prefixes=[shard], histogram="x.png"))


def flip_byte(prefix: str) -> None:
    change(f"{prefix}.bin", 2 * 10, bytes([203 ^ 1]))  # document 2: 202 instead of 203


def swap_index(prefix: str) -> None:
    other = legible_shard(Path(f"{prefix}_other"), DOCUMENTS[:4])
    shutil.copy(f"{other}.idx", f"{prefix}.idx")


def swap_index_of_equal_count(prefix: str) -> None:
    other = legible_shard(Path(f"{prefix}_other"), [*DOCUMENTS[:2], *DOCUMENTS[:1:-1]])
    shutil.copy(f"{other}.idx", f"{prefix}.idx")


def wrong_lengths(prefix: str) -> None:
    """Make document 1 one id longer and document 2 one shorter, with matching pointers and hashes."""
    change(f"{prefix}.idx", HEADER.size + 4, np.array([6, 5], "<i4").tobytes())
    change(f"{prefix}.idx", HEADER.size + 5 * 4 + 2 * 8, np.array([2 * 10], "<i8").tobytes())
    rehash(prefix)


def only_lengths(prefix: str) -> None:
    change(f"{prefix}.idx", HEADER.size + 4, np.array([6, 5], "<i4").tobytes())
    rehash(prefix)


def id_out_of_range(prefix: str) -> None:
    change(f"{prefix}.bin", 2 * 10, np.array([1001, 2000], "<u2").tobytes())


def id_out_of_range_hashed(prefix: str) -> None:
    id_out_of_range(prefix)
    rehash(prefix)


def missing_eods(prefix: str) -> None:
    for end in (14, 29):
        change(f"{prefix}.bin", 2 * end, np.array([7], "<u2").tobytes())


def eod_inside(prefix: str) -> None:
    change(f"{prefix}.bin", 2 * 16, np.array([1000], "<u2").tobytes())
    rehash(prefix)


def remove(suffix: str) -> Callable[[str], None]:
    return lambda prefix: Path(f"{prefix}{suffix}").unlink()


def truncate(suffix: str, size: int) -> Callable[[str], None]:
    return lambda prefix: os.truncate(f"{prefix}{suffix}", size)


PROBLEMS: dict[str, tuple[Callable[[str], None], list[str]]] = {
    "flipped_byte": (flip_byte, ["plain.bin does not have the sha256", "the changed document cannot be located"]),
    "flipped_byte_out_of_range": (
        lambda prefix: change(f"{prefix}.bin", 2 * 10 + 1, b"\x80"),
        ["plain.bin does not have the sha256", "plain.bin: document 2: id 32971 at 10 is outside the 1,001 ids"],
    ),
    "truncated_bin": (truncate(".bin", 41), ["plain.bin is truncated: it has 41 bytes, its manifest says 60", "sha256"]),
    "lengthened_bin": (
        lambda prefix: change(f"{prefix}.bin", 60, b"\1\1"),
        [
            "plain.bin is too long: it has 62 bytes, its manifest says 60",
            "60 bytes, .bin has 62; every document after the first wrong length",
        ],
    ),
    "truncated_idx": (truncate(".idx", 100), ["plain.idx is truncated: it has 100 bytes, its 5 documents need 142"]),
    "truncated_idx_header": (truncate(".idx", 20), ["plain.idx is truncated: it has 20 bytes, its header alone needs 34"]),
    "idx_of_another_shard": (
        swap_index,
        ["num_documents is 5, but .idx has 4 documents: it is the .idx of another shard", "plain.idx does not have the sha256"],
    ),
    "idx_of_a_shard_with_as_many_documents": (
        swap_index_of_equal_count,
        ["plain.idx does not have the sha256", "plain.bin: document 2 does not end with eod 1000: its last id is 304"],
    ),
    "idx_of_another_dtype": (
        lambda prefix: change(f"{prefix}.idx", 17, b"\4"),
        ["plain.idx has the header", "does not fit a shard of uint16 ids"],
    ),
    "manifest_counts_documents_wrongly": (
        lambda prefix: change_manifest(prefix, num_documents=6),
        ["plain.json: num_documents is 6, but .idx has 5 documents, and its sha256 is right: the manifest was changed"],
    ),
    "manifest_counts_tokens_wrongly": (
        lambda prefix: change_manifest(prefix, num_tokens=31),
        ["plain.json: num_tokens is 31, but .bin, whose sha256 is right, has 30: the manifest was changed"],
    ),
    "wrong_lengths": (
        wrong_lengths,
        ["document 1 does not end with eod 1000", "plain.bin: document 1 has eod 1000 inside, at its id 4"],
    ),
    "wrong_lengths_alone": (
        only_lengths,
        ["plain.idx: document 2 begins at byte 18; from there on the pointers are not the running sum of the lengths"],
    ),
    "id_out_of_range": (id_out_of_range, ["sha256", "plain.bin: document 2: id 1001 at 10 is outside the 1,001 ids"]),
    "id_out_of_range_from_the_start": (id_out_of_range_hashed, ["plain.bin: document 2: id 1001 at 10 is outside"]),
    "missing_eod": (
        missing_eods,
        ["plain.bin: document 2 does not end with eod 1000: its last id is 7 (and 1 more documents)", "sha256"],
    ),
    "eod_inside": (eod_inside, ["plain.bin: document 3 has eod 1000 inside, at its id 1"]),
    "manifest_missing": (remove(".json"), ["the manifest", "plain.json does not: the shard was not finished"]),
    "bin_missing": (remove(".bin"), ["plain.bin is missing"]),
    "idx_missing": (remove(".idx"), ["plain.idx is missing"]),
    "manifest_of_another_dtype": (lambda prefix: change_manifest(prefix, dtype="int8"), ["plain.json: dtype 'int8' is not"]),
}


@pytest.mark.parametrize("block_bytes", [2, 1 << 20])
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_planted_problem_is_found_and_named(
    plain: str, name: str, block_bytes: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verification, "BLOCK_BYTES", block_bytes)
    damage, expected = PROBLEMS[name]
    assert verify_shard(plain) == []
    damage(plain)
    with pytest.raises(VerificationError, match=r"1 of 1 shards damaged: .*plain \("):
        inspect_shards(InspectSettings(prefixes=[plain], verify=True))
    said = capsys.readouterr().err
    for words in expected:
        assert words in said
    assert all(line.startswith("problem: ") for line in said.splitlines())


def test_a_wrong_direction_is_found_by_encoding_again(tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer(tmp_path / "tokenizer", "banana bandana cabana nana anna")
    texts = [f"{word} nabanana canadana bannanada" for word in ("banana", "nabandana", "cabana", "dananaba")]
    for direction, other in ((Direction.REVERSE, "forward"), (Direction.FORWARD, "reverse")):
        prefix = make(tmp_path, direction, texts, tokenizer)
        done = run(prefix, "--verify")
        assert done.returncode == 0, done.stderr
        assert f"{direction} is right: of 4 documents that were decoded and encoded again, 4 keep their ids only" in done.stdout
        change_manifest(prefix, direction=other)
        done = run(prefix, "--verify")
        assert done.returncode == 1
        assert f"problem: {prefix}.json: the manifest says {other}, but the ids are {direction}: of 4" in done.stderr
        assert f"0 keep their ids only if the shard is {other}, 4 only if it is {direction}" in done.stderr


def test_without_the_tokenizer_the_direction_is_reported_as_not_checked(
    plain: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inspect_shards(InspectSettings(prefixes=[plain], verify=True))
    assert "direction  not checked: the shard's tokenizer is not at a recorded path" in capsys.readouterr().out
    with pytest.raises(UsageError, match="not at no such"):
        inspect_shards(InspectSettings(prefixes=[plain], verify=True, tokenizer="no such"))


def test_the_other_shards_are_inspected_after_a_damaged_one(tmp_path: Path) -> None:
    for name in "abc":
        legible_shard(tmp_path / name, DOCUMENTS)
    os.truncate(tmp_path / "a.bin", 4)
    (tmp_path / "b.json").unlink()
    done = run(str(tmp_path / "?"), "--verify")
    assert done.returncode == 1
    assert "verified   all 30 tokens" in done.stdout
    assert "a.bin is truncated" in done.stderr
    assert "b.json does not" in done.stderr
    assert "error: 2 of 3 shards damaged" in done.stderr
    done = run(str(tmp_path / "a"))  # problems that need no reading are found without --verify
    assert done.returncode == 1
    assert "a.bin is truncated" in done.stderr
    assert run(str(tmp_path / "c"), str(tmp_path / "d")).returncode == 2


def test_verify_prints_the_report_before_the_problem(shard: str, capsys: pytest.CaptureFixture[str]) -> None:
    change(f"{shard}.idx", 50, b"\7\0")
    with pytest.raises(VerificationError):
        inspect_shards(InspectSettings(prefixes=[shard], verify=True))
    said = capsys.readouterr()
    assert "documents  3" in said.out
    assert ".idx" in said.err


def test_another_tokenizer_is_refused_and_a_moved_one_must_be_named(shard: str, tmp_path: Path) -> None:
    other = legible_tokenizer(tmp_path / "other")
    stored = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(stored.replace('"5": 5', '"5": 6').replace('"6": 6', '"6": 5'))
    with pytest.raises(MismatchError, match="is not that of the shard"):
        inspect_shards(InspectSettings(prefixes=[shard], show=1, tokenizer=str(other)))
    (tmp_path / "tokenizer").rename(tmp_path / "moved")
    with pytest.raises(UsageError, match="name it by --tokenizer"):
        inspect_shards(InspectSettings(prefixes=[shard], show=1))
    inspect_shards(InspectSettings(prefixes=[shard], show=1, tokenizer=str(tmp_path / "moved")))
