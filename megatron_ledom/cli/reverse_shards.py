"""Turn stored shards to the other direction without the corpus: ours, and plain .bin and .idx of other Megatron tools."""

import argparse
from collections.abc import Sequence

from megatron_ledom.cli.options import add_overwrite


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="P",
        help="prefixes or patterns of them such as 'data/x-*-of-00064'; several become one shard, in this order",
    )
    parser.add_argument("--output-prefix", required=True, metavar="P", help="path of the turned shard without ending")
    add_overwrite(parser)
    foreign = parser.add_argument_group("inputs without a manifest, made by another tool")
    foreign.add_argument("--tokenizer", metavar="PATH", help="the tokenizer they were made with (needed)")
    foreign.add_argument("--eod-token", metavar="T", help="token that closes documents; default: the tokenizer's eos")
    foreign.add_argument("--from-direction", choices=["forward", "reverse"], help="their direction (default: forward)")
    foreign.add_argument(
        "--eod",
        choices=["auto", "keep", "append"],
        default="auto",
        help="keep: every document ends with eod; append: none does, add it; auto: see the first documents (default)",
    )
    foreign.add_argument("--text-bytes", type=int, default=0, metavar="N", help="UTF-8 bytes of their text, for bits per byte")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse first, import after: `--help` answers at once."""
    arguments = build_parser(prog).parse_args(argv)
    import logging

    from megatron_ledom.data.shards.rewriting import ReverseSettings, reverse_shards
    from megatron_ledom.direction import Direction

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    direction = Direction(arguments.from_direction) if arguments.from_direction else None
    reverse_shards(ReverseSettings(**{**vars(arguments), "from_direction": direction}))
