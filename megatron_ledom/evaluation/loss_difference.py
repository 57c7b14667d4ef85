"""The loss of a forward and of a reverse model on the same documents: records of each document, and figures of all of them.

Differences are forward minus reverse, in nats: below zero the reverse model finds the text harder. Positions are those of the
text in reading order for both models: a token's tenth of its document, and its place from the beginning and from the end.

Compared are the inner tokens of a document, all but the first and the last of the text: each of these two is the one that one of
the models has to tell from eod alone, which training leaves out of the loss by default (`data.eod_mask_loss`), so that its loss
there says nothing. Whole documents are summed beside it; they are all that can be compared where the tokenizers differ.

A document begins, in model order, after eod (after BOS for a stock model whose tokenizer adds one) and ends with eod. One longer
than the context is read in windows of that length which overlap by half: the first window scores all of its tokens, each later
one only those that no window before it has scored, given at least half a context of what the model reads before them.
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
    """A text, the part of the corpus it comes from (empty where none is told), and where it was read."""

    text: str
    domain: str = ""
    where: str = ""


@dataclass(frozen=True, slots=True)
class CompareSettings:
    """context: most tokens that a model is fed at once; num_resamples, seed: of the intervals over documents."""

    context: int
    batch_size: int = 16
    num_resamples: int = 2000
    seed: int = 0


def document_records(
    forward: LanguageModel, reverse: LanguageModel, documents: Sequence[Document], settings: CompareSettings
) -> list[dict[str, Any]]:
    """Return the record of each document. Losses are sums in nats; `inner` leaves out the first and the last token of the text.

    With the same tokenizer the tokens are the same, and `tenths`, `from_start` and `from_end` hold sums of inner tokens by position;
    else whole texts are all that can be compared, and these are missing.
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
    """Figures of all documents with tokens, of each domain, and by position where that is known; intervals by documents."""
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
    """log P of every token of each document (ids, text order) and of the eod that closes it; natural logs, text order.

    context: most tokens that the model is fed at once, at least 2, at most its positions; UsageError otherwise.
    """
    limit = model.num_positions
    if context < 2 or (limit is not None and context > limit):
        raise UsageError(f"a context of {context} tokens: it must be at least 2 and at most the model's {limit} positions")
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
    """Spans of at most `context` tokens which together score each of `tokens` after the leading ones once, in order."""
    end = min(len(tokens), context)
    spans = [Span(tokens[:end], num_leading)]
    step = context // 2
    while end < len(tokens):
        begin, end = end, min(len(tokens), end + step)
        first = end - context
        spans.append(Span(tokens[first:end], begin - first))
    return spans


def is_same_tokenizer(forward: JointTokenizer, reverse: JointTokenizer) -> bool:
    """Return True if both read the same tokens of a text."""
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
    """Sums of inner tokens in each tenth, and at places 2 to 3, 4 to 7, 8 to 15 and so on, from the beginning and from the end."""
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
    """Index of the largest power of two that is not above each place."""
    return np.frexp(place.astype(np.float64))[1].astype(np.int64) - 1  # exact up to 2**53


def _metrics(records: Sequence[Record], settings: CompareSettings) -> Summary:
    """Totals and means; differences a token only where the tokens are the same."""
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
    """One entry a group of places: tokens, loss a token of each side, and the difference with its interval."""
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
    """sum(values) / sum(weights) and its interval over the documents that have a weight; None where that is none, or one."""
    has_weight = weights > 0
    values, weights = values[has_weight], weights[has_weight]
    if not len(values):
        return {"difference": None, "interval": None}
    interval = None
    if len(values) > 1:
        interval = bootstrap_interval(values, weights, num_resamples=settings.num_resamples, seed=settings.seed)
    return {"difference": float(values.sum() / weights.sum()), "interval": interval}
