"""The problems of the controls: a training part for each seed, shared held-out parts, and chains with one planted error."""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from lines import write_lines
from problems import COMPUTE, STEP, Level, Problem, new_problem, parts

HELD_OUT = ("labelled", "development", "test", "planted")
"""Parts that no model is trained on: answers of the first train the verifier, the second chooses lambda and N."""
GOLD_CHAIN = "right"
OPERAND = "wrong operand, true sums"
FALSE = "false sum"
CARRIED = "false sum, carried on"
OPERATION = "wrong operation, true sums"
OTHER = "another question's chain"
KINDS = (OPERAND, FALSE, CARRIED, OPERATION, OTHER)
TRIES = 50
"""Random draws of an error before a kind counts as impossible for a chain."""
Calculation = tuple[int, str, int, int]
"""A line of a chain: value, sign, number, stated result."""


def write_problems(folder: Path, levels: list[Level], num: dict[str, int], seeds: Sequence[int], problems_seed: int) -> None:
    """Write the held-out parts, the planted errors, and the training texts of each seed in both orders of the parts.

    The right answers to the test part are in a file of their own, which only `registration.read_answers` opens.
    """
    held = parts(levels, {name: num[name] for name in HELD_OUT}, problems_seed)
    for name in ("labelled", "development"):
        write_lines(folder / f"{name}.jsonl", [one.as_fields() for one in held[name]])
    test = [one.as_fields() for one in held["test"]]
    write_lines(folder / "test.jsonl", [{name: one[name] for name in ("prompt", "level")} for one in test])
    write_lines(folder / "answers.jsonl", [{name: one[name] for name in ("prompt", "answer")} for one in test])
    write_lines(folder / "planted.jsonl", planted(held["planted"], levels, problems_seed))
    known = {one.question for found in held.values() for one in found}
    for seed in seeds:
        random_, seen = Random(f"{problems_seed} {seed}"), set(known)
        drawn = [new_problem(level, levels, random_, seen) for _ in range(num["train"]) for level in range(1, len(levels) + 1)]
        write_lines(folder / f"train_{seed}.jsonl", [{"text": f"{one.question}\n{one.answer}"} for one in drawn])
        write_lines(folder / f"swapped_{seed}.jsonl", [{"text": f"{one.answer}\n{one.question}"} for one in drawn])


def planted(problems: Sequence[Problem], levels: list[Level], seed: int) -> list[dict[str, Any]]:
    """Return for each problem its right chain and one with each kind of error that it can have, as candidates."""
    random_, records = Random(seed), []
    for problem in problems:
        others = [
            one for one in problems if one.level == problem.level and one.answer.split()[-1] != problem.answer.split()[-1]
        ]
        found = {GOLD_CHAIN: problem.answer}
        for kind in KINDS:
            chain = with_error(problem.answer, kind, levels[problem.level - 1].largest, [one.answer for one in others], random_)
            found |= {} if chain is None else {kind: chain}
        fields = {"prompt": f"{problem.question}\n", "level": problem.level}
        records.append({**fields, "kinds": list(found), "candidates": list(found.values())})
    return records


def with_error(answer: str, kind: str, largest: int, others: Sequence[str], random_: Random) -> str | None:
    """Return a right chain with one error of a kind at a random line, or None if it can have none.

    No number falls below zero. The result has as many characters as the answer: a shorter text is likelier whatever its errors.
    largest: the largest number of the question's level. others: chains with other results.
    """
    if kind == OTHER:
        others = [one for one in others if len(one) == len(answer)]
        return random_.choice(others) if others else None
    lines = [_read(line) for line in answer.split("\n")[:-1]]
    right = lines[-1][3]
    for _ in range(TRIES):
        place = random_.randrange(len(lines))
        value, sign, number, result = lines[place]
        if kind == OPERAND:
            changed = _from(lines, place, value, sign, random_.randint(2, largest))
        elif kind == OPERATION:
            changed = _from(lines, place, value, "-" if sign == "+" else "+", number)
        else:
            stated = (value, sign, number, result + random_.choice((-3, -2, -1, 1, 2, 3)))
            rest = lines[place + 1 :] if kind == FALSE else _again(lines[place + 1 :], stated[3])
            changed = [*lines[:place], stated, *rest]
        text = _text(changed, right if kind == FALSE else changed[-1][3])
        is_possible = all(min(value, result) >= 0 for value, _, _, result in changed)
        if changed != lines and is_possible and len(text) == len(answer):
            return text
    return None


def _read(line: str) -> Calculation:
    found = STEP.fullmatch(line)
    assert found is not None
    return int(found[1]), found[2], int(found[3]), int(found[4])


def _text(lines: Sequence[Calculation], result: int) -> str:
    return "\n".join([*(f"{value}{sign}{number}={stated}" for value, sign, number, stated in lines), f"#### {result}"])


def _from(lines: Sequence[Calculation], place: int, value: int, sign: str, number: int) -> list[Calculation]:
    """Return the lines with another calculation at a place, and true sums from there on."""
    first = (value, sign, number, COMPUTE[sign](value, number))
    return [*lines[:place], first, *_again(lines[place + 1 :], first[3])]


def _again(lines: Sequence[Calculation], value: int) -> list[Calculation]:
    """Return the lines, computed again from another value."""
    found = []
    for _, sign, number, _ in lines:
        result = COMPUTE[sign](value, number)
        found.append((value, sign, number, result))
        value = result
    return found
