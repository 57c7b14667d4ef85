"""The analyses as tasks of tools/evaluate.py. A reverse model's main figure is what it gives to the answer in front of what is given."""

from typing import Any

from megatron_ledom.evaluation.prompts import Field, Template
from megatron_ledom.evaluation.tasks import Item, Kind, Layout, Row, Task

MADE_BY = "tools/make_analysis_data.py --task"
MADE = {
    "before": "text",
    "after": "text",
    "choices": "list",
    "gold": "number",
    "group": "text",
}


def _choice(row: Row) -> Item:
    choices = tuple(row["choices"])
    if not 0 <= row["gold"] < len(choices):
        raise ValueError(f"the right choice is {row['gold']}, none of 0 to {len(choices) - 1}")
    values = {"before": row["before"], "answer": choices[row["gold"]], "after": row["after"]}
    return Item(values=values, choices=choices, gold=row["gold"], kept={"group": row["group"]})


def _answer(row: Row) -> Item:
    item = _choice(row)
    return Item(values=item.values, gold=(item.values["answer"],), kept=item.kept)


ENDING = Template(fields=(Field("before"), Field("answer", cue=".")), field_separator=" ", is_read_back=False)
BEGINNING = Template(fields=(Field("after"), Field("answer")), field_separator=" ", is_read_back=False)
ASKED_IN_OWN_ORDER: dict[str, Any] = {"template": ENDING, "reverse_template": BEGINNING, "main_way": "choice_given_context"}
"""What is asked for comes last in the order of either model: at the end of a sentence, or at the beginning of its other wording."""

MADE_TASKS: tuple[Task, ...] = (
    Task(
        name="reversal",
        kind=Kind.CHOICE,
        about="facts trained in one order and asked in both (reversal curse); four names, chance 25 %",
        layouts=(Layout(MADE, _choice),),
        file="reversal",
        demonstrations_file="reversal_shots",
        download=f"{MADE_BY} reversal",
        choice_field="answer",
        **ASKED_IN_OWN_ORDER,
    ),
    Task(
        name="reversal_written",
        kind=Kind.ANSWER,
        about="the same facts, the name is written and compared as a whole",
        template=ENDING,
        reverse_template=BEGINNING,
        layouts=(Layout(MADE, _answer),),
        file="reversal",
        demonstrations_file="reversal_shots",
        download=f"{MADE_BY} reversal",
        answers="alias",
        max_new_tokens=32,
        stop_strings=(".", "\n"),
    ),
)
