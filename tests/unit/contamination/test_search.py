"""Passages of evaluation items in texts: what is found, how much of an item is needed, and what is cut."""

import random
import subprocess
import sys
from collections.abc import Iterable

import pytest

from megatron_ledom.contamination.cutting import pieces_without
from megatron_ledom.contamination.items import EvaluationItem, items_sha256
from megatron_ledom.contamination.near_words import NearWords
from megatron_ledom.contamination.report import ContaminationCounts, report_of
from megatron_ledom.contamination.search import Decontamination, Searcher
from megatron_ledom.contamination.settings import SearchSettings
from megatron_ledom.errors import UsageError


def words(start: int, count: int) -> str:
    """Return `count` words that occur nowhere else: w100 w101 ... written with letters only."""
    return " ".join("w" + "".join(chr(97 + int(digit)) for digit in str(number)) for number in range(start, start + count))


ITEMS = [
    EvaluationItem(set="long", number=0, question=words(100, 40), answer=words(200, 20)),
    EvaluationItem(set="short", number=0, question=words(300, 10), answer="forty two", choices=(words(400, 9),)),
    EvaluationItem(set="short", number=1, question="what burns", answer="fire"),
]
PAGE = words(1000, 300)


def searcher(items: Iterable[EvaluationItem] = ITEMS, **changes: object) -> Searcher:
    return Searcher(Decontamination(SearchSettings(**changes), list(items)))  # type: ignore[arg-type]


def found(text: str, **changes: object) -> list[tuple[int, str]]:
    passages = searcher(**changes).search([PAGE, text]).get(1, [])
    return [(passage.item, passage.kind) for passage in passages]


def inside(text: str) -> str:
    return f"{words(2000, 200)} {text} {words(3000, 200)}"


def test_a_question_inside_a_page_is_found_with_its_place() -> None:
    text = "é " + inside(words(100, 40).upper())
    (passage,) = searcher().search([text])[0]
    assert text.encode()[passage.begin : passage.end].decode() == words(100, 40).upper()
    assert (passage.item, passage.kind, passage.score) == (0, "question", 1.0)


@pytest.mark.parametrize(("count", "is_found"), [(40, True), (20, True), (19, False)])
def test_the_threshold_is_the_share_of_the_words_of_a_part(count: int, is_found: bool) -> None:
    assert bool(found(inside(words(105, count) if count < 35 else words(100, count)))) == is_found
    assert not found(inside(words(100, 35)), threshold=0.9)


def test_hits_count_together_only_if_they_are_near() -> None:
    near = f"{words(100, 10)} {words(5000, 20)} {words(125, 10)}"
    far = f"{words(100, 10)} {words(5000, 50)} {words(125, 10)}"
    assert found(near) == [(0, "question")]
    assert found(far) == []


def test_changed_words_break_runs_and_the_rest_still_counts() -> None:
    changed = words(100, 40).split()
    changed[20] = "other"
    assert found(" ".join(changed)) == [(0, "question")]
    assert found(" ".join("other" if place % 8 == 7 else word for place, word in enumerate(changed))) == []


def test_a_part_below_min_words_is_not_searched_and_one_below_ngram_must_be_whole() -> None:
    assert found("what burns fire") == []
    assert found(words(300, 10), ngram=13) == [(1, "question")]
    assert found(words(300, 9), ngram=13) == []
    assert searcher().searched_items() == {0, 1}


def test_each_way_to_match_finds_its_parts() -> None:
    question, answer = inside(words(100, 40)), inside(words(200, 20))
    both = f"{question} {answer}"
    assert [bool(found(question, match=match)) for match in ("either", "question", "answer", "both", "any")] == [1, 1, 0, 0, 1]
    assert [bool(found(answer, match=match)) for match in ("either", "question", "answer", "both", "any")] == [1, 0, 1, 0, 1]
    assert found(both, match="both") == [(0, "both"), (0, "answer")]
    assert found(words(400, 9)) == []
    assert found(words(400, 9), match="any") == [(1, "choice")]


def test_a_short_answer_near_its_question_makes_it_both() -> None:
    assert found(f"{words(300, 10)} Answer: forty-two", match="both") == [(1, "both")]
    assert found(f"forty two is the answer to {words(300, 10)}", match="both") == [(1, "both")]
    assert found(f"{words(300, 10)} {words(6000, 60)} forty two", match="both") == []


def test_numbers_make_a_difference_unless_they_are_ignored() -> None:
    item = EvaluationItem(set="n", number=0, question="Ann has 3 pears and buys 4 more of 12 so how many has she now")
    copy = item.question.replace("3", "5").replace("12", "1,000")
    assert searcher([item]).search([copy]) == {}
    assert searcher([item], ignore_numbers=True).search([copy])[0][0].score == 1.0


@pytest.mark.parametrize(
    "question", ["1, 2, 3, 4, 5, 6, 7, 8, 9, 10", "x + y = z, a b c d e f g", "sqrt 1 sqrt 2 sin 3 cos 4 sqrt 5"]
)
def test_rows_of_numbers_and_letters_are_no_evidence(question: str) -> None:
    assert searcher([EvaluationItem(set="n", number=0, question=question)]).search([question]) == {}


def test_equal_hashes_are_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    found_by = searcher()
    index = found_by._index

    class Lying:
        def search(self, texts: list[str]) -> object:
            return index.search([words(100, 40)] * len(texts))

        def words(self, text: str) -> object:
            return index.words(text)

        def words_in(self, text: str, ranges: object) -> object:
            return index.words_in(text, ranges)

    monkeypatch.setattr(found_by, "_index", Lying())
    assert found_by.search([words(7000, 60)]) == {}


def test_every_ngram_of_random_items_is_found_where_a_plain_search_finds_it() -> None:
    chance = random.Random(7)
    letters = [words(number, 1) for number in range(11, 17)]
    items = [
        EvaluationItem(set="r", number=n, question=" ".join(chance.choices(letters, k=chance.randrange(3, 9))))
        for n in range(40)
    ]
    index = searcher(items, ngram=5, min_words=3, threshold=1.0, match="question")
    for _ in range(200):
        text = " ".join(chance.choices(letters, k=40))
        expected = {
            n
            for n, item in enumerate(items)
            if f" {item.question} " in f" {text} " and len(set(item.question.split())) >= SearchSettings().telling_words
        }
        assert expected <= {passage.item for passage in index.search([text]).get(0, [])}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ngram": 0}, "--ngram 0 must be 1 to 64"),
        ({"ngram": 65}, "--ngram 65"),
        ({"min_words": 9}, "--min-words 9 must be 1 to --ngram"),
        ({"threshold": 0.0}, "--threshold 0.0 must be above 0"),
        ({"threshold": 1.5}, "--threshold 1.5"),
    ],
)
def test_settings_without_sense_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        searcher(**changes)


def test_the_hash_of_items_covers_every_field() -> None:
    other = EvaluationItem(set="long", number=0, question=words(100, 40), answer=words(200, 21))
    assert items_sha256(ITEMS[:1]) != items_sha256([other])
    assert items_sha256(ITEMS) == items_sha256(list(ITEMS))


def test_a_cut_text_leaves_pieces_without_the_passage_and_its_surroundings() -> None:
    text = f"{words(2000, 100)} {words(100, 40)} {words(3000, 100)}"
    pieces = pieces_without(text, searcher().search([text])[0])
    assert len(pieces) == 2
    assert all(piece in text and len(piece) >= 200 for piece in pieces)
    assert all(not text.replace(piece, "").startswith(piece) for piece in pieces)
    assert set(" ".join(pieces).split()) <= set(text.split()) - set(words(100, 40).split())
    assert len(text) - sum(map(len, pieces)) >= len(words(100, 40)) + 400


def test_the_words_in_ranges_are_those_of_the_whole_text() -> None:
    chance, index = random.Random(8), searcher().index
    text = " ".join(chance.choices(["one", "\\quad", "1,000", "中文", "½", "naïve,", "x-\ny", "..."], k=200))
    words, spans = index.ngrams.words(text)
    for _ in range(100):
        firsts = [chance.randrange(-20, len(words)) for _ in range(3)]
        ranges = [(first, first + chance.randrange(1, 40)) for first in firsts]
        near = NearWords(index.ngrams, text, ranges)
        for first, end in ranges:
            assert near.words(first, end) == words[max(0, first) : max(0, end)]
            last = min(end, len(words)) - 1
            if 0 <= first <= last:
                assert near.span(first, last) == (spans[first][0], spans[last][1])


@pytest.mark.parametrize("letter", ["a", "é", "中", "👍"])
def test_a_cut_of_any_letters_is_at_the_passage(letter: str) -> None:
    text = f"{letter * 300} {words(100, 40)} {letter * 300}"
    (passage,) = searcher().search([text])[0]
    begin = len(f"{letter * 300} ".encode())
    assert (passage.begin, passage.end) == (begin, begin + len(words(100, 40)))
    spaced = f"{f'{letter * 9} ' * 60}{words(100, 40)}{f' {letter * 9}' * 60}"
    first, second = pieces_without(spaced, searcher().search([spaced])[0])
    assert first == second == " ".join([letter * 9] * 40)


MEMORY = """
import resource
from megatron_ledom.contamination.cutting import pieces_without
from megatron_ledom.contamination.report import ContaminationCounts
from tests.unit.contamination.test_search import searcher, words
text = f"é {words(10000, 2000) * 600} {words(100, 40)} {words(10000, 2000) * 600}"
found_by, counts = searcher(), ContaminationCounts()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(passages,) = found_by.search([text]).values()
counts.add_document("a", text, passages)
assert len(pieces_without(text, passages)) == 2
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / len(text))
"""


def test_a_long_contaminated_document_takes_few_times_its_size() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 3


def test_short_pieces_are_dropped_and_a_text_of_many_pieces_as_a_whole() -> None:
    short = f"{words(2000, 30)} {words(100, 40)}"
    assert pieces_without(short, searcher().search([short])[0]) == []
    many = " ".join(f"{words(2000 + 1000 * n, 150)} {words(100, 40)}" for n in range(11))
    assert pieces_without(many, searcher().search([many])[0]) == []


def test_counts_of_parts_add_up_to_the_counts_of_all() -> None:
    texts = [inside(words(100, 40)), PAGE, f"{words(300, 10)} forty two", words(100, 40), words(200, 20), words(100, 40)]
    index = searcher()

    def counted(some: list[tuple[int, str]]) -> ContaminationCounts:
        counts = ContaminationCounts(documents=len(some))
        for number, text in some:
            for passages in index.search([text]).values():
                counts.add_document(f"file:{number}", text, passages)
        return counts

    numbered = list(enumerate(texts))
    whole, joined = counted(numbered), ContaminationCounts()
    for begin in range(0, len(texts), 2):
        joined.add(counted(numbered[begin : begin + 2]))
    assert joined == whole
    report = report_of(whole, index, Decontamination(SearchSettings(), ITEMS))
    assert report["documents"] == {"searched": 6, "contaminated": 5, "pieces_of_cut_documents": 0}
    assert report["sets"]["long"] == {"items": 1, "searched": 1, "touched": 1, "question": 1, "answer": 1, "both": 0}
    assert report["sets"]["short"] == {"items": 2, "searched": 1, "touched": 1, "question": 1, "answer": 0, "both": 1}
    assert [example["where"] for example in report["items"][0]["examples"]] == ["file:0", "file:3", "file:4"]
    assert report["items"][0]["documents"] == 4
