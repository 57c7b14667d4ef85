"""An HTML page that needs nothing besides itself: pictures inside, light and dark."""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #ffffff; --line: #d5d5d5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #161616; --line: #3a3a3a; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
img { width: 100%; height: auto; }
table { border-collapse: collapse; } th, td { text-align: right; padding: .25rem .75rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } figure { margin: 2rem 0; } div { overflow-x: auto; } pre { overflow-x: auto; }
"""
PAGES = {"light": {"paper": "#ffffff", "ink": "#1b1b1b"}, "dark": {"paper": "#161616", "ink": "#e6e6e6"}}
"""Colours of a page, for the pictures on it."""


def table(rows: Sequence[Sequence[str]], header: int = 1) -> str:
    """Rows of text as a table, the first `header` of them as its head."""
    lines = []
    for index, row in enumerate(rows):
        cell = "th" if index < header else "td"
        lines.append(f"<tr>{''.join(f'<{cell}>{html.escape(text)}</{cell}>' for text in row)}</tr>")
    return "<div><table>\n" + "\n".join(lines) + "\n</table></div>"


def figure(name: str, themes: Mapping[str, bytes]) -> str:
    """A picture by its PNG for a light and for a dark page."""
    light, dark = (f"data:image/png;base64,{base64.b64encode(themes[theme]).decode()}" for theme in ("light", "dark"))
    source = f'<source srcset="{dark}" media="(prefers-color-scheme: dark)">'
    return f'<figure><picture>{source}<img src="{light}" alt="{html.escape(name)}"></picture></figure>'


def page(title: str, parts: Iterable[str]) -> str:
    """The whole page; parts are HTML already, the title is text."""
    title = html.escape(title)
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n'
        f"{body}\n</body></html>\n"
    )
