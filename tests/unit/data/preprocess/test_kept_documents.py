"""Optional steps of preprocessing: limits, filters, exact deduplication across tasks, shuffling. None depends on the workers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ledom.data.preprocess.deduplication import first_occurrences, hashes_of
from megatron_ledom.data.preprocess.pipeline import preprocess
from megatron_ledom.data.preprocess.task import PreprocessSettings
from megatron_ledom.data.shards.shard import ShardManifest, ShardReader
from megatron_ledom.errors import LedomError, UsageError
from tests.support.legible import EOD_ID, legible_documents, legible_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(legible_tokenizer(tmp_path_factory.mktemp("tokenizer") / "legible"))


def made(folder: Path, tokenizer: str, name: str = "data", **changes: Any) -> ShardManifest:
    settings = {"input": [f"{folder}/*.jsonl"], "tokenizer": tokenizer, "output_prefix": f"{folder}/{name}", "workers": 1}
    manifest = preprocess(PreprocessSettings(**{**settings, **changes}))
    assert manifest is not None
    return manifest


def documents(prefix: str) -> list[list[int]]:
    """Return the documents in model order, without eod."""
    reader = ShardReader(prefix)
    return [reader.document(index).tolist()[:-1] for index in range(len(reader))]


def keep_even(text: str, record: Mapping[str, Any]) -> bool:
    """Filter by a field other than the text."""
    return bool(record["number"] % 2 == 0)


def test_length_limits_count_the_skipped_documents(tmp_path: Path, tokenizer: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["1", "1 2", "1 2 3", "", "1 2 3 4", "5 6 7"])
    manifest = made(tmp_path, tokenizer, min_tokens=2, max_tokens=3)
    assert manifest.skipped == {"no_tokens": 1, "too_long": 1, "too_short": 1}
    assert documents(f"{tmp_path}/data") == [[2, 1], [3, 2, 1], [7, 6, 5]]
    assert manifest.text_bytes == 3 + 5 + 5


def test_a_filter_sees_text_and_record(tmp_path: Path, tokenizer: str) -> None:
    lines = [f'{{"text": "{number}", "number": {number}}}\n' for number in range(10)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    manifest = made(
        tmp_path, tokenizer, filter="tests.unit.data.preprocess.test_kept_documents:keep_even", workers=2, part_bytes=60
    )
    assert documents(f"{tmp_path}/data") == [[number] for number in range(0, 10, 2)]
    assert manifest.skipped == {"filtered": 5}


def test_a_filter_that_fails_is_an_error_with_the_line_of_code(tmp_path: Path, tokenizer: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["1"])
    with pytest.raises(LedomError, match=r"the function of --filter failed; repair it:[\s\S]*KeyError: 'number'"):
        made(tmp_path, tokenizer, filter="tests.unit.data.preprocess.test_kept_documents:keep_even")


TEXTS = ["1", "2", "1", "3", "2", "4", "1", "5", "5", "6"]


@pytest.mark.parametrize("workers", [1, 3])
def test_of_equal_documents_the_first_one_stays(tmp_path: Path, tokenizer: str, workers: int) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    manifest = made(tmp_path, tokenizer, deduplicate=True, workers=workers, part_bytes=30)
    assert documents(f"{tmp_path}/data") == [[number] for number in range(1, 7)]
    assert manifest.skipped == {"duplicate": 4}


def test_tasks_deduplicate_across_each_other_in_any_order(tmp_path: Path, tokenizer: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(UsageError, match="run all tasks with --hash-only first"):
        made(tmp_path, tokenizer, deduplicate=True, task_id=2, num_tasks=3)
    for task in (2, 0, 1):
        hash_only = {"hash_only": True, "task_id": task, "num_tasks": 3, "workers": 1}
        settings = {"input": [f"{tmp_path}/*.jsonl"], "tokenizer": tokenizer, "output_prefix": f"{tmp_path}/data"}
        assert preprocess(PreprocessSettings(**settings, **hash_only)) is None  # type: ignore[arg-type]
    skipped, found = 0, []
    for task in (1, 2, 0):
        skipped += made(tmp_path, tokenizer, deduplicate=True, task_id=task, num_tasks=3).skipped["duplicate"]
    for task in range(3):
        found += documents(f"{tmp_path}/data-{task:05d}-of-00003")
    assert found == [[number] for number in range(1, 7)]
    assert skipped == 4
    write_jsonl(tmp_path / "b.jsonl", ["7"])
    with pytest.raises(UsageError, match=r"\.hashes was made from other inputs or options"):
        made(tmp_path, tokenizer, deduplicate=True, task_id=2, num_tasks=3)


@given(tasks=st.lists(st.lists(st.integers(0, 5).map(str), max_size=8), min_size=1, max_size=4))
def test_first_occurrences_are_those_of_a_set(tasks: list[list[str]]) -> None:
    seen: set[str] = set()
    for number, texts in enumerate(tasks):
        expected = []
        for text in texts:
            expected.append(text not in seen)
            seen.add(text)
        earlier = (hashes_of(others) for others in tasks[:number])
        assert first_occurrences(hashes_of(texts), earlier).tolist() == expected


def test_hashes_that_agree_in_one_half_are_distinguished() -> None:
    own = np.array([[1, 1], [1, 2], [1, 3], [2, 1], [1, 2]], np.uint64)
    others = np.array([[1, 3], [1, 0], [1, 4], [3, 1], [2, 1]], np.uint64)
    assert first_occurrences(own, iter([others])).tolist() == [True, True, False, False, False]
    assert first_occurrences(own, iter([])).tolist() == [True, True, True, True, False]


def test_a_shuffle_depends_on_its_seed_alone(tmp_path: Path, tokenizer: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", legible_documents(9, 20) * 3)
    made(tmp_path, tokenizer, "plain")
    plain = documents(f"{tmp_path}/plain")
    orders = {}
    for name, seed, workers, part_bytes in [("a", 1, 1, 1 << 20), ("b", 1, 3, 100), ("c", 2, 1, 1 << 20)]:
        made(tmp_path, tokenizer, name, shuffle_seed=seed, workers=workers, part_bytes=part_bytes)
        orders[name] = documents(f"{tmp_path}/{name}")
        assert sorted(orders[name]) == sorted(plain)
    assert orders["a"] == orders["b"]
    assert len({str(order) for order in (plain, orders["a"], orders["c"])}) == 3


def test_bos_is_first_in_model_order(tmp_path: Path, tokenizer: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["1 2", "", "3"])
    manifest = made(tmp_path, tokenizer, bos_token="999")
    reader = ShardReader(f"{tmp_path}/data")
    assert reader.ids.tolist() == [999, 2, 1, EOD_ID, 999, 3, EOD_ID]
    assert manifest.bos_token == "999"
    assert made(tmp_path, tokenizer, "by_id", eod_id=7).eod_token == "7"


def test_the_specials_of_the_original_can_be_added(tmp_path: Path, tokenizer: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["1 2", "<EOD>"])
    manifest = made(tmp_path, tokenizer, add_specials=True)
    assert (manifest.vocab_size, manifest.eod_token, manifest.eod_id) == (1006, "<EOD>", 1003)
    assert manifest.tokenizer_path == f"{tmp_path}/data.tokenizer"
    again = made(tmp_path, manifest.tokenizer_path, "again")
    assert (again.tokenizer_sha256, again.eod_id) == (manifest.tokenizer_sha256, manifest.eod_id)
    with pytest.raises(UsageError, match="already has <CLS>, <EOD>, <MASK>, <PAD>, <SEP>"):
        made(tmp_path, manifest.tokenizer_path, "twice", add_specials=True)
