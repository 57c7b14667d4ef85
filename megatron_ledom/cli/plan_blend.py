"""Print tokens, weight, drawn tokens and epochs of each source of a blend, and its config lines. Exits with 1 if a source would repeat."""

import argparse
from collections.abc import Sequence


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="P",
        help="prefixes of shards, patterns of them, or NAME=TOKENS for a shard that does not exist yet",
    )
    parser.add_argument("--tokens", metavar="BUDGET", help="number of tokens to train on, such as 435.37B or 1e12")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--weights", nargs="+", type=float, metavar="W", help="one weight for each source; only their ratios count"
    )
    how.add_argument(
        "--tokens-per-source", nargs="+", metavar="TOKENS", help="tokens drawn from each source; --tokens is their sum"
    )
    how.add_argument("--proportional", action="store_true", help="weight each source by its tokens (default)")
    parser.add_argument(
        "--seq-length", type=int, metavar="N", help="with --global-batch-size: also print samples and iterations"
    )
    parser.add_argument("--global-batch-size", type=int, metavar="N", help="samples per iteration")
    parser.add_argument("--allow-repeats", action="store_true", help="allow a source to be read more than once")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command. Imports follow parsing, so `--help` is fast."""
    arguments = vars(build_parser(prog).parse_args(argv))
    allow_repeats = arguments.pop("allow_repeats")
    del arguments["proportional"]  # the default
    from megatron_ledom.data.blends.plan import BlendSettings, check_repeats, describe, plan_blend, to_yaml

    plan = plan_blend(BlendSettings(**arguments))
    print(describe(plan), flush=True)
    if not allow_repeats:
        check_repeats(plan)
    print(f"\n{to_yaml(plan)}")
