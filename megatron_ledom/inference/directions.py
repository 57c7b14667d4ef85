"""The reverse language model (LEDOM, arXiv 2507.01335): P(x) = prod_t P(x_t | x_{t+1..T}).

The forward twin of the reverse model, or any stock causal model: half of Reverse Reward and of every comparison.
"""

from collections.abc import Iterator, Sequence
from typing import Any, overload

from megatron_ledom.direction import Direction
from megatron_ledom.inference.generation import Generation, Sampling
from megatron_ledom.inference.joint import check_texts
from megatron_ledom.inference.language_model import LanguageModel, as_list, paired
from megatron_ledom.inference.scoring import SpanScore


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
        texts = as_list(preceding_text)
        if not self.leading_ids:
            check_texts(texts, "prompt")
        sampling = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            num_return_sequences=num_return_sequences,
            seed=seed,
            stop_strings=stop_strings,
        )
        return self.writer.write(texts, self.leading_ids, sampling, batch_size)

    def stream_following(self, preceding_text: str, **options: Any) -> Iterator[Generation]:
        """As `generate_following` for one text, shown while it is written: each result is the text so far, which grows at its end.

        options: those of `Sampling`. The last result is what `generate_following` returns.
        """
        if not self.leading_ids:
            check_texts([preceding_text], "prompt")
        return self.writer.stream(preceding_text, self.leading_ids, Sampling(**options))

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
        pairs = paired(preceding, following)
        if not self.leading_ids:
            check_texts([before for before, _ in pairs], "preceding text")
        scores = self.span_scores(pairs, include_end, batch_size)
        return scores[0] if isinstance(preceding, str) else scores


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
        texts = as_list(following_text)
        check_texts(texts, "following text")
        sampling = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            num_return_sequences=num_return_sequences,
            seed=seed,
            stop_strings=stop_strings,
        )
        return self.writer.write(texts, self.leading_ids, sampling, batch_size)

    def stream_preceding(self, following_text: str, **options: Any) -> Iterator[Generation]:
        """As `generate_preceding` for one text, shown while it is written: each result is the text so far, which grows at its front.

        options: those of `Sampling`. The last result is what `generate_preceding` returns.
        """
        check_texts([following_text], "following text")
        return self.writer.stream(following_text, self.leading_ids, Sampling(**options))

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
        pairs = paired(preceding, following)
        check_texts([after for _, after in pairs], "following text")
        scores = self.span_scores(pairs, include_beginning, batch_size)
        return scores[0] if isinstance(preceding, str) else scores
