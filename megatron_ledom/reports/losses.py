"""The loss of a forward and of a reverse model on the same documents: from the command's options to losses and their report."""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, MismatchError, UsageError
from megatron_ledom.evaluation.intervals import check_statistics
from megatron_ledom.evaluation.item_file import ItemFile, numbered
from megatron_ledom.evaluation.loss_difference import (
    NUM_PARTS,
    CompareSettings,
    Document,
    Summary,
    document_records,
    is_same_tokenizer,
    summarize,
)
from megatron_ledom.evaluation.record_checks import document_check
from megatron_ledom.evaluation.tasks.loading import ENDINGS, read_rows
from megatron_ledom.inference.language_model import ForwardLM, ReverseLM
from megatron_ledom.inference.model_folder import (
    SAY_EOD_ID,
    check_unchanged,
    folder_facts,
    load_tokenizer,
    read_model_config,
    surroundings,
)
from megatron_ledom.inference.scoring import check_batch_size
from megatron_ledom.markdown import markdown_table
from megatron_ledom.reports import pages
from megatron_ledom.reports.pages import bullets, interval, number, paragraph
from megatron_ledom.storage.files import json_text, write_file
from megatron_ledom.storage.hashes import sha256_of
from megatron_ledom.storage.locks import output_folder_lock

WINDOW_DOCUMENTS = 64
"""Documents that are read together and kept at once; batches are cut by the documents' numbers alone."""
TITLE = "Loss of a forward and of a reverse model on the same documents"
MEANING = (
    "Differences are forward minus reverse: below zero the reverse model finds the text harder. Intervals: 95 %, bootstrap over"
    " documents. Positions are those of the text in reading order for both models. In its own order each model begins after eod (BOS for"
    " a stock model whose tokenizer adds one), so that a forward model's first token is the first of the text and a reverse model's the"
    " last; predicting from eod is not trained unless data.eod_mask_loss was off. Inner tokens are all but these two; they are what is"
    " compared. Whole documents have them too. The eod that closes a document (forward: the text ends here; reverse: it begins here) is in"
    " no sum and stands by itself."
)
POSITIONS = {
    "tenths": "part of the document",
    "from_start": "place from the beginning",
    "from_end": "place from the end",
}
Options = Mapping[str, Any]
Rows = list[list[str]]


def compare_losses(options: Options) -> None:
    """Read both models on every document of a file; the same command goes on where it stopped."""
    check_batch_size(options["batch_size"])
    check_statistics()
    pages.check_plots()
    documents = read_documents(options)
    is_same = _check_tokenizers(options)
    settings = CompareSettings(_context(options), options["batch_size"], seed=options["seed"])
    with output_folder_lock(options["output"]):
        _compare_into(Path(options["output"]), options, documents, settings, with_positions=is_same)


def _compare_into(
    output: Path, options: Options, documents: Sequence[Document], settings: CompareSettings, *, with_positions: bool
) -> None:
    """Score the documents and write the report; resumes what the folder has. Nobody else writes there."""
    about = _made_by(options, settings)
    file = ItemFile(output, "losses", about)
    records = file.resume(WINDOW_DOCUMENTS, len(documents), document_check(documents, with_positions=with_positions))
    if len(records) < len(documents):
        records += _read(options, documents, len(records), file, settings, about)
    if not any(record["forward"]["tokens"] and record["reverse"]["tokens"] for record in records):
        raise DataError(f"{options['data']} has no document with a token; give texts under {options['text_key']!r}")
    summary = summarize(records, settings)
    write_report(output, summary, {**about, "resamples": settings.num_resamples, "seed": settings.seed})
    print(sentence(summary), output / "report.html", sep="\n")


def _read(
    options: Options,
    documents: Sequence[Document],
    num_kept: int,
    file: ItemFile,
    settings: CompareSettings,
    about: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Both models over the documents after the first `num_kept`, each window kept at once."""
    forward = ForwardLM.from_pretrained(options["forward"])
    asked = {"direction": options["direction"], "eod_id": options["eod_id"]}
    reverse = ReverseLM.from_pretrained(options["reverse"], **asked, say=SAY_EOD_ID)
    for side in ("forward", "reverse"):
        check_unchanged(Path(options[side]), about[side])
    records: list[dict[str, Any]] = []
    with tqdm(total=len(documents), unit=" documents", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        bar.update(num_kept)
        for begin in range(num_kept, len(documents), WINDOW_DOCUMENTS):
            window = documents[begin : begin + WINDOW_DOCUMENTS]
            found = numbered(begin, document_records(forward, reverse, window, settings))
            file.append(found)
            records += found
            bar.update(len(found))
    return records


def _check_tokenizers(options: Options) -> bool:
    """Return True if both are the same. Refuse different ones, unless that is asked for, before weights are loaded."""
    forward, _ = load_tokenizer(Path(options["forward"]))
    reverse, _ = load_tokenizer(Path(options["reverse"]), Direction.REVERSE, options["eod_id"], SAY_EOD_ID)
    is_same = is_same_tokenizer(forward, reverse)
    if not is_same and not options["different_tokenizers"]:
        raise MismatchError(
            f"{options['forward']} and {options['reverse']} have different tokenizers: their tokens are not the same, so losses a token"
            " and by position cannot be compared; give twins with one tokenizer, or --different-tokenizers for bits a byte of"
            " whole documents only"
        )
    return is_same


def read_documents(options: Options) -> list[Document]:
    """The first `limit` documents of a file; a line without the asked keys is refused by its number."""
    path = Path(options["data"])
    if not path.is_file() or not path.name.endswith(ENDINGS):
        raise UsageError(f"{path} is no file with one of the endings {' '.join(ENDINGS)}; give documents as JSON lines")
    if options["limit"] is not None and options["limit"] < 1:
        raise UsageError(f"--limit {options['limit']} compares nothing; it must be at least 1")
    documents = []
    for where, row in read_rows(path):
        for key in (options["text_key"], options["domain_key"]):
            if key is not None and not isinstance(row.get(key), str):
                raise DataError(f"{where}: no text under {key!r}; found the keys {', '.join(row) or 'none'}")
        domain = "" if options["domain_key"] is None else row[options["domain_key"]]
        documents.append(Document(row[options["text_key"]], domain, where.removeprefix(f"{path}:").strip()))
        if len(documents) == options["limit"]:
            break
    if not documents:
        raise DataError(f"{path} holds no documents; give JSON lines with texts under {options['text_key']!r}")
    return documents


def _context(options: Options) -> int:
    """The same for both models: what is asked for, else the fewer positions of the two."""
    limits = [read_model_config(Path(options[side])).get("max_position_embeddings") for side in ("forward", "reverse")]
    known = [int(limit) for limit in limits if limit]
    if options["context"] is None and not known:
        raise UsageError("neither model says how many positions it has; give --context")
    asked = min(known) if options["context"] is None else int(options["context"])
    if known and asked > min(known):
        raise UsageError(
            f"--context {asked} must be at most the model's {min(known)} positions; ask for fewer, or leave it out"
        )
    return asked


def _made_by(options: Options, settings: CompareSettings) -> dict[str, Any]:
    """What the losses depend on; not how many documents are read, so that more of them can be added."""
    return {
        **{side: folder_facts(Path(options[side])) for side in ("forward", "reverse")},
        "data_sha256": sha256_of(options["data"]),
        "text_key": options["text_key"],
        "domain_key": options["domain_key"],
        "direction": options["direction"],
        "eod_id": options["eod_id"],
        "context": settings.context,
        "batch_size": settings.batch_size,
        "different_tokenizers": options["different_tokenizers"],
        "surroundings": surroundings(),
    }


def write_report(folder: Path, summary: Summary, about: Mapping[str, Any]) -> None:
    """Write `report.json`, `report.md` and `report.html`, each whole or not there; UsageError where matplotlib is not installed."""
    contents = {
        "report.html": as_html(summary, about),
        "report.md": as_markdown(summary, about),
        "report.json": json_text({"about": dict(about), **summary}, where=folder / "report.json", indent=1) + "\n",
    }
    for name, content in contents.items():
        write_file(folder / name, content)


def sentence(summary: Summary) -> str:
    """Return the finding in words."""
    whole = summary["all"]
    gap = whole["reverse_above_forward"]
    side = "above" if (gap["difference"] or 0.0) >= 0 else "below"
    if gap["difference"] is None:
        return "No document has a token besides its first and its last one: nothing can be compared but whole documents."
    told = f"On {whole['compared']} the reverse model's loss is {abs(100 * gap['difference']):.2f} % {side} the forward model's"
    if gap["interval"] is None:
        return f"{told}, on one document, which gives no interval."
    low, high = gap["interval"]
    holds = "; 0 lies within it" if low <= 0 <= high else ""
    return (
        f"{told} (95 % interval {100 * low:+.2f} to {100 * high:+.2f} %{holds}), and higher on"
        f" {100 * whole['reverse_worse_documents']:.1f} % of {whole['documents']:,} documents."
    )


def _cells(found: Mapping[str, Any], form: str = "+.4f", scale: float = 1.0) -> list[str]:
    """Return a difference and its interval as two cells."""
    if found["difference"] is None:
        return ["–", "–"]
    return [number(found["difference"], form, scale), interval(found["interval"], form, scale)]


def _domain_table(summary: Summary) -> Rows:
    """All documents, then each domain: inner tokens where they are the same."""
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
    """The same for whole documents, by byte."""
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
    """Return the finding, what the figures mean, and every table."""
    parts = [f"# {TITLE}", sentence(summary), MEANING, "\n".join(f"- {name}: {value}" for name, value in about.items())]
    return "\n\n".join([*parts, *map(markdown_table, _tables(summary))]) + "\n"


def as_html(summary: Summary, about: Mapping[str, Any]) -> str:
    """Return the same with plots, in one page for light and dark."""
    body = [paragraph(sentence(summary), is_strong=True), paragraph(MEANING)]
    for name in POSITIONS:
        if name in summary:
            draw = partial(_draw_positions, name=name, rows=summary[name])
            body.append(_figure(f"difference by {POSITIONS[name]}", draw))
    if "domains" in summary:
        body.append(_figure("difference by domain", partial(_draw_domains, domains=summary["domains"])))
    body += map(pages.table, _tables(summary))
    return pages.page(TITLE, [*body, bullets(f"{name}: {value}" for name, value in about.items())])


def _figure(title: str, fill: Callable[..., None]) -> str:
    return pages.figure(title, lambda theme: pages.draw_png(theme, (8.5, 3.6), partial(fill, theme=theme)))


def _draw_positions(axes: Any, *, name: str, rows: Sequence[Summary], theme: str) -> None:
    """Draw the difference with its interval; 0 as a line."""
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
    """Draw one bar a domain, of what is compared."""
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
