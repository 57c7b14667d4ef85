#!/usr/bin/env python3
"""Draw loss, gradient norm, throughput and learning rate of runs to PNG, and one HTML page with their final figures.

Runs of both directions come into one picture: `python tools/report_run.py RUN_REVERSE RUN_FORWARD --output report`.
"""

import argparse

from megatron_ledom.errors import run_command


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, their run_dir")
    parser.add_argument("--output", default="report", metavar="DIR", help="folder of the pictures and report.html")
    parser.add_argument("--smooth", type=int, default=0, metavar="N", help="draw the mean of N records over the faint curve")
    parser.add_argument(
        "--plan",
        nargs="?",
        const="",
        metavar="HARDWARE",
        help="compare with the plan for it; default: the run's parallel.hardware",
    )
    return parser.parse_args()


def main() -> None:
    """Parse first, import after: `--help` answers at once."""
    arguments = parse()
    from megatron_ledom.reports.runs import report_runs

    report_runs(arguments.runs, arguments.output, arguments.smooth, arguments.plan)


if __name__ == "__main__":
    run_command(main)
