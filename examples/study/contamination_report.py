"""The section of part 6 in the report: paragraphs and tables of `Contamination.results()`."""

from collections.abc import Iterator
from typing import Any

from contamination import MEASURES, PERCENTS
from planting import NEVER
from sections import Results, Rows, Section, interval, not_run, percent

TITLE = "Trained on test problems"
ANSWERS = ("loss_forward", "loss_reverse", "greedy", "best_scored", "margin_scored")
"""Measures that the first sentence has."""


def contamination_section(results: Results | None) -> Section:
    """Return the section of part 6."""
    if results is None:
        return not_run(TITLE, "contamination")
    nats = [name for name in MEASURES if name not in PERCENTS]
    tables = [_difference_rows(results), _search_rows(results["searches"])]
    tables += [_rows(results, PERCENTS, 100.0, ".1f"), _rows(results, nats, 1.0, ".3f")]
    return Section(title=TITLE, paragraphs=[*_answers(results), _about(results), *_about_searches(results)], tables=tables)


def _answers(results: Results) -> Iterator[str]:
    """Yield the changes of the problems that were read most, beyond those of the problems that were not planted."""
    most = max(group["reads"] for group in results["groups"])
    rows = {name: results["measures"][name][str(most)]["against_never"] for name in ANSWERS}
    parts = [f"{MEASURES[name]} {_change(name, row)}" for name, row in rows.items() if row["difference"] is not None]
    yield (
        f"Contaminated minus clean twins, for problems that a training read about {most} times, beyond the change of problems that were not"
        f" planted: {'; '.join(parts)}."
    )


def _change(name: str, row: Results) -> str:
    """Return a difference with its interval."""
    if row["difference"] is None:
        return "none"
    scale, form = (100.0, "+.1f") if name in PERCENTS else (1.0, "+.3f")
    return f"{scale * row['difference']:{form}} ({interval(row['interval'], scale, form)}){_mark(row)}"


def _difference_rows(results: Results) -> Rows:
    """Return the table of differences of both arms by group: points of percent, or nats."""
    times = [group["reads"] for group in results["groups"]]
    rows = [["contaminated minus clean", *("never read" if one == NEVER else f"read about {one} times" for one in times)]]
    for name, found in results["measures"].items():
        unit = ", points" if name in PERCENTS else ""
        rows.append([f"{MEASURES[name]}{unit}", *(_change(name, found[str(one)]) for one in times)])
    return rows


def _mark(row: Results) -> str:
    return " *" * row["is_significant"]


def _about(results: Results) -> str:
    groups, seeds = results["groups"], results["seeds"]
    planted = ", ".join(f"{g['reads']} times ({g['copies']} copies)" for g in groups if g["copies"])
    num_seeds = "One seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    return (
        f"{num_seeds} of {results['model']} twins, all reported. The contaminated corpus has test problems of level {results['level']} with"
        f" their solutions: {groups[0]['num']} random ones in each group, which a training reads on average {planted}, and as many that are"
        f" not planted. The {results['num_planted']:,} planted documents replace as many random ordinary ones of the same level; steps and"
        " seeds are those of the clean twins. Lambda by seed, chosen with the clean twins on the development part: "
        f"{', '.join(f'{one:.2f}' for one in results['lambdas'])}. Contaminated scorer: the clean forward model's"
        f" {results['num_samples']} answers, and only the reverse model is contaminated. Right minus wrong: the right solution against the"
        " mean over the different wrong answers of the clean forward model; questions without a wrong one do not count. Losses are of question"
        " and solution together. Intervals are paired bootstraps over seeds and questions, not corrected; * marks those of the"
        f" {results['num_comparisons']} differences that also exclude 0 at the level for so many (Bonferroni). Against never planted: the"
        " difference of differences, for random pairs of problems."
    )


def _about_searches(results: Results) -> Iterator[str]:
    """Yield a sentence for each search of the contaminated corpus."""
    for name, row in results["searches"].items():
        found, missed = row["planted_documents"], row["missed_documents"]
        text = (
            f"ledom decontaminate, {name}: {row['planted_problems'] - row['missed_problems']} of {row['planted_problems']} planted problems"
            f" and {found - missed:,} of {found:,} planted documents are found, and {row['wrongly_dropped']:,} of"
            f" {row['ordinary_documents']:,} ordinary training problems are dropped, too."
        )
        if row["is_rest"]:
            text += (
                " What remains is byte for byte the clean corpus without the replaced problems; with them back in their places it is the"
                " clean corpus, and twins trained on it are the clean twins."
            )
        yield text


def _rows(results: Results, names: Any, scale: float, form: str) -> Rows:
    rows = [["measure", "read", "problems", "clean", "contaminated", "difference", "95 % interval", "each seed"]]
    rows[0] += ["against never planted", "95 % interval"]
    for name in names:
        for reads, row in results["measures"][name].items():
            times = "never" if int(reads) == NEVER else f"{reads} times"
            cells = [MEASURES[name], times, str(row["num"])]
            cells += [_number(row[arm], scale, form) for arm in ("clean", "contaminated")]
            cells += _cells(row, scale, form)
            cells.append(" ".join(_number(value, scale, f"+{form}") for value in row["by_seed"]) or "none")
            against = row.get("against_never")
            rows.append([*cells, *(("none", "none") if against is None else _cells(against, scale, form))])
    return rows


def _cells(row: Results, scale: float, form: str) -> list[str]:
    found = interval(row["interval"], scale, f"+{form}")
    return [_number(row["difference"], scale, f"+{form}"), f"{found}{_mark(row)}"]


def _number(value: float | None, scale: float, form: str) -> str:
    return "none" if value is None else f"{scale * value:{form}}"


def _search_rows(searches: Results) -> Rows:
    rows = [["search", "planted problems found", "planted documents found", "ordinary documents dropped", "%"]]
    rows[0] += ["problems found that were not planted", "the rest is the clean corpus without the replaced problems"]
    for name, row in searches.items():
        pairs = [(row[f"planted_{kind}"] - row[f"missed_{kind}"], row[f"planted_{kind}"]) for kind in ("problems", "documents")]
        cells = [name, *(f"{found:,} of {all_:,}" for found, all_ in pairs), f"{row['wrongly_dropped']:,}"]
        cells += [percent(row["wrongly_dropped"] / row["ordinary_documents"]), str(row["touched_never_planted"])]
        rows.append([*cells, "yes" if row["is_rest"] else "no"])
    return rows
