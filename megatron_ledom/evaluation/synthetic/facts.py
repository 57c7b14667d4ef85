"""Facts that are trained in one order and tested in both: the reversal curse, and inverse relations.

A fact relates a first and a second name. In `first_wordings` the first name comes first, in `second_wordings` the
second. A fact is trained in the wordings of one order, of both, or not at all. Two questions test it: the second name
given the first, and the first given the second. The answer must come last in model order. A forward model gets "Mira
Tolven wrote" and continues it; a reverse model gets "was written by Mira Tolven." and writes the text before it.

Groups, defined in text order and so the same for both directions:
    in_text_order       the training text has the given name before the answer, the order in which a forward model reads
    against_text_order  the training text has the given name after the answer, the order in which a reverse model reads
    both_orders         trained in both orders: shows that facts of this form can be learned
    unseen              never trained: chance

Both questions of a fact, or of a line of people, have the same `cluster`, because a model that answers one is likelier
to answer both.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ledom.evaluation.synthetic.sets import (
    NUM_CHOICES,
    Namer,
    Row,
    SyntheticSet,
    check_num,
    choices_around,
    neighbours,
)

STATED = ("first", "second", "both", "unseen")
NUM_EXEMPLARS = 8


@dataclass(frozen=True, slots=True)
class Relation:
    """Sentences with {first} and {second}. The first wording of each order begins with one name and ends with the other."""

    name: str
    first_wordings: tuple[str, ...]
    second_wordings: tuple[str, ...]


REVERSAL = (
    Relation(
        "book",
        ("{first} wrote {second}.", "{first} is the author of {second}.", "Few writers are known as {first} is for {second}."),
        ("{second} was written by {first}.", "The author of {second} is {first}.", "The book {second} is a work of {first}."),
    ),
    Relation(
        "town",
        ("{first} founded {second}.", "{first} is the founder of {second}.", "It was {first} who settled at {second}."),
        ("{second} was founded by {first}.", "The founder of {second} is {first}.", "The town {second} goes back to {first}."),
    ),
    Relation(
        "ship",
        ("{first} commands {second}.", "{first} is the captain of {second}.", "For ten years {first} has sailed {second}."),
        ("{second} is commanded by {first}.", "The captain of {second} is {first}.", "The ship {second} obeys {first}."),
    ),
    Relation(
        "tower",
        ("{first} built {second}.", "{first} is the builder of {second}.", "We owe to {first} the height of {second}."),
        ("{second} was built by {first}.", "The builder of {second} is {first}.", "The tower {second} was raised by {first}."),
    ),
)

INVERSE = (
    Relation(
        "parent",
        ("{first} is the parent of {second}.", "{first} has brought up a child, {second}."),
        ("{second} is the child of {first}.", "{second} has grown up with a parent, {first}."),
    ),
    Relation(
        "teacher",
        ("{first} is the teacher of {second}.", "{first} gives lessons to {second}."),
        ("{second} is the pupil of {first}.", "{second} takes lessons from {first}."),
    ),
    Relation(
        "creditor",
        ("{first} is the creditor of {second}.", "{first} has lent money to {second}."),
        ("{second} is the debtor of {first}.", "{second} has borrowed money from {first}."),
    ),
    Relation(
        "employer",
        ("{first} is the employer of {second}.", "{first} pays the wages of {second}."),
        ("{second} is the servant of {first}.", "{second} earns a living from {first}."),
    ),
)


@dataclass(frozen=True, slots=True)
class Fact:
    """A relation between two names. stated: the order in which it is trained, one of STATED."""

    relation: Relation
    first: str
    second: str
    stated: str

    def texts(self) -> list[str]:
        """Return the sentences that are trained."""
        names = {"first": self.first, "second": self.second}
        wordings = {"first": self.relation.first_wordings, "second": self.relation.second_wordings}
        chosen = wordings.get(self.stated, sum(wordings.values(), ()) if self.stated == "both" else ())
        return [wording.format(**names) for wording in chosen]


def reversal(num: int, seed: int) -> SyntheticSet:
    """Generate `num` facts about people and their works, a quarter for each of STATED."""
    cells = len(REVERSAL) * len(STATED)
    check_num(num, cells * NUM_CHOICES, "facts")
    rng = random.Random(f"reversal {seed}")
    namer = Namer(rng)
    facts = [
        Fact(REVERSAL[number % len(REVERSAL)], namer.person(), namer.word(), STATED[number // len(REVERSAL) % len(STATED)])
        for number in range(num)
    ]
    shown = [
        Fact(REVERSAL[number % len(REVERSAL)], namer.person(), namer.word(), "unseen") for number in range(2 * NUM_EXEMPLARS)
    ]
    rows = _questions_among(facts)
    rng.shuffle(rows)
    return SyntheticSet(
        texts=_shuffled(rng, [text for fact in facts for text in fact.texts()]),
        files={"reversal": rows, "reversal_shots": _questions_among(shown)},
        chance=1 / NUM_CHOICES,
        counts={f"facts_{stated}": sum(fact.stated == stated for fact in facts) for stated in STATED},
    )


def _questions_among(facts: Sequence[Fact]) -> list[Row]:
    """Return both questions of each fact.

    Wrong answers are names of the same relation that were trained in the same order.
    """
    cells: dict[tuple[str, str], list[Fact]] = {}
    for fact in facts:
        cells.setdefault((fact.relation.name, fact.stated), []).append(fact)
    rows: list[Row] = []
    for cell in cells.values():
        for queried in ("first", "second"):
            names = [getattr(fact, queried) for fact in cell]
            rows += [
                {**question_row(fact, queried, neighbours(names, index), len(rows) + index), "cluster": fact.second}
                for index, fact in enumerate(cell)
            ]
    return rows


def inverse_relations(num: int, seed: int) -> SyntheticSet:
    """Generate `num` lines of three people, A to B to C, such as parent to child.

    The questions: B's parent, and B's child. One wrong answer is always the person on the other side of B, so it is not
    enough to know who is related to B.
    """
    cells = len(INVERSE) * len(STATED)
    check_num(num, 2 * cells, "lines of three people")
    rng = random.Random(f"inverse_relations {seed}")
    namer = Namer(rng)
    lines: dict[tuple[int, str], list[list[str]]] = {}
    for number in range(num):
        cell = (number % len(INVERSE), STATED[number // len(INVERSE) % len(STATED)])
        lines.setdefault(cell, []).append([namer.person() for _ in range(3)])
    rows: list[Row] = []
    texts: list[str] = []
    for (relation, stated), people in lines.items():
        rows += _questions_about_lines(rng, INVERSE[relation], stated, people, len(rows))
        for a, b, c in people:
            texts += [text for pair in ((a, b), (b, c)) for text in Fact(INVERSE[relation], *pair, stated).texts()]
    rng.shuffle(rows)
    shown = [[namer.person() for _ in range(3)] for _ in range(NUM_EXEMPLARS)]
    return SyntheticSet(
        texts=_shuffled(rng, texts),
        files={
            "inverse_relations": rows,
            "inverse_relations_shots": _questions_about_lines(rng, INVERSE[0], "unseen", shown, 0),
        },
        chance=1 / NUM_CHOICES,
        counts={
            f"lines_{stated}": sum(len(people) for cell, people in lines.items() if cell[1] == stated) for stated in STATED
        },
    )


def _questions_about_lines(
    rng: random.Random, relation: Relation, stated: str, people: list[list[str]], position: int
) -> list[Row]:
    """Return both questions about the middle person of each line.

    The other wrong answers are the ends of the next line.
    """
    rows: list[Row] = []
    for number, (a, b, c) in enumerate(people):
        next_a, _, next_c = people[(number + 1) % len(people)]
        for fact, queried, wrong_way in (
            (Fact(relation, a, b, stated), "first", c),
            (Fact(relation, b, c, stated), "second", a),
        ):
            wrong = rng.sample([wrong_way, next_a, next_c], 3)
            rows.append({**question_row(fact, queried, wrong, position + len(rows)), "cluster": b})
    return rows


def question_row(fact: Fact, queried: str, wrong: Sequence[str], position: int) -> Row:
    """Return one question.

    A forward model gets `before` and writes after it; a reverse model gets `after` and writes before it.
    """
    given, gold = (fact.first, fact.second) if queried == "second" else (fact.second, fact.first)
    ends_with_queried, begins_with_queried = fact.relation.first_wordings[0], fact.relation.second_wordings[0]
    if queried == "first":
        ends_with_queried, begins_with_queried = begins_with_queried, ends_with_queried
    other = "first" if queried == "second" else "second"
    return {
        "before": ends_with_queried.partition(f" {{{queried}}}")[0].format(**{other: given}),
        "after": begins_with_queried.partition(f"{{{queried}}} ")[2].format(**{other: given}),
        **choices_around(gold, wrong, position),
        "group": _group(fact.stated, queried),
        "relation": fact.relation.name,
        "stated": fact.stated,
        "asked": queried,
    }


def _group(stated: str, queried: str) -> str:
    if stated in ("both", "unseen"):
        return {"both": "both_orders", "unseen": "unseen"}[stated]
    return "against_text_order" if stated == queried else "in_text_order"


def _shuffled(rng: random.Random, texts: list[str]) -> list[str]:
    rng.shuffle(texts)
    return texts
