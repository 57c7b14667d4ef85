"""The parts of a task: where its items come from, how they are put into words, and how an answer is judged.

A task is data. Its `row_formats` say which fields a line of its file must have, and turn one into an `Item`; its `template` puts an
item into words for either direction; its `kind` says what the model does with them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from megatron_ledom.direction import Direction
from megatron_ledom.evaluation.code.execution import ProgramTests
from megatron_ledom.evaluation.tasks.prompts import Template

Row = Mapping[str, Any]
"""One line of a file as it was read."""


class TaskKind(StrEnum):
    """The kind of task: weigh given choices, write an answer, a program that is run, or a question that is solved."""

    CHOICE = "choice"
    ANSWER = "answer"
    CODE = "code"
    QUESTION = "question"


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question, text order.

    values: the template's fields, the written ones as far as the set tells them. choices: the values that one field can have.
    gold: the right choice's number, or every accepted answer. tests: of `TaskKind.CODE`, what calls the written function.
    kept: what results repeat of an item besides, such as the group that it belongs to.
    """

    values: Mapping[str, str]
    choices: tuple[str, ...] = ()
    gold: int | tuple[str, ...] = ()
    tests: ProgramTests | None = None
    kept: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RowFormat:
    """One way in which a set is published. fields: dotted name -> what its value must be, of `FIELD_TYPES`; read: a row's Item.

    `read` raises ValueError where a value is of the right type and makes no sense, such as a gold choice that does not exist.
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
    """A task of one of the kinds. Files are named without their ending.

    download, exemplars_download: where the items, and the items of `exemplars_file`, come from.
    content_sha256: of the set's items, whatever kind of file they come in (`loading.content_hash`), where that is known.
    choice_field: the field that the choices are values of; the fields before it are the context. normalization: of a choice task's
    main figure (raw, token, byte). answers: how answers are compared, a kind of `grading.answers.comparison_by`. reverse_template: for a
    reverse model, where the mirrored `template` would not do.
    """

    name: str
    kind: TaskKind
    about: str
    template: Template
    row_formats: tuple[RowFormat, ...]
    file: str
    exemplars_file: str
    download: str
    exemplars_download: str = "the training part of the same set, in the same layout"
    content_sha256: str | None = None
    choice_field: str = ""
    normalization: str = "raw"
    answers: str = "math"
    max_new_tokens: int = 256
    stop_strings: tuple[str, ...] = ()
    reverse_template: Template | None = None
    main_way: str = ""
    """Of the ways of `multiple_choice`, the one of the main figure in both directions; empty for `multiple_choice.MAIN_WAY`."""

    def template_for(self, direction: Direction) -> Template:
        """The template that a model of this direction is asked with."""
        if direction is Direction.REVERSE and self.reverse_template is not None:
            return self.reverse_template
        return self.template


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedTask:
    """A task with its items. exemplars: demonstrations in the order in which they are taken; files: name -> sha256 of what was read;
    content_sha256: of all items of the file, to compare with the task's."""

    task: Task
    items: tuple[Item, ...]
    exemplars: tuple[Item, ...] = ()
    num_fewshot: int = 0
    seed: int = 0
    max_new_tokens: int = 256
    files: Mapping[str, str] = field(default_factory=dict)
    content_sha256: str = ""

    known: frozenset[str] = frozenset()
    """Of `TaskKind.QUESTION`: the questions of the file of demonstrations, which was trained on, to tell copies."""

    def exemplars_for(self, item: Item) -> list[Mapping[str, str]]:
        """The values of the first `num_fewshot` exemplars, the item itself left out."""
        others = [exemplar.values for exemplar in self.exemplars[: self.num_fewshot + 1] if exemplar.values != item.values]
        return others[: self.num_fewshot]
