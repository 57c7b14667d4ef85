"""The model class for lm-evaluation-harness. The docstring of `evaluation.harness` explains its answers."""

import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from megatron_ledom.direction import Direction, to_model_order
from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.evaluation.harness import without_the_harness
from megatron_ledom.evaluation.harness.reverse_choices import (
    WAYS,
    among_choices,
    choice_requests,
    choices_of_documents,
    document_of,
    requested_score,
    split_space,
)
from megatron_ledom.evaluation.multiple_choice import Pair
from megatron_ledom.evaluation.task_model import LanguageTaskModel, direction_of, load_language_model
from megatron_ledom.inference.generation import Sampling
from megatron_ledom.inference.joint_tokenizer import HealedPrompt
from megatron_ledom.inference.language_model import ForwardLM, ReverseLM
from megatron_ledom.inference.model_folder import HARNESS_OPTIONS, read_model_config
from megatron_ledom.inference.scoring import Span, logprobs_and_likeliest, measure_spans, naming_text, score_spans
from megatron_ledom.tokenizers.reader import read_tokenizer

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs, resolve_max_length
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise without_the_harness(error) from error

logger = logging.getLogger(__name__)
DEFAULT_BATCH_SIZE = 16
MAX_NEW_TOKENS = 256
"""Default of the harness for tasks that set no limit."""
WINDOW_REQUESTS = 256
"""Requests per step of the progress bar."""
SAMPLING_OPTIONS = ("temperature", "top_p", "top_k")
Part = TypeVar("Part")
Answer = TypeVar("Answer")


@register_model("ledom")
class LedomLM(LM):  # type: ignore[misc]
    """A model folder, or a loaded model, of either direction.

    pretrained: folder, or a `ForwardLM` or `ReverseLM`. direction, eod_id, device, dtype: as in
    `LanguageModel.from_pretrained`; the default direction is the recorded one, else forward. way: the score of choices
    by a reverse model, one of WAYS. max_length: a limit below the model's positions. max_batch_size: ignored, as large
    batches are split automatically; the harness passes it.
    """

    def __init__(
        self,
        pretrained: str | Path | ForwardLM | ReverseLM,
        direction: str | None = None,
        way: str = "joint",
        batch_size: int | str = DEFAULT_BATCH_SIZE,
        device: str | None = None,
        dtype: str | None = None,
        eod_id: int | None = None,
        max_length: int | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if way not in WAYS:
            raise UsageError(f"way={way!r} is unknown; it can be one of {', '.join(WAYS)}")
        if isinstance(pretrained, str | Path):
            folder = Path(pretrained)
            found = direction_of(folder, direction, HARNESS_OPTIONS)
            loading = {"eod_id": eod_id, "device": _device(device), "dtype": _dtype(dtype), "option_names": HARNESS_OPTIONS}
            self._lm = load_language_model(folder, found, direction, **loading)
            self._start = _start_id(folder, self._lm)
        else:
            self._lm = pretrained
            self._start = (*self._lm.leading_ids, *self._lm.stop_ids)[0]
        self._way, self._is_reverse = way, self._lm.direction is Direction.REVERSE
        self.batch_size = DEFAULT_BATCH_SIZE if str(batch_size).startswith("auto") else int(batch_size)
        self._scorer = LanguageTaskModel(self._lm, self.batch_size)
        positions = resolve_max_length(self._lm.model.config)
        self.max_length = positions if max_length is None else max_length
        if not 1 < self.max_length <= positions:
            raise UsageError(f"max_length={max_length} must be between 2 and the {positions} positions of the model")
        self._device = self._lm.model.device

    def get_model_info(self) -> dict[str, Any]:
        """Return the entries about the model for the harness's results file."""
        info = {"direction": str(self._lm.direction), "model_dtype": str(self._lm.model.dtype), "max_length": self.max_length}
        return {**info, "way": self._way} if self._is_reverse else info

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Let the harness cache answers (--use_cache). Raises UsageError for a reverse model."""
        if self._is_reverse:
            raise UsageError(
                "the harness caches answers by context and continuation alone, but those of a reverse model depend on the other"
                " choices of the document; run without --use_cache"
            )
        super().set_cache_hook(cache_hook)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return log P(continuation | context) of each pair, and True if greedy decoding gives the continuation.

        For a reverse model: log of the choice's probability, normalized over the document's choices, by `way`, and
        False. Raises UsageError for a continuation without others to compare it with, DataError for choices that do not
        fit the model.
        """
        if self._is_reverse:
            return self._choice_likelihoods(requests, disable_tqdm)
        spans = [self._forward_span(*request.args) for request in requests]
        measure = partial(measure_spans, self._lm.model, batch_size=self.batch_size, measure=logprobs_and_likeliest)
        answers = []
        rows = self._in_windows(spans, lambda part: measure(spans=part), "loglikelihood", disable_tqdm)
        for request, row in zip(requests, rows, strict=True):
            answer = math.fsum(logprob for logprob, _ in row), all(is_likeliest for _, is_likeliest in row)
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
            answers.append(answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return log P of each whole text after the start symbol, in windows of `max_length` in model order."""
        spans = [self._rolling_spans(*request.args) for request in requests]
        score = partial(score_spans, self._lm.model, batch_size=self.batch_size)
        flat = [span for row in spans for span in row]
        rows = self._in_windows(flat, lambda part: score(spans=part), "loglikelihood_rolling", disable_tqdm)
        return [math.fsum(math.fsum(next(rows)) for _ in row) for row in spans]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return a forward model's text after each context.

        It ends before the first of the task's `until` strings, at eod or at the limit. Raises UsageError for a reverse
        model and for unknown generation options.
        """
        if self._is_reverse:
            tasks = ", ".join(sorted({str(request.task_name) for request in requests}))
            raise UsageError(
                f"{tasks}: the harness's prompts need text after them, and a reverse model writes only before a text; use ledom evaluate,"
                " whose prompts for a reverse model follow the answer"
            )
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        sampling = {shown: self._sampling(requests[numbers[0]].args[1]) for shown, numbers in groups.items()}
        answers: dict[int, str] = {}
        for shown, numbers in groups.items():
            longest_first = sorted(numbers, key=lambda number: -len(requests[number].args[0]))
            texts = [requests[number].args[0] for number in longest_first]
            write = partial(self._write, sampling=sampling[shown])
            for number, text in zip(longest_first, self._in_windows(texts, write, "generate_until", disable_tqdm), strict=True):
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
                answers[number] = text
        return [answers[number] for number in range(len(requests))]

    def _choice_likelihoods(self, requests: Sequence[Any], disable_tqdm: bool) -> list[tuple[float, bool]]:
        documents, tokenizer = choices_of_documents(requests), self._lm.tokenizer
        room = self.max_length - 1  # eod takes one position
        score_requests = {
            document: choice_requests(found, self._way, tokenizer, room, document) for document, found in documents.items()
        }
        pairs = list(
            dict.fromkeys(pair for row in score_requests.values() for one in row for pair in (one.pair, one.prior) if pair)
        )
        scores = self._in_windows(pairs, self._scorer.score, "loglikelihood", disable_tqdm)
        scored = dict(zip(pairs, scores, strict=True))
        likelihoods: dict[tuple[Any, Pair], float] = {}
        for document, choices in documents.items():
            values = among_choices([requested_score(one, scored) for one in score_requests[document]])
            likelihoods |= {(document, choice): value for choice, value in zip(choices, values, strict=True)}
        return [(likelihoods[document_of(request), request.args], False) for request in requests]

    def _forward_span(self, context: str, continuation: str) -> Span:
        """Return the span of both parts as one text, truncated as in the harness.

        Without a context the text follows the start symbol.
        """
        text_ids, num_context = self._lm.tokenizer.split(*split_space(context, continuation))
        if num_context == len(text_ids):
            raise DataError(f"{continuation!r} has no token to score; check the task's choices")
        if context.strip():
            tokens = self._with_leading(text_ids)
            num_context += len(tokens) - len(text_ids)
        else:
            tokens = text_ids if text_ids[0] == self._start else [self._start, *text_ids]
        num_context = max(1, num_context)
        if len(tokens) - num_context > self.max_length:
            raise DataError(
                f"a continuation of {len(tokens) - num_context} tokens exceeds the {self.max_length} positions of the model"
            )
        excess = max(0, len(tokens) - self.max_length - 1)
        if excess:
            logger.warning(
                "skipped %d tokens at the beginning of a context: the model has %d positions", excess, self.max_length
            )
        return Span(self._without(tokens, excess), num_context - excess)

    def _rolling_spans(self, text: str) -> list[Span]:
        ids = to_model_order(self._lm.tokenizer.encode(text), self._lm.direction)
        tokens = ids if self._marker else self._with_leading(ids)  # the marker is the start of the first window already
        windows = get_rolling_token_windows(tokens, self._start, self.max_length, 1)
        return [Span([*given, *predicted], len(given)) for given, predicted in map(make_disjoint_window, windows)]

    @property
    def _marker(self) -> list[int]:
        """The marker of a model that has one, else nothing."""
        return self._lm.leading_ids if self._lm.reading is not None else []

    def _without(self, tokens: list[int], excess: int) -> list[int]:
        """Return tokens without the first ones of a text that is too long; a marker stays."""
        kept = self._marker if excess else []
        return [*kept, *tokens[excess + len(kept) :]]

    def _with_leading(self, tokens: list[int]) -> list[int]:
        """Return the tokens after a stock model's BOS, which is added unless the text begins with it."""
        leading = self._lm.leading_ids
        return tokens if tokens[: len(leading)] == leading else [*leading, *tokens]

    def _sampling(self, options: dict[str, Any]) -> Sampling:
        """Return the sampling settings for a task's generation options."""
        chosen = dict(normalize_gen_kwargs(options, MAX_NEW_TOKENS))
        until, num_new = [term for term in chosen.pop("until") if term], chosen.pop("max_gen_toks")
        if not chosen.pop("do_sample"):
            chosen["temperature"] = 0.0
        if chosen.pop("num_beams", 1) != 1 or set(chosen) - set(SAMPLING_OPTIONS):
            known = ", ".join(("until", "max_gen_toks", "do_sample", *SAMPLING_OPTIONS))
            raise UsageError(f"a task has the generation options {options}, known are {known}; change them with --gen_kwargs")
        if num_new >= self.max_length:
            raise UsageError(
                f"max_gen_toks={num_new} leaves no room for a prompt in the {self.max_length} positions of the model;"
                f" write at most {self.max_length - 1} tokens (--gen_kwargs max_gen_toks=N)"
            )
        return Sampling(max_new_tokens=num_new, stop_strings=until, **chosen)

    def _write(self, contexts: Sequence[str], sampling: Sampling) -> list[str]:
        """Return the texts written after the contexts. The beginning of a context that does not fit is skipped."""
        encoded = [self._with_leading(self._lm.tokenizer.encode(context)) or [self._start] for context in contexts]
        room = self.max_length - sampling.max_new_tokens
        if num_cut := sum(len(tokens) > room for tokens in encoded):
            logger.warning("skipped the beginnings of %d prompts: %d tokens fit with those to write", num_cut, room)
        cut = [self._without(tokens, max(0, len(tokens) - room)) for tokens in encoded]
        opened = [(context, HealedPrompt(tokens, b"")) for context, tokens in zip(contexts, cut, strict=True)]
        written = self._lm.writer.write_healed(opened, [], sampling, self.batch_size)
        return [_before_any(sampling.stop_strings, self._lm.tokenizer.decode(one.text_ids)) for one in written]

    def _in_windows(
        self, items: Sequence[Part], compute: Callable[[list[Part]], list[Answer]], name: str, disable_tqdm: bool
    ) -> Iterator[Answer]:
        """Yield the results of `compute` for the items, window by window, with a progress bar on a terminal."""
        with tqdm(total=len(items), desc=name, file=sys.stderr, disable=disable_tqdm or not sys.stderr.isatty()) as bar:
            for begin in range(0, len(items), WINDOW_REQUESTS):
                part = list(items[begin : begin + WINDOW_REQUESTS])
                with naming_text(self._lm.tokenizer, self._lm.direction):
                    answers = compute(part)
                yield from answers
                bar.update(len(part))


def _device(name: str | None) -> str | None:
    """Return the device to use. Without CUDA it is the CPU, because the harness requests CUDA by default."""
    if name is not None and name.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("CUDA is not available: the model runs on the CPU, not on %s", name)
        return "cpu"
    return name


def _dtype(name: str | None) -> torch.dtype | None:
    """Return the torch dtype of this name. None lets the loader choose."""
    chosen = None if name in (None, "auto") else getattr(torch, str(name), name)
    if chosen is not None and not isinstance(chosen, torch.dtype):
        raise UsageError(f"dtype={name!r} is not a torch dtype; it can be auto, float32, bfloat16 or float16")
    return chosen


def _start_id(folder: Path, language_model: ForwardLM | ReverseLM) -> int:
    """Return the id before the first token.

    It is eod, as in training, for a model of this package and for a reverse model, else the tokenizer's BOS or eos.
    """
    if read_model_config(folder).get("direction") is None and language_model.direction is Direction.FORWARD:
        files = read_tokenizer(str(folder))
        found = files.special_id("eos") if files.special_id("bos") is None else files.special_id("bos")
        if found is not None:
            return found
    return (*language_model.leading_ids, *language_model.stop_ids)[0]


def _before_any(terms: Sequence[str], text: str) -> str:
    """Return the text up to the first occurrence of any of the strings."""
    for term in terms:
        text = text.partition(term)[0]
    return text
