"""The model of this package as lm-evaluation-harness asks one; what it answers is said in `evaluation.harness`."""

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
    asked_of_choices,
    choices_of_documents,
    document_of,
    scored_of,
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
"""Of tasks that say nothing; the harness's own default."""
WINDOW_REQUESTS = 256
"""How many requests are computed between two steps of the progress bar."""
SAMPLING_OPTIONS = ("temperature", "top_p", "top_k")
Part = TypeVar("Part")
Answer = TypeVar("Answer")


@register_model("ledom")
class LedomLM(LM):  # type: ignore[misc]
    """A model folder, or a loaded model, of either direction.

    pretrained: folder, or a `ForwardLM` or `ReverseLM`. direction, eod_id, device, dtype: as `LanguageModel.from_pretrained`; by
    default what config.json records, else forward. way: what a reverse model is asked of choices, one of WAYS. max_length: fewer
    positions than the model has. max_batch_size: not needed, as wide batches are divided by themselves; the harness passes it.
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
        """Return what the harness's results file says of the model."""
        info = {"direction": str(self._lm.direction), "model_dtype": str(self._lm.model.dtype), "max_length": self.max_length}
        return {**info, "way": self._way} if self._is_reverse else info

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Let the harness keep answers (--use_cache); refused for a reverse model."""
        if self._is_reverse:
            raise UsageError(
                "the cache of the harness keeps answers by context and continuation alone, and those of a reverse model depend on"
                " the other choices of the document; leave out --use_cache"
            )
        super().set_cache_hook(cache_hook)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation): log P(continuation | context), and whether it is what greedy writing gives.

        Of a reverse model: log P(choice | context, one of the document's choices) by `way`, and False. Raises UsageError for a
        continuation without others to compare it with, DataError for choices that do not fit the model.
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
        """log P of each whole text after the start symbol, in windows of `max_length` from where the model begins to read."""
        spans = [self._rolling_spans(*request.args) for request in requests]
        score = partial(score_spans, self._lm.model, batch_size=self.batch_size)
        flat = [span for row in spans for span in row]
        rows = self._in_windows(flat, lambda part: score(spans=part), "loglikelihood_rolling", disable_tqdm)
        return [math.fsum(math.fsum(next(rows)) for _ in row) for row in spans]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what a forward model writes behind each context, up to the first of the task's `until` strings, eod or the limit.

        Raises UsageError for a reverse model and for options of writing that are not known here.
        """
        if self._is_reverse:
            tasks = ", ".join(sorted({str(request.task_name) for request in requests}))
            raise UsageError(
                f"{tasks}: the harness's prompts end where the answer is to begin, and a reverse model writes only in front of a text;"
                " ledom evaluate has prompts with the answer in front"
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
        room = self.max_length - 1  # of which eod takes one
        asked = {
            document: asked_of_choices(found, self._way, tokenizer, room, document) for document, found in documents.items()
        }
        pairs = list(dict.fromkeys(pair for row in asked.values() for one in row for pair in (one.pair, one.prior) if pair))
        scores = self._in_windows(pairs, self._scorer.score, "loglikelihood", disable_tqdm)
        scored = dict(zip(pairs, scores, strict=True))
        likelihoods: dict[tuple[Any, Pair], float] = {}
        for document, choices in documents.items():
            values = among_choices([scored_of(one, scored) for one in asked[document]])
            likelihoods |= {(document, choice): value for choice, value in zip(choices, values, strict=True)}
        return [(likelihoods[document_of(request), request.args], False) for request in requests]

    def _forward_span(self, context: str, continuation: str) -> Span:
        """The ids of both as one text, behind the start symbol if there is no context; cut as the harness cuts it."""
        text_ids, num_context = self._lm.tokenizer.split(*split_space(context, continuation))
        if num_context == len(text_ids):
            raise DataError(f"{continuation!r} yields no token, so there is nothing to score; look at the task's choices")
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
                "%d tokens at the beginning of a context are left out: the model has %d positions", excess, self.max_length
            )
        return Span(tokens[excess:], num_context - excess)

    def _rolling_spans(self, text: str) -> list[Span]:
        tokens = self._with_leading(to_model_order(self._lm.tokenizer.encode(text), self._lm.direction))
        windows = get_rolling_token_windows(tokens, self._start, self.max_length, 1)
        return [Span([*given, *predicted], len(given)) for given, predicted in map(make_disjoint_window, windows)]

    def _with_leading(self, tokens: list[int]) -> list[int]:
        """A stock model's BOS before the text, unless the text spells it out."""
        leading = self._lm.leading_ids
        return tokens if tokens[: len(leading)] == leading else [*leading, *tokens]

    def _sampling(self, options: dict[str, Any]) -> Sampling:
        """How a task wants its answers written."""
        chosen = dict(normalize_gen_kwargs(options, MAX_NEW_TOKENS))
        until, num_new = [term for term in chosen.pop("until") if term], chosen.pop("max_gen_toks")
        if not chosen.pop("do_sample"):
            chosen["temperature"] = 0.0
        if chosen.pop("num_beams", 1) != 1 or set(chosen) - set(SAMPLING_OPTIONS):
            known = ", ".join(("until", "max_gen_toks", "do_sample", *SAMPLING_OPTIONS))
            raise UsageError(f"a task asks to write with {options}; known here are {known}: change it with --gen_kwargs")
        if num_new >= self.max_length:
            raise UsageError(
                f"max_gen_toks={num_new} leaves no room for a prompt in the {self.max_length} positions of the model;"
                f" write at most {self.max_length - 1} tokens (--gen_kwargs max_gen_toks=N)"
            )
        return Sampling(max_new_tokens=num_new, stop_strings=until, **chosen)

    def _write(self, contexts: Sequence[str], sampling: Sampling) -> list[str]:
        """Write behind the contexts, whose beginnings are left out where they do not fit."""
        encoded = [self._with_leading(self._lm.tokenizer.encode(context)) or [self._start] for context in contexts]
        room = self.max_length - sampling.max_new_tokens
        if num_cut := sum(len(tokens) > room for tokens in encoded):
            logger.warning("the beginnings of %d prompts are left out: %d tokens fit beside those to write", num_cut, room)
        opened = [(context, HealedPrompt(tokens[-room:], b"")) for context, tokens in zip(contexts, encoded, strict=True)]
        written = self._lm.writer.write_healed(opened, [], sampling, self.batch_size)
        return [_before_any(sampling.stop_strings, self._lm.tokenizer.decode(one.text_ids)) for one in written]

    def _in_windows(
        self, items: Sequence[Part], compute: Callable[[list[Part]], list[Answer]], name: str, disable_tqdm: bool
    ) -> Iterator[Answer]:
        """Yield what `compute` gives for the items, window by window, with a bar on a terminal."""
        with tqdm(total=len(items), desc=name, file=sys.stderr, disable=disable_tqdm or not sys.stderr.isatty()) as bar:
            for begin in range(0, len(items), WINDOW_REQUESTS):
                part = list(items[begin : begin + WINDOW_REQUESTS])
                with naming_text(self._lm.tokenizer, self._lm.direction):
                    answers = compute(part)
                yield from answers
                bar.update(len(part))


def _device(asked: str | None) -> str | None:
    """Return what is asked for; without CUDA the CPU, since the harness asks for CUDA where its user says nothing."""
    if asked is not None and asked.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("no CUDA here: the model runs on the CPU, not on %s", asked)
        return "cpu"
    return asked


def _dtype(asked: str | None) -> torch.dtype | None:
    """Of torch, by its name; None lets the loader choose."""
    chosen = None if asked in (None, "auto") else getattr(torch, str(asked), asked)
    if chosen is not None and not isinstance(chosen, torch.dtype):
        raise UsageError(f"dtype={asked!r} is none of torch; it can be auto, float32, bfloat16 or float16")
    return chosen


def _start_id(folder: Path, language_model: ForwardLM | ReverseLM) -> int:
    """Return the id before the first token: eod for a model of this package, as in training; the tokenizer's BOS or eos for another."""
    if read_model_config(folder).get("direction") is None and language_model.direction is Direction.FORWARD:
        files = read_tokenizer(str(folder))
        found = files.special_id("eos") if files.special_id("bos") is None else files.special_id("bos")
        if found is not None:
            return found
    return language_model.stop_ids[0]


def _before_any(terms: Sequence[str], text: str) -> str:
    """The text up to the first of the strings in it."""
    for term in terms:
        text = text.partition(term)[0]
    return text
