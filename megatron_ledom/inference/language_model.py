"""Language models of both directions: `ReverseLM` and `ForwardLM`.

A reverse model writes and scores the text that precedes a given text: P(x) = prod_t P(x_t | x_{t+1..T}) (LEDOM, arXiv
2507.01335). A forward model, a twin or any stock causal model, writes and scores the text that follows.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, overload

import torch
from transformers import GenerationConfig

from megatron_ledom.direction import Direction, Reading
from megatron_ledom.errors import DataError, MismatchError, UsageError
from megatron_ledom.inference.generation import Generation, Sampling, Writer
from megatron_ledom.inference.joint_tokenizer import JointTokenizer
from megatron_ledom.inference.model_folder import (
    PYTHON_OPTIONS,
    OptionNames,
    check_model_type,
    leading_ids_of,
    load_stock_model,
    load_tokenizer,
    read_model_config,
    recorded_reading,
)
from megatron_ledom.inference.scoring import (
    Span,
    SpanScore,
    TokenUsage,
    distinct_spans,
    naming_text,
    no_room,
    score_spans,
    span_score,
    span_tokens,
    too_long,
)


class LanguageModel:
    """A causal Hugging Face model with its direction. Texts and `text_ids` are always in text order.

    stop_ids: the ids that end generation; the first is eod. leading_ids: the ids before every sequence in model order: none for
    a model of this package without a marker, else its marker; BOS for a stock model whose tokenizer adds one. reading: how the
    model reads in this direction; None for a folder that records no direction.
    """

    direction: ClassVar[Direction]

    def __init__(
        self,
        model: Any,
        tokenizer: JointTokenizer,
        stop_ids: list[int],
        leading_ids: list[int],
        reading: Reading | None = None,
    ) -> None:
        self.model, self.tokenizer, self.stop_ids, self.leading_ids = model, tokenizer, stop_ids, leading_ids
        self.reading = reading
        self.writer = Writer(model, tokenizer, self.direction, stop_ids)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        direction: str | None = None,
        eod_id: int | None = None,
        option_names: OptionNames = PYTHON_OPTIONS,
    ) -> Self:
        """Load an exported or stock folder of safetensors, offline.

        device: by default CUDA if available, else the CPU. dtype: by default the stored one on CUDA, float32 on a CPU.
        direction, eod_id (the id that ended each text in training): only for a reverse model whose config.json records no
        direction. option_names: the names of these two in error messages.
        """
        folder = Path(folder)
        check_model_type(folder, read_model_config(folder))
        loaded = cls._parts_of(folder, direction, eod_id, option_names)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        chosen = dtype or (torch.float32 if device.type == "cpu" else "auto")
        model = load_stock_model(folder, dtype=chosen).to(device).eval()
        model.generation_config = GenerationConfig()  # the folder's own sampling defaults must not mix with the caller's
        return cls(model, *loaded)

    @classmethod
    def sharing(cls, other: "LanguageModel", folder: str | Path) -> Self:
        """Return a two-way model in this direction, with the weights of the same folder that were loaded in the other one."""
        return cls(other.model, *cls._parts_of(Path(folder), None, None, PYTHON_OPTIONS))

    @classmethod
    def _parts_of(
        cls, folder: Path, direction: str | None, eod_id: int | None, option_names: OptionNames
    ) -> tuple[JointTokenizer, list[int], list[int], Reading | None]:
        """Return tokenizer, stop ids, leading ids and reading of a folder."""
        config = read_model_config(folder)
        cls._check_direction(folder, config.get("direction"), direction, option_names)
        reading = recorded_reading(folder, config, cls.direction)
        tokenizer, stop_ids = load_tokenizer(folder, cls.direction, eod_id, option_names)
        return tokenizer, stop_ids, leading_ids_of(reading, cls.direction, tokenizer), reading

    @classmethod
    def _check_direction(cls, folder: Path, recorded: str | None, passed: str | None, option_names: OptionNames) -> None:
        """Refuse a direction that is not this one. A folder that records none is forward, unless the caller passes a direction."""
        mine = str(cls.direction)
        other = "ForwardLM" if cls.direction is Direction.REVERSE else "ReverseLM"
        if passed is not None and passed != mine:
            raise UsageError(f"direction={passed!r} was passed to {cls.__name__}, which reads {mine}; use {other}")
        if recorded is None and passed is None and cls.direction is Direction.REVERSE:
            raise MismatchError(
                f"{folder}/config.json records no direction, so the model counts as a forward one, expected 'reverse'; pass a folder"
                f" that ledom convert-checkpoint wrote, or pass {option_names.reverse} if you know that this is a reverse model"
            )

    def span_scores(
        self, pairs: list[tuple[str, str]], with_eod: bool, batch_size: int, *, usage: TokenUsage | None = None
    ) -> list[SpanScore]:
        """Score one part of each (preceding, following): the preceding part for a reverse model, the following for a forward one.

        The other part is given. If it is empty, the text is scored after the start of a document: BOS for a stock model whose
        tokenizer adds one, else eod. usage: the tokens that the model reads, and the time, are added to it.
        """
        start = time.monotonic()
        spans = [self._span(pair, with_eod) for pair in pairs]
        with naming_text(self.tokenizer, self.direction):
            values = score_spans(self.model, spans, batch_size)
        scores = [span_score(span, row, self.direction, with_eod) for span, row in zip(spans, values, strict=True)]
        if usage is not None:
            usage.tokens += sum(len(s.tokens) for s in distinct_spans(spans).values() if len(s.tokens) > s.num_context)
            usage.seconds += time.monotonic() - start
        return scores

    def score_problem(self, pair: tuple[str, str], with_eod: bool) -> str | None:
        """Return the reason if a pair is too long for `span_scores`; None if it fits."""
        return too_long(len(self._tokens(pair, with_eod)[0]), self.num_positions, self.direction)

    def growth_problem(self, text: str, num_new_tokens: int) -> str | None:
        """Return the reason if the model has no room for a text and `num_new_tokens` more; None if it has."""
        healed = self.tokenizer.heal_prompt(text, self.direction)
        num_given = len(self.leading_ids) + len(healed.tokens) + len(healed.trimmed)
        return no_room(num_given, num_new_tokens, self.num_positions, self.direction)

    @property
    def num_positions(self) -> int | None:
        """Length of the longest sequence, in tokens; None if the model has no limit."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def _tokens(self, pair: tuple[str, str], with_eod: bool) -> tuple[list[int], int]:
        tokens, num_given = span_tokens(self.tokenizer, self.direction, pair, self.leading_ids, self.stop_ids)
        return [*tokens, *(self.stop_ids[:1] if with_eod else [])], num_given

    def _span(self, pair: tuple[str, str], with_eod: bool) -> Span:
        tokens, num_given = self._tokens(pair, with_eod)
        if problem := too_long(len(tokens), self.num_positions, self.direction):
            raise DataError(f"{problem}; shorten it")
        return Span(tokens, num_given)

    def _generate(self, given: str | list[str], sampling: Sampling, batch_size: int) -> list[Generation]:
        texts = [given] if isinstance(given, str) else list(given)
        self._check_given(texts)
        return self.writer.write(texts, self.leading_ids, sampling, batch_size)

    def _stream(self, given: str, options: dict[str, Any]) -> Iterator[Generation]:
        self._check_given([given])
        return self.writer.stream(given, self.leading_ids, Sampling(**options))

    def _log_likelihood(
        self, preceding: str | list[str], following: str | list[str], with_eod: bool, batch_size: int
    ) -> SpanScore | list[SpanScore]:
        before, after = ([part] if isinstance(part, str) else list(part) for part in (preceding, following))
        if len(before) != len(after):
            raise UsageError(f"{len(before)} preceding and {len(after)} following texts; pass as many of each")
        self._check_given(after if self.direction is Direction.REVERSE else before)
        scores = self.span_scores(list(zip(before, after, strict=True)), with_eod, batch_size)
        return scores[0] if isinstance(preceding, str) else scores

    def _check_given(self, texts: list[str]) -> None:
        """Raise UsageError for an empty text if the model needs one to start from."""
        if not all(texts) and not self.leading_ids:
            part = "following" if self.direction is Direction.REVERSE else "preceding"
            raise UsageError(f"an empty {part} text gives the model nothing to start from; pass at least one character")


class ReverseLM(LanguageModel):
    """Writes and scores the text that precedes a given text. Load with `ReverseLM.from_pretrained(folder)`."""

    direction = Direction.REVERSE

    def generate_preceding(
        self,
        following_text: str | list[str],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        num_return_sequences: int = 1,
        seed: int | None = None,
        stop_strings: Sequence[str] = (),
        batch_size: int = 16,
    ) -> list[Generation]:
        """Write the text that precedes each given text, until eod (the text begins there) or `max_new_tokens`.

        Returns `num_return_sequences` results for each text, in the order of the texts; `result.text` ends with the given text
        exactly. Token healing: the model chooses the first tokens of the given text again where a preceding text can change
        them. It must spell the same characters, perhaps as the end of a longer piece; these tokens do not count as new.
        Temperature 0 takes the likeliest token; top_p 1 and top_k 0 are off; without a seed torch's own generator is used.
        The writing also ends at the first of `stop_strings`, which is not part of the result.
        """
        sampling = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            num_return_sequences=num_return_sequences,
            seed=seed,
            stop_strings=stop_strings,
        )
        return self._generate(following_text, sampling, batch_size)

    def stream_preceding(self, following_text: str, **options: Any) -> Iterator[Generation]:
        """Do the same as `generate_preceding` for one text, and yield the text so far while it grows at its beginning.

        options: those of `Sampling`. The last result is that of `generate_preceding`.
        """
        return self._stream(following_text, options)

    @overload
    def log_likelihood(
        self, preceding: str, following: str, *, include_beginning: bool = False, batch_size: int = 16
    ) -> SpanScore: ...
    @overload
    def log_likelihood(
        self, preceding: list[str], following: list[str], *, include_beginning: bool = False, batch_size: int = 16
    ) -> list[SpanScore]: ...
    def log_likelihood(
        self,
        preceding: str | list[str],
        following: str | list[str],
        *,
        include_beginning: bool = False,
        batch_size: int = 16,
    ) -> SpanScore | list[SpanScore]:
        """Return log P_R(preceding | following), the sum over the tokens of `preceding` in natural logs; lists give a list.

        Both are encoded once as one text; a token that crosses the boundary belongs to `following`. An empty `preceding`
        scores 0. An empty `following` raises UsageError unless the model has a marker, because nothing would condition the first
        token.
        include_beginning adds log P(eod | the whole text), the log-probability that the text begins where `preceding` does.
        """
        return self._log_likelihood(preceding, following, include_beginning, batch_size)


class ForwardLM(LanguageModel):
    """Writes and scores the text that follows a given text. A folder that records no direction counts as forward."""

    direction = Direction.FORWARD

    def generate_following(
        self,
        preceding_text: str | list[str],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        num_return_sequences: int = 1,
        seed: int | None = None,
        stop_strings: Sequence[str] = (),
        batch_size: int = 16,
    ) -> list[Generation]:
        """Write the text that follows each given text, until eod or `max_new_tokens`: the mirror of `ReverseLM.generate_preceding`.

        Returns `num_return_sequences` results for each text, in the order of the texts; `result.text` begins with the given
        text exactly. Token healing: the model chooses the last tokens of the given text again where a following text can
        change them. The writing also ends at the first of `stop_strings`, which is not part of the result.
        """
        sampling = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            num_return_sequences=num_return_sequences,
            seed=seed,
            stop_strings=stop_strings,
        )
        return self._generate(preceding_text, sampling, batch_size)

    def stream_following(self, preceding_text: str, **options: Any) -> Iterator[Generation]:
        """Do the same as `generate_following` for one text, and yield the text so far while it grows at its end.

        options: those of `Sampling`. The last result is that of `generate_following`.
        """
        return self._stream(preceding_text, options)

    @overload
    def log_likelihood(
        self, preceding: str, following: str, *, include_end: bool = False, batch_size: int = 16
    ) -> SpanScore: ...
    @overload
    def log_likelihood(
        self, preceding: list[str], following: list[str], *, include_end: bool = False, batch_size: int = 16
    ) -> list[SpanScore]: ...
    def log_likelihood(
        self,
        preceding: str | list[str],
        following: str | list[str],
        *,
        include_end: bool = False,
        batch_size: int = 16,
    ) -> SpanScore | list[SpanScore]:
        """Return log P_F(following | preceding), the sum over the tokens of `following` in natural logs; lists give a list.

        Both are encoded once as one text; a token that crosses the boundary belongs to `following`. An empty `preceding`
        raises UsageError unless the tokenizer adds a BOS or the model has a marker. If `preceding` has no token of its own, nothing
        conditions the first token of the text, so it is not scored; `num_tokens` does not count it. include_end adds log P(eod | the
        whole text).
        """
        return self._log_likelihood(preceding, following, include_end, batch_size)
