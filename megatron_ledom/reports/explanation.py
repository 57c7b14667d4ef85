"""Explanation of one question's ranked candidates, step by step, for a terminal and as a page.

Each step of a candidate is shaded by log P_R(x | y up to the end of the step): how well the question x follows from the answer y
so far. The scored tokens are always those of the question, so steps and candidates are comparable, unlike sums over the answer,
which fall with its length. LEDOM (arXiv 2507.01335) shows its examples in this way.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ledom.errors import visible
from megatron_ledom.inference.engines.engine import Engine, StepDelimiter
from megatron_ledom.reports import pages
from megatron_ledom.reports.pages import number, paragraph

LIGHT, DARK = (222, 236, 250), (255, 170, 90)
"""Colours (red, green, blue) of the lowest and the highest value; dark text is legible on both."""
HTML_STYLE = """
.step { color: #1b1b1b; padding: 0 .15rem; border-radius: .2rem; white-space: pre-wrap; } h2 { font-size: 1.05rem; }
.value { font-size: .75rem; opacity: .75; }
"""


@dataclass(frozen=True, slots=True)
class ExplainedStep:
    """The text of a step, and log P_R of the question given the answer up to the end of the step."""

    text: str
    reverse_logprob: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """The candidates of one question, best first: each one's position in the input, its reward and its steps.

    skipped: for each candidate the reason if the ranking skipped it, else None; a skipped candidate has no steps here.
    """

    prompt: str
    positions: list[int]
    rewards: list[float | None]
    candidates: list[list[ExplainedStep]]
    skipped: list[str | None]

    def shade(self, value: float) -> tuple[int, int, int]:
        """Return the colour of a value in the range of all steps."""
        values = [step.reverse_logprob for steps in self.candidates for step in steps]
        low, high = min(values), max(values)
        fraction = (value - low) / (high - low) if high > low else 1.0
        red, green, blue = (round(a + fraction * (b - a)) for a, b in zip(LIGHT, DARK, strict=True))
        return red, green, blue


def explain(
    reverse: Engine,
    prompt: str,
    answers: Sequence[str],
    rewards: Sequence[float | None],
    ranking: Sequence[int],
    delimiter: StepDelimiter,
    skipped: Sequence[str | None] | None = None,
) -> Explanation:
    """Score each answer after each of its steps, all in one call, so that they share batches. Empty answers have no steps.

    skipped: for each answer the reason if the ranking skipped it, else None; a skipped answer is not scored here.
    """
    reasons = [None] * len(answers) if skipped is None else skipped
    cut = [delimiter.steps_of(answers[position]) if reasons[position] is None else [] for position in ranking]
    begun = ["".join(steps[: end + 1]) for steps in cut for end in range(len(steps))]
    scores = iter(reverse.score([(prompt, text) for text in begun]))
    explained = [[ExplainedStep(step, next(scores).logprob) for step in steps] for steps in cut]
    ranked = [rewards[position] for position in ranking]
    return Explanation(prompt, list(ranking), ranked, explained, [reasons[position] for position in ranking])


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
    """Return one page without external files; every text of a model is escaped."""
    body = [
        paragraph(explanation.prompt),
        "<p>A step is shaded by log P<sub>R</sub>(question | answer up to its end); a warmer colour means a likelier question.</p>",
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
    """Return the rank, position and reward of each candidate, and the reason if the ranking skipped it."""
    lines = []
    rows = zip(explanation.positions, explanation.rewards, explanation.skipped, strict=True)
    for rank, (position, reward, reason) in enumerate(rows, 1):
        skipped = "" if reason is None else f"; skipped by the ranking and not scored here: {_visible(reason)}"
        lines.append(f"{rank}. candidate {position}, reward {number(reward, '.3f', missing='none')}{skipped}")
    return lines


def _visible(text: str) -> str:
    """Return a text without line breaks at its end and without control characters, which could change the terminal."""
    return "".join(c if c.isprintable() else " " if c in "\n\t" else "\ufffd" for c in text.rstrip("\n"))
