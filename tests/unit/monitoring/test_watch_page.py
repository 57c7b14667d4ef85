"""The commands of docs/how_to/watch_runs.md run as they stand there, but for the port; and the options of `ledom status`."""

import json
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import httpx
import pytest
import yaml

from megatron_ledom.cli.status import build_parser
from megatron_ledom.monitoring.state import State
from tests.support.paths import ROOT
from tests.support.served import serving_tool

PAGE = (ROOT / "docs/how_to/watch_runs.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines() if line]


@pytest.fixture
def folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the run of the page and its stage file, whose second stage has not begun."""
    (run.parent / "runs").mkdir()
    run.rename(run.parent / "runs/ledom_7b")
    config = yaml.safe_load((run.parent / "runs/ledom_7b/config.yaml").read_text())
    stages = []
    for name in ("ledom_7b", "anneal"):
        (run.parent / f"{name}.yaml").write_text(yaml.safe_dump({**config, "run_dir": f"runs/{name}", "init_from": None}))
        stages.append({"config": f"{name}.yaml", "name": name})
    (run.parent / "stages.yaml").write_text(yaml.safe_dump({"stages": stages}))
    monkeypatch.chdir(run.parent)
    return run.parent


def test_the_commands_of_the_page_show_the_run(folder: Path, python: Path) -> None:
    for command in COMMANDS:
        words = shlex.split(command)
        if "--serve" in words:
            with serving_tool("status", *words[2:]) as server:
                [found] = httpx.get(f"{server.url}/api/status", timeout=60).json()["runs"]
                assert (found["run"], found["state"], found["iteration"]) == ("runs/ledom_7b", "complete", 10)
                assert server.end() == 0
            continue
        process = subprocess.Popen([python.with_name("ledom"), *words[1:]], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        first = [process.stdout.readline() for _ in range(3)]
        if "--watch" in words:
            process.send_signal(signal.SIGINT)
        text = "".join(first) + process.stdout.read()
        assert process.wait(60) == 0, text
        if "--json" in words:
            assert [run["state"] for run in json.loads(text)] == ["complete"]
        else:
            assert "10 of 10 (100.0 %)" in text
        if "--stages" in words:
            assert "runs/anneal" in text
            assert "not started" in text
            assert "stage 2 of 2 (anneal)" in text
    assert len(COMMANDS) == 5


def test_every_state_and_exit_code_is_described() -> None:
    rows = re.findall(r"^\| ([a-z ]+) \|", PAGE, re.MULTILINE)
    assert [*State] == [row for row in rows if row in [*State]]
    assert re.findall(r"^\| (\d) \|", PAGE, re.MULTILINE) == ["0", "1", "2"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["run", "--json", "--serve"],
        ["run", "--watch", "0"],
        ["run", "--watch", "nan"],
        ["run", "--port", "65536"],
        ["run", "--min-free-disk-gib", "inf"],
    ],
)
def test_wrong_usage_is_refused(arguments: list[str]) -> None:
    from megatron_ledom.cli.status import main

    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert build_parser().parse_args(["run", "--watch"]).watch == 10


def test_a_folder_without_runs_and_one_that_is_missing_need_somebody(tmp_path: Path, python: Path) -> None:
    done = subprocess.run(
        [python.with_name("ledom"), "status", tmp_path, tmp_path / "missing\x1b[2J"],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "give the run_dir of a run" in done.stdout
    assert "does not exist" in done.stdout
    assert "\x1b" not in done.stdout
    shutil.rmtree(tmp_path)
