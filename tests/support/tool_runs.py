"""Run tools in this process, or as the command that users start."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ledom.data.preprocess.pipeline import preprocess
from megatron_ledom.data.preprocess.task import PreprocessSettings
from tests.support.forked import run_forked
from tests.support.paths import ROOT

PREPROCESS_DATA = str(ROOT / "tools/preprocess_data.py")
SLURM_FREE = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}


def run_tool(monkeypatch: pytest.MonkeyPatch, tool: str, *arguments: object) -> int:
    """Run a tool in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", [f"{tool}.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools" / f"{tool}.py"), run_name="__main__")
    return int(ended.value.code or 0)


def preprocess_by_command(
    folder: Path, tokenizer: str, *arguments: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the preprocessing command in `folder`, which has the input; the output is folder/out/data by default."""
    command = [PREPROCESS_DATA, "--tokenizer", tokenizer, "--output-prefix", "out/data", "--workers", "2"]
    return run_forked([*command, *arguments], folder=folder, environment={**SLURM_FREE, **(env or {})})


def preprocessed(folder: Path, tokenizer: str, name: str, **changes: object) -> Path:
    """Make a shard in this process, by default from folder/*.jsonl, and return its prefix."""
    prefix = folder / name
    settings = {"input": [str(folder / "*.jsonl")], "tokenizer": tokenizer, "output_prefix": str(prefix), "workers": 1}
    preprocess(PreprocessSettings(**{**settings, **changes}))  # type: ignore[arg-type]
    return prefix


def train_by_command(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the tokenizer training command in `folder`."""
    return run_forked([ROOT / "tools/train_tokenizer.py", *arguments], folder=folder)
