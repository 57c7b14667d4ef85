"""Convert shards to the opposite direction, or to another unit or marker, without the corpus: those of this package, or .bin and .idx
of other Megatron tools."""

import argparse
from collections.abc import Sequence

from megatron_ledom.cli.options import add_model_order, add_overwrite


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="P",
        help="prefixes, or patterns such as 'data/x-*-of-00064'; several become one shard, in this order",
    )
    parser.add_argument("--output-prefix", required=True, metavar="P", help="path of the new shard without extension")
    add_overwrite(parser)
    parser.add_argument(
        "--to-direction",
        choices=["forward", "reverse"],
        help="direction of the new shard (default: the other one than that of the inputs)",
    )
    add_model_order(parser)
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer of the inputs (default: the path in their manifest)")
    foreign = parser.add_argument_group("inputs of another tool, without a manifest", "They need --tokenizer.")
    foreign.add_argument("--eod-token", metavar="T", help="token that ends documents (eod; default: the tokenizer's eos)")
    foreign.add_argument("--from-direction", choices=["forward", "reverse"], help="direction of the inputs (default: forward)")
    foreign.add_argument(
        "--eod",
        choices=["auto", "keep", "append"],
        default="auto",
        help="keep: every document ends with eod; append: none does, add it; auto: look at the first documents (default)",
    )
    foreign.add_argument(
        "--text-bytes",
        type=int,
        default=0,
        metavar="N",
        help="UTF-8 bytes of the text of the inputs, to compute bits per byte (0: unknown)",
    )
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command. Imports follow parsing, so `--help` is fast."""
    arguments = build_parser(prog).parse_args(argv)
    import logging

    from megatron_ledom.cli.options import order_settings
    from megatron_ledom.data.shards.rewriting import ReverseSettings, reverse_shards
    from megatron_ledom.direction import Direction

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    order = order_settings(arguments)
    names = ("from_direction", "to_direction")
    directions = {name: Direction(value) if (value := getattr(arguments, name)) else None for name in names}
    reverse_shards(ReverseSettings(**{**vars(arguments), **directions, "order": order}))
