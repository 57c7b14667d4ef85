"""Print the totals of a preprocessing array and list the tasks to run again. Exits with 1 if there are any."""

import argparse
from collections.abc import Sequence


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("prefix", metavar="P", help="--output-prefix of the tasks, whose shards are P-00000-of-000NN.*")
    parser.add_argument("--num-tasks", type=int, metavar="N", help="number of tasks; default: the number in the file names")
    parser.add_argument("--json", metavar="FILE", help="also write the summary to a file")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command. Imports follow parsing, so `--help` is fast."""
    arguments = build_parser(prog).parse_args(argv)
    from megatron_ledom.data.preprocess.task_summary import SummarySettings, summarize_tasks

    summarize_tasks(SummarySettings(**vars(arguments)))
