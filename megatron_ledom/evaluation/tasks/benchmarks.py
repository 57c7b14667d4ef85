"""The published benchmarks as tasks: row formats, prompts and judgement.

A new set in a known format needs one entry and no code. The file of a task is FOLDER/NAME with one of
`loading.ENDINGS`. Rename a file that is published under another name.
"""

import re
from collections.abc import Sequence
from typing import Any

from megatron_ledom.evaluation.code.execution import ProgramTests
from megatron_ledom.evaluation.tasks.prompts import Field, Template
from megatron_ledom.evaluation.tasks.task import Item, Row, RowFormat, Task, TaskKind

MATHS = Template(
    fields=(
        Field("question", "Question: "),
        Field("chain", "Reasoning: ", "\nThat is how the answer is found."),
        Field("answer", "Answer: "),
    ),
    num_targets=2,
    block_separator="\n\n\n",
)
"""For worked solutions, which may contain blank lines."""
QUESTION_ANSWER = Template(fields=(Field("question", "Question: "), Field("answer", "Answer: ")))
RUNNING = Template(fields=(Field("context"), Field("ending")), field_separator=" ", is_read_back=False)
"""Running text: the choices continue the context."""


def _plain(value: Any) -> str:
    """Return a number or text as people write it: 145.0 is 145."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _index(number: Any, choices: Sequence[str]) -> int:
    """Return the index of a gold choice that is given by its number, which may be a string."""
    if not str(number).strip().isdigit() or not int(number) < len(choices):
        raise ValueError(
            f"the right choice is {number!r}, expected 0 to {len(choices) - 1} (a file without answers cannot be judged)"
        )
    return int(number)


def _named(name: str, names: Sequence[str]) -> int:
    """Return the index of a gold choice that is given by its label, such as B."""
    if name not in names:
        raise ValueError(f"the right choice is {name!r}, expected {', '.join(names)} (a file without answers cannot be judged)")
    return list(names).index(name)


def _gsm8k(row: Row) -> Item:
    chain, mark, answer = row["answer"].rpartition("####")
    if not mark:
        raise ValueError("the answer does not end with '#### NUMBER'")
    answer = answer.strip().replace(",", "")
    chain = re.sub(r"<<.*?>>", "", chain).strip()  # the calculator's marks
    return Item(values={"question": row["question"].strip(), "chain": chain, "answer": answer}, gold=(answer,))


def _svamp(row: Row) -> Item:
    body = row["Body"].strip()
    question = f"{body}{'' if body.endswith(('.', ',', '?', '!')) else '.'} {row['Question'].strip()}"
    answer = _plain(row["Answer"])
    chain = re.sub(r"(?<=\d)\.0\b", "", str(row["Equation"])).strip()
    return Item(values={"question": question, "chain": chain, "answer": answer}, gold=(answer,))


def _problem(row: Row) -> Item:
    values = {"question": row["problem"].strip(), "answer": _plain(row["answer"])}
    if isinstance(row.get("solution"), str):
        values["chain"] = row["solution"].strip()
    return Item(values=values, gold=(values["answer"],))


def _boolq(row: Row) -> Item:
    gold = int(row["answer"] if "answer" in row else row["label"])
    choices = ("no", "yes")
    question = row["question"].strip().removesuffix("?") + "?"
    values = {"passage": row["passage"].strip(), "question": question, "answer": choices[_index(gold, choices)]}
    return Item(values=values, choices=choices, gold=gold)


def _without_brackets(text: str) -> str:
    """Remove the marks of headings from HellaSwag's how-to texts: `[title] Do this. [step] Take ...`."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return re.sub(r" {2,}", " ", text).strip()


def _hellaswag(row: Row) -> Item:
    choices = tuple(_without_brackets(ending) for ending in row["endings"])
    gold = _index(row["label"], choices)
    context = f"{row['activity_label']}: {_without_brackets(row['ctx'])}"
    return Item(values={"context": context, "ending": choices[gold]}, choices=choices, gold=gold)


def _winogrande(row: Row) -> Item:
    before, mark, after = row["sentence"].partition("_")
    if not mark:
        raise ValueError("the sentence has no _ for the option")
    choices = (row["option1"], row["option2"])
    gold = _named(str(row["answer"]), ("1", "2"))
    return Item(values={"before": before, "option": choices[gold], "after": after}, choices=choices, gold=gold)


def _choice_item(question: str, choices: Sequence[str], gold: int, names: tuple[str, str] = ("question", "answer")) -> Item:
    kept = tuple(choice.strip() for choice in choices)
    return Item(values={names[0]: question.strip(), names[1]: kept[gold]}, choices=kept, gold=gold)


def _arc(row: Row) -> Item:
    return _choice_item(row["question"], row["choices"]["text"], _named(row["answerKey"], row["choices"]["label"]))


def _arc_original(row: Row) -> Item:
    listed = row["question"]["choices"]
    gold = _named(row["answerKey"], [choice["label"] for choice in listed])
    return _choice_item(row["question"]["stem"], [choice["text"] for choice in listed], gold)


def _openbookqa(row: Row) -> Item:
    gold = _named(row["answerKey"], row["choices"]["label"])
    return _choice_item(row["question_stem"], row["choices"]["text"], gold, ("context", "ending"))


def _openbookqa_original(row: Row) -> Item:
    item = _arc_original(row)
    return Item(
        values={"context": item.values["question"], "ending": item.values["answer"]}, choices=item.choices, gold=item.gold
    )


def _piqa(row: Row) -> Item:
    choices = (row["sol1"], row["sol2"])
    return _choice_item(row["goal"], choices, _index(row["label"], choices))


def _short_answer(row: Row) -> Item:
    found = row["answer"]
    accepted = found if isinstance(found, list) else [found["value"], *found["aliases"]]
    if not accepted:
        raise ValueError("no answer is accepted")
    return Item(values={"question": row["question"].strip(), "answer": accepted[0]}, gold=tuple(dict.fromkeys(accepted)))


def _humaneval(row: Row) -> Item:
    code = row["canonical_solution"].rstrip() + "\n"
    return Item(
        values={"prompt": row["prompt"], "code": code, "whole": row["prompt"] + code},
        gold=(row["canonical_solution"],),
        tests=ProgramTests(
            code=f"{row['test']}\n\ncheck({row['entry_point']})\n", entry_point=row["entry_point"], prelude=row["prompt"]
        ),
    )


PROBLEM = (RowFormat({"problem": "text", "answer": "text or number"}, _problem),)
NAMED_CHOICES = {"choices.text": "list", "choices.label": "list", "answerKey": "text"}
STEM_CHOICES = {"question.stem": "text", "question.choices": "list", "answerKey": "text"}
SHORT_ANSWER = {"template": QUESTION_ANSWER, "kind": TaskKind.ANSWER, "answers": "alias", "max_new_tokens": 32}
HUB = "https://huggingface.co/datasets"
MATH_TRAIN = (
    "lines with problem, solution and answer: train.jsonl of https://github.com/openai/prm800k/tree/main/prm800k/math_splits"
    " (12,000 problems of MATH, none of them in MATH-500)"
)

STATEMENTS = "lines with problem and answer; the statements are on https://artofproblemsolving.com/wiki"
MATH500 = f"test.jsonl of {HUB}/HuggingFaceH4/MATH-500"
COMPETITIONS = (
    ("math500", "500 competition problems of the MATH test set", 512, MATH500,
     "60eca610052c3b191b9a1d1dde977b72f239e7a5f69d4cc18f4d12870638d775"),
    ("aime24", "the 30 problems of AIME 2024", 1024, f"30 {STATEMENTS}",
     "44624eaa356c586dc626f12c7f57ee0ced11404677e2e55887a8fae9a0ed2bb4"),
    ("amc23", "40 problems of AMC 12, 2023", 1024, f"40 {STATEMENTS}",
     "d91256e2a58aa23b4b159ac4a20cfdd3d2f7951d04c6811443da724ed34a1f85"),
)  # fmt: skip
"""Of each: name, about, max_new_tokens, download, content_sha256."""
ARC_CONTENT = {
    "easy": "54d9da5a41a60041b367da1ae54ad44f032c026cec02ab8c055fa56efd0c86ef",
    "challenge": "3a3c06ab9e6b4f86a07e6efca8bd899d8902e29af7268511b5d497c57c51833c",
}
TASKS: tuple[Task, ...] = (
    Task(
        name="gsm8k",
        kind=TaskKind.ANSWER,
        about="grade-school word problems with worked solutions",
        template=MATHS,
        row_formats=(RowFormat({"question": "text", "answer": "text"}, _gsm8k),),
        file="gsm8k_test",
        exemplars_file="gsm8k_train",
        download="test.jsonl and train.jsonl of https://github.com/openai/grade-school-math/tree/master/grade_school_math/data",
        content_sha256="9f282e85e14fa9f24d5716ea31e37136f2fe953b36d5835ee8f5c65893dae24d",
    ),
    *(
        Task(
            name=name,
            kind=TaskKind.ANSWER,
            about=about,
            template=MATHS,
            row_formats=PROBLEM,
            file=name,
            exemplars_file="math_train",
            exemplars_download=MATH_TRAIN,
            download=download,
            content_sha256=known,
            max_new_tokens=max_new_tokens,
        )
        for name, about, max_new_tokens, download, known in COMPETITIONS
    ),
    Task(
        name="svamp",
        kind=TaskKind.ANSWER,
        about="short word problems; the equation is the worked solution",
        template=MATHS,
        row_formats=(RowFormat({"Body": "text", "Question": "text", "Answer": "text or number", "Equation": "text"}, _svamp),),
        file="svamp",
        exemplars_file="svamp_train",
        download="data/test.jsonl and data/train.jsonl of https://github.com/arkilpatel/SVAMP, or SVAMP.json as JSON lines",
        content_sha256="3e0b9d48687128db0e62e1dcc29664e9724f3c3fdf58b6cc86829fd0f8338053",
        max_new_tokens=64,
    ),
    Task(
        name="boolq",
        kind=TaskKind.CHOICE,
        about="yes-or-no questions about a passage",
        template=Template(fields=(Field("passage", "Passage: "), Field("question", "Question: "), Field("answer", "Answer: "))),
        row_formats=(
            RowFormat({"passage": "text", "question": "text", "answer": "yes or no"}, _boolq),
            RowFormat({"passage": "text", "question": "text", "label": "number"}, _boolq),
        ),
        file="boolq_validation",
        exemplars_file="boolq_train",
        download=f"{HUB}/google/boolq, data/validation-*.parquet, or dev.jsonl of the original release",
        content_sha256="441522d2982f3cbfaa47d4ba0c1124181a7540fabb0e75a40b314e842bfb4ce5",
        choice_field="answer",
    ),
    Task(
        name="hellaswag",
        kind=TaskKind.CHOICE,
        about="choose the one of four endings that continues a text",
        template=RUNNING,
        row_formats=(
            RowFormat({"activity_label": "text", "ctx": "text", "endings": "list", "label": "text or number"}, _hellaswag),
        ),
        file="hellaswag_validation",
        exemplars_file="hellaswag_train",
        download=f"{HUB}/Rowan/hellaswag, data/validation-*.parquet, or hellaswag_val.jsonl of the original release",
        content_sha256="e9ef685538c973345660de055d2c10cd745e8efe401ff90157a1c90fbf16595f",
        choice_field="ending",
        normalization="byte",
    ),
    Task(
        name="winogrande",
        kind=TaskKind.CHOICE,
        about="choose the one of two words that fills a gap",
        template=Template(fields=(Field("before"), Field("option"), Field("after")), field_separator="", is_read_back=False),
        row_formats=(
            RowFormat({"sentence": "text", "option1": "text", "option2": "text", "answer": "text or number"}, _winogrande),
        ),
        file="winogrande_validation",
        exemplars_file="winogrande_train",
        download=f"{HUB}/allenai/winogrande, winogrande_xl/validation-*.parquet, or dev.jsonl of the original release",
        content_sha256="8f7fb3d4cfd4d364711986d69536b8fa39f437e468d29797169088f5b61b99ca",
        choice_field="option",
    ),
    Task(
        name="openbookqa",
        kind=TaskKind.CHOICE,
        about="science questions or beginnings of sentences; four choices",
        template=RUNNING,
        row_formats=(
            RowFormat({"question_stem": "text", **NAMED_CHOICES}, _openbookqa),
            RowFormat(STEM_CHOICES, _openbookqa_original),
        ),
        file="openbookqa_test",
        exemplars_file="openbookqa_train",
        download=f"{HUB}/allenai/openbookqa, main/test-*.parquet, or Data/Main/test.jsonl of the original release",
        content_sha256="359809e70895d034c251aabce5e321e077e48b95d2ffd6ea61d08122f3ce0ee0",
        choice_field="ending",
        normalization="byte",
    ),
    *(
        Task(
            name=f"arc_{part}",
            kind=TaskKind.CHOICE,
            about=f"school science questions, the {part} part",
            template=QUESTION_ANSWER,
            row_formats=(RowFormat({"question": "text", **NAMED_CHOICES}, _arc), RowFormat(STEM_CHOICES, _arc_original)),
            file=f"arc_{part}_test",
            exemplars_file=f"arc_{part}_train",
            download=f"{HUB}/allenai/ai2_arc, ARC-{part.title()}/test-*.parquet, or ARC-{part.title()}-Test.jsonl",
            content_sha256=known,
            choice_field="answer",
            normalization="byte",
        )
        for part, known in ARC_CONTENT.items()
    ),
    Task(
        name="piqa",
        kind=TaskKind.CHOICE,
        about="choose the one of two ways to do something that works",
        template=QUESTION_ANSWER,
        row_formats=(RowFormat({"goal": "text", "sol1": "text", "sol2": "text", "label": "text or number"}, _piqa),),
        file="piqa_validation",
        exemplars_file="piqa_train",
        download="valid.jsonl of https://yonatanbisk.com/piqa with the lines of valid-labels.lst added as label",
        content_sha256="69fdbc1207496802a9c4eeaa3352fce324df92f3bf134852d181b55cfdca3758",
        choice_field="answer",
        normalization="byte",
    ),
    Task(
        name="triviaqa",
        about="trivia questions without a passage",
        row_formats=(RowFormat({"question": "text", "answer.value": "text", "answer.aliases": "list"}, _short_answer),),
        file="triviaqa_validation",
        exemplars_file="triviaqa_train",
        download=f"{HUB}/mandarjoshi/trivia_qa, rc.wikipedia.nocontext/validation-*.parquet",
        content_sha256="46821201dfced9d7770db0b686814aa5d917dbac828f328f8dc9b4845ddb010d",
        **SHORT_ANSWER,  # type: ignore[arg-type]
    ),
    Task(
        name="nq_open",
        about="questions that people asked a search engine",
        row_formats=(RowFormat({"question": "text", "answer": "list"}, _short_answer),),
        file="nq_open_validation",
        exemplars_file="nq_open_train",
        download=f"{HUB}/google-research-datasets/nq_open, nq_open/validation-*.parquet, or NQ-open.dev.jsonl",
        content_sha256="0caf471b0ddcec9c03342757c50008411ccd7f7ba573768795dbe496b382a01c",
        **SHORT_ANSWER,  # type: ignore[arg-type]
    ),
    Task(
        name="humaneval",
        kind=TaskKind.CODE,
        about="Python functions from their docstring; the written code is run (--allow-code-execution)",
        template=Template(
            fields=(Field("prompt"), Field("code")), field_separator="", block_separator="\n\n\n", is_read_back=False
        ),
        reverse_template=Template(
            fields=(
                Field("prompt", "# To be written:\n"),
                Field("whole", "# The whole function:\n", "\n# That was the whole function."),
            ),
            block_separator="\n\n\n\n",
        ),
        row_formats=(
            RowFormat({"prompt": "text", "canonical_solution": "text", "test": "text", "entry_point": "text"}, _humaneval),
        ),
        file="humaneval",
        exemplars_file="humaneval_fewshot",
        exemplars_download=(
            "problems of your own as lines with prompt, canonical_solution, test and entry_point: the set has no training part"
        ),
        download="HumanEval.jsonl.gz of https://github.com/openai/human-eval/tree/master/data",
        content_sha256="83d6e6d96950f159617ab206453475368725e8e46330dd3794ae27202c7b23a2",
        stop_strings=("\nclass ", "\ndef ", "\nif ", "\nprint(", "\nassert ", "\n#", "\n@"),
    ),
)
