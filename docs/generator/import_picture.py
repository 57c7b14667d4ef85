"""docs/import_picture.svg: the rooms of the package in layers, from LAYERS of tests/unit/test_layers.py.

An arrow leads from a room to one that it imports. Where the arrows A -> B -> C are there, A -> C is not drawn (the transitive
reduction). What nearly every room imports is one box at the bottom, without arrows.
"""

import ast
from collections.abc import Iterator
from itertools import pairwise

import networkx as nx

from docs.generator.paths import ROOT

SOURCE = ROOT / "tests/unit/test_layers.py"
FOUNDATION = ("direction", "errors", "lazy", "markdown", "provenance", "storage", "tables")
"""Small rooms at the bottom, which any other may import."""
HIDDEN = ("__init__", "_helpers")
WIDTH, HEIGHT, GAP, STEP, MARGIN = 108, 34, 34, 88, 24
"""Size of a box, distance between boxes of a row, from row to row, and to the edge, in pixels."""
PASSAGE = 10
"""Width that an arrow takes in a row that it passes through."""
SWEEPS = 24
Point = tuple[float, float]


def import_picture() -> str:
    """Return the picture as SVG."""
    graph = nx.transitive_reduction(rooms())
    rows_upwards = nx.topological_generations(graph.reverse())  # a room is one row above the highest one that it imports
    depth = {name: row for row, names in enumerate(rows_upwards) for name in sorted(names)}
    ways = {(start, end): passages(start, end, depth) for start, end in sorted(graph.edges)}
    rows = ordered(depth, list(ways.values()))
    width = 2 * MARGIN + max(_width(row) for row in rows)
    places = {name: point for number, row in enumerate(rows) for name, point in _placed(row, width, number)}
    bottom = MARGIN + STEP * len(rows) - (STEP - HEIGHT) / 2
    arrows = [_arrow([places[name] for name in ways[way]]) for way in sorted(ways)]
    boxes = [_box(*places[name], WIDTH, name) for name in sorted(graph)]
    base = _box(width / 2, bottom + HEIGHT / 2, width - 2 * MARGIN, f"any room may import: {', '.join(FOUNDATION)}")
    return "\n".join([_head(width, bottom + HEIGHT + MARGIN), *arrows, *boxes, base, "</svg>", ""])


def rooms() -> nx.DiGraph:
    """Return a graph with an edge from each room to those that it may import; rooms such as `planning.dry_run` count with the folder they are in."""
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    [text] = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "LAYERS"
    ]
    edges: dict[str, set[str]] = {}
    for line in filter(None, text.split("\n")):
        name, _, names = line.partition(":")
        room = name.partition(".")[0]
        edges.setdefault(room, set()).update(set(names.split()) - {room})
    left = {name for name in edges if name not in (*FOUNDATION, *HIDDEN)}
    return nx.DiGraph({name: sorted(edges[name] & left) for name in sorted(left)})


def passages(start: str, end: str, depth: dict[str, int]) -> list[str]:
    """Return what an arrow passes, from its start to its end: in each row between them a place of its own, `start>end>row`."""
    return [start, *(f"{start}>{end}>{row}" for row in range(depth[start] - 1, depth[end], -1)), end]


def ordered(depth: dict[str, int], ways: list[list[str]]) -> list[list[str]]:
    """Return the rooms and passages of each row, the highest row first, so that what is connected is near each other."""
    rows: list[list[str]] = [sorted(name for name in depth if depth[name] == row) for row in range(max(depth.values()), -1, -1)]
    for way in ways:
        for name in way[1:-1]:
            rows[max(depth.values()) - int(name.rpartition(">")[2])].append(name)
    near: dict[str, list[str]] = {name: [] for row in rows for name in row}
    for way in ways:
        for one, other in pairwise(way):
            near[one].append(other)
            near[other].append(one)
    for _ in range(SWEEPS):
        for row in [*rows, *reversed(rows)]:
            place = {name: (column + 0.5) / len(line) for line in rows for column, name in enumerate(line)}
            row.sort(key=lambda name: (sum(place[other] for other in near[name]) / max(1, len(near[name])), name))
    return rows


def _size(name: str) -> int:
    return PASSAGE if ">" in name else WIDTH


def _width(row: list[str]) -> int:
    return sum(map(_size, row)) + GAP * (len(row) - 1)


def _placed(row: list[str], width: float, number: int) -> Iterator[tuple[str, Point]]:
    """Yield the middle of each room and passage of a row."""
    left = (width - _width(row)) / 2
    for name in row:
        yield name, (left + _size(name) / 2, MARGIN + HEIGHT / 2 + STEP * number)
        left += _size(name) + GAP


def _arrow(points: list[Point]) -> str:
    """Return a smooth line from the lower edge of a box through its passages to the upper edge of another."""
    (x, y), *between, (to_x, to_y) = points
    stops = [(x, y + HEIGHT / 2)]
    for way_x, way_y in between:
        stops += [(way_x, way_y - HEIGHT / 2), (way_x, way_y + HEIGHT / 2)]
    stops.append((to_x, to_y - HEIGHT / 2 - 5))
    path = f"M{x:.0f},{stops[0][1]:.0f}"
    for (from_x, from_y), (next_x, next_y) in pairwise(stops):
        bend = (next_y - from_y) / 2
        path += f" C{from_x:.0f},{from_y + bend:.0f} {next_x:.0f},{next_y - bend:.0f} {next_x:.0f},{next_y:.0f}"
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
