"""Command lines of every tool that writes one file or shard, and small inputs for all tools."""

import json
from collections.abc import Callable
from pathlib import Path

from megatron_ledom.config.load import load_config, save_config
from tests.support.evaluation_sets import write_sets
from tests.support.legible import legible_ids, legible_shard
from tests.support.paths import ROOT
from tests.support.tiny_models import random_model_folder

SHARD = [legible_ids(document, 4) for document in range(5)]

Arguments = Callable[[Path, dict[str, str]], list[str]]


FILES: dict[str, tuple[str, Arguments]] = {
    "merge_shards": ("out", lambda at, made: ["--input", made["shard"], "--output-prefix", f"{at}/out"]),
    "reverse_shards": ("out", lambda at, made: ["--input", made["shard"], "--output-prefix", f"{at}/out"]),
    "prepare_pairs": (
        "out",
        lambda at, made: [
            *("--input", made["pairs"], "--output-prefix", f"{at}/out", "--tokenizer", made["reverse"], "--seq-length", "64"),
            *("--prompt-template", "{question}", "--answer-template", "{answer}"),
        ],
    ),
    "rerank": (
        "out.jsonl",
        lambda at, made: [
            *("--forward", made["forward"], "--reverse", made["reverse"], "--input", made["candidates"]),
            *("--output", f"{at}/out.jsonl"),
        ],
    ),
    "infill": (
        "out.jsonl",
        lambda at, made: [
            *("--forward", made["forward"], "--reverse", made["reverse"], "--input", made["gaps"]),
            *("--output", f"{at}/out.jsonl", "--max-new-tokens", "4"),
        ],
    ),
    "export_preferences": ("out", lambda at, made: [made["ranked"], "--output", f"{at}/out"]),
    "train_tokenizer": ("out", lambda at, made: ["--input", made["text"], "--vocab-size", "300", "--output", f"{at}/out"]),
    "summarize_tasks": ("out", lambda at, made: [made["shard"], "--num-tasks", "1", "--json", f"{at}/out"]),
    "inspect_shard": ("out.png", lambda at, made: [made["shard"], "--histogram", f"{at}/out.png"]),
}
"""Tool -> (the output that it locks, its command line). `made`: the paths that `write_inputs` returns."""


def write_inputs(root: Path) -> dict[str, str]:
    """Write small inputs for every command; return their paths by name."""
    lines = {
        "pairs": [{"question": f"What is {n}?", "answer": f" It is {n}."} for n in range(40)],
        "candidates": [{"prompt": f"The capital of {n}", "candidates": [" Paris", " 42"]} for n in range(4)],
        "gaps": [{"prompt": f"The capital of {n}", "suffix": " is Paris."} for n in range(4)],
        "text": [{"text": f"The cat sat on {n} mats, and the dog ran after the cat number {n}."} for n in range(200)],
        "ranked": [
            {
                "prompt": "p",
                "candidates": ["1", "2"],
                "gold": "1",
                "ranking": [0, 1],
                "best": "1",
                "scores": [
                    {
                        "forward_logprob": -1.0,
                        "reverse_logprob": -1.0,
                        "forward_tokens": 1,
                        "reverse_tokens": 1,
                        "reward": -1.0,
                    },
                    {
                        "forward_logprob": -2.0,
                        "reverse_logprob": -2.0,
                        "forward_tokens": 1,
                        "reverse_tokens": 1,
                        "reward": -2.0,
                    },
                ],
            }
        ]
        * 6,
    }
    found = {}
    for name, rows in lines.items():
        path = root / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        found[name] = str(path)
    for direction in ("forward", "reverse"):
        found[direction] = str(random_model_folder(root / direction, "byte_level", direction))
    run = root / "run"
    run.mkdir()
    config = load_config(str(ROOT / "examples/configs/quickstart_reverse.yaml"), [f"run_dir={run}"])
    save_config(config, str(run / "config.yaml"))
    record = {
        "iteration": 1,
        "lm_loss": 2.0,
        "grad_norm": 1.0,
        "lr": 0.1,
        "tokens_per_second": 9.0,
        "consumed_train_tokens": 64,
    }
    (run / "metrics.jsonl").write_text(json.dumps({**record, "mfu": 0.1, "elapsed_seconds": 1.0}) + "\n", encoding="utf-8")
    return {
        **found,
        "run": str(run),
        "shard": legible_shard(root / "x-00000-of-00001", SHARD),
        "sets": str(write_sets(root / "sets")),
    }
