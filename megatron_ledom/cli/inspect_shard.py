"""Show the contents of shards: manifest, statistics and documents in text order. --verify reads everything again."""

import argparse
from collections.abc import Sequence


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("prefixes", nargs="+", metavar="P", help="paths of shards without extension, or patterns of them")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read everything again and check the direction on a sample; exit with 1 if there is a problem",
    )
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the first N documents as text")
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="tokenizer for --show and --verify; default: the path in the manifest"
    )
    parser.add_argument("--histogram", metavar="FILE.png", help="plot the lengths of all documents")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command. Imports follow parsing, so `--help` is fast."""
    arguments = build_parser(prog).parse_args(argv)
    from megatron_ledom.data.shards.inspection import InspectSettings, inspect_shards

    inspect_shards(InspectSettings(**vars(arguments)))
