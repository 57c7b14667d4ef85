"""The index at the top of DECISIONS.md: its subjects and entries, as links that work on the site and on a code host."""

import re

from docs.generator.paths import ROOT
from megatron_ledom.markdown import marked

FILE = ROOT / "DECISIONS.md"
MARK = "index"


def decisions() -> str:
    """Return DECISIONS.md with the index of its headings."""
    before, _, after = marked(FILE.read_text(encoding="utf-8"), MARK, FILE.name)
    lines = []
    for sign, title in re.findall(r"^(###?) (.+)$", after, re.MULTILINE):
        indent = "- " if sign == "##" else "    - "
        lines.append(f"{indent}[{title}](#{anchor(title)})\n")
    return f"{before}{''.join(lines)}{after}"


def anchor(title: str) -> str:
    """Return the anchor of a heading."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())
