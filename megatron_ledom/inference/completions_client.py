"""HTTP to one completions server: where the API key may go, what is tried again, and errors that are one line without the key."""

import ipaddress
import json
import os
import time
from typing import Any

import httpx

from megatron_ledom.errors import DataError, TransientError, UsageError
from megatron_ledom.inference.key_mask import KeyMask

ATTEMPTS = 4
"""How often a request is tried while the server is busy or away; pauses of 1, 2 and 4 seconds lie between."""
CONNECT_SECONDS = 30.0
SHOWN_CHARACTERS = 300
KEY = "OPENAI_API_KEY"


class CompletionsClient:
    """Sends JSON to `<url>/completions` and returns the JSON object of the answer. Threads may share it.

    The API key, if the environment has one in OPENAI_API_KEY, goes to the host of `url` alone: redirects are refused, and plain
    http beyond this machine is refused with a key unless `key_over_http` allows it.
    """

    def __init__(self, url: str, *, timeout: float = 600.0, key_over_http: bool = False) -> None:
        address = _address(url)
        is_local = _is_loopback(address.host)
        self.url, key = str(address), _api_key()
        self.mask = KeyMask(key)
        if key and address.scheme == "http" and not is_local and not key_over_http:
            raise UsageError(
                f"{KEY} is set, and {self.url} is plain http to another machine, where anyone on the way can read it; use an"
                f" https address, unset {KEY} if the server needs none, or pass --key-over-http in a network that you trust"
            )
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        try:
            self._http = httpx.Client(
                headers=headers,
                timeout=httpx.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS), pool=None),
                limits=httpx.Limits(max_connections=None),
                follow_redirects=False,
                trust_env=not is_local,  # a proxy has no part in what stays on this machine
            )
        except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
            raise UsageError(
                f"the environment's proxy or certificates (HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE) cannot be used for {self.url}:"
                f" {self.shown(str(error))}; correct or unset them"
            ) from None

    def ask(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to one request; a busy server and a broken connection are tried again.

        Raises TransientError after ATTEMPTS, DataError for a refusal and for an answer that is no JSON object, UsageError for a
        redirect.
        """
        body = json.dumps(fields, allow_nan=False).encode()
        reason = ""
        for attempt in range(ATTEMPTS):
            try:
                response = self._http.post(self.url, content=body)
            except httpx.TransportError as error:
                reason = self.shown(f"{type(error).__name__}: {error}")
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise DataError(f"{self.url}: {self.shown(str(error))}; see that it is a completions server") from None
            else:
                if not _may_pass(response.status_code):
                    return self._content(response)
                reason = f"{response.status_code} {self.shown(response.content.decode('utf-8', 'replace'))}"
            if attempt + 1 < ATTEMPTS:
                time.sleep(2**attempt)
        raise TransientError(
            f"{self.url} did not answer {ATTEMPTS} times ({reason}); see that the server runs, then start again"
        )

    def shown(self, text: str, most: int = SHOWN_CHARACTERS) -> str:
        """Return what the server said as the part of a message: one line, printable, short, without the key.

        Every text of a server that a message quotes passes here. The key is masked before the text is cut: of a key that is cut
        first, the rest would be shown.
        """
        masked = self.mask.masked(text)
        line = "".join(c if c.isprintable() else "?" for c in " ".join(masked.split()))
        return line if len(line) <= most else f"{line[:most]} ..."

    def _content(self, response: httpx.Response) -> dict[str, Any]:
        if response.has_redirect_location:
            raise UsageError(
                f"{self.url} answers with a redirect ({response.status_code}) to {self.shown(response.headers['location'])}; no"
                " redirect is followed, so that prompts and key go to no other host: give the address of the server itself"
            )
        if response.status_code != 200:
            said = self.shown(response.content.decode("utf-8", "replace"))
            raise DataError(f"{self.url} refuses the request: {response.status_code} {said}")
        try:
            answer = json.loads(response.content)
        except (ValueError, RecursionError):
            kind = self.shown(response.headers.get("content-type", "no content type"))
            said = self.shown(response.content.decode("utf-8", "replace"))
            raise DataError(f"{self.url} answered with {kind} that is not JSON: {said!r}; is it /v1/completions?") from None
        if not isinstance(answer, dict):
            raise DataError(
                f"{self.url} answered with a {type(answer).__name__}, expected an object: {self.shown(str(answer))};"
                " is it /v1/completions?"
            )
        return answer


def _address(url: str) -> httpx.URL:
    """Return the address of the completions of a server; UsageError for what is none."""
    wanted = "expected one such as http://localhost:8000/v1"
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise UsageError(f"{url!r} is no address of a server ({error}); {wanted}") from error
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise UsageError(
            f"the address of the server at {parsed.host} holds a user, a query or a fragment; {wanted}, and put the key into {KEY}"
        )
    is_port = parsed.port is None or 0 < parsed.port < 2**16
    if parsed.scheme not in ("http", "https") or not parsed.host or "%" in parsed.host or not is_port:
        raise UsageError(f"{url!r} is no address of a server; {wanted}")
    path = parsed.path.rstrip("/").removesuffix("/completions").rstrip("/")
    if path.endswith("/chat"):
        raise UsageError(f"{url!r} is a chat endpoint, which scores nothing; {wanted}")
    return parsed.copy_with(path=f"{path}/completions")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _api_key() -> str | None:
    """Return the key of the environment without white space around it; UsageError, without the key, where no header can carry it."""
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UsageError(
            f"{KEY} holds a space, a line break or a letter outside ASCII, which no HTTP header carries; set it anew"
        )
    return key or None


def _may_pass(status: int) -> bool:
    """Return True for the answer of a server that is busy, starting or failing for a while."""
    return status in (408, 425, 429) or (status >= 500 and status not in (501, 505))
