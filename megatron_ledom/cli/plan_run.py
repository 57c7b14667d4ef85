"""Predict memory, time and cost of a run, without a GPU. --search finds the best layout.

Example: `ledom plan-run --config ledom_7b --hardware h100-sxm --num-gpus 64 --search`.
"""

import argparse
from collections.abc import Sequence

from megatron_ledom.config.options import add_config
from megatron_ledom.errors import PlanError


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config(parser)
    hardware = "a name from `ledom configs list`, or a YAML file of the same kind"
    parser.add_argument("--hardware", required=True, metavar="NAME", help=hardware)
    parser.add_argument("--num-gpus", type=int, metavar="N", help="number of GPUs; default: parallel.world_size")
    parser.add_argument("--search", action="store_true", help="try every layout and plan the best one")
    parser.add_argument("--save-config", metavar="FILE", help="write the planned run as YAML for `ledom train`")
    parser.add_argument("--output", metavar="DIR", help="write plots, plan.html and, with --search, layouts.tsv")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command. Imports follow parsing, so `--help` is fast."""
    arguments = build_parser(prog).parse_args(argv)
    from megatron_ledom.reports.plans import plan_run

    text, plan = plan_run(**vars(arguments))
    print(text, end="", flush=True)
    if not plan.fits:
        raise PlanError("the run does not fit into memory: recompute more, or use more devices (--search finds a layout)")
