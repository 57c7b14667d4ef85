"""The parameter groups of a stored optimizer: their settings are the run's, whatever the checkpoint says.

A group holds settings (max_lr, min_lr, lr, betas, eps, weight_decay, ...) beside the number of updates made. megatron-core 0.16
loads the stored settings over those of the run, and its schedule then follows the stored max_lr and min_lr; 0.19 takes max_lr and
min_lr for a part of a group's identity, and refuses a checkpoint of another learning rate. Both load what this module leaves.
"""

from typing import Any

from megatron_ledom.errors import MismatchError

POSITION = ("params", "step")
"""What a checkpoint decides of a group: all the rest are settings."""
Group = dict[str, Any]


def use_settings_of(optimizer: Any, stored: Any) -> None:
    """Give every group of a loaded optimizer state, before it is loaded, the settings of `optimizer`.

    stored: what megatron-core's `optimizer.sharded_state_dict` became when it was read. Changed in place.
    Raises MismatchError for a group that the run has not.
    """
    parts = optimizer.chained_optimizers
    states = [stored] if len(parts) == 1 else [stored[index] for index in range(len(parts))]
    for part, state in zip(parts, states, strict=True):
        kept = state.get("optimizer", state)  # fp32 weights without the distributed optimizer: no outer layer
        if "param_groups" in kept:
            kept["param_groups"] = [_with_settings(group, part.param_groups) for group in kept["param_groups"]]


def settings_of(group: Group) -> Group:
    """A group without its parameters and the number of updates."""
    return {key: value for key, value in group.items() if key not in POSITION}


def _with_settings(stored: Group, own_groups: list[Group]) -> Group:
    own = [group for group in own_groups if _identity(group) == _identity(stored)]
    if len(own) != 1:
        decay, is_expert = _identity(stored)
        raise MismatchError(
            f"the checkpoint has a parameter group (wd_mult {decay}, is_expert_parallel {is_expert}) of which this run has"
            f" {len(own)} instead of 1; it was written by another optimizer: use another run_dir for a new run"
        )
    return {key: stored[key] for key in POSITION if key in stored} | settings_of(own[0])


def _identity(group: Group) -> tuple[float, bool]:
    """What tells the groups of one optimizer apart, here as in every version of megatron-core."""
    return float(group.get("wd_mult", 1.0)), bool(group.get("is_expert_parallel", False))
