"""Check a training run over all nodes of a SLURM job against one process. Not yet run on hardware."""

import os
import shutil
import subprocess
import sys

from megatron_ledom.config.derived import next_multiple
from megatron_ledom.hardware_check.check import Outcome, Setting, failed, passed, skipped
from megatron_ledom.hardware_check.curves import compare
from megatron_ledom.hardware_check.layouts import DISTRIBUTED, ONE_PROCESS, TOLERANCE
from megatron_ledom.hardware_check.ranks import end_of_log
from megatron_ledom.hardware_check.training_runs import (
    GLOBAL_BATCH,
    STEPS,
    RunFailedError,
    TrainingRuns,
    own_layers,
)
from megatron_ledom.platform.slurm import BY_SBATCH, nodes_of_job, read_number, read_step
from megatron_ledom.storage.records import METRICS, read_records

ALL_NODES = "all_nodes"
GRACE_SECONDS = 2.0


def check_nodes(setting: Setting) -> Outcome:
    """Train over all nodes with srun, as a job of several nodes does, and compare every step with one process.

    The report's folder must be on a file system that all nodes share.
    """
    if read_step(os.environ) is not None:
        return skipped("inside srun; run this check in the batch script itself, which starts the ranks on all nodes")
    num_nodes = nodes_of_job(os.environ)
    if num_nodes < 2:
        return skipped("not in a SLURM job of several nodes; run this check in the batch script of such a job")
    if shutil.which("srun") is None:
        return skipped(f"in a SLURM job of {num_nodes} nodes, but there is no srun")
    num_ranks = num_nodes * setting.num_gpus
    batch = [f"train.global_batch_size={next_multiple(GLOBAL_BATCH, num_ranks)}", "train.micro_batch_size=1"]
    runs = TrainingRuns(setting, [own_layers(setting.device), *batch])
    expected = runs.train({ONE_PROCESS: []})[ONE_PROCESS]
    arguments = runs.arguments(ALL_NODES, [f"parallel.{one}" for one in DISTRIBUTED])
    run_on_nodes(runs, [sys.executable, "-m", "megatron_ledom.pretrain", *arguments], num_nodes)
    difference = compare(read_records(os.path.join(runs.run_dir(ALL_NODES), METRICS)), expected)
    sentence = f"{num_ranks} ranks on {num_nodes} nodes against one process, {STEPS} steps: {difference.sentence(TOLERANCE)}"
    numbers = {"nodes": num_nodes, "ranks": num_ranks, **difference.numbers()}
    return failed(sentence, **numbers) if difference.exceeds(TOLERANCE) else passed(sentence, **numbers)


def run_on_nodes(runs: TrainingRuns, command: list[str], num_nodes: int) -> None:
    """Run a command with srun, one task for each GPU of each node, until the check's time ends. Raises RunFailedError."""
    per_node = runs.setting.num_gpus
    srun = ["srun", f"--nodes={num_nodes}", f"--ntasks={num_nodes * per_node}", f"--ntasks-per-node={per_node}"]
    cpus = read_number(os.environ, "SLURM_CPUS_ON_NODE", BY_SBATCH, least=1)
    srun += [f"--cpus-per-task={max(1, cpus // per_node)}", "--kill-on-bad-exit=1", "--wait=30"]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if runs.setting.device == "cpu" else {}
    log_file = runs.folder / "srun.log"
    with open(log_file, "wb") as output:
        process = subprocess.Popen([*srun, *command], env={**os.environ, **hidden}, stdout=output, stderr=output)
    try:
        code = process.wait(max(0.0, runs.seconds_left()))
    except subprocess.TimeoutExpired:
        raise RunFailedError(
            f"the run on {num_nodes} nodes did not end in time: {end_of_log(log_file)}; check that the nodes reach each other"
        ) from None
    finally:
        if process.poll() is None:
            process.terminate()  # srun then ends the ranks on all nodes
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    if code:
        raise RunFailedError(f"the run on {num_nodes} nodes ended with the exit code {code}: {end_of_log(log_file)}")
