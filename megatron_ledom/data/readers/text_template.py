"""Templates that join the texts of several keys of a record, such as `{question}: {answer}`."""

from collections.abc import Callable
from string import Formatter

from megatron_ledom.errors import UsageError

ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}
"""Characters that may follow a backslash in a template on the command line. Other backslashes stay unchanged."""


class TextTemplate:
    """A parsed template. `{key}` stands for the text at that key of a record, a doubled brace for one brace.

    Formats, conversions and indices are refused, because they would print a value as Python does.
    """

    def __init__(self, template: str, option: str) -> None:
        """Parse a template. option: its name in error messages, such as --text-template."""
        self.template = template
        try:
            parts = list(Formatter().parse(template))
        except ValueError as error:
            raise _refused(template, option, str(error)) from error
        for _, column, layout, conversion in parts:
            if column is None:
                continue
            if not column or layout or conversion:
                raise _refused(
                    template, option, f"found {{{column}{'!' + conversion if conversion else ''}{':' * bool(layout)}...}}"
                )
        self._parts = [(literal, column) for literal, column, _, _ in parts]
        self.fields = [column for _, column in self._parts if column is not None]
        """Keys in the order of the template."""

    def render(self, text_of: Callable[[str], str]) -> str:
        """Return the text of a record. text_of: returns the text at a key, or raises."""
        return "".join(literal if column is None else literal + text_of(column) for literal, column in self._parts)


def template_of(template: str | None, text_key: str) -> TextTemplate | None:
    """Return the parsed --text-template, or None. Raises UsageError if it has no key or --text-key is given as well."""
    if template is None:
        return None
    parsed = TextTemplate(template, "--text-template")
    if not parsed.fields:
        raise _refused(template, "--text-template", "it names no key")
    if text_key != "text":
        raise UsageError(f"--text-key {text_key} and --text-template both select the text; give one of them")
    return parsed


def from_command_line(template: str) -> str:
    r"""Return a template in which the two characters `\n` are a line break, `\t` a tab and `\\` one backslash."""
    read, position = [], 0
    while (found := template.find("\\", position)) >= 0:
        following = template[found + 1 : found + 2]
        is_escape = following in ESCAPES and following != ""
        read += [template[position:found], ESCAPES[following] if is_escape else "\\"]
        position = found + (2 if is_escape else 1)
    return "".join([*read, template[position:]])


def _refused(template: str, option: str, reason: str) -> UsageError:
    return UsageError(
        f"{option} {template!r} is not a template ({reason}); write keys as {{question}}, and double a brace of the text"
    )
