"""Measure this machine for the planner, write its hardware file, and print the planner's error on the measurements.

One process measures kernels; under torchrun or srun it also measures collectives between the ranks.
"""

import argparse
from collections.abc import Sequence


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--hardware",
        required=True,
        metavar="NAME",
        help="a name from `ledom configs list`; peak rates, links and prices come from it",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="the hardware file to write")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command. Imports follow parsing, so `--help` is fast."""
    arguments = build_parser(prog).parse_args(argv)
    from megatron_ledom.platform.core_versions import check_core
    from megatron_ledom.platform.quiet import quiet_libraries

    check_core()
    quiet_libraries()
    from megatron_ledom.planning.calibration import calibrate

    print(calibrate(arguments.hardware, arguments.output), end="")
