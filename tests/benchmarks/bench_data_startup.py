"""Seconds and memory that the data of a run needs to start: ours and stock megatron-core on the same synthetic shards.

    python tests/benchmarks/bench_data_startup.py --shards 2400 --tokens 435e9 --folder /scratch/startup

`.idx` and `.json` are real, with log-normal document lengths; `.bin` is sparse. Each row is a process of its own. The rows
"again" find the index of the first start. The stock side does what a Megatron trainer does: BlendedMegatronDatasetBuilder after
init_process_group, with a cache folder. The first and the last sample are read to measure the cost of seeking.
"""

import argparse
import gc
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
PARTS = 7
"""Number of corpora to which the shards belong, as in the published run."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="folder of the shards; existing ones are used again")
    parser.add_argument("--shards", type=int, default=2400)
    parser.add_argument("--tokens", type=float, default=435e9, help="tokens of all shards together")
    parser.add_argument("--tokens-per-document", type=float, default=1300)
    parser.add_argument("--seq-length", type=int, default=8192)
    parser.add_argument("--stock-limit-seconds", type=int, default=600, help="stop the stock side after this time")
    parser.add_argument("--only", choices=["ours", "again", "stock", "stock again"], help="measure one row in this process")
    return parser.parse_args()


def write_shards(options: argparse.Namespace) -> None:
    """Write the shards, each with about tokens / shards tokens."""
    from megatron_ledom.data.shards.index_file import index_blocks
    from megatron_ledom.data.shards.shard import Counts, ShardManifest
    from megatron_ledom.direction import Direction

    numbers = np.random.default_rng(1)
    documents = int(options.tokens / options.shards / options.tokens_per_document)
    sigma = 1.0
    mean = math.log(options.tokens_per_document) - sigma**2 / 2
    for shard in range(options.shards):
        prefix = options.folder / prefix_of(shard, options.shards)
        if prefix.with_name(f"{prefix.name}.json").exists():
            continue
        lengths = np.maximum(numbers.lognormal(mean, sigma, documents), 2).astype(np.int32)
        content = b"".join(index_blocks(lengths, np.dtype("uint16")))
        Path(f"{prefix}.idx").write_bytes(content)
        tokens = int(lengths.sum(dtype=np.int64))
        with open(f"{prefix}.bin", "wb") as stream:
            stream.truncate(2 * tokens)
        import hashlib

        manifest = ShardManifest(
            direction=Direction.REVERSE,
            tokenizer_name="synthetic",
            tokenizer_sha256="0" * 64,
            vocab_size=64_005,
            eod_id=64_002,
            dtype="uint16",
            num_documents=documents,
            num_tokens=tokens,
            text_bytes=4 * tokens,
            skipped=Counts().skipped,
            input_files=[],
            bin_sha256=f"{shard:064x}",
            idx_sha256=hashlib.sha256(content).hexdigest(),
        )
        Path(f"{prefix}.json").write_bytes(manifest.to_json())


def prefix_of(shard: int, shards: int) -> str:
    return f"part{shard * PARTS // shards}-{shard:05d}"


def measured(row: Callable[[argparse.Namespace], dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the results of `row` and the memory of the process as JSON."""
    import torch  # noqa: F401  imports are not measured
    from megatron.core.datasets import blended_megatron_dataset_builder, helpers  # noqa: F401

    from megatron_ledom.data.blends import sources  # noqa: F401

    gc.collect()
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    own_before = private_megabytes()
    found = row(options)
    kept = found.pop("dataset")  # measure with its files open
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found |= {
        "peak_mb": (max(peak, children) - before) / 1024,
        "private_mb": private_megabytes() - own_before,
        "files_open": len(os.listdir("/proc/self/fd")),
        "total_seconds": time.perf_counter() - started,
    }
    print(json.dumps(found))
    del kept


def private_megabytes() -> float:
    """Return the memory of this process alone. Mapped files do not count: all ranks share them in the page cache."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Dirty", "Anonymous:"))) / 2 / 1024


def config_of(options: argparse.Namespace) -> Any:
    from megatron_ledom.config.load import config_from_dict

    batch = 1024 if options.tokens > 1e10 else 8
    part = 0.95 if options.tokens > 1e10 else 0.8  # the sizes of small shards vary more
    iterations = int(part * options.tokens / options.seq_length / batch)
    blend = [[1.0, str(options.folder / prefix_of(shard, options.shards))] for shard in range(options.shards)]
    size = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4}
    values = {
        "run_dir": "unused",
        "model": size,
        "data": {"train_blend": blend, "seq_length": options.seq_length, "path_to_cache": str(options.folder / "ours")},
        "train": {"train_iters": iterations, "global_batch_size": batch},
    }
    return config_from_dict(values, "the benchmark")


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """Prepare the data like a rank before its first batch; return the measurements."""
    from megatron_ledom.data.blends.sources import load_sources
    from megatron_ledom.data.dataset.blend_samples import build_train_dataset
    from megatron_ledom.data.dataset.sample_index import prepare_indices
    from megatron_ledom.platform.launch import ALONE

    config = config_of(options)
    start = time.perf_counter()
    sources = load_sources(config)
    opened = time.perf_counter()
    prepare_indices(config, sources, config.data.path_to_cache, ALONE)
    dataset = build_train_dataset(config, sources, config.data.path_to_cache)
    ready = time.perf_counter()
    result = {"open_seconds": opened - start, "index_seconds": ready - opened, "ready_seconds": ready - start}
    return {**result, **sought(dataset), "cache_mb": folder_megabytes(options.folder / "ours"), "dataset": dataset}


def stock(options: argparse.Namespace) -> dict[str, Any]:
    """Prepare the data with megatron-core alone; return the measurements."""
    import torch.distributed as dist
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    from megatron_ledom.config.derived import train_samples
    from megatron_ledom.data.dataset.blend_samples import ShardVocabulary

    config = config_of(options)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # it keeps six files per shard open
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    start = time.perf_counter()
    prefixes = [prefix for _, prefix in config.data.train_blend]
    data_config = GPTDatasetConfig(
        random_seed=42,
        sequence_length=options.seq_length,
        blend_per_split=[(prefixes, [1.0] * len(prefixes)), None, None],
        path_to_cache=str(options.folder / "stock"),
        tokenizer=ShardVocabulary(64_002),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=True,
        create_attention_mask=False,
        num_dataset_builder_threads=len(os.sched_getaffinity(0)),
    )
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [train_samples(config), None, None], lambda: True, data_config)
    dataset = builder.build()[0]
    result = {"ready_seconds": time.perf_counter() - start}
    return {**result, **sought(dataset), "cache_mb": folder_megabytes(options.folder / "stock"), "dataset": dataset}


def sought(dataset: Any) -> dict[str, float]:
    """Return the milliseconds to read the first sample, the last one, and one of 200 consecutive samples."""
    times = {}
    for name, sample in (("first_sample_ms", 0), ("far_sample_ms", len(dataset) - 1)):
        start = time.perf_counter()
        dataset[sample]
        times[name] = 1000 * (time.perf_counter() - start)
    start = time.perf_counter()
    for sample in range(200):
        dataset[sample]
    return {**times, "sample_ms": 1000 * (time.perf_counter() - start) / 200, "samples": len(dataset)}


def folder_megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.iterdir()) / 1e6


def main() -> None:
    options = parse()
    if options.only:
        measured(stock if options.only.startswith("stock") else ours, options)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    write_shards(options)
    print("| start | ready s | peak MB | private MB | files open | cache MB | 1st sample ms | far sample ms | sample ms |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in ("ours", "again", "stock", "stock again"):
        command = [sys.executable, __file__, *sys.argv[1:], "--only", row]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        try:
            done = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, text=True, check=False, timeout=options.stock_limit_seconds
            )
        except subprocess.TimeoutExpired:
            print(f"| {row} | more than {options.stock_limit_seconds} | | | | | | | |", flush=True)
            break
        found = json.loads(done.stdout.splitlines()[-1])
        names = ("ready_seconds", "peak_mb", "private_mb", "files_open", "cache_mb", "first_sample_ms", "far_sample_ms")
        cells = [f"{found[name]:,.1f}" for name in (*names, "sample_ms")]
        print(f"| {row} | {' | '.join(cells)} |", flush=True)
        print(f"  {found}", file=sys.stderr)


if __name__ == "__main__":
    main()
