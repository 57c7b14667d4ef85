"""Plot loss, gradient norm, throughput and learning rate of runs, and write an HTML page with their final metrics.

Several runs share one plot: `ledom report-run RUN_REVERSE RUN_FORWARD --output report`.
"""

import argparse
from collections.abc import Sequence


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of the runs (run_dir)")
    parser.add_argument(
        "--output", default="report", metavar="DIR", help="folder for the plots and report.html (default %(default)s)"
    )
    parser.add_argument("--smooth", type=int, default=0, metavar="N", help="also draw the moving mean of N records")
    parser.add_argument(
        "--plan",
        nargs="?",
        const="",
        metavar="HARDWARE",
        help="compare with the plan for this hardware; default: parallel.hardware of the run",
    )
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command. Imports follow parsing, so `--help` is fast."""
    arguments = build_parser(prog).parse_args(argv)
    from megatron_ledom.reports.runs import report_runs

    report_runs(arguments.runs, arguments.output, arguments.smooth, arguments.plan)
