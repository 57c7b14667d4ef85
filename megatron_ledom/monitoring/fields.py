"""The fields of the status of a run, and the limits of a healthy one."""

from dataclasses import dataclass, field
from typing import Any

from megatron_ledom.monitoring.problems import Problem, ProblemKind, problem
from megatron_ledom.monitoring.state import State

GIB = 2**30


@dataclass(slots=True)
class RunStatus:
    """The status of one run folder. A number that is not known is None; the fields are those of `ledom status --json`."""

    run: str
    """The folder, as it was given."""
    stage: str = ""
    """Place of the run in a stage file, such as `stage 2 of 3 (anneal)`."""
    state: str = State.UNREADABLE
    """A value of `State`."""
    reason: str = ""
    """The reason of the state: the error, the cause of a stop, the last sign of life."""
    is_healthy: bool = False
    """True if none of the problems is serious."""
    problems: list[Problem] = field(default_factory=list)
    """All problems, with that of the state first."""
    read_at: float = 0.0
    """Time of reading, in seconds since 1970."""
    iteration: int | None = None
    """The last finished iteration."""
    train_iters: int | None = None
    consumed_train_tokens: int | None = None
    """At the last record."""
    eta_seconds: float | None = None
    """Seconds of training until the last iteration, without validations and saves; None unless the run is running."""
    lm_loss: float | None = None
    """Mean of the last finite losses."""
    validation: dict[str, float] = field(default_factory=dict)
    """Loss of each set at the last validation."""
    validation_iteration: int | None = None
    tokens_per_second: float | None = None
    """Median of the last records, as all speeds."""
    seconds_per_iteration: float | None = None
    mfu: float | None = None
    global_batch_size: int | None = None
    """Samples of an iteration at present; with a schedule of the batch size from the last record."""
    bad_steps: int | None = None
    """Number of steps of the whole run that were not finite or a spike."""
    recent_bad_steps: int = 0
    """Number of those among the last iterations."""
    last_bad_step: dict[str, Any] | None = None
    checkpoint_iteration: int | None = None
    checkpoint_age_seconds: float | None = None
    slowest_ranks: list[tuple[int, int]] = field(default_factory=list)
    """The ranks that were slowest most often: rank, and number of the last records in which it was."""
    slowest_ratio: float | None = None
    """Median over the last records: step time of the slowest rank in relation to the mean of all ranks."""
    heartbeat_age_seconds: float | None = None
    record_age_seconds: float | None = None
    """Age of the newest file of records."""
    activity: str = ""
    """Activity of rank 0 at the last heartbeat."""
    idle_seconds: float | None = None
    """Seconds without progress of rank 0 at the last heartbeat."""
    host: str = ""
    """Host of rank 0."""
    world_size: int | None = None
    slurm_job_id: str | None = None
    slurm_state: str | None = None
    """None if SLURM does not know the job, does not answer or is not installed."""
    launches: int | None = None
    disk_free_bytes: int | None = None
    disk_needed_bytes: int | None = None
    """Free space below which the disk counts as low."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """Iterations and losses over the whole run, for a plot."""

    def add(self, kind: ProblemKind, text: str) -> None:
        """Add a problem."""
        self.problems.append(problem(kind, text))


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Times and sizes beyond which a run is not healthy."""

    stale_seconds: float = 120.0
    """Age of a heartbeat from which its process counts as gone."""
    stall_seconds: float | None = None
    """Seconds without progress from which a run counts as stalled. Default: half of what its watchdog allows."""
    min_free_disk_gib: float | None = None
    """Free disk space below which a run is not healthy. Default: twice its newest checkpoint."""
    ended_with: int | None = None
    """Exit code of the launch, if it is known to have ended."""
