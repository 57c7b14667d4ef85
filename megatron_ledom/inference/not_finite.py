"""The error for logits and scores that are NaN or infinite: it names the model, the text and the token."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from megatron_ledom.direction import Direction, to_text_order
from megatron_ledom.errors import NotFiniteError
from megatron_ledom.inference.joint import JointTokenizer

SHOWN_CHARACTERS = 60
"""Of the text beside the token that the error names."""


def not_finite(model: Any, read: Sequence[int], next_id: int | None = None) -> NotFiniteError:
    """Return the error for logits of `model` that are not finite at the position after `read` (ids, model order)."""
    name = getattr(model.config, "name_or_path", "") or type(model).__name__
    token = "for the next token" if next_id is None else f"for token id {next_id}"
    return NotFiniteError(
        f"the model {name} gives logits that are not finite (NaN or infinity, in {model.dtype}) {token} after {len(read)} tokens:"
        " its weights are damaged, or its values exceed the range of that type; check the weights, or load it in float32",
        read,
        next_id,
    )


@contextmanager
def naming_text(tokenizer: JointTokenizer, direction: Direction) -> Iterator[None]:
    """Add the text and the token to a NotFiniteError from inside, whose raiser knows ids only."""
    try:
        yield
    except NotFiniteError as error:
        if not error.read:
            raise
        reverse = direction is Direction.REVERSE
        read = tokenizer.decode(to_text_order(error.read, direction))
        shown = read[:SHOWN_CHARACTERS] if reverse else read[-SHOWN_CHARACTERS:]
        token = "" if error.next_id is None else f" {tokenizer.decode([error.next_id])!r}"
        raise NotFiniteError(f"{error} (token{token} {'before' if reverse else 'after'} {shown!r})") from error
