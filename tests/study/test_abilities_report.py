"""Part 3 of the study: the text of its section for known results, and the inputs of its steps."""

import json
from copy import deepcopy
from pathlib import Path

import pytest

from tests.study.handmade_abilities import VALUES, write_found
from tests.study.programs import run_python

REPORT = """
import json
from pathlib import Path
from abilities import Abilities
from abilities_report import abilities_not_reproduced, abilities_section
from losses import Twins
from settings import load_settings
settings = load_settings("tiny", ["abilities.seeds=[1,2]"])
results = Abilities(Twins(Path("study"), settings)).results()
report = {"sections": [[s.title, s.paragraphs, s.tables] for s in [abilities_section(results)]], "failed": abilities_not_reproduced(results)}
print(json.dumps({**report, "rows": results["rows"], "num_plots": len(abilities_section(results).plots)}))
"""


def _report(folder: Path, second_seed: dict[str, dict[str, dict[str, float]]]) -> dict[str, list]:  # type: ignore[type-arg]
    """Return the report on VALUES in seed 1 and `second_seed` in seed 2."""
    for seed, values in ((1, VALUES), (2, second_seed)):
        for direction, found in values.items():
            write_found(folder / "study/abilities/found" / f"{direction}_{seed}", direction, found)
    report: dict[str, list] = json.loads(run_python(REPORT, folder))  # type: ignore[type-arg]
    return report


def test_metrics_are_those_of_each_directions_main_way_and_differences_are_paired_by_seed(tmp_path: Path) -> None:
    second = deepcopy(VALUES)
    second["reverse"]["label_backfill"]["all"] = second["reverse"]["label_backfill"][""] = 0.96
    report = _report(tmp_path, second)
    rows = {(row["task"], row["group"]): row for row in report["rows"]}
    label = rows["label_backfill", "all"]
    assert label["values"] == {"reverse": [0.9, 0.96], "forward": [0.8, 0.8]}
    assert label["difference"] == pytest.approx(0.13)
    assert label["interval"] == pytest.approx(
        [0.13 - 12.706 * 0.03, 0.13 + 12.706 * 0.03], abs=1e-3
    )  # t of one degree of freedom
    assert rows["question_from_answer", "copied"]["means"] == {"reverse": 0.1, "forward": 0.0}
    [[title, sentences, tables]] = report["sections"]
    assert title == "Reverse abilities"
    text = " ".join(sentences)
    assert "2 seeds" in sentences[0]
    assert "exactly this solution, step by step, in 50.0 % of the cases" in text
    assert "the same answer by any steps: 60.0 %; copies of a trained question: 10.0 %" in text
    assert "The forward model reaches 0.0 % zero-shot" in text
    assert "forward model is right in 100.0 % of the questions in that order and in 25.0 % of those against it" in text
    assert "reverse model in 25.0 % and 100.0 %" in text
    assert "the label before a text: reverse 93.0 %, forward 80.0 %" in text
    assert [len(table) for table in tables] == [1 + 5, 1 + 8, 1 + 3]
    cells = ["label, chosen: all", "40", "80.0", "80.0 (70.0 to 90.0); 80.0 (70.0 to 90.0)", "93.0"]
    assert tables[2][-1][:5] == cells
    assert tables[2][-1][6:] == ["+13.0", "-25.1 to +51.1"]
    assert report["failed"] == []
    assert report["num_plots"] == 1


def test_unexpected_results_are_reported(tmp_path: Path) -> None:
    second = deepcopy(VALUES)
    second["reverse"]["reversal"] |= {"in_text_order": 1.0, "against_text_order": 0.25}
    second["reverse"]["abduction"]["known_world"] = 0.5
    second["forward"]["question_from_answer"][""] = 0.7
    failed = _report(tmp_path, second)["failed"]
    assert len(failed) == 3
    assert failed[0].startswith(
        "Facts, chosen: the reverse model is right more often against text order than in it: +0.0 points, the interval contains 0"
    )
    assert failed[1].startswith(
        "A question for a given solution: reverse is right more often than forward: +15.0 points, the interval contains 0"
    )
    assert failed[2].startswith("The cause of outcomes in a known world: reverse is at least as good as forward: -20.0 points")


def test_untrained_facts_above_chance_are_reported_only_if_every_seed_agrees(tmp_path: Path) -> None:
    second = deepcopy(VALUES)
    second["forward"]["abduction"]["unseen_world"] = 0.9
    assert _report(tmp_path / "one", second)["failed"] == []
    for seed in (1, 2):
        write_found(tmp_path / f"both/study/abilities/found/forward_{seed}", "forward", second["forward"])
        write_found(tmp_path / f"both/study/abilities/found/reverse_{seed}", "reverse", second["reverse"])
    [alarm] = json.loads(run_python(REPORT, tmp_path / "both"))["failed"]
    assert alarm.startswith("cause, chosen: rules that were never trained: the forward model is above chance (90.0 %)")


@pytest.mark.parametrize("size", ["tiny", "small", "full"])
def test_every_step_reads_files_of_earlier_steps(size: str, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from abilities import Abilities
from losses import Twins
from settings import load_settings
settings = load_settings({size!r}, [])
assert settings.abilities.repeats.keys() == settings.abilities.num.keys()
assert settings.abilities.model in settings.models
written, names = set(), []
for steps in Abilities(Twins(Path("study"), settings)).stages():
    for step in steps:
        for path in step.inputs:
            assert path.exists() or any(path == one or one in path.parents for one in written), (step.name, path)
    for step in steps:
        written |= set(step.outputs)
        names.append(step.name)
assert len(set(names)) == len(names)
print(sum(name.startswith("evaluate_") for name in names), len(settings.abilities.seeds))
"""
    num_evaluated, num_seeds = map(int, run_python(code, tmp_path).split())
    assert num_evaluated == 2 * num_seeds
