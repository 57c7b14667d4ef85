"""Receivers of alerts on this machine: a webhook, and a mail server without TLS."""

import email
import json
import socketserver
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import ThreadingHTTPServer
from typing import Any

from tests.support.local_server import QuietHandler, running


@dataclass
class Hook:
    """A webhook and the messages that it got, also those that it refused."""

    port: int = 0
    messages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Return the address of the server."""
        return f"http://127.0.0.1:{self.port}"

    def events(self) -> list[str]:
        """Return the events of the messages in order."""
        return [each["event"] for each in self.messages]

    def changes(self) -> list[str]:
        """Return the events of the messages without bad steps, which a small model may have."""
        return [event for event in self.events() if event != "spike"]


@contextmanager
def receiving(port: int = 0, statuses: Sequence[int] = (200,)) -> Iterator[Hook]:
    """Run a webhook. statuses: the answers in order; the last one is repeated."""
    hook, answers = Hook(), list(statuses)

    class Handler(QuietHandler):
        def do_POST(self) -> None:
            hook.messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(answers.pop(0) if len(answers) > 1 else answers[0])
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    hook.port = server.server_port
    with running(server):
        yield hook


@dataclass
class MailServer:
    """A mail server and the mails that it got."""

    port: int = 0
    lines: list[str] = field(default_factory=list)
    """Every line that a client has sent."""
    mails: list[Message] = field(default_factory=list)


@contextmanager
def receiving_mail() -> Iterator[MailServer]:
    """Run a mail server that speaks SMTP without extensions."""
    found = MailServer()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"220 here\r\n")
            for line in iter(self._line, ""):
                command = line[:4].upper()
                if command == "DATA":
                    self.wfile.write(b"354 send it\r\n")
                    body = "".join(iter(self._line, ".\r\n"))
                    found.mails.append(email.message_from_string(body))
                self.wfile.write(b"221 bye\r\n" if command == "QUIT" else b"250 fine\r\n")
                if command == "QUIT":
                    return

        def _line(self) -> str:
            line = self.rfile.readline().decode()
            found.lines.append(line)
            return line

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    found.port = server.server_address[1]
    with running(server):
        yield found
