"""Start a command by its name: `ledom COMMAND`, or `tools/COMMAND.py` in a checkout.

It imports only the module of that command, so that `--help` is fast.
"""

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from megatron_ledom.errors import UsageError, run_command

GROUPS = {
    "from text to shards": {
        "train-tokenizer": "train a SentencePiece BPE tokenizer",
        "preprocess-data": "write a shard of reversed (or forward) token ids from raw text",
        "corpus": "plan, fetch, build, blend, document and publish a corpus from one recipe",
        "decontaminate": "find the items of evaluation sets in text, report them, drop or cut them",
        "summarize-tasks": "print the totals of a preprocessing array and list the tasks to run again",
        "inspect-shard": "show and verify shards",
        "merge-shards": "join shards of one direction and tokenizer",
        "reverse-shards": "convert shards to the other direction without the corpus",
        "prepare-pairs": "pack prompts and answers into a shard to fine-tune a scorer",
        "plan-blend": "compute the weights, tokens and epochs of the sources of a blend",
    },
    "planning a run": {
        "configs": "list and show the configs of the package",
        "plan-run": "predict memory, time and cost of a run; search for the best layout",
        "calibrate-hardware": "measure this machine for the planner",
        "validate-planner": "compare the planner with published runs",
        "check-hardware": "check a machine in minutes and write a report",
        "check-nodes": "check the nodes of a SLURM job in seconds and name the bad ones",
        "ops": "show which fused operators are built, and which are used on this machine",
    },
    "training": {
        "train": "train a model from shards; torchrun or srun starts one process per GPU",
        "inspect-checkpoint": "show and verify a checkpoint",
        "average-checkpoints": "average the weights of checkpoints into a new run folder",
        "replay-step": "compute one step of a run again, bit for bit",
        "status": "show the state, progress and problems of runs, in the terminal or as a web page",
        "alert": "send a message when a run stops, fails, stalls, or has little disk space",
        "report-run": "plot the curves of runs, with an HTML page of their final metrics",
    },
    "using a model": {
        "convert-checkpoint": "convert a checkpoint to a Hugging Face folder, or back",
        "generate": "write the text that precedes a given text",
        "infill": "write the text between a prefix and a suffix",
        "rerank": "rank answers by Reverse Reward",
        "serve": "serve a reverse model and Reverse Reward over HTTP",
        "report-rerank": "compare Reverse Reward with its baselines",
        "export-preferences": "write pairs of a better and a worse answer for DPO from ranked answers",
    },
    "evaluating models": {
        "evaluate": "evaluate a model of either direction on tasks from local files",
        "summarize-evaluation": "join the results of tasks that were evaluated one by one",
        "harness": "evaluate a model in lm-evaluation-harness",
        "compare-losses": "compare the losses of a forward model and its reverse twin",
        "make-analysis-data": "write synthetic training text and questions for an analysis",
    },
    "the shell": {
        "completion": "print the completion script of a shell",
    },
}
"""Title -> name of a command -> its purpose, in the order in which a new user needs them."""
COMMANDS = [name for group in GROUPS.values() for name in group]
EXAMPLE = """\
`ledom COMMAND --help` shows the options of a command. From a text file to a model that writes what precedes a given text:

  ledom train-tokenizer --input corpus.jsonl --vocab-size 8000 --output tokenizer
  ledom preprocess-data --input corpus.jsonl --tokenizer tokenizer --output-prefix shards/train
  ledom configs show quickstart_reverse > run.yaml
  ledom train --config run.yaml run_dir=run data.tokenizer=tokenizer \\
      'data.train_blend=[[1.0, shards/train]]' 'data.valid_blend=[]' data.allow_repeats=true
  ledom convert-checkpoint mcore-to-hf --load run --save model
  ledom generate --model model --following "and they lived happily ever after."
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `ledom` itself."""
    listed = [
        f"{title}:\n" + "".join(f"  {name:21}{text}\n" for name, text in group.items()) for title, group in GROUPS.items()
    ]
    parser = argparse.ArgumentParser(
        prog="ledom",
        usage="ledom COMMAND [OPTION ...]",
        description="Pretraining of reverse language models, from raw text to Reverse Reward.",
        epilog="\n".join([*listed, EXAMPLE]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def load(command: str) -> ModuleType:
    """Import the module of a command, which has `build_parser(prog)` and `main(argv, prog)`."""
    return importlib.import_module(
        "megatron_ledom.pretrain" if command == "train" else f"{__package__}.{command.replace('-', '_')}"
    )


def run(argv: Sequence[str]) -> int | None:
    """Run `ledom ARGV` and return its exit code."""
    parser = build_parser()
    parsed = parser.parse_args(argv)
    if parsed.version:
        from megatron_ledom import __version__

        print(f"ledom {__version__}")
        return 0
    if parsed.command is None:
        parser.print_help(sys.stderr)
        return UsageError.exit_code
    if parsed.command not in COMMANDS:
        close = difflib.get_close_matches(parsed.command.replace("_", "-"), COMMANDS, 1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(COMMANDS)};"
        raise UsageError(f"{parsed.command} is not a command of ledom; {hint} `ledom --help` lists them")
    return run_one(parsed.command, parsed.arguments, f"ledom {parsed.command}")


def run_one(command: str, argv: Sequence[str], prog: str) -> int | None:
    """Run one command and return its exit code. `prog` is its name in the usage line."""
    code: int | None = load(command).main(argv, prog)
    return code


def run_tool(command: str) -> NoReturn:
    """Run a command as its script in `tools/`."""
    run_command(lambda: run_one(command, sys.argv[1:], f"tools/{command.replace('-', '_')}.py"))


def main() -> NoReturn:
    """Run `ledom` and exit the process with its exit code (see errors.py)."""
    run_command(lambda: run(sys.argv[1:]))
