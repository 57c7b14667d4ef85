"""The configs that come with the package, by name: the files of examples/configs in a checkout, which a wheel holds as well."""

from pathlib import Path

CHECKOUT = Path(__file__).parents[2] / "examples/configs"
INSTALLED = Path(__file__).parents[1] / "configs"
"""Where setup.py lets a wheel keep them."""


def shipped_configs() -> dict[str, Path]:
    """Return the configs by name, such as `ledom_7b`."""
    folder = INSTALLED if INSTALLED.is_dir() else CHECKOUT
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def config_path(given: str) -> Path:
    """Return the file that `--config` means: a path, or else the name of a config that comes with the package."""
    path = Path(given)
    return path if path.is_file() else shipped_configs().get(given, path)
