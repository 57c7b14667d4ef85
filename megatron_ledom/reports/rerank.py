"""The report of reranked files: methods compared, or one choice explained step by step.

An explained candidate is shaded step by step, by how well the question follows from what is written so far: log P_R(x | y up to and
with the step). It is a likelihood of the same question tokens everywhere, so steps and candidates can be compared with each other,
unlike sums over the answer, which fall with its length (LEDOM, arXiv 2507.01335, shows its examples this way).
"""

import html
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, LedomError, UsageError, visible
from megatron_ledom.inference.engines.engine import Engine, StepDelimiter
from megatron_ledom.inference.model_folder import SAY_REVERSE_EOD
from megatron_ledom.inference.reverse_reward.rerank_part import spent_file
from megatron_ledom.inference.reverse_reward.reward import RewardSettings
from megatron_ledom.reports import pages
from megatron_ledom.reports.pages import number, paragraph
from megatron_ledom.reports.selection import ReportSettings, report_selection, sentences, verdict
from megatron_ledom.storage.files import write_file
from megatron_ledom.storage.locks import output_folder_lock

LIGHT, DARK = (222, 236, 250), (255, 170, 90)
"""Colours of the lowest and of the highest value, red, green, blue; both carry dark text."""
HTML_STYLE = """
.step { color: #1b1b1b; padding: 0 .15rem; border-radius: .2rem; white-space: pre-wrap; } h2 { font-size: 1.05rem; }
.value { font-size: .75rem; opacity: .75; }
"""
Options = dict[str, Any]


def report_rerank(options: Options) -> None:
    """Compare the methods over reranked files, or explain one choice; write the page and print the finding."""
    for path in [*options["files"], *([options["beam"]] if options["beam"] else [])]:
        if not os.path.isfile(path):
            raise UsageError(f"{path} is no file; pass outputs of ledom rerank")
    with output_folder_lock(options["output"]):
        if options["explain"] is None:
            _compare(options)
        else:
            _explain(options)


def _compare(options: Options) -> None:
    if options["gold_key"] is None:
        raise UsageError("a comparison needs --gold-key, the field with the right answer")
    settings = ReportSettings(
        gold_key=options["gold_key"],
        answers=options["answers"],
        reward=recorded_reward(options["files"]),
        num_folds=options["folds"],
        seed=options["seed"],
        ranked_at=tuple(recorded_weight(path) for path in options["files"]),
    )
    report = report_selection(options["files"], options["output"], settings, beam=options["beam"])
    print(verdict(report))
    for name, found in report["methods"].items():
        print(f"{name:<28}{100 * found['accuracy']:6.1f} %")
    print(*report["notes"], *sentences(report), os.path.join(options["output"], "report.html"), sep="\n")


def _explain(options: Options) -> None:
    from megatron_ledom.inference.engines.engine import StepDelimiter
    from megatron_ledom.inference.engines.transformers_engine import TransformersEngine
    from megatron_ledom.inference.language_model import ReverseLM
    from megatron_ledom.inference.reverse_reward.ranked_lines import ranked_candidates, read_reranked

    if options["reverse"] is None:
        raise UsageError("--explain needs --reverse, the folder of the reverse model")
    records = read_reranked(options["files"][0])
    if not 1 <= options["explain"] <= len(records):
        raise UsageError(f"{options['files'][0]} has lines 1 to {len(records)}, asked for was {options['explain']}")
    record = records[options["explain"] - 1]
    where = f"{options['files'][0]}:{options['explain']}"
    texts, rewards, skipped = ranked_candidates(record, where)
    eod_id = options["reverse_eod_id"]  # a folder for which it is given records no direction either
    direction = None if eod_id is None else str(Direction.REVERSE)
    reverse = ReverseLM.from_pretrained(options["reverse"], direction=direction, eod_id=eod_id, say=SAY_REVERSE_EOD)
    engine = TransformersEngine(reverse)
    delimiter = StepDelimiter.parse(options["step_delimiter"])
    try:
        explanation = explain(engine, record["prompt"], texts, rewards, record["ranking"], delimiter, skipped)
    except LedomError as error:
        raise type(error)(f"{where}: {error}") from error
    page = Path(options["output"], f"explain_{options['explain']}.html")
    write_file(page, as_html(explanation).encode("utf-8", errors="xmlcharrefreplace"))
    print(as_terminal(explanation))
    print(page)


def recorded_reward(files: list[str]) -> RewardSettings:
    """Return the reward's settings that stand beside the files; the defaults where none are. UsageError where they differ."""
    found = []
    for path in files:
        beside = spent_file(path)
        if beside.is_file():
            found.append(_reward_beside(beside))
    for settings in found[1:]:
        if replace(settings, weight=0) != replace(found[0], weight=0):
            raise UsageError(f"the files were made with different rewards ({settings} and {found[0]}); compare like with like")
    return found[0] if found else RewardSettings()


def _reward_beside(path: Path) -> RewardSettings:
    """Return the reward's settings in the notes of a reranking; DataError where there are none."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))["made_by"]["settings"]["reward"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path}: has no made_by.settings.reward ({type(error).__name__}: {error}); rerank again, or remove it to take the defaults"
        ) from error
    if not isinstance(settings, dict):
        raise DataError(f"{path}: made_by.settings.reward is {settings!r:.60}, expected an object; rerank again")
    if "weight" not in settings:
        raise DataError(
            f"{path}: made_by.settings.reward has no weight; rerank again, or remove {path.name} to take the defaults"
        )
    try:
        return RewardSettings(**settings)
    except (TypeError, OverflowError, UsageError) as error:
        raise DataError(f"{path}: made_by.settings.reward cannot be used ({error}); rerank again") from error


def recorded_weight(file: str) -> float | None:
    """Return the weight at which a file was ranked, None where no notes beside it tell."""
    beside = spent_file(file)
    return _reward_beside(beside).weight if beside.is_file() else None


@dataclass(frozen=True, slots=True)
class ExplainedStep:
    """A step's text, and log P_R of the question given the answer up to its end."""

    text: str
    reverse_logprob: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """The candidates of one question, best first: each one's place in the input, its reward and its steps.

    skipped: why a candidate was skipped when it was ranked; it has no steps here. None for every other one.
    """

    prompt: str
    places: list[int]
    rewards: list[float | None]
    candidates: list[list[ExplainedStep]]
    skipped: list[str | None]

    def shade(self, value: float) -> tuple[int, int, int]:
        """Return the colour of a value among those of all steps."""
        values = [step.reverse_logprob for steps in self.candidates for step in steps]
        low, high = min(values), max(values)
        share = (value - low) / (high - low) if high > low else 1.0
        red, green, blue = (round(a + share * (b - a)) for a, b in zip(LIGHT, DARK, strict=True))
        return red, green, blue


def steps_of(answer: str, delimiter: StepDelimiter) -> list[str]:
    """Return the answer cut after each delimiter; together the steps are the answer. White space at the end joins the last step."""
    steps: list[str] = []
    rest = answer
    while rest:
        end = delimiter.end_of_step(rest)
        if end is None:
            if rest.strip() or not steps:
                return [*steps, rest]
            return [*steps[:-1], steps[-1] + rest]
        steps.append(rest[:end])
        rest = rest[end:]
    return steps


def explain(
    reverse: Engine,
    prompt: str,
    answers: Sequence[str],
    rewards: Sequence[float | None],
    ranking: Sequence[int],
    delimiter: StepDelimiter,
    skipped: Sequence[str | None] | None = None,
) -> Explanation:
    """Score each answer after each of its steps; all of them in one call, so that they share batches. Empty answers have no steps.

    skipped: of each answer, why the ranking skipped it, or None; a skipped one is not scored here either.
    """
    reasons = [None] * len(answers) if skipped is None else skipped
    cut = [steps_of(answers[place], delimiter) if reasons[place] is None else [] for place in ranking]
    begun = ["".join(steps[: end + 1]) for steps in cut for end in range(len(steps))]
    scores = iter(reverse.score([(prompt, text) for text in begun]))
    explained = [[ExplainedStep(step, next(scores).logprob) for step in steps] for steps in cut]
    ranked = [rewards[place] for place in ranking]
    return Explanation(prompt, list(ranking), ranked, explained, [reasons[place] for place in ranking])


def as_terminal(explanation: Explanation) -> str:
    """Return the explanation with 24-bit colours for a terminal."""
    lines = [visible(explanation.prompt), ""]
    for heading, steps in zip(_headings(explanation), explanation.candidates, strict=True):
        lines.append(heading)
        for step in steps:
            red, green, blue = explanation.shade(step.reverse_logprob)
            shaded = f"\x1b[48;2;{red};{green};{blue}m\x1b[38;2;27;27;27m{_visible(step.text)}\x1b[0m"
            lines.append(f"{step.reverse_logprob:10.2f}  {shaded}")
        lines.append("")
    return "\n".join(lines)


def as_html(explanation: Explanation) -> str:
    """Return one page that needs nothing besides itself; every text of a model is escaped."""
    body = [
        paragraph(explanation.prompt),
        "<p>A step is shaded by log P<sub>R</sub>(question | answer up to its end); the warmer, the better the question follows.</p>",
    ]
    for heading, steps in zip(_headings(explanation), explanation.candidates, strict=True):
        body.append(f"<h2>{html.escape(heading)}</h2>")
        for step in steps:
            colour = "rgb({},{},{})".format(*explanation.shade(step.reverse_logprob))
            value = f"{step.reverse_logprob:.2f}"
            text = html.escape(step.text.rstrip("\n"))
            body.append(
                f'<div><span class="step" style="background:{colour}" title="{value}">{text}</span>'
                f' <span class="value">{value}</span></div>'
            )
    return pages.page("Why this answer", body, HTML_STYLE)


def _headings(explanation: Explanation) -> list[str]:
    """Return the rank, place and reward of each candidate, and why it was skipped when it was ranked."""
    lines = []
    rows = zip(explanation.places, explanation.rewards, explanation.skipped, strict=True)
    for rank, (place, reward, reason) in enumerate(rows, 1):
        skipped = "" if reason is None else f"; skipped when it was ranked, and not scored here: {_visible(reason)}"
        lines.append(f"{rank}. candidate {place}, reward {number(reward, '.3f', missing='none')}{skipped}")
    return lines


def _visible(text: str) -> str:
    """Return a text without the line break at its end, and without control characters that would steer the terminal."""
    return "".join(c if c.isprintable() else " " if c in "\n\t" else "\ufffd" for c in text.rstrip("\n"))
