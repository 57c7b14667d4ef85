"""The README: its commands exist with the flags it shows, each is run by the quickstart or by a test, its files exist."""

import os
import re
import shlex
from functools import cache

import pytest

from tests.support.forked import run_forked
from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
RUN_BY_QUICKSTART = "<!-- run by the quickstart -->"
"""Stands above blocks that tests/quickstart compares with what the quickstart ran."""
RUN_BY_TESTS = {
    "make quickstart": "Makefile: the quickstart itself",
    "make study SIZE=small": "tests/study/test_study.py, its tiny size",
    "make test": "Makefile: what runs this test",
    "pip install .": "tests/packaging/test_wheel.py",
    "ledom --help": "tests/unit/cli/test_ledom.py",
    "eval $(ledom completion bash)": "tests/unit/cli/test_ledom.py",
    "python -m megatron_ledom.pretrain --config examples/configs/ledom_7b.yaml --dry-run": "here",
    "python -m megatron_ledom.ops": "tests/unit/ops/test_ops.py",
    "python tools/inspect_shard.py quickstart/shards/reverse/valid --show 2": "tests/quickstart/test_quickstart.py",
    "bash examples/slurm/preprocess.sbatch": "tests/unit/examples/test_slurm_scripts.py, tests/slurm/test_slurm_jobs.py",
    "python tools/inspect_checkpoint.py runs/reverse --verify": "tests/unit/checkpoint/test_inspect_checkpoint.py",
    "python tools/summarize_tasks.py data/dclm_01": "tests/slurm/test_slurm_jobs.py",
    "python tools/inspect_shard.py data/dclm_01-*-of-00064 --verify": "tests/unit/data/shards/test_inspect_shard.py",
    "python tools/plan_blend.py --input data/dclm_01-*-of-00064 --tokens 234e9 --seq-length 8192 --global-batch-size 1024": (
        "tests/unit/data/blends/test_plan_blend.py"
    ),
    "bash examples/slurm/pretrain.sbatch": "tests/slurm/test_slurm_training.py",
    "python tools/convert_checkpoint.py hf-to-mcore --load models/qwen3 --save runs/qwen3_reverse --direction reverse"
    " --seq-length 4096": "tests/numerics/test_export.py, tests/numerics/test_conversion.py",
    "python tools/preprocess_data.py --input corpus/*.jsonl --tokenizer runs/qwen3_reverse/tokenizer --output-prefix"
    " data/qwen3_reverse": "tests/unit/data/preprocess/test_preprocess.py",
    "torchrun --nproc-per-node 8 -m megatron_ledom.pretrain --config runs/qwen3_reverse/model.yaml"
    " data.train_blend=[[1.0,data/qwen3_reverse]] train.train_iters=1000 train.global_batch_size=64"
    " optimizer.lr_warmup_iters=50 parallel.tensor_model_parallel_size=8": "tests/distributed/test_train_imported.py, on forked ranks",
    "python tools/prepare_pairs.py --input pairs.jsonl --tokenizer runs/scorer/tokenizer --output-prefix data/pairs --seq-length 1024"
    r" --prompt-template Question: {question}\nAnswer:  --answer-template {answer} --too-long skip": (
        "tests/unit/finetune/test_prepare_pairs.py"
    ),
    "bash examples/slurm/convert.sbatch": "tests/slurm/test_slurm_jobs.py",
    "bash examples/slurm/evaluate.sbatch": "tests/slurm/test_slurm_jobs.py",
    "bash examples/slurm/evaluate_tasks.sbatch": "tests/slurm/test_slurm_jobs.py",
    "torchrun --nproc-per-node 8 tools/replay_step.py --run runs/ledom_7b --iteration 1234": (
        "tests/distributed/test_anomalies.py, on forked ranks"
    ),
    "python tools/plan_run.py --config examples/configs/ledom_7b.yaml --hardware h100-sxm --num-gpus 64 --search --save-config"
    " chosen.yaml --output plan": "tests/unit/planning/test_planner_search.py",
    "python tools/validate_planner.py": "tests/unit/planning/test_planner_step_time.py",
    "python tools/calibrate_hardware.py --hardware h100-sxm --output own.yaml": "tests/unit/planning/test_calibration.py, for a CPU",
    "python tools/report_run.py runs/ledom_7b --plan a100-80": "tests/unit/reports/test_run_report.py",
    "python tools/report_run.py quickstart/runs/reverse quickstart/runs/forward --output report --smooth 5": (
        "tests/unit/reports/test_run_report.py"
    ),
    "python tools/report_rerank.py answers.jsonl answers_seed1.jsonl --output report --gold-key answer": (
        "tests/unit/evaluation/test_selection.py"
    ),
    "python tools/report_rerank.py answers.jsonl --output report --explain 3 --reverse quickstart/models/reverse": (
        "tests/unit/evaluation/test_selection.py"
    ),
    "python tools/make_analysis_data.py --task reversal --output made/reversal --num 64 --seed 0": "tests/unit/evaluation/test_synthetic_sets.py",
    "python tools/evaluate.py --model models/reverse --tasks reversal,reversal_written --data made/reversal --output evaluated": (
        "tests/unit/evaluation/test_synthetic_sets.py, tests/quickstart/test_reversal_curse.py"
    ),
    "python tools/compare_losses.py models/forward models/reverse --data held_out.jsonl --domain-key source --output compared": (
        "tests/unit/evaluation/test_loss_difference.py"
    ),
    "python tools/evaluate.py --list --data evaluation_sets": "tests/unit/evaluation/test_evaluate_tool.py",
    "python tools/evaluate.py --model quickstart/models/reverse --tasks gsm8k,svamp --data evaluation_sets --num-fewshot 4"
    " --show 2": "tests/unit/evaluation/test_evaluate_tool.py",
    "python tools/evaluate.py --model quickstart/models/reverse --tasks gsm8k,hellaswag --data evaluation_sets --limit 200"
    " --num-fewshot 4 --output evaluated": "tests/unit/evaluation/test_evaluate_tool.py",
    "python -m megatron_ledom.evaluation.harness --model_args pretrained=quickstart/models/reverse,way=joint --tasks my_choices"
    " --include_path my_tasks --batch_size 16": "tests/unit/evaluation/test_harness.py",
}


def commands(above: str | None = None) -> list[str]:
    """Every command of the README's bash blocks; with `above`, those of blocks below that line only."""
    start = rf"{re.escape(above)}\n" if above else ""
    blocks = re.findall(rf"{start}```bash\n(.*?)```", README, re.DOTALL)
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def without_variables(command: str) -> str:
    """The command without the NAME=VALUE words before it."""
    words = shlex.split(command)
    while re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    return " ".join(words)


@cache
def help_of(*words: str) -> str:
    done = run_forked([*words, "--help"])
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", [line for line in commands() if line.startswith("python ")])
def test_script_exists_and_knows_the_flags(command: str) -> None:
    words = shlex.split(command)[1:]
    script = words[:2] if words[0] == "-m" else words[:1]
    if words[0] != "-m":
        assert (ROOT / words[0]).is_file()
    script += [word for word in words[len(script) :] if word in ("mcore-to-hf", "hf-to-mcore")]
    known = help_of(*script)
    for flag in (word for word in words if word.startswith("--")):
        assert re.search(rf"{flag}\b", known), f"{script} does not know {flag}"


def test_every_command_is_run_by_the_quickstart_or_a_test() -> None:
    left = {without_variables(line) for line in commands()} - {without_variables(c) for c in commands(RUN_BY_QUICKSTART)}
    assert left == set(RUN_BY_TESTS)


def test_each_test_that_is_named_exists() -> None:
    named = {path for text in RUN_BY_TESTS.values() for path in re.findall(r"tests/[\w./]+", text)}
    assert len(named) > 20
    assert not sorted(path for path in named if not (ROOT / path).is_file())


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in (line for line in RUN_BY_TESTS if line.startswith("make ")):
        assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE)


def test_dry_run_of_the_7b_prints_the_numbers_of_the_readme() -> None:
    command = next(line for line in commands() if line.endswith("--dry-run"))
    done = run_forked(shlex.split(command)[1:])
    assert done.returncode == 0, done.stderr
    for number in ("7.794 B", "435.37 B", "51,900", "32 an iteration"):
        assert number in done.stdout


def test_variables_of_the_slurm_commands_are_read_by_the_scripts() -> None:
    for command in (line for line in commands() if "sbatch" in line):
        words = shlex.split(command)
        text = (ROOT / words[-1]).read_text()
        for name in (word.partition("=")[0] for word in words if re.match(r"[A-Z_]+=", word)):
            assert f"${{{name}:-" in text


def test_every_path_the_readme_names_exists() -> None:
    named = set(re.findall(r"`((?:megatron_ledom|tools|examples|tests)/[\w./]*)`", README))
    inside = {f"megatron_ledom/{path}" for path in re.findall(r"`((?:\w+/)?\w+\.py)`", README)}
    inside = {path for path in inside if path.removeprefix("megatron_ledom/") not in named}
    missing = sorted(path for path in named | inside if not os.path.exists(ROOT / path))
    assert not missing


def test_python_example_uses_what_the_package_exports() -> None:
    example = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(example) == 1
    compile(example[0], "README.md", "exec")
    from megatron_ledom.inference import ReverseLM

    for name in re.findall(r"model\.(\w+)\(", example[0]):
        assert hasattr(ReverseLM, name)
