"""Small training runs for the checks: synthetic data, a tiny model, ranks on this machine, and the records of the runs."""

import json
import logging
import os
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_ledom.data.preprocess.pipeline import preprocess
from megatron_ledom.data.preprocess.task import PreprocessSettings
from megatron_ledom.direction import Direction
from megatron_ledom.errors import VerificationError
from megatron_ledom.hardware_check.check import Setting
from megatron_ledom.hardware_check.curves import Record
from megatron_ledom.hardware_check.ranks import RESERVE_SECONDS, Ranks, end_of_log, free_ports
from megatron_ledom.storage.hashes import sha256_of
from megatron_ledom.storage.records import METRICS, read_records

log = logging.getLogger(__name__)

STEPS = 10
GLOBAL_BATCH = 16
NUM_DOCUMENTS = 400
VOCAB_SIZE = 320
EOD = "<eod>"
LONG_SECONDS = 45.0
"""Seconds in which a run ends on an ordinary machine, with the start of its processes."""
NO_TIME = "no time was left"
"""Reason for a run that was not started, or did not end, within the time limit."""
CONFIG: dict[str, Any] = {
    "model": {
        "num_layers": 4,
        "hidden_size": 128,
        "ffn_hidden_size": 256,
        "num_attention_heads": 8,
        "num_query_groups": 2,
        "params_dtype": "fp32",
    },
    "data": {"seq_length": 64, "allow_repeats": True},
    "parallel": {"distributed_timeout_minutes": 2},
    "optimizer": {"lr": 2e-4, "min_lr": 2e-5, "lr_warmup_iters": 2},
    "train": {
        "train_iters": STEPS,
        "global_batch_size": GLOBAL_BATCH,
        "micro_batch_size": 4,
        "num_threads": 1,
        "watchdog_seconds": 40,
        "exit_before_limit_seconds": 0,
    },
    "logging": {"log_interval": 1, "tensorboard": False, "peak_tflops": 1.0},
}
"""The model has widths that the CUDA kernels accept, and heads for eight tensor-parallel ranks. The learning rate is low: at 1e-3
the gradient norm has spikes, in which rounding to bf16 grows to 2% of the loss."""


class RunFailedError(VerificationError):
    """A training run that did not end well. The message has the end of its log."""


def documents(count: int = NUM_DOCUMENTS, seed: int = 1) -> list[str]:
    """Return synthetic texts of different lengths, the same for the same seed."""
    draw = random.Random(seed)
    things = ("stones", "birds", "boats", "trees", "lamps", "roads", "wells", "bells")
    places = ("north", "south", "east", "west")

    def sentence() -> str:
        """Return a sentence with a sum that can be learned."""
        one, other = draw.randrange(10), draw.randrange(10)
        return f"In the {draw.choice(places)} are {one} and {other} {draw.choice(things)}, {one + other} in all."

    return [" ".join(sentence() for _ in range(draw.randrange(1, 5))) for _ in range(count)]


class TrainingRuns:
    """The runs of one check: `train` starts them in the check's folder, and ends them before its time limit."""

    def __init__(
        self, setting: Setting, settings: Sequence[str] = (), directions: Sequence[Direction] = (Direction.REVERSE,)
    ) -> None:
        """Write tokenizer, shards and config. `settings`: overrides of all runs. `directions`: those of the shards."""
        self.setting, self.settings = setting, list(settings)
        self.end = time.monotonic() + setting.seconds - RESERVE_SECONDS
        self.folder = Path(setting.folder)
        self.num_launches = 0
        self.prepared: list[tuple[int, str, Ranks]] = []
        self.longest_launch = 0.0
        corpus = self.folder / "corpus.jsonl"
        texts = documents()
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        self.tokenizer = write_tokenizer(self.folder / "tokenizer", texts)
        for direction in directions:
            preprocess(
                PreprocessSettings(
                    input=[str(corpus)],
                    tokenizer=self.tokenizer,
                    output_prefix=self.shard(direction),
                    direction=direction,
                    workers=1,
                    task_id=0,
                    num_tasks=1,
                )
            )
        self.config = self.folder / "config.yaml"
        self.config.write_text(yaml.safe_dump({"run_dir": str(self.folder / "run"), **CONFIG}), encoding="utf-8")

    def shard(self, direction: Direction) -> str:
        """Return the prefix of the shard of a direction."""
        return str(self.folder / f"{direction}_text")

    def data_sha256(self) -> str:
        """Return the hash of the ids of the reverse shard."""
        return sha256_of(Path(f"{self.shard(Direction.REVERSE)}.bin"))

    def run_dir(self, name: str) -> str:
        """Return the folder of a run."""
        return str(self.folder / name)

    def seconds_left(self) -> float:
        """Return the seconds until the runs must end."""
        return self.end - time.monotonic()

    def arguments(self, name: str, overrides: Sequence[str]) -> list[str]:
        """Return the arguments of the training command of a run; a direction among the overrides chooses the shard."""
        forward = "data.direction=forward" in overrides
        shard = self.shard(Direction.FORWARD if forward else Direction.REVERSE)
        own = [f"run_dir={self.run_dir(name)}", f"data.train_blend=[[1.0,{shard}]]"]
        return ["--config", str(self.config), *own, *self.settings, *overrides]

    def prepare(self, num_ranks: int, device: str | None = None) -> None:
        """Start the processes of a coming launch, so that they import the trainer while earlier launches train."""
        device = device or self.setting.device
        self.prepared.append((num_ranks, device, self._start(num_ranks, device)))

    def _start(self, num_ranks: int, device: str) -> Ranks:
        """Return new ranks."""
        self.num_launches += 1
        path = self.folder / f"launch_{self.num_launches}.json"
        return Ranks("megatron_ledom.hardware_check.rank", path, num_ranks, device)

    def _ranks(self, num_ranks: int, device: str) -> Ranks:
        """Return the first prepared ranks for a launch, or else new ones."""
        for number, (*key, ranks) in enumerate(self.prepared):
            if key == [num_ranks, device]:
                del self.prepared[number]
                return ranks
        return self._start(num_ranks, device)

    def train(
        self, runs: Mapping[str, Sequence[str]], num_ranks: int = 1, device: str | None = None
    ) -> dict[str, list[Record]]:
        """Train runs, overrides by name, and return their records by name. Raises RunFailedError for the first that fails.

        device: by default that of the setting; `cpu` hides the GPUs.
        """
        records, failures = self.try_each(runs, num_ranks, device)
        for name, failure in failures.items():
            raise RunFailedError(f"the run {name} on {num_ranks} ranks {failure}")
        missing = [name for name in runs if name not in records]
        if missing:
            raise RunFailedError(
                f"the time limit of {self.setting.seconds:.0f} s ended before the run {missing[0]} did; allow more time"
            )
        return records

    def try_each(
        self, runs: Mapping[str, Sequence[str]], num_ranks: int = 1, device: str | None = None
    ) -> tuple[dict[str, list[Record]], dict[str, str]]:
        """Train runs; return the records of those that end well, and the failures. Runs in neither had no time left.

        The runs share processes. If one fails after others, it starts again from an empty folder in new processes, and has
        failed if it fails there too. A run has also failed if it had LONG_SECONDS when the time ended, and twice the time of the
        longest finished launch: it may hang.
        """
        waiting, failures, finished = dict(runs), dict[str, str](), list[str]()
        while waiting and self.seconds_left() > 0:
            done, failure = self._launch(waiting, num_ranks, device or self.setting.device)
            finished += done
            waiting = {name: overrides for name, overrides in waiting.items() if name not in done}
            if failure is None:
                break
            failing = next(iter(waiting))
            if done and self.seconds_left() > 0:
                shutil.rmtree(self.run_dir(failing), ignore_errors=True)
            else:
                failures[failing] = failure
                del waiting[failing]
        return {name: read_records(os.path.join(self.run_dir(name), METRICS)) for name in finished}, failures

    def _launch(self, runs: Mapping[str, Sequence[str]], num_ranks: int, device: str) -> tuple[list[str], str | None]:
        """Train some runs on prepared or new ranks; return the names of the finished ones, and the failure of the next, if it failed."""
        ranks = self._ranks(num_ranks, device)
        ports, started = free_ports(len(runs)), time.time()
        described = [
            {"name": name, "arguments": self.arguments(name, overrides), "port": port}
            for (name, overrides), port in zip(runs.items(), ports, strict=True)
        ]
        codes = ranks.run({"runs": described}, self.end)
        finished = Path(f"{ranks.path}.finished")
        names = finished.read_text(encoding="utf-8").splitlines() if finished.exists() else []
        if codes is None:
            seconds = time.time() - (finished.stat().st_mtime if names else started)
            too_long = f"did not end in {seconds:.0f} s, so it may hang: {end_of_log(ranks.log_file)}"
            return names, too_long if seconds > max(LONG_SECONDS, 2 * self.longest_launch) else None
        self.longest_launch = max(self.longest_launch, time.time() - started)
        if not any(codes):
            return names, None
        return names[: len(runs) - 1], ranks.failure(codes)


def write_tokenizer(folder: Path, texts: Sequence[str]) -> str:
    """Write a byte-level BPE tokenizer with an eod, trained on the texts, and return its folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=[EOD], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOD, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


def own_layers(device: str) -> str:
    """Return the override for this package's best layers on a device: fused operators if they are built, else torch."""
    from megatron_ledom.ops.library import backend

    return f"model.transformer_impl={'fused' if backend(device).usable else 'torch'}"
