"""Write the generated pages of the documentation; a test compares them with the files in the repository.

python -m docs.generator            writes docs/reference/cli.md, docs/reference/config.md and docs/import_picture.svg
"""

from collections.abc import Callable

from docs.generator.cli_page import cli_page
from docs.generator.config_page import config_page
from docs.generator.import_picture import import_picture
from docs.generator.paths import DOCS

PAGES: dict[str, Callable[[], str]] = {
    "reference/cli.md": cli_page,
    "reference/config.md": config_page,
    "import_picture.svg": import_picture,
}
"""File below docs/ -> the function that returns its text."""


def main() -> None:
    """Write every page."""
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
        print(f"wrote docs/{name}")


if __name__ == "__main__":
    main()
