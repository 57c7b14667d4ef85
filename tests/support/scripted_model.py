"""A model that writes texts given by a test."""

from megatron_ledom.direction import Direction
from megatron_ledom.inference.scoring import SpanScore


class Scripted:
    """A model that writes given texts."""

    def __init__(self, direction: Direction, *texts: str) -> None:
        self.direction, self._texts = direction, list(texts)
        self.given: list[str] = []

    def write(self, given: list[str], *, max_new_tokens: int, stop_strings: list[str]) -> list[str]:
        self.given += given
        return self._texts[: len(given)]

    def score(self, pairs: list[tuple[str, str]]) -> list[SpanScore]:
        raise AssertionError("nothing is scored")
