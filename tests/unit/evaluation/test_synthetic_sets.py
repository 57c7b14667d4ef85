"""Synthetic sets: reproducible bytes, one right answer, no leak; an oracle scores 100 %, ignorance scores chance."""

import hashlib
import json
import re
import shutil
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.direction import Direction
from megatron_ledom.errors import UsageError
from megatron_ledom.evaluation.results import TaskResult, share
from megatron_ledom.evaluation.synthetic.facts import INVERSE, REVERSAL
from megatron_ledom.evaluation.synthetic.generators import GENERATORS, make_analysis_data
from megatron_ledom.evaluation.synthetic.tasks import SYNTHETIC_TASKS
from megatron_ledom.evaluation.synthetic.word_problems import END, GAINS, LOSSES, START, TIMES, Solution, solve
from megatron_ledom.evaluation.task_evaluation import evaluate_task
from megatron_ledom.evaluation.tasks.loading import load_task
from megatron_ledom.inference.scoring import SpanScore
from tests.support.tiny_models import random_model_folder
from tests.support.tool_runs import run_tool

NUM = {"reversal": 160, "inverse_relations": 64, "label_backfill": 800, "abduction": 8, "question_from_answer": 200}
CHOICES = ("reversal", "inverse_relations", "label_backfill", "abduction")
"""Choice tasks, each with its own data."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    generated = {name: tmp_path_factory.mktemp("generated") / name for name in GENERATORS}
    for name, folder in generated.items():
        make_analysis_data(name, str(folder), NUM[name], 3)
    return generated


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def train_texts(folder: Path) -> list[str]:
    return [row["text"] for row in rows_of(folder / "train.jsonl")]


class Judge:
    """A model whose score of a text is `value`, a function of the whole text."""

    def __init__(self, direction: Direction, value: Any) -> None:
        self.direction, self._value = direction, value

    def score(self, pairs: list[tuple[str, str]]) -> list[SpanScore]:
        return [SpanScore([0], [float(self._value(before + after))]) for before, after in pairs]

    def write(self, given: list[str], *, max_new_tokens: int, stop_strings: list[str]) -> list[str]:
        raise AssertionError("nothing is written")


def evaluated(task: str, folder: Path, direction: Direction, value: Any) -> TaskResult:
    return evaluate_task(Judge(direction, value), load_task(task, folder))


def groups_of(result: TaskResult) -> dict[str, float]:
    return {
        name.rpartition("/")[2]: metric.value for name, metric in result.metrics.items() if name.startswith(result.main + "/")
    }


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_the_same_arguments_give_the_same_bytes_and_the_manifest_their_hashes(
    name: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--task", name, "--output", str(tmp_path / "again"), "--num", str(NUM[name]), "--seed", "3"]
    assert run_tool(monkeypatch, "make_analysis_data", *arguments) == 0
    contents = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    assert contents == {path.name: path.read_bytes() for path in folders[name].iterdir()}
    manifest = json.loads(contents.pop("manifest.json"))
    assert (manifest["task"], manifest["num"], manifest["seed"]) == (name, NUM[name], 3)
    assert {file: hashlib.sha256(content).hexdigest() for file, content in contents.items()} == {
        file: entry["sha256"] for file, entry in manifest["files"].items()
    }
    make_analysis_data(name, str(tmp_path / "other"), NUM[name], 4)
    assert (tmp_path / "other" / "train.jsonl").read_bytes() != contents["train.jsonl"]


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_another_set_in_the_same_folder_and_too_small_a_one_are_refused(name: str, folders: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="seed was 3 and is 4"):
        make_analysis_data(name, str(folders[name]), NUM[name], 4)
    with pytest.raises(UsageError, match=r"--num 1 .* must be at least"):
        GENERATORS[name](1, 0)


@pytest.mark.parametrize("task", CHOICES)
def test_the_four_choices_differ_and_the_right_one_is_equally_often_at_each_position(
    task: str, folders: dict[str, Path]
) -> None:
    rows = rows_of(folders[task] / f"{task}.jsonl")
    assert all(len(set(row["choices"])) == 4 for row in rows)
    places = Counter(row["gold"] for row in rows)
    assert max(places.values()) - min(places.values()) <= len({row["group"] for row in rows})
    manifest = json.loads((folders[task] / "manifest.json").read_text())
    assert manifest["chance"] == 0.25


@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.parametrize("task", CHOICES)
def test_a_scorer_that_does_not_know_the_training_text_gets_chance(
    task: str, direction: Direction, folders: dict[str, Path]
) -> None:
    """Six scorers with random preferences for texts and choices are together within four standard errors of 25 %."""

    def blind(salt: int) -> Any:
        return lambda text: zlib.crc32(f"{salt} {text}".encode())

    values = [
        result.metrics[result.main].value
        for salt in range(6)
        for result in [evaluated(task, folders[task], direction, blind(salt))]
    ]
    num = len(values) * len(rows_of(folders[task] / f"{task}.jsonl"))
    assert abs(sum(values) / len(values) - 0.25) < 4 * (0.25 * 0.75 / num) ** 0.5


@pytest.mark.parametrize("task", CHOICES)
def test_a_scorer_that_prefers_some_choices_gets_chance(task: str, folders: dict[str, Path]) -> None:
    """Each choice is right once for every three times that it is wrong, so a preference for a choice does not help."""
    rows = rows_of(folders[task] / f"{task}.jsonl")
    offered = Counter(choice for row in rows for choice in row["choices"])
    right = Counter(row["choices"][row["gold"]] for row in rows)
    assert {choice: 4 * right[choice] for choice in offered} == dict(offered)


@pytest.mark.parametrize(("task", "size"), [("reversal", 2), ("inverse_relations", 2), ("abduction", 16)])
def test_questions_about_the_same_subject_are_one_cluster_and_intervals_are_over_clusters(
    task: str, size: int, folders: dict[str, Path]
) -> None:
    """For a model that knows every second cluster, the interval is wider than for as many independent items."""
    clusters = [row["cluster"] for row in rows_of(folders[task] / f"{task}.jsonl")]
    assert set(Counter(clusters).values()) == {size}
    known = set(sorted(set(clusters))[::2])
    together, apart = (share([name in known for name in clusters], named) for named in (clusters, None))
    assert together.high - together.low > 1.2 * (apart.high - apart.low)
    result = evaluated(task, folders[task], Direction.REVERSE, lambda text: zlib.crc32(text.encode()))
    assert result.about["num_clusters"] == len(set(clusters))
    main = result.metrics[result.main]
    num_right = round(main.value * main.num_items)
    assert main.low != share([number < num_right for number in range(main.num_items)]).low


@pytest.mark.parametrize("direction", list(Direction))
def test_reversal_an_oracle_with_the_training_text_knows_all_except_the_unseen(
    direction: Direction, folders: dict[str, Path]
) -> None:
    texts = train_texts(folders["reversal"])

    def together(text: str) -> float:
        names = [
            word.strip(".") for word in text.split() if word[0].isupper() and word not in ("The", "It", "We", "Few", "For")
        ]
        return float(any(all(name in trained for name in names) for trained in texts))

    found = groups_of(evaluated("reversal", folders["reversal"], direction, together))
    assert {name: value for name, value in found.items() if name != "unseen"} == {
        "in_text_order": 1.0,
        "against_text_order": 1.0,
        "both_orders": 1.0,
    }
    assert found["unseen"] == pytest.approx(0.25, abs=0.02)  # all are equal for it, so the first one is chosen


def test_reversal_each_model_is_tested_in_its_own_order_and_only_stated_orders_are_trained(folders: dict[str, Path]) -> None:
    """A forward model's sentence is trained if the given name comes first, a reverse model's if it comes last."""
    texts = set(train_texts(folders["reversal"]))
    for row in rows_of(folders["reversal"] / "reversal.jsonl"):
        gold = row["choices"][row["gold"]]
        assert (f"{row['before']} {gold}." in texts) == (row["group"] in ("in_text_order", "both_orders"))
        assert (f"{gold} {row['after']}" in texts) == (row["group"] in ("against_text_order", "both_orders"))
        assert not any(f"{row['before']} {wrong}." in texts for wrong in row["choices"] if wrong != gold)
    shots = rows_of(folders["reversal"] / "reversal_shots.jsonl")
    assert not any(choice in text for row in shots for choice in row["choices"] for text in texts)


def test_reversal_wordings_of_questions_begin_with_one_name_and_end_with_the_other() -> None:
    for relation in (*REVERSAL, *INVERSE):
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


def facts_in(texts: list[str]) -> set[tuple[str, str, str]]:
    """Return (relation, first, second) of every sentence that matches one of the wordings."""
    found = set()
    for relation in INVERSE:
        for wording in (*relation.first_wordings, *relation.second_wordings):
            pattern = re.escape(wording)
            for name in ("first", "second"):
                pattern = pattern.replace(re.escape(f"{{{name}}}"), f"(?P<{name}>[A-Z][a-z]+ [A-Z][a-z]+)")
            matches = [match for text in texts if (match := re.fullmatch(pattern, text))]
            found |= {(relation.name, match["first"], match["second"]) for match in matches}
    return found


@pytest.mark.parametrize("direction", list(Direction))
def test_inverse_relations_an_oracle_knows_the_trained_facts_and_pairs_alone_give_half(
    direction: Direction, folders: dict[str, Path]
) -> None:
    known = facts_in(train_texts(folders["inverse_relations"]))
    assert len(known) == 2 * 48

    def is_true(text: str) -> float:
        return float(bool(facts_in([text]) & known))

    def belong(text: str) -> float:
        pairs = {frozenset(fact[1:]) for fact in known}
        return float(any(frozenset(fact[1:]) in pairs for fact in facts_in([text])))

    found = groups_of(evaluated("inverse_relations", folders["inverse_relations"], direction, is_true))
    assert {name for name, value in found.items() if value == 1.0} == {"in_text_order", "against_text_order", "both_orders"}
    assert found["unseen"] == pytest.approx(0.25, abs=0.05)
    half = groups_of(evaluated("inverse_relations", folders["inverse_relations"], direction, belong))
    assert all(0.25 <= value <= 0.75 for name, value in half.items() if name != "unseen")


def test_inverse_relations_only_the_trained_wording_was_trained(folders: dict[str, Path]) -> None:
    texts = set(train_texts(folders["inverse_relations"]))
    for row in rows_of(folders["inverse_relations"] / "inverse_relations.jsonl"):
        gold = row["choices"][row["gold"]]
        assert (f"{row['before']} {gold}." in texts) == (row["group"] in ("in_text_order", "both_orders"))
        assert (f"{gold} {row['after']}" in texts) == (row["group"] in ("against_text_order", "both_orders"))
        for wrong in (choice for choice in row["choices"] if choice != gold):
            assert f"{row['before']} {wrong}." not in texts


@pytest.mark.parametrize("direction", list(Direction))
def test_abduction_an_oracle_knows_known_worlds_and_one_outcome_gives_half(
    direction: Direction, folders: dict[str, Path]
) -> None:
    texts = train_texts(folders["abduction"])
    rule = re.compile(r"In (\w+) on day \d+ (the|a) ([^.]+)\. (So .+)\.", re.ASCII)
    known = {match.groups() for text in texts if (match := rule.fullmatch(text))}
    assert len(known) == 6 * 16
    questions = [
        f"{row['before']} {row['choices'][row['gold']]} {row['after']}"
        for row in rows_of(folders["abduction"] / "abduction.jsonl")
    ]
    assert not set(questions) & set(texts)

    def is_rule(text: str) -> float:
        match = rule.fullmatch(text)
        return float(match is not None and match.groups() in known)

    def shares_first_outcome(text: str) -> float:
        match = rule.fullmatch(text)
        firsts = {(*groups[:3], groups[3].partition(" and ")[0]) for groups in known}
        return float(match is not None and (*match.groups()[:3], match[4].partition(" and ")[0]) in firsts)

    found = groups_of(evaluated("abduction", folders["abduction"], direction, is_rule))
    assert found == {"known_world": 1.0, "unseen_world": 0.25}
    half = groups_of(evaluated("abduction", folders["abduction"], direction, shares_first_outcome))
    assert 0.25 < half["known_world"] < 0.75


@pytest.mark.parametrize("direction", list(Direction))
def test_labels_an_oracle_that_counts_words_in_the_training_text_knows_all(
    direction: Direction, folders: dict[str, Path]
) -> None:
    counts: dict[str, Counter[str]] = {}
    texts = train_texts(folders["label_backfill"])
    for text in texts:
        label, _, words = text.removeprefix("Category: ").partition("\nText: ")
        for word in words.split():
            counts.setdefault(word, Counter())[label] += 1
    own = {word: found.most_common(1)[0][0] for word, found in counts.items() if found.most_common(1)[0][1] > found.total() / 2}

    def num_own(text: str) -> float:
        label, _, words = text.strip().removeprefix("Category: ").partition("\nText: ")
        return float(sum(own.get(word) == label for word in words.split()))

    result = evaluated("label_backfill", folders["label_backfill"], direction, num_own)
    assert result.metrics[result.main].value == 1.0
    assert not any("prior_removed" in name or "context_given_choice" in name for name in result.metrics)
    questions = {row["after"] for row in rows_of(folders["label_backfill"] / "label_backfill.jsonl")}
    assert not any(text.partition("\nText: ")[2] in questions for text in texts)


def test_problems_have_the_answer_of_their_solution_and_no_test_solution_is_trained(folders: dict[str, Path]) -> None:
    folder = folders["question_from_answer"]
    questions, trained = (rows_of(folder / f"question_from_answer{end}.jsonl") for end in ("", "_train"))
    for row in (*questions, *trained):
        *equations, last = row["solution"].split(". ")
        assert last == f"The answer is {row['answer']}."
        for equation in equations:
            left, right = equation.split(" = ")
            a, sign, b = left.split()
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "x": int(a) * int(b)}[sign] == int(right)
        assert equations[-1].endswith(f"= {row['answer']}")
        assert solve(row["question"]) == Solution(row["solution"], int(row["answer"]))
    assert not {row["solution"] for row in questions} & {row["solution"] for row in trained}
    assert train_texts(folder) == [f"Question: {row['question']}\nSolution: {row['solution']}" for row in trained]


@pytest.mark.parametrize(
    ("question", "solution"),
    [
        (
            "Mara has 5 pears. Mara loses 5 pears. Then the number of pears triples. How many pears does Mara have now?",
            "5 - 5 = 0. 0 x 3 = 0. The answer is 0.",
        ),
        ("Mara has 5 pears. How many pears does Mara have now?", "The answer is 5."),
        ("Zoe has 5 nails. Zoe finds 12 more nails. How many nails does Zoe have now?", "5 + 12 = 17. The answer is 17."),
        ("Mara has 5 pears. Mara loses 6 pears. Mara buys 3 more pears. How many pears does Mara have now?", None),
        ("Mara has 5 pears. Joel buys 4 more pears. How many pears does Mara have now?", None),
        ("Mara has 5 pears. Mara buys 4 more hats. How many pears does Mara have now?", None),
        ("Mara has 5 pears. Mara buys 4 more pears. How many hats does Mara have now?", None),
        ("Mara has five pears. How many pears does Mara have now?", None),
        ("Mara has 5 pears. Mara has 6 pears. How many pears does Mara have now?", None),
        ("Mara has 5 pears. How many pears does Mara have now? And", None),
        ("Mara has 5 pears.", None),
        ("", None),
    ],
)
def test_the_solver_reads_its_grammar_and_nothing_else(question: str, solution: str | None) -> None:
    solved = solve(question)
    assert (solved and solved.solution) == solution
    assert solved is None or solved.solution.endswith(f"The answer is {solved.answer}.")


def written_from(solution: str) -> str:
    """Return a question of the grammar with this solution."""
    names = {"name": "Ada", "things": "plums"}
    steps = re.findall(r"(\d+) ([-+x]) (\d+) =", solution)
    sentences = [START.format(number=steps[0][0], **names)]
    for _, sign, number in steps:
        times = next((text for text, factor in TIMES.items() if factor == int(number)), "")
        wording = {"+": GAINS[0], "-": LOSSES[0], "x": times}[sign]
        sentences.append(wording.format(number=number, **names))
    return " ".join([*sentences, END.format(**names)])


@pytest.mark.parametrize("direction", list(Direction))
def test_a_question_is_right_by_its_steps_and_a_copy_or_a_constant_one_is_not(
    direction: Direction, folders: dict[str, Path]
) -> None:
    """One question for all items is right for at most one, which the manifest records as chance.

    A trained one is never right.
    """
    folder = folders["question_from_answer"]
    task = load_task("question_from_answer", folder)
    trained = sorted(task.trained_questions)

    class Writer(Judge):
        def write(self, given: list[str], *, max_new_tokens: int, stop_strings: list[str]) -> list[str]:
            questions = [self._value(text) for text in given]
            return [f"Question: {q}\n" if self.direction is Direction.REVERSE else f" {q}" for q in questions]

    def metrics(value: Any) -> dict[str, float]:
        return {name: metric.value for name, metric in evaluate_task(Writer(direction, value), task).metrics.items()}

    able = metrics(written_from)
    assert (able["accuracy"], able["solvable"], able["has_answer"], able["copied"]) == (1.0, 1.0, 1.0, 0.0)
    without_steps = metrics(lambda text: f"Ada has {re.findall('[0-9]+', text)[-1]} plums. How many plums does Ada have now?")
    assert (without_steps["accuracy"], without_steps["solvable"], without_steps["has_answer"]) == (0.0, 1.0, 1.0)
    copied = metrics(lambda text: trained[zlib.crc32(text.encode()) % len(trained)])
    assert (copied["accuracy"], copied["solvable"], copied["copied"]) == (0.0, 1.0, 1.0)
    assert 0 < copied["has_answer"] < 0.25
    one = metrics(lambda _: task.items[0].values["question"])
    assert one["accuracy"] == json.loads((folder / "manifest.json").read_text())["chance"] == 1 / 40
    none = metrics(lambda _: "How?")
    assert (none["accuracy"], none["solvable"], none["answered"]) == (0.0, 0.0, 1.0)


def test_every_analysis_runs_in_both_directions_through_the_tool(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name, folder in folders.items():
        for path in folder.glob(f"{name}*.jsonl"):
            shutil.copy(path, data)
    names = ",".join(task.name for task in SYNTHETIC_TASKS)
    for direction in ("forward", "reverse"):
        model = random_model_folder(tmp_path / direction, "byte_level", direction)
        options = ["--model", str(model), "--data", str(data), "--tasks", names, "--output", str(tmp_path / f"out_{direction}")]
        options += ["--limit", "1", "--num-fewshot", "1", "--max-new-tokens", "4"]
        assert run_tool(monkeypatch, "evaluate", *options) == 0, capsys.readouterr().err
        tasks = json.loads((tmp_path / f"out_{direction}/summary.json").read_text())["tasks"]
        assert sorted(tasks) == sorted(task.name for task in SYNTHETIC_TASKS)
