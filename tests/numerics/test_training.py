"""Training equals plain torch: losses, gradient norms, learning rates and weights of every schedule, clip and z-loss."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ledom.config.load import load_config
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.convert.rules import Sizes, weights_of
from megatron_ledom.model.builder import build_model_chunks, wrap_for_training
from megatron_ledom.model.layer_specs import LayerChoice
from megatron_ledom.training.optimizer import build_optimizer, build_scheduler
from megatron_ledom.training.step_policy import Action, Verdict
from megatron_ledom.training.trainer import train_step
from tests.support.plain_llama import PlainLlama, plain_lr, plain_optimizer, plain_step
from tests.support.tiny_runs import TinyData

STEPS, VOCAB, ROWS, LENGTH = 12, 1005, 4, 32
BASE = (
    "optimizer.lr_warmup_iters=3",
    "optimizer.adam_eps=1e-6",  # with 1e-8 the order of a sum would decide the sign of the update if the gradient is nearly 0
    f"train.train_iters={STEPS}",
    f"train.global_batch_size={ROWS}",
)
WSD = ("optimizer.lr_decay_style=WSD", "optimizer.lr_wsd_decay_iters=5")
CASES = {
    "cosine": (),
    "linear, ends early": ("optimizer.lr_decay_style=linear", "optimizer.lr_decay_iters=8"),
    "constant without clipping": ("optimizer.lr_decay_style=constant", "optimizer.clip_grad=0"),
    **{f"WSD {shape}": (*WSD, f"optimizer.lr_wsd_decay_style={shape}") for shape in ("linear", "cosine", "minus_sqrt")},
    "WSD": WSD,
    "clipped hard": ("optimizer.clip_grad=0.1",),
    "z-loss": ("train.z_loss_coeff=0.1",),
    "strong decay": ("optimizer.weight_decay=10",),
}


def always_update(lm_loss: float, grad_norm: float) -> Verdict:
    return Verdict(Action.UPDATE)


def micro_batches(step: int) -> list[dict[str, torch.Tensor]]:
    """Return a global batch as micro-batches of one sample, with a different number of masked positions in each."""
    ids = torch.randint(0, VOCAB, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    mask = torch.ones(ROWS, LENGTH)
    for row in range(ROWS):
        mask[row, : 3 * row] = 0
    whole = {
        "tokens": ids[:, :-1],
        "labels": ids[:, 1:],
        "loss_mask": mask,
        "position_ids": torch.arange(LENGTH).expand(ROWS, -1),
    }
    return [{name: value[row : row + 1].contiguous() for name, value in whole.items()} for row in range(ROWS)]


def hf_weights(config: RunConfig, core: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of a model by their Hugging Face names."""
    own = (("self_attention.linear_qkv.layer_norm_", "input_layernorm."), ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."))
    weights = {}
    for weight in weights_of(Sizes(config.model, VOCAB)):
        name = weight.core.replace("decoder.layers.", f"decoder.layers.{weight.layer}.")
        for stored, module in own:
            name = name.replace(stored, module)
        weights |= weight.split(core[name])
    return {name: weight.detach().clone() for name, weight in weights.items()}


@pytest.mark.parametrize(("case", "layers"), [*((case, "torch") for case in CASES), ("cosine", "fused"), ("z-loss", "fused")])
def test_training_equals_plain_torch(data: TinyData, tmp_path: Path, groups: Any, case: str, layers: str) -> None:
    config = load_config(str(data.config), [f"run_dir={tmp_path}", *BASE, *CASES[case]])
    chunks = build_model_chunks(config, VOCAB, groups, LayerChoice(layers, "test"))
    plain = PlainLlama(config.model, VOCAB)
    plain.load_state_dict(hf_weights(config, chunks[0].state_dict()))
    model = wrap_for_training(config, chunks)
    optimizer = build_optimizer(config, model, groups)
    scheduler = build_scheduler(config, optimizer)
    plain_adam = plain_optimizer(config, plain)
    norms = []
    for step in range(STEPS):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(plain_lr(config, step), rel=1e-12, abs=1e-15)
        expected = plain_step(config, plain, plain_adam, micro_batches(step), plain_lr(config, step))
        found = train_step(
            config,
            model,
            optimizer,
            [iter(micro_batches(step))],
            groups,
            always_update,
            global_batch_size=config.train.global_batch_size,
        )
        scheduler.step(increment=1)
        assert (found.lm_loss, found.grad_norm) == pytest.approx(expected, rel=1e-5)
        norms.append(found.grad_norm)
    wanted = plain.state_dict()
    for name, weight in hf_weights(config, chunks[0].state_dict()).items():
        torch.testing.assert_close(weight, wanted[name], rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert max(norms) > 2 * 0.1  # clipping acts if set


def test_padding_rows_of_the_vocabulary_do_not_count(data: TinyData, tmp_path: Path, groups: Any) -> None:
    """Their logits are not in the loss and get no gradient, so only the decay changes them."""
    config = load_config(str(data.config), [f"run_dir={tmp_path}", *BASE, "optimizer.weight_decay=0"])
    chunks = build_model_chunks(config, VOCAB, groups, LayerChoice("torch", "test"))
    head = chunks[0].output_layer.weight
    with torch.no_grad():
        head[VOCAB:] = 100.0
    model = wrap_for_training(config, chunks)
    optimizer = build_optimizer(config, model, groups)
    found = train_step(
        config,
        model,
        optimizer,
        [iter(micro_batches(0))],
        groups,
        always_update,
        global_batch_size=config.train.global_batch_size,
    )
    assert found.lm_loss == pytest.approx(6.9, abs=0.2)  # ln 1005
    assert (head[VOCAB:] == 100.0).all()
