"""Reranking files: JSON lines of prompts and candidates in, the same with scores and a ranking out, resumed after a kill.

Lines are scored in windows, so that batches are full although a line has few candidates. Windows are cut by the input and the
settings alone: a run that was killed repeats its unfinished window from the same first line, and ends with the same bytes.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_ledom.errors import DataError, LedomError, MismatchError, UsageError
from megatron_ledom.inference.engine import Engine, root
from megatron_ledom.inference.generation import Sampling
from megatron_ledom.inference.reverse_reward import Candidate, RewardSettings, rank, score_questions
from megatron_ledom.inference.search import BeamSettings, beam_search

WRITTEN = ("greedy", "scores", "ranking", "best", "search")
"""Fields that ranking writes, over those of an input that was ranked before."""


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a reranking file; `fields` are all its fields as read."""

    number: int
    where: str
    prompt: str
    candidates: list[Candidate] | None
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RerankSettings:
    """What is done with each line. Without `sampling` the candidates are the line's own; `beam` needs `sampling` as well."""

    reward: RewardSettings = field(default_factory=RewardSettings)
    sampling: Sampling | None = None
    beam: BeamSettings | None = None
    greedy: bool = False
    """Whether the forward model also writes its likeliest answer, under "greedy": a baseline, not a candidate."""
    token_values: bool = False
    """Whether scores hold the ids and log-probabilities of single tokens."""
    window_candidates: int = 512
    """A window is closed by the line that brings it to this many candidates: what a kill can lose at most."""

    def __post_init__(self) -> None:
        """Refuse a search without a way to sample."""
        if (self.beam or self.greedy) and self.sampling is None:
            raise UsageError("a beam search and a greedy answer are written by the forward model: set how to sample as well")


def rerank_file(
    engines: Callable[[], tuple[Engine, Engine]],
    input_path: str | Path,
    output_path: str | Path,
    settings: RerankSettings,
    *,
    made_by: dict[str, Any] | None = None,
) -> int:
    """Rank the candidates of each line, or write them first; returns the number of lines.

    engines: gives the forward and the reverse engine, once the whole input is known to be well formed. made_by: what else the
    output depends on, such as the models' folders and the batch size; a resumed run must say the same.

    What is finished is kept in `<output>.part` with `<output>.part.json`, which holds the settings and what was spent; the
    same call goes on from there. At the end the output gets its name, and `<output>.spent.json` tells the cost. Raises DataError
    with the line for a bad one, and MismatchError where the part was made from another input or otherwise.
    """
    input_path, output_path = Path(input_path), Path(output_path)
    _check_paths(input_path, output_path)
    records = list(read_records(input_path, sampled=settings.sampling is not None))
    windows = list(_windows(records, settings))
    part = _Part(output_path, {"settings": asdict(settings), **(made_by or {})})
    num_done = part.resume(windows)
    forward, reverse = engines()
    with tqdm(total=len(records), unit=" prompts", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        bar.update(sum(map(len, windows[:num_done])))
        for window in windows[num_done:]:
            before, start = (forward.spent.tokens, reverse.spent.tokens), time.monotonic()
            lines = _named(forward, reverse, window, settings)
            spent = {
                "forward_tokens": forward.spent.tokens - before[0],
                "reverse_tokens": reverse.spent.tokens - before[1],
                "seconds": time.monotonic() - start,
            }
            part.append(lines, spent)
            bar.update(len(window))
    part.finish()
    return len(records)


def read_records(path: Path, *, sampled: bool) -> Iterator[Record]:
    """The lines of a reranking file, each checked; a fault is named by file and line. Blank lines are passed over."""
    with path.open("rb") as lines:
        numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
        for index, (number, line) in enumerate(numbered):
            yield _parse_record(line, index, f"{path}:{number}", sampled)


def _check_paths(input_path: Path, output_path: Path) -> None:
    """Refuse, before any model is loaded, an input that is no file and an output that cannot be written."""
    if not input_path.is_file():
        raise UsageError(f"{input_path} is no file; pass JSON lines with a prompt each")
    if not output_path.parent.is_dir():
        raise UsageError(f"the folder {output_path.parent} of the output does not exist; create it first")
    if output_path.is_dir() or output_path.resolve() == input_path.resolve():
        raise UsageError(f"the output {output_path} is a folder or the input itself; name another file")


def _windows(records: list[Record], settings: RerankSettings) -> Iterator[list[Record]]:
    """Consecutive lines with at least `window_candidates` together; one line where each is a search of its own."""
    sampled = settings.sampling.num_return_sequences if settings.sampling else 0
    window: list[Record] = []
    num_candidates = 0
    for record in records:
        window.append(record)
        num_candidates += len(record.candidates or []) or sampled
        if settings.beam or num_candidates >= settings.window_candidates:
            yield window
            window, num_candidates = [], 0
    if window:
        yield window


def _named(forward: Engine, reverse: Engine, window: list[Record], settings: RerankSettings) -> list[dict[str, Any]]:
    """The window's output; an error names the line that causes it, which is found by trying each line alone."""
    try:
        return _ranked(forward, reverse, window, settings)
    except LedomError as whole:
        for record in window:
            try:
                _ranked(forward, reverse, [record], settings)
            except LedomError as error:
                raise type(error)(f"{record.where}: {error}") from error
        raise whole


def _ranked(forward: Engine, reverse: Engine, window: list[Record], settings: RerankSettings) -> list[dict[str, Any]]:
    """The output object of each line."""
    written = _written(forward, reverse, window, settings)
    if settings.beam is not None:
        return written
    candidates = [
        record.candidates or [Candidate(text) for text in fields["candidates"]]
        for record, fields in zip(window, written, strict=True)
    ]
    questions = [(record.prompt, own) for record, own in zip(window, candidates, strict=True)]
    results = []
    scored = score_questions(forward, reverse, questions, settings.reward)
    for fields, own, scores in zip(written, candidates, scored, strict=True):
        ranking = rank([score.reward for score in scores])
        values = [score.as_fields(token_values=settings.token_values) for score in scores]
        results.append({**fields, "scores": values, "ranking": ranking, "best": own[ranking[0]].text})
    return results


def _written(forward: Engine, reverse: Engine, window: list[Record], settings: RerankSettings) -> list[dict[str, Any]]:
    """The fields of each line, with what the forward model writes for it."""
    written = [dict(record.fields) for record in window]
    if settings.sampling is None:
        return written
    roots = [root(record.prompt, settings.sampling, record.number) for record in window]
    if settings.greedy:
        likeliest = Sampling(max_new_tokens=settings.sampling.max_new_tokens)
        for fields, (path,) in zip(written, forward.sample(roots, likeliest), strict=True):
            fields["greedy"] = path.text
    if settings.beam is None:
        for fields, paths in zip(written, forward.sample(roots, settings.sampling), strict=True):
            fields["candidates"] = [path.text for path in paths]
        return written
    for fields, start in zip(written, roots, strict=True):
        found = beam_search(forward, reverse, start, settings.beam, settings.sampling, settings.reward)
        fields |= found.as_fields(token_values=settings.token_values)
    return written


class _Part:
    """The unfinished output: whole windows only, and beside it the settings that made it."""

    def __init__(self, output: Path, made_by: dict[str, Any]) -> None:
        self._output, self._part = output, output.with_name(output.name + ".part")
        self._notes = output.with_name(output.name + ".part.json")
        self._made_by = json.loads(json.dumps(made_by, default=sorted))
        self._spent: list[dict[str, float]] = []

    def resume(self, windows: list[list[Record]]) -> int:
        """Cut what an earlier run left to whole windows, check that it belongs to this input; returns how many there are."""
        if not (self._notes.is_file() and self._part.is_file()):  # nothing was begun, or a run ended in its very last moment
            self._part.unlink(missing_ok=True)
            self._notes.unlink(missing_ok=True)
            return 0
        notes = json.loads(self._notes.read_text(encoding="utf-8"))
        if notes["made_by"] != self._made_by:
            raise MismatchError(
                f"{self._part} was begun otherwise ({_difference(notes['made_by'], self._made_by)}); say the same to go on, or"
                f" remove {self._notes}"
            )
        self._spent = notes["spent"]
        lines = self._part.read_bytes().splitlines(keepends=True)
        finished = windows[: len(self._spent)]
        records = [record for window in finished for record in window]
        kept = lines[: len(records)]
        for record, line in zip_longest(records, kept):
            found = json.loads(line) if line is not None else {}
            if any(found.get(key) != value for key, value in record.fields.items() if key not in WRITTEN):
                raise MismatchError(f"{self._part} was made from another input than {record.where}; remove it to start again")
        os.truncate(self._part, sum(map(len, kept)))
        return len(finished)

    def append(self, lines: list[dict[str, Any]], spent: dict[str, float]) -> None:
        """Add a window. The notes count it only when its lines are safe on the disk."""
        with self._part.open("a", encoding="utf-8") as output:
            output.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            output.flush()
            os.fsync(output.fileno())
        self._spent.append(spent)
        fresh = self._notes.with_name(self._notes.name + ".new")
        with fresh.open("w", encoding="utf-8") as notes:
            json.dump({"made_by": self._made_by, "spent": self._spent}, notes)
            notes.flush()
            os.fsync(notes.fileno())
        fresh.replace(self._notes)

    def finish(self) -> None:
        """Give the output its name. What was spent stands beside it."""
        self._part.touch()
        total = {
            name: math.fsum(spent[name] for spent in self._spent) for name in ("forward_tokens", "reverse_tokens", "seconds")
        }
        report = {**total, "made_by": self._made_by}
        self._output.with_name(self._output.name + ".spent.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        self._part.replace(self._output)
        self._notes.unlink(missing_ok=True)


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    changed = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            changed += [_difference(before, after)] if before != after else []
        elif before != after:
            changed.append(f"{name} was {before}, is {after}")
    return "; ".join(changed)


def _parse_record(line: bytes, number: int, where: str, sampled: bool) -> Record:
    try:
        fields = json.loads(line.decode("utf-8"))
    except ValueError as error:
        raise DataError(f"{where}: not a line of JSON in UTF-8 ({error}); repair or remove the line") from error
    prompt = fields.get("prompt") if isinstance(fields, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise DataError(f'{where}: expected an object with a text that is not empty under "prompt"; add it or remove the line')
    given = fields.get("candidates")
    if sampled:
        if given is not None:
            raise DataError(f"{where}: has candidates already; rank these without sampling, or remove the field")
        return Record(number, where, prompt, None, fields)
    if not isinstance(given, list) or not given:
        raise DataError(f'{where}: expected a list of at least one answer under "candidates"; or let the model sample them')
    candidates = [_parse_candidate(item, f"{where}: candidate {i}") for i, item in enumerate(given)]
    return Record(number, where, prompt, candidates, fields)


def _parse_candidate(item: Any, where: str) -> Candidate:
    if isinstance(item, str):
        return Candidate(item)
    if not isinstance(item, dict) or not isinstance(item.get("text"), str):
        raise DataError(f'{where}: expected a text, or an object with a text under "text"; write it as one of them')
    logprob, num_tokens = item.get("forward_logprob"), item.get("forward_tokens")
    if logprob is None:
        return Candidate(item["text"])
    if isinstance(logprob, bool) or not isinstance(logprob, int | float) or not math.isfinite(logprob) or logprob > 0:
        raise DataError(
            f"{where}: forward_logprob={logprob!r} is no logarithm of a probability (a number up to 0); correct or remove it"
        )
    if num_tokens is not None and (type(num_tokens) is not int or num_tokens < 0):
        raise DataError(f"{where}: forward_tokens={num_tokens!r} is no number of tokens; correct or remove it")
    return Candidate(item["text"], float(logprob), num_tokens)
