"""Log-probabilities of one part of a text, given the other part, in either direction.

Shapes: B rows of a batch, K positions kept, V vocabulary of the logits.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from megatron_ledom.direction import Direction, to_model_order, to_text_order
from megatron_ledom.errors import DataError, NotFiniteError, UsageError
from megatron_ledom.inference.joint_tokenizer import JointTokenizer

MAX_KEPT_LOGITS = 2**28  # B * K * V of one batch: 1 GiB in float32
SHOWN_CHARACTERS = 60
"""Number of characters next to the token that an error about logits that are not finite quotes."""
SpanKey = tuple[tuple[int, ...], int]
Measured = TypeVar("Measured")
Measure = Callable[[torch.Tensor, torch.Tensor], list[Measured]]
"""Takes the logits [K, V] that predict the scored tokens, and these tokens [K]; returns one value for each token."""


@dataclass(frozen=True, slots=True)
class Span:
    """A sequence in model order; the tokens from position `num_context` on are scored, each given all before it."""

    tokens: list[int]
    num_context: int


@dataclass(slots=True)
class TokenUsage:
    """Tokens that a model has read and written so far, without padding, and the seconds that this took."""

    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class SpanScore:
    """Natural-log probabilities of a span, given the other part of its text.

    text_ids, token_logprobs: the scored ids and their values, in text order. eod_logprob: the log-probability of the eod at the
    end of the span, if requested. logprob: the sum of all values.
    """

    text_ids: list[int]
    token_logprobs: list[float]
    eod_logprob: float | None = None

    def __post_init__(self) -> None:
        """Raise NotFiniteError for NaN. -inf is allowed: it is the log-probability of an impossible token."""
        if math.isnan(self.logprob):
            position = next((i for i, value in enumerate(self.token_logprobs) if math.isnan(value)), None)
            token = "eod" if position is None else f"token {position} of the scored part, id {self.text_ids[position]},"
            raise NotFiniteError(f"the log-probability of {token} is not a number (NaN); check the model's weights")

    @property
    def logprob(self) -> float:
        """The summed log-probability in natural logs, with eod if requested."""
        return math.fsum([*self.token_logprobs, self.eod_logprob or 0.0])

    @property
    def num_tokens(self) -> int:
        """Number of scored tokens of the text, without eod."""
        return len(self.token_logprobs)


def span_tokens(
    tokenizer: JointTokenizer, direction: Direction, pair: tuple[str, str], leading_ids: list[int], stop_ids: list[int]
) -> tuple[list[int], int]:
    """Return the tokens of a (preceding, following) in model order, and how many of them are given; the others are to be scored.

    Both parts are encoded once as one text; a token that crosses the boundary belongs to `following`. `leading_ids`, or the
    first of `stop_ids` (eod), replace an empty given part. If the given part has no token of its own, the first token of the
    scored part counts as given, because nothing conditions it.
    """
    text_ids, num_preceding = tokenizer.split(*pair)
    reverse = direction is Direction.REVERSE
    num_given = len(text_ids) - num_preceding if reverse else num_preceding
    given = pair[1] if reverse else pair[0]
    leading = leading_ids or ([] if given else stop_ids[:1])
    if reverse and not num_given and not leading:
        raise DataError("a following text has no tokens, so the model has nothing to start from; pass a longer text")
    return [*leading, *to_model_order(text_ids, direction)], max(1, len(leading) + num_given)


def span_score(span: Span, logprobs: list[float], direction: Direction, with_eod: bool) -> SpanScore:
    """Return the score of a span in text order, from the log-probabilities in model order; with_eod: the last one is eod's."""
    num_scored = len(logprobs) - 1 if with_eod else len(logprobs)
    return SpanScore(
        text_ids=to_text_order(span.tokens[span.num_context :][:num_scored], direction),
        token_logprobs=to_text_order(np.array(logprobs[:num_scored]), direction).tolist(),
        eod_logprob=logprobs[-1] if with_eod else None,
    )


def score_spans(model: Any, spans: list[Span], batch_size: int) -> list[list[float]]:
    """Return log P(tokens[t] | tokens[:t]) for t >= num_context of each span, in model order, from a float32 log-softmax.

    Rows of similar length share a batch. They are padded after their end, which a causal model does not read, so the result
    depends on the batch only by rounding. A batch has at most `batch_size` rows, and fewer for large vocabularies. A span that
    occurs several times is computed once.
    """
    return measure_spans(model, spans, batch_size, logprobs_of)


def logprobs_of(logits_KV: torch.Tensor, tokens_K: torch.Tensor) -> list[float]:
    """Return the log-probability of each token, computed in float32."""
    logprobs_KV = torch.log_softmax(logits_KV.float(), dim=-1)
    return [float(value) for value in logprobs_KV.gather(1, tokens_K[:, None])[:, 0].tolist()]


def logprobs_and_likeliest(logits_KV: torch.Tensor, tokens_K: torch.Tensor) -> list[tuple[float, bool]]:
    """Return for each token its log-probability, and True if it is the likeliest token (the first one of equals)."""
    is_likeliest_K = logits_KV.argmax(dim=-1) == tokens_K
    return list(zip(logprobs_of(logits_KV, tokens_K), is_likeliest_K.tolist(), strict=True))


def measure_spans(model: Any, spans: list[Span], batch_size: int, measure: Measure[Measured]) -> list[list[Measured]]:
    """Return the values of `measure` for each scored token of each span, in model order; batches as in `score_spans`."""
    check_batch_size(batch_size)
    distinct = distinct_spans(spans)
    pending = sorted((span for span in distinct.values() if len(span.tokens) > span.num_context), key=lambda s: -len(s.tokens))
    values: dict[SpanKey, list[Measured]] = {key: [] for key in distinct}
    while pending:
        num_rows = _fitting_rows(pending[:batch_size], model.config.vocab_size)
        chosen, pending = pending[:num_rows], pending[num_rows:]
        for span, row in zip(chosen, _score_batch(model, chosen, measure), strict=True):
            values[_key(span)] = row
    return [list(values[_key(span)]) for span in spans]


def distinct_spans(spans: list[Span]) -> dict[SpanKey, Span]:
    """Return each span once, in the order of first appearance."""
    return {_key(span): span for span in spans}


def _key(span: Span) -> SpanKey:
    return tuple(span.tokens), span.num_context


def check_batch_size(batch_size: int) -> None:
    """Raise UsageError for a batch size below 1."""
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size}: it must be at least 1")


def _fitting_rows(spans: list[Span], vocab_size: int) -> int:
    """Return how many of the spans, longest first, fit into a batch whose logits stay below the limit; at least 1."""
    longest = len(spans[0].tokens)
    num_rows = 1
    for count in range(2, len(spans) + 1):
        kept = longest - min(span.num_context for span in spans[:count]) + 1
        if count * kept * vocab_size > MAX_KEPT_LOGITS:
            break
        num_rows = count
    return num_rows


@torch.inference_mode()
def _score_batch(model: Any, spans: list[Span], measure: Measure[Measured]) -> list[list[Measured]]:
    """Run one forward pass over a batch; keep the logits from the first position that any row needs.

    The model predicts the last token of a span but does not read it, so a span may be one token longer than the model's positions.
    """
    longest = max(len(span.tokens) for span in spans) - 1
    first = min(span.num_context for span in spans) - 1  # the logits at position t predict token t + 1
    input_ids = torch.zeros(len(spans), longest, dtype=torch.long)
    for row, span in enumerate(spans):
        input_ids[row, : len(span.tokens) - 1] = torch.tensor(span.tokens[:-1])
    input_ids = input_ids.to(model.device)
    logits_BKV = model(input_ids=input_ids, use_cache=False, logits_to_keep=longest - first).logits
    _check_finite(model, spans, logits_BKV, first)
    measured = []
    for row, span in enumerate(spans):
        begin, end = span.num_context, len(span.tokens)
        tokens_K = torch.tensor(span.tokens[begin:], device=logits_BKV.device)
        measured.append(measure(logits_BKV[row, begin - 1 - first : end - 1 - first], tokens_K))
    return measured


def _check_finite(model: Any, spans: list[Span], logits_BKV: torch.Tensor, first: int) -> None:
    """Raise NotFiniteError for the first scored token whose logits contain NaN or +inf, or no finite value.

    The maximum over the vocabulary finds these; -inf for single tokens only makes them impossible and is allowed. Logits at the
    padding are ignored. first: the position of the first kept logits.
    """
    is_finite_BK = torch.isfinite(logits_BKV.amax(dim=-1))
    if bool(is_finite_BK.all()):
        return
    for row, span in enumerate(spans):
        begin, end = span.num_context - 1 - first, len(span.tokens) - 1 - first
        bad = (~is_finite_BK[row, begin:end]).nonzero()
        if len(bad):
            position = span.num_context + int(bad[0])
            raise not_finite(model, span.tokens[:position], span.tokens[position])


def too_long(num_tokens: int, num_positions: int | None, direction: Direction) -> str | None:
    """Return the reason if a text of `num_tokens` is too long to be scored; None if it fits."""
    if not num_positions or num_tokens <= num_positions:
        return None
    return f"a text of {num_tokens} tokens exceeds the {num_positions} positions of the {direction} model"


def no_room(num_given: int, num_new: int, num_positions: int | None, direction: Direction) -> str | None:
    """Return the reason if `num_given` and `num_new` tokens together are too long; None if they fit."""
    if not num_positions or num_given + num_new <= num_positions:
        return None
    return (
        f"{num_given} tokens of text and max_new_tokens={num_new} exceed the {num_positions} positions of the {direction} model"
    )


def not_finite(model: Any, read: Sequence[int], next_id: int | None = None) -> NotFiniteError:
    """Return the error for logits of `model` that are not finite at the position after `read` (ids, model order)."""
    name = getattr(model.config, "name_or_path", "") or type(model).__name__
    token = "for the next token" if next_id is None else f"for token id {next_id}"
    return NotFiniteError(
        f"the model {name} gives logits that are not finite (NaN or infinity, in {model.dtype}) {token} after {len(read)} tokens."
        " Its weights are damaged, or its values exceed the range of that type; check the weights, or load it in float32",
        read,
        next_id,
    )


@contextmanager
def naming_text(tokenizer: JointTokenizer, direction: Direction) -> Iterator[None]:
    """Add the text and the token to a NotFiniteError of the block, whose message contains only ids."""
    try:
        yield
    except NotFiniteError as error:
        if not error.read:
            raise
        reverse = direction is Direction.REVERSE
        read = tokenizer.decode(to_text_order(error.read, direction))
        shown = read[:SHOWN_CHARACTERS] if reverse else read[-SHOWN_CHARACTERS:]
        token = "" if error.next_id is None else f" {tokenizer.decode([error.next_id])!r}"
        raise NotFiniteError(f"{error} (token{token} {'before' if reverse else 'after'} {shown!r})") from error
