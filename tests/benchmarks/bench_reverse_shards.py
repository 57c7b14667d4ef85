"""Compare reversing and merging shards with `cp` of the same .bin; all of them end with an fsync.

    python tests/benchmarks/bench_reverse_shards.py [--megabytes 1000] [--rounds 5] [--folder DIR] [--dtype uint16]

Prints the median MB/s of each and the ratio to `cp`, all from one run. The variants alternate, so a change of the machine's
speed affects all of them. The input is in the page cache.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_ledom.data.shards.shard import Counts, ShardWriter
from megatron_ledom.direction import Direction
from megatron_ledom.provenance import Provenance

ROOT = Path(__file__).parents[2]
EOD, VOCAB = 64_002, 64_005


def write_shard(prefix: str, num_bytes: int, dtype: str) -> None:
    """Write a shard of random ids. Lengths are log-normal with a median of 700 tokens, like those of web text."""
    generator = np.random.default_rng(0)
    provenance = Provenance(
        direction=Direction.FORWARD, tokenizer_name="bench", tokenizer_sha256="a" * 64, vocab_size=VOCAB, eod_id=EOD
    )
    with ShardWriter(prefix, provenance, dtype) as writer:
        while writer._num_bytes < num_bytes:
            lengths = np.maximum(2, generator.lognormal(np.log(700), 1.0, 10_000).astype(np.int32))
            ids = generator.integers(0, 64_000, int(lengths.sum()), dtype=np.int32).astype(dtype)
            ids[np.cumsum(lengths) - 1] = EOD
            writer.append(ids, lengths)
        writer.finalize(Counts(text_bytes=1, eod_token="<eod>"))


def main() -> None:
    """Measure in a temporary folder and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="folder for temporary files; default: the system's")
    parser.add_argument("--dtype", choices=["uint16", "int32"], default="uint16")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        measure(folder, arguments.megabytes, arguments.rounds, arguments.dtype)
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, megabytes: int, rounds: int, dtype: str) -> None:
    """Write the input, run the variants alternately, and print."""
    source, output = str(folder / "source"), str(folder / "output")
    write_shard(source, megabytes * 1_000_000, dtype)
    size = Path(f"{source}.bin").stat().st_size

    def tool(name: str) -> Callable[[], None]:
        command = [sys.executable, str(ROOT / f"tools/{name}.py"), "--input", source, "--output-prefix", output, "--overwrite"]
        return lambda: run(command)

    def copy() -> None:
        run(["cp", f"{source}.bin", f"{output}.bin"])
        descriptor = os.open(f"{output}.bin", os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    variants = {"cp and fsync": copy, "reverse_shards": tool("reverse_shards"), "merge_shards": tool("merge_shards")}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            for suffix in (".bin", ".idx", ".json"):
                Path(output + suffix).unlink(missing_ok=True)
            start = time.perf_counter()
            variant()
            seconds[name].append(time.perf_counter() - start)
    floor = statistics.median(seconds["cp and fsync"])
    print(f"{size / 1e6:,.0f} MB of {dtype}, start-up of the commands included, {rounds} rounds")
    for name, values in seconds.items():
        median = statistics.median(values)
        spread = f"{size / max(values) / 1e6:,.0f} to {size / min(values) / 1e6:,.0f}"
        print(f"{name:16s} {size / median / 1e6:8,.0f} MB/s ({spread})   time / cp {median / floor:5.2f}")


def run(command: list[str]) -> None:
    """Run one command; show its log only if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)


if __name__ == "__main__":
    main()
