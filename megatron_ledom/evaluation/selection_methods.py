"""Accuracy of the methods that choose one of a question's C candidates: Reverse Reward and its baselines.

The accuracy with k of C candidates is the mean over all subsets of k, so the order of the candidates does not matter.
For a score it has a closed formula. Votes are counted for each subset of k, or for a number of subsets drawn with a
fixed seed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.evaluation.grading.answers import Answers, classes_of, read_golds
from megatron_ledom.evaluation.intervals import Values
from megatron_ledom.inference.reverse_reward.ranked_lines import (
    Reranked,
    check_same_questions,
    checked,
    chosen_text,
    read_reranked,
)
from megatron_ledom.inference.reverse_reward.reward import RewardSettings, reward_of

Marks = npt.NDArray[np.bool_]
MOST_SUBSETS = 256
"""Maximum number of subsets whose votes are counted. If there are more, as many are drawn."""
GRID = tuple(step / 20 for step in range(21))
"""The values from which lambda is chosen."""
METHODS = {
    "greedy": "the likeliest answer, one for each question",
    "random of N": "the mean over all candidates",
    "forward likelihood, sum": "highest log P_F(y|x)",
    "forward likelihood, mean": "highest log P_F(y|x) per token",
    "majority vote": "the most frequent answer",
    "reverse-weighted majority": "the answer with the highest sum of exp(reward) over its candidates",
    "reverse only": "highest log P_R(x|y)",
    "Reverse Reward": "highest reward, with lambda chosen on other questions",
    "beam by Reverse Reward": "the best answer of the step-level beam search",
    "oracle": "pass@N: any candidate is right",
}
WITH_REVERSE = ("reverse-weighted majority", "reverse only", "Reverse Reward")
"""Methods that need a reverse pass over each candidate."""


@dataclass(frozen=True, slots=True)
class Question:
    """The candidates of one question, in any order.

    is_right [C]; classes [C]: equal numbers are equal answers, -1 means no answer. forward, forward_mean, reverse [C]:
    log-likelihoods (the mean is per token); rewards [lambdas of GRID, C]; all -inf if a candidate cannot be scored.
    is_skipped [C]: not scored, so never chosen by a score. greedy, beam: True if that answer is right, None without
    one. sample_tokens, reverse_tokens: mean tokens to write and to judge a candidate. num_by_words: candidates without
    a recorded number of tokens; their words are counted instead.
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
    is_skipped: npt.NDArray[np.bool_]

    def outcome(self, method: str, num: int, weight: int) -> float | None:
        """Return the accuracy (0 to 1) of a method with `num` candidates, the mean over all subsets of that size.

        Answers of equal score are equally likely to be chosen. weight: an index of GRID. None: the file has no such
        answer.
        """
        if method in ("greedy", "beam by Reverse Reward"):
            known = self.greedy if method == "greedy" else self.beam
            return None if known is None else float(known)
        if method == "random of N":
            return float(self.is_right.mean())
        if method == "oracle":
            return share_with_any(self.is_right, num)
        if method in ("majority vote", "reverse-weighted majority"):
            if method == "majority vote":
                return share_by_vote(np.zeros(len(self.classes)), self.classes, self.is_right, num)
            return share_by_vote(self.rewards[weight], np.where(self.is_skipped, -1, self.classes), self.is_right, num)
        likelihoods = {
            "forward likelihood, sum": self.forward,
            "forward likelihood, mean": self.forward_mean,
            "reverse only": self.reverse,
            "Reverse Reward": self.rewards[weight],
        }
        order = np.unique(likelihoods[method], return_inverse=True)[1].reshape(-1)
        below = np.where(self.is_skipped, -1, order).astype(np.float64)  # below -inf, and wrong if all are skipped
        return share_by_score(below, self.is_right & ~self.is_skipped, num)


def load_questions(
    path: str | Path, gold_key: str, answers: Answers, settings: RewardSettings, beam: str | Path | None = None
) -> list[Question]:
    """Return the questions of a reranked file without the skipped ones.

    gold_key: the field with the right answer (or a text that ends with it). `load_seeds` loads several files of the
    same questions.
    """
    (questions,), _ = load_seeds([path], gold_key, answers, settings, beam)
    return questions


def load_seeds(
    paths: Sequence[str | Path], gold_key: str, answers: Answers, settings: RewardSettings, beam: str | Path | None = None
) -> tuple[list[list[Question]], list[str]]:
    """Return the questions of reranked files, one file per sampling seed, and notes on skipped questions.

    All files are of the same input. A question that was skipped in one file is omitted from all of them. beam: a file
    of searches for the same prompts, to compare their best answers; a search without an answer is wrong. The rewards of
    every lambda are computed from the scores. Raises DataError with the line and the field that is missing, or with all
    right answers that cannot be read.
    """
    seeds = [
        [checked(record, f"{path}:{number}", gold_key) for number, record in enumerate(read_reranked(path), 1)]
        for path in paths
    ]
    best = None if beam is None else _best_of_beam(beam, paths[0], seeds[0])
    check_same_questions(paths, [[(line.prompt, line.gold) for line in lines] for lines in seeds])
    kept = [index for index in range(len(seeds[0])) if all(lines[index].skipped is None for lines in seeds)]
    loaded = []
    for path, lines in zip(paths, seeds, strict=True):
        golds = read_golds(answers, [(lines[index].where, lines[index].gold) for index in kept])
        if len(kept) < 2:
            skipped = f" (and {len(lines) - len(kept)} skipped)" if len(kept) < len(lines) else ""
            raise DataError(
                f"{path} has {len(kept)} questions{skipped}; a comparison needs at least 2, and is meaningful with hundreds"
            )
        rows = zip(kept, golds, strict=True)
        loaded.append([_question(lines[i], gold, answers, settings, None if best is None else best[i]) for i, gold in rows])
    unanswered = 0 if best is None else sum(not best[index] for index in kept)
    return loaded, _notes_on_skipped(len(seeds[0]), kept, unanswered)


def chosen_weights(questions: Sequence[Question], num: int, num_folds: int, seed: int) -> npt.NDArray[np.int64]:
    """Return for each question the lambda (index of GRID) with the highest accuracy on the *other* folds.

    Of several equally good ones, it is the middle one. No lambda is chosen on the questions that it is evaluated on.
    """
    if not 2 <= num_folds <= len(questions):
        raise UsageError(
            f"--folds {num_folds} must be 2 to {len(questions)}, the number of questions; give --folds {min(5, len(questions))}"
        )
    right = np.array([[question.outcome("Reverse Reward", num, w) for w in range(len(GRID))] for question in questions])
    folds = np.random.default_rng(seed).permutation(len(questions)) % num_folds
    chosen = np.zeros(len(questions), np.int64)
    for fold in range(num_folds):
        chosen[folds == fold] = _best_of(right[folds != fold])
    return chosen


def best_weight(questions: Sequence[Question], num: int) -> int:
    """Return the index of GRID with the highest accuracy with `num` candidates; of equal ones the middle."""
    return _best_of(
        np.array([[question.outcome("Reverse Reward", num, w) for w in range(len(GRID))] for question in questions])
    )


def share_with_any(is_right: Marks, num: int) -> float:
    """Return the fraction of subsets of `num` that contain a right candidate: 1 - C(wrong, num) / C(all, num)."""
    wrong = int((~is_right).sum())
    return 1 - float(_shares_within(len(is_right), num)[wrong])


def share_by_score(scores: Values, is_right: Marks, num: int) -> float:
    """Return the fraction of subsets of `num` whose best candidate by score is right.

    Equal scores are equally likely to be chosen. With b candidates below a score and m at it, the best has this score
    in (C(b + m, num) - C(b, num)) / C(all, num) of the subsets.
    """
    _, groups, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    right = np.bincount(groups.reshape(-1), weights=is_right) / sizes
    up_to, within = np.cumsum(sizes), _shares_within(len(scores), num)
    return float(((within[up_to] - within[up_to - sizes]) * right).sum())


def share_by_vote(log_weights: Values, classes: npt.NDArray[np.int64], is_right: Marks, num: int) -> float:
    """Return the fraction of subsets of `num` whose class with the most weight is right.

    Tied classes share the credit; class -1 has no vote.
    """
    members = classes[:, None] == np.unique(classes[classes >= 0])[None, :]
    if members.shape[1] == 0:
        return 0.0
    subsets = _subsets(len(classes), num)
    inside = np.where(subsets, log_weights, -np.inf)
    votes = np.exp(inside - np.maximum(inside.max(axis=1, keepdims=True), -1e300)) @ members
    stands = (subsets.astype(np.float64) @ members) > 0
    most = np.where(stands, votes, -np.inf).max(axis=1, keepdims=True)
    wins = stands & (votes >= most - 1e-12 * np.abs(most))
    right = (members & is_right[:, None]).sum(axis=0) / members.sum(axis=0)
    return float(((wins * right).sum(axis=1) / np.maximum(1, wins.sum(axis=1))).mean())


@lru_cache(maxsize=256)
def _shares_within(total: int, num: int) -> Values:
    """Return, for n from 0 to `total`, the fraction of subsets of `num` within n given candidates of `total`."""
    every = math.comb(total, num)
    return np.array([math.comb(n, num) / every for n in range(total + 1)])


@lru_cache(maxsize=64)
def _subsets(total: int, num: int) -> Marks:
    """Return marks [subsets, total] of the subsets of `num`: all of them, or MOST_SUBSETS drawn ones."""
    if math.comb(total, num) <= MOST_SUBSETS:
        chosen = np.array(list(combinations(range(total), num)))
    else:
        rng = np.random.default_rng([total, num])
        chosen = np.argsort(rng.random((MOST_SUBSETS, total)), axis=1)[:, :num]
    marks = np.zeros((len(chosen), total), np.bool_)
    np.put_along_axis(marks, chosen, True, axis=1)
    return marks


def _notes_on_skipped(num: int, kept: Sequence[int], num_unanswered: int) -> list[str]:
    notes = []
    if len(kept) < num:
        notes.append(
            f"Note: {num - len(kept)} of {num} questions were skipped by the reranking, because their prompts leave no room for an answer;"
            " they are omitted from every file and method."
        )
    if num_unanswered:
        notes.append(
            f"Note: {num_unanswered} of {len(kept)} beam searches chose no answer, because their prompt or answers were skipped or"
            " empty; they count as wrong."
        )
    return notes


def _best_of_beam(beam: str | Path, path: str | Path, lines: Sequence[Reranked]) -> list[str]:
    searches = read_reranked(beam)
    if [search.get("prompt") for search in searches] != [line.prompt for line in lines]:
        raise DataError(f"{beam} and {path} have different prompts; run the search on the same input")
    return [chosen_text(search, f"{beam}:{number}") for number, search in enumerate(searches, 1)]


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
    recorded = [score.forward_tokens for score in scores]
    num_written = [len(text.split()) if num is None else num for num, text in zip(recorded, texts, strict=True)]
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
            np.mean(
                [
                    num + (score.reverse_tokens or 0) if score.skipped is None else 0
                    for num, score in zip(num_written, scores, strict=True)
                ]
            )
        ),
        num_by_words=recorded.count(None),
        is_skipped=np.array([score.skipped is not None for score in scores]),
    )


def _or_worst(value: float | None) -> float:
    return -np.inf if value is None else value


def _best_of(right: Values) -> int:
    """Return the column of [questions, lambdas] with the highest accuracy; the middle one of several."""
    accuracy = right.mean(axis=0)
    best = np.flatnonzero(accuracy >= accuracy.max() - 1e-12)
    return int(best[len(best) // 2])
