"""The example of a minute in README.md and docs/get_started.md, run as written: the model memorizes the facts."""

import re
import shlex
from pathlib import Path

from tests.support.forked import run_forked
from tests.support.paths import ROOT

LEDOM = ["-c", "from megatron_ledom.cli.main import main; main()"]
PAGE = (ROOT / "docs/get_started.md").read_text(encoding="utf-8")
BEGINNING, END = "Zamfu Tider", " wrote Lamhoth."


def test_the_example_of_a_minute_runs_and_prints_what_the_pages_show(tmp_path: Path) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    [block] = [block for block in blocks if "one_minute" in block]
    for command in block.strip().splitlines():
        done = run_forked([*LEDOM, *shlex.split(command)[1:]], folder=tmp_path)
        assert done.returncode == 0, done.stderr
    assert done.stdout == f"{BEGINNING}{END}\n"
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    python = run_forked(["-c", code], folder=tmp_path)
    assert python.returncode == 0, python.stderr
    text, author, other = python.stdout.splitlines()
    assert text == f"{BEGINNING}{END}"
    assert float(author.removeprefix(BEGINNING)) > -2
    assert float(other.rpartition(" ")[2]) < -5
