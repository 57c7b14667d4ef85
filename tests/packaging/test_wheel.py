"""The installed wheel, outside the checkout: `ledom` alone goes from text to an evaluated model.

pip installs the wheel in a new environment. A path file adds its dependencies from the environment that runs the tests, because
torch and megatron-core take minutes to install. These tests therefore do not check the versions that pip would choose;
tests/unit/test_repository.py checks that pyproject.toml names all dependencies.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.evaluation_sets import write_sets
from tests.support.paths import ROOT
from tests.support.tiny_models import random_model_folder

pytestmark = pytest.mark.timeout(1200)  # C++ is compiled and each command imports torch
NOT_COPIED = shutil.ignore_patterns(".*", "build", "dist", "tests", "__pycache__", "*.so", "*.egg-info")
RESULTS = {"quickstart", "study"}  # folders at the top of a checkout
WITHOUT = {"PYTHONPATH", "CXX", "CC", "LEDOM_CUDA", "LEDOM_EXTENSIONS"}
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in WITHOUT} | {"LEDOM_CUDA": "0"}
TEXTS = [f"Line {number} says: the cat number {number * 7} sat on mat {number % 5}." for number in range(400)]
TINY = [
    *["model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=64", "model.num_attention_heads=4"],
    *["model.params_dtype=fp32", "data.valid_blend=[]", "train.train_iters=3", "train.num_threads=1"],
    *["model.vocab_size=305", "optimizer.lr_warmup_iters=1"],
]

QUIET = ("train-tokenizer", "preprocess-data", "train", "convert-checkpoint", "generate")
"""Commands of the quickstart: they show no warning of a library."""
EACH = """
import json, sys
from megatron_ledom.cli.main import run
for command in json.loads(sys.argv[1]):
    assert not run(command), command
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, so that nothing is built inside the checkout."""

    def ignored(folder: str, names: list[str]) -> set[str]:
        return NOT_COPIED(folder, names) | (RESULTS if Path(folder) == ROOT else set())

    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("sources") / "megatron_ledom", ignore=ignored))


def build(sources: Path, target: Path, *options: str, **variables: str) -> str:
    """Build without the network and return the output."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), *options, str(sources)]
    done = subprocess.run(command, env=ENVIRONMENT | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


@dataclass(frozen=True)
class Installed:
    """An environment with only the wheel and its dependencies; commands run in `folder`."""

    environment: Path
    folder: Path

    def ledom(self, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run `ledom`, and check its exit code."""
        command = [str(self.environment / "bin/ledom"), *map(str, arguments)]
        done = subprocess.run(command, cwd=self.folder, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        if arguments[0] in QUIET:
            assert [line for line in (done.stdout + done.stderr).splitlines() if re.search("Warning|FSDP", line)] == []
        return done

    def each(self, *commands: list[object]) -> str:
        """Run commands of `ledom` in one process, check that all succeed, and return their output."""
        words = json.dumps([list(map(str, command)) for command in commands])
        program = [str(self.environment / "bin/python"), "-c", EACH, words]
        done = subprocess.run(program, cwd=self.folder, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def install(wheel: Path, folder: Path) -> Installed:
    """Install the wheel in a new environment; add dependencies afterwards, or pip would find the package installed."""
    venv.create(folder / "environment", with_pip=False)
    python = str(folder / "environment/bin/python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, cwd=folder, env=ENVIRONMENT, check=True)
    site = next((folder / "environment/lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")) + "\n")
    (folder / "elsewhere").mkdir()
    return Installed(folder / "environment", folder / "elsewhere")


@pytest.fixture(scope="module")
def built(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the source distribution and the wheel that is built from it, without the minute that the compiler optimizes for."""
    target = tmp_path_factory.mktemp("dist")
    (compiler := target / "c++").write_text('#!/bin/sh\nexec c++ "$@" -O0\n')
    compiler.chmod(0o755)
    build(sources, target / "dist", LEDOM_EXTENSIONS="1", CXX=str(compiler), CC=str(compiler))
    return target / "dist"


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return install(next(built.glob("*.whl")), tmp_path_factory.mktemp("installed"))


def test_source_distribution_contains_the_sources_of_the_wheel(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    here = [
        path.relative_to(ROOT).as_posix()
        for top in ("csrc", "docs", "examples/configs", "tools")
        for path in (ROOT / top).rglob("*.*")
    ]
    assert names >= {
        "LICENSE",
        "README.md",
        "setup.py",
        "constraints/python3.11.txt",
        "docs/images/loss_curves.png",
        *(name for name in here if "__pycache__" not in name),
    }


def test_wheel_contains_the_package_and_its_data(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert "Project-URL: Paper, https://arxiv.org/abs/2507.01335" in metadata.splitlines()
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "megatron_ledom").rglob("*.py")}
    data = {f"megatron_ledom/configs/{path.name}" for path in (ROOT / "examples/configs").glob("*.yaml")}
    data |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "megatron_ledom").rglob("*.yaml")}
    data |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "megatron_ledom/serving/page").iterdir()}
    assert names >= sources | data | {"megatron_ledom/py.typed"}
    assert {name.partition("/")[0] for name in names} == {
        "megatron_ledom",
        next(n for n in names if ".dist-info/" in n).partition("/")[0],
    }
    assert re.search(r"^License-Expression: Apache-2.0$", metadata, re.MULTILINE)


def test_ledom_alone_goes_from_text_to_an_evaluated_model(installed: Installed) -> None:
    ledom = installed.ledom
    (installed.folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert "ledom_7b" in ledom("configs", "list").stdout
    assert "ffn_hidden_size: 24576" in ledom("configs", "show", "ledom_7b").stdout
    ledom("train-tokenizer", "--input", "corpus.jsonl", "--vocab-size", 300, "--output", "tokenizer")
    names = ["--input", "corpus.jsonl", "--tokenizer", "tokenizer", "--output-prefix", "shards/train"]
    ledom("preprocess-data", *names, "--workers", 1)
    assert "reverse" in ledom("inspect-shard", "shards/train", "--verify").stdout
    data = ["data.tokenizer=tokenizer", "data.train_blend=[[1.0, shards/train]]", "run_dir=run"]
    assert "memory" in ledom("plan-run", "--config", "quickstart_reverse", "--hardware", "cpu", "--num-gpus", 1, *TINY).stdout
    ledom("train", "--config", "quickstart_reverse", *TINY, *data)
    assert "3" in ledom("inspect-checkpoint", "run").stdout
    ledom("convert-checkpoint", "mcore-to-hf", "--load", "run", "--save", "model")
    written = ledom("generate", "--model", "model", "--following", " sat on mat 3.", "--max-new-tokens", 4).stdout
    assert written.endswith(" sat on mat 3.\n")
    ledom("make-analysis-data", "--task", "reversal", "--output", "made", "--num", 64)
    ledom("evaluate", "--model", "model", "--tasks", "reversal", "--data", "made", "--limit", 2, "--output", "evaluated")
    assert (installed.folder / "evaluated/summary.json").is_file()


@pytest.fixture(scope="module")
def without_a_compiler(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel of a machine without a compiler, installed, with a model, questions and a shard of pairs."""
    target = tmp_path_factory.mktemp("without_a_compiler")
    printed = build(sources, target, "--wheel", CXX="/nowhere/c++", CC="/nowhere/cc")
    assert "not built, so preprocessing and reversing shards do not work: the C++ compiler /nowhere/c++ is not found" in printed
    wheel = next(target.glob("*.whl"))
    assert wheel.name.endswith("-py3-none-any.whl")
    installed = install(wheel, target)
    random_model_folder(installed.folder / "model", "byte_level", "reverse")
    write_sets(installed.folder / "sets")
    pairs = [{"question": f"What is {number}?", "answer": f"It is {number * 7}."} for number in range(100)]
    (installed.folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    names = ["--input", "pairs.jsonl", "--tokenizer", "model", "--eod-token", "<EOD>", "--output-prefix", "pairs"]
    installed.ledom("prepare-pairs", *names, "--seq-length", 64)
    return installed


def test_without_a_compiler_models_are_used(without_a_compiler: Installed) -> None:
    sizes = ["--limit", 1, "--max-new-tokens", 2]
    printed = without_a_compiler.each(
        ["evaluate", "--model", "model", "--tasks", "svamp,boolq", "--data", "sets", *sizes, "--output", "evaluated"],
        ["generate", "--model", "model", "--following", "The end.", "--max-new-tokens", 2],
    )
    assert printed.endswith("The end.\n")


def test_without_a_compiler_stored_shards_are_read_and_trained_on(without_a_compiler: Installed) -> None:
    ledom = without_a_compiler.ledom
    assert "verified" in ledom("inspect-shard", "pairs", "--verify").stdout
    assert "usage: ledom convert-checkpoint" in ledom("convert-checkpoint", "--help").stdout
    data = ["data.tokenizer=model", "data.train_blend=[[1.0, pairs]]", "data.seq_length=64", "data.reset_attention_mask=true"]
    train = [
        "train",
        "--config",
        "quickstart_reverse",
        *TINY,
        *data,
        "model.vocab_size=400",
        "train.global_batch_size=4",
        "run_dir=run",
    ]
    convert = ["convert-checkpoint", "mcore-to-hf", "--load", "run", "--save", "exported"]
    assert "pairs" in without_a_compiler.each([*train, "--dry-run"], train, convert)
    assert (without_a_compiler.folder / "exported/config.json").is_file()


def test_without_a_compiler_preprocessing_and_reversing_shards_are_refused(without_a_compiler: Installed) -> None:
    preprocess = ["preprocess-data", "--input", "x.jsonl", "--tokenizer", "model", "--output-prefix", "shard"]
    for command in (preprocess, ["reverse-shards", "--input", "pairs", "--output-prefix", "shard"]):
        refused = without_a_compiler.ledom(*command, code=2).stderr
        assert "megatron_ledom was installed without its C++ helpers" in refused
        assert "LEDOM_EXTENSIONS=1 pip install" in refused
