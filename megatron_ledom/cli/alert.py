"""Watch runs and send one message for each event: stopped, failed, stalled, bad steps, disk low, recovered, finished.

Reads the status of the runs (`ledom status`) at intervals and sends to a webhook, as JSON or in Slack's form, and by e-mail. What has been
told, and what is not delivered yet, is in a small file, so that a watcher that is started again repeats and loses nothing; a message
may come twice with the same id if the watcher was killed while it was sent. SIGTERM ends it after the last messages.
"""

import argparse
from collections.abc import Sequence


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="folder of a run, or a folder with runs in it; instead overrides, section.key=value, with --stages or --config",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--config", metavar="FILE", help="watch the run_dir of this config, which may not exist yet")
    what.add_argument("--stages", metavar="FILE", help="watch the runs of this stage file, which may not exist yet")
    to = parser.add_argument_group("where to send")
    to.add_argument("--webhook", metavar="SOURCE", help="env:NAME or file:PATH, the place of the address, which is a secret")
    to.add_argument("--format", choices=("json", "slack"), default="json", help="form for the webhook (default %(default)s)")
    to.add_argument(
        "--email", nargs="+", metavar="ADDRESS", default=[], help="addresses; sent by the machine's sendmail, or by --smtp"
    )
    to.add_argument("--email-from", metavar="ADDRESS", help="sender (default ledom@ and the name of the host)")
    to.add_argument(
        "--smtp",
        metavar="HOST[:PORT]",
        help="mail server; with ALERT_SMTP_USER and ALERT_SMTP_PASSWORD of the environment, over TLS",
    )
    to.add_argument("--check", action="store_true", help="check these settings without sending anything, and stop")
    to.add_argument("--test", action="store_true", help="send a test message to each, and stop")
    how = parser.add_argument_group("how to watch")
    how.add_argument(
        "--interval", type=float, default=60.0, metavar="SECONDS", help="time between two looks (default %(default)s)"
    )
    how.add_argument(
        "--once", action="store_true", help="look once, send, and stop; exit code 1 if a message could not be sent"
    )
    how.add_argument(
        "--state",
        default="ledom_alerts.json",
        metavar="FILE",
        help="the small file; one for each watcher (default %(default)s)",
    )
    how.add_argument(
        "--stale-seconds", type=float, default=120.0, metavar="N", help="as in `ledom status` (default %(default)s)"
    )
    how.add_argument("--stall-seconds", type=float, metavar="N", help="as in `ledom status`")
    how.add_argument("--min-free-disk-gib", type=float, metavar="N", help="as in `ledom status`")
    how.add_argument(
        "--end-seconds",
        type=float,
        default=20.0,
        metavar="N",
        help="longest time from SIGTERM, or from the look of --once, to the end (default %(default)s)",
    )
    how.add_argument(
        "--exit-note",
        metavar="FILE",
        help="for launchers: a file with the exit code of the launch and a sentence, which ends the watcher; SIGTERM then only asks for a look",
    )
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command."""
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    if not (args.webhook or args.email):
        parser.error("nowhere to send: give --webhook or --email")
    if not (args.runs or args.config or args.stages or args.test or args.check):
        parser.error("no run: give the folder of a run, --config or --stages")
    if not 1 <= args.interval <= 86400 or not 0 <= args.end_seconds <= 3600:
        parser.error("--interval expects 1 to 86400 seconds, --end-seconds 0 to 3600")

    import logging
    import signal

    from megatron_ledom.monitoring.alert_channels import open_channels
    from megatron_ledom.monitoring.alert_state import load_state
    from megatron_ledom.monitoring.alert_watch import Watcher, send_test
    from megatron_ledom.monitoring.fields import Limits
    from megatron_ledom.monitoring.runs import RunReader

    logging.basicConfig(level=logging.INFO, format="%(asctime)s alerts: %(message)s", datefmt="%H:%M:%S")
    channels = open_channels(args.webhook, args.format, args.email, args.email_from, args.smtp)
    if args.check:
        return 0
    if args.test:
        return send_test(channels)
    folders, stages = _watched_runs(args)

    def open_reader(code: int | None) -> RunReader:
        """Return the reader of the runs; `code` is the exit code of their launch, if it has ended."""
        limits = Limits(
            stale_seconds=args.stale_seconds,
            stall_seconds=args.stall_seconds,
            min_free_disk_gib=args.min_free_disk_gib,
            ended_with=code,
        )
        return RunReader(folders, limits, stages=stages)

    watcher = Watcher(
        open_reader=open_reader,
        channels=channels,
        state=load_state(args.state),
        interval_seconds=args.interval,
        end_seconds=args.end_seconds,
        may_be_missing=bool(args.config or args.stages),
        exit_note=args.exit_note,
    )
    signal.signal(signal.SIGTERM, lambda *_: watcher.ending.set())
    if args.once:
        return 0 if watcher.look_once() else 1
    return 0 if watcher.watch() else 1


def _watched_runs(args: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """Return the folders that the command line names, and run folder -> title of those that may not exist yet."""
    if args.config is None and args.stages is None:
        import os

        from megatron_ledom.errors import UsageError

        missing = [run for run in args.runs if not os.path.isdir(run)]
        if missing:
            raise UsageError(
                f"{', '.join(missing)}: no such folder; give the run_dir of a run, or --config for one that may not exist yet"
            )
        return list(args.runs), {}
    from megatron_ledom.config.load import load_config
    from megatron_ledom.training.stages import load_stages

    if args.config is not None:
        return [], {load_config(args.config, args.runs).run_dir: ""}
    return [], {stage.config.run_dir: stage.title for stage in load_stages(args.stages, args.runs)}
