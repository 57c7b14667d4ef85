"""Send the messages of alerts: to a webhook, as JSON or in Slack's form, and by e-mail. Secrets appear in no error."""

import json
import logging
import os
import re
import shutil
import smtplib
import socket
import ssl
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.message import EmailMessage
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx

from megatron_ledom.errors import UsageError, visible

log = logging.getLogger(__name__)

SEND_SECONDS = 10.0
"""Longest time of one try."""
NOT_FOR_EVER = (401, 403, 404, 407, 408, 425, 429)
"""Refusals of a web server that a change there, or time, can end."""
JSON = {"Content-Type": "application/json"}
SENDMAIL_FOLDERS = ("/usr/sbin", "/usr/lib", "/sbin")
SMTP_USER, SMTP_PASSWORD = "ALERT_SMTP_USER", "ALERT_SMTP_PASSWORD"
MOST_TEXT = 3000
"""Longest text of a Slack message, in characters."""


class Channel(Protocol):
    """A way to send messages."""

    name: str

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one message. Raises SendError if it may not have arrived."""


class SendError(Exception):
    """A message may not have arrived. Its text has no secret."""


class RefusedError(SendError):
    """The receiver has refused this message and would refuse it again."""


def read_secret(source: str, option: str) -> str:
    """Return the value that `env:NAME` or `file:PATH` names. Raises UsageError for anything else, such as the value itself."""
    kind, _, place = source.partition(":")
    if kind == "env" and place:
        value = os.environ.get(place, "").strip()
        if not value:
            raise UsageError(f"{option} env:{place}: the environment variable {place} is not set, or empty")
        return value
    if kind == "file" and place:
        try:
            value = Path(place).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{option} file:{place} cannot be read ({type(error).__name__})") from None
        if not value:
            raise UsageError(f"{option} file:{place} is empty; write the address into it")
        return value
    raise UsageError(
        f"{option} expects env:NAME or file:PATH, the place of the address: the address is a secret, and every user of the machine"
        " can see the options of a process"
    )


class Webhook:
    """A server that takes a POST for each message."""

    name = "webhook"

    def __init__(self, url: str, form: str) -> None:
        """form: `json` for all fields, `slack` for Slack's `text`. Raises UsageError for an address that cannot work."""
        try:
            parts = urlsplit(url)
            is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_usable = False
        if not is_usable:
            raise UsageError("the address of --webhook is not one of a web server; expected https://host/path")
        self._url, self._form = url, form
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs each address

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one message. Every answer but 2xx counts as a failure."""
        body = {"text": slack_text(message)} if self._form == "slack" else dict(message)
        try:
            content = json.dumps(body).encode()  # in ASCII: a name of a file may have no UTF-8
            answer = httpx.post(self._url, content=content, headers=JSON, timeout=SEND_SECONDS, follow_redirects=False)
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            raise SendError(f"{type(error).__name__}: {self._hidden(str(error))}") from None
        if not answer.is_success:
            is_final = answer.is_client_error and answer.status_code not in NOT_FOR_EVER
            kind = RefusedError if is_final else SendError
            raise kind(f"HTTP status {answer.status_code}: {self._hidden(answer.text)}")

    def _hidden(self, text: str) -> str:
        parts = urlsplit(self._url)
        for secret in (self._url, parts.path, parts.query, parts.password, parts.username):
            if secret and secret != "/":
                text = text.replace(secret, "***")
        return visible(" ".join(text.split())[:200])


def slack_text(message: Mapping[str, Any]) -> str:
    """Return the text of a message with Slack's escapes, so that a folder or an error cannot mention people or make links."""
    text = f"{message['text']}\n{message['run']} at {message['time']}"[:MOST_TEXT]
    return visible(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


@dataclass(frozen=True, slots=True)
class SmtpServer:
    """A mail server, and the user for it."""

    host: str
    port: int
    user: str
    password: str


def smtp_server(address: str, variables: Mapping[str, str]) -> SmtpServer:
    """Return the server of `HOST[:PORT]` with user and password of the environment. Raises UsageError."""
    match = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:@/\s]+)(?::([0-9]{1,5}))?", address)
    if match is None or not 0 < int(match[2] or 25) < 2**16:
        shown = f" {address!r}" if "@" not in address else ""  # before an @ may be a password
        raise UsageError(
            f"--smtp{shown} is not HOST or HOST:PORT; user and password belong into {SMTP_USER} and {SMTP_PASSWORD}"
        )
    user, password = variables.get(SMTP_USER, ""), variables.get(SMTP_PASSWORD, "")
    if bool(user) != bool(password):
        raise UsageError(f"{SMTP_USER} and {SMTP_PASSWORD} belong together, but only one is set")
    return SmtpServer(match[1].strip("[]"), int(match[2] or 25), user, password)


class Email:
    """Mail through a server, or through the machine's `sendmail`."""

    name = "email"

    def __init__(self, addresses: Sequence[str], sender: str | None, server: SmtpServer | None) -> None:
        """Raises UsageError for an address that is none, and without server and `sendmail`."""
        for address in [*addresses, *([sender] if sender else [])]:
            if re.fullmatch(r"[^@\s,<>]+@[^@\s,<>]+", address) is None:
                raise UsageError(f"{address!r} is not an e-mail address; expected one such as me@example.org")
        folders = os.pathsep.join([os.environ.get("PATH", ""), *SENDMAIL_FOLDERS])
        self._sendmail = shutil.which("sendmail", path=folders)
        if server is None and self._sendmail is None:
            raise UsageError(
                "--email: this machine has no `sendmail`; give the mail server of your site with --smtp HOST[:PORT]"
            )
        self._addresses, self._server = list(addresses), server
        self._sender = sender or f"ledom@{socket.getfqdn()}"

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one message."""
        mail = EmailMessage()
        mail["From"], mail["To"] = self._sender, ", ".join(self._addresses)
        mail["Subject"] = visible(" ".join(f"[ledom] {message['name']}: {message['event']}".split()))[:150]
        mail["Message-ID"] = f"<{message['id']}@ledom>"  # a repeated message has the same id
        lines = [
            f"{key}: {value}" for key, value in message.items() if value not in (None, "") and key not in ("text", "version")
        ]
        mail.set_content(visible("\n".join([str(message["text"]), "", *lines])) + "\n")
        try:
            self._send(mail)
        except (OSError, smtplib.SMTPException, subprocess.SubprocessError, ssl.SSLError) as error:
            raise SendError(f"{type(error).__name__}: {self._hidden(str(error))}") from None

    def _send(self, mail: EmailMessage) -> None:
        server = self._server
        if server is None:
            command = [str(self._sendmail), "-i", "-t"]
            subprocess.run(command, input=bytes(mail), check=True, capture_output=True, timeout=SEND_SECONDS)
            return
        with smtplib.SMTP(server.host, server.port, timeout=SEND_SECONDS) as connection:
            connection.ehlo()
            if connection.has_extn("starttls"):
                connection.starttls(context=ssl.create_default_context())
                connection.ehlo()
            elif server.user:
                raise SendError(f"{server.host} offers no TLS, and the password is not sent without it")
            if server.user:
                connection.login(server.user, server.password)
            refused = connection.send_message(mail)  # raises only if every address is refused
        for address, (code, text) in refused.items():
            log.error("the mail server does not take %s (%d %s)", address, code, visible(text.decode(errors="replace"))[:200])

    def _hidden(self, text: str) -> str:
        if self._server is not None and self._server.password:
            text = text.replace(self._server.password, "***")
        return visible(" ".join(text.split())[:200])


def open_channels(
    webhook: str | None, form: str, addresses: Sequence[str], sender: str | None, smtp: str | None
) -> list[Channel]:
    """Return the channels of the options of `ledom alert`. Raises UsageError if one cannot work."""
    channels: list[Channel] = []
    if webhook is not None:
        channels.append(Webhook(read_secret(webhook, "--webhook"), form))
    if addresses:
        channels.append(Email(addresses, sender, None if smtp is None else smtp_server(smtp, os.environ)))
    return channels
