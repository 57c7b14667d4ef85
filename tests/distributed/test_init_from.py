"""A run that starts from another run's checkpoint (`init_from`): weights, optimizer and position, in any layout, checked first."""

import json
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_ledom.checkpoint.folder import latest_checkpoint
from megatron_ledom.checkpoint.manifest import load_manifest
from megatron_ledom.training.origin import FILE, read_chain
from tests.support.tiny_runs import (
    Record,
    TinyData,
    curve,
    read_metrics,
    read_tensors,
    run_command,
    run_on_ranks,
    start_ranks,
)

COMMON = ("train.train_iters=8", "checkpoint.save_interval=4", "optimizer.lr_decay_style=constant")
FOURTH = "checkpoints/iter_0000004"
TP, PP = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"


@pytest.fixture(scope="module")
def base(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete run of one process, with a checkpoint in its middle."""
    run_dir = tmp_path_factory.mktemp("base") / "base"
    run_on_ranks(data.config, run_dir, *COMMON)
    return run_dir


def started_only(config_file: str, overrides: list[str]) -> None:
    """Start a run as a rank, and save its state at once, without a step."""
    from megatron_ledom import pretrain
    from megatron_ledom.training import trainer

    def save_at_once(state: object, *_: object) -> None:
        trainer.save_checkpoint(state)  # type: ignore[arg-type]
        state.store.finish()  # type: ignore[attr-defined]

    trainer.train = save_at_once  # type: ignore[assignment]
    pretrain.main(["--config", config_file, *overrides])


def start_only(data: TinyData, run_dir: Path, num_ranks: int, *overrides: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a run that has started and saved without a step."""
    arguments = [f"run_dir={run_dir}", *COMMON, *overrides]
    instead = partial(started_only, str(data.config), arguments)
    ranks = start_ranks(data.config, run_dir, num_ranks=num_ranks, instead=instead)
    assert ranks.wait() == [0] * num_ranks, ranks.output()
    return read_tensors(run_dir)


def of_weights(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tensors.items() if not name.startswith("optimizer.")}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [(2, (f"{TP}=2", "parallel.sequence_parallel=true")), (2, (f"{PP}=2", "train.global_batch_size=4"))],
    ids=["TP 2", "PP 2 and another batch"],
)
def test_weights_are_those_of_the_other_run_in_every_layout(
    data: TinyData, tmp_path: Path, base: Path, num_ranks: int, layout: tuple[str, ...]
) -> None:
    found = start_only(data, tmp_path / "run", num_ranks, f"init_from={base}", *layout)
    assert_same(of_weights(found), of_weights(read_tensors(base)))
    moments = [value for name, value in found.items() if "exp_avg" in name]
    assert moments == [] or not any(value.any() for value in moments)
    manifest = load_manifest(str(latest_checkpoint(str(tmp_path / "run/checkpoints"))))
    assert (manifest.iteration, manifest.consumed_train_samples) == (0, 0)


def test_the_optimizer_state_comes_along_in_another_layout(data: TinyData, tmp_path: Path, base: Path) -> None:
    found = start_only(data, tmp_path / "run", 2, f"init_from={base}", "init_state=optimizer", f"{TP}=2", "optimizer.lr=1e-3")
    assert_same(found, read_tensors(base))
    manifest = load_manifest(str(latest_checkpoint(str(tmp_path / "run/checkpoints"))))
    assert (manifest.iteration, manifest.consumed_train_samples) == (0, 0)


def test_a_run_with_all_state_continues_as_the_other_one_bit_for_bit(data: TinyData, tmp_path: Path, base: Path) -> None:
    records = run_on_ranks(data.config, tmp_path / "run", *COMMON, f"init_from={base / FOURTH}", "init_state=all")
    assert [record["iteration"] for record in records] == [5, 6, 7, 8]
    assert without_times(records) == without_times(read_metrics(base)[4:])
    assert_same(read_tensors(tmp_path / "run"), read_tensors(base))


def without_times(records: list[Record]) -> list[Record]:
    names = ("iteration", "lm_loss", "grad_norm", "lr", "consumed_train_samples", "consumed_train_tokens")
    return [{name: record[name] for name in names} for record in records]


def test_a_longer_context_with_rope_scaling_starts_near_the_loss_of_the_other_run(
    data: TinyData, tmp_path: Path, base: Path
) -> None:
    longer = ["data.seq_length=64", "train.train_iters=2", "optimizer.lr_warmup_iters=1", "data.allow_repeats=true"]
    yarn = ["model.rope_scaling=yarn", "model.rope_scaling_factor=2", "model.rope_scaling_original_max_position=32"]
    scratch = run_on_ranks(data.config, tmp_path / "scratch", *longer)
    extended = run_on_ranks(data.config, tmp_path / "run", *longer, *yarn, f"init_from={base}")
    assert extended[0]["lm_loss"] < scratch[0]["lm_loss"] - 0.2
    assert extended[0]["consumed_train_tokens"] == 8 * 64


def test_a_kill_before_the_first_checkpoint_starts_again_from_the_recorded_checkpoint(
    data: TinyData, tmp_path: Path, base: Path
) -> None:
    """The other run trains on, so the latest checkpoint of its folder is another one by then."""
    source, run_dir = tmp_path / "source", tmp_path / "run"
    shutil.copytree(base, source)
    (source / "checkpoints/latest").write_text("iter_0000004\n")
    command = ("train.train_iters=30", "checkpoint.save_interval=30", f"init_from={source}", "data.allow_repeats=true")
    ranks = start_ranks(data.config, run_dir, *command)
    ranks.wait_until(lambda: (run_dir / "metrics.jsonl").exists() and len(read_metrics(run_dir)) > 2)
    ranks.send(signal.SIGKILL)
    ranks.wait()
    (source / "checkpoints/latest").write_text("iter_0000008\n")
    found = run_on_ranks(data.config, run_dir, *command)
    (source / "checkpoints/latest").write_text("iter_0000004\n")
    assert curve(found) == curve(run_on_ranks(data.config, tmp_path / "whole", *command))
    assert [record["iteration"] for record in read_chain(str(run_dir))] == [4]


def test_manifests_record_the_chain_and_a_resume_needs_no_source(data: TinyData, tmp_path: Path, base: Path) -> None:
    middle, last = tmp_path / "middle", tmp_path / "last"
    run_on_ranks(data.config, middle, *COMMON, f"init_from={base / FOURTH}")
    few = ["train.train_iters=4", f"init_from={middle}"]
    run_on_ranks(data.config, last, *few, "train.exit_interval=2")
    shutil.rmtree(middle)  # the run has a checkpoint of its own
    run_on_ranks(data.config, last, *few)
    manifest = load_manifest(str(latest_checkpoint(str(last / "checkpoints"))))
    assert manifest.iteration == 4
    assert [(record["iteration"], record["init_state"]) for record in manifest.started_from] == [(4, "weights"), (8, "weights")]
    assert manifest.started_from[0]["path"] == str(base / FOURTH)
    assert manifest.started_from == json.loads((last / FILE).read_text())


@pytest.fixture(scope="module")
def begun(data: TinyData, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from `base` that was stopped after two iterations."""
    run_dir = tmp_path_factory.mktemp("begun") / "begun"
    run_on_ranks(data.config, run_dir, "train.exit_interval=2", f"init_from={base}")
    return run_dir


REFUSED = {
    "another architecture": (["model.ffn_hidden_size=96"], "model.ffn_hidden_size=96 but the checkpoint has 64"),
    "another context": (
        ["data.seq_length=64", "model.rope_scaling=llama3", "model.rope_scaling_original_max_position=64"],
        "rope_scaling_original_max_position=64, but the first training of {base}/checkpoints/iter_0000008 had 32 positions; set it to 32",
    ),
    "too short a factor": (
        ["data.seq_length=128", "model.rope_scaling=linear", "model.rope_scaling_factor=2"],
        "data.seq_length=128 is above model.rope_scaling_factor=2 x 32 positions",
    ),
    "another direction": (
        ["data.direction=forward", "data.train_blend=[[1.0,{data}/forward_train]]"],
        "is a reverse model, but data.direction=forward",
    ),
    "another optimizer": (
        ["init_state=all", "parallel.use_distributed_optimizer=true"],
        "state of an ordinary optimizer, which the other kind cannot load; set parallel.use_distributed_optimizer=false, or start",
    ),
    "no checkpoint": (
        ["init_from={base}/checkpoints/iter_0000005"],
        "is not a folder; give a run folder or one of its checkpoints",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_start_that_does_not_fit_is_refused_before_anything_is_written(
    data: TinyData, tmp_path: Path, base: Path, case: str
) -> None:
    overrides, message = REFUSED[case]
    texts = [text.format(base=base, data=data.folder) for text in overrides]
    done = run_command("--config", str(data.config), f"run_dir={tmp_path}/run", f"init_from={base}", *texts, "--check", "1")
    assert message.format(base=base) in done.stderr, done.stderr
    assert done.returncode in (1, 2)
    ranks = start_ranks(data.config, tmp_path / "run", f"init_from={base}", *texts)
    assert ranks.wait() == [done.returncode]
    assert message.format(base=base) in ranks.output()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["init_from={base}/checkpoints/iter_0000004"], "has started from init_from={base} ("),
        (["init_from={base}", "init_state=optimizer"], "and init_state=optimizer, but run_dir="),
        (["init_from={base}/../base"], ""),
        ([], ""),
    ],
)
def test_a_changed_init_from_of_a_run_with_checkpoints_is_refused(
    data: TinyData, base: Path, begun: Path, changed: list[str], message: str
) -> None:
    texts = [text.format(base=base) for text in changed]
    done = run_command("--config", str(data.config), f"run_dir={begun}", *texts, "--check", "1")
    assert done.returncode == bool(message), done.stderr
    assert message.format(base=base) in done.stderr
    if not message:
        assert "would start from iteration 2 of 20" in done.stdout


def test_a_run_that_began_otherwise_does_not_take_init_from(data: TinyData, base: Path, begun: Path, tmp_path: Path) -> None:
    done = run_command("--config", str(data.config), f"run_dir={base}", f"init_from={begun}", *COMMON, "--check", "1")
    assert (done.returncode, "has started without init_from" in done.stderr) == (1, True), done.stderr
    shutil.copytree(begun, tmp_path / "lost")
    for name in ("checkpoints", "saves.jsonl", "launches.jsonl"):
        path = tmp_path / "lost" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = run_command("--config", str(data.config), f"run_dir={tmp_path}/lost", "--check", "1")
    assert "init_from=None and init_state=weights, but run_dir=" in done.stderr


def test_a_damaged_source_is_refused_by_its_hashes(data: TinyData, tmp_path: Path, base: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(base, source)
    file = next((source / "checkpoints/iter_0000008").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    ranks = start_ranks(data.config, tmp_path / "run", f"init_from={source}", "checkpoint.verify_on_load=false")
    assert ranks.wait() == [1]
    assert file.name in ranks.output()
    assert "sha256" in ranks.output()
    assert not list((tmp_path / "run/checkpoints").glob("iter_*"))
