#!/usr/bin/env python3
"""Make the data of an analysis: training text in reading order, questions for tools/evaluate.py, and a manifest with hashes."""

import argparse

from megatron_ledom.errors import run_command
from megatron_ledom.evaluation.synthetic.generators import GENERATORS, make_analysis_data


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", required=True, choices=sorted(GENERATORS), help="what to make")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a folder of its own for each set")
    parser.add_argument("--num", type=int, required=True, metavar="N", help="facts, problems, texts or worlds, by the task")
    parser.add_argument("--seed", type=int, default=0, help="the same one gives the same bytes (default %(default)s)")
    return parser


def main() -> None:
    """Parse, then make."""
    args = build_parser().parse_args()
    make_analysis_data(args.task, args.out, args.num, args.seed)


if __name__ == "__main__":
    run_command(main)
