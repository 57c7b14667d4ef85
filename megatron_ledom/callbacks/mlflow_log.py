"""Send the records of a run to MLflow, with MLflow's own client."""

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_ledom.callbacks.background_log import RejectedError, TimedRecord, flatten
from megatron_ledom.callbacks.run_ids import TRACKING_ID, kept_id, run_name
from megatron_ledom.config.load import published
from megatron_ledom.config.problems import first_line
from megatron_ledom.config.schema import RunConfig

log = logging.getLogger(__name__)

RUN_TAG = "ledom.run_id"
"""Tag of an MLflow run with the id that the run folder keeps: a resumed run finds its MLflow run by it."""
METRICS_AT_ONCE, PARAMS_AT_ONCE, LONGEST_NAME, LONGEST_VALUE = 1000, 100, 250, 500
"""Limits of MLflow's server; the last one is that of its older versions."""
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # MLflow 3 reports its use to its makers
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # BackgroundLog tries again, and quietly
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
"""Variables of MLflow's client, unless the environment sets them."""
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


def load_client() -> None:
    """Import MLflow's client, which takes seconds: call it before training."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow.tracking  # noqa: F401


class MlflowLog:
    """The MLflow run of a training run."""

    def __init__(self, config: RunConfig) -> None:
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=config.logging.mlflow_uri)
        experiment = self._experiment(str(config.logging.mlflow_experiment))
        kept = kept_id(config.run_dir, TRACKING_ID)
        found = self._client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{kept}'", max_results=1)
        run = (
            found[0] if found else self._client.create_run(experiment, tags={RUN_TAG: kept}, run_name=run_name(config.run_dir))
        )
        self._run_id: str = run.info.run_id
        self._client.update_run(self._run_id, status="RUNNING")
        self._log_settings(dict(_settings(published(config))), run.data.params)

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        return str(self._client.create_experiment(name) if found is None else found.experiment_id)

    def _log_settings(self, settings: Mapping[str, str], known: Mapping[str, str]) -> None:
        """Log new settings as parameters; MLflow's cannot change, so a changed one becomes a tag."""
        from mlflow.entities import Param, RunTag
        from mlflow.exceptions import MlflowException

        new = [Param(name, value) for name, value in settings.items() if name not in known]
        changed = [RunTag(f"changed.{name}", value) for name, value in settings.items() if known.get(name, value) != value]
        try:
            for params in _parts(new, PARAMS_AT_ONCE):
                self._client.log_batch(self._run_id, params=params)
            for tags in _parts(changed, PARAMS_AT_ONCE):
                self._client.log_batch(self._run_id, tags=tags)
        except MlflowException as error:
            if error.error_code not in REFUSALS:
                raise
            log.warning("MLflow refuses the settings of the run (%s); its metrics are sent without them", first_line(error))

    def send(self, records: Sequence[TimedRecord]) -> None:
        """Log the numbers of records, with the iteration as the step. Raises RejectedError if the server refuses them."""
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        metrics = [
            Metric(metric_name(name), value, each.time_ns // 1_000_000, int(each.record["iteration"]))
            for each in records
            for name, value in flatten(each.record).items()
        ]
        try:
            for part in _parts(metrics, METRICS_AT_ONCE):
                self._client.log_batch(self._run_id, metrics=part)
        except MlflowException as error:
            if error.error_code in REFUSALS:
                raise RejectedError(str(error)) from error
            raise

    def close(self, is_complete: bool) -> None:
        """Set the status: finished, or scheduled for a run that can be resumed."""
        if is_complete:
            self._client.set_terminated(self._run_id, "FINISHED")  # with the time of the end
        else:
            self._client.update_run(self._run_id, status="SCHEDULED")


def metric_name(name: str) -> str:
    """Return a name that MLflow accepts: no other characters, no part of a path that is empty or dots, and not too long."""
    parts = [part for part in re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII).split("/") if part.strip(".")]
    joined = "/".join(parts)
    if len(joined) <= LONGEST_NAME:
        return joined
    first, last = parts[0], parts[-1]
    return f"{first}/{hashlib.sha256(name.encode()).hexdigest()[:16]}/{last}"[:LONGEST_NAME]


def _settings(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", str(value)[:LONGEST_VALUE]


def _parts(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
