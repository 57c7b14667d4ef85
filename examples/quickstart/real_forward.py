"""Rank the answers of a real forward model to word problems with a reverse model that is trained here, and write the report.

It shows that the pieces work together, not how well: a forward model of 135 M parameters solves few of the problems, and the
reverse model is as small as that of the quickstart. The same command resumes: finished phases and ranked parts are kept.
"""

import argparse
import json
from pathlib import Path

from commands import ROOT, ledom, run

from megatron_ledom.errors import UsageError, run_command
from megatron_ledom.storage.files import write_file

PROMPT = "Question: {question}\nAnswer:"
"""The prompt of both models; the answer follows after a space."""
TRAINING = (
    "data.seq_length=512",
    "train.train_iters=300",
    "train.eval_interval=300",
    "train.eval_iters=8",
    "model.params_dtype=fp32",
)
"""As many tokens as in the quickstart. A question and its answer together must fit into `data.seq_length`."""
HELD_OUT = 500
"""Pairs for the validation of the reverse model, at most a tenth of all."""


def read_lines(path: Path) -> list[dict[str, str]]:
    """Return the objects of a JSON Lines file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_lines(path: Path, records: list[dict[str, str]]) -> None:
    """Write one object per line; the file appears only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "".join(json.dumps(record) + "\n" for record in records))


def train_reverse(arguments: argparse.Namespace) -> Path:
    """Train a reverse model on the questions with their answers, as the quickstart does; return the folder of its export."""
    output = arguments.output
    model: Path = output / "model"
    if (model / "config.json").exists():
        return model
    texts = [{"text": PROMPT.format(question=pair["question"]) + " " + pair["answer"]} for pair in read_lines(arguments.pairs)]
    held_out = min(HELD_OUT, len(texts) // 10)
    for split, part in (("valid", texts[:held_out]), ("train", texts[held_out:])):
        write_lines(output / f"{split}.jsonl", part)
    if not (output / "tokenizer").exists():
        names = ["--input", output / "train.jsonl", "--output", output / "tokenizer"]
        run(ledom("train-tokenizer", *names, "--vocab-size", arguments.vocab_size))
    for split in ("train", "valid"):
        names = ["--input", output / f"{split}.jsonl", "--tokenizer", output / "tokenizer", "--direction", "reverse"]
        run(ledom("preprocess-data", *names, "--output-prefix", output / split, "--workers", 1, "--overwrite"))
    paths = [f"run_dir={output / 'run'}", f"data.tokenizer={output / 'tokenizer'}", "data.allow_repeats=true"]
    paths += [f"data.{split}_blend=[[1.0,{output / split}]]" for split in ("train", "valid")]
    config = ROOT / "examples/configs/quickstart_reverse.yaml"
    run(ledom("train", "--config", config, *paths, *TRAINING, *arguments.overrides))
    run(ledom("convert-checkpoint", "mcore-to-hf", "--load", output / "run", "--save", model))
    return model


def rank_answers(arguments: argparse.Namespace, reverse: Path) -> None:
    """Sample and rank answers to the first items of the evaluation file, and write the report."""
    output = arguments.output
    items = read_lines(arguments.items)[: arguments.num_items]
    questions = [{"prompt": PROMPT.format(question=item["question"]), "gold": item["answer"]} for item in items]
    asked, ranked = output / "questions.jsonl", output / "answers.jsonl"
    if not ranked.exists():  # a killed ranking keeps its finished parts
        write_lines(asked, questions)
        names = ["--forward", arguments.forward, "--reverse", reverse, "--input", asked, "--output", ranked]
        sampling = ["--sample", arguments.num_samples, "--greedy", "--temperature", 0.7, "--top-p", 0.95, "--seed", 1]
        length = ["--max-new-tokens", arguments.max_new_tokens, "--batch-size", arguments.num_samples]
        run(ledom("rerank", *names, *sampling, *length))
    run(ledom("report-rerank", ranked, "--output", output / "report", "--gold-key", "gold"))


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forward", required=True, metavar="DIR", help="Hugging Face folder of the forward model")
    parser.add_argument("--pairs", required=True, type=Path, metavar="FILE", help="JSON lines: question, answer; for training")
    parser.add_argument(
        "--items", required=True, type=Path, metavar="FILE", help="JSON lines: question, answer; for the evaluation"
    )
    parser.add_argument("--output", default=Path("real_forward"), type=Path, metavar="DIR", help="(default %(default)s)")
    parser.add_argument("--num-items", type=int, default=50, metavar="N", help="(default %(default)s)")
    parser.add_argument("--num-samples", type=int, default=8, metavar="N", help="answers to each (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=160, metavar="N", help="of an answer (default %(default)s)")
    text = "pieces of the reverse model's tokenizer (default %(default)s)"
    parser.add_argument("--vocab-size", type=int, default=4000, metavar="N", help=text)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the training")
    return parser.parse_args()


def main() -> None:
    """Train, rank, report."""
    arguments = parse()
    for path in (arguments.pairs, arguments.items):
        if not path.is_file():
            raise UsageError(f"{path} is not a file; give JSON Lines with the keys question and answer")
    rank_answers(arguments, train_reverse(arguments))


if __name__ == "__main__":
    run_command(main)
