"""Check a machine in minutes: operators, kernels, training layouts, checkpoints, conversion, speed, and the planner.

Each check runs in a process of its own within a share of the time, so that a crash or a hang stops only that check. The results are
in report.json and report.md, for a bug report: they name neither hosts nor users nor folders. Exit code 1 if a check failed.
"""

import argparse
from collections.abc import Sequence

from megatron_ledom.hardware_check.catalogue import CHECKS
from megatron_ledom.hardware_check.check import Check


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="GPUs to use, on a CPU the number of processes (default: all GPUs, or 2 processes)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=8.0,
        help="time of all checks together; a check that exceeds its share is killed and has failed (default %(default)g)",
    )
    parser.add_argument(
        "--output",
        default="hardware_check",
        metavar="DIR",
        help="new folder for the report and the logs (default %(default)s)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"run only these checks, and {CHECKS[0].name} first, which finds the devices; the checks are"
        f" {', '.join(check.name for check in CHECKS)}",
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cuda", "cpu"],
        default="auto",
        help="auto: the GPUs, or the CPU of a machine without NVIDIA GPUs (default %(default)s)",
    )
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None, *, checks: Sequence[Check] = CHECKS) -> int:
    """Run the command and return its exit code. Imports follow parsing, so `--help` is fast.

    checks: what to run, by default everything.
    """
    arguments = build_parser(prog).parse_args(argv)
    import logging
    import sys

    from megatron_ledom.hardware_check.runner import Request, check_hardware, describe
    from megatron_ledom.platform.core_versions import check_core

    check_core()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    request = Request(
        output=arguments.output,
        device=arguments.device,
        num_gpus=arguments.gpus,
        minutes=arguments.minutes,
        only=arguments.only,
    )
    report = check_hardware(request, checks)
    print(describe(report, arguments.output), end="")
    return int(any(result.has_failed for result in report.results))
