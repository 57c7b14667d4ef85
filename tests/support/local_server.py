"""A server of this machine in a thread."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from socketserver import BaseServer
from typing import Any


class QuietHandler(BaseHTTPRequestHandler):
    """A handler of HTTP that prints nothing."""

    def log_message(self, *arguments: Any) -> None:
        """Print nothing."""


@contextmanager
def running(server: BaseServer) -> Iterator[None]:
    """Run a server inside the context."""
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
