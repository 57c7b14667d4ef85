"""The notebooks of examples/notebooks run from start to end, and what is committed shows that run."""

import re
import sys
from pathlib import Path

import nbformat
import pytest

from tests.support.paths import ROOT

FOLDER = ROOT / "examples/notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def output(notebook: nbformat.NotebookNode) -> str:
    """Return the text that the cells of a notebook printed."""
    return "".join(part.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for part in cell.outputs)


def test_two_notebooks_are_there() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["look_into_a_shard", "reverse_reward"]


@pytest.fixture
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", "/usr/local/bin:/usr/bin:/bin")  # `ledom` must be found without an activated environment
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@pytest.mark.usefixtures("_environment")
def test_the_notebook_of_reverse_reward_runs_with_a_short_training(
    python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commands are forks of a process that has imported torch."""
    from execute import execute  # type: ignore[import-not-found]

    text = (FOLDER / "reverse_reward.ipynb").read_text(encoding="utf-8")
    for long, short in {"range(20_000)": "range(6_000)", "train_iters: 300": "train_iters: 40", "/300 ": "/40 "}.items():
        assert long in text
        text = text.replace(long, short)
    (tmp_path / "short.ipynb").write_text(text.replace("log_interval: 100", "log_interval: 20"), encoding="utf-8")
    monkeypatch.setattr(sys, "executable", str(python))
    executed = output(execute(tmp_path / "short.ipynb"))
    assert executed.count("iteration 40/40") == 2
    rows = re.findall(r"^( .*\.) +-\d+\.\d\d +-\d+\.\d\d +-\d+\.\d\d$", executed, re.MULTILINE)
    assert {" 4 + 3 = 7. Eva has 7 coins.", " 5 + 3 = 8. Eva has 8 coins."} < set(rows[:5])
    assert executed.count(" Eva has 7 coins.\n\n") >= 3


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("_environment")
@pytest.mark.parametrize("path", [NOTEBOOKS[0], pytest.param(NOTEBOOKS[1], marks=pytest.mark.slow)], ids=lambda path: path.stem)
def test_notebook_runs(path: Path) -> None:
    from execute import execute

    executed, committed = output(execute(path)), output(nbformat.read(path, as_version=4))
    lines = {
        "look_into_a_shard": r"^ *\d+ +\d+  .*|magic: .*",
        "reverse_reward": r"^ .*(?= +-\d+\.\d\d +-\d+\.\d\d +-\d+\.\d\d$)",
    }
    found = re.findall(lines[path.stem], executed, re.MULTILINE)
    assert len(found) > 5
    if path.stem == "look_into_a_shard":  # exact on every machine
        assert found == re.findall(lines[path.stem], committed, re.MULTILINE)
        assert "damaged" in executed
    else:  # of five given answers the right one has the highest reward; each text ends as it was given
        assert found[0].strip() == "4 + 3 = 7. Eva has 7 coins."
        assert len(re.findall(r"^Question: .*\nAnswer: .* Eva has 7 coins\.$", executed, re.MULTILINE)) == 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebook_was_executed_and_has_no_error(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    assert not [part for cell in cells for part in cell.outputs if part.output_type == "error"]
