"""Find evaluation items in texts: n-grams of normalized words, joined to passages, with a threshold on the share of the item.

Sources. Brown et al. 2020, arXiv 2005.14165, appendix C (GPT-3): 13-grams, shorter for short items but never below 8 words, and the
window of 200 characters that is cut. Chowdhery et al. 2022, arXiv 2204.02311 (PaLM), Dubey et al. 2024, arXiv 2407.21783 (Llama 3) and
Lambert et al. 2024, arXiv 2411.15124 (Tulu 3): 8-grams and a share of the item, 70 %, by set, and 50 %. Singh et al. 2024, arXiv
2411.03923: the longest passage predicts gains better than the union of all matches, so that hits count together only if they are near.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np

from megatron_ledom.contamination.items import EvaluationItem, items_sha256
from megatron_ledom.contamination.normalization import FRACTIONS, NO_WORDS, fold_table, normalization_version
from megatron_ledom.errors import UsageError

Match = Literal["either", "question", "answer", "both", "any"]
Action = Literal["report", "drop", "cut"]
QUESTION, ANSWER, CHOICE, BOTH = "question", "answer", "choice", "both"
SEARCHED: dict[Match, tuple[str, ...]] = {
    "either": (QUESTION, ANSWER),
    "question": (QUESTION,),
    "answer": (ANSWER,),
    "both": (QUESTION, ANSWER),
    "any": (QUESTION, ANSWER, CHOICE),
}
"""Parts of an item that are searched for each way to match."""
MOST_NGRAM_WORDS = 64
ANSWER_DISTANCE_WORDS = 50
"""A short answer belongs to a question if it is at most this far from it."""


@dataclass(kw_only=True, slots=True)
class SearchSettings:
    """Definition of a contaminated document, and the action for one."""

    action: Action = "drop"
    match: Match = "either"
    """A document is contaminated by an item if it has its question or answer, the question, the answer, both, or any part of it."""
    ngram: int = 8
    """Words that must be equal in a row."""
    min_words: int = 8
    """A shorter part is not searched: it occurs by chance. A part shorter than `ngram` must occur as a whole."""
    threshold: float = 0.5
    """Share of the words of a part that a passage must have."""
    telling_words: int = 4
    """Different words of two letters or more that a passage must have: rows of numbers and formulas of single letters occur by chance."""
    ignore_numbers: bool = False
    """Numbers are equal to each other, so that a copy with changed numbers is found."""

    def check(self) -> None:
        """Raise UsageError for values that make no sense."""
        if not 1 <= self.ngram <= MOST_NGRAM_WORDS:
            raise UsageError(f"--ngram {self.ngram} must be 1 to {MOST_NGRAM_WORDS} words; the literature uses 8 to 13")
        if not 1 <= self.min_words <= self.ngram:
            raise UsageError(f"--min-words {self.min_words} must be 1 to --ngram ({self.ngram})")
        if not 0 < self.threshold <= 1:
            raise UsageError(f"--threshold {self.threshold} must be above 0 and at most 1, a share of the words of an item")


@dataclass(slots=True)
class Decontamination:
    """Settings and items of a search: all that determines its result."""

    settings: SearchSettings
    items: Sequence[EvaluationItem]
    items_sha256: str = field(init=False)

    def __post_init__(self) -> None:
        self.items_sha256 = items_sha256(self.items)

    def request(self) -> dict[str, Any]:
        """Return what determines the result, for the request of a job."""
        return {
            **asdict(self.settings),
            "items_sha256": self.items_sha256,
            "num_items": len(self.items),
            "normalization": normalization_version(),
        }


class Part(NamedTuple):
    """A searched text of an item."""

    item: int
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Passage:
    """A place in a text that has enough of a part of an item. begin, end: its bytes in the UTF-8 of the text."""

    item: int
    kind: str
    score: float
    """Share of the part's words that the passage has."""
    begin: int
    end: int
    first_word: int
    last_word: int


class Hit(NamedTuple):
    """An n-gram of a part in a text: first word in the text and in the part, and number of words."""

    word: int
    part_word: int
    length: int


class Searcher:
    """The index of a list of items. Forked workers share it."""

    def __init__(self, decontamination: Decontamination) -> None:
        from megatron_ledom._helpers import NgramIndex

        settings = self.settings = decontamination.settings
        settings.check()
        self.items = decontamination.items
        self.parts = [
            part
            for number, item in enumerate(self.items)
            for part in _parts(number, item, SEARCHED[settings.match])
            if part.text
        ]
        table, pool = _table()
        self._index = NgramIndex(
            table=table,
            pool=pool,
            ignore_numbers=settings.ignore_numbers,
            no_words=NO_WORDS,
            fractions=FRACTIONS,
            length=settings.ngram,
            shortest=settings.min_words,
        )
        places, self._num_words = self._index.build([part.text for part in self.parts])
        order = np.argsort(places[:, 2], kind="stable")
        self._places = np.ascontiguousarray(places[order, :2].astype(np.int32))
        self._starts = np.searchsorted(places[order, 2], np.arange(self._index.num_ngrams + 1))

    @property
    def num_bytes(self) -> int:
        """Return the memory of the index in bytes, without the texts of the items."""
        return int(self._index.bytes + self._places.nbytes + self._starts.nbytes + self._num_words.nbytes)

    @property
    def num_ngrams(self) -> int:
        """Return the number of different n-grams."""
        return int(self._index.num_ngrams)

    @property
    def _searched_kinds(self) -> dict[int, set[str]]:
        """Parts with enough words of each item, by their kinds."""
        kinds: dict[int, set[str]] = defaultdict(set)
        for part, words in zip(self.parts, self._num_words.tolist(), strict=True):
            if words >= self.settings.min_words:
                kinds[part.item].add(part.kind)
        return kinds

    def searched_items(self) -> set[int]:
        """Return the numbers of the items that have enough words for the chosen way to match."""
        kinds = self._searched_kinds
        if self.settings.match != BOTH:
            return set(kinds)
        return {item for item in kinds if QUESTION in kinds[item] and self.words(self.items[item].answer)}

    def check_items(self) -> None:
        """Raise UsageError if no item is long enough, so that nothing would be found."""
        if not self.num_ngrams:
            raise UsageError(
                f"none of the {len(self.items):,} items has {self.settings.min_words} words to search for; give other items, or"
                " lower --min-words"
            )

    def words(self, text: str) -> list[str]:
        """Return the normalized words of a text."""
        return list(self._index.words(text)[0])

    def search(self, texts: Sequence[str]) -> dict[int, list[Passage]]:
        """Return the passages of the contaminated ones of some texts, by their number, in the order of the text."""
        hits = self._index.search(texts)
        found = {}
        for number, rows in _by_text(hits):
            if passages := self._passages(texts[number], rows):
                found[number] = passages
        return found

    def _passages(self, text: str, rows: Any) -> list[Passage]:
        by_part = self._hits_by_part(rows)
        near = [(part, cluster) for part, hits in by_part.items() for cluster in self._clusters(part, hits)]
        if not near:
            return []
        words, spans = self._index.words(text)
        found = []
        for part, cluster in near:
            of_part = self._part_words(part)
            exact = [
                hit
                for hit in cluster
                if words[hit.word : hit.word + hit.length] == of_part[hit.part_word : hit.part_word + hit.length]
            ]
            for same in self._clusters(part, exact):
                if _telling_words(same, of_part) < self.settings.telling_words:
                    continue
                first, last = same[0].word, max(hit.word + hit.length for hit in same) - 1
                begin, end = int(spans[first][0]), int(spans[last][1])
                item, kind, _ = self.parts[part]
                found.append(Passage(item, kind, round(self._share(part, same), 4), begin, end, first, last))
        return self._matching(
            sorted(found, key=lambda passage: (passage.begin, passage.end, passage.item, passage.kind)), words
        )

    def _hits_by_part(self, rows: Any) -> dict[int, list[Hit]]:
        """Return the hits of each part that can reach the threshold. A phrase of many items is in many parts, which need more."""
        in_part: dict[int, list[tuple[int, Hit]]] = defaultdict(list)
        for ngram, length in np.unique(rows[:, 2:], axis=0).tolist():
            for part, part_word in self._places[self._starts[ngram] : self._starts[ngram + 1]].tolist():
                in_part[part].append((ngram, Hit(0, part_word, length)))
        places: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for part, found in in_part.items():
            if self._share(part, [hit for _, hit in found]) >= self.settings.threshold:
                for ngram, hit in found:
                    places[ngram].append((part, hit.part_word))
        by_part: dict[int, list[Hit]] = defaultdict(list)
        for _, word, ngram, length in rows.tolist() if places else ():
            for part, part_word in places.get(ngram, ()):
                by_part[part].append(Hit(word, part_word, length))
        return by_part

    def _clusters(self, part: int, hits: list[Hit]) -> Iterator[list[Hit]]:
        """Yield the groups of near hits of a part that have enough of its words. A gap has at most as many words as the part."""
        num_words = int(self._num_words[part])
        if self._share(part, hits) < self.settings.threshold:
            return
        cluster: list[Hit] = []
        for hit in sorted(hits):
            if cluster and hit.word - cluster[-1].word - cluster[-1].length > num_words:
                if self._share(part, cluster) >= self.settings.threshold:
                    yield cluster
                cluster = []
            cluster.append(hit)
        if cluster and self._share(part, cluster) >= self.settings.threshold:
            yield cluster

    def _share(self, part: int, hits: list[Hit]) -> float:
        """Return the share of a part's words that the hits cover."""
        covered = 0  # one bit per word
        for hit in hits:
            covered |= ((1 << hit.length) - 1) << hit.part_word
        return covered.bit_count() / int(self._num_words[part])

    def _part_words(self, part: int) -> list[str]:
        return list(self._index.words(self.parts[part].text)[0])

    def _matching(self, passages: list[Passage], words: list[str]) -> list[Passage]:
        """Return the passages of the items that match in the chosen way. One found with its answer has the kind `both`."""
        kinds: dict[int, set[str]] = defaultdict(set)
        for passage in passages:
            kinds[passage.item].add(passage.kind)
        together = {
            passage.item
            for passage in passages
            if passage.kind == QUESTION and (ANSWER in kinds[passage.item] or self._has_short_answer(passage, words))
        }
        wanted = {item for item in kinds if self.settings.match != BOTH or item in together}
        return [
            Passage(*_fields(passage, BOTH if passage.item in together and passage.kind == QUESTION else passage.kind))
            for passage in passages
            if passage.item in wanted
        ]

    def _has_short_answer(self, passage: Passage, words: list[str]) -> bool:
        answer = self.words(self.items[passage.item].answer)
        if not 0 < len(answer) < self.settings.min_words:
            return False
        before = words[max(0, passage.first_word - ANSWER_DISTANCE_WORDS) : passage.first_word]
        after = words[passage.last_word + 1 : passage.last_word + 1 + ANSWER_DISTANCE_WORDS]
        return any(
            side[start : start + len(answer)] == answer
            for side in (before, after)
            for start in range(len(side) - len(answer) + 1)
        )


def _telling_words(hits: Sequence[Hit], words: Sequence[str]) -> int:
    """Return the number of different words of two letters or more that hits cover. words: of the part."""
    covered = {word for hit in hits for word in words[hit.part_word : hit.part_word + hit.length]}
    return sum(not word[0].isdigit() and len(word.encode()) > 1 for word in covered)


def _fields(passage: Passage, kind: str) -> tuple[Any, ...]:
    return (passage.item, kind, passage.score, passage.begin, passage.end, passage.first_word, passage.last_word)


def _parts(number: int, item: EvaluationItem, kinds: Sequence[str]) -> Iterator[Part]:
    if QUESTION in kinds:
        yield Part(number, QUESTION, item.question)
    if ANSWER in kinds:
        yield Part(number, ANSWER, item.answer)
    if CHOICE in kinds:
        yield from (Part(number, CHOICE, choice) for choice in item.choices)


def _by_text(hits: Any) -> Iterator[tuple[int, Any]]:
    """Yield (number of the text, its rows) of the rows of a search."""
    if not len(hits):
        return
    numbers = hits[:, 0]
    borders = np.flatnonzero(np.diff(numbers)) + 1
    for rows in np.split(hits, borders):
        yield int(rows[0, 0]), rows


@cache
def _table() -> tuple[list[int], str]:
    return fold_table()
