"""A finished study written by hand: runs with known losses and candidates with known scores, to check every result."""

import json
from pathlib import Path
from typing import Any

import yaml

from tests.study.handmade_abilities import write_abilities
from tests.study.handmade_contamination import write_contamination
from tests.study.handmade_ranked import write_ranked
from tests.study.handmade_reinforcement import write_reinforcement

SEEDS = (1, 2)
LOSSES = {1: {"forward": 2.0, "reverse": 2.1}, 2: {"forward": 2.0, "reverse": 2.06}}
"""Losses by seed: gaps of 5 and 3 percent."""
DOMAINS = {"text": ("prose", "code"), "maths": ("problems",), "gsm": ("gsm_symbolic",)}
PLACES = {1: [0.1, 0.0], 2: [0.3, 0.0]}
"""By seed: the reverse twin's extra loss in the first and in the last tenth of a document. Forward losses are 2."""


def write_study(folder: Path) -> None:
    """Write all files that the report reads, for the seeds, models and samples of small.yaml."""
    for corpus, domains in DOMAINS.items():
        for model in ("small", "large"):
            for seed, losses in LOSSES.items():
                for direction, loss in losses.items():
                    _write_run(folder / "runs" / f"{corpus}_{model}_{seed}_{direction}", direction, domains, loss)
        for seed, more in PLACES.items():
            tenths = [{"group": 9 * i, "tokens": 50, "forward": 2.0, "reverse": 2 + add} for i, add in enumerate(more)]
            report = folder / "compared" / f"{corpus}_{seed}" / "report.json"
            report.parent.mkdir(parents=True)
            report.write_text(json.dumps({"tenths": tenths}))
    (folder / "gsm").mkdir()
    counts = {"gsm_symbolic": {"train": 360, "held_out": 40, "refused": 7}}
    (folder / "gsm/counts.json").write_text(json.dumps(counts))
    problem = {"question": "Ann has 3 pens. Then Ann buys 2 more. How many pens does Ann have now?", "answer": "3+2=5\n#### 5"}
    (folder / "maths").mkdir()
    (folder / "maths/train.jsonl").write_text(json.dumps(problem) + "\n" + json.dumps({**problem, "answer": "#### 70"}) + "\n")
    _write_backward(folder / "backward", problem)
    write_abilities(folder, seed=1)
    write_reinforcement(folder / "reinforcement")
    write_contamination(folder)
    rewards, ablations = folder / "rewards", folder / "ablations"
    for path in (rewards, ablations):
        path.mkdir(parents=True)
    (rewards / "level.json").write_text(json.dumps({"level": 2, "greedy": {"1": 0.9, "2": 0.5}, "is_inside": True}))
    scorers = ("scorer_of_pairs_all_tokens", "scorer_of_pairs_question_only", "scorer_of_size_small")
    for seed in SEEDS:
        # the reverse term prefers the right answer in the test part, and a wrong one in the development part
        for part, is_helpful in (("development", False), ("test", True)):
            write_ranked(rewards / f"{part}_{seed}.jsonl", is_helpful)
            for scorer in scorers:
                write_ranked(ablations / f"{part}_{seed}_{scorer}.jsonl", is_helpful)
        write_ranked(ablations / f"test_{seed}_wrong_direction.jsonl", is_helpful=None)
        write_ranked(rewards / f"beam_{seed}.jsonl", is_helpful=True)
        spent = {"forward_tokens": 300, "reverse_tokens": 300}
        (rewards / f"beam_{seed}.jsonl.spent.json").write_text(json.dumps(spent))


def _write_backward(folder: Path, known: dict[str, str]) -> None:
    """Write four problems for the result 5: a copy, a wrong chain, another result, and a text that is not a problem."""
    folder.mkdir()
    question = "Ben has 4 cups. Then Ben {} 1{}. How many cups does Ben have now?"
    texts = [f"{known['question']}\n{known['answer']}", question.format("buys", " more") + "\n4+1=6\n#### 5"]
    texts += [question.format("loses", "") + "\n4-1=3\n#### 5", "#### 5"]
    for seed in SEEDS:
        lines = [json.dumps({"result": 5, "text": text}) + "\n" for text in texts]
        (folder / f"written_{seed}.jsonl").write_text("".join(lines))


def _write_run(folder: Path, direction: str, domains: tuple[str, ...], loss: float) -> None:
    folder.mkdir(parents=True)
    model = {"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2}
    train = {"train_iters": 20, "global_batch_size": 4}
    config = {"run_dir": "study", "model": model, "train": train, "data": {"direction": direction}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    records: list[dict[str, Any]] = []
    for step in (10, 20):
        record = {"iteration": step, "lm_loss": 6 - step / 10, "consumed_train_tokens": 1024 * step}
        records.append({**record, "tokens_per_second": 5000.0, "mfu": 0.5})
    records[-1]["validation"] = {domain: {"lm_loss": loss, "bits_per_byte": 1.0} for domain in domains}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
