"""Measure this machine for the planner, write its hardware file, and print how far the planner is off on what was measured.

Alone it measures kernels; under torchrun or srun also collectives between the ranks.
"""

import argparse
from collections.abc import Sequence


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--hardware",
        required=True,
        metavar="NAME",
        help="a name from `ledom configs list`: peaks, links and prices are taken from it",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="the hardware file to write")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse first, import after: `--help` answers at once."""
    arguments = build_parser(prog).parse_args(argv)
    from megatron_ledom.planning.calibration import calibrate

    print(calibrate(arguments.hardware, arguments.output), end="")
