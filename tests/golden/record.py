"""The reference losses of two tiny runs. `python -m tests.golden.record` rewrites them; the commit message says why.

`losses_cpu.json` is the run of `tiny_reverse.yaml`; `golden_losses.json` of the package that of `ledom check-hardware`.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_ledom.hardware_check.check import Setting
from megatron_ledom.hardware_check.golden import RECORDED, REFERENCE, TORCH, Golden
from megatron_ledom.hardware_check.training_runs import TrainingRuns
from tests.support.tiny_runs import Record, TinyData, run_on_ranks, write_tiny_data

FOLDER = Path(__file__).parent
CONFIG, LOSSES = FOLDER / "tiny_reverse.yaml", FOLDER / "losses_cpu.json"


def golden_run(data: TinyData, folder: Path) -> list[Record]:
    """Run the golden config; return loss and gradient norm of every step, and the validation losses."""
    config = folder / CONFIG.name
    config.write_text(CONFIG.read_text())
    blends = [f"data.{name}_blend=[[1.0,{data.shard(f'reverse_{name}')}]]" for name in ("train", "valid")]
    records = run_on_ranks(config, folder / "run", *blends)
    return [reproducible(record) for record in records]


def hardware_check_run(folder: Path) -> Golden:
    """Run the reference of the check `golden`; return loss and gradient norm of every step, and the sha256 of its data."""
    folder.mkdir()
    runs = TrainingRuns(Setting(device="cpu", num_gpus=1, seconds=300, folder=str(folder)))
    records = runs.train({REFERENCE: [TORCH]})[REFERENCE]
    return Golden(runs.data_sha256(), [reproducible(record) for record in records])


def reproducible(record: Record) -> Record:
    """Return the values of a record that do not depend on the machine's speed or folders."""
    validation = [result["lm_loss"] for result in record.get("validation", {}).values()]
    return {
        "iteration": record["iteration"],
        "lm_loss": record["lm_loss"],
        "grad_norm": record["grad_norm"],
        **({"validation": validation} if validation else {}),
    }


def lines(records: Sequence[Record]) -> str:
    """Return records as JSON, one a line."""
    return "[\n" + ",\n".join(f"  {json.dumps(record)}" for record in records) + "\n]"


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # as in the tests
    with tempfile.TemporaryDirectory() as folder:
        tiny = golden_run(write_tiny_data(Path(folder)), Path(folder))
        golden = hardware_check_run(Path(folder, "hardware_check"))
    LOSSES.write_text(f"{lines(tiny)}\n")
    RECORDED.write_text(f'{{"data_sha256": "{golden.data_sha256}", "steps": {lines(golden.steps)}}}\n')
    print(f"wrote {LOSSES} and {RECORDED}")
