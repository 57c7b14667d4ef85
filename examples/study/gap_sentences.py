"""Sentences about part 8: what its controls say, and what then follows about the published gap."""

from collections.abc import Iterator

from loss_gap import CHAIN, NEGLIGIBLE, PRIMES, PUBLISHED, SEEN
from sections import Results, interval

PAPER = "Papadopoulos et al. (arXiv 2401.17505)"


def gap_sentences(results: Results | None) -> Iterator[str]:
    """Yield the sentences. A part that was not run, or that has one seed, gets a single one."""
    if results is None:
        yield "Loss gap with controls: not run in this report (`--parts loss_gap`)."
        return
    if len(results["seeds"]) < 2:
        yield "Loss gap with controls: one seed, so there are no intervals and nothing is decided."
        return
    yield _positive(results["controls"][PRIMES], results["controls"][SEEN])
    yield _negative(results["controls"][CHAIN])
    yield _published(results)
    yield _growth(results["growth"])


def appears(row: Results) -> bool:
    """Return True if the positive control has a gap that is significantly above 0."""
    return bool(row["is_significant"] and row["mean"] > 0)


def _positive(row: Results, seen: Results) -> str:
    text = f"Positive control of the loss gap, products of primes: {_gap(row)}."
    if appears(row):
        return (
            f"{text} The gap appears with its sign: this set-up can show a large one. On pairs that were trained on it is {_gap(seen)}. The form"
            " of the lines was chosen after trials with other pairs of primes (docs/study.md)."
        )
    return f"{text} It should be above 0 and is not significantly so: at this size the set-up shows no gap even where there is one."


def _negative(row: Results) -> str:
    text = f"Negative control, a reversible Markov chain: {_gap(row)}."
    if row["is_equivalent"]:
        return f"{text} It is 0 within {NEGLIGIBLE} %, as it must be."
    if row["is_significant"]:
        return f"{text} It should be 0: check this first."
    return f"{text} That it is within {NEGLIGIBLE} % is not shown with so few seeds."


def _published(results: Results) -> str:
    cells = results["cells"]
    below, above = ([n for n, row in cells.items() if _excluded(row) == side] for side in ("below", "above"))
    equal = [name for name, row in cells.items() if row["is_equivalent"]]
    widths = [(row["interval"][1] - row["interval"][0]) / 2 for row in cells.values()]
    text = (
        f"The published gap, {PUBLISHED[0]:+} to {PUBLISHED[1]:+} % (arXiv 2502.18435): of {len(cells)} cells (text, size, context) the"
        f" 95 % interval, not corrected for their number, of {len(below)} lies below it, of {len(above)} above it; the others do not decide."
        f" Smaller than {PUBLISHED[0]} % either way (two one-sided tests, Holm): {len(equal)} of {len(cells)}."
        f" The intervals reach {min(widths):.2f} to {max(widths):.2f} % to each side: smaller gaps are not seen."
    )
    if not appears(results["controls"][PRIMES]):
        text += " As the positive control failed, this says nothing about larger models."
    return text


def _excluded(row: Results) -> str | None:
    """Return the side of the published gap on which an interval lies, None if it does not exclude it."""
    low, high = row["interval"]
    return "below" if high < PUBLISHED[0] else "above" if low > PUBLISHED[1] else None


def _growth(growth: Results) -> str:
    """Return whether the gap grows with context and size."""
    rows = {name: row for name, row in growth.items() if row["is_significant"]}
    start = f"{PAPER} report that the gap grows with context and size."
    if not growth:
        return f"{start} This size has one context and one model, so it cannot say."
    if not rows:
        return f"{start} None of {len(growth)} changes is significant here (Holm)."
    found = "; ".join(f"{name}: {row['mean']:+.2f} ({interval(row['interval'])})" for name, row in rows.items())
    return f"{start} Of {len(growth)} changes these are significant here (Holm), in percentage points: {found}."


def _gap(row: Results) -> str:
    return f"{row['mean']:+.2f} % ({interval(row['interval'])})"
