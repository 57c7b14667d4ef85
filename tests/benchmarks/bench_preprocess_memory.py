"""Measure whether memory grows with the corpus: peak memory of preprocessing on inputs of growing size, and the slope.

    python tests/benchmarks/bench_preprocess_memory.py [--corpus F.jsonl] [--tokenizer tokenizer.json] [--gigabytes 0.1 1 4]
        [--new-words]

Memory is PSS summed over the process tree (pages shared by several processes count once), sampled from /proc four times a
second; that of the largest process is RSS from the kernel. Sizes are those of the text. A smaller corpus is repeated; caches
that grow with the number of different words then stop growing, unless --new-words changes the words of each repetition. The
slope is that of a least-squares line through all points, in MB for each GB of text.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from preprocess_competitors import COMPETITORS, environment_of, our_command
from preprocess_corpus import build_corpus, compress, cut_corpus, train_byte_level
from preprocess_report import machine
from process_tree import Usage, measure

LIMIT_BYTES = 0.8e9  # for two workers
SAMPLE_SECONDS = 0.25
MADE_MEGABYTES = 100


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--corpus",
        type=Path,
        metavar="FILE.jsonl",
        help="plain JSONL with a key `text`; default: text of this Python installation",
    )
    parser.add_argument("--tokenizer", type=Path, help="tokenizer of the tool; default: a byte-level BPE trained here")
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.1, 1, 4], help="sizes of the text (default: 0.1 1 4)")
    parser.add_argument("--new-words", action="store_true", help="change the words of each repetition, which fills word caches")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--compression", choices=["none", "gz", "zst"], default="none")
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder for temporary files, 10 bytes per byte of text")
    return parser.parse_args()


def run_on(arguments: argparse.Namespace, corpus: Path, tokenizer: Path, gigabytes: float, work: Path) -> tuple[Usage, int]:
    """Run once and remove input and output; return the usage and the number of bytes of text."""
    plain, prefix = work / "input.jsonl", work / "out"
    cut_corpus(corpus, plain, gigabytes * 1000, new_words=arguments.new_words)
    source = compress(plain, arguments.compression)
    command = our_command(source, tokenizer, prefix, "reverse", arguments.workers)
    usage = measure(command, environment_of(COMPETITORS[0]), memory="pss", interval_seconds=SAMPLE_SECONDS)
    text_bytes = int(json.loads(Path(f"{prefix}.json").read_bytes())["text_bytes"])
    for path in (plain, source, *(Path(f"{prefix}{suffix}") for suffix in (".bin", ".idx", ".json"))):
        path.unlink(missing_ok=True)
    return usage, text_bytes


def run(arguments: argparse.Namespace, work: Path) -> bool:
    """Measure and print; return True if memory stays below the limit."""
    corpus = arguments.corpus or work / "made.jsonl"
    if arguments.corpus is None:
        build_corpus(corpus, MADE_MEGABYTES)
    tokenizer = arguments.tokenizer or train_byte_level(corpus, work / "byte_level")
    print(f"machine: {machine()}; {arguments.workers} workers, input {arguments.compression} compressed\n")
    print("| text | CPU s | wall s | peak PSS, all processes | peak RSS, largest process |\n|---|---|---|---|---|")
    sizes, peaks = [], []
    for gigabytes in arguments.gigabytes:
        usage, text_bytes = run_on(arguments, corpus, tokenizer, gigabytes, work)
        sizes.append(text_bytes / 1e9)
        peaks.append(usage.peak_tree_bytes)
        print(
            f"| {text_bytes / 1e9:.2f} GB | {usage.cpu_seconds:.1f} | {usage.wall_seconds:.1f} |"
            f" {usage.peak_tree_bytes / 1e6:.0f} MB | {usage.peak_process_bytes / 1e6:.0f} MB |",
            flush=True,
        )
    if len(sizes) > 1:
        print(f"\nslope: {np.polyfit(sizes, peaks, 1)[0] / 1e6:+.2f} MB for each GB of text")
    is_met = max(peaks) < LIMIT_BYTES
    print(f"limit of {LIMIT_BYTES / 1e9} GB: {'met' if is_met else 'MISSED'}")
    return is_met


def main() -> None:
    """Measure and print; the exit status is 1 if memory exceeds the limit."""
    arguments = parse()
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        sys.exit(0 if run(arguments, Path(folder)) else 1)


if __name__ == "__main__":
    main()
