"""The section of part 5 in the report: paragraphs, tables and plots of `Reinforcement.results()`."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from families import side_of
from grpo_rewards import BASE, REVERSE, RIGHT, SHUFFLED
from reinforcement import INSTALL
from sections import Results, Rows, Section, interval, percent

from megatron_ledom.reports import pages
from megatron_ledom.reports.curves import moving_average

TITLE = "Training with Reverse Reward"
SCORES = {"greedy": "greedy", "right": "sampled", "majority": "majority vote"}
PERCENTS = {
    "copied": "copied from the question, % of words",
    "known_words": "words of the question, %",
    "has_end": "with a final answer, %",
    "false_calculation": "with a calculation error, %",
    "unfit": "correct, but for another question, %",
    "is_cut": "cut at the limit, %",
}
NUMBERS = {
    "reward": ("mean Reverse Reward", ".2f"),
    "tokens": ("tokens", ".1f"),
    "kl": ("divergence from the start, nats", ".2f"),
}
LINES = {
    "reward": ("mean Reverse Reward of the answers (nats)", 1.0),
    "right": ("right answers, %", 100.0),
    "tokens": ("tokens per answer", 1.0),
    "copied": ("words copied from the question, %", 100.0),
    "false_calculation": ("answers with a calculation error, %", 100.0),
}
COLOUR_OF = {REVERSE: 0, SHUFFLED: 5, RIGHT: 1}
SMOOTH = 5


def reinforcement_section(results: Results | None) -> Section:
    """Return the section of part 5, or its note that it is omitted."""
    if results is None:
        return Section(title=TITLE, paragraphs=[f"Omitted, because TRL is not installed. {INSTALL} installs it."])
    tables = [_score_rows(results), _sign_rows(results, NUMBERS), _sign_rows(results, PERCENTS)]
    paragraphs = [_about(results), *_outcomes(results), *_hacking(results), _SIGNS]
    plots = [pages.figure(f"{name} in training", partial(_draw, results, name)) for name in LINES]
    return Section(title=TITLE, paragraphs=paragraphs, tables=tables, plots=plots)


def _about(results: Results) -> str:
    settings, seeds = results["settings"], results["seeds"]
    num = settings["num_questions"] * settings["num_generations"]
    num_seeds = "One seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    return (
        f"TRL's GRPO trains the forward twins on new questions of the level of part 2: {settings['steps']} steps of {num} answers,"
        f" {settings['num_generations']} to each of {settings['num_questions']} questions; learning rate"
        f" {settings['learning_rate']:g}, no penalty for the divergence. {num_seeds}, all reported, each with its own models;"
        f" lambda by seed, chosen on the development part: {', '.join(f'{one:.2f}' for one in results['lambdas'])}. The forward model"
        " of the reward stays the untrained one. Every arm of a seed sees the same questions in the same order. The control with"
        " shuffled rewards gets the Reverse Rewards of the answers to each question in random order: the same advantages,"
        " without information. Measured"
        f" on the {results['num_test']} test questions of part 2, with {settings['num_samples']} answers to each, sampled at"
        " temperature 1. Intervals are paired bootstraps over seeds and questions."
        " Significant, and * after an interval: after Holm's correction over all measures of all arms."
    )


_SIGNS = (
    "Signs of answers that please the reward only: their length; the share of their words (numbers and signs included) in runs of"
    " three that the question has too; the share of their words and numbers that occur anywhere in the question; the"
    " share that ends in a line #### N; calculation errors (or no calculation) and correct calculations of another"
    " question, as in part 2; answers that had not ended at the limit of tokens. The divergence is log P(answer) of the trained"
    " minus that of the untrained model, the mean over answers of the trained one."
)


def _verdict(row: Results) -> str:
    """Return the direction of a difference: rose, fell, or not significant."""
    return {1: "significantly higher", -1: "significantly lower", 0: "not significantly different"}[side_of(row)]


def _points(row: Results) -> str:
    return f"{100 * row['difference']:+.1f} points ({interval(row['difference_interval'], 100, '+.1f')})"


def _outcomes(results: Results) -> Iterator[str]:
    """Yield a sentence on each arm's right answers, and one on Reverse Reward against the shuffled rewards."""
    arms = results["arms"]
    for name in (REVERSE, SHUFFLED, RIGHT):
        found = [f"{label} {_points(arms[name][key])}, {_verdict(arms[name][key])}" for key, label in SCORES.items()]
        yield f"{name[0].upper()}{name[1:]}, right answers against no training: {'; '.join(found)}."
    row = results["against_shuffled"]["right"]
    yield f"{REVERSE} against {SHUFFLED}, sampled: {_points(row)}, {_verdict(row)}."


def _hacking(results: Results) -> Iterator[str]:
    """Yield sentences on the reward that was trained, and on the signs that moved with it."""
    arms = results["arms"]
    reward, right = arms[REVERSE]["reward"], arms[REVERSE]["right"]
    before = arms[BASE]["reward"]["mean"]
    text = (
        f"Mean Reverse Reward of the answers, without training and trained on it: {before:.2f} and {reward['mean']:.2f} nats,"
        f" {_verdict(reward)}; right answers have {results['right_answers']['reward']:.2f}."
    )
    if side_of(reward) > 0 and side_of(right) <= 0:
        text += " The reward rose, but right answers not significantly: some of the gain may please the reward only."
    if reward["mean"] > results["right_answers"]["reward"]:
        text += " Its answers have a higher reward than the right ones."
    yield text
    moved = [_moved(arms[REVERSE], arms[BASE], key, label, ".1f", 100.0) for key, label in PERCENTS.items()]
    moved.append(_moved(arms[REVERSE], arms[BASE], "tokens", "tokens per answer", ".1f", 1.0))
    changes = "; ".join(one for one in moved if one)
    yield f"Signs that changed significantly with Reverse Reward: {changes or 'none'}."


def _marked(row: Results) -> str:
    return f"{interval(row['difference_interval'], 100, '+.1f')}{' *' * row['is_significant']}"


def _moved(arm: Results, base: Results, key: str, label: str, form: str, scale: float) -> str:
    """Return the change of a sign, or nothing if it is not significant."""
    if not side_of(arm[key]):
        return ""
    return f"{label}: {scale * base[key]['mean']:{form}} to {scale * arm[key]['mean']:{form}}"


def _score_rows(results: Results) -> Rows:
    rows = [["arm", "answers", "right %", "95 % interval", "each seed", "difference from no training", "95 % interval"]]
    for name, arm in results["arms"].items():
        for key, label in SCORES.items():
            one = arm[key]
            cells = [name, label, percent(one["mean"]), interval(one["interval"], 100, ".1f")]
            cells.append(" ".join(map(percent, one["by_seed"])))
            is_base = name == BASE
            cells.append("none" if is_base else f"{100 * one['difference']:+.1f}")
            rows.append([*cells, "none" if is_base else _marked(one)])
    return rows


def _sign_rows(results: Results, columns: dict[str, Any]) -> Rows:
    """Return a table of signs by arm, each with its interval, and of the right answers themselves."""
    forms = {key: (*one, 1.0) if isinstance(one, tuple) else (one, ".1f", 100.0) for key, one in columns.items()}
    rows = [["arm", *(cell for label, _, _ in forms.values() for cell in (label, "95 % interval"))]]
    for name, arm in results["arms"].items():
        cells = [
            (f"{scale * arm[key]['mean']:{form}}", interval(arm[key]["interval"], scale, form))
            for key, (_, form, scale) in forms.items()
        ]
        rows.append([name, *(cell for pair in cells for cell in pair)])
    right, last = results["right_answers"], ["the right answers"]
    for key, (_, form, scale) in forms.items():
        last += [f"{scale * right[key]:{form}}" if key in right else "none", "none"]
    return [*rows, last]


def _draw(results: Results, name: str, theme: str) -> bytes:
    """Draw the means over seeds in each step of the training, with their moving averages."""
    label, scale = LINES[name]

    def _fill(axes: Any) -> None:
        for arm, curves in results["curves"].items():
            values, colour = [scale * value for value in curves[name]], pages.COLOURS[theme][COLOUR_OF[arm]]
            steps = list(range(1, len(values) + 1))
            axes.plot(steps, values, color=colour, alpha=0.25, lw=0.8)
            axes.plot(steps, moving_average(values, SMOOTH), color=colour, lw=1.6, label=arm)
        axes.set(xlabel="step", ylabel=label)

    return pages.draw_png(theme, (8.5, 3.0), _fill)
