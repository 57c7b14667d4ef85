"""The report of `ledom compare-losses`: losses of a forward and a reverse model on the same documents, as JSON, Markdown and HTML."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_ledom.evaluation.intervals import check_statistics
from megatron_ledom.evaluation.loss_comparison import (
    check_tokenizers,
    common_context,
    made_by,
    read_documents,
    score_documents,
)
from megatron_ledom.evaluation.loss_difference import NUM_PARTS, CompareSettings, Summary, summarize
from megatron_ledom.inference.scoring import check_batch_size
from megatron_ledom.reports import pages
from megatron_ledom.reports.pages import bullets, interval, number, paragraph
from megatron_ledom.storage.files import json_text, write_file
from megatron_ledom.storage.locks import output_folder_lock
from megatron_ledom.tables import markdown_table

TITLE = "Loss of a forward and of a reverse model on the same documents"
MEANING = (
    "Differences are forward minus reverse: below zero, the reverse model has the higher loss. Intervals are 95 % bootstrap intervals over"
    " documents. Positions are in text order for both models. In its own order, each model begins after eod (after BOS for a stock model"
    " whose tokenizer adds one). So the first token that a forward model predicts is the first of the text, and for a reverse model it is"
    " the last; predicting from eod is not trained unless data.eod_mask_loss was off. Inner tokens are all tokens except these two; the"
    " comparison uses inner tokens. The losses of whole documents include the two. The eod that ends a document (forward: the text ends"
    " here; reverse: it begins here) is in no sum and is listed separately."
)
POSITIONS = {
    "tenths": "part of the document",
    "from_start": "position from the beginning",
    "from_end": "position from the end",
}
Options = Mapping[str, Any]
Rows = list[list[str]]


def compare_losses(options: Options) -> None:
    """Score both models on every document of a file and write the report; the same command resumes where it stopped."""
    check_batch_size(options["batch_size"])
    check_statistics()
    pages.check_plots()
    documents = read_documents(options)
    is_same = check_tokenizers(options)
    settings = CompareSettings(common_context(options), options["batch_size"], seed=options["seed"])
    with output_folder_lock(options["output"]):
        output, about = Path(options["output"]), made_by(options, settings)
        records = score_documents(output, options, documents, settings, about, with_positions=is_same)
        summary = summarize(records, settings)
        write_report(output, summary, {**about, "resamples": settings.num_resamples, "seed": settings.seed})
        print(sentence(summary), output / "report.html", sep="\n")


def write_report(folder: Path, summary: Summary, about: Mapping[str, Any]) -> None:
    """Write `report.json`, `report.md` and `report.html`, each atomically. Raises UsageError if matplotlib is not installed."""
    contents = {
        "report.html": as_html(summary, about),
        "report.md": as_markdown(summary, about),
        "report.json": json_text({"about": dict(about), **summary}, where=folder / "report.json", indent=1) + "\n",
    }
    for name, content in contents.items():
        write_file(folder / name, content)


def sentence(summary: Summary) -> str:
    """Return the main result as a sentence."""
    whole = summary["all"]
    gap = whole["reverse_above_forward"]
    side = "above" if (gap["difference"] or 0.0) >= 0 else "below"
    if gap["difference"] is None:
        return "No document has more than a first and a last token, so nothing can be compared except whole documents."
    start = (
        f"On {whole['compared']} the reverse model's loss is {abs(100 * gap['difference']):.2f} % {side} the forward model's"
    )
    if gap["interval"] is None:
        return f"{start}, on one document, so there is no interval."
    low, high = gap["interval"]
    contains_zero = "; it contains 0" if low <= 0 <= high else ""
    return (
        f"{start} (95 % interval {100 * low:+.2f} to {100 * high:+.2f} %{contains_zero}), and higher on"
        f" {100 * whole['reverse_worse_documents']:.1f} % of {whole['documents']:,} documents."
    )


def _cells(found: Mapping[str, Any], form: str = "+.4f", scale: float = 1.0) -> list[str]:
    """Return a difference and its interval as two cells."""
    if found["difference"] is None:
        return ["–", "–"]
    return [number(found["difference"], form, scale), interval(found["interval"], form, scale)]


def _domain_table(summary: Summary) -> Rows:
    """Return the table of all documents, then each domain; inner tokens only if both models have the same tokens."""
    rows = [["documents of", "number", "bytes"]]
    has_tokens = "per_inner_token" in summary["all"]
    rows[0] += ["inner tokens", "forward, nats a token", "reverse, nats a token", "difference", "95 %"] if has_tokens else []
    rows[0] += ["reverse above forward, %", "95 %"]
    for name, found in {"all": summary["all"], **summary.get("domains", {})}.items():
        row = [name, f"{found['documents']:,}", f"{found['bytes']:,}"]
        if has_tokens:
            row += [
                f"{found['inner_tokens']:,}",
                *(f"{found[side]['loss_per_inner_token']:.4f}" for side in ("forward", "reverse")),
            ]
            row += _cells(found["per_inner_token"])
        rows.append([*row, *_cells(found["reverse_above_forward"], "+.2f", 100)])
    return rows


def _whole_table(summary: Summary) -> Rows:
    """Return the same table for whole documents, in bits per byte."""
    rows = [
        [
            "whole documents of",
            "forward, bits a byte",
            "reverse, bits a byte",
            "difference",
            "95 %",
            "reverse above forward, %",
            "95 %",
        ]
    ]
    for name, found in {"all": summary["all"], **summary.get("domains", {})}.items():
        whole = found["whole_documents"]
        row = [name, *(f"{found[side]['bits_per_byte']:.4f}" for side in ("forward", "reverse"))]
        row += _cells(whole["bits_per_byte"])
        rows.append([*row, *_cells(whole["reverse_above_forward"], "+.2f", 100)])
    return rows


def _edge_table(summary: Summary) -> Rows:
    rows = [["nats, mean over documents", "first token of the text", "last token of the text", "eod", "a token, all of them"]]
    for side in ("forward", "reverse"):
        found = summary["all"][side]
        rows.append(
            [side, *(f"{found[f'mean_{name}']:.4f}" for name in ("first", "last", "eod")), f"{found['loss_per_token']:.4f}"]
        )
    return rows


def _place(name: str, group: int) -> str:
    if name == "tenths":
        return f"{group * 100 // NUM_PARTS} to {(group + 1) * 100 // NUM_PARTS} %"
    return f"{2**group:,} to {2 ** (group + 1) - 1:,}"


def _position_table(name: str, summary: Summary) -> Rows:
    rows = [[POSITIONS[name], "tokens", "forward, nats a token", "reverse, nats a token", "difference", "95 %"]]
    for row in summary[name]:
        values = [f"{row[side]:.4f}" for side in ("forward", "reverse")]
        rows.append([_place(name, row["group"]), f"{row['tokens']:,}", *values, *_cells(row)])
    return rows


def _tables(summary: Summary) -> list[Rows]:
    return [
        _domain_table(summary),
        _whole_table(summary),
        _edge_table(summary),
        *(_position_table(name, summary) for name in POSITIONS if name in summary),
    ]


def as_markdown(summary: Summary, about: Mapping[str, Any]) -> str:
    """Return the main result, the meaning of the numbers, and every table."""
    parts = [f"# {TITLE}", sentence(summary), MEANING, "\n".join(f"- {name}: {value}" for name, value in about.items())]
    return "\n\n".join([*parts, *map(markdown_table, _tables(summary))]) + "\n"


def as_html(summary: Summary, about: Mapping[str, Any]) -> str:
    """Return the same with plots, as one page for light and dark themes."""
    body = [paragraph(sentence(summary), is_strong=True), paragraph(MEANING)]
    for name in POSITIONS:
        if name in summary:
            draw = partial(_draw_positions, name=name, rows=summary[name])
            body.append(_plot(f"difference by {POSITIONS[name]}", draw))
    if "domains" in summary:
        body.append(_plot("difference by domain", partial(_draw_domains, domains=summary["domains"])))
    body += map(pages.table, _tables(summary))
    return pages.page(TITLE, [*body, bullets(f"{name}: {value}" for name, value in about.items())])


def _plot(title: str, fill: Callable[..., None]) -> str:
    return pages.figure(title, lambda theme: pages.draw_png(theme, (8.5, 3.6), partial(fill, theme=theme)))


def _draw_positions(axes: Any, *, name: str, rows: Sequence[Summary], theme: str) -> None:
    """Draw the difference with its interval, and a line at 0."""
    places = list(range(len(rows)))
    values = [row["difference"] for row in rows]
    bounds = [row["interval"] or [row["difference"]] * 2 for row in rows]
    colour = pages.COLOURS[theme][1]
    axes.fill_between(places, [low for low, _ in bounds], [high for _, high in bounds], color=colour, alpha=0.25, label="95 %")
    axes.plot(places, values, color=colour, marker="o", ms=3, lw=1.4, label="forward minus reverse")
    axes.axhline(0, color=pages.THEMES[theme]["ink"], lw=0.8)
    axes.set_xticks(places, [_place(name, row["group"]).replace(" to ", "–") for row in rows], fontsize="x-small", rotation=30)
    axes.set(xlabel=POSITIONS[name], ylabel="nats a token", title=f"Loss difference by {POSITIONS[name]}")


def _draw_domains(axes: Any, *, domains: Mapping[str, Any], theme: str) -> None:
    """Draw one bar for each domain: the difference in % of the forward loss."""
    found = [domain["reverse_above_forward"] for domain in domains.values()]
    values = [100 * (one["difference"] or 0.0) for one in found]
    bounds = [[100 * bound for bound in one["interval"] or [one["difference"] or 0.0] * 2] for one in found]
    spans = [[max(0.0, value - low) for value, (low, _) in zip(values, bounds, strict=True)]]
    spans.append([max(0.0, high - value) for value, (_, high) in zip(values, bounds, strict=True)])
    ink = pages.THEMES[theme]["ink"]
    axes.barh(range(len(values)), values, xerr=spans, color=pages.COLOURS[theme][1], ecolor=ink, label="reverse above forward")
    axes.axvline(0, color=ink, lw=0.8)
    axes.set_yticks(range(len(values)), [name.replace("$", r"\$") for name in domains])
    axes.set(xlabel="% of the forward loss", title="Loss difference by domain")
