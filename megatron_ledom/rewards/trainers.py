"""Reward functions as TRL, verl and OpenRLHF call them. Each passes texts to one `ReverseRewardFunction`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.inference.reverse_reward.queries import answer_of
from megatron_ledom.rewards.reward_function import ReverseRewardFunction

Message = Mapping[str, Any]
"""A message of a conversation, with `role` and `content`."""


def chat_text(messages: Sequence[Message], where: str = "a conversation") -> str:
    """Return the texts of messages, joined by line breaks, without roles. Raises DataError for other content than text."""
    texts = []
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else message
        parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
        for part in parts:
            text = part.get("text") if isinstance(part, Mapping) else None
            if not isinstance(text, str):
                raise DataError(f"{where} contains {str(part)[:60]!r}, expected a text; Reverse Reward reads texts only")
            texts.append(text)
    return "\n".join(texts)


def chat_prompt(messages: Sequence[Message]) -> str:
    """Return the texts of a conversation before the answer, each closed by a line break."""
    return chat_text(messages, "a prompt") + "\n"


class TrlReward:
    """A reward function of TRL's trainers, such as `GRPOTrainer(reward_funcs=TrlReward(function))`.

    render_prompt: returns the prompt of a conversation as text, for datasets of messages; `chat_prompt` by default. It should
    write prompts as the reverse model saw them in its training.
    """

    __name__ = "reverse_reward"
    """The name that TRL logs."""

    def __init__(
        self, function: ReverseRewardFunction, render_prompt: Callable[[Sequence[Message]], str] = chat_prompt
    ) -> None:
        self.function, self.render_prompt = function, render_prompt

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        """Return the reward of each completion. prompts and completions are texts or lists of messages; TRL's columns are ignored."""
        texts = [prompt if isinstance(prompt, str) else self.render_prompt(prompt) for prompt in prompts]
        answers = [answer if isinstance(answer, str) else chat_text(answer, "a completion") for answer in completions]
        return self.function(texts, answers)


class VerlReward:
    """The `compute_score` of verl's `custom_reward_function`; `compute_scores` is that of its reward manager `batch`.

    verl does not pass the prompt. question_key: the key of `extra_info` with the question, as verl's data preparation writes it.
    separator: the end of the prompt, between the question and the answer.
    """

    def __init__(self, function: ReverseRewardFunction, *, question_key: str = "question", separator: str = "\n") -> None:
        self.function, self.question_key, self.separator = function, question_key, separator

    def __call__(
        self,
        data_source: str,
        solution_str: str,
        ground_truth: Any,
        extra_info: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> float:
        """Return the reward of one answer. data_source and ground_truth are not used."""
        return self.compute_scores([data_source], [solution_str], [ground_truth], [extra_info])[0]

    def compute_scores(
        self,
        data_sources: Sequence[str],
        solution_strs: Sequence[str],
        ground_truths: Sequence[Any],
        extra_infos: Sequence[Mapping[str, Any] | None],
        **_: Any,
    ) -> list[float]:
        """Return the rewards of a batch of answers."""
        return self.function([self._prompt(info) for info in extra_infos], list(solution_strs))

    def _prompt(self, extra_info: Mapping[str, Any] | None) -> str:
        question = (extra_info or {}).get(self.question_key)
        if not isinstance(question, str):
            known = ", ".join(map(str, extra_info or {})) or "none"
            raise DataError(
                f"extra_info has no text {self.question_key!r}; its keys are: {known}. Write the question into extra_info of the data,"
                " or pass question_key"
            )
        return question + self.separator


class OpenRlhfReward:
    """The `reward_func` of OpenRLHF, and what its remote reward model returns.

    ends: texts of special tokens that end a query, such as "</s>" or "<|im_end|>"; OpenRLHF does not remove them.
    """

    def __init__(self, function: ReverseRewardFunction, *, ends: Sequence[str] = ()) -> None:
        if isinstance(ends, str) or not all(isinstance(end, str) and end for end in ends):
            raise UsageError(f"ends={ends!r} must be a list of texts that are not empty, such as ['</s>']")
        self.function, self.ends = function, tuple(ends)

    def __call__(self, queries: Sequence[str], prompts: Sequence[str], labels: Any = None, **_: Any) -> dict[str, Any]:
        """Return tensors: `rewards`, `scores` (the same) and `extra_logs`. A query is a prompt with its answer; labels are not used."""
        import torch

        rewards = torch.tensor(self._rewards(queries, prompts), dtype=torch.float32)
        return {"rewards": rewards, "scores": rewards, "extra_logs": {"reverse_reward": rewards}}

    def respond(self, request: Mapping[str, Any]) -> dict[str, list[float]]:
        """Return the response to a request of OpenRLHF to a remote reward model: an object with `query` and `prompts`."""
        queries, prompts = request.get("query"), request.get("prompts")
        for name, given in (("query", queries), ("prompts", prompts)):
            if not isinstance(given, list):
                raise DataError(f"the request has {str(given)[:60]!r} under {name!r}, expected a list of texts")
        rewards = self._rewards(list(queries or []), list(prompts or []))
        return {"rewards": rewards, "scores": rewards}

    def _rewards(self, queries: Sequence[str], prompts: Sequence[str]) -> list[float]:
        if len(queries) != len(prompts):
            raise DataError(f"{len(queries)} queries and {len(prompts)} prompts were given; pass one prompt for each query")
        pairs = zip(queries, prompts, strict=True)
        return self.function(list(prompts), [answer_of(query, prompt, self.ends) for query, prompt in pairs])
