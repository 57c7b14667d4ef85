"""The SLURM scripts: valid shell, known directives, commands that exist, and a time limit that leads to a requeue."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ledom.data.shard import check_shard
from tests.legible import legible_documents, legible_tokenizer, write_jsonl

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples/slurm").glob("*.sbatch"))
PRETRAIN = ROOT / "examples/slurm/pretrain.sbatch"
SBATCH_OPTIONS = """
account acctg-freq array begin chdir clusters comment constraint container contiguous core-spec cores-per-socket
cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency distribution error exclude exclusive export
export-file extra-node-info get-user-env gid gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket gpus-per-task gres
gres-flags hint hold input job-name kill-on-invalid-dep licenses mail-type mail-user mem mem-bind mem-per-cpu
mem-per-gpu mincpus network nice no-kill no-requeue nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-gpu
ntasks-per-node ntasks-per-socket open-mode output overcommit oversubscribe parsable partition power prefer priority
profile propagate qos quiet reboot requeue reservation signal sockets-per-node spread-job switches test-only thread-spec
threads-per-core time time-min tmp tres-per-task uid use-min-nodes verbose wait wait-all-nodes wckey wrap
"""
FAKE_SRUN = r"""#!/bin/bash
# srun on one machine: two tasks in SLURM's variables; USR1 goes on to them, TERM kills them, as the real one does
while [[ $1 == --* ]]; do shift; done
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & tasks+=($!); done
trap 'kill -USR1 "${tasks[@]}"' USR1
trap 'kill -KILL "${tasks[@]}"' TERM
status=0
for task in "${tasks[@]}"; do
    while kill -0 "$task" 2>/dev/null; do wait "$task" || true; done
    wait "$task" || status=$?
done
exit $status
"""
FAKE_SCONTROL = r"""#!/bin/bash
if [[ "$1 $2" == 'show hostnames' ]]; then printf 'node-a\nnode-b\n'
elif [[ "$1 $2 $4" == 'show node node-a' ]]; then echo 'NodeName=node-a NodeAddr=address-a NodeHostName=host-a'
else echo "$@" >> "$RECORD/queued"; fi
"""
FAKE_PYTHON = """#!{python}
import os, signal, sys, time
saved = []
signal.signal(signal.SIGUSR1, lambda *_: saved.append(1))
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
path = os.path.join(os.environ["RECORD"], "rank" + os.environ["RANK"])
with open(path + ".part", "w") as file:
    print(*[os.environ[name] for name in names], *sys.argv[1:], file=file)
os.rename(path + ".part", path)
until = time.monotonic() + float(os.environ["SECONDS_TO_TRAIN"])
while time.monotonic() < until and not saved:
    time.sleep(0.02)
sys.exit(int(os.environ["STATUS"]))
"""


def directives(script: Path) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.read_text().splitlines() if line.startswith("#SBATCH")]


def python_command(script: Path) -> list[str]:
    """Words of the one command that runs Python, after the interpreter."""
    text = script.read_text().replace("\\\n", " ").replace("' rank ", "")
    start = text.index('exec "$PYTHON"')
    end = re.search(r" &$|^\s*$", text[start:], re.MULTILINE)
    words = text[start : start + end.start() if end else None].replace('"$@"', "").replace("\n'", "").replace("'", "")
    return shlex.split(words)[2:]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_valid_bash(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_passes_shellcheck(script: Path) -> None:
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert program, "shellcheck is missing; install the test extra"
    checked = subprocess.run([program, str(script)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_directives_are_known_and_come_first(script: Path) -> None:
    names = [directive.split("=")[0].removeprefix("--") for directive in directives(script)]
    assert {"job-name", "time", "output", "nodes"} <= set(names)
    assert set(names) <= set(SBATCH_OPTIONS.split())
    commands = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    before = script.read_text().split(commands[0])[0]
    assert before.count("#SBATCH") == len(names), "sbatch ignores directives after the first command"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_command_of_the_script_exists_with_its_flags(script: Path) -> None:
    words = python_command(script)
    asked = words[:2] if words[0] == "-m" else [word for word in words[:2] if not word.startswith("-")]
    answer = subprocess.run([sys.executable, *asked, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    flags = [word for word in words if word.startswith("--")]
    assert flags
    assert not [flag for flag in flags if not re.search(rf"{flag}\b", answer.stdout)]


def test_ranks_of_the_pretrain_script_are_those_of_the_7b() -> None:
    asked = dict(directive.removeprefix("--").split("=", 1) for directive in directives(PRETRAIN) if "=" in directive)
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    assert int(asked["nodes"]) * int(asked["ntasks-per-node"]) == 64
    assert (asked["signal"], asked["open-mode"]) == ("B:USR1@600", "append")


class Cluster:
    """A folder with stand-ins for srun, scontrol and Python, and what they recorded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, content in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL), ("python", FAKE_PYTHON)):
            (folder / name).write_text(content.format(python=sys.executable) if name == "python" else content)
            (folder / name).chmod(0o755)

    def start(self, *arguments: str, seconds: float, status: int) -> "subprocess.Popen[str]":
        slurm = {
            "SLURM_JOB_NODELIST": "node-[a-b]",
            "SLURM_JOB_ID": "4007",
            "SLURM_NTASKS": "2",
            "SLURM_NTASKS_PER_NODE": "2",
            "SLURM_CPUS_PER_TASK": "1",
        }
        given = {"PYTHON": str(self.folder / "python"), "RECORD": str(self.folder), "CONFIG": "a run.yaml"}
        behaviour = {"SECONDS_TO_TRAIN": str(seconds), "STATUS": str(status)}
        path = {"PATH": f"{self.folder}{os.pathsep}{os.environ['PATH']}"}
        command = ["bash", str(PRETRAIN), *arguments]
        return subprocess.Popen(
            command, env={**os.environ, **slurm, **given, **behaviour, **path}, stdout=subprocess.PIPE, text=True
        )

    def wait_for_ranks(self) -> None:
        until = time.monotonic() + 20
        while not all((self.folder / f"rank{rank}").exists() for rank in (0, 1)):
            assert time.monotonic() < until, "the ranks did not start"
            time.sleep(0.02)

    def recorded(self, name: str) -> str:
        path = self.folder / name
        return path.read_text().strip() if path.exists() else ""


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def test_finished_training_is_not_requeued_and_ranks_know_their_place(cluster: Cluster) -> None:
    assert cluster.start("train.seed=1", seconds=0, status=0).wait(timeout=30) == 0
    for rank in (0, 1):
        place = f"{rank} {rank} 2 2 address-a 24007"
        assert cluster.recorded(f"rank{rank}") == f"{place} -m megatron_ledom.pretrain --config a run.yaml train.seed=1"
    assert cluster.recorded("queued") == ""


def test_time_limit_stops_the_ranks_and_requeues(cluster: Cluster) -> None:
    job = cluster.start(seconds=60, status=0)
    cluster.wait_for_ranks()
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == 0
    assert cluster.recorded("queued") == "requeue 4007"


@pytest.mark.parametrize("at_the_limit", [False, True])
def test_failed_training_fails_the_job_and_is_not_requeued(cluster: Cluster, at_the_limit: bool) -> None:
    job = cluster.start(seconds=60 if at_the_limit else 0, status=3)
    cluster.wait_for_ranks()
    if at_the_limit:
        job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == 3
    assert cluster.recorded("queued") == ""


def test_array_longer_than_the_number_of_tasks_is_refused() -> None:
    slurm = {"SLURM_ARRAY_TASK_MAX": "63", "SLURM_ARRAY_TASK_ID": "3", "NUM_TASKS": "32", "PYTHON": "false"}
    command = ["bash", str(ROOT / "examples/slurm/preprocess.sbatch")]
    refused = subprocess.run(command, env={**os.environ, **slurm}, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "submit with --array=0-31" in refused.stderr


def test_array_tasks_write_the_shards_of_the_whole_corpus(tmp_path: Path) -> None:
    tokenizer = legible_tokenizer(tmp_path / "legible")
    for part, texts in enumerate((legible_documents(3, 5), legible_documents(2, 7))):
        write_jsonl(tmp_path / f"part{part}.jsonl", texts)
    for task in range(2):
        variables = {
            "INPUT": str(tmp_path / "part*.jsonl"),
            "TOKENIZER": str(tokenizer),
            "OUTPUT_PREFIX": str(tmp_path / "shard"),
            "NUM_TASKS": "2",
            "PYTHON": sys.executable,
            "SLURM_CPUS_PER_TASK": "1",
            "SLURM_ARRAY_TASK_ID": str(task),
            "SLURM_ARRAY_TASK_MAX": "1",
        }
        script = ["bash", "examples/slurm/preprocess.sbatch"]
        done = subprocess.run(script, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    manifests = [check_shard(str(tmp_path / f"shard-{task:05d}-of-00002")) for task in range(2)]
    assert sorted(manifest.num_tokens for manifest in manifests) == [2 * 8, 3 * 6]
