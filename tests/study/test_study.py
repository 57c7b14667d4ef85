"""The study: its problems and steps alone, and (slow) its smallest size through every command, killed once, opened in a browser."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.study.handmade import write_study
from tests.tiny_runs import ROOT

PREPARED = """
import sys
sys.path[:0] = [{study!r}, {quickstart!r}]
"""


def run_python(code: str, folder: Path) -> str:
    """What `code` prints with the study's modules at hand."""
    paths = {name: str(ROOT / "examples" / name) for name in ("study", "quickstart")}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PREPARED.format(**paths) + code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_chain_is_what_its_story_says_and_no_question_is_in_two_parts(tmp_path: Path) -> None:
    code = """
import json
from problems import Level, parts
levels = [Level(steps=1, largest=5), Level(steps=3, largest=20, distractors=2)]
made = parts(levels, {"test": 40, "train": 60}, 3)
again = parts(levels, {"test": 40, "train": 90}, 3)
assert [p.question for p in made["test"]] == [p.question for p in again["test"]]
print(json.dumps([[part, p.question, p.answer] for part, all_ in made.items() for p in all_]))
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


@pytest.mark.parametrize(
    ("chain", "is_true"),
    [
        ("3+4=7\n7-2=5\n#### 5", True),
        ("3+4=8\n8-2=6\n#### 6", False),  # a wrong sum
        ("3+4=7\n8-2=6\n#### 6", False),  # does not go on from the one before
        ("3+4=7\n#### 8", False),
        ("#### 8", False),
    ],
)
def test_the_calculator_finds_wrong_chains(chain: str, is_true: bool, tmp_path: Path) -> None:
    assert run_python(f"from problems import check_chain\nprint(check_chain({chain!r}))", tmp_path).strip() == str(is_true)


def test_a_step_is_done_once_and_again_where_its_input_changed(tmp_path: Path) -> None:
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
runner.code = {"steps.py": "edited"}  # what a function does may have changed
runner.run([step])
print(times)
"""
    assert run_python(code, tmp_path).splitlines()[-1] == "['a', 'bad', 'b', 'b', 'b']"


def test_the_report_says_of_known_files_what_they_hold(tmp_path: Path) -> None:
    """The reverse term is right in every test question and never in the development part: lambda must come from the latter."""
    write_study(tmp_path / "study")
    code = """
from pathlib import Path
from settings import load_settings
from study_report import write_study
note = {"seconds": 1.5, "commands": [["python", "tools/rerank.py"]], "inputs": {"study/a": "00ff" * 16}}
write_study(Path("study"), "tiny", load_settings("tiny", []), {"rerank_test_1": note})
"""
    run_python(code, tmp_path)
    results = json.loads((tmp_path / "study/results.json").read_text())
    for row in results["gaps"]:
        assert row["by_seed"] == pytest.approx([5.0, 3.0])
        assert row["gap"] == pytest.approx(4.0)
        low, high = row["interval"]  # t of one degree of freedom is 12.706, the standard error of 5 and 3 is 1
        assert (low, high) == pytest.approx((4 - 12.706, 4 + 12.706), abs=1e-3)
    report = results["rewards"]["report"]
    assert report["held_out"]["num_folds"] is None
    methods = {name: found["accuracy"] for name, found in report["methods"].items()}
    assert methods["reverse only"] == methods["oracle"] == methods["beam by Reverse Reward"] == 1.0
    assert methods["forward likelihood, sum"] == methods["greedy"] == methods["random of N"] == 0.25
    assert methods["Reverse Reward"] == 0.25
    wrong = {row["name"]: row["difference"] for row in results["wrong"]}
    assert wrong == {"reverse model fed text order": 0.0, "forward model fed reversed order": 0.0}
    page, summary = ((tmp_path / "study" / name).read_text() for name in ("report.html", "summary.md"))
    assert "Reverse Reward is not significantly above these baselines: greedy: +0.0 points; random of N: +0.0 points" in page
    assert "not surely above the forward one" in summary
    assert "P_F(y\\|x)" in summary
    assert "tools/rerank.py" in page
    assert "00ff00ff00ff00ff  study/a" in page
    assert page.count("<picture>") == 7
    assert "https://" not in page


def start(folder: Path) -> "subprocess.Popen[str]":
    """The study's command on its smallest size, in a session of its own."""
    command = [sys.executable, str(ROOT / "examples/study/study.py"), "--size", "tiny"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, start_new_session=True, **streams)


@pytest.mark.slow
def test_the_tiny_study_goes_on_after_a_kill_and_its_page_opens(tmp_path: Path) -> None:
    killed = start(tmp_path)
    assert killed.stdout is not None
    for line in killed.stdout:
        if line.startswith("--- train_maths_large_2"):
            break
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    done = start(tmp_path)
    output, _ = done.communicate()
    assert done.returncode == 0, output[-3000:]
    assert "--- collect\n" not in output
    study = tmp_path / "study"
    results = json.loads((study / "results.json").read_text())
    assert {row["domain"] for row in results["gaps"]} == {"prose", "code", "problems"}
    assert all(len(row["by_seed"]) == 2 for row in [*results["gaps"], *results["ablations"], *results["wrong"]])
    assert results["rewards"]["report"]["num_candidates"] == 4
    assert "https://" not in (study / "report.html").read_text()
    again = start(tmp_path)
    assert "---" not in again.communicate()[0]
    assert_page_opens(study / "report.html", tmp_path)


def assert_page_opens(page: Path, folder: Path) -> None:
    """A real browser draws it; skips where there is none."""
    browser = next((found for name in ("chromium", "google-chrome", "firefox") if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no browser on this machine: the page was made, but not opened")
    options = ["--headless", "--screenshot=shot.png", "--window-size=1000,3000"]
    options += [] if "firefox" in browser else ["--no-sandbox", "--disable-gpu"]
    subprocess.run([browser, *options, page.as_uri()], cwd=folder, check=True, capture_output=True, timeout=120)
    shot = (folder / "shot.png").read_bytes()
    assert shot.startswith(b"\x89PNG")
    assert len(shot) > 30_000  # a blank page is a few thousand bytes
