"""The report of one or several runs: curves, final metrics, reverse compared with forward, and measured with planned values."""

import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from megatron_ledom.config.batch_schedule import has_batch_schedule, largest_batch
from megatron_ledom.config.derived import expected_world_size
from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.evaluation.intervals import t_interval
from megatron_ledom.planning.dry_run import known_model, stored_manifests
from megatron_ledom.planning.hardware import load_hardware
from megatron_ledom.planning.plan import make_plan
from megatron_ledom.reports.curves import draw, plot_names
from megatron_ledom.reports.pages import figure, number, page, paragraph, table
from megatron_ledom.reports.run_data import RunData, load_runs, training_pairs, twins_of, validation_pairs
from megatron_ledom.storage.files import write_file
from megatron_ledom.storage.locks import output_folder_lock
from megatron_ledom.storage.records import LAUNCHES
from megatron_ledom.training.history import read_launches

LAST = 10
"""Number of records whose mean is the final loss."""
FEWEST = 20
"""Smallest number of training records at the same tokens for which an interval of the difference is computed."""
BLOCKS = 10
"""Number of blocks of the last records; their means are treated as independent, unlike neighbouring records."""
LAST_VALIDATIONS = 5
FEWEST_VALIDATIONS = 3
NO_BASE = (
    "The forward run has a loss of 0, so no percentage of it exists; the twins' losses are not compared. Check its records."
)


def report_runs(folders: list[str], output: str, smooth: int, plan: str | None = None) -> None:
    """Write report.html and its plots as PNG files into the folder `output`; print the table.

    plan: the hardware for a plan that the runs are compared with; empty for each run's own parallel.hardware.
    """
    runs = load_runs(folders)
    with output_folder_lock(output):
        plots = [
            figure(name, partial(draw, name, runs, smooth=smooth), Path(output, f"{name}.png")) for name in plot_names(runs)
        ]
        rows = [summary(run) if plan is None else summary(run) | planned_rows(run, plan or None) for run in runs]
        cells = [[name, *(row[name] for row in rows)] for name in rows[0]]
        body = [paragraph(twin_sentence(runs), is_strong=True), table(cells), *plots]
        write_file(Path(output, "report.html"), page(", ".join(run.name for run in runs), body))
    for name, *values in cells:
        print(f"{name:<34}" + "".join(f"  {value:>24}" for value in values))
    print(twin_sentence(runs))
    print(os.path.join(output, "report.html"))


def summary(run: RunData) -> dict[str, str]:
    """Return the final metrics of a run, each with its name."""
    last = run.records[-1]
    validated = [record["validation"] for record in run.records if record.get("validation")]
    rows = {
        "run": run.name,
        "direction": run.direction,
        "iterations": f"{last['iteration']:,} of {run.config.train.train_iters:,}",
        "tokens": f"{last['consumed_train_tokens']:,}",
        f"training loss, last {LAST} records": number(final_loss(run), ".4f"),
        "tokens/s, median": number(_median(run, "tokens_per_second"), ",.0f"),
        "MFU, median": number(_median(run, "mfu"), ".1%"),
        "iterations skipped": f"{last.get('skipped_iterations', 0):,}",
    }
    last_sets = list(validated[-1].values()) if validated else []
    for key, name in (("lm_loss", "validation loss"), ("bits_per_byte", "bits per byte")):
        rows[f"{name}, mean of sets"] = number(_mean_of_sets([found[key] for found in last_sets]), ".4f")
    return rows


def final_loss(run: RunData) -> float | None:
    """Return the mean of the last finite training losses; None if there are none."""
    losses = run.points("lm_loss")[1][-LAST:]
    return statistics.mean(losses) if losses else None


def _mean_of_sets(values: list[float | None]) -> float | None:
    """Return the mean; None if a set has no finite value or there are no sets."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.mean(finite) if finite and len(finite) == len(values) else None


def _median(run: RunData, key: str) -> float | None:
    values = run.points(key)[1]
    return statistics.median(values) if values else None


def twin_sentence(runs: Sequence[RunData]) -> str:
    """Return a sentence on the final loss difference of the first reverse and the first forward run; empty if one is missing.

    It uses the validation losses, or the training losses without a common validation. It calls one run lower only if the sign is the
    same in all of the last validations of every set or, for training losses, if 0 is outside their interval.
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
        return f"{start}; {len(last)} common validation(s) give no interval, so neither is called lower (ledom compare-losses gives one)."
    over = f"{100 * min(means):+.2f} % to {100 * max(means):+.2f} % over the last {len(last)} validations"
    if min(map(min, every)) <= 0 <= max(map(max, every)):
        return f"{start}; the difference changes its sign between sets or validations ({over}), so neither is called lower."
    side = "above" if reverse > forward else "below"
    return f"{start}: {abs(reverse / forward - 1):.2%} {side} the forward run ({over})."


def _by_training(reverse: RunData, forward: RunData) -> str:
    """Compare the second half of the records at the same tokens in blocks, because neighbouring records are correlated."""
    pairs = [*training_pairs(reverse, forward).values()]
    if len(pairs) < FEWEST:
        return (
            f"The twins have no common validation and {len(pairs)} training records at the same tokens; an interval of their difference"
            f" needs {FEWEST}. Neither is called lower."
        )
    size = len(pairs) // 2 // BLOCKS
    last = pairs[-size * BLOCKS :]
    blocks = [statistics.mean(one - other for one, other in last[size * i : size * (i + 1)]) for i in range(BLOCKS)]
    base = statistics.mean(other for _, other in last) / 100
    if base <= 0:
        return NO_BASE
    middle = statistics.mean(blocks) / base
    low, high = (bound / base for bound in t_interval(blocks))
    difference = f"{middle:+.2f} %, 95 % interval {low:+.2f} to {high:+.2f} %"
    start = f"No common validation. Over the last {len(last)} training records at the same tokens the reverse run is"
    if low <= 0 <= high:
        return f"{start} not significantly different from the forward run ({difference}), so neither is called lower."
    return f"{start} {'above' if middle > 0 else 'below'} the forward run ({difference}; training loss, one run of each)."


def planned_rows(run: RunData, hardware: str | None) -> dict[str, str]:
    """Return planned and measured seconds per iteration and MFU of a run, each with its name.

    hardware: a name or a file; None means the run's own parallel.hardware. The measured seconds follow from the median of
    tokens_per_second; with a schedule of the batch size, plan and records are those of the largest one. Raises UsageError
    without hardware or without that median.
    """
    name = hardware or run.config.parallel.hardware
    if name is None:
        raise UsageError(f"{run.name} sets no parallel.hardware; name the hardware, for example --plan a100-80")
    machine = load_hardware(name)
    config = replace(run.config, model=known_model(run.config, stored_manifests(run.config)))
    plan = make_plan(config, ranks_of(run), machine)
    size = largest_batch(config)
    run = replace(run, records=[record for record in run.records if record.get("global_batch_size", size) == size])
    rate = _median(run, "tokens_per_second")
    if rate is None:
        of_batch = f" of its largest global batch, {size} samples" if has_batch_schedule(config) else ""
        raise UsageError(f"{run.name} has no tokens_per_second in its records{of_batch}; it cannot be compared with a plan")
    if rate <= 0:
        raise UsageError(f"the median of tokens_per_second of {run.name} is not above 0; it cannot be compared with a plan")
    measured = plan.layout.tokens_per_iteration / rate
    low, high = plan.interval
    return {
        "planned for": f"{plan.layout.num_ranks} x {machine.name}",
        "s/iteration, planned": f"{plan.time.total:.3f}",
        "s/iteration, measured": f"{measured:.3f}",
        "planned / measured": f"{plan.time.total / measured - 1:+.1%}",
        "measured in the interval": "yes" if low <= measured <= high else f"no, it is {low:.3f} to {high:.3f}",
        "MFU, planned": f"{plan.mfu:.1%}",
        "MFU, measured": number(_median(run, "mfu"), ".1%"),
    }


def ranks_of(run: RunData) -> int:
    """Return the number of ranks of the last launch, or that of the config if no launch is recorded."""
    launches = read_launches(run.config.run_dir)
    if not launches:
        return expected_world_size(run.config)
    num = launches[-1].get("world_size")
    if type(num) is not int or num < 1:
        path = os.path.join(run.config.run_dir, LAUNCHES)
        raise DataError(
            f"{path}: the last launch has the world_size {num!r:.60}, expected a number of ranks; correct that line"
        )
    return num
