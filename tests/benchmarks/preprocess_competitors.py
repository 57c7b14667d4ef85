"""The competitors of bench_preprocess.py: packages that each needs, and its command."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent

Kind = Literal["ours", "anchor", "floor"]
SuiteName = Literal["byte-level", "sentencepiece"]

PIECES = 64_000  # the original's vocabulary
SENTENCES = 500_000  # lines from which a SentencePiece vocabulary is learned

PROBE = """
import importlib.metadata as metadata, json, sys
versions = {}
for name in sys.argv[1:]:
    try:
        versions[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        versions[name] = None
print(json.dumps(versions))
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Competitor:
    """One row of the table."""

    name: str
    title: str
    kind: Kind
    suite: SuiteName = "byte-level"
    workers: int = 1
    requirements: tuple[str, ...] = ()
    """Packages to install with pip, apart from this project."""

    @property
    def direction(self) -> str:
        """Direction of the output; anchors write forward shards only."""
        return "forward" if self.kind == "anchor" else "reverse"


COMPETITORS = (
    Competitor(name="ours-1", title="megatron_ledom, 1 worker", kind="ours"),
    Competitor(name="ours-2", title="megatron_ledom, 2 workers", kind="ours", workers=2),
    Competitor(
        name="classic",
        title="Megatron-LM classic tool, re-created",
        kind="anchor",
        requirements=("torch", "megatron-core", "transformers"),
    ),
    Competitor(
        name="gigatoken",
        title="Megatron-LM GigaToken tool, re-created",
        kind="anchor",
        requirements=("torch", "megatron-core", "gigatoken==0.10.0", "awkward"),
    ),
    Competitor(
        name="datatrove",
        title="datatrove Megatron writer",
        kind="anchor",
        requirements=("datatrove==0.10.1", "tokenizers", "orjson"),
    ),
    Competitor(name="floor", title="floor: each step alone", kind="floor", requirements=("fastokens", "orjson")),
    Competitor(name="ours-sp", title="megatron_ledom, SentencePiece vocabulary", kind="ours", suite="sentencepiece"),
    Competitor(
        name="sentencepiece",
        title="sentencepiece library, used directly",
        kind="anchor",
        suite="sentencepiece",
        requirements=("sentencepiece", "orjson"),
    ),
)


@dataclass(slots=True)
class Suite:
    """One tokenizer, and the output of our forward run on the corpus, which the others must equal."""

    tokenizer: Path
    """Tokenizer for our tool."""
    anchor_tokenizer: Path
    """Tokenizer for the others: tokenizer.json, or the .model for sentencepiece."""
    expected: Path = Path()
    """Prefix of the expected shards: .forward.bin, .forward.idx, .reverse.bin."""
    manifest: dict[str, Any] = field(default_factory=dict)


def find_interpreter(requirements: Sequence[str], candidates: Sequence[str]) -> tuple[str | None, dict[str, str], list[str]]:
    """Return the first interpreter with all packages (or None), their versions, and the packages the last one lacks."""
    missing: list[str] = []
    for python in candidates:
        names = [requirement.partition("==")[0] for requirement in requirements]
        found: dict[str, str | None] = json.loads(subprocess.check_output([python, "-c", PROBE, *names]))
        missing = [item for item, name in zip(requirements, names, strict=True) if found[name] is None]
        if not missing:
            return python, {name: version for name, version in found.items() if version is not None}, []
    return None, {}, missing


def environment_of(competitor: Competitor) -> dict[str, str]:
    """Return the environment: this checkout comes before an installed package; anchors and floor use one thread."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if competitor.kind != "ours":
        environment |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "FASTOKENS_BPE_THREADS": "1"}
    return environment


def our_command(source: Path, tokenizer: Path, prefix: Path, direction: str, workers: int) -> list[str]:
    """Return the command of our tool."""
    options = {
        "--input": source,
        "--tokenizer": tokenizer,
        "--output-prefix": prefix,
        "--direction": direction,
        "--workers": workers,
    }
    return [sys.executable, str(ROOT / "tools/preprocess_data.py"), *_as_arguments(options), "--overwrite"]


def train_sentencepiece(source: Path, folder: Path) -> Path:
    """Train a vocabulary of the original's kind and size with the project's tool; return its folder."""
    options = {"--input": source, "--vocab-size": PIECES, "--output": folder, "--max-sentences": SENTENCES}
    command = [sys.executable, str(ROOT / "tools/train_tokenizer.py"), *_as_arguments(options)]
    subprocess.run(command, env=environment_of(COMPETITORS[0]), check=True)
    return folder


def command_of(competitor: Competitor, python: str, suite: Suite, source: Path, prefix: Path) -> list[str]:
    """Return the command of a competitor on `source`. It writes prefix.bin; the floor writes its times to prefix.json."""
    if competitor.kind == "ours":
        return our_command(source, suite.tokenizer, prefix, competitor.direction, competitor.workers)
    manifest = suite.manifest
    options: dict[str, Any] = {"--input": source, "--tokenizer": suite.anchor_tokenizer}
    options |= {"--eod-id": manifest["eod_id"], "--dtype": manifest["dtype"]}
    if competitor.kind == "floor":
        options |= {"--vocab-size": manifest["vocab_size"], "--output": f"{prefix}.bin", "--result": f"{prefix}.json"}
        return [python, str(HERE / "preprocess_floor.py"), *_as_arguments(options)]
    options |= {"--output-prefix": prefix, "--eod-token": manifest["eod_token"], "--workers": competitor.workers}
    return [python, str(HERE / "preprocess_anchors.py"), competitor.name, *_as_arguments(options)]


def _as_arguments(options: dict[str, Any]) -> list[str]:
    return [f"{name}={value}" for name, value in options.items()]
