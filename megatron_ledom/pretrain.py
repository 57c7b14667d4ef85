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
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_ledom.callbacks.task_files import check_tasks
from megatron_ledom.checkpoint.folder import latest_checkpoint, saved_iteration, settle_latest
from megatron_ledom.config.checks import check_config
from megatron_ledom.config.derived import checkpoint_folder, expected_world_size
from megatron_ledom.config.load import load_config
from megatron_ledom.config.options import add_config
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.errors import LASTING, UNFORESEEN, LedomError, StoppedWaiting, run_command
from megatron_ledom.platform.launch import Launch, read_launch
from megatron_ledom.platform.quiet import quiet_libraries
from megatron_ledom.training.held_out import check_held_out
from megatron_ledom.training.resilience import StopRequest, find_deadline

if TYPE_CHECKING:
    from megatron_ledom.training.callback import Callback

log = logging.getLogger("megatron_ledom.pretrain")

COMPLETE = "nothing is left to do; raise train.train_iters to train longer"


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line, without importing torch."""
    parser = argparse.ArgumentParser(
        prog=prog or "python -m megatron_ledom.pretrain",
        description="Train a reverse (or forward) language model from indexed shards.",
        epilog="Example: torchrun --nproc-per-node 8 -m megatron_ledom.pretrain --config ledom_7b train.seed=1. --dry-run prints every key with"
        " its value; docs/reference/config.md describes them.",
    )
    add_config(parser)
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
    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        from megatron_ledom.planning.dry_run import dry_run
        from megatron_ledom.planning.verdicts import refuse

        described = dry_run(config, expected_world_size(config))
        print(described.text, flush=True)
        refuse(described.verdicts, accepted=arguments.accept_plan)
    elif arguments.check is not None:
        print(check_start(config, arguments.check, accept_plan=arguments.accept_plan))
    elif arguments.progress:
        print(saved_iteration(checkpoint_folder(config)), config.train.train_iters)
    else:
        stop = StopRequest()  # first, because importing torch takes seconds
        launch = read_launch()
        check_config(config, launch.world_size)
        return run_to_exit_code(config, launch, stop, callbacks)
    return 0


def run_to_exit_code(config: RunConfig, launch: Launch, stop: StopRequest, callbacks: "Sequence[Callback]" = ()) -> int:
    """Train and return 0, or UNFORESEEN after an error that is not a user's mistake."""
    try:
        run(config, launch, stop, callbacks)
    except StoppedWaiting as reason:
        log.warning("%s", reason)  # another start resumes from the same iteration
    except (LedomError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        if isinstance(error, OSError) and error.errno in LASTING:
            raise  # `run_command` names the file
        log.exception("rank %d failed", launch.rank)
        return UNFORESEEN
    return 0


def run(config: RunConfig, launch: Launch, stop: StopRequest, callbacks: "Sequence[Callback]" = ()) -> None:
    """Train one run in this process, as one of the launched ranks: check, lock the run folder, build, train."""
    start_logging(launch.rank)
    from megatron_ledom.data.blends.sources import describe_blend, load_run_tokenizer, load_sources
    from megatron_ledom.training.preflight import check_environment, is_complete
    from megatron_ledom.training.run_folder import check_still_latest, lock_run, warn_of_later_checkpoints, write_start

    started, checkpoint = time.monotonic(), latest_checkpoint(checkpoint_folder(config))
    check_environment(config)  # every cheap check before torch starts anything
    sources = load_sources(config)
    tokenizer = load_run_tokenizer(config, sources)
    task_hashes = check_tasks(config, tokenizer is not None)
    if is_complete(config, sources, checkpoint):
        log.info("run_dir=%s is complete at iteration %d: %s", config.run_dir, config.train.train_iters, COMPLETE)
        return
    from megatron_ledom.callbacks.build import build_callbacks
    from megatron_ledom.data.dataset.blend_samples import index_cache
    from megatron_ledom.data.dataset.sample_index import prepare_indices
    from megatron_ledom.model.layer_specs import choose_layers
    from megatron_ledom.ops.library import describe as describe_ops
    from megatron_ledom.parallel.collectives import from_first_rank
    from megatron_ledom.parallel.groups import start_distributed, stop_distributed
    from megatron_ledom.platform.device import prepare_platform
    from megatron_ledom.training.history import check_history, write_launch
    from megatron_ledom.training.state import build_state, check_resumable
    from megatron_ledom.training.trainer import train
    from megatron_ledom.training.watched_launch import end_launch, watched

    platform = prepare_platform(config.train.num_threads, launch)
    choice = choose_layers(config)
    sources, changed = check_resumable(config, sources, checkpoint)
    log.info("platform: %s; layers: %s (%s)", platform.describe(), choice.implementation, choice.reason)
    log.info("%s", describe_ops(platform.device, choice.implementation))
    log.info("training data\n%s", describe_blend(config, sources))
    with stop.exiting_at_once():  # no collective waits for the index: there is no process group yet
        prepare_indices(config, sources, index_cache(config), launch)

    def take_run_folder() -> None:
        """Lock and check the run folder on rank 0; an error here ends all ranks."""
        stop.deadline = find_deadline(config.train, started)
        resources.enter_context(lock_run(config.run_dir))
        settle_latest(checkpoint_folder(config))
        check_still_latest(config, checkpoint)
        check_history(config, checkpoint)
        warn_of_later_checkpoints(config, checkpoint)
        check_held_out(config, sources, task_hashes, is_new=checkpoint is None)
        write_start(config, tokenizer, changed)
        write_launch(config, launch, saved_iteration(checkpoint_folder(config)), checkpoint)

    groups = start_distributed(platform, config.parallel, launch, stop.name)
    try:
        with ExitStack() as resources:
            from_first_rank(take_run_folder)
            watchdog, report = resources.enter_context(watched(config, launch))
            state = build_state(config, sources, platform, groups, choice, checkpoint)
            train(state, stop, [*build_callbacks(state, watchdog, task_hashes), *callbacks])
            end_launch(watchdog, report, state.iteration, stop)
    finally:
        stop_distributed()


def start_logging(rank: int) -> None:
    """Log to stderr with the rank in each line; ranks other than 0 log only warnings and errors."""
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"%(asctime)s [rank {rank}] %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    quiet_libraries()  # a line of the log lists the installed versions


def check_start(config: RunConfig, num_ranks: int, *, accept_plan: bool = False) -> str:
    """Check a start on `num_ranks` ranks, without a GPU. Returns a line about the start and one for each verdict.

    Raises PlanError if memory or disk space is too small, unless `accept_plan` is set.
    """
    from megatron_ledom.data.blends.sources import load_run_tokenizer, load_sources
    from megatron_ledom.planning.verdicts import disk_verdict, memory_verdict, plan_of_config, refuse
    from megatron_ledom.training.history import check_history
    from megatron_ledom.training.preflight import check_environment, is_complete

    check_config(config, num_ranks)
    check_environment(config)
    sources = load_sources(config)
    check_tasks(config, load_run_tokenizer(config, sources) is not None)
    checkpoint = latest_checkpoint(checkpoint_folder(config))
    check_history(config, checkpoint)
    if is_complete(config, sources, checkpoint):
        return f"the run is complete at iteration {config.train.train_iters}: {COMPLETE}"
    iteration = saved_iteration(checkpoint_folder(config))
    if iteration > 0:
        from megatron_ledom.training.state import check_resumable

        check_resumable(config, sources, checkpoint)
    model = replace(config.model, vocab_size=sources.provenance.vocab_size)
    verdicts = [memory_verdict(config, plan_of_config(config, num_ranks, model)), disk_verdict(config, model)]
    refuse(verdicts, accepted=accept_plan)
    start = f"{num_ranks} ranks would start from iteration {iteration} of {config.train.train_iters}"
    return "\n".join([start, *(verdict.line() for verdict in verdicts)])


if __name__ == "__main__":
    run_command(main)
