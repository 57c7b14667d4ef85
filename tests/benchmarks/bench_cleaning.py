"""Recall of near-duplicates by kind of change, and what the filters drop of junk and of clean pages, by examples/corpus/clean.

    PYTHONPATH=.:.venv/datatrove python tests/benchmarks/bench_cleaning.py --corpus F.jsonl | --html FOLDER ... [--of-a-kind 50]

Copies of pages, changed by kind, are planted into a corpus, and cleaned without filters; a copy counts as found if it or its page is
dropped. Similarity is the share of common word 5-grams, and the expected recall is MinHash's formula at that similarity. Junk is
planted into another copy of the corpus, which is filtered but not deduplicated. --html makes the corpus from pages of
documentation, such as Debian's debian-handbook, python3.11-doc and rust-doc.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lxml.html

from megatron_ledom.data.readers.input_files import expand_inputs
from megatron_ledom.data.readers.records import ReadSettings, read_texts
from tests.support.paths import ROOT
from tests.support.planted_pages import JUNK, NEAR_DUPLICATES

SEED = 1234
BLOCKS = ("p", "li", "dt", "dd", "pre", "tr", "div", "section", "h1", "h2", "h3", "h4", "br")
NOT_TEXT = ("script", "style", "nav", "header", "footer", "head")
WORDS = range(150, 3000)


def pages_of(folders: Iterable[Path]) -> Iterator[str]:
    """Yield the text of every HTML page with 150 to 3,000 words."""
    for folder in folders:
        for path in sorted(folder.rglob("*.html")):
            if path.is_symlink():
                continue
            tree = lxml.html.fromstring(path.read_bytes())
            for element in list(tree.iter(*NOT_TEXT)):
                element.drop_tree()
            for element in tree.iter(*BLOCKS):
                element.tail = "\n" + (element.tail or "")
            lines = [" ".join(line.split()) for line in tree.text_content().split("\n")]
            text = "\n\n".join(line for line in lines if line)
            if len(text.split()) in WORDS:
                yield text


def clean(work: Path, documents: list[dict[str, Any]], *options: str) -> tuple[dict[str, Any], dict[str, str], float]:
    """Clean documents. Returns the report, the reason of each dropped id, and the CPU seconds."""
    source, output = work / "planted.jsonl", work / f"cleaned{len(list(work.iterdir()))}"
    source.write_text("".join(json.dumps(document) + "\n" for document in documents))
    command = [sys.executable, str(ROOT / "examples/corpus/clean/clean.py"), "--input", str(source), "--output", str(output)]
    started = time.monotonic()
    subprocess.run([*command, "--tasks", "4", *options], check=True, stdout=subprocess.DEVNULL)
    dropped = {}
    read = ReadSettings(keep_records=True)
    if found := list(output.glob("dropped/*/*")):
        from megatron_ledom.data.readers.byte_ranges import ByteRange
        from megatron_ledom.data.readers.records import RecordReader

        for path in expand_inputs([str(path) for path in found]):
            for batch in RecordReader(ByteRange(path, 0, path.num_bytes), read).batches():
                dropped |= {record["id"]: record["removed_because"] for record in batch.records}
    return json.loads((output / "report.json").read_text()), dropped, time.monotonic() - started


def shingles(texts: list[str]) -> list[set[str]]:
    """Return the word 5-grams of texts, as datatrove's MinHash makes them."""
    from datatrove.utils.text import TextNormConfig, ngrams, simplify_text
    from datatrove.utils.word_tokenizers import load_word_tokenizer

    words = load_word_tokenizer("en")
    return [
        {" ".join(gram) for gram in ngrams(words.word_tokenize(simplify_text(text, TextNormConfig())), 5)} for text in texts
    ]


def similarity(one: set[str], two: set[str]) -> float:
    """Return the Jaccard similarity."""
    return len(one & two) / len(one | two)


def recall(work: Path, pages: list[str], of_a_kind: int) -> None:
    """Plant near-duplicates, clean, and print a table."""
    chance = random.Random(SEED)
    documents = [{"id": str(number), "text": text} for number, text in enumerate(pages)]
    chosen = chance.sample(range(len(pages)), of_a_kind * len(NEAR_DUPLICATES))
    copies = []
    for number, of in enumerate(chosen):
        kind = [*NEAR_DUPLICATES][number % len(NEAR_DUPLICATES)]
        copies.append({"id": f"{of} {kind}", "text": NEAR_DUPLICATES[kind](pages[of], chance), "of": of, "kind": kind})
    planted = [*documents, *copies]
    chance.shuffle(planted)
    report, dropped, seconds = clean(work, planted, "--filters")
    grams = shingles(pages)
    print("| planted | copies | similarity | expected | found |\n|---|---:|---:|---:|---:|")
    for kind in NEAR_DUPLICATES:
        mine = [copy for copy in copies if copy["kind"] == kind]
        near = [
            similarity(grams[copy["of"]], of_copy)
            for copy, of_copy in zip(mine, shingles([c["text"] for c in mine]), strict=True)
        ]
        expected = statistics.mean(1 - (1 - value**8) ** 14 for value in near)
        found = sum(copy["id"] in dropped or str(copy["of"]) in dropped for copy in mine) / len(mine)
        print(f"| {kind} | {len(mine)} | {statistics.median(near):.2f} | {expected:.0%} | {found:.0%} |")
    of_copies = set(chosen)
    others = [int(number) for number in dropped if " " not in number and int(number) not in of_copies]
    by_gram = defaultdict(list)
    for number, of_page in enumerate(grams):
        for gram in of_page:
            by_gram[gram].append(number)
    nearest = []
    for number in others:
        shared = Counter(other for gram in grams[number] for other in by_gram[gram] if other != number)
        nearest.append(max((similarity(grams[number], grams[other]) for other, _ in shared.most_common(50)), default=0.0))
    size = sum(len(document["text"].encode()) for document in planted) / 1e6
    print(
        f"\nOf {len(pages) - len(of_copies):,} pages without a copy {len(others)} were dropped; the nearest page has a similarity of"
        f" {sorted(round(value, 2) for value in nearest)}.\n{size:.0f} MB, {seconds:.0f} s under load; {report['removed']}"
    )


def junk(work: Path, pages: list[str], of_a_kind: int) -> None:
    """Plant junk, filter, and print what was dropped by which step."""
    chance = random.Random(SEED)
    documents = [{"id": f"page/{number}", "text": text} for number, text in enumerate(pages)]
    documents += [{"id": f"{kind}/{number}", "text": JUNK[kind](chance)} for kind in JUNK for number in range(of_a_kind)]
    chance.shuffle(documents)
    report, dropped, seconds = clean(work, documents, "--keep-duplicates")
    reasons: dict[str, Counter[str]] = {kind: Counter() for kind in (*JUNK, "page")}
    for identity, reason in dropped.items():
        reasons[identity.split("/")[0]][reason] += 1
    print("\n| planted | pages | dropped | by |\n|---|---:|---:|---|")
    for kind, found in reasons.items():
        number = len(pages) if kind == "page" else of_a_kind
        steps = ", ".join(f"{name} {count}" for name, count in found.most_common(8))
        print(f"| {kind} | {number:,} | {found.total() / number:.0%} | {steps} |")
    print(f"{seconds:.0f} s under load; languages {report['languages']}")


def main() -> None:
    """Make or read the corpus, and run both parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--corpus", nargs="+")
    source.add_argument("--html", nargs="+", type=Path)
    parser.add_argument("--of-a-kind", type=int, default=50)
    arguments = parser.parse_args()
    pages = list(pages_of(arguments.html)) if arguments.html else list(read_texts(expand_inputs(arguments.corpus)))
    print(f"{len(pages):,} pages, {sum(len(text.encode()) for text in pages) / 1e6:.1f} MB")
    with tempfile.TemporaryDirectory() as folder:
        recall(Path(folder), pages, arguments.of_a_kind)
        junk(Path(folder), pages, arguments.of_a_kind)


if __name__ == "__main__":
    main()
