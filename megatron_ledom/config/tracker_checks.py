"""Check the addresses of MLflow and OpenTelemetry: complete, of a kind that works, and without secrets."""

from collections.abc import Iterator
from urllib.parse import SplitResult, urlsplit

from megatron_ledom.config.schema import RunConfig

MLFLOW_VARIABLES = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_URI"
OTLP_VARIABLES = "OTEL_EXPORTER_OTLP_HEADERS"


def trackers(config: RunConfig) -> Iterator[str]:
    """Check the keys of MLflow and OpenTelemetry."""
    logs = config.logging
    if logs.mlflow_experiment is not None and not logs.mlflow_experiment.strip():
        yield "logging.mlflow_experiment is empty; give the name of an experiment, or remove it"
    if logs.mlflow_uri is not None and logs.mlflow_experiment is None:
        yield "logging.mlflow_uri without logging.mlflow_experiment has no effect; set the experiment too, or remove the address"
    if logs.mlflow_uri is not None:
        yield from _address("logging.mlflow_uri", logs.mlflow_uri, MLFLOW_VARIABLES, only_web=False)
    if logs.otlp_endpoint is not None:
        yield from _address("logging.otlp_endpoint", logs.otlp_endpoint, OTLP_VARIABLES, only_web=True)


def _address(key: str, address: str, variables: str, *, only_web: bool) -> Iterator[str]:
    """Check one address. The message never has the address: a wrong one may contain a password."""
    parts = _split(address)
    if parts is None or not address.strip():
        yield f"{key} is no address; expected one such as http://host:port"
        return
    if "@" in parts.netloc or parts.query or parts.fragment:
        yield (
            f"{key} contains a user, a query or a fragment, and the run folder, checkpoints and logs record the address; remove"
            f" it, and set {variables} in the environment"
        )
        return
    if only_web and (parts.scheme not in ("http", "https") or not parts.hostname):
        yield (
            f"{key}={address!r} is not the address of a web server; expected one such as http://collector:4318: metrics are"
            " sent over HTTP, not gRPC"
        )


def _split(address: str) -> SplitResult | None:
    """Return the parts of an address; None if it has a malformed host or port."""
    try:
        parts = urlsplit(address)
        _ = parts.port
    except ValueError:
        return None
    return parts
