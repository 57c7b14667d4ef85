"""Word problems with worked solutions, made by rule in levels of difficulty, and the calculator that checks every chain.

    Ann has 7 pens. Then Ann buys 5 more. Sam has 9 pens. Then Ann loses 3. How many pens does Ann have now?
    7+5=12
    12-3=9
    #### 9

A level has a number of steps, a largest number and sentences that have nothing to do with the answer. All names, things, verbs and
numbers are drawn by a seed; a question of one part (training, calibration, development, test) is in no other part.
"""

import operator
import random
import re
from dataclasses import dataclass

from megatron_ledom.errors import DataError

NAMES = ("Ann", "Ben", "Cara", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jack", "Kim", "Leo", "Mia", "Nick", "Olga", "Paul")
THINGS = ("pens", "cards", "books", "shells", "coins", "apples", "stamps", "keys", "boxes", "cups", "nuts", "rings")
VERBS = {"+": ("buys", "finds", "gets", "wins"), "-": ("loses", "sells", "breaks", "drops")}
STEP = re.compile(r"(\d+)([-+*])(\d+)=(\d+)")
ALL_VERBS = "|".join(verb for verbs in VERBS.values() for verb in verbs)
START = re.compile(r"(\w+) has (\d{1,4}) (\w+)\.", re.ASCII)
CHANGE = re.compile(rf"Then (\w+) ({ALL_VERBS}) (\d{{1,4}})(?: more)?\.", re.ASCII)
ASKED = re.compile(r"How many (\w+) does (\w+) have now\?", re.ASCII)
COMPUTE = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """How hard problems are. steps: lines of the chain; largest: of the numbers in the question; distractors: idle sentences."""

    steps: int
    largest: int
    distractors: int = 0


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem: `answer` is the chain, a calculation a line, and `#### N`."""

    question: str
    answer: str
    level: int

    def as_fields(self) -> dict[str, str | int]:
        """The object of a line of JSON; `text` is what a model is trained on."""
        return {
            "question": self.question,
            "answer": self.answer,
            "level": self.level,
            "text": f"{self.question}\n{self.answer}",
            "prompt": f"{self.question}\n",
        }


def draw(level: int, levels: list[Level], random_: random.Random) -> Problem:
    """One problem of a level, which counts from 1."""
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
    """The calculator pass: every line is a true calculation that goes on from the one before, and the last is their result."""
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
    """Problems of all levels in equal numbers for each part named in `sizes` (problems a level). No question comes twice.

    Parts are drawn in the order of `sizes`; name the held-out ones first, so that another size of training leaves them the same.
    """
    random_, seen = random.Random(seed), set[str]()
    made = {}
    for part, size in sizes.items():
        drawn = [_new(level, levels, random_, seen) for _ in range(size) for level in range(1, len(levels) + 1)]
        wrong = [problem for problem in drawn if not check_chain(problem.answer)]
        if wrong:
            raise DataError(f"the calculator finds another result for {wrong[0].answer!r}; the generator of {part} is wrong")
        made[part] = drawn
    return made


def _new(level: int, levels: list[Level], random_: random.Random, seen: set[str]) -> Problem:
    for _ in range(1000):
        problem = draw(level, levels, random_)
        if problem.question not in seen:
            seen.add(problem.question)
            return problem
    raise DataError(f"level {level} has too few different problems for the numbers asked for; ask for fewer or widen the level")


def solve(question: str) -> str | None:
    """The worked solution of a question of these stories, in the form of `Problem.answer`; None for any other text.

    The person asked about must begin with a number of the things asked about; sentences on what others have are passed over. No
    number may fall below zero.
    """
    *story, asked = re.findall(r"[^.?]+[.?]", question) or [""]
    end = ASKED.fullmatch(asked.strip())
    if end is None or "".join([*story, asked]) != question:
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
