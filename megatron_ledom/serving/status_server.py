"""The web page of `ledom status --serve`: the status of runs, read again at each refresh."""

import json
import logging
import signal
import sys
import threading
import time
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.responses import JSONResponse

from megatron_ledom import __version__
from megatron_ledom.errors import UsageError
from megatron_ledom.inference.engines.completions_client import is_loopback
from megatron_ledom.monitoring.runs import RunReader
from megatron_ledom.monitoring.table import as_fields
from megatron_ledom.serving.host_names import other_name
from megatron_ledom.serving.page_files import page_router, read_page

SHARED = ("style.css", "dom.js", "theme.js", "icon.svg")
"""Files that the page has in common with that of `ledom serve`."""
KEPT_SECONDS = 2.0
"""Seconds for which a status is given to further requests."""


class StatusBoard:
    """The status of the runs; requests that come together share one reading."""

    def __init__(self, reader: RunReader) -> None:
        self._reader, self._lock = reader, threading.Lock()
        self._read_at, self._fields = -KEPT_SECONDS, list[dict[str, Any]]()

    def read(self) -> list[dict[str, Any]]:
        """Return the fields of each run, at most KEPT_SECONDS old. Raise UsageError for too many runs."""
        with self._lock:
            if time.monotonic() - self._read_at > KEPT_SECONDS:
                self._fields = [as_fields(run) for run in self._reader.read()]
                self._read_at = time.monotonic()
            return self._fields


def build_status_app(reader: RunReader, host: str) -> FastAPI:
    """Return the application. host: the address to listen on."""
    app = FastAPI(title="ledom status", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    board = StatusBoard(reader)

    @app.middleware("http")
    async def check_host(request: Request, call_next: Any) -> Response:
        """Refuse another name of a server that only this machine reaches."""
        wrong = other_name(request.scope, host)
        if wrong is not None:
            return JSONResponse({"error": f"this server answers to localhost, found the host {wrong}"}, status_code=400)
        answer: Response = await call_next(request)
        return answer

    @app.get("/api/status")
    def status() -> Response:
        """Return the status of every run, with the fields of `ledom status --json`."""
        try:
            runs = board.read()
        except UsageError as error:
            return JSONResponse({"error": str(error)}, status_code=500)
        text = json.dumps({"at": time.time(), "runs": runs}, allow_nan=False)  # ASCII: the name of a folder may be no UTF-8
        return Response(text, media_type="application/json", headers={"Cache-Control": "no-store"})

    app.include_router(page_router(read_page("status_page", SHARED)))
    return app


def serve_status(reader: RunReader, *, host: str, port: int) -> None:
    """Serve the page until SIGTERM or SIGINT."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    if not is_loopback(host):
        print(f"warning: everybody who reaches {host}:{port} can see the runs", file=sys.stderr)
    app = build_status_app(reader, host)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # uvicorn handles it while it serves, and then raises it once more
    uvicorn.Server(uvicorn.Config(app, host=host, port=port, access_log=False, log_config=None, server_header=False)).run()
