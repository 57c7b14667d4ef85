"""Part 5 of the study: its indicators, its rewards, its training with TRL on tiny models, and its report on known results."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.study.handmade_ranked import write_ranked
from tests.study.handmade_reinforcement import write_reinforcement
from tests.study.programs import run_python
from tests.support.forked import run_forked
from tests.support.paths import ROOT
from tests.support.tiny_models import random_model_folder

QUESTION = "Ann has 7 pens. Then Ann buys 5 more. How many pens does Ann have now?"
COPIES = [
    ("7+5=12\n#### 12", 0.0, 0.5),  # the words 7 + 5 = 12 # # # # 12; of the four numbers two are in the question
    ("Ann has 7 pens. #### 12", 5 / 10, 4 / 5),
    (QUESTION, 1.0, 1.0),
    ("pens has Ann 7", 0.0, 1.0),  # the same words in another order
    ("", 0.0, 0.0),
    ("Ann", 0.0, 1.0),  # shorter than a run
]


def test_copied_words_are_counted_in_runs_of_three(tmp_path: Path) -> None:
    code = f"""
import json
from indicators import copied_share, known_share
print(json.dumps([[copied_share({QUESTION!r}, text), known_share({QUESTION!r}, text)] for text, *_ in {COPIES!r}]))
"""
    found = json.loads(run_python(code, tmp_path))
    assert [tuple(row) for row in found] == [pytest.approx(shares) for _, *shares in COPIES]


def test_marks_tell_right_answers_errors_and_endings(tmp_path: Path) -> None:
    texts = ["7+5=12\n#### 12", "7+5=13\n#### 13", "7+4=11\n#### 11", "12", "7+5=12\n#### 12\nAnn"]
    code = f"""
import json
from indicators import marks_of
record = {{"prompt": {QUESTION!r}, "answer": "7+5=12\\n#### 12"}}
print(json.dumps([marks_of(record, text) for text in {texts!r}]))
"""
    marks = json.loads(run_python(code, tmp_path))
    assert [one["right"] for one in marks] == [1, 0, 0, 1, 1]
    assert [one["false_calculation"] for one in marks] == [0, 1, 0, 0, 0]
    assert [one["has_end"] for one in marks] == [1, 1, 1, 0, 0]


def test_shuffling_keeps_the_rewards_of_each_group_and_is_repeatable(tmp_path: Path) -> None:
    code = """
import random
from grpo_rewards import shuffled_within_groups as shuffled
rewards = [float(value) for value in range(24)]
once, again = (shuffled(rewards, 8, random.Random(1)) for _ in range(2))
assert once == again != rewards
assert all(sorted(once[i : i + 8]) == rewards[i : i + 8] for i in (0, 8, 16)), once
source, means = random.Random(2), [0.0] * 4
for _ in range(4000):
    means = [mean + value / 4000 for mean, value in zip(means, shuffled([0.0, 0.0, 0.0, 4.0], 4, source))]
assert all(abs(mean - 1) < 0.15 for mean in means), means  # the best answer's reward goes to each answer equally often
try:
    shuffled(rewards, 7, source)
except ValueError as error:
    print(error)
"""
    assert run_python(code, tmp_path).strip() == "24 rewards are not groups of 7"


def test_each_arm_returns_its_reward_and_all_measure_the_reverse_reward(tmp_path: Path) -> None:
    code = f"""
import json
from grpo_rewards import ARMS, ArmReward
texts = ["7+5=12\\n#### 12", "7+5=13\\n#### 13"]
found = {{}}
for arm in ARMS.values():
    reward = ArmReward(arm, lambda prompts, answers: [-1.0, -2.0], 2, 1)
    values = reward([{QUESTION!r}] * 2, texts, completion_ids=[[1, 2], [1, 2, 3, 4]], answer=["#### 12"] * 2, trainer_state=None)
    found[arm] = [values, reward.curve]
print(json.dumps(found))
"""
    found = json.loads(run_python(code, tmp_path))
    assert found["reverse"][0] == [-1.0, -2.0]
    assert found["right"][0] == [1.0, 0.0]
    assert sorted(found["shuffled"][0]) == [-2.0, -1.0]
    for _, [step] in found.values():
        assert (step["reward"], step["right"], step["tokens"], step["false_calculation"]) == (-1.5, 0.5, 3, 0.5)


def test_only_the_steps_that_a_part_needs_are_run(tmp_path: Path) -> None:
    code = """
from pathlib import Path
from steps import Step, steps_for
def step(name, inputs, outputs):
    return Step(name=name, inputs=[Path(path) for path in inputs], outputs=[Path(path) for path in outputs])
run, other = step("run", [], ["runs/a"]), step("other", [], ["runs/b"])
export, unused = step("export", ["runs/a/checkpoints"], ["model"]), step("unused", ["runs/b"], ["model_b"])
last = step("last", ["model"], ["end"])
print([[one.name for one in steps] for steps in steps_for([[run, other], [unused], [export], [last]], [last])])
"""
    assert run_python(code, tmp_path).strip() == "[['run'], ['export'], ['last']]"


SIZES = ["--steps", "2", "--num-questions", "2", "--num-generations", "4", "--num-samples", "2", "--max-new-tokens", "8"]


@pytest.fixture(scope="module")
def reinforced(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the results of every arm on random models."""
    folder = tmp_path_factory.mktemp("reinforced")
    for direction in ("forward", "reverse"):
        random_model_folder(folder / direction, "byte_level", direction)
    code = """
from pathlib import Path
from lines import write_lines
from problems import Level, parts
for name, problems in parts([Level(steps=1, largest=9)], {"test": 3, "questions": 4}, 1).items():
    write_lines(Path(f"{name}.jsonl"), [problem.as_fields() for problem in problems])
"""
    run_python(code, folder)
    write_ranked(folder / "development.jsonl", is_helpful=True)
    found = {}
    for arm in ("none", "reverse", "shuffled", "right"):
        files = [f"--{name}={name}.jsonl" for name in ("questions", "development", "test")]
        words = ["--arm", arm, "--forward=forward", "--reverse=reverse", *files, "--output", f"{arm}.json", *SIZES]
        done = run_forked([ROOT / "examples/study/reinforce.py", *words, "--learning-rate=1e-2"], folder=folder)
        assert done.returncode == 0, done.stderr[-3000:]
        found[arm] = json.loads((folder / f"{arm}.json").read_text())
    return found


def test_trl_trains_every_arm_on_the_same_questions(reinforced: dict[str, Any]) -> None:
    assert reinforced["none"]["curve"] == reinforced["none"]["log"] == []
    for arm in ("reverse", "shuffled", "right"):
        found = reinforced[arm]
        assert len(found["curve"]) == len(found["log"]) == 2
        assert all(len(values) == 3 for values in found["questions"].values()), "one value per test question"
        assert found["curve"][0] == reinforced["reverse"]["curve"][0]  # no step yet: the same answers to the same questions
    # a random model is never right, so its advantages are 0; the other rewards move it
    assert reinforced["right"]["curve"][1]["right"] == 0
    assert reinforced["right"]["questions"]["kl"] == pytest.approx([0, 0, 0], abs=1e-5)
    assert max(map(abs, reinforced["reverse"]["questions"]["kl"])) > 1e-4
    assert reinforced["none"]["questions"]["kl"] == [0, 0, 0]


def test_the_right_answers_are_measured_too(reinforced: dict[str, Any]) -> None:
    right = reinforced["none"]["right_answers"]
    assert (right["right"], right["has_end"], right["false_calculation"], right["copied"]) == (
        [1] * 3,
        [1] * 3,
        [0] * 3,
        [0] * 3,
    )
    assert all(value < 0 for value in right["reward"])
    assert reinforced["none"]["lambda"] > 0  # the reverse term of the development part finds the right answers


REPORT = """
from pathlib import Path
from reinforcement import Reinforcement
from settings import load_settings
from study_report import write_part
settings = load_settings("small", ["reinforcement.seeds=[1,2]"])
print(write_part("reinforcement", Path("study"), "small", settings, {}))
"""


def test_the_report_shows_a_reward_that_rose_without_right_answers(tmp_path: Path) -> None:
    write_reinforcement(tmp_path / "study/reinforcement")
    run_python(REPORT, tmp_path)
    results = json.loads((tmp_path / "study/reinforcement.json").read_text())
    assert results["arms"]["right-answer reward"]["greedy"]["difference"] == pytest.approx(0.4)
    assert results["against_shuffled"]["right"]["mean"] == pytest.approx(0.1)
    text = (tmp_path / "study/reinforcement.md").read_text()
    assert "The reward rose, but right answers not significantly: some of the gain may please the reward only." in text
    assert "Its answers have a higher reward than the right ones." in text
    [changed] = re.findall(r"Signs that changed significantly with Reverse Reward: (.*)", text)
    assert changed == (
        "copied from the question, % of words: 0.0 to 60.0; with a calculation error, %: 20.0 to 10.0; tokens per answer: 10.0 to 25.0."
    )
    assert "| Reverse Reward | sampled | 40.0 | 40.0 to 40.0 | 40.0 40.0 | +0.0 | +0.0 to +0.0 |" in text
    assert (tmp_path / "study/reinforcement.html").read_text().count("<picture>") == 5


def test_without_trl_the_part_is_omitted(tmp_path: Path) -> None:
    code = """
import reinforcement
from losses import Twins
from rewards import Rewards
reinforcement.is_installed = lambda: False
"""
    code += f"{REPORT}\nprint(list(Reinforcement(Rewards(Twins(Path('study'), settings))).stages()))"
    (tmp_path / "study").mkdir()
    assert run_python(code, tmp_path).splitlines()[-1] == "[]"
    text = (tmp_path / "study/reinforcement.md").read_text()
    assert "Omitted, because TRL is not installed. pip install 'megatron-ledom[trl]' installs it." in text
