"""The section of part 3 in the report: paragraphs, tables and a plot of `Abilities.results()`."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from families import side_of, t_family
from losses import interval_over_seeds
from sections import Results, Rows, Section, interval, percent
from twins import DIRECTIONS

from megatron_ledom.reports import pages
from megatron_ledom.reports.curves import COLOURS

TITLE = "Reverse abilities"
CHANCE = 0.25
"""Accuracy of a random choice of four."""
QUESTIONS = {
    "question_from_answer": "question for a solution, written",
    "reversal": "fact, chosen",
    "reversal_written": "fact, written",
    "inverse_relations": "relation, chosen",
    "abduction": "cause, chosen",
    "label_backfill": "label, chosen",
}
GROUPS = {
    "in_text_order": "tested in text order",
    "against_text_order": "tested against text order",
    "both_orders": "trained in both orders",
    "unseen": "never trained",
    "known_world": "trained rules",
    "unseen_world": "rules that were never trained",
    "all": "all",
    "solvable": "can be solved",
    "has_answer": "has the answer, by any steps",
    "copied": "copy of a trained question (never right)",
}
MIXED = ("reversal", "reversal_written", "inverse_relations", "abduction")
"""Tasks whose groups differ so much that their joint accuracy is meaningless."""
PARTS = (("question_from_answer",), ("reversal", "reversal_written", "inverse_relations"), ("abduction", "label_backfill"))
"""The tasks of each table."""
DRAWN = ("in_text_order", "against_text_order", "both_orders", "unseen", "known_world", "unseen_world", "all")


@dataclass(frozen=True, slots=True)
class Claim:
    """An expected effect: a difference that should be above 0.

    by_seed: the difference in each seed; reason: the likely reason if it is not found. is_strict: the difference must
    be significantly above 0; otherwise it must not be below 0.
    """

    text: str
    by_seed: list[float]
    reason: str
    is_strict: bool = True

    def failure(self, tested: dict[str, Any]) -> str | None:
        """Return a sentence about the result if it is not as expected, else None. tested: the row of its family."""
        mean, side = statistics.mean(self.by_seed), side_of(tested, "mean")
        if side > 0 if self.is_strict else mean >= 0:
            return None
        between = interval_over_seeds(self.by_seed, -1.0, 1.0)
        sure = "the interval contains 0"
        if between is None:
            sure = "one seed"
        elif side < 0:
            sure = "significantly below"
        elif not between[0] <= 0 <= between[1]:
            sure = "not significant after the correction"
        return f"{self.text}: {100 * mean:+.1f} points, {sure}. {self.reason}"


def abilities_section(results: Results) -> Section:
    """Return the section of part 3."""
    tables = [table for part in PARTS if len(table := _table(results, part)) > 1]
    paragraphs = [_about(results), *_sentences(results)]
    return Section(title=TITLE, paragraphs=paragraphs, tables=tables, plots=abilities_plots(results))


def abilities_claims(results: Results) -> Rows:
    """Return a row of the table of claims for each expected effect.

    The paper gives examples only, no numbers.
    """
    rows = []
    for claim, tested in _tested(results):
        between = interval(interval_over_seeds(claim.by_seed, -1.0, 1.0), 100, "+.1f")
        found = f"{100 * statistics.mean(claim.by_seed):+.1f} points ({between})"
        rows.append([claim.text, "examples only", found, "as expected" if claim.failure(tested) is None else "not significant"])
    return rows


def abilities_not_reproduced(results: Results) -> list[str]:
    """Return a sentence for each expected effect that is not found, and for untrained facts above chance."""
    failed = [failure for claim, tested in _tested(results) if (failure := claim.failure(tested)) is not None]
    for row in results["rows"]:
        if row["group"] not in ("unseen", "unseen_world") or row["task"] == "reversal_written":
            continue
        for direction in DIRECTIONS:
            if all(low > CHANCE for low, _ in row["within"][direction]):
                value = percent(row["means"][direction])
                failed.append(
                    f"{_name(row)}: the {direction} model is above chance ({value} %) on facts that were never trained:"
                    " check this first."
                )
    return failed


def abilities_plots(results: Results) -> list[str]:
    """Return the plot of accuracy by group and direction, with a dot for each seed."""
    rows = [row for row in results["rows"] if row["group"] in DRAWN and not _is_mixed(row)]
    size = (8.5, 0.8 + 0.45 * len(rows))
    return [
        pages.figure(
            "accuracy by question and direction",
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
    axes.set(xlim=(0, 128), xticks=range(0, 101, 20), xlabel="right, %")  # room for the legend after the longest bar
    axes.invert_yaxis()


_CHOICES = ("reversal", "inverse_relations", "abduction", "label_backfill")


def _about(results: Results) -> str:
    num, set_sizes = results["num_seeds"], results["num"]
    sizes = ", ".join(f"{count:,} of {name}" for name, count in set_sizes.items())
    seeds = "One seed" if num == 1 else f"{num} seeds"
    return (
        f"{seeds} of a {results['model']} model of each direction, all reported. One corpus for all: synthetic sets about invented names"
        f" ({sizes}), each repeated until it can be learned. The result of a seed has its interval over questions. The difference is"
        " reverse minus forward, with Student's t interval over seeds. * after an interval: different from 0 after"
        " Holm's correction over all rows. All seeds use the same sets. Choices are of four, chance 25 %."
    )


def _sentences(results: Results) -> Iterator[str]:
    """Yield a paragraph for each kind of question."""
    question = _find(results, "question_from_answer", "all")
    if question is not None:
        copied, answered = (_find(results, "question_from_answer", kind) for kind in ("copied", "has_answer"))
        assert copied is not None
        assert answered is not None
        yield (
            "Question synthesis: given a worked solution that is in no trained text, the reverse model writes a question with exactly this"
            f" solution, step by step, in {percent(question['means']['reverse'])} % of the cases (the same answer by any steps:"
            f" {percent(answered['means']['reverse'])} %; copies of a trained question: {percent(copied['means']['reverse'])} %). The"
            f" forward model reaches {percent(question['means']['forward'])} % zero-shot. It has never seen a solution before its question,"
            " so this shows that the order is not learned without such texts, not that a forward model cannot learn it."
        )
    for task, way in (("reversal", "chosen of four"), ("reversal_written", "written")):
        own, other = (_find(results, task, group) for group in ("in_text_order", "against_text_order"))
        if own is not None and other is not None:
            yield (
                f"Reversal curse, {way}: for facts trained in one order only, the forward model is right in"
                f" {percent(own['means']['forward'])} % of the questions in that order and in {percent(other['means']['forward'])} % of those"
                f" against it, the reverse model in {percent(own['means']['reverse'])} % and {percent(other['means']['reverse'])} %."
            )
    cause, label = _find(results, "abduction", "known_world"), _find(results, "label_backfill", "all")
    parts = [
        f"{name}: reverse {percent(row['means']['reverse'])} %, forward {percent(row['means']['forward'])} %"
        for name, row in (("the cause of two outcomes in a known world", cause), ("the label before a text", label))
        if row is not None
    ]
    if parts:
        yield (
            f"Working backward: {'; '.join(parts)}. A forward model chooses by the likelihood of the text after each choice, so it can"
            " solve both tasks too."
        )


def _tested(results: Results) -> list[tuple[Claim, dict[str, Any]]]:
    """Return the claims with the rows of their family, whose p-values are corrected together."""
    found = list(_claims(results))
    return list(zip(found, t_family({claim.text: claim.by_seed for claim in found}).values(), strict=True))


def _claims(results: Results) -> Iterator[Claim]:
    """Yield the effects that the paper's examples suggest."""
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
                "There are few facts and few seeds, and facts that are read too rarely are not learned.",
            )
    kinds = (
        (
            "question_from_answer",
            "all",
            "A question for a given solution: reverse is right more often than forward",
            _UNLEARNED,
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


_UNLEARNED = "Copying every number of a solution into its question takes more training than this."
_PLACE_LAST = (
    "A forward model reads the place and the cause first, and they determine the outcomes. A reverse model reads the place last and must"
    " infer the cause and the place from outcomes that all worlds share."
)
_LABEL = "A forward model chooses the label by the likelihood of the words after it, which works as well."


def _table(results: Results, tasks: Sequence[str]) -> Rows:
    rows = [
        [
            "question",
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
        rows.append(
            [
                *cells,
                f"{100 * row['difference']:+.1f}",
                f"{interval(row['interval'], 100, '+.1f')}{' *' * row['is_significant']}",
            ]
        )
    return rows


def _is_mixed(row: dict[str, Any]) -> bool:
    return row["group"] == "all" and row["task"] in MIXED


def _name(row: dict[str, Any]) -> str:
    return f"{QUESTIONS[row['task']]}: {GROUPS.get(row['group'], row['group'].replace('_', ' '))}"


def _find(results: Results, task: str, group: str) -> dict[str, Any] | None:
    """Return the row of a group, or None if the set was not generated."""
    return next((row for row in results["rows"] if (row["task"], row["group"]) == (task, group)), None)
