"""The config and the records of runs for reports, and the losses of twins at the same training tokens."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ledom.checkpoint.chain import tokens_before
from megatron_ledom.config.load import load_config
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.errors import UsageError
from megatron_ledom.storage.records import METRICS, iteration_of, read_records
from megatron_ledom.training.origin import read_chain

MOST = 2**63
"""Limit of an integer in a record; it still converts to a float."""
MEASURED = ("lm_loss", "grad_norm", "lr", "tokens_per_second", "mfu")
"""Metrics of a record that a report reads; null or missing if no finite value was measured."""
Record = dict[str, Any]
Series = tuple[list[float], list[float]]
"""Training tokens and the values there."""


@dataclass(frozen=True, slots=True)
class RunData:
    """The config and the records of one run."""

    name: str
    """The name of its folder, with as many parent folders as distinguish it from the other runs."""
    config: RunConfig
    records: list[Record]
    earlier_tokens: int = 0
    """Training tokens of the runs from which it started by `init_from`."""

    @property
    def direction(self) -> str:
        """`reverse`, `forward` or `both`."""
        return str(self.config.data.direction)

    def last_tokens(self) -> float:
        """Return the training tokens at the last record, with those of earlier runs."""
        return float(self.earlier_tokens + self.records[-1]["consumed_train_tokens"])

    def points(self, key: str) -> Series:
        """Return the training tokens, with those of earlier runs, and the finite values of a key."""
        found = [(self.earlier_tokens + record["consumed_train_tokens"], record.get(key)) for record in self.records]
        usable = [(x, y) for x, y in found if y is not None and math.isfinite(y)]
        return [x for x, _ in usable], [y for _, y in usable]

    def validations(self) -> dict[str, Series]:
        """Return the training tokens, with those of earlier runs, and the finite losses of each validation set."""
        series: dict[str, Series] = {}
        for record in self.records:
            for name, found in record.get("validation", {}).items():
                if found["lm_loss"] is None or not math.isfinite(found["lm_loss"]):
                    continue
                tokens, losses = series.setdefault(name, ([], []))
                tokens.append(self.earlier_tokens + record["consumed_train_tokens"])
                losses.append(found["lm_loss"])
        return series


def load_runs(folders: list[str]) -> list[RunData]:
    """Read config.yaml and metrics.jsonl of each run. Raises UsageError for a folder that is not of a run or has no records yet."""
    runs = []
    for folder, name in zip(folders, _names(folders), strict=True):
        config_file, metrics = os.path.join(folder, "config.yaml"), os.path.join(folder, METRICS)
        if not os.path.exists(config_file):
            raise UsageError(f"{folder} has no config.yaml; give the run_dir of a run")
        records = read_records(metrics, checked_record)
        if not records:
            raise UsageError(f"{metrics} has no record yet; wait for logging.log_interval iterations")
        runs.append(RunData(name, load_config(config_file), records, tokens_before(read_chain(folder))))
    return runs


def checked_record(record: Record) -> Record:
    """Return the record after checking the types of its fields. Raises KeyError, TypeError or ValueError, like `iteration_of`."""
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
    """Raise TypeError or ValueError for a value that is not a number or is too large."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"its {name} is {value!r:.60}, expected a number")
    if isinstance(value, int) and abs(value) > MOST:
        raise ValueError(f"its {name} is an integer of {value.bit_length()} bits, expected one below 2^63")
    if not may_be_nan and not math.isfinite(value):
        raise ValueError(f"its {name} is {value}, expected a finite number")


def _names(folders: list[str]) -> list[str]:
    parts = [Path(folder).resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UsageError(f"a run is named twice: {', '.join(folders)}; name each run once")


def twins_of(runs: Sequence[RunData]) -> tuple[RunData, RunData] | None:
    """Return the first reverse and the first forward run; None if one is missing."""
    first = {run.direction: run for run in reversed(runs)}
    return (first["reverse"], first["forward"]) if {"reverse", "forward"} <= set(first) else None


def training_pairs(reverse: RunData, forward: RunData) -> dict[float, tuple[float, float]]:
    """Return the reverse and the forward loss for each number of training tokens at which both are finite."""
    return _at_same_tokens(reverse.points("lm_loss"), forward.points("lm_loss"))


def validation_pairs(reverse: RunData, forward: RunData) -> dict[str, dict[float, tuple[float, float]]]:
    """Return both losses at each number of training tokens, for each validation set that both runs have.

    Two single sets with different names are paired too.
    """
    ours, theirs = reverse.validations(), forward.validations()
    names = {name: (name, name) for name in ours if name in theirs}
    if not names and len(ours) == len(theirs) == 1:
        names = {f"{one} and {other}": (one, other) for one, other in zip(ours, theirs, strict=True)}
    found = {name: _at_same_tokens(ours[one], theirs[other]) for name, (one, other) in names.items()}
    return {name: pairs for name, pairs in found.items() if pairs}


def _at_same_tokens(one: Series, other: Series) -> dict[float, tuple[float, float]]:
    theirs = dict(zip(*other, strict=True))
    return {tokens: (value, theirs[tokens]) for tokens, value in zip(*one, strict=True) if tokens in theirs}
