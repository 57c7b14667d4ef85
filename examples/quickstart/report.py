"""What the quickstart found, read from the files it left: report.json, report.md, and the same lines in README.md."""

import json
import math
import os
import platform
import shutil
import statistics
from pathlib import Path
from typing import Any

from commands import ROOT, QuickstartError
from safetensors import safe_open
from twins import DIRECTIONS, read_metrics

from megatron_ledom.markdown import write_between
from megatron_ledom.reports.pages import number
from megatron_ledom.storage.files import write_file, write_json
from megatron_ledom.tables import markdown_table

OUTPUT = Path("quickstart")
README_PLOT = Path("examples/quickstart/loss_curves.png")
Report = dict[str, Any]


def build_report(phases: dict[str, Report]) -> Report:
    """Everything worth telling. `phases`: what each phase returned, with its `seconds`."""
    return {
        "machine": describe_machine(),
        "corpus": json.loads((OUTPUT / "corpus/totals.json").read_text()),
        "overrides": phases["train"]["overrides"],
        "models": {direction: _describe_model(direction) for direction in DIRECTIONS},
        "resumed": phases["train"]["stopped_at"] == phases["train"]["resumed_at"],
        "resumed_at": phases["train"]["resumed_at"],
        "generated": phases["generate"]["endings"],
        "reranked": json.loads((OUTPUT / "reranked/answers.jsonl").read_text()),
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
    """Elements of all tensors in the safetensors files of a folder."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118  not a dict
    return total


def describe_machine() -> Report:
    """The processor's name, the cores this process may use, and what a model would run on."""
    import torch

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        name = names[0] if names else name
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": name, "cores": len(os.sched_getaffinity(0)), "gpu": gpu, "torch": torch.__version__}


def to_markdown(report: Report) -> str:
    """The tables, the texts and the paths, as shown at the end and in the README."""
    machine = report["machine"]
    device = f"{machine['cores']} cores of {machine['cpu']}" + (f" and {machine['gpu']}" if machine["gpu"] else "")
    minutes, seconds = divmod(round(report["seconds"]), 60)
    parts = [
        f"One run on {device} (torch {machine['torch']}, {', '.join(report['overrides'])}): {minutes} min {seconds} s.",
        _describe_corpus(report["corpus"]),
        _twins_table(report),
        f"The reverse run got SIGTERM at iteration {report['resumed_at']} and was resumed there by the same command.",
        _phases_table(report["phases"]),
        "The reverse model wrote everything before the marked ending:",
        *[_fenced(text["text"][: -len(text["following"])] + "⟦" + text["following"] + "⟧") for text in report["generated"]],
        _reranked(report["reranked"]),
    ]
    return "\n\n".join(parts) + "\n"


def _describe_corpus(corpus: Report) -> str:
    parts = [
        f"{corpus[split]['text_bytes'] / 1e6:.1f} MB in {corpus[split]['documents']:,} files" for split in ("train", "valid")
    ]
    return f"Text: {parts[0]} for training; {parts[1]} held out, which the validation reads but for a last partial batch."


def _twins_table(report: Report) -> str:
    models = [report["models"][direction] for direction in DIRECTIONS]
    figures = [
        ("parameters", "parameters", "{:,}"),
        ("tokens in the training shard", "shard_tokens", "{:,}"),
        ("tokens trained on", "trained_tokens", "{:,}"),
        ("loss at the start, nats a token", "first_loss", "{:.3f}"),
        ("training loss at the end", "train_loss", "{:.3f}"),
        ("loss on held-out files", "valid_loss", "{:.3f}"),
        ("bits per byte on held-out files", "bits_per_byte", "{:.3f}"),
        ("tokens/s (both trained at once)", "tokens_per_second", "{:,.0f}"),
        ("largest logit difference of the export", "largest_logit_difference", "{:.1e}"),
    ]
    cells = [["", *DIRECTIONS], *([name, *(form.format(model[key]) for model in models)] for name, key, form in figures)]
    return markdown_table(cells, "lrr")


def _phases_table(phases: dict[str, float]) -> str:
    return markdown_table([["phase", "seconds"], *([name, f"{seconds:.1f}"] for name, seconds in phases.items())], "lr")


def _reranked(record: Report) -> str:
    rows = [["rank", "reward", "log P(answer given prompt)", "log P(prompt given answer)", "answer begins"]]
    for place, index in enumerate(record["ranking"], 1):
        score, answer = record["scores"][index], record["candidates"][index]
        text = repr(answer if isinstance(answer, str) else answer["text"])[:60].replace("`", "'")
        numbers = [number(score[key], ".1f") for key in ("reward", "forward_logprob", "reverse_logprob")]
        rows.append([str(place), *numbers, f"`{text}`"])
    title = f"Eight continuations of `{record['prompt']!r}` by the forward twin, ranked by Reverse Reward:"
    return f"{title}\n\n{markdown_table(rows, 'rrrrl')}"


def _fenced(text: str) -> str:
    return f"````text\n{text.strip(chr(10))}\n````"


def write_report(report: Report) -> str:
    """Write report.json and report.md; returns the Markdown."""
    markdown = to_markdown(report)
    paths = "\n".join(f"- {name}: `{path}`" for name, path in report["paths"].items())
    write_json(OUTPUT / "report.json", report, indent=2)
    whole = f"# Quickstart\n\n{markdown}\n![loss curves](loss_curves.png)\n\n{paths}\n"
    write_file(OUTPUT / "report.md", whole)
    return f"{markdown}\n{paths}\n"


def update_readme() -> None:
    """Put the last run's plot and tables between the markers of the project's README.md."""
    if not (OUTPUT / "report.json").exists():
        raise QuickstartError("quickstart/report.json is missing; run the quickstart first")
    shutil.copyfile(OUTPUT / "loss_curves.png", ROOT / README_PLOT)
    markdown = to_markdown(json.loads((OUTPUT / "report.json").read_text(encoding="utf-8")))
    plot = f"![Training and held-out loss of both twins]({README_PLOT})"
    write_between(str(ROOT / "README.md"), "quickstart", f"{markdown}\n{plot}\n")
