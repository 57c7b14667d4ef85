"""Pairs of a prompt and an answer, as JSON lines, become a shard for the training of a scorer.

Two templates render a pair. It is encoded once as one text, and divided by the same function that the scorer uses. Packs of one
length contain pairs of different lengths, none of them cut. PREFIX.targets records the role of each id in its pair.
"""

import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from megatron_ledom.data.readers.text_template import TextTemplate
from megatron_ledom.data.shards.shard import (
    SUFFIXES,
    TARGETS,
    Counts,
    InputFile,
    ShardManifest,
    ShardWriter,
    choose_dtype,
    real_files,
)
from megatron_ledom.data.shards.targets import END, GIVEN, NOTHING, SCORED
from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, UsageError, cannot_write
from megatron_ledom.inference.joint_tokenizer import JointTokenizer
from megatron_ledom.inference.scoring import span_tokens
from megatron_ledom.storage.files import close_synced, publish, withdraw
from megatron_ledom.tokenizers.corpus_tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)
SHORTEST = 8
"""Smallest length of a pack, in tokens."""
MOST_OPEN = 64
"""Number of packs that are filled at the same time; with 64, the pairs of GSM8K leave 3 % of packs of 1,024 tokens empty."""


@dataclass(kw_only=True, slots=True)
class PairSettings:
    """Options of `ledom prepare-pairs`."""

    input: list[str]
    """Files of JSON lines."""
    tokenizer: str
    output_prefix: str
    seq_length: int
    """data.seq_length of the run, in tokens."""
    prompt_template: str = "{question}\n"
    """Template of the prompt. Its end separates the prompt from the answer."""
    answer_template: str = "{answer}"
    direction: Direction = Direction.REVERSE
    too_long: Literal["refuse", "skip", "cut"] = "refuse"
    """A pair longer than a pack raises an error, is skipped, or loses the first tokens of its given part, in model order."""
    eod_token: str | None = None
    overwrite: bool = False


def prepare_pairs(settings: PairSettings) -> ShardManifest:
    """Write the shard and return its manifest. After a failure, no file of it remains."""
    started = time.monotonic()
    if settings.seq_length < SHORTEST:
        raise UsageError(f"--seq-length {settings.seq_length} is too short for a pair; it must be at least {SHORTEST}")
    missing = [path for path in settings.input if not os.path.isfile(path)]
    if missing:
        raise UsageError(f"--input {missing[0]} is not a file; give JSON lines")
    paths = {os.path.realpath(path): path for path in settings.input}
    if len(paths) < len(settings.input):
        twice = next(path for path in settings.input if paths[os.path.realpath(path)] != path or settings.input.count(path) > 1)
        raise UsageError(f"--input {twice} is named more than once; its pairs would count twice: name each file once")
    reader = PairReader(settings.prompt_template, settings.answer_template)
    tokenizer = load_tokenizer(settings.tokenizer, settings.eod_token)
    with TemporaryDirectory() as folder:
        tokenizer.save(folder)  # as in an export, which the scorer will load
        joint = JointTokenizer.from_pretrained(Path(folder))
    counts = Counts(tokenizer_path=settings.tokenizer, eod_token=tokenizer.eod_token)
    dtype = choose_dtype("auto", tokenizer.vocab_size)
    provenance = tokenizer.provenance(settings.direction)
    total = sum(os.path.getsize(path) for path in settings.input)
    with (
        ShardWriter(settings.output_prefix, provenance, dtype, overwrite=settings.overwrite) as writer,
        tqdm(total=total, unit="B", unit_scale=True, desc="pairs", disable=None) as bar,
    ):
        shard = PairShard(settings, tokenizer, joint, writer)
        try:
            for path in settings.input:
                counts.input_files.append(_add_file(shard, reader, path, bar))
            counts.elapsed_seconds = time.monotonic() - started
            manifest = shard.finish(counts)
        finally:
            shard.close()
    _log_result(settings, manifest)
    return manifest


def _log_result(settings: PairSettings, manifest: ShardManifest) -> None:
    """Log one line on the written pairs, and one on the skipped and cut ones."""
    pairs = manifest.pairs
    log.info(
        "%s: %s order, %s pairs in %s packs of %d tokens, %.1f %% filling; tokens given %s, scored %s; %.1f s",
        *(settings.output_prefix, manifest.direction, f"{pairs['num_pairs']:,}", f"{manifest.num_documents:,}"),
        *(pairs["seq_length"], 100 * pairs["filling_tokens"] / manifest.num_tokens),
        *(f"{pairs['given_tokens']:,}", f"{pairs['scored_tokens']:,}", manifest.elapsed_seconds),
    )
    if manifest.skipped or pairs["num_cut"]:
        skipped = ", ".join(f"{count:,} {reason}" for reason, count in manifest.skipped.items()) or "none"
        log.warning("skipped: %s; cut: %s", skipped, f"{pairs['num_cut']:,}")


@dataclass(frozen=True, slots=True)
class Pair:
    """The two parts of a text, in text order, with the separator at the end of the prompt; line: its number in the file, from 1."""

    prompt: str
    answer: str
    line: int


class PairReader:
    """Reads JSON lines and renders two templates, in which `{key}` is the text of that key of a line."""

    def __init__(self, prompt_template: str, answer_template: str) -> None:
        given = {"prompt": prompt_template, "answer": answer_template}
        self.templates = {name: TextTemplate(template, f"--{name}-template") for name, template in given.items()}

    def read(self, lines: Iterable[bytes], where: str) -> Iterator[Pair]:
        """Yield every line as a pair. Raises DataError with the line."""
        for line, content in enumerate(lines, 1):
            try:
                record = json.loads(content)
            except ValueError as error:
                raise DataError(f"{where}:{line} is not JSON ({error}); repair it") from error
            if not isinstance(record, dict):
                raise DataError(f'{where}:{line} is not an object, expected one such as {{"question": ..., "answer": ...}}')
            texts = {name: self._render(template, record, f"{where}:{line}") for name, template in self.templates.items()}
            yield Pair(**texts, line=line)

    def _render(self, template: TextTemplate, record: dict[str, Any], where: str) -> str:
        def text_of(key: str) -> str:
            """Return the text of a key."""
            if isinstance(value := record.get(key), str):  # a number or a list would be rendered in Python's notation
                return value
            known = ", ".join(record) or "none"
            raise DataError(f"{where} has no text {key!r} for the template {template.template!r}; its keys are: {known}")

        return template.render(text_of)


class HashedLines:
    """The lines of a file, hashed and counted as they are read."""

    def __init__(self, stream: BinaryIO, bar: Any) -> None:
        self.stream, self.bar, self.digest, self.num_bytes = stream, bar, hashlib.sha256(), 0

    def __iter__(self) -> Iterator[bytes]:
        for line in self.stream:
            self.digest.update(line)
            self.num_bytes += len(line)
            self.bar.update(len(line))
            yield line


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """The joint text in model order, eod last; the first `num_given` tokens are given, the others are scored."""

    tokens: list[int]
    num_given: int

    def cut_to(self, length: int) -> "EncodedPair | None":
        """Return the pair without the first tokens of its given part, cut to `length`; None if none of the given part would stay."""
        surplus = max(0, len(self.tokens) - length)
        return EncodedPair(self.tokens[surplus:], self.num_given - surplus) if surplus < self.num_given else None


def encode_pair(tokenizer: JointTokenizer, direction: Direction, pair: Pair, eod_id: int) -> EncodedPair | None:
    """Return the ids of a pair as a scorer of `direction` reads them, with eod; None if the given or the scored part is empty."""
    given = pair.answer if direction is Direction.REVERSE else pair.prompt
    if not given:
        return None
    tokens, num_given = span_tokens(tokenizer, direction, (pair.prompt, pair.answer), [], [eod_id])
    return EncodedPair([*tokens, eod_id], num_given) if num_given < len(tokens) else None


class Packer:
    """Puts each pair into the unfinished pack that it fills best. The packs depend only on the order of the pairs."""

    def __init__(self, length: int) -> None:
        self.length = length
        self._open: list[tuple[int, list[EncodedPair]]] = []
        """(free tokens, pairs) of each unfinished pack, oldest first."""

    def add(self, pair: EncodedPair) -> Iterator[list[EncodedPair]]:
        """Add a pair of at most `length` tokens; yield the packs that are finished."""
        size = len(pair.tokens)
        fitting = [(room, number) for number, (room, _) in enumerate(self._open) if room >= size]
        if fitting:
            room, number = min(fitting)
            pack = self._open.pop(number)[1]
            pack.append(pair)
        else:
            room, pack = self.length, [pair]
        if room == size:
            yield pack
        else:
            self._open.append((room - size, pack))
        if len(self._open) > MOST_OPEN:
            _, number = min((room, number) for number, (room, _) in enumerate(self._open))
            yield self._open.pop(number)[1]

    def finish(self) -> Iterator[list[EncodedPair]]:
        """Yield the unfinished packs."""
        yield from (pack for _, pack in self._open)
        self._open = []


class PairShard:
    """Encodes, packs and writes pairs; counts the skipped ones."""

    def __init__(self, settings: PairSettings, tokenizer: Tokenizer, joint: JointTokenizer, writer: ShardWriter) -> None:
        self.settings, self.tokenizer, self.joint, self.writer = settings, tokenizer, joint, writer
        self.packer = Packer(settings.seq_length)
        self.counts: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.text_bytes = 0
        self.digest = hashlib.sha256()
        self.final = real_files(settings.output_prefix, (*SUFFIXES, TARGETS))
        self.path = Path(f"{self.final[TARGETS]}.part")
        self.targets = self.path.open("wb")

    def add(self, pair: Pair, where: str) -> None:
        """Add the pair of one line of the file `where`."""
        encoded = encode_pair(self.joint, self.settings.direction, pair, self.tokenizer.eod_id)
        if encoded is None:
            self.skipped["empty prompt or answer"] += 1
            return
        if self.tokenizer.eod_id in encoded.tokens[:-1]:
            raise DataError(f"{where}:{pair.line} contains the eod {self.tokenizer.eod_token!r}, which ends pairs; remove it")
        if len(encoded.tokens) > self.settings.seq_length:
            shortened = self._shortened(encoded, f"{where}:{pair.line}")
            if shortened is None:
                self.skipped["too long"] += 1
                return
            encoded = shortened
        scored, given = pair.prompt.encode(), pair.answer.encode()
        if self.settings.direction is Direction.FORWARD:
            scored, given = given, scored
        self.text_bytes += len(scored) + len(given)
        num_scored = len(encoded.tokens) - 1 - encoded.num_given
        self.counts.update(num_pairs=1, scored_bytes=len(scored), scored_tokens=num_scored, given_tokens=encoded.num_given - 1)
        for pack in self.packer.add(encoded):
            self._write(pack)

    def _shortened(self, encoded: EncodedPair, where: str) -> EncodedPair | None:
        policy, length = self.settings.too_long, self.settings.seq_length
        if policy == "refuse":
            raise DataError(
                f"{where} has {len(encoded.tokens):,} tokens with its eod, more than --seq-length {length:,}; raise it, skip such"
                " pairs with --too-long skip, or shorten their given part with --too-long cut"
            )
        shortened = encoded.cut_to(length) if policy == "cut" else None
        self.counts["num_cut"] += shortened is not None
        return shortened

    def _write(self, pack: list[EncodedPair]) -> None:
        """Write a pack as one document of exactly `seq_length` ids, and the role of each id."""
        length = self.settings.seq_length
        ids, targets = np.full(length, self.tokenizer.eod_id, np.int64), np.full(length, NOTHING, np.uint8)
        end = 0
        for pair in pack:
            begin, end = end, end + len(pair.tokens)
            ids[begin:end] = pair.tokens
            targets[begin + 1 : begin + pair.num_given] = GIVEN
            targets[begin + pair.num_given : end - 1] = SCORED
            targets[end - 1] = END
        self.counts["filling_tokens"] += length - end
        if ids.min() < 0 or ids.max() >= self.tokenizer.vocab_size:  # a cast would wrap around silently
            raise DataError(f"an id is outside the vocabulary of {self.tokenizer.vocab_size:,} ids; the tokenizer is damaged")
        self.writer.append(ids.astype(self.writer.dtype), np.array([length], np.int32))
        self._append_targets(targets)

    def _append_targets(self, targets: npt.NDArray[np.uint8]) -> None:
        try:
            self.targets.write(targets.data)
        except OSError as error:
            raise cannot_write(error, str(self.path)) from error
        self.digest.update(targets.data)

    def finish(self, counts: Counts) -> ShardManifest:
        """Write the unfinished packs and give the files their names, the manifest last."""
        for pack in self.packer.finish():
            self._write(pack)
        if self.writer.num_documents < 2:
            raise DataError(
                f"{self.counts['num_pairs']} pairs fill {self.writer.num_documents} pack of {self.settings.seq_length} tokens, but a"
                " run needs two; give more pairs, or a smaller --seq-length"
            )
        close_synced(self.targets)
        names = ("num_pairs", "num_cut", "given_tokens", "scored_tokens", "scored_bytes", "filling_tokens")
        counts.pairs = {"seq_length": self.settings.seq_length, **{name: self.counts[name] for name in names}}
        counts.text_bytes, counts.skipped = self.text_bytes, dict(sorted(self.skipped.items()))
        counts.targets_sha256 = self.digest.hexdigest()
        withdraw(self.final[".json"])  # an old manifest must never describe new targets
        publish(self.path, self.final[TARGETS])
        return self.writer.finalize(counts)

    def close(self) -> None:
        """Remove the partial file of targets."""
        self.targets.close()
        self.path.unlink(missing_ok=True)


def _add_file(shard: PairShard, reader: PairReader, path: str, bar: Any) -> InputFile:
    with open(path, "rb") as stream:
        lines = HashedLines(stream, bar)
        for pair in reader.read(lines, path):
            shard.add(pair, path)
    return InputFile(path=path, num_bytes=lines.num_bytes, sha256=lines.digest.hexdigest())
