"""Send the records of a run as OpenTelemetry metrics (OTLP over HTTP), with OpenTelemetry's own exporter.

Each record is sent once, with the time of its iteration: as gauges, and not through a meter, which would send the newest value again
and again. OpenTelemetry has no steps, so the iteration is a gauge as well.
"""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_ledom.callbacks.background_log import RejectedError, TimedRecord
from megatron_ledom.callbacks.run_ids import TRACKING_ID, kept_id, run_name
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.storage.records import Record

PATH = "/v1/metrics"
SCOPE = "megatron_ledom"
PREFIX = "ledom."
UNITS = {
    "tokens_per_second": "{token}/s",
    "_seconds": "s",
    "seconds_per_iteration": "s",
    "_seconds_min": "s",
    "_seconds_mean": "s",
    "_seconds_max": "s",
    "memory_gib": "GiBy",
    "bits_per_byte": "bit/By",
}
"""End of a name -> unit of UCUM."""
EXPORTER_LOGGER = "opentelemetry.exporter"
HEADER_LOGGER = "opentelemetry.util.re"
"""Logger that prints a header it cannot read, with its token."""
NOT_FOR_EVER = (401, 403, 404, 408, 429)
"""Refusals of a server that a change there, or time, can end."""
Value = tuple[str, dict[str, str], float]


def load_client() -> None:
    """Import OpenTelemetry's exporter: call it before training."""
    import opentelemetry.exporter.otlp.proto.http.metric_exporter
    import opentelemetry.sdk.metrics.export  # noqa: F401


class OtlpLog:
    """The exporter of one run. Headers, certificates and timeouts come from the variables OTEL_EXPORTER_OTLP_*."""

    def __init__(self, config: RunConfig) -> None:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.resources import Resource

        self._messages = _LastMessage()
        headers = logging.getLogger(HEADER_LOGGER)
        headers.filters = [_hide_header]
        endpoint = str(config.logging.otlp_endpoint).rstrip("/")
        self._exporter = OTLPMetricExporter(endpoint=endpoint.removesuffix(PATH) + PATH)
        run_id = kept_id(config.run_dir, TRACKING_ID)
        names = {"service.instance.id": run_id, "ledom.run.id": run_id, "ledom.run.name": run_name(config.run_dir)}
        if "OTEL_SERVICE_NAME" not in os.environ and "service.name=" not in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
            names["service.name"] = SCOPE
        self._resource = Resource.create(names)

    def send(self, records: Sequence[TimedRecord]) -> None:
        """Export records. Raises ConnectionError with the exporter's message if the collector does not take them.

        Raises RejectedError if it will never take them.
        """
        from opentelemetry.sdk.metrics.export import (
            Gauge,
            Metric,
            MetricExportResult,
            MetricsData,
            NumberDataPoint,
            ResourceMetrics,
            ScopeMetrics,
        )
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        points: dict[str, list[Any]] = {}
        for each in records:
            for name, attributes, value in values_of(each.record):
                points.setdefault(name, []).append(NumberDataPoint(attributes, 0, each.time_ns, value))
        metrics = [Metric(name, "", unit_of(name), Gauge(found)) for name, found in points.items()]
        scope = ScopeMetrics(InstrumentationScope(SCOPE), metrics, "")
        self._messages.text = ""
        result = self._exporter.export(MetricsData([ResourceMetrics(self._resource, [scope], "")]))
        if result is not MetricExportResult.SUCCESS:
            text = self._messages.text or "the export failed"
            code = re.search(r"code: (4\d\d)\b", text)
            raise RejectedError(text) if code and int(code[1]) not in NOT_FOR_EVER else ConnectionError(text)

    def close(self, is_complete: bool) -> None:
        """Close the connection."""
        self._exporter.shutdown()


def values_of(record: Record) -> Iterator[Value]:
    """Yield name, attributes and value of each number of a record.

    A number of a set, such as `validation` of `books`, has the name of its kind (`ledom.validation.lm_loss`) and the set as
    attribute, so that one query draws all sets.
    """
    for name, value in record.items():
        if isinstance(value, dict):
            for inner, found in value.items():
                if isinstance(found, dict):
                    yield from ((_name(name, key), {"set": inner}, each) for key, each in found.items() if _is_number(each))
                elif _is_number(found):
                    yield _name(name, inner), {}, found
        elif _is_number(value):
            yield _name(name), {}, value


def _hide_header(record: logging.LogRecord) -> bool:
    """Replace a message that contains a header, which may be a token."""
    record.msg, record.args = "a header in OTEL_EXPORTER_OTLP_HEADERS is not NAME=VALUE and is not sent", ()
    return True


def unit_of(name: str) -> str:
    """Return the unit of a metric, or an empty text."""
    return next((unit for end, unit in UNITS.items() if name.endswith(end)), "")


def _name(*parts: str) -> str:
    return PREFIX + re.sub(r"[^\w\-./]", "_", ".".join(parts), flags=re.ASCII)[:240]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


class _LastMessage(logging.Handler):
    """Keeps the exporter's last message, instead of a line in the log for each try."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text = ""
        logger = logging.getLogger(EXPORTER_LOGGER)
        logger.handlers, logger.propagate = [self], False

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message, unless it only says that there were several tries."""
        message = record.getMessage()
        if not self.text or "Transient error" in message or "code:" in message:
            self.text = message.replace("Transient error ", "")
