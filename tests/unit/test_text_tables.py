"""Tables in Markdown, and in aligned columns for a terminal."""

from megatron_ledom.tables import aligned_lines, markdown_table


def test_a_table_is_aligned_and_keeps_bars_inside_their_cell() -> None:
    rows = [["", "P(y|x)"], ["one", "1"], ["", "2"]]
    assert markdown_table(rows, "lr") == "| | P(y\\|x) |\n|---|---:|\n| one | 1 |\n|  | 2 |"
    assert markdown_table(rows[:1]) == "| | P(y\\|x) |\n|---|---|"


def test_columns_are_aligned_by_their_longest_cell() -> None:
    assert aligned_lines([["name", "n", ""], ["a", "1,000", ""]], "l") == ["name      n", "a     1,000"]
