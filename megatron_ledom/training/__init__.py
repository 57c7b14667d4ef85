"""Training: the loop, its recovery and its state. docs/reference/python_api.md describes how to add a callback."""

from typing import TYPE_CHECKING

from megatron_ledom.lazy import lazy_exports

if TYPE_CHECKING:
    from megatron_ledom.training.callback import Callback, TrainingRun
    from megatron_ledom.training.step_policy import StepResult

__all__ = ["Callback", "StepResult", "TrainingRun"]

__getattr__ = lazy_exports(
    __name__,
    {
        "megatron_ledom.training.callback": ["Callback", "TrainingRun"],
        "megatron_ledom.training.step_policy": ["StepResult"],
    },
)
