"""Plant test problems in a corpus, and check a search for them.

Planted documents replace as many ordinary ones of the same level, so that the corpora differ in nothing else.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from lines import read_lines

from megatron_ledom.errors import UsageError
from megatron_ledom.storage.files import write_file

NEVER = 0
"""Reads of the problems that are not planted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Test problems that a training reads equally often, on average.

    reads: mean number of times; copies: in the corpus, of which a training reads a part; problems: numbers of the problems.
    """

    reads: int
    copies: int
    problems: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The groups, not planted ones first, and the numbers of the lines of the corpus that planted ones replace."""

    groups: list[Group]
    replaced: list[int]

    def planted(self) -> list[int]:
        """Return for each replaced line the number of the problem that stands there."""
        return [number for group in self.groups for number in group.problems for _ in range(group.copies)]


def choose(num_problems: int, places: Sequence[int], reads: Sequence[int], share_read: float, seed: int) -> Plan:
    """Return a random plan with equally many problems for each number of reads, and as many that are not planted.

    places: numbers of the lines that may be replaced; share_read: the part of the corpus that a training reads.
    """
    random_ = Random(seed)
    order, size = random_.sample(range(num_problems), num_problems), num_problems // (len(reads) + 1)
    groups = [
        Group(
            reads=times,
            copies=max(1, round(times / share_read)) if times else 0,
            problems=sorted(order[number * size : (number + 1) * size]),
        )
        for number, times in enumerate((NEVER, *reads))
    ]
    needed = size * sum(group.copies for group in groups)
    if not size or needed > len(places):
        raise UsageError(
            f"contamination.reads={list(reads)} needs {len(reads) + 1} or more test problems of a level and {needed} training problems"
            f" of it; there are {num_problems} and {len(places)}. Name fewer or smaller reads, or raise num_problems"
        )
    return Plan(groups=groups, replaced=random_.sample(list(places), needed))


def read_plan(path: Path) -> Plan:
    """Return the plan of a file."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return Plan(groups=[Group(**group) for group in found["groups"]], replaced=found["replaced"])


def plant(corpus: Path, test: Path, plan: Plan, output: Path, plan_file: Path) -> None:
    """Write the corpus with the planted problems, and the plan."""
    problems = [json.dumps({name: one[name] for name in FIELDS}) + "\n" for one in read_lines(test)]
    new = dict(zip(plan.replaced, (problems[number] for number in plan.planted()), strict=True))
    lines = corpus.read_text(encoding="utf-8").splitlines(keepends=True)
    write_file(output, "".join(new.get(number, line) for number, line in enumerate(lines)))
    write_file(plan_file, json.dumps(asdict(plan)))


FIELDS = ("question", "answer", "level", "text", "prompt")
"""Those of a training problem, in its order, so that a planted one looks like the others."""


def check_search(corpus: Path, planted: Path, plan: Plan, kept: Path, report: Path) -> dict[str, Any]:
    """Return the results of a search that dropped documents of the planted corpus.

    is_rest: True if exactly the ordinary documents remain, in their order. With the replaced ones back in their places they are
    the corpus without planted problems, byte for byte.
    """
    replaced, lines = set(plan.replaced), planted.read_text(encoding="utf-8").splitlines(keepends=True)
    original = corpus.read_text(encoding="utf-8").splitlines(keepends=True)
    remaining = kept.read_text(encoding="utf-8").splitlines(keepends=True)
    left = set(remaining)
    ordinary = [line for number, line in enumerate(original) if number not in replaced]
    documents = [lines[place] for place in plan.replaced]
    found = json.loads(report.read_text(encoding="utf-8"))
    return {
        "planted_problems": len(set(documents)),
        "missed_problems": len(set(documents) & left),
        "planted_documents": len(documents),
        "missed_documents": sum(line in left for line in documents),
        "ordinary_documents": len(ordinary),
        "wrongly_dropped": sum(line not in left for line in ordinary),
        "touched_never_planted": len({item["item"] for item in found["items"]} & set(plan.groups[0].problems)),
        "is_rest": remaining == ordinary,
    }
