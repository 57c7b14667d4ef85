"""The reference losses of one tiny run. `python -m tests.golden.record` rewrites them; the commit message says why."""

import json
import os
import tempfile
from pathlib import Path

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


def reproducible(record: Record) -> Record:
    """Return the values of a record that do not depend on the machine's speed or folders."""
    validation = [result["lm_loss"] for result in record.get("validation", {}).values()]
    return {
        "iteration": record["iteration"],
        "lm_loss": record["lm_loss"],
        "grad_norm": record["grad_norm"],
        **({"validation": validation} if validation else {}),
    }


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # as in the tests
    with tempfile.TemporaryDirectory() as folder:
        records = golden_run(write_tiny_data(Path(folder)), Path(folder))
    LOSSES.write_text("[\n" + ",\n".join(f"  {json.dumps(record)}" for record in records) + "\n]\n")
    print(f"wrote {LOSSES}")
