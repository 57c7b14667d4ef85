"""Compare how long a save stops training: a save in the background and a save that training waits for.

    python tests/benchmarks/bench_async_save.py [--folder /tmp] [--layers 12 --hidden-size 768] [--rounds 3]

One process runs both. The model has about 125 M parameters by default, in fp32 with Adam's moments. A round saves once in each
way, and trains steps while the background save writes. A background save stops training for its call and for its finish.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from megatron_ledom.config.load import config_from_dict
from megatron_ledom.direction import Direction
from megatron_ledom.provenance import Provenance

VOCAB_SIZE = 8_005


def seconds(act: Callable[[], None]) -> float:
    """Return the wall time of `act`."""
    before = time.perf_counter()
    act()
    return time.perf_counter() - before


def main() -> None:
    """Measure both ways and print the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="folder for the checkpoints; default: the system's temporary folder")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        measure(arguments, folder)


def measure(arguments: argparse.Namespace, folder: str) -> None:
    """Build the model, then save it `rounds` times in each way."""
    from megatron_ledom.checkpoint.manifest import CheckpointManifest
    from megatron_ledom.checkpoint.store import CheckpointStore
    from megatron_ledom.config.schema import CheckpointConfig
    from megatron_ledom.hardware_check.speed import random_batches
    from megatron_ledom.model.builder import build_model_chunks, checkpoint_metadata, wrap_for_training
    from megatron_ledom.model.layer_specs import choose_layers
    from megatron_ledom.parallel.groups import start_distributed
    from megatron_ledom.platform.device import prepare_platform
    from megatron_ledom.training.optimizer import build_optimizer, build_scheduler
    from megatron_ledom.training.step_policy import Action, Verdict
    from megatron_ledom.training.trainer import train_step

    width = arguments.hidden_size
    shape = {
        "num_layers": arguments.layers,
        "hidden_size": width,
        "ffn_hidden_size": 4 * width,
        "num_attention_heads": width // 64,
    }
    config = config_from_dict(
        {
            "run_dir": folder,
            "model": {**shape, "params_dtype": "fp32"},
            "data": {"seq_length": arguments.seq_length},
            "train": {"train_iters": 1000, "global_batch_size": 1, "seed": 1},
            "optimizer": {"lr_warmup_iters": 1},
        },
        "benchmark",
    )
    groups = start_distributed(prepare_platform(config.train.num_threads), config.parallel)
    model = wrap_for_training(config, build_model_chunks(config, VOCAB_SIZE, groups, choose_layers(config)))
    optimizer = build_optimizer(config, model, groups)
    scheduler = build_scheduler(config, optimizer)
    batches = [random_batches(config, VOCAB_SIZE, torch.device("cpu"))]
    parameters = sum(weight.numel() for weight in model[0].parameters())
    print(
        f"{parameters / 1e6:.0f} M parameters, {12 * parameters / 1e9:.2f} GB per checkpoint, {torch.get_num_threads()} threads"
    )
    provenance = Provenance(
        direction=Direction.REVERSE, tokenizer_name="none", tokenizer_sha256="0" * 64, vocab_size=VOCAB_SIZE, eod_id=0
    )
    stores = {
        way: CheckpointStore(
            f"{folder}/{way}", checkpoint_metadata(groups), CheckpointConfig(async_save=way == "async", keep_last=1)
        )
        for way in ("waiting", "async")
    }

    def step() -> None:
        train_step(config, model, optimizer, batches, groups, lambda *_: Verdict(Action.UPDATE), global_batch_size=1)
        scheduler.step(increment=1)

    def save(way: str, iteration: int) -> None:
        position = {"iteration": iteration, "consumed_train_samples": 0, "consumed_train_tokens": 0}
        manifest = CheckpointManifest.describe(config, provenance, [], 1, **position)
        stores[way].save(manifest, model, optimizer, scheduler)

    compare(step, save, stores["async"], arguments.rounds)


def compare(step: Callable[[], None], save: Callable[[str, int], None], store: Any, rounds: int) -> None:
    """Print each round, and the median ratio of the times for which the two saves stop training."""
    step()
    ratios = []
    for number in range(1, rounds + 1):
        alone = seconds(step)
        waiting = seconds(lambda: save("waiting", number))  # noqa: B023  called at once
        begun = time.perf_counter()
        call = seconds(lambda: save("async", number))  # noqa: B023  called at once
        meanwhile, steps = seconds(step), 1
        while multiprocessing.active_children():
            meanwhile += seconds(step)
            steps += 1
        written = time.perf_counter() - begun
        finish = seconds(store.poll)
        held = call + finish
        ratios.append(waiting / held)
        print(
            f"round {number}: waiting {waiting:.2f} s | async: stopped {held:.2f} s (call {call:.2f}, finish {finish:.2f}), written"
            f" after {written:.2f} s | a step {alone:.2f} s alone, {meanwhile / steps:.2f} s while the writer runs"
        )
    print(f"a save in the background stops training for {statistics.median(ratios):.1f} times less time (median)")


if __name__ == "__main__":
    main()
