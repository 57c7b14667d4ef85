"""Language models of both directions: `ReverseLM` (LEDOM, arXiv 2507.01335: P(x) = prod_t P(x_t | x_{t+1..T})) and `ForwardLM`.

Each writes and scores the part of a text that it comes to last, given the other: a reverse model what precedes, a forward model,
its twin or any stock causal model, what follows.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, overload

import torch
from transformers import GenerationConfig

from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, MismatchError, UsageError
from megatron_ledom.inference.generation import Generation, Sampling, Writer
from megatron_ledom.inference.joint_tokenizer import JointTokenizer
from megatron_ledom.inference.model_folder import (
    PYTHON_OPTIONS,
    OptionNames,
    check_model_type,
    load_stock_model,
    load_tokenizer,
    read_model_config,
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
    """A causal Hugging Face model with the order in which it reads. Texts and `text_ids` are always text order.

    stop_ids: what ends generation; the first is eod. leading_ids: what stands before every sequence in model order: nothing
    for a model of this package, BOS for a stock model whose tokenizer adds one.
    """

    direction: ClassVar[Direction]

    def __init__(self, model: Any, tokenizer: JointTokenizer, stop_ids: list[int], leading_ids: list[int]) -> None:
        self.model, self.tokenizer, self.stop_ids, self.leading_ids = model, tokenizer, stop_ids, leading_ids
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

        device: CUDA where there is one, else the CPU. dtype: the stored one on CUDA, float32 on a CPU. direction and eod_id, the
        id that the model was trained to end a text with: only for a reverse model whose config.json records no direction.
        option_names: how error messages name these two.
        """
        folder = Path(folder)
        config = read_model_config(folder)
        check_model_type(folder, config)
        cls._check_direction(folder, config.get("direction"), direction, option_names)
        tokenizer, stop_ids = load_tokenizer(folder, cls.direction, eod_id, option_names)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        chosen = dtype or (torch.float32 if device.type == "cpu" else "auto")
        model = load_stock_model(folder, dtype=chosen).to(device).eval()
        model.generation_config = GenerationConfig()  # the folder's own sampling defaults must not mix with the caller's
        adds_bos = config.get("direction") is None and cls.direction is Direction.FORWARD  # before a text's last word: nonsense
        return cls(model, tokenizer, stop_ids, tokenizer.leading_ids if adds_bos else [])

    @classmethod
    def _check_direction(cls, folder: Path, recorded: str | None, passed: str | None, option_names: OptionNames) -> None:
        """Refuse a folder that reads the other way; without a record only what is passed, or stock HF, counts."""
        mine = str(cls.direction)
        other = "ForwardLM" if cls.direction is Direction.REVERSE else "ReverseLM"
        if passed is not None and passed != mine:
            raise UsageError(f"direction={passed!r} was passed to {cls.__name__}, which reads {mine}; use {other}")
        if recorded is None and passed is None and cls.direction is Direction.REVERSE:
            raise MismatchError(
                f"{folder}/config.json records no direction, and a stock model reads forward; expected 'reverse': pass a folder"
                f" that ledom convert-checkpoint wrote, or say {option_names.reverse} if you know that it is one"
            )
        if recorded is not None and recorded != mine:
            raise MismatchError(
                f"{folder}/config.json says that this model reads {recorded}, {cls.__name__} needs a {mine} one: load it with"
                f" {other}, or pass the folder of a {mine} model (fed the wrong order, a model gives nonsense without an error)"
            )

    def span_scores(
        self, pairs: list[tuple[str, str]], with_eod: bool, batch_size: int, *, usage: TokenUsage | None = None
    ) -> list[SpanScore]:
        """Score, of each (preceding, following), the part that this model comes to last, given the other part.

        Where the given part is empty, the text is scored by itself after what stands before a document: BOS for a stock model
        whose tokenizer adds one, else eod. usage: takes up the tokens that the model was fed, and the time.
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
        """Return why `span_scores` would refuse a pair as too long, None where it fits."""
        return too_long(len(self._tokens(pair, with_eod)[0]), self.num_positions, self.direction)

    def growth_problem(self, text: str, num_new_tokens: int) -> str | None:
        """Return why the model has no room for a text and `num_new_tokens` beside it, None where it has."""
        healed = self.tokenizer.heal_prompt(text, self.direction)
        num_given = len(self.leading_ids) + len(healed.tokens) + len(healed.trimmed)
        return no_room(num_given, num_new_tokens, self.num_positions, self.direction)

    @property
    def num_positions(self) -> int | None:
        """The longest sequence, in tokens; None where the model has no limit."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def _tokens(self, pair: tuple[str, str], with_eod: bool) -> tuple[list[int], int]:
        tokens, num_given = span_tokens(self.tokenizer, self.direction, pair, self.leading_ids, self.stop_ids)
        return [*tokens, *(self.stop_ids[:1] if with_eod else [])], num_given

    def _span(self, pair: tuple[str, str], with_eod: bool) -> Span:
        tokens, num_given = self._tokens(pair, with_eod)
        if fault := too_long(len(tokens), self.num_positions, self.direction):
            raise DataError(f"{fault}; shorten it")
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
            raise UsageError(f"{len(before)} preceding and {len(after)} following texts do not pair; pass as many of each")
        self._check_given(after if self.direction is Direction.REVERSE else before)
        scores = self.span_scores(list(zip(before, after, strict=True)), with_eod, batch_size)
        return scores[0] if isinstance(preceding, str) else scores

    def _check_given(self, texts: list[str]) -> None:
        """Refuse an empty text where the model needs one to start from."""
        is_reverse = self.direction is Direction.REVERSE
        if not all(texts) and (is_reverse or not self.leading_ids):
            part = "following" if is_reverse else "preceding"
            raise UsageError(f"an empty {part} text gives the model nothing to start from: pass at least one character")


class ReverseLM(LanguageModel):
    """Writes what came before a text and scores what came before a text. Load with `ReverseLM.from_pretrained(folder)`."""

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
        """Write what came before each text, until the model says that the text begins there (eod) or `max_new_tokens`.

        Returns `num_return_sequences` results for each text, in the order of the texts; `result.text` ends with the given text
        exactly. The first tokens of the given text which would be others if it were continued to the front are not fixed:
        the model spells the same characters again, perhaps as the end of a longer piece; they do not count as new.
        Temperature 0 takes the likeliest token; top_p 1 and top_k 0 are off; without a seed torch's own generator goes on.
        Writing ends, too, where one of `stop_strings` stands in front of what was written; it is not part of the result.
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
        """As `generate_preceding` for one text, shown while it is written: each result is the text so far, which grows at its front.

        options: those of `Sampling`. The last result is what `generate_preceding` returns.
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
        """log P_R(preceding | following): the sum over the tokens of `preceding`, natural logs; lists give a list.

        Both are encoded once as one text; a token that reaches over the boundary belongs to `following`. An empty `preceding`
        scores 0; an empty `following` is refused, because the first token would be conditioned on nothing the model was
        trained on. include_beginning adds log P(eod | the whole text): that the text begins where `preceding` does.
        """
        return self._log_likelihood(preceding, following, include_beginning, batch_size)


class ForwardLM(LanguageModel):
    """Writes what follows a text and scores what follows a text. A folder that records no direction counts as forward."""

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
        """Write what follows each text, until eod or `max_new_tokens`; the mirror image of `ReverseLM.generate_preceding`.

        Returns `num_return_sequences` results for each text, in the order of the texts; `result.text` begins with the given
        text exactly. Its last tokens are spelled again where they could continue as a longer piece. Writing ends, too, where one
        of `stop_strings` was written; it is not part of the result.
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
        """As `generate_following` for one text, shown while it is written: each result is the text so far, which grows at its end.

        options: those of `Sampling`. The last result is what `generate_following` returns.
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
        """log P_F(following | preceding): the sum over the tokens of `following`, natural logs; lists give a list.

        Both are encoded once as one text; a token that reaches over the boundary belongs to `following`. An empty `preceding`
        is refused unless the tokenizer puts a BOS there. Where `preceding` has no token of its own, the first token of the
        text is conditioned on nothing and left out (`num_tokens` tells). include_end adds log P(eod | the whole text).
        """
        return self._log_likelihood(preceding, following, include_end, batch_size)
