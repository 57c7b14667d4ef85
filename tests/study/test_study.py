"""The study: its problems, its steps, its smallest size as a whole, killed once, and (slow) its page in a browser."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.study.handmade import write_study
from tests.study.programs import PREPARED, run_python
from tests.support.forked import run_forked
from tests.support.paths import ROOT


def test_every_chain_solves_its_story_and_no_question_is_in_two_parts(tmp_path: Path) -> None:
    code = """
import json
from problems import Level, parts
levels = [Level(steps=1, largest=5), Level(steps=3, largest=20, distractors=2)]
first = parts(levels, {"test": 40, "train": 60}, 3)
again = parts(levels, {"test": 40, "train": 90}, 3)
assert [p.question for p in first["test"]] == [p.question for p in again["test"]]
print(json.dumps([[part, p.question, p.answer] for part, all_ in first.items() for p in all_]))
"""
    found = json.loads(run_python(code, tmp_path))
    assert len({question for _, question, _ in found}) == len(found) == 200
    for _, question, answer in found:
        name = re.search(r"does (\w+) have now", question)
        assert name is not None
        value = 0
        for sentence in question.split(". "):
            number = re.search(r"\d+", sentence)
            if name[1] in sentence and number is not None:
                takes = any(verb in sentence for verb in ("loses", "sells", "breaks", "drops"))
                value += -int(number[0]) if takes else int(number[0])
        assert answer.endswith(f"#### {value}")


def test_the_solver_finds_the_solution_of_every_story_and_none_of_other_texts(tmp_path: Path) -> None:
    code = """
import json
from problems import Level, parts, solve
levels = [Level(steps=1, largest=9), Level(steps=4, largest=50, distractors=2)]
assert all(solve(p.question) == p.answer for p in parts(levels, {"test": 300}, 1)["test"])
story = "Ann has {} pens. Then Ann loses {}. How many pens does Ann have now?"
print(json.dumps([solve(text) for text in (
    story.format(7, 5),
    story.format(5, 7),
    story.format(7, 5).replace("Then Ann", "Then Ben"),
    story.format(7, 5).replace("many pens", "many cups"),
    story.format(7, 5) + " Ann",
    "Ann has 7 pens. How many pens does Ann have now?",
    "",
)]))
"""
    assert json.loads(run_python(code, tmp_path)) == ["7-5=2\n#### 2", *[None] * 6]


CHAINS = [
    ("He has 3+4=<<3+4=7>>7 pens, 20% of 5 x 7 = 35.\n#### 7", True),
    ("Half of it: 0.5*7=<<.5*7=3.5>>3.5, or 10/3 = 3.33 each.\n#### 3.5", True),
    ("22 red pens + 3 red pens = 25 pens, 5% * 40 = 2, (1+2)*$1,000 = $3,000\n#### 3,000", True),
    ("He has 3+4=<<3+4=8>>8.\n#### 8", False),
    ("He has 3 x 4 = 11.\n#### 11", False),
    ("A half of 15: 15*0.5=7\n#### 7", False),  # whole numbers are not rounded
    ("X + 2 + 1 = 9, so X = 6\n#### 6", False),  # no equation of numbers
    ("<<__import__('os')=1>>3+4=7\n#### 7", False),
    ("3+4=7", False),  # no answer
    ("3/0=7\n#### 7", False),
]
"""Solutions written by people; True if the calculator accepts them."""


def test_the_calculator_reads_solutions_written_by_people(tmp_path: Path) -> None:
    chains = [chain for chain, _ in CHAINS]
    found = run_python(f"from word_problems import is_true_chain\nprint([is_true_chain(c) for c in {chains!r}])", tmp_path)
    assert found.strip() == str([is_true for _, is_true in CHAINS])


def test_a_wrong_answer_fits_another_question_or_has_a_calculation_error(tmp_path: Path) -> None:
    code = """
from mistakes import kind_of
record = {"answer": "3+4=7\\n#### 7"}
print([kind_of(text, record) for text in ("3+4=7\\n#### 7", "3+5=8\\n#### 8", "3+4=8\\n#### 8", "8")])
"""
    kinds = ["right", "true calculations of another question", "false calculation", "false calculation"]
    assert run_python(code, tmp_path).strip() == str(kinds)


def test_word_problems_are_checked_and_the_calculators_notes_are_removed(tmp_path: Path) -> None:
    rows = [
        {"question": "3 and 4?", "answer": "It is 3+4=<<3+4=7>>7.\n#### 7"},
        {"question": "3 and 5?", "answer": "It is 3+5=<<3+5=9>>9.\n#### 9"},
        {"question": "3 and 4?", "answer": "Again 3+4=<<3+4=7>>7.\n#### 7"},
    ]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "bad.jsonl").write_text(json.dumps({"problem": "3 and 4?"}) + "\n")
    code = """
from pathlib import Path
from corpora import Corpora
from settings import load_settings
from word_problems import DataError, gsm8k, gsm_symbolic
found = gsm8k(Path("gsm8k.jsonl"))
assert found.problems == [{"text": "3 and 4?\\nIt is 3+4=7.\\n#### 7", "domain": "gsm8k"}], found
assert found.num_refused == 1
try:
    gsm8k(Path("bad.jsonl"))
except DataError as error:
    assert "bad.jsonl:1" in str(error) and "found the keys problem" in str(error), error
else:
    raise AssertionError
drawn = gsm_symbolic(200, 1)
corpora = Corpora(Path("study"), load_settings("tiny", ["num_gsm_held_out=2"], "gsm8k.jsonl"))
try:
    corpora._word_problems().work()
except DataError as error:
    assert "gsm8k has 1 problems with correct solutions (1 rejected)" in str(error), error
else:
    raise AssertionError
texts = [problem["text"] for problem in drawn.problems]
assert drawn.problems == gsm_symbolic(200, 1).problems and len(set(texts)) == len(texts) > 100
assert all("####" in text and "Do not include units" not in text for text in texts)
print("done")
"""
    assert run_python(code, tmp_path) == "done\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["num_sample=3"], "num_sample"),
        (["models={}", "levels=[]"], "seeds, models and levels"),
        (
            ["train_iters={text: 3}", "vocab_size.mats=3"],
            "vocab_size has text, maths, gsm, abilities, mats; it needs text, maths, gsm, abilities",
        ),
        (["--gsm8k", "nowhere.jsonl"], "nowhere.jsonl is not a file"),
        (["abilities.num.riddles=3", "abilities.repeats.riddles=1"], "abilities.num names riddles"),
        (["seeds=[1,1]"], "seeds is [1, 1]"),
        (["num_problems.development=1"], "at least 2 problems per level"),
        (["backward=[9,3,2]"], "backward is [9, 3, 2]"),
        (["reinforcement.steps=3"], "num_problems.reinforcement=4 is too small: 3 steps of 2 questions need 6"),
        (["reinforcement.num_generations=1"], "at least 2 num_generations"),
        (["parts=[riddles]"], "parts names riddles; it can name reinforcement, contamination, controls, loss_gap"),
        (["--parts", "controls,riddles"], "--parts names 'riddles'; it can name"),
        (["controls.num.test=1"], "with at least 2 problems each"),
        (["controls.model=huge"], "controls.model is huge; it must name some of models: large"),
        (["loss_gap.contexts=[64,100]"], "loss_gap has the contexts [100]; each must be 8 or more and divide batch_tokens=256"),
        (["loss_gap.contexts=[128,64]"], "it needs different numbers, in order"),
        (["infill.model=huge"], "infill.model is huge; it must name some of models: large"),
        (["two_way.units=[letter]"], "two_way.units names letter; it can name word, entity, segment"),
    ],
)
def test_bad_settings_are_refused_before_any_step_runs(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = run_forked([ROOT / "examples/study/study.py", "--size", "tiny", *arguments], folder=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert not (tmp_path / "study").exists()


SYNTHETIC_CHAINS = [
    ("3+4=7\n7-2=5\n#### 5", True),
    ("3+4=8\n8-2=6\n#### 6", False),  # a wrong sum
    ("3+4=7\n8-2=6\n#### 6", False),  # does not begin with the result of the line before
    ("3+4=7\n#### 8", False),
    ("#### 8", False),
]


def test_the_calculator_finds_wrong_chains(tmp_path: Path) -> None:
    chains = [chain for chain, _ in SYNTHETIC_CHAINS]
    found = run_python(f"from problems import check_chain\nprint([check_chain(c) for c in {chains!r}])", tmp_path)
    assert found.strip() == str([is_true for _, is_true in SYNTHETIC_CHAINS])


def test_a_step_runs_once_and_again_if_its_input_changed(tmp_path: Path) -> None:
    code = """
from pathlib import Path
from steps import Runner, Step
source, target, times = Path("source"), Path("target"), []
def work():
    times.append(source.read_text())
    assert not target.exists()
    target.write_text(source.read_text())
    if source.read_text() == "bad":
        raise ValueError
step = Step(name="copy", inputs=[source], outputs=[target], work=work)
source.write_text("a")
for _ in range(2):
    Runner(Path("notes"), 2).run([step])
source.write_text("bad")
try:
    Runner(Path("notes"), 2).run([step])
except ValueError:
    pass
source.write_text("b")
Runner(Path("notes"), 2).run([step])
target.unlink()
runner = Runner(Path("notes"), 2)
runner.run([step])
Path("notes/steps/of_another_size.json").write_text("{}")
assert list(runner.all_notes()) == ["copy"]
runner.code = {"steps.py": "edited"}  # the function may have changed
runner.run([step])
print(times)
"""
    assert run_python(code, tmp_path).splitlines()[-1] == "['a', 'bad', 'b', 'b', 'b']"


def test_a_training_that_a_signal_stopped_is_not_finished_and_runs_again(tmp_path: Path) -> None:
    code = """
import sys
from functools import partial
from pathlib import Path
from commands import QuickstartError
from losses import check_complete
from steps import Runner, Step
run = Path("run")
train = '''
from pathlib import Path
folders = [Path("run/checkpoints", name) for name in ("iter_0000019", "iter_0000450")]
folder = folders[folders[0].exists()]
folder.mkdir(parents=True)
(folder / "manifest.json").write_text("{}")
'''
step = Step(name="t", outputs=[run], commands=[[sys.executable, "-c", train]], resumes=True, check=partial(check_complete, run, 450))
try:
    Runner(Path("notes"), 1).run([step])
except QuickstartError as error:
    print(error)
Runner(Path("notes"), 1).run([step])
print(sorted(path.name for path in Path("run/checkpoints").iterdir()))
"""
    told = run_python(code, tmp_path)
    assert "run was stopped and saved at iteration 19 of 450; run the study again to resume it" in told
    assert told.splitlines()[-1] == "['iter_0000019', 'iter_0000450']"


def test_running_steps_of_a_killed_study_end_before_the_next_study_begins(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from steps import Runner, Step
waits = [sys.executable, "-c", "import time; open('begun', 'w').close(); time.sleep(3); open('ended', 'w').close()"]
step = Step(name="wait", outputs=[Path("ended")], commands=[waits])
"""
    paths = {name: str(ROOT / "examples" / name) for name in ("study", "quickstart")}
    first = subprocess.Popen(
        [sys.executable, "-c", PREPARED.format(**paths) + code + "Runner(Path('notes'), 1).run([step])"], cwd=tmp_path
    )
    while not (tmp_path / "begun").exists():
        assert first.poll() is None
        time.sleep(0.02)
    first.kill()
    first.wait()
    output = run_python(code + "Runner(Path('notes'), 1)\nprint(Path('ended').exists())", tmp_path)
    assert "is still running in notes; waiting for its end" in output
    assert output.splitlines()[-1] == "True"


def test_the_report_agrees_with_known_files(tmp_path: Path) -> None:
    """The reverse term is right in every test question and never in the development part, from which lambda must come."""
    write_study(tmp_path / "study")
    code = """
from pathlib import Path
from settings import load_settings
from study_report import write_study
note = {"seconds": 1.5, "commands": [["python", "tools/rerank.py"]], "inputs": {"study/a": "00ff" * 16}}
seeds = ["abilities.seeds=[1]", "reinforcement.seeds=[1,2]", "contamination.seeds=[1,2]"]
write_study(Path("study"), "small", load_settings("small", seeds), {"rerank_test_1": note})
"""
    run_python(code, tmp_path)
    results = json.loads((tmp_path / "study/results.json").read_text())
    for row in results["gaps"]:
        assert row["by_seed"] == pytest.approx([5.0, 3.0])
        assert row["gap"] == pytest.approx(4.0)
        # Student's t of one degree of freedom is 12.706
        assert row["interval"] == pytest.approx([4 - 12.706, 4 + 12.706], abs=1e-3)
        assert row["holm_p"] == pytest.approx(min(1, 8 * 0.15596), abs=1e-3)  # t = 4, eight rows
    assert {row["domain"] for row in results["gaps"]} == {"prose", "code", "problems", "gsm_symbolic"}
    for first, last in results["places"].values():
        assert (first["tenth"], last["tenth"]) == (0, 9)
        assert (*first["by_seed"], first["difference"]) == pytest.approx((0.1, 0.3, 0.2))
        assert last["difference"] == pytest.approx(0.0)
    shares = {
        "true chain": 0.25,
        "solved to the result": 0.5,
        "solved by its own chain": 0.25,
        "copy of a trained question": 0.25,
    }
    assert results["backward"]["by_seed"] == {name: [share] * 2 for name, share in shares.items()}
    assert results["backward"]["chance"] == pytest.approx(
        1 / 2 / 20
    )  # one of two trained problems ends in 2 to 21, twenty results
    report = results["rewards"]["report"]
    assert report["held_out"]["num_folds"] is None
    methods = {name: found["accuracy"] for name, found in report["methods"].items()}
    assert methods["reverse only"] == methods["oracle"] == methods["beam by Reverse Reward"] == 1.0
    assert methods["forward likelihood, sum"] == methods["greedy"] == methods["random of N"] == 0.25
    assert methods["Reverse Reward"] == 0.25
    # three of four candidates have an error in the sum k+1; the reverse term finds the right one
    for name, right in (("all candidates", 0.25), ("greedy", 0.25), ("reverse only", 1.0)):
        kinds = {"right": right, "true calculations of another question": 0.0, "false calculation": 1 - right}
        assert results["mistakes"][name] == {kind: [share] * 2 for kind, share in kinds.items()}
    wrong = {row["name"]: row["difference"] for row in results["wrong"]}
    assert wrong == {"reverse model fed text order": 0.0, "forward model fed reversed order": 0.0}
    page, summary = ((tmp_path / "study" / name).read_text() for name in ("report.html", "summary.md"))
    _check_texts(page, summary)


def _check_texts(page: str, summary: str) -> None:
    assert "Reverse Reward is not significantly above these baselines: greedy: +0.0 points; random of N: +0.0 points" in page
    assert "not significantly above the forward loss" in summary
    assert "P_F(y\\|x)" in summary
    assert "Of the wrong candidates 100.0 % have a calculation error" in summary
    assert "| majority vote | 4 | 32 | 25.0 | 25.0 to 25.0 | 20,480 |" in summary
    assert re.search(r"\| Reverse Reward \| 1 \| .* \| 40,960 \|", summary)  # two models were trained
    assert "tools/rerank.py" in page
    assert "00ff00ff00ff00ff  study/a" in page
    assert "gsm_symbolic: 360 trained on, 40 held out, 7 rejected by the calculator" in page
    assert "| Reverse Reward is right more often than greedy |" in summary
    assert "cannot decide for: forward model fed reversed order (at chance in its own direction too)" in summary
    assert "chooses worse than chance" not in summary
    assert "some of the gain may please the reward only" in summary
    assert summary.index("any second model: not run in this report") < summary.index("## The claims")
    # a loss curve for three corpora and two models, three by position, over N and lambda, abilities, five of the training
    assert page.count("<picture>") == 17
    assert "https://" not in page


def test_beam_search_is_compared_with_as_many_candidates_as_its_tokens_allow(tmp_path: Path) -> None:
    """A candidate takes 8 tokens to write and 18 to score. The search is always right, a candidate in 1 of 4 cases."""
    write_study(tmp_path / "study")
    code = """
import json
from pathlib import Path
from losses import Twins
from rewards import Rewards
from settings import load_settings
rewards = Rewards(Twins(Path("study"), load_settings("tiny", [])))
for tokens in (20, 30, 80, 500):  # per question
    for seed in (1, 2):
        spent = {"forward_tokens": 20 * tokens - 7, "reverse_tokens": 7}
        Path(f"{rewards.beam(seed)}.spent.json").write_text(json.dumps(spent))
    print(json.dumps(rewards.results()["beam"]))
"""
    rows = [json.loads(row) for row in run_python(code, tmp_path).splitlines()]
    assert [(row["tokens"], row["num"], row["num_tokens"]) for row in rows] == [
        (20, 1, pytest.approx(26)),
        (30, 1, pytest.approx(26)),
        (80, 3, pytest.approx(78)),
        (500, 4, pytest.approx(104)),
    ]
    assert [row["is_affordable"] for row in rows] == [False, True, True, True]
    for row in rows:
        assert (row["accuracy"], row["best_of_num"], row["difference"]) == (1.0, 0.25, 0.75)
        low, high = row["difference_interval"]
        assert 0.4 < low <= 0.75 <= high <= 1.0
        assert (low < high) == (row["num"] > 1)  # for N=1 the mean over all candidates, which is the same for every question


def test_equal_answers_are_scored_once_and_an_answer_without_a_score_is_never_chosen(tmp_path: Path) -> None:
    """Ten tokens to write, 10 of the answer and 100 of the question to score.

    The second answer equals the first, the third is empty.
    """
    score = {"forward_tokens": 10, "reverse_tokens": 100, "forward_logprob": -5.0, "reverse_logprob": -9.0}
    unknown = {"forward_tokens": None, "reverse_tokens": None, "forward_logprob": None, "reverse_logprob": None}
    record = {
        "answer": "#### 3",
        "greedy": "1+2=3\n#### 3",
        "candidates": ["1+2=3\n#### 3", "1+2=3\n#### 3", "", "2+2=4\n#### 4"],
    }
    record["scores"] = [score, score, unknown, {**score, "reverse_logprob": -8.0}]
    (tmp_path / "study/rewards").mkdir(parents=True)
    (tmp_path / "study/rewards/test_1.jsonl").write_text(json.dumps(record) + "\n")
    code = """
import json
from pathlib import Path
from losses import Twins
from mistakes import mistakes
from rewards import Rewards
from settings import load_settings
rewards = Rewards(Twins(Path("study"), load_settings("tiny", [])))
print(json.dumps([rewards._tokens_by_num(4), mistakes(rewards, [0.5])["reverse only"]]))
"""
    tokens, kinds = json.loads(run_python(code, tmp_path))
    assert tokens == pytest.approx([90, 15 + 110 * 5 / 6 + 55, 22.5 + 110 + 82.5, 250])  # means over all subsets
    assert kinds == {"right": [0.0], "true calculations of another question": [1.0], "false calculation": [0.0]}


def start(folder: Path, python: Path, *options: str) -> "subprocess.Popen[str]":
    """Start the study's command with its smallest size, in its own session."""
    command = [str(python), str(ROOT / "examples/study/study.py"), "--size", "tiny", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, start_new_session=True, **streams)


@pytest.fixture(scope="module")
def tiny_study(tmp_path_factory: pytest.TempPathFactory, python: Path) -> Path:
    """Return the folder of a finished tiny study that was killed once and resumed."""
    folder = tmp_path_factory.mktemp("tiny")
    killed = start(folder, python)
    assert killed.stdout is not None
    for line in killed.stdout:
        if line.startswith("--- train_maths"):
            break
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    done = start(folder, python)
    output, _ = done.communicate()
    assert done.returncode == 0, output[-3000:]
    assert "--- collect\n" not in output
    return folder / "study/tiny"


def test_the_tiny_study_resumes_after_a_kill_and_fills_every_table(tiny_study: Path) -> None:
    results = json.loads((tiny_study / "results.json").read_text())
    assert {row["domain"] for row in results["gaps"]} == {"prose", "code", "problems", "gsm_symbolic"}
    assert all(len(row["by_seed"]) == 1 for row in [*results["gaps"], *results["ablations"], *results["wrong"]])
    assert results["rewards"]["report"]["num_candidates"] == 4
    assert {row["task"] for row in results["abilities"]["rows"]} >= {"question_from_answer", "reversal", "reversal_written"}
    assert set(results["places"]) == {"text", "maths", "gsm"}
    assert all(len(curves["reward"]) == 2 for curves in results["reinforcement"]["curves"].values())
    searches = results["contamination"]["searches"]
    assert all(row["missed_documents"] == 0 for row in searches.values())
    assert searches["ngram 64"]["is_rest"]  # so the clean corpus is the decontaminated one with the replaced problems
    assert all(len(row["by_seed"]) == 1 for rows in results["contamination"]["measures"].values() for row in rows.values())
    controls = results["controls"]
    assert controls["num_test"] == 8
    assert controls["registration"]["opened"] == json.loads((tiny_study / "controls/seal.json").read_text())["opened"]
    assert controls["budget"]["rows"]["verifier"]["tokens"] >= controls["budget"]["rows"]["R"]["tokens"] == 24 * 256
    assert controls["sampling"]["written"] > 0
    assert "FLOPs of sampling" in (tiny_study / "summary.md").read_text()
    assert set(results["loss_gap"]["cells"]) == {"gsm_symbolic|large|64"}
    assert set(results["infill"]["num_items"]) == {"code", "prose"}
    assert results["two_way"]["tokens"]["two_way_double"] == [48 * 256, 24 * 256]
    assert results["teacher"]["tokens"] == {"star": 24 * 16 * 19}
    page = (tiny_study / "report.html").read_text()
    assert "https://" not in page
    for step in tiny_study.glob("steps/*.json"):
        assert f"{step.stem}, " in page  # its commands and hashes


@pytest.mark.parametrize(
    ("part", "step"),
    [
        ("reinforcement", "reinforce_shuffled_1"),
        ("contamination", "scores_clean_1"),
        ("controls", "controls_registration"),
        ("loss_gap", "train_gap_primes_large_64_1_reverse"),
        ("infill", "infill_answers_1"),
        ("two_way", "train_two_way_two_way_double_1"),
        ("teacher", "train_teacher_star_reverse_teacher_1"),
    ],
)
def test_a_part_alone_uses_the_steps_of_the_study_and_has_its_own_report(
    tiny_study: Path, python: Path, part: str, step: str
) -> None:
    alone = start(tiny_study.parents[1], python, "--only", part)
    output = alone.communicate()[0]
    assert alone.returncode == 0, output[-3000:]
    assert "---" not in output
    page = (tiny_study / f"{part}.html").read_text()
    assert f"{step}, " in page
    assert "train_text" not in page
    assert "Not run" not in page


@pytest.mark.slow
def test_a_finished_study_runs_no_step_again_and_its_page_opens_light_and_dark(tiny_study: Path, python: Path) -> None:
    again = start(tiny_study.parents[1], python)
    assert "---" not in again.communicate()[0]
    assert again.returncode == 0
    browser = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no browser on this machine: the page was written, but not opened")
    shots = {}
    for theme, number in (("dark", 0), ("light", 1)):
        shot = tiny_study / f"{theme}.png"
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--screenshot={shot}", "--window-size=1100,4000"]
        options += [f"--blink-settings=preferredColorScheme={number}"]
        command = [browser, *options, (tiny_study / "report.html").as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        with Image.open(shot) as image:
            pixels = image.convert("L")
            shots[theme] = (pixels.getpixel((3, 3)), pixels.getextrema())
    for theme, is_paper in (("dark", lambda grey: grey < 40), ("light", lambda grey: grey > 240)):
        paper, (least, most) = shots[theme]
        assert is_paper(paper), shots
        assert most - least > 150, shots  # the page is not blank
