"""The section of part 10 in the report."""

from collections.abc import Iterator

from sections import Results, Rows, Section, interval, not_run, percent
from two_way import AGAINST, DOUBLE, EQUAL, FORWARD, METHODS, OWN, REVERSE

from megatron_ledom.reports.method_comparison import MAIN

TITLE = "One model, both directions"
NAMES = {
    FORWARD: "forward alone",
    REVERSE: "reverse alone",
    EQUAL: "two-way, equal tokens",
    DOUBLE: "two-way, equal forward tokens",
}
"""Names of the models; the others are named by their unit."""
GROUPS = {
    OWN: "tested in text order",
    AGAINST: "tested against it",
    "both_orders": "trained in both orders",
    "unseen": "never trained",
}
KINDS = {
    "loss": "loss, nats per token, {way}",
    "facts": "facts trained in the order that the {way} direction does not read, right, points",
    "alone": "answers and scores alone, against the twins, right, points",
    "scorer": "scores the answers of the forward twin, against the reverse twin, right, points",
}


def two_way_section(results: Results | None) -> Section:
    """Return the section of part 10."""
    if results is None:
        return not_run(TITLE, "two_way")
    tables = [_losses(results), _facts(results), _answers(results), _comparisons(results)]
    return Section(title=TITLE, paragraphs=[*sentences(results), _about(results)], tables=tables)


def name_of(model: str) -> str:
    """Return the name of a model in tables."""
    return NAMES.get(model, f"two-way, reverse documents by {model}")


def sentences(results: Results) -> Iterator[str]:
    """Yield one sentence for each kind of comparison: what differs significantly, and that the others do not."""
    for kind in KINDS:
        rows = {name: row for name, row in results["comparisons"].items() if name.startswith(f"{kind}|")}
        found = [f"{_label(name)}: {_difference(name, row)}" for name, row in rows.items() if row["is_significant"]]
        rest = [_label(name) for name, row in rows.items() if not row["is_significant"]]
        parts = [f"Significant after the correction: {'; '.join(found)}."] if found else []
        parts += [f"Not significant: {'; '.join(rest)}."] if rest else []
        yield " ".join(parts)


def _about(results: Results) -> str:
    one = results["settings"]
    units = (
        f" Further two-way models, of equal forward tokens, reverse units: {', '.join(one['units'])}." if one["units"] else ""
    )
    return (
        f"Seeds {results['seeds']}, all reported; models of the shape {one['model']}. One corpus for all: problems of {len(one['levels'])} levels"
        f" and the facts of the part on abilities, {one['repeats']} times; every document is shorter than a sample, so it begins with the marker"
        f" of its direction, unless it continues from the sample before.{units}"
        " Losses: held-out problems without the first and the last token. Facts: chosen of four, chance 25 %."
        f" Answers: {one['num_samples']} for each of {results['num_questions']} questions, lambda by the development questions. Intervals:"
        " bootstrap over seeds and items. All comparisons are one family (Holm); p-values are at least those of Student's t over the seeds."
    )


def _losses(results: Results) -> Rows:
    rows = [["model", "tokens", "of them forward", "forward loss", "95 % interval", "reverse loss", "95 % interval"]]
    for model, (tokens, forward) in results["tokens"].items():
        cells = [name_of(model), f"{tokens:,}", f"{forward:,}"]
        for way in (FORWARD, REVERSE):
            found = results["losses"].get(f"{model}|{way}")
            cells += ["", ""] if found is None else [f"{found['mean']:.4f}", interval(found["interval"], form=".4f")]
        rows.append(cells)
    return rows


def _facts(results: Results) -> Rows:
    rows = [["model", "asked", *(f"{label}, {way}, %" for label in GROUPS.values() for way in ("chosen", "written"))]]
    asked = dict.fromkeys(tuple(name.split("|")[:2]) for name in results["facts"])
    for model, way in asked:
        names = [f"{model}|{way}|{task}|{group}" for group in GROUPS for task in ("reversal", "reversal_written")]
        rows.append([name_of(model), way, *(percent(results["facts"][name]["mean"]) for name in names)])
    return rows


def _answers(results: Results) -> Rows:
    rows = [["answers", "scores", *(f"{method}, %" for method in METHODS)]]
    for answering, scoring in dict.fromkeys(tuple(name.split("|")[:2]) for name in results["answers"]):
        cells = []
        for method in METHODS:
            found = results["answers"].get(f"{answering}|{scoring}|{method}")
            between = "" if found is None or method != MAIN else f" ({interval(found['interval'], 100, '.1f')})"
            cells.append("" if found is None else f"{percent(found['mean'])}{between}")
        rows.append([name_of(answering), name_of(scoring), *cells])
    return rows


def _comparisons(results: Results) -> Rows:
    rows = [["comparison", "difference", "95 % interval", "each seed", "Holm p"]]
    for name, row in results["comparisons"].items():
        scale, form = _scale(name)
        each = " ".join(format(scale * value, form) for value in row["by_seed"])
        mark = " *" * row["is_significant"]
        rows.append(
            [
                _label(name),
                format(scale * row["mean"], form),
                interval(row["interval"], scale, form),
                each,
                f"{row['holm_p']:.4f}{mark}",
            ]
        )
    return rows


def _label(name: str) -> str:
    kind, way, model = name.split("|")
    return f"{name_of(model)}, {KINDS[kind].format(way=way)}"


def _difference(name: str, row: Results) -> str:
    scale, form = _scale(name)
    return f"{scale * row['mean']:{form}} ({interval(row['interval'], scale, form)})"


def _scale(name: str) -> tuple[float, str]:
    return (1.0, "+.4f") if name.startswith("loss|") else (100.0, "+.1f")
