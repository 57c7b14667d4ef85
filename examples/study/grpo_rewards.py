"""The reward functions of the arms of part 5, as TRL calls them. Each measures every answer that it rewards."""

import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from indicators import marks_of

BASE, REVERSE, SHUFFLED, RIGHT = "no training", "Reverse Reward", "shuffled rewards", "right-answer reward"
ARMS = {BASE: "none", REVERSE: "reverse", SHUFFLED: "shuffled", RIGHT: "right"}
"""Name in the report -> name in files and on the command line."""
Scores = Callable[[Sequence[str], Sequence[str]], list[float]]


def shuffled_within_groups(rewards: Sequence[float], size: int, random_: random.Random) -> list[float]:
    """Return the rewards with those of each group of `size` answers to one question in a random order.

    GRPO compares the answers of a group. So this keeps the distribution of its advantages exactly, while the expected advantage
    of each answer is 0. An exchange between groups would also change how far rewards differ within a group.
    """
    if len(rewards) % size:
        raise ValueError(f"{len(rewards)} rewards are not groups of {size}")
    mixed: list[float] = []
    for start in range(0, len(rewards), size):
        mixed += random_.sample(list(rewards[start : start + size]), size)
    return mixed


class ArmReward:
    """The reward of an arm. `curve` gets the means of each call: the Reverse Reward, the marks, and the length in tokens.

    score: the Reverse Reward of prompts and answers; all arms compute it, so that they can be compared.
    """

    def __init__(self, arm: str, score: Scores, group_size: int, seed: int) -> None:
        self.arm, self.score, self.group_size, self.random = arm, score, group_size, random.Random(seed)
        self.curve: list[dict[str, float]] = []
        self.__name__ = f"reward_{arm}"  # TRL logs under this name

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        answer: Sequence[str],
        **_: Any,
    ) -> list[float]:
        """Return the reward of each completion. answer: the right answers, which only the arm `right` uses."""
        rewards = self.score(prompts, completions)
        rows = zip(prompts, completions, answer, strict=True)
        marks = [marks_of({"prompt": prompt, "answer": gold}, text) for prompt, text, gold in rows]
        means = {name: statistics.mean(one[name] for one in marks) for name in marks[0]}
        lengths = statistics.mean(map(len, completion_ids))
        self.curve.append({"reward": statistics.mean(rewards), "tokens": lengths, **means})
        if self.arm == ARMS[RIGHT]:
            return [one["right"] for one in marks]
        if self.arm == ARMS[SHUFFLED]:
            if any(len(set(prompts[i : i + self.group_size])) > 1 for i in range(0, len(prompts), self.group_size)):
                raise ValueError("the answers to one question are not next to each other")
            return shuffled_within_groups(rewards, self.group_size, self.random)
        return rewards
