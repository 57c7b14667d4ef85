"""Show what shards hold: manifest, statistics and documents in reading order; --verify reads everything again."""

import argparse
from collections.abc import Sequence


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("prefixes", nargs="+", metavar="P", help="paths of shards without ending, or patterns of them")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read everything again, check the direction on a sample; exit 1 if there is any problem",
    )
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the first N documents as text")
    parser.add_argument("--tokenizer", metavar="PATH", help="default: where the manifest says it was")
    parser.add_argument("--histogram", metavar="FILE.png", help="draw the lengths of all documents")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse first, import after: `--help` answers at once."""
    arguments = build_parser(prog).parse_args(argv)
    from megatron_ledom.data.shards.inspection import InspectSettings, inspect_shards

    inspect_shards(InspectSettings(**vars(arguments)))
