"""Servers on this machine that take the metrics of a run: MLflow's own server code, and a collector that decodes OTLP."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from tests.support.local_server import QuietHandler, running


@dataclass
class Collector:
    """The requests that a collector has received, and its answers."""

    port: int = 0
    status: int = 200
    answer: bytes = b""
    paths: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    requests: list[ExportMetricsServiceRequest] = field(default_factory=list)
    refused: float | None = None
    """If given, a request with a point of this value gets `status`, and others are taken."""
    pause: threading.Event | None = None
    """If given, answers wait for it."""

    @property
    def address(self) -> str:
        """Return the address without the path of metrics."""
        return f"http://127.0.0.1:{self.port}"

    def resources(self) -> list[dict[str, str]]:
        """Return the resource attributes of each request."""
        return [
            {each.key: each.value.string_value for each in metrics.resource.attributes}
            for request in self.requests
            for metrics in request.resource_metrics
        ]

    def points(self, name: str) -> list[tuple[int, dict[str, str], float]]:
        """Return time in ns, attributes and value of each point of a metric, in order of arrival."""
        return [
            (point.time_unix_nano, {each.key: each.value.string_value for each in point.attributes}, _value(point))
            for request in self.requests
            for metrics in request.resource_metrics
            for scope in metrics.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.gauge.data_points
        ]

    def values(self, name: str) -> list[float]:
        """Return the values of a metric without attributes."""
        return [value for _, attributes, value in self.points(name) if not attributes]


def _value(point: Any) -> float:
    return float(point.as_int if point.WhichOneof("value") == "as_int" else point.as_double)


def has_value(request: ExportMetricsServiceRequest, value: float) -> bool:
    """Return True if a point of a request has this value."""
    scopes = [scope for metrics in request.resource_metrics for scope in metrics.scope_metrics]
    return any(_value(point) == value for scope in scopes for metric in scope.metrics for point in metric.gauge.data_points)


@contextmanager
def collecting(port: int = 0, **settings: Any) -> Iterator[Collector]:
    """Run a collector on a port; 0 takes a free one."""
    collector = Collector(**settings)

    class Handler(QuietHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if collector.pause is not None:
                collector.pause.wait(60)
            collector.paths.append(self.path)
            collector.headers.append(dict(self.headers.items()))
            request = ExportMetricsServiceRequest.FromString(body)
            is_taken = collector.status == 200 or (collector.refused is not None and not has_value(request, collector.refused))
            if is_taken:
                collector.requests.append(request)
            self.send_response(200 if is_taken else collector.status)
            self.send_header("Content-Length", str(len(collector.answer)))
            self.end_headers()
            self.wfile.write(collector.answer)

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    collector.port = server.server_port
    with running(server):
        try:
            yield collector
        finally:
            if collector.pause is not None:
                collector.pause.set()


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """Run the REST interface of MLflow's server over a new sqlite database; gives its address."""
    os.environ |= {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{folder / 'mlflow.db'}",
        "_MLFLOW_SERVER_ARTIFACT_ROOT": str(folder / "artifacts"),
    }
    from flask import Flask
    from mlflow.server import handlers
    from werkzeug.serving import make_server

    app = Flask("mlflow")
    for path, handler, methods in handlers.get_endpoints():
        app.add_url_rule(path, handler.__name__, handler, methods=methods)
    server = make_server("127.0.0.1", 0, app, threaded=True)
    handlers._get_tracking_store()  # makes the tables
    with running(server):
        yield f"http://127.0.0.1:{server.server_port}"
