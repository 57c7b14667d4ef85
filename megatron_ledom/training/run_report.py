"""One or several runs told from their folders: curves as PNG, and one HTML page that needs nothing besides itself."""

import html
import math
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ledom.config.load import load_config
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.errors import UsageError
from megatron_ledom.pages import figure, page, table
from megatron_ledom.storage.files import write_file
from megatron_ledom.storage.locks import output_folder_lock
from megatron_ledom.storage.records import METRICS, has_iteration, read_records

LAST = 10
"""Records whose mean is the loss at the end."""
Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class RunData:
    """What a report reads of a run."""

    name: str
    """Its folder's name, with as many parents as tell it from the others."""
    config: RunConfig
    records: list[Record]

    @property
    def direction(self) -> str:
        """`reverse` or `forward`."""
        return str(self.config.data.direction)

    def points(self, key: str) -> tuple[list[float], list[float]]:
        """Training tokens and the values of a key, where there is a finite one."""
        found = [(record["consumed_train_tokens"], record.get(key)) for record in self.records]
        usable = [(x, y) for x, y in found if y is not None and math.isfinite(y)]
        return [x for x, _ in usable], [y for _, y in usable]

    def validations(self) -> dict[str, tuple[list[float], list[float]]]:
        """Training tokens and loss of each validation set, where it is finite."""
        series: dict[str, tuple[list[float], list[float]]] = {}
        for record in self.records:
            for name, found in record.get("validation", {}).items():
                if found["lm_loss"] is None or not math.isfinite(found["lm_loss"]):
                    continue
                tokens, losses = series.setdefault(name, ([], []))
                tokens.append(record["consumed_train_tokens"])
                losses.append(found["lm_loss"])
        return series


def load_runs(folders: list[str]) -> list[RunData]:
    """Read config.yaml and metrics.jsonl of each run. Raises UsageError for a folder that is no run, or has no records yet."""
    runs = []
    for folder, name in zip(folders, _names(folders), strict=True):
        config_file, metrics = os.path.join(folder, "config.yaml"), os.path.join(folder, METRICS)
        if not os.path.exists(config_file):
            raise UsageError(f"{folder} has no config.yaml; give folders of runs, their run_dir")
        records = read_records(metrics, has_iteration)
        if not records:
            raise UsageError(f"{metrics} has no record yet; wait for logging.log_interval iterations")
        runs.append(RunData(name, load_config(config_file), records))
    return runs


def report_runs(folders: list[str], output: str, smooth: int, plan: str | None = None) -> None:
    """Write loss.png, of twins loss_difference.png, grad_norm.png, tokens_per_second.png, lr.png and report.html into `output`; print the table.

    plan: hardware whose plan the runs are compared with; empty for each run's own parallel.hardware.
    """
    from megatron_ledom.training.curves import draw, figures_of
    from megatron_ledom.training.twins import twin_sentence

    runs = load_runs(folders)
    with output_folder_lock(output):
        pictures: dict[str, dict[str, bytes]] = {}
        for name in figures_of(runs):
            pictures[name] = {theme: draw(name, runs, theme, smooth) for theme in ("light", "dark")}
            write_file(Path(output, f"{name}.png"), pictures[name]["light"])
        rows = _rows(runs, plan)
        write_file(Path(output, "report.html"), _page(rows, twin_sentence(runs), pictures))
    names = list(rows[0])
    for name in names:
        print(f"{name:<34}" + "".join(f"  {row[name]:>24}" for row in rows))
    print(twin_sentence(runs))
    print(os.path.join(output, "report.html"))


def _rows(runs: list[RunData], plan: str | None) -> list[dict[str, str]]:
    """Return the final metrics of each run; with `plan` those of its plan beside them."""
    rows = [summary(run) for run in runs]
    if plan is not None:
        from megatron_ledom.training.plan_report import planned_rows

        for row, run in zip(rows, runs, strict=True):
            row |= planned_rows(run, plan or None)
    return rows


def summary(run: RunData) -> dict[str, str]:
    """The final figures of a run, by what they are."""
    last = run.records[-1]
    validated = [record["validation"] for record in run.records if "validation" in record]
    rows = {
        "run": run.name,
        "direction": run.direction,
        "iterations": f"{last['iteration']:,} of {run.config.train.train_iters:,}",
        "tokens": f"{last['consumed_train_tokens']:,}",
        f"training loss, last {LAST} records": _number(final_loss(run), ".4f"),
        "tokens/s, median": _number(_median(run, "tokens_per_second"), ",.0f"),
        "MFU, median": _number(_median(run, "mfu"), ".1%"),
        "iterations skipped": f"{last.get('skipped_iterations', 0):,}",
    }
    means = (
        [statistics.mean(found[key] for found in validated[-1].values()) for key in ("lm_loss", "bits_per_byte")]
        if validated and all(found["lm_loss"] is not None for found in validated[-1].values())
        else []
    )
    rows["validation loss, mean of sets"] = _number(means[0], ".4f") if means else "–"
    rows["bits per byte, mean of sets"] = _number(means[1], ".4f") if means else "–"
    return rows


def final_loss(run: RunData) -> float | None:
    """Mean training loss of the last records; None if none of them is finite."""
    losses = run.points("lm_loss")[1][-LAST:]
    return statistics.mean(losses) if losses else None


def _names(folders: list[str]) -> list[str]:
    parts = [Path(folder).resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UsageError(f"the same run is named twice: {', '.join(folders)}; name each once")


def _median(run: RunData, key: str) -> float | None:
    values = run.points(key)[1]
    return statistics.median(values) if values else None


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _page(rows: list[dict[str, str]], sentence: str, pictures: dict[str, dict[str, bytes]]) -> str:
    cells = [[name, *(row[name] for row in rows)] for name in rows[0]]
    figures = [figure(name, themes) for name, themes in pictures.items()]
    return page(
        ", ".join(row["run"] for row in rows), [f"<p><strong>{html.escape(sentence)}</strong></p>", table(cells), *figures]
    )
