"""The rank of a process from the variables of torchrun or srun, and the end of its job."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ledom.data.preprocess.task import PreprocessSettings, task_of
from megatron_ledom.errors import UsageError
from megatron_ledom.platform import slurm
from megatron_ledom.platform.launch import ALONE, FOREIGN, Launch, read_launch
from megatron_ledom.platform.slurm import seconds_until_job_end, tasks_of_nodes
from tests.support.paths import ROOT

SRUN = {  # rank 9 of 8 + 4: a step with an uneven number of ranks on its nodes
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "12",
    "SLURM_NTASKS_PER_NODE": "8",
    "SLURM_JOB_NODELIST": "n[1-4]",
    "SLURM_TASKS_PER_NODE": "8(x4)",
    "SLURM_STEP_NUM_TASKS": "12",
    "SLURM_STEP_NODELIST": "n[2-3]",
    "SLURM_STEP_TASKS_PER_NODE": "8,4",
}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}
ONE_TASK = {  # a job of one task, in its batch script or shell; there --ntasks-per-node is only a limit
    "SLURM_JOB_ID": "5",
    "SLURM_NTASKS": "1",
    "SLURM_NPROCS": "1",
    "SLURM_NTASKS_PER_NODE": "8",
    "SLURM_TASKS_PER_NODE": "1",
    "SLURM_JOB_NUM_NODES": "1",
    "SLURM_NNODES": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
}
INTERACTIVE_STEP = str(0xFFFFFFFA)
SCONTROL = """#!/bin/bash
if [[ "$1 $2 $3" == 'show hostnames n[2-3]' ]]; then printf 'n2\\nn3\\n'
elif [[ "$*" == 'show node --oneliner n2' ]]; then echo 'NodeName=n2 NodeAddr=address-2 NodeHostName=host-2'
else exit 1; fi
"""


@pytest.fixture(autouse=True)
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder for fake SLURM commands, and remove the variables of a real launcher."""
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name in (*SRUN, *ONE_TASK, "SLURM_JOB_END_TIME", *FOREIGN):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def put(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    (folder / name).chmod(0o755)


def set_variables(monkeypatch: pytest.MonkeyPatch, *groups: dict[str, str]) -> None:
    for name, value in {name: value for group in groups for name, value in group.items()}.items():
        monkeypatch.setenv(name, value)


def test_without_a_launcher_a_process_is_alone() -> None:
    assert read_launch() == ALONE


def test_rank_of_srun(commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(commands, "scontrol", SCONTROL)
    set_variables(monkeypatch, SRUN)
    address = "tcp://address-2:24562"
    assert read_launch() == Launch(rank=9, world_size=12, local_rank=1, local_world_size=4, init_method=address)


def test_rendezvous_address_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, SRUN, {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "1234"})
    assert read_launch().init_method == "tcp://10.0.0.7:1234"


def test_without_an_address_of_scontrol_the_message_asks_for_one(commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(commands, "scontrol", "#!/bin/sh\nexit 1\n")
    set_variables(monkeypatch, SRUN)
    with pytest.raises(UsageError, match=r"first node of n\[2-3\]; set MASTER_ADDR"):
        read_launch()


def test_torchrun_has_priority_over_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    """For example, srun starts one torchrun per node."""
    set_variables(monkeypatch, SRUN, TORCHRUN)
    assert read_launch() == Launch(rank=3, world_size=4, local_rank=1, local_world_size=2, init_method="env://")


def test_half_of_the_variables_of_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match="WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT not"):
        read_launch()


@pytest.mark.parametrize("step", [None, INTERACTIVE_STEP], ids=["batch script", "shell of salloc"])
def test_forgotten_srun_is_refused(monkeypatch: pytest.MonkeyPatch, step: str | None) -> None:
    set_variables(monkeypatch, SRUN)
    monkeypatch.delenv("SLURM_STEP_ID")
    if step:
        monkeypatch.setenv("SLURM_STEP_ID", step)
    with pytest.raises(UsageError, match="job 123456 has 12 tasks, but this process was not started by srun"):
        read_launch()
    set_variables(monkeypatch, ONE_TASK)
    assert read_launch() == ALONE


def test_step_of_one_task_has_no_rendezvous(monkeypatch: pytest.MonkeyPatch) -> None:
    one = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_PROCID": "0"}
    set_variables(monkeypatch, SRUN, one, {"SLURM_LOCALID": "0", "SLURM_NODEID": "0"})
    assert read_launch() == ALONE


@pytest.mark.parametrize(("text", "counts"), [("8", [8]), ("8(x2)", [8, 8]), ("2(x3),1,4(x2)", [2, 2, 2, 1, 4, 4])])
def test_tasks_of_nodes(text: str, counts: list[int]) -> None:
    assert tasks_of_nodes(text) == counts


@pytest.mark.parametrize("text", ["8x2", "", "8,", "8(x99999999999)", "8(x2", "-8"])
def test_tasks_of_nodes_in_another_form_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"SLURM_TASKS_PER_NODE={text!r} is not of the form 8(x2),4")):
        tasks_of_nodes(text)


@pytest.mark.parametrize(
    ("left", "seconds"),
    [("5:04", 304.0), ("47:59:59", 172799.0), ("2-00:00:01", 172801.0), ("UNLIMITED", None), ("INVALID", None)],
)
def test_remaining_time_of_squeue(commands: Path, monkeypatch: pytest.MonkeyPatch, left: str, seconds: float | None) -> None:
    put(commands, "squeue", f"#!/bin/sh\n[ \"$2\" = --jobs=123456 ] && printf '123455 9:00\\n123456 {left}\\n'\n")
    assert seconds_until_job_end() is None
    set_variables(monkeypatch, SRUN)
    assert seconds_until_job_end() == seconds


def test_remaining_time_without_squeue(commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(commands, "squeue", "#!/bin/sh\nexit 1\n")
    set_variables(monkeypatch, SRUN)
    assert seconds_until_job_end() is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1000300")
    monkeypatch.setattr(slurm.time, "time", lambda: 1000000.0)
    assert seconds_until_job_end() == 300.0


def test_launch_is_read_and_signals_are_remembered_before_torch_is_imported() -> None:
    """A signal before that kills, and importing torch takes seconds."""
    lines = (
        "import sys; from megatron_ledom.pretrain import StopRequest, read_launch",
        "StopRequest(); read_launch(); assert 'torch' not in sys.modules",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], check=False, cwd=ROOT)
    assert done.returncode == 0


IN_A_JOB = {"SLURM_JOB_ID": "5", "SLURM_JOB_NUM_NODES": "4"}


@pytest.mark.parametrize(
    "tasks",
    [
        {"SLURM_TASKS_PER_NODE": "8(x4)", "SLURM_NTASKS_PER_NODE": "8"},
        {"SLURM_TASKS_PER_NODE": "8(x3),8"},
        {"SLURM_NTASKS_PER_NODE": "8"},
        {"SLURM_NPROCS": "32"},
    ],
)
def test_forgotten_srun_is_refused_without_ntasks(monkeypatch: pytest.MonkeyPatch, tasks: dict[str, str]) -> None:
    set_variables(monkeypatch, IN_A_JOB, tasks)
    with pytest.raises(UsageError, match="job 5 has 32 tasks, but this process was not started by srun"):
        read_launch()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SLURM_TASKS_PER_NODE", "8(x4)", "SLURM_NTASKS=1, but SLURM_TASKS_PER_NODE makes 32: it is unclear"),
        ("SLURM_NPROCS", "32", "SLURM_NTASKS=1, but SLURM_NPROCS makes 32"),
        ("SLURM_JOB_NUM_NODES", "4", "SLURM_NTASKS=1, but SLURM_JOB_NUM_NODES makes 4"),
        ("SLURM_NNODES", "4", "SLURM_NTASKS=1, but SLURM_JOB_NUM_NODES makes 4"),
        ("SLURM_NTASKS", "32", "SLURM job 5 has 32 tasks, but this process was not started by srun"),
        ("SLURM_PROCID", "2", "SLURM_PROCID=2, but SLURM_STEP_ID is not set, so no srun started this process"),
        ("SLURM_LOCALID", "1", "SLURM_LOCALID=1, but SLURM_STEP_ID is not set"),
        ("SLURM_NODEID", "3", "SLURM_NODEID=3, but SLURM_STEP_ID is not set"),
        ("SLURM_STEP_NUM_TASKS", "4", "SLURM_STEP_NUM_TASKS=4, but SLURM_STEP_ID is not set"),
        *((name, "", f"{name}='' is not a whole number") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID")),
    ],
)
def test_a_process_without_srun_that_may_be_one_of_several_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    set_variables(monkeypatch, ONE_TASK)
    assert read_launch() == ALONE
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"^{re.escape(message)}"):
        read_launch()


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NPROCS"])
def test_an_empty_variable_is_named_where_no_other_is_set(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "")
    with pytest.raises(UsageError, match=f"^{name}='' is not a whole number"):
        read_launch()


def test_a_step_of_several_tasks_without_a_rank_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, ONE_TASK, {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"})
    monkeypatch.delenv("SLURM_PROCID")
    with pytest.raises(UsageError, match=r"^SLURM_STEP_NUM_TASKS=4, but SLURM_PROCID is not set"):
        read_launch()


def test_a_step_whose_size_is_another_than_that_of_its_nodes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, SRUN, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"})
    monkeypatch.delenv("SLURM_STEP_TASKS_PER_NODE")
    with pytest.raises(UsageError, match=r"^SLURM_STEP_NUM_TASKS=1, but SLURM_TASKS_PER_NODE=8\(x4\) makes 32 tasks"):
        read_launch()


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_an_unsupported_launcher_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "8")
    with pytest.raises(UsageError, match=f"{name}='8', but RANK is not set"):
        read_launch()


@pytest.mark.parametrize("value", ["", " ", "-1", "x", "1.5", "٣", pytest.param(5000 * "9", id="5000 digits")])
@pytest.mark.parametrize(
    "name",
    [
        *("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NUM_TASKS"),
        *("SLURM_STEP_TASKS_PER_NODE", "SLURM_JOB_ID", "MASTER_PORT"),
    ],
)
def test_a_variable_of_a_step_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    set_variables(monkeypatch, SRUN, {"MASTER_ADDR": "n2", name: value})
    with pytest.raises(UsageError, match=f"^{name}={value!r} is not"):
        read_launch()


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "SLURM_TASKS_PER_NODE"])
def test_a_variable_of_a_job_that_is_empty_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    set_variables(monkeypatch, IN_A_JOB, {name: ""})
    with pytest.raises(UsageError, match=f"^{name}='' is not"):
        read_launch()


@pytest.mark.parametrize(
    "missing", ["SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID", "SLURM_LOCALID", "SLURM_JOB_ID"]
)
def test_a_variable_of_a_step_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    set_variables(monkeypatch, SRUN, {"MASTER_ADDR": "n2"})
    for name in (missing, missing.replace("STEP_NUM_", "N"), missing.replace("STEP_", "")):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match=r"^SLURM_\w+ is not set; srun sets it for every task"):
        read_launch()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SLURM_NODEID", "2", "SLURM_NODEID=2, but SLURM_STEP_TASKS_PER_NODE=8,4 has 2 nodes"),
        ("SLURM_LOCALID", "4", "SLURM_LOCALID=4, but SLURM_STEP_TASKS_PER_NODE=8,4 has 4 tasks on node 1"),
        ("SLURM_PROCID", "12", "SLURM_PROCID=12 is not below SLURM_STEP_NUM_TASKS=12"),
        ("SLURM_STEP_NUM_TASKS", "13", "SLURM_STEP_NUM_TASKS=13, but SLURM_STEP_TASKS_PER_NODE=8,4 makes 12 tasks"),
        ("SLURM_STEP_NUM_TASKS", "0", "SLURM_STEP_NUM_TASKS='0' is not a whole number of at least 1"),
        ("SLURM_STEP_NODELIST", "", "SLURM_STEP_NODELIST is empty or not set"),
        ("MASTER_ADDR", "", "MASTER_ADDR='' is not a host name"),
        ("MASTER_PORT", "70000", "MASTER_PORT=70000 is above 65535"),
    ],
)
def test_variables_of_a_step_that_contradict_each_other_are_named(
    commands: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    put(commands, "scontrol", SCONTROL)
    set_variables(monkeypatch, SRUN, {name: value})
    with pytest.raises(UsageError, match=f"^{message}"):
        read_launch()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *((name, value, f"{name}={value!r} is not a whole number") for name in list(TORCHRUN)[:4] for value in ("", "x", "-1")),
        ("RANK", "4", "RANK=4 is not below WORLD_SIZE=4"),
        ("LOCAL_RANK", "2", "LOCAL_RANK=2 is not below LOCAL_WORLD_SIZE=2"),
        ("LOCAL_WORLD_SIZE", "5", "LOCAL_WORLD_SIZE=5 is not at most WORLD_SIZE=4"),
        ("MASTER_ADDR", "", "MASTER_ADDR='' is not a host name"),
        ("MASTER_ADDR", "tcp://n1", "MASTER_ADDR='tcp://n1' is not a host name"),
        ("MASTER_PORT", "", "MASTER_PORT='' is not a whole number"),
        ("MASTER_PORT", "29500x", "MASTER_PORT='29500x' is not a whole number"),
        ("MASTER_PORT", "65536", "MASTER_PORT=65536 is above 65535"),
    ],
)
def test_variables_of_torchrun_that_are_wrong_are_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    set_variables(monkeypatch, TORCHRUN, {name: value})
    with pytest.raises(UsageError, match=f"^{message}"):
        read_launch()


def test_an_ipv6_address_works_for_the_rendezvous(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, SRUN, {"MASTER_ADDR": "fe80::1", "MASTER_PORT": "1234"})
    assert read_launch().address() == ("fe80::1", 1234)


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_JOB_END_TIME"])
def test_an_end_of_the_job_that_cannot_be_read_is_named(commands: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    put(commands, "squeue", "#!/bin/sh\nexit 1\n")
    set_variables(monkeypatch, SRUN, {name: "soon"})
    with pytest.raises(UsageError, match=f"^{name}='soon' is not a whole number"):
        seconds_until_job_end()


def test_the_environment_is_read_in_few_places() -> None:
    """Only `platform` parses a launcher's variables; a lock shows the job's id unchanged."""
    launcher = re.compile(r"""environ(?:\.get\(|\[)\s*["'](?:SLURM_|RANK|WORLD_SIZE|LOCAL_|MASTER_|OMPI_|PMI_)""")
    sources = sorted((ROOT / "megatron_ledom").rglob("*.py"))
    assert [path.name for path in sources if launcher.search(path.read_text(encoding="utf-8"))] == ["locks.py"]


@pytest.mark.parametrize("value", ["", "x", "-1", "1.5"])
@pytest.mark.parametrize("name", ["ID", "COUNT", "MIN", "MAX", "STEP"])
def test_a_variable_of_an_array_that_is_no_number_is_named(name: str, value: str) -> None:
    settings = PreprocessSettings(input=[], tokenizer="", output_prefix="")
    array = {"ID": "1", "COUNT": "3", "MIN": "0", "MAX": "2", "STEP": "1"} | {name: value}
    with pytest.raises(UsageError, match=f"^SLURM_ARRAY_TASK_{name}={value!r} is not a whole number"):
        task_of(settings, {f"SLURM_ARRAY_TASK_{name}": value for name, value in array.items()})


def test_an_array_without_its_count_is_refused() -> None:
    settings = PreprocessSettings(input=[], tokenizer="", output_prefix="")
    with pytest.raises(UsageError, match=r"^SLURM_ARRAY_TASK_COUNT is not set; sbatch --array sets it"):
        task_of(settings, {"SLURM_ARRAY_TASK_ID": "1"})
