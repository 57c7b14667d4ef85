"""What the reverse and the forward language model share: loading a folder, checking its direction, scoring, writing."""

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from megatron_ledom.direction import Direction, to_model_order, to_text_order
from megatron_ledom.errors import DataError, MismatchError, UsageError
from megatron_ledom.inference.generation import Writer
from megatron_ledom.inference.joint import JointTokenizer
from megatron_ledom.inference.not_finite import naming_text
from megatron_ledom.inference.scoring import Span, SpanScore, Spent, distinct_spans, score_spans
from megatron_ledom.inference.stock_model import check_model_type, load_stock_model
from megatron_ledom.tokenizers.reader import TokenizerFiles, other_ends, read_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Say:
    """How the caller names, in advice, the eod and the direction of a folder that records neither."""

    eod: str
    reverse: str


SAY_PYTHON = Say("eod_id=ID", "direction='reverse'")
SAY_EOD_ID = Say("--eod-id ID", "--direction reverse")
SAY_REVERSE_EOD = Say("--reverse-eod-id ID", "--reverse-eod-id ID, which says both")
SAY_MODEL_ARGS = Say("eod_id=ID in --model_args", "direction=reverse in --model_args")


class LanguageModel:
    """A causal Hugging Face model with the order in which it reads. Texts and `text_ids` are always text order.

    stop_ids: what ends generation; the first is eod. leading_ids: what stands before every sequence in model order: nothing
    for a model of this package, BOS for a stock model whose tokenizer adds one.
    """

    direction: ClassVar[Direction]

    def __init__(self, model: Any, tokenizer: JointTokenizer, stop_ids: list[int], leading_ids: list[int]) -> None:
        self.model, self.tokenizer, self.stop_ids, self.leading_ids = model, tokenizer, stop_ids, leading_ids
        self.writer = Writer(model, tokenizer, self.direction, stop_ids)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        direction: str | None = None,
        eod_id: int | None = None,
        say: Say = SAY_PYTHON,
    ) -> Self:
        """Load an exported or stock folder of safetensors, offline.

        device: CUDA where there is one, else the CPU. dtype: the stored one on CUDA, float32 on a CPU. direction and eod_id, the
        id that the model was trained to end a text with: only for a reverse model whose config.json records no direction.
        say: how error messages name these two.
        """
        folder = Path(folder)
        config = read_model_config(folder)
        check_model_type(folder, config)
        cls._check_direction(folder, config.get("direction"), direction, say)
        tokenizer, stop_ids = load_tokenizer(folder, cls.direction, eod_id, say)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        chosen = dtype or (torch.float32 if device.type == "cpu" else "auto")
        with _bar_on_terminals_only():
            model = load_stock_model(folder, dtype=chosen)
        model = model.to(device).eval()
        model.generation_config = GenerationConfig()  # the folder's own sampling defaults must not mix with the caller's
        adds_bos = config.get("direction") is None and cls.direction is Direction.FORWARD  # before a text's last word: nonsense
        return cls(model, tokenizer, stop_ids, tokenizer.leading_ids if adds_bos else [])

    @classmethod
    def _check_direction(cls, folder: Path, recorded: str | None, passed: str | None, say: Say) -> None:
        """Refuse a folder that reads the other way; without a record only what is passed, or stock HF, counts."""
        mine = str(cls.direction)
        other = "ForwardLM" if cls.direction is Direction.REVERSE else "ReverseLM"
        if passed is not None and passed != mine:
            raise UsageError(f"direction={passed!r} was passed to {cls.__name__}, which reads {mine}; use {other}")
        if recorded is None and passed is None and cls.direction is Direction.REVERSE:
            raise MismatchError(
                f"{folder}/config.json records no direction, and a stock model reads forward; expected 'reverse': pass a folder"
                f" that tools/convert_checkpoint.py wrote, or say {say.reverse} if you know that it is one"
            )
        if recorded is not None and recorded != mine:
            raise MismatchError(
                f"{folder}/config.json says that this model reads {recorded}, {cls.__name__} needs a {mine} one: load it with"
                f" {other}, or pass the folder of a {mine} model (fed the wrong order, a model gives nonsense without an error)"
            )

    def span_scores(
        self, pairs: list[tuple[str, str]], with_eod: bool, batch_size: int, *, spent: Spent | None = None
    ) -> list[SpanScore]:
        """Score, of each (preceding, following), the part that this model comes to last, given the other part.

        Where the given part is empty, the text is scored by itself after what stands before a document: BOS for a stock model
        whose tokenizer adds one, else eod. spent: takes up the tokens that the model was fed, and the time.
        """
        start = time.monotonic()
        spans = [self._span(pair, with_eod) for pair in pairs]
        with naming_text(self.tokenizer, self.direction):
            values = score_spans(self.model, spans, batch_size)
        scores = [span_score(span, row, self.direction, with_eod) for span, row in zip(spans, values, strict=True)]
        if spent is not None:
            spent.tokens += sum(len(s.tokens) for s in distinct_spans(spans).values() if len(s.tokens) > s.num_context)
            spent.seconds += time.monotonic() - start
        return scores

    def score_fault(self, pair: tuple[str, str], with_eod: bool) -> str | None:
        """Return why `span_scores` would refuse a pair as too long, None where it fits."""
        return too_long(len(self._tokens(pair, with_eod)[0]), self.num_positions, self.direction)

    def growth_fault(self, text: str, num_new_tokens: int) -> str | None:
        """Return why the model has no room for a text and `num_new_tokens` beside it, None where it has."""
        opened = self.tokenizer.open_text(text, self.direction)
        num_given = len(self.leading_ids) + len(opened.tokens) + len(opened.loose)
        return no_room(num_given, num_new_tokens, self.num_positions, self.direction)

    @property
    def num_positions(self) -> int | None:
        """The longest sequence, in tokens; None where the model has no limit."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def _tokens(self, pair: tuple[str, str], with_eod: bool) -> tuple[list[int], int]:
        tokens, num_given = span_tokens(self.tokenizer, self.direction, pair, self.leading_ids, self.stop_ids)
        return [*tokens, *(self.stop_ids[:1] if with_eod else [])], num_given

    def _span(self, pair: tuple[str, str], with_eod: bool) -> Span:
        tokens, num_given = self._tokens(pair, with_eod)
        if fault := too_long(len(tokens), self.num_positions, self.direction):
            raise DataError(f"{fault}; shorten it")
        return Span(tokens, num_given)


def too_long(num_tokens: int, num_positions: int | None, direction: Direction) -> str | None:
    """Return why a text of `num_tokens` cannot be scored, None where it fits."""
    if not num_positions or num_tokens <= num_positions:
        return None
    return f"a text of {num_tokens} tokens exceeds the {num_positions} positions of the {direction} model"


def no_room(num_given: int, num_new: int, num_positions: int | None, direction: Direction) -> str | None:
    """Return why `num_new` tokens cannot be written beside `num_given`, None where they fit."""
    if not num_positions or num_given + num_new <= num_positions:
        return None
    return (
        f"{num_given} tokens of text and max_new_tokens={num_new} exceed the {num_positions} positions of the {direction} model"
    )


def span_tokens(
    tokenizer: JointTokenizer, direction: Direction, pair: tuple[str, str], leading_ids: list[int], stop_ids: list[int]
) -> tuple[list[int], int]:
    """(tokens in model order, how many of them are given) of a (preceding, following) of which one part is to be scored.

    Both parts are encoded once as one text; a token that reaches over the boundary belongs to `following`. An empty given
    part is replaced by what stands before a document. Where the given part has no token of its own, the first token of the
    scored part counts as given, since nothing conditions it.
    """
    text_ids, num_preceding = tokenizer.split(*pair)
    reverse = direction is Direction.REVERSE
    num_given = len(text_ids) - num_preceding if reverse else num_preceding
    given = pair[1] if reverse else pair[0]
    leading = leading_ids or ([] if given else stop_ids[:1])
    if reverse and not num_given and not leading:
        raise DataError("a following text yields no token, so nothing conditions what precedes it; pass other text")
    return [*leading, *to_model_order(text_ids, direction)], max(1, len(leading) + num_given)


def span_score(span: Span, logprobs: list[float], direction: Direction, with_eod: bool) -> SpanScore:
    """The log-probabilities of a span's scored tokens, model order and eod last if it was scored, as a score in text order."""
    num_scored = len(logprobs) - 1 if with_eod else len(logprobs)
    return SpanScore(
        text_ids=to_text_order(span.tokens[span.num_context :][:num_scored], direction),
        token_logprobs=to_text_order(np.array(logprobs[:num_scored]), direction).tolist(),
        eod_logprob=logprobs[-1] if with_eod else None,
    )


@contextlib.contextmanager
def _bar_on_terminals_only() -> Iterator[None]:
    """Keep the progress bar with which transformers loads weights out of log files."""
    if sys.stderr.isatty() or not is_progress_bar_enabled():
        yield
        return
    disable_progress_bar()
    try:
        yield
    finally:
        enable_progress_bar()


def paired(preceding: str | list[str], following: str | list[str]) -> list[tuple[str, str]]:
    """Two texts, or two lists of the same length, as a list of (preceding, following)."""
    preceding, following = as_list(preceding), as_list(following)
    if len(preceding) != len(following):
        raise UsageError(f"{len(preceding)} preceding and {len(following)} following texts do not pair; pass as many of each")
    return list(zip(preceding, following, strict=True))


def as_list(texts: str | list[str]) -> list[str]:
    """One text or several, as a list."""
    return [texts] if isinstance(texts, str) else list(texts)


def load_tokenizer(
    folder: Path, direction: Direction = Direction.FORWARD, eod_id: int | None = None, say: Say = SAY_PYTHON
) -> tuple[JointTokenizer, list[int]]:
    """The tokenizer of a model folder and its stop ids, checked against each other and against what the folder records.

    direction: that of the model, for a folder which records none; eod_id, say: see `LanguageModel.from_pretrained`.
    """
    config = read_model_config(folder)
    files = read_tokenizer(str(folder))
    _check_tokenizer(folder, files, config.get("tokenizer_sha256"))
    trained_here, is_reverse = config.get("direction") is not None, direction is Direction.REVERSE
    tokenizer = JointTokenizer.of_files(files, specials_are_text=trained_here or is_reverse)
    stop_ids = _stop_ids(folder, config)
    if is_reverse and not trained_here:
        stop_ids = [_eod_of_foreign_folder(folder, tokenizer, stop_ids, eod_id, say)]
    elif eod_id is not None:
        remedy = "leave it out" if trained_here else f"leave it out, or, if it is a reverse model, say so ({say.reverse})"
        raise UsageError(
            f"eod_id={eod_id} was passed, but {folder} is read as a {direction} model and says itself what ends a text; {remedy}"
        )
    _check_ids(folder, config, tokenizer, stop_ids)
    return tokenizer, stop_ids


def read_model_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder."""
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"{folder} is no model folder (it has no config.json); pass one that tools/convert_checkpoint.py wrote"
        )
    return _read_json(folder / "config.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); write the folder again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, expected an object; write the folder again")
    return content


def _stop_ids(folder: Path, config: dict[str, Any]) -> list[int]:
    """What the model was trained to stop with: `eod_id` of an export (trap 1), a stock folder's generation eos."""
    generation = _read_json(path) if (path := folder / "generation_config.json").is_file() else {}
    found = (
        ("config.json has eod_id", config.get("eod_id")),
        ("generation_config.json has eos_token_id", generation.get("eos_token_id")),
        ("config.json has eos_token_id", config.get("eos_token_id")),
    )
    where, eos = next(((where, ids) for where, ids in found if ids is not None), ("", None))
    if eos is None:
        raise DataError(f"{folder} names no eod_id or eos_token_id, so generation would never stop; add eod_id to config.json")
    ids = eos if isinstance(eos, list) else [eos]
    if not ids or not all(type(id_) is int and id_ >= 0 for id_ in ids):
        raise DataError(f"{folder}/{where} {eos!r}, expected the id of a token or a list of ids; correct it")
    return list(ids)


def _eod_of_foreign_folder(folder: Path, tokenizer: JointTokenizer, stop_ids: list[int], eod_id: int | None, say: Say) -> int:
    """The eod of a reverse model that others exported: what is passed, or the folder's eos unless there is a doubt.

    The original's export names the tokenizer's eos, 2, and was trained with another token of its own, 64002: it would never stop.
    """
    doubtful = other_ends(tokenizer.vocab, stop_ids)
    if eod_id is None and doubtful:
        names = ", ".join(f"{token} = {id_}" for token, id_ in doubtful.items())
        raise MismatchError(
            f"{folder} names {stop_ids} as its eos, but its tokenizer has {names}, too: with the wrong one, generation never stops;"
            f" pass the one that documents were closed with in training ({say.eod})"
        )
    if eod_id is None:
        logger.warning(
            "%s does not say which id its documents were closed with; its eos %d is taken. Name another with %s",
            *(folder, stop_ids[0], say.eod),
        )
    return stop_ids[0] if eod_id is None else eod_id


def _check_tokenizer(folder: Path, files: TokenizerFiles, recorded: Any) -> None:
    """Refuse an export whose tokenizer is not the one it was trained with."""
    if recorded is not None and not isinstance(recorded, str):
        raise DataError(f"{folder}/config.json has tokenizer_sha256 {recorded!r}, expected a hash; write the folder again")
    if recorded is not None and files.sha256 != recorded:
        raise MismatchError(
            f"the tokenizer of {folder} has hash {files.sha256[:12]}, the model was trained with {recorded[:12]}: its ids would"
            " mean other texts; put back the tokenizer files that the export came with"
        )


def _check_ids(folder: Path, config: dict[str, Any], tokenizer: JointTokenizer, stop_ids: list[int]) -> None:
    """Refuse ids which the embedding does not have."""
    vocab_size = config.get("vocab_size", 0)
    if type(vocab_size) is not int:
        raise DataError(f"{folder}/config.json has vocab_size {vocab_size!r}, expected a number of ids; correct it")
    largest = max([*tokenizer.vocab.values(), *stop_ids])
    if largest >= vocab_size:
        raise MismatchError(
            f"the tokenizer of {folder} and its eod use ids up to {largest}, the model has {vocab_size}: they do not belong"
            " together; export again with the tokenizer that the shards were made with"
        )
