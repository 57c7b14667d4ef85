"""Tables as Markdown, and as aligned columns for a terminal. `reports/pages.py` makes tables in HTML."""

from collections.abc import Iterable, Sequence


def markdown_table(rows: Sequence[Sequence[str]], align: str = "") -> str:
    """Return plain-text cells as a Markdown table; the first row contains the headings.

    align: `l` or `r` for each column; further columns have Markdown's default alignment.
    """
    ends = [":" if side == "r" else "" for side in align.ljust(len(rows[0]))]
    headings, *lines = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    head = "".join(f"| {cell} " if cell else "| " for cell in headings)
    rule = "".join(f"|---{end}" for end in ends)
    return "\n".join([f"{head}|", f"{rule}|", *(f"| {' | '.join(cells)} |" for cells in lines)])


def aligned_lines(rows: Iterable[Sequence[str]], align: str = "") -> list[str]:
    """Return a line for each row, with columns two spaces apart.

    align: `l` or `r` for each column; further columns are `r`.
    """
    cells = list(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    marks = ["<" if side == "l" else ">" for side in align.ljust(len(widths))]
    forms = [f"{mark}{width}" for mark, width in zip(marks, widths, strict=True)]
    return ["  ".join(map(format, row, forms)).rstrip() for row in cells]
