"""Show the status of runs from their folders: state, progress, loss, speed, spikes, last checkpoint, slowest ranks, disk.

Nothing is written into the folders. Exit code 0: no run needs anybody (running, queued, not started, stopped as requested, complete).
1: a run is stalled, failed, lost, preempted, unknown or unreadable, cannot be resumed from its newest checkpoint, or its disk is low.
2: wrong usage. --serve shows the same as a web page, and needs the extra `serve`.
"""

import argparse
from collections.abc import Sequence


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folder of a run, or a folder with runs in it")
    parser.add_argument("--stages", metavar="FILE", help="show the run of each stage of a stage file, also those to come")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print JSON, a list with one object for each run")
    how.add_argument(
        "--watch", type=_seconds, nargs="?", const=10.0, metavar="N", help="print again every N seconds (default %(const)g)"
    )
    how.add_argument("--serve", action="store_true", help="serve a web page that refreshes itself, until it is interrupted")
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--stale-seconds",
        type=_seconds,
        default=120.0,
        metavar="N",
        help="age of a heartbeat from which its process counts as gone (default %(default)g)",
    )
    limits.add_argument(
        "--stall-seconds",
        type=_seconds,
        metavar="N",
        help="seconds without progress from which a run counts as stalled (default: half of what its watchdog allows)",
    )
    limits.add_argument(
        "--min-free-disk-gib",
        type=_gib,
        metavar="N",
        help="free disk space below which a run is not healthy (default: twice its newest checkpoint)",
    )
    page = parser.add_argument_group("web page")
    page.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s: this machine only)")
    page.add_argument("--port", type=_port, default=8010, help="port to listen on; 0 takes a free one (default %(default)s)")
    return parser


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time above 0 s")
    return value


def _gib(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size in GiB")
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to 65535")
    return value


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command."""
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    if not args.runs and args.stages is None:
        parser.error("name at least one RUN, or --stages FILE")

    from megatron_ledom.monitoring.fields import Limits
    from megatron_ledom.monitoring.runs import RunReader
    from megatron_ledom.monitoring.table import as_json, as_table
    from megatron_ledom.monitoring.watching import watch

    limits = Limits(
        stale_seconds=args.stale_seconds, stall_seconds=args.stall_seconds, min_free_disk_gib=args.min_free_disk_gib
    )
    reader = RunReader(args.runs, limits, stages=_titles(args.stages))
    if args.serve:
        from megatron_ledom.serving.extra import check_installed

        check_installed("fastapi", "uvicorn")
        from megatron_ledom.serving.status_server import serve_status

        serve_status(reader, host=args.host, port=args.port)
        return 0
    if args.watch is not None:
        return watch(reader, args.watch)
    found = reader.read()
    print(as_json(found) if args.json else as_table(found))
    return 0 if all(run.is_healthy for run in found) else 1


def _titles(path: str | None) -> dict[str, str]:
    """Return run folder -> title of the stages of a file."""
    if path is None:
        return {}
    from megatron_ledom.training.stages import load_stages

    return {stage.config.run_dir: stage.title for stage in load_stages(path)}
