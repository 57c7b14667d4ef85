"""Pairs of a better and a worse answer from ranked answers, as JSON lines and as Parquet, which TRL's DPOTrainer loads."""

import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, islice
from pathlib import Path
from typing import Any

from megatron_ledom.errors import DataError, UsageError, cannot_write
from megatron_ledom.inference.json_fields import json_line
from megatron_ledom.inference.reverse_reward.ranked_lines import ranked_candidates, reranked_lines, skipped_prompt
from megatron_ledom.storage.files import PART_SUFFIX, new_file, real_path, sync_stream
from megatron_ledom.storage.hashes import sha256_of
from megatron_ledom.storage.jobs import check_same_request
from megatron_ledom.storage.locks import output_file_lock

BEST_WORST, BEST_OTHERS, ALL = "best-worst", "best-others", "all"
ROWS = 1024
"""Number of pairs that are written to the Parquet file at once."""
ENDINGS = (".jsonl", ".parquet", ".json")
"""The two files of pairs, and the notes, which are written last."""
Pair = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceSettings:
    """Options of `ledom export-preferences`."""

    pairs: str = BEST_WORST
    """best-worst, best-others (the best answer against each other one) or all."""
    min_margin: float = 0.0
    """Smallest difference of the two rewards, in nats. Answers with equal rewards are never a pair."""
    max_pairs: int | None = None
    """Number of pairs that are kept of each line, those that differ most; None: all."""
    conversational: bool = False
    """Write messages instead of texts."""

    def __post_init__(self) -> None:
        """Raise UsageError for values outside their range."""
        if self.pairs not in (BEST_WORST, BEST_OTHERS, ALL):
            raise UsageError(f"pairs={self.pairs!r} is unknown; it can be {BEST_WORST}, {BEST_OTHERS} or {ALL}")
        if not 0 <= self.min_margin < math.inf:
            raise UsageError(f"--min-margin {self.min_margin} must be a number of at least 0; 0 keeps every difference")
        if self.max_pairs is not None and self.max_pairs < 1:
            raise UsageError(f"--max-pairs {self.max_pairs} keeps no pair; it must be at least 1")


def export_preferences(
    inputs: Sequence[str | Path], output: str | Path, settings: PreferenceSettings, *, overwrite: bool = False
) -> dict[str, int]:
    """Write OUTPUT.jsonl, OUTPUT.parquet and OUTPUT.json from files of ranked answers; return the counts.

    A complete output of the same request is kept; one of another request raises UsageError without `overwrite`. Raises DataError
    with file and line for an invalid line, and if there is no pair; then nothing is written.
    """
    targets = [Path(f"{output}{ending}") for ending in ENDINGS]
    _check_paths(inputs, targets)
    request = {
        "settings": asdict(settings),
        "input": [[str(path), Path(path).stat().st_size, sha256_of(path)] for path in inputs],
    }
    targets[0].parent.mkdir(parents=True, exist_ok=True)
    with output_file_lock(output):
        counts = None if overwrite else _counts_of_complete(targets, request)
        if counts is not None:
            print(f"{targets[0]} and {targets[1]} are complete; nothing to do", file=sys.stderr)
            return counts
        try:
            counts = _write(targets, request, inputs, settings)
        except OSError as error:
            raise cannot_write(error, str(output)) from error
    print(_summary(targets, counts), file=sys.stderr)
    return counts


def _check_paths(inputs: Sequence[str | Path], targets: Sequence[Path]) -> None:
    """Raise UsageError for an input that is not a file or is named twice, and for an output that is an input."""
    real: dict[str, str | Path] = {}
    for path in inputs:
        if not Path(path).is_file():
            raise UsageError(f"{path} is not a file; give outputs of ledom rerank")
        resolved = str(Path(path).resolve())
        if resolved in real:
            raise UsageError(f"{path} is the same file as {real[resolved]}; its pairs would count twice: name each file once")
        real[resolved] = path
    for target in targets:
        if real_path(target) in real:
            raise UsageError(f"the output {target} is one of the inputs; name another output")
        if target.is_dir():
            raise UsageError(f"the output {target} is a folder; name another output")


def _counts_of_complete(targets: Sequence[Path], request: dict[str, Any]) -> dict[str, int] | None:
    """Return the counts of a complete output of the request; None if there is no output, or an unfinished one of the request.

    Raises UsageError for an output of another request.
    """
    notes, advice = targets[-1], "pass --overwrite to replace it, or name another output"
    existing = [target for target in targets if target.exists()]
    if not existing:
        return None
    made = _noted(notes) if notes.exists() else _noted(Path(real_path(notes) + PART_SUFFIX))
    if made is None:
        raise UsageError(f"{existing[0]} exists, but no {notes.name} records how it was made; {advice}")
    check_same_request(existing[0], made["made_by"], request, advice, UsageError)
    is_whole = notes.exists() and len(existing) == len(targets)
    if not is_whole or [sha256_of(target) for target in targets[:-1]] != made.get("sha256"):
        return None
    return dict(made["counts"])


def _noted(path: Path) -> dict[str, Any] | None:
    """Return the notes of an output; None if they are missing or damaged."""
    try:
        made = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return made if isinstance(made, dict) and isinstance(made.get("made_by"), dict) else None


def _write(
    targets: Sequence[Path], request: dict[str, Any], inputs: Sequence[str | Path], settings: PreferenceSettings
) -> dict[str, int]:
    """Write the files of pairs, then the notes. While they are written, the unfinished notes contain the request.

    The hashes in the notes of an older output tell that its files were replaced.
    """
    lines_path, table_path, notes_path = targets
    counts: Counter[str] = Counter(num_prompts=0, num_pairs=0, num_prompts_without_pairs=0, num_unscored=0)
    with new_file(notes_path) as notes:
        notes.write(json_line({"made_by": request}))
        sync_stream(notes)
        with new_file(lines_path) as lines, new_file(table_path) as table:
            _write_rows(_pairs_of(inputs, settings, counts), lines, table, conversational=settings.conversational)
            if not counts["num_pairs"]:
                raise DataError(
                    f"{', '.join(map(str, inputs))}: no two answers of a prompt differ by a margin of {settings.min_margin:g} or more;"
                    " lower --min-margin, or sample more answers"
                )
        hashes = [sha256_of(lines_path), sha256_of(table_path)]
        notes.seek(0)
        notes.truncate()
        notes.write(json.dumps({"made_by": request, "counts": dict(counts), "sha256": hashes}, indent=1).encode() + b"\n")
    return dict(counts)


def _write_rows(pairs: Iterator[Pair], lines: Any, table: Any, *, conversational: bool) -> None:
    """Write each pair to both files."""
    import pyarrow
    from pyarrow import parquet

    message = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
    kind = pyarrow.list_(message) if conversational else pyarrow.string()
    texts = [(name, kind) for name in ("prompt", "chosen", "rejected")]
    schema = pyarrow.schema([*texts, ("chosen_reward", pyarrow.float64()), ("rejected_reward", pyarrow.float64())])
    with parquet.ParquetWriter(table, schema) as writer:
        while rows := list(islice(pairs, ROWS)):
            lines.write(b"".join(map(json_line, rows)))
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))


def _pairs_of(inputs: Iterable[str | Path], settings: PreferenceSettings, counts: Counter[str]) -> Iterator[Pair]:
    """Yield the pairs of all lines, in their order, and count them."""
    for path in inputs:
        for where, record in reranked_lines(path):
            counts["num_prompts"] += 1
            pairs = []
            if skipped_prompt(record) is None:
                texts, rewards, _ = ranked_candidates(record, where)
                _check_encodable([record["prompt"], *texts], where)
                scored = [(reward, text) for reward, text in zip(rewards, texts, strict=True) if reward is not None]
                counts["num_unscored"] += len(texts) - len(scored)
                pairs = _chosen_pairs(scored, settings)
            counts["num_pairs"] += len(pairs)
            counts["num_prompts_without_pairs"] += not pairs
            yield from (_as_row(record["prompt"], better, worse, settings) for better, worse in pairs)


Scored = tuple[float, str]
"""A reward and its answer."""


def _chosen_pairs(scored: list[Scored], settings: PreferenceSettings) -> list[tuple[Scored, Scored]]:
    """Return the (better, worse) answers of a prompt; equal ones count once."""
    ordered = sorted(scored, key=lambda one: -one[0])
    if settings.pairs == ALL:
        possible = list(combinations(ordered, 2))
    elif settings.pairs == BEST_OTHERS:
        possible = [(ordered[0], other) for other in ordered[1:]]
    else:
        possible = [(ordered[0], ordered[-1])] if ordered else []
    kept = {
        (better[1], worse[1]): (better, worse)
        for better, worse in possible
        if better[0] > worse[0] and better[0] - worse[0] >= settings.min_margin and better[1] != worse[1]
    }
    pairs = list(kept.values())
    if settings.max_pairs is not None and len(pairs) > settings.max_pairs:
        places = sorted(range(len(pairs)), key=lambda i: pairs[i][1][0] - pairs[i][0][0])[: settings.max_pairs]
        pairs = [pairs[place] for place in sorted(places)]
    return pairs


def _as_row(prompt: str, better: Scored, worse: Scored, settings: PreferenceSettings) -> Pair:
    """Return the fields of a pair. A reward of minus infinity is null, because JSON lacks it."""
    texts: dict[str, Any] = {"prompt": prompt, "chosen": better[1], "rejected": worse[1]}
    if settings.conversational:
        texts = {
            "prompt": [{"role": "user", "content": prompt.rstrip()}],
            **{name: [{"role": "assistant", "content": texts[name]}] for name in ("chosen", "rejected")},
        }
    return {**texts, "chosen_reward": better[0], "rejected_reward": None if worse[0] == -math.inf else worse[0]}


def _check_encodable(texts: Iterable[str], where: str) -> None:
    """Raise DataError for half of a surrogate pair, which Parquet and datasets lack."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: a text contains half of a surrogate pair ({text[:40]!a}); repair or remove the line"
            ) from error


def _summary(targets: Sequence[Path], counts: dict[str, int]) -> str:
    """Return one sentence about a finished output."""
    return (
        f"{targets[0]} and {targets[1]}: {counts['num_pairs']:,} pairs of {counts['num_prompts']:,} prompts; prompts without a pair:"
        f" {counts['num_prompts_without_pairs']:,}, answers without a reward: {counts['num_unscored']:,}"
    )
