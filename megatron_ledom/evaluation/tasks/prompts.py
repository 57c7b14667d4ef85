"""Prompts: defined once, as fields, and rendered for a forward and for a reverse model.

A forward model reads the few-shot examples, then the question, and writes after the end. A reverse model reads from the
end of the text, so its prompt is mirrored (LEDOM, arXiv 2507.01335, few-shot template): the part that it writes comes
first in text order, then the rest of the question, then the few-shot examples, each with its fields in the opposite
order. Both models therefore read the same parts in the same order. Nothing inside a field is reversed: its label
precedes it, its cue follows it.

    forward:   Question: 1+1?         reverse:   [Answer: 4
               Answer: 2                         ]Question: 2+2?

               Question: 2+2?                    Answer: 2
               Answer:[ 4]                       Question: 1+1?

White space: fields are joined by `field_separator`, blocks by `block_separator`; labels and cues are used unchanged.
White space between the prompt and the part that the model writes belongs to that part, never to the prompt, because
tokenizers join a space to the word after it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_ledom.direction import Direction, to_model_order
from megatron_ledom.errors import UsageError
from megatron_ledom.inference.joint_tokenizer import JointTokenizer

Values = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Field:
    """A part of a task. label: the text before its value.

    cue: the text after its value, which shows a reverse model which field to write.
    """

    name: str
    label: str = ""
    cue: str = ""

    def text(self, value: str) -> str:
        """Return the label, the value and the cue as one text."""
        return f"{self.label}{value}{self.cue}"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt. given: the text that the model gets.

    target: the text to write or to score, empty if unknown. Both in text order.
    """

    direction: Direction
    given: str
    target: str

    def parts(self) -> tuple[str, str]:
        """Return (preceding, following) of the whole text, the arguments of `log_likelihood` and `Engine.score`."""
        return (self.target, self.given) if self.direction is Direction.REVERSE else (self.given, self.target)

    def in_text_order(self) -> str:
        """Return the whole text in text order, with the target between marks."""
        marked = f"⟦{self.target}⟧"
        return marked + self.given if self.direction is Direction.REVERSE else self.given + marked

    def in_model_order(self, tokenizer: JointTokenizer, leading_ids: Sequence[int] = ()) -> str:
        """Return the tokens of the whole text in the order in which the model reads them, after the given ids."""
        ids = [*leading_ids, *to_model_order(tokenizer.encode("".join(self.parts())), self.direction)]
        return "|".join(tokenizer.spell([id_]).decode("utf-8", "replace") for id_ in ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A task's fields in the order in which a forward model reads them.

    The model writes the last `num_targets` of them.
    """

    fields: tuple[Field, ...]
    num_targets: int = 1
    field_separator: str = "\n"
    block_separator: str = "\n\n"
    is_read_back: bool = True
    """True: the text that a model writes is split at the labels.

    False: the target is only scored, or read whole, and needs no label.
    """

    def __post_init__(self) -> None:
        """Raise UsageError for a template with nothing to give or to write, or with a written field without a label."""
        names = [field.name for field in self.fields]
        if len(set(names)) != len(names):
            raise UsageError(f"the fields {', '.join(names)} must have different names; rename one")
        if not 1 <= self.num_targets < len(names):
            raise UsageError(
                f"num_targets={self.num_targets} must be 1 to {len(names) - 1}: one field is given, one is written"
            )
        unnamed = [field.name for field in self.fields[-self.num_targets :] if not field.label.strip()]
        if unnamed and self.is_read_back:
            raise UsageError(f"the written field {unnamed[0]!r} has no label, so it cannot be found in a model's text; add one")

    def render(self, direction: Direction, query: Values, exemplars: Sequence[Values] = ()) -> Prompt:
        """Return the prompt of one query. If it lacks a field that the model writes, the target is empty."""
        blocks = [self.block(values, direction) for values in exemplars]
        given_fields, written_fields = self.fields[: -self.num_targets], self.fields[-self.num_targets :]
        given = self.field_separator.join(self._ordered(direction, [f.text(_value(query, f)) for f in given_fields]))
        is_known = all(field.name in query for field in written_fields)
        texts = [field.text(query[field.name]) for field in written_fields] if is_known else []
        target = self.field_separator.join(self._ordered(direction, texts))
        if direction is Direction.REVERSE:
            return self._reverse_prompt(given, target, blocks)
        label = written_fields[0].label
        whole = self.block_separator.join([*blocks, given + self.field_separator + label])
        opened = whole.rstrip()
        edge = whole[len(opened) :]
        return Prompt(direction, opened, edge + target.removeprefix(label) if is_known else "")

    def _reverse_prompt(self, given: str, target: str, blocks: list[str]) -> Prompt:
        """Return the prompt of a reverse model: the cue of the field that it writes first begins the given text."""
        first = self.fields[-self.num_targets]
        whole = self.block_separator.join([first.cue + self.field_separator + given, *self._ordered(Direction.REVERSE, blocks)])
        opened = whole.lstrip()
        edge = whole[: len(whole) - len(opened)]
        return Prompt(Direction.REVERSE, opened, target.removesuffix(first.cue) + edge if target else "")

    def read(self, direction: Direction, written: str) -> dict[str, str | None]:
        """Return the written fields of a model's text, stripped of labels, cues and white space; None for a missing one.

        A forward model's text ends at the next block. A reverse model may continue with a further text at the front, so
        the occurrence nearest to the prompt counts. Without `is_read_back` the whole text is the last field.
        """
        fields = self.fields[-self.num_targets :]
        if not self.is_read_back:
            return {fields[-1].name: written.strip()}
        reverse = direction is Direction.REVERSE
        rest = written if reverse else fields[0].label + written.split(self.block_separator)[0]
        found: dict[str, str | None] = {}
        for number, field in enumerate(fields):
            if reverse:
                before, label, value = rest.rpartition(field.label)
                rest = before if label else rest
            else:
                _, label, value = rest.partition(field.label)
                following = fields[number + 1].label if number + 1 < len(fields) else ""
                rest = value
                value = value.partition(following)[0] if following else value
            found[field.name] = value.strip().removesuffix(field.cue.strip()).strip() if label else None
        return found

    def split_before(self, name: str, values: Values) -> tuple[str, str]:
        """Return one block in forward order, cut before the value of the field `name`: (up to its label, the rest).

        White space at the cut belongs to the rest, as it does in a prompt.
        """
        before: list[str] = []
        for number, field in enumerate(self.fields):
            if field.name == name:
                opened = self.field_separator.join([*before, field.label])
                after = [field.text(_value(values, field)).removeprefix(field.label)]
                after += [later.text(_value(values, later)) for later in self.fields[number + 1 :]]
                kept = opened.rstrip()
                return kept, opened[len(kept) :] + self.field_separator.join(after)
            before.append(field.text(_value(values, field)))
        raise UsageError(f"the template has no field {name!r}; it has {', '.join(f.name for f in self.fields)}")

    def block(self, values: Values, direction: Direction = Direction.FORWARD) -> str:
        """Return one whole block in text order, its fields in the order of the direction."""
        return self.field_separator.join(self._ordered(direction, [field.text(_value(values, field)) for field in self.fields]))

    def _ordered(self, direction: Direction, texts: list[str]) -> list[str]:
        """Return whole parts, such as fields or blocks, in text order. Their contents stay as they are."""
        return list(reversed(texts)) if direction is Direction.REVERSE else texts


def _value(values: Values, field: Field) -> str:
    if field.name not in values:
        raise UsageError(
            f"the field {field.name!r} has no value, found {', '.join(values) or 'none'}; give every field of the prompt a value"
        )
    return values[field.name]
