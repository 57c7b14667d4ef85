"""The packages of the extra `serve`."""

from importlib.util import find_spec

from megatron_ledom.errors import UsageError

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


def check_installed(*packages: str) -> None:
    """Raise UsageError if one of the packages, by default all of the extra, is missing."""
    missing = [name for name in packages or PACKAGES if find_spec(name) is None]
    if missing:
        raise UsageError(f"the server needs {', '.join(missing)}; install the extra: pip install 'megatron-ledom[serve]'")
