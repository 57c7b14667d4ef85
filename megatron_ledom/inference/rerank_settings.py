"""How a reranking file is made: the reward, who writes the candidates, and what becomes of texts that are too long."""

from dataclasses import dataclass, field

from megatron_ledom.errors import UsageError
from megatron_ledom.inference.generation import Sampling
from megatron_ledom.inference.reverse_reward import RewardSettings
from megatron_ledom.inference.search import BeamSettings

REFUSE, SKIP = "refuse", "skip"


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
    too_long: str = REFUSE
    """`refuse`: nothing is begun if the input has texts that are too long for a model, or answers might be. `skip`: they get no
    score. An answer that comes out too long although max_new_tokens has room gets none in any case."""

    def __post_init__(self) -> None:
        """Refuse a search without a way to sample, and an unknown way to deal with texts that are too long."""
        if self.too_long not in (REFUSE, SKIP):
            raise UsageError(f"too_long={self.too_long!r} is unknown; it can be {REFUSE} or {SKIP}")
        if (self.beam or self.greedy) and self.sampling is None:
            raise UsageError("a beam search and a greedy answer are written by the forward model: set how to sample as well")
