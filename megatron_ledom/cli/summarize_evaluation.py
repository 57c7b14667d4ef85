"""Join the results of tasks that were evaluated one by one, as evaluate_tasks.sbatch does. Exits with 1 if a task has none yet.

Reads DIR/TASK/summary.json of each task and writes DIR/summary.json and DIR/summary.md.
"""

import argparse
from collections.abc import Sequence


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("folder", metavar="DIR", help="OUTPUT of evaluate_tasks.sbatch, with one folder per task")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command. Imports follow parsing, so `--help` is fast."""
    arguments = build_parser(prog).parse_args(argv)
    from megatron_ledom.evaluation.joined_results import summarize_evaluation

    summarize_evaluation(arguments.folder)
