"""Ways to choose one of N answers, and how often each is right: Reverse Reward beside the baselines it has to beat.

Shapes: C candidates of a question.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.inference.answers import Answers, classes_of, read_golds
from megatron_ledom.inference.reranked_file import Reranked, checked, read_reranked
from megatron_ledom.inference.reverse_reward import RewardSettings, reward_of
from megatron_ledom.inference.subsets import share_by_score, share_by_vote, share_with_any

Values = npt.NDArray[np.float64]
GRID = tuple(step / 20 for step in range(21))
"""The lambdas among which one is chosen."""
METHODS = {
    "greedy": "the likeliest answer, one for each question",
    "random of N": "the mean over all candidates",
    "forward likelihood, sum": "highest log P_F(y|x)",
    "forward likelihood, mean": "highest log P_F(y|x) a token",
    "majority vote": "the commonest answer",
    "reverse-weighted majority": "the answer whose candidates have the most reward, exp(reward), in sum",
    "reverse only": "highest log P_R(x|y)",
    "Reverse Reward": "highest reward, with lambda chosen on other questions",
    "beam by Reverse Reward": "the best answer of the step-level beam search",
    "oracle": "pass@N: any candidate is right",
}
WITH_REVERSE = ("reverse-weighted majority", "reverse only", "Reverse Reward")
"""Methods that pay for a reverse pass over each candidate."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question's candidates; their order says nothing.

    is_right [C]; classes [C]: equal numbers are the same answer, -1 none. forward, forward_mean, reverse [C]: log-likelihoods
    (the mean is a token's); rewards [lambdas of GRID, C]; all -inf where a candidate cannot be scored. greedy, beam: whether that
    answer is right, None where there is none. sample_tokens, reverse_tokens: mean cost of writing and of judging a candidate.
    num_by_words: candidates whose written tokens the file does not tell; their words are counted in place of them.
    """

    prompt: str
    gold: str
    is_right: npt.NDArray[np.bool_]
    classes: npt.NDArray[np.int64]
    forward: Values
    forward_mean: Values
    reverse: Values
    rewards: Values
    greedy: bool | None
    beam: bool | None
    sample_tokens: float
    reverse_tokens: float
    num_by_words: int

    def outcome(self, method: str, num: int, weight: int) -> float | None:
        """How right a method is with `num` of the candidates (0 to 1), in the mean over all choices of so many, since candidates may
        come in any order; equally good answers share. `weight` is an index of GRID. None: not known."""
        if method in ("greedy", "beam by Reverse Reward"):
            known = self.greedy if method == "greedy" else self.beam
            return None if known is None else float(known)
        if method == "random of N":
            return float(self.is_right.mean())
        if method == "oracle":
            return share_with_any(self.is_right, num)
        if method in ("majority vote", "reverse-weighted majority"):
            log_weights = np.zeros(len(self.classes)) if method == "majority vote" else self.rewards[weight]
            return share_by_vote(log_weights, self.classes, self.is_right, num)
        likelihoods = {
            "forward likelihood, sum": self.forward,
            "forward likelihood, mean": self.forward_mean,
            "reverse only": self.reverse,
            "Reverse Reward": self.rewards[weight],
        }
        return share_by_score(likelihoods[method], self.is_right, num)


def load_questions(
    path: str | Path, gold_key: str, answers: Answers, settings: RewardSettings, beam: str | Path | None = None
) -> list[Question]:
    """The lines of a reranked file whose `gold_key` field holds the right answer (a text that ends with it, or the answer).

    beam: a file of searches for the same prompts, whose best answers are compared. Rewards are computed anew from the scores for
    every lambda; DataError names a line and a field that lack something, and all right answers that cannot be read.
    """
    lines = [checked(record, f"{path}:{number}", gold_key) for number, record in enumerate(read_reranked(path), 1)]
    best = [None] * len(lines) if beam is None else _best_of_beam(beam, path, lines)
    golds = read_golds(answers, [(line.where, line.gold) for line in lines])
    if len(lines) < 2:
        raise DataError(
            f"{path} holds {len(lines)} questions; a comparison needs at least 2, and means something from hundreds"
        )
    return [_question(line, gold, answers, settings, one) for line, gold, one in zip(lines, golds, best, strict=True)]


def _best_of_beam(beam: str | Path, path: str | Path, lines: Sequence[Reranked]) -> list[str]:
    searches = read_reranked(beam)
    if [search.get("prompt") for search in searches] != [line.prompt for line in lines]:
        raise DataError(f"{beam} has other prompts than {path}; search for the same input")
    for number, search in enumerate(searches, 1):
        if not isinstance(search.get("best"), str):
            raise DataError(f"{beam}:{number}: best is no text; give an output of tools/rerank.py --beam")
    return [search["best"] for search in searches]


def _question(line: Reranked, gold: Any, answers: Answers, settings: RewardSettings, beam: str | None) -> Question:
    def is_right(text: str) -> bool:
        found = answers.read(text)
        return found is not None and answers.is_same(gold, found)

    prompt, texts, scores = line.prompt, line.texts, line.scores
    try:
        rewards = [
            [
                _or_worst(reward_of(score, prompt, text, replace(settings, weight=weight)))
                for score, text in zip(scores, texts, strict=True)
            ]
            for weight in GRID
        ]
    except DataError as error:
        raise DataError(f"{line.where}: {error}") from error
    told = [score.forward_tokens for score in scores]
    num_written = [len(text.split()) if num is None else num for num, text in zip(told, texts, strict=True)]
    return Question(
        prompt=prompt,
        gold=line.gold,
        is_right=np.array([is_right(text) for text in texts]),
        classes=np.array([-1 if c is None else c for c in classes_of(texts, answers)]),
        forward=np.array([_or_worst(score.forward_logprob) for score in scores]),
        forward_mean=np.array(
            [_or_worst(score.forward_logprob) / max(1, num) for score, num in zip(scores, num_written, strict=True)]
        ),
        reverse=np.array([_or_worst(score.reverse_logprob) for score in scores]),
        rewards=np.array(rewards),
        greedy=None if line.greedy is None else is_right(line.greedy),
        beam=None if beam is None else is_right(beam),
        sample_tokens=float(np.mean(num_written)),
        reverse_tokens=float(
            np.mean([num + (score.reverse_tokens or 0) for num, score in zip(num_written, scores, strict=True)])
        ),
        num_by_words=told.count(None),
    )


def _or_worst(value: float | None) -> float:
    return -np.inf if value is None else value


def chosen_weights(questions: Sequence[Question], num: int, num_folds: int, seed: int) -> npt.NDArray[np.int64]:
    """For each question the lambda (index of GRID) with which most questions of the *other* folds come out right.

    Of equally good ones the middle is taken. A question's own fold has no say, so no lambda has seen what it is judged on.
    """
    if not 2 <= num_folds <= len(questions):
        raise UsageError(f"{num_folds} folds of {len(questions)} questions: give from 2 to as many as there are questions")
    right = np.array([[question.outcome("Reverse Reward", num, w) for w in range(len(GRID))] for question in questions])
    folds = np.random.default_rng(seed).permutation(len(questions)) % num_folds
    chosen = np.zeros(len(questions), np.int64)
    for fold in range(num_folds):
        chosen[folds == fold] = _best_of(right[folds != fold])
    return chosen


def best_weight(questions: Sequence[Question], num: int) -> int:
    """The index of GRID that is best for these questions with `num` of their candidates; of equal ones the middle."""
    return _best_of(
        np.array([[question.outcome("Reverse Reward", num, w) for w in range(len(GRID))] for question in questions])
    )


def _best_of(right: Values) -> int:
    """The column [questions, lambdas] that is right most often; of equal ones the middle."""
    accuracy = right.mean(axis=0)
    best = np.flatnonzero(accuracy >= accuracy.max() - 1e-12)
    return int(best[len(best) // 2])
