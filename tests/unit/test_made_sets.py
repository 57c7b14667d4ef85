"""Sets made by a script: the same bytes for a seed, one right answer, nothing leaks, an oracle gets all and the blind get chance."""

import hashlib
import json
import random
import runpy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.direction import Direction
from megatron_ledom.errors import UsageError
from megatron_ledom.evaluation.evaluate import evaluate_task
from megatron_ledom.evaluation.made.facts import REVERSAL
from megatron_ledom.evaluation.made.generators import GENERATORS, make_analysis_data
from megatron_ledom.evaluation.results import TaskResult
from megatron_ledom.evaluation.task_files import load_task
from megatron_ledom.inference.scoring import SpanScore

ROOT = Path(__file__).parents[2]
NUM = {"reversal": 160}
CHOICES = {"reversal": "reversal"}
"""Tasks of choices -> the generator of their data."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp("made") / name for name in GENERATORS}
    for name, folder in made.items():
        make_analysis_data(name, str(folder), NUM[name], 3)
    return made


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def train_texts(folder: Path) -> list[str]:
    return [row["text"] for row in rows_of(folder / "train.jsonl")]


class Judge:
    """A model that gives a text the value of `value`, a function of the whole text."""

    def __init__(self, direction: Direction, value: Any) -> None:
        self.direction, self._value = direction, value

    def score(self, pairs: list[tuple[str, str]]) -> list[SpanScore]:
        return [SpanScore([0], [float(self._value(before + after))]) for before, after in pairs]

    def write(self, given: list[str], *, max_new_tokens: int, stop_strings: list[str]) -> list[str]:
        raise AssertionError("nothing is written")


def judged(task: str, folder: Path, direction: Direction, value: Any) -> TaskResult:
    return evaluate_task(Judge(direction, value), load_task(task, folder))


def groups_of(result: TaskResult) -> dict[str, float]:
    return {
        name.rpartition("/")[2]: metric.value for name, metric in result.metrics.items() if name.startswith(result.main + "/")
    }


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_the_same_arguments_give_the_same_bytes_and_the_manifest_their_hashes(
    name: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--task", name, "--out", str(tmp_path / "again"), "--num", str(NUM[name]), "--seed", "3"]
    monkeypatch.setattr(sys, "argv", ["make_analysis_data.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools/make_analysis_data.py"), run_name="__main__")
    assert not ended.value.code
    contents = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    assert contents == {path.name: path.read_bytes() for path in folders[name].iterdir()}
    manifest = json.loads(contents.pop("manifest.json"))
    assert (manifest["task"], manifest["num"], manifest["seed"]) == (name, NUM[name], 3)
    assert {file: hashlib.sha256(content).hexdigest() for file, content in contents.items()} == {
        file: told["sha256"] for file, told in manifest["files"].items()
    }
    make_analysis_data(name, str(tmp_path / "other"), NUM[name], 4)
    assert (tmp_path / "other" / "train.jsonl").read_bytes() != contents["train.jsonl"]


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_another_set_in_the_same_folder_and_too_small_a_one_are_refused(name: str, folders: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="seed was 3, is 4"):
        make_analysis_data(name, str(folders[name]), NUM[name], 4)
    with pytest.raises(UsageError, match="too few"):
        GENERATORS[name](1, 0)


@pytest.mark.parametrize("task", sorted(CHOICES))
def test_choices_are_four_different_ones_and_right_in_each_place_as_often(task: str, folders: dict[str, Path]) -> None:
    rows = rows_of(folders[CHOICES[task]] / f"{task}.jsonl")
    assert all(len(set(row["choices"])) == 4 for row in rows)
    places = Counter(row["gold"] for row in rows)
    assert max(places.values()) - min(places.values()) <= len({row["group"] for row in rows})
    manifest = json.loads((folders[CHOICES[task]] / "manifest.json").read_text())
    assert manifest["chance"] == 0.25


@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.parametrize("task", sorted(CHOICES))
def test_a_scorer_that_does_not_know_the_training_text_gets_chance(
    task: str, direction: Direction, folders: dict[str, Path]
) -> None:
    """It takes a liking to some texts and choices: 20 of them together are within four standard errors of 25 %."""

    def blind(salt: int) -> Any:
        return lambda text: random.Random(f"{salt} {text}").random()

    values = [
        result.metrics[result.main].value
        for salt in range(20)
        for result in [judged(task, folders[CHOICES[task]], direction, blind(salt))]
    ]
    num = len(values) * len(rows_of(folders[CHOICES[task]] / f"{task}.jsonl"))
    assert abs(sum(values) / len(values) - 0.25) < 4 * (0.25 * 0.75 / num) ** 0.5


@pytest.mark.parametrize("task", sorted(CHOICES))
def test_a_scorer_that_prefers_some_choices_gets_chance(task: str, folders: dict[str, Path]) -> None:
    """Each choice is right once for every three times that it is wrong, so that no liking for a choice helps."""
    rows = rows_of(folders[CHOICES[task]] / f"{task}.jsonl")
    offered = Counter(choice for row in rows for choice in row["choices"])
    right = Counter(row["choices"][row["gold"]] for row in rows)
    assert {choice: 4 * right[choice] for choice in offered} == dict(offered)


@pytest.mark.parametrize("direction", list(Direction))
def test_reversal_an_oracle_that_read_the_training_text_knows_all_but_the_unseen(
    direction: Direction, folders: dict[str, Path]
) -> None:
    texts = train_texts(folders["reversal"])

    def together(text: str) -> float:
        names = [
            word.strip(".") for word in text.split() if word[0].isupper() and word not in ("The", "It", "We", "Few", "For")
        ]
        return float(any(all(name in trained for name in names) for trained in texts))

    found = groups_of(judged("reversal", folders["reversal"], direction, together))
    assert {name: value for name, value in found.items() if name != "unseen"} == {
        "in_text_order": 1.0,
        "against_text_order": 1.0,
        "both_orders": 1.0,
    }
    assert found["unseen"] == pytest.approx(0.25, abs=0.02)  # all are equal for it, and the first one is taken


def test_reversal_each_model_is_asked_in_its_own_order_and_only_trained_orders_were_trained(folders: dict[str, Path]) -> None:
    """A forward model's sentence was trained where the given name stood first, a reverse model's where it stood last."""
    texts = set(train_texts(folders["reversal"]))
    for row in rows_of(folders["reversal"] / "reversal.jsonl"):
        gold = row["choices"][row["gold"]]
        assert (f"{row['before']} {gold}." in texts) == (row["group"] in ("in_text_order", "both_orders"))
        assert (f"{gold} {row['after']}" in texts) == (row["group"] in ("against_text_order", "both_orders"))
        assert not any(f"{row['before']} {wrong}." in texts for wrong in row["choices"] if wrong != gold)
    shots = rows_of(folders["reversal"] / "reversal_shots.jsonl")
    assert not any(choice in text for row in shots for choice in row["choices"] for text in texts)


def test_reversal_wordings_that_are_asked_begin_with_one_name_and_end_with_the_other() -> None:
    for relation in REVERSAL:
        assert relation.first_wordings[0].startswith("{first} ")
        assert relation.first_wordings[0].endswith(" {second}.")
        assert relation.second_wordings[0].startswith("{second} ")
        assert relation.second_wordings[0].endswith(" {first}.")


@pytest.mark.parametrize("direction", list(Direction))
def test_reversal_a_written_name_is_compared_as_a_whole(direction: Direction, folders: dict[str, Path]) -> None:
    task = load_task("reversal_written", folders["reversal"], limit=3)
    gold = [item.gold[0] for item in task.items if isinstance(item.gold, tuple)]

    class Writer(Judge):
        def write(self, given: list[str], *, max_new_tokens: int, stop_strings: list[str]) -> list[str]:
            assert given[0] == task.items[0].values["after" if direction is Direction.REVERSE else "before"]
            return [f" {gold[0]}" if direction is Direction.FORWARD else f"{gold[0]} ", gold[1][:-1], ""]

    result = evaluate_task(Writer(direction, None), task)
    assert result.metrics["accuracy"].value == pytest.approx(1 / 3)
