"""Items from files: row formats, refused files, few-shot examples, and the judgement of answers."""

import json
import math
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.evaluation.evaluate_command import list_tasks
from megatron_ledom.evaluation.grading.answers import comparison_by
from megatron_ledom.evaluation.results import share
from megatron_ledom.evaluation.tasks.loading import all_tasks, content_hash, load_task, parse_row, task_named
from megatron_ledom.evaluation.written_answers import prompt_of, write_answers
from tests.support.evaluation_sets import SETS, write_sets
from tests.support.scripted_model import Scripted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("sets") / "data")


def test_items_of_the_published_row_formats(folder: Path) -> None:
    first = {name: load_task(name, folder).items[0] for name in ("gsm8k", "svamp", "boolq", "hellaswag", "winogrande")}
    assert first["gsm8k"].values["chain"] == "2 + 1000 = 1002."
    assert first["gsm8k"].gold == ("1002",)
    assert first["svamp"].values["question"] == "Ann has 2 pears. Ben has 3. How many pears are there?"
    assert (first["svamp"].values["chain"], first["svamp"].gold) == ("( 2 + 3 )", ("5",))
    assert (first["boolq"].choices, first["boolq"].gold) == (("no", "yes"), 1)
    assert first["hellaswag"].choices == ("Stop.", "adds salt.")
    assert first["winogrande"].values["after"] == " is small."
    assert load_task("arc_easy", folder).items[0].values == {"question": "What is cold?", "answer": "ice"}
    assert load_task("piqa", folder).items[0].choices == ("Add ice.", "Add fire.")
    assert load_task("triviaqa", folder).items[0].gold == ("Paris", "City of Paris")


def test_the_hash_of_the_content_is_the_same_for_every_kind_of_file_and_another_for_other_items(tmp_path: Path) -> None:
    rows = SETS["boolq_validation"]
    others = [rows[::-1], [{**rows[0], "answer": False}, rows[1]], [{**rows[0], "question": "is ice warm"}, rows[1]]]
    found = []
    for number, version in enumerate([rows, rows, *others]):
        data = tmp_path / str(number)
        data.mkdir()
        if number == 1:
            pq.write_table(pa.Table.from_pylist(version), data / "boolq_validation.parquet")
        else:
            (data / "boolq_validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in version))
        found.append(load_task("boolq", data).content_sha256)
    assert found[0] == found[1] == load_task("boolq", tmp_path / "0", limit=1).content_sha256
    assert len(set(found)) == 4


def test_a_worked_solution_is_not_part_of_the_content_hash() -> None:
    """It is never judged, and only some copies of a set have it. An answer is judged."""
    task, row = task_named("aime24"), {"problem": "What is 1 + 1?", "answer": "2"}
    versions = (row, {**row, "solution": "Count."}, {**row, "answer": "3"})
    without, worked, other = (content_hash([parse_row(task, version, "set.jsonl:1")]) for version in versions)
    assert without == worked != other


@pytest.mark.parametrize(
    ("task", "name", "changed", "message"),
    [
        (
            "gsm8k",
            "gsm8k_test",
            {"answer": None},
            "answer is missing; found the fields question, answer, expected {question: text",
        ),
        ("gsm8k", "gsm8k_test", {"answer": "no mark"}, "does not end with '#### NUMBER'"),
        ("boolq", "boolq_validation", {"answer": "yes"}, "answer is 'yes', expected: yes or no"),
        ("hellaswag", "hellaswag_validation", {"label": ""}, "the right choice is '', expected 0 to 1"),
        ("hellaswag", "hellaswag_validation", {"label": 2}, "the right choice is 2, expected 0 to 1"),
        ("arc_challenge", "arc_challenge_test", {"answerKey": "E"}, "the right choice is 'E', expected A, B"),
        ("winogrande", "winogrande_validation", {"sentence": "No gap."}, "has no _"),
        ("triviaqa", "triviaqa_validation", {"answer": "Paris"}, "answer.value is missing"),
    ],
)
def test_a_wrong_field_is_refused_with_what_is_expected(task: str, name: str, changed: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=r"set\.jsonl:3 is not an item of") as caught:
        parse_row(task_named(task), {**SETS[name][0], **changed}, "set.jsonl:3")
    assert message in str(caught.value)
    assert task_named(task).download in str(caught.value)


def test_files_that_are_no_sets_are_refused(tmp_path: Path) -> None:
    for content, message in (
        (b"[1]\n", "a list, expected an object"),
        (b"{\n", "not a line of JSON"),
        (b"\n", "contains no items"),
    ):
        (tmp_path / "svamp.jsonl").write_bytes(content)
        with pytest.raises(DataError, match=message):
            load_task("svamp", tmp_path)
    with pytest.raises(UsageError, match=r"needs its items in .*/piqa_validation with one of .*it contains svamp.jsonl"):
        load_task("piqa", tmp_path)


def test_few_shot_examples_are_drawn_by_seed_and_never_the_item_itself(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "svamp.jsonl").write_text(json.dumps(SETS["svamp"][0]) + "\n")
    (tmp_path / "svamp_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SETS["svamp"]))
    for seed in range(6):
        task = load_task("svamp", tmp_path, num_fewshot=2, seed=seed)
        shown = task.exemplars_for(task.items[0])
        assert len(shown) == 2
        assert task.items[0].values not in shown
    assert len(task.files) == 2
    with pytest.raises(UsageError, match="3 few-shot examples need 4; lower --num-fewshot"):
        load_task("svamp", tmp_path, num_fewshot=3)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("hellaswag", "the training part of the same set, in the same format"),
        ("aime24", "train.jsonl of https://github.com/openai/prm800k/tree/main/prm800k/math_splits"),
        ("humaneval", "problems of your own as lines with prompt, canonical_solution, test and entry_point"),
        ("reversal", "ledom make-analysis-data --task reversal"),
    ],
)
def test_errors_about_few_shot_examples_name_their_own_source(name: str, source: str, folder: Path, tmp_path: Path) -> None:
    """The source of the items would give the model its own questions as examples."""
    task = task_named(name)
    for path in folder.glob(f"{task.file}.*"):
        shutil.copy(path, tmp_path)
    row = {"before": "A wrote", "after": "is by A.", "choices": ["B", "C"], "gold": 0, "group": "unseen"}
    (tmp_path / "reversal.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UsageError, match=r"its few-shot examples \(--num-fewshot\) in ") as missing:
        load_task(name, tmp_path, num_fewshot=1)
    (tmp_path / f"{task.exemplars_file}.jsonl").write_text('{"other": 1}\n')
    with pytest.raises(DataError, match="other, expected") as wrong:
        load_task(name, tmp_path, num_fewshot=1)
    for error in (missing, wrong):
        assert source in str(error.value)
        assert name == "reversal" or task.download not in str(error.value)


def test_the_list_names_the_source_of_few_shot_examples(capsys: pytest.CaptureFixture[str]) -> None:
    list_tasks(None)
    output = capsys.readouterr().out
    assert output.count("\n  few-shot  ") == len(all_tasks())
    assert (
        output.count("  few-shot  lines with problem, solution and answer: train.jsonl of https://github.com/openai/prm800k")
        == 3
    )


@pytest.mark.parametrize("direction", list(Direction))
def test_an_answer_is_read_from_its_end_or_front_and_checked(direction: Direction, folder: Path) -> None:
    task = load_task("math500", folder)
    chain = " Add.\n\nIt is so.\nThat is how the answer is found."
    forward = f"{chain}\nAnswer: 0.75"
    reverse = "Answer: 0.75\nReasoning: Add.\n\nIt is so.\n"
    model = Scripted(direction, reverse if direction is Direction.REVERSE else forward)
    found = write_answers(model, task, task.items)
    assert model.given == [prompt_of(task, direction, task.items[0]).given]
    assert (found[0]["answer"], found[0]["is_right"]) == ("0.75", True)
    assert not write_answers(Scripted(direction, "nothing"), task, task.items)[0]["is_right"]


def test_formulas_are_compared_by_math_verify() -> None:
    math_verify = comparison_by("math")
    pair = r"\left( 3, \frac{\pi}{2} \right)"
    assert math_verify.is_right([pair], "$(3, \\pi/2)$")
    assert not math_verify.is_right([pair], "2")
    assert math_verify.is_right(["18"], "18 dollars")
    assert not math_verify.is_right(["18"], "17")


def test_aliases_are_compared_without_case_articles_and_punctuation() -> None:
    alias = comparison_by("alias")
    assert alias.is_right(["The Eiffel Tower"], " eiffel tower.\nQuestion: next")
    assert not alias.is_right(["Eiffel"], "eiffel tower")


def test_intervals_are_those_of_the_formula() -> None:
    metric = share([True] * 3 + [False] * 7)
    assert metric.stderr == pytest.approx(math.sqrt(0.3 * 0.7 / 9))
    z, n, p = 1.959964, 10, 0.3
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (metric.low, metric.high) == pytest.approx(
        ((centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)), 1e-5
    )
    assert share([True]).stderr is None


def test_intervals_of_items_about_the_same_subject_are_over_subjects() -> None:
    """Repeating each item four times makes no interval narrower.

    Items with distinct subjects have the interval without clusters.
    """
    are_right = [number % 3 == 0 for number in range(60)]
    names = [str(number) for number in range(60)]
    single, alone, repeated = share(are_right), share(are_right, names), share(are_right * 4, names * 4)
    assert (repeated.value, repeated.num_items) == (single.value, 240)
    for found in (alone, repeated):
        assert found.stderr == pytest.approx(single.stderr)
        assert (found.low, found.high) == pytest.approx((single.low, single.high), abs=0.02)
    assert share(are_right * 4).high < repeated.high - 0.03
    all_right = share([True] * 40, names[:10] * 4)
    assert (all_right.low, all_right.high) == (share([True] * 10).low, 1.0)
    assert share([True, False], ["one", "one"]).stderr is None
