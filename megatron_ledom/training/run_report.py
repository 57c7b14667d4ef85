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
from megatron_ledom.storage.records import METRICS, iteration_of, read_records

MOST = 2**63
LAST = 10
"""Records whose mean is the loss at the end."""
MEASURED = ("lm_loss", "grad_norm", "lr", "tokens_per_second", "mfu")
"""Numbers of a record that a report reads; null, or not there, where nothing finite was measured."""
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
        records = read_records(metrics, checked_record)
        if not records:
            raise UsageError(f"{metrics} has no record yet; wait for logging.log_interval iterations")
        runs.append(RunData(name, load_config(config_file), records))
    return runs


def checked_record(record: Record) -> Record:
    """Return a record whose fields have the types that a report reads; raises KeyError, TypeError or ValueError as `iteration_of`."""
    iteration_of(record)
    _check_number(record["consumed_train_tokens"], "consumed_train_tokens")
    _check_number(record.get("skipped_iterations", 0), "skipped_iterations")
    for name in MEASURED:
        if record.get(name) is not None:
            _check_number(record[name], name, may_be_nan=True)
    sets = record.get("validation", {})
    if not isinstance(sets, dict):
        raise TypeError(f"its validation is {sets!r:.60}, expected an object with the losses of each set")
    for name, found in sets.items():
        if not isinstance(found, dict):
            raise TypeError(f"its validation.{name} is {found!r:.60}, expected an object with lm_loss and bits_per_byte")
        for key in ("lm_loss", "bits_per_byte"):
            if key not in found:
                raise ValueError(f"its validation.{name} has no {key}")
            if found[key] is not None:
                _check_number(found[key], f"validation.{name}.{key}", may_be_nan=True)
    return record


def _check_number(value: Any, name: str, *, may_be_nan: bool = False) -> None:
    """Raise TypeError or ValueError for what is no number, or is greater than a float holds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"its {name} is {value!r:.60}, expected a number")
    if isinstance(value, int) and abs(value) > MOST:
        raise ValueError(f"its {name} is an integer of {value.bit_length()} bits, expected one below 2^63")
    if not may_be_nan and not math.isfinite(value):
        raise ValueError(f"its {name} is {value}, expected a finite number")


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
    validated = [record["validation"] for record in run.records if record.get("validation")]
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
    last_sets = list(validated[-1].values()) if validated else []
    for key, name in (("lm_loss", "validation loss"), ("bits_per_byte", "bits per byte")):
        rows[f"{name}, mean of sets"] = _number(_mean_of_sets([found[key] for found in last_sets]), ".4f")
    return rows


def final_loss(run: RunData) -> float | None:
    """Mean training loss of the last records; None if none of them is finite."""
    losses = run.points("lm_loss")[1][-LAST:]
    return statistics.mean(losses) if losses else None


def _mean_of_sets(values: list[float | None]) -> float | None:
    """Return the mean; None where a set has no finite value, or there are no sets."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.mean(finite) if finite and len(finite) == len(values) else None


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
