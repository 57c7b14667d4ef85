"""The controls: planted errors, the registration, the choice of lambda and N, the verifier, and the sentences of known results."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.study.programs import run_python
from tests.support.legible import legible_tokenizer

SETUP = """
import json
from pathlib import Path
import numpy as np
from losses import Twins
from settings import load_settings
from controls import Controls, SCORER_SEEDS
from control_choice import FIRST, GRID, SCORERS
controls = Controls(Twins(Path("study"), load_settings("tiny", ["controls.seeds=[1,2]"])))
"""


def test_each_planted_error_is_the_one_that_its_kind_names(tmp_path: Path) -> None:
    code = """
from random import Random
from control_problems import CARRIED, FALSE, GOLD_CHAIN, KINDS, OPERAND, OPERATION, OTHER, planted
from problems import COMPUTE, STEP, Level, check_chain, parts
levels = [Level(steps=1, largest=9), Level(steps=3, largest=9)]
records = planted(parts(levels, {"planted": 60}, 1)["planted"], levels, 1)
assert len(records) == 120
counts = dict.fromkeys(KINDS, 0)
for record in records:
    found = dict(zip(record["kinds"], record["candidates"], strict=True))
    right = found.pop(GOLD_CHAIN)
    assert check_chain(right) and right not in found.values()
    for kind, text in found.items():
        counts[kind] += 1
        lines = [STEP.fullmatch(line) for line in text.split("\\n")[:-1]]
        own = [STEP.fullmatch(line) for line in right.split("\\n")[:-1]]
        assert all(lines) and len(lines) == len(own), text
        false = sum(COMPUTE[one[2]](int(one[1]), int(one[3])) != int(one[4]) for one in lines)
        signs = sum(one[2] != other[2] for one, other in zip(lines, own))
        numbers = sum(one[3] != other[3] for one, other in zip(lines, own))
        same_end = text.split()[-1] == right.split()[-1]
        assert false == (kind in (FALSE, CARRIED)), (kind, text)
        assert same_end == (kind == FALSE), (kind, text)
        if kind != OTHER:
            assert (signs, numbers) == (kind == OPERATION, kind == OPERAND), (kind, text)
        if kind == FALSE:
            assert sum(a[0] != b[0] for a, b in zip(lines, own)) == 1
        assert len(text) == len(right)
assert min(counts.values()) > 15, counts
print("done")
"""
    assert run_python(code, tmp_path) == "done\n"


def test_every_seed_has_its_own_training_problems_and_none_of_a_held_out_part(tmp_path: Path) -> None:
    code = (
        SETUP
        + """
step = controls._problems()
step.work()
assert all(path.exists() for path in step.outputs)
texts = {path.stem: [json.loads(line) for line in path.open()] for path in step.outputs}
held = {one["prompt"] for name in ("labelled", "development", "test", "planted") for one in texts[name]}
assert len(held) == 2 * (5 + 4 + 4 + 6)
for seed in (1, 2):
    pairs = [one["text"].partition("\\n")[::2] for one in texts[f"train_{seed}"]]
    assert not held & {f"{question}\\n" for question, _ in pairs} and len(set(pairs)) == 300
    assert [one["text"] for one in texts[f"swapped_{seed}"]] == [f"{answer}\\n{question}" for question, answer in pairs]
assert texts["train_1"] != texts["train_2"]
assert all("answer" not in json.dumps(one) for one in texts["test"])
print("done")
"""
    )
    assert run_python(code, tmp_path) == "done\n"


def test_the_test_answers_are_read_only_under_the_registration_that_was_sealed(tmp_path: Path) -> None:
    code = """
import json
from pathlib import Path
from registration import Registration
from megatron_ledom.errors import LedomError
one = Registration(Path("."))
one.answers.write_text(json.dumps({"prompt": "3 and 4?\\n", "answer": "#### 7"}) + "\\n")
content = {"primary": ["R - S"], "lambda": [1.0]}
told = []
def refused(work, *given):
    try:
        work(*given)
    except LedomError as error:
        told.append(str(error))
    else:
        raise AssertionError(work)
refused(one.open_test)
refused(one.read_answers, content)
one.write(content)
one.write({**content, "lambda": [2.0]})  # nothing was opened: it may change
one.write(content)
refused(one.read_answers, content)  # not opened
one.open_test()
one.open_test()
assert one.read_answers(content) == {"3 and 4?\\n": "#### 7"}
refused(one.write, {**content, "lambda": [2.0]})
refused(one.read_answers, {**content, "lambda": [2.0]})
stored = one.path.read_text()
one.path.write_text(stored.replace("R - S", "R - F2"))
refused(one.read_answers, content)
one.path.unlink()
refused(one.read_answers, content)
one.path.write_text(stored)
assert one.read_answers(content)
print(json.dumps(told))
"""
    told = json.loads(run_python(code, tmp_path))
    expected = ["only after the comparison is registered"] * 2 + ["was not opened", "its settings, models or choices changed"]
    expected += ["(lambda changed)", "was changed after it was written", "does not exist"]
    for message, part in zip(told, expected, strict=True):
        assert part in message


def test_lambda_and_n_are_those_of_the_highest_accuracy_and_an_empty_answer_is_never_chosen(tmp_path: Path) -> None:
    """The scorer finds the right answer, which F1 dislikes by 3 nats: from lambda = 4 on it is chosen, and more answers help."""
    code = """
import numpy as np
from control_choice import GRID, SCORERS, Answers, choose, combined, outcomes
names = ("F1", *SCORERS)
right = np.array([False, True, False, False])
values = {name: np.array([-1.0, -4.0, -2.0, -np.inf]) for name in names}
values["R"] = np.array([-2.0, -1.0, -2.0, -np.inf])
values["S"] = np.array([-1.0, -2.0, -1.0, -np.inf])
one = Answers(values, right, np.array([1, 2, 3, -1]), False)
assert choose([one], "F1") == (0, 1)
weight, num = choose([one], "R")
assert num == 4 and GRID[weight] >= 4, (weight, num)
assert outcomes([[one]], "R", [(weight, num)]).tolist() == [[1.0]]
assert outcomes([[one]], "R", [(0, 4)]).tolist() == [[0.0]]
assert choose([one], "S")[1] == 1  # a bad scorer: one answer at random is better
assert one.outcome("R", weight, 1) == 0.25
assert np.isneginf(combined(values["F1"], -values["R"], 2.0)[3])
print("done")
"""
    assert run_python(code, tmp_path) == "done\n"


def _write_scores(folder: Path, helpful: dict[str, float]) -> None:
    """Write scores of two seeds: F1 is right in every second question, a scorer finds the right answer in the given share."""
    (folder / "controls").mkdir(parents=True)
    for part in ("development", "test"):
        records: list[dict[str, Any]] = []
        for k in range(40):
            record = {"prompt": f"{part} {k}?\n", "greedy": "#### 1", "candidates": ["#### 1", "#### 2"]}
            right = 0 if k % 2 else 1
            for seed in (1, 2):
                scores = {"F1": [-1.0, -2.0]}
                for name, share in helpful.items():
                    best = right if (k + seed) % 20 < 20 * share else 1 - right
                    scores[name] = [0.0 if best == i else -100.0 for i in range(2)]
                path = folder / "controls/scores" / str(seed) / f"{part}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a") as file:
                    file.write(json.dumps({**record, "scores": scores}) + "\n")
            records.append({"prompt": record["prompt"], "answer": f"#### {right + 1}", "level": 1})
        for name in ("development",) if part == "development" else ("test", "answers", "planted"):
            (folder / "controls" / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    for seed in (1, 2):
        own = {name: [0.0, -1.0, -1.0] if name != "S" else [0.0, 1.0, 0.0] for name in ("F1", *helpful)}
        kinds = ["right", "false sum", "another question's chain"]
        lines = [{"prompt": f"{k}?\n", "kinds": kinds, "candidates": ["a", "b", "c"], "scores": own} for k in range(10)]
        (folder / f"controls/scores/{seed}/planted.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))


HELPFUL = {"R": 0.9, "F2": 0.5, "S": 0.9, "PMI": 0.5, "PMI, P(y) of S": 0.9, "verifier": 0.7}
RESULTS = (
    SETUP
    + """
import planted_errors
from control_problems import FALSE, OTHER
from controls_report import answers, controls_section, verdict
from sections import percent
planted_errors.KINDS = (FALSE, OTHER)
Controls._budget = lambda self: {
    "rows": {name: {"tokens": 10, "flops": 100.0, "speed": None} for name in (FIRST, *SCORERS)},
    "parameters": {"model": 10, "verifier": 9},
    "verifier": {"share_right": [0.5], "examples": 4},
}
"""
)


def test_the_budget_of_the_verifier_has_the_answers_that_it_learns_from(tmp_path: Path) -> None:
    """Two answers to one question of 3 tokens: 2 x 3 read, 2 + 1 and 1 written, each with an end; a third of 6 x 10 operations a token."""
    legible_tokenizer(tmp_path / "study/controls/tokenizer")
    for seed in (1, 2):
        file = tmp_path / f"study/controls/answers/{seed}/labelled.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"prompt": "100 101 102", "candidates": ["103 104", "105"]}) + "\n")
    code = (
        SETUP
        + """
from control_budget import sampling_cost, section_with_sampling
import control_budget
from sections import Section
row = {"tokens": 10, "flops": 600.0}
budget = {"rows": {"F1": row, "verifier": {"tokens": 10, "flops": 300.0}}}
found = sampling_cost(controls, budget)
assert found == {"read": 6.0, "written": 5.0, "flops": 11 * 60 / 3}, found
control_budget.controls_section = lambda results: Section(title="t")
(table,) = section_with_sampling({"budget": budget, "sampling": found}).tables
assert table[1] == ["verifier", "6", "5", "220", "300", "520", "87 %"], table
print("done")
"""
    )
    assert run_python(code, tmp_path) == "done\n"


def test_the_section_says_what_known_scores_mean(tmp_path: Path) -> None:
    """R is right in 90 %, as S is, and F2 in 50 %: the gain is that of the conditional, not of the order."""
    _write_scores(tmp_path / "study", HELPFUL)
    code = (
        RESULTS
        + """
controls.registration.write(controls.content())
assert controls.registration.path.exists()
try:
    controls.results()
except ValueError as error:
    assert "was not opened" in str(error), error
else:
    raise AssertionError
controls.registration.open_test()
found = controls.results()
section = controls_section(found)
print(json.dumps({"found": found, "told": list(answers(found)), "cells": str(section.tables), "text": str(section.paragraphs)}))
"""
    )
    told = json.loads(run_python(code, tmp_path))
    found = told["found"]
    assert found["accuracy"]["R"]["mean"] == found["accuracy"]["S"]["mean"] == pytest.approx(0.9)
    assert found["primary"]["R - S"]["is_equivalent"]
    assert found["primary"]["R - F2"]["is_significant"]
    assert found["primary"]["R - F2"]["mean"] == pytest.approx(0.4)
    assert found["planted"]["rows"]["false sum|S"]["mean"] == 0.0
    assert found["planted"]["rows"]["another question's chain|S"]["mean"] == 0.5
    assert found["planted"]["rows"]["false sum|R"]["mean"] == found["planted"]["rows"]["false sum|R"]["pooled"] == 1.0
    sentences = " ".join(told["told"])
    assert "the conditional P(question | answer) does it, not the reading order" in sentences
    assert "the reverse model adds more than a second forward model" in sentences
    assert "significantly above one half for false sum (1.00" in sentences
    assert found["registration"]["sha256"] in told["text"]
    assert found["over_n"]["R"] == [[1, pytest.approx(0.5)], [2, pytest.approx(0.9)]]


def test_an_undecided_comparison_and_a_part_that_was_not_run_are_called_so(tmp_path: Path) -> None:
    code = """
from controls_report import controls_section, first_section, verdict
row = {"is_significant": False, "is_equivalent": False, "mean": 0.02, "narrow_interval": [-0.01, 0.02]}
gain = {"is_significant": True, "mean": 0.1, "interval": [0.05, 0.15]}
print(verdict("R - S", row, gain, gain))
print(verdict("R - F2", {**row, "is_equivalent": True}, gain, gain))
print(verdict("R - F2", {**row, "is_equivalent": True}, {**gain, "is_significant": False}, gain))
print(verdict("R - F2", {**row, "is_significant": True, "mean": -0.1}, gain, gain))
print(verdict("R - F2", {**row, "is_equivalent": True}, gain, {**gain, "is_significant": False}))
print(verdict("R - F2", {**row, "is_equivalent": True}, {**gain, "interval": [0.01, 0.15]}, gain))
print(verdict("R - F2", {**row, "is_significant": True}, {**gain, "is_significant": False}, gain))
print(*first_section(None, None).paragraphs, *controls_section(None).paragraphs)
"""
    undecided, equal, gainless, less, *small, above, none = run_python(code, tmp_path).splitlines()
    assert undecided.startswith("undecided")
    assert [text.split(":")[0] for text in small] == ["undecided"] * 2  # the other gains nothing, or the gain is not larger
    assert above == gainless
    assert "the gain is that of an ensemble" in equal
    assert gainless.endswith("so there is no gain to explain")
    assert less == "a second forward model helps more than the reverse model"
    assert none.lower().count("not run") == 3
