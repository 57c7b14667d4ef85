"""Part 3, working backward: reverse models get only a result and write problems with that result; a solver judges them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from commands import tool
from lines import read_lines
from losses import interval_over_seeds
from problems import check_chain, solve
from rewards import Rewards
from sections import Section, interval, percent
from steps import Step


class Backward:
    """The written problems: their files, the steps that write them, and their evaluation."""

    def __init__(self, rewards: Rewards) -> None:
        self.rewards, self.settings, self.folder = rewards, rewards.settings, rewards.twins.folder / "backward"

    def written(self, seed: int) -> Path:
        """Return the file of the problems that the reverse twin of a seed writes."""
        return self.folder / f"written_{seed}.jsonl"

    def stages(self) -> Iterator[list[Step]]:
        """Yield the steps. The twins of the synthetic problems are already trained."""
        self.folder.mkdir(parents=True, exist_ok=True)
        yield [self._write(seed) for seed in self.settings.seeds]

    def _write(self, seed: int) -> Step:
        model, output = self.rewards.model_of(seed, "reverse"), self.written(seed)
        low, high, num = self.settings.backward
        names = ["--model", model, "--output", output, "--results", *range(low, high + 1), "--num-samples", num]
        command = tool("examples/study/write_backward.py", *names, "--temperature", self.settings.temperature, "--seed", seed)
        return Step(name=f"backward_{seed}", inputs=[model], outputs=[output], commands=[command])

    def results(self) -> dict[str, Any]:
        """Return the fractions of the written problems by seed, and the chance of a random training problem."""
        train = list(read_lines(self.rewards.twins.folder / "maths/train.jsonl"))
        known = {record["question"] for record in train}
        by_seed = [_shares(list(read_lines(self.written(seed))), known) for seed in self.settings.seeds]
        low, high, num = self.settings.backward
        ends = [int(record["answer"].rpartition("#### ")[2]) for record in train]
        chance = sum(low <= end <= high for end in ends) / len(ends) / (high - low + 1)
        shares = {name: [one[name] for one in by_seed] for name in by_seed[0]}
        return {"by_seed": shares, "chance": chance, "results": [low, high], "num_samples": num}


def _shares(records: list[dict[str, Any]], known: set[str]) -> dict[str, float]:
    counts = dict.fromkeys(("true chain", "solved to the result", "solved by its own chain", "copy of a trained question"), 0)
    for record in records:
        question, _, chain = record["text"].partition("\n")
        solution = solve(question)
        counts["true chain"] += check_chain(chain)
        counts["solved to the result"] += solution is not None and solution.endswith(f"#### {record['result']}")
        counts["solved by its own chain"] += solution == chain
        counts["copy of a trained question"] += question in known
    return {name: count / len(records) for name, count in counts.items()}


def section(found: dict[str, Any]) -> Section:
    """Return the section of the report."""
    low, high = found["results"]
    about = (
        f"Working backward: the reverse twins of the synthetic word problems get `#### N` for N from {low} to {high}, and write"
        f" {found['num_samples']} problems for each: the solution from its last line to its first, then the question. A solver solves the"
        f" question. A random question of the training part has the given result in {percent(found['chance'])} % of the cases. A forward"
        " model cannot do this, because no text begins with a result."
    )
    rows = [["of the problems written", "%", "95 % interval", "each seed"]]
    for name, values in found["by_seed"].items():
        span = interval(interval_over_seeds(values, 0.0, 1.0), 100, ".1f")
        rows.append([name, percent(sum(values) / len(values)), span, " ".join(map(percent, values))])
    return Section(title="Working backward", paragraphs=[about], tables=[rows])
