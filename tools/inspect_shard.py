#!/usr/bin/env python3
"""Show what a shard holds: manifest, statistics and documents in reading order; --verify reads everything again."""

import argparse

from megatron_ledom.errors import run_command


def parse() -> argparse.Namespace:
    """The command line; see README and `--help`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prefix", metavar="P", help="path of the shard without ending")
    parser.add_argument("--verify", action="store_true", help="read everything again; exit 1 on any fault")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the first N documents as text")
    parser.add_argument("--tokenizer", metavar="PATH", help="default: where the manifest says it was")
    return parser.parse_args()


def main() -> None:
    """Parse first, import after: `--help` answers at once."""
    arguments = parse()
    from megatron_ledom.data.inspection import InspectSettings, inspect_shard

    inspect_shard(InspectSettings(**vars(arguments)))


if __name__ == "__main__":
    run_command(main)
