"""Start the logs of a run that send its records to servers in the background: MLflow and OpenTelemetry."""

from megatron_ledom.callbacks.background_log import BackgroundLog
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.training.callback import TrainingRun


def start_trackers(run: TrainingRun) -> list[BackgroundLog]:
    """Return the logs that the config asks for. Imports their clients before training. Call on rank 0."""
    config = run.state.config
    if config.logging.mlflow_experiment is None and config.logging.otlp_endpoint is None:
        return []
    with run.pause("loading the clients of the trackers"):
        return _started(config)


def _started(config: RunConfig) -> list[BackgroundLog]:
    found = []
    if config.logging.mlflow_experiment is not None:
        from megatron_ledom.callbacks import mlflow_log

        mlflow_log.load_client()
        found.append(BackgroundLog("MLflow", lambda: mlflow_log.MlflowLog(config)))
    if config.logging.otlp_endpoint is not None:
        from megatron_ledom.callbacks import otlp_log

        otlp_log.load_client()
        found.append(BackgroundLog("the OpenTelemetry collector", lambda: otlp_log.OtlpLog(config)))
    return found
