"""The set-up of `make quickstart` and `make test`: which Python it takes, and which missing programs it reports before it starts."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT

NAME = f"python{sys.version_info[0]}.{sys.version_info[1]}"
OTHER = "3.12" if NAME == "python3.13" else "3.13"
TOOLS = {NAME: os.path.realpath(sys.executable), "git": shutil.which("git"), "g++": shutil.which("g++")}

spec = importlib.util.spec_from_file_location("choose_python", ROOT / ".ci/choose_python.py")
assert spec is not None
assert spec.loader is not None
choose_python = importlib.util.module_from_spec(spec)
spec.loader.exec_module(choose_python)


def tools(folder: Path, *missing: str) -> dict[str, str]:
    """Return the environment of a machine that has only TOOLS without `missing`."""
    (folder / "bin").mkdir()
    for name, path in TOOLS.items():
        if name not in missing:
            assert path is not None
            (folder / "bin" / name).symlink_to(path)
    return {"PATH": str(folder / "bin"), "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}


def script(path: Path, text: str) -> str:
    """Write a program of the shell."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def beside(folder: Path, lacking: str) -> None:
    """Put another supported Python, which has no torch, on the PATH."""
    answer = json.dumps([OTHER, "/other", lacking])
    script(folder / "bin" / f"python{OTHER}", f"case $2 in import\\ torch*) exit 1;; esac\necho '{answer}'")


def set_up(folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [shutil.which("bash") or "bash", ".ci/make_venv", str(folder / "venv")]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def chosen(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run choose_python.py alone."""
    command = [sys.executable, str(ROOT / ".ci/choose_python.py")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (NAME, "no Python found; install one of python3.11 python3.12 python3.13 (with venv)"),
        ("git", "git is missing; install it"),
        ("g++", "no C++ compiler found"),
    ],
)
def test_a_missing_prerequisite_is_named(tmp_path: Path, missing: str, message: str) -> None:
    done = set_up(tmp_path, tools(tmp_path, missing))
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "venv").exists()


def test_another_python_is_refused_with_the_supported_ones(tmp_path: Path) -> None:
    other = script(tmp_path / "python3", """echo '["3.8", "/usr", ""]'""")
    done = set_up(tmp_path, tools(tmp_path) | {"PYTHON": other})
    assert done.returncode == 2
    assert f"found Python 3.8 ({other}); supported are 3.11, 3.12, 3.13" in done.stderr
    assert "make PYTHON=/path/to/python3.13" in done.stderr


def test_a_named_python_that_does_not_run_is_an_error(tmp_path: Path) -> None:
    done = set_up(tmp_path, tools(tmp_path) | {"PYTHON": "/nowhere/python3"})
    assert done.returncode == 2
    assert "PYTHON=/nowhere/python3 is not a Python that runs" in done.stderr


def test_pythons_that_do_not_run_are_passed_over(tmp_path: Path) -> None:
    environment = tools(tmp_path)
    for name in {"python3.11", "python3.12", "python3.13", "python3"} - {NAME}:
        script(tmp_path / "bin" / name, "exit 127")
    done = chosen(environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{tmp_path}/bin/{NAME}", f"{ROOT}/constraints/{NAME}.txt", ""]
    assert "the only supported one here" in done.stderr


def test_one_that_lacks_the_headers_gives_way_to_a_complete_one_and_is_an_error_if_named(tmp_path: Path) -> None:
    environment = tools(tmp_path)
    beside(tmp_path, "the Python headers are missing")
    bare = f"{tmp_path}/bin/python{OTHER}"
    done = chosen(environment)
    assert done.stdout.splitlines()[0] == f"{tmp_path}/bin/{NAME}", done.stderr
    assert "the only complete one here" in done.stderr
    named = chosen(environment | {"PYTHON": bare})
    assert named.returncode == 2
    assert f"Python {OTHER} ({bare}): the Python headers are missing" in named.stderr


def test_a_python_with_a_cuda_torch_is_preferred(tmp_path: Path) -> None:
    environment = tools(tmp_path)
    beside(tmp_path, "")
    (tmp_path / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: True)\n")
    done = chosen(environment | {"PYTHONPATH": str(tmp_path)})
    assert done.stdout.splitlines() == [f"{tmp_path}/bin/{NAME}", f"{ROOT}/constraints/{NAME}.txt", "cuda"], done.stderr
    assert "it has a CUDA torch, which is used" in done.stderr


def test_the_newest_is_taken_on_a_machine_with_a_gpu(tmp_path: Path) -> None:
    environment = tools(tmp_path)
    beside(tmp_path, "")
    newest = max(NAME, f"python{OTHER}")
    script(tmp_path / "bin/nvidia-smi", "exit 0")
    done = chosen(environment)
    assert done.stdout.splitlines()[0] == f"{tmp_path}/bin/{newest}", done.stderr
    assert "for a machine with a GPU" in done.stderr


def test_pip_tells_the_size_of_torch_without_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pins = (ROOT / f"constraints/{NAME}.txt").read_text()
    [version] = re.findall(r"^torch==(.*)$", pins, re.MULTILINE)
    tag = f"cp{NAME.removeprefix('python').replace('.', '')}-none-any"
    with zipfile.ZipFile(tmp_path / f"torch-{version}-{tag}.whl", "w") as wheel:
        metadata = f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\nRequires-Dist: sympy\n"
        wheel.writestr(f"torch-{version}.dist-info/METADATA", metadata)
        wheel.writestr(f"torch-{version}.dist-info/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        wheel.writestr(f"torch-{version}.dist-info/RECORD", "")
    for name, value in {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    python = choose_python.probe(os.path.realpath(sys.executable))
    assert choose_python.ask_pip([python, python._replace(version=OTHER)]) == [True, None]


def test_only_cuda_libraries_make_a_torch_large() -> None:
    def report(*requires: str) -> str:
        return json.dumps({"install": [{"metadata": {"name": "torch", "requires_dist": list(requires)}}]})

    assert not choose_python.needs_cuda_libraries(report("sympy>=1.13.3", "jinja2", "triton==3.7.1"))
    assert choose_python.needs_cuda_libraries(report("sympy>=1.13.3", 'cuda-bindings<14,>=13.0.3; platform_system == "Linux"'))


@pytest.mark.parametrize(
    ("small", "version", "reason"),
    [
        ([True, True, True], "3.13", "the newest supported one here"),
        ([False, True, True], "3.12", "whose torch is small (for Python 3.13 torch brings gigabytes of CUDA libraries)"),
        ([None, False, True], "3.11", "whose torch is small (for Python 3.13 pip finds no torch)"),
        ([False, False, False], "3.13", "that pip has a torch for, with gigabytes of CUDA libraries"),
        ([None, False, None], "3.12", "that pip has a torch for, with gigabytes of CUDA libraries"),
        ([None, None, None], "3.13", "pip could not tell the size of its torch"),
    ],
)
def test_the_newest_python_with_a_small_torch_is_taken(small: list[bool | None], version: str, reason: str) -> None:
    pythons = [choose_python.Python(f"python{name}", name, f"/{name}", "") for name in ("3.13", "3.12", "3.11")]
    choice = choose_python.choose_by_torch(pythons, small)
    assert choice.python.version == version
    assert reason in choice.reason
    assert not choice.cuda


def test_the_checks_of_a_submission_demand_the_second_python(tmp_path: Path) -> None:
    environment = tools(tmp_path) | {"PYENV_ROOT": str(tmp_path)}
    for name in ("cat", "dirname", "mktemp", "rm", "sort", "tail"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or name)
    (tmp_path / "bin/python3.12").unlink(missing_ok=True)
    script(tmp_path / "bin/bash", "exit 0")  # for .ci/install_services
    script(tmp_path / "bin/make", 'echo make "$@"')
    command = [shutil.which("bash") or "bash", str(ROOT / ".ci/run")]

    def run(**variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=False)

    refused = run()
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "no python3.12 on the PATH" in refused.stderr
    judges, omitted, tests = run(ONE_PYTHON="1").stdout.splitlines()
    assert (judges, tests) == ("make install-judges install-datatrove PYTHON=python3.11", "make test PYTHON=python3.11")
    assert omitted.startswith("=== omitted: the tests of megatron-core on Python 3.12")
    (tmp_path / "versions/3.12.9/bin").mkdir(parents=True)
    second = script(tmp_path / "versions/3.12.9/bin/python3.12", "exit 0")
    pythons = f"VENV=.venv-3.12 PYTHON={second}"
    both = "3.11=.venv/bin/python 3.12=.venv-3.12/bin/python"
    assert run().stdout.splitlines() == [judges, tests, f"make test-core moves {pythons} CORES={both}"]
    script(tmp_path / "bin/make", f'echo make "$@"\n[ "$*" != "install-judges {pythons}" ]')
    failed = run()
    assert failed.stdout.splitlines() == [judges, tests]
    assert (failed.returncode, failed.stderr) == (2, f"make install-judges {pythons}\n")
