"""Word problems written by people: GSM8K's training part, and reasoning-gym's variations of a hundred problems.

Both have worked solutions that end in `#### N`. A calculator checks every solution. A solution with a wrong equation,
or without one that it can read, is skipped and counted. GSM8K's test part is not read. But the problems that
reasoning-gym varies come from it (GSM-Symbolic, arXiv 2410.05229), so never evaluate these models on that part.
"""

import ast
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.evaluation.tasks.loading import read_rows

NUMBER = r"\d*\.?\d+"
EQUATION = re.compile(rf"([\d.+\-*/()% ]*[\d)%]) *= *({NUMBER})(?![\d.]* *[-+*/%=])")
"""A calculation before an equals sign, and the number after it, if no further calculation follows."""
ANNOTATION = re.compile(r"<<([^<>=]*)=([^<>]*)>>")
"""GSM8K's notes for a calculator. They are checked like any equation, then removed from the text."""
UNIT = re.compile(r"(?<=\d) [a-zA-Z]+(?:[ /][a-zA-Z]+)?(?= *[-+*/=])")
"""Words between a number and an operator, as in 3 red pens + 4 red pens = 7."""
ANSWER = re.compile(r"^#### (-?[\d,.]*\d)\s*\Z", re.MULTILINE)
SYMBOLS = str.maketrans({"×": "*", "÷": "/", "$": None, "€": None, "£": None, ",": None})
REQUEST = " Give the result as your final answer. Do not include units."
"""The end of every question of reasoning-gym, which is removed."""
COMPUTE: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@dataclass(frozen=True, slots=True)
class Source:
    """Problems of one source with correct solutions, and the number of problems that the calculator rejected."""

    problems: list[dict[str, str]] = field(default_factory=list)
    num_refused: int = 0


def gsm8k(path: Path) -> Source:
    """Return the problems of a file of GSM8K: JSON lines or Parquet, with the fields question and answer."""
    pairs = []
    for where, row in read_rows(path):
        if not all(isinstance(row.get(name), str) for name in ("question", "answer")):
            found = ", ".join(row) or "none"
            raise DataError(f"{where} has no text under question and answer; found the keys {found}; give GSM8K's train file")
        pairs.append((row["question"], row["answer"]))
    return _checked("gsm8k", pairs)


def gsm_symbolic(num: int, seed: int) -> Source:
    """Draw `num` random problems of reasoning-gym, and return those that are neither duplicates nor rejected."""
    generator_version()
    from reasoning_gym import create_dataset

    rows = create_dataset("gsm_symbolic", size=num, seed=seed)
    return _checked("gsm_symbolic", [(row["question"].removesuffix(REQUEST), row["metadata"]["answer_cot"]) for row in rows])


def generator_version() -> str:
    """Return the version of reasoning-gym, which determines the problems. Raises UsageError if it is not installed."""
    try:
        return version("reasoning-gym")
    except PackageNotFoundError as error:
        raise UsageError("word problems need reasoning-gym; run pip install 'megatron-ledom[study]'") from error


def _checked(domain: str, pairs: list[tuple[str, str]]) -> Source:
    kept = dict(reversed(pairs))  # the first of equal questions
    problems = []
    for question, answer in reversed(kept.items()):
        if is_true_chain(answer):
            problems.append({"text": f"{question}\n{ANNOTATION.sub('', answer)}", "domain": domain})
    return Source(problems, len(kept) - len(problems))


def is_true_chain(answer: str) -> bool:
    """Return True if a solution ends in `#### N` and has equations that the calculator can read, all of them correct.

    A calculation with words in it is not read. A result with decimals may differ by one in its last decimal, a whole
    one may not.
    """
    if not ANSWER.search(answer):
        return False
    plain = ANNOTATION.sub("", answer).translate(SYMBOLS)
    plain = re.sub(r"(?<=[\d)]) ?x ?(?=[\d(])", "*", plain)
    plain = UNIT.sub("", plain)
    noted = ANNOTATION.findall(answer.translate(SYMBOLS))
    read = [found for found in EQUATION.findall(plain) if _is_whole(found[0])]
    return bool(noted or read) and all(_is_true(*equation) for equation in noted + read)


def _is_whole(expression: str) -> bool:
    """Return True for a complete calculation: it begins with a number or a bracket, and all brackets are closed."""
    plain = expression.strip()
    is_closed = plain.count("(") == plain.count(")")
    return plain[0] not in "+-*/)%." and is_closed and re.search(r"[\d)%] *[-+*/]", plain) is not None


def _is_true(expression: str, stated: str) -> bool:
    try:
        value, claimed = calculate(expression), float(stated)
    except (ArithmeticError, SyntaxError, ValueError):
        return False
    decimals = len(stated.strip().partition(".")[2].rstrip("0"))
    return abs(value - claimed) <= (10.0**-decimals if decimals else 1e-6)


def calculate(expression: str) -> float:
    """Return the value of numbers with + - * / and brackets; 20% is 0.2.

    Raises ValueError, SyntaxError or ArithmeticError.
    """
    plain = re.sub(rf"({NUMBER})\s*%", r"(\1/100)", expression.strip())
    plain = re.sub(r"(?<![\d.])0+(?=\d)", "", plain)  # Python reads no leading zeros
    return _value(ast.parse(plain, mode="eval").body)


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in COMPUTE:
        return COMPUTE[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError(f"not a calculation: {ast.unparse(node)}")
