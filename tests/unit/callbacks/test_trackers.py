"""MLflow and OpenTelemetry get the records of a run from their own clients; a server that is away delays and ends nothing."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.callbacks import background_log
from megatron_ledom.callbacks.background_log import BackgroundLog
from megatron_ledom.callbacks.mlflow_log import metric_name
from megatron_ledom.callbacks.otlp_log import OtlpLog, unit_of, values_of
from megatron_ledom.callbacks.run_ids import TRACKING_ID
from megatron_ledom.config.load import load_config
from tests.support.injected_errors import inject
from tests.support.tiny_runs import TinyData, free_port, read_metrics, run_on_ranks, start_ranks
from tests.support.tracking_servers import collecting, mlflow_server

SECRET = "hidden-0123456789"
ROLL_BACK = ("train.on_nonfinite=roll_back", "checkpoint.save_interval=2")


def use_variables(variables: Mapping[str, str], then: Callable[[], None] | None = None) -> None:
    """Set variables of the environment in a rank."""
    os.environ.update(variables)
    if then is not None:
        then()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the pauses between tries short."""
    monkeypatch.setattr(background_log, "FIRST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(background_log, "LONGEST_PAUSE_SECONDS", 0.1)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")


@pytest.fixture(scope="module")
def mlflow_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of an MLflow server."""
    pytest.importorskip("mlflow")
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as address:
        yield address


def otlp_log(data: TinyData, tmp_path: Path, address: str) -> BackgroundLog:
    """Return the log of a run at a collector."""
    (tmp_path / "run").mkdir()
    config = load_config(str(data.config), [f"run_dir={tmp_path}/run", f"logging.otlp_endpoint={address}"])
    return BackgroundLog("the collector", lambda: OtlpLog(config))


def until(is_so: Callable[[], Any]) -> None:
    end = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end, "not within 20 s"
        time.sleep(0.01)


def test_a_resumed_run_continues_the_series_that_its_first_launch_began(
    data: TinyData, tmp_path: Path, mlflow_address: str
) -> None:
    """The second launch rolls back from iteration 6 to 4: both programs get iteration 5 again, and the newest value counts."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(mlflow_address)
    run, statuses = tmp_path / "run", []
    validation = (f"data.valid_blend=[[1.0,{data.shard('reverse_valid')}]]", "train.eval_interval=3", "train.eval_iters=1")
    variables = {"OTEL_EXPORTER_OTLP_HEADERS": f"authorization=Bearer%20{SECRET}", "OTEL_RESOURCE_ATTRIBUTES": "team=reverse"}
    with collecting() as collector:
        settings = (f"logging.otlp_endpoint={collector.address}", "logging.mlflow_experiment=tiny", *ROLL_BACK, *validation)
        settings = (*settings, f"logging.mlflow_uri={mlflow_address}")
        for changed, error in (("train.exit_interval=3", None), ("optimizer.clip_grad=0.9", partial(inject, "nan:6"))):
            hook = partial(use_variables, variables, error)
            run_on_ranks(data.config, run, "train.train_iters=8", *settings, changed, hook=hook)
            (found,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
            statuses.append(found.info.status)
    records = read_metrics(run)
    assert [record["iteration"] for record in records] == list(range(1, 9))
    assert statuses == ["SCHEDULED", "FINISHED"]
    history = client.get_metric_history(found.info.run_id, "lm_loss")
    newest = {each.step: each.value for each in sorted(history, key=lambda each: each.timestamp)}
    assert newest == losses_of(records)
    assert len(history) > len(newest)
    assert found.data.metrics["iteration"] == 8
    (name,) = (key for key in found.data.metrics if key.startswith("validation/") and key.endswith("lm_loss"))
    assert found.data.metrics[name] == records[-1]["validation"][data.shard("reverse_valid")]["lm_loss"]
    assert found.data.params["model.hidden_size"] == "32"
    assert "data.tokenizer" not in found.data.params
    assert found.data.tags["changed.optimizer.clip_grad"] == "0.9"
    run_id = (run / TRACKING_ID).read_text().strip()
    assert found.data.tags["ledom.run_id"] == run_id
    check_collected(collector, records, data.shard("reverse_valid"), run_id)
    assert not [path for path in run.rglob("*.*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def losses_of(records: list[dict[str, Any]]) -> dict[int, float]:
    """Return iteration -> loss of the iterations that were not skipped."""
    return {record["iteration"]: record["lm_loss"] for record in records if record["lm_loss"] is not None}


def check_collected(collector: Any, records: list[dict[str, Any]], shard: str, run_id: str) -> None:
    """Check what a collector got of a run that was resumed and rolled back."""
    times = [at for at, _, _ in collector.points("ledom.iteration")]
    iterations = dict(zip(times, collector.values("ledom.iteration"), strict=True))
    assert {iterations[at]: loss for at, _, loss in collector.points("ledom.lm_loss")} == losses_of(records)
    assert len(iterations) > len(records)
    assert times == sorted(times)
    assert 0 <= time.time() - times[-1] / 1e9 < 300
    assert {tuple(sorted(each.items())) for each in collector.resources()} == {tuple(sorted(collector.resources()[0].items()))}
    resource = collector.resources()[0]
    assert (resource["service.name"], resource["ledom.run.name"], resource["team"]) == ("megatron_ledom", "run", "reverse")
    assert resource["ledom.run.id"] == resource["service.instance.id"] == run_id
    _, attributes, value = collector.points("ledom.validation.lm_loss")[-1]
    assert (attributes, value) == ({"set": shard}, records[-1]["validation"][shard]["lm_loss"])
    assert set(collector.paths) == {"/v1/metrics"}
    assert all(each["authorization"] == f"Bearer {SECRET}" for each in collector.headers)


@pytest.mark.usefixtures("quick")
def test_records_wait_for_a_collector_that_is_away_and_arrive_with_their_times(
    data: TinyData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    port = free_port()
    sender = otlp_log(data, tmp_path, f"http://127.0.0.1:{port}/")
    start = time.perf_counter()
    for iteration in (1, 2, 3):
        sender.write({"iteration": iteration, "lm_loss": 5.0 - iteration})
    written, longest = time.time_ns(), time.perf_counter() - start
    assert longest < 0.2
    until(lambda: "does not take the records" in caplog.text)
    time.sleep(0.3)
    with collecting(port) as collector:
        until(lambda: collector.requests)
        sender.write({"iteration": 4, "lm_loss": 1.0})
        sender.close()
    assert collector.values("ledom.lm_loss") == [4.0, 3.0, 2.0, 1.0]
    assert [at < written for at, _, _ in collector.points("ledom.lm_loss")] == [True, True, True, False]
    assert [record.levelname for record in caplog.records if record.name.startswith(("megatron", "opentel"))] == [
        "WARNING",
        "INFO",
    ]


@pytest.mark.usefixtures("quick")
def test_a_collector_that_never_answers_delays_the_end_by_a_bounded_time(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background_log, "CLOSE_SECONDS", 0.5)
    monkeypatch.setattr(background_log, "MOST_WAITING", 5)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "30")
    with collecting(pause=threading.Event()) as collector:
        sender = otlp_log(data, tmp_path, collector.address)
        sender.write({"iteration": 1})
        until(lambda: sender._sending)
        for iteration in range(2, 12):
            sender.write({"iteration": iteration})
        assert [each.record["iteration"] for each in sender._waiting] == [7, 8, 9, 10, 11]
        start = time.perf_counter()
        sender.close()
        assert 0.4 < time.perf_counter() - start < 3
    assert "the collector lacks 11 records" in caplog.text


@pytest.mark.usefixtures("quick")
def test_a_secret_that_a_server_repeats_is_not_logged(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"x-key={SECRET},authorization=Bearer%20{SECRET}2")
    with collecting(status=401, answer=f"no access for {SECRET} or {SECRET}2".encode()) as collector:
        sender = otlp_log(data, tmp_path, collector.address)
        sender.write({"iteration": 1})
        until(lambda: collector.headers)
        sender.close()
    assert collector.headers[0]["x-key"] == SECRET
    assert "does not take the records" in caplog.text
    assert "401" in caplog.text
    assert "hidden" not in caplog.text


@pytest.mark.usefixtures("quick")
def test_a_record_that_is_refused_takes_no_other_along(
    data: TinyData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with collecting(status=400, answer=b"out of bounds", refused=666.0) as collector:
        sender = otlp_log(data, tmp_path, collector.address)
        for iteration in range(1, 9):
            sender.write({"iteration": iteration, "lm_loss": 666.0 if iteration in (3, 4) else float(iteration)})
        until(lambda: collector.values("ledom.lm_loss")[-1:] == [8.0])
        sender.close()
    assert collector.values("ledom.lm_loss") == [1.0, 2.0, 5.0, 6.0, 7.0, 8.0]
    assert caplog.text.count("refuses a record") == 1
    assert "the collector lacks 2 records" in caplog.text


@pytest.mark.usefixtures("quick")
def test_a_header_that_cannot_be_read_is_not_printed(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"Authorization: Bearer {SECRET}")
    with collecting() as collector:
        sender = otlp_log(data, tmp_path, collector.address)
        sender.write({"iteration": 1})
        sender.close()
    assert "a header in OTEL_EXPORTER_OTLP_HEADERS is not NAME=VALUE" in caplog.text
    assert SECRET not in caplog.text


def test_a_run_trains_to_its_end_while_both_servers_are_away(data: TinyData, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    away = f"http://127.0.0.1:{free_port()}"
    settings = (f"logging.otlp_endpoint={away}", "logging.mlflow_experiment=tiny", f"logging.mlflow_uri={away}")
    variables = {"MLFLOW_TRACKING_TOKEN": SECRET, "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
    hook = partial(use_variables, variables)
    ranks = start_ranks(data.config, tmp_path / "run", "train.train_iters=3", *settings, hook=hook)
    assert ranks.wait() == [0], ranks.output()
    assert len(read_metrics(tmp_path / "run")) == 3
    for name in ("MLflow", "the OpenTelemetry collector"):
        assert ranks.output().count(f"{name} does not take the records") == 1
        assert f"{name} lacks 3 records" in ranks.output()
    assert "Traceback" not in ranks.output()
    assert SECRET not in ranks.output()


def test_names_are_those_that_mlflow_accepts(mlflow_address: str) -> None:
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

    client = MlflowClient(mlflow_address)
    run = client.create_run(client.create_experiment("names")).info.run_id
    long = "/".join(["validation", *["folder"] * 60, "lm_loss"])
    names = [
        "lm_loss",
        "validation//data/a/lm_loss",
        "validation/s3://a?b/../x/lm_loss",
        long,
        long.replace("folder", "f0lder"),
    ]
    client.log_batch(run, metrics=[Metric(metric_name(name), 1.0, 1, 1) for name in names])
    assert len(client.get_run(run).data.metrics) == len(names)
    assert metric_name(names[1]) == "validation/data/a/lm_loss"


def test_numbers_of_sets_have_the_set_as_attribute_and_a_unit() -> None:
    record = {
        "iteration": 3,
        "lm_loss": None,
        "validation": {"a b": {"lm_loss": 2.0}},
        "times": {"save": 1.0},
        "not_finite": ["x"],
    }
    assert list(values_of(record)) == [
        ("ledom.iteration", {}, 3),
        ("ledom.validation.lm_loss", {"set": "a b"}, 2.0),
        ("ledom.times.save", {}, 1.0),
    ]
    assert [unit_of(name) for name in ("ledom.eta_seconds", "ledom.tokens_per_second", "ledom.lm_loss")] == [
        "s",
        "{token}/s",
        "",
    ]
