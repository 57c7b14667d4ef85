"""The floor of preprocessing: each step alone, on one thread, with its input already in memory.

    python tests/benchmarks/preprocess_floor.py --input F.jsonl[.gz|.zst] --tokenizer tokenizer.json --output FILE --result R.json \\
        --eod-id 151645 --vocab-size 151669 --dtype int32

Writes CPU and wall seconds of: load (the vocabulary), read, decompress, parse (orjson), encode (the fastest exact encoder),
concatenate (the project's C++ helper), write (with fsync). The output equals a reversed .bin of `ledom preprocess-data`. Memory
grows with the input.
"""

import argparse
import importlib
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import orjson

from megatron_ledom.data.preprocess.encode_parts import concatenate_documents
from megatron_ledom.direction import Direction
from megatron_ledom.tokenizers.encoders import CachedByteEncoder, Encoder, FastokensEncoder, HubEncoder, why_not_bytes

BLOCK_BYTES = 4 << 20
STEPS = ("read", "decompress", "parse", "encode", "concatenate", "write")

Result = TypeVar("Result")


class StepClock:
    """CPU and wall seconds of each step."""

    def __init__(self) -> None:
        self.cpu: dict[str, float] = {}
        self.wall: dict[str, float] = {}

    def time(self, step: str, work: Callable[[], Result]) -> Result:
        """Do `work` and store its time; CPU seconds count all threads."""
        cpu, wall = time.process_time(), time.perf_counter()
        result = work()
        self.cpu[step] = time.process_time() - cpu
        self.wall[step] = time.perf_counter() - wall
        return result


def read_blocks(path: Path) -> list[bytes]:
    """Return the file in blocks, as it is stored."""
    with path.open("rb", buffering=0) as file:
        return list(iter(lambda: file.read(BLOCK_BYTES), b""))


def decompressed(blocks: list[bytes], suffix: str) -> list[bytes]:
    """Return the decompressed blocks. isal decompresses gzip if it is installed."""
    if suffix == ".zst":
        import zstandard

        with zstandard.ZstdDecompressor().stream_reader(b"".join(blocks)) as stream:
            return list(iter(lambda: stream.read(BLOCK_BYTES), b""))
    library = importlib.import_module("isal.isal_zlib" if importlib.util.find_spec("isal") else "zlib")
    decompressor = library.decompressobj(wbits=31)
    return [decompressor.decompress(block) for block in blocks]


def lines_of(blocks: list[bytes]) -> Iterator[list[bytes]]:
    """Yield whole lines, about one block at a time."""
    rest = b""
    for block in blocks:
        lines = (rest + block).split(b"\n")
        rest = lines.pop()
        yield lines
    if rest:
        yield [rest]


def parse_texts(blocks: list[bytes]) -> list[list[str]]:
    """Return the text of each line."""
    return [[orjson.loads(line)["text"] for line in lines] for lines in lines_of(blocks)]


def write_arrays(path: Path, arrays: list[Any]) -> None:
    """Write all arrays one after the other, and force them to the disk."""
    with path.open("wb", buffering=0) as file:
        for array in arrays:
            file.write(array.data)
        os.fsync(file.fileno())


def fastest_encoder(path: str) -> Encoder:
    """Return the project's own encoder if it supports the tokenizer, else fastokens."""
    stored = orjson.loads(Path(path).read_bytes())
    if why_not_bytes(stored) is None:
        return CachedByteEncoder(stored, HubEncoder(Path(path).read_bytes(), path))
    return FastokensEncoder(Path(path).read_text(encoding="utf-8"))


def run(arguments: argparse.Namespace) -> StepClock:
    """Run all steps, one after the other."""
    clock, source = StepClock(), Path(arguments.input)
    tokenizer = clock.time("load", lambda: fastest_encoder(arguments.tokenizer))
    blocks = clock.time("read", lambda: read_blocks(source))
    if source.suffix in (".gz", ".zst"):
        stored_blocks = blocks
        blocks = clock.time("decompress", lambda: decompressed(stored_blocks, source.suffix))
    batches = clock.time("parse", lambda: parse_texts(blocks))
    flat = clock.time("encode", lambda: [tokenizer.encode(texts) for texts in batches])
    options: dict[str, Any] = {
        "direction": Direction.REVERSE,
        "eod_id": arguments.eod_id,
        "vocab_size": arguments.vocab_size,
        "dtype": arguments.dtype,
    }

    def concatenate() -> list[Any]:
        return [concatenate_documents(ids, at, **options)[0] for ids, at in flat]

    arrays = clock.time("concatenate", concatenate)
    clock.time("write", lambda: write_arrays(Path(arguments.output), arrays))
    return clock


def main() -> None:
    """Measure the steps and write their times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--input", "--tokenizer", "--output", "--result", "--dtype"):
        parser.add_argument(name, required=True)
    for name in ("--eod-id", "--vocab-size"):
        parser.add_argument(name, type=int, required=True)
    arguments = parser.parse_args()
    clock = run(arguments)
    Path(arguments.result).write_text(json.dumps({"cpu": clock.cpu, "wall": clock.wall}))


if __name__ == "__main__":
    main()
