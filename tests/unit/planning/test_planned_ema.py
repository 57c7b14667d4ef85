"""A moving average of the weights is part of the planned memory and of the planned checkpoint."""

from dataclasses import replace

from megatron_ledom.config.load import load_config
from megatron_ledom.planning.hardware import load_hardware
from megatron_ledom.planning.memory import state_bytes
from megatron_ledom.planning.plan import bytes_of_checkpoint, make_plan


def test_a_moving_average_takes_four_bytes_a_weight_divided_like_the_optimizer() -> None:
    with_it = load_config("ledom_7b", ["optimizer.ema_decay=0.999", "parallel.world_size=null", "model.vocab_size=100000"])
    without = replace(with_it, optimizer=replace(with_it.optimizer, ema_decay=None))
    plans = [make_plan(config, 64, load_hardware("h100-sxm")) for config in (with_it, without)]
    layout = plans[0].layout
    copies = layout.data * layout.context if layout.distributed_optimizer else 1
    states = [state_bytes(plan.model, plan.layout, 2**20)[2] for plan in plans]
    assert states[0] - states[1] == 4 * 2**20 // copies
    assert plans[0].needed_gib > plans[1].needed_gib
    assert plans[0].checkpoint_bytes - plans[1].checkpoint_bytes == 4 * plans[0].parameters
    sizes = [bytes_of_checkpoint(with_it.model, config.optimizer) for config in (with_it, without)]
    assert sizes[0] - sizes[1] == 4 * plans[0].parameters
