"""Every command that writes holds a lock on its output, or is listed with why it needs none; two processes never share one."""

import json
import os
import runpy
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ledom.config.load import load_config, save_config
from megatron_ledom.data.shards.shard import check_shard
from megatron_ledom.errors import UsageError
from megatron_ledom.storage.files import json_text, write_file
from megatron_ledom.storage.locks import LOCK_SUFFIX, output_file_lock, output_folder_lock
from tests.evaluation_sets import write_sets
from tests.legible import file_bytes, legible_ids, legible_shard
from tests.tiny_models import random_model_folder

ROOT = Path(__file__).parents[3]
SHARD = [legible_ids(document, 4) for document in range(5)]
Arguments = Callable[[Path, dict[str, str]], list[str]]

FILES: dict[str, tuple[str, Arguments]] = {
    "merge_shards": ("out", lambda at, made: ["--input", made["shard"], "--output-prefix", f"{at}/out"]),
    "reverse_shards": ("out", lambda at, made: ["--input", made["shard"], "--output-prefix", f"{at}/out"]),
    "prepare_pairs": (
        "out",
        lambda at, made: [
            *("--input", made["pairs"], "--output-prefix", f"{at}/out", "--tokenizer", made["reverse"], "--seq-length", "64"),
            *("--prompt-template", "{question}", "--answer-template", "{answer}"),
        ],
    ),
    "rerank": (
        "out.jsonl",
        lambda at, made: [
            *("--forward", made["forward"], "--reverse", made["reverse"], "--input", made["candidates"]),
            *("--output", f"{at}/out.jsonl"),
        ],
    ),
    "train_tokenizer": ("out", lambda at, made: ["--input", made["text"], "--vocab-size", "300", "--output", f"{at}/out"]),
    "summarize_tasks": ("out", lambda at, made: [made["shard"], "--num-tasks", "1", "--json", f"{at}/out"]),
    "inspect_shard": ("out.png", lambda at, made: [made["shard"], "--histogram", f"{at}/out.png"]),
}
"""Tool -> the output whose lock it takes, and a command line; `made` are inputs."""
FOLDERS: dict[str, Arguments] = {
    "evaluate": lambda at, made: [
        *("--model", made["forward"], "--data", made["sets"], "--tasks", "piqa", "--output", str(at)),
    ],
    "compare_losses": lambda at, made: [
        *(made["forward"], made["reverse"], "--data", made["text"], "--output", str(at)),
    ],
    "make_analysis_data": lambda at, made: ["--task", "reversal", "--num", "64", "--out", str(at)],
    "report_rerank": lambda at, made: [made["ranked"], "--gold-key", "gold", "--output", str(at)],
    "report_run": lambda at, made: [made["run"], "--output", str(at)],
    "plan_run": lambda at, made: [
        *("--config", str(ROOT / "examples/configs/ledom_2b.yaml"), "--hardware", "h100-sxm", "--output", str(at)),
    ],
}
OTHER_LOCKS = {
    "preprocess_data": "holds the lock of PREFIX.work, see test_preprocess_resume.py",
    "convert_checkpoint": "holds the lock of the folder that it makes, see test_conversion_faults.py",
    "calibrate_hardware": "writes one file under the lock, after minutes of measuring",
    "validate_planner": "writes between marks of a document under its lock, after minutes of fitting",
}
WRITES_NOTHING = {"generate", "inspect_checkpoint", "plan_blend", "replay_step"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Small inputs of every command."""
    root = tmp_path_factory.mktemp("inputs")
    lines = {
        "pairs": [{"question": f"What is {n}?", "answer": f" It is {n}."} for n in range(40)],
        "candidates": [{"prompt": f"The capital of {n}", "candidates": [" Paris", " 42"]} for n in range(4)],
        "text": [{"text": f"The cat sat on {n} mats, and the dog ran after the cat number {n}."} for n in range(200)],
        "ranked": [
            {
                "prompt": "p",
                "candidates": ["1", "2"],
                "gold": "1",
                "ranking": [0, 1],
                "best": "1",
                "scores": [
                    {
                        "forward_logprob": -1.0,
                        "reverse_logprob": -1.0,
                        "forward_tokens": 1,
                        "reverse_tokens": 1,
                        "reward": -1.0,
                    },
                    {
                        "forward_logprob": -2.0,
                        "reverse_logprob": -2.0,
                        "forward_tokens": 1,
                        "reverse_tokens": 1,
                        "reward": -2.0,
                    },
                ],
            }
        ]
        * 6,
    }
    found = {}
    for name, rows in lines.items():
        path = root / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        found[name] = str(path)
    for direction in ("forward", "reverse"):
        found[direction] = str(random_model_folder(root / direction, "byte_level", direction))
    run = root / "run"
    run.mkdir()
    config = load_config(str(ROOT / "examples/configs/quickstart_reverse.yaml"), [f"run_dir={run}"])
    save_config(config, str(run / "config.yaml"))
    record = {
        "iteration": 1,
        "lm_loss": 2.0,
        "grad_norm": 1.0,
        "lr": 0.1,
        "tokens_per_second": 9.0,
        "consumed_train_tokens": 64,
    }
    (run / "metrics.jsonl").write_text(json.dumps({**record, "mfu": 0.1, "elapsed_seconds": 1.0}) + "\n", encoding="utf-8")
    return {
        **found,
        "run": str(run),
        "shard": legible_shard(root / "x-00000-of-00001", SHARD),
        "sets": str(write_sets(root / "sets")),
    }


def run_here(monkeypatch: pytest.MonkeyPatch, tool: str, *arguments: str) -> int:
    """The tool in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", [f"{tool}.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools" / f"{tool}.py"), run_name="__main__")
    return int(ended.value.code or 0)


def test_every_tool_is_listed() -> None:
    tools = {path.stem for path in (ROOT / "tools").glob("*.py")}
    assert {*FILES, *FOLDERS, *OTHER_LOCKS, *WRITES_NOTHING} == tools


@pytest.mark.parametrize("tool", sorted(FILES))
def test_a_command_that_writes_a_file_refuses_one_that_another_process_writes(
    tool: str, made: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, arguments = FILES[tool]
    command = arguments(tmp_path, made)
    if tool == "summarize_tasks":
        command[0] = made["shard"].removesuffix("-00000-of-00001")
    with output_file_lock(tmp_path / name):
        assert run_here(monkeypatch, tool, *command) == 2
        assert [path.name for path in tmp_path.iterdir()] == [name + LOCK_SUFFIX]
    assert f"is being written by process {os.getpid()}" in capsys.readouterr().err
    assert run_here(monkeypatch, tool, *command) == 0, capsys.readouterr().err
    assert not list(tmp_path.glob(f"*{LOCK_SUFFIX}"))


@pytest.mark.parametrize("tool", sorted(FOLDERS))
def test_a_command_that_writes_a_folder_refuses_one_that_another_process_writes(
    tool: str, made: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = FOLDERS[tool](tmp_path, made)
    with output_folder_lock(tmp_path):
        assert run_here(monkeypatch, tool, *command) == 2
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_SUFFIX]
    assert f"is being written by process {os.getpid()}" in capsys.readouterr().err


def both(command: list[str]) -> tuple[set[int], str]:
    """Exit codes and messages of a command that two processes are given at once."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    told = [process.communicate(timeout=200)[1] for process in started]
    return {process.returncode for process in started}, "\n".join(told)


def test_evaluate_started_twice_at_once_judges_each_item_once(made: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/evaluate.py"), *FOLDERS["evaluate"](tmp_path / "twice", made)]
    codes, told = both(command)
    assert codes in ({0, 2}, {0}), told  # the second is refused, or comes when the first has finished
    lines = (tmp_path / "twice/piqa.items.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["item"] for line in lines] == [0, 1]


def test_merge_started_twice_at_once_leaves_one_whole_shard(tmp_path: Path) -> None:
    parts = [
        legible_shard(tmp_path / f"x-{n}", [legible_ids(document % 9, 40) for document in range(n, n + 5)])
        for n in range(0, 100, 5)
    ]
    command = [sys.executable, str(ROOT / "tools/merge_shards.py"), "--input", *parts, "--output-prefix", str(tmp_path / "all")]
    codes, told = both(command)
    assert codes == {0, 2}, told  # the second is refused, by the lock or by what is there
    check_shard(str(tmp_path / "all"))
    assert file_bytes(str(tmp_path / "all")) == file_bytes(
        legible_shard(tmp_path / "once", [legible_ids(document % 9, 40) for document in range(100)])
    )


def test_the_lock_of_a_killed_process_is_free_and_one_file_has_one_lock_by_any_name(tmp_path: Path) -> None:
    output, link = tmp_path / "out.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(output)
    holding = textwrap.dedent(f"""
        import time
        from megatron_ledom.storage.locks import output_file_lock
        with output_file_lock({str(output)!r}):
            print("held", flush=True)
            time.sleep(60)
    """)
    with subprocess.Popen([sys.executable, "-c", holding], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(UsageError, match=f"link.jsonl is being written by process {holder.pid} on "),
            output_file_lock(link),
        ):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert (tmp_path / f"out.jsonl{LOCK_SUFFIX}").exists()
    with output_file_lock(output):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.jsonl"]


def test_a_file_that_cannot_be_written_is_named_and_the_old_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_file(path, "old")
    (tmp_path / "summary.json.part").mkdir()
    with pytest.raises(ValueError, match=r"summary\.json cannot be written"):
        write_file(path, "new")
    assert path.read_text(encoding="utf-8") == "old"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_json_with_nan_or_infinity_is_refused_with_its_key(value: float) -> None:
    with pytest.raises(ValueError, match=r"out\.jsonl: scores\[1\]\.reward is not a finite number"):
        json_text({"scores": [{"reward": -1.0}, {"reward": value}]}, where="out.jsonl")
