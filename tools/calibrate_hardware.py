#!/usr/bin/env python3
"""Measure this machine for the planner, write its hardware file, and print how far the planner is off on what was measured.

Alone it measures kernels; under torchrun or srun also collectives between the ranks.
"""

import argparse

from megatron_ledom.errors import run_command


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--hardware",
        required=True,
        metavar="NAME",
        help="a name of examples/hardware: peaks, links and prices are taken from it",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="the hardware file to write")
    return parser.parse_args()


def main() -> None:
    """Parse first, import after: `--help` answers at once."""
    arguments = parse()
    from megatron_ledom.planning.calibration import calibrate

    print(calibrate(arguments.hardware, arguments.output), end="")


if __name__ == "__main__":
    run_command(main)
