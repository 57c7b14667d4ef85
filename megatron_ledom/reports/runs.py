"""A run's records beside its plan: how far the planner was off.

One or several runs told from their folders: curves as PNG, and one HTML page that needs nothing besides itself.

A reverse run beside a forward run: their difference at the same training tokens, and what of it can be said.
"""

import html
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ledom.config.derived import planned_world_size, tokens_per_iteration
from megatron_ledom.config.load import load_config
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.planning.dry_run import known_model, stored_manifests
from megatron_ledom.planning.hardware import Hardware, load_hardware
from megatron_ledom.planning.plan import make_plan
from megatron_ledom.reports.pages import figure, page, table
from megatron_ledom.storage.files import write_file
from megatron_ledom.storage.locks import output_folder_lock
from megatron_ledom.storage.records import LAUNCHES, METRICS, iteration_of, read_records
from megatron_ledom.training.history import read_launches

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
    from megatron_ledom.reports.curves import draw, figures_of

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


FEWEST = 20
"""Training records at the same tokens from which on their difference has an interval."""
BLOCKS = 10
"""Parts of the last records whose means are taken to be independent, unlike the records themselves."""
T_95 = 2.262
"""Student's t for 95 % of BLOCKS - 1 degrees of freedom."""
LAST_VALIDATIONS = 5
FEWEST_VALIDATIONS = 3
NO_BASE = (
    "The forward run has a loss of 0, of which no loss is a percentage; the twins' losses are not compared. See its records."
)
Series = tuple[list[float], list[float]]


def twins_of(runs: Sequence[RunData]) -> tuple[RunData, RunData] | None:
    """Return the first reverse and the first forward run; None without both."""
    first = {run.direction: run for run in reversed(runs)}
    return (first["reverse"], first["forward"]) if {"reverse", "forward"} <= set(first) else None


def training_pairs(reverse: RunData, forward: RunData) -> dict[float, tuple[float, float]]:
    """Return training tokens: reverse and forward loss, where both have a finite record."""
    return _at_same_tokens(reverse.points("lm_loss"), forward.points("lm_loss"))


def validation_pairs(reverse: RunData, forward: RunData) -> dict[str, dict[float, tuple[float, float]]]:
    """Return, for each validation set that both have, training tokens: both losses; of two single sets with other names, for those."""
    ours, theirs = reverse.validations(), forward.validations()
    names = {name: (name, name) for name in ours if name in theirs}
    if not names and len(ours) == len(theirs) == 1:
        names = {f"{one} and {other}": (one, other) for one, other in zip(ours, theirs, strict=True)}
    found = {name: _at_same_tokens(ours[one], theirs[other]) for name, (one, other) in names.items()}
    return {name: pairs for name, pairs in found.items() if pairs}


def twin_sentence(runs: Sequence[RunData]) -> str:
    """Return how far the first reverse run ends from the first forward run, by validation where both have it; empty without both.

    A side is named only where the difference is sure: with the same sign in every one of the last validations of every set, or,
    without validation, with 0 outside an interval of the training losses.
    """
    twins = twins_of(runs)
    if twins is None:
        return ""
    validated = validation_pairs(*twins)
    if validated:
        return _by_validation(validated)
    if any(run.validations() for run in twins):
        return "The twins have no validation of the same set at the same training tokens; their losses are not compared."
    return _by_training(*twins)


def _by_validation(sets: dict[str, dict[float, tuple[float, float]]]) -> str:
    common = sorted(set.intersection(*map(set, sets.values())))
    if not common:
        return "The twins' validation sets were not measured at the same training tokens; their losses are not compared."
    last = common[-LAST_VALIDATIONS:]
    reverse, forward = (statistics.mean(pairs[last[-1]][side] for pairs in sets.values()) for side in (0, 1))
    if any(pairs[tokens][1] <= 0 for pairs in sets.values() for tokens in last):
        return NO_BASE
    every = [[pairs[tokens][0] / pairs[tokens][1] - 1 for pairs in sets.values()] for tokens in last]
    means = [statistics.mean(row) for row in every]
    name = f"mean of {len(sets)} sets" if len(sets) > 1 else next(iter(sets))
    start = (
        f"On validation ({name}, after {last[-1]:,.0f} tokens) the reverse run is at {reverse:.4f} nats a token, the forward run at"
        f" {forward:.4f}"
    )
    if len(last) < FEWEST_VALIDATIONS:
        return f"{start}; {len(last)} common validation(s) give no interval, so neither is called lower (tools/compare_losses.py gives one)."
    over = f"{100 * min(means):+.2f} % to {100 * max(means):+.2f} % over the last {len(last)} validations"
    if min(map(min, every)) <= 0 <= max(map(max, every)):
        return f"{start}; the difference changes its sign between sets or validations ({over}), so neither is called lower."
    side = "above" if reverse > forward else "below"
    return f"{start}: {abs(reverse / forward - 1):.2%} {side} the forward run ({over})."


def _by_training(reverse: RunData, forward: RunData) -> str:
    """Of the second half of the records at the same tokens, in blocks: neighbouring records are alike."""
    pairs = [*training_pairs(reverse, forward).values()]
    if len(pairs) < FEWEST:
        return (
            f"The twins have no common validation and {len(pairs)} training records at the same tokens; from {FEWEST} on their difference"
            " has an interval. Neither is called lower."
        )
    size = len(pairs) // 2 // BLOCKS
    last = pairs[-size * BLOCKS :]
    blocks = [statistics.mean(one - other for one, other in last[size * i : size * (i + 1)]) for i in range(BLOCKS)]
    base = statistics.mean(other for _, other in last) / 100
    if base <= 0:
        return NO_BASE
    middle, half = statistics.mean(blocks) / base, T_95 * statistics.stdev(blocks) / math.sqrt(BLOCKS) / base
    told = f"{middle:+.2f} %, 95 % interval {middle - half:+.2f} to {middle + half:+.2f} %"
    start = f"No common validation. Over the last {len(last)} training records at the same tokens the reverse run is"
    if abs(middle) <= half:
        return f"{start} not surely different from the forward run ({told}), so neither is called lower."
    return f"{start} {'above' if middle > 0 else 'below'} the forward run ({told}; training loss, one run of each)."


def _at_same_tokens(one: Series, other: Series) -> dict[float, tuple[float, float]]:
    theirs = dict(zip(*other, strict=True))
    return {tokens: (value, theirs[tokens]) for tokens, value in zip(*one, strict=True) if tokens in theirs}


def planned_rows(run: RunData, hardware: str | None) -> dict[str, str]:
    """Planned and measured seconds, tokens a second and MFU of a run, by what they are.

    hardware: a name or a file; None means the run's own parallel.hardware. Raises UsageError without any.
    """
    name = hardware or run.config.parallel.hardware
    if name is None:
        raise UsageError(f"{run.name} names no parallel.hardware; give one, for example --plan a100-80")
    machine = load_hardware(name)
    return compare(run, machine)


def compare(run: RunData, machine: Hardware) -> dict[str, str]:
    """The rows for given hardware. Seconds an iteration follow from the median of tokens_per_second."""
    config = replace(run.config, model=known_model(run.config, stored_manifests(run.config)))
    plan = make_plan(config, ranks_of(run), machine)
    rates = run.points("tokens_per_second")[1]
    if not rates:
        raise UsageError(f"{run.name} has no tokens_per_second in its records; it cannot be compared with a plan")
    if statistics.median(rates) <= 0:
        raise UsageError(f"the median of tokens_per_second of {run.name} is not above 0; it cannot be compared with a plan")
    measured = tokens_per_iteration(run.config) / statistics.median(rates)
    low, high = plan.interval
    utilisation = run.points("mfu")[1]
    return {
        "planned for": f"{plan.layout.num_ranks} x {machine.name}",
        "s/iteration, planned": f"{plan.time.total:.3f}",
        "s/iteration, measured": f"{measured:.3f}",
        "planned / measured": f"{plan.time.total / measured - 1:+.1%}",
        "measured in the interval": "yes" if low <= measured <= high else f"no, it is {low:.3f} to {high:.3f}",
        "MFU, planned": f"{plan.mfu:.1%}",
        "MFU, measured": f"{statistics.median(utilisation):.1%}" if utilisation else "–",
    }


def ranks_of(run: RunData) -> int:
    """Ranks of the last launch; of a run without a record of it, those the config names."""
    launches = read_launches(run.config.run_dir)
    if not launches:
        return planned_world_size(run.config)
    num = launches[-1].get("world_size")
    if type(num) is not int or num < 1:
        path = os.path.join(run.config.run_dir, LAUNCHES)
        raise DataError(
            f"{path}: the last launch has the world_size {num!r:.60}, expected a number of ranks; correct that line"
        )
    return num
