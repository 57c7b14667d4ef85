"""Read the results of the quickstart from its files; write report.json, report.md and the blocks in README.md and docs/."""

import json
import math
import os
import platform
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from commands import ROOT, QuickstartError
from safetensors import safe_open
from twins import DIRECTIONS, read_metrics

from megatron_ledom.markdown import write_between
from megatron_ledom.reports.method_comparison import MAIN
from megatron_ledom.reports.pages import number
from megatron_ledom.storage.files import write_file, write_json
from megatron_ledom.tables import markdown_table

OUTPUT = Path("quickstart")
VOTE = "majority vote"
PLOT = Path("docs/images/loss_curves.png")
PAGE = Path("docs/get_started.md")
Report = dict[str, Any]


def build_report(phases: dict[str, Report]) -> Report:
    """Return all results. `phases`: the result of each phase, with its `seconds`."""
    return {
        "machine": describe_machine(),
        "corpus": json.loads((OUTPUT / "corpus/totals.json").read_text()),
        "overrides": phases["train"]["overrides"],
        "models": {direction: _describe_model(direction) for direction in DIRECTIONS},
        "resumed": phases["train"]["stopped_at"] == phases["train"]["resumed_at"],
        "resumed_at": phases["train"]["resumed_at"],
        "generated": phases["generate"]["endings"],
        "reranked": json.loads((OUTPUT / "reranked/answers.jsonl").read_text()),
        "problems": phases["choose"]["report"],
        "phases": {name: phase["seconds"] for name, phase in phases.items()},
        "seconds": sum(phase["seconds"] for phase in phases.values()),
        "paths": {
            "corpus": "quickstart/corpus",
            "tokenizer": "quickstart/tokenizer",
            "shards": "quickstart/shards",
            "runs and checkpoints": "quickstart/runs",
            "Hugging Face folders": "quickstart/models",
            "loss curves": "quickstart/loss_curves.png",
            "ranked answers": "quickstart/reranked/answers.jsonl",
            "word problems": "quickstart/problems/answers/report/report.html",
            "logs": "quickstart/logs",
            "this report": "quickstart/report.md",
        },
    }


def _describe_model(direction: str) -> Report:
    records = read_metrics(OUTPUT / "runs" / direction / "metrics.jsonl")
    validations = [
        {"iteration": record["iteration"], **next(iter(record["validation"].values()))}
        for record in records
        if "validation" in record
    ]
    shard = json.loads((OUTPUT / "shards" / direction / "train.json").read_text())
    card = json.loads((OUTPUT / "models" / direction / "export.json").read_text())
    return {
        "parameters": count_parameters(OUTPUT / "models" / direction),
        "shard_tokens": shard["num_tokens"],
        "trained_tokens": records[-1]["consumed_train_tokens"],
        "iterations": records[-1]["iteration"],
        "first_loss": records[0]["lm_loss"],
        "train_loss": statistics.mean(record["lm_loss"] for record in records[-5:]),
        "valid_loss": validations[-1]["lm_loss"],
        "bits_per_byte": validations[-1]["bits_per_byte"],
        "validations": validations,
        "tokens_per_second": statistics.median(record["tokens_per_second"] for record in records),
        "largest_logit_difference": card["verification"]["largest_logit_difference"],
    }


def count_parameters(folder: Path) -> int:
    """Return the number of elements of all tensors in the safetensors files of a folder."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118  not a dict
    return total


def describe_machine() -> Report:
    """Return the name of the processor, the number of cores this process may use, the GPU if any, and torch's version."""
    import torch

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        name = names[0] if names else name
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": name, "cores": len(os.sched_getaffinity(0)), "gpu": gpu, "torch": torch.__version__}


def to_markdown(report: Report) -> str:
    """Return the tables and texts, which are printed at the end and shown in docs/get_started.md."""
    parts = [
        _describe_choice(report["problems"]),
        _describe_run(report),
        _describe_corpus(report["corpus"]),
        _twins_table(report),
        f"The reverse run was stopped by SIGTERM at iteration {report['resumed_at']}; the same command resumed it there.",
        _phases_table(report["phases"]),
        "The reverse model wrote the text before each ending in ⟦brackets⟧:",
        *[_fenced(text["text"][: -len(text["following"])] + "⟦" + text["following"] + "⟧") for text in report["generated"]],
        _reranked(report["reranked"]),
    ]
    return "\n\n".join(parts) + "\n"


def to_short_markdown(report: Report) -> str:
    """Return the lines of results in README.md."""
    chosen = (
        "tokens trained on",
        "loss on held-out files",
        "bits per byte on held-out files",
        "tokens/s (both at the same time)",
    )
    return f"{_describe_choice(report['problems'])}\n\n{_describe_run(report)}\n\n{_twins_table(report, chosen)}\n"


def _describe_run(report: Report) -> str:
    machine = report["machine"]
    device = f"{machine['cores']} cores of {machine['cpu']}" + (f" and {machine['gpu']}" if machine["gpu"] else "")
    minutes, seconds = divmod(round(report["seconds"]), 60)
    return f"One run on {device} (torch {machine['torch']}, {', '.join(report['overrides'])}): {minutes} min {seconds} s."


def _describe_choice(found: Report) -> str:
    """Return the result of Reverse Reward on the word problems, beside the majority vote."""
    ours, vote = (found["methods"][name] for name in (MAIN, VOTE))
    gain = _against_vote(found["comparisons"])
    at_equal_tokens = next(row for row in found["equal_tokens"] if row["method"] == MAIN)
    return (
        f"**On {found['num_questions']} word problems, Reverse Reward is right in {_percent(ours)} %, the majority vote in {_percent(vote)} %: {gain}"
        f" points** (95 % intervals). Both choose one of {found['num_candidates']} answers that the forward twin sampled. If scoring may not cost"
        f" more tokens than sampling these, Reverse Reward has {at_equal_tokens['num_candidates']} answers:"
        f" {_against_vote(found['comparisons_at_equal_tokens'])} points."
    )


def _percent(method: Report) -> str:
    low, high = method["interval"]
    return f"{100 * method['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _against_vote(comparisons: list[Report]) -> str:
    row = next(row for row in comparisons if row["against"] == VOTE)
    low, high = row["interval"]
    return f"{100 * row['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _describe_corpus(corpus: Report) -> str:
    parts = [
        f"{corpus[split]['text_bytes'] / 1e6:.1f} MB in {corpus[split]['documents']:,} files" for split in ("train", "valid")
    ]
    return (
        f"Text: {parts[0]} for training, and {parts[1]} held out for validation. The validation reads all held-out text except"
        " the last, incomplete batch."
    )


def _twins_table(report: Report, chosen: Sequence[str] = ()) -> str:
    """Return the table of both twins; `chosen` names its rows, default: all."""
    models = [report["models"][direction] for direction in DIRECTIONS]
    rows = [
        ("parameters", "parameters", "{:,}"),
        ("tokens in the training shard", "shard_tokens", "{:,}"),
        ("tokens trained on", "trained_tokens", "{:,}"),
        ("loss at the start, nats per token", "first_loss", "{:.3f}"),
        ("training loss at the end", "train_loss", "{:.3f}"),
        ("loss on held-out files", "valid_loss", "{:.3f}"),
        ("bits per byte on held-out files", "bits_per_byte", "{:.3f}"),
        ("tokens/s (both at the same time)", "tokens_per_second", "{:,.0f}"),
        ("largest logit difference of the export", "largest_logit_difference", "{:.1e}"),
    ]
    shown = [row for row in rows if not chosen or row[0] in chosen]
    cells = [["", *DIRECTIONS], *([name, *(form.format(model[key]) for model in models)] for name, key, form in shown)]
    return markdown_table(cells, "lrr")


def _phases_table(phases: dict[str, float]) -> str:
    return markdown_table([["phase", "seconds"], *([name, f"{seconds:.1f}"] for name, seconds in phases.items())], "lr")


def _reranked(record: Report) -> str:
    rows = [["rank", "reward", "log P(answer given prompt)", "log P(prompt given answer)", "answer begins"]]
    for position, index in enumerate(record["ranking"], 1):
        score, answer = record["scores"][index], record["candidates"][index]
        text = repr(answer if isinstance(answer, str) else answer["text"])[:60].replace("`", "'")
        numbers = [number(score[key], ".1f") for key in ("reward", "forward_logprob", "reverse_logprob")]
        rows.append([str(position), *numbers, f"`{text}`"])
    title = f"Eight continuations of `{record['prompt']!r}` by the forward twin, ranked by Reverse Reward:"
    return f"{title}\n\n{markdown_table(rows, 'rrrrl')}"


def _fenced(text: str) -> str:
    return f"````text\n{text.strip(chr(10))}\n````"


def write_report(report: Report) -> str:
    """Write report.json and report.md; return the Markdown."""
    markdown = to_markdown(report)
    paths = "\n".join(f"- {name}: `{path}`" for name, path in report["paths"].items())
    write_json(OUTPUT / "report.json", report, indent=2)
    whole = f"# Quickstart\n\n{markdown}\n![loss curves](loss_curves.png)\n\n{paths}\n"
    write_file(OUTPUT / "report.md", whole)
    return f"{markdown}\n{paths}\n"


def update_pages() -> None:
    """Write the last run's plot, tables and texts between the markers of docs/get_started.md, and the main ones into README.md."""
    if not (OUTPUT / "report.json").exists():
        raise QuickstartError("quickstart/report.json is missing; run the quickstart first")
    report = json.loads((OUTPUT / "report.json").read_text(encoding="utf-8"))
    shutil.copyfile(OUTPUT / "loss_curves.png", ROOT / PLOT)
    plot = f"![Training and held-out loss of both twins]({PLOT.relative_to(PAGE.parent)})"
    write_between(str(ROOT / PAGE), "quickstart", f"{to_markdown(report)}\n{plot}\n")
    write_between(str(ROOT / "README.md"), "quickstart", to_short_markdown(report))
