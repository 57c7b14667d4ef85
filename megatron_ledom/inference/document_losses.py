"""What every token of a document costs a model, whole documents at a time, longer ones in windows.

A document begins, in model order, after eod (after BOS for a stock model whose tokenizer adds one) and ends with eod: "the text ends
here" for a forward model, "the text begins here" for a reverse one. Its first token in model order, the first of the text or the
last, is therefore given by eod alone, which training leaves out of the loss by default (`data.eod_mask_loss`).

A document longer than the context is read in windows of that length which overlap by half: the first window scores all of its tokens,
each later one only those that no window before it has scored, so that a token is scored once, given at least half a context of what
the model reads before it, and in no window twice. Both directions do the same, each from the end that it begins with.
"""

from collections.abc import Sequence

import numpy as np

from megatron_ledom.direction import to_model_order, to_text_order
from megatron_ledom.errors import UsageError
from megatron_ledom.inference.language_model import LanguageModel
from megatron_ledom.inference.not_finite import naming_text
from megatron_ledom.inference.scoring import Span, SpanScore, score_spans


def longest_context(model: LanguageModel) -> int | None:
    """Positions that the model has, or None where its config does not say."""
    found = getattr(model.model.config, "max_position_embeddings", None)
    return int(found) if found else None


def document_losses(model: LanguageModel, documents: Sequence[list[int]], *, context: int, batch_size: int) -> list[SpanScore]:
    """log P of every token of each document (ids, text order) and of the eod that closes it; natural logs, text order.

    context: most tokens that the model is fed at once, at least 2, at most its positions; UsageError otherwise.
    """
    limit = longest_context(model)
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
