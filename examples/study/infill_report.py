"""The section of part 9 in the report."""

from collections.abc import Iterator

from infill import BASELINES, MEASURES, OURS
from sections import Results, Rows, Section, interval, not_run, percent

TITLE = "Infilling: two directions that meet, or fill-in-the-middle training?"
ABOUT = {
    "forward only": "the forward model, greedily, from the prefix alone",
    "FIM": "a forward model trained on prefix, suffix, middle (arXiv 2207.14255), greedily",
    "": "greedy texts of both directions; where they meet, else the better one by both scores",
    ", samples": "the same with samples of each direction; every pair may meet",
    ", samples, score alone": "the same texts, the best score whether the models met or not",
    ", forward samples, score of both": "only the forward model's samples, chosen by both scores: no overlap",
}


def infill_section(results: Results | None) -> Section:
    """Return the section of part 9."""
    if results is None:
        return not_run(TITLE, "infill")
    tables = [_method_rows(results), _comparison_rows(results["primary"], "primary comparison")]
    tables += [_comparison_rows(results["secondary"], "other comparison"), _met_rows(results)]
    return Section(title=TITLE, paragraphs=[*infill_sentences(results), _about(results)], tables=tables)


def infill_sentences(results: Results) -> Iterator[str]:
    """Yield the sentences about the primary comparisons."""
    for other in BASELINES:
        parts = []
        for measure in MEASURES:
            row = results["primary"][f"{OURS} - {other}|{measure}"]
            verdict = "not significant" if not row["is_significant"] else "better" if row["mean"] > 0 else "worse"
            found = interval(row["interval"], 100, "+.1f")
            parts.append(f"{measure} {100 * row['mean']:+.1f} points ({found}; Holm p = {row['holm_p']:.3f}): {verdict}")
        yield f"Twins that meet against {other}, both greedy: {'; '.join(parts)}."
    if len(results["settings"]["seeds"]) < 2:
        yield "One seed: the intervals say nothing about other seeds."


def _about(results: Results) -> str:
    one, nums = results["settings"], results["num_items"]
    return (
        f"{nums['code']} lines of held-out code and {nums['prose']} sentences of held-out prose, each inside a piece of 120 to 400 characters;"
        f" seeds {one['seeds']}, all reported. Every model of a seed has the shape `{one['model']}`, the same pieces and"
        f" {one['train_iters'] * one['batch_size'] * 256:,} training tokens; a two-way model reads half of them in each direction. The FIM model"
        " reads 90 % of its pieces as prefix, suffix, middle, where the middle is a line or sentence as in the test if the piece has one: this"
        f" favours it. All methods stop at the end of the line or sentence. Samples: {one['num_samples']} of each direction. Twins need two"
        " models and two trainings. Exact match: the text is the missing one. Edit similarity: 1 - edit distance in characters / length of the"
        " longer text. Intervals: bootstrap over seeds and gaps (crossed). Holm p: adjusted within each table, over both measures."
    )


def _method_rows(results: Results) -> Rows:
    rows = [
        ["gaps", "method", "exact %", "95 % interval", "each seed", "edit similarity %", "95 % interval", "each seed", "choice"]
    ]
    for name, measures in results["rows"].items():
        kind, method = name.split("|")
        cells = [cell for measure in MEASURES for cell in _cells(measures[measure])]
        rows.append(
            [kind, method, *cells, ABOUT.get(method, ABOUT.get(method.removeprefix("twins").removeprefix("two-way"), ""))]
        )
    return rows


def _cells(row: Results) -> list[str]:
    return [percent(row["mean"]), interval(row["interval"], 100, ".1f"), " ".join(map(percent, row["by_seed"]))]


def _comparison_rows(family: Results, title: str) -> Rows:
    rows = [[title, "measure", "points", "95 % interval", "each seed", "Holm p"]]
    for name, row in family.items():
        seeds = " ".join(f"{100 * value:+.1f}" for value in row["by_seed"])
        cells = [*name.split("|"), f"{100 * row['mean']:+.1f}", interval(row["interval"], 100, "+.1f"), seeds]
        rows.append([*cells, f"{row['holm_p']:.4f}{' *' * row['is_significant']}"])
    return rows


def _met_rows(results: Results) -> Rows:
    rows = [["method", "met %", "95 % interval", "each seed", "exact where they met", "exact where not"]]
    for name, row in results["met"].items():
        right = [f"{num} of {all_}" for num, all_ in results["right_if_met"][name].values()]
        rows.append([name, *_cells(row), *right])
    return rows
