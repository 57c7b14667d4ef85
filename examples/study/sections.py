"""The sections of the report: paragraphs and tables of the results, as plain text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from families import side_of
from losses import interval_over_seeds
from rewards import WANTED

from megatron_ledom.evaluation.selection_methods import METHODS, WITH_REVERSE
from megatron_ledom.reports import pages
from megatron_ledom.reports.method_comparison import sentences

Rows = list[list[str]]
Results = dict[str, Any]
PUBLISHED_GAP = "+2.1 to +2.4 %"
"""Loss of a right-to-left model relative to a left-to-right one (arXiv 2502.18435)."""
PUBLISHED_GAIN = "0 to +15 points above greedy (+0.5 to +2.3 on GSM8K)"
"""Gain of best-of-N by Reverse Reward, for three models and four sets (arXiv 2507.01335)."""
BASELINES = ("random of N", "greedy", "majority vote", "forward likelihood, sum")
"""Baselines for the paper's claim."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading with paragraphs, tables and plots. The plots are HTML, for the page only."""

    title: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Rows] = ()
    plots: Sequence[str] = ()


def not_run(title: str, part: str) -> Section:
    """Return the section of a part that was not run."""
    return Section(title=title, paragraphs=[f"Not run: this size runs it alone, with `--parts {part}`."])


def percent(value: float) -> str:
    """Return a fraction as a number of percent."""
    return f"{100 * value:.1f}"


def interval(found: Sequence[float] | None, scale: float = 1.0, form: str = "+.2f") -> str:
    """Return an interval as a cell: `low to high`."""
    return pages.interval(found, form, scale, missing="none")


def claims(results: Results, of_abilities: Rows) -> Section:
    """Return the table of claims: published result, result here and verdict. of_abilities: the rows of part 3."""
    rows = [["claim", "published", "found here", "verdict"], _gap_claim(results["gaps"])]
    rows += [_reward_claim(results["rewards"]["report"], against) for against in ("greedy", "majority vote")]
    rows += [*of_abilities, _guard_claim(results["wrong"])]
    return Section(title="The claims", tables=[rows])


def _gap_claim(gaps: list[Results]) -> list[str]:
    found = f"{min(row['gap'] for row in gaps):+.2f} to {max(row['gap'] for row in gaps):+.2f} %"
    above, below = (sum(side_of(row, "gap") == sign for row in gaps) for sign in (1, -1))
    verdict = f"significantly higher in {above} of {len(gaps)} sets, significantly lower in {below} (Holm)"
    return ["a reverse model has a higher final loss", PUBLISHED_GAP, found, verdict]


def _reward_claim(report: Results, against: str) -> list[str]:
    row = next(row for row in report["comparisons"] if row["against"] == against)
    found = f"{100 * row['difference']:+.1f} points ({interval(row['interval'], 100, '+.1f')})"
    verdict = "not significant"
    if row["is_significant"]:
        verdict = "reproduced" if row["difference"] > 0 else "significantly the opposite"
    published = PUBLISHED_GAIN if against == "greedy" else "not published"
    return [f"Reverse Reward is right more often than {against}", published, found, verdict]


def _guard_claim(wrong: list[Results]) -> list[str]:
    found = "; ".join(f"{100 * row['difference']:+.1f} points" for row in wrong)
    blind = [row["name"] for row in wrong if row["right_way"][1][0] <= 0]
    verdict = "holds" if not blind else f"cannot decide for: {', '.join(blind)} (at chance in its own direction too)"
    if any(side_of(row) > 0 for row in wrong):
        verdict = "FAILED: check this first"
    return ["models that read in the wrong direction choose at chance", "a control of ours", found, verdict]


def not_reproduced(results: Results) -> list[str]:
    """Return a sentence for each claim of parts 1, 2 and 4 that this size does not reproduce, with the likely reason."""
    found = []
    unsure = [row for row in results["gaps"] if side_of(row, "gap") <= 0]
    if unsure:
        where = "; ".join(f"{row['domain']}, {row['model']} model: {row['gap']:+.2f} %{_side(row)}" for row in unsure)
        found.append(
            f"The reverse loss is not significantly above the forward loss ({where}). Models of these sizes are far from converged, and"
            " intervals over few seeds are wide."
        )
    rows = [row for row in results["rewards"]["report"]["comparisons"] if row["against"] in BASELINES]
    below = [row for row in rows if not (row["is_significant"] and row["difference"] > 0)]
    if below:
        against = "; ".join(
            f"{row['against']}: {100 * row['difference']:+.1f} points{', significantly worse' * row['is_significant']}"
            for row in below
        )
        found.append(
            f"Reverse Reward is not significantly above these baselines: {against}. {_reason(results['mistakes'])} The scorer is as"
            " small as the model that answers and was trained on the same problems. With few questions a small gain is not significant."
        )
    found += _overdone(results)
    for row in results["wrong"]:
        if side_of(row) > 0:
            found.append(f"{row['name']} chooses better than chance ({100 * row['difference']:+.1f} points): check this first.")
    return found


def _overdone(results: Results) -> list[str]:
    """Return a sentence if the reverse model's choice is right less often than a random candidate."""
    methods, mistakes = results["rewards"]["report"]["methods"], results["mistakes"]
    only, drawn = methods["reverse only"]["accuracy"], methods["random of N"]["accuracy"]
    if only >= drawn:
        return []
    chosen, all_ = (
        sum(mistakes[name]["false calculation"]) / results["num_seeds"] for name in ("reverse only", "all candidates")
    )
    return [
        f"The reverse model alone chooses worse than chance ({percent(only)} % right, {percent(drawn)} % for a random candidate). It"
        f" chooses the candidate that makes the question likeliest. That candidate has a calculation error in {percent(chosen)} % of"
        f" the cases, a random candidate in {percent(all_)} %. The score takes no account of calculation errors. Some candidates fit the"
        " question better only because of such an error, and among many candidates the best score often belongs to one of them."
    ]


def _reason(mistakes: Results) -> str:
    """Return a sentence about the wrong candidates that a reverse model hardly distinguishes from right ones."""
    _, unfit, false = (sum(values) for values in mistakes["all candidates"].values())
    share = 0.0 if unfit + false == 0 else false / (unfit + false)
    return (
        f"Of the wrong candidates {percent(share)} % have a calculation error. A reverse model hardly detects these: its score measures"
        " how likely the question is, given the answer."
    )


def _side(row: Results) -> str:
    """Return the meaning of a gap that is not significantly above 0."""
    if row["interval"] is None:
        return ", one seed"
    if row["is_significant"]:
        return ", significantly below"
    return (
        ", the interval contains 0"
        if row["interval"][0] <= 0 <= row["interval"][1]
        else ", not significant after the correction"
    )


def loss(results: Results, plots: Sequence[str]) -> Section:
    """Return the section of part 1."""
    num = results["num_seeds"]
    about = (
        f"Twins differ only in the order of the ids. {num} seeds. The gap is the relative difference of the final losses on held-out"
        f" text, reverse against forward, with Student's t interval over seeds. Published: {PUBLISHED_GAP}."
        " * after an interval: different from 0 after Holm's correction over all rows of the table, or all tenths of all corpora."
    )
    place = (
        "By position: reverse minus forward for the largest twins, in nats per token, in each tenth of a document, in text order for both."
        " The first and the last token of a text do not count, because the forward twin predicts the first one, and the reverse twin the"
        " last one, from the end-of-document token alone. Each twin has the least context where it begins to read. The question and the"
        " solution of a problem contain nearly the same numbers: the forward twin has a high loss on them in the question, the reverse"
        " twin in the solution."
    )
    problems = "; ".join(
        f"{name}: {found['train']:,} trained on, {found['held_out']} held out, {found['refused']:,} rejected by the calculator"
        for name, found in results["word_problems"].items()
    )
    paragraphs = [about, f"Word problems written by people: {problems}. {_HELD_OUT}", _SPEED, place]
    tables = [_gap_rows(results["gaps"]), _place_rows(results["places"]), _speed_rows(results["speed"])]
    return Section(title="Loss", paragraphs=paragraphs, tables=tables, plots=plots)


_HELD_OUT = (
    "The held-out problems of gsm_symbolic have other numbers and names than the trained ones, but are variants of the same hundred"
    " problems. No text is both trained on and held out, but many files of prose contain licences and other boilerplate."
)
_SPEED = (
    "Training runs use one process per core and fp32, which is faster than bf16 at these widths (7,600 and 6,500 tokens/s per core at width"
    " 128), and the fused CPU operators instead of torch.compile, which takes seconds at each start. The fraction of the peak refers to the"
    " highest peak that a run of the row measured at its start; other load on the machine lowers it."
)


def _gap_rows(found: list[Results]) -> Rows:
    rows = [["corpus, model", "held out", "forward", "reverse", "gap %", "95 % interval", "each seed"]]
    for row in found:
        means = [sum(row["losses"][d]) / len(row["by_seed"]) for d in ("forward", "reverse")]
        seeds = " ".join(f"{value:+.2f}" for value in row["by_seed"])
        cells = [f"{row['corpus']}, {row['model']}", row["domain"], *(f"{m:.4f}" for m in means), f"{row['gap']:+.2f}"]
        rows.append([*cells, f"{interval(row['interval'])}{_mark(row)}", seeds])
    return rows


def _place_rows(places: dict[str, list[Results]]) -> Rows:
    rows = [["nats by tenth", *(name for corpus in places for name in (corpus, "95 % interval"))]]
    for tenth in sorted({row["tenth"] for found in places.values() for row in found}):
        cells = [f"{10 * tenth} to {10 * tenth + 10} %"]
        for found in places.values():
            row = next((one for one in found if one["tenth"] == tenth), None)
            cells += (
                ["none", "none"]
                if row is None
                else [f"{row['difference']:+.3f}", f"{interval(row['interval'], form='+.3f')}{_mark(row)}"]
            )
        rows.append(cells)
    return rows


def _mark(row: Results) -> str:
    """Return the mark of a difference that is significant after the correction."""
    return " *" * row["is_significant"]


def _speed_rows(speeds: dict[str, list[float]]) -> Rows:
    rows = [["corpus, model", "tokens/s of one run", "fraction of one core's matmul peak (fp32)"]]
    return rows + [[name, f"{speed:,.0f}", f"{100 * share:.0f} %"] for name, (speed, share) in speeds.items()]


def reward(results: Results, plots: Sequence[str]) -> Section:
    """Return the section of part 2."""
    report, level, beam = (results["rewards"][name] for name in ("report", "level", "beam"))
    about = f"{results['num_seeds']} seeds of both models, all reported. Lambda by seed, chosen on the development part alone: "
    about += ", ".join(f"{row[0]:.2f}" for row in report["held_out"]["lambdas"])
    tables = [_method_rows(report), _equal_rows(report, results["training_tokens"]), _mistake_rows(results["mistakes"])]
    paragraphs = [
        _about_level(level),
        about,
        _INTERVALS,
        *sentences(report),
        _about_beam(beam),
        f"{_MISTAKES} {_reason(results['mistakes'])}",
    ]
    return Section(title="Reverse Reward", paragraphs=paragraphs, tables=tables, plots=plots)


_MISTAKES = (
    "The mistakes in wrong answers, over all candidates: either every calculation is correct, but for another question (a number that is"
    " not in the question, a sentence that is not used), or a calculation is wrong or none can be read (a calculation error)."
)
LABELS = {
    "true calculations of another question": "correct, but for another question",
    "false calculation": "calculation error",
}
"""Kinds of answers (`mistakes.KINDS`) as the report names them."""


def _mistake_rows(found: Results) -> Rows:
    kinds = list(next(iter(found.values())))
    titles = [LABELS.get(kind, kind) for kind in kinds]
    rows = [["chosen by, % of answers", *(name for title in titles for name in (title, "95 % interval", "each seed"))]]
    for name, shares in found.items():
        cells = [
            (percent(sum(v) / len(v)), interval(interval_over_seeds(v, 0.0, 1.0), 100, ".1f"), " ".join(map(percent, v)))
            for v in shares.values()
        ]
        rows.append([name, *(cell for pair in cells for cell in pair)])
    return rows


_INTERVALS = (
    "Intervals of accuracies and of their differences are paired bootstraps over seeds and questions. With few seeds they hardly extend"
    " beyond the range of these seeds, so for two seeds that differ much they are too narrow. Intervals of losses and of part 3 are"
    " Student's t over seeds, which is stricter."
)


def _about_beam(beam: Results) -> str:
    text = (
        f"Beam search: {percent(beam['accuracy'])} % right with {beam['tokens']:.0f} tokens per question. Best of {beam['num']} by"
        f" Reverse Reward, {beam['num_tokens']:.0f} tokens: {percent(beam['best_of_num'])} %; difference"
        f" {100 * beam['difference']:+.1f} points ({interval(beam['difference_interval'], 100, '+.1f')})."
    )
    text += " Both score equal answers once. The token usage of the search includes the prompt. Its lambda is 0.5, not a tuned value."
    return text if beam["is_affordable"] else text + " The search used fewer tokens than a single candidate of best-of-N."


def _about_level(level: Results) -> str:
    greedy = ", ".join(f"level {name}: {percent(value)} %" for name, value in level["greedy"].items())
    low, high = (f"{100 * value:.0f}" for value in WANTED)
    rule = f"Level {level['level']} was chosen before any reranking: the first level at which the forward model solves {low} to {high} %"
    rule += f" of the calibration part greedily (mean of all seeds; {greedy})."
    return rule if level["is_inside"] else rule + " No level was in this range, so the nearest to its middle was chosen."


def _method_rows(report: Results) -> Rows:
    rows = [["method", "right %", "95 % interval", "each seed", "choice"]]
    for name, found in report["methods"].items():
        seeds = " ".join(map(percent, found["by_seed"]))
        rows.append([name, percent(found["accuracy"]), interval(found["interval"], 100, ".1f"), seeds, METHODS[name]])
    return rows


def _equal_rows(report: Results, training_tokens: int) -> Rows:
    """Return the table at equal tokens. training_tokens: of one model; a method with a reverse pass needs a second one."""
    rows = [
        ["method at equal tokens", "candidates", "tokens per question", "right %", "95 % interval", "tokens of the trainings"]
    ]
    for row in report["equal_tokens"]:
        cells = [row["method"], str(row["num_candidates"]), f"{row['tokens']:.0f}", percent(row["accuracy"])]
        trained = training_tokens * (2 if row["method"] in WITH_REVERSE else 1)
        rows.append([*cells, interval(row["interval"], 100, ".1f"), f"{trained:,}"])
    return rows


def ablation(results: Results) -> list[Section]:
    """Return the sections of part 4: other scorers and rewards, and the control."""
    about = (
        "The same candidates with other scores. The scorers of pairs are trained from scratch for as many steps as the twins. Differences"
        " are paired by question. * after an interval: different from 0 after Holm's correction over the rows."
    )
    guard = (
        "A control of the whole pipeline: copies of the twins whose config records the other direction. Their choice must be at chance, the"
        " mean over all candidates. An interval above 0 means that information leaks. In their own direction the same models are"
        f" {_right_ways(results['wrong'])} points from chance; if that is not above 0, the control shows nothing."
    )
    rows, wrong = (_ablation_rows(results[n], f"to {o}") for n, o in (("ablations", "Reverse Reward"), ("wrong", "chance")))
    return [
        Section(title="Ablations", paragraphs=[about], tables=[rows]),
        Section(title="Wrong direction", paragraphs=[guard], tables=[wrong]),
    ]


def _right_ways(wrong: list[Results]) -> str:
    return " and ".join(
        f"{100 * difference:+.1f} ({interval(between, 100, '+.1f')})"
        for difference, between in (row["right_way"] for row in wrong)
    )


def _ablation_rows(found: list[Results], other: str) -> Rows:
    rows = [["variant", "right %", "95 % interval", "each seed", f"difference {other}", "95 % interval"]]
    for row in found:
        cells = [row["name"], percent(row["accuracy"]), interval(row["interval"], 100, ".1f")]
        cells += [" ".join(map(percent, row["by_seed"])), f"{100 * row['difference']:+.1f}"]
        rows.append([*cells, f"{interval(row['difference_interval'], 100, '+.1f')}{_mark(row)}"])
    return rows
