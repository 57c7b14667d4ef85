#!/usr/bin/env python3
"""Show what a checkpoint holds: position, layout, tensors by part, files; --verify reads everything again."""

import argparse

from megatron_ledom.errors import run_command


def parse() -> argparse.Namespace:
    """The command line; see README and `--help`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("where", metavar="DIR", help="one checkpoint, or a run folder: all are listed and the latest is shown")
    parser.add_argument("--verify", action="store_true", help="compare the sha256 of every file; exit 1 on any fault")
    return parser.parse_args()


def main() -> None:
    """Parse first, import after: `--help` answers at once."""
    arguments = parse()
    from megatron_ledom.checkpoint.inspection import inspect_checkpoint

    inspect_checkpoint(arguments.where, verify=arguments.verify)


if __name__ == "__main__":
    run_command(main)
