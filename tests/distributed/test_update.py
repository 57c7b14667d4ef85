"""The two halves of an optimizer step equal megatron-core's whole step, which would let NaN into the weights."""

import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PROGRAM = """
import sys, torch
from megatron.core.optimizer import ChainedOptimizer
from megatron_ledom.config.load import load_config
from megatron_ledom.model.builder import build_model_chunks, wrap_for_training
from megatron_ledom.model.layer_specs import choose_layers
from megatron_ledom.parallel.groups import start_distributed
from megatron_ledom.platform.device import prepare_platform
from megatron_ledom.training.replay import squared_norms
from megatron_ledom.training.optimizer import build_optimizer
from megatron_ledom.training.trainer import apply_gradient, measure_gradient

config = load_config("examples/configs/quickstart_reverse.yaml", ["model.vocab_size=500", *sys.argv[1:]])
platform = prepare_platform(1)
groups = start_distributed(platform, config.parallel)

def build():
    model = wrap_for_training(config, build_model_chunks(config, 512, groups, choose_layers(config)))
    return model, build_optimizer(config, model, groups)

def fill(model, scale):
    generator = torch.Generator().manual_seed(1)
    for param in model[0].parameters():
        param.main_grad.copy_(torch.randn(param.shape, generator=generator) * scale)

(one, whole), (two, halves) = build(), build()
assert type(whole) is ChainedOptimizer
for scale in (1.0, 1e-5, 1.0):  # clipped, not clipped
    fill(one, scale), fill(two, scale)
    _, expected, _ = whole.step()
    norm = measure_gradient(halves)
    total = sum(squared_norms(two, halves).values()) ** 0.5
    assert abs(total / norm - 1) < 1e-5, (total, norm)
    apply_gradient(halves, norm)
    assert norm == expected
    assert all(torch.equal(a, b) for a, b in zip(one[0].parameters(), two[0].parameters()))
fill(one, float("nan"))
whole.step()
print("nan in the weights after the whole step:", any(bool(p.isnan().any()) for p in one[0].parameters()))
"""


@pytest.mark.parametrize(
    "settings",
    [
        ["model.params_dtype=fp32"],
        ["model.params_dtype=bf16"],
        ["model.params_dtype=bf16", "parallel.use_distributed_optimizer=true"],
    ],
)
def test_measure_and_apply_equal_the_whole_step_which_lets_nan_into_the_weights(settings: list[str], python: Path) -> None:
    command = [python, "-c", PROGRAM, *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "nan in the weights after the whole step: True"
