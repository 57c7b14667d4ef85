"""Show the status of runs from their folders: state, progress, loss, speed, spikes, last checkpoint, slowest rank, disk.

Nothing is written into the folders. Exit code 0: every run is running, queued, stopped as requested, or complete. 1: a run is
stalled, failed, lost or unreadable, or its disk is low. --serve shows the same as a web page, and needs the extra `serve`.
"""

import argparse
from collections.abc import Sequence


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or a folder with runs in it")
    parser.add_argument("--json", action="store_true", help="print JSON, one object for each run")
    parser.add_argument(
        "--stale-seconds",
        type=float,
        default=120.0,
        metavar="N",
        help="age of a heartbeat from which its process counts as gone (default %(default)s)",
    )
    parser.add_argument(
        "--stall-seconds",
        type=float,
        metavar="N",
        help="seconds without progress from which a run counts as stalled (default: alerts.stall_seconds of the run)",
    )
    parser.add_argument(
        "--min-free-disk-gib",
        type=float,
        metavar="N",
        help="free disk space below which a run is not healthy (default: alerts.min_free_disk_gib of the run)",
    )
    page = parser.add_argument_group("web page")
    page.add_argument("--serve", action="store_true", help="serve a page that refreshes itself, until it is interrupted")
    page.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s: this machine only)")
    page.add_argument("--port", type=int, default=8010, help="port to listen on; 0 takes a free one (default %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command."""
    args = build_parser(prog).parse_args(argv)

    from megatron_ledom.monitoring.run_status import Limits
    from megatron_ledom.monitoring.runs import JobStates, read_all, run_folders
    from megatron_ledom.monitoring.table import as_json, as_table

    limits = Limits(
        stale_seconds=args.stale_seconds, stall_seconds=args.stall_seconds, min_free_disk_gib=args.min_free_disk_gib
    )
    if args.serve:
        from megatron_ledom.serving.extra import check_installed

        check_installed()
        from megatron_ledom.serving.status_server import serve_status

        serve_status(args.runs, limits, host=args.host, port=args.port)
        return 0
    found = read_all(run_folders(args.runs), limits, JobStates())
    print(as_json(found) if args.json else as_table(found))
    return 0 if all(run.is_healthy for run in found) else 1
