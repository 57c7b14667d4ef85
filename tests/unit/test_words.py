"""The words of the project (docs/glossary.md): words that are out do not come back, and no docstring begins with a noun clause.

Run as a script, `python tests/unit/test_words.py PATH...` prints the findings of some files or folders.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("megatron_ledom", "tools", "examples", "tests", "csrc", "docs")
FILES = ("README.md", "CONTRIBUTING.md", "setup.py", "Makefile")
SUFFIXES = {".py", ".md", ".yaml", ".sbatch", ".h", ".cpp", ".cu", ".cuh", ".ipynb"}

OUT = {
    r"stretch(es)?": "byte range",
    r"faults?|faulty": "error, mistake, damaged",
    r"left out|leaves? out|leaving out": "skipped",
    r"go(es|ing)? on|went on|gone on": "resume, continue",
    r"turned|turning|turns (shards|ids|order|texts?)": "reversed",
    r"(the|logits|failed|a) gate": "parity check",
    r"made (sets?|data|facts|problems|texts?|questions)": "synthetic",
    r"open (end|ending|text)": "token healing",
    r"meeting( place)?": "rendezvous",
    r"figures?": "metrics, numbers",
    r"trap \d": "say what the problem is",
    r"shall": "must, will",
    r"behind": "after",
    r"besides": "also, apart from",
    r"by heart": "memorized",
    r"for the \d+\. time": "failure N",
    r"sa(y|ys|id) so": "report",
    r"stand-?ins?": "replacement",
    r"made anew": "recomputed",
    r"pulse": "heartbeat",
}
"""Words that are out, each with what stands for it."""

ALLOWED = {
    "figure": r"</?figure>|figure \{|figure\.|figure\(|\.figure|figure=|Figures? \d|figures?\b.*matplotlib|matplotlib.*\bfigures?|plt\.",
    "fault": r"faulthandler|segmentation fault",
    "gate": r"the gate was left open|gate_proj|gate and up|up and gate|SwiGLU|swiglu|silu|gate/up|the gate'?s? (half|gradient|projection)",
    "turned": r"turned (on|off)",
    "turning": r"turning (on|off)",
}
"""A finding of the word, or of the word without its s, is allowed in a line that matches."""

CLAUSE = re.compile(r"(What|Whether|Which|How|Why|Where|When|Who|Whose|That)\b(?! (is|are|was|were) (?=[^.]*\?))")
NOT_READ = {"tests/unit/test_words.py", "docs/glossary.md", "CHANGELOG.md", "DECISIONS.md"}
"""This file and the glossary name the words; the other two are history."""


def files() -> list[Path]:
    """Return the files of the project that hold words, relative to its root."""
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    found += [ROOT / name for name in FILES if (ROOT / name).is_file()]
    return sorted(path.relative_to(ROOT) for path in found if str(path.relative_to(ROOT)) not in NOT_READ)


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line number and text of the comments, strings and docstrings of a Python file, or of every line of another file."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(text.splitlines(), 1)
        return
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in kinds:
            yield from enumerate(token.string.splitlines(), token.start[0])


def names(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the identifiers of a Python file, their words apart."""
    if path.suffix != ".py":
        return
    for token in tokenize.generate_tokens(io.StringIO((ROOT / path).read_text(encoding="utf-8")).readline):
        if token.type == tokenize.NAME and ("_" in token.string or token.string.lower() in ("stretch", "fault", "faults")):
            yield token.start[0], token.string.replace("_", " ")


def is_allowed(word: str, line: str) -> bool:
    """Return True if the table above lets this line use the word."""
    word = word.lower().split()[-1]
    pattern = ALLOWED.get(word) or ALLOWED.get(word.removesuffix("s"))
    return pattern is not None and re.search(pattern, line) is not None


def words_that_are_out(path: Path) -> Iterator[str]:
    """Yield each word of a file that is out, with its line and what to say instead."""
    for number, line in [*prose(path), *names(path)]:
        readable = re.sub(r"`[^`]*`|\"[a-z_]+\"", "", line) if path.suffix == ".py" else re.sub(r"`[^`]*`", "", line)
        for pattern, instead in OUT.items():
            for match in re.finditer(rf"\b({pattern})\b", readable, re.IGNORECASE):
                if not is_allowed(match[0], line):
                    yield f"{path}:{number}: {match[0]!r} is out; say: {instead}: {line.strip()[:90]}"


def noun_clauses(path: Path) -> Iterator[str]:
    """Yield each docstring of a file that begins with What, Whether, Which or the like."""
    if path.suffix != ".py":
        return
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        is_literal = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if is_literal and CLAUSE.match(node.value.value.strip()):  # type: ignore[attr-defined]
            yield f"{path}:{node.lineno}: begins with a noun clause: {node.value.value.strip()[:90]}"  # type: ignore[attr-defined]


def findings(path: Path) -> list[str]:
    """Return everything this file reports about another."""
    return [*words_that_are_out(path), *noun_clauses(path)]


@pytest.mark.parametrize("folder", [*FOLDERS, "."])
def test_no_word_that_is_out_comes_back(folder: str) -> None:
    mine = [path for path in files() if path.parts[0] == folder or (folder == "." and len(path.parts) == 1)]
    found = [line for path in mine for line in findings(path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        '"""Whether it fits."""\n',
        "x = 1  # what is left out\n",
        'raise ValueError(f"{x} faults")\n',
        "def go_on() -> None: ...\n",
    ],
)
def test_words_that_are_out_are_found(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file.py").write_text(text)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert findings(Path("file.py"))


if __name__ == "__main__":
    given = [Path(name).resolve().relative_to(ROOT) for name in sys.argv[1:]]
    chosen = [path for path in files() if any(path.is_relative_to(start) for start in given)]
    for line in (line for path in chosen for line in findings(path)):
        print(line)
