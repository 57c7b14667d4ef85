"""The sections of the report: sentences and tables from the results, as plain text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from losses import interval_over_seeds
from rewards import WANTED

from megatron_ledom.evaluation.selection_methods import METHODS
from megatron_ledom.reports import pages
from megatron_ledom.reports.method_comparison import sentences

Rows = list[list[str]]
Results = dict[str, Any]
PUBLISHED_GAP = "+2.1 to +2.4 %"
"""Right-to-left loss above left-to-right (arXiv 2502.18435)."""
PUBLISHED_GAIN = "0 to +15 points above greedy (+0.5 to +2.3 on GSM8K)"
"""Best of N by Reverse Reward, three models and four sets (arXiv 2507.01335)."""
BASELINES = ("random of N", "greedy", "majority vote", "forward likelihood, sum")
"""What the paper's claim is measured against."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading with what stands below it; plots are HTML, and only in the page."""

    title: str
    told: Sequence[str] = ()
    tables: Sequence[Rows] = ()
    plots: Sequence[str] = ()


def percent(value: float) -> str:
    """A share as a number of per cent."""
    return f"{100 * value:.1f}"


def interval(found: Sequence[float] | None, scale: float = 1.0, form: str = "+.2f") -> str:
    """Return a cell: `low to high`."""
    return pages.interval(found, form, scale, missing="none")


def claims(results: Results, of_abilities: Rows) -> Section:
    """What the paper claims, what is published, what is found, and a verdict; `of_abilities`: the rows of part 3."""
    rows = [["claim", "published", "found here", "verdict"], _gap_claim(results["gaps"])]
    rows += [_reward_claim(results["rewards"]["report"], against) for against in ("greedy", "majority vote")]
    rows += [*of_abilities, _guard_claim(results["wrong"])]
    return Section(title="The claims", tables=[rows])


def _gap_claim(gaps: list[Results]) -> list[str]:
    found = f"{min(row['gap'] for row in gaps):+.2f} to {max(row['gap'] for row in gaps):+.2f} %"
    above, below = (
        sum(row["interval"] is not None and sign * row["interval"][side] > 0 for row in gaps)
        for sign, side in ((1, 0), (-1, 1))
    )
    verdict = f"in {above} of {len(gaps)} sets surely above, in {below} surely below"
    return ["a reverse model ends at a higher loss", PUBLISHED_GAP, found, verdict]


def _reward_claim(report: Results, against: str) -> list[str]:
    row = next(row for row in report["comparisons"] if row["against"] == against)
    found = f"{100 * row['difference']:+.1f} points ({interval(row['interval'], 100, '+.1f')})"
    verdict = "not significant"
    if row["is_significant"]:
        verdict = "reproduced" if row["difference"] > 0 else "the opposite, significantly"
    published = PUBLISHED_GAIN if against == "greedy" else "not published"
    return [f"Reverse Reward is right more often than {against}", published, found, verdict]


def _guard_claim(wrong: list[Results]) -> list[str]:
    found = "; ".join(f"{100 * row['difference']:+.1f} points" for row in wrong)
    blind = [row["name"] for row in wrong if row["right_way"][1][0] <= 0]
    verdict = "holds" if not blind else f"cannot tell of: {', '.join(blind)} (no better than chance the right way either)"
    if any(row["difference_interval"][0] > 0 for row in wrong):
        verdict = "BROKEN: look into this first"
    return ["models fed the wrong way choose no better than chance", "a guard of ours", found, verdict]


def not_reproduced(results: Results) -> list[str]:
    """A sentence for each claim of parts 1, 2 and 4 that this size does not show, with the likely reason."""
    told = []
    unsure = [row for row in results["gaps"] if row["interval"] is None or row["interval"][0] <= 0]
    if unsure:
        where = "; ".join(
            f"{row['domain']}, {row['model']} model: {row['gap']:+.2f} %{_side(row['interval'])}" for row in unsure
        )
        told.append(
            f"The reverse loss is not surely above the forward one ({where}). Models of these sizes are far from converged, and few"
            " seeds make wide intervals."
        )
    rows = [row for row in results["rewards"]["report"]["comparisons"] if row["against"] in BASELINES]
    below = [row for row in rows if not (row["is_significant"] and row["difference"] > 0)]
    if below:
        against = "; ".join(
            f"{row['against']}: {100 * row['difference']:+.1f} points{', significantly worse' * row['is_significant']}"
            for row in below
        )
        told.append(
            f"Reverse Reward is not significantly above these baselines: {against}. {_reason(results['mistakes'])} The scorer is as"
            " small as the answerer and saw the same problems; with few questions a small gain cannot be told from none."
        )
    told += _overdone(results)
    for row in results["wrong"]:
        if row["difference_interval"][0] > 0:
            told.append(
                f"{row['name']} chooses better than chance ({100 * row['difference']:+.1f} points): look into this first."
            )
    return told


def _overdone(results: Results) -> list[str]:
    """That the answer a reverse model likes best is right less often than any, if it is so."""
    methods, mistakes = results["rewards"]["report"]["methods"], results["mistakes"]
    only, drawn = methods["reverse only"]["accuracy"], methods["random of N"]["accuracy"]
    if only >= drawn:
        return []
    chosen, all_ = (
        sum(mistakes[name]["false calculation"]) / results["num_seeds"] for name in ("reverse only", "all candidates")
    )
    return [
        f"The reverse model alone chooses worse than chance ({percent(only)} against {percent(drawn)} %): of many candidates the one under"
        f" which the question is likeliest holds a false calculation in {percent(chosen)} % of the cases, of all candidates"
        f" {percent(all_)} % do. The maximum of a score that cannot see an error finds answers that pay for it with that error."
    ]


def _reason(mistakes: Results) -> str:
    """What share of the wrong candidates a reverse model can hardly see."""
    _, unfit, false = (sum(values) for values in mistakes["all candidates"].values())
    share = 0.0 if unfit + false == 0 else false / (unfit + false)
    return (
        f"Of the wrong candidates {percent(share)} % hold a false calculation, which a reverse model hardly sees: it judges whether the"
        " question follows from the answer."
    )


def _side(found: list[float] | None) -> str:
    """What an interval that is not above 0 says."""
    if found is None:
        return ", one seed"
    return ", surely below" if found[1] < 0 else ", the interval holds 0"


def loss(results: Results, plots: Sequence[str]) -> Section:
    """Part 1."""
    num = results["num_seeds"]
    about = (
        f"Twins differ in the order of the ids alone. {num} seeds; the gap is reverse over forward on held-out text at the end, its"
        f" interval Student's t over seeds. Published: {PUBLISHED_GAP}."
    )
    place = (
        "By place: reverse minus forward of the largest twins, in nats a token, in each tenth of a document, in reading order for both."
        " The first and the last token of a text are left out: each of them is the one that one of the twins has to tell from the"
        " end-of-document token alone. Each twin knows least at its own beginning: in problems whose question and solution tell nearly the"
        " same, the forward twin pays for the numbers in the question, the reverse twin in the solution."
    )
    problems = "; ".join(
        f"{name}: {found['train']:,} trained on, {found['held_out']} held out, {found['refused']:,} refused by the calculator"
        for name, found in results["word_problems"].items()
    )
    told = [about, f"Word problems written by people: {problems}. {_HELD_OUT}", _SPEED, place]
    tables = [_gap_rows(results["gaps"]), _place_rows(results["places"]), _speed_rows(results["speed"])]
    return Section(title="Loss", told=told, tables=tables, plots=plots)


_HELD_OUT = (
    "What is held out of gsm_symbolic are other numbers and names in the same hundred problems, not problems of another form. No text is"
    " both trained on and held out, but licences and other boilerplate stand in many files of prose."
)
_SPEED = (
    "Trainings run one process a core in fp32, which at these widths is faster than bf16 (7,600 and 6,500 tokens/s a core at width 128),"
    " with the fused CPU operators in place of torch.compile, which costs seconds at each start. The share is of the highest peak that any"
    " run of the row measured at its start; what else the machine did makes it smaller."
)


def _gap_rows(found: list[Results]) -> Rows:
    rows = [["corpus, model", "held out", "forward", "reverse", "gap %", "95 % interval", "each seed"]]
    for row in found:
        means = [sum(row["losses"][d]) / len(row["by_seed"]) for d in ("forward", "reverse")]
        seeds = " ".join(f"{value:+.2f}" for value in row["by_seed"])
        cells = [f"{row['corpus']}, {row['model']}", row["domain"], *(f"{m:.4f}" for m in means), f"{row['gap']:+.2f}"]
        rows.append([*cells, interval(row["interval"]), seeds])
    return rows


def _place_rows(places: dict[str, list[Results]]) -> Rows:
    rows = [["nats by tenth", *(name for corpus in places for name in (corpus, "95 % interval"))]]
    for tenth in sorted({row["tenth"] for found in places.values() for row in found}):
        cells = [f"{10 * tenth} to {10 * tenth + 10} %"]
        for found in places.values():
            row = next((one for one in found if one["tenth"] == tenth), None)
            cells += ["none", "none"] if row is None else [f"{row['difference']:+.3f}", interval(row["interval"], form="+.3f")]
        rows.append(cells)
    return rows


def _speed_rows(speeds: dict[str, list[float]]) -> Rows:
    rows = [["corpus, model", "tokens/s of one run", "share of one core's matmul peak (fp32)"]]
    return rows + [[name, f"{speed:,.0f}", f"{100 * share:.0f} %"] for name, (speed, share) in speeds.items()]


def reward(results: Results, plots: Sequence[str]) -> Section:
    """Part 2."""
    report, level, beam = (results["rewards"][name] for name in ("report", "level", "beam"))
    about = f"{results['num_seeds']} seeds of both models, every one reported; lambda by seed, chosen on the development part alone: "
    about += ", ".join(f"{row[0]:.2f}" for row in report["held_out"]["lambdas"])
    tables = [_method_rows(report), _equal_rows(report), _mistake_rows(results["mistakes"])]
    told = [
        _about_level(level),
        about,
        _INTERVALS,
        *sentences(report),
        _about_beam(beam),
        f"{_MISTAKES} {_reason(results['mistakes'])}",
    ]
    return Section(title="Reverse Reward", told=told, tables=tables, plots=plots)


_MISTAKES = (
    "Why wrong answers are wrong, all candidates used: either every calculation is true, but of another question (a number that the"
    " question does not have, a sentence left out), or one is false or none can be read."
)


def _mistake_rows(found: Results) -> Rows:
    kinds = list(next(iter(found.values())))
    rows = [["chosen by, % of answers", *(name for kind in kinds for name in (kind, "95 % interval", "each seed"))]]
    for name, shares in found.items():
        cells = [
            (percent(sum(v) / len(v)), interval(interval_over_seeds(v, 0.0, 1.0), 100, ".1f"), " ".join(map(percent, v)))
            for v in shares.values()
        ]
        rows.append([name, *(cell for pair in cells for cell in pair)])
    return rows


_INTERVALS = (
    "Intervals of accuracies and of their differences are paired bootstraps over seeds and questions at once, of a few seeds: they"
    " hardly leave the range of the seeds that were seen, and with two seeds that differ much they are too narrow. Intervals of losses and"
    " of part 3 are Student's t over seeds, a stricter measure."
)


def _about_beam(beam: Results) -> str:
    told = (
        f"Beam search: {percent(beam['accuracy'])} % right with {beam['tokens']:.0f} tokens a question. Best of {beam['num']} by"
        f" Reverse Reward, {beam['num_tokens']:.0f} tokens: {percent(beam['best_of_num'])} %; difference"
        f" {100 * beam['difference']:+.1f} points ({interval(beam['difference_interval'], 100, '+.1f')})."
    )
    told += " Equal answers are judged once in both, and the search's count has the prompt, too. Its lambda is 0.5, not a tuned one."
    return told if beam["is_affordable"] else told + " The search spent less than a single candidate of best-of-N costs."


def _about_level(level: Results) -> str:
    greedy = ", ".join(f"level {name}: {percent(value)} %" for name, value in level["greedy"].items())
    low, high = (f"{100 * value:.0f}" for value in WANTED)
    rule = f"Level {level['level']} was taken before any reranked result was seen: the first that the forward model solves greedily"
    rule += f" in {low} to {high} % of the cases on the calibration part (mean of all seeds; {greedy})."
    return rule if level["is_inside"] else rule + " None was inside: the nearest to the middle was taken."


def _method_rows(report: Results) -> Rows:
    rows = [["method", "right %", "95 % interval", "each seed", "how it chooses"]]
    for name, found in report["methods"].items():
        seeds = " ".join(map(percent, found["by_seed"]))
        rows.append([name, percent(found["accuracy"]), interval(found["interval"], 100, ".1f"), seeds, METHODS[name]])
    return rows


def _equal_rows(report: Results) -> Rows:
    rows = [["method at equal tokens", "candidates", "tokens a question", "right %", "95 % interval"]]
    for row in report["equal_tokens"]:
        cells = [row["method"], str(row["num_candidates"]), f"{row['tokens']:.0f}", percent(row["accuracy"])]
        rows.append([*cells, interval(row["interval"], 100, ".1f")])
    return rows


def ablation(results: Results) -> list[Section]:
    """Part 4: other scorers and rewards, and the guard."""
    about = (
        "The same candidates, judged otherwise. The scorers of pairs are trained from scratch for as many steps as the twins. Differences"
        " are paired, question by question; intervals are not widened for their number."
    )
    guard = (
        "A guard on the whole pipeline: copies of the twins whose config says the other direction. Their choice must not be better than"
        " chance, the mean over all candidates. An interval above 0 means that something leaks. Fed their own way, the same models are"
        f" {_right_ways(results['wrong'])} points from chance: where that is not above 0, the guard shows nothing."
    )
    rows, wrong = (_ablation_rows(results[n], f"to {o}") for n, o in (("ablations", "Reverse Reward"), ("wrong", "chance")))
    return [
        Section(title="What made the difference", told=[about], tables=[rows]),
        Section(title="Wrong direction", told=[guard], tables=[wrong]),
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
        rows.append([*cells, interval(row["difference_interval"], 100, "+.1f")])
    return rows
