"""`ledom`: every tool by its name, late imports, explained mistakes, and completion in a real bash."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from megatron_ledom.cli.completion import FILES, FOLDERS, actions, whole_parser
from megatron_ledom.cli.main import COMMANDS, EXAMPLE, GROUPS, load, run
from megatron_ledom.errors import UsageError
from tests.support.paths import ROOT

TOOLS = sorted(file.stem for file in (ROOT / "tools").glob("*.py"))
WITHOUT_SCRIPT = {
    "train": "python -m megatron_ledom.pretrain",
    "ops": "python -m megatron_ledom.ops",
    "harness": "python -m megatron_ledom.evaluation.harness",
    "configs": "new with the command",
    "completion": "new with the command",
}
ANSWERED_BY_LM_EVAL = "harness"
LEDOM = [sys.executable, "-c", "from megatron_ledom.cli.main import main; main()"]
HEAVY = ("torch", "megatron", "transformers", "pyarrow", "tensorboard", "matplotlib", "sentencepiece", "tokenizers")
REPORT = """
import json, resource, sys
from megatron_ledom.cli.main import run
code, loaded = None, {}
for command in json.loads(sys.argv[1]):
    try:
        code = run([*command, "--help"])
    except SystemExit as stop:
        code = stop.code
    used = resource.getrusage(resource.RUSAGE_SELF)
    loaded = {"code": code, "modules": sorted(sys.modules), "seconds": used.ru_utime + used.ru_stime}
    print(json.dumps(loaded), file=sys.stderr)
"""
NO_PATHS = {
    None,
    "BUDGET",
    "D",
    "F",
    "I",
    "ID",
    "K",
    "KEY",
    "LINE",
    "M:F",
    "N",
    "NAME",
    "NAME,NAME",
    "OPTION",
    "RANKS",
    "SIZE",
    "T",
}
NO_PATHS |= {"ADDRESS", "HOST[:PORT]", "OPTIONS", "SECONDS", "SOURCE"}
NO_PATHS |= {"TEXT", "TOKEN", "TOKENS", "URL", "W", "section.key=value", "KEY=VALUE", "SOURCE=FILE", "HARDWARE"}


def ledom(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*LEDOM, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def helped(*commands: list[str]) -> list[dict[str, object]]:
    """Return exit code, loaded modules and seconds after the help of each command, all in one process."""
    started = [sys.executable, "-c", REPORT, json.dumps(commands)]
    done = subprocess.run(started, cwd=ROOT, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_commands_are_the_tools_by_name() -> None:
    assert {name.replace("_", "-") for name in TOOLS} == set(COMMANDS) - set(WITHOUT_SCRIPT)


def test_help_names_every_command_and_is_instant() -> None:
    [report] = helped([])
    ours = {name for name in report["modules"] if name.startswith("megatron_ledom")}  # type: ignore[attr-defined]
    assert ours == {"megatron_ledom", *(f"megatron_ledom.{name}" for name in ("cli", "cli.main", "errors", "lazy"))}
    assert not {"numpy", "pydantic", "yaml", "importlib.metadata", *HEAVY} & set(report["modules"])  # type: ignore[call-overload]
    assert report["seconds"] < 0.2  # type: ignore[operator]  # CPU seconds; 0.04 on two slow cores
    page = ledom("--help").stdout
    for name, text in (item for group in GROUPS.values() for item in group.items()):
        assert re.search(rf"^  {name} +{re.escape(text)}$", page, re.MULTILINE)


def test_no_command_imports_anything_heavy_for_its_help() -> None:
    commands = [[name] for name in COMMANDS if name != ANSWERED_BY_LM_EVAL]
    for command, report in zip(commands, helped(*commands), strict=True):
        assert report["code"] == 0
        assert not [name for name in HEAVY if name in report["modules"]], command  # type: ignore[operator]


@pytest.mark.parametrize("command", COMMANDS)
def test_usage_names_the_command_as_it_was_started(command: str) -> None:
    for prog in (f"ledom {command}", f"tools/{command.replace('-', '_')}.py"):
        assert load(command).build_parser(prog).format_usage().startswith(f"usage: {prog} ")


def test_usage_of_a_script() -> None:
    done = subprocess.run([sys.executable, "tools/rerank.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: tools/rerank.py ")


def test_version() -> None:
    assert ledom("--version").stdout == f"ledom {tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['version']}\n"


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("preproces-data", "did you mean preprocess-data?"),
        ("preprocess_data", "did you mean preprocess-data?"),
        ("rerankk", "did you mean rerank?"),
        ("xyz", "expected one of train-tokenizer, preprocess-data, "),
    ],
)
def test_a_wrong_command_is_explained(given: str, hint: str) -> None:
    with pytest.raises(UsageError, match=f"{given} is not a command of ledom; {re.escape(hint)}") as raised:
        run([given])
    assert raised.value.exit_code == 2


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    assert "from text to shards:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["configs", "list"], 0),
        (["plan-run", "--config", "ledom_7b", "--hardware", "a100-40", "--num-gpus", "2"], 1),
        (["configs", "show", "x"], 2),
        (["train"], 2),
    ],
)
def test_exit_code_is_that_of_the_command(arguments: list[str], code: int) -> None:
    assert ledom(*arguments).returncode == code


def test_every_path_has_a_metavar_that_completes() -> None:
    found = {action.metavar for action in actions(whole_parser()) if not isinstance(action, argparse._SubParsersAction)}
    assert found <= FILES | FOLDERS | NO_PATHS
    assert found >= FILES | FOLDERS


COMPLETE = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
words=($(complete -p ledom)); $(printf '%s\\n' "${words[@]}" | grep -A1 -x -- -F | tail -1)
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "ledom"
    path.write_text(ledom("completion", "bash").stdout)
    return path


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ledom", "pre"], {"preprocess-data", "prepare-pairs"}),
        (["ledom", "convert-checkpoint", ""], {"mcore-to-hf", "hf-to-mcore"}),
        (["ledom", "preprocess-data", "--dir"], {"--direction"}),
        (["ledom", "preprocess-data", "--direction", ""], {"reverse", "forward"}),
        (["ledom", "preprocess-data", "--input", "cor"], {"corpus.jsonl", "corpora"}),
        (["ledom", "train", "--config", "cor"], {"corpus.jsonl", "corpora"}),
        (["ledom", "generate", "--model", "cor"], {"corpora"}),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_bash_completes(script: Path, tmp_path: Path, words: list[str], expected: set[str]) -> None:
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpus.jsonl").touch()
    command = ["bash", "--norc", "-c", COMPLETE, "bash", str(script), *words]
    done = subprocess.run(command, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected, done.stderr


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_get_a_script(shell: str) -> None:
    assert "preprocess-data" in ledom("completion", shell).stdout


def test_the_recipe_of_the_help_leads_to_a_run_that_would_start(tmp_path: Path) -> None:
    """A shell runs its first four commands as printed, with `--check` instead of minutes of training."""
    texts = [json.dumps({"text": path.read_text("utf-8")}) for path in sorted(Path(json.__file__).parents[1].glob("*.py"))[:80]]
    (tmp_path / "corpus.jsonl").write_text("\n".join(texts) + "\n")
    commands = EXAMPLE.split("\n\n")[1].replace("\\\n", "").strip().split("\n")[:4]
    assert [command.split()[1] for command in commands] == ["train-tokenizer", "preprocess-data", "configs", "train"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = " && ".join(commands) + " --check 1"
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "would start from iteration 0" in done.stdout
