"""docs/reference/python_api.md names every export and only those, imports are lazy, and the examples run."""

import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import megatron_ledom
from tests.support.evaluation_sets import write_sets
from tests.support.paths import ROOT
from tests.support.tiny_models import random_model_folder
from tests.support.tiny_runs import TinyData, read_metrics

PAGE = (ROOT / "docs/reference/python_api.md").read_text(encoding="utf-8")
TABLE = re.findall(r"^\| `(megatron_ledom[\w.]*)` \| (.*) \|$", PAGE, re.MULTILINE)
PACKAGES = [package for package, _ in TABLE]
EXAMPLES: list[str] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def documented(text: str) -> set[str]:
    """Return the names in the second column, without parentheses."""
    return set(re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", text)))


@pytest.mark.parametrize(("package", "text"), TABLE, ids=PACKAGES)
def test_the_page_names_what_the_package_exports(package: str, text: str) -> None:
    module = importlib.import_module(package)
    assert set(module.__all__) == documented(text)
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert not (Path(str(module.__file__)).parent / f"{name}.py").exists(), "a submodule of that name would hide the export"


def test_no_other_package_exports_anything() -> None:
    files = [path.relative_to(ROOT) for path in (ROOT / "megatron_ledom").rglob("__init__.py") if "__all__" in path.read_text()]
    assert sorted(PACKAGES) == sorted(".".join(path.parent.parts) for path in files)


def test_a_name_that_is_not_exported_is_refused() -> None:
    with pytest.raises(AttributeError, match=r"module 'megatron_ledom\.data' has no attribute 'ShardEater'"):
        _ = importlib.import_module("megatron_ledom.data").ShardEater


def test_importing_the_packages_imports_nothing_heavy() -> None:
    code = f"import sys, {', '.join(PACKAGES)}; print([name for name in ('numpy', 'torch', 'pydantic') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version_is_that_of_the_project() -> None:
    assert megatron_ledom.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_version_of_a_checkout_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    installed = megatron_ledom.__version__
    monkeypatch.setattr("importlib.metadata.version", missing)
    assert megatron_ledom.__version__ == installed


def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for direction in ("reverse", "forward"):
        random_model_folder(tmp_path / "models" / direction, "byte_level", direction)
    write_sets(tmp_path / "evaluation_sets")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for example in [example for example in EXAMPLES if "sys.exit" not in example]:
        exec(compile(example, "python_api.md", "exec"), names)
    assert "reverse 2 [" in capsys.readouterr().out
    assert names["result"].metric_values().keys() >= {"svamp/accuracy"}
    assert {"config.json", "model.safetensors"} <= set(os.listdir("models/again"))


def test_the_example_of_a_callback_trains_and_its_numbers_are_in_every_record(
    data: TinyData, tmp_path: Path, python: Path
) -> None:
    """The example is a script that ends the process."""
    (script,) = [example for example in EXAMPLES if "sys.exit" in example]
    (tmp_path / "train_with_progress.py").write_text(script)
    command = [str(python), "train_with_progress.py", "--config", str(data.config), "run_dir=run", "train.train_iters=3"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [record["update"] for record in read_metrics(tmp_path / "run")]
    assert [round(3 * record["share_of_run"]) for record in found] == [1, 2, 3]
    assert all(record["mean_lr"] > 0 for record in found)
