"""Evaluate multiple-choice tasks during training, with the metrics that `ledom evaluate` has for the exported model.

The model scores on its training ranks. Weights, optimizer and random states do not change.

Shapes: N rows of one call, L positions of a row, b rows and s positions of a micro-batch on this rank.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_ledom.callbacks.task_files import hashes_of, load_tasks
from megatron_ledom.callbacks.validation import Results, add_results
from megatron_ledom.config.derived import next_multiple
from megatron_ledom.data.blends.sources import RUN_TOKENIZER
from megatron_ledom.data.dataset.batch import Batch, context_part
from megatron_ledom.direction import Direction, Reading, Unit
from megatron_ledom.errors import ConfigError, DataError, NotFiniteError, UsageError
from megatron_ledom.evaluation.multiple_choice import distinct_pairs, score_requests
from megatron_ledom.evaluation.task_evaluation import evaluate_task
from megatron_ledom.evaluation.tasks.task import LoadedTask
from megatron_ledom.inference.joint_tokenizer import JointTokenizer
from megatron_ledom.inference.scoring import Span, SpanKey, SpanScore, distinct_spans, span_score, span_tokens
from megatron_ledom.parallel.collectives import check_same, gathered_weights
from megatron_ledom.storage.records import Record
from megatron_ledom.training.callback import Callback, TrainingRun
from megatron_ledom.training.held_out import TaskHashes
from megatron_ledom.training.state import TrainState

log = logging.getLogger(__name__)

Report = dict[str, torch.Tensor]


class TrainingScorer:
    """The model in training, used as a scorer. It scores the same ids in the same context as the exported model.

    Make the same calls on every rank.
    """

    def __init__(self, state: TrainState, tokenizer: JointTokenizer) -> None:
        self.state, self.tokenizer = state, tokenizer

    @property
    def direction(self) -> Direction:
        """Return the reading direction of the model."""
        return self._reading.direction

    @property
    def _reading(self) -> Reading:
        return self.state.provenance.readings[0]  # tasks are refused for a two-way model

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[SpanScore]:
        """Return, for each (preceding, following), the score of the part that the model reads last, given the other part."""
        spans = [self.span(pair) for pair in pairs]
        values = score_spans(self.state, spans)
        return [span_score(span, row, self.direction, False) for span, row in zip(spans, values, strict=True)]

    def span(self, pair: tuple[str, str]) -> Span:
        """Return the ids of a pair. Raises DataError if they are longer than a sample of the run."""
        marker_id = self._reading.marker_id
        leading = [] if marker_id is None else [marker_id]
        tokens, num_given = span_tokens(self.tokenizer, self.direction, pair, leading, [self.state.provenance.eod_id])
        limit = self.state.config.data.seq_length
        if len(tokens) > limit:
            raise DataError(
                f"a text of {len(tokens):,} tokens exceeds data.seq_length={limit}: {pair[0][:60]!r}; lower train.task_num_fewshot, or"
                " remove the task from train.tasks"
            )
        return Span(tokens, num_given)

    def write(self, given: Sequence[str], *, max_new_tokens: int, stop_strings: Sequence[str]) -> NoReturn:
        """Raise UsageError: without a cache of keys and values, each token would be a pass of the whole pipeline."""
        raise UsageError(
            "a task in which the model writes text cannot be evaluated during training: each token would cost a pass of the whole"
            " pipeline; export the checkpoint and evaluate that"
        )


@torch.no_grad()
def score_spans(state: TrainState, spans: Sequence[Span]) -> list[list[float]]:
    """Return log P(tokens[t] | tokens[:t]) for t >= num_context of each span: model order, natural log. Call on every rank."""
    distinct = distinct_spans(list(spans))
    order = sorted(distinct, key=lambda key: -len(key[0]))
    at_once = state.config.train.micro_batch_size * state.groups.data.size() * _num_microbatches(state)
    values: dict[SpanKey, list[float]] = {}
    modes = [chunk.training for chunk in state.model]
    for chunk in state.model:
        chunk.eval()
    with gathered_weights(state.model):
        for first in range(0, len(order), at_once):
            rows = order[first : first + at_once]
            losses_NL = _losses(state, [list(tokens) for tokens, _ in rows], at_once)
            for (tokens, context), row in zip(rows, losses_NL.tolist(), strict=False):
                values[tokens, context] = [-loss for loss in row[context - 1 : len(tokens) - 1]]
    for chunk, mode in zip(state.model, modes, strict=True):
        chunk.train(mode)
    return [list(values[tuple(span.tokens), span.num_context]) for span in spans]


def _num_microbatches(state: TrainState) -> int:
    """Return the number of micro-batches per call: enough for every stage, and whole rounds for the interleaved schedule."""
    return 2 * state.groups.pipeline.size()


def _losses(state: TrainState, rows: list[list[int]], at_once: int) -> torch.Tensor:
    """Return the loss of each next token, [at_once, L] on the CPU, the same on every rank.

    With fewer than `at_once` rows, the first row fills up the batch.
    """
    groups, parallel = state.groups, state.config.parallel
    length = next_multiple(max(map(len, rows)), 2 * parallel.context_parallel_size * parallel.tensor_model_parallel_size)
    padded_NL = torch.full((at_once, length), state.provenance.eod_id)
    for number in range(at_once):
        row = rows[number] if number < len(rows) else rows[0]
        padded_NL[number, : len(row)] = torch.tensor(row)
    schedule = get_forward_backward_func(groups.pipeline.size(), groups.virtual_stages if groups.virtual_stages > 1 else None)
    iterators = [_batches(state, padded_NL) for _ in state.model]
    reports: list[Report] = schedule(
        forward_step_func=partial(_forward_step, bool(state.config.train.z_loss_coeff)),
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=state.model if len(state.model) > 1 else state.model[0],
        num_microbatches=_num_microbatches(state),
        seq_length=length,
        micro_batch_size=state.config.train.micro_batch_size,
        forward_only=True,
    )
    losses_NL = torch.zeros(at_once, length, device=state.platform.device)
    for report in reports:  # empty except on the last pipeline stage
        losses_NL[report["rows"][:, None], report["positions"]] = report["losses"].float()
    dist.all_reduce(losses_NL, group=groups.data_and_context)  # for each value all ranks but one have 0, so the sum is exact
    dist.all_reduce(losses_NL, group=groups.pipeline)
    return losses_NL.cpu()


def _batches(state: TrainState, padded_NL: torch.Tensor) -> Iterator[Batch]:
    """Yield this rank's micro-batches. They have no document mask: each row is one text, even if training masks documents."""
    groups, size = state.groups, state.config.train.micro_batch_size
    for number in range(_num_microbatches(state)):
        first = (number * groups.data.size() + groups.data.rank()) * size
        tokens = padded_NL[first : first + size]
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        batch = {"tokens": tokens, "labels": tokens.roll(-1, 1), "position_ids": positions}
        batch = context_part(batch, groups.context.rank(), groups.context.size())
        batch["rows"] = torch.arange(first, first + size)
        yield {name: value.contiguous().to(state.platform.device) for name, value in batch.items()}


def _forward_step(has_z_loss: bool, batches: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
    batch = next(batches)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

    def kept(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Report]:
        """Return every loss of the micro-batch with its row and position."""
        losses = losses[..., 0] if has_z_loss else losses
        report = {"losses": losses, "rows": batch["rows"], "positions": batch["position_ids"]}
        return losses.sum(), torch.tensor(losses.numel(), dtype=torch.int, device=losses.device), report

    return output, kept


class TaskSet:
    """The tasks of a run, read once."""

    def __init__(self, scorer: TrainingScorer, tasks: Sequence[LoadedTask]) -> None:
        """Raises DataError for a text longer than a sample, so that the run ends before its first step."""
        self.scorer, self.tasks = scorer, tasks
        for task in tasks:
            requests = [score_requests(task.task, scorer.direction, item, task.exemplars_for(item)) for item in task.items]
            for pair in distinct_pairs(requests):
                scorer.span(pair)

    def evaluate(self) -> Results:
        """Return all metrics of each task by name; `accuracy` is its main metric for the direction. The same on every rank."""
        results = [evaluate_task(self.scorer, task) for task in self.tasks]
        return {
            result.task: {
                "accuracy": result.metrics[result.main].value,
                **{name: metric.value for name, metric in result.metrics.items()},
                "num_items": float(len(task.items)),
            }
            for task, result in zip(self.tasks, results, strict=True)
        }


class TaskEvaluation(Callback):
    """Evaluates the tasks of a run every `train.task_interval` iterations and at the end."""

    def __init__(self, tasks: TaskSet) -> None:
        self.tasks = tasks

    def wants_record(self, run: TrainingRun) -> bool:
        """Return True if an evaluation is due."""
        return run.is_last_iteration() or run.state.iteration % run.state.config.train.task_interval == 0

    def on_measure(self, run: TrainingRun, record: Record) -> None:
        """Evaluate the tasks and add the results, if an evaluation is due."""
        if self.wants_record(run):
            with run.pause("evaluating tasks"):
                add_task_results(record, self.tasks.evaluate)


def add_task_results(record: Record, evaluate: Callable[[], Results]) -> None:
    """Add the results of the tasks; if scores are not finite, log that there are none."""
    try:
        add_results(record, "tasks", evaluate())
    except NotFiniteError as error:
        record.setdefault("not_finite", []).append("tasks")
        log.warning("iteration %d: the tasks have no result: %s", record["iteration"], error)


def load_task_set(state: TrainState, known: TaskHashes) -> TaskSet:
    """Return the tasks of the config, with the tokenizer in the run folder. Call on every rank, at the start.

    known: sha256 of the tasks' files when they were checked.
    """
    unit = state.provenance.readings[0].unit
    if unit is not Unit.TOKEN:
        raise ConfigError(f"train.tasks are prompts in token order, but the shards are in {unit} order; remove train.tasks")
    tokenizer = JointTokenizer.from_pretrained(Path(os.path.join(state.config.run_dir, RUN_TOKENIZER)))
    tasks = load_tasks(state.config)
    check_files(hashes_of(tasks), known, str(state.config.train.task_data))
    return TaskSet(TrainingScorer(state, tokenizer), tasks)


def check_files(found: TaskHashes, known: TaskHashes, folder: str) -> None:
    """Refuse task files that differ between ranks or from those that were checked. Call on every rank.

    Ranks with different texts would wait for each other for ever. Raises RuntimeError on every rank if ranks have read
    different files, DataError if the files have changed since they were checked.
    """
    advice = f"{folder} must contain the same files on all nodes, and nothing may change them: start again"
    check_same("the sha256 of the files of train.tasks", found, advice)
    if found != known:
        raise DataError(f"files of train.tasks in {folder} were replaced while the run started; start it again")
