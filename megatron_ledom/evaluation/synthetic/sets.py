"""A synthetic set and its files: training text, questions, few-shot examples, and a manifest with hashes."""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_ledom.errors import UsageError
from megatron_ledom.storage.files import json_text, write_file, write_json
from megatron_ledom.storage.jobs import check_same_request

FORMAT = 1
MANIFEST = "manifest.json"
NUM_CHOICES = 4
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticSet:
    """A generated set. texts: training texts, in text order. files: name without ending -> rows for `ledom evaluate`.

    chance: expected accuracy of a model that knows nothing; for written answers, the highest accuracy of one answer for
    all items.
    """

    texts: Sequence[str]
    files: Mapping[str, Sequence[Row]]
    chance: float
    counts: Mapping[str, int] = field(default_factory=dict)


def write_synthetic_set(generated: SyntheticSet, folder: Path, about: Mapping[str, Any]) -> None:
    """Write `train.jsonl`, the question files and, last, the manifest.

    The folder exists, and the caller holds its lock. The same arguments give the same bytes. Raises UsageError if the
    folder contains another set, whose training text would be lost.
    """
    path = folder / MANIFEST
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        before = {name: found.get(name) for name in about}
        check_same_request(f"the set in {folder}", before, about, "write this set to another folder", UsageError)
    rows: dict[str, Sequence[Row]] = {"train": [{"text": text} for text in generated.texts], **generated.files}
    hashes = {}
    for name, lines in rows.items():
        path_of_rows = folder / f"{name}.jsonl"
        content = "".join(json_text(line, where=path_of_rows) + "\n" for line in lines).encode()
        write_file(path_of_rows, content)
        hashes[f"{name}.jsonl"] = {"sha256": hashlib.sha256(content).hexdigest(), "lines": len(lines)}
    manifest = {
        **about,
        "format": FORMAT,
        "package_version": version("megatron-ledom"),
        "chance": generated.chance,
        "counts": dict(generated.counts),
        "files": hashes,
    }
    write_json(path, manifest, ensure_ascii=True)


def choices_around(gold: str, wrong: Sequence[str], position: int) -> dict[str, Any]:
    """Return the fields of a choice: the right one at `position` modulo their number, the wrong ones around it in order."""
    choices = list(wrong)
    place = position % (len(wrong) + 1)
    choices.insert(place, gold)
    return {"choices": choices, "gold": place}


def neighbours(values: Sequence[str], index: int) -> list[str]:
    """Return the three values after `values[index]` in a circle. So each value is wrong three times and right once."""
    return [values[(index + step) % len(values)] for step in range(1, NUM_CHOICES)]


def check_num(num: int, least: int, unit: str) -> None:
    """Raise UsageError if a set is too small to have wrong answers of the same kind."""
    if num < least:
        raise UsageError(f"--num {num} {unit} must be at least {least}, so that every question has wrong answers")


class Namer:
    """Invented words of two syllables, never the same twice."""

    ONSETS = ("b", "br", "d", "dr", "f", "g", "h", "k", "kl", "l", "m", "n", "p", "pl", "r", "s", "st", "t", "tr", "v", "z")
    VOWELS = ("a", "e", "i", "o", "u")
    CODAS = ("", "", "l", "m", "n", "r", "s", "th")

    def __init__(self, rng: random.Random) -> None:
        self._rng, self._used = rng, set[str]()

    def word(self) -> str:
        """Return a new word with a capital first letter."""
        while True:
            draw = self._rng.choice
            word = "".join(draw(part) for part in (self.ONSETS, self.VOWELS, self.CODAS, self.ONSETS, self.VOWELS, self.CODAS))
            if word not in self._used:
                self._used.add(word)
                return word.title()

    def person(self) -> str:
        """Return a given and a family name."""
        return f"{self.word()} {self.word()}"
