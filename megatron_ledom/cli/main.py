"""Start a command by its name: `ledom COMMAND`, or `tools/COMMAND.py` in a checkout.

Only the file of the command that was asked for is imported, so that help answers at once.
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
        "summarize-tasks": "add up the tasks of a preprocessing array, and name those to run again",
        "inspect-shard": "show and verify shards",
        "merge-shards": "join shards of one direction and tokenizer",
        "reverse-shards": "turn stored shards to the other direction without the corpus",
        "prepare-pairs": "pack prompts and answers into a shard to fine-tune a scorer",
        "plan-blend": "plan the weights of a blend: tokens and epochs of each source",
    },
    "planning a run": {
        "configs": "list and show the configs that come with the package",
        "plan-run": "plan memory, time and cost of a run without a GPU; search for the best layout",
        "calibrate-hardware": "measure this machine for the planner",
        "validate-planner": "compare the planner with published runs",
        "ops": "show which fused operators are built and used here",
    },
    "training": {
        "train": "train a model from shards; start one process a GPU by torchrun or srun",
        "inspect-checkpoint": "show and verify a checkpoint",
        "replay-step": "repeat one step of a run bit for bit",
        "report-run": "draw the curves of runs, with one HTML page of their figures",
    },
    "using a model": {
        "convert-checkpoint": "convert a checkpoint to a Hugging Face folder, or such a folder to a run",
        "generate": "write what came before a text",
        "rerank": "rank answers by Reverse Reward",
        "report-rerank": "compare Reverse Reward with its baselines",
    },
    "evaluating models": {
        "evaluate": "evaluate a model of either direction on tasks from local files",
        "harness": "evaluate a model in lm-evaluation-harness",
        "compare-losses": "compare the losses of a forward model and its reverse twin",
        "make-analysis-data": "write the synthetic data of an analysis",
    },
    "this command": {
        "completion": "print the completion script of a shell",
    },
}
"""Title -> name of a command -> what it does, in the order in which a newcomer meets them."""
COMMANDS = [name for group in GROUPS.values() for name in group]
EXAMPLE = """\
`ledom COMMAND --help` shows the options of a command. From text to a model that writes what came before:

  ledom train-tokenizer --input corpus.jsonl --vocab-size 8000 --output tokenizer
  ledom preprocess-data --input corpus.jsonl --tokenizer tokenizer --output-prefix shards/train
  ledom configs show quickstart_reverse > run.yaml
  ledom train --config run.yaml run_dir=run data.tokenizer=tokenizer \\
      'data.train_blend=[[1.0, shards/train]]' 'data.valid_blend=[]' data.allow_repeats=true
  ledom convert-checkpoint mcore-to-hf --load run --save model
  ledom generate --model model --following "and they lived happily ever after."
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the command line of `ledom` itself."""
    listed = [
        f"{title}:\n" + "".join(f"  {name:20}{text}\n" for name, text in group.items()) for title, group in GROUPS.items()
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
    """Import the module of a command: it has `build_parser(prog)` and `main(argv, prog)`."""
    return importlib.import_module(
        "megatron_ledom.pretrain" if command == "train" else f"{__package__}.{command.replace('-', '_')}"
    )


def run(argv: Sequence[str]) -> int | None:
    """Run the command line `ledom ARGV`; returns its exit code."""
    parser = build_parser()
    asked = parser.parse_args(argv)
    if asked.version:
        from megatron_ledom import __version__

        print(f"ledom {__version__}")
        return 0
    if asked.command is None:
        parser.print_help(sys.stderr)
        return UsageError.exit_code
    if asked.command not in COMMANDS:
        close = difflib.get_close_matches(asked.command.replace("_", "-"), COMMANDS, 1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(COMMANDS)};"
        raise UsageError(f"{asked.command} is no command of ledom; {hint} `ledom --help` says what each does")
    return run_one(asked.command, asked.arguments, f"ledom {asked.command}")


def run_one(command: str, argv: Sequence[str], prog: str) -> int | None:
    """Run one command; `prog` is how its usage names it. Returns its exit code."""
    code: int | None = load(command).main(argv, prog)
    return code


def run_tool(command: str) -> NoReturn:
    """Run the script of a checkout that stands for a command."""
    run_command(lambda: run_one(command, sys.argv[1:], f"tools/{command.replace('-', '_')}.py"))


def main() -> NoReturn:
    """Run `ledom` and exit the process with its code, see errors.py."""
    run_command(lambda: run(sys.argv[1:]))
