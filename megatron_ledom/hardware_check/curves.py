"""Compare the losses and gradient norms of two training runs, step by step."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ledom.errors import VerificationError

Record = dict[str, Any]
"""A line of metrics.jsonl."""
SMALLEST = 1e-30
"""Smallest number that a difference is divided by."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Largest relative difference of two runs over all steps. NaN is larger than any tolerance."""

    loss: float
    grad_norm: float

    def numbers(self) -> dict[str, float]:
        """Return the values for the report."""
        return {"loss_difference": self.loss, "grad_norm_difference": self.grad_norm}

    def exceeds(self, tolerance: "Difference") -> bool:
        """Return True if a value is above its tolerance, or is no number."""
        return not (self.loss <= tolerance.loss and self.grad_norm <= tolerance.grad_norm)

    def sentence(self, tolerance: "Difference") -> str:
        """Return both values and their tolerances in words."""
        return (
            f"losses differ by {self.loss:.1e} (tolerance {tolerance.loss:.0e}), gradient norms by {self.grad_norm:.1e}"
            f" ({tolerance.grad_norm:.0e})"
        )


def compare(found: Sequence[Record], expected: Sequence[Record]) -> Difference:
    """Return the largest relative differences. Raises VerificationError if the runs do not have the same steps."""
    steps, wanted = [record["iteration"] for record in found], [record["iteration"] for record in expected]
    if steps != wanted or not steps:
        raise VerificationError(f"the run has records of the iterations {steps}, expected {wanted}; look into its log")
    return Difference(*(_largest(found, expected, key) for key in ("lm_loss", "grad_norm")))


def _largest(found: Sequence[Record], expected: Sequence[Record], key: str) -> float:
    pairs = [(float(one[key]), float(other[key])) for one, other in zip(found, expected, strict=True)]
    differences = [abs(one - other) / max(abs(other), SMALLEST) for one, other in pairs]
    return largest_number(differences)


def largest_number(values: Iterable[float]) -> float:
    """Return the largest value; NaN counts as larger than every number."""
    return max(values, key=lambda value: (math.isnan(value), value))


def compare_each(
    found: Mapping[str, Sequence[Record]], expected: Sequence[Record], tolerance: Difference
) -> tuple[dict[str, Difference], list[str]]:
    """Return the difference of each run by name, and a sentence for each that is above the tolerance."""
    differences = {name: compare(records, expected) for name, records in found.items()}
    problems = [f"{name}: {one.sentence(tolerance)}" for name, one in differences.items() if one.exceeds(tolerance)]
    return differences, problems


def largest(differences: Iterable[Difference]) -> Difference:
    """Return the largest loss difference and the largest gradient norm difference of several runs."""
    found = list(differences)
    return Difference(largest_number(one.loss for one in found), largest_number(one.grad_norm for one in found))


def numbers_of(differences: Mapping[str, Difference]) -> dict[str, dict[str, float]]:
    """Return the values of each run for the report."""
    return {name: one.numbers() for name, one in differences.items()}
