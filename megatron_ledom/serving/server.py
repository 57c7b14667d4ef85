"""Load the models, then serve them until a signal ends the server."""

import logging
import signal
import sys

import uvicorn

from megatron_ledom.inference.engines.completions_client import is_loopback
from megatron_ledom.serving.app import build_app
from megatron_ledom.serving.metrics import Metrics
from megatron_ledom.serving.models import ServedModels
from megatron_ledom.serving.settings import ServeSettings

IDLE_SECONDS = 30
"""Time after which an idle connection is closed."""
SWITCH_SECONDS = 1e-4
"""Longest time that the event loop keeps the models' thread waiting. That thread asks for Python's lock after every operation of torch;
with Python's 5 ms it computes at a few per cent of its speed while the event loop is busy."""


def serve(settings: ServeSettings) -> None:
    """Serve until SIGTERM or SIGINT. Then accept no further request, finish those that run or wait, and return."""
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
    uvicorn.Server(config).run()
