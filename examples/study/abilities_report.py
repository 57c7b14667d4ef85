"""What the report tells of part 3: sentences, tables and a picture, from `Abilities.results()`."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from losses import interval_over_seeds
from sections import Results, Rows, Section, interval, percent
from twins import DIRECTIONS

from megatron_ledom.reports import pages
from megatron_ledom.reports.curves import COLOURS

TITLE = "Reverse abilities"
CHANCE = 0.25
"""Of a choice of four."""
ASKED = {
    "question_from_answer": "question of a solution, written",
    "reversal": "fact, chosen",
    "reversal_written": "fact, written",
    "inverse_relations": "relation, chosen",
    "abduction": "cause, chosen",
    "label_backfill": "label, chosen",
}
GROUPS = {
    "in_text_order": "asked in text order",
    "against_text_order": "asked against text order",
    "both_orders": "trained in both orders",
    "unseen": "never trained",
    "known_world": "rules that were trained",
    "unseen_world": "rules never trained",
    "all": "all",
    "solvable": "can be solved",
    "has_answer": "has the answer, by whatever steps",
    "copied": "copy of a trained one (never right)",
}
MIXED = ("reversal", "reversal_written", "inverse_relations", "abduction")
"""Tasks of groups so different that a figure of all of them says nothing."""
PARTS = (("question_from_answer",), ("reversal", "reversal_written", "inverse_relations"), ("abduction", "label_backfill"))
"""One table each."""
DRAWN = ("in_text_order", "against_text_order", "both_orders", "unseen", "known_world", "unseen_world", "all")


@dataclass(frozen=True, slots=True)
class Claim:
    """An expected direction of effect: what is above what, by how much in each seed, and what may be the reason where it is not so.

    is_strict: the difference has to be surely above 0; else it must not be below."""

    text: str
    by_seed: list[float]
    reason: str
    is_strict: bool = True

    def failure(self) -> str | None:
        """What was found instead; None where it is as expected."""
        mean, between = statistics.mean(self.by_seed), interval_over_seeds(self.by_seed, -1.0, 1.0)
        if self.is_strict and between is not None and between[0] > 0:
            return None
        if not self.is_strict and mean >= 0:
            return None
        sure = "the interval holds 0"
        if between is None:
            sure = "one seed"
        elif between[1] < 0:
            sure = "surely below"
        return f"{self.text}: {100 * mean:+.1f} points, {sure}. {self.reason}"


def abilities_section(results: Results) -> Section:
    """Sentences, tables and the picture of part 3."""
    tables = [table for part in PARTS if len(table := _table(results, part)) > 1]
    told = [_about(results), *_told(results)]
    return Section(title=TITLE, told=told, tables=tables, plots=abilities_plots(results))


def abilities_claims(results: Results) -> Rows:
    """A row of the table of claims for each expected direction of effect; the paper shows these by examples, without plots."""
    rows = []
    for claim in _claims(results):
        between = interval(interval_over_seeds(claim.by_seed, -1.0, 1.0), 100, "+.1f")
        found = f"{100 * statistics.mean(claim.by_seed):+.1f} points ({between})"
        rows.append([claim.text, "examples alone", found, "as expected" if claim.failure() is None else "not surely so"])
    return rows


def abilities_not_reproduced(results: Results) -> list[str]:
    """A sentence for each expected direction of effect that is not there, and for what nobody could know but is known."""
    told = [failure for claim in _claims(results) if (failure := claim.failure()) is not None]
    for row in results["rows"]:
        if row["group"] not in ("unseen", "unseen_world") or row["task"] == "reversal_written":
            continue
        for direction in DIRECTIONS:
            if all(low > CHANCE for low, _ in row["within"][direction]):
                value = percent(row["means"][direction])
                told.append(
                    f"{_name(row)}: the {direction} model is above chance ({value} %) where nothing could be known:"
                    " look into this first."
                )
    return told


def abilities_plots(results: Results) -> list[str]:
    """Accuracy by group and direction, a dot for each seed."""
    rows = [row for row in results["rows"] if row["group"] in DRAWN and not _is_mixed(row)]
    size = (8.5, 0.8 + 0.45 * len(rows))
    return [
        pages.figure(
            "accuracy by what is asked and direction",
            lambda theme: pages.draw_png(theme, size, partial(_draw_bars, rows, theme)),
        )
    ]


def _draw_bars(rows: Sequence[dict[str, Any]], theme: str, axes: Any) -> None:
    """Draw a pair of bars for each row, the first row on top."""
    ink = pages.THEMES[theme]["ink"]
    for direction, shift in (("forward", -0.2), ("reverse", 0.2)):
        places = [number + shift for number in range(len(rows))]
        widths = [100 * row["means"][direction] for row in rows]
        axes.barh(places, widths, 0.38, color=COLOURS[theme][direction][0], alpha=0.75, label=direction)
        dots = [(100 * value, place) for row, place in zip(rows, places, strict=True) for value in row["values"][direction]]
        axes.scatter(*zip(*dots, strict=True), s=12, color=ink, zorder=3, label="each seed" if shift > 0 else None)
    choices = [number for number, row in enumerate(rows) if row["task"] in _CHOICES]
    for number in choices:
        label = "chance" if number == choices[0] else None
        axes.plot([100 * CHANCE] * 2, [number - 0.42, number + 0.42], color=ink, ls="--", lw=1.2, label=label)
    axes.set_yticks(range(len(rows)), [_name(row) for row in rows])
    axes.set(xlim=(0, 128), xticks=range(0, 101, 20), xlabel="right, %")  # the legend stands beside the longest bar
    axes.invert_yaxis()


_CHOICES = ("reversal", "inverse_relations", "abduction", "label_backfill")


def _about(results: Results) -> str:
    num, made = results["num_seeds"], results["num"]
    sizes = ", ".join(f"{count:,} of {name}" for name, count in made.items())
    seeds = "One seed" if num == 1 else f"{num} seeds"
    return (
        f"{seeds} of a {results['model']} model of each direction, every one reported. One corpus for all: made sets about invented names"
        f" ({sizes}), each repeated as often as it needs. Figures of a seed have the interval over its questions; the difference is"
        " reverse minus forward, its interval Student's t over seeds. The sets are the same for all seeds. Choices are of four, chance 25 %."
    )


def _told(results: Results) -> Iterator[str]:
    """A sentence for each question of this part."""
    question = _find(results, "question_from_answer", "all")
    if question is not None:
        copied, answered = (_find(results, "question_from_answer", kind) for kind in ("copied", "has_answer"))
        assert copied is not None
        assert answered is not None
        yield (
            f"Question synthesis: given a worked solution that stands in no trained text, the reverse model writes a question whose own"
            f" solution, step by step, is the given one in {percent(question['means']['reverse'])} % of the cases (the given answer by"
            f" whatever steps: {percent(answered['means']['reverse'])} %; copies of a trained question:"
            f" {percent(copied['means']['reverse'])} %). The forward model comes to {percent(question['means']['forward'])} %, asked"
            " zero-shot: it has never seen a solution in front of its question, so it shows that this order is not learnt by itself,"
            " not that a forward model could not learn it."
        )
    for task, way in (("reversal", "chosen of four"), ("reversal_written", "written")):
        own, other = (_find(results, task, group) for group in ("in_text_order", "against_text_order"))
        if own is not None and other is not None:
            yield (
                f"Reversal curse, {way}: facts trained in one order only are known to the forward model in"
                f" {percent(own['means']['forward'])} % of the cases asked in that order and in {percent(other['means']['forward'])} %"
                f" asked against it; to the reverse model in {percent(own['means']['reverse'])} % and"
                f" {percent(other['means']['reverse'])} %."
            )
    cause, label = _find(results, "abduction", "known_world"), _find(results, "label_backfill", "all")
    parts = [
        f"{name}: reverse {percent(row['means']['reverse'])} %, forward {percent(row['means']['forward'])} %"
        for name, row in (("the cause of two outcomes in a known world", cause), ("the label in front of a text", label))
        if row is not None
    ]
    if parts:
        yield (
            f"Working backward: {'; '.join(parts)}. A forward model chooses by how likely what follows is behind each choice, so neither"
            " task is closed to it."
        )


def _claims(results: Results) -> Iterator[Claim]:
    """What the paper's examples make one expect."""
    for task, way in (("reversal", "chosen"), ("reversal_written", "written")):
        own, other = (_find(results, task, group) for group in ("in_text_order", "against_text_order"))
        if own is None or other is None:
            continue
        for direction, first, second, order in (
            ("reverse", other, own, "against text order than in it"),
            ("forward", own, other, "in text order than against it"),
        ):
            by_seed = [a - b for a, b in zip(first["values"][direction], second["values"][direction], strict=True)]
            yield Claim(
                f"Facts, {way}: the {direction} model is right more often {order}",
                by_seed,
                "Few facts and few seeds, and what was read too seldom is not learnt.",
            )
    kinds = (
        (
            "question_from_answer",
            "all",
            "A question for a given solution: reverse is right more often than forward",
            _UNLEARNT,
            True,
        ),
        (
            "abduction",
            "known_world",
            "The cause of outcomes in a known world: reverse is at least as good as forward",
            _PLACE_LAST,
            False,
        ),
        ("label_backfill", "all", "The label of a text: reverse is at least as good as forward", _LABEL, False),
    )
    for task, group, text, reason, is_strict in kinds:
        row = _find(results, task, group)
        if row is not None:
            by_seed = [r - f for r, f in zip(row["values"]["reverse"], row["values"]["forward"], strict=True)]
            yield Claim(text, by_seed, reason, is_strict)


_UNLEARNT = "To copy every number of a solution into its question takes more training than this."
_PLACE_LAST = (
    "A forward model is given place and cause, and outcomes follow from these; a reverse model reads the place last and has to tell"
    " cause and place together from outcomes that all worlds share."
)
_LABEL = "A forward model tells a label by the words that follow it, which is as good a way."


def _table(results: Results, tasks: Sequence[str]) -> Rows:
    rows = [
        [
            "asked",
            "questions",
            "forward %",
            "forward, each seed",
            "reverse %",
            "reverse, each seed",
            "difference",
            "95 % interval",
        ]
    ]
    for row in results["rows"]:
        if row["task"] not in tasks or _is_mixed(row):
            continue
        cells = [_name(row), str(row["num_items"])]
        for direction in ("forward", "reverse"):
            seeds = zip(row["values"][direction], row["within"][direction], strict=True)
            each = "; ".join(f"{percent(value)} ({percent(low)} to {percent(high)})" for value, (low, high) in seeds)
            cells += [percent(row["means"][direction]), each]
        rows.append([*cells, f"{100 * row['difference']:+.1f}", interval(row["interval"], 100, "+.1f")])
    return rows


def _is_mixed(row: dict[str, Any]) -> bool:
    return row["group"] == "all" and row["task"] in MIXED


def _name(row: dict[str, Any]) -> str:
    return f"{ASKED[row['task']]}: {GROUPS.get(row['group'], row['group'].replace('_', ' '))}"


def _find(results: Results, task: str, group: str) -> dict[str, Any] | None:
    """The row of a group; None where the set was not made."""
    return next((row for row in results["rows"] if (row["task"], row["group"]) == (task, group)), None)
