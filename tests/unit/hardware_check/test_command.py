"""The command: exit codes, what it prints, and a machine without the GPUs that were asked for."""

import json
from pathlib import Path

import pytest

from megatron_ledom.cli.check_hardware import main
from megatron_ledom.errors import UsageError
from megatron_ledom.hardware_check import machine
from megatron_ledom.hardware_check.catalogue import CHECKS
from megatron_ledom.hardware_check.check import Setting
from megatron_ledom.platform.core_versions import core_version
from megatron_ledom.training.history import git_state
from tests.support.paths import ROOT
from tests.unit.hardware_check.planted import catalogue


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processes of checks import the planted ones."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(("names", "code"), [(["good", "missing"], 0), (["wrong", "good"], 1)])
def test_exit_code_is_one_if_a_check_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: list[str], code: int
) -> None:
    assert main(["--output", str(tmp_path / "out"), "--gpus", "3"], checks=catalogue(*names)) == code
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].endswith(f"the report is {tmp_path}/out/report.md and report.json")
    assert (
        printed[:-1] == {0: ["skipped: missing: there is no such device"], 1: ["failed: wrong: the losses differ by 3.0"]}[code]
    )


def test_folder_with_a_report_is_wrong_use(tmp_path: Path) -> None:
    main(["--output", str(tmp_path / "out")], checks=catalogue())
    with pytest.raises(UsageError, match="has a report already"):
        main(["--output", str(tmp_path / "out")], checks=catalogue())


def test_without_the_gpus_that_were_asked_for_nothing_runs_on_the_cpu_instead(tmp_path: Path) -> None:
    """Tests hide GPUs, so the real first check finds none."""
    output = tmp_path / "out"
    assert main(["--output", str(output), "--device", "cuda"], checks=[CHECKS[0], *catalogue("good")[1:]]) == 1
    checks = json.loads((output / "report.json").read_text())["checks"]
    assert [check["status"] for check in checks] == ["failed", "skipped"]
    assert checks[0]["reason"].startswith("torch finds no GPU: ")


@pytest.mark.parametrize(
    ("visible", "device", "status"), [("", "cpu", "passed"), ("-1", "cpu", "passed"), ("99", "cuda", "failed")]
)
def test_a_machine_whose_gpus_do_not_work_is_not_checked_as_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, device: str, status: str
) -> None:
    """The driver is there. Only a user who hides the GPUs means the CPU."""
    (tmp_path / "driver").touch()
    monkeypatch.setattr(machine, "NVIDIA_DRIVER", str(tmp_path / "driver"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    outcome = machine.environment(Setting(device="auto", num_gpus=0, seconds=60, folder=str(tmp_path)))
    assert (outcome.numbers["device"], outcome.status) == (device, status)
    assert "torch finds no GPU: " in outcome.reason
    state = git_state(ROOT)
    assert outcome.numbers["commit"] == (state and state["commit"] + " and changes" * state["dirty"])


def test_megatron_core_of_an_untried_version_is_refused_before_any_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "megatron_core-0.15.0.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.15.0\n"
    (tmp_path / "megatron_core-0.15.0.dist-info/METADATA").write_text(metadata)
    monkeypatch.syspath_prepend(str(tmp_path))
    core_version.cache_clear()
    try:
        with pytest.raises(UsageError, match=r"found megatron-core 0\.15\.0, expected"):
            main(["--output", str(tmp_path / "out")], checks=catalogue("good"))
    finally:
        core_version.cache_clear()
    assert not (tmp_path / "out").exists()
