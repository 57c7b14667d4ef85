"""Serve a reverse model over HTTP: completions that precede a text, scores, rewards and rankings. Needs the extra `serve`."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_ledom.cli.options import add_batch_size, add_unrecorded_direction

KEY_VARIABLE = "LEDOM_API_KEY"
UPSTREAM_KEY_VARIABLES = "LEDOM_UPSTREAM_API_KEY and LEDOM_FORWARD_UPSTREAM_API_KEY"


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--reverse", required=True, metavar="DIR", help="folder of the reverse model")
    parser.add_argument(
        "--forward", metavar="DIR", help="folder of the forward model, for forward completions and Reverse Reward"
    )
    _add_upstream(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one (default %(default)s)")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"key that requests must send; other users of the machine see it, so {KEY_VARIABLE} can hold it instead",
    )
    parser.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="URL",
        help="web origin whose pages may call the server; repeatable",
    )
    add_batch_size(parser)
    parser.add_argument(
        "--batch-window-ms",
        type=float,
        default=4.0,
        metavar="N",
        help="milliseconds for which a request waits for others of its batch (default %(default)s)",
    )
    parser.add_argument(
        "--max-queue", type=int, default=256, metavar="N", help="most requests that wait; others get 429 (default %(default)s)"
    )
    parser.add_argument(
        "--max-body-bytes", type=int, default=4 << 20, metavar="N", help="largest body of a request (default %(default)s)"
    )
    parser.add_argument(
        "--timeout", type=float, default=300.0, metavar="N", help="longest time of a request, in seconds (default %(default)s)"
    )
    parser.add_argument("--log-text", action="store_true", help="write the bodies of requests into the log (default: never)")
    add_unrecorded_direction(parser)
    return parser


def _add_upstream(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("models that run on an upstream, a completions server such as vLLM")
    group.add_argument(
        "--upstream",
        metavar="URL",
        help="upstream of the reverse model, such as http://localhost:8001/v1; of its folder, only tokenizer and config are then kept",
    )
    group.add_argument("--upstream-model", metavar="NAME", help="name of the reverse model there (default: the only one)")
    group.add_argument("--forward-upstream", metavar="URL", help="upstream of the forward model")
    group.add_argument(
        "--forward-upstream-model", metavar="NAME", help="name of the forward model there (default: the only one)"
    )
    group.add_argument(
        "--upstream-requests",
        type=int,
        default=64,
        metavar="N",
        help="most texts that each upstream writes at once, and most that it scores at once (default %(default)s)",
    )
    group.add_argument(
        "--check-upstream-weights",
        action="store_true",
        help="at the start, load the folder's weights on the CPU once and compare log-probabilities (default: below 2 GiB)",
    )
    group.add_argument(
        "--key-over-http",
        action="store_true",
        help=f"send {UPSTREAM_KEY_VARIABLES} by plain http to an upstream on another machine, where others can read it",
    )


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command."""
    args = build_parser(prog).parse_args(argv)

    from megatron_ledom.serving.extra import check_installed
    from megatron_ledom.serving.settings import ServeSettings

    check_installed()
    settings = ServeSettings(
        reverse=Path(args.reverse),
        forward=Path(args.forward) if args.forward else None,
        upstream=args.upstream,
        upstream_model=args.upstream_model,
        forward_upstream=args.forward_upstream,
        forward_upstream_model=args.forward_upstream_model,
        upstream_requests=args.upstream_requests,
        check_upstream_weights=args.check_upstream_weights,
        key_over_http=args.key_over_http,
        direction=args.direction,
        eod_id=args.eod_id,
        host=args.host,
        port=args.port,
        api_key=args.api_key if args.api_key is not None else os.environ.get(KEY_VARIABLE),
        cors_origins=tuple(args.cors_origin),
        batch_size=args.batch_size,
        batch_window_seconds=args.batch_window_ms / 1000,
        max_queue=args.max_queue,
        max_body_bytes=args.max_body_bytes,
        timeout_seconds=args.timeout,
        log_text=args.log_text,
    )
    from megatron_ledom.serving.server import serve

    serve(settings)
