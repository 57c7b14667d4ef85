"""Throughput of reverse scoring, compared with one text at a time, Hugging Face's batched forward, and the FLOP floor.

    python tests/benchmarks/bench_scoring.py [--size tiny 125m] [--pairs 96] [--batch-size 16] [--rounds 5]

Pairs are (question, candidate): several candidates per question, lengths as varied as in real samples, one in eight a repetition.
All ways read the same pairs in one run, alternate, and return the same sums; ratios are medians over the rounds.
- one by one: the library with a batch of one and one call per pair.
- Hugging Face: batches in the order of the file, padded by its tokenizer conventions, `model(**batch).logits`, log-softmax of all.
- floor: the FLOPs of the distinct tokens at the matmul speed measured here (2 per weight and token, logits of scored tokens only).
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_ledom.direction import Direction, to_model_order
from megatron_ledom.inference.engines.transformers_engine import TransformersEngine
from megatron_ledom.inference.joint_tokenizer import JointTokenizer
from megatron_ledom.inference.language_model import ReverseLM
from megatron_ledom.inference.scoring import Span, distinct_spans
from tests.support.tiny_models import byte_level_json

SHAPES = {
    "tiny": {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "vocab_size": 8_192,
    },
    "125m": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "vocab_size": 32_000,
    },
}
WORDS = ["the", "capital", "of", "Paris", "cat", "ran", "42", "7", "mat", "dog", "width", "height", "France", "people"]
Pairs = list[tuple[str, str]]


def pairs_of(num: int) -> Pairs:
    """Return questions of about 40 words with candidates of 5 to 120 words; one candidate in eight is a repetition."""
    rng = random.Random(0)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    pairs: Pairs = []
    while len(pairs) < num:
        question = words(25, 55)
        candidates = [" " + words(5, 120) for _ in range(7)]
        pairs += [(question, text) for text in [*candidates, candidates[0]]]
    return pairs[:num]


def hugging_face(lm: ReverseLM, spans: list[Span], batch_size: int) -> list[float]:
    """Score as one would by hand: padded batches in order, and the logits of every position."""
    sums = []
    for start in range(0, len(spans), batch_size):
        batch = spans[start : start + batch_size]
        longest = max(len(span.tokens) for span in batch)
        input_ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(input_ids)
        for row, span in enumerate(batch):
            input_ids[row, : len(span.tokens)] = torch.tensor(span.tokens)
            mask[row, : len(span.tokens)] = 1
        with torch.inference_mode():
            logprobs = torch.log_softmax(lm.model(input_ids=input_ids, attention_mask=mask).logits.float(), -1)
            values = logprobs[:, :-1].gather(2, input_ids[:, 1:, None])[..., 0]
        sums += [float(values[row, s.num_context - 1 : len(s.tokens) - 1].sum()) for row, s in enumerate(batch)]
    return sums


def floor_seconds(lm: ReverseLM, spans: list[Span], flops: float) -> float:
    """Return the seconds of the multiplications alone: body for every distinct token, head for scored ones, attention scores."""
    config = lm.model.config
    head = config.hidden_size * config.vocab_size
    body = sum(p.numel() for p in lm.model.parameters()) - 2 * head  # embeddings are looked up
    total = 0.0
    for span in distinct_spans(spans).values():
        length = len(span.tokens)
        total += 2 * body * length + 2 * head * (length - span.num_context)
        total += 2 * 2 * config.num_hidden_layers * config.hidden_size * length * (length + 1) / 2
    return total / flops


def matmul_flops(size: int = 1024) -> float:
    """Return the FLOP/s of the fastest of a few square products in float32."""
    a = torch.randn(size, size)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def measure(size: str, num_pairs: int, batch_size: int, rounds: int) -> None:
    """Measure all ways with a model of this size and print a table."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[size], max_position_embeddings=2048)
    tokenizer = JointTokenizer(Tokenizer.from_str(byte_level_json()))
    lm = ReverseLM(LlamaForCausalLM(config).eval(), tokenizer, [3], [])
    pairs = pairs_of(num_pairs)
    spans = []
    for question, text in pairs:
        text_ids, num_preceding = tokenizer.split(question, text)
        spans.append(Span(to_model_order(text_ids, Direction.REVERSE), len(text_ids) - num_preceding))
    ways: dict[str, Callable[[], list[float]]] = {
        "library": lambda: [score.logprob for score in TransformersEngine(lm, batch_size).score(pairs)],
        "one by one": lambda: [TransformersEngine(lm, 1).score([pair])[0].logprob for pair in pairs],
        "Hugging Face, batched": lambda: hugging_face(lm, spans, batch_size),
    }
    flops = matmul_flops()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    expected = ways["library"]()
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            sums = way()
            seconds[name].append(time.perf_counter() - start)
            worst = max(abs(a - b) for a, b in zip(sums, expected, strict=True))
            assert worst < 1e-2, f"{name} differs by {worst}"
    tokens = sum(len(span.tokens) for span in spans)
    floor = floor_seconds(lm, spans, flops)
    print(f"{size}: {num_pairs} pairs, {tokens} tokens, batches of {batch_size}, matmul {flops / 1e9:.0f} GFLOP/s")
    print(f"{'way':<24}{'tokens/s':>12}{'library is faster by':>24}{'times the floor':>18}")
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds["library"], strict=True)]
        median = statistics.median(own)
        print(f"{name:<24}{tokens / median:>12.0f}{statistics.median(ratios):>23.2f}x{median / floor:>17.2f}x")


def main() -> None:
    """Measure and print each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=list(SHAPES), default=["tiny"])
    parser.add_argument("--pairs", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    for size in args.size:
        measure(size, args.pairs, args.batch_size, args.rounds)


if __name__ == "__main__":
    main()
