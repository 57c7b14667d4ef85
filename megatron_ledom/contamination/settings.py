"""Settings of a search for evaluation items: the definition of a contaminated document, and the action for one."""

from dataclasses import dataclass
from typing import Literal

from megatron_ledom.errors import UsageError

Match = Literal["either", "question", "answer", "both", "any"]
Action = Literal["report", "drop", "cut"]
QUESTION, ANSWER, CHOICE, BOTH = "question", "answer", "choice", "both"
SEARCHED: dict[Match, tuple[str, ...]] = {
    "either": (QUESTION, ANSWER),
    "question": (QUESTION,),
    "answer": (ANSWER,),
    "both": (QUESTION, ANSWER),
    "any": (QUESTION, ANSWER, CHOICE),
}
"""Parts of an item that are searched for each way to match."""
MOST_NGRAM_WORDS = 64


@dataclass(kw_only=True, slots=True)
class SearchSettings:
    """Definition of a contaminated document, and the action for one."""

    action: Action = "drop"
    match: Match = "either"
    """A document is contaminated by an item if it has its question or answer, the question, the answer, both, or any part of it."""
    ngram: int = 8
    """Words that must be equal in a row."""
    min_words: int = 8
    """A shorter part is not searched: it occurs by chance. A part shorter than `ngram` must occur as a whole."""
    threshold: float = 0.5
    """Share of the words of a part that a passage must have."""
    telling_words: int = 4
    """Different words of two letters or more that a passage must have: rows of numbers and formulas of single letters occur by chance."""
    ignore_numbers: bool = False
    """Numbers are equal to each other, so that a copy with changed numbers is found."""

    def check(self) -> None:
        """Raise UsageError for values that make no sense."""
        if not 1 <= self.ngram <= MOST_NGRAM_WORDS:
            raise UsageError(f"--ngram {self.ngram} must be 1 to {MOST_NGRAM_WORDS} words; the literature uses 8 to 13")
        if not 1 <= self.min_words <= self.ngram:
            raise UsageError(f"--min-words {self.min_words} must be 1 to --ngram ({self.ngram})")
        if not 0 < self.threshold <= 1:
            raise UsageError(f"--threshold {self.threshold} must be above 0 and at most 1, a share of the words of an item")
