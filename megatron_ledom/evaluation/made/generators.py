"""Which sets can be made."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from megatron_ledom.evaluation.made.facts import reversal
from megatron_ledom.evaluation.made.made_set import MadeSet, write_made_set

GENERATORS: Mapping[str, Callable[[int, int], MadeSet]] = MappingProxyType({"reversal": reversal})
"""Name -> function of a number and a seed; what the number counts stands in the function's docstring."""


def make_analysis_data(task: str, folder: str, num: int, seed: int) -> None:
    """Make a set and write it into `folder`."""
    made = GENERATORS[task](num, seed)
    write_made_set(made, Path(folder), {"task": task, "num": num, "seed": seed})
