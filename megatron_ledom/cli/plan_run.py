"""Plan a run without a GPU: memory of every stage, seconds of an iteration, days and cost; --search finds the best layout.

Example: `ledom plan-run --config ledom_7b --hardware h100-sxm --num-gpus 64 --search`.
"""

import argparse
from collections.abc import Sequence

from megatron_ledom.cli.options import add_config
from megatron_ledom.errors import PlanError


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config(parser)
    hardware = "a name from `ledom configs list`, or a YAML file like those"
    parser.add_argument("--hardware", required=True, metavar="NAME", help=hardware)
    parser.add_argument("--num-gpus", type=int, metavar="N", help="devices; default: parallel.world_size")
    parser.add_argument("--search", action="store_true", help="try every layout, and plan the best one")
    parser.add_argument("--save-config", metavar="FILE", help="write the planned run as YAML for the trainer")
    parser.add_argument("--output", metavar="DIR", help="write pictures, plan.html and, of a search, layouts.tsv")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse first, import after: `--help` answers at once."""
    arguments = build_parser(prog).parse_args(argv)
    from megatron_ledom.reports.plans import plan_run

    text, plan = plan_run(**vars(arguments))
    print(text, end="", flush=True)
    if not plan.fits:
        raise PlanError("the plan does not fit: recompute more, or spread it over more devices (--search finds a layout)")
