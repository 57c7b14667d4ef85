"""Checkpoints of mixed layouts are averaged to the last bit of an fp64 average; the result exports and trains on in any layout."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_ledom.checkpoint.averaging import BLOCK_ELEMENTS, MAIN
from megatron_ledom.checkpoint.folder import find_checkpoint
from megatron_ledom.checkpoint.manifest import load_manifest
from megatron_ledom.checkpoint.stored_tensors import StoredTensors
from megatron_ledom.convert.average import average_checkpoints
from megatron_ledom.convert.hf_export import export_hf
from megatron_ledom.errors import DataError, LedomError, MismatchError, UsageError
from tests.support.paths import ROOT
from tests.support.tiny_runs import TinyData, run_each_on_ranks
from tests.support.warm_python import shared_python

TP, PP = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
DISTRIBUTED = ["parallel.use_distributed_optimizer=true", "parallel.overlap_grad_reduce=true", "parallel.bucket_size=3000"]
STEPS = ["model.params_dtype=bf16", "train.train_iters=4", "checkpoint.save_interval=2", "optimizer.lr_warmup_iters=0"]
RUNS = {
    "tensor": [*STEPS, TP, "parallel.sequence_parallel=true"],
    "distributed": [*STEPS, *DISTRIBUTED, "train.seed=1"],
    "pipeline": [*STEPS, PP, "train.seed=2"],
    "fp32": [*STEPS, *DISTRIBUTED, "model.params_dtype=fp32"],
    "forward": [*STEPS[:1], "train.train_iters=1", *STEPS[3:], "data.direction=forward"],
}
"""Overrides of runs on two ranks; seeds differ, so that layouts cannot be mistaken for each other."""


@pytest.fixture(scope="module")
def runs(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("averaged")
    forward = f"data.train_blend=[[1.0,{data.shard('forward_train')}]]"
    overrides = {folder / name: [*words, *([forward] if name == "forward" else [])] for name, words in RUNS.items()}
    run_each_on_ranks(data.config, overrides, num_ranks=2)
    return folder


def iteration(run: Path, number: int) -> str:
    return str(run / f"checkpoints/iter_{number:07d}")


def mixed(runs: Path) -> list[str]:
    return [iteration(runs / "tensor", 2), iteration(runs / "pipeline", 4), iteration(runs / "distributed", 4)]


def expected(checkpoints: list[str], factors: list[float]) -> dict[str, torch.Tensor]:
    """Return the average of the main weights by name: in fp64, rounded once to fp32."""
    total: dict[str, torch.Tensor] = {}
    for checkpoint, factor in zip(checkpoints, factors, strict=True):
        stored = StoredTensors(checkpoint)
        for name in [name for name in stored.entries if not name.startswith("optimizer.")]:
            kinds = [f"optimizer.state.{kind}.{name}" for kind in ("fp32_param", "param")]
            main = stored.read(next(found for found in [*kinds, name] if found in stored.entries))
            assert main.dtype is torch.float32
            total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + factor * main.double()
    return {name: (value / sum(factors)).float() for name, value in total.items()}


@pytest.mark.parametrize(
    ("options", "factors"),
    [({}, [1.0, 1.0, 1.0]), ({"decay": 0.7}, [0.7**2, 0.7, 1.0]), ({"factors": [1.0, 2.5, 0.3]}, [1.0, 2.5, 0.3])],
)
def test_the_average_of_mixed_layouts_equals_that_of_fp64_to_the_last_bit(
    runs: Path, tmp_path: Path, options: dict[str, float], factors: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_ledom.checkpoint.averaging.BLOCK_ELEMENTS", 1000)  # so that blocks cross chunks
    assert BLOCK_ELEMENTS > 1000
    average_checkpoints(mixed(runs), str(tmp_path / "out"), max_shard_size=100_000, **options)  # type: ignore[arg-type]
    stored = StoredTensors(find_checkpoint(str(tmp_path / "out")))
    wanted = expected(mixed(runs), factors)
    assert stored.entries.keys() == {*wanted, *(f"{MAIN}.{name}" for name in wanted)}
    for name, main in wanted.items():
        assert torch.equal(stored.read(f"{MAIN}.{name}"), main), name
        assert torch.equal(stored.read(name), main.bfloat16()), name


def test_checkpoints_of_one_run_are_chosen_by_number_or_by_iteration(runs: Path, tmp_path: Path) -> None:
    run = runs / "fp32"
    both = expected([iteration(run, 2), iteration(run, 4)], [1.0, 1.0])
    average_checkpoints([str(run)], str(tmp_path / "last"), last=2)
    average_checkpoints([str(run)], str(tmp_path / "named"), iterations=[2, 4])
    for name in ("last", "named"):
        stored = StoredTensors(find_checkpoint(str(tmp_path / name)))
        assert stored.entries.keys() == both.keys()  # the weights of an fp32 run are its main weights
        assert all(torch.equal(stored.read(key), value) for key, value in both.items())
    record = load_manifest(find_checkpoint(str(tmp_path / "last"))).average
    assert record is not None
    assert [(one["run"], one["iteration"], one["share"]) for one in record["checkpoints"]] == [
        ("fp32", 2, 0.5),
        ("fp32", 4, 0.5),
    ]


def test_the_result_exports_with_a_parity_check_and_a_card(runs: Path, tmp_path: Path) -> None:
    average_checkpoints(mixed(runs), str(tmp_path / "out"))
    check = export_hf(str(tmp_path / "out"), str(tmp_path / "hf"), verify="whole")
    assert check is not None
    norm = load_file(tmp_path / "hf/model.safetensors")["model.norm.weight"]
    assert torch.equal(norm, expected(mixed(runs), [1.0] * 3)["decoder.final_layernorm.weight"].bfloat16())
    card = (tmp_path / "hf/README.md").read_text()
    assert "uniform average of the weights" in card
    assert re.search(r"pipeline +\| +4 +\| +1,024 +\| +1,024 +\| +0.3333", card)


def test_every_layout_trains_on_from_the_main_weights_themselves(data: TinyData, runs: Path, tmp_path: Path) -> None:
    """One step that changes nothing: the weights that it saves are the fp32 average, not the rounded weights of the model."""
    average_checkpoints(mixed(runs), str(tmp_path / "one"))
    still = [
        "optimizer.lr=1e-30",
        "optimizer.min_lr=0.0",
        "optimizer.weight_decay=0.0",
        "train.train_iters=1",
        "optimizer.lr_warmup_iters=0",
    ]
    layouts = {"one": [TP], "two": [PP], "three": DISTRIBUTED}
    overrides = {}
    for name, layout in layouts.items():
        if name != "one":
            shutil.copytree(tmp_path / "one", tmp_path / name)
        overrides[tmp_path / name] = ["model.params_dtype=bf16", *still, *layout]
    run_each_on_ranks(data.config, overrides, num_ranks=2)
    wanted = expected(mixed(runs), [1.0] * 3)
    for name in layouts:
        trained = find_checkpoint(str(tmp_path / name))
        assert load_manifest(trained).iteration == 1
        found = expected([trained], [1.0])
        assert [key for key, value in wanted.items() if not torch.equal(value, found[key])] == [], name
        assert any(not torch.equal(value, value.bfloat16().float()) for value in wanted.values())


def test_what_does_not_belong_together_is_refused(runs: Path, tmp_path: Path) -> None:
    save = str(tmp_path / "out")
    first = iteration(runs / "tensor", 2)
    with pytest.raises(MismatchError, match=r"another architecture.*model.params_dtype=bf16 but the checkpoint has fp32"):
        average_checkpoints([first, iteration(runs / "fp32", 2)], save)
    with pytest.raises(MismatchError, match=r"is forward, .* is reverse"):
        average_checkpoints([first, iteration(runs / "forward", 1)], save)
    other = shutil.copytree(first, tmp_path / "other/checkpoints/iter_0000002")
    manifest = load_manifest(str(other))
    renamed = {**manifest.provenance.to_dict(), "tokenizer_sha256": "0" * 64}
    change_manifest(Path(other), renamed)
    with pytest.raises(MismatchError, match="was made with tokenizer legible \\(000000000000\\)"):
        average_checkpoints([first, str(other)], save)
    assert not (tmp_path / "out").exists()


def change_manifest(checkpoint: Path, values: dict[str, object]) -> None:
    """Change values of a manifest, with its hash."""
    from megatron_ledom.checkpoint.manifest import OWN_HASH, _hash

    path = checkpoint / "manifest.json"
    content = {**json.loads(path.read_text()), **values}
    del content[OWN_HASH]
    path.write_text(json.dumps({**content, OWN_HASH: _hash(content)}))


def test_a_damaged_checkpoint_is_found_and_nothing_is_left(runs: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(iteration(runs / "tensor", 4), tmp_path / "damaged")
    file = max(Path(damaged).glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    moments = content.rfind(b"PK\x05\x06") - 2000  # in the last tensor, which the average may not even read
    content[moments] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"{file.name} has sha256"):
        average_checkpoints([iteration(runs / "tensor", 2), str(damaged)], str(tmp_path / "new/out"))
    assert not (tmp_path / "new").exists()


def test_wrong_choices_are_explained_before_any_work(runs: Path, tmp_path: Path) -> None:
    run, save = str(runs / "tensor"), tmp_path / "out"
    cases: list[tuple[list[str], dict[str, object], str]] = [
        ([run], {}, "has the checkpoints 2, 4: choose with --last N or --iterations"),
        ([run], {"last": 3}, "--last 3, but .* has 2 trained checkpoints"),
        ([run], {"iterations": [2, 3]}, "no checkpoint of iteration 3; it has 2, 4"),
        (mixed(runs), {"last": 2}, "--load names several folders"),
        ([run], {"last": 2, "decay": 1.5}, "--decay 1.5 must lie between 0 and 1"),
        ([run], {"last": 2, "factors": [1.0]}, "--factors has 1 numbers for 2 checkpoints"),
        ([run], {"last": 2, "factors": [1.0, 0.0]}, "must be positive"),
        ([run, iteration(runs / "tensor", 4)], {}, "is named twice"),
        ([run], {"last": 2, "weights": "ema"}, "trained without optimizer.ema_decay"),
    ]
    for load, options, message in cases:
        with pytest.raises(LedomError, match=message):
            average_checkpoints(load, str(save), **options)  # type: ignore[arg-type]
    save.mkdir()
    with pytest.raises(UsageError, match="exists already"):
        average_checkpoints([run], str(save), last=2)
    assert [*save.iterdir()] == []


def test_killed_at_random_moments_no_average_seems_finished(runs: Path, tmp_path: Path) -> None:
    """An average that had finished is whole; any other left nothing that loads, and starts again."""
    run = runs / "tensor"
    command = [str(shared_python()), "-m", "tests.support.conversion_child", "average", str(run), str(tmp_path / "out"), "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    left = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(left) == 4
    assert not all(one["finished"] for one in left)
    wanted = expected([iteration(run, 2), iteration(run, 4)], [1.0, 1.0])
    for one in left:
        assert not one["part_loads"]
        if not one["finished"]:
            average_checkpoints([str(run)], one["target"], last=2)
        found = expected([find_checkpoint(one["target"])], [1.0])
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
        assert not Path(f"{one['target']}.part").exists()
