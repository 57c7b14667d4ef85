"""examples/corpus/clean without datatrove: its help, its advice, and its list of packages. tests/cleaning runs it with datatrove."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.forked import run_forked
from tests.support.paths import ROOT

SCRIPT = "examples/corpus/clean/clean.py"


def test_without_datatrove_the_command_says_how_to_get_it_and_writes_nothing(tmp_path: Path) -> None:
    if find_spec("datatrove") is not None:
        pytest.skip("datatrove is in this environment")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a page"}) + "\n")
    done = run_forked([SCRIPT, "--input", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "out")])
    assert done.returncode == 2
    assert "make install-datatrove" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name != ".lock"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "0"], "--workers 0 is not possible"),
        (["--text-key", "a.b"], "names a field inside another|is a field inside another"),
        (["--id-key", "text"], "name two fields"),
    ],
)
def test_impossible_options_are_refused(tmp_path: Path, options: list[str], message: str) -> None:
    done = run_forked([SCRIPT, "--input", "a.jsonl", "--output", str(tmp_path / "out"), *options])
    assert done.returncode == 2
    assert any(part in done.stderr for part in message.split("|"))
    assert not (tmp_path / "out").exists()


def test_the_help_needs_neither_datatrove_nor_torch() -> None:
    code = f"import sys, runpy; sys.argv = ['clean.py', '--help']\ntry: runpy.run_path({SCRIPT!r}, run_name='__main__')\n"
    code += "except SystemExit: pass\nsys.exit(any(name in sys.modules for name in ('torch', 'datatrove', 'spacy')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--keep-languages" in done.stdout


def test_every_package_is_pinned() -> None:
    lines = (ROOT / "examples/corpus/clean/requirements.txt").read_text().splitlines()
    packages = [line for line in lines if line and not line.startswith("#")]
    assert len(packages) > 15
    assert all(line.count("==") == 1 for line in packages)
