"""Continue a text with the stock `generate` of transformers and token healing, and join the result to the text.

Shapes: B rows, S positions, V ids of the logits.
"""

import codecs
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from megatron_ledom.direction import Direction, to_text_order
from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.inference.joint_tokenizer import HealedPrompt, JointTokenizer, TokenHealer
from megatron_ledom.inference.scoring import check_batch_size, naming_text, not_finite


@dataclass(frozen=True, slots=True)
class Generation:
    """The text that a model wrote, joined to the given text.

    preceding + following is `text`; the given part is unchanged. stopped: the model wrote eod, so the text begins (reverse) or
    ends (forward) there; otherwise a stop string or the token limit ended it. text_ids: the ids that the model wrote, in text
    order, without eod; those next to the given text may repeat its edge (token healing), the farthest ones may spell the stop
    string. stop_string: the string that ended the writing; it and everything beyond it are not in the text.
    """

    preceding: str
    following: str
    stopped: bool
    text_ids: list[int]
    stop_string: str | None = None

    @property
    def text(self) -> str:
        """The whole text, in text order."""
        return self.preceding + self.following


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Settings of generation: temperature 0 takes the likeliest token; top_p 1 and top_k 0 are off; a seed makes a call repeatable.

    stop_strings: the writing ends at the first of these strings, each in text order.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    num_return_sequences: int = 1
    seed: int | None = None
    stop_strings: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Raise UsageError for values outside their range."""
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens={self.max_new_tokens}: it must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature={self.temperature} must be 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p={self.top_p} must be above 0 and at most 1 (off)")
        if self.top_k < 0:
            raise UsageError(f"top_k={self.top_k} must be 0 (off) or a positive number")
        if self.num_return_sequences < 1:
            raise UsageError(f"{self.num_return_sequences} samples requested; at least 1 is needed")
        if isinstance(self.stop_strings, str):
            raise UsageError(f"stop_strings={self.stop_strings!r} is one text, so each letter would stop; pass a list")
        if not all(self.stop_strings):
            raise UsageError("an empty stop string would stop at once; remove it, or give at least one character")
        if self.num_return_sequences > 1 and self.temperature == 0:
            raise UsageError(
                f"{self.num_return_sequences} samples at temperature 0 would all be the same; set a temperature above 0"
            )


class _HealThenWrite(LogitsProcessor):  # type: ignore[misc]
    """Token healing: restricts each row to ids that spell its trimmed bytes, and all rows to ids of the tokenizer."""

    def __init__(
        self, model: Any, healer: TokenHealer, trimmed_by_row: list[bytes], num_prompt: int, writable_ids: torch.Tensor
    ) -> None:
        self._healer, self._trimmed, self._num_prompt = healer, list(trimmed_by_row), num_prompt
        self._model, self._writable_ids = model, writable_ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores [B, V] of the next token with -inf for every id that is not allowed; input_ids [B, S] so far.

        Raises NotFiniteError for logits that contain NaN or +inf.
        """
        is_finite_B = torch.isfinite(scores.amax(dim=-1))
        if not bool(is_finite_B.all()):
            row = int((~is_finite_B).nonzero()[0])
            raise not_finite(self._model, input_ids[row].tolist())
        masked = torch.full_like(scores, -torch.inf)
        masked[:, self._writable_ids] = scores[:, self._writable_ids]
        for row, trimmed in enumerate(self._trimmed):
            if not trimmed:
                continue
            if input_ids.shape[1] > self._num_prompt:
                trimmed = self._trimmed[row] = self._healer.rest(trimmed, int(input_ids[row, -1]))
            if trimmed:
                allowed = torch.tensor(self._healer.allowed(trimmed), device=scores.device)
                masked[row] = -torch.inf
                masked[row, allowed] = scores[row, allowed]
        return masked


RowsSoFar = Callable[[list[list[int]]], list[bool]]
"""Gets the new tokens of each row (model order) after every step; returns True for each row that is done."""


class _Watch(StoppingCriteria):  # type: ignore[misc]
    """Calls `look` after every step, and ends the rows for which it returns True."""

    def __init__(self, look: RowsSoFar, num_prompt: int) -> None:
        self._look, self._num_prompt = look, num_prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **unused: Any) -> torch.Tensor:
        """Return [B] booleans, True for each row that ends; input_ids [B, S] so far."""
        return torch.tensor(self._look(input_ids[:, self._num_prompt :].tolist()), device=input_ids.device)


class TextJoiner:
    """Joins the ids that a model writes after a healed prompt to the given text. Needs no model.

    healer: token healing for the same tokenizer. stop_ids: the ids that end a text.
    """

    def __init__(self, tokenizer: JointTokenizer, direction: Direction, stop_ids: list[int]) -> None:
        self._tokenizer, self._direction, self.stop_ids = tokenizer, direction, stop_ids
        self.healer = TokenHealer(tokenizer, direction, stop_ids)

    def counts_as_new(self, tokens: list[int], trimmed: bytes) -> bool:
        """Return True if the last of `tokens` (model order) adds to the given text, so it does not only spell `trimmed`."""
        return self.healer.count_healing(tokens, trimmed) < len(tokens)

    def join(self, text: str, healed: HealedPrompt, tokens: list[int], sampling: Sampling) -> Generation:
        """Cut a row at its end and join its text to `text`."""
        tokens = tokens[: self.healer.count_healing(tokens, healed.trimmed) + sampling.max_new_tokens]
        text_ids, written, stop_string, stopped = self.cut(tokens, healed, sampling)
        pair = (written, text) if self._direction is Direction.REVERSE else (text, written)
        return Generation(*pair, stopped=stopped, text_ids=text_ids, stop_string=stop_string)

    def cut(self, tokens: list[int], healed: HealedPrompt, sampling: Sampling) -> tuple[list[int], str, str | None, bool]:
        """Return the ids before eod in text order, their text up to a stop string, that string, and True if eod ended the text."""
        stops = [index for index, token in enumerate(tokens) if token in self.stop_ids]
        text_ids = to_text_order(tokens[: stops[0]] if stops else tokens, self._direction)
        written = self.written_text(text_ids, healed, stopped=bool(stops))
        found = [self._up_to_stop(written, string) for string in sampling.stop_strings if string in written]
        if found:  # the shortest text: its stop string was written first
            return text_ids, *min(found, key=lambda kept: len(kept[0])), False
        return text_ids, written, None, bool(stops)

    def _up_to_stop(self, written: str, string: str) -> tuple[str, str]:
        """Return the text between the given text and the nearest `string`, and the string."""
        if self._direction is Direction.REVERSE:
            return written.rpartition(string)[2], string
        return written.partition(string)[0], string

    def written_text(self, text_ids: list[int], healed: HealedPrompt, *, stopped: bool) -> str:
        """Return the characters of `text_ids` without those that repeat the given text (token healing).

        An incomplete character at the far end, cut by the token limit, is omitted. So is the dummy prefix of a text that a
        reverse model finished. Other bytes that are not UTF-8 become U+FFFD.
        """
        if self._tokenizer.surfaces is None:
            return self._decoded_text(text_ids, healed)
        kept_ids = [id_ for id_ in text_ids if id_ not in self._tokenizer.special_ids]
        written = self._tokenizer.spell(kept_ids)
        if self._direction is Direction.FORWARD:
            written = written[len(healed.trimmed) :]
            return codecs.getincrementaldecoder("utf-8")("replace").decode(written, final=stopped)
        written = written[: max(0, len(written) - len(healed.trimmed))] + healed.bridge
        if stopped and self._tokenizer.has_dummy_prefix:
            written = written.removeprefix(b" ")
        while not stopped and written and written[0] & 0xC0 == 0x80:
            written = written[1:]
        return written.decode("utf-8", "replace")

    def _decoded_text(self, text_ids: list[int], healed: HealedPrompt) -> str:
        """Return the written text for a tokenizer without `surfaces`: decode all ids, then remove the text of the given ids."""
        given_ids = to_text_order(healed.tokens, self._direction)
        given = self._tokenizer.decode(given_ids)
        if self._direction is Direction.REVERSE:
            whole = self._tokenizer.decode(text_ids + given_ids)
            return whole.removesuffix(given) if whole.endswith(given) else self._tokenizer.decode(text_ids)
        whole = self._tokenizer.decode(given_ids + text_ids)
        return whole.removeprefix(given) if whole.startswith(given) else self._tokenizer.decode(text_ids)


class Writer(TextJoiner):
    """A model with its tokenizer and stop ids that continues texts with token healing."""

    def __init__(self, model: Any, tokenizer: JointTokenizer, direction: Direction, stop_ids: list[int]) -> None:
        super().__init__(tokenizer, direction, stop_ids)
        self._model = model
        writable = sorted({*tokenizer.vocab.values(), *stop_ids})
        self._writable_ids = torch.tensor([id_ for id_ in writable if id_ < model.config.vocab_size], device=model.device)

    def write(self, texts: list[str], leading_ids: list[int], sampling: Sampling, batch_size: int) -> list[Generation]:
        """Return `num_return_sequences` results for each text, in the order of the texts; a batch has at most `batch_size` rows."""
        healed = {text: self._tokenizer.heal_prompt(text, self._direction) for text in texts}
        return self.write_healed([(text, healed[text]) for text in texts], leading_ids, sampling, batch_size)

    def write_healed(
        self, texts: list[tuple[str, HealedPrompt]], leading_ids: list[int], sampling: Sampling, batch_size: int
    ) -> list[Generation]:
        """Do the same as `write` for texts that the caller prepared for token healing."""
        check_batch_size(batch_size)
        rows = [text for text in texts for _ in range(sampling.num_return_sequences)]
        results = []
        with _seeded(sampling.seed, self._model.device):
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                healed = [row for _, row in batch]
                tokens = self._write_batch(healed, leading_ids, sampling, self._stopper(healed, sampling))
                results += [self.join(*text, row, sampling) for text, row in zip(batch, tokens, strict=True)]
        return results

    def stream(self, text: str, leading_ids: list[int], sampling: Sampling) -> Iterator[Generation]:
        """Yield the text so far after every token that adds to it, and finally the result of `write`.

        The model runs in a thread, at most one token ahead; the thread ends when the iterator is closed.
        """
        if sampling.num_return_sequences > 1:
            raise UsageError(f"a stream shows one text, but {sampling.num_return_sequences} were requested; request one")
        return self._streamed(text, leading_ids, sampling)

    def _streamed(self, text: str, leading_ids: list[int], sampling: Sampling) -> Iterator[Generation]:
        healed = self._tokenizer.heal_prompt(text, self._direction)
        stop, steps, is_closed = self._stopper([healed], sampling), SimpleQueue[Any](), False

        def _show(rows: list[list[int]]) -> list[bool]:
            steps.put(rows[0])
            return [True] if is_closed else stop(rows) if stop else [False]

        def _run() -> None:
            try:
                with _seeded(sampling.seed, self._model.device):
                    steps.put((self._write_batch([healed], leading_ids, sampling, _show)[0],))
            except BaseException as error:  # raised again in the caller's thread
                steps.put(error)

        thread, shown = Thread(target=_run, daemon=True), ""
        thread.start()
        try:
            while isinstance(step := steps.get(), list):
                now = self.join(text, healed, step, sampling)
                if len(now.text) > len(shown) and not now.stopped and now.stop_string is None:
                    shown = now.text
                    yield now
        finally:
            is_closed = True
            thread.join()
        if isinstance(step, BaseException):
            raise step
        yield self.join(text, healed, step[0], sampling)

    def _stopper(self, healed: list[HealedPrompt], sampling: Sampling) -> RowsSoFar | None:
        """Return the function that ends rows at stop strings; None if there are none."""
        if not sampling.stop_strings:
            return None

        def look(rows: list[list[int]]) -> list[bool]:
            return [self.cut(row, text, sampling)[2] is not None for row, text in zip(rows, healed, strict=True)]

        return look

    def _write_batch(
        self, healed: list[HealedPrompt], leading_ids: list[int], sampling: Sampling, look: RowsSoFar | None
    ) -> list[list[int]]:
        """Return the new tokens of each row in model order. Prompts are padded, and masked, before their beginning."""
        prompts = [leading_ids + row.tokens for row in healed]
        if not all(prompts):
            raise DataError("a given text has no tokens, so the model has nothing to start from; pass a longer text")
        longest, num_trimmed = max(map(len, prompts)), max(len(row.trimmed) for row in healed)
        self.check_length(longest + num_trimmed, sampling.max_new_tokens)
        chosen: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            # top_k 0 and top_p 1 are written out: transformers would otherwise put its own defaults there
            chosen = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens + num_trimmed,  # a token spells at least one byte
            eos_token_id=self.stop_ids,
            pad_token_id=self.stop_ids[0],
            **chosen,
        )
        healing = self.healing_processor([row.trimmed for row in healed], longest)
        with naming_text(self._tokenizer, self._direction):
            output = self._model.generate(
                **self.padded(prompts),
                generation_config=config,
                logits_processor=LogitsProcessorList([healing]),
                stopping_criteria=StoppingCriteriaList([_Watch(look, longest)] if look else []),
            )
        return [list(row) for row in output[:, longest:].tolist()]

    def padded(self, prompts: list[list[int]]) -> dict[str, torch.Tensor]:
        """Return `input_ids` and `attention_mask` [B, S]; rows end together, padded and masked before their beginning."""
        longest = max(map(len, prompts))
        input_ids = torch.full((len(prompts), longest), self.stop_ids[0])
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            attention_mask[row, longest - len(prompt) :] = 1
        return {"input_ids": input_ids.to(self._model.device), "attention_mask": attention_mask.to(self._model.device)}

    def healing_processor(self, trimmed_by_row: list[bytes], num_prompt: int) -> LogitsProcessor:
        """Return the processor that makes rows spell their trimmed bytes after `num_prompt` given positions (token healing)."""
        return _HealThenWrite(self._model, self.healer, trimmed_by_row, num_prompt, self._writable_ids)

    def check_length(self, num_prompt: int, max_new_tokens: int) -> None:
        """Raise UsageError if the text and `max_new_tokens` exceed the positions of the model."""
        limit = getattr(self._model.config, "max_position_embeddings", None)
        if limit and num_prompt + max_new_tokens > limit:
            raise UsageError(
                f"{num_prompt} tokens of text and max_new_tokens={max_new_tokens} exceed the {limit} positions of the model;"
                f" shorten the text or write at most {max(0, limit - num_prompt)} tokens"
            )


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed the generators for one call and restore their states afterwards; do nothing without a seed."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
