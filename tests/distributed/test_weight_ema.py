"""The moving average of the weights: its value, resumed bit for bit, resharded, kept right by skipped and repeated steps, exported."""

import random
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_ledom.checkpoint.folder import find_checkpoint, latest_checkpoint
from megatron_ledom.checkpoint.stored_tensors import StoredTensors
from megatron_ledom.convert.average import average_checkpoints
from megatron_ledom.convert.hf_export import export_hf
from megatron_ledom.errors import UsageError
from tests.distributed.test_average_checkpoints import DISTRIBUTED, PP, TP, iteration
from tests.support.injected_errors import inject
from tests.support.tiny_runs import Record, TinyData, curve, read_tensors, run_each_on_ranks, run_on_ranks, start_tool

EMA = "optimizer.ema_decay=0.6"
GATHER = "parallel.overlap_param_gather=true"
STEPS = ["model.params_dtype=bf16", "train.train_iters=3", "checkpoint.save_interval=1", "train.eval_iters=1"]
LAYOUTS = {
    "tensor": [TP],
    "pipeline": [PP, "model.share_embeddings_and_output_weights=true", "train.skip_iterations=[2]"],
    "distributed": [*DISTRIBUTED, GATHER],
}


@pytest.fixture(scope="module")
def records(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, list[Record]]:
    """Runs of three iterations on two ranks: with the average, without it, stopped and resumed; one skips an iteration."""
    folder = tmp_path_factory.mktemp("ema")
    steps = [*STEPS, f"data.valid_blend=[[1.0,{data.shard('reverse_valid')}]]"]
    runs = {folder / name: [*steps, EMA, *layout] for name, layout in LAYOUTS.items()}
    runs[folder / "off"] = [*steps, *LAYOUTS["distributed"]]
    runs[folder / "stopped"] = [*steps, EMA, *LAYOUTS["distributed"], "train.exit_interval=2"]
    found = run_each_on_ranks(data.config, runs, num_ranks=2)
    again = {folder / "stopped": [*steps, EMA, *LAYOUTS["distributed"]]}
    return found | run_each_on_ranks(data.config, again, num_ranks=2)


@pytest.fixture
def folder(records: dict[Path, list[Record]]) -> Path:
    return next(iter(records)).parent


def main_weight(stored: StoredTensors, name: str) -> torch.Tensor:
    kinds = [f"optimizer.state.{kind}.{name}" for kind in ("fp32_param", "param")]
    return stored.read(next(found for found in kinds if found in stored.entries)).double()


def averages(run: Path) -> dict[str, torch.Tensor]:
    """Return the stored moving averages of the latest checkpoint by the name of the weight."""
    found = {name.removeprefix("ema."): value for name, value in read_tensors(run).items() if name.startswith("ema.")}
    assert found
    return found


@pytest.mark.parametrize(("name", "updates"), [("tensor", [1, 2, 3]), ("distributed", [1, 2, 3]), ("pipeline", [1, 3])])
def test_the_average_is_that_of_the_weights_after_every_update(folder: Path, name: str, updates: list[int]) -> None:
    after = [StoredTensors(iteration(folder / name, number)) for number in updates]
    factors = [0.6 ** (len(updates) - 1 - index) for index in range(len(updates))]
    for weight, found in averages(folder / name).items():
        total = sum(factor * main_weight(one, weight) for factor, one in zip(factors, after, strict=True))
        torch.testing.assert_close(found.double(), total / sum(factors), rtol=3e-7, atol=1e-8)


def test_the_average_changes_nothing_in_training(records: dict[Path, list[Record]], folder: Path) -> None:
    """Validation exchanges weights and averages, and exchanges them back."""
    one, other = records[folder / "distributed"], records[folder / "off"]
    assert curve(one) == curve(other)
    kept = {name: value for name, value in read_tensors(folder / "distributed").items() if not name.startswith("ema.")}
    without = read_tensors(folder / "off")
    assert kept.keys() == without.keys()
    assert all(torch.equal(value, without[name]) for name, value in kept.items())
    assert "validation_ema" not in other[-1]


def test_a_resumed_run_has_the_same_average_bit_for_bit(folder: Path) -> None:
    wanted, found = averages(folder / "distributed"), averages(folder / "stopped")
    assert wanted.keys() == found.keys()
    assert [name for name, value in wanted.items() if not torch.equal(value, found[name])] == []


def test_the_average_loads_unchanged_in_other_layouts(data: TinyData, folder: Path, tmp_path: Path) -> None:
    """The other layout skips its only step, so that it saves what it has loaded; the last run has the average switched off."""
    still = [*STEPS, "train.train_iters=4", "train.skip_iterations=[4]"]
    names = {"tensor": [PP], "distributed": ["parallel.use_distributed_optimizer=true", TP]}
    runs = {tmp_path / name: [*still, EMA, *layout] for name, layout in names.items()}
    runs[tmp_path / "dropped"] = [*still, *LAYOUTS["distributed"]]
    for run, source in zip(runs, [*names, "distributed"], strict=True):
        shutil.copytree(folder / source, run)
    run_each_on_ranks(data.config, runs, num_ranks=2)
    for name in names:
        wanted, found = averages(folder / name), averages(tmp_path / name)
        assert wanted.keys() == found.keys()
        assert [key for key, value in wanted.items() if not torch.equal(value, found[key])] == []
    assert not [key for key in read_tensors(tmp_path / "dropped") if key.startswith("ema.")]


@pytest.mark.parametrize("how", ["whole", "layers"])
def test_the_average_is_exported_with_a_parity_check(
    records: dict[Path, list[Record]], folder: Path, tmp_path: Path, how: str
) -> None:
    run = folder / random.choice(["tensor", "distributed"])
    check = export_hf(str(run), str(tmp_path / "hf"), verify=how, weights="ema")  # type: ignore[arg-type]
    assert check is not None
    norm = load_file(tmp_path / "hf/model.safetensors")["model.norm.weight"]
    assert torch.equal(norm, averages(run)["decoder.final_layernorm.weight"].bfloat16())
    assert not torch.equal(norm, StoredTensors(find_checkpoint(str(run))).read("decoder.final_layernorm.weight"))
    assert "moving average of the weights, decay 0.6" in (tmp_path / "hf/README.md").read_text()
    losses = records[run][-1]
    assert losses["validation"].keys() == losses["validation_ema"].keys()
    assert losses["validation"] != losses["validation_ema"]


def test_a_run_starts_from_the_average_of_moving_averages(folder: Path, tmp_path: Path) -> None:
    average_checkpoints([str(folder / "tensor")], str(tmp_path / "out"), last=1, weights="ema")
    found = StoredTensors(find_checkpoint(str(tmp_path / "out")))
    for name, value in averages(folder / "tensor").items():
        assert torch.equal(found.read(f"optimizer.state.fp32_param.{name}"), value)
        assert torch.equal(found.read(name), value.bfloat16())


def test_an_export_of_an_average_that_was_not_kept_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"trained without optimizer.ema_decay; export the weights themselves"):
        export_hf(str(folder / "off"), str(tmp_path / "hf"), weights="ema")
    assert latest_checkpoint(str(folder / "off/checkpoints")) is not None


def test_a_run_that_rolls_back_has_the_average_of_one_that_skipped(data: TinyData, tmp_path: Path) -> None:
    """Iteration 4 fails: iteration 3, done after the last checkpoint, is repeated, and counts once in the average."""
    steps = ["train.train_iters=6", "checkpoint.save_interval=2", EMA]
    back, skipped = tmp_path / "back", tmp_path / "skipped"
    run_on_ranks(data.config, back, *steps, "train.on_nonfinite=roll_back", hook=partial(inject, "nan:4"))
    run_on_ranks(data.config, skipped, *steps, "train.skip_iterations=[4]")
    assert (back / "skip_iterations.json").exists()
    wanted, found = averages(skipped), averages(back)
    assert [name for name, value in wanted.items() if not torch.equal(value, found[name])] == []


def test_a_step_of_a_run_with_the_average_replays_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    arguments = ["--run", str(folder / "stopped"), "--iteration", "3"]
    ranks = start_tool("tools/replay_step.py", arguments, tmp_path / "log", num_ranks=2)
    assert ranks.wait() == [0, 0], ranks.output()
    assert "equal bit for bit" in ranks.output()
