"""The synthetic sets by name, and the command that writes one."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from megatron_ledom.evaluation.synthetic.causes_and_labels import abduction, label_backfill
from megatron_ledom.evaluation.synthetic.facts import inverse_relations, reversal
from megatron_ledom.evaluation.synthetic.sets import SyntheticSet, write_synthetic_set
from megatron_ledom.evaluation.synthetic.word_problems import question_from_answer
from megatron_ledom.storage.locks import output_folder_lock

GENERATORS: Mapping[str, Callable[[int, int], SyntheticSet]] = MappingProxyType(
    {
        "reversal": reversal,
        "question_from_answer": question_from_answer,
        "abduction": abduction,
        "label_backfill": label_backfill,
        "inverse_relations": inverse_relations,
    }
)
"""Name -> function of a number and a seed. The function's docstring says what the number counts."""


def make_analysis_data(task: str, folder: str, num: int, seed: int) -> None:
    """Generate a set and write it into `folder`."""
    generated = GENERATORS[task](num, seed)
    with output_folder_lock(folder):
        write_synthetic_set(generated, Path(folder), {"task": task, "num": num, "seed": seed})
