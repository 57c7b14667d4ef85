"""Addresses of trackers are refused if they are incomplete, have no effect, or contain a secret; messages repeat no secret."""

from pathlib import Path

import pytest

from megatron_ledom.config.load import load_config
from megatron_ledom.config.tracker_checks import trackers
from tests.support.tiny_runs import TinyData

MLFLOW = "logging.mlflow_experiment=tiny"
WITH_SECRET = "contains a user, a query or a fragment"


def problems(data: TinyData, tmp_path: Path, *settings: str) -> list[str]:
    return list(trackers(load_config(str(data.config), [f"run_dir={tmp_path}/run", *settings])))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["logging.mlflow_experiment=' '"], "logging.mlflow_experiment is empty"),
        (["logging.mlflow_uri=http://host"], "logging.mlflow_uri without logging.mlflow_experiment has no effect"),
        ([MLFLOW, "logging.mlflow_uri=https://me:hidden@host"], f"logging.mlflow_uri {WITH_SECRET}"),
        ([MLFLOW, "logging.mlflow_uri='postgresql://me:hidden@host/db'"], "MLFLOW_TRACKING_URI in the environment"),
        ([MLFLOW, "logging.mlflow_uri=''"], "logging.mlflow_uri is no address"),
        (["logging.otlp_endpoint=https://hidden@host"], "OTEL_EXPORTER_OTLP_HEADERS in the environment"),
        (["logging.otlp_endpoint='https://host/x?api-key=hidden'"], f"logging.otlp_endpoint {WITH_SECRET}"),
        (["logging.otlp_endpoint=http://host:notaport"], "logging.otlp_endpoint is no address"),
        (["logging.otlp_endpoint=grpc://host:4317"], "over HTTP, not gRPC"),
        (["logging.otlp_endpoint=host:4318"], "expected one such as http://collector:4318"),
    ],
)
def test_an_address_that_cannot_work_or_has_a_secret_is_refused(
    data: TinyData, tmp_path: Path, settings: list[str], sentence: str
) -> None:
    (found,) = problems(data, tmp_path, *settings)
    assert sentence in found
    assert "hidden" not in found


@pytest.mark.parametrize(
    "settings",
    [
        [MLFLOW],
        [MLFLOW, "logging.mlflow_uri=http://mlflow:5000"],
        [MLFLOW, "logging.mlflow_uri=sqlite:////scratch/mlflow.db"],
        [MLFLOW, "logging.mlflow_uri=databricks"],
        ["logging.otlp_endpoint=http://[::1]:4318/"],
        ["logging.otlp_endpoint=https://host/otlp/v1/metrics"],
    ],
)
def test_an_address_that_works_passes(data: TinyData, tmp_path: Path, settings: list[str]) -> None:
    assert problems(data, tmp_path, *settings) == []
