"""Multiple choice in the loop: accuracy of the model that is being trained, over the files of `train.task_files`."""

import os
from pathlib import Path

from megatron_ledom.data.sources import RUN_TOKENIZER
from megatron_ledom.inference.joint import JointTokenizer
from megatron_ledom.training.choice_files import ChoiceItem, read_choices
from megatron_ledom.training.span_scoring import TrainingScorer
from megatron_ledom.training.state import TrainState

TaskResult = dict[str, float]


class TaskSet:
    """The tasks of a run, read once."""

    def __init__(self, scorer: TrainingScorer, tasks: dict[str, list[ChoiceItem]]) -> None:
        self.scorer, self.tasks = scorer, tasks
        for items in tasks.values():  # a text that is too long shall end the run before its first step
            for pair in _pairs(items):
                scorer.span(pair)

    def evaluate(self) -> dict[str, TaskResult]:
        """By task: accuracy, and accuracy_per_token, where log-probabilities are divided by the tokens scored. On every rank.

        A reverse model ranks by log P(context | choice), a forward one by log P(choice | context); the first of equal ones counts.
        """
        return {name: self._evaluate(items) for name, items in self.tasks.items()}

    def _evaluate(self, items: list[ChoiceItem]) -> TaskResult:
        scores = iter(self.scorer.score(_pairs(items)))
        right = per_token = 0
        for item in items:
            found = [next(scores) for _ in item.choices]
            right += _best([score.logprob for score in found]) == item.gold
            per_token += _best([score.logprob / max(1, score.num_tokens) for score in found]) == item.gold
        return {"accuracy": right / len(items), "accuracy_per_token": per_token / len(items), "num_items": float(len(items))}


def load_task_set(state: TrainState) -> TaskSet:
    """The tasks of the config, with the tokenizer that the run folder holds. Call on every rank, at the start."""
    tokenizer = JointTokenizer.from_pretrained(Path(os.path.join(state.config.run_dir, RUN_TOKENIZER)))
    files = state.config.train.task_files
    return TaskSet(TrainingScorer(state, tokenizer), {name: read_choices(path) for name, path in files.items()})


def _pairs(items: list[ChoiceItem]) -> list[tuple[str, str]]:
    return [(item.context, choice) for item in items for choice in item.choices]


def _best(values: list[float]) -> int:
    return max(range(len(values)), key=lambda number: (values[number], -number))
