"""The inference engine that runs a transformers model in this process; it writes answers with the stock `generate`.

An answer keeps the keys and values of its tokens. Therefore the model reads a prompt once for all of its answers, and a step
continues where the last one ended. Shapes: B rows, S positions, V ids, H heads, D width of a head.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_ledom.errors import DataError
from megatron_ledom.inference.engines.engine import Engine, PartialAnswer, StepDelimiter
from megatron_ledom.inference.generation import Sampling
from megatron_ledom.inference.joint_tokenizer import HealedPrompt
from megatron_ledom.inference.key_value_cache import Cache, padded_cache, read_caches, row_of_cache
from megatron_ledom.inference.language_model import LanguageModel
from megatron_ledom.inference.row_batch import must_divide, write_batch
from megatron_ledom.inference.row_choice import RowChoice, RowSettings
from megatron_ledom.inference.scoring import SpanScore, check_batch_size


@dataclass(frozen=True, slots=True)
class _State:
    """The state of an answer.

    healed: the prompt. written: the new ids, in model order. cache: keys and values of all tokens but the last; None if not computed.
    """

    healed: HealedPrompt
    written: tuple[int, ...] = ()
    cache: Cache | None = None


class TransformersEngine(Engine):
    """Samples, scores and expands with a `ForwardLM` or `ReverseLM`; at most `batch_size` sequences at once.

    Only a forward model writes answers. A reverse model keeps no cache between steps: a new step is at the end of the answer,
    which a reverse model reads first, so all later keys and values change.
    """

    def __init__(self, language_model: LanguageModel, batch_size: int = 16) -> None:
        check_batch_size(batch_size)
        super().__init__(language_model.direction)
        self._lm, self.batch_size = language_model, batch_size

    def score(self, pairs: Sequence[tuple[str, str]], *, include_end: bool = False) -> list[SpanScore]:
        """See `Engine.score`. Rows of similar length share a batch."""
        return self._lm.span_scores(list(pairs), include_end, self.batch_size, usage=self.usage)

    def score_problem(self, pair: tuple[str, str], *, include_end: bool = False) -> str | None:
        """See `Engine.score_problem`."""
        return self._lm.score_problem(pair, include_end)

    def growth_problem(self, text: str, num_new_tokens: int) -> str | None:
        """See `Engine.growth_problem`."""
        return self._lm.growth_problem(text, num_new_tokens)

    @torch.inference_mode()
    def _grow(
        self, answers: Sequence[PartialAnswer], num: int, delimiter: StepDelimiter | None, sampling: Sampling
    ) -> list[list[PartialAnswer]]:
        start = time.monotonic()
        started = [self._started(answer) for answer in answers]
        rows = [
            (index, answer.child(number))
            for index, answer in enumerate(started)
            if not answer.finished
            for number in range(num)
        ]
        grown: list[list[PartialAnswer]] = [[answer] if answer.finished else [] for answer in started]
        caches: dict[int, Cache] = {}
        for begin in range(0, len(rows), self.batch_size):
            batch = rows[begin : begin + self.batch_size]
            caches = self._caches({index: started[index] for index, _ in batch}, caches)
            written = self._write([answer for _, answer in batch], [caches[index] for index, _ in batch], delimiter, sampling)
            for (index, _), answer in zip(batch, written, strict=True):
                grown[index].append(answer)
        self.usage.seconds += time.monotonic() - start
        return grown

    def _started(self, answer: PartialAnswer) -> PartialAnswer:
        if answer.state is not None:
            return answer
        healed = self._lm.tokenizer.heal_prompt(answer.prompt, self.direction)
        if not self._lm.leading_ids + healed.tokens:
            raise DataError("a prompt has no tokens, so the model has nothing to start from; pass a longer text")
        return replace(answer, state=_State(healed))

    def _tokens(self, answer: PartialAnswer) -> list[int]:
        return [*self._lm.leading_ids, *answer.state.healed.tokens, *answer.state.written]

    def _caches(self, answers: dict[int, PartialAnswer], known: dict[int, Cache]) -> dict[int, Cache]:
        """Return the cache of each answer: its own, one of `known`, or computed now in one batch."""
        caches = {index: answer.state.cache or known.get(index) for index, answer in answers.items()}
        missing = [index for index, cache in caches.items() if cache is None]
        read = [self._tokens(answers[index])[:-1] for index in missing]
        for index, cache in zip(missing, read_caches(self._lm.model, read), strict=True):
            caches[index] = cache
        self.usage.tokens += sum(map(len, read))
        return {index: cache or [] for index, cache in caches.items()}

    def _write(
        self, answers: list[PartialAnswer], caches: list[Cache], delimiter: StepDelimiter | None, sampling: Sampling
    ) -> list[PartialAnswer]:
        """Continue each answer by one step, or to its end without a delimiter. A batch that exceeds the model's positions is divided."""
        tokens = [self._tokens(answer) for answer in answers]
        longest = max(map(len, tokens))
        settings = [
            RowSettings(
                answer.key,
                answer.state.healed.trimmed if not answer.state.written else b"",
                sampling.max_new_tokens - answer.num_tokens,
                sampling,
                num_written_before=len(answer.state.written),
            )
            for answer in answers
        ]
        if must_divide(self._lm, tokens, settings):
            middle = len(answers) // 2
            return [
                *self._write(answers[:middle], caches[:middle], delimiter, sampling),
                *self._write(answers[middle:], caches[middle:], delimiter, sampling),
            ]

        def _is_done(choice: RowChoice, row: int) -> bool:
            return choice.has_ended(row) or (delimiter is not None and _ends_step(choice, row, answers[row], delimiter))

        choice, cache = write_batch(self._lm, tokens, settings, padded_cache(caches, longest - 1), _is_done)
        self.usage.tokens += sum(map(len, choice.new_ids))
        return [self._grown(answer, choice, row, longest, delimiter, cache) for row, answer in enumerate(answers)]

    def _grown(
        self, answer: PartialAnswer, choice: RowChoice, row: int, longest: int, delimiter: StepDelimiter | None, cache: Any
    ) -> PartialAnswer:
        new_ids = choice.new_ids[row]
        stopped = bool(new_ids) and new_ids[-1] in self._lm.stop_ids
        kept_ids = new_ids[:-1] if stopped else new_ids
        finished = stopped or choice.num_written(row) >= choice.rows[row].limit
        written = (*answer.state.written, *kept_ids)
        state = _State(answer.state.healed, written)
        if delimiter is not None and not finished:
            begin = longest - len(self._tokens(answer))
            state = replace(state, cache=row_of_cache(cache, row, begin, longest + len(kept_ids) - 1))
        logprob = sum(choice.logprobs[row]) + (answer.forward_logprob or 0.0)
        num_tokens = answer.num_tokens + choice.num_written(row) - stopped
        text = self._lm.writer.written_text(list(written), answer.state.healed, stopped=stopped)
        return replace(answer, text=text, finished=finished, num_tokens=num_tokens, forward_logprob=logprob, state=state)


def _ends_step(choice: RowChoice, row: int, answer: PartialAnswer, delimiter: StepDelimiter) -> bool:
    """Return True if the newest token of a row ends its step."""
    new_ids = choice.new_ids[row]
    if not choice.num_written(row):
        return False
    ids = [*answer.state.written, *new_ids]
    step = choice.writer.written_text(ids, answer.state.healed, stopped=False)[len(answer.text) :]
    return delimiter.end_of_step(step) is not None or bool(step.strip() and new_ids[-1] in delimiter.token_ids)
