"""The names by which a server that only this machine reaches is called."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from megatron_ledom.errors import visible
from megatron_ledom.inference.engines.completions_client import is_loopback


def other_name(scope: Mapping[str, Any], host: str) -> str | None:
    """Return the name in a request to a loopback address if it is not the server's own; a web page can give its own name that address.

    None for the right name, and for a server that other machines reach. host: the address on which the server listens.
    """
    if not is_loopback(host):
        return None
    given = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1")
    try:
        name = urlsplit(f"//{given}").hostname or ""
    except ValueError:
        name = ""
    return None if is_loopback(name) or name == host else visible(given)
