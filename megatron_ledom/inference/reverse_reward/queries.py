"""Queries of RLHF trainers: a prompt and its answer as one text."""

from collections.abc import Sequence

from megatron_ledom.errors import DataError


def answer_of(query: str, prompt: str, ends: Sequence[str]) -> str:
    """Return the answer in a query, without the special tokens `ends` at its end.

    The query begins with its prompt, perhaps after a BOS. Raises DataError if it does not contain the prompt.
    """
    is_text = isinstance(prompt, str) and prompt != ""
    found = 0 if is_text and query.startswith(prompt) else query.find(prompt) if is_text else -1
    if found < 0:
        raise DataError(
            f"the query {query[:60]!r} does not contain its prompt {str(prompt)[:60]!r}, so the answer is unknown; pass queries that"
            " begin with their prompts"
        )
    answer = query[found + len(prompt) :]
    while end := next((end for end in ends if answer.endswith(end)), None):
        answer = answer.removesuffix(end)
    return answer
