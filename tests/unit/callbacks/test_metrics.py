"""The records of a run: bits per byte and MFU as counted by hand, each iteration once, the same values in every log."""

import gzip
import json
import math
import subprocess
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_ledom.callbacks import metrics, timing
from megatron_ledom.callbacks.metrics import MetricsWriter, wandb_run_id
from megatron_ledom.callbacks.tasks import add_task_results
from megatron_ledom.callbacks.timing import Throughput
from megatron_ledom.callbacks.validation import add_results, bits_per_byte
from megatron_ledom.config.load import load_config
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.data.shards.shard import load_manifest
from megatron_ledom.errors import NotFiniteError
from megatron_ledom.platform.device import Platform
from megatron_ledom.storage.records import Record, append_record
from megatron_ledom.training.history import git_state, read_bad_steps, read_launches
from megatron_ledom.training.step_policy import Action, StepResult, Verdict
from tests.support.injected_errors import inject
from tests.support.tiny_runs import TinyData, read_metrics, run_on_ranks, start_ranks

CPU = Platform(torch.device("cpu"), "gloo", 1)
RESULT = StepResult(3.0, 1.0, Verdict(Action.UPDATE))


@pytest.fixture
def config(data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A config whose run folder exists; this process is rank 0."""
    monkeypatch.setattr(metrics.dist, "get_rank", lambda: 0)
    (tmp_path / "run").mkdir()
    return load_config(str(data.config), [f"run_dir={tmp_path / 'run'}", "logging.peak_tflops=2.0"])


def record(iteration: int, lm_loss: float) -> dict[str, Any]:
    validation = {"some/prefix": {"lm_loss": lm_loss + 1, "bits_per_byte": 0.5}}
    return {"iteration": iteration, "lm_loss": lm_loss, "grad_norm": 1.0, "validation": validation}


def lines(config: RunConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(config.run_dir, "metrics.jsonl").read_text().splitlines()]


def test_bits_per_byte_by_hand() -> None:
    """One bit per token, and 6 tokens (with eods) for 4 bytes of text: 1.5 bits per byte."""
    assert bits_per_byte(math.log(2), 4 / 6) == pytest.approx(1.5)
    assert bits_per_byte(3 * math.log(2), 4.0) == pytest.approx(0.75)


def test_a_run_reports_the_keys_that_scripts_rely_on(data: TinyData, tmp_path: Path) -> None:
    shard = data.shard("reverse_valid")
    validation = (f"data.valid_blend=[[1.0,{shard}]]", "train.eval_interval=3", "train.eval_iters=2")
    settings = ("train.train_iters=5", "logging.log_interval=2", "logging.tensorboard=true", *validation)
    records = run_on_ranks(data.config, tmp_path / "run", *settings)
    assert [found["iteration"] for found in records] == [2, 3, 4, 5]  # at the interval, at validations, at the end
    keys = """iteration lm_loss grad_norm lr consumed_train_samples consumed_train_tokens tokens_per_second
        seconds_per_iteration mfu elapsed_seconds eta_seconds rank_seconds_min rank_seconds_mean rank_seconds_max slowest_rank
        data_wait_seconds memory_gib skipped_iterations"""
    assert all(list(found) == [*keys.split(), *(["validation"] if "validation" in found else [])] for found in records)
    assert [found["consumed_train_samples"] for found in records] == [16, 24, 32, 40]
    assert records[-1]["consumed_train_tokens"] == 40 * 32
    assert [found["iteration"] for found in records if "validation" in found] == [3, 5]
    assert "test" not in records[-1]
    result, manifest = records[-1]["validation"][shard], load_manifest(shard)
    by_hand = result["lm_loss"] / math.log(2) * manifest.num_tokens / manifest.text_bytes
    assert result["bits_per_byte"] == pytest.approx(by_hand)
    assert (tmp_path / "run/config.yaml").exists()
    board = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [(e.step, pytest.approx(e.value)) for e in board.Scalars("lm_loss")] == [
        (found["iteration"], found["lm_loss"]) for found in records
    ]


def test_a_split_run_reports_its_held_out_documents_and_tests_them_once_at_the_end(data: TinyData, tmp_path: Path) -> None:
    named = f"data.train_blend=[[1,{data.shard('reverse_train')}]]"
    settings = (named, "data.split=[6,2,2]", "train.eval_interval=2", "train.eval_iters=2", "logging.tensorboard=true")
    records = run_on_ranks(data.config, tmp_path / "run", "train.train_iters=4", *settings)
    assert [found["iteration"] for found in records if "validation" in found] == [2, 4]
    assert [found["iteration"] for found in records if "test" in found] == [4]
    manifest = load_manifest(data.shard("reverse_train"))
    for kind, name in (("validation", "valid"), ("test", "test")):
        assert list(records[-1][kind]) == [name]
        result = records[-1][kind][name]
        by_hand = result["lm_loss"] / math.log(2) * manifest.num_tokens / manifest.text_bytes
        assert result["bits_per_byte"] == pytest.approx(by_hand)
    assert records[-1]["validation"]["valid"]["lm_loss"] != records[-1]["test"]["test"]["lm_loss"]
    board = EventAccumulator(str(tmp_path / "run/tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("test/test/lm_loss")] == [4]


def test_throughput_by_hand(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    config.train.global_batch_size, config.train.train_iters = 10, 12  # 320 tokens an iteration
    state: Any = SimpleNamespace(config=config, provenance=SimpleNamespace(vocab_size=1001), platform=CPU, iteration=2)
    state.last_batch_size = config.train.global_batch_size
    run: Any = SimpleNamespace(state=state)
    throughput = Throughput()
    throughput.start(state, world_size=2)
    throughput.on_step_end(run, RESULT)
    throughput.on_step_end(run, RESULT)
    clock[0] += 7.0
    throughput.on_pause_end(run, 3.0)  # a save: its time does not count as training
    read: Record = {}
    throughput.on_measure(run, read)
    assert read["tokens_per_second"] == 160.0
    # by hand, for one token: 6 FLOP per weight (two layers, output layer), and attention over all 32 positions
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64
    flops = 6 * (2 * layer + 32 * 1024) + 2 * 12 * 32 * 32
    assert read["mfu"] == pytest.approx(160 * flops / (2 * 2e12))
    assert read["elapsed_seconds"] == 7.0
    assert read["seconds_per_iteration"] == 2.0
    assert read["eta_seconds"] == 20.0
    throughput.on_step_end(run, RESULT)
    throughput.on_step_end(run, None)  # a skipped iteration
    clock[0] += 5.0
    throughput.on_measure(run, read)
    assert (read["tokens_per_second"], read["seconds_per_iteration"]) == (64.0, 2.5)


@pytest.mark.distributed
def test_a_slow_rank_is_named(data: TinyData, tmp_path: Path) -> None:
    """Each of the four forward passes of a step sleeps 0.05 s on rank 1; rank 0 waits only in the gradient reduction."""
    settings = ("train.train_iters=4", "logging.log_interval=2")
    ranks = start_ranks(data.config, tmp_path / "run", *settings, num_ranks=2, hook=partial(inject, "slow:1:1"))
    assert ranks.wait() == [0, 0], ranks.output()
    for record in read_metrics(tmp_path / "run"):
        assert record["slowest_rank"] == 1
        assert record["rank_seconds_max"] - record["rank_seconds_min"] > 0.1
        assert record["rank_seconds_max"] <= record["seconds_per_iteration"]
    assert "rank 1 slower by" in ranks.log.read_text()


@pytest.mark.distributed
def test_a_profile_of_the_configured_iterations_and_ranks_is_written(data: TinyData, tmp_path: Path) -> None:
    window = ("logging.profile_start=2", "logging.profile_stop=3", "logging.profile_ranks=[1]")
    run_on_ranks(data.config, tmp_path / "run", "train.train_iters=4", *window, num_ranks=2)
    (trace,) = (tmp_path / "run/profile").iterdir()
    assert trace.name == "rank_1_iterations_2_to_3.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any("scaled_dot_product" in event.get("name", "") for event in events)


def test_a_run_folder_records_its_launches(data: TinyData, tmp_path: Path) -> None:
    for train_iters in (3, 4):
        run_on_ranks(data.config, tmp_path / "run", f"train.train_iters={train_iters}")
    launches = read_launches(str(tmp_path / "run"))
    assert len(launches) == 2
    assert launches[0]["world_size"] == 1
    assert [launch["from_iteration"] for launch in launches] == [0, 3]
    assert launches[0]["config"]["train"]["train_iters"] == 3
    assert launches[0]["versions"]["torch"] == torch.__version__
    assert launches[0]["versions"]["megatron-core"] == version("megatron-core")
    assert launches[0]["command"]


def test_the_state_of_the_source_is_that_of_git(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    commands = ["init -q", "-c user.name=a -c user.email=a@b commit -q --allow-empty -m x"]
    for command in commands:
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    clean = git_state(tmp_path)
    assert clean is not None
    assert (len(clean["commit"]), clean["dirty"]) == (40, False)
    (tmp_path / "file").write_text("x")
    subprocess.run(["git", "add", "file"], cwd=tmp_path, check=True)
    changed = git_state(tmp_path)
    assert changed is not None
    assert (changed["dirty"], changed["changed"]) == (True, ["file"])


def test_lines_of_steps_that_a_kill_undid_are_dropped(config: RunConfig) -> None:
    path = Path(config.run_dir, "metrics.jsonl")
    path.write_text("".join(json.dumps(record(i, 5.0)) + "\n" for i in (1, 2, 3, 4)) + '{"iteration": 5, "lm_lo')
    writer = MetricsWriter(config, 2)
    assert [found["iteration"] for found in lines(config)] == [1, 2]
    writer.write(record(3, 4.0))
    writer.close()
    assert [(found["iteration"], found["lm_loss"]) for found in lines(config)] == [(1, 5.0), (2, 5.0), (3, 4.0)]
    assert [path.name for path in Path(config.run_dir).iterdir()] == ["metrics.jsonl"]


def test_a_record_is_not_appended_to_an_incomplete_line(tmp_path: Path) -> None:
    path = tmp_path / "bad_steps.jsonl"
    for torn in ("", '{"iteration": 9', '{"iteration": 1}\n{"iteration": 9, "lm_lo'):
        path.write_text(torn)
        append_record(str(path), {"iteration": 2})
        append_record(str(path), {"iteration": 3})
        numbers = [found["iteration"] for found in read_bad_steps(str(tmp_path))]
        assert numbers == ([1, 2, 3] if "\n" in torn else [2, 3])


def test_only_rank_0_writes(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics.dist, "get_rank", lambda: 1)
    writer = MetricsWriter(config, 0)
    writer.write(record(1, 5.0))
    writer.close()
    assert list(Path(config.run_dir).iterdir()) == []


def test_tensorboard_has_the_values_and_drops_undone_iterations(config: RunConfig) -> None:
    config.logging.tensorboard = True
    for start, iterations, loss in ((0, (1, 2, 3, 4), 5.0), (2, (3, 4), 4.0)):
        writer = MetricsWriter(config, start)
        for iteration in iterations:
            writer.write(record(iteration, loss))
        writer.close()
    board = EventAccumulator(str(Path(config.run_dir, "tensorboard"))).Reload()
    assert [(event.step, event.value) for event in board.Scalars("lm_loss")] == [(1, 5.0), (2, 5.0), (3, 4.0), (4, 4.0)]
    assert [event.value for event in board.Scalars("validation/some/prefix/lm_loss")] == [6.0, 6.0, 5.0, 5.0]


def test_weights_and_biases_offline_gets_the_records(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config.logging.wandb_mode = "offline"
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged: list[tuple[int, float]] = []
    config.logging.wandb_project = "tiny"
    writer = MetricsWriter(config, 0)
    log = wandb.Run.log
    monkeypatch.setattr(
        wandb.Run, "log", lambda self, data, step: (logged.append((step, data["lm_loss"])), log(self, data, step=step))
    )
    writer.write(record(1, 5.0))
    writer.close()
    assert logged == [(1, 5.0)]
    run_id = wandb_run_id(config.run_dir)
    assert list(Path(config.run_dir, "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))


def test_runs_of_one_name_have_two_wandb_ids_and_a_resumed_run_has_one(tmp_path: Path) -> None:
    found = []
    for name in ("a", "b", "a"):
        (tmp_path / name / "reverse").mkdir(parents=True, exist_ok=True)
        found.append(wandb_run_id(str(tmp_path / name / "reverse")))
    assert found[0] == found[2] != found[1]


def test_results_that_are_not_finite_are_named_and_not_recorded(caplog: pytest.LogCaptureFixture) -> None:
    record: Record = {"iteration": 7}
    found = {"a": {"lm_loss": 2.0, "bits_per_byte": 1.0}, "b": {"lm_loss": math.nan, "bits_per_byte": math.nan}}
    add_results(record, "validation", found)

    def evaluate_tasks() -> dict[str, dict[str, float]]:
        raise NotFiniteError("token 3 of item 5")

    add_task_results(record, evaluate_tasks)
    assert record == {"iteration": 7, "validation": {"a": found["a"]}, "not_finite": ["validation/b", "tasks"]}
    assert "iteration 7: validation of b is not finite" in caplog.text
    assert "token 3 of item 5" in caplog.text
