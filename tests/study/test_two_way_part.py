"""The two-way part: its blends, and its statistics on measurements written by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.study.programs import run_python

SETUP = """
import json
from pathlib import Path
from abilities import Abilities
from losses import Twins
from settings import load_settings
from two_way import TwoWay
from two_way_report import two_way_section
changes = ["two_way.seeds=[1,2,3]", "two_way.units=[word]"]
part = TwoWay(Abilities(Twins(Path("study"), load_settings("tiny", changes))))
"""
NUM = 12
"""Questions: six of the development part, then six of the test part."""
LOSSES = {"forward": {"forward": 1.0}, "reverse": {"reverse": 1.1}, "word": {"forward": 0.9}}
LOSSES |= {"two_way": {"forward": 1.2, "reverse": 1.1}, "two_way_double": {"forward": 1.0, "reverse": 1.0}}
RIGHT_FACTS = {"forward": 0, "reverse": 0, "two_way": 0, "two_way_double": 0, "word": 15}
"""Right ones of 16 facts that are asked against the order of their training."""
FITTING = {"forward reverse": True, "two_way two_way": False, "two_way_double two_way_double": True}
FITTING |= {"forward two_way": True, "forward two_way_double": False}
"""True if the scorer prefers the right answer of two."""


def _write(folder: Path) -> None:
    """Write the measurements of three seeds, whose losses differ by 0.01."""
    questions = [{"prompt": f"What is {number}?\n", "answer": f"#### {number}"} for number in range(NUM)]
    (folder / "study/two_way").mkdir(parents=True)
    (folder / "study/two_way/questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    for seed in (1, 2, 3):
        found = folder / f"study/two_way/measured/{seed}"
        found.mkdir(parents=True)
        losses = {
            name: {way: [loss + 0.01 * seed + 0.1 * text for text in range(5)] for way, loss in ways.items()}
            for name, ways in LOSSES.items()
        }
        (found / "losses.json").write_text(json.dumps(losses))
        facts = {name: {way: _facts(RIGHT_FACTS[name], way) for way in ways} for name, ways in LOSSES.items()}
        (found / "facts.json").write_text(json.dumps(facts))
        for pair, is_fitting in FITTING.items():
            lines = [_ranked(question, is_fitting) for question in questions]
            (found / f"{pair}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _facts(right: int, way: str) -> dict[str, list[tuple[str, bool]]]:
    own, against = ("in_text_order", "against_text_order") if way == "forward" else ("against_text_order", "in_text_order")
    groups = {own: 16, against: right, "both_orders": 16, "unseen": 4}
    rows = [(group, number < count) for group, count in groups.items() for number in range(16)]
    return {"reversal": rows, "reversal_written": rows}


def _ranked(question: dict[str, str], is_fitting: bool) -> dict[str, Any]:
    """Return a line with a right and a wrong answer that the forward model holds for equally likely."""
    score = {"forward_logprob": -3.0, "forward_tokens": 4, "reverse_tokens": 9}
    reverse = (-5.0, -9.0) if is_fitting else (-9.0, -5.0)
    scores = [{**score, "reverse_logprob": value, "reward": (value - 3.0) / 2} for value in reverse]
    candidates = [question["answer"], "#### 99"]
    ranking = [0, 1] if is_fitting else [1, 0]
    return {
        **question,
        "candidates": candidates,
        "greedy": "#### 99",
        "scores": scores,
        "ranking": ranking,
        "best": candidates[ranking[0]],
    }


def test_the_results_and_the_section_agree_with_known_measurements(tmp_path: Path) -> None:
    _write(tmp_path)
    code = "found = part.results()\nsection = two_way_section(found)\n"
    code += 'print(json.dumps([found, " ".join(section.paragraphs), section.tables]))'
    found, text, tables = json.loads(run_python(SETUP + code, tmp_path))
    assert found["tokens"] == {
        "forward": [6144, 6144],
        "reverse": [6144, 0],
        "two_way": [6144, 3072],
        "two_way_double": [12288, 6144],
        "word": [12288, 6144],
    }
    compared = found["comparisons"]
    assert (
        len(compared) == 14
    )  # losses and facts of two models both ways, and of the unit forward; two models as scorer and alone
    expected = {"loss|forward|two_way": 0.2, "loss|reverse|two_way": 0.0, "loss|reverse|two_way_double": -0.1}
    expected |= {"loss|forward|word": -0.1, "facts|forward|word": 15 / 16, "facts|reverse|two_way": 0.0}
    expected |= {"alone||two_way": -0.5, "alone||two_way_double": 0.0, "scorer||two_way": 0.0, "scorer||two_way_double": -0.5}
    assert {name: compared[name]["mean"] for name in expected} == pytest.approx(expected)
    assert compared["loss|forward|two_way"]["by_seed"] == pytest.approx([0.2] * 3)
    assert compared["facts|forward|word"]["is_significant"]
    assert not compared["facts|reverse|two_way"]["is_significant"]
    assert found["num_questions"] == 6
    assert "two-way, reverse documents by word, facts trained in the order that the forward direction does not read" in text
    losses, facts, answers, comparisons = tables
    assert losses[3][:4] == ["two-way, equal tokens", "6,144", "3,072", "1.4200"]
    assert facts[1] == ["forward alone", "forward", "100.0", "100.0", "0.0", "0.0", "100.0", "100.0", "25.0", "25.0"]
    assert facts[2][:6] == ["reverse alone", "reverse", "0.0", "0.0", "100.0", "100.0"]
    assert answers[1][:3] == ["forward alone", "reverse alone", "0.0"]
    assert answers[1][5].startswith("100.0 (")
    assert len(comparisons) == 15


def test_a_part_that_was_not_run_is_called_so(tmp_path: Path) -> None:
    code = "print(part.results(), *two_way_section(None).paragraphs)"
    assert "None Not run: this size runs it alone, with `--parts two_way`." in run_python(SETUP + code, tmp_path)


def test_the_blends_state_the_direction_of_each_source(tmp_path: Path) -> None:
    code = "print(json.dumps({step.name: step.commands[0] for stage in part.stages() for step in stage if step.name.startswith('train')}))"
    commands = json.loads(run_python(SETUP + code, tmp_path))
    assert len(commands) == 15
    shards = "study/two_way/shards"
    blend = f"data.train_blend=[[1, {shards}/forward/train, forward], [1, {shards}/word/train, reverse]]"
    assert {blend, "data.direction=both", "train.train_iters=48"} <= set(commands["train_two_way_word_2"])
    assert f"data.train_blend=[[1, {shards}/reverse/train, reverse]]" in commands["train_two_way_reverse_1"]
