"""The losses of a forward and of a reverse model on the same documents: records and metrics.

Differences are forward minus reverse, in nats: below zero the loss of the reverse model is higher. Positions are in
text order for both models: the tenth of the document in which a token is, and its number from the beginning and from
the end.

The comparison uses the inner tokens of a document: all except the first and the last of the text. The forward model
predicts the first token from eod alone, the reverse model the last one. Training does not count such a prediction in
the loss by default (`data.eod_mask_loss`), so its loss is meaningless. The sums over whole documents are recorded too;
models with different tokenizers can only be compared by these.

A document follows eod in model order (BOS for a stock model whose tokenizer adds one) and ends with eod. A document
longer than the context is read in windows that overlap by half. The first window scores all of its tokens, each later
window only the tokens that are not scored yet, so each has at least half a context before it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ledom.direction import to_model_order, to_text_order
from megatron_ledom.errors import UsageError
from megatron_ledom.evaluation.intervals import Values, bootstrap_interval
from megatron_ledom.inference.joint_tokenizer import JointTokenizer
from megatron_ledom.inference.language_model import LanguageModel
from megatron_ledom.inference.scoring import Span, SpanScore, naming_text, score_spans

SIDES = ("forward", "reverse")
NUM_PARTS = 10
Record = Mapping[str, Any]
Summary = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Document:
    """A text, its domain in the corpus (may be empty), and its place in the file."""

    text: str
    domain: str = ""
    where: str = ""


@dataclass(frozen=True, slots=True)
class CompareSettings:
    """Settings of a comparison.

    context: maximum tokens per window; num_resamples, seed: of the intervals over documents.
    """

    context: int
    batch_size: int = 16
    num_resamples: int = 2000
    seed: int = 0


def document_records(
    forward: LanguageModel, reverse: LanguageModel, documents: Sequence[Document], settings: CompareSettings
) -> list[dict[str, Any]]:
    """Return the record of each document.

    Losses are sums in nats; `inner` excludes the first and the last token of the text. If both models have the same
    tokenizer, `tenths`, `from_start` and `from_end` contain the sums of the inner tokens by position.
    """
    is_same = is_same_tokenizer(forward.tokenizer, reverse.tokenizer)
    ids = [reverse.tokenizer.encode(document.text) for document in documents]
    forward_ids = ids if is_same else [forward.tokenizer.encode(document.text) for document in documents]
    scores = [
        document_losses(model, own, context=settings.context, batch_size=settings.batch_size)
        for model, own in ((forward, forward_ids), (reverse, ids))
    ]
    return [_record(document, *pair, with_positions=is_same) for document, *pair in zip(documents, *scores, strict=True)]


def summarize(records: Sequence[Record], settings: CompareSettings) -> Summary:
    """Return the metrics of all documents with tokens, of each domain, and by position if known.

    Intervals are over documents.
    """
    used = [record for record in records if record["forward"]["tokens"] and record["reverse"]["tokens"]]
    summary: Summary = {"documents_without_tokens": len(records) - len(used), "all": _metrics(used, settings)}
    domains = sorted({record["domain"] for record in used})
    if domains != [""]:
        summary["domains"] = {name: _metrics([r for r in used if r["domain"] == name], settings) for name in domains}
    if used and "tenths" in used[0]:
        for name in ("tenths", "from_start", "from_end"):
            summary[name] = _positions([record[name] for record in used], settings)
    return summary


def document_losses(model: LanguageModel, documents: Sequence[list[int]], *, context: int, batch_size: int) -> list[SpanScore]:
    """Return log P of every token of each document (ids, text order) and of its eod, in nats and text order.

    context: maximum tokens per window. Raises UsageError unless it is at least 2 and at most the model's positions.
    """
    limit = model.num_positions
    if context < 2 or (limit is not None and context > limit):
        raise UsageError(f"the context of {context} tokens must be at least 2 and at most the model's {limit} positions")
    leading = model.leading_ids or model.stop_ids[:1]
    cut = [
        windows([*leading, *to_model_order(list(ids), model.direction), model.stop_ids[0]], len(leading), context)
        for ids in documents
    ]
    with naming_text(model.tokenizer, model.direction):
        values = iter(score_spans(model.model, [span for spans in cut for span in spans], batch_size))
    scores = []
    for ids, spans in zip(documents, cut, strict=True):
        logprobs = [value for _ in spans for value in next(values)]
        in_text_order = to_text_order(np.array(logprobs[:-1], np.float64), model.direction).tolist()
        scores.append(SpanScore(list(ids), in_text_order, logprobs[-1]))
    return scores


def windows(tokens: list[int], num_leading: int, context: int) -> list[Span]:
    """Return spans of at most `context` tokens that together score each token after the leading ones once, in order."""
    end = min(len(tokens), context)
    spans = [Span(tokens[:end], num_leading)]
    step = context // 2
    while end < len(tokens):
        begin, end = end, min(len(tokens), end + step)
        first = end - context
        spans.append(Span(tokens[first:end], begin - first))
    return spans


def is_same_tokenizer(forward: JointTokenizer, reverse: JointTokenizer) -> bool:
    """Return True if both tokenizers split every text into the same tokens."""
    return forward.content == reverse.content


def _record(document: Document, forward: SpanScore, reverse: SpanScore, *, with_positions: bool) -> dict[str, Any]:
    scores = dict(zip(SIDES, (forward, reverse), strict=True))
    record: dict[str, Any] = {"where": document.where, "domain": document.domain, "bytes": len(document.text.encode())}
    for name, score in scores.items():
        losses = [-value for value in score.token_logprobs]
        record[name] = {
            "tokens": len(losses),
            "loss": math.fsum(losses),
            "inner": math.fsum(losses[1:-1]),
            "first": losses[0] if losses else 0.0,
            "last": losses[-1] if losses else 0.0,
            "eod": -(score.eod_logprob or 0.0),
        }
    if with_positions:
        record |= _by_position({name: -np.array(score.token_logprobs, np.float64) for name, score in scores.items()})
    return record


def _by_position(losses: Mapping[str, Values]) -> dict[str, Any]:
    """Return the sums of the inner tokens in each tenth, and in tokens 2 to 3, 4 to 7, 8 to 15 and so on from each end."""
    num = len(losses["forward"])
    losses = {side: values[1:-1] for side, values in losses.items()}
    place = np.arange(2, num)
    groups = {
        "tenths": (NUM_PARTS * (place - 1)) // max(1, num),
        "from_start": _power(place),
        "from_end": _power(num + 1 - place),
    }
    found = {}
    for name, group in groups.items():
        size = NUM_PARTS if name == "tenths" else int(group.max(initial=-1)) + 1
        sums = {side: np.bincount(group, values, size).tolist() for side, values in losses.items()}
        found[name] = {"tokens": np.bincount(group, minlength=size).tolist(), **sums}
    return found


def _power(place: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the exponent of the largest power of two that does not exceed each place."""
    return np.frexp(place.astype(np.float64))[1].astype(np.int64) - 1  # exact up to 2**53


def _metrics(records: Sequence[Record], settings: CompareSettings) -> Summary:
    """Return totals and means; differences per token only if both models have the same tokens."""
    column = {
        (side, name): np.array([record[side][name] for record in records], np.float64)
        for side in SIDES
        for name in records[0][side]
    }
    num_bytes = np.array([record["bytes"] for record in records], np.float64)
    has_same_tokens = "tenths" in records[0]
    loss = {side: column[side, "loss"] for side in SIDES}
    compared = {side: column[side, "inner"] for side in SIDES} if has_same_tokens else loss
    difference = compared["forward"] - compared["reverse"]
    whole = loss["forward"] - loss["reverse"]
    found: Summary = {
        "documents": len(records),
        "bytes": int(num_bytes.sum()),
        "compared": "inner tokens" if has_same_tokens else "whole documents",
        "reverse_above_forward": _ratio(-difference, compared["forward"], settings),
        "reverse_worse_documents": float(np.mean(difference < 0)),
        "whole_documents": {
            "reverse_above_forward": _ratio(-whole, loss["forward"], settings),
            "bits_per_byte": _ratio(whole / math.log(2), num_bytes, settings),
        },
    }
    for side in SIDES:
        tokens = column[side, "tokens"]
        found[side] = {
            "tokens": int(tokens.sum()),
            "loss": float(loss[side].sum()),
            "loss_per_token": float(loss[side].sum() / tokens.sum()),
            "bits_per_byte": float(loss[side].sum() / math.log(2) / num_bytes.sum()),
            **{f"mean_{name}": float(column[side, name].mean()) for name in ("first", "last", "eod")},
        }
    if has_same_tokens:
        inner = np.maximum(column["forward", "tokens"] - 2, 0)
        found["inner_tokens"] = int(inner.sum())
        found["per_inner_token"] = _ratio(difference, inner, settings)
        for side in SIDES:
            found[side]["loss_per_inner_token"] = float(compared[side].sum() / max(1.0, inner.sum()))
    return found


def _positions(groups: Sequence[Record], settings: CompareSettings) -> list[Summary]:
    """Return one entry per group of positions: tokens, loss per token of each side, and the difference with its interval."""
    size = max(len(group["tokens"]) for group in groups)
    sums = {
        name: np.array([[*group[name], *[0.0] * (size - len(group[name]))] for group in groups], np.float64)
        for name in ("tokens", *SIDES)
    }
    rows = []
    for number in range(size):
        tokens, forward, reverse = (sums[name][:, number] for name in ("tokens", *SIDES))
        if tokens.sum():
            per_token = {side: float(sums[side][:, number].sum() / tokens.sum()) for side in SIDES}
            rows.append(
                {"group": number, "tokens": int(tokens.sum()), **per_token, **_ratio(forward - reverse, tokens, settings)}
            )
    return rows


def _ratio(values: Values, weights: Values, settings: CompareSettings) -> Summary:
    """Return sum(values) / sum(weights) over the documents with a weight, and its interval.

    The ratio is None without such documents, the interval None for a single one.
    """
    has_weight = weights > 0
    values, weights = values[has_weight], weights[has_weight]
    if not len(values):
        return {"difference": None, "interval": None}
    interval = None
    if len(values) > 1:
        interval = bootstrap_interval(values, weights, num_resamples=settings.num_resamples, seed=settings.seed)
    return {"difference": float(values.sum() / weights.sum()), "interval": interval}
