"""Load the models, then serve them until a signal ends the server."""

import logging
import signal
import sys

import uvicorn

from megatron_ledom.inference.engines.completions_client import is_loopback
from megatron_ledom.inference.engines.model_process import ModelProcessLost
from megatron_ledom.serving.app import build_app
from megatron_ledom.serving.metrics import Metrics
from megatron_ledom.serving.models import ServedModels
from megatron_ledom.serving.settings import ServeSettings

IDLE_SECONDS = 30
"""Time after which an idle connection is closed."""
SWITCH_SECONDS = 1e-4
"""Longest time that a busy event loop keeps the threads waiting that talk to the process of the models, which is idle meanwhile. With Python's
5 ms they take a tenth of its time."""


def serve(settings: ServeSettings) -> None:
    """Serve until SIGTERM or SIGINT. Then accept no further request, finish those that run or wait, and return.

    Raises ModelProcessLost if the process of the models ends by itself.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log every request to an upstream
    sys.setswitchinterval(SWITCH_SECONDS)
    metrics = Metrics()
    models = ServedModels.load(settings, metrics)
    app = build_app(settings, models, metrics)
    if settings.api_key is None and not is_loopback(settings.host):
        print(
            f"warning: everybody who reaches {settings.host}:{settings.port} can use the models; pass --api-key to require a key",
            file=sys.stderr,
        )
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        access_log=False,  # the application writes its own, without addresses of requests
        log_config=None,
        log_level="info",
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=int(settings.timeout_seconds) + 1,
    )
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # uvicorn handles it while it serves, and then raises it once more
    server, lost = uvicorn.Server(config), list[ModelProcessLost]()

    def _end(error: ModelProcessLost) -> None:
        lost.append(error)
        server.should_exit = True

    models.watch(_end)
    try:
        server.run()
    finally:
        models.end()
    if lost:
        raise lost[0]
