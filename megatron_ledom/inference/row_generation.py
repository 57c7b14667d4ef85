"""Continue several texts in one batch, each with its own settings, and show each text while it grows.

`Writer.write` continues texts with one setting for all. Here each row has its own limit, temperature, stop strings and random
numbers, and a row can be given up. So requests that arrive together can share a batch.
"""

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

import torch
from transformers import DynamicCache

from megatron_ledom.direction import Direction, to_text_order
from megatron_ledom.errors import DataError
from megatron_ledom.inference.generation import Generation, Sampling, TextJoiner
from megatron_ledom.inference.joint_tokenizer import HealedPrompt, JointTokenizer
from megatron_ledom.inference.key_value_cache import padded_cache, read_caches
from megatron_ledom.inference.language_model import LanguageModel
from megatron_ledom.inference.row_batch import must_divide, write_batch
from megatron_ledom.inference.row_choice import RowChoice, RowSettings, WrittenIds


@dataclass(frozen=True, slots=True)
class RowRequest:
    """A text to continue.

    key: seeds the row's own random numbers. num_likeliest: likeliest tokens to report at each position. is_shown: True for a row whose
    text `on_step` reads while it grows; a model in another process tells the steps of no others.
    """

    text: str
    sampling: Sampling
    key: str
    num_likeliest: int = 0
    is_shown: bool = False


@dataclass(frozen=True, slots=True)
class WrittenToken:
    """A token of written text, in reading order.

    text: its characters; bytes that are no whole character are U+FFFD. offset: the position of its first character within the
    written text. logprob: its log-probability, without temperature. likeliest: the likeliest tokens there, if requested.
    """

    text: str
    offset: int
    logprob: float
    likeliest: list[tuple[str, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RowResult:
    """The result of a row.

    num_given, num_new: the tokens that were read, and those that were written, with eod. tokens: the written tokens of the text,
    without eod and without tokens beyond a stop string.
    """

    generation: Generation
    num_given: int
    num_new: int
    tokens: list[WrittenToken]


OnStep = Callable[[int, Callable[[], Generation]], bool]
"""Gets the index of a row, and a function that reads its text so far, after each of its tokens; returns False if nobody wants the row
any more. Reading takes longer the more text there is, so it is done only if something needs it."""
OnEnd = Callable[[int, RowResult], None]
"""Gets the index and the result of a row as soon as it is done; others of its batch may still grow."""


IsWanted = Callable[[int], bool]
"""Returns False if nobody wants the row with this index any more."""


class TokenModel(Protocol):
    """The parts of a language model that join written ids to a text: no weights."""

    @property
    def direction(self) -> Direction:
        """The direction of the model."""

    @property
    def tokenizer(self) -> JointTokenizer:
        """The tokenizer of the model's folder."""

    @property
    def leading_ids(self) -> list[int]:
        """The ids before every sequence in model order."""

    @property
    def writer(self) -> TextJoiner:
        """Joins written ids to the given text."""


class RowWriter(TokenModel, Protocol):
    """A model that writes rows: in this process, or on a server."""

    @property
    def num_positions(self) -> int | None:
        """Length of the longest sequence, in tokens; None if the model has no limit."""

    def growth_problem(self, text: str, num_new_tokens: int) -> str | None:
        """Return the reason if the model has no room for a text and `num_new_tokens` more; None if it has."""

    def write_rows(
        self, requests: Sequence[RowRequest], on_step: OnStep, on_end: OnEnd, is_wanted: IsWanted
    ) -> list[RowResult]:
        """Return the result of each request. No two of the functions are called at the same time."""


def written_part(generation: Generation, direction: Direction) -> str:
    """Return the part of a text that the model wrote."""
    return generation.preceding if direction is Direction.REVERSE else generation.following


def row_problem(model: LanguageModel | RowWriter, request: RowRequest) -> str | None:
    """Return the reason if the model has no room for a row; None if it has. Does not run the model."""
    return model.growth_problem(request.text, request.sampling.max_new_tokens)


@torch.inference_mode()
def write_rows(
    model: LanguageModel,
    requests: Sequence[RowRequest],
    batch_size: int,
    on_step: OnStep | None = None,
    on_end: OnEnd | None = None,
) -> list[RowResult]:
    """Return the result of each request; a batch has at most `batch_size` rows. The model reads a text once for all its rows."""
    results: list[RowResult] = []
    rows = healed_rows(model, requests)
    for start in range(0, len(rows), batch_size):
        results += _write_batch(model, rows[start : start + batch_size], RowObserver(model, on_step, on_end))
    return results


class LocalRows:
    """Writes rows with a model of this process, at most `batch_size` at once. A `RowWriter`."""

    def __init__(self, model: LanguageModel, batch_size: int) -> None:
        self._model, self._batch_size = model, batch_size
        self.direction, self.tokenizer, self.leading_ids = model.direction, model.tokenizer, model.leading_ids
        self.writer, self.num_positions = model.writer, model.num_positions

    def growth_problem(self, text: str, num_new_tokens: int) -> str | None:
        """See `RowWriter.growth_problem`."""
        return self._model.growth_problem(text, num_new_tokens)

    def write_rows(
        self, requests: Sequence[RowRequest], on_step: OnStep, on_end: OnEnd, is_wanted: IsWanted
    ) -> list[RowResult]:
        """See `RowWriter.write_rows`."""

        def _on_step(index: int, read: Callable[[], Generation]) -> bool:
            return is_wanted(index) and on_step(index, read)

        return write_rows(self._model, requests, self._batch_size, _on_step, on_end)


def healed_rows(model: TokenModel, requests: Sequence[RowRequest]) -> list["Row"]:
    """Return the rows of requests; equal texts are prepared once. Raises DataError for a text without tokens."""
    healed = {text: model.tokenizer.heal_prompt(text, model.direction) for text in {request.text for request in requests}}
    if not all([*model.leading_ids, *prompt.tokens] for prompt in healed.values()):
        raise DataError("a given text has no tokens, so the model has nothing to start from; pass a longer text")
    return [Row(index, request, healed[request.text]) for index, request in enumerate(requests)]


@dataclass(frozen=True, slots=True)
class Row:
    """A request with its place in the call and its text, prepared for token healing."""

    index: int
    request: RowRequest
    healed: HealedPrompt

    def settings(self) -> RowSettings:
        """Return the settings of the row's choice."""
        sampling, num_likeliest = self.request.sampling, self.request.num_likeliest
        return RowSettings(
            self.request.key, self.healed.trimmed, sampling.max_new_tokens, sampling, num_likeliest=num_likeliest
        )


@dataclass(frozen=True, slots=True)
class RowObserver:
    """Shows each row after its step, decides if it is done, and gives its result at its end."""

    model: TokenModel
    on_step: OnStep | None
    on_end: OnEnd | None

    def after_token(self, row: Row, written: WrittenIds) -> RowResult | None:
        """Return the result of a row that is done: at its limit, at eod, at a stop string, or if nobody wants it; else None."""

        @cache
        def _text() -> Generation:
            return self._joined(row, written)

        is_done = len(written.logprobs) >= row.request.sampling.max_new_tokens or written.ids[-1] in self.model.writer.stop_ids
        if self.on_step is not None and not self.on_step(row.index, _text):
            is_done = True
        if not is_done and not (row.request.sampling.stop_strings and _text().stop_string is not None):
            return None
        return self.end(row, written, _text())

    def end(self, row: Row, written: WrittenIds, generation: Generation | None = None) -> RowResult:
        """Return the result of a row that ends with what it wrote; generation: its text, if it was joined already."""
        result = row_result(self.model, row.healed, written, generation or self._joined(row, written))
        if self.on_end is not None:
            self.on_end(row.index, result)
        return result

    def _joined(self, row: Row, written: WrittenIds) -> Generation:
        return self.model.writer.join(row.request.text, row.healed, written.ids, row.request.sampling)


def _write_batch(model: LanguageModel, rows: list[Row], observer: RowObserver) -> list[RowResult]:
    """Write one batch. It can exceed the positions of the model although each row fits; then it is divided."""
    prompts = [[*model.leading_ids, *row.healed.tokens] for row in rows]
    settings = [row.settings() for row in rows]
    if must_divide(model, prompts, settings):
        middle = len(rows) // 2
        return [*_write_batch(model, rows[:middle], observer), *_write_batch(model, rows[middle:], observer)]
    results: dict[int, RowResult] = {}

    def _is_done(choice: RowChoice, number: int) -> bool:
        result = observer.after_token(rows[number], choice.written(number))
        if result is not None:
            results[number] = result
        return result is not None

    write_batch(model, prompts, settings, _shared_cache(model, prompts, max(map(len, prompts))), _is_done)
    return [results[number] for number in range(len(rows))]


def _shared_cache(model: LanguageModel, prompts: list[list[int]], longest: int) -> DynamicCache | None:
    """Return the keys and values of prompts of which several are equal; None if each occurs once."""
    distinct = {tuple(prompt[:-1]) for prompt in prompts}
    if len(distinct) == len(prompts):
        return None
    caches = dict(zip(distinct, read_caches(model.model, [list(tokens) for tokens in distinct]), strict=True))
    return padded_cache([caches[tuple(prompt[:-1])] for prompt in prompts], longest - 1)


def row_result(model: TokenModel, healed: HealedPrompt, written: WrittenIds, generation: Generation) -> RowResult:
    """Return the result of a row from the ids that it wrote and from its joined text."""
    return RowResult(
        generation,
        num_given=len(model.leading_ids) + len(healed.tokens),
        num_new=len(written.logprobs),
        tokens=_tokens(model, healed, written, generation),
    )


def _tokens(model: TokenModel, healed: HealedPrompt, written: WrittenIds, generation: Generation) -> list[WrittenToken]:
    """Return the tokens of the written text in reading order, with the position of each.

    near, far: the bytes between the given text and the two ends of a token; they are negative where tokens spell the healed edge
    of the given text.
    """
    reverse, tokenizer = model.direction is Direction.REVERSE, model.tokenizer
    new_ids = written.ids[: len(written.ids) - generation.stopped]
    num_healing = len(written.ids) - len(written.logprobs)
    characters = _Characters(model, healed, new_ids, stopped=generation.stopped)
    length = len(written_part(generation, model.direction))
    far = len(healed.bridge) - len(healed.trimmed) + sum(len(_spelled(model, id_)) for id_ in new_ids[:num_healing])
    found = []
    for place, id_ in enumerate(new_ids[num_healing:]):
        near, far = far, far + len(_spelled(model, id_))
        if characters.up_to(near) >= length:
            break
        offset = max(0, length - characters.reached_by(far)) if reverse else characters.up_to(near)
        others = (
            [(tokenizer.token_text(other), value) for other, value in written.likeliest[place]] if written.likeliest else []
        )
        found.append(WrittenToken(tokenizer.token_text(id_), offset, written.logprobs[place], others))
    return [found[place] for place in to_text_order(list(range(len(found))), model.direction)]


class _Characters:
    """Counts characters of the written bytes, from the given text to a number of bytes away from it."""

    def __init__(self, model: TokenModel, healed: HealedPrompt, new_ids: list[int], *, stopped: bool) -> None:
        self._reverse = model.direction is Direction.REVERSE
        spelled = b"".join(_spelled(model, id_) for id_ in to_text_order(new_ids, model.direction))
        num_trimmed = len(healed.trimmed)
        written = spelled[: max(0, len(spelled) - num_trimmed)] + healed.bridge if self._reverse else spelled[num_trimmed:]
        while self._reverse and not stopped and written and written[0] & 0xC0 == 0x80:
            written = written[1:]
        self._bytes, self._num = written, len(written.decode("utf-8", "replace"))

    def up_to(self, num_bytes: int) -> int:
        """Return the number of whole characters within the bytes nearest to the given text."""
        whole, partial = self._before(num_bytes)
        return self._num - whole - partial if self._reverse else whole

    def reached_by(self, num_bytes: int) -> int:
        """Return the number of characters of which at least one byte is within the bytes nearest to the given text."""
        whole, partial = self._before(num_bytes)
        return self._num - whole if self._reverse else whole + partial

    def _before(self, num_bytes: int) -> tuple[int, int]:
        """Return the number of whole characters before the place in reading order, and 1 if it is within a character."""
        place = min(max(0, num_bytes), len(self._bytes))
        place = len(self._bytes) - place if self._reverse else place
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        num = len(decoder.decode(self._bytes[:place]))
        if not decoder.getstate()[0]:
            return num, 0
        is_within = place < len(self._bytes) and not decoder.decode(self._bytes[place : place + 1]).startswith("\ufffd")
        return (num, 1) if is_within else (num + 1, 0)


def _spelled(model: TokenModel, id_: int) -> bytes:
    """Return the bytes of an id in written text, which has none for a special token."""
    tokenizer = model.tokenizer
    if id_ in tokenizer.special_ids:
        return b""
    return tokenizer.decode([id_]).encode() if tokenizer.surfaces is None else tokenizer.spell([id_])
