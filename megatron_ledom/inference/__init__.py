"""Use a trained model: write the text before a given text, score parts of a text, rank answers. Needs torch and transformers only."""

from typing import TYPE_CHECKING

from megatron_ledom.lazy import lazy_exports

if TYPE_CHECKING:
    from megatron_ledom.inference.engines.transformers_engine import TransformersEngine
    from megatron_ledom.inference.language_model import ForwardLM, ReverseLM
    from megatron_ledom.inference.reverse_reward.reward import Candidate, CandidateScore, RewardSettings, rank, score_questions

__all__ = [
    "Candidate",
    "CandidateScore",
    "ForwardLM",
    "ReverseLM",
    "RewardSettings",
    "TransformersEngine",
    "rank",
    "score_questions",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "megatron_ledom.inference.reverse_reward.reward": [
            "Candidate",
            "CandidateScore",
            "RewardSettings",
            "rank",
            "score_questions",
        ],
        "megatron_ledom.inference.language_model": ["ForwardLM", "ReverseLM"],
        "megatron_ledom.inference.engines.transformers_engine": ["TransformersEngine"],
    },
)
