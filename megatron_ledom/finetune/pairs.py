"""Pairs of a prompt and an answer as ids: rendered, encoded once as one text and cut by the very function that the scorer uses."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_ledom.data.readers.corpus import TextTemplate
from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError
from megatron_ledom.inference.joint_tokenizer import JointTokenizer
from megatron_ledom.inference.scoring import span_tokens


@dataclass(frozen=True, slots=True)
class Pair:
    """prompt, answer: the two parts of a text, in text order, the separator at the end of the prompt. line: in the file, from 1."""

    prompt: str
    answer: str
    line: int


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """tokens: the joint text in model order, eod last. num_given: how many come first and are not scored."""

    tokens: list[int]
    num_given: int

    def cut_to(self, length: int) -> "EncodedPair | None":
        """With the beginning of its given part left off, which is farthest from the scored part; None where that is not enough."""
        surplus = max(0, len(self.tokens) - length)
        return EncodedPair(self.tokens[surplus:], self.num_given - surplus) if surplus < self.num_given else None


class PairReader:
    """Reads JSON lines and renders two templates, in which `{key}` stands for the text of that key of a line."""

    def __init__(self, prompt_template: str, answer_template: str) -> None:
        given = {"prompt": prompt_template, "answer": answer_template}
        self.templates = {name: TextTemplate(template, f"--{name}-template") for name, template in given.items()}

    def read(self, lines: Iterable[bytes], where: str) -> Iterator[Pair]:
        """Every line as a pair. Raises DataError that names the line."""
        for line, content in enumerate(lines, 1):
            try:
                record = json.loads(content)
            except ValueError as error:
                raise DataError(f"{where}:{line} is not JSON ({error}); repair it") from error
            if not isinstance(record, dict):
                raise DataError(f'{where}:{line} holds no object; expected one such as {{"question": ..., "answer": ...}}')
            texts = {name: self._render(template, record, f"{where}:{line}") for name, template in self.templates.items()}
            yield Pair(**texts, line=line)

    def _render(self, template: TextTemplate, record: dict[str, Any], where: str) -> str:
        def text_of(key: str) -> str:
            """The text at a key."""
            if isinstance(value := record.get(key), str):  # a number or a list would be rendered in Python's way
                return value
            known = ", ".join(record) or "none"
            raise DataError(f"{where} has no text {key!r}, which {template.template!r} asks for; its keys: {known}")

        return template.render(text_of)


def encode_pair(tokenizer: JointTokenizer, direction: Direction, pair: Pair, eod_id: int) -> EncodedPair | None:
    """The ids that a scorer of `direction` sees of the pair, closed by eod; None where nothing is given or nothing to score."""
    given = pair.answer if direction is Direction.REVERSE else pair.prompt
    if not given:
        return None
    tokens, num_given = span_tokens(tokenizer, direction, (pair.prompt, pair.answer), [], [eod_id])
    return EncodedPair([*tokens, eod_id], num_given) if num_given < len(tokens) else None
