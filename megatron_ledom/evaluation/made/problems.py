"""Word problems of a small grammar, their worked solutions, and a solver that reads the grammar back.

    Question: Mara has 5 pears. Mara buys 4 more pears. Mara loses 2 pears. How many pears does Mara have now?
    Solution: 5 + 4 = 9. 9 - 2 = 7. The answer is 7.

A reverse model that has read such texts writes the question in front of a solution. What it writes is right if the solver finds the
solution's answer; it has no other way to be right than to be of the grammar, so that the figure is a lower bound.
"""

import random
import re
from collections.abc import Sequence

from megatron_ledom.evaluation.made.made_set import MadeSet, Row, check_num

NAMES = ("Mara", "Joel", "Nina", "Omar", "Tess", "Ivan", "Lena", "Hugo", "Rosa", "Paul", "Edda", "Kian")
THINGS = ("pears", "hats", "coins", "books", "shells", "stamps", "keys", "nuts", "rings", "cups")
GAINS = ("{name} buys {number} more {things}.", "{name} finds {number} more {things}.")
LOSSES = ("{name} loses {number} {things}.", "{name} gives away {number} {things}.")
TIMES = {"Then the number of {things} doubles.": 2, "Then the number of {things} triples.": 3}
START = "{name} has {number} {things}."
END = "How many {things} does {name} have now?"
MOST = 40
"""No number of things is above it; numbers that come or go are from 2 to 20."""
TEST_SHARE = 5


def question_from_answer(num: int, seed: int) -> MadeSet:
    """`num` problems of one to three steps; a fifth of them, whose solutions stand in no other, is asked and not trained."""
    check_num(num, 4 * TEST_SHARE, "problems")
    rng = random.Random(f"question_from_answer {seed}")
    problems: dict[str, Row] = {}
    while len(problems) < num:
        problem = _problem(rng, rng.randint(1, 3))
        problems.setdefault(problem["solution"], problem)
    rows = list(problems.values())
    asked, trained = rows[: num // TEST_SHARE], rows[num // TEST_SHARE :]
    return MadeSet(
        texts=[f"Question: {row['question']}\nSolution: {row['solution']}" for row in trained],
        files={"question_from_answer": asked, "question_from_answer_train": trained},
        chance=None,
        counts={"trained": len(trained), "asked": len(asked)},
    )


def _problem(rng: random.Random, num_steps: int) -> Row:
    names = {"name": rng.choice(NAMES), "things": rng.choice(THINGS)}
    value = rng.randint(2, 20)
    sentences, equations = [START.format(number=value, **names)], []
    for _ in range(num_steps):
        kinds = [
            kind for kind, is_possible in (("+", value <= MOST - 2), ("-", value > 2), ("x", 2 * value <= MOST)) if is_possible
        ]
        kind = rng.choice(kinds)
        if kind == "x":
            wording, number = rng.choice([(text, factor) for text, factor in TIMES.items() if factor * value <= MOST])
            result = number * value
        elif kind == "+":
            wording, number = rng.choice(GAINS), rng.randint(2, min(20, MOST - value))
            result = value + number
        else:
            wording, number = rng.choice(LOSSES), rng.randint(2, min(20, value - 1)) if value > 3 else 2
            result = value - number
        sentences.append(wording.format(number=number, **names))
        equations.append(f"{value} {kind} {number} = {result}.")
        value = result
    return {
        "question": " ".join([*sentences, END.format(**names)]),
        "solution": " ".join([*equations, f"The answer is {value}."]),
        "answer": str(value),
        "group": f"{num_steps}_step{'s' if num_steps > 1 else ''}",
    }


def solve(question: str) -> int | None:
    """The answer of a question of this grammar about one person and one kind of thing; None for any other text.

    No number of things may fall below zero on the way.
    """
    sentences = re.findall(r"[^.?]+[.?]", question.strip())
    if len(sentences) < 2 or "".join(sentences) != question.strip():
        return None
    first, *steps, last = (sentence.strip() for sentence in sentences)
    begun = _match(START, first)
    if begun is None or last != END.format(name=begun["name"], things=begun["things"]):
        return None
    value = int(begun["number"])
    for step in steps:
        changed = _step(step, value, begun["name"], begun["things"])
        if changed is None or changed < 0:
            return None
        value = changed
    return value


def _step(sentence: str, value: int, name: str, things: str) -> int | None:
    """What a sentence makes of the number of things; None where it is not about this person and these things."""
    for wording, factor in TIMES.items():
        if sentence == wording.format(things=things):
            return factor * value
    for wordings, sign in ((GAINS, 1), (LOSSES, -1)):
        found = _first_match(wordings, sentence)
        if found is not None:
            return value + sign * int(found["number"]) if (found["name"], found["things"]) == (name, things) else None
    return None


def _first_match(wordings: Sequence[str], sentence: str) -> dict[str, str] | None:
    return next((found for wording in wordings if (found := _match(wording, sentence)) is not None), None)


def _match(wording: str, sentence: str) -> dict[str, str] | None:
    """The names and the number in a sentence of this wording."""
    pattern = re.escape(wording)
    for part, inner in (("name", "[A-Z][a-z]+"), ("number", r"\d{1,6}"), ("things", "[a-z]+")):
        pattern = pattern.replace(re.escape(f"{{{part}}}"), f"(?P<{part}>{inner})")
    found = re.fullmatch(pattern, sentence, re.ASCII)
    return None if found is None else found.groupdict()
