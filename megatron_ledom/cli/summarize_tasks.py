"""Totals over all tasks of a preprocessing array, and which must run again; exit 1 if any must."""

import argparse
from collections.abc import Sequence


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("prefix", metavar="P", help="the tasks' --output-prefix; they wrote P-00000-of-000NN.*")
    parser.add_argument("--num-tasks", type=int, metavar="N", help="tasks of the array; default: what the files' names say")
    parser.add_argument("--json", metavar="FILE", help="write the summary to a file, too")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse first, import after: `--help` answers at once."""
    arguments = build_parser(prog).parse_args(argv)
    from megatron_ledom.data.preprocess.task_summary import SummarySettings, summarize_tasks

    summarize_tasks(SummarySettings(**vars(arguments)))
