"""A real SLURM on this machine alone: two virtual nodes, loopback only, everything in one folder."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

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


def why_not() -> str | None:
    """The reason that no SLURM can be started here; None if one can."""
    path = f"{os.environ['PATH']}:{SYSTEM_PROGRAMS}"
    missing = [name for name in NEEDED if shutil.which(name, path=path) is None]
    if missing:
        return f"no SLURM to start: {', '.join(missing)} not installed (Debian: apt install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "a SLURM of its own can only be started by root"


class Cluster:
    """The running cluster; `stop` ends it."""

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
        """What a command prints; AssertionError with its messages if it fails."""
        environment = {**self.environment, **variables}
        done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False, timeout=180)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, script: Path, *arguments: str, options: list[str], cwd: Path, **variables: str) -> str:
        """Submit a script; the job's id."""
        return self.run("sbatch", "--parsable", *options, str(script), *arguments, cwd=cwd, **variables).strip()

    def job(self, job_id: str) -> dict[str, str]:
        """What scontrol says of a job (of an array's first element left in memory)."""
        words = self.run("scontrol", "show", "job", "--oneliner", job_id).splitlines()[0].split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def states(self, job_id: str) -> list[str]:
        """State of each element of a job array, or of the job."""
        lines = self.run("scontrol", "show", "job", "--oneliner", job_id).splitlines()
        return [word.removeprefix("JobState=") for line in lines for word in line.split() if word.startswith("JobState=")]

    def wait_until(self, is_so: Callable[[], bool], seconds: float = 120, explain: Callable[[], str] = str) -> None:
        """Wait for something that the cluster does."""
        end = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < end, f"it does not happen; {explain()}\n{self._logs()}"
            time.sleep(0.1)

    def start_again_soon(self, job_id: str, **settings: str) -> None:
        """Wait until a job is back in the queue, then let it start in a few seconds instead of SLURM's two minutes.

        A start in the same second would be taken for the old one.
        """
        self.wait_until(lambda: self.states(job_id) == ["PENDING"])
        changes = [f"{name}={value}" for name, value in settings.items()]
        self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now+4seconds", *changes)

    def rank_process(self, run_dir: Path, rank: int) -> int:
        """Process id of one running rank of a training run; its own children are younger."""
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

    def _logs(self) -> str:
        tails = [f"{path.name}: {path.read_text(errors='replace')[-1500:]}" for path in sorted(self.folder.glob("*.log"))]
        return "\n".join(tails)

    def stop(self) -> None:
        """End jobs and daemons, steps that are left over too."""
        subprocess.run(["scancel", "--user=root"], env=self.environment, check=False, capture_output=True, timeout=30)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(daemon.pid, signal.SIGKILL)
                daemon.wait()


def _free_ports(count: int) -> list[int]:
    """Free ports; each of them and the next one are free now."""
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
