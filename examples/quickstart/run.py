"""Run the whole pipeline on text of this machine, from the corpus to texts of two trained models, and Reverse Reward on word problems.

It writes only below quickstart/ in the current folder. Each step is a command line of the project, printed before it runs.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import QuickstartError, ledom, run, run_all, tool

from megatron_ledom.errors import run_command
from megatron_ledom.platform.quiet import quiet_libraries

sys.path.append(str(Path(__file__).resolve().parents[1] / "study"))
"""The quickstart uses the word problems of the study."""
OUTPUT = Path("quickstart")
RESULTS = OUTPUT / "phases"
ENDINGS = {
    "code": "        return total / len(values)",
    "prose": "and it is not safe to call this function from more than one thread.",
    "licence": "OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.",
}
PROMPT = 'def read_lines(path):\n    """'
NUM_CANDIDATES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The amount of work: `full` is the quickstart; `small` takes every step in about a minute, for the tests."""

    most_megabytes: float
    least_megabytes: float
    held_out_percent: float
    vocab_size: int
    max_new_tokens: int
    overrides: tuple[str, ...]
    num_problems: int
    """Word problems of each level for training."""
    num_questions: int
    """Word problems that the forward twin answers."""
    num_answers: int
    """Sampled answers to each question."""
    problem_overrides: tuple[str, ...]


SIZES = {
    "full": Size(
        most_megabytes=20,
        least_megabytes=10,
        held_out_percent=1.5,
        vocab_size=8000,
        max_new_tokens=96,
        overrides=(),
        num_problems=8000,
        num_questions=200,
        num_answers=16,
        problem_overrides=(),
    ),
    "small": Size(
        most_megabytes=2,
        least_megabytes=1,
        held_out_percent=6,
        vocab_size=1000,
        max_new_tokens=16,
        overrides=(
            "model.num_layers=2",
            "model.hidden_size=64",
            "model.ffn_hidden_size=128",
            "model.num_attention_heads=4",
            "model.num_query_groups=2",
            "data.seq_length=64",
            "train.train_iters=120",
            "train.eval_interval=60",
            "train.eval_iters=4",
            "logging.log_interval=5",
            "logging.tensorboard=false",
        ),
        num_problems=1000,
        num_questions=10,
        num_answers=4,
        problem_overrides=("model.num_layers=2", "model.hidden_size=64", "train.train_iters=60", "checkpoint.save_interval=60"),
    ),
}
Result = dict[str, Any]


def collect(size: Size) -> Result:
    """Collect the text of this Python's library and packages."""
    limits = ["--most-megabytes", size.most_megabytes, "--least-megabytes", size.least_megabytes]
    limits += ["--held-out-percent", size.held_out_percent]
    run(tool("examples/quickstart/collect.py", "--output", OUTPUT / "corpus", *limits))
    return {}


def train_tokenizer(size: Size) -> Result:
    """Train a SentencePiece BPE tokenizer on the training files."""
    names = ["--input", OUTPUT / "corpus/train.jsonl", "--output", OUTPUT / "tokenizer"]
    run(ledom("train-tokenizer", *names, "--vocab-size", size.vocab_size, "--max-sentences", 200_000))
    return {}


def preprocess(size: Size) -> Result:
    """Write the shards of both directions and both splits, and verify one of them."""
    for direction in ("reverse", "forward"):
        for split in ("train", "valid"):
            names = ["--input", OUTPUT / "corpus" / f"{split}.jsonl", "--tokenizer", OUTPUT / "tokenizer"]
            names += ["--output-prefix", OUTPUT / "shards" / direction / split, "--direction", direction]
            run(ledom("preprocess-data", *names, "--workers", 2))
    run(ledom("inspect-shard", OUTPUT / "shards/reverse/train", "--verify"))
    return {}


def train(size: Size) -> Result:
    """Train both twins at the same time; stop and resume the reverse run."""
    from twins import choose_overrides, train_twins

    machine = choose_overrides()
    resume = train_twins([*machine, *size.overrides])
    return {"overrides": machine, "stopped_at": resume.stopped_at, "resumed_at": resume.resumed_at}


def export(size: Size) -> Result:
    """Export both models to Hugging Face folders; each has to pass the parity check."""
    from twins import export_twins

    export_twins(OUTPUT)
    return {}


def generate(size: Size) -> Result:
    """Write the text before three endings with the reverse model."""
    folder = OUTPUT / "generated"
    folder.mkdir(parents=True)
    options = ["--max-new-tokens", size.max_new_tokens, "--temperature", 0.7, "--top-p", 0.9, "--seed", 1]
    commands = [
        ledom("generate", "--model", OUTPUT / "models/reverse", "--following", text, *options) for text in ENDINGS.values()
    ]
    run_all(commands, [folder / f"{kind}.txt" for kind in ENDINGS])
    endings = []
    for kind, following in ENDINGS.items():
        path = folder / f"{kind}.txt"
        text = path.read_text(encoding="utf-8").removesuffix("\n")
        if not text.endswith(following) or text == following:
            raise QuickstartError(f"{path} does not end with the given text, or contains nothing else")
        endings.append({"kind": kind, "following": following, "text": text})
    return {"endings": endings}


def rerank(size: Size) -> Result:
    """Sample continuations of a prompt from the forward twin and rank them by Reverse Reward."""
    folder = OUTPUT / "reranked"
    folder.mkdir(parents=True)
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": PROMPT}) + "\n", encoding="utf-8")
    names = ["--forward", OUTPUT / "models/forward", "--reverse", OUTPUT / "models/reverse"]
    names += ["--input", folder / "prompts.jsonl", "--output", folder / "answers.jsonl"]
    options = ["--temperature", 0.8, "--top-p", 0.95, "--max-new-tokens", size.max_new_tokens // 2]
    run(ledom("rerank", *names, "--sample", NUM_CANDIDATES, *options))
    return {}


def problems(size: Size) -> Result:
    """Train twins of their own on word problems."""
    from arithmetic import train_on_problems, write_problems
    from twins import choose_threads

    write_problems(size.num_problems, size.num_questions)
    train_on_problems([choose_threads(), *size.problem_overrides])
    return {}


def choose(size: Size) -> Result:
    """Choose one of the forward twin's answers to each problem, by Reverse Reward and by other methods."""
    from arithmetic import choose_answers

    return {"report": choose_answers(size.num_answers)}


PHASES: list[tuple[str, Callable[[Size], Result], list[str]]] = [
    ("collect", collect, ["corpus"]),
    ("tokenizer", train_tokenizer, ["tokenizer"]),
    ("preprocess", preprocess, ["shards"]),
    ("train", train, ["runs", "logs"]),
    ("export", export, ["models"]),
    ("generate", generate, ["generated"]),
    ("rerank", rerank, ["reranked"]),
    ("problems", problems, ["problems"]),
    ("choose", choose, ["problems/models", "problems/answers"]),
]
"""Name of each phase, its function, and the folders below quickstart/ that it writes."""


def run_phases(size: Size, keep: bool) -> dict[str, Result]:
    """Run the phases in order; return the result of each with its seconds. With `keep`, skip the phases that are finished."""
    results: dict[str, Result] = {}
    for number, (name, function, folders) in enumerate(PHASES, 1):
        done = RESULTS / f"{name}.json"
        if keep and done.exists():
            results[name] = json.loads(done.read_text(encoding="utf-8"))
            print(f"--- {number}/{len(PHASES)} {name}: finished before", flush=True)
            continue
        keep = False  # the phases after a repeated one are repeated, too
        print(f"--- {number}/{len(PHASES)} {name}", flush=True)
        done.unlink(missing_ok=True)
        for folder in folders:
            shutil.rmtree(OUTPUT / folder, ignore_errors=True)
        started = time.perf_counter()
        results[name] = {**function(size), "seconds": time.perf_counter() - started}
        RESULTS.mkdir(parents=True, exist_ok=True)
        done.write_text(json.dumps(results[name]), encoding="utf-8")
    return results


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="full", help="small: every step on little text, for tests")
    parser.add_argument("--keep", action="store_true", help="continue after the last finished phase instead of starting over")
    parser.add_argument(
        "--update-readme", action="store_true", help="only write the last run's results into README.md and docs/get_started.md"
    )
    return parser.parse_args()


def main() -> None:
    """Run everything, or only write the last results into the documentation."""
    arguments = parse()
    quiet_libraries()
    from report import build_report, update_pages, write_report

    if arguments.update_readme:
        update_pages()
        return
    results = run_phases(SIZES[arguments.size], arguments.keep)
    from megatron_ledom.reports.curves import draw
    from megatron_ledom.reports.run_data import load_runs

    report = build_report(results)
    models = report["models"]
    title = f"Reverse and forward twins, {models['reverse']['parameters'] / 1e6:.1f} M parameters each"
    runs = load_runs([str(OUTPUT / "runs" / direction) for direction in models])
    (OUTPUT / "loss_curves.png").write_bytes(draw("loss", runs, title=title))
    print(f"\n{write_report(report)}")


if __name__ == "__main__":
    run_command(main)
