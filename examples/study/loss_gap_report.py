"""The section of part 8 in the report."""

from functools import partial
from typing import Any

from gap_sentences import PAPER, gap_sentences
from loss_gap import CHAIN, CONTROLS, NEGLIGIBLE, PRIMES, PUBLISHED, SEEN
from sections import Results, Rows, Section, interval, not_run

from megatron_ledom.reports import pages

TITLE = "The loss gap over context and size"
LABELS = {PRIMES: "products of primes (positive control)", CHAIN: "reversible chain (negative control)"}
ROWS = {**LABELS, SEEN: "products of primes that were trained on"}


def loss_gap_section(results: Results | None) -> Section:
    """Return the section of part 8."""
    if results is None:
        return not_run(TITLE, "loss_gap")
    tables = [_control_rows(results), _cell_rows(results["cells"])]
    tables += [_growth_rows(results["growth"])] if results["growth"] else []
    tables.append(_speed_rows(results))
    plots = [pages.figure("loss gap over context", partial(_draw, results))]
    return Section(title=TITLE, paragraphs=[*gap_sentences(results), _about(results)], tables=tables, plots=plots)


def _about(results: Results) -> str:
    one = results["settings"]
    return (
        "Gap: the relative difference of the final losses on held-out text, reverse against forward, in percent. Seeds"
        f" {results['seeds']}, all reported; each model reads {one['tokens']:,} tokens, at every context and size, in steps of"
        f" {one['batch_tokens']:,}; texts follow each other within a sample, so a long context holds several word problems. Controls:"
        f" {one['control_model']} models, {one['control_tokens']:,} tokens. Positive: lines `p * q = n` with primes of 11 to"
        f" {one['largest_prime']}, n from its last digit, pairs of primes unseen in either order; a forward model multiplies, a reverse"
        f" model must factor (an example of {PAPER}). Pairs that were trained on can be memorized, so their gap is no control."
        f" Negative: walks of a Markov chain with {one['num_states']} states and symmetric weights, so each walk is"
        " exactly as likely as its reverse. Intervals: Student's t over seeds. Holm p: adjusted within each table."
        f" Equivalence: two one-sided t-tests, within {PUBLISHED[0]} % for the cells and {NEGLIGIBLE} % for the negative control."
    )


def _control_rows(results: Results) -> Rows:
    rows = [["control", "forward", "reverse", "gap %", "95 % interval", "each seed", "p (0)", f"p (outside {NEGLIGIBLE} %)"]]
    for name, label in ROWS.items():
        row, losses = results["controls"][name], results["losses"][name]
        means = [f"{losses[direction]:.4f}" for direction in ("forward", "reverse")]
        rows.append([label, *means, *_cells(row), _p(row["holm_p"]), _p(row["equivalent_p"])])
    return rows


def _cell_rows(cells: Results) -> Rows:
    rows = [["held out", "model", "context", "gap %", "95 % interval", "each seed", "Holm p (0)"]]
    rows[0] += [f"excludes {PUBLISHED[0]:+} to {PUBLISHED[1]:+} %", f"Holm p (outside {PUBLISHED[0]} %)"]
    for name, row in cells.items():
        between = row["interval"]
        excludes = "one seed" if between is None else _yes(between[1] < PUBLISHED[0] or between[0] > PUBLISHED[1])
        rows.append([*name.split("|"), *_cells(row), _p(row["holm_p"]), excludes, _p(row["equivalent_p"])])
    return rows


def _growth_rows(growth: Results) -> Rows:
    rows = [["change of the gap", "percentage points", "95 % interval", "each seed", "Holm p"]]
    return rows + [[name, *_cells(row), _p(row["holm_p"])] for name, row in growth.items()]


def _cells(row: Results) -> list[str]:
    return [f"{row['mean']:+.2f}", interval(row["interval"]), " ".join(f"{value:+.2f}" for value in row["by_seed"])]


def _p(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}{' *' * (value < 0.05)}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _speed_rows(results: Results) -> Rows:
    return [["model, context", "tokens/s of one run"], *([name, f"{speed:,.0f}"] for name, speed in results["speed"].items())]


def _draw(results: Results, theme: str) -> bytes:
    """Draw the gap of each text and size over the context, with intervals, the published range and both controls."""

    def _fill(axes: Any) -> None:
        lines: dict[str, list[tuple[int, Results]]] = {}
        for name, row in results["cells"].items():
            domain, model, context = name.split("|")
            lines.setdefault(f"{domain}, {model}", []).append((int(context), row))
        place = results["settings"]["control_context"]
        lines |= {LABELS[name]: [(place, results["controls"][name])] for name in CONTROLS}
        for number, ((label, points), colour) in enumerate(zip(lines.items(), pages.COLOURS[theme] * 3, strict=False)):
            shift = 1 + 0.02 * number  # intervals at one context stand side by side
            marker = "s" if label in LABELS.values() else "o"
            places, values = [x * shift for x, _ in points], [row["mean"] for _, row in points]
            axes.plot(places, values, color=colour, marker=marker, ms=4, lw=1.4, label=label)
            for x, (_, row) in zip(places, points, strict=True):
                if row["interval"] is not None:
                    axes.plot([x, x], row["interval"], color=colour, lw=1.0)
        axes.axhspan(*PUBLISHED, color=pages.THEMES[theme]["ink"], alpha=0.15, label="published")
        axes.axhline(0, color=pages.THEMES[theme]["ink"], lw=0.8)
        contexts = results["settings"]["contexts"]
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, labels=list(map(str, contexts)))
        axes.set(xlabel="context (tokens)", ylabel="gap, % of the forward loss", title="Loss gap, reverse against forward")

    return pages.draw_png(theme, (8.5, 4.8), _fill)
