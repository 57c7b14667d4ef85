"""Count the contaminated documents and the touched items, and write the report. Counts of parts add up in the order of the parts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_ledom.contamination.search import Decontamination, Passage, Searcher
from megatron_ledom.contamination.settings import BOTH

MOST_EXAMPLES = 3
"""Passages that the report shows for each item."""
LONGEST_CHARACTERS = 300
"""Characters of a passage or question in the report."""


@dataclass(slots=True)
class ContaminationCounts:
    """Counts of some documents, as JSON: item -> its number of documents, by kind, and example passages."""

    documents: int = 0
    """Searched documents."""
    contaminated: int = 0
    pieces: int = 0
    """Documents that remain of cut ones."""
    items: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add_document(self, where: str, text: str, passages: Sequence[Passage]) -> None:
        """Count a contaminated document. where: its name, such as FILE:LINE."""
        self.contaminated += 1
        utf8 = text.encode()
        seen: set[tuple[int, str]] = set()
        touched: set[int] = set()
        for passage in passages:
            entry = self.items.setdefault(str(passage.item), {"documents": 0, "kinds": {}, "examples": []})
            if (passage.item, passage.kind) not in seen:
                entry["kinds"][passage.kind] = entry["kinds"].get(passage.kind, 0) + 1
            if passage.item not in touched:
                entry["documents"] += 1
            touched.add(passage.item)
            seen.add((passage.item, passage.kind))
            if len(entry["examples"]) < MOST_EXAMPLES:
                begins = utf8[passage.begin : min(passage.end, passage.begin + 4 * LONGEST_CHARACTERS)]
                found = begins.decode(errors="ignore")[:LONGEST_CHARACTERS]  # the cut may be inside a character
                entry["examples"].append({"where": where, "kind": passage.kind, "score": passage.score, "passage": found})

    def add(self, other: "ContaminationCounts") -> None:
        """Add the counts of the documents that follow."""
        self.documents += other.documents
        self.contaminated += other.contaminated
        self.pieces += other.pieces
        for item, theirs in other.items.items():
            entry = self.items.setdefault(item, {"documents": 0, "kinds": {}, "examples": []})
            entry["documents"] += theirs["documents"]
            for kind, count in theirs["kinds"].items():
                entry["kinds"][kind] = entry["kinds"].get(kind, 0) + count
            entry["examples"] += theirs["examples"][: MOST_EXAMPLES - len(entry["examples"])]


def summary_of(counts: ContaminationCounts, searcher: Searcher) -> dict[str, dict[str, int]]:
    """Return for each set its number of items, of those that were searched, and of those that were found, by kind."""
    items = searcher.items
    names = ("items", "searched", "touched", "question", "answer", "both")
    sets = {name: dict.fromkeys(names, 0) for name in items.sets}
    for key, numbers in (("items", items.set_of), ("searched", items.set_of[searcher.is_searched()])):
        for name, count in zip(items.sets, np.bincount(numbers, minlength=len(items.sets)).tolist(), strict=True):
            sets[name][key] = count
    for number in sorted(map(int, counts.items)):
        entry, kinds = sets[items.sets[items.set_of[number]]], counts.items[str(number)]["kinds"]
        entry["touched"] += bool(kinds)
        for kind in kinds:
            entry[kind] = entry.get(kind, 0) + 1
        entry["question"] += BOTH in kinds and "question" not in kinds
    return sets


def report_of(counts: ContaminationCounts, searcher: Searcher, decontamination: Decontamination) -> dict[str, Any]:
    """Return the report as JSON: settings, documents, sets, and every touched item with passages."""
    items = []
    for number in sorted(map(int, counts.items)):
        item, entry = searcher.items[number], counts.items[str(number)]
        items.append({"set": item.set, "item": item.number, "question": item.question[:LONGEST_CHARACTERS], **entry})
    return {
        "settings": decontamination.request(),
        "documents": {
            "searched": counts.documents,
            "contaminated": counts.contaminated,
            "pieces_of_cut_documents": counts.pieces,
        },
        "index": {"ngrams": searcher.num_ngrams, "bytes": searcher.num_bytes},
        "sets": summary_of(counts, searcher),
        "items": items,
    }


def describe(report: dict[str, Any]) -> str:
    """Return the counts of a report as lines to print."""
    rows = [("set", "items", "searched", "touched", "question", "answer", "both")]
    rows += [(name, *(f"{entry[key]:,}" for key in rows[0][1:])) for name, entry in report["sets"].items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    documents = report["documents"]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([*lines, f"{documents['contaminated']:,} of {documents['searched']:,} documents are contaminated"])
