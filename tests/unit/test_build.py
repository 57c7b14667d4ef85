"""setup.py chooses the extensions to build and reports the reason for the others; compilers and torch are simulated."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

RUN = """
import importlib.util, os, runpy, shutil, sys, types
from setuptools import Extension
from setuptools.command.build_ext import build_ext
class Pybind11Extension(Extension):
    def __init__(self, *arguments, cxx_std=0, **named):
        super().__init__(*arguments, **named)
helpers = types.ModuleType("pybind11.setup_helpers")
helpers.Pybind11Extension, helpers.build_ext = Pybind11Extension, build_ext
helpers.ParallelCompile = lambda default: types.SimpleNamespace(install=lambda: None)
sys.modules.update({"pybind11": types.ModuleType("pybind11"), "pybind11.setup_helpers": helpers})
nvcc, torch, has_compiler = sys.argv[1], sys.argv[2], sys.argv[3] == "yes"
shutil.which = lambda name, path=None: (nvcc or None) if name == "nvcc" else sys.executable if has_compiler else None
find = importlib.util.find_spec
spec = types.SimpleNamespace(origin=torch + "/__init__.py") if torch else None
importlib.util.find_spec = lambda name, *rest: spec if name == "torch" else find(name, *rest)
import setuptools
setuptools.setup = lambda **named: print(*(extension.name for extension in named["ext_modules"]))
sys.argv = ["setup.py"]
runpy.run_path("setup.py")
"""
HELPERS = "megatron_ledom._helpers megatron_ledom._cpu_ops"
OPERATORS = f"{HELPERS} megatron_ledom._cuda_ops"


def decide(
    mode: str | None, nvcc: str, torch: str, *, extensions: str | None = None, has_compiler: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run setup.py: its extensions are on stdout, its reasons on stderr."""
    variables = {"LEDOM_CUDA": mode, "LEDOM_EXTENSIONS": extensions}
    environment = {"PATH": "/usr/bin:/bin"} | {name: value for name, value in variables.items() if value is not None}
    command = [sys.executable, "-c", RUN, nvcc, torch, "yes" if has_compiler else "no"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def cpu_torch(tmp_path: Path) -> str:
    """Make a torch with the stable ABI, without CUDA."""
    header = tmp_path / "torch/include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    return str(tmp_path / "torch")


@pytest.fixture
def cuda_torch(cpu_torch: str) -> str:
    (Path(cpu_torch) / "lib").mkdir()
    (Path(cpu_torch) / "lib/libtorch_cuda.so").touch()
    return cpu_torch


def test_operators_are_built_where_nvcc_and_a_cuda_torch_are(cuda_torch: str) -> None:
    for mode in (None, "auto", "1"):
        assert decide(mode, "true", cuda_torch).stdout.strip() == OPERATORS
    done = decide("0", "true", cuda_torch)
    assert done.stdout.strip() == HELPERS
    assert "not built: LEDOM_CUDA=0" in done.stderr


def test_a_cpu_torch_gets_them_only_if_required(cpu_torch: str) -> None:
    done = decide(None, "true", cpu_torch)
    assert done.stdout.strip() == HELPERS
    assert "not built: this torch has no CUDA (LEDOM_CUDA=1 builds them anyway)" in done.stderr
    assert decide("1", "true", cpu_torch).stdout.strip() == OPERATORS


@pytest.mark.parametrize(
    ("nvcc", "torch", "reason"),
    [
        ("", "cuda_torch", "nvcc is not found; set CUDA_HOME"),
        ("true", "", "torch is not in the build's environment; install torch, then use pip install --no-build-isolation"),
        ("true", "old", "has no stable ABI; install torch 2.10 or newer"),
    ],
)
def test_forced_and_impossible_fails_with_the_reason(
    cuda_torch: str, tmp_path: Path, nvcc: str, torch: str, reason: str
) -> None:
    where = {"cuda_torch": cuda_torch, "": "", "old": str(tmp_path)}[torch]
    done = decide("auto", nvcc, where)
    assert done.stdout.strip() == HELPERS
    assert f"not built: {reason}" in done.stderr or reason in done.stderr
    forced = decide("1", nvcc, where)
    assert forced.returncode == 1
    assert "LEDOM_CUDA=1, but " in forced.stderr
    assert reason in forced.stderr


def test_another_value_is_refused(cpu_torch: str) -> None:
    done = decide("yes", "true", cpu_torch)
    assert done.returncode == 1
    assert "LEDOM_CUDA=yes, expected auto, 0 or 1" in done.stderr


def test_helpers_are_skipped_without_a_compiler(cuda_torch: str) -> None:
    for mode in (None, "auto"):
        done = decide(None, "true", cuda_torch, extensions=mode, has_compiler=False)
        assert (done.returncode, done.stdout.strip()) == (0, "")
        assert "C++ helpers not built, so preprocessing and reversing shards do not work: the C++ compiler " in done.stderr
    forced = decide(None, "true", cuda_torch, extensions="1", has_compiler=False)
    assert forced.returncode == 1
    assert "LEDOM_EXTENSIONS=1, but the C++ compiler " in forced.stderr


def test_helpers_are_skipped_on_request(cuda_torch: str) -> None:
    done = decide(None, "true", cuda_torch, extensions="0")
    assert (done.returncode, done.stdout.strip()) == (0, "")
    assert decide(None, "true", cuda_torch, extensions="1").stdout.strip() == OPERATORS
    assert "LEDOM_EXTENSIONS=no, expected auto, 0 or 1" in decide(None, "true", cuda_torch, extensions="no").stderr


@pytest.mark.parametrize(("extensions", "has_compiler"), [("0", True), ("auto", False)])
def test_required_operators_are_never_skipped(cuda_torch: str, extensions: str, has_compiler: bool) -> None:
    done = decide("1", "true", cuda_torch, extensions=extensions, has_compiler=has_compiler)
    assert done.returncode == 1
    assert "LEDOM_CUDA=1, but " in done.stderr
