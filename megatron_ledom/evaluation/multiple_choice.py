"""Multiple choice: the likelihoods by which a model of either direction ranks the choices.

A block of the task, in text order, is cut before the choice into `context` (with the choice's label) and `rest` (the
choice and the text after it). c is a choice, q the context, `premise` the label alone, x the few-shot examples. Each
way gives one log-likelihood per choice:

forward
    choice_given_context    log P_F(c | x, q)
    prior_removed           log P_F(c | x, q) - log P_F(c | x, premise) (Holtzman et al. 2021, arXiv 2104.08315, eq. 2)
reverse (the few-shot examples follow the query in the text, so a reverse model reads them first)
    joint                   log P_R(q c | x): ranks the choices as P(c | q) does, because P(q) is the same for all of them
    context_given_choice    log P_R(q | c, x): without the prior of the choice
    prior_removed           log P_R(q c | x) - log P_R(premise c | x): the gain from adding the context to a choice with its label
    choice_given_context    log P_R(c | q, x) with the choice at the front, as `prompts` mirrors a task, or in the wording of
                            `reverse_template`. Other running text has no such order.

If the choice is the first field, there is no context, so `context_given_choice` and `prior_removed` are omitted. If
fields follow the choice (WinoGrande's gap), a forward model scores the text after the choice, as is usual, and a
reverse model the text before it. The whole text is tokenized at once, and a token that crosses a cut belongs to the
part after it (`inference.joint_tokenizer`). `context_given_choice` therefore does not score a token of the context that
is merged with the choice; `prior_removed`, a difference of two whole texts, does. Without few-shot examples a reverse
model begins after eod.

Each value is used as it is (raw), per scored token and per scored byte. A difference is divided by the tokens or bytes
of the choice (forward) or of the context (reverse).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ledom.direction import Direction
from megatron_ledom.errors import NotFiniteError, UsageError
from megatron_ledom.evaluation.task_model import TaskModel
from megatron_ledom.evaluation.tasks.prompts import Values
from megatron_ledom.evaluation.tasks.task import Item, LoadedTask, Task
from megatron_ledom.inference.scoring import SpanScore

NORMALIZATIONS = ("raw", "token", "byte")
MAIN_WAY = {Direction.FORWARD: "choice_given_context", Direction.REVERSE: "joint"}
"""The way whose accuracy is a task's main metric, unless the task names another.

It ranks choices by P(choice | context).
"""
Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """A score to compute: log P of the scored part of `pair`, minus that of `prior` if there is one.

    Texts are in text order.
    """

    pair: Pair
    prior: Pair | None = None


def score_choices(model: TaskModel, task: LoadedTask, items: Sequence[Item]) -> list[dict[str, Any]]:
    """Return the record of each item: the gold choice, and log-likelihood, tokens and bytes of every choice by way."""
    requests = [score_requests(task.task, model.direction, item, task.exemplars_for(item)) for item in items]
    distinct = distinct_pairs(requests)
    scored = dict(zip(distinct, model.score(distinct), strict=True))
    records = []
    for item, ways in zip(items, requests, strict=True):
        scores = {name: _measured(way, scored, model.direction) for name, way in ways.items()}
        records.append({**item.kept, "gold": item.gold, "scores": scores})
    return records


def score_requests(task: Task, direction: Direction, item: Item, exemplars: Sequence[Values]) -> dict[str, list[ScoreRequest]]:
    """Return the scores to compute, by way, one for each choice."""
    ways: dict[str, list[ScoreRequest]] = {}
    for choice in item.choices:
        values = {**item.values, task.choice_field: choice}
        found = _forward(task, values, exemplars) if direction is Direction.FORWARD else _reverse(task, values, exemplars)
        for name, request in found.items():
            ways.setdefault(name, []).append(request)
    return ways


def distinct_pairs(requests: Sequence[Mapping[str, Sequence[ScoreRequest]]]) -> list[Pair]:
    """Return every pair of texts to score, once."""
    pairs = (
        pair for ways in requests for way in ways.values() for one in way for pair in (one.pair, one.prior) if pair is not None
    )
    return list(dict.fromkeys(pairs))


def chosen(scores: Mapping[str, Sequence[Any]], normalization: str) -> int:
    """Return the number of the choice with the highest score, the first of equal ones.

    scores: one way of a record. A `logprob` of None is -inf, an impossible choice (JSON has no infinity)."""
    values = [
        (-math.inf if logprob is None else logprob) / _divisor(num_tokens, num_bytes, normalization)
        for logprob, num_tokens, num_bytes in zip(scores["logprob"], scores["tokens"], scores["bytes"], strict=True)
    ]
    return max(range(len(values)), key=lambda index: (values[index], -index))


def _divisor(num_tokens: float, num_bytes: float, normalization: str) -> float:
    return {"raw": 1.0, "token": max(1.0, num_tokens), "byte": max(1.0, num_bytes)}[normalization]


def _forward(task: Task, values: Values, exemplars: Sequence[Values]) -> dict[str, ScoreRequest]:
    template = task.template
    prompt = template.render(Direction.FORWARD, values, exemplars)
    ways = {"choice_given_context": ScoreRequest(prompt.parts())}
    if _has_context(task):
        blocks = "".join(template.block(exemplar) + template.block_separator for exemplar in exemplars)
        whole = blocks + _with_premise(task, values)
        opened = whole[: len(whole) - len(prompt.target.lstrip())].rstrip()
        ways["prior_removed"] = ScoreRequest(prompt.parts(), (opened, whole[len(opened) :]))
    return ways


def _reverse(task: Task, values: Values, exemplars: Sequence[Values]) -> dict[str, ScoreRequest]:
    template = task.template
    context, rest = template.split_before(task.choice_field, values)
    blocks = [template.block(exemplar) for exemplar in reversed(exemplars)]
    edge = template.block_separator if blocks else ""
    after = template.block_separator.join(blocks)
    joint = (context + rest + edge, after)
    ways = {"joint": ScoreRequest(joint)}
    if _has_context(task):
        ways["context_given_choice"] = ScoreRequest((context, rest + edge + after))
        ways["prior_removed"] = ScoreRequest(joint, (_with_premise(task, values) + edge, after))
    mirrored = task.template_for(Direction.REVERSE)
    if mirrored.is_read_back or mirrored is not template:
        ways["choice_given_context"] = ScoreRequest(mirrored.render(Direction.REVERSE, values, exemplars).parts())
    return ways


def _has_context(task: Task) -> bool:
    """Return True if a field stands before the choice."""
    return task.template.fields[0].name != task.choice_field


def _with_premise(task: Task, values: Values) -> str:
    """Return a block without the fields before the choice: the label, the choice and the fields after it."""
    names = [field.name for field in task.template.fields]
    if task.choice_field not in names:
        raise UsageError(
            f"task {task.name} has no field {task.choice_field!r} for its choices; its fields are {', '.join(names)}"
        )
    kept = task.template.fields[names.index(task.choice_field) :]
    return task.template.field_separator.join(field.text(values[field.name]) for field in kept)


def _measured(way: Sequence[ScoreRequest], scored: Mapping[Pair, SpanScore], direction: Direction) -> dict[str, list[Any]]:
    """Return the log-likelihoods (None: -inf), tokens and bytes of the choices."""
    rows = [_one(request, scored, direction) for request in way]
    measured: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in ("logprob", "tokens", "bytes")}
    measured["logprob"] = [None if value == -math.inf else value for value in measured["logprob"]]
    return measured


def _one(request: ScoreRequest, scored: Mapping[Pair, SpanScore], direction: Direction) -> dict[str, float]:
    whole = scored[request.pair]
    found = {"logprob": whole.logprob, "tokens": whole.num_tokens, "bytes": _scored_bytes(request.pair, direction)}
    if request.prior is not None:
        prior = scored[request.prior]
        found["logprob"] = less_prior(whole.logprob, prior.logprob)
        if direction is Direction.REVERSE:
            found["tokens"] -= prior.num_tokens
            found["bytes"] -= _scored_bytes(request.prior, direction)
    return found


def less_prior(whole: float, prior: float) -> float:
    """Return `whole - prior`, two log-likelihoods; an impossible whole stays -inf.

    Raises NotFiniteError if only the prior is impossible: a part of a text cannot be less likely than the whole."""
    if whole == -math.inf:
        return whole
    if prior == -math.inf:
        raise NotFiniteError(f"a text has log-likelihood {whole:.6g}, a part of it -inf, so their difference is not a score")
    return whole - prior


def _scored_bytes(pair: Pair, direction: Direction) -> int:
    """Return the UTF-8 bytes of the scored part, without white space at its edges."""
    return len((pair[0] if direction is Direction.REVERSE else pair[1]).strip().encode())
