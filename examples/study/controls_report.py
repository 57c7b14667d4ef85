"""The section of part 7, and the first section of the report: what the controls say about the claim."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from control_choice import FIRST, MARGIN, SCORERS
from gap_sentences import gap_sentences
from sections import Results, Rows, Section, interval, not_run, percent

from megatron_ledom.reports import pages

TITLE = "The reading order, or any second model?"
ABOUT = {
    FIRST: "the forward model that answers, alone: log P(answer | question)",
    "R": "reverse model: log P(question | answer)",
    "F2": "forward model of another seed: log P(answer | question)",
    "S": "forward model that reads the answer, then the question: log P(question | answer)",
    "PMI": "F1 alone: log P(answer | question) - log P(answer); F1 was trained on no answer alone",
    "PMI, P(y) of S": "the same with log P(answer) of S, which begins every text with an answer",
    "verifier": "F1 with a head, fine-tuned on right and wrong answers: log-odds of right",
}
EQUAL = {
    "R - F2": "a second forward model does as well: the gain is that of an ensemble",
    "R - S": "the conditional P(question | answer) does it, not the reading order",
}
MORE = {
    "R - F2": "the reverse model adds more than a second forward model",
    "R - S": "the reading order adds to the conditional P(question | answer)",
}
LESS = {
    "R - F2": "a second forward model helps more than the reverse model",
    "R - S": "the same conditional, read forward, helps more than the reverse model",
}


def first_section(controls: Results | None, gap: Results | None) -> Section:
    """Return the first section of the report."""
    if controls is None:
        found = ["Reverse Reward, the reading order or any second model: not run in this report (`--parts controls`)."]
    else:
        found = list(answers(controls))
    return Section(title="What the controls say about the claims", paragraphs=[*found, *gap_sentences(gap)])


def answers(results: Results) -> Iterator[str]:
    """Yield the sentences about the registered comparisons, the gain itself, and the planted errors."""
    own, first = results["accuracy"]["R"], results["accuracy"][FIRST]
    gain = results["secondary"][f"R - {FIRST}"]
    yield (
        f"Reverse Reward, {_about_size(results)}: {percent(own['mean'])} % right with the reverse model, {percent(first['mean'])} % by F1's own"
        f" likelihood ({_points(gain)}; Holm p = {gain['holm_p']:.3f})."
    )
    for name, row in results["primary"].items():
        other = results["secondary"][f"{name.removeprefix('R - ')} - {FIRST}"]
        yield f"{name} = {_points(row)}, Holm p = {row['holm_p']:.4f}: {verdict(name, row, gain, other)}."
    if len(results["seeds"]) < 10:
        yield "With fewer than ten seeds the 95 % intervals are too narrow, and with one they say nothing about other seeds."
    yield _about_planted(results["planted"])


def verdict(name: str, row: Results, gain: Results, other: Results) -> str:
    """Return the meaning of a registered comparison.

    gain, other: what R, and the scorer that R is compared with, add to F1 alone. Equality explains the gain of R only if the other
    scorer gains, too, and if the difference is small beside that gain: the rule is registered (EQUALITY in controls.py).
    """
    if row["is_significant"] and row["mean"] < 0:
        return LESS[name]
    if not _gains(gain):
        return "the reverse model does not gain significantly over F1 alone, so there is no gain to explain"
    if row["is_significant"]:
        return f"{MORE[name]}, by less than {100 * MARGIN:.0f} points" if row["is_equivalent"] else MORE[name]
    largest = max(map(abs, row["narrow_interval"]))
    if row["is_equivalent"] and _gains(other) and largest <= gain["interval"][0] / 2:
        return f"equal within {100 * MARGIN:.0f} points and within half of the gain, so {EQUAL[name]}"
    return "undecided: neither a difference nor an equality that would explain the gain is shown"


def _gains(row: Results) -> bool:
    return bool(row["is_significant"] and row["mean"] > 0)


def _about_size(results: Results) -> str:
    num = len(results["seeds"])
    return f"{num} {'seed' if num == 1 else 'seeds'}, {results['num_test']} test questions, {results['num_samples']} answers"


def _points(row: Results) -> str:
    return f"{100 * row['mean']:+.1f} points ({interval(row['interval'], 100, '+.1f')})"


def _about_planted(planted: Results) -> str:
    """Return which errors the reverse model sees and which it does not, with true chains of the same question beside them."""
    seen, blind = list[str](), list[str]()
    for kind in planted["kinds"]:
        row = planted["rows"][f"{kind}|R"]
        is_seen = row["is_significant"] and row["mean"] > 0.5
        (seen if is_seen else blind).append(f"{kind} ({row['mean']:.2f}, {interval(row['interval'], form='.2f')})")
    return (
        "Planted errors, the share in which the reverse model prefers the right chain: "
        f"significantly above one half for {'; '.join(seen) or 'none'}; not for {'; '.join(blind) or 'none'}."
    )


def controls_section(results: Results | None) -> Section:
    """Return the section of part 7."""
    if results is None:
        return not_run(TITLE, "controls")
    paragraphs = [*answers(results), _about(results), _about_registration(results["registration"]), _PLANTED, _budget(results)]
    tables = [
        _comparison_rows(results["primary"], "registered comparison"),
        _accuracy_rows(results),
        _comparison_rows(results["secondary"], "other comparison"),
        _planted_rows(results["planted"]),
        _comparison_rows(results["planted"]["against"], "planted error, difference"),
        _budget_rows(results),
    ]
    plots = [pages.figure("accuracy over N", partial(_draw_over_n, results))]
    return Section(title=TITLE, paragraphs=paragraphs, tables=tables, plots=plots)


def _about(results: Results) -> str:
    levels = "; ".join(f"{one['steps']} step(s) with numbers to {one['largest']}" for one in results["levels"])
    return (
        f"{_about_size(results)}, all seeds reported; levels: {levels}. Per seed, F1, R, F2 and S have the same shape, the same training"
        " problems and equally many tokens; S reads each text as answer, then question. R, F2 and S share a seed that is not F1's. The"
        " training problems are drawn by seed, too. The verifier reads as many tokens as each of them trained on, of F1's answers to half"
        " of the development problems, and needs to know which are right, as no other scorer does; lambda and N are chosen on the other half."
        " Score: F1 + lambda * X; lambda and N by seed, alike for all. Accuracies with N answers are means over all subsets"
        " of N. Intervals: paired bootstrap over seeds and questions (crossed); with few seeds they hardly extend beyond the range"
        " of these seeds. Holm p: adjusted within each table."
    )


def _about_registration(found: Results) -> str:
    hypotheses = " ".join(f"{name}: {text}" for name, text in found["hypotheses"].items())
    return (
        f"Registered before the test part was opened ({found['opened']}), sha256 {found['sha256']}: {hypotheses} Test: {found['test']}."
        f" Score: {found['score']}. Chosen lambda and N by seed: {_chosen(found['chosen'])}. The file"
        " `controls/registration.json` has the settings and the hashes; the answers of the test part are not read if it is missing or differs."
    )


def _chosen(chosen: dict[str, list[list[Any]]]) -> str:
    parts = []
    for name, rows in chosen.items():
        each = ", ".join(f"{float(weight):g} and {num}" for weight, num in rows)
        parts.append(f"{name}: {each}")
    return "; ".join(parts)


_PLANTED = (
    "Planted errors, without sampling: each right chain is compared with the same chain with one error. A value is the share of"
    " questions in which the right chain has the higher value of the scorer alone (the area under the ROC curve within questions; 0.5:"
    " blind). Pooled: the area over all pairs of chains, of different questions, too. Kinds: another number with true sums; a false sum after"
    " which the chain continues with the true one; a false sum with which it continues; plus for minus or minus for plus with true sums; the"
    " right chain of another question. Tested against 0.5 together (Holm)."
)


def _accuracy_rows(results: Results) -> Rows:
    rows = [["choice by", "X", "right %", "95 % interval", "each seed"]]
    found = {name if name == FIRST else f"F1 + lambda * {name}": (name, row) for name, row in results["accuracy"].items()}
    for label, (name, row) in found.items():
        rows.append([label, ABOUT[name], *_cells(row)])
    for name, row in results["baselines"].items():
        rows.append([name, "none", *_cells(row)])
    return rows


def _cells(row: Results) -> list[str]:
    return [percent(row["mean"]), interval(row["interval"], 100, ".1f"), " ".join(map(percent, row["by_seed"]))]


def _comparison_rows(family: Results, title: str) -> Rows:
    rows = [
        [title, "points", "95 % interval", "each seed", "Holm p", "90 % interval", f"equal within {100 * MARGIN:.0f} points"]
    ]
    for name, row in family.items():
        seeds = " ".join(f"{100 * value:+.1f}" for value in row["by_seed"])
        cells = [name.replace("|", ", "), f"{100 * row['mean']:+.1f}", interval(row["interval"], 100, "+.1f"), seeds]
        cells += [f"{row['holm_p']:.4f}{' *' * row['is_significant']}", interval(row["narrow_interval"], 100, "+.1f")]
        rows.append([*cells, "yes" if row["is_equivalent"] else "not shown"])
    return rows


def _planted_rows(planted: Results) -> Rows:
    rows = [
        ["planted error", "scorer", "questions", "right chain higher", "95 % interval", "each seed", "Holm p (0.5)", "pooled"]
    ]
    for kind in planted["kinds"]:
        for name in (FIRST, *SCORERS):
            row = planted["rows"][f"{kind}|{name}"]
            cells = [kind, name, str(row["num"]), f"{row['mean']:.3f}", interval(row["interval"], form=".3f")]
            cells.append(" ".join(f"{value:.2f}" for value in row["by_seed"]))
            rows.append([*cells, f"{row['holm_p']:.4f}{' *' * row['is_significant']}", f"{row['pooled']:.3f}"])
    return rows


def _budget(results: Results) -> str:
    found = results["budget"]
    shares = ", ".join(percent(share) for share in found["verifier"]["share_right"])
    return (
        f"Training compute: each model has {found['parameters']['model']:,} weights, the verifier"
        f" {found['parameters']['verifier']:,}, because its head has one row; equal tokens are therefore slightly fewer operations for"
        f" it. It begins with F1's weights, so F1's own training comes on top. It learns from answers of which {shares} % are right (by seed)."
    )


def _budget_rows(results: Results) -> Rows:
    rows = [["scorer", "training tokens", "training FLOPs", "tokens/s of one run", "extra training beside F1"]]
    base = results["budget"]["rows"][FIRST]["flops"]
    for name, row in results["budget"]["rows"].items():
        speed = "not measured" if row["speed"] is None else f"{row['speed']:,.0f}"
        if name == "PMI, P(y) of S":
            cells = ["none of its own, but needs S", "none of its own", speed, "100 %, that of S"]
        else:
            extra = 0.0 if name == FIRST else row["flops"] / base
            cells = [f"{row['tokens']:,.0f}", f"{row['flops']:.3g}", speed, f"{100 * extra:.0f} %"]
        rows.append([name, *cells])
    return rows


def _draw_over_n(results: Results, theme: str) -> bytes:
    """Draw the accuracy of each scorer over the number of answers."""

    def _fill(axes: Any) -> None:
        for (name, points), colour in zip(results["over_n"].items(), pages.COLOURS[theme] * 2, strict=False):
            axes.plot([n for n, _ in points], [100 * y for _, y in points], label=name, color=colour, marker="o", ms=3, lw=1.4)
        numbers = [n for n, _ in results["over_n"][FIRST]]
        axes.set_xscale("log", base=2)
        axes.set_xticks(numbers, labels=list(map(str, numbers)))
        title = "F1 + lambda * X over N, mean over all subsets; lambda from development for each N"
        axes.set(xlabel="answers N", ylabel="right answers (%)", title=title)

    return pages.draw_png(theme, (8.5, 4.8), _fill)
