"""Prompts written once, in fields, and rendered for a forward and for a reverse model.

A forward model reads the demonstrations, then the question, and writes on from the end. A reverse model reads from the end of the
text, so everything is mirrored in reading order (LEDOM, arXiv 2507.01335, few-exemplar template): what is to be written stands at the
front, then the rest of the question, and only then the demonstrations, each with its fields in the opposite order. Both models
therefore take in the same parts in the same order. Inside a field nothing is turned: its label precedes it, its cue follows it.

    forward:   Question: 1+1?         reverse:   [Answer: 4
               Answer: 2                         ]Question: 2+2?

               Question: 2+2?                    Answer: 2
               Answer:[ 4]                       Question: 1+1?

White space: fields are joined by `field_separator`, blocks by `block_separator`; labels and cues stand as they are written. Where
text is to be written next to a label or cue, white space at that edge belongs to what the model writes, never to the prompt, because
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
    """A part of a task. label: stands before its value. cue: stands after it; a reverse model needs one to know what to write."""

    name: str
    label: str = ""
    cue: str = ""

    def text(self, value: str) -> str:
        """The field with its value."""
        return f"{self.label}{value}{self.cue}"


@dataclass(frozen=True, slots=True)
class Prompt:
    """given: what the model is given, `target`: what it is to write or what is scored, as far as it is known; text order."""

    direction: Direction
    given: str
    target: str

    def parts(self) -> tuple[str, str]:
        """(preceding, following) of the whole text, as `log_likelihood` and `Engine.score` take them."""
        return (self.target, self.given) if self.direction is Direction.REVERSE else (self.given, self.target)

    def shown(self) -> str:
        """In reading order, with the target between marks."""
        marked = f"⟦{self.target}⟧"
        return marked + self.given if self.direction is Direction.REVERSE else self.given + marked

    def as_seen(self, tokenizer: JointTokenizer) -> str:
        """The pieces of the whole text in the order in which the model takes them in, the first one first."""
        ids = to_model_order(tokenizer.encode("".join(self.parts())), self.direction)
        return "|".join(tokenizer.spell([id_]).decode("utf-8", "replace") for id_ in ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A task's fields in the order in which a forward model takes them in; the last `num_targets` of them are written."""

    fields: tuple[Field, ...]
    num_targets: int = 1
    field_separator: str = "\n"
    block_separator: str = "\n\n"
    is_read_back: bool = True
    """What a model writes is taken apart by the labels; without, the target is only scored or read whole, and needs none."""

    def __post_init__(self) -> None:
        """Refuse a template from which nothing could be written or read back."""
        names = [field.name for field in self.fields]
        if len(set(names)) != len(names):
            raise UsageError(f"the fields {', '.join(names)} share a name; give each its own")
        if not 1 <= self.num_targets < len(names):
            raise UsageError(f"num_targets={self.num_targets} of {len(names)} fields: at least one is given and one is written")
        unnamed = [field.name for field in self.fields[-self.num_targets :] if not field.label.strip()]
        if unnamed and self.is_read_back:
            raise UsageError(f"the written field {unnamed[0]!r} has no label, so it could not be found in what a model writes")

    def render(self, direction: Direction, query: Values, exemplars: Sequence[Values] = ()) -> Prompt:
        """The prompt for one query. Fields of the query that are to be written may be missing: the target is then empty."""
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
        """The cue of the field that is written first stands at the front of what is given."""
        first = self.fields[-self.num_targets]
        whole = self.block_separator.join([first.cue + self.field_separator + given, *self._ordered(Direction.REVERSE, blocks)])
        opened = whole.lstrip()
        edge = whole[: len(whole) - len(opened)]
        return Prompt(Direction.REVERSE, opened, target.removesuffix(first.cue) + edge if target else "")

    def read(self, direction: Direction, written: str) -> dict[str, str | None]:
        """The written fields found in a model's text, without labels, cues and the white space around; None where one is missing.

        A forward model's text ends at the next block. A reverse model's may go on to the front with what it takes for an earlier
        text: the occurrence nearest to the prompt counts. Without `is_read_back` all of the text is the last field.
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
        """One block in the order of the fields, cut in front of the value of the field `name`: (up to its label, the rest).

        White space at the cut belongs to the rest, as it does where a model writes on.
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
        raise UsageError(f"no field {name!r} in this template; it has {', '.join(f.name for f in self.fields)}")

    def block(self, values: Values, direction: Direction = Direction.FORWARD) -> str:
        """Return one whole block as it is read, its fields in the order of the direction."""
        return self.field_separator.join(self._ordered(direction, [field.text(_value(values, field)) for field in self.fields]))

    def _ordered(self, direction: Direction, texts: list[str]) -> list[str]:
        """Whole parts, such as fields and blocks, in reading order; what is inside of them is not turned."""
        return list(reversed(texts)) if direction is Direction.REVERSE else texts


def _value(values: Values, field: Field) -> str:
    if field.name not in values:
        raise UsageError(
            f"no value for the field {field.name!r}, found {', '.join(values) or 'none'}; every given field needs one"
        )
    return values[field.name]
