"""docs/import_picture.svg: the rooms of the package in layers, from LAYERS of tests/unit/test_layers.py.

An arrow leads from a room to one that it imports. Where the arrows A -> B -> C are there, A -> C is not drawn (the transitive
reduction). What nearly every room imports is one box at the bottom, without arrows.
"""

import ast

from docs.generator.paths import ROOT

SOURCE = ROOT / "tests/unit/test_layers.py"
FOUNDATION = ("direction", "errors", "lazy", "markdown", "provenance", "storage", "tables")
"""Small rooms at the bottom, which any other may import."""
HIDDEN = ("__init__", "_helpers")
WIDTH, HEIGHT, GAP, STEP, MARGIN = 108, 34, 26, 84, 24
"""Size of a box, distance between boxes of a row, from row to row, and to the edge, in pixels."""
SWEEPS = 12
Edges = dict[str, set[str]]


def import_picture() -> str:
    """Return the picture as SVG."""
    edges = reduced(rooms())
    rows = ordered(edges)
    width = 2 * MARGIN + max(len(row) * (WIDTH + GAP) - GAP for row in rows)
    places = {
        name: (width / 2 + (column - (len(row) - 1) / 2) * (WIDTH + GAP), MARGIN + HEIGHT / 2 + STEP * number)
        for number, row in enumerate(rows)
        for column, name in enumerate(row)
    }
    bottom = MARGIN + STEP * len(rows) - (STEP - HEIGHT) / 2
    height = bottom + HEIGHT + MARGIN
    arrows = [_arrow(places[start], places[end]) for start in sorted(edges) for end in sorted(edges[start])]
    boxes = [_box(x, y, WIDTH, name) for name, (x, y) in sorted(places.items())]
    base = _box(width / 2, bottom + HEIGHT / 2, width - 2 * MARGIN, "every room may import: " + ", ".join(FOUNDATION))
    return "\n".join([_head(width, height), *arrows, *boxes, base, "</svg>", ""])


def rooms() -> Edges:
    """Return each room with those that it may import; rooms such as `planning.dry_run` count with the folder they are in."""
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    [text] = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "LAYERS"
    ]
    edges: Edges = {}
    for line in filter(None, text.split("\n")):
        name, _, names = line.partition(":")
        room = name.partition(".")[0]
        edges.setdefault(room, set()).update(set(names.split()) - {room})
    left = {name for name in edges if name not in (*FOUNDATION, *HIDDEN)}
    return {name: edges[name] & left for name in left}


def reachable(start: str, edges: Edges) -> set[str]:
    """Return every room that a room imports, directly or by way of others."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = edges[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def reduced(edges: Edges) -> Edges:
    """Return the edges without those that a longer way replaces."""
    return {
        name: {end for end in ends if not any(end in reachable(other, edges) for other in ends - {end})}
        for name, ends in edges.items()
    }


def ordered(edges: Edges) -> list[list[str]]:
    """Return the rows, the highest first: a room stands one row above the highest that it imports; neighbours are near each other."""
    depth: dict[str, int] = {}
    while len(depth) < len(edges):
        depth |= {name: 1 + max((depth[end] for end in ends), default=-1) for name, ends in edges.items() if ends <= depth.keys()}
    rows = [sorted(name for name in edges if depth[name] == level) for level in range(max(depth.values()), -1, -1)]
    near = {name: edges[name] | {other for other in edges if name in edges[other]} for name in edges}
    for _ in range(SWEEPS):
        place = {name: (column + 0.5) / len(row) for row in rows for column, name in enumerate(row)}
        for row in rows:
            row.sort(key=lambda name: (sum(place[other] for other in near[name]) / max(1, len(near[name])), name))
    return rows


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    (x, y), (to_x, to_y) = start, end
    y, to_y = y + HEIGHT / 2, to_y - HEIGHT / 2 - 5
    bend = (to_y - y) / 2
    path = f"M{x:.0f},{y:.0f} C{x:.0f},{y + bend:.0f} {to_x:.0f},{to_y - bend:.0f} {to_x:.0f},{to_y:.0f}"
    return f'<path class="arrow" d="{path}" marker-end="url(#tip)"/>'


def _box(x: float, y: float, width: float, text: str) -> str:
    corner = f'x="{x - width / 2:.0f}" y="{y - HEIGHT / 2:.0f}" width="{width:.0f}" height="{HEIGHT}"'
    return f'<rect class="box" {corner} rx="6"/><text x="{x:.0f}" y="{y + 5:.0f}">{text}</text>'


def _head(width: float, height: float) -> str:
    style = (
        "text{font:14px sans-serif;text-anchor:middle;fill:#1b1f24}"
        ".box{fill:#eef2fb;stroke:#3f51b5;stroke-width:1.2}.arrow{fill:none;stroke:#8a94a6;stroke-width:1.2}"
    )
    tip = '<marker id="tip" viewBox="0 0 8 8" refX="4" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}">',
            "<title>Imports between the rooms of megatron_ledom</title>",
            f"<style>{style}</style>",
            f'<defs>{tip}<path d="M0,0 L8,4 L0,8 z" fill="#8a94a6"/></marker></defs>',
            '<rect width="100%" height="100%" fill="#ffffff"/>',
        ]
    )
