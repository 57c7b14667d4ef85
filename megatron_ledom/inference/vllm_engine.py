"""An engine on vLLM in this process. Written against vLLM's documented `LLM` and `SamplingParams`; not yet run on hardware.

The model is sent token ids, so that a reverse model is served like any other (its folder is a stock architecture); prompts are
tokenised by its folder's tokenizer here. vLLM's own prefix cache keeps what a forward model has read.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ledom.direction import Direction
from megatron_ledom.errors import UsageError
from megatron_ledom.inference.engine import Path as AnswerPath
from megatron_ledom.inference.engine import StepDelimiter
from megatron_ledom.inference.generation import Sampling
from megatron_ledom.inference.language_model import span_score
from megatron_ledom.inference.remote_text import RemoteText, check_delimiter, seed_of
from megatron_ledom.inference.scoring import SpanScore, Spent, distinct_spans


class VllmEngine:
    """Samples, scores and expands with `vllm.LLM(folder, **options)`; vLLM makes the batches."""

    def __init__(self, folder: str | Path, direction: Direction, **options: Any) -> None:
        try:
            import vllm
        except ImportError as error:
            raise UsageError("this engine needs vLLM: pip install vllm, in an environment that fits your GPUs") from error
        self._vllm = vllm
        self._text = RemoteText.from_pretrained(folder, direction)
        self._llm = vllm.LLM(model=str(folder), skip_tokenizer_init=False, **options)
        self.spent = Spent()

    @property
    def direction(self) -> Direction:
        """Which way the model reads."""
        return self._text.direction

    def score(self, pairs: Sequence[tuple[str, str]], *, include_end: bool = False) -> list[SpanScore]:
        """See `Engine.score`. Equal pairs are computed once; vLLM has to write one token, which is thrown away."""
        spans = [self._text.span(pair, include_end) for pair in pairs]
        distinct = distinct_spans(spans)
        params = self._vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        outputs = self._generate([span.tokens for span in distinct.values()], [params] * len(distinct))
        values = {}
        for (key, span), output in zip(distinct.items(), outputs, strict=True):
            found = list(zip(span.tokens, output.prompt_logprobs, strict=True))[span.num_context :]
            values[key] = [float(by_id[token].logprob) for token, by_id in found]
        ordered = [values[tuple(span.tokens), span.num_context] for span in spans]
        return [span_score(span, row, self.direction, include_end) for span, row in zip(spans, ordered, strict=True)]

    def sample(self, roots: Sequence[AnswerPath], sampling: Sampling) -> list[list[AnswerPath]]:
        """See `Engine.sample`."""
        return self._grow(roots, sampling.num_return_sequences, None, sampling)

    def expand(
        self, paths: Sequence[AnswerPath], num: int, delimiter: StepDelimiter, sampling: Sampling
    ) -> list[list[AnswerPath]]:
        """See `Engine.expand`."""
        check_delimiter(delimiter)
        return self._grow(paths, num, delimiter, sampling)

    def _grow(
        self, paths: Sequence[AnswerPath], num: int, delimiter: StepDelimiter | None, sampling: Sampling
    ) -> list[list[AnswerPath]]:
        children = [path.child(number) for path in paths if not path.finished for number in range(num)]
        params = [
            self._vllm.SamplingParams(
                max_tokens=sampling.max_new_tokens - path.num_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=seed_of(path),
                stop_token_ids=self._text.stop_ids,
            )
            for path in children
        ]
        outputs = self._generate([self._text.prompt_ids(path) for path in children], params)
        written = iter(
            self._text.grown(path, output.outputs[0].text, len(output.outputs[0].token_ids), delimiter)
            for path, output in zip(children, outputs, strict=True)
        )
        return [[path] if path.finished else [next(written) for _ in range(num)] for path in paths]

    def _generate(self, prompts: list[list[int]], params: list[Any]) -> list[Any]:
        start = time.monotonic()
        outputs = self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False) if prompts else []
        self.spent.tokens += sum(len(o.prompt_token_ids) + len(o.outputs[0].token_ids) for o in outputs)
        self.spent.seconds += time.monotonic() - start
        return list(outputs)
