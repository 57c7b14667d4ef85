"""Hazards: cases in which megatron-core silently computes something wrong, and against which this package has a guard.

Each test removes one guard in the ranks of a real run, with a hook of `hazards.py`, and checks that the error occurs.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_ledom.platform.core_on_cpu import REPLACEMENTS
from tests.distributed import hazards
from tests.support.paths import ROOT
from tests.support.tiny_runs import Record, TinyData, curve, read_metrics, read_tensors, run_on_ranks, start_ranks

STEPS = 6
BASE = (f"train.train_iters={STEPS}", "model.num_layers=4", f"train.eval_interval={STEPS}", "train.eval_iters=1")
INTERLEAVED = ("parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2")
OVERLAPPED = (
    "parallel.use_distributed_optimizer=true",
    "parallel.overlap_grad_reduce=true",
    "parallel.overlap_param_gather=true",
)
BF16_DROPOUT = ("model.params_dtype=bf16", "model.hidden_dropout=0.1")
ODD_SIZES = ("model.hidden_size=36", "model.kv_channels=8", "model.ffn_hidden_size=60")
"""Matrix sizes for which megatron-core pads every bucket."""


def base(data: TinyData) -> list[str]:
    return [*BASE, f"data.valid_blend=[[1.0,{data.shard('reverse_valid')}]]"]


@pytest.fixture(scope="module")
def one_process(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    return run_on_ranks(data.config, tmp_path_factory.mktemp("one") / "run", *base(data))


def largest_difference(found: list[Record], expected: list[Record]) -> float:
    pairs = zip(curve(found), curve(expected), strict=True)
    return max(abs(a / b - 1) for one, other in pairs for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("guard", hazards.GUARDS)
def test_interleaved_stages_train_another_model_without_the_guard(
    data: TinyData, tmp_path: Path, one_process: list[Record], guard: str
) -> None:
    """`test_layouts.py` has the same layout with the guard.

    Without it, a stage sends memory that has been freed: mostly with the numbers of another tensor, which train silently;
    sometimes with NaN, which ends the run. From megatron-core 0.18 an output is freed only after it was sent.
    """
    run_dir = tmp_path / "run"
    ranks = start_ranks(data.config, run_dir, *base(data), *INTERLEAVED, num_ranks=2, hook=hazards.GUARDS[guard].apply)
    codes = ranks.wait()
    if not hazards.GUARDS[guard].is_needed():
        assert codes == [0, 0], ranks.output()
        assert largest_difference(read_metrics(run_dir), one_process) < 1e-5
    elif any(codes):
        assert "the loss is nan" in ranks.output()
    else:
        assert largest_difference(read_metrics(run_dir), one_process) > 1e-3


def test_saved_weights_are_stale_if_read_before_they_are_gathered(data: TinyData, tmp_path: Path) -> None:
    """There is no validation before the save, because its forward pass would gather the weights."""
    curves, saved = {}, {}
    for name, hook in {"guarded": None, "stale": hazards.stale_weights}.items():
        curves[name] = curve(run_on_ranks(data.config, tmp_path / name, *BASE, *OVERLAPPED, num_ranks=2, hook=hook))
        saved[name] = weights_of(read_tensors(tmp_path / name))
    assert curves["guarded"] == curves["stale"]  # the training itself is the same
    different = [name for name, tensor in saved["guarded"].items() if not torch.equal(tensor, saved["stale"][name])]
    assert len(different) > len(saved["guarded"]) // 3


def weights_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {name: tensor for name, tensor in tensors.items() if name.endswith("weight") and not name.startswith("optimizer")}
    assert len(found) == 9
    return found


def sum_a_transposed_tensor(without: str | None) -> None:
    """Sum a tensor over two ranks as a row-parallel layer does; without the correction each rank keeps its own values."""
    from megatron.core.tensor_parallel import mappings

    from megatron_ledom.config.schema import ParallelConfig
    from megatron_ledom.parallel.groups import start_distributed, stop_distributed
    from megatron_ledom.platform import core_fixes
    from megatron_ledom.platform.device import prepare_platform
    from megatron_ledom.platform.launch import read_launch

    is_right = without is None or not core_fixes.CORRECTIONS[without].is_needed()
    if without is not None:
        del core_fixes.CORRECTIONS[without]
    launch = read_launch()
    groups = start_distributed(prepare_platform(1, launch), ParallelConfig(tensor_model_parallel_size=2), launch)
    own = torch.arange(6.0).view(2, 3).t() * (launch.rank + 1)
    found = mappings.reduce_from_tensor_model_parallel_region(own, group=groups.tensor)
    expected = torch.arange(6.0).view(2, 3).t() * 3
    assert torch.equal(found, expected) is is_right
    stop_distributed()


@pytest.mark.parametrize("without", [None, "sums of all memory layouts"])
def test_ranks_sum_a_tensor_that_is_not_contiguous(data: TinyData, tmp_path: Path, without: str | None) -> None:
    ranks = start_ranks(data.config, tmp_path / "run", num_ranks=2, instead=partial(sum_a_transposed_tensor, without))
    assert ranks.wait() == [0, 0], ranks.output()


def test_optimizer_state_of_padded_buckets_is_saved_at_its_position(data: TinyData, tmp_path: Path) -> None:
    """Without the correction everything after the first padded bucket is saved from a wrong position."""
    saved = {}
    for name, bucket, hook in (
        ("one bucket", [], None),
        ("corrected", ["parallel.bucket_size=5000"], None),
        ("stock", ["parallel.bucket_size=5000"], partial(hazards.without, "padded buckets")),
    ):
        run_on_ranks(data.config, tmp_path / name, *base(data), *OVERLAPPED, *ODD_SIZES, *bucket, num_ranks=2, hook=hook)
        tensors = read_tensors(tmp_path / name)
        saved[name] = {key: tensor for key, tensor in tensors.items() if "exp_avg" in key}
    expected = saved["one bucket"]
    assert len(expected) == 2 * 9  # two moments each of the embedding, the output layer, two norms, and five matrices
    wrong = {
        name: [key for key in expected if not torch.allclose(saved[name][key], expected[key], rtol=1e-3, atol=1e-7)]
        for name in ("corrected", "stock")
    }
    assert wrong["corrected"] == []
    assert len(wrong["stock"]) > 3


def test_the_distributed_optimizer_cannot_load_the_state_of_torchs_adam(data: TinyData, tmp_path: Path) -> None:
    """`test_resume.py` resumes the same run with the correction."""
    stock = partial(hazards.without, "torch's Adam")
    command = [*base(data), *OVERLAPPED, "train.exit_interval=3"]
    run_on_ranks(data.config, tmp_path / "run", *command, num_ranks=2, hook=stock)
    ranks = start_ranks(data.config, tmp_path / "run", *command, num_ranks=2, hook=stock)
    assert ranks.wait() == [3, 3], ranks.output()
    assert "assert len(steps) == 1" in ranks.output()


@pytest.fixture(scope="module")
def with_dropout(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    return run_on_ranks(data.config, tmp_path_factory.mktemp("dropout") / "run", *base(data), *OVERLAPPED, *BF16_DROPOUT)


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_a_run_on_a_cpu_needs_each_replacement(data: TinyData, tmp_path: Path, with_dropout: list[Record], name: str) -> None:
    """Without the random state the run ends well, but dropout ignores the states that megatron-core sets."""
    command = [*base(data), *OVERLAPPED, *BF16_DROPOUT]
    ranks = start_ranks(data.config, tmp_path / "run", *command, hook=partial(hazards.without, name))
    codes = ranks.wait()
    if name == "random state":
        assert codes == [0], ranks.output()
        assert curve(read_metrics(tmp_path / "run"))[0] != curve(with_dropout)[0]
    else:
        assert codes == [3], ranks.output()


def test_optimizer_state_changes_layout_only_in_the_chosen_format(
    data: TinyData, tmp_path: Path, one_process: list[Record]
) -> None:
    first = [*base(data), "parallel.use_distributed_optimizer=true", "train.exit_interval=3"]
    second = [*first, "parallel.tensor_model_parallel_size=2"]
    run_on_ranks(data.config, tmp_path / "run", *first, num_ranks=2)
    assert largest_difference(run_on_ranks(data.config, tmp_path / "run", *second, num_ranks=2), one_process) < 1e-5
    run_on_ranks(data.config, tmp_path / "other", *first, num_ranks=2, hook=hazards.data_parallel_sharding)
    ranks = start_ranks(data.config, tmp_path / "other", *second, num_ranks=2, hook=hazards.data_parallel_sharding)
    assert ranks.wait() == [1, 1], ranks.output()
    ranks = start_ranks(data.config, tmp_path / "default", *first, num_ranks=2, hook=hazards.default_sharding)
    assert ranks.wait() == [3, 3], ranks.output()


def test_no_compiler_is_needed_to_train(data: TinyData, tmp_path: Path, one_process: list[Record]) -> None:
    found = run_on_ranks(data.config, tmp_path / "run", *base(data), hook=hazards.no_compiler)
    assert curve(found) == curve(one_process)
    torch_layers = "model.transformer_impl=torch"  # the fused layers have their own activation
    ranks = start_ranks(data.config, tmp_path / "fused", *base(data), torch_layers, hook=hazards.fused_activation)
    assert ranks.wait() != [0]
    assert "no-such-compiler" in ranks.output()


FOREIGN_APEX = """
import torch

class FusedAdam(torch.optim.SGD):
    def __init__(self, params, lr=0.0, **settings):
        super().__init__(params, lr=0.0)

FusedSGD = torch.optim.SGD
"""
UNGUARDED = """
import sys
from megatron_ledom import pretrain
from megatron_ledom.platform import core_fixes
del core_fixes.CORRECTIONS["torch's Adam"]
pretrain.main()
"""


def test_a_foreign_package_called_apex_has_no_effect(data: TinyData, tmp_path: Path, one_process: list[Record]) -> None:
    """The log names it. Without the guard its optimizer makes the steps; here it changes nothing."""
    (tmp_path / "packages/apex/optimizers").mkdir(parents=True)
    (tmp_path / "packages/apex/__init__.py").touch()
    (tmp_path / "packages/apex/optimizers/__init__.py").write_text(FOREIGN_APEX)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'packages'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    curves = {}
    for name, start in {"guarded": ["-m", "megatron_ledom.pretrain"], "unguarded": ["-c", UNGUARDED]}.items():
        arguments = ["--config", str(data.config), f"run_dir={tmp_path / name}", *base(data)]
        command = [sys.executable, *start, *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"apex at {tmp_path / 'packages/apex/__init__.py'} ignored: it is not NVIDIA's" in done.stderr
        curves[name] = curve(read_metrics(tmp_path / name))
    assert curves["guarded"] == curve(one_process)
    assert curves["unguarded"][1:] != curve(one_process)[1:]
