"""CPU time of SentencePiece BPE encoding: the sentencepiece library, `tokenizers` on the converted model, and ours.

    python tests/benchmarks/bench_piece_encoder.py [--input corpus.jsonl] [--model FILE | --vocab-size 64000] [--rounds 3]

Texts are the Python files of this machine unless --input names a JSONL file with a "text" in each line. A vocabulary is learned
from half of them and kept in --cache. Each variant uses one thread. The variants alternate, on new strings of the same texts,
and a Markdown table shows the best round of each. If ids differ, nothing is printed.
"""

import argparse
import hashlib
import json
import platform
import random
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sentencepiece
from tokenizers import Tokenizer

from megatron_ledom.tokenizers.encoders import CachedPieceEncoder
from megatron_ledom.tokenizers.sentencepiece_bpe import convert, train

Flat = tuple[np.ndarray, np.ndarray]


def collect(megabytes: float) -> list[str]:
    """Return files of the Python library and its installed packages, shuffled with a fixed seed, up to a size."""
    folders = {sysconfig.get_paths()[name] for name in ("stdlib", "purelib")}
    paths = sorted(
        {path for folder in folders for ending in ("py", "txt", "md", "rst") for path in Path(folder).rglob(f"*.{ending}")}
    )
    random.Random(0).shuffle(paths)
    texts: list[str] = []
    size = 0
    for path in paths:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            continue
        size += path.stat().st_size
        if size >= megabytes * 1e6:
            break
    return texts


def read_texts(path: str, megabytes: float) -> list[str]:
    """Return the texts of a JSONL file, up to a size."""
    texts: list[str] = []
    size = 0
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            texts.append(json.loads(line)["text"])
            size += len(texts[-1])
            if size >= megabytes * 1e6:
                break
    return texts


def learned(texts: list[str], vocab_size: int, cache: Path) -> bytes:
    """Return a model trained on every second text. It is kept in the folder `cache`, named by a hash of the texts."""
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]
    path = cache / f"{vocab_size}_{digest}.model"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_bytes(train(texts[::2], vocab_size, max_sentences=300_000))
        path.with_suffix(".part").rename(path)
    return path.read_bytes()


def flat(documents: list[list[int]]) -> Flat:
    """Return all ids in one array, and the offsets of the documents."""
    offsets = np.concatenate([[0], np.cumsum([len(document) for document in documents])])
    return np.concatenate([np.array(document, np.uint32) for document in documents]), offsets


def measure(texts: list[str], model: bytes, rounds: int) -> dict[str, list[float]]:
    """Return CPU seconds by variant and round. Ours with a cold cache is a new encoder in every round."""
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    hub = Tokenizer.from_str(convert(model, "the model"))
    hub.encode_special_tokens = True
    encoders = [CachedPieceEncoder(model)]
    variants: dict[str, Callable[[list[str]], Flat | list[list[int]]]] = {
        "sentencepiece library": lambda given: library.encode(given, out_type=int, num_threads=1),
        "tokenizers library": lambda given: [
            encoding.ids for text in given for encoding in hub.encode_batch_fast([text], add_special_tokens=False)
        ],
        "ours, cold cache": lambda given: encoders[-1].encode(given),
        "ours, warm cache": lambda given: encoders[-1].encode(given),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    expected: Flat | None = None
    for _ in range(rounds):
        encoders[:] = [CachedPieceEncoder(model)]
        for name, variant in variants.items():
            given = [text.encode().decode() for text in texts]  # new strings, which have not cached their UTF-8
            start = time.process_time()
            found = variant(given)
            seconds[name].append(time.process_time() - start)
            ids, offsets = flat(found) if isinstance(found, list) else found
            expected = expected or (ids, offsets)
            if not (np.array_equal(ids, expected[0]) and np.array_equal(offsets, expected[1])):
                raise SystemExit(f"{name} gives other ids than the sentencepiece library")
    print(f"{len(expected[0]) if expected else 0:,} ids, equal in all; cache {encoders[-1].statistics()}\n")
    return seconds


def processor() -> str:
    """Return the name of the processor, the number of cores and the version of Python."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(names)} cores, Python {platform.python_version()}"


def main() -> None:
    """Measure the encoders and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", help='JSONL file with a "text" in each line')
    parser.add_argument("--megabytes", type=float, default=40, help="use this much text")
    parser.add_argument("--model", help="SentencePiece .model file; default: learned here")
    parser.add_argument("--vocab-size", type=int, default=64_000)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir(), "bench_piece_encoder"))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    texts = read_texts(arguments.input, arguments.megabytes) if arguments.input else collect(arguments.megabytes)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    model = Path(arguments.model).read_bytes() if arguments.model else learned(texts, arguments.vocab_size, arguments.cache)
    print(f"{processor()}; {megabytes:.1f} MB in {len(texts):,} texts")
    seconds = measure(texts, model, arguments.rounds)
    slowest = min(seconds["sentencepiece library"])
    print("| encoder, one thread | CPU s | MB/s per core | times the library |\n|---|---|---|---|")
    for name, values in seconds.items():
        best = min(values)
        print(f"| {name} | {best:.2f} | {megabytes / best:.1f} | {slowest / best:.1f} |")


if __name__ == "__main__":
    main()
