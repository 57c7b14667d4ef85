"""HTTP client of one endpoint of a server: protects the API key, repeats failed requests, and raises one-line errors without the key."""

import base64
import html
import ipaddress
import json
import os
import re
import time
from typing import Any
from urllib.parse import quote

import httpx

from megatron_ledom.errors import LedomError, RedirectError, RemoteAnswerError, TransientError, UsageError

SHORTEST_PART = 6
"""Number of consecutive characters of a key, or of an encoded form of it, from which on a part is masked."""
LONGEST_READ = 20_000
"""Number of characters of a text that are searched; the rest is dropped, because no message shows it."""
MASK = "[key]"
ESCAPE = re.compile(r"\\u00([2-7][0-9a-fA-F])|%([2-7][0-9a-fA-F])")
ATTEMPTS = 4
"""Number of attempts while the server is busy or away, with pauses of 1, 2 and 4 seconds."""
CONNECT_SECONDS = 30.0
SHOWN_CHARACTERS = 300
KEY = "OPENAI_API_KEY"


class CompletionsClient:
    """Sends JSON to `<url>/<endpoint>` and returns the JSON object of the response. Threads may share it.

    The API key, from the environment variable `key_variable`, is sent only to the host of `url`. Redirects are refused. With a
    key, plain http to another machine is refused unless `key_over_http` is True.
    """

    def __init__(
        self,
        url: str,
        *,
        endpoint: str = "completions",
        timeout: float = 600.0,
        key_over_http: bool = False,
        key_variable: str = KEY,
    ) -> None:
        address = _address(url, endpoint, key_variable)
        self._endpoint = endpoint
        is_local = is_loopback(address.host)
        self.url, key = str(address), _api_key(key_variable)
        self.mask, self._key_variable = KeyMask(key), key_variable
        if key and address.scheme == "http" and not is_local and not key_over_http:
            raise UsageError(
                f"{key_variable} is set, and {self.url} is plain http to another machine, so others in the network can read the key;"
                f" use an https address, unset {key_variable} if the server needs none, or pass --key-over-http in a network that you trust"
            )
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        self._options: dict[str, Any] = {
            "headers": headers,
            "timeout": httpx.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS), pool=None),
            "limits": httpx.Limits(max_connections=None),
            "follow_redirects": False,
            "trust_env": not is_local,  # no proxy for requests to this machine
        }
        try:
            self._http = httpx.Client(**self._options)
        except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
            raise UsageError(
                f"the environment's proxy or certificates (HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE) cannot be used for {self.url}:"
                f" {self.shown(str(error))}; correct or unset them"
            ) from None

    def request(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Return the response to one request; repeat it if the server is busy or the connection breaks.

        Raises TransientError after ATTEMPTS or if the server does not answer in time, RemoteAnswerError for a refusal or a response that is
        not a JSON object, RedirectError for a redirect.
        """
        return self._content(self._answer("POST", self.url, fields))

    def get(self, path: str) -> dict[str, Any]:
        """Return the response to a GET of another path of the server, such as `models` beside `completions`; errors as in `request`."""
        return self._content(self._answer("GET", self._beside(path)))

    def request_if_offered(self, path: str, fields: dict[str, Any]) -> dict[str, Any] | None:
        """Return the response of another path to JSON; None if the server, or a proxy before it, gives no JSON object there."""
        try:
            return self._content(self._answer("POST", self._beside(path), fields, attempts=1))
        except (RemoteAnswerError, TransientError):
            return None

    def open_async(self) -> httpx.AsyncClient:
        """Return an asynchronous client with the same key, time limits and rules."""
        return httpx.AsyncClient(**self._options)

    def refusal(self, response: httpx.Response) -> LedomError:
        """Return the error for a response, already read, whose status is not 200; TransientError if a later request may get one."""
        if response.has_redirect_location:
            return RedirectError(
                f"{response.url} redirects ({response.status_code}) to {self.shown(response.headers['location'])}. Redirects are not"
                " followed, so that prompts and key go to no other host; give the address of the server itself"
            )
        said = f"{response.status_code} {self.shown(response.content.decode('utf-8', 'replace'))}"
        if is_transient(response.status_code):
            return TransientError(f"{response.url} cannot answer now: {said}")
        remedy = (
            f"; put its key into the environment variable {self._key_variable}" if response.status_code in (401, 403) else ""
        )
        return RemoteAnswerError(f"{response.url} refuses the request: {said}{remedy}")

    def away(self, url: object, reason: str) -> TransientError:
        """Return the error for a server that did not answer any attempt."""
        return TransientError(f"{url} did not answer {ATTEMPTS} times ({reason}); check that it runs, then try again")

    def too_slow(self, url: object) -> TransientError:
        """Return the error for a server that took a request and did not answer in time.

        Such a request is not repeated: the server may still compute it, and would compute it again.
        """
        return TransientError(
            f"{url} did not answer within {self._options['timeout'].read:g} seconds; send less at once, or try again when it is less busy"
        )

    def _answer(self, method: str, url: str, fields: dict[str, Any] | None = None, attempts: int = ATTEMPTS) -> httpx.Response:
        """Return the first response that is not transient; raise TransientError at once if the server takes too long."""
        body = None if fields is None else json.dumps(fields, allow_nan=False).encode()
        reason = ""
        for attempt in range(attempts):
            try:
                response = self._http.request(method, url, content=body)
            except httpx.ReadTimeout:
                raise self.too_slow(url) from None
            except httpx.TransportError as error:
                reason = self.shown(f"{type(error).__name__}: {error}")
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise RemoteAnswerError(
                    f"{url}: {self.shown(str(error))}; check that it is the server's /v1/{self._endpoint}"
                ) from None
            else:
                if not is_transient(response.status_code):
                    return response
                reason = f"{response.status_code} {self.shown(response.content.decode('utf-8', 'replace'))}"
            if attempt + 1 < attempts:
                time.sleep(2**attempt)
        raise self.away(url, reason)

    def _beside(self, path: str) -> str:
        """Return the address of `path` in the folder of the endpoint; a path that begins with / is beside `v1`."""
        folder = self.url.removesuffix(f"/{self._endpoint}")
        return folder.removesuffix("/v1") + path if path.startswith("/") else f"{folder}/{path}"

    def shown(self, text: str, most: int = SHOWN_CHARACTERS) -> str:
        """Return a text of the server for a message: one line, printable, short, without the key.

        Every quoted text of a server must pass through this method. It masks the key before it cuts the text, because the
        remaining part of a cut key would not be recognized.
        """
        masked = self.mask.masked(text)
        line = "".join(c if c.isprintable() else "?" for c in " ".join(masked.split()))
        return line if len(line) <= most else f"{line[:most]} ..."

    def _content(self, response: httpx.Response) -> dict[str, Any]:
        if response.status_code != 200:
            raise self.refusal(response)
        try:
            answer = json.loads(response.content)
        except (ValueError, RecursionError):
            kind = self.shown(response.headers.get("content-type", "no content type"))
            said = self.shown(response.content.decode("utf-8", "replace"))
            raise RemoteAnswerError(
                f"{response.url} answered with {kind} that is not JSON: {said!r}; is it /v1/{self._endpoint}?"
            ) from None
        if not isinstance(answer, dict):
            raise RemoteAnswerError(
                f"{response.url} answered with a {type(answer).__name__}, expected an object: {self.shown(str(answer))};"
                f" is it /v1/{self._endpoint}?"
            )
        return answer


class KeyMask:
    """Masks a key in texts. An empty key masks nothing."""

    def __init__(self, key: str | None) -> None:
        self._key = key or ""
        self._forms = [form.lower() for form in _forms(self._key)] if self._key else []
        self._shortest = min(len(self._key), SHORTEST_PART)
        self._starts = {form[i : i + self._shortest] for form in self._forms for i in range(len(form) - self._shortest + 1)}

    def is_contained_in(self, text: str) -> bool:
        """Return True if a text contains the whole key. A key of less than 8 characters, such as EMPTY, is not a secret."""
        return len(self._key) >= 8 and self._key in text

    def masked(self, text: str) -> str:
        """Return the text with MASK for each part of the key; call it before the text is cut."""
        if not self._key:
            return text
        text = ESCAPE.sub(lambda found: chr(int(found[1] or found[2], 16)), text[:LONGEST_READ])
        lowered = "".join(c.lower() if c.isascii() else c for c in text)
        parts, position = [], 0
        while position < len(text):
            length = self._length_at(lowered, position)
            parts.append(MASK if length else text[position])
            position += length or 1
        return "".join(parts)

    def _length_at(self, text: str, start: int) -> int:
        """Return the number of characters from `start` on that are part of one of the forms; 0 if fewer than the shortest part."""
        if text[start : start + self._shortest] not in self._starts:
            return 0
        longest = 0
        for form in self._forms:
            length = self._shortest
            while text[start : start + length] in form and start + length <= len(text):
                longest = length
                length += 1
        return longest


def _forms(key: str) -> list[str]:
    """Return the key and its encodings. Base64 has three, one for each position of the key modulo 3 in the encoded text."""
    data = key.encode()
    forms = [key, data.hex(), quote(key, safe=""), html.escape(key), json.dumps(key)[1:-1], repr(key)[1:-1]]
    for before in range(3):
        encoded = base64.b64encode(b"\0" * before + data).rstrip(b"=").decode()
        whole = encoded[-(-before * 8 // 6) :][: len(data) * 8 // 6]
        forms += [whole, whole.replace("+", "-").replace("/", "_")]
    shortest = min(len(key), SHORTEST_PART)
    return list(dict.fromkeys(form for form in forms if len(form) >= shortest))


def _address(url: str, endpoint: str, key_variable: str) -> httpx.URL:
    """Return the address of an endpoint of a server; raises UsageError for an invalid one."""
    wanted = "expected one such as http://localhost:8000/v1"
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise UsageError(f"{url!r} is not the address of a server ({error}); {wanted}") from error
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise UsageError(
            f"the address of the server at {parsed.host} contains a user, a query or a fragment; {wanted}, and put the key into {key_variable}"
        )
    is_port = parsed.port is None or 0 < parsed.port < 2**16
    if parsed.scheme not in ("http", "https") or not parsed.host or "%" in parsed.host or not is_port:
        raise UsageError(f"{url!r} is not the address of a server; {wanted}")
    path = parsed.path.rstrip("/").removesuffix(f"/{endpoint}").rstrip("/")
    if path.endswith("/chat"):
        raise UsageError(f"{url!r} is a chat endpoint, which cannot score texts; {wanted}")
    return parsed.copy_with(path=f"{path}/{endpoint}")


def is_loopback(host: str) -> bool:
    """Return True if only this machine can reach the host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _api_key(variable: str) -> str | None:
    """Return the stripped key of the environment; raises UsageError, without the key, if no HTTP header can contain it."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UsageError(
            f"{variable} contains a space, a line break or a letter outside ASCII, which an HTTP header cannot contain; correct it"
        )
    return key or None


def is_transient(status: int) -> bool:
    """Return True for the status of a server that is busy, starting or failing temporarily."""
    return status in (408, 425, 429) or (status >= 500 and status not in (501, 505))
