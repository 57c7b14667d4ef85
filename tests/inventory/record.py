"""Record the results of every command line on small inputs: `python -m tests.inventory.record` writes `reference.json`.

The reference checks changes that must not alter any result. `commands.py` has its commands, `inputs.py` makes its inputs. It
uses command lines only and imports no module of the project, so all modules can move. `--checkout` and `--python` (for the
test: LEDOM_INVENTORY_CHECKOUT and LEDOM_INVENTORY_PYTHON) run the commands of another checkout or with another interpreter.

`pytest tests/inventory` runs all commands again, in 80 s on two free cores; `-k NAME` runs the steps of that name and their
needs.

Compared are the sha256 of shards, indexes and tokenizers; of JSON, text and pages the values, and the sha256 of the text
without times, folders and speeds (see `artifacts.py`); the sha256 of the bytes of tensors; the exit code of every command; the
numbers of a dry run; only the keys of the calibration, which measures time; and only the existence of pictures.

The last bits of torch's results depend on the kind of machine. The reference names its `machine`: the processor's vendor and
vector instructions, and the versions of torch and numpy. On the same kind everything must be equal. On another one, floats of
steps that compute with torch may differ by 1e-4 of their size, hashes of such artifacts do not count, and tensors are compared
by their norms. Some results contain versions of libraries: use the pinned ones. A sampled text can still differ on another
machine: first record the reference there from a trusted checkout.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.inventory.artifacts import read_artifact, text_record
from tests.inventory.commands import STEPS, Step
from tests.inventory.run import Done, Place, run_all, with_needs

ROOT = Path(__file__).parents[2]
REFERENCE = Path(__file__).with_name("reference.json")
VECTOR_FLAGS = {
    "avx",
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_bf16",
    "avx512_vnni",
    "amx_bf16",
    "amx_tile",
    "sve",
}
STDERR_CHARACTERS = 3000

Record = dict[str, Any]


def machine() -> Record:
    """Return everything on which the last bits of torch's results depend."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = sorted(VECTOR_FLAGS & set(fields.get("flags", "").split()))
    versions = {"torch": torch.__version__, "numpy": np.__version__}
    return {"architecture": platform.machine(), "vendor": fields.get("vendor_id", ""), "flags": flags, **versions}


def record_all(
    checkout: Path, python: Path, names: Collection[str], hash_seed: str | None = None
) -> tuple[Record, dict[str, float]]:
    """Run the named steps and their needs in a temporary folder; return the record, and the seconds of each step."""
    chosen = with_needs(names)
    with tempfile.TemporaryDirectory() as name:
        place = Place(Path(name).resolve(), checkout.resolve(), python)
        steps: Record = {}
        seconds: dict[str, float] = {}

        def keep(step: Step, done: Done) -> None:
            steps[step.name] = step_record(step, done, place)
            seconds[step.name] = done.seconds

        run_all(place, chosen, keep, hash_seed)
    return {"machine": machine(), "steps": {step.name: steps[step.name] for step in chosen}}, seconds


def step_record(step: Step, done: Done, place: Place) -> Record:
    """Return exit code and artifacts of a step that has just ended: a later step may change the same folder."""
    places = [(str(place.python), "PYTHON"), (str(place.folder), "FOLDER"), (str(place.checkout), "CHECKOUT")]
    matches = {path for pattern in step.outputs for path in place.folder.glob(pattern)}
    found = sorted(path for path in matches if path.is_file() or (path / ".metadata").exists())
    artifacts = {str(path.relative_to(place.folder)): artifact(path, step, places) for path in found}
    if step.stdout:
        artifacts["stdout"] = text_record(done.stdout, step.stdout, places)
    errors = {"stderr": done.stderr[-STDERR_CHARACTERS:]} if done.code else {}
    return {"command": step.command, "code": done.code, "artifacts": artifacts, **errors}


def artifact(path: Path, step: Step, places: list[tuple[str, str]]) -> Record:
    """Return the record of one file or checkpoint; an unreadable one is recorded as unreadable."""
    try:
        if step.is_measured:
            return text_record(path.read_text("utf-8"), "structure", places)
        return read_artifact(path, places)
    except (
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
    ) as error:  # a broken artifact is a result, not an error of the inventory
        return {"kind": "unreadable", "error": type(error).__name__}


def to_json(made: Record) -> str:
    """Return the record as JSON with one line per artifact, so that a diff shows the changed ones."""
    steps = []
    for name, step in made["steps"].items():
        fields = {key: value for key, value in step.items() if key != "artifacts"}
        lines = [f"{json.dumps(file)}: {json.dumps(value, ensure_ascii=False)}" for file, value in step["artifacts"].items()]
        artifacts = "{\n   " + ",\n   ".join(lines) + "}" if lines else "{}"
        steps.append(f'{json.dumps(name)}: {json.dumps(fields, ensure_ascii=False)[:-1]}, "artifacts": {artifacts}}}')
    return f'{{"machine": {json.dumps(made["machine"])},\n"steps": {{\n ' + ",\n ".join(steps) + "}}\n"


def main() -> None:
    """Write the whole reference, or replace the named steps in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, default=ROOT, help="checkout whose commands to run (default: this one)")
    parser.add_argument(
        "--python", type=Path, default=Path(sys.executable), help="interpreter to run them with (default: this one)"
    )
    parser.add_argument("--output", type=Path, default=REFERENCE, help="file to write (default: the reference)")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="replace these steps of the file, and keep the others")
    arguments = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    names = arguments.only or [step.name for step in STEPS]
    made, seconds = record_all(arguments.checkout, arguments.python, names, os.environ.get("PYTHONHASHSEED"))
    failed = [f"{name}: exit code {step['code']}\n{step['stderr']}" for name, step in made["steps"].items() if step["code"]]
    if failed:
        sys.exit("nothing is written, because commands failed:\n" + "\n".join(failed))
    if arguments.only:
        kept = json.loads(arguments.output.read_text("utf-8"))
        kept["steps"] |= {name: made["steps"][name] for name in arguments.only}
        made = kept
    arguments.output.write_text(to_json(made), "utf-8")
    slowest = sorted(seconds, key=seconds.__getitem__, reverse=True)[:10]
    print(f"wrote {arguments.output}; slowest: {', '.join(f'{name} {seconds[name]:.1f} s' for name in slowest)}")


if __name__ == "__main__":
    main()
