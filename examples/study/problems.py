"""Synthetic word problems with worked solutions, in levels of difficulty, and the calculator that checks every chain.

    Ann has 7 pens. Then Ann buys 5 more. Sam has 9 pens. Then Ann loses 3. How many pens does Ann have now?
    7+5=12
    12-3=9
    #### 9

A level has a number of steps, a largest number and a number of irrelevant sentences. All names, things, verbs and
numbers are drawn by a seed. A question of one part (training, calibration, development, test) is in no other part.
"""

import operator
import random
import re
from dataclasses import dataclass

from megatron_ledom.errors import DataError

NAMES = ("Ann", "Ben", "Cara", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jack", "Kim", "Leo", "Mia", "Nick", "Olga", "Paul")
THINGS = ("pens", "cards", "books", "shells", "coins", "apples", "stamps", "keys", "boxes", "cups", "nuts", "rings")
VERBS = {"+": ("buys", "finds", "gets", "wins"), "-": ("loses", "sells", "breaks", "drops")}
GOLD = "answer"
"""The field of a problem with its worked solution."""
STEP = re.compile(r"(\d+)([-+*])(\d+)=(\d+)")
ALL_VERBS = "|".join(verb for verbs in VERBS.values() for verb in verbs)
START = re.compile(r"(\w+) has (\d{1,4}) (\w+)\.", re.ASCII)
CHANGE = re.compile(rf"Then (\w+) ({ALL_VERBS}) (\d{{1,4}})(?: more)?\.", re.ASCII)
QUERY = re.compile(r"How many (\w+) does (\w+) have now\?", re.ASCII)
COMPUTE = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """A level of difficulty.

    steps: lines of the chain; largest: largest number in the question; distractors: irrelevant sentences.
    """

    steps: int
    largest: int
    distractors: int = 0


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem. answer: the chain, one calculation per line, and `#### N`."""

    question: str
    answer: str
    level: int

    def as_fields(self) -> dict[str, str | int]:
        """Return the fields of a JSON line. `text` is the training text."""
        return {
            "question": self.question,
            "answer": self.answer,
            "level": self.level,
            "text": f"{self.question}\n{self.answer}",
            "prompt": f"{self.question}\n",
        }


def draw(level: int, levels: list[Level], random_: random.Random) -> Problem:
    """Draw a problem of a level. Levels count from 1."""
    shape = levels[level - 1]
    name, *others = random_.sample(NAMES, 1 + shape.distractors)
    thing = random_.choice(THINGS)
    value = random_.randint(2, shape.largest)
    story, chain = [], []
    for _ in range(shape.steps):
        number = random_.randint(2, shape.largest)
        sign = random_.choice("+-") if number < value else "+"
        result = COMPUTE[sign](value, number)
        more = " more" if sign == "+" else ""
        story.append(f"Then {name} {random_.choice(VERBS[sign])} {number}{more}.")
        chain.append(f"{value}{sign}{number}={result}")
        value = result
    start = chain[0].partition("+" if "+" in chain[0] else "-")[0]
    story.insert(0, f"{name} has {start} {thing}.")
    for other in others:
        idle = f"{other} has {random_.randint(2, shape.largest)} {thing}."
        story.insert(random_.randint(0, len(story)), idle)
    question = " ".join([*story, f"How many {thing} does {name} have now?"])
    return Problem(question, "\n".join([*chain, f"#### {value}"]), level)


def check_chain(answer: str) -> bool:
    """Return True if a chain is correct.

    Every line is a correct calculation that begins with the result of the line before, and the last line is the result.
    """
    *chain, last = answer.split("\n")
    value: int | None = None
    for line in chain:
        found = STEP.fullmatch(line)
        if found is None or (value is not None and int(found[1]) != value):
            return False
        value = COMPUTE[found[2]](int(found[1]), int(found[3]))
        if int(found[4]) != value:
            return False
    return value is not None and last == f"#### {value}"


def parts(levels: list[Level], sizes: dict[str, int], seed: int) -> dict[str, list[Problem]]:
    """Return equally many problems of each level for each part in `sizes` (problems per level). No question occurs twice.

    Parts are drawn in the order of `sizes`. Name the held-out parts first, so that they do not depend on the size of
    the training part.
    """
    random_, seen = random.Random(seed), set[str]()
    generated = {}
    for part, size in sizes.items():
        drawn = [new_problem(level, levels, random_, seen) for _ in range(size) for level in range(1, len(levels) + 1)]
        wrong = [problem for problem in drawn if not check_chain(problem.answer)]
        if wrong:
            raise DataError(f"the calculator finds another result for {wrong[0].answer!r}; correct the generator of {part}")
        generated[part] = drawn
    return generated


def new_problem(level: int, levels: list[Level], random_: random.Random, seen: set[str]) -> Problem:
    """Draw a problem whose question is not in `seen`, and add it there."""
    for _ in range(1000):
        problem = draw(level, levels, random_)
        if problem.question not in seen:
            seen.add(problem.question)
            return problem
    raise DataError(f"level {level} has too few different problems; lower num_problems or widen the level")


def solve(question: str) -> str | None:
    """Return the worked solution of a question of this form, as in `Problem.answer`, or None for any other text.

    The story must begin with a number of things of the queried person. Sentences about others are skipped. The number
    must not fall below zero.
    """
    *story, query = re.findall(r"[^.?]+[.?]", question) or [""]
    end = QUERY.fullmatch(query.strip())
    if end is None or "".join([*story, query]) != question:
        return None
    thing, name = end.groups()
    value, chain = -1, []
    for sentence in map(str.strip, story):
        start, change = START.fullmatch(sentence), CHANGE.fullmatch(sentence)
        if start is not None and start[1] != name:
            continue
        if start is not None and start[3] == thing and value < 0:
            value = int(start[2])
        elif change is not None and change[1] == name and value >= 0:
            sign = next(sign for sign, verbs in VERBS.items() if change[2] in verbs)
            result = COMPUTE[sign](value, int(change[3]))
            chain.append(f"{value}{sign}{change[3]}={result}")
            value = result
        else:
            return None
        if value < 0:
            return None
    return "\n".join([*chain, f"#### {value}"]) if chain else None
