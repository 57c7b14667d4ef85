"""Write the generated parts of the documentation: `python -m docs.generator`. A test compares them with the files in the repository."""

from collections.abc import Callable

from docs.generator.cli_page import cli_page
from docs.generator.config_page import config_page
from docs.generator.decisions_index import decisions
from docs.generator.import_picture import import_picture
from docs.generator.paths import ROOT

PAGES: dict[str, Callable[[], str]] = {
    "docs/reference/cli.md": cli_page,
    "docs/reference/config.md": config_page,
    "docs/import_picture.svg": import_picture,
    "DECISIONS.md": decisions,
}
"""File -> the function that returns its text."""


def main() -> None:
    """Write every page."""
    for name, page in PAGES.items():
        (ROOT / name).write_text(page(), encoding="utf-8")
        print(f"wrote {name}")


if __name__ == "__main__":
    main()
