"""Ways to choose one of N answers, and how often each is right: Reverse Reward beside the baselines it has to beat.

Shapes: C candidates of a question.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.inference.answers import Answers, classes_of
from megatron_ledom.inference.reverse_reward import CandidateScore, RewardSettings, reward_of

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
    """One question's candidates, in the order in which they were sampled.

    is_right [C]; classes [C]: equal numbers are the same answer, -1 none. forward, forward_mean, reverse [C]: log-likelihoods
    (the mean is a token's); rewards [lambdas of GRID, C]; all -inf where a candidate cannot be scored. greedy, beam: whether that
    answer is right, None where there is none. sample_tokens, reverse_tokens: mean cost of writing and of judging a candidate.
    num_by_words: candidates whose written tokens the file does not tell; their words are counted in place of them.
    """

    prompt: str
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
        """How right a method is with the first `num` candidates (0 to 1); `weight` is an index of GRID. None: not known."""
        right = self.is_right[:num]
        if method in ("greedy", "beam by Reverse Reward"):
            known = self.greedy if method == "greedy" else self.beam
            return None if known is None else float(known)
        if method == "random of N":
            return float(right.mean())
        if method == "oracle":
            return float(right.any())
        if method in ("majority vote", "reverse-weighted majority"):
            rewards = self.rewards[weight, :num]
            weights = np.ones(num) if method == "majority vote" else np.exp(rewards - max(rewards.max(), -1e300))
            return float(self._vote(weights, right))
        likelihoods = {
            "forward likelihood, sum": self.forward,
            "forward likelihood, mean": self.forward_mean,
            "reverse only": self.reverse,
            "Reverse Reward": self.rewards[weight],
        }
        return float(right[int(np.argmax(likelihoods[method][:num]))])

    def _vote(self, weights: Values, right: npt.NDArray[np.bool_]) -> bool:
        """Whether the class with the most weight is right; of equal ones, the class that comes first. No answer has no vote."""
        classes = self.classes[: len(weights)]
        voted = [int(number) for number in dict.fromkeys(classes.tolist()) if number >= 0]
        if not voted:
            return False
        winner = max(voted, key=lambda number: float(weights[classes == number].sum()))
        return bool(right[classes == winner][0])


def load_questions(
    path: str | Path, gold_key: str, answers: Answers, settings: RewardSettings, beam: str | Path | None = None
) -> list[Question]:
    """The lines of a reranked file whose `gold_key` field holds the right answer (a text that ends with it, or the answer).

    beam: a file of searches for the same prompts, whose best answers are compared. Rewards are computed anew from the scores for
    every lambda; DataError names a line that lacks something.
    """
    records = read_reranked(path)
    searches = [] if beam is None else read_reranked(beam)
    if beam is not None and [r["prompt"] for r in searches] != [r["prompt"] for r in records]:
        raise DataError(f"{beam} has other prompts than {path}; search for the same input")
    questions = []
    for number, record in enumerate(records, 1):
        where = f"{path}:{number}"
        if gold_key not in record:
            raise DataError(f"{where}: has no field {gold_key!r} with the right answer; name the field that has it")
        best = searches[number - 1]["best"] if searches else None
        questions.append(_question(record, where, answers.read(str(record[gold_key])), answers, settings, best))
    if len(questions) < 2:
        raise DataError(
            f"{path} holds {len(questions)} questions; a comparison needs at least 2, and means something from hundreds"
        )
    return questions


def read_reranked(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a reranked file, one a line; DataError names a line that is none.

    A line ends at a newline byte only: inside a text, U+2028, U+2029 and U+0085 may stand as they are.
    """
    records = []
    with Path(path).open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line.decode("utf-8"))
            except ValueError as error:
                raise DataError(f"{path}:{number}: not a line of JSON in UTF-8 ({error}); repair or remove the line") from error
            if not isinstance(record, dict) or "scores" not in record:
                raise DataError(f"{path}:{number}: has no scores; give an output of tools/rerank.py")
            records.append(record)
    return records


def _question(
    record: dict[str, Any], where: str, gold: Any, answers: Answers, settings: RewardSettings, beam: str | None
) -> Question:
    if gold is None:
        raise DataError(f"{where}: no answer can be read from the right answer; see the kinds of answers")

    def is_right(text: str) -> bool:
        found = answers.read(text)
        return found is not None and answers.is_same(gold, found)

    texts = [c["text"] if isinstance(c, dict) else c for c in record["candidates"]]
    names = ("forward_logprob", "reverse_logprob", "forward_tokens", "reverse_tokens", "reward")
    scores = [
        CandidateScore(**{name: _value(s, name) for name in names}, language_model_logprob=_value(s, "language_model_logprob"))
        for s in record["scores"]
    ]
    prompt = record["prompt"]
    rewards = [
        [
            _or_worst(reward_of(score, prompt, text, replace(settings, weight=weight)))
            for score, text in zip(scores, texts, strict=True)
        ]
        for weight in GRID
    ]
    told = [score.forward_tokens for score in scores]
    num_written = [len(text.split()) if num is None else num for num, text in zip(told, texts, strict=True)]
    return Question(
        prompt=prompt,
        is_right=np.array([is_right(text) for text in texts]),
        classes=np.array([-1 if c is None else c for c in classes_of(texts, answers)]),
        forward=np.array([_or_worst(score.forward_logprob) for score in scores]),
        forward_mean=np.array(
            [_or_worst(score.forward_logprob) / max(1, num) for score, num in zip(scores, num_written, strict=True)]
        ),
        reverse=np.array([_or_worst(score.reverse_logprob) for score in scores]),
        rewards=np.array(rewards),
        greedy=is_right(record["greedy"]) if "greedy" in record else None,
        beam=None if beam is None else is_right(beam),
        sample_tokens=float(np.mean(num_written)),
        reverse_tokens=float(
            np.mean([num + (score.reverse_tokens or 0) for num, score in zip(num_written, scores, strict=True)])
        ),
        num_by_words=told.count(None),
    )


def _value(score: dict[str, Any], name: str) -> Any:
    """A value of a candidate's scores; -inf is written as null and named apart."""
    return -np.inf if name in score.get("minus_infinity", ()) else score.get(name)


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
    """The index of GRID that is best for these questions with their first `num` candidates; of equal ones the middle."""
    return _best_of(
        np.array([[question.outcome("Reverse Reward", num, w) for w in range(len(GRID))] for question in questions])
    )


def _best_of(right: Values) -> int:
    """The column [questions, lambdas] that is right most often; of equal ones the middle."""
    accuracy = right.mean(axis=0)
    best = np.flatnonzero(accuracy >= accuracy.max() - 1e-12)
    return int(best[len(best) // 2])
