"""Step-level beam search guided by Reverse Reward (LEDOM, arXiv 2507.01335, section "Reverse Reward").

The forward model writes answers step by step; after each step the paths so far are ranked by their reward and the best go on.
A reverse pass keeps no keys and values for the next step: a step is put at the end of the answer, which is the *beginning* of
what a reverse model reads, so that everything it has computed about the rest becomes invalid. Its cost therefore grows with
the length of the path at every step. The forward model's prefixes are kept: it reads a prompt once, and a path never again.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from megatron_ledom.errors import UsageError
from megatron_ledom.inference.engines.engine import Engine, Meter, Path, StepDelimiter
from megatron_ledom.inference.generation import Sampling
from megatron_ledom.inference.reverse_reward.reward import (
    Candidate,
    CandidateScore,
    RewardSettings,
    candidate_faults,
    rank,
    ranked_fields,
    score_questions,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSettings:
    """k beams, n expansions a step. The paper's are 4 and 3; its delimiter is not published."""

    num_beams: int = 4
    num_expansions: int = 3
    delimiter: StepDelimiter = field(default_factory=StepDelimiter)

    def __post_init__(self) -> None:
        """Refuse a search of nothing."""
        if self.num_beams < 1 or self.num_expansions < 1:
            raise UsageError(
                f"a beam search with {self.num_beams} beams and {self.num_expansions} expansions writes nothing; both must be"
                " at least 1"
            )


@dataclass(frozen=True, slots=True)
class Step:
    """One round of a search: how many paths it looked at, how many went on, how many were finished so far, and its cost."""

    num_paths: int
    num_kept: int
    num_finished: int
    forward_tokens: int
    reverse_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Found:
    """The result of a search: finished answers in the order in which they ended, their scores, the ranking and the rounds."""

    answers: list[Candidate]
    scores: list[CandidateScore]
    ranking: list[int]
    steps: list[Step]

    def as_fields(self, *, token_values: bool = False) -> dict[str, Any]:
        """The output fields of a reranking file. Seconds are left out: they would differ between two runs."""
        rounds = [asdict(step) for step in self.steps]
        for step in rounds:
            del step["seconds"]
        return {
            "candidates": [answer.text for answer in self.answers],
            **ranked_fields(self.answers, self.scores, token_values=token_values),
            "search": {
                "steps": rounds,
                "forward_tokens": sum(step.forward_tokens for step in self.steps),
                "reverse_tokens": sum(step.reverse_tokens for step in self.steps),
            },
        }


def beam_search(
    forward: Engine, reverse: Engine, start: Path, beam: BeamSettings, sampling: Sampling, reward: RewardSettings
) -> Found:
    """Search for answers from `start`, a Path without text (`engine.root`).

    The first round writes k * n first steps, each later one n continuations of every path that went on. Finished paths are
    kept and take up beams: with m of them, the best k - m of the others go on, so that the search ends with k answers or, if
    more ended in one round, with all of these. Unfinished paths are ranked by the reward of what is written, where log P_F is
    that of the tokens as they were sampled if the engine tells it (no pass is spent on it); the finished ones are scored
    once more at the end, exactly like candidates of a file. With n = 1 nothing is pruned, and the answers are those of
    best-of-k with the same seed. Temperature 0 allows one beam only, since all of its samples are the same.
    """
    if sampling.temperature == 0 and beam.num_beams * beam.num_expansions > 1:
        raise UsageError("beams at temperature 0 would all be the same; set a temperature above 0")
    finished: list[Path] = []
    live, num = [start], beam.num_beams * beam.num_expansions
    steps: list[Step] = []
    while live:
        meter = Meter(forward, reverse)
        grown = [path for own in forward.expand(live, num, beam.delimiter, sampling) for path in own]
        finished += [path for path in grown if path.finished]
        unfinished = [path for path in grown if not path.finished]
        width = max(0, beam.num_beams - len(finished))
        live = _best(forward, reverse, unfinished, width, reward)
        steps.append(Step(len(grown), len(live), len(finished), **meter.spent()))
        num = beam.num_expansions
    meter = Meter(forward, reverse)
    answers = [Candidate(path.text) for path in finished]
    scores = _scores(forward, reverse, start.prompt, answers, reward)
    steps.append(Step(len(finished), 0, len(finished), **meter.spent()))
    return Found(answers, scores, rank([score.reward for score in scores]), steps)


def _best(forward: Engine, reverse: Engine, paths: list[Path], width: int, reward: RewardSettings) -> list[Path]:
    """The `width` best paths, in their old order; nothing is scored where all or none go on."""
    if width >= len(paths) or not width:
        return paths[:width]
    partial = replace(reward, include_ends=False)  # an unfinished answer has no end yet
    candidates = [Candidate(path.text, path.forward_logprob, path.num_tokens) for path in paths]
    scores = _scores(forward, reverse, paths[0].prompt, candidates, partial)
    return [paths[index] for index in sorted(rank([score.reward for score in scores])[:width])]


def _scores(
    forward: Engine, reverse: Engine, prompt: str, candidates: list[Candidate], reward: RewardSettings
) -> list[CandidateScore]:
    """The scores of what was written; what is too long for a model, as it tokenises it, gets none."""
    faults = candidate_faults(forward, reverse, prompt, candidates, reward, is_written=True)
    return score_questions(forward, reverse, [(prompt, candidates)], reward, [faults])[0]
