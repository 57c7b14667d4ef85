"""The report of the study: an HTML page and a Markdown summary with the same tables, from the files of the steps."""

import html
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from abilities import Abilities
from abilities_report import abilities_claims, abilities_not_reproduced, abilities_section
from ablations import Ablations
from backward import Backward
from backward import section as backward_section
from contamination import Contamination
from contamination_report import TITLE as CONTAMINATION
from contamination_report import contamination_section
from control_budget import results_with_sampling, section_with_sampling
from controls import Controls
from controls_report import TITLE as CONTROLS
from controls_report import first_section
from families import mark_over_seeds
from infill import Infilling
from infill_report import TITLE as INFILL
from infill_report import infill_section
from loss_gap import LossGap
from loss_gap_report import TITLE as LOSS_GAP
from loss_gap_report import loss_gap_section
from losses import Twins, gaps, gaps_by_place, speed_of
from mistakes import mistakes
from plots import loss_plots
from reinforcement import Reinforcement
from reinforcement_report import TITLE as REINFORCEMENT
from reinforcement_report import reinforcement_section
from rewards import Rewards
from sections import Section, ablation, claims, loss, not_reproduced, reward
from settings import Settings
from teacher import Teacher
from teacher_report import TITLE as TEACHER
from teacher_report import teacher_section
from twins import DIRECTIONS, read_metrics
from two_way import TwoWay
from two_way_report import TITLE as TWO_WAY
from two_way_report import two_way_section

from megatron_ledom.reports import pages
from megatron_ledom.reports.method_comparison import plots_of
from megatron_ledom.storage.files import write_file
from megatron_ledom.tables import markdown_table

STYLE = "table { margin-bottom: 1.5rem; }"


def write_study(folder: Path, size: str, settings: Settings, notes: dict[str, dict[str, Any]]) -> Path:
    """Write results.json, summary.md and report.html into `folder`, and return the path of the page."""
    twins = Twins(folder, settings)
    rewards = Rewards(twins)
    backward, ablations = Backward(rewards), Ablations(rewards)
    results = {"size": size, "num_seeds": len(settings.seeds), "word_problems": twins.corpora.counts()}
    results |= {"gaps": gaps(twins), "places": gaps_by_place(twins), "speed": _speeds(twins), "rewards": rewards.results()}
    mark_over_seeds(results["gaps"])
    mark_over_seeds([row for rows in results["places"].values() for row in rows])
    results["training_tokens"] = _training_tokens(twins)
    weights = [row[0] for row in results["rewards"]["report"]["held_out"]["lambdas"]]
    results["mistakes"] = mistakes(rewards, weights)
    results |= {"abilities": Abilities(twins).results(), "backward": backward.results()}
    results |= {"ablations": ablations.results(), "wrong": ablations.wrong_direction()}
    results |= {name: read(rewards) if name in settings.parts else None for name, (_, read, _) in ALONE.items()}
    write_file(folder / "results.json", json.dumps(results, indent=1))
    failed = [*not_reproduced(results), *abilities_not_reproduced(results["abilities"])]
    failed = failed or ["Every tested effect has the published sign."]
    alone = {name: section(results[name]) for name, (_, _, section) in ALONE.items()}
    sections = [
        first_section(results["controls"], results["loss_gap"]),
        claims(results, abilities_claims(results["abilities"])),
        Section(title="Not reproduced", paragraphs=failed),
        loss(results, loss_plots(twins, results["places"])),
        reward(results, plots_of(results["rewards"]["report"])),
        abilities_section(results["abilities"]),
        backward_section(results["backward"]),
        *ablation(results),
        *alone.values(),
    ]
    title = f"The claims of LEDOM in miniature, size {size}"
    write_file(folder / "summary.md", _markdown(title, sections))
    return _write_page(folder / "report.html", title, sections, _commands(notes, settings))


ALONE: dict[str, tuple[str, Callable[[Rewards], Any], Callable[[Any], Section]]] = {
    "reinforcement": (REINFORCEMENT, lambda rewards: Reinforcement(rewards).results(), reinforcement_section),
    "contamination": (CONTAMINATION, lambda rewards: Contamination(rewards).results(), contamination_section),
    "controls": (CONTROLS, lambda rewards: results_with_sampling(Controls(rewards.twins)), section_with_sampling),
    "loss_gap": (LOSS_GAP, lambda rewards: LossGap(rewards.twins).results(), loss_gap_section),
    "infill": (INFILL, lambda rewards: Infilling(rewards.twins).results(), infill_section),
    "two_way": (TWO_WAY, lambda rewards: TwoWay(Abilities(rewards.twins)).results(), two_way_section),
    "teacher": (TEACHER, lambda rewards: Teacher(rewards.twins).results(), teacher_section),
}
"""Parts that `--parts` runs alone: title, function of the results, and function of the section."""


def write_part(name: str, folder: Path, size: str, settings: Settings, notes: dict[str, dict[str, Any]]) -> Path:
    """Write NAME.json, NAME.md and NAME.html, the report of one part of ALONE, into `folder`. Return the path of the page."""
    title, read, section = ALONE[name]
    results = read(Rewards(Twins(folder, settings)))
    sections, title = [section(results)], f"{title}, size {size}"
    write_file(folder / f"{name}.json", json.dumps(results, indent=1))
    write_file(folder / f"{name}.md", _markdown(title, sections))
    return _write_page(folder / f"{name}.html", title, sections, _commands(notes, settings))


def _write_page(page: Path, title: str, sections: Sequence[Section], commands: list[str]) -> Path:
    body = [line for section in sections for line in _as_html(section)]
    write_file(page, pages.page(title, [*body, "<h2>Commands and hashes</h2>", *commands], STYLE))
    return page


def _training_tokens(twins: Twins) -> int:
    """Return the tokens that a model of part 2 read in its training."""
    run = twins.run_of("maths", twins.largest, twins.settings.seeds[0], "forward")
    return int(read_metrics(run / "metrics.jsonl")[-1]["consumed_train_tokens"])


def _speeds(twins: Twins) -> dict[str, list[float]]:
    """Return by corpus and model the mean tokens/s of a run, and its fraction of the highest measured matmul peak."""
    found = {}
    for corpus, model in product(twins.corpora.domains, twins.settings.models):
        runs = [twins.run_of(corpus, model, s, d) for s, d in product(twins.settings.seeds, DIRECTIONS)]
        values = [speed_of(run) for run in runs]
        speed = sum(tokens for tokens, _ in values) / len(values)
        found[f"{corpus}, {model}"] = [speed, speed * min(share / tokens for tokens, share in values)]
    return found


def _as_html(section: Section) -> list[str]:
    paragraphs = map(pages.paragraph, section.paragraphs)
    return [f"<h2>{html.escape(section.title)}</h2>", *paragraphs, *map(pages.table, section.tables), *section.plots]


def _commands(notes: dict[str, dict[str, Any]], settings: Settings) -> list[str]:
    """Return as HTML the study's command and settings, and the commands, seconds and hashes of each step."""
    parts = [f"<pre>{html.escape(shlex.join(sys.argv))}\n{html.escape(json.dumps(asdict(settings)))}</pre>"]
    parts += [
        f"<p>{len(notes)} steps, {sum(note['seconds'] for note in notes.values()):,.0f} s in total, on one core each.</p>"
    ]
    for name, note in notes.items():
        lines = [shlex.join(command) for command in note["commands"]]
        lines += [f"package {note['package']}"] if "package" in note else []
        lines += [f"settings {json.dumps(note['settings'])}"] if note.get("settings") is not None else []
        lines += [f"{digest[:16]}  examples/study/{path}" for path, digest in (note.get("code") or {}).items()]
        lines += [f"{digest[:16]}  {path}" for path, digest in note["inputs"].items()]
        title = html.escape(f"{name}, {note['seconds']:.1f} s")
        parts.append(f"<details><summary>{title}</summary><pre>{html.escape(chr(10).join(lines))}</pre></details>")
    return parts


def _markdown(title: str, sections: Sequence[Section]) -> str:
    parts = [f"# {title}"]
    for section in sections:
        parts += [f"## {section.title}", *section.paragraphs]
        parts += map(markdown_table, section.tables)
    return "\n\n".join(parts) + "\n"
