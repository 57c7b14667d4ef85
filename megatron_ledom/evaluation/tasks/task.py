"""The parts of a task: the files of its items, the template of its prompts, and the way in which its answers are judged.

A task is data. Its `row_formats` define the fields of a line of its file and convert the line to an `Item`. Its
`template` renders an item as a prompt for either direction. Its `kind` defines what the model does with the prompt.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from megatron_ledom.direction import Direction
from megatron_ledom.evaluation.code.execution import ProgramTests
from megatron_ledom.evaluation.tasks.prompts import Template

Row = Mapping[str, Any]
"""One line of a file, as read."""


class TaskKind(StrEnum):
    """The kind of task.

    The model scores given choices, or writes an answer, a program that is run, or a question that is solved.
    """

    CHOICE = "choice"
    ANSWER = "answer"
    CODE = "code"
    QUESTION = "question"


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question, in text order.

    values: the template's fields; a field that the model writes is present if the set contains it. choices: the
    possible values of one field. gold: the number of the right choice, or every accepted answer. tests: of
    `TaskKind.CODE`, the code that calls the written function. kept: entries that are copied to the item's record, such
    as its group.
    """

    values: Mapping[str, str]
    choices: tuple[str, ...] = ()
    gold: int | tuple[str, ...] = ()
    tests: ProgramTests | None = None
    kept: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RowFormat:
    """One format in which a set is published.

    fields: dotted name -> type of its value, a key of `FIELD_TYPES`. read: row -> Item. `read` raises ValueError if a
    value has the right type but makes no sense, such as a gold choice that does not exist.
    """

    fields: Mapping[str, str]
    read: Callable[[Row], Item]


FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "text": (str,),
    "number": (int, float),
    "text or number": (str, int, float),
    "yes or no": (bool,),
    "list": (list,),
    "object": (dict,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task of one of the kinds. File names have no ending.

    download, exemplars_download: source of the items, and of the few-shot examples in `exemplars_file`. content_sha256:
    hash of the set's items if known, the same for every file type (`loading.content_hash`). choice_field: the field
    whose values are the choices; the fields before it are the context. normalization: of a choice task's main metric
    (raw, token, byte). answers: the comparison of answers, a name of `grading.answers.comparison_by`. reverse_template:
    for a reverse model, if the mirrored `template` does not fit.
    """

    name: str
    kind: TaskKind
    about: str
    template: Template
    row_formats: tuple[RowFormat, ...]
    file: str
    exemplars_file: str
    download: str
    exemplars_download: str = "the training part of the same set, in the same format"
    content_sha256: str | None = None
    choice_field: str = ""
    normalization: str = "raw"
    answers: str = "math"
    max_new_tokens: int = 256
    stop_strings: tuple[str, ...] = ()
    reverse_template: Template | None = None
    main_way: str = ""
    """The way (of `multiple_choice`) of the main metric, in both directions. Empty: `multiple_choice.MAIN_WAY`."""

    def template_for(self, direction: Direction) -> Template:
        """Return the template of the prompts for a model of this direction."""
        if direction is Direction.REVERSE and self.reverse_template is not None:
            return self.reverse_template
        return self.template


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedTask:
    """A task with its items. exemplars: few-shot examples, in the order of use.

    files: name -> sha256 of each file that was read. content_sha256: of all items of the file, to compare with the
    task's.
    """

    task: Task
    items: tuple[Item, ...]
    exemplars: tuple[Item, ...] = ()
    num_fewshot: int = 0
    seed: int = 0
    max_new_tokens: int = 256
    files: Mapping[str, str] = field(default_factory=dict)
    content_sha256: str = ""

    trained_questions: frozenset[str] = frozenset()
    """Of `TaskKind.QUESTION`: the questions that were trained, so that a copy of one is recognized."""

    def exemplars_for(self, item: Item) -> list[Mapping[str, str]]:
        """Return the values of the first `num_fewshot` exemplars other than the item itself."""
        others = [exemplar.values for exemplar in self.exemplars[: self.num_fewshot + 1] if exemplar.values != item.values]
        return others[: self.num_fewshot]
