"""Plan a blend: tokens, weight, tokens drawn and epochs of each source, and the config's lines; exit 1 if one would repeat."""

import argparse
from collections.abc import Sequence


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="P", help="prefixes of shards, patterns of them, or NAME=TOKENS"
    )
    parser.add_argument("--tokens", metavar="BUDGET", help="tokens the run draws: 435.37B, 1e12, ...")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--weights", nargs="+", type=float, metavar="W", help="one for each source; only their ratios count")
    how.add_argument("--tokens-per-source", nargs="+", metavar="TOKENS", help="tokens drawn from each; --tokens is their sum")
    how.add_argument("--proportional", action="store_true", help="each source in proportion to its tokens (default)")
    parser.add_argument("--seq-length", type=int, metavar="N", help="with --global-batch-size: samples and iterations, too")
    parser.add_argument("--global-batch-size", type=int, metavar="N", help="samples an iteration")
    parser.add_argument("--allow-repeats", action="store_true", help="let a source be read more than once")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse first, import after: `--help` answers at once."""
    arguments = vars(build_parser(prog).parse_args(argv))
    allow_repeats = arguments.pop("allow_repeats")
    del arguments["proportional"]  # what happens anyway
    from megatron_ledom.data.blends.plan import BlendSettings, check_repeats, describe, plan_blend, to_yaml

    plan = plan_blend(BlendSettings(**arguments))
    print(describe(plan), flush=True)
    if not allow_repeats:
        check_repeats(plan)
    print(f"\n{to_yaml(plan)}")
