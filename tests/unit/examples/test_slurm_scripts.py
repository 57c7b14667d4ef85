"""The SLURM scripts: valid shell, known directives, existing commands, and a requeue after the time limit."""

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

from megatron_ledom.data.shards.shard import check_shard
from tests.support.corpus_recipes import two_sources
from tests.support.fake_srun import TWO_TASKS
from tests.support.forked import run_forked
from tests.support.legible import legible_documents, legible_tokenizer, write_jsonl
from tests.support.paths import ROOT
from tests.support.tiny_runs import TinyData

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
FAKE_SRUN = f"#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\n{TWO_TASKS}"
FAILS = """#!/bin/bash
# the first {variable} calls fail
echo >> "$RECORD/{variable}"
(($(wc -l < "$RECORD/{variable}") > ${{{variable}:-0}})) || exit 1
"""
FAKE_SCONTROL = f"""{FAILS.format(variable="SCONTROL_FAILS")}
echo "$@" >> "$RECORD/queued"
"""
FAKE_SQUEUE = f"""{FAILS.format(variable="SQUEUE_FAILS")}
echo "$STATE"
"""
FAKE_SBATCH = """#!/bin/bash
printf '%s\n' "$@" > "$RECORD/submitted"
"""
FAKE_PYTHON = """#!{python}
import os, signal, sys, time
if "--progress" in sys.argv:
    with open(os.path.join(os.environ["RECORD"], "PROGRESS_FAILS"), "a+") as calls:
        calls.write("call\\n")
        calls.seek(0)
        if len(calls.readlines()) <= int(os.environ.get("PROGRESS_FAILS", 0)):
            sys.exit(1)
    print(os.environ["PROGRESS"])
    sys.exit()
saved = []
signal.signal(signal.SIGUSR1, lambda *_: saved.append(1))
path = os.path.join(os.environ["RECORD"], "rank" + os.environ["SLURM_PROCID"])
with open(path + ".part", "w") as file:
    print(*sys.argv[1:], file=file)
os.rename(path + ".part", path)
until = time.monotonic() + float(os.environ["SECONDS_TO_TRAIN"])
while time.monotonic() < until and not saved:
    time.sleep(0.02)
sys.exit(int(os.environ["STATUS"]))
"""


def directives(script: Path) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.read_text().splitlines() if line.startswith("#SBATCH")]


def python_command(script: Path) -> list[str]:
    """Return the words after the interpreter of the one command that runs Python."""
    text = script.read_text().replace("\\\n", " ")
    (command,) = re.findall(r'"\$PYTHON" (.*?)(?: "\$@"|\))?$', text, re.MULTILINE)
    return shlex.split(command)


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
    command = words[:2] if words[0] == "-m" else [word for word in words[:2] if not word.startswith("-")]
    answer = run_forked([*command, "--help"])
    assert answer.returncode == 0, answer.stderr
    flags = [word for word in words if word.startswith("--")]
    assert flags
    assert not [flag for flag in flags if not re.search(rf"{flag}\b", answer.stdout)]


def test_ranks_of_the_pretrain_script_are_those_of_the_7b() -> None:
    options = dict(directive.removeprefix("--").split("=", 1) for directive in directives(PRETRAIN) if "=" in directive)
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert int(options["nodes"]) * int(options["ntasks-per-node"]) == 64
    assert (options["signal"], options["open-mode"]) == ("B:USR1@300", "append")


class Cluster:
    """A folder with fake commands for SLURM and Python, and the calls that they recorded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        fakes = {"srun": FAKE_SRUN, "scontrol": FAKE_SCONTROL, "squeue": FAKE_SQUEUE, "sbatch": FAKE_SBATCH}
        for name, content in fakes.items():
            (folder / name).write_text(content)
        (folder / "python").write_text(FAKE_PYTHON.format(python=sys.executable))
        for name in (*fakes, "python"):
            (folder / name).chmod(0o755)

    def start(
        self,
        *arguments: str,
        seconds: float = 0,
        status: int = 0,
        progress: str = "7 7",
        state: str = "RUNNING",
        fails: dict[str, int] | None = None,
        name: str = "tiny",
    ) -> "subprocess.Popen[str]":
        """Start the script as a job whose ranks take `seconds`, end with `status`, and have saved `progress`.

        fails: number of first calls of SQUEUE, SCONTROL or PROGRESS that fail.
        """
        slurm = {
            "SLURM_JOB_NODELIST": "node-[a-b]",
            "SLURM_JOB_ID": "4007",
            "SLURM_JOB_NAME": name,
            "SLURM_NTASKS": "2",
            "SLURM_CPUS_PER_TASK": "1",
        }
        behaviour = {"SECONDS_TO_TRAIN": str(seconds), "STATUS": str(status), "PROGRESS": progress, "STATE": state}
        behaviour |= {f"{name}_FAILS": str(count) for name, count in (fails or {}).items()} | {"RETRY_SECONDS": "0"}
        environment = {**self.environment(), **slurm, **behaviour, "PYTHON": str(self.folder / "python")}
        command = ["bash", str(PRETRAIN), *arguments]
        return subprocess.Popen(command, env=environment, cwd=self.folder, stdout=subprocess.PIPE, text=True)

    def environment(self) -> dict[str, str]:
        outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        path = f"{self.folder}{os.pathsep}{os.environ['PATH']}"
        return {**outside, "PATH": path, "RECORD": str(self.folder), "CONFIG": "a run.yaml"}

    def submit(self, script: str, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        """Run a script outside a job, with the real Python."""
        environment = {**self.environment(), "PYTHON": sys.executable, **variables}
        command = ["bash", f"examples/slurm/{script}", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

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


def test_complete_training_is_not_requeued(cluster: Cluster) -> None:
    assert cluster.start("train.seed=1").wait(timeout=30) == 0
    for rank in (0, 1):
        assert cluster.recorded(f"rank{rank}") == "-m megatron_ledom.pretrain --config a run.yaml train.seed=1"
    assert cluster.recorded("queued") == ""


def test_training_that_stopped_before_its_end_is_requeued(cluster: Cluster) -> None:
    """No signal is needed: the trainer itself reads the time limit."""
    assert cluster.start(progress="3 7").wait(timeout=30) == 0
    assert cluster.recorded("queued") == "requeue 4007"


def test_time_limit_stops_the_ranks_and_requeues(cluster: Cluster) -> None:
    job = cluster.start(seconds=60, progress="3 7")
    cluster.wait_for_ranks()
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == 0
    assert cluster.recorded("queued") == "requeue 4007"


@pytest.mark.parametrize("status", [0, 137])
def test_job_that_slurm_ends_does_not_requeue_itself(cluster: Cluster, status: int) -> None:
    """SLURM ends a job by scancel, or by a preemption, after which it has already queued the job again."""
    assert cluster.start(progress="3 7", status=status, state="COMPLETING").wait(timeout=30) == status
    assert cluster.recorded("queued") == ""


@pytest.mark.parametrize("status", [1, 2])
@pytest.mark.parametrize("at_the_limit", [False, True])
def test_training_that_explains_its_error_fails_the_job(cluster: Cluster, status: int, at_the_limit: bool) -> None:
    job = cluster.start(seconds=60 if at_the_limit else 0, status=status, progress="3 7")
    cluster.wait_for_ranks()
    if at_the_limit:
        job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == status
    assert cluster.recorded("queued") == ""


@pytest.mark.parametrize("status", [3, 137])
def test_lost_ranks_are_started_again_while_checkpoints_are_made(cluster: Cluster, status: int) -> None:
    """Three failures since one checkpoint end the job; a new checkpoint restarts the count."""
    requeued = []
    for progress in ("0 7", "0 7", "3 7", "3 7", "3 7"):
        assert cluster.start(progress=progress, status=status).wait(timeout=30) == status
        requeued.append(len(cluster.recorded("queued").splitlines()))
    assert requeued == [1, 2, 3, 4, 4]
    assert cluster.recorded("tiny-4007.failures").split() == ["0", "0", "3", "3", "3"]
    assert cluster.start().wait(timeout=30) == 0
    assert cluster.recorded("tiny-4007.failures") == ""


@pytest.mark.parametrize(("name", "file"), [("team/run 7", "team_run 7-4007.failures"), ("-x", "-x-4007.failures")])
def test_any_job_name_can_be_requeued(cluster: Cluster, name: str, file: str) -> None:
    assert cluster.start(progress="3 7", status=137, name=name).wait(timeout=30) == 137
    assert (cluster.recorded("queued"), cluster.recorded(file)) == ("requeue 4007", "3")
    assert cluster.start(name=name).wait(timeout=30) == 0
    assert not (cluster.folder / file).exists()


@pytest.mark.parametrize("what", ["SQUEUE", "PROGRESS", "SCONTROL"])
@pytest.mark.parametrize("status", [0, 137])
def test_unfinished_run_is_requeued_after_failed_queries(cluster: Cluster, what: str, status: int) -> None:
    """For example, the controller restarts, or a file server does not respond for a minute."""
    assert cluster.start(progress="3 7", status=status, fails={what: 3}).wait(timeout=30) == status
    assert cluster.recorded("queued") == "requeue 4007"


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("SQUEUE", "squeue does not report the state of this job"),
        ("PROGRESS", "the progress of the run cannot be read"),
        ("SCONTROL", "scontrol does not queue this job again"),
    ],
)
@pytest.mark.parametrize(("status", "job_status"), [(0, 3), (137, 137)])
def test_job_whose_queries_all_fail_fails_with_the_reason(
    cluster: Cluster, what: str, says: str, status: int, job_status: int
) -> None:
    """The status is never 0, which would mean a complete run."""
    job = cluster.start(progress="3 7", status=status, fails={what: 1000})
    output, _ = job.communicate(timeout=30)
    assert job.returncode == job_status
    assert f"{says}; not queued again" in output
    assert cluster.recorded("queued") == ""


def test_pretrain_by_hand_checks_the_ranks_it_would_request(cluster: Cluster, data: TinyData, tmp_path: Path) -> None:
    config = {"CONFIG": str(data.config)}
    refused = cluster.submit("pretrain.sbatch", "parallel.world_size=2", SBATCH_OPTIONS="--nodes=3", **config)
    assert refused.returncode == 2
    assert "parallel.world_size=2, but 24 ranks are launched" in refused.stderr
    assert cluster.recorded("submitted") == ""
    options = "--nodes=2 --ntasks-per-node=1"
    arguments = ("parallel.world_size=2", f"run_dir={tmp_path}/run")
    done = cluster.submit("pretrain.sbatch", *arguments, SBATCH_OPTIONS=options, **config)
    assert done.returncode == 0, done.stderr
    assert "2 ranks would start from iteration 0 of 20" in done.stdout
    assert cluster.recorded("submitted").split("\n") == [*options.split(), "examples/slurm/pretrain.sbatch", *arguments]


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        ("-N 3", 24),
        ("-N3 --ntasks-per-node 2", 6),
        ("--nodes 3 -N 1 --ntasks-per-node=4", 4),
        ("--nodes=9 -n 5", 5),
        ("--ntasks=7 --ntasks-per-core=1", 7),
        ("-J ledom --nodes=1 --ntasks-per-node=3", 3),
    ],
)
def test_pretrain_by_hand_counts_ranks_in_every_spelling(cluster: Cluster, data: TinyData, options: str, ranks: int) -> None:
    refused = cluster.submit("pretrain.sbatch", "parallel.world_size=999", SBATCH_OPTIONS=options, CONFIG=str(data.config))
    assert f"but {ranks} ranks are launched" in refused.stderr
    assert (refused.returncode, cluster.recorded("submitted")) == (2, "")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("-N 2-4", "--nodes=2-4 is not one number"),
        ("--ntasks-per-node", "--ntasks-per-node= is not"),
        ("-J a/b", "has a slash"),
    ],
)
def test_pretrain_by_hand_refuses_what_it_cannot_count(cluster: Cluster, data: TinyData, options: str, says: str) -> None:
    refused = cluster.submit("pretrain.sbatch", SBATCH_OPTIONS=options, CONFIG=str(data.config))
    assert (refused.returncode, cluster.recorded("submitted")) == (2, "")
    assert says in refused.stderr


@pytest.mark.parametrize(
    ("pattern", "outputs"),
    [
        ("[ab]/x.jsonl", ["a/x.jsonl", "b/x.jsonl"]),
        ("*/c/x.jsonl", ["a/c/x.jsonl", "b/c/x.jsonl"]),
        ("a/*.jsonl", ["x.jsonl", "y.jsonl"]),
        ("{root}/[ab]/[xy].jsonl", ["a/x.jsonl", "a/y.jsonl", "b/x.jsonl"]),
        ("{root}/a/x.jsonl", ["x.jsonl"]),
    ],
)
def test_each_file_of_a_ranking_array_has_an_output_of_its_own(cluster: Cluster, pattern: str, outputs: list[str]) -> None:
    for name in ("a/x.jsonl", "a/y.jsonl", "b/x.jsonl", "a/c/x.jsonl", "b/c/x.jsonl"):
        (cluster.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (cluster.folder / name).touch()
    (cluster.folder / "python").write_text('#!/bin/bash\nwhile [[ $1 != --output ]]; do shift; done\necho "$2"\n')
    slurm = {"SLURM_JOB_ID": "1", "SLURM_ARRAY_TASK_MAX": str(len(outputs) - 1), "PYTHON": str(cluster.folder / "python")}
    variables = {**os.environ, **slurm, "INPUT": pattern.format(root=cluster.folder), "OUTPUT": "out"}
    command = ["bash", str(ROOT / "examples/slurm/evaluate.sbatch")]
    found = []
    for task in range(len(outputs)):
        environment = {**variables, "SLURM_ARRAY_TASK_ID": str(task)}
        done = subprocess.run(command, env=environment, cwd=cluster.folder, capture_output=True, text=True, check=True)
        found.append(done.stdout.strip())
    assert found == [f"out/{name}" for name in outputs]
    assert all((cluster.folder / name).parent.is_dir() for name in found)


def test_pretrain_by_hand_refuses_missing_shards(cluster: Cluster, data: TinyData) -> None:
    options, gone = "--nodes=1 --ntasks-per-node=1", "data.train_blend=[[1.0,gone]]"
    refused = cluster.submit("pretrain.sbatch", gone, SBATCH_OPTIONS=options, CONFIG=str(data.config))
    assert refused.returncode != 0
    assert "gone" in refused.stderr
    assert cluster.recorded("submitted") == ""


def accepted_settings(folder: Path) -> dict[str, tuple[dict[str, str], str]]:
    """Return, for each script, variables that it accepts, and the options that it then passes to sbatch."""
    (folder / "model").mkdir()
    (folder / "model/config.json").touch()
    (folder / "a.jsonl").touch()
    (folder / "b.jsonl").touch()
    (folder / "run/checkpoints").mkdir(parents=True)
    (folder / "run/checkpoints/latest").touch()
    files, model = str(folder / "?.jsonl"), str(folder / "model")
    prefix = str(folder / "out/shard")
    return {
        "preprocess.sbatch": (
            {"INPUT": files, "TOKENIZER": model, "OUTPUT_PREFIX": prefix, "NUM_TASKS": "5"},
            "--array=0-4",
        ),
        "convert.sbatch": ({"LOAD": str(folder / "run"), "SAVE": str(folder / "hf")}, ""),
        "evaluate.sbatch": (
            {"FORWARD": model, "REVERSE": model, "INPUT": files, "OUTPUT": str(folder / "ranked")},
            "--array=0-1",
        ),
        "evaluate_tasks.sbatch": (
            {"MODEL": model, "DATA": str(folder), "TASKS": "svamp,piqa", "OUTPUT": str(folder / "evaluated"), "PYTHON": "true"},
            "--array=0-1",
        ),
        "check_hardware.sbatch": ({"OUTPUT": str(folder / "checked")}, ""),
    }


@pytest.mark.parametrize(
    ("script", "wrong", "says"),
    [
        ("preprocess.sbatch", "INPUT", "matches no file"),
        ("preprocess.sbatch", "TOKENIZER", "does not exist"),
        ("convert.sbatch", "LOAD", "neither a run folder with a finished checkpoint nor a checkpoint"),
        ("convert.sbatch", "SAVE", "exists; name another folder"),
        ("evaluate.sbatch", "INPUT", "matches no file"),
        ("evaluate.sbatch", "REVERSE", "config.json does not exist"),
        ("evaluate_tasks.sbatch", "MODEL", "config.json does not exist"),
        ("evaluate_tasks.sbatch", "DATA", "is not a folder"),
        ("check_hardware.sbatch", "OUTPUT", "exists; name another folder"),
    ],
)
def test_script_by_hand_checks_its_settings_and_submits_itself(
    cluster: Cluster, tmp_path: Path, script: str, wrong: str, says: str
) -> None:
    variables, options = accepted_settings(tmp_path)[script]
    bad = {**variables, wrong: str(tmp_path / "run") if wrong in ("SAVE", "OUTPUT") else str(tmp_path / "missing")}
    refused = cluster.submit(script, **bad)
    assert (refused.returncode, cluster.recorded("submitted")) == (2, "")
    assert says in refused.stderr
    done = cluster.submit(script, "--an-option", SBATCH_OPTIONS="--time=10", **variables)
    assert done.returncode == 0, done.stderr
    expected = [*options.split(), "--time=10", f"examples/slurm/{script}", "--an-option"]
    assert cluster.recorded("submitted").split("\n") == expected


def test_array_longer_than_the_number_of_tasks_is_refused() -> None:
    slurm = {
        "SLURM_ARRAY_TASK_MAX": "63",
        "SLURM_ARRAY_TASK_ID": "3",
        "NUM_TASKS": "32",
        "PYTHON": "false",
        "SLURM_JOB_ID": "1",
    }
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
            "SLURM_JOB_ID": "1",
            "SLURM_CPUS_PER_TASK": "1",
            "SLURM_ARRAY_TASK_ID": str(task),
            "SLURM_ARRAY_TASK_MAX": "1",
        }
        script = ["bash", "examples/slurm/preprocess.sbatch"]
        done = subprocess.run(script, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    manifests = [check_shard(str(tmp_path / f"shard-{task:05d}-of-00002")) for task in range(2)]
    assert sorted(manifest.num_tokens for manifest in manifests) == [2 * 8, 3 * 6]


def test_the_corpus_script_submits_an_array_for_each_source_and_builds_its_task(cluster: Cluster, tmp_path: Path) -> None:
    tokenizer = str(legible_tokenizer(tmp_path / "tokenizer"))
    recipe = two_sources(tmp_path, tokenizer)
    text = Path(recipe).read_text(encoding="utf-8")
    Path(recipe).write_text(text.replace("    tokens: 120\n", "    tokens: 120\n    tasks: 2\n"), encoding="utf-8")
    (cluster.folder / "sbatch").write_text('#!/bin/bash\necho "$SOURCE" "$@" >> "$RECORD/submitted"\n')
    options = ("--set", "direction=forward", "--set", "sources.web.tasks=3", "--overwrite")
    done = cluster.submit("corpus.sbatch", *options, RECIPE=recipe)
    assert done.returncode == 0, done.stderr
    script = f"examples/slurm/corpus.sbatch {' '.join(options)}"
    assert cluster.recorded("submitted").splitlines() == [
        f"web --job-name=ledom-corpus-web --array=0-2 {script}",
        f"code --job-name=ledom-corpus-code --array=0-0 {script}",
    ]
    task = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "1", "SLURM_ARRAY_TASK_ID": "2", "SOURCE": "web", "RECIPE": recipe}
    done = cluster.submit("corpus.sbatch", *options, **task)
    assert done.returncode == 0, done.stderr
    assert check_shard(str(tmp_path / "out/web-00002-of-00003")).direction == "forward"
    assert cluster.submit("corpus.sbatch", RECIPE="missing.yaml").returncode == 2
