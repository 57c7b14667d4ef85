"""Reverse Reward: rank a forward model's answers by how well a reverse model recovers the prompt from them.

`R(x, y) = P_F(y|x)^(1-lambda) * P_R(x|y)^lambda` (LEDOM, arXiv 2507.01335, section "Reverse Reward"), here in logs:
`(1 - lambda) log P_F(y|x) + lambda log P_R(x|y)`, x the prompt, y a candidate answer. Both terms are sums over the tokens of
the prompt joined to the candidate as given; neither is normalised by length.
"""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from megatron_ledom.errors import DataError, LedomError, UsageError
from megatron_ledom.inference.forward_lm import ForwardLM
from megatron_ledom.inference.generation import Sampling
from megatron_ledom.inference.reverse_lm import ReverseLM
from megatron_ledom.inference.scoring import check_batch_size


@dataclass(frozen=True, slots=True)
class Candidate:
    """An answer in text order. forward_logprob: its natural log-probability, if whoever sampled it kept it."""

    text: str
    forward_logprob: float | None = None


@dataclass(frozen=True, slots=True)
class CandidateScore:
    """Natural logs, summed over tokens. forward_tokens is None where forward_logprob was given and not computed here.

    An empty answer has nothing to condition the reverse model on: its reverse_logprob and reward are None, and it ranks last.
    """

    forward_logprob: float
    reverse_logprob: float | None
    forward_tokens: int | None
    reverse_tokens: int
    reward: float | None


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a reranking file; `fields` are all its fields as read."""

    where: str
    prompt: str
    candidates: list[Candidate] | None
    fields: dict[str, Any]


def reverse_reward(forward_logprob: float, reverse_logprob: float, weight: float) -> float:
    """(1 - weight) * forward_logprob + weight * reverse_logprob; a term of weight 0 is left out, so 0 * -inf never is NaN."""
    terms = ((1 - weight, forward_logprob), (weight, reverse_logprob))
    return math.fsum(share * logprob for share, logprob in terms if share > 0)


def check_weight(weight: float) -> None:
    """Refuse a weight (lambda) outside [0, 1]."""
    if not 0 <= weight <= 1:
        raise UsageError(f"weight={weight} is outside [0, 1]; 0 ranks by the forward model alone, 1 by the reverse model alone")


def score_candidates(
    forward: ForwardLM,
    reverse: ReverseLM,
    prompt: str,
    candidates: list[Candidate],
    *,
    weight: float = 0.5,
    batch_size: int = 16,
) -> list[CandidateScore]:
    """Score each candidate after `prompt`, in input order; `prompt` ends with whatever separates it from an answer."""
    check_weight(weight)
    unscored = [c.text for c in candidates if c.forward_logprob is None]
    forward_scores = iter(forward.log_likelihood([prompt] * len(unscored), unscored, batch_size=batch_size))
    answers = [c.text for c in candidates if c.text]
    reverse_scores = iter(reverse.log_likelihood([prompt] * len(answers), answers, batch_size=batch_size))
    scores = []
    for candidate in candidates:
        forward_logprob, forward_tokens = candidate.forward_logprob, None
        if forward_logprob is None:
            forward_score = next(forward_scores)
            forward_logprob, forward_tokens = forward_score.logprob, forward_score.num_tokens
        if not candidate.text:
            scores.append(CandidateScore(forward_logprob, None, forward_tokens, 0, None))
            continue
        score = next(reverse_scores)
        reward = reverse_reward(forward_logprob, score.logprob, weight)
        scores.append(CandidateScore(forward_logprob, score.logprob, forward_tokens, score.num_tokens, reward))
    return scores


def rank(rewards: list[float | None]) -> list[int]:
    """Indices, best first; equal rewards keep their order, None comes last."""
    return sorted(range(len(rewards)), key=lambda i: (rewards[i] is None, -(rewards[i] or 0.0)))


def sample_candidates(
    forward: ForwardLM, prompt: str, sampling: Sampling, *, salt: int = 0, batch_size: int = 16
) -> list[Candidate]:
    """Let the forward model answer `num_return_sequences` times; `salt` (a record's number) sets equal prompts apart."""
    seed = ((sampling.seed or 0) * 1_000_003 + salt) % 2**63
    options = {**asdict(sampling), "seed": seed}
    return [Candidate(r.following) for r in forward.generate_following(prompt, batch_size=batch_size, **options)]


def rerank_file(
    forward: ForwardLM | str | Path,
    reverse: ReverseLM | str | Path,
    input_path: str | Path,
    output_path: str | Path,
    *,
    weight: float = 0.5,
    sampling: Sampling | None = None,
    batch_size: int = 16,
) -> int:
    """Rank the candidates of each line of a JSON-lines file, or sample them first; returns the number of lines written.

    forward, reverse: models, or folders to load once the whole input is known to be well formed. The output is written to
    `<output>.part` and renamed when complete; after an error nothing is left.
    """
    input_path, output_path = Path(input_path), Path(output_path)
    check_weight(weight)
    check_batch_size(batch_size)
    _check_paths(input_path, output_path)
    records = list(read_records(input_path, sampled=sampling is not None))
    reverse_lm = reverse if isinstance(reverse, ReverseLM) else ReverseLM.from_pretrained(reverse)
    forward_lm = forward if isinstance(forward, ForwardLM) else ForwardLM.from_pretrained(forward)
    with _written_whole(output_path) as output:
        for number, record in enumerate(tqdm(records, unit=" prompts", file=sys.stderr, disable=not sys.stderr.isatty())):
            try:
                candidates = record.candidates
                if candidates is None and sampling is not None:
                    candidates = sample_candidates(forward_lm, record.prompt, sampling, salt=number, batch_size=batch_size)
                result = _ranked(forward_lm, reverse_lm, record, candidates or [], weight, batch_size)
            except LedomError as error:
                raise type(error)(f"{record.where}: {error}") from error
            output.write(json.dumps(result, ensure_ascii=False) + "\n")
    return len(records)


def read_records(path: Path, *, sampled: bool) -> Iterator[Record]:
    """The lines of a reranking file, each checked; a fault is named by file and line. Blank lines are passed over."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _parse_record(line, f"{path}:{number}", sampled)


def _parse_record(line: bytes, where: str, sampled: bool) -> Record:
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
        return Record(where, prompt, None, fields)
    if not isinstance(given, list) or not given:
        raise DataError(f'{where}: expected a list of at least one answer under "candidates"; or let the model sample them')
    return Record(where, prompt, [_parse_candidate(item, f"{where}: candidate {i}") for i, item in enumerate(given)], fields)


def _parse_candidate(item: Any, where: str) -> Candidate:
    if isinstance(item, str):
        return Candidate(item)
    if not isinstance(item, dict) or not isinstance(item.get("text"), str):
        raise DataError(f'{where}: expected a text, or an object with a text under "text"; write it as one of them')
    logprob = item.get("forward_logprob")
    if logprob is None:
        return Candidate(item["text"])
    if isinstance(logprob, bool) or not isinstance(logprob, int | float) or not math.isfinite(logprob) or logprob > 0:
        raise DataError(
            f"{where}: forward_logprob={logprob!r} is no logarithm of a probability (a number up to 0); correct or remove it"
        )
    return Candidate(item["text"], float(logprob))


def _ranked(
    forward: ForwardLM, reverse: ReverseLM, record: Record, candidates: list[Candidate], weight: float, batch_size: int
) -> dict[str, Any]:
    """The output object of one line."""
    scores = score_candidates(forward, reverse, record.prompt, candidates, weight=weight, batch_size=batch_size)
    ranking = rank([score.reward for score in scores])
    sampled = {} if record.candidates is not None else {"candidates": [candidate.text for candidate in candidates]}
    return {
        **record.fields,
        **sampled,
        "scores": [asdict(score) for score in scores],
        "ranking": ranking,
        "best": candidates[ranking[0]].text,
    }


def _check_paths(input_path: Path, output_path: Path) -> None:
    if not input_path.is_file():
        raise UsageError(f"{input_path} is no file; pass JSON lines with a prompt each")
    if not output_path.parent.is_dir():
        raise UsageError(f"the folder {output_path.parent} of the output does not exist; create it first")
    if output_path.is_dir() or output_path.resolve() == input_path.resolve():
        raise UsageError(f"the output {output_path} is a folder or the input itself; name another file")


@contextmanager
def _written_whole(path: Path) -> Iterator[IO[str]]:
    """A text file that appears under its name only when everything was written."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w", encoding="utf-8") as output:
            yield output
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
