"""Imported only if the compiled module of this name was not built; raises UsageError with the way to build it."""

from typing import TYPE_CHECKING, Any

from megatron_ledom.errors import UsageError

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...


raise UsageError(
    "megatron_ledom was installed without its C++ helpers (no compiled module megatron_ledom._helpers). Only preprocessing text and"
    " reversing shards need them. Install a C++ compiler and the headers of Python (Debian: apt install g++"
    " python3-dev), then build: LEDOM_EXTENSIONS=1 pip install --force-reinstall --no-deps --no-cache-dir megatron-ledom, or . in a"
    " checkout"
)
