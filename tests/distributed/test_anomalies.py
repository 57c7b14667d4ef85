"""Bad steps of real runs: the action of each policy, its repetition after a resume, and the bit-equal replay."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.support.injected_errors import inject
from tests.support.tiny_runs import Record, TinyData, curve, read_metrics, read_tensors, run_on_ranks, start_ranks, start_tool

STEPS = 20
BASE = (f"train.train_iters={STEPS}", "checkpoint.save_interval=5", "train.spike_window=8")
BAD = 13


def bad_steps(run_dir: Path) -> list[Record]:
    return [json.loads(line) for line in (run_dir / "bad_steps.jsonl").read_text(encoding="utf-8").splitlines()]


def check_same_weights(found: Path, expected: Path) -> None:
    tensors, wanted = read_tensors(found), read_tensors(expected)
    assert tensors.keys() == wanted.keys()
    assert any("exp_avg_sq" in name for name in tensors)
    assert not [name for name, tensor in tensors.items() if not torch.equal(tensor, wanted[name])]


@pytest.fixture(scope="module")
def skipping_run(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without injected errors that skips the bad iteration from the start."""
    run_dir = tmp_path_factory.mktemp("skipping") / "run"
    run_on_ranks(data.config, run_dir, *BASE, f"train.skip_iterations=[{BAD}]")
    return run_dir


def test_weights_that_are_not_finite_are_not_saved(data: TinyData, tmp_path: Path) -> None:
    """The step after them stops the run, which resumes from the previous checkpoint."""
    run_dir = tmp_path / "run"
    ranks = start_ranks(data.config, run_dir, *BASE, hook=partial(inject, "spoil:10"), num_ranks=2)
    assert ranks.wait() == [1, 1], ranks.output()
    assert "iteration 10 was not saved" in ranks.output()
    assert (run_dir / "checkpoints/latest").read_text() == "iter_0000005\n"
    assert bad_steps(run_dir)[0]["iteration"] == 11


@pytest.mark.parametrize("kind", ["nan", "gradient"])
def test_a_step_that_is_not_finite_stops_the_run_with_nothing_updated(data: TinyData, tmp_path: Path, kind: str) -> None:
    run_dir = tmp_path / "run"
    ranks = start_ranks(data.config, run_dir, *BASE, hook=partial(inject, f"{kind}:{BAD}"))
    assert ranks.wait() == [1], ranks.output()
    assert f"iteration {BAD}: the loss is" in ranks.output()
    assert f"train.skip_iterations=[{BAD}]" in ranks.output()
    assert (run_dir / "checkpoints/latest").read_text() == "iter_0000010\n"
    assert all(bool(torch.isfinite(tensor).all()) for tensor in read_tensors(run_dir).values() if tensor.is_floating_point())
    (bad,) = bad_steps(run_dir)
    assert [record["iteration"] for record in read_metrics(run_dir)] == list(range(1, BAD))
    assert (bad["iteration"], bad["action"], bad["first_sample"], bad["last_sample"]) == (
        BAD,
        "stop",
        8 * (BAD - 1),
        8 * BAD - 1,
    )
    assert [origin["sample"] for origin in bad["samples"]] == list(range(8 * (BAD - 1), 8 * BAD))
    assert {origin["source"] for origin in bad["samples"]} == {data.shard("reverse_train")}


@pytest.mark.parametrize(("kind", "key"), [("nan", "on_nonfinite"), ("gradient", "on_nonfinite"), ("spike", "on_spike")])
def test_a_skipped_step_updates_nothing_and_consumes_its_samples(
    data: TinyData, tmp_path: Path, skipping_run: Path, kind: str, key: str
) -> None:
    run_dir = tmp_path / "run"
    records = run_on_ranks(data.config, run_dir, *BASE, f"train.{key}=skip", hook=partial(inject, f"{kind}:{BAD}"))
    assert [record["iteration"] for record in records] == list(range(1, STEPS + 1))
    assert [record["skipped_iterations"] for record in records] == [0] * (BAD - 1) + [1] * (STEPS - BAD + 1)
    wanted = read_metrics(skipping_run)
    assert curve(records[BAD:]) == curve(wanted[BAD - 1 :])  # the run that skips it has no record of it
    assert records[-1]["lr"] == wanted[-1]["lr"]
    check_same_weights(run_dir, skipping_run)
    if kind == "nan":
        assert records[BAD - 1]["lm_loss"] is None


def test_a_warned_spike_is_updated_and_recorded(data: TinyData, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    records = run_on_ranks(data.config, run_dir, *BASE, hook=partial(inject, f"spike:{BAD}"))
    (bad,) = bad_steps(run_dir)
    assert (bad["iteration"], bad["action"]) == (BAD, "warn")
    assert bad["score"] > 8
    assert records[-1]["skipped_iterations"] == 0


DISTRIBUTED = (
    "parallel.use_distributed_optimizer=true",
    "parallel.overlap_grad_reduce=true",
    "parallel.overlap_param_gather=true",
)


@pytest.mark.parametrize(("num_ranks", "settings"), [(1, ()), (2, DISTRIBUTED)])
def test_a_return_to_the_checkpoint_equals_a_run_that_skips_the_iteration(
    data: TinyData, tmp_path: Path, skipping_run: Path, num_ranks: int, settings: tuple[str, ...]
) -> None:
    run_dir, whole = tmp_path / "run", skipping_run
    if num_ranks > 1:
        whole = tmp_path / "whole"
        run_on_ranks(data.config, whole, *BASE, *settings, f"train.skip_iterations=[{BAD}]", num_ranks=num_ranks)
    command = (*BASE, *settings, "train.on_nonfinite=roll_back", "train.exit_interval=14")
    first = run_on_ranks(data.config, run_dir, *command, num_ranks=num_ranks, hook=partial(inject, f"nan:{BAD}"))
    assert [record["iteration"] for record in first] == [*range(1, BAD), 14]
    assert json.loads((run_dir / "skip_iterations.json").read_text()) == {"iterations": [BAD], "roll_backs": {"10": 1}}
    run_on_ranks(data.config, run_dir, *command, num_ranks=num_ranks)
    assert curve(read_metrics(run_dir)) == curve(read_metrics(whole))
    assert read_metrics(run_dir)[-1]["skipped_iterations"] == 1
    check_same_weights(run_dir, whole)


def test_a_resume_between_a_return_and_the_next_checkpoint_skips_the_same(
    data: TinyData, tmp_path: Path, skipping_run: Path
) -> None:
    """The run stops right after the return, before any save; the list of iterations is in the run folder."""
    run_dir = tmp_path / "run"
    command = (*BASE, "train.on_nonfinite=roll_back")
    ranks = start_ranks(data.config, run_dir, *command, hook=partial(inject, f"nan:{BAD},exit:{BAD - 1}:0:2"))
    assert ranks.wait() == [9], ranks.output()
    assert (run_dir / "checkpoints/latest").read_text() == "iter_0000010\n"
    run_on_ranks(data.config, run_dir, *command)
    assert curve(read_metrics(run_dir)) == curve(read_metrics(skipping_run))
    check_same_weights(run_dir, skipping_run)


def test_returns_and_skips_end_at_their_limits(data: TinyData, tmp_path: Path) -> None:
    every = ",".join(f"nan:{number}" for number in range(6, 21))
    for name, settings, last in (
        ("back", ["on_nonfinite=roll_back", "max_roll_backs=2"], 8),
        ("skip", ["on_nonfinite=skip", "max_skips=3"], 9),
    ):
        run_dir = tmp_path / name
        ranks = start_ranks(
            data.config, run_dir, *BASE, *[f"train.{setting}" for setting in settings], hook=partial(inject, every)
        )
        assert ranks.wait() == [1], ranks.output()
        assert bad_steps(run_dir)[-1]["iteration"] == last
        assert f"iteration {last}: the loss is nan" in ranks.output()


@pytest.mark.parametrize(
    ("num_ranks", "settings"), [(1, ()), (2, ("parallel.tensor_model_parallel_size=2",)), (2, DISTRIBUTED)]
)
def test_the_replay_of_a_bad_step_gives_its_numbers_bit_for_bit(
    data: TinyData, tmp_path: Path, num_ranks: int, settings: tuple[str, ...]
) -> None:
    """This holds after a resume, and although only the newest checkpoint is kept."""
    run_dir, error = tmp_path / "run", f"spike:{BAD}"
    policy = f"train.on_spike={'roll_back' if num_ranks > 1 else 'skip'}"
    command = (*BASE, *settings, policy, "checkpoint.keep_last=1", "train.exit_interval=14")
    for _ in range(2):
        run_on_ranks(data.config, run_dir, *command, num_ranks=num_ranks, hook=partial(inject, error))
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["iter_0000010", "iter_0000020", "latest"]
    before = sorted((path, path.stat().st_mtime_ns) for path in run_dir.rglob("*"))
    arguments = ["--run", str(run_dir), "--iteration", str(BAD), "--show", "1"]
    replay = start_tool(
        "tools/replay_step.py", arguments, tmp_path / "replay.log", num_ranks=num_ranks, hook=partial(inject, error)
    )
    assert replay.wait() == [0] * num_ranks, replay.output()
    output = replay.output()
    assert "equal bit for bit" in output
    assert str(bad_steps(run_dir)[0]["grad_norm"]) in output
    assert "iter_0000010" in output
    assert sorted((path, path.stat().st_mtime_ns) for path in run_dir.rglob("*")) == before
    healthy = start_tool("tools/replay_step.py", arguments, tmp_path / "healthy.log", num_ranks=num_ranks)
    assert healthy.wait() == [1] * num_ranks  # without the injected error the step differs, and the tool reports it
    assert "NOT equal" in healthy.output()


def test_the_replay_refuses_another_number_of_ranks_and_other_iterations(data: TinyData, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_on_ranks(data.config, run_dir, "train.train_iters=3")
    for iteration, num_ranks, message in (("9", 1, "it can be 1 to 3"), ("2", 2, "was done on 1 ranks, but 2 are launched")):
        arguments = ["--run", str(run_dir), "--iteration", iteration]
        replay = start_tool("tools/replay_step.py", arguments, tmp_path / "replay.log", num_ranks=num_ranks)
        assert replay.wait() == [2] * num_ranks
        assert message in replay.output()


def list_files(folder: Path) -> list[tuple[Path, int]]:
    return sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))


def test_a_replay_uses_ranks_and_config_of_the_launch_that_did_the_step(data: TinyData, tmp_path: Path) -> None:
    """A later launch had another learning rate and more ranks. A long replay is refused without --allow-long."""
    run_dir = tmp_path / "run"
    command = ("train.train_iters=5", "checkpoint.save_interval=2")
    run_on_ranks(data.config, run_dir, *command, "train.exit_interval=3")
    run_on_ranks(data.config, run_dir, *command, "optimizer.lr=1e-3", num_ranks=2)
    shutil.rmtree(run_dir / "checkpoints/iter_0000002")
    arguments = ["--run", str(run_dir), "--iteration", "3"]
    for more, code, message in (([], 2, "repeat 3 steps"), (["--allow-long"], 0, "initial weights, iteration 0: 3 steps")):
        replay = start_tool("tools/replay_step.py", [*arguments, *more], tmp_path / "replay.log")
        assert replay.wait() == [code], replay.output()
        assert message in replay.output()
    assert "equal bit for bit" in replay.output()


def test_a_replay_builds_a_missing_index_outside_the_run_folder(data: TinyData, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_on_ranks(data.config, run_dir, "train.train_iters=3", "data.path_to_cache=null", num_ranks=2)
    arguments = ["--run", str(run_dir), "--iteration", "2", "--show", "1"]
    for gone in (*(run_dir / "index_cache").glob("*.index"), run_dir / "index_cache"):
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
        before = list_files(run_dir)
        replay = start_tool("tools/replay_step.py", arguments, tmp_path / "replay.log", num_ranks=2)
        assert replay.wait() == [0, 0], replay.output()
        assert "equal bit for bit" in replay.output()
        assert list_files(run_dir) == before
