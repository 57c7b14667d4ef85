"""The weight at which files were ranked beside the lambda that a report chose: two rankings, and neither may pass for the other."""

from collections.abc import Sequence
from typing import Any

MAIN = "Reverse Reward"


def weight_note(report: dict[str, Any], ranked_at: Sequence[float | None]) -> str:
    """Return how often the files' own rankings are right, and at which lambdas the report's figure for Reverse Reward stands.

    ranked_at: the weight of each file, None where it is not recorded; at least one is.
    """
    chosen = sorted({value for row in report["held_out"]["lambdas"] for value in row})
    held_out = f"{', '.join(f'{value:.2f}' for value in chosen)} ({100 * report['methods'][MAIN]['accuracy']:.1f} % right)"
    weights = sorted({weight for weight in ranked_at if weight is not None})
    own = ", ".join(_at(weight, report["over_lambda"]) for weight in weights)
    return (
        f"Note: The files were ranked at weight {own}; {MAIN} in this report stands at the lambda chosen on held-out questions,"
        f" {held_out}. To use that one, rank again with --weight."
    )


def _at(weight: float, over_lambda: list[list[float]]) -> str:
    nearest, accuracy = min(over_lambda, key=lambda point: abs(point[0] - weight))
    said = "" if abs(nearest - weight) < 1e-9 else f" at {nearest:.2f}, the nearest that was tried"
    return f"{weight:g} ({100 * accuracy:.1f} % right{said})"
