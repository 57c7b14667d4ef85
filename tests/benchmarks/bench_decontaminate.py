"""Recall, false positives and cost of the search for evaluation items, beside datatrove's n-gram decontamination on the same corpus.

    python tests/benchmarks/bench_decontaminate.py --sets FOLDER [--corpus F.jsonl] [--of-a-kind 60] [--other-python VENV/bin/python]
        [--megabytes 100] [--rounds 5] [--tokenizer tokenizer.json] [--only recall|speed]

Copies of items, changed by kind, are planted into pages of a clean corpus; --sets is a folder as for `ledom evaluate --data`. A copy
counts as found if its document is contaminated; a document without a copy that is contaminated is a false positive and is printed. datatrove
runs in another environment (pip install datatrove spacy regex xxhash==3.5.0), with
the same n. Cost: preprocessing alternates without the search, with it, and with a stored index, which the first round builds.
Without --corpus and --tokenizer small ones are made from this Python installation.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from preprocess_corpus import build_corpus, train_byte_level
from process_tree import measure

from megatron_ledom.contamination.items import EvaluationItem
from megatron_ledom.contamination.search import Decontamination, Searcher
from megatron_ledom.contamination.settings import SearchSettings
from megatron_ledom.evaluation.known_items import read_known_items

OTHER = Path(__file__).with_name("decontaminate_datatrove.py")
SEED = 1234
LONG_PAGE_CHARACTERS = 200_000
SPACES = ("\u00a0", "\u2009", "  ", "\t", "\u3000", " \u200b")
MORE_PUNCTUATION = (" ", " - ", "; ", " ... ", " (", ") ")


def other_punctuation(text: str, chance: random.Random) -> str:
    """Replace punctuation except inside numbers."""
    return re.sub(r"(?<!\d)[^\w\s\\]|[^\w\s\\](?!\d)", lambda _: chance.choice(MORE_PUNCTUATION), text)


def broken(text: str, chance: random.Random) -> str:
    """Break lines at 30 characters, and some words with a hyphen."""
    text = re.sub(
        r"(?<!\\)\b([a-z]{3,})([a-z]{3,})\b",
        lambda found: f"{found[1]}-\n{found[2]}" if chance.random() < 0.1 else found[0],
        text,
    )
    return "\n".join(textwrap.fill(line, 30, break_long_words=False, break_on_hyphens=False) for line in text.split("\n"))


def other_numbers(text: str, chance: random.Random) -> str:
    """Change every number, but not its number of digits."""
    return re.sub(r"\d", lambda found: str((int(found[0]) + chance.randrange(1, 9)) % 9 + 1), text)


def other_spaces(text: str, chance: random.Random) -> str:
    """Replace spaces, separate thousands, and add LaTeX spaces around relations."""
    text = re.sub(r"(?<![\d.])(\d{1,3})(\d{3})(?![\d.])", r"\1,\2", text)
    text = re.sub(r"(?<=[\w}]) ?([=+<]) ?(?=[\w\\])", r"\\,\1\\;", text) if "$" in text else text
    return re.sub(r" ", lambda _: chance.choice(SPACES), text)


CHANGES: dict[str, Callable[[str, random.Random], str]] = {
    "verbatim": lambda text, _: text,
    "other punctuation": other_punctuation,
    "other case": lambda text, chance: chance.choice([text.upper(), text.lower(), text.title()]),
    "broken lines": broken,
    "other spacing": other_spaces,
    "inside a page of 200,000 characters": lambda text, _: text,
    "half in each of two documents": lambda text, _: text,
    "other numbers": other_numbers,
}


def planted(items: list[EvaluationItem], pages: list[str], of_a_kind: int) -> Iterator[dict[str, Any]]:
    """Yield the documents of the planted corpus: copies of questions in pages, by kind, then the clean pages that remain."""
    chance = random.Random(SEED)
    chosen = chance.sample([item for item in items if len(item.question.split()) >= 12], of_a_kind * len(CHANGES))
    rest = iter(pages)
    for number, item in enumerate(chosen):
        kind = [*CHANGES][number % len(CHANGES)]
        copy = CHANGES[kind](item.question, chance)
        halves = [copy]
        if kind.startswith("half"):
            words = copy.split(" ")
            halves = [" ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])]
        for half in halves:
            page = next(rest)
            while kind.startswith("inside") and len(page) < LONG_PAGE_CHARACTERS:
                page += "\n\n" + next(rest)
            at = page.find("\n", chance.randrange(len(page))) + 1
            yield {"text": f"{page[:at]}\n{half}\n\n{page[at:]}", "kind": kind, "planted": f"{item.set}/{item.number}"}
    yield from ({"text": page, "kind": "", "planted": ""} for page in rest)


def ours(
    documents: list[dict[str, Any]], items: list[EvaluationItem], **settings: Any
) -> tuple[set[int], float, dict[int, str]]:
    """Return (contaminated documents, seconds, first passage of each)."""
    searcher = Searcher(Decontamination(SearchSettings(**settings), items))
    started = time.process_time()
    found = searcher.search([document["text"] for document in documents])
    seconds = time.process_time() - started
    first = {number: passages[0] for number, passages in found.items()}
    texts = {
        number: f"{items[p.item].set}/{items[p.item].number} {p.kind} {p.score}: "
        + documents[number]["text"].encode()[p.begin : p.end].decode()[:120]
        for number, p in first.items()
    }
    return set(found), seconds, texts


def theirs(python: str, work: Path, items: list[EvaluationItem], ngram: int) -> tuple[set[int], float]:
    """Return (documents that datatrove removes, CPU seconds of its filter)."""
    (work / "items.json").write_text(json.dumps([[item.set, item.question, item.answer] for item in items]))
    printed = subprocess.run(
        [python, OTHER, work / "planted.jsonl", work / "items.json", str(ngram)], check=True, capture_output=True, text=True
    )
    result = json.loads(printed.stdout.splitlines()[-1])
    return set(result["contaminated"]), result["seconds"]


def print_recall(documents: list[dict[str, Any]], results: dict[str, tuple[set[int], float]]) -> None:
    """Print a table: kind -> share of the copies that each tool found, then false positives and speed."""
    names = [*results]
    print("| planted | copies | " + " | ".join(names) + " |\n|---|---:|" + "---:|" * len(names))
    copies: dict[str, dict[str, set[int]]] = {}
    for number, document in enumerate(documents):
        if document["kind"]:
            copies.setdefault(document["kind"], {}).setdefault(document["planted"], set()).add(number)
    for kind, by_item in copies.items():
        shares = [sum(bool(numbers & results[name][0]) for numbers in by_item.values()) / len(by_item) for name in names]
        print(f"| {kind} | {len(by_item)} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
    clean = {number for number, document in enumerate(documents) if not document["kind"]}
    print(
        f"| *clean documents contaminated* | {len(clean):,} | "
        + " | ".join(f"{len(results[n][0] & clean)}" for n in names)
        + " |"
    )
    size = sum(len(document["text"].encode()) for document in documents) / 1e6
    print(f"| *MB/s* | {size:.0f} MB | " + " | ".join(f"{size / results[name][1]:.2f}" for name in names) + " |")


def recall(arguments: argparse.Namespace, work: Path, corpus: Path, items: list[EvaluationItem]) -> None:
    """Plant, search with several settings and with datatrove, and print the tables."""
    with corpus.open(encoding="utf-8") as lines:
        pages = [json.loads(line)["text"] for line in lines]
    documents = list(planted(items, pages, arguments.of_a_kind))
    (work / "planted.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    ways: dict[str, dict[str, Any]] = {
        "n = 8 (default)": {},
        "numbers ignored": {"ignore_numbers": True},
        "n = 13": {"ngram": 13},
        "n = 8, any one n-gram": {"threshold": 1e-6},
    }
    results, passages = {}, {}
    for name, settings in ways.items():
        contaminated, seconds, passages[name] = ours(documents, items, **settings)
        results[name] = contaminated, seconds
    if arguments.other_python:
        for ngram in (8, 13):
            results[f"datatrove, n = {ngram}"] = theirs(arguments.other_python, work, items, ngram)
    print_recall(documents, results)
    for name in ("n = 8 (default)", "numbers ignored"):
        wrong = [text for number, text in passages[name].items() if not documents[number]["kind"]]
        print(f"\n{name}: {len(wrong)} clean documents contaminated" + "".join(f"\n  {text!r}" for text in wrong[:10]))
    missed = Counter(d["kind"] for n, d in enumerate(documents) if d["kind"] and n not in results["n = 8 (default)"][0])
    print(f"\nmissed documents (a half counts for itself): {dict(missed)}")


def speed(arguments: argparse.Namespace, work: Path, corpus: Path, items: list[EvaluationItem]) -> None:
    """Print CPU seconds of preprocessing with and without the search, in alternating rounds, and the memory of the index."""
    tokenizer = arguments.tokenizer or str(work / "tokenizer.json")
    if not arguments.tokenizer:
        train_byte_level(corpus, Path(tokenizer))
    searcher = Searcher(Decontamination(SearchSettings(), items))
    print(f"\n{len(items):,} items, {searcher.num_ngrams:,} n-grams, index of {searcher.num_bytes / 1e6:.1f} MB")
    command = [sys.executable, "-c", "from megatron_ledom.cli.main import main; main()", "preprocess-data", "--overwrite"]
    command += ["--input", str(corpus), "--tokenizer", tokenizer, "--workers", "1", "--output-prefix", str(work / "out")]
    filtered = [*command, "--decontaminate", *arguments.sets]
    ways = {"without": command, "with": filtered, "with a stored index": [*filtered, "--index-folder", str(work / "index")]}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(arguments.rounds + 1):
        for name, way in ways.items():
            used = measure(way, dict(os.environ))
            if number:  # the first round fills caches
                seconds[name].append(used.cpu_seconds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"corpus {corpus.stat().st_size / 1e6:.0f} MB; CPU seconds in alternating rounds, ratios to those without")
    for name, values in seconds.items():
        pairs = [round(after / before, 3) for before, after in zip(seconds["without"], values, strict=True)]
        ratio = medians[name] / medians["without"]
        print(
            f"{name}: {[round(value, 2) for value in values]}, median {medians[name]:.2f}, ratio {ratio:.3f}, of rounds {pairs}"
        )


def main() -> None:
    """Run both parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", required=True)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--of-a-kind", type=int, default=60)
    parser.add_argument("--other-python")
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokenizer")
    parser.add_argument("--only", choices=["recall", "speed"])
    arguments = parser.parse_args()
    items = read_known_items(arguments.sets)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        corpus = arguments.corpus or work / "corpus.jsonl"
        if not arguments.corpus:
            build_corpus(corpus, arguments.megabytes)
        if arguments.only != "speed":
            recall(arguments, work, corpus, items)
        if arguments.only != "recall":
            speed(arguments, work, corpus, items)


if __name__ == "__main__":
    main()
