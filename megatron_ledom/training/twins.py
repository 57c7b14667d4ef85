"""A reverse run beside a forward run: their difference at the same training tokens, and what of it can be said."""

import math
import statistics
from collections.abc import Sequence

from megatron_ledom.training.run_report import RunData

FEWEST = 20
"""Training records at the same tokens from which on their difference has an interval."""
BLOCKS = 10
"""Parts of the last records whose means are taken to be independent, unlike the records themselves."""
T_95 = 2.262
"""Student's t for 95 % of BLOCKS - 1 degrees of freedom."""
LAST_VALIDATIONS = 5
FEWEST_VALIDATIONS = 3
NO_BASE = (
    "The forward run has a loss of 0, of which no loss is a percentage; the twins' losses are not compared. See its records."
)
Series = tuple[list[float], list[float]]


def twins_of(runs: Sequence[RunData]) -> tuple[RunData, RunData] | None:
    """Return the first reverse and the first forward run; None without both."""
    first = {run.direction: run for run in reversed(runs)}
    return (first["reverse"], first["forward"]) if {"reverse", "forward"} <= set(first) else None


def training_pairs(reverse: RunData, forward: RunData) -> dict[float, tuple[float, float]]:
    """Return training tokens: reverse and forward loss, where both have a finite record."""
    return _at_same_tokens(reverse.points("lm_loss"), forward.points("lm_loss"))


def validation_pairs(reverse: RunData, forward: RunData) -> dict[str, dict[float, tuple[float, float]]]:
    """Return, for each validation set that both have, training tokens: both losses; of two single sets with other names, for those."""
    ours, theirs = reverse.validations(), forward.validations()
    names = {name: (name, name) for name in ours if name in theirs}
    if not names and len(ours) == len(theirs) == 1:
        names = {f"{one} and {other}": (one, other) for one, other in zip(ours, theirs, strict=True)}
    found = {name: _at_same_tokens(ours[one], theirs[other]) for name, (one, other) in names.items()}
    return {name: pairs for name, pairs in found.items() if pairs}


def twin_sentence(runs: Sequence[RunData]) -> str:
    """Return how far the first reverse run ends from the first forward run, by validation where both have it; empty without both.

    A side is named only where the difference is sure: with the same sign in every one of the last validations of every set, or,
    without validation, with 0 outside an interval of the training losses.
    """
    twins = twins_of(runs)
    if twins is None:
        return ""
    validated = validation_pairs(*twins)
    if validated:
        return _by_validation(validated)
    if any(run.validations() for run in twins):
        return "The twins have no validation of the same set at the same training tokens; their losses are not compared."
    return _by_training(*twins)


def _by_validation(sets: dict[str, dict[float, tuple[float, float]]]) -> str:
    common = sorted(set.intersection(*map(set, sets.values())))
    if not common:
        return "The twins' validation sets were not measured at the same training tokens; their losses are not compared."
    last = common[-LAST_VALIDATIONS:]
    reverse, forward = (statistics.mean(pairs[last[-1]][side] for pairs in sets.values()) for side in (0, 1))
    if any(pairs[tokens][1] <= 0 for pairs in sets.values() for tokens in last):
        return NO_BASE
    every = [[pairs[tokens][0] / pairs[tokens][1] - 1 for pairs in sets.values()] for tokens in last]
    means = [statistics.mean(row) for row in every]
    name = f"mean of {len(sets)} sets" if len(sets) > 1 else next(iter(sets))
    start = (
        f"On validation ({name}, after {last[-1]:,.0f} tokens) the reverse run is at {reverse:.4f} nats a token, the forward run at"
        f" {forward:.4f}"
    )
    if len(last) < FEWEST_VALIDATIONS:
        return f"{start}; {len(last)} common validation(s) give no interval, so neither is called lower (tools/compare_losses.py gives one)."
    over = f"{100 * min(means):+.2f} % to {100 * max(means):+.2f} % over the last {len(last)} validations"
    if min(map(min, every)) <= 0 <= max(map(max, every)):
        return f"{start}; the difference changes its sign between sets or validations ({over}), so neither is called lower."
    side = "above" if reverse > forward else "below"
    return f"{start}: {abs(reverse / forward - 1):.2%} {side} the forward run ({over})."


def _by_training(reverse: RunData, forward: RunData) -> str:
    """Of the second half of the records at the same tokens, in blocks: neighbouring records are alike."""
    pairs = [*training_pairs(reverse, forward).values()]
    if len(pairs) < FEWEST:
        return (
            f"The twins have no common validation and {len(pairs)} training records at the same tokens; from {FEWEST} on their difference"
            " has an interval. Neither is called lower."
        )
    size = len(pairs) // 2 // BLOCKS
    last = pairs[-size * BLOCKS :]
    blocks = [statistics.mean(one - other for one, other in last[size * i : size * (i + 1)]) for i in range(BLOCKS)]
    base = statistics.mean(other for _, other in last) / 100
    if base <= 0:
        return NO_BASE
    middle, half = statistics.mean(blocks) / base, T_95 * statistics.stdev(blocks) / math.sqrt(BLOCKS) / base
    told = f"{middle:+.2f} %, 95 % interval {middle - half:+.2f} to {middle + half:+.2f} %"
    start = f"No common validation. Over the last {len(last)} training records at the same tokens the reverse run is"
    if abs(middle) <= half:
        return f"{start} not surely different from the forward run ({told}), so neither is called lower."
    return f"{start} {'above' if middle > 0 else 'below'} the forward run ({told}; training loss, one run of each)."


def _at_same_tokens(one: Series, other: Series) -> dict[float, tuple[float, float]]:
    theirs = dict(zip(*other, strict=True))
    return {tokens: (value, theirs[tokens]) for tokens, value in zip(*one, strict=True) if tokens in theirs}
