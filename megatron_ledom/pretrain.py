"""Training: `torchrun ... -m megatron_ledom.pretrain --config FILE [section.key=value ...]`.

The same command on the same `run_dir` goes on where the last one stopped. SIGTERM or SIGUSR1 saves at the next step
boundary and exits with 0. Send it to the ranks, as srun does: torchrun passes SIGTERM on, but kills them after 30 seconds.
"""

import argparse
import importlib.util
import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING

from megatron_ledom.config.checks import check_config
from megatron_ledom.config.derived import planned_world_size
from megatron_ledom.config.load import load_config, save_config
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.errors import ConfigError, UsageError, run_command

if TYPE_CHECKING:
    from megatron_ledom.data.tokenizer import Tokenizer

log = logging.getLogger("megatron_ledom.pretrain")


def parse_arguments() -> argparse.Namespace:
    """The command line; torch is not imported yet."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_ledom.pretrain",
        description="Train a reverse (or forward) language model from indexed shards.",
        epilog="Example: torchrun --nproc-per-node 8 -m megatron_ledom.pretrain --config examples/configs/ledom_7b.yaml train.seed=1",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML of the run; see examples/configs")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and every derived number, and stop")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a key of the config")
    return parser.parse_args()


def main() -> None:
    """Parse, check, then train or describe."""
    arguments = parse_arguments()
    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        from megatron_ledom.training.dry_run import describe_run

        print(describe_run(config, planned_world_size(config)))
        return
    check_config(config, int(os.environ.get("WORLD_SIZE", "1")))
    run(config)


def run(config: RunConfig) -> None:
    """Train one run in this process, as one of the launched ranks."""
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"%(asctime)s [rank {rank}] %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    logging.getLogger("megatron").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"megatron\.core")  # what is installed is said in one line below
    from megatron_ledom.data.sources import load_run_tokenizer, load_sources

    sources = load_sources(config)  # every cheap check before torch starts anything
    tokenizer = load_run_tokenizer(config, sources)
    if config.logging.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise UsageError("logging.wandb_project is set but wandb is not installed: pip install 'megatron-ledom[wandb]'")
    from megatron_ledom.model.layer_specs import choose_layers
    from megatron_ledom.parallel.groups import start_distributed, stop_distributed
    from megatron_ledom.platform.device import prepare_platform
    from megatron_ledom.training.launch_record import write_launch
    from megatron_ledom.training.loop import train
    from megatron_ledom.training.resilience import StopRequest
    from megatron_ledom.training.state import build_state, check_resumable
    from megatron_ledom.training.watchdog import Watchdog

    stop = StopRequest()
    platform = prepare_platform(config.train.num_threads)
    choice = choose_layers(config)
    check_resumable(config, sources)
    log.info("platform: %s; layers: %s (%s)", platform.describe(), choice.implementation, choice.reason)
    if rank == 0:
        prepare_run_folder(config, tokenizer)
        write_launch(config.run_dir)
    groups = start_distributed(platform, config.parallel)
    try:
        with Watchdog(config) as watchdog:
            train(build_state(config, sources, platform, groups, choice), stop, watchdog)
    finally:
        stop_distributed()


def prepare_run_folder(config: RunConfig, tokenizer: "Tokenizer | None") -> None:
    """Write the resolved config, and keep a copy of the tokenizer, with eod as its eos, for the export."""
    from megatron_ledom.data.sources import RUN_TOKENIZER

    try:
        os.makedirs(config.run_dir, exist_ok=True)
        if tokenizer is not None:
            tokenizer.save(os.path.join(config.run_dir, RUN_TOKENIZER))
        save_config(config, os.path.join(config.run_dir, "config.yaml"))
    except OSError as error:
        raise ConfigError(
            f"run_dir={config.run_dir} cannot be written ({error.strerror}); name a folder you may write to"
        ) from error


if __name__ == "__main__":
    run_command(main)
