"""Markdown documents with a marked part that a script writes."""

from pathlib import Path

from megatron_ledom.errors import UsageError
from megatron_ledom.storage.files import write_file
from megatron_ledom.storage.locks import output_file_lock


def write_between(file: str, mark: str, text: str) -> None:
    """Replace the text between `<!-- mark -->` and `<!-- /mark -->` in a document. Raises UsageError without the marks."""
    with output_file_lock(file, "--write"):
        before, _, after = marked(Path(file).read_text(encoding="utf-8"), mark, file)
        write_file(file, f"{before}{text}{after}")


def marked(document: str, mark: str, name: str) -> tuple[str, str, str]:
    """Return three parts of a document: up to and with the opening mark, between the marks, and the rest."""
    begin, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
    if document.count(begin) != 1 or document.count(end) != 1:
        raise UsageError(f"{name} lacks the lines {begin.strip()} and {end}; add both, and the text is written between them")
    before, rest = document.split(begin)
    between, after = rest.split(end)
    return before + begin, between, end + after
