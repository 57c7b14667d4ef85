"""Prometheus metrics of one server."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """Counts of requests, tokens and seconds, and the sizes of queue and batches; each server has its own registry."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("ledom_requests", "Requests by endpoint and status", ["endpoint", "status"], registry=registry)
        self.request_seconds = Histogram(
            "ledom_request_seconds",
            "Seconds from a request to the end of its response",
            ["endpoint"],
            buckets=SECONDS,
            registry=registry,
        )
        self.waiting = Gauge("ledom_waiting_requests", "Requests that wait for the models", registry=registry)
        self.batch_rows = Histogram("ledom_batch_sequences", "Sequences in a batch", ["kind"], buckets=ROWS, registry=registry)
        self.batch_seconds = Histogram(
            "ledom_batch_seconds",
            "Seconds of a batch, with the wait for the one before it",
            ["kind"],
            buckets=SECONDS,
            registry=registry,
        )
        self.tokens = Counter("ledom_tokens", "Tokens that a model read or wrote", ["direction", "kind"], registry=registry)

    def as_text(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self._registry)
