"""A model whose weights run on an upstream, a completions server such as vLLM: its connection, and the checks at the start.

The folder of the model is read here for its tokenizer, eod and direction. The upstream gets ids in model order, so it needs no knowledge
of any of them. But it may serve another model than that of the folder, and then every answer would look right. So before the first
request:

- the model must be listed, and its context counts if it is shorter than the folder's;
- its tokenizer must give the ids of ours (`/tokenize`; without it, the names of the tokens of a scored text);
- its log-probabilities of a few texts must be those of the folder's weights, computed here on the CPU, if these are below 2 GiB or the
  user asks for it; otherwise these texts must be likelier in the order of the folder's direction than in the other. That finds the twin
  of the other direction, but not another model of the same direction and tokenizer;
- it must write a few tokens as requests will ask for them, and give them the log-probabilities that it gives when it scores them.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from megatron_ledom.direction import Direction, to_model_order
from megatron_ledom.errors import MismatchError, RemoteAnswerError, UsageError
from megatron_ledom.inference.engines.completions_client import CompletionsClient, is_loopback
from megatron_ledom.inference.engines.completions_engine import CallerNames, CompletionsEngine
from megatron_ledom.inference.engines.completions_rows import CompletionsRows
from megatron_ledom.inference.generation import Sampling
from megatron_ledom.inference.row_generation import RowRequest
from megatron_ledom.inference.scoring import Span, score_spans, too_long
from megatron_ledom.serving.loading import load_model, unrecorded_reverse
from megatron_ledom.serving.settings import ServeSettings

log = logging.getLogger(__name__)
KEY_VARIABLE = "LEDOM_UPSTREAM_API_KEY"
FORWARD_KEY_VARIABLE = "LEDOM_FORWARD_UPSTREAM_API_KEY"
"""Holds the key of the forward model's upstream, if it is not that of the reverse model's."""
MODEL_OPTIONS = "--upstream-model or --forward-upstream-model"
PROBES = (
    "The capital of France is Paris, and the capital of Germany is Berlin. Many people visit both cities every year.",
    "In 1969 the first people walked on the Moon. They came back to the Earth after eight days, with stones and photographs.",
    "def area(width, height):\n    return width * height\n\n\nprint(area(3, 14))\n",
)
"""Texts that a model of either direction knows better in its own order."""
RARE = "Naïve café, 漢字 and 🙂: 42 + 17 = 59.\n\tA tab, two  spaces, an e\u0301."
"""A text that tokenizers divide differently."""
ORDER_MARGIN = 0.5
"""Difference of the log-probabilities per token from which on the order of the probes is clear; a trained model gives several nats."""
LOWEST = -100.0
"""Stands for smaller log-probabilities, and for minus infinity, in means."""
REMEDY = "Start the upstream with this folder, or pass the folder of the model that it serves"
MOST_DIFFERENCE = 0.15
"""Largest mean difference per token from the folder's weights: bf16 and 8-bit weights stay below it, other models do not."""
BESIDE = ("The cat sat", " is nice")
"""Texts that a model continues at the start, short because a context may be."""
HOT = Sampling(max_new_tokens=8, temperature=2.0)
"""At this temperature, log-probabilities after the temperature differ clearly from those before it."""
SMALL_BYTES = 2 << 30
"""Size of weights that are compared without being asked for."""


@dataclass(frozen=True, slots=True)
class _Option:
    """The options of one model's upstream."""

    url: str
    model: str | None
    name_option: str


class UpstreamEngine(CompletionsEngine):
    """Scores on an upstream. A text may have one token less than the model has positions, because vLLM also writes one.

    rows: writes there; `connect` sets it.
    """

    rows: CompletionsRows

    def score_problem(self, pair: tuple[str, str], *, include_end: bool = False) -> str | None:
        """See `Engine.score_problem`."""
        return too_long(len(self._span(pair, include_end).tokens), self.most_scored, self.direction)

    @property
    def most_scored(self) -> int | None:
        """Length of the longest text that can be scored, in tokens; None if there is no limit."""
        return self.num_positions - 1 if self.num_positions else None

    def logprobs(self, spans: list[Span]) -> list[list[float]]:
        """Return the log-probabilities of the scored ids of each span."""
        return self._logprobs(spans)

    def check_names(self, tokens: list[int]) -> bool:
        """Compare the names of the tokens of a prompt with ours; return False if the upstream does not name them.

        Raises RemoteAnswerError for other names.
        """
        completion = self._request(tokens, max_tokens=0, echo=True, logprobs=1, temperature=0)
        return self.checks.prompt_logprobs(completion, tokens)[1]


def connect(settings: ServeSettings, direction: Direction, folder: Path) -> UpstreamEngine:
    """Return the engine of a model on its upstream, after all checks."""
    option, variable = _option(settings, direction), key_variable(settings, direction)
    client = CompletionsClient(
        option.url, timeout=settings.timeout_seconds, key_over_http=settings.key_over_http, key_variable=variable
    )
    listed = _listed_model(client, option)
    engine = UpstreamEngine(
        option.url,
        listed["id"],
        folder,
        direction,
        batch_size=settings.upstream_requests,
        timeout=settings.timeout_seconds,
        key_over_http=settings.key_over_http,
        unrecorded=unrecorded_reverse(settings, direction),
        names=CallerNames(variable, MODEL_OPTIONS, trust_advice=""),
    )
    context = listed["max_model_len"]
    if type(context) is int and context > 0:
        engine.num_positions = min(context, engine.num_positions or context)
    _check_tokenizer(engine, folder)
    _check_model(engine, folder, settings)
    engine.rows = CompletionsRows(engine, settings.upstream_requests)
    check_writing(engine)
    log.info("the %s model runs on an upstream, as %s, with %s positions", direction, listed["id"], engine.num_positions)
    return engine


def key_variable(settings: ServeSettings, direction: Direction) -> str:
    """Return the environment variable of the key of a model's upstream; without a key of its own, the forward one gets the other's.

    Raises UsageError if the upstreams are on two hosts and only one key is set: it may be a secret of one of them.
    """
    hosts = {_host(url) for url in (settings.upstream, settings.forward_upstream) if url}
    missing = [variable for variable in (KEY_VARIABLE, FORWARD_KEY_VARIABLE) if variable not in os.environ]
    if len(hosts) == 2 and len(missing) == 1:
        raise UsageError(
            f"the upstreams are on two hosts, {' and '.join(sorted(hosts))}, and only one key is set; set {missing[0]}, too, to"
            " an empty text if that upstream needs no key"
        )
    shares = FORWARD_KEY_VARIABLE in missing and KEY_VARIABLE not in missing
    return KEY_VARIABLE if direction is Direction.REVERSE or shares else FORWARD_KEY_VARIABLE


def _host(url: str) -> str:
    try:
        host = httpx.URL(url).host
    except httpx.InvalidURL:
        return url  # CompletionsClient refuses it
    return "this machine" if is_loopback(host) else host


def _option(settings: ServeSettings, direction: Direction) -> _Option:
    is_reverse = direction is Direction.REVERSE
    url = (settings.upstream if is_reverse else settings.forward_upstream) or ""
    try:
        if httpx.URL(url).path in ("", "/"):
            url = f"{url.rstrip('/')}/v1"
    except httpx.InvalidURL:
        pass  # CompletionsClient refuses it
    if is_reverse:
        return _Option(url, settings.upstream_model, "--upstream-model")
    return _Option(url, settings.forward_upstream_model, "--forward-upstream-model")


def _listed_model(client: CompletionsClient, option: _Option) -> dict[str, Any]:
    """Return the entry of the model in `/v1/models`; without a name the only one that is no adapter of another.

    Its `max_model_len` is that of the model to which an adapter belongs, if vLLM lists the adapter without one; None if neither has one.
    """
    data = client.get("models").get("data")
    entries = (
        [one for one in data if isinstance(one, dict) and isinstance(one.get("id"), str)] if isinstance(data, list) else []
    )
    chosen = [one for one in entries if (one["id"] == option.model if option.model else not one.get("parent"))]
    if len(chosen) == 1:
        parents = [one for one in entries if one["id"] == chosen[0].get("parent")]
        lengths = [one["max_model_len"] for one in (*chosen, *parents) if one.get("max_model_len") is not None]
        return {**chosen[0], "max_model_len": lengths[0] if lengths else None}
    names = client.shown(", ".join(one["id"] for one in entries)) or "none"
    found = f"has no model {option.model!r}" if option.model else f"has {len(chosen)} models, expected 1"
    raise UsageError(f"{option.url} {found}; pass {option.name_option} NAME with one of its names: {names}")


def _check_tokenizer(engine: UpstreamEngine, folder: Path) -> None:
    """Raise MismatchError if the upstream's tokenizer gives other ids than the folder's; warn if it cannot be compared."""
    for text in (*PROBES, RARE):
        fields = {"model": engine.served_as, "prompt": text, "add_special_tokens": False}
        answer = engine.client.request_if_offered("/tokenize", fields)
        ours, theirs = engine.tokenizer.encode(text), (answer or {}).get("tokens")
        if not theirs or not isinstance(theirs, list) or not all(type(id_) is int for id_ in theirs):
            break  # no such endpoint, or one with another schema
        if theirs != ours:
            shown = engine.client.shown(str(theirs), 60)
            raise MismatchError(
                f"the tokenizer of {engine.client.url} gives {text[:20]!r} ... other ids than that of {folder}:"
                f" {shown}, expected {str(ours)[:60]} .... {REMEDY}"
            )
    else:
        return
    try:
        if not engine.check_names(_probe(engine, RARE, engine.direction).tokens):
            log.warning("%s neither tokenizes nor names tokens, so its tokenizer was not compared", engine.client.url)
    except RemoteAnswerError as error:
        raise MismatchError(f"{error}. {REMEDY}") from error


def _check_model(engine: UpstreamEngine, folder: Path, settings: ServeSettings) -> None:
    """Raise MismatchError if the upstream has other weights than the folder or, if those are large, prefers the other order."""
    other = Direction.FORWARD if engine.direction is Direction.REVERSE else Direction.REVERSE
    spans = [_probe(engine, text, direction) for direction in (engine.direction, other) for text in PROBES]
    largest = Span([engine.stop_ids[0], max(engine.tokenizer.vocab.values())], 1)  # refused by a smaller vocabulary
    found = engine.logprobs([*spans, largest])[:-1]
    own, opposite = _mean(found[: len(PROBES)]), _mean(found[len(PROBES) :])
    order = f"ordinary texts have a log-probability of {own:.2f} per token in the order of a {engine.direction} model, {opposite:.2f} in the other"
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if settings.check_upstream_weights or 0 < num_bytes <= SMALL_BYTES:
        expected = score_spans(load_model(settings, engine.direction, folder, "cpu").model, spans, len(spans))
        difference = _mean_difference(found, expected)
        if difference > MOST_DIFFERENCE:
            raise MismatchError(
                f"{engine.client.url} has other weights than {folder}: log-probabilities of the same tokens differ by {difference:.2f}"
                f" on average, expected at most {MOST_DIFFERENCE}; {order}. {REMEDY}"
            )
        log.info("the log-probabilities of the upstream differ by %.4f per token from those of %s", difference, folder)
    elif opposite - own > ORDER_MARGIN:
        raise MismatchError(
            f"{engine.client.url} serves a {other} model, {folder} is a {engine.direction} model: {order}. {REMEDY}"
        )
    elif own - opposite < ORDER_MARGIN:
        log.warning(
            "the direction of the upstream is unclear: %s; --check-upstream-weights compares it with the weights", order
        )


def check_writing(engine: UpstreamEngine) -> None:
    """Raise MismatchError if the upstream gives written tokens other log-probabilities than the same tokens when it scores them.

    An upstream that does not write as asked for raises RemoteAnswerError.
    """
    written = [engine.rows.written_span(RowRequest(text, HOT, text, num_likeliest=1)) for text in BESIDE]
    difference = _mean_difference([values for _, values in written], engine.logprobs([span for span, _ in written]))
    if difference > MOST_DIFFERENCE:
        raise MismatchError(
            f"{engine.client.url} gives the tokens that it writes other log-probabilities than the same tokens when it scores them: they"
            f" differ by {difference:.2f} on average at temperature {HOT.temperature:g}, expected at most {MOST_DIFFERENCE}; let it return"
            " them as before the temperature (vLLM: start it without --logprobs-mode, or with raw_logprobs)"
        )


def _mean_difference(found: list[list[float]], expected: list[list[float]]) -> float:
    pairs = [pair for rows in zip(found, expected, strict=True) for pair in zip(*rows, strict=True)]
    return sum(abs(max(a, LOWEST) - max(b, LOWEST)) for a, b in pairs) / len(pairs)


def _mean(rows: list[list[float]]) -> float:
    values = [max(value, LOWEST) for row in rows for value in row]
    return sum(values) / len(values)


def _probe(engine: UpstreamEngine, text: str, direction: Direction) -> Span:
    """Return a text after the start of a document, in the order of a model of `direction`, with all of its ids scored."""
    start = engine.leading_ids or engine.stop_ids[:1]
    tokens = [*start, *to_model_order(engine.tokenizer.encode(text), direction)]
    return Span(tokens[: engine.most_scored], len(start))
