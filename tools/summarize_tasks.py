#!/usr/bin/env python3
"""Totals over all tasks of a preprocessing array, and which must run again; exit 1 if any must."""

import argparse

from megatron_ledom.errors import run_command


def parse() -> argparse.Namespace:
    """The command line; see README and `--help`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prefix", metavar="P", help="the tasks' --output-prefix; they wrote P-00000-of-000NN.*")
    parser.add_argument("--num-tasks", type=int, metavar="N", help="tasks of the array; default: what the files' names say")
    parser.add_argument("--json", metavar="FILE", help="write the summary to a file, too")
    return parser.parse_args()


def main() -> None:
    """Parse first, import after: `--help` answers at once."""
    arguments = parse()
    from megatron_ledom.data.preprocess.task_summary import SummarySettings, summarize_tasks

    summarize_tasks(SummarySettings(**vars(arguments)))


if __name__ == "__main__":
    run_command(main)
