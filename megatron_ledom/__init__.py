"""Pretraining of reverse language models on megatron-core: text to shards, training, export, Reverse Reward.

docs/reference/python_api.md lists the names that other programs can rely on.
"""

from typing import TYPE_CHECKING, Any

from megatron_ledom.lazy import lazy_exports

if TYPE_CHECKING:
    from megatron_ledom.direction import Direction
    from megatron_ledom.errors import LedomError

    __version__: str

__all__ = ["Direction", "LedomError", "__version__"]

_load = lazy_exports(__name__, {"megatron_ledom.direction": ["Direction"], "megatron_ledom.errors": ["LedomError"]})


def __getattr__(name: str) -> Any:
    """Return the version or an export, imported at its first use."""
    return _version() if name == "__version__" else _load(name)


def _version() -> str:
    """Return the installed version, or that of a checkout that is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("megatron-ledom")
    except PackageNotFoundError:
        import tomllib
        from pathlib import Path

        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        return str(project["version"])
