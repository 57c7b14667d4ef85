"""The packages of the extra `serve`."""

from importlib.util import find_spec

from megatron_ledom.errors import UsageError

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


def check_installed() -> None:
    """Raise UsageError if a package of the extra is missing."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UsageError(f"the server needs {', '.join(missing)}; install the extra: pip install 'megatron-ledom[serve]'")
