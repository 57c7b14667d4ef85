"""Reports as one HTML file that needs nothing besides itself: style, tables, and matplotlib pictures for light and dark pages."""

import base64
import html
import importlib.util
import io
from collections.abc import Callable, Sequence
from typing import Any

from megatron_ledom.errors import UsageError

THEMES = {"light": {"paper": "#ffffff", "ink": "#1b1b1b"}, "dark": {"paper": "#161616", "ink": "#e6e6e6"}}
COLOURS = {
    "light": ["#c1440e", "#1f5fa8", "#1b7f5c", "#8a2be2", "#b8860b", "#5b6470", "#d1478c", "#111111", "#7a5230"],
    "dark": ["#ff8a5b", "#7db8ff", "#6fe0b4", "#c9a2ff", "#ffd166", "#b7c0cc", "#ff9ecb", "#f0f0f0", "#d8b48a"],
}
"""For curves that belong to no direction, distinct on either paper."""
STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #ffffff; --line: #d5d5d5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #161616; --line: #3a3a3a; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
img { width: 100%; height: auto; }
table { border-collapse: collapse; } th, td { text-align: right; padding: .25rem .75rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, .words { text-align: left; }
th:not(:first-child):not(.words), td:not(:first-child):not(.words) { white-space: nowrap; }
caption { text-align: left; font-weight: 600; padding: .5rem .75rem .5rem 0; } figure { margin: 2rem 0; } div { overflow-x: auto; }
pre { font-size: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def page(title: str, body: Sequence[str], style: str = "") -> str:
    """A whole page; `title` is plain text, `body` is HTML, `style` is added to the common one."""
    title = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}{style}</style></head>\n<body><h1>{title}</h1>\n'
        f"{chr(10).join(body)}\n</body></html>\n"
    )


def table(rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """Plain-text cells as an HTML table; the first row holds the headings. Columns of words are aligned left, those of numbers right."""
    words = [any(map(_is_text, column)) for column in zip(*rows[1:], strict=False)]
    lines = [f"<caption>{html.escape(caption)}</caption>"] if caption else []
    for number, row in enumerate(rows):
        cell = "td" if number else "th"
        kinds = [' class="words"' if index < len(words) and words[index] else "" for index in range(len(row))]
        cells = zip(row, kinds, strict=True)
        lines.append("<tr>" + "".join(f"<{cell}{kind}>{html.escape(text)}</{cell}>" for text, kind in cells) + "</tr>")
    return f"<div><table>\n{chr(10).join(lines)}\n</table></div>"


def _is_text(cell: str) -> bool:
    """Whether a cell holds words: it does not begin with a number or a sign."""
    return cell.strip()[:1].isalpha()


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """The same cells as a Markdown table."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def figure(name: str, themes: dict[str, bytes]) -> str:
    """A PNG picture for each of THEMES, inside the page."""
    light, dark = (f"data:image/png;base64,{base64.b64encode(themes[theme]).decode()}" for theme in ("light", "dark"))
    source = f'<source srcset="{dark}" media="(prefers-color-scheme: dark)">'
    return f'<figure><picture>{source}<img src="{light}" alt="{html.escape(name)}"></picture></figure>'


def check_plots() -> None:
    """Refuse to begin what ends in curves where matplotlib is missing. Raises UsageError."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("curves need matplotlib: pip install 'megatron-ledom[plots]'")


def draw_png(theme: str, size: tuple[float, float], fill: Callable[[Any], None]) -> bytes:
    """What `fill` draws on the axes of a figure of `size` inches, as PNG; UsageError where matplotlib is not installed."""
    check_plots()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    colours = THEMES[theme]
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    with mpl.rc_context(
        {"figure.facecolor": colours["paper"], "axes.facecolor": colours["paper"], **dict.fromkeys(inked, colours["ink"])}
    ):
        drawn = Figure(figsize=size, layout="constrained")
        axes = drawn.subplots()
        fill(axes)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, labelcolor=colours["ink"], fontsize="small")
        buffer = io.BytesIO()
        drawn.savefig(buffer, dpi=130, format="png")
    return buffer.getvalue()
