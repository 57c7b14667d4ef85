"""A real SLURM on this machine: two virtual nodes, only on the loopback interface, with all files in one folder."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.paths import ROOT

NEEDED = ("sbatch", "srun", "scontrol", "slurmctld", "slurmd", "munged")
SYSTEM_PROGRAMS = "/usr/sbin:/usr/local/sbin"
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={controller_port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{node_port}-{next_port}] CPUs=8 RealMemory=8000 State=UNKNOWN
PartitionName=all Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=urgent Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def reason_against() -> str | None:
    """Return the reason why no SLURM can be started here, or None."""
    path = f"{os.environ['PATH']}:{SYSTEM_PROGRAMS}"
    missing = [name for name in NEEDED if shutil.which(name, path=path) is None]
    if missing:
        return f"no SLURM to start: {', '.join(missing)} not installed (Debian: apt install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "only root can start a SLURM"


class Cluster:
    """A running SLURM cluster; `stop` ends it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        self.environment |= {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": f"{os.environ['PATH']}:{SYSTEM_PROGRAMS}"}
        self.daemons: list[subprocess.Popen[bytes]] = []
        (folder / "state").mkdir(parents=True)
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        ports = _free_ports(3)
        host = socket.gethostname().split(".")[0]
        names = {"controller_port": ports[0], "node_port": ports[1], "next_port": ports[1] + 1}
        (folder / "slurm.conf").write_text(CONFIG.format(host=host, folder=folder, **names))
        files = {name: f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")}
        self._start("munged", "--force", "--foreground", f"--socket={folder}/munge.socket", *files.values())
        self.wait_until(lambda: (folder / "munge.socket").exists())
        self._start("slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            (folder / f"spool.{node}").mkdir()
            self._start("slurmd", "-D", "-N", node)
        self.wait_until(lambda: self.run("sinfo", "--noheader", "--format=%T %D").split() == ["idle", "2"])

    def _start(self, *command: str) -> None:
        log = (self.folder / f"{command[0]}.out").open("ab")
        self.daemons.append(
            subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        )
        log.close()

    def run(self, *command: str, cwd: Path | None = None, **variables: str) -> str:
        """Run a command and return its output. Raises AssertionError with its messages if it fails."""
        environment = {**self.environment, **variables}
        done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False, timeout=180)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, script: Path, *arguments: str, options: list[str], cwd: Path, **variables: str) -> str:
        """Submit a script and return the id of its job."""
        return self.run("sbatch", "--parsable", *options, str(script), *arguments, cwd=cwd, **variables).strip()

    def job(self, job_id: str) -> dict[str, str]:
        """Return the fields that scontrol shows for a job, or for the first element of an array that it still shows."""
        words = self.run("scontrol", "show", "job", "--oneliner", job_id).splitlines()[0].split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def states(self, job_id: str) -> list[str]:
        """Return the state of each element of a job array, or of the job."""
        lines = self.run("scontrol", "show", "job", "--oneliner", job_id).splitlines()
        return [word.removeprefix("JobState=") for line in lines for word in line.split() if word.startswith("JobState=")]

    def wait_until(self, is_so: Callable[[], bool], seconds: float = 120, explain: Callable[[], str] = str) -> None:
        """Wait until `is_so` returns True."""
        end = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < end, f"not within {seconds:g} s: {explain()}\n{self._logs()}"
            time.sleep(0.1)

    def start_again_soon(self, job_id: str, **settings: str) -> None:
        """Wait until a job is back in the queue, then let it start in a few seconds instead of SLURM's two minutes.

        SLURM would confuse a start in the same second with the old one.
        """
        self.wait_until(lambda: self.states(job_id) == ["PENDING"])
        changes = [f"{name}={value}" for name, value in settings.items()]
        self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now+4seconds", *changes)

    def rank_process(self, run_dir: Path, rank: int) -> int:
        """Return the process id of one running rank of a training run: the lowest, since children have higher ones."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                variables = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue  # it has ended
            if f"run_dir={run_dir}".encode() in words and f"SLURM_PROCID={rank}".encode() in variables and b"srun" not in words:
                found.append(int(folder.name))
        return min(found)

    def wait_for_end(self, job_id: str, seconds: float = 120, explain: Callable[[], str] = str) -> None:
        """Wait until no element of a job is waiting or running."""
        running = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"}
        self.wait_until(lambda: not running & set(self.states(job_id)), seconds, explain)

    def end_pretraining(self, job_id: str) -> None:
        """End a job of pretrain.sbatch, and remove its files, which a job of the same number in the next test run would read."""
        if not job_id:
            return
        self.run("scancel", "--quiet", job_id)
        self.wait_for_end(job_id)
        for kind in ("failures", "alerts", "alerts.end"):
            (ROOT / f"ledom-7b-{job_id}.{kind}").unlink(missing_ok=True)

    def _logs(self) -> str:
        tails = [f"{path.name}: {path.read_text(errors='replace')[-1500:]}" for path in sorted(self.folder.glob("*.log"))]
        return "\n".join(tails)

    def stop(self) -> None:
        """End all jobs, their remaining steps, and the daemons."""
        subprocess.run(["scancel", "--user=root"], env=self.environment, check=False, capture_output=True, timeout=30)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(daemon.pid, signal.SIGKILL)
                daemon.wait()


def _free_ports(count: int) -> list[int]:
    """Return ports that are free now, each together with the next number."""
    ports: list[int] = []
    while len(ports) < count:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            ports.append(port)
    return ports
