"""Word problems of a small grammar, their worked solutions, and a solver that parses the grammar.

    Question: Mara has 5 pears. Mara buys 4 more pears. Mara loses 2 pears. How many pears does Mara have now?
    Solution: 5 + 4 = 9. 9 - 2 = 7. The answer is 7.

A reverse model that has read such texts writes the question before a solution. The question is right if the solver's
solution equals the given one, step by step. A question outside the grammar is never right, so the accuracy is a lower
bound. No test solution is trained, so a trained question is never right, and one question is right for one item at
most.

An equal answer alone means little. For 2,000 problems (seed 0), a random trained question has the right answer for 2.6
% of the items, the best single question for 6 %, and a question that only states the answer, without any step, for all
of them.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ledom.evaluation.synthetic.sets import Row, SyntheticSet, check_num

NAMES = ("Mara", "Joel", "Nina", "Omar", "Tess", "Ivan", "Lena", "Hugo", "Rosa", "Paul", "Edda", "Kian")
THINGS = ("pears", "hats", "coins", "books", "shells", "stamps", "keys", "nuts", "rings", "cups")
GAINS = ("{name} buys {number} more {things}.", "{name} finds {number} more {things}.")
LOSSES = ("{name} loses {number} {things}.", "{name} gives away {number} {things}.")
TIMES = {"Then the number of {things} doubles.": 2, "Then the number of {things} triples.": 3}
START = "{name} has {number} {things}."
END = "How many {things} does {name} have now?"
MOST = 40
"""Maximum number of things. Steps add or remove 2 to 20."""
TEST_SHARE = 5


def question_from_answer(num: int, seed: int) -> SyntheticSet:
    """Generate `num` problems of one to three steps with distinct solutions.

    A fifth of them are questions and not trained.
    """
    check_num(num, 4 * TEST_SHARE, "problems")
    rng = random.Random(f"question_from_answer {seed}")
    problems: dict[str, Row] = {}
    while len(problems) < num:
        problem = _problem(rng, rng.randint(1, 3))
        problems.setdefault(problem["solution"], problem)
    rows = list(problems.values())
    questions, trained = rows[: num // TEST_SHARE], rows[num // TEST_SHARE :]
    return SyntheticSet(
        texts=[f"Question: {row['question']}\nSolution: {row['solution']}" for row in trained],
        files={"question_from_answer": questions, "question_from_answer_train": trained},
        chance=1 / len(questions),
        counts={"trained": len(trained), "asked": len(questions)},
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
        elif kind == "+":
            wording, number = rng.choice(GAINS), rng.randint(2, min(20, MOST - value))
        else:
            wording, number = rng.choice(LOSSES), rng.randint(2, min(20, value - 1)) if value > 3 else 2
        sentences.append(wording.format(number=number, **names))
        equation, value = _equation(value, kind, number)
        equations.append(equation)
    return {
        "question": " ".join([*sentences, END.format(**names)]),
        "solution": " ".join([*equations, f"The answer is {value}."]),
        "answer": str(value),
        "group": f"{num_steps}_step{'s' if num_steps > 1 else ''}",
    }


def _equation(value: int, kind: str, number: int) -> tuple[str, int]:
    """Return a step in the words of a solution, and its result. kind: + - x."""
    result = {"+": value + number, "-": value - number, "x": value * number}[kind]
    return f"{value} {kind} {number} = {result}.", result


@dataclass(frozen=True, slots=True)
class Solution:
    """A question's worked solution, in the words of the training text, and its answer."""

    solution: str
    answer: int


def solve(question: str) -> Solution | None:
    """Return the solution of a question of this grammar, or None for any other text.

    The question is about one person and one kind of thing. The number of things must never fall below zero.
    """
    sentences = re.findall(r"[^.?]+[.?]", question.strip())
    if len(sentences) < 2 or "".join(sentences) != question.strip():
        return None
    first, *steps, last = (sentence.strip() for sentence in sentences)
    begun = _match(START, first)
    if begun is None or last != END.format(name=begun["name"], things=begun["things"]):
        return None
    value, equations = int(begun["number"]), list[str]()
    for sentence in steps:
        step = _step(sentence, begun["name"], begun["things"])
        if step is None:
            return None
        equation, value = _equation(value, *step)
        if value < 0:
            return None
        equations.append(equation)
    return Solution(" ".join([*equations, f"The answer is {value}."]), value)


def _step(sentence: str, name: str, things: str) -> tuple[str, int] | None:
    """Return the kind (+ - x) and number of a sentence's step, or None if it is not about this person and these things."""
    for wording, factor in TIMES.items():
        if sentence == wording.format(things=things):
            return "x", factor
    for wordings, kind in ((GAINS, "+"), (LOSSES, "-")):
        found = _first_match(wordings, sentence)
        if found is not None:
            return (kind, int(found["number"])) if (found["name"], found["things"]) == (name, things) else None
    return None


def _first_match(wordings: Sequence[str], sentence: str) -> dict[str, str] | None:
    return next((found for wording in wordings if (found := _match(wording, sentence)) is not None), None)


def _match(wording: str, sentence: str) -> dict[str, str] | None:
    """Return the names and the number in a sentence of this wording, or None."""
    pattern = re.escape(wording)
    for part, inner in (("name", "[A-Z][a-z]+"), ("number", r"\d{1,6}"), ("things", "[a-z]+")):
        pattern = pattern.replace(re.escape(f"{{{part}}}"), f"(?P<{part}>{inner})")
    found = re.fullmatch(pattern, sentence, re.ASCII)
    return None if found is None else found.groupdict()
