"""Small local tasks with every type of request, as task files of lm-evaluation-harness."""

import json
from pathlib import Path
from typing import Any

QUESTIONS = [
    {"question": "What is the capital of France?", "choices": ["Paris", "the mat", "Berlin is"], "gold": 0},
    {"question": "Where was the cat?", "choices": ["on the mat", "there", "in a café of 漢字"], "gold": 2},
    {"question": "What ran after the dog?", "choices": ["the cat", "a naïve person", "7"], "gold": 1},
    {"question": "area(3, 14)?", "choices": ["42", "width * height", "the end of the capital"], "gold": 0},
]
GAPS = [
    {
        "first": "The cup fits the box, for the cup",
        "second": "The cup fits the box, for the box",
        "rest": "is small.",
        "gold": 0,
    },
    {
        "first": "The cat ran after the dog, so the cat",
        "second": "The cat ran after the dog, so the dog",
        "rest": "was fast.",
        "gold": 1,
    },
]
TEXTS = [
    {"text": "The cat sat on the mat, and the dog ran after the cat."},
    {"text": "漢字 and naïve people, of course."},
    {"text": "x"},
]
ACCURACY = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
QUESTION = "Question: {{question}}\nAnswer:"
TASKS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "tiny_choices": (
        QUESTIONS,
        {
            "output_type": "multiple_choice",
            "doc_to_text": QUESTION,
            "doc_to_target": "{{gold}}",
            "doc_to_choice": "{{choices}}",
            "fewshot_split": "test",
            "fewshot_config": {"sampler": "first_n"},
            "metric_list": [*ACCURACY, {"metric": "acc_mutual_info", "aggregation": "mean", "higher_is_better": True}],
        },
    ),
    "tiny_gaps": (
        GAPS,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{gold}}",
            "doc_to_target": "{{rest}}",
            "doc_to_choice": "{{[first, second]}}",
            "metric_list": ACCURACY[:1],
        },
    ),
    "tiny_last_word": (
        TEXTS[:2],
        {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' ' + text.split(' ')[-1]}}",
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            ],
        },
    ),
    "tiny_texts": (
        TEXTS,
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        },
    ),
    "tiny_answers": (
        QUESTIONS,
        {
            "output_type": "generate_until",
            "doc_to_text": QUESTION,
            "doc_to_target": "{{choices[gold]}}",
            "fewshot_split": "test",
            "fewshot_config": {"sampler": "first_n"},
            "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
    ),
}


def write_tasks(folder: Path) -> Path:
    """Write a task file and a file of items for each task. The folder is the harness's `include_path`."""
    folder.mkdir()
    for name, (rows, task) in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        dataset = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
        content = {"task": name, "dataset_path": "json", "dataset_kwargs": dataset, "test_split": "test", **task}
        (folder / f"{name}.yaml").write_text(json.dumps(content))  # JSON is YAML
    return folder
