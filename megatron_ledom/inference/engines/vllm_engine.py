"""An inference engine on vLLM in this process: equal to the transformers engine on vLLM's CPU build (0.32); not yet run on a GPU.

vLLM gets token ids, so it can run a reverse model (a stock architecture); the tokenizer of the model folder encodes the prompts
here. vLLM's own prefix cache keeps the prompts that a forward model has read.
"""

import time
from pathlib import Path
from typing import Any

from megatron_ledom.direction import Direction
from megatron_ledom.errors import UsageError
from megatron_ledom.inference.engines.engine import PartialAnswer
from megatron_ledom.inference.engines.remote_engine import RemoteEngine, seed_of
from megatron_ledom.inference.generation import Sampling
from megatron_ledom.inference.scoring import Span


class VllmEngine(RemoteEngine):
    """Samples, scores and expands with `vllm.LLM(folder, **options)`; vLLM makes the batches."""

    def __init__(self, folder: str | Path, direction: Direction, **options: Any) -> None:
        try:
            import vllm
        except ImportError as error:
            raise UsageError("this engine needs vLLM; pip install vllm, in an environment that fits your GPUs") from error
        self._vllm = vllm
        super().__init__(folder, direction)
        self._llm = vllm.LLM(model=str(folder), skip_tokenizer_init=False, trust_remote_code=False, **options)

    def _logprobs(self, spans: list[Span]) -> list[list[float]]:
        """See `RemoteEngine._logprobs`. vLLM must write one token after each span; it is discarded."""
        params = self._vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        outputs = self._generate([span.tokens for span in spans], [params] * len(spans))
        scored = [
            list(zip(span.tokens, output.prompt_logprobs, strict=True))[span.num_context :]
            for span, output in zip(spans, outputs, strict=True)
        ]
        return [[float(by_id[token].logprob) for token, by_id in found] for found in scored]

    def _written(self, answers: list[PartialAnswer], sampling: Sampling) -> list[tuple[str, int]]:
        params = [
            self._vllm.SamplingParams(
                max_tokens=sampling.max_new_tokens - answer.num_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=seed_of(answer),
                stop_token_ids=self.stop_ids,
            )
            for answer in answers
        ]
        outputs = self._generate([self.prompt_ids(answer) for answer in answers], params)
        return [(output.outputs[0].text, len(output.outputs[0].token_ids)) for output in outputs]

    def _generate(self, prompts: list[list[int]], params: list[Any]) -> list[Any]:
        start = time.monotonic()
        outputs = self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False) if prompts else []
        self.usage.tokens += sum(len(o.prompt_token_ids) + len(o.outputs[0].token_ids) for o in outputs)
        self.usage.seconds += time.monotonic() - start
        return list(outputs)
