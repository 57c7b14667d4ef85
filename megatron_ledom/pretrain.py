"""Train a model: `torchrun ... -m megatron_ledom.pretrain --config FILE [section.key=value ...]`.

`srun python -m megatron_ledom.pretrain ...` does the same inside a SLURM job. The same command with the same `run_dir` resumes
from the latest checkpoint. On SIGTERM, SIGUSR1 or SIGUSR2, and shortly before the job's time limit, the run saves after the
current step and exits with 0. Send signals to the ranks, as srun does: torchrun forwards SIGTERM, but kills the ranks after
30 seconds. `errors.py` lists the exit codes; 0 means complete, or saved and ready to resume (`--progress` shows which).
"""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megatron_ledom.callbacks.task_files import check_tasks
from megatron_ledom.checkpoint.folder import latest_checkpoint, own_checkpoints, saved_iteration, settle_latest
from megatron_ledom.config.checks import check_config
from megatron_ledom.config.derived import checkpoint_folder, expected_world_size
from megatron_ledom.config.load import load_config
from megatron_ledom.config.options import add_config
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.errors import LASTING, UNFORESEEN, LedomError, MismatchError, StoppedWaiting, run_command
from megatron_ledom.mirror.store import check_address
from megatron_ledom.platform.launch import Launch, read_launch
from megatron_ledom.platform.quiet import quiet_libraries
from megatron_ledom.training.held_out import check_held_out
from megatron_ledom.training.resilience import StopRequest, find_deadline
from megatron_ledom.training.stages import (
    Stage,
    check_stages,
    current_stage,
    load_stages,
    only_stage,
    progress,
    replace_process,
    stage_before,
    take_place,
)

if TYPE_CHECKING:
    from megatron_ledom.data.blends.sources import Sources
    from megatron_ledom.planning.verdicts import DiskNeed
    from megatron_ledom.tokenizers.corpus_tokenizer import Tokenizer
    from megatron_ledom.training.callback import Callback
    from megatron_ledom.training.held_out import TaskHashes
    from megatron_ledom.training.origin import Origin

log = logging.getLogger("megatron_ledom.pretrain")

ALONE_SECONDS = 45
"""Longest time that the first rank of several works alone: srun ends it a minute after the others have ended."""
COMPLETE = "nothing is left to do; raise train.train_iters to train longer"


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line, without importing torch."""
    parser = argparse.ArgumentParser(
        prog=prog or "python -m megatron_ledom.pretrain",
        description="Train a reverse (or forward) language model from indexed shards.",
        epilog="Example: torchrun --nproc-per-node 8 -m megatron_ledom.pretrain --config ledom_7b train.seed=1. --dry-run prints every key with"
        " its value; docs/reference/config.md describes them.",
    )
    add_config(parser, or_stages=True)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print the resolved config and every derived number, and stop")
    what.add_argument(
        "--check",
        type=int,
        metavar="RANKS",
        help="check config, shards, tokenizer and run folder for a start on RANKS ranks, and stop; use it before requesting nodes",
    )
    parser.add_argument(
        "--accept-plan",
        action="store_true",
        help="with --check or --dry-run: exit with 0 even if memory or disk space is too small",
    )
    what.add_argument(
        "--progress", action="store_true", help="print the saved iteration and the last one of the run, `18000 51900`, and stop"
    )
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None, *, callbacks: "Sequence[Callback]" = ()) -> int:
    """Train, or describe the run, according to the command line. Returns the exit code.

    callbacks: called after those of the config, at each moment.
    """
    arguments = build_parser(prog).parse_args(argv)
    if arguments.stages is None:
        stages = only_stage(load_config(arguments.config, arguments.overrides))
    else:
        stages = load_stages(arguments.stages, arguments.overrides)
    for stage in stages:
        check_address(stage.config)
    if arguments.dry_run:
        print_dry_run(stages, accept_plan=arguments.accept_plan)
    elif arguments.check is not None:
        print(check_start_of_stages(stages, arguments.check, accept_plan=arguments.accept_plan))
    elif arguments.progress:
        print(*progress(stages))
    else:
        return train_stages(stages, callbacks)
    return 0


def train_stages(stages: Sequence[Stage], callbacks: "Sequence[Callback]" = ()) -> int:
    """Train the current stage and, in a new process, the next one. Returns the exit code."""
    stop = StopRequest()  # first, because importing torch takes seconds
    launch, place = read_launch(), take_place()
    start_logging(launch.rank)
    check_stages(stages, launch.world_size)
    stage = stages[place.stage - 1] if place.stage is not None else current_stage(stages) or stages[-1]
    if stage.count > 1:
        log.info("%s, run_dir=%s", stage.title, stage.config.run_dir)
        refuse_to_begin_again(stage, stages)
    here = replace(launch, port_offset=place.replacements)  # the port of the process before may not be free yet
    code, is_over = run_to_exit_code(stage.config, here, stop, callbacks, place.since)
    if is_over and stage.number < stage.count:
        replace_process(stages[stage.number], place.since, place.replacements + 1, stop)
    return code


def refuse_to_begin_again(stage: Stage, stages: Sequence[Stage]) -> None:
    """Raise MismatchError if a stage would begin although a later one has copies at its mirror: the run folders here are lost."""
    from megatron_ledom.mirror.fetching import candidates_of
    from megatron_ledom.mirror.store import MirrorStore, address_of

    def copies(one: Stage) -> list[str]:
        """Return the names of the whole copies of a stage."""
        return [] if one.config.checkpoint.mirror is None else candidates_of(MirrorStore(address_of(one.config)))

    later = stages[stage.number :]
    if latest_checkpoint(checkpoint_folder(stage.config)) is not None or all(
        one.config.checkpoint.mirror is None for one in later
    ):
        return
    found = next((one for one in reversed(later) if copies(one)), None)
    if found is not None and not copies(stage):
        raise MismatchError(
            f"{stage.title} has no checkpoint in {stage.config.run_dir} and would begin again, but {found.title} has copies at"
            f" {found.config.checkpoint.mirror}: train the config of that stage once by itself (--config), which fetches the newest copy, and"
            " start this command again; or set other mirrors for new runs"
        )


def run_to_exit_code(
    config: RunConfig, launch: Launch, stop: StopRequest, callbacks: "Sequence[Callback]" = (), since: float | None = None
) -> tuple[int, bool]:
    """Train and return 0, or UNFORESEEN after an error that is not a user's mistake, and the result of `run`."""
    try:
        return 0, run(config, launch, stop, callbacks, since)
    except StoppedWaiting as reason:
        log.warning("%s", reason)  # another start resumes from the same iteration
    except (LedomError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        if isinstance(error, OSError) and error.errno in LASTING:
            raise  # `run_command` names the file
        log.exception("rank %d failed", launch.rank)
        return UNFORESEEN, False
    return 0, False


@dataclass(frozen=True, slots=True)
class CheckedStart:
    """A start whose config, data and checkpoint are checked. started: time.monotonic() at the start of the launch."""

    config: RunConfig
    launch: Launch
    stop: StopRequest
    started: float
    sources: "Sources"
    tokenizer: "Tokenizer | None"
    task_hashes: "TaskHashes"
    checkpoint: str | None
    origin: "Origin | None"


def run(
    config: RunConfig, launch: Launch, stop: StopRequest, callbacks: "Sequence[Callback]" = (), since: float | None = None
) -> bool:
    """Train one run in this process, as one of the launched ranks: check, lock the run folder, build, train.

    since: start of the launch, as time.monotonic(). Returns True if the last iteration is saved and no rank is to stop; the same
    on every rank.
    """
    from megatron_ledom.data.blends.sources import load_run_tokenizer, load_sources
    from megatron_ledom.training.origin import find_origin
    from megatron_ledom.training.preflight import check_environment, is_complete
    from megatron_ledom.training.watched_launch import report_complete

    started = time.monotonic() if since is None else since
    checkpoint = latest_checkpoint(checkpoint_folder(config))
    check_environment(config)  # every cheap check before torch starts anything
    sources = load_sources(config)
    tokenizer = load_run_tokenizer(config, sources)
    task_hashes = check_tasks(config, tokenizer is not None)
    config, checkpoint = run_to_resume(config, checkpoint, launch, stop)
    origin = find_origin(config, sources.provenance, checkpoint)
    if is_complete(config, sources, checkpoint):
        log.info("run_dir=%s is complete at iteration %d: %s", config.run_dir, config.train.train_iters, COMPLETE)
        report_complete(config, launch)
        copy_the_rest(config, launch)
        return True
    check_teacher(config, sources)
    return train_run(
        CheckedStart(config, launch, stop, started, sources, tokenizer, task_hashes, checkpoint, origin), callbacks
    )


def check_teacher(config: RunConfig, sources: "Sources") -> None:
    """Refuse a `train.auxiliary.teacher` that does not fit the data of the run, before anything is built."""
    if config.train.auxiliary.kind is not None:
        from megatron_ledom.reverse_teacher import find_teacher  # imports torch

        find_teacher(config, sources.provenance)


def train_run(start: CheckedStart, callbacks: "Sequence[Callback]" = ()) -> bool:
    """Build and train a run whose config, data and checkpoint are checked. Returns as `run`."""
    from megatron_ledom.callbacks.build import build_callbacks
    from megatron_ledom.callbacks.mirroring import Mirroring
    from megatron_ledom.data.blends.sources import describe_blend
    from megatron_ledom.data.dataset.blend_samples import index_cache
    from megatron_ledom.data.dataset.sample_index import prepare_indices
    from megatron_ledom.model.layer_specs import choose_layers
    from megatron_ledom.ops.library import describe as describe_ops
    from megatron_ledom.parallel.collectives import from_first_rank
    from megatron_ledom.parallel.groups import start_distributed, stop_distributed
    from megatron_ledom.platform.device import prepare_platform
    from megatron_ledom.training.history import write_launch
    from megatron_ledom.training.origin import write_chain
    from megatron_ledom.training.run_folder import lock_run, write_start
    from megatron_ledom.training.state import build_state, check_resumable
    from megatron_ledom.training.trainer import train
    from megatron_ledom.training.watched_launch import end_launch, watched

    config, launch, stop, checkpoint = start.config, start.launch, start.stop, start.checkpoint
    platform = prepare_platform(config.train.num_threads, launch)
    choice = choose_layers(config)
    sources, changed = check_resumable(config, start.sources, checkpoint, start.origin)
    log.info("platform: %s; layers: %s (%s)", platform.describe(), choice.implementation, choice.reason)
    log.info("%s", describe_ops(platform.device, choice.implementation))
    log.info("training data\n%s", describe_blend(config, sources))
    with stop.exiting_at_once():  # no collective waits for the index: there is no process group yet
        prepare_indices(config, sources, index_cache(config), launch)

    def take_run_folder() -> None:
        """Lock and check the run folder on rank 0; an error here ends all ranks."""
        stop.deadline = find_deadline(config.train, start.started)
        resources.enter_context(lock_run(config.run_dir))
        check_run_folder(config, checkpoint)
        check_held_out(config, sources, start.task_hashes, is_new=checkpoint is None)
        write_chain(config, start.origin)
        write_start(config, start.tokenizer, changed)
        write_launch(config, launch, saved_iteration(checkpoint_folder(config)), checkpoint)

    groups = start_distributed(platform, config.parallel, launch, stop.name)
    try:
        with ExitStack() as resources:
            from_first_rank(take_run_folder)
            watchdog, report = resources.enter_context(watched(config, launch))
            state = build_state(config, sources, platform, groups, choice, checkpoint, start.origin)
            own = [*build_callbacks(state, watchdog, start.task_hashes), Mirroring(config, stop, resources)]
            train(state, stop, [*own, *callbacks])
            is_saved = from_first_rank(lambda: saved_iteration(checkpoint_folder(config)) == config.train.train_iters)
            is_over = is_saved and not stop.agreed(platform.device, 0.0)
            end_launch(watchdog, report, state.iteration, stop)
            return is_over
    finally:
        stop_distributed()


def run_to_resume(config: RunConfig, checkpoint: str | None, launch: Launch, stop: StopRequest) -> tuple[RunConfig, str | None]:
    """Return the config, with what the run folder recorded, and the checkpoint: the given one, or one from checkpoint.mirror.

    Call it on every rank. The first one fetches, the others wait; no collective does, as there is no process group yet.
    """
    from megatron_ledom.mirror.fetching import fetch_newest, wait_for_fetch
    from megatron_ledom.training.run_folder import as_recorded, lock_run

    if checkpoint is None and config.checkpoint.mirror is not None:
        with stop.exiting_at_once(), ExitStack() as resources:
            if launch.rank == 0:
                resources.enter_context(lock_run(config.run_dir))
                fetch_newest(config)
            else:
                wait_for_fetch(config)
        checkpoint = latest_checkpoint(checkpoint_folder(config))
    return as_recorded(config), checkpoint


def check_run_folder(config: RunConfig, checkpoint: str | None) -> None:
    """Refuse a run folder or a mirror that do not fit the checkpoint. Call it on the first rank, with the lock of the run."""
    from megatron_ledom.mirror.contents import check_mirror
    from megatron_ledom.training.history import check_history
    from megatron_ledom.training.origin import first_iteration
    from megatron_ledom.training.run_folder import check_still_latest, warn_of_later_checkpoints

    settle_latest(checkpoint_folder(config))
    check_still_latest(config, checkpoint)
    check_history(config, checkpoint, first_iteration(config))
    warn_of_later_checkpoints(config, checkpoint)
    check_mirror(config, may_adopt=checkpoint is None)


def copy_the_rest(config: RunConfig, launch: Launch) -> None:
    """Copy the checkpoints of a complete run that checkpoint.mirror lacks; wait for it as the end of a run does."""
    if config.checkpoint.mirror is None or launch.rank != 0:
        return
    from megatron_ledom.mirror.contents import Claim, check_mirror
    from megatron_ledom.mirror.uploader import Uploader
    from megatron_ledom.training.run_folder import lock_run

    with lock_run(config.run_dir):
        check_mirror(config, may_adopt=False)
        with Uploader(config, Claim.of(config)) as uploader:
            last = saved_iteration(checkpoint_folder(config))  # later ones are of a run that was set back
            uploader.add(iteration for iteration in own_checkpoints(checkpoint_folder(config)) if iteration <= last)
            most = config.checkpoint.mirror_wait_seconds
            uploader.finish(lambda: most if launch.world_size == 1 else min(most, ALONE_SECONDS))


def start_logging(rank: int) -> None:
    """Log to stderr with the rank in each line; ranks other than 0 log only warnings and errors.

    A library that logs while it is imported, as Muon's does, leaves a handler of logging's default format; basicConfig would then
    do nothing.
    """
    for handler in list(logging.root.handlers):
        default = getattr(handler.formatter, "_fmt", None) == logging.BASIC_FORMAT
        if type(handler) is logging.StreamHandler and default:
            logging.root.removeHandler(handler)
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"%(asctime)s [rank {rank}] %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    if rank != 0:
        logging.getLogger("megatron_ledom.training.origin").setLevel(
            logging.ERROR
        )  # every rank finds the same about the origin
    quiet_libraries()  # a line of the log lists the installed versions


def print_dry_run(stages: Sequence[Stage], *, accept_plan: bool) -> None:
    """Print the resolved config and every derived number of each stage. Raises PlanError, as `refuse`, after all of them."""
    from megatron_ledom.planning.dry_run import dry_run, of_another_machine
    from megatron_ledom.planning.verdicts import refuse, shared_disk_verdicts

    verdicts, needs = [], []
    for stage in stages:
        described = dry_run(stage.config, expected_world_size(stage.config), stage.number)
        verdicts += described.verdicts
        needs += described.needs
        print((f"# {stage.title}\n" if stage.count > 1 else "") + described.text, flush=True)
    if len(stages) > 1:
        print(
            "".join(f"# all stages: {of_another_machine(verdict).line()}\n" for verdict in shared_disk_verdicts(needs)), end=""
        )
    check_stages(stages, expected_world_size(stages[0].config))
    refuse(verdicts, accepted=accept_plan)


def check_start_of_stages(stages: Sequence[Stage], num_ranks: int, *, accept_plan: bool = False) -> str:
    """Check the start of each stage, as `check_start`. Returns its lines, each part under the title of its stage."""
    from megatron_ledom.planning.verdicts import refuse, shared_disk_verdicts

    check_stages(stages, num_ranks)
    if len(stages) == 1:
        return check_start(stages[0].config, num_ranks, accept_plan=accept_plan)
    current = current_stage(stages)
    lines: list[str] = []
    needs: list[DiskNeed] = []
    for stage in stages:
        is_later = current is not None and stage.number > current.number
        is_past = current is None or stage.number < current.number
        lines.append(f"{stage.title}: {'complete' if is_past else 'to come' if is_later else 'next'}")
        if not is_past:
            before = stage_before(stage, stages)
            comes_later = is_later and before is not None
            lines.append(
                check_start(
                    stage.config, num_ranks, accept_plan=accept_plan, stage=stage.number, is_later=comes_later, needs=needs
                )
            )
            if before is not None:
                check_same_data_kind(before, stage)
    together = shared_disk_verdicts(needs)
    refuse(together, accepted=accept_plan)
    return "\n".join([*lines, *(f"all stages: {verdict.line()}" for verdict in together)])


def check_same_data_kind(before: Stage, stage: Stage) -> None:
    """Raise MismatchError if a stage has shards of another tokenizer or direction than the stage from which it starts."""
    from megatron_ledom.data.blends.sources import load_sources

    earlier, own = load_sources(before.config).provenance, load_sources(stage.config).provenance
    earlier.check_same(own, f"the data of {before.title}", f"that of {stage.title}")


def check_start(
    config: RunConfig,
    num_ranks: int,
    *,
    accept_plan: bool = False,
    stage: int = 1,
    is_later: bool = False,
    needs: "list[DiskNeed] | None" = None,
) -> str:
    """Check a start on `num_ranks` ranks, without a GPU. Returns a line about the start and one for each verdict.

    is_later: the checkpoint to start from does not exist yet. needs: gets the disk space that this run, of that number of a stage, needs.
    Raises PlanError if memory or disk space is too small, unless `accept_plan` is set.
    """
    from megatron_ledom.data.blends.sources import load_run_tokenizer, load_sources
    from megatron_ledom.planning.verdicts import (
        disk_needs,
        disk_verdict,
        memory_verdict,
        plan_of_config,
        refuse,
        shared_disk_verdicts,
    )
    from megatron_ledom.training.history import check_history
    from megatron_ledom.training.origin import find_origin, first_iteration
    from megatron_ledom.training.preflight import check_environment, is_complete
    from megatron_ledom.training.run_folder import as_recorded

    check_config(config, num_ranks)
    check_environment(config)
    config = as_recorded(config)
    sources = load_sources(config)
    check_tasks(config, load_run_tokenizer(config, sources) is not None)
    checkpoint = latest_checkpoint(checkpoint_folder(config))
    check_history(config, checkpoint, first_iteration(config))
    origin = None if is_later else find_origin(config, sources.provenance, checkpoint)
    if is_complete(config, sources, checkpoint):
        return f"the run is complete at iteration {config.train.train_iters}: {COMPLETE}"
    check_teacher(config, sources)
    iteration = saved_iteration(checkpoint_folder(config))
    if iteration > 0 or origin is not None:
        from megatron_ledom.training.state import check_resumable

        check_resumable(config, sources, checkpoint, origin)
    model = replace(config.model, vocab_size=sources.provenance.vocab_size)
    own = disk_needs(config, model, stage)
    verdicts = [memory_verdict(config, plan_of_config(config, num_ranks, model)), disk_verdict(config, model)]
    verdicts += shared_disk_verdicts(own)
    if needs is not None:
        needs += own
    refuse(verdicts, accepted=accept_plan)
    start = f"{num_ranks} ranks would start from iteration {iteration} of {config.train.train_iters}"
    if origin is not None:
        begin = origin.manifest.iteration if origin.state == "all" else 0
        start = f"{num_ranks} ranks would start at iteration {begin} of {config.train.train_iters} with {origin.describe()}"
    if checkpoint is None and config.checkpoint.mirror is not None:
        start += f", or from the newest checkpoint in {config.checkpoint.mirror}, which the start asks"
    return "\n".join([start, *(verdict.line() for verdict in verdicts)])


if __name__ == "__main__":
    run_command(main)
