"""Draw loss, gradient norm, throughput and learning rate of runs to PNG, and one HTML page with their final figures.

Runs of both directions come into one picture: `ledom report-run RUN_REVERSE RUN_FORWARD --output report`.
"""

import argparse
from collections.abc import Sequence


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse first, import after: `--help` answers at once."""
    arguments = build_parser(prog).parse_args(argv)
    from megatron_ledom.reports.runs import report_runs

    report_runs(arguments.runs, arguments.output, arguments.smooth, arguments.plan)
