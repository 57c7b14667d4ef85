"""Parts of every report: an HTML page without external files, cells, tables, and plots for light and dark pages."""

import base64
import html
import importlib.util
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_ledom.errors import UsageError
from megatron_ledom.storage.files import write_file

THEMES = {"light": {"paper": "#ffffff", "ink": "#1b1b1b"}, "dark": {"paper": "#161616", "ink": "#e6e6e6"}}
COLOURS = {
    "light": ["#c1440e", "#1f5fa8", "#1b7f5c", "#8a2be2", "#b8860b", "#5b6470", "#d1478c", "#111111", "#7a5230"],
    "dark": ["#ff8a5b", "#7db8ff", "#6fe0b4", "#c9a2ff", "#ffd166", "#b7c0cc", "#ff9ecb", "#f0f0f0", "#d8b48a"],
}
"""For curves that belong to no direction; distinct on both pages."""
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
    """Return a whole page; `title` is plain text, `body` is HTML, `style` is added to the common one."""
    title = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}{style}</style></head>\n<body><h1>{title}</h1>\n'
        f"{chr(10).join(body)}\n</body></html>\n"
    )


def paragraph(text: str, *, is_strong: bool = False) -> str:
    """Return plain text as an HTML paragraph."""
    escaped = html.escape(text)
    return f"<p><strong>{escaped}</strong></p>" if is_strong else f"<p>{escaped}</p>"


def bullets(texts: Iterable[str]) -> str:
    """Return plain texts as an HTML list."""
    return f"<ul>{''.join(f'<li>{html.escape(text)}</li>' for text in texts)}</ul>"


def number(value: float | None, form: str, scale: float = 1.0, missing: str = "–") -> str:
    """Return a cell such as `+2.10`: the value times `scale` in the format `form`."""
    return missing if value is None else format(scale * value, form)


def interval(bounds: Sequence[float] | None, form: str, scale: float = 1.0, missing: str = "–") -> str:
    """Return a cell such as `1.2 to 3.4`."""
    return missing if bounds is None else " to ".join(number(bound, form, scale) for bound in bounds)


def table(rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """Return plain-text cells as an HTML table; the first row contains the headings. Words are aligned left, numbers right."""
    words = [any(map(_is_text, column)) for column in zip(*rows[1:], strict=False)]
    lines = [f"<caption>{html.escape(caption)}</caption>"] if caption else []
    for number, row in enumerate(rows):
        cell = "td" if number else "th"
        kinds = [' class="words"' if index < len(words) and words[index] else "" for index in range(len(row))]
        cells = zip(row, kinds, strict=True)
        lines.append("<tr>" + "".join(f"<{cell}{kind}>{html.escape(text)}</{cell}>" for text, kind in cells) + "</tr>")
    return f"<div><table>\n{chr(10).join(lines)}\n</table></div>"


def _is_text(cell: str) -> bool:
    """Return True for a cell of words: it does not begin with a number or a sign."""
    return cell.strip()[:1].isalpha()


def figure(name: str, draw: Callable[[str], bytes], png: Path | None = None) -> str:
    """Draw a plot for each of THEMES, and return both as one HTML element.

    draw: theme -> PNG. png: a file to which the light plot is also written.
    """
    pictures = {theme: draw(theme) for theme in THEMES}
    if png is not None:
        write_file(png, pictures["light"])
    light, dark = (f"data:image/png;base64,{base64.b64encode(picture).decode()}" for picture in pictures.values())
    source = f'<source srcset="{dark}" media="(prefers-color-scheme: dark)">'
    return f'<figure><picture>{source}<img src="{light}" alt="{html.escape(name)}"></picture></figure>'


def check_plots() -> None:
    """Raise UsageError if matplotlib is missing; call it before long work that ends in plots."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("plots need matplotlib; pip install 'megatron-ledom[plots]'")


def draw_png(theme: str, size: tuple[float, float], fill: Callable[[Any], None], *, is_bare: bool = False) -> bytes:
    """Return a plot of `size` inches as PNG; `fill` draws its axes. Raises UsageError if matplotlib is not installed.

    is_bare: omit the grid and the legend.
    """
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
        if not is_bare:
            axes.grid(alpha=0.25)
            axes.legend(frameon=False, labelcolor=colours["ink"], fontsize="small")
        buffer = io.BytesIO()
        drawn.savefig(buffer, dpi=130, format="png")
    return buffer.getvalue()
