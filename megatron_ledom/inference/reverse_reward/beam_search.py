"""Step-level beam search guided by Reverse Reward (LEDOM, arXiv 2507.01335, section "Reverse Reward").

The forward model writes answers step by step. After each step the search ranks the partial answers by their reward and continues
the best ones. The reverse model must read each answer again after every step, because a new step is the *beginning* of its
input; so its cost per step grows with the length of the answer. The forward model keeps its keys and values, so it reads
the prompt once and each token of an answer once.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from megatron_ledom.errors import UsageError
from megatron_ledom.inference.engines.engine import Engine, PartialAnswer, StepDelimiter, UsageMeter
from megatron_ledom.inference.generation import Sampling
from megatron_ledom.inference.reverse_reward.reward import (
    Candidate,
    CandidateScore,
    RewardSettings,
    candidate_problems,
    rank,
    ranked_fields,
    score_questions,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSettings:
    """The numbers of beams (k) and of expansions at each step (n). The paper uses 4 and 3; its delimiter is not published."""

    num_beams: int = 4
    num_expansions: int = 3
    delimiter: StepDelimiter = field(default_factory=StepDelimiter)

    def __post_init__(self) -> None:
        """Raise UsageError for numbers below 1."""
        if self.num_beams < 1 or self.num_expansions < 1:
            raise UsageError(
                f"a beam search with {self.num_beams} beams and {self.num_expansions} expansions writes nothing; both must be"
                " at least 1"
            )


@dataclass(frozen=True, slots=True)
class SearchRound:
    """One round of a search: the numbers of answers it ranked, kept and finished so far, and its token usage."""

    num_paths: int
    num_kept: int
    num_finished: int
    forward_tokens: int
    reverse_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The result of a search: the finished answers in the order of their ends, their scores, their ranking, and the rounds."""

    answers: list[Candidate]
    scores: list[CandidateScore]
    ranking: list[int]
    rounds: list[SearchRound]

    def as_fields(self, *, token_values: bool = False) -> dict[str, Any]:
        """Return the fields of a reranking file, without the seconds, which would differ between two runs."""
        rounds = [asdict(search_round) for search_round in self.rounds]
        for search_round in rounds:
            del search_round["seconds"]
        return {
            "candidates": [answer.text for answer in self.answers],
            **ranked_fields(self.answers, self.scores, token_values=token_values),
            "search": {
                "steps": rounds,
                "forward_tokens": sum(search_round.forward_tokens for search_round in self.rounds),
                "reverse_tokens": sum(search_round.reverse_tokens for search_round in self.rounds),
            },
        }


def beam_search(
    forward: Engine, reverse: Engine, start: PartialAnswer, beam: BeamSettings, sampling: Sampling, reward: RewardSettings
) -> SearchResult:
    """Search for answers from `start`, a PartialAnswer without text (`empty_answer`).

    The first round writes k * n first steps. Each later round writes n continuations of every kept answer. Finished answers
    occupy beams: with m of them, the search keeps the best k - m unfinished answers. So it ends with k answers, or with more if
    several finish in the last round. Unfinished answers are ranked by the reward of their text so far; log P_F is that of the
    sampling if the engine reports it, so it costs no forward pass. Finished answers are scored again at the end, exactly like
    the candidates of a file. With n = 1 nothing is pruned, and the answers are those of best-of-k with the same seed.
    Temperature 0 requires k = n = 1, because all samples would be equal.
    """
    if sampling.temperature == 0 and beam.num_beams * beam.num_expansions > 1:
        raise UsageError("beams at temperature 0 would all be the same; set a temperature above 0")
    finished: list[PartialAnswer] = []
    live, num = [start], beam.num_beams * beam.num_expansions
    rounds: list[SearchRound] = []
    while live:
        meter = UsageMeter(forward, reverse)
        grown = [answer for own in forward.expand(live, num, beam.delimiter, sampling) for answer in own]
        finished += [answer for answer in grown if answer.finished]
        unfinished = [answer for answer in grown if not answer.finished]
        width = max(0, beam.num_beams - len(finished))
        live = _best(forward, reverse, unfinished, width, reward)
        rounds.append(SearchRound(len(grown), len(live), len(finished), **meter.usage()))
        num = beam.num_expansions
    meter = UsageMeter(forward, reverse)
    candidates = [Candidate(answer.text) for answer in finished]
    scores = _scores(forward, reverse, start.prompt, candidates, reward)
    rounds.append(SearchRound(len(finished), 0, len(finished), **meter.usage()))
    return SearchResult(candidates, scores, rank([score.reward for score in scores]), rounds)


def _best(
    forward: Engine, reverse: Engine, answers: list[PartialAnswer], width: int, reward: RewardSettings
) -> list[PartialAnswer]:
    """Return the `width` best answers, in their old order; skip the scoring if all or none are kept."""
    if width >= len(answers) or not width:
        return answers[:width]
    partial = replace(reward, include_ends=False)  # an unfinished answer has no end yet
    candidates = [Candidate(answer.text, answer.forward_logprob, answer.num_tokens) for answer in answers]
    scores = _scores(forward, reverse, answers[0].prompt, candidates, partial)
    return [answers[index] for index in sorted(rank([score.reward for score in scores])[:width])]


def _scores(
    forward: Engine, reverse: Engine, prompt: str, candidates: list[Candidate], reward: RewardSettings
) -> list[CandidateScore]:
    """Return the scores of written answers; those that are too long for a model are skipped."""
    problems = candidate_problems(forward, reverse, prompt, candidates, reward, is_written=True)
    return score_questions(forward, reverse, [(prompt, candidates)], reward, [problems])[0]
