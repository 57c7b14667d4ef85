"""Find the configs that come with the package: the files of examples/configs in a checkout, or their copies in a wheel."""

from pathlib import Path

CHECKOUT = Path(__file__).parents[2] / "examples/configs"
INSTALLED = Path(__file__).parents[1] / "configs"
"""Folder of the copies in an installed wheel, written by setup.py."""


def shipped_configs() -> dict[str, Path]:
    """Return the configs by name, such as `ledom_7b`."""
    folder = INSTALLED if INSTALLED.is_dir() else CHECKOUT
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def config_path(given: str) -> Path:
    """Return the file for a value of `--config`: a path, or else the name of a config that comes with the package."""
    path = Path(given)
    return path if path.is_file() else shipped_configs().get(given, path)
