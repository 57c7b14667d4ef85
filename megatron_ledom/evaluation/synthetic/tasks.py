"""The synthetic sets as tasks of `ledom evaluate`."""

from typing import Any

from megatron_ledom.evaluation.tasks.prompts import Field, Template
from megatron_ledom.evaluation.tasks.task import Item, Row, RowFormat, Task, TaskKind

CHOICE_FIELDS = {
    "before": "text",
    "after": "text",
    "choices": "list",
    "gold": "number",
    "group": "text",
}


def _choice(row: Row) -> Item:
    choices = tuple(row["choices"])
    if not 0 <= row["gold"] < len(choices):
        raise ValueError(f"the right choice is {row['gold']}, expected 0 to {len(choices) - 1}")
    values = {"before": row["before"], "answer": choices[row["gold"]], "after": row["after"]}
    kept = {name: row[name] for name in ("group", "cluster") if name in row}
    return Item(values=values, choices=choices, gold=row["gold"], kept=kept)


def _answer(row: Row) -> Item:
    item = _choice(row)
    return Item(values=item.values, gold=(item.values["answer"],), kept=item.kept)


def _question(row: Row) -> Item:
    values = {"solution": row["solution"], "question": row["question"]}
    return Item(values=values, gold=(row["solution"],), kept={"group": row["group"], "gold_answer": row["answer"]})


ENDING = Template(fields=(Field("before"), Field("answer", cue=".")), field_separator=" ", is_read_back=False)
BEGINNING = Template(fields=(Field("after"), Field("answer")), field_separator=" ", is_read_back=False)
ANSWER_LAST: dict[str, Any] = {"template": ENDING, "reverse_template": BEGINNING, "main_way": "choice_given_context"}
"""Settings of a task whose answer is last in model order: at the end of a sentence, or at its beginning (reverse)."""


def _files(name: str, exemplars: str = "shots") -> dict[str, Any]:
    """Return the file names of a set, and the command that writes them."""
    command = f"ledom make-analysis-data --task {name}"
    files = {"file": name, "exemplars_file": f"{name}_{exemplars}"}
    return {**files, "download": command, "exemplars_download": command}


SYNTHETIC_TASKS: tuple[Task, ...] = (
    Task(
        name="reversal",
        kind=TaskKind.CHOICE,
        about="facts trained in one order and tested in both (reversal curse); four names, chance 25 %",
        row_formats=(RowFormat(CHOICE_FIELDS, _choice),),
        **_files("reversal"),
        choice_field="answer",
        **ANSWER_LAST,
    ),
    Task(
        name="reversal_written",
        kind=TaskKind.ANSWER,
        about="the same facts; the model writes the name, which must match as a whole",
        template=ENDING,
        reverse_template=BEGINNING,
        row_formats=(RowFormat(CHOICE_FIELDS, _answer),),
        **_files("reversal"),
        answers="alias",
        max_new_tokens=32,
        stop_strings=(".", "\n"),
    ),
    Task(
        name="question_from_answer",
        kind=TaskKind.QUESTION,
        about="write the question of a worked solution; right if a solver finds the same solution",
        template=Template(fields=(Field("solution", "Solution: "), Field("question", "Question: "))),
        row_formats=(RowFormat({"question": "text", "solution": "text", "answer": "text", "group": "text"}, _question),),
        **_files("question_from_answer", "train"),
        max_new_tokens=128,
    ),
    Task(
        name="abduction",
        kind=TaskKind.CHOICE,
        about="choose the cause of given outcomes in a small world; chance 25 %",
        template=Template(fields=(Field("before"), Field("answer"), Field("after")), field_separator=" ", is_read_back=False),
        row_formats=(RowFormat(CHOICE_FIELDS, _choice),),
        **_files("abduction"),
        choice_field="answer",
    ),
    Task(
        name="label_backfill",
        kind=TaskKind.CHOICE,
        about="choose the label that preceded a text; chance 25 %",
        template=Template(fields=(Field("answer", "Category: "), Field("after", "Text: ")), is_read_back=False),
        row_formats=(RowFormat(CHOICE_FIELDS, _choice),),
        **_files("label_backfill"),
        choice_field="answer",
    ),
    Task(
        name="inverse_relations",
        kind=TaskKind.CHOICE,
        about="a parent trained, the child tested, and similar relations; pairing alone does not help; chance 25 %",
        row_formats=(RowFormat(CHOICE_FIELDS, _choice),),
        **_files("inverse_relations"),
        choice_field="answer",
        **ANSWER_LAST,
    ),
)
