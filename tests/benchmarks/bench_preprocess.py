"""Compare the cost of preprocessing with other tools and with its floor: same corpus, tokenizer and bytes, one run.

    python tests/benchmarks/bench_preprocess.py [--corpus F.jsonl] [--megabytes 100] [--tokenizer tokenizer.json] [--rounds 3]
        [--anchors-python VENV/bin/python] [--only ours-1 classic ...] [--skip datatrove ...]

Competitors alternate in every round. The table gives medians of CPU seconds (user + system, whole process tree) and wall
seconds. Every output is compared byte for byte with our forward run, and our reversed one with that run reversed document by
document in numpy. If one differs, the exit status is 1. The packages of competitors may be in another environment
(--anchors-python); the table lists a competitor that is not installed with the command that installs it. Without --corpus and
--tokenizer, small ones are made from this Python installation.
"""

import argparse
import filecmp
import json
import os
import sys
import tempfile
from dataclasses import dataclass, field
from multiprocessing import Process
from pathlib import Path

import numpy as np
from preprocess_competitors import (
    COMPETITORS,
    Competitor,
    Suite,
    command_of,
    environment_of,
    find_interpreter,
    our_command,
    train_sentencepiece,
)
from preprocess_corpus import build_corpus, compress, cut_corpus, train_byte_level
from preprocess_report import Results, cost_table, floor_table, goal_table, machine, projection_table
from process_tree import measure

from megatron_ledom.data.shards.index_file import HEADER
from megatron_ledom.direction import Direction, to_model_order


@dataclass(slots=True)
class Bench:
    """The inputs and competitors of one benchmark, and its results."""

    work: Path
    plain: Path
    """Input of the anchors: never compressed."""
    source: Path
    """Input of ours and the floor: the same text, compressed if --compression asks for it."""
    runs: list[tuple[Competitor, str]]
    """Competitors and their interpreters."""
    suites: dict[str, Suite] = field(default_factory=dict)
    results: Results = field(default_factory=Results)

    def source_of(self, competitor: Competitor) -> Path:
        """Return the input of a competitor."""
        return self.plain if competitor.kind == "anchor" else self.source


def parse() -> argparse.Namespace:
    """Parse the command line."""
    names = [competitor.name for competitor in COMPETITORS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--corpus",
        type=Path,
        metavar="FILE.jsonl",
        help="plain JSONL with a key `text`; default: text of this Python installation",
    )
    parser.add_argument("--megabytes", type=float, default=100, help="text taken from the corpus (default: 100)")
    parser.add_argument(
        "--tokenizer", type=Path, help="tokenizer.json with a tokenizer_config.json; default: a BPE trained here"
    )
    parser.add_argument(
        "--sentencepiece", type=Path, metavar="FOLDER", help="output of `ledom train-tokenizer`; default: trained here"
    )
    parser.add_argument("--compression", choices=["none", "gz", "zst"], default="none", help="compression of the input of ours")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--skip", nargs="+", choices=names, default=[], metavar="NAME")
    parser.add_argument("--anchors-python", default=sys.executable, help="interpreter with the competitors' packages")
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder for temporary files; default: a temporary one")
    return parser.parse_args()


def choose_runs(arguments: argparse.Namespace, results: Results) -> list[tuple[Competitor, str]]:
    """Return the competitors that can run, with their interpreters; print versions, and note missing packages."""
    runs: list[tuple[Competitor, str]] = []
    versions: dict[str, str] = {}
    for competitor in COMPETITORS:
        if competitor.name not in arguments.only or competitor.name in arguments.skip:
            continue
        candidates = [sys.executable, arguments.anchors_python]
        python, found, missing = find_interpreter(competitor.requirements, candidates)
        if python is None:
            results.missing[competitor.name] = f"not installed: pip install {' '.join(missing)}"
            print(f"{competitor.name}: {results.missing[competitor.name]}")
        else:
            runs.append((competitor, python))
            versions |= found
    print("packages: " + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())))
    return runs


def prepare_suites(bench: Bench, arguments: argparse.Namespace) -> None:
    """Prepare the tokenizers, and for each our forward shard and its reversal, which all outputs must equal."""
    for name in dict.fromkeys(competitor.suite for competitor, _ in bench.runs):
        if name == "byte-level":
            path = arguments.tokenizer or train_byte_level(bench.plain, bench.work / "byte_level")
            suite = Suite(path, path / "tokenizer.json" if path.is_dir() else path)
        else:
            folder = arguments.sentencepiece or train_sentencepiece(bench.plain, bench.work / "sentencepiece")
            suite = Suite(folder, folder / "tokenizer.model")
        suite.expected = bench.work / f"expected_{name}"
        forward = Path(f"{suite.expected}.forward")
        measure(our_command(bench.plain, suite.tokenizer, forward, "forward", 1), environment_of(COMPETITORS[0]))
        suite.manifest = json.loads(Path(f"{forward}.json").read_bytes())
        apart = Process(target=reverse_shard, args=(forward, Path(f"{suite.expected}.reverse")))
        apart.start()  # this process's peak memory counts for every command that it starts
        apart.join()
        assert apart.exitcode == 0
        bench.suites[name] = suite


def reverse_shard(forward: Path, target: Path) -> None:
    """Write target.bin: each document of a forward shard reversed, except its eod, which stays last."""
    manifest = json.loads(Path(f"{forward}.json").read_bytes())
    ids = np.fromfile(f"{forward}.bin", manifest["dtype"])
    lengths = np.fromfile(f"{forward}.idx", np.int32, manifest["num_documents"], offset=HEADER.size)
    assert lengths.sum() == len(ids)
    begin = 0
    for length in lengths.tolist():
        end = begin + length - 1
        ids[begin:end] = to_model_order(ids[begin:end], Direction.REVERSE)
        begin = end + 1
    ids.tofile(f"{target}.bin")
    os.link(f"{forward}.idx", f"{target}.idx")


def verdict_on(prefix: Path, competitor: Competitor, suite: Suite) -> str:
    """Return `equal`, or the files that differ from the expected ones."""
    expected = f"{suite.expected}.{competitor.direction}"
    suffixes = (".bin",) if competitor.kind == "floor" else (".bin", ".idx")
    different = [end for end in suffixes if not filecmp.cmp(f"{prefix}{end}", f"{expected}{end}", shallow=False)]
    return f"**{' and '.join(different)} differ**" if different else "equal"


def run_once(bench: Bench, competitor: Competitor, python: str) -> None:
    """Run one competitor once on the whole corpus; store its usage and whether its output is as expected."""
    suite, prefix = bench.suites[competitor.suite], bench.work / f"out_{competitor.name}"
    command = command_of(competitor, python, suite, bench.source_of(competitor), prefix)
    usage = measure(command, environment_of(competitor))
    results = bench.results
    results.usages.setdefault(competitor.name, []).append(usage)
    if competitor.kind == "floor":
        results.steps.append(json.loads(Path(f"{prefix}.json").read_bytes()))
    verdict = verdict_on(prefix, competitor, suite)
    if results.verdicts.get(competitor.name, "equal") == "equal":
        results.verdicts[competitor.name] = verdict
    for suffix in (".bin", ".idx", ".json"):
        Path(f"{prefix}{suffix}").unlink(missing_ok=True)
    print(f"  {competitor.name}: {usage.cpu_seconds:.2f} CPU s, {usage.wall_seconds:.2f} s, {verdict}", flush=True)


def measure_start_up(bench: Bench, document: Path) -> None:
    """Measure each competitor on one document, the median of three; the floor measures its loading itself."""
    for competitor, python in bench.runs:
        if competitor.kind == "floor":
            continue
        prefix = bench.work / f"start_{competitor.name}"
        command = command_of(competitor, python, bench.suites[competitor.suite], document, prefix)
        runs = [measure(command, environment_of(competitor)) for _ in range(3)]
        bench.results.start_up[competitor.name] = sorted(runs, key=lambda usage: usage.cpu_seconds)[1]


def report(bench: Bench) -> bool:
    """Print all tables; return True if every output was as expected."""
    results = bench.results
    sections = [cost_table(results, bench.suites)]
    if results.steps:
        sections.append(floor_table(results, bench.suites["byte-level"]))
    sections += [goal_table(results), projection_table(results, bench.suites)]
    print("\n" + "\n\n".join(sections))
    different = [name for name, verdict in results.verdicts.items() if verdict != "equal"]
    if different:
        print(f"\nOutput differs from the expected bytes: {', '.join(different)}")
    return not different


def run(arguments: argparse.Namespace, work: Path) -> bool:
    """Run the whole benchmark; return True if every output was as expected."""
    print(f"machine: {machine()}; load average {os.getloadavg()[0]:.1f}")
    results = Results()
    runs = choose_runs(arguments, results)
    if not runs:
        raise SystemExit("none of the chosen competitors can run; install the packages named above")
    corpus = arguments.corpus or work / "made.jsonl"
    if arguments.corpus is None:
        build_corpus(corpus, arguments.megabytes)
    plain, document = work / "corpus.jsonl", work / "document.jsonl"
    num_documents, text_bytes = cut_corpus(corpus, plain, arguments.megabytes)
    cut_corpus(plain, document, 1e-6)
    print(f"corpus: {num_documents:,} documents, {text_bytes / 1e6:.1f} MB of text")
    bench = Bench(work, plain, compress(plain, arguments.compression), runs, results=results)
    prepare_suites(bench, arguments)
    for name, suite in bench.suites.items():
        manifest = suite.manifest
        print(f"{name}: {manifest['vocab_size']:,} ids, {manifest['num_tokens']:,} tokens stored as {manifest['dtype']}")
    measure_start_up(bench, document)
    for turn in range(arguments.rounds):
        print(f"round {turn + 1} of {arguments.rounds}, load average {os.getloadavg()[0]:.1f}", flush=True)
        for competitor, python in runs:
            run_once(bench, competitor, python)
    return report(bench)


def main() -> None:
    """Measure and print; exit status 1 if an output differs."""
    arguments = parse()
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        sys.exit(0 if run(arguments, Path(folder)) else 1)


if __name__ == "__main__":
    main()
