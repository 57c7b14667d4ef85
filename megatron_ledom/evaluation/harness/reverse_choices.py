"""Scores of a document's choices by a reverse model, for the harness's requests of (context, continuation).

The requests name their task and document, so the choices of a document are collected from the requests of all tasks.
"""

import logging
import math
import os
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from megatron_ledom.errors import DataError, NotFiniteError, UsageError
from megatron_ledom.evaluation.multiple_choice import Pair, ScoreRequest, less_prior
from megatron_ledom.inference.joint_tokenizer import JointTokenizer
from megatron_ledom.inference.scoring import SpanScore

logger = logging.getLogger(__name__)
WAYS = ("joint", "context_given_choice", "prior_removed")
"""Ways to score, explained in `evaluation.multiple_choice`."""
WORD_BEGINS = re.compile(r"\s+(?=\S)")
Document = tuple[str, int, bool]
"""Task, number of the document in it, True if its choices have a context."""


def split_space(context: str, continuation: str) -> Pair:
    """Move white space at the end of the context to the continuation, because tokenizers join it to the next word."""
    opened = context.rstrip()
    return opened, context[len(opened) :] + continuation


def document_of(request: Any) -> Document:
    """Return the document of a request. Requests without context (acc_mutual_info) count as another document."""
    if request.task_name is None or request.doc_id is None:
        raise UsageError("a request names no task and document, so its choices cannot be grouped; set its metadata")
    return request.task_name, request.doc_id, bool(request.args[0].strip())


def choices_of_documents(requests: Sequence[Any]) -> dict[Document, list[Pair]]:
    """Return the distinct (context, continuation) of each document.

    Raises UsageError for a document with a single one.
    """
    found: dict[Document, list[Pair]] = {}
    for request in requests:
        found.setdefault(document_of(request), []).append(request.args)
    for (task, number, _), choices in found.items():
        if len(choices) < 2:
            raise UsageError(
                f"{task}, document {number} has one continuation (output_type: loglikelihood), and a reverse model reads the continuation"
                " first: it can compare choices (output_type: multiple_choice) or score whole texts (loglikelihood_rolling); run this"
                " task with a forward model"
            )
    return {document: list(dict.fromkeys(choices)) for document, choices in found.items()}


def choice_requests(
    choices: Sequence[Pair], way: str, tokenizer: JointTokenizer, room: int, document: Document
) -> list[ScoreRequest]:
    """Return the score to compute for each choice. room: maximum tokens of a whole text."""
    if way != "joint" and not document[2]:
        raise UsageError(
            f"{document[0]}: way={way} scores a context given a choice, and these choices have no context; use way=joint"
        )
    return [_request(context, continuation, way) for context, continuation in fitting(choices, tokenizer, room, document)]


def _request(context: str, continuation: str, way: str) -> ScoreRequest:
    whole = context + continuation if context else continuation.lstrip()
    if way == "joint":
        return ScoreRequest((whole, ""))
    if way == "context_given_choice":
        return ScoreRequest((context, continuation))
    return ScoreRequest((whole, ""), (continuation.lstrip(), ""))


def fitting(choices: Sequence[Pair], tokenizer: JointTokenizer, room: int, document: Document) -> list[Pair]:
    """Return the choices after `split_space`, without the beginning of their contexts if the texts are too long.

    All choices lose the same characters, up to a word if white space separates words. A reverse model reads the
    beginning last, so the rest keeps its log-likelihood. Raises DataError if the choices do not fit without any context
    that they share.
    """
    split = [split_space(*choice) for choice in choices]
    wholes = [context + continuation for context, continuation in split]
    shared = os.path.commonprefix([context for context, _ in split])  # noqa: RUF071 (characters are meant)
    dropped = 0
    while too_long := _longest_beyond(room, [whole[dropped:] for whole in wholes], tokenizer):
        text, excess = too_long
        num_before = partial(_num_ids_before, tokenizer, text)
        dropped += max(1, bisect_left(range(len(text)), excess, key=num_before))
        next_word = WORD_BEGINS.search(shared, dropped)
        dropped = next_word.end() if next_word else dropped
        if dropped >= len(shared):
            raise DataError(
                f"{document[0]}, document {document[1]}: the choices have more than {room} tokens without the context that they share,"
                " and likelihoods of texts that begin differently cannot be compared; skip the document (--limit, --samples)"
            )
    if dropped:
        logger.warning("%s, document %d: skipped %d characters of the context: %d tokens fit", *document[:2], dropped, room)
    return [(context[dropped:], continuation) for context, continuation in split]


def _longest_beyond(room: int, texts: Sequence[str], tokenizer: JointTokenizer) -> tuple[str, int] | None:
    """Return the text with the most tokens and the number of tokens beyond `room`; None if all fit."""
    doubtful = [text for text in texts if len(text.encode()) + 1 > room]  # a token has at least a byte, except a dummy prefix
    sizes = {text: len(tokenizer.encode(text)) for text in doubtful}
    longest = max(doubtful, key=sizes.__getitem__, default=None)
    return None if longest is None or sizes[longest] <= room else (longest, sizes[longest] - room)


def _num_ids_before(tokenizer: JointTokenizer, text: str, cut: int) -> int:
    return tokenizer.split(text[:cut], text[cut:])[1]


def requested_score(request: ScoreRequest, scored: Mapping[Pair, SpanScore]) -> float:
    """Return the log-likelihood, minus that of the prior if there is one."""
    whole = scored[request.pair].logprob
    return less_prior(whole, scored[request.prior].logprob) if request.prior else whole


def among_choices(values: Sequence[float]) -> list[float]:
    """Return the logs of the choices' probabilities, normalized to add up to 1.

    values: log-likelihoods, up to a constant.
    """
    highest = max(values)
    if highest == -math.inf:
        raise NotFiniteError("all choices of a document have log-likelihood -inf, so they cannot be ranked")
    total = highest + math.log(math.fsum(math.exp(value - highest) for value in values))
    return [value - total for value in values]
