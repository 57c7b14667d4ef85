"""Compare the concatenation of documents in model order with a copy of the same bytes and with numpy.

    python tests/benchmarks/bench_concatenate_documents.py [--tokens 20000000] [--rounds 7]

Prints medians and ratios of one run. The variants alternate, so a change of the machine's speed affects all of them.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from megatron_ledom.data.preprocess.encode_parts import concatenate_documents
from megatron_ledom.direction import Direction, to_model_order

EOD, VOCAB = 64_002, 64_005


def make_documents(tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random ids and offsets. Lengths are log-normal with a median of 700 tokens, like those of web text."""
    generator = np.random.default_rng(0)
    lengths = np.maximum(1, generator.lognormal(np.log(700), 1.0, tokens // 700).astype(np.int64))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return generator.integers(0, 64_000, offsets[-1], dtype=np.uint32), offsets


def numpy_loop(ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Do the same work in numpy, one document after the other."""
    joined = np.empty(len(ids) + len(offsets) - 1, np.uint16)
    for index, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        if ids[begin:end].max() >= VOCAB:
            raise ValueError(f"id out of range in document {index}")
        joined[begin + index : end + index] = to_model_order(ids[begin:end], Direction.REVERSE)
        joined[end + index] = EOD
    return joined


def main() -> None:
    """Measure the variants and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    ids, offsets = make_documents(arguments.tokens)
    narrow, out = ids.astype(np.uint16), np.empty(len(ids), np.uint16)

    def joined() -> np.ndarray:
        options = {"direction": Direction.REVERSE, "eod_id": EOD, "vocab_size": VOCAB, "dtype": np.uint16}
        return concatenate_documents(ids, offsets, **options)[0]

    assert np.array_equal(joined(), numpy_loop(ids, offsets))
    variants: dict[str, Callable[[], object]] = {
        "concatenate_documents (C++)": joined,
        "numpy, document by document": lambda: numpy_loop(ids, offsets),
        "floor: narrow and copy": lambda: np.copyto(out, ids, casting="unsafe"),
        "floor: copy of the result": lambda: np.copyto(out, narrow),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(arguments.rounds):
        for name, variant in variants.items():
            start = time.perf_counter()
            variant()
            seconds[name].append(time.perf_counter() - start)
    ours = statistics.median(seconds["concatenate_documents (C++)"])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:30s} {len(ids) / median / 1e6:8.0f} M tokens/s   time / ours {median / ours:6.2f}")


if __name__ == "__main__":
    main()
