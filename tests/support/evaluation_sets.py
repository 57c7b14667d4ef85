"""A few legible items of every task, in a published format of its set."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Rows = list[dict[str, Any]]
CHOICES = {"text": ["ice", "fire"], "label": ["A", "B"]}


def _svamp(name: str, first: int, second: int) -> dict[str, Any]:
    return {
        "Body": f"{name} has {first} pears. Ben has {second}",
        "Question": "How many pears are there?",
        "Answer": float(first + second),
        "Equation": f"( {first}.0 + {second}.0 )",
    }


SETS: dict[str, Rows] = {
    "gsm8k_test": [
        {"question": "Ann has 2 pears and buys 1,000. How many?", "answer": "2 + 1000 = <<2+1000=1002>>1002.\n#### 1,002"},
        {"question": "Ben has 3 hats and loses 1. How many?", "answer": "3 - 1 = <<3-1=2>>2.\n#### 2"},
    ],
    "math500": [{"problem": "What is $1/2 + 1/4$?", "solution": "Add.\n\nIt is $3/4$.", "answer": "\\frac{3}{4}"}],
    "aime24": [{"id": 60, "problem": "How many minutes?", "answer": "204"}],
    "amc23": [{"problem": "How many miles?", "answer": 27.0}],
    "svamp": [_svamp("Ann", 2, 3), _svamp("Eve", 1, 1), _svamp("Zoe", 4, 4)],
    "svamp_train": [_svamp("Carl", 7, 0), _svamp("Dora", 7, 7)],
    "boolq_validation": [
        {"passage": "Ice is cold.", "question": "is ice cold", "answer": True, "title": "Ice"},
        {"passage": "Fire is hot.", "question": "is fire cold", "answer": False},
    ],
    "boolq_train": [{"passage": f"{n} is even.", "question": f"is {n} even", "label": 1} for n in (2, 4, 6)],
    "hellaswag_validation": [
        {
            "activity_label": "Cooking",
            "ctx": "A man boils water. He",
            "endings": ["[title] Stop.", "adds salt."],
            "label": "1",
        }
    ],
    "winogrande_validation": [
        {"sentence": "The cup fits the box, for the _ is small.", "option1": "cup", "option2": "box", "answer": "1"}
    ],
    "openbookqa_test": [{"question_stem": "Water freezes to", "choices": CHOICES, "answerKey": "A"}] * 3,
    "arc_challenge_test": [{"question": "What burns?", "choices": CHOICES, "answerKey": "B"}],
    "piqa_validation": [{"goal": "Cool water.", "sol1": "Add ice.", "sol2": "Add fire.", "label": n} for n in (0, 0)],
    "triviaqa_validation": [{"question": "Capital of France?", "answer": {"value": "Paris", "aliases": ["City of Paris"]}}],
    "nq_open_validation": [{"question": "who wrote hamlet", "answer": ["Shakespeare", "William Shakespeare"]}],
}
ARC_ORIGINAL = {
    "id": "1",
    "question": {"stem": "What is cold?", "choices": [{"text": "ice", "label": "1"}, {"text": "fire", "label": "2"}]},
    "answerKey": "1",
}
HUMANEVAL = [
    {
        "task_id": f"Test/{number}",
        "prompt": f'def add_{number}(a: int) -> int:\n    """Add {number}."""\n',
        "canonical_solution": f"    return a + {number}\n",
        "test": f"def check(candidate):\n    assert candidate(1) == {number + 1}\n",
        "entry_point": f"add_{number}",
    }
    for number in (1, 2)
]


def write_sets(folder: Path) -> Path:
    """Write one file per task.

    Most are JSON lines; HumanEval is compressed, PIQA is Parquet, WinoGrande an Arrow stream of `datasets`. ARC's easy
    part has the original format.
    """
    folder.mkdir()
    for name, rows in SETS.items():
        if name not in ("piqa_validation", "winogrande_validation"):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(SETS["piqa_validation"]), folder / "piqa_validation.parquet")
    table = pa.Table.from_pylist(SETS["winogrande_validation"])
    with pa.ipc.new_stream(str(folder / "winogrande_validation.arrow"), table.schema) as stream:
        stream.write_table(table)
    (folder / "arc_easy_test.jsonl").write_text(json.dumps(ARC_ORIGINAL) + "\n", encoding="utf-8")
    with gzip.open(folder / "humaneval.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in HUMANEVAL)
    return folder
