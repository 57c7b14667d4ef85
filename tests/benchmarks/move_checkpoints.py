"""Checkpoints of one megatron-core (and Python) read by another: every ordered pair, two optimizers, same and changed layout.

Each installation trains six iterations without a stop, and three that end with a checkpoint. Every other one resumes from that
checkpoint and makes the last three, whose losses and gradient norms are compared with those of its own six. Run by hand:

    make moves CORES="3.11:0.16.1=.venv/bin/python 3.12:0.19.2=VENV/bin/python 3.12:0.18.2=VENV/bin/python,FOLDER"

NAME=PYTHON[,FOLDER]: FOLDER holds an unpacked megatron-core that comes before the one of PYTHON. Prints a table in Markdown; exit
code 1 if a move fails.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
DISTRIBUTED = [
    "parallel.use_distributed_optimizer=true",
    "parallel.overlap_grad_reduce=true",
    "parallel.overlap_param_gather=true",
]
OPTIMIZERS: dict[str, list[str]] = {"ordinary": [], "distributed": DISTRIBUTED}
DTYPE = "model.params_dtype="
LAYOUTS = {  # overrides before and after the move, and the largest relative difference
    "same layout, bf16": ([f"{DTYPE}bf16"], [f"{DTYPE}bf16"], 0.0),
    "TP 2 to PP 2, fp32": (["parallel.tensor_model_parallel_size=2"], ["parallel.pipeline_model_parallel_size=2"], 1e-5),
}
COMMAND = ["train.train_iters=6", "model.num_layers=2", "optimizer.lr_warmup_iters=1"]
STOP = "train.exit_interval=3"


@dataclass(frozen=True, slots=True)
class Core:
    """A Python and a megatron-core: a name for the table, the interpreter, and a folder for the start of its path."""

    name: str
    python: str
    folder: str

    def run(self, *arguments: str) -> None:
        """Run this script on it. Raises CalledProcessError."""
        path = os.pathsep.join(filter(None, (self.folder, str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        subprocess.run([self.python, __file__, *arguments], env=environment, cwd=ROOT, check=True)


def _core(text: str) -> Core:
    name, found, place = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PYTHON[,FOLDER]")
    python, _, folder = place.partition(",")
    return Core(name, os.path.abspath(python), os.path.abspath(folder) if folder else "")


def _run_of(work: Path, *names: str) -> Path:
    return work / " ".join(names).replace(" ", "_").replace(",", "").replace(":", "-")


def train(work: Path, own: str) -> None:
    """Train the references and the first parts of one installation."""
    from tests.support.tiny_runs import TinyData, run_on_ranks

    config = TinyData(work).config
    for optimizer, settings in OPTIMIZERS.items():
        for layout, (before, after, _) in LAYOUTS.items():
            kinds = {"whole": after, "first": [*before, STOP]}
            for kind, overrides in kinds.items():
                run_on_ranks(config, _run_of(work, kind, own, optimizer, layout), *COMMAND, *settings, *overrides, num_ranks=2)


def resume(work: Path, own: str, writers: list[str]) -> None:
    """Resume the first parts of other installations, and write the largest difference or the error of each to a file."""
    from tests.support.tiny_runs import TinyData, curve, read_metrics, start_ranks

    config, found = TinyData(work).config, {}
    for writer in writers:
        for optimizer, settings in OPTIMIZERS.items():
            for layout, (_, after, _) in LAYOUTS.items():
                run_dir = _run_of(work, writer, "to", own, optimizer, layout)
                shutil.copytree(_run_of(work, "first", writer, optimizer, layout), run_dir)
                ranks = start_ranks(config, run_dir, *COMMAND, *settings, *after, num_ranks=2)
                codes = ranks.wait()
                if codes != [0, 0]:
                    found[f"{writer} {optimizer} {layout}"] = f"exit codes {codes}: {ranks.output()[-2000:]}"
                    continue
                pairs = zip(
                    curve(read_metrics(run_dir))[3:],
                    curve(read_metrics(_run_of(work, "whole", own, optimizer, layout)))[3:],
                    strict=True,
                )
                differences = [abs(a / b - 1) for one, other in pairs for a, b in zip(one, other, strict=True)]
                assert len(differences) == 6
                found[f"{writer} {optimizer} {layout}"] = max(differences)
    (work / f"{own.replace(':', '-')}.json").write_text(json.dumps(found), encoding="utf-8")


def table(cores: list[Core], work: Path) -> tuple[str, list[str]]:
    """Return the largest differences as a table in Markdown, and a sentence for each move that failed."""
    columns = [(optimizer, layout) for optimizer in OPTIMIZERS for layout in LAYOUTS]
    rows = ["| written by | read by | " + " | ".join(f"{optimizer}, {layout}" for optimizer, layout in columns) + " |"]
    rows.append("|---" * (len(columns) + 2) + "|")
    failures = []
    for writer in cores:
        for reader in cores:
            if writer == reader:
                continue
            found = json.loads((work / f"{reader.name.replace(':', '-')}.json").read_text(encoding="utf-8"))
            cells = []
            for optimizer, layout in columns:
                answer = found[f"{writer.name} {optimizer} {layout}"]
                works = isinstance(answer, float) and answer <= LAYOUTS[layout][2]
                if not works:
                    failures.append(f"{writer.name} to {reader.name}, {optimizer}, {layout}: {answer}")
                cells.append(("equal" if answer == 0 else f"{answer:.0e}") if works else "FAILED")
            rows.append("| " + " | ".join([writer.name, reader.name, *cells]) + " |")
    return "\n".join(rows), failures


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cores", nargs="*", type=_core, metavar="NAME=PYTHON[,FOLDER]")
    parser.add_argument("--work", type=Path, help="keep the runs in this new folder")
    parser.add_argument("--train", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--resume", nargs="+", metavar="NAME", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments.work, arguments.train)
        return 0
    if arguments.resume:
        resume(arguments.work, arguments.resume[0], arguments.resume[1:])
        return 0
    if len(arguments.cores) < 2:
        parser.error("give at least two installations")
    from tests.support.tiny_runs import write_tiny_data

    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        write_tiny_data(work)
        for core in arguments.cores:
            core.run("--work", str(work), "--train", core.name)
        for core in arguments.cores:
            others = [other.name for other in arguments.cores if other != core]
            core.run("--work", str(work), "--resume", core.name, *others)
        text, failures = table(arguments.cores, work)
    print(text)
    print(*failures, sep="\n", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
