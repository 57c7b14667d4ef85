"""Check that every parallel layout trains the model that one process trains. Over NCCL: not yet run on hardware."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_ledom.hardware_check.check import Outcome, Setting, failed, passed, skipped
from megatron_ledom.hardware_check.curves import Difference, Record, compare_each, largest, numbers_of
from megatron_ledom.hardware_check.training_runs import NO_TIME, STEPS, TrainingRuns, own_layers

TOLERANCE = Difference(loss=1e-5, grad_norm=1e-4)
"""Relative tolerances in fp32 for ten steps: other layouts add in another order."""
ONE_PROCESS = "one process"
DISTRIBUTED = (
    "use_distributed_optimizer=true",
    "overlap_grad_reduce=true",
    "overlap_param_gather=true",
    "bucket_size=20000",  # several buckets, so that there is something to overlap
)


@dataclass(frozen=True, slots=True)
class Layout:
    """A layout and the number of its ranks."""

    num_ranks: int
    settings: tuple[str, ...]
    """Overrides of the section `parallel`."""
    on_cpu: bool = True
    """False: only on GPUs, because on a CPU each process takes seconds to start, and two ranks cover its code."""
    micro_batch_size: int = 4

    def overrides(self) -> list[str]:
        """Return the overrides of a run."""
        return [f"train.micro_batch_size={self.micro_batch_size}", *(f"parallel.{setting}" for setting in self.settings)]


def _sizes(*, tp: int = 1, pp: int = 1, cp: int = 1) -> tuple[str, ...]:
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "context_parallel_size": cp}
    return tuple(f"{name}={size}" for name, size in sizes.items() if size > 1)


SP = "sequence_parallel=true"
VPP = "virtual_pipeline_model_parallel_size=2"
LAYOUTS = {
    "TP2": Layout(2, _sizes(tp=2)),
    "DP2 distributed optimizer": Layout(2, DISTRIBUTED),
    "PP2": Layout(2, _sizes(pp=2)),
    "TP2 SP": Layout(2, (*_sizes(tp=2), SP)),
    "CP2": Layout(2, _sizes(cp=2)),
    "PP2 VPP2": Layout(2, (*_sizes(pp=2), VPP)),
    "TP2 PP2": Layout(4, _sizes(tp=2, pp=2), on_cpu=False),
    "TP2 DP2": Layout(4, (*_sizes(tp=2), SP, *DISTRIBUTED), on_cpu=False),
    "PP4": Layout(4, _sizes(pp=4), on_cpu=False),
    "TP2 PP2 DP2": Layout(8, (*_sizes(tp=2, pp=2), SP, *DISTRIBUTED), on_cpu=False),
    "TP8 SP": Layout(8, (*_sizes(tp=8), SP), on_cpu=False),
    "DP8 distributed optimizer": Layout(8, DISTRIBUTED, on_cpu=False, micro_batch_size=2),
    "CP2 TP2 PP2": Layout(8, _sizes(tp=2, pp=2, cp=2), on_cpu=False),
}
"""Layouts by name, the most important ones first in each number of ranks."""


def check_layouts(setting: Setting) -> Outcome:
    """Train one process and then the layouts that the machine has ranks for, until the time is over; compare every step."""
    chosen, left = choose(setting)
    if not chosen:
        return skipped(f"layouts need 2 ranks or more, this machine has {setting.num_gpus}", skipped_layouts=left)
    runs = TrainingRuns(setting, [own_layers(setting.device)])
    runs.prepare(1)
    prepare_layouts(runs, chosen)
    expected = runs.train({ONE_PROCESS: []})[ONE_PROCESS]
    found, failures = train_layouts(runs, chosen)
    left |= unfinished(chosen, found, failures)
    return report(found, expected, failures, left, "nccl" if setting.device == "cuda" else "gloo")


def choose(setting: Setting, names: Collection[str] = LAYOUTS) -> tuple[dict[str, Layout], dict[str, str]]:
    """Return the layouts among `names` that can run here, and the reason for each of the others."""
    chosen, left = {}, {}
    for name in names:
        layout = LAYOUTS[name]
        if layout.num_ranks > setting.num_gpus:
            left[name] = f"needs {layout.num_ranks} ranks, there are {setting.num_gpus}"
        elif setting.device == "cpu" and not layout.on_cpu:
            left[name] = "only on GPUs, to save time on a CPU"
        else:
            chosen[name] = layout
    return chosen, left


def launches_of(chosen: Mapping[str, Layout]) -> list[int]:
    """Return the numbers of ranks in the order of the launches: the smallest, the largest, and then those between.

    Layouts of all GPUs say more than those of half of them, so the latter come last, in case the time is short.
    """
    sizes = sorted({layout.num_ranks for layout in chosen.values()})
    return sizes[:1] + sizes[:0:-1]


def prepare_layouts(runs: TrainingRuns, chosen: Mapping[str, Layout]) -> None:
    """Start the processes for some layouts."""
    for num_ranks in launches_of(chosen):
        runs.prepare(num_ranks)


def train_layouts(
    runs: TrainingRuns, chosen: Mapping[str, Layout], settings: Sequence[str] = ()
) -> tuple[dict[str, list[Record]], dict[str, str]]:
    """Train layouts, with further settings, until the time is over; return the records and the failures by name."""
    found: dict[str, list[Record]] = {}
    failures: dict[str, str] = {}
    for num_ranks in launches_of(chosen):
        same = {name: [*settings, *layout.overrides()] for name, layout in chosen.items() if layout.num_ranks == num_ranks}
        records, failed_runs = runs.try_each(same, num_ranks)
        found |= records
        failures |= failed_runs
    return found, failures


def unfinished(names: Iterable[str], found: Collection[str], failures: Collection[str]) -> dict[str, str]:
    """Return the reason for each run that neither ended nor failed."""
    return {name: NO_TIME for name in names if name not in found and name not in failures}


def without_time(left: Mapping[str, str]) -> str:
    """Return the end of a sentence that names the runs without time, or nothing."""
    late = [name for name, reason in left.items() if reason == NO_TIME]
    return f"; without time for {', '.join(late)}" if late else ""


def report(
    found: Mapping[str, Sequence[Record]],
    expected: Sequence[Record],
    failures: Mapping[str, str],
    left: Mapping[str, str],
    backend: str,
) -> Outcome:
    """Return the outcome: failed if a layout failed or differs, or if none was compared."""
    differences, problems = compare_each(found, expected, TOLERANCE)
    problems += [f"{name} {failure}" for name, failure in failures.items()]
    numbers = {"backend": backend, "layouts": numbers_of(differences), "skipped_layouts": dict(left)}
    if problems:
        return failed(f"{len(problems)} of {len(found) + len(failures)} layouts failed: {'; '.join(problems)}", **numbers)
    if not found:
        return failed(f"no layout ended within the time limit; allow more time{without_time(left)}", **numbers)
    worst = largest(differences.values()).sentence(TOLERANCE)
    subject = f"{len(found)} layouts over {backend} against one process, {STEPS} steps in fp32"
    return passed(f"{subject}: {worst}{without_time(left)}", **numbers)
