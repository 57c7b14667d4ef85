"""Join shards of one direction and tokenizer, in the given order, into the shard that a single task would have written."""

import argparse
from collections.abc import Sequence

from megatron_ledom.cli.options import add_overwrite


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="P",
        help="prefixes, or patterns such as 'data/x-*-of-00064', whose matches are sorted",
    )
    parser.add_argument("--output-prefix", required=True, metavar="P", help="path of the joined shard without extension")
    add_overwrite(parser)
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command. Imports follow parsing, so `--help` is fast."""
    arguments = build_parser(prog).parse_args(argv)
    import logging

    from megatron_ledom.data.shards.rewriting import MergeSettings, merge_shards

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    merge_shards(MergeSettings(**vars(arguments)))
