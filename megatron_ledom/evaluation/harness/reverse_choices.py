"""Scores of a document's choices by a reverse model, of the (context, continuation) pairs that the harness asks for.

The harness's requests name their task and document, so its choices are found again among the requests of all tasks.
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
"""Names and meanings of `evaluation.multiple_choice`."""
WORD_BEGINS = re.compile(r"\s+(?=\S)")
Document = tuple[str, int, bool]
"""Task, number of the document in it, whether its choices have a context."""


def split_space(context: str, continuation: str) -> Pair:
    """White space between context and continuation belongs to the continuation, as tokenizers join it to what follows."""
    opened = context.rstrip()
    return opened, context[len(opened) :] + continuation


def document_of(request: Any) -> Document:
    """Where a request of the harness belongs. Unconditional requests of a document (acc_mutual_info) are apart from the others."""
    if request.task_name is None or request.doc_id is None:
        raise UsageError(
            "a request names no task and document, so it is not known which choices belong together; set its metadata"
        )
    return request.task_name, request.doc_id, bool(request.args[0].strip())


def choices_of_documents(requests: Sequence[Any]) -> dict[Document, list[Pair]]:
    """The distinct (context, continuation) of each document. Raises UsageError for one that has no others to be compared with."""
    found: dict[Document, list[Pair]] = {}
    for request in requests:
        found.setdefault(document_of(request), []).append(request.args)
    for (task, number, _), choices in found.items():
        if len(choices) < 2:
            raise UsageError(
                f"{task}, document {number}: one continuation given a context is asked for (output_type: loglikelihood), and a reverse"
                " model reads the continuation first: it can compare choices (output_type: multiple_choice) or score whole texts"
                " (loglikelihood_rolling); leave this task to a forward model"
            )
    return {document: list(dict.fromkeys(choices)) for document, choices in found.items()}


def choice_requests(
    choices: Sequence[Pair], way: str, tokenizer: JointTokenizer, room: int, document: Document
) -> list[ScoreRequest]:
    """Return what is scored of each choice. room: the most tokens a whole text may have."""
    if way != "joint" and not document[2]:
        raise UsageError(
            f"{document[0]}: way={way} asks how a context follows from a choice, and these choices have no context; use way=joint"
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
    """The choices with the space on the right side, without as much of the beginning of their contexts as must go so that all fit.

    What is left out is the same for all, up to a word if words are parted by white space. A reverse model comes to it last, so what is
    left has the log-likelihood that it has at the end of the whole. Raises DataError where choices do not fit with any of the context
    they share.
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
                f"{document[0]}, document {document[1]}: its choices take more than {room} tokens without any context they share,"
                " and of texts that begin differently likelihoods cannot be compared; leave it out (--limit, --samples)"
            )
    if dropped:
        logger.warning("%s, document %d: %d characters are left out, as %d tokens fit", *document[:2], dropped, room)
    return [(context[dropped:], continuation) for context, continuation in split]


def _longest_beyond(room: int, texts: Sequence[str], tokenizer: JointTokenizer) -> tuple[str, int] | None:
    """The text with the most tokens and how many of them have no room; None if all fit."""
    doubtful = [text for text in texts if len(text.encode()) + 1 > room]  # a token spells a byte, but for a dummy prefix
    sizes = {text: len(tokenizer.encode(text)) for text in doubtful}
    longest = max(doubtful, key=sizes.__getitem__, default=None)
    return None if longest is None or sizes[longest] <= room else (longest, sizes[longest] - room)


def _num_ids_before(tokenizer: JointTokenizer, text: str, cut: int) -> int:
    return tokenizer.split(text[:cut], text[cut:])[1]


def requested_score(request: ScoreRequest, scored: Mapping[Pair, SpanScore]) -> float:
    """The log-likelihood, less that of the prior where there is one."""
    whole = scored[request.pair].logprob
    return less_prior(whole, scored[request.prior].logprob) if request.prior else whole


def among_choices(values: Sequence[float]) -> list[float]:
    """log P of each choice, given that it is one of these; values: log-likelihoods of all, up to a constant."""
    highest = max(values)
    if highest == -math.inf:
        raise NotFiniteError("all choices of a document are impossible (log-likelihood -inf), so none is likelier than another")
    total = highest + math.log(math.fsum(math.exp(value - highest) for value in values))
    return [value - total for value in values]
