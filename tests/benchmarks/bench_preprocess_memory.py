"""Does memory grow with the corpus? Peak memory of tools/preprocess_data.py on inputs of rising size, and the slope.

    python tests/benchmarks/bench_preprocess_memory.py [--corpus F.jsonl] [--tokenizer tokenizer.json] [--gigabytes 0.1 1 4]
        [--new-words]

The figure is PSS summed over the process tree (pages shared by several processes count once), sampled from /proc four times a
second; the largest process is given as RSS from the kernel. Sizes are those of the text; a corpus that is smaller is repeated,
which tells nothing of caches that grow with the words they have seen; --new-words makes each repetition's words new ones.
The slope is a least-squares line through all points, in bytes for each GB of text.
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
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, metavar="FILE.jsonl", help="plain JSONL with a key `text`; default: made")
    parser.add_argument("--tokenizer", type=Path, help="what the tool takes; default: a byte-level BPE trained here")
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.1, 1, 4], help="text (default: 0.1 1 4)")
    parser.add_argument(
        "--new-words", action="store_true", help="shift the letters of each repetition: a strain on word caches"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--compression", choices=["none", "gz", "zst"], default="none")
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder for temporary files, 10 bytes a byte of text")
    return parser.parse_args()


def run_on(arguments: argparse.Namespace, corpus: Path, tokenizer: Path, gigabytes: float, work: Path) -> tuple[Usage, int]:
    """Usage of one run, and the text bytes it stored; its input and output are removed."""
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
    """Measure and print; whether the limit holds."""
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
    """Measure and print; exit status 1 if memory passes the limit."""
    arguments = parse()
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        sys.exit(0 if run(arguments, Path(folder)) else 1)


if __name__ == "__main__":
    main()
