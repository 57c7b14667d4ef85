"""The runner of checks: no check stops another, no process outlives its check, and the report has the reason of each failure."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_ledom.errors import UsageError
from megatron_ledom.hardware_check import isolation
from megatron_ledom.hardware_check.check import Check
from megatron_ledom.hardware_check.report import Report
from megatron_ledom.hardware_check.runner import Request, check_hardware, describe
from tests.support.paths import ROOT
from tests.unit.hardware_check.planted import catalogue

MINUTES = 2.0


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processes of checks import the planted ones."""
    monkeypatch.chdir(ROOT)


def run(folder: Path, *names: str, minutes: float = MINUTES, **settings: Any) -> tuple[Report, dict[str, Any]]:
    """Run planted checks; return the report and the checks of report.json by name."""
    report = check_hardware(Request(output=str(folder), minutes=minutes, **settings), catalogue(*names))
    return report, checks_of(folder)


def checks_of(folder: Path) -> dict[str, Any]:
    return {check["name"]: check for check in json.loads((folder / "report.json").read_text())["checks"]}


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_each_ending_of_a_check_has_its_reason_and_the_others_run(tmp_path: Path) -> None:
    endings = {
        "wrong": "the losses differ by 3.0",
        "refuses": "…/shard has another direction",
        "breaks": "ZeroDivisionError: no tokens",
        "crashes": "its process was killed by SIGSEGV, without a result",
        "is_killed": "its process was killed by SIGKILL, without a result; the usual cause is too little memory",
        "exits": "its process ended without a result; the log may show the reason",
        "returns_nothing": "TypeError: tests.unit.hardware_check.planted:returns_nothing returned NoneType, expected an Outcome",
        "crashes_at_its_end": "its process was killed by SIGABRT, after its result: all is well",
    }
    report, checks = run(tmp_path, *endings, "writes_rubbish", "missing", "good")
    assert {name: checks[name]["reason"] for name in endings} == endings
    assert {checks[name]["status"] for name in [*endings, "writes_rubbish"]} == {"failed"}
    assert checks["writes_rubbish"]["reason"].startswith("its result is not the JSON of an outcome (JSONDecodeError")
    assert checks["writes_rubbish"]["log_tail"] == ["��\\x1b[2J"]
    assert checks["wrong"]["log_tail"] == ["the losses follow"]
    assert checks["wrong"]["numbers"] == {"loss_difference": 3.0}
    assert checks["breaks"]["log_tail"][-1] == "ZeroDivisionError: no tokens"
    assert any(line.endswith(" in crashes") for line in checks["crashes"]["log_tail"])
    assert (checks["missing"]["status"], checks["good"]["status"]) == ("skipped", "passed")
    assert (checks["missing"]["log_tail"], checks["good"]["log_tail"]) == ([], [])
    assert report.summary() == "2 passed, 9 failed, 1 skipped"


def test_a_check_that_hangs_is_killed_with_its_children_at_its_limit(tmp_path: Path) -> None:
    _, checks = run(tmp_path, "hangs", minutes=0.1)
    assert checks["hangs"]["status"] == "failed"
    assert re.fullmatch(
        r"its process was killed at its time limit of \d s \(allow more with --minutes\), without a result",
        checks["hangs"]["reason"],
    )
    assert any(line.endswith(" in hangs") for line in checks["hangs"]["log_tail"])  # the stack before the kill
    assert checks["hangs"]["seconds"] == pytest.approx(checks["hangs"]["limit_seconds"], abs=1.0)
    assert not is_alive(int((tmp_path / "hangs/files/child").read_text()))


def test_no_child_of_a_passed_check_is_left(tmp_path: Path) -> None:
    _, checks = run(tmp_path, "leaves_a_child")
    assert checks["leaves_a_child"]["status"] == "passed"
    assert not is_alive(int((tmp_path / "leaves_a_child/files/child").read_text()))


def test_a_process_that_cannot_be_killed_does_not_stop_the_other_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A process inside a broken driver ignores the kill; here the kill does nothing."""
    with monkeypatch.context() as context:
        context.setattr(psutil.Process, "kill", lambda process: None)
        context.setattr(isolation, "KILL_SECONDS", 0.5)
        _, checks = run(tmp_path, "leaves_a_child", "good")
    child = int((tmp_path / "leaves_a_child/files/child").read_text())
    assert is_alive(child)
    psutil.Process(child).kill()
    assert checks["good"]["status"] == "passed"
    assert f"processes that cannot be killed, as a broken driver holds them: [{child}]" in caplog.messages


def test_time_that_a_check_leaves_is_for_the_others(tmp_path: Path) -> None:
    _, checks = run(tmp_path, "good", "missing")
    limits = [check["limit_seconds"] for check in checks.values()]
    assert limits[0] == pytest.approx(60 * MINUTES * 10 / 12, abs=0.1)
    assert 60 * MINUTES / 12 < limits[1] < limits[2] <= 60 * MINUTES


def test_report_has_the_machine_the_numbers_and_every_check(tmp_path: Path) -> None:
    run(tmp_path, "good", "wrong", num_gpus=3)
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["machine"] == {"device": "cpu", "ranks": 3}
    assert (content["format"], content["is_complete"], content["minutes"]) == (1, True, MINUTES)
    assert (content["passed"], content["failed"], content["skipped"]) == (2, 1, 0)
    assert content["checks"][1]["numbers"] == {"num_gpus": 3, "device": "cpu", "speed": "nan", "parts": [1, "inf"]}
    page = (tmp_path / "report.md").read_text()
    assert "2 passed, 1 failed, 0 skipped." in page
    assert "| wrong | failed |" in page
    assert "| loss_difference | 3 |" in page
    assert "the losses follow" in page
    assert (tmp_path / "good/files/kept").read_text() == "kept"
    assert (tmp_path / "wrong/log.txt").read_text() == "the losses follow\n"


def test_report_names_no_host_and_no_folder_of_the_machine(tmp_path: Path) -> None:
    report, checks = run(tmp_path, "tells_of_its_machine", "refuses")
    written = (tmp_path / "report.json").read_text() + (tmp_path / "report.md").read_text() + describe(report, "output")
    for word in (socket.gethostname(), str(tmp_path), str(ROOT), sys.prefix, "/data/own"):
        assert word not in written
    assert checks["tells_of_its_machine"]["reason"].endswith("cannot read …/shard.bin")
    assert any('File "tests/unit/hardware_check/planted.py"' in line for line in checks["refuses"]["log_tail"])


def test_without_a_machine_the_others_are_skipped(tmp_path: Path) -> None:
    checks = [replace(catalogue()[0], function="tests.unit.hardware_check.planted:no_machine"), *catalogue("good")[1:]]
    report = check_hardware(Request(output=str(tmp_path)), checks)
    assert report.summary() == "0 passed, 1 failed, 1 skipped"
    assert report.results[1].outcome.reason == "the check machine found no device"


def test_only_the_named_checks_and_the_first_one_run(tmp_path: Path) -> None:
    _, checks = run(tmp_path, "wrong", "good", only=["good"])
    assert list(checks) == ["machine", "good"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"only": ["goood"]}, r"--only goood is not a check; did you mean good\? The checks are machine, good"),
        ({"only": ["xyz"]}, "--only xyz is not a check; the checks are machine, good"),
        ({"minutes": 0.0}, "--minutes 0 is not a number above 0"),
        ({"minutes": float("nan")}, "--minutes nan is not a number above 0"),
        ({"minutes": float("inf")}, "--minutes inf is not a number above 0"),
        ({"num_gpus": 0}, "--gpus 0 is below 1"),
    ],
)
def test_wrong_use_is_refused_before_anything_is_written(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        check_hardware(Request(output=str(tmp_path / "new"), **settings), catalogue("good"))
    assert not (tmp_path / "new").exists()


def test_folder_with_a_report_or_with_other_files_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    before = (tmp_path / "report.json").read_bytes()
    with pytest.raises(UsageError, match="has a report already"):
        run(tmp_path)
    assert (tmp_path / "report.json").read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes").touch()
    with pytest.raises(UsageError, match="is not empty"):
        run(tmp_path / "other")


def test_a_check_does_not_see_the_launcher_unless_it_keeps_its_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("RANK", "3")
    first, other = catalogue("sees_no_launcher")
    kept = Check("kept", "", 1.0, other.function, keeps_job=True)
    report = check_hardware(Request(output=str(tmp_path)), [first, other, kept])
    assert [result.outcome.numbers["variables"] for result in report.results[1:]] == [[], ["SLURM_JOB_ID"]]


def test_a_check_does_not_multiply_in_tf32_where_a_container_switches_it_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    _, checks = run(tmp_path, "multiplies_in_fp32")
    assert checks["multiplies_in_fp32"]["numbers"] == {"tf32": False, "cublas": "0"}


CALL = """
import logging, sys
from megatron_ledom.errors import run_command
from megatron_ledom.hardware_check.runner import Request, check_hardware
from tests.unit.hardware_check.planted import catalogue
logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
run_command(lambda: check_hardware(Request(output=sys.argv[1]), catalogue("good", "hangs", "wrong")) and 0)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interruption_ends_the_check_and_keeps_the_results(tmp_path: Path, number: signal.Signals) -> None:
    """A kill leaves the report of the finished checks; Ctrl-C and SIGTERM also add the others as skipped."""
    process = subprocess.Popen([sys.executable, "-c", CALL, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    child = tmp_path / "hangs/files/child"
    end = time.monotonic() + 60
    while not (child.exists() and child.read_text()):
        assert time.monotonic() < end
        assert process.poll() is None
    process.send_signal(number)
    _, printed = process.communicate(timeout=60)
    checks = checks_of(tmp_path)
    statuses = {name: check["status"] for name, check in checks.items()}
    finished = {"machine": "passed", "good": "passed"}
    assert "good: passed in" in printed
    assert not json.loads((tmp_path / "report.json").read_text())["is_complete"]
    assert "**not complete**" in (tmp_path / "report.md").read_text()
    if number == signal.SIGKILL:
        assert statuses == finished
        psutil.Process(int(child.read_text())).kill()  # nobody is left to do it; a rank of a real check ends by itself
        return
    assert process.returncode == 130
    assert statuses == {**finished, "hangs": "skipped", "wrong": "skipped"}
    assert not is_alive(int(child.read_text()))


def test_a_check_knows_the_time_that_its_imports_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise it is killed while it believes to have time for its report."""
    monkeypatch.setenv("PLANTED_IMPORT_SECONDS", "1.5")
    _, checks = run(tmp_path, "imported_slowly")
    row = checks["imported_slowly"]
    assert row["limit_seconds"] - row["seconds"] - 1 <= row["numbers"]["left"] <= row["limit_seconds"] - 1.5
