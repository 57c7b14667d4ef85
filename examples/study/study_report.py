"""The report of the study: one HTML page and a Markdown summary of the same tables, from the files of its steps."""

import html
import json
import shlex
from itertools import product
from pathlib import Path
from typing import Any

from abilities import Abilities
from abilities_report import TITLE as ABILITIES
from abilities_report import abilities_figures, abilities_not_reproduced, abilities_sections
from ablations import Ablations
from losses import DOMAINS, Twins, gaps, speed_of
from rewards import WANTED, Rewards
from settings import Settings
from steps import write_whole
from twins import DIRECTIONS

from megatron_ledom import pages
from megatron_ledom.inference.selection import METHODS
from megatron_ledom.inference.selection_report import draw_over_lambda, draw_over_n, sentences
from megatron_ledom.training.curves import draw
from megatron_ledom.training.run_report import load_runs

Rows = list[list[str]]
PUBLISHED = "+2.1 to +2.4 %"
"""Right-to-left loss above left-to-right (arXiv 2502.18435)."""
BASELINES = ("random of N", "greedy", "majority vote", "forward likelihood, sum")
"""What the paper's claim is measured against."""
STYLE = "table { margin-bottom: 1.5rem; }"
OPEN = "Not done here: the gap by position in the document. GSM8K is no corpus of part 1."


def write_study(folder: Path, size: str, settings: Settings, notes: dict[str, dict[str, Any]]) -> Path:
    """Write results.json, summary.md and report.html into `folder`; returns the page."""
    twins = Twins(folder, settings)
    rewards = Rewards(twins)
    ablations = Ablations(rewards)
    results = {"size": size, "gaps": gaps(twins), "rewards": rewards.results(), "ablations": ablations.results()}
    results |= {"wrong": ablations.wrong_direction(), "speed": _speeds(twins), "num_seeds": len(settings.seeds)}
    results["abilities"] = Abilities(twins).results()
    write_whole(folder / "results.json", json.dumps(results, indent=1))
    sections = _sections(results, settings)
    write_whole(folder / "summary.md", _markdown(size, sections))
    figures = {"Loss": _loss_figures(twins), "Reverse Reward": _reward_figures(results["rewards"]["report"])}
    figures[ABILITIES] = abilities_figures(results["abilities"])
    body = []
    for title, told, tables in sections:
        body += [f"<h2>{html.escape(title)}</h2>", *(f"<p>{html.escape(line)}</p>" for line in told)]
        body += [*map(pages.table, tables), *figures.get(title, [])]
    body += ["<h2>Commands and hashes</h2>", *_commands(notes)]
    page = folder / "report.html"
    write_whole(page, pages.page(f"The claims of LEDOM in miniature, size {size}", body, STYLE))
    return page


def _speeds(twins: Twins) -> dict[str, list[float]]:
    """Median tokens/s and share of the matmul peak, by corpus and model, of all runs."""
    found = {}
    for corpus, model in product(DOMAINS, twins.settings.models):
        runs = [twins.run_of(corpus, model, s, d) for s, d in product(twins.settings.seeds, DIRECTIONS)]
        values = [speed_of(run) for run in runs]
        found[f"{corpus}, {model}"] = [sum(column) / len(values) for column in zip(*values, strict=True)]
    return found


def _sections(results: dict[str, Any], settings: Settings) -> list[tuple[str, list[str], list[Rows]]]:
    """(title, sentences, tables) of each part."""
    report, level, beam = (results["rewards"][name] for name in ("report", "level", "beam"))
    num = results["num_seeds"]
    about = f"{num} seeds of both models, every one reported; lambda by seed, chosen on the development part alone: "
    about += ", ".join(f"{row[0]:.2f}" for row in report["held_out"]["lambdas"])
    beamed = (
        f"Beam search: {_percent(beam['accuracy'])} % right with {beam['tokens']:.0f} tokens a question. Best of {beam['num']} by"
        f" Reverse Reward, {beam['num_tokens']:.0f} tokens: {_percent(beam['best_of_num'])} %."
    )
    failed = [*_not_reproduced(results), *abilities_not_reproduced(results["abilities"])]
    return [
        ("What did not reproduce", failed or ["Every direction of effect that was looked at is as published."], []),
        ("Loss", [_about_loss(num)], [_gap_rows(results["gaps"]), _speed_rows(results["speed"])]),
        (
            "Reverse Reward",
            [_about_level(level), about, *sentences(report), beamed],
            [_method_rows(report), _equal_rows(report)],
        ),
        *abilities_sections(results["abilities"]),
        ("What made the difference", [_ABOUT_ABLATIONS], [_ablation_rows(results["ablations"], "to Reverse Reward")]),
        ("Wrong direction", [_ABOUT_WRONG], [_ablation_rows(results["wrong"], "to chance")]),
        ("What is open", [OPEN], []),
    ]


_ABOUT_ABLATIONS = (
    "The same candidates, judged otherwise. The scorers of pairs are trained from scratch for as many steps as the twins. Differences"
    " are paired, question by question; intervals are not widened for their number."
)
_ABOUT_WRONG = (
    "A guard on the whole pipeline: copies of the twins whose config says the other direction. Their choice must not be better than"
    " chance, the mean over all candidates. An interval above 0 means that something leaks."
)


def _about_loss(num: int) -> str:
    return (
        f"Twins differ in the order of the ids alone. {num} seeds; the gap is reverse over forward on held-out text at the end, its"
        f" interval Student's t over seeds. Published: {PUBLISHED}."
    )


def _about_level(level: dict[str, Any]) -> str:
    greedy = ", ".join(f"level {name}: {_percent(value)} %" for name, value in level["greedy"].items())
    low, high = (f"{100 * value:.0f}" for value in WANTED)
    rule = f"Level {level['level']} was taken before any reranked result was seen: the first that the forward model solves greedily"
    rule += f" in {low} to {high} % of the cases on the calibration part (mean of all seeds; {greedy})."
    return rule if level["is_inside"] else rule + " None was inside: the nearest to the middle was taken."


def _side(interval: list[float] | None) -> str:
    """What an interval that is not above 0 says."""
    if interval is None:
        return ", one seed"
    return ", surely below" if interval[1] < 0 else ", the interval holds 0"


def _not_reproduced(results: dict[str, Any]) -> list[str]:
    """A sentence for each claim that this size does not show, with the likely reason."""
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
            f"Reverse Reward is not significantly above these baselines: {against}. The scorer is as small as the answerer and saw the"
            " same problems, and a reverse model cannot see a wrong sum, only a chain that does not fit the question; with few"
            " questions a small gain cannot be told from none."
        )
    for row in results["wrong"]:
        if row["difference_interval"][0] > 0:
            told.append(
                f"{row['name']} chooses better than chance ({100 * row['difference']:+.1f} points): look into this first."
            )
    return told


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _interval(interval: list[float] | None, scale: float = 1.0, form: str = "+.2f") -> str:
    return "none" if interval is None else " to ".join(format(scale * value, form) for value in interval)


def _gap_rows(found: list[dict[str, Any]]) -> Rows:
    rows = [["corpus, model", "held out", "forward", "reverse", "gap %", "95 % interval", "each seed"]]
    for row in found:
        means = [sum(row["losses"][d]) / len(row["by_seed"]) for d in ("forward", "reverse")]
        seeds = " ".join(f"{value:+.2f}" for value in row["by_seed"])
        cells = [f"{row['corpus']}, {row['model']}", row["domain"], *(f"{m:.4f}" for m in means), f"{row['gap']:+.2f}"]
        rows.append([*cells, _interval(row["interval"]), seeds])
    return rows


def _speed_rows(speeds: dict[str, list[float]]) -> Rows:
    rows = [["corpus, model", "tokens/s of one run", "share of one core's matmul peak (fp32)"]]
    return rows + [[name, f"{speed:,.0f}", f"{100 * share:.0f} %"] for name, (speed, share) in speeds.items()]


def _method_rows(report: dict[str, Any]) -> Rows:
    rows = [["method", "right %", "95 % interval", "each seed", "how it chooses"]]
    for name, found in report["methods"].items():
        seeds = " ".join(map(_percent, found["by_seed"]))
        rows.append([name, _percent(found["accuracy"]), _interval(found["interval"], 100, ".1f"), seeds, METHODS[name]])
    return rows


def _equal_rows(report: dict[str, Any]) -> Rows:
    rows = [["method at equal tokens", "candidates", "tokens a question", "right %"]]
    for row in report["equal_tokens"]:
        rows.append([row["method"], str(row["num_candidates"]), f"{row['tokens']:.0f}", _percent(row["accuracy"])])
    return rows


def _ablation_rows(found: list[dict[str, Any]], other: str) -> Rows:
    rows = [["variant", "right %", "95 % interval", "each seed", f"difference {other}", "95 % interval"]]
    for row in found:
        cells = [row["name"], _percent(row["accuracy"]), _interval(row["interval"], 100, ".1f")]
        cells += [" ".join(map(_percent, row["by_seed"])), f"{100 * row['difference']:+.1f}"]
        rows.append([*cells, _interval(row["difference_interval"], 100, "+.1f")])
    return rows


def _loss_figures(twins: Twins) -> list[str]:
    """Curves of the first seed's twins, for each corpus and model."""
    figures, seed = [], twins.settings.seeds[0]
    for corpus, model in product(DOMAINS, twins.settings.models):
        runs = load_runs([str(twins.run_of(corpus, model, seed, direction)) for direction in DIRECTIONS])
        title = f"{corpus}, {model} model, seed {seed}"
        figures.append(pages.figure(f"loss: {title}", {theme: draw("loss", runs, theme, 5, title) for theme in pages.THEMES}))
    return figures


def _reward_figures(report: dict[str, Any]) -> list[str]:
    over_n = {theme: draw_over_n(report, theme) for theme in pages.THEMES}
    over_lambda = {theme: draw_over_lambda(report, theme) for theme in pages.THEMES}
    return [pages.figure("accuracy over N", over_n), pages.figure("accuracy over lambda", over_lambda)]


def _commands(notes: dict[str, dict[str, Any]]) -> list[str]:
    """Every step's commands, seconds, and the sha256 of what it read."""
    told = [f"<p>{len(notes)} steps, {sum(note['seconds'] for note in notes.values()):,.0f} s of one core each.</p>"]
    for name, note in notes.items():
        lines = [shlex.join(command) for command in note["commands"]]
        lines += [f"{digest[:16]}  {path}" for path, digest in note["inputs"].items()]
        title = html.escape(f"{name}, {note['seconds']:.1f} s")
        told.append(f"<details><summary>{title}</summary><pre>{html.escape(chr(10).join(lines))}</pre></details>")
    return told


def _markdown(size: str, sections: list[tuple[str, list[str], list[Rows]]]) -> str:
    parts = [f"# The claims of LEDOM in miniature, size {size}"]
    for title, told, tables in sections:
        parts += [f"## {title}", *told]
        for rows in tables:
            lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
            parts.append("\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]))
    return "\n\n".join(parts) + "\n"
