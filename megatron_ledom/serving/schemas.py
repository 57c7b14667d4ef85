"""Bodies of the requests. Field names and defaults of the reward are those of `RewardSettings`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from megatron_ledom.inference.reverse_reward.reward import RewardSettings

MAX_ITEMS = 1024
"""Largest number of candidates, documents or pairs of a request."""
MAX_CHOICES = 128
MAX_SEED = 1 << 63
Finite = Annotated[float, Field(allow_inf_nan=False)]
Normalization = Literal["none", "token", "byte"]
TooLong = Literal["refuse", "skip"]
DEFAULTS = RewardSettings()


class Strict(BaseModel):
    """A body in which an unknown field is an error, so that a misspelt option does not pass unseen."""

    model_config = ConfigDict(extra="forbid")


class RewardOptions(BaseModel):
    """The fields of `RewardSettings`."""

    weight: Annotated[Finite, Field(ge=0, le=1)] = Field(DEFAULTS.weight, description="lambda, the weight of the reverse model")
    forward_normalization: Normalization = Field("none", description="divisor of log P_F(candidate | prompt)")
    reverse_normalization: Normalization = Field("none", description="divisor of log P_R(prompt | candidate)")
    language_model_weight: Finite = Field(DEFAULTS.language_model_weight, description="mu, the weight of log P_R(candidate)")
    temperature: Annotated[Finite, Field(gt=0)] = Field(DEFAULTS.temperature, description="T, divides the reward")
    include_ends: bool = Field(DEFAULTS.include_ends, description="both log-probabilities include the end of the text")

    def settings(self) -> RewardSettings:
        """Return the settings."""
        return RewardSettings(**{name: getattr(self, name) for name in RewardOptions.model_fields})


class GivenCandidate(Strict):
    """An answer whose forward log-probability is known."""

    text: str
    forward_logprob: Finite | None = None
    forward_tokens: Annotated[int, Field(ge=0, lt=1 << 53)] | None = None


Candidates = Annotated[list[str | GivenCandidate], Field(min_length=1, max_length=MAX_ITEMS)]


class RewardItem(Strict):
    """A prompt with its candidates. The prompt is joined to a candidate exactly as given."""

    prompt: Annotated[str, Field(min_length=1)]
    candidates: Candidates


class RewardOutput(Strict):
    """Options of the response."""

    token_values: bool = Field(False, description="also return the id and log-probability of each token")
    too_long: TooLong = Field("refuse", description="texts that are too long for a model: 400, or no score")


class RewardRequest(RewardOutput, RewardOptions):
    """A prompt with candidates, or several as `items`."""

    model: str | None = Field(None, description="ignored: both models are used")
    prompt: Annotated[str, Field(min_length=1)] | None = None
    candidates: Candidates | None = None
    items: Annotated[list[RewardItem], Field(min_length=1, max_length=MAX_ITEMS)] | None = None


class TextPair(Strict):
    """Two adjacent texts, joined exactly as given."""

    preceding: str
    following: str


class ScoreRequest(Strict):
    """Pairs to score. Without `model`, all models of the server score them."""

    model: str | None = None
    pairs: Annotated[list[TextPair], Field(min_length=1, max_length=MAX_ITEMS)]
    include_ends: bool = Field(False, description="also score the end of the text (forward) or its beginning (reverse)")
    token_values: bool = Field(True, description="return the id, text and log-probability of each scored token")


class Document(BaseModel):
    """A document as an object; further fields are ignored."""

    text: Annotated[str, Field(min_length=1)]


class RerankRequest(BaseModel):
    """A query with documents, as clients of Jina, Cohere and vLLM send it. Unknown fields are ignored."""

    model: str | None = None
    query: Annotated[str, Field(min_length=1)]
    documents: Annotated[list[Annotated[str, Field(min_length=1)] | Document], Field(min_length=1, max_length=MAX_ITEMS)]
    top_n: Annotated[int, Field(ge=0)] | None = Field(None, description="number of results; without it, or with 0, all")
    return_documents: bool | None = Field(None, description="false: results have no document")
    separator: str = Field("\n", description="stands between query and document")
    weight: Annotated[Finite, Field(ge=0, le=1)] | None = Field(
        None, description="lambda; by default 0.5 with a forward model, 1 without"
    )
    forward_normalization: Normalization = "none"
    reverse_normalization: Normalization = "none"
    language_model_weight: Finite = 0.0
    include_ends: bool = False
    too_long: TooLong = Field("refuse", description="documents that are too long for a model: 400, or ranked last")


class OpenRlhfRequest(BaseModel):
    """The body that OpenRLHF sends to a remote reward model: `query` is prompt and answer as one text. Others are ignored."""

    query: Annotated[list[str], Field(min_length=1, max_length=MAX_ITEMS)]
    prompts: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_ITEMS)]
    labels: list[Any] | None = None


class StreamOptions(BaseModel):
    """Options of a stream."""

    include_usage: bool | None = None


Text = Annotated[str, Field(min_length=1)]
Texts = Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES)]


class CompletionRequest(Strict):
    """OpenAI's schema of completions. A reverse model takes `suffix`, a forward model takes `prompt`; both together fill in a text."""

    model: str | None = Field(None, description="name or direction of a model; by default the one whose field is used")
    prompt: str | list[str] | None = Field(None, description="for a forward model, or with suffix: the text that precedes")
    suffix: str | list[str] | None = Field(None, description="for a reverse model, or with prompt: the text that follows")
    max_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = 16
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = 1.0
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-MAX_SEED, lt=MAX_SEED)] | None = None
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    best_of: int | None = Field(None, description="with prompt and suffix: texts of each model, from which n are chosen")
    frequency_penalty: Finite | None = None
    presence_penalty: Finite | None = None
    logit_bias: dict[str, Finite] | None = None
