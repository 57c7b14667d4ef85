"""Evaluation items for the search for contamination: all known sets of a folder, and JSON lines of the user."""

import json
from pathlib import Path

import pytest

from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.evaluation.known_items import read_known_items
from tests.support.evaluation_sets import SETS, write_sets


def test_a_folder_gives_the_items_of_every_set_but_not_of_training_parts(tmp_path: Path) -> None:
    items = read_known_items([str(write_sets(tmp_path / "sets"))])
    found = {item.set for item in items}
    assert {"gsm8k", "math500", "svamp", "boolq", "hellaswag", "winogrande", "piqa", "arc_easy", "humaneval"} <= found
    assert not any("Carl" in item.question for item in items)
    by_set = {item.set: item for item in reversed(items)}
    assert by_set["gsm8k"].question == SETS["gsm8k_test"][0]["question"]
    assert by_set["gsm8k"].answer == "2 + 1000 = 1002. 1002"
    assert by_set["boolq"].question == "is ice cold?"
    assert by_set["winogrande"].question == "The cup fits the box, for the cup is small."
    assert (by_set["piqa"].answer, by_set["piqa"].choices) == ("Add ice.", ("Add fire.",))
    assert by_set["hellaswag"].answer == "adds salt."
    assert "return a + 1" in by_set["humaneval"].answer


def test_own_lines_need_a_question_only(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    lines = [{"question": "Why?"}, {"question": "How many?", "answer": 4, "choices": ["3", "4"], "id": "x"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = read_known_items([str(path)])
    assert (first.set, first.number, first.question, first.answer) == ("own", 0, "Why?", "")
    assert (second.number, second.answer, second.choices) == (1, "4", ("3",))


@pytest.mark.parametrize(
    "line", [{"text": "a"}, {"question": 3}, {"question": "a", "choices": "b"}, {"question": "a", "answer": ["b"]}]
)
def test_own_lines_of_another_form_are_refused_with_their_place(tmp_path: Path, line: dict[str, object]) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"question": "a"}) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(DataError, match=r"own\.jsonl:2.* expected \{question: text"):
        read_known_items([str(path)])


def test_a_path_without_items_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist; give a folder as for"):
        read_known_items([str(tmp_path / "none")])
    with pytest.raises(UsageError, match="has no file of a known set; expected gsm8k_test"):
        read_known_items([str(tmp_path)])
    (tmp_path / "own.jsonl").write_text("\n")
    with pytest.raises(DataError, match="have no items"):
        read_known_items([str(tmp_path / "own.jsonl")])


def test_a_set_is_read_once_a_lost_one_is_refused_and_an_unknown_one_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_sets(tmp_path / "sets")
    num_items = len(read_known_items([str(folder)]))
    assert not caplog.messages
    again = next(folder.glob("gsm8k_test.jsonl*"))
    (folder / "gsm8k_test.parquet").write_bytes(again.read_bytes())
    (folder / "mmlu.jsonl").write_text("")
    assert len(read_known_items([str(folder)])) == num_items
    assert "not searched, because no known set has the name: gsm8k_test.parquet, mmlu.jsonl" in caplog.text
    (folder / "gsm8k_test.parquet").unlink()
    again.rename(tmp_path / "gone")
    (folder / "gsm8k_test.jsonl").symlink_to("nowhere")
    with pytest.raises(UsageError, match=r"gsm8k_test\.jsonl is a link to nowhere"):
        read_known_items([str(folder)])
