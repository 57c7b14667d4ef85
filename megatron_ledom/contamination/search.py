"""Find evaluation items in texts: n-grams of normalized words, joined to passages, with a threshold on the share of the item.

Sources. Brown et al. 2020, arXiv 2005.14165, appendix C (GPT-3): 13-grams, shorter for short items but never below 8 words, and the
window of 200 characters that is cut. Chowdhery et al. 2022, arXiv 2204.02311 (PaLM), Dubey et al. 2024, arXiv 2407.21783 (Llama 3) and
Lambert et al. 2024, arXiv 2411.15124 (Tulu 3): 8-grams and a share of the item, 70 %, by set, and 50 %. Singh et al. 2024, arXiv
2411.03923: the longest passage predicts gains better than the union of all matches, so that hits count together only if they are near.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_ledom.contamination.item_index import KINDS, ItemIndex, build_index
from megatron_ledom.contamination.items import EvaluationItem, items_sha256
from megatron_ledom.contamination.near_words import NearWords
from megatron_ledom.contamination.normalization import normalization_version
from megatron_ledom.contamination.settings import ANSWER, BOTH, QUESTION, SearchSettings
from megatron_ledom.errors import UsageError

ANSWER_DISTANCE_WORDS = 50
"""A short answer belongs to a question if it is at most this far from it."""


@dataclass(slots=True)
class Decontamination:
    """Settings and items of a search: all that determines its result."""

    settings: SearchSettings
    items: Sequence[EvaluationItem]
    index: ItemIndex | None = None
    """The index of the items if it is stored; else a `Searcher` builds it."""
    items_sha256: str = ""
    """Hash of the items; a stored index has it."""

    def __post_init__(self) -> None:
        self.items_sha256 = self.items_sha256 or items_sha256(self.items)

    def request(self) -> dict[str, Any]:
        """Return what determines the result, for the request of a job."""
        return {
            **asdict(self.settings),
            "items_sha256": self.items_sha256,
            "num_items": len(self.items),
            "normalization": normalization_version(),
        }


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
        self.settings = decontamination.settings
        self.settings.check()
        self.index = decontamination.index or build_index(self.settings, decontamination.items)
        self.items = self.index.items
        self._index, self._num_words = self.index.ngrams, self.index.num_words
        self._places, self._starts = self.index.places, self.index.starts

    @property
    def num_bytes(self) -> int:
        """Return the memory of the index in bytes, without the texts of the items."""
        return self.index.num_bytes

    @property
    def num_ngrams(self) -> int:
        """Return the number of different n-grams."""
        return self.index.num_ngrams

    def is_searched(self) -> npt.NDArray[np.bool_]:
        """Return a mask of the items [items]: True for those that have enough words for the chosen way to match."""
        is_long = self._num_words >= self.settings.min_words
        found = np.zeros(len(self.items), np.bool_)
        if self.settings.match != BOTH:
            found[self.index.part_items[is_long]] = True
            return found
        questions = self.index.part_items[is_long & (self.index.part_kinds == KINDS.index(QUESTION))]
        found[[item for item in questions.tolist() if self.words(self.items.answer(item))]] = True
        return found

    def searched_items(self) -> set[int]:
        """Return the numbers of the items of `is_searched`."""
        return set(np.flatnonzero(self.is_searched()).tolist())

    def check_items(self) -> None:
        """Raise UsageError if no item is long enough, so that nothing would be found."""
        if not self.num_ngrams:
            raise UsageError(
                f"none of the {len(self.items):,} items has {self.settings.min_words} words to search for; give other items, or"
                " lower --min-words"
            )

    def words(self, text: str) -> list[str]:
        """Return the normalized words of a text."""
        return self.index.words(text)

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
        around = ANSWER_DISTANCE_WORDS + 1
        ends = [(part[0].word, max(hit.word + hit.length for hit in part)) for _, part in near]
        words = NearWords(self._index, text, ((first - around, end + around) for first, end in ends))
        found = []
        for part, cluster in near:
            of_part = self.index.part_words(part)
            exact = [
                hit
                for hit in cluster
                if words.words(hit.word, hit.word + hit.length) == of_part[hit.part_word : hit.part_word + hit.length]
            ]
            for same in self._clusters(part, exact):
                if _telling_words(same, of_part) < self.settings.telling_words:
                    continue
                first, last = same[0].word, max(hit.word + hit.length for hit in same) - 1
                begin, end = words.span(first, last)
                item, score = self.index.item(part), round(self._share(part, same), 4)
                found.append(Passage(item, self.index.kind(part), score, begin, end, first, last))
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

    def _matching(self, passages: list[Passage], words: NearWords) -> list[Passage]:
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

    def _has_short_answer(self, passage: Passage, words: NearWords) -> bool:
        answer = self.words(self.items.answer(passage.item))
        if not 0 < len(answer) < self.settings.min_words:
            return False
        before = words.words(passage.first_word - ANSWER_DISTANCE_WORDS, passage.first_word)
        after = words.words(passage.last_word + 1, passage.last_word + 1 + ANSWER_DISTANCE_WORDS)
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


def _by_text(hits: Any) -> Iterator[tuple[int, Any]]:
    """Yield (number of the text, its rows) of the rows of a search."""
    if not len(hits):
        return
    numbers = hits[:, 0]
    borders = np.flatnonzero(np.diff(numbers)) + 1
    for rows in np.split(hits, borders):
        yield int(rows[0, 0]), rows
