"""Reverse Reward as a reward function of trainers and searches: TRL, verl, OpenRLHF, and rewards of single steps."""

from typing import TYPE_CHECKING

from megatron_ledom.lazy import lazy_exports

if TYPE_CHECKING:
    from megatron_ledom.rewards.process_reward import ProcessReward
    from megatron_ledom.rewards.reward_function import ReverseRewardFunction
    from megatron_ledom.rewards.trainers import OpenRlhfReward, TrlReward, VerlReward, chat_prompt

__all__ = ["OpenRlhfReward", "ProcessReward", "ReverseRewardFunction", "TrlReward", "VerlReward", "chat_prompt"]

__getattr__ = lazy_exports(
    __name__,
    {
        "megatron_ledom.rewards.reward_function": ["ReverseRewardFunction"],
        "megatron_ledom.rewards.trainers": ["OpenRlhfReward", "TrlReward", "VerlReward", "chat_prompt"],
        "megatron_ledom.rewards.process_reward": ["ProcessReward"],
    },
)
