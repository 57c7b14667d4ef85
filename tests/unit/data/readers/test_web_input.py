"""https:// inputs against a web server on this machine that gives wrong answers, and changes in stores that check nothing themselves."""

import re
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import fsspec
import pytest

from megatron_ledom.data.readers.byte_ranges import InputPath
from megatron_ledom.data.readers.input_files import expand_inputs, find_inputs
from megatron_ledom.data.readers.remote import check_no_secrets, without_secrets
from megatron_ledom.data.readers.remote_stream import opened_remote
from megatron_ledom.errors import DataError, LedomError, TransientError, UsageError

pytest.importorskip("aiohttp", reason="aiohttp is not installed")
CONTENT = b"".join(b'{"text": "%06d"}\n' % number for number in range(500))
PAGE = b"<html>please log in</html>" * 20
SIGNED = "X-Amz-Signature=SECRETSIG"
Answer = tuple[int, bytes, dict[str, str]]
"""(status, body, headers)"""


@dataclass
class Site:
    """One file, and wrong answers to some requests."""

    url: str = ""
    content: bytes = CONTENT
    etag: str = '"first"'
    wrong: Callable[[str, str, str], Answer | None] = lambda method, path, asked: None
    """Returns an answer in place of the right one, for (method, path, Range)."""
    encodings: list[str] = field(default_factory=list)
    """Accept-Encoding of each request for a range."""

    def answer(self, method: str, path: str, asked: str) -> Answer:
        """Return the right answer, unless there is a wrong one."""
        wrong = self.wrong(method, path, asked)
        if wrong is not None:
            return wrong
        if not asked:
            return 200, self.content, {"ETag": self.etag}
        start, end = (int(value) for value in re.findall(r"\d+", asked))
        part = self.content[start : end + 1]
        return 206, part, {"ETag": self.etag, "Content-Range": f"bytes {start}-{end}/{len(self.content)}"}


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A web server, asked without waiting between two tries."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Print nothing to stderr."""

        def do_GET(self) -> None:
            asked = self.headers.get("Range", "")
            if asked:
                site.encodings.append(self.headers.get("Accept-Encoding", ""))
            status, body, headers = site.answer(self.command, self.path, asked)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield site
    server.shutdown()
    server.server_close()


def read(source: InputPath, block: int = 1000) -> bytes:
    """Return the content of a file, read in blocks."""
    for stream in opened_remote(source, block, source.num_bytes):
        found = bytearray()
        while part := stream.read(block):
            found += part
    return bytes(found)


def once(asked: str, answer: Answer) -> tuple[Callable[[str, str, str], Answer | None], list[str]]:
    """Return a function that gives a wrong answer to the first request for a range, and the list of such requests."""
    met: list[str] = []

    def wrong(method: str, path: str, found: str) -> Answer | None:
        if found == asked:
            met.append(found)
        return answer if found == asked and len(met) == 1 else None

    return wrong, met


OF_THE_START = {"Content-Range": f"bytes 0-999/{len(CONTENT)}", "ETag": '"first"'}
OF_THE_FOURTH = {"Content-Range": f"bytes 3000-3999/{len(CONTENT)}", "ETag": '"first"'}
WRONG: dict[str, Answer] = {
    "login page": (200, PAGE, {}),
    "page of equal size": (200, b"x" * 1000, {}),
    "start of the file": (206, CONTENT[:1000], OF_THE_START),
    "range of another version": (206, b"x" * 1000, {**OF_THE_FOURTH, "ETag": '"second"'}),
    "range without its version": (206, b"x" * 1000, {"Content-Range": OF_THE_FOURTH["Content-Range"]}),
    "range of a longer file": (206, b"x" * 1000, {**OF_THE_FOURTH, "Content-Range": "bytes 3000-3999/99999"}),
    "range without its place": (206, b"x" * 1000, {"ETag": '"first"'}),
    "encoded range": (206, b"x" * 1000, {**OF_THE_FOURTH, "Content-Encoding": "aws-chunked"}),
    "longer range": (206, b"x" * 1001, OF_THE_FOURTH),
}


@pytest.mark.parametrize("name", WRONG)
def test_another_answer_is_not_taken_for_the_range(name: str, site: Site) -> None:
    (source,) = expand_inputs([f"{site.url}/a.jsonl"])
    site.wrong, met = once("bytes=3000-3999", WRONG[name])
    assert read(source) == CONTENT
    assert len(met) == 2
    assert set(site.encodings) == {"identity"}


@pytest.mark.parametrize("page", [PAGE, b"x" * len(CONTENT)])
def test_a_page_is_not_taken_for_the_whole_file(page: bytes, site: Site) -> None:
    (source,) = expand_inputs([f"{site.url}/a.jsonl"])
    site.wrong, met = once(f"bytes=0-{len(CONTENT) - 1}", (200, page, {}))
    assert read(source, 1 << 20) == CONTENT
    assert len(met) == 2


def test_a_whole_file_of_the_listed_version_is_taken_if_all_was_asked_for(site: Site) -> None:
    (source,) = expand_inputs([f"{site.url}/a.jsonl"])
    site.wrong = lambda method, path, asked: (200, CONTENT, {"ETag": '"first"'}) if asked else None
    assert read(source, 1 << 20) == CONTENT


def test_a_server_without_ranges_is_named(site: Site) -> None:
    (source,) = expand_inputs([f"{site.url}/a.jsonl"])
    site.wrong = lambda method, path, asked: (200, CONTENT, {"ETag": '"first"'}) if asked else None
    with pytest.raises(
        TransientError, match=r"a.jsonl cannot be read: asked for bytes 0 to 1,000 .*status 200 with no Content-Range"
    ):
        read(source)


def test_a_file_that_was_replaced_while_it_is_read_is_refused(site: Site) -> None:
    (source,) = expand_inputs([f"{site.url}/a.jsonl"])
    for stream in opened_remote(source, 1000, source.num_bytes):
        assert stream.read(1000) == CONTENT[:1000]
        site.content, site.etag = CONTENT.replace(b"1", b"2"), '"second"'
        with pytest.raises(DataError, match=r"another version .*start over with --overwrite"):
            stream.read(1000)
        break


@pytest.mark.parametrize("status", [400, 403, 404])
@pytest.mark.parametrize("place", ["listing", "size", "range", "end"])
def test_no_traceback_has_the_signature_of_a_redirect(place: str, status: int, site: Site) -> None:
    page = b'<a href="a.jsonl">a</a>'
    shows = {"/d/": (200, page, {"Content-Type": "text/html"}), "/d": (200, page, {"Content-Type": "text/html"})}
    fails = [place in ("listing", "size")]

    def wrong(method: str, path: str, asked: str) -> Answer | None:
        if path in shows:
            return shows[path]
        if SIGNED in path:
            return status, b"no", {}
        return (302, b"", {"Location": f"{site.url}/stored?{SIGNED}"}) if fails[0] or (place == "range" and asked) else None

    site.wrong = wrong

    def run() -> None:
        (source,) = expand_inputs([f"{site.url}/d/" if place == "size" else f"{site.url}/a.jsonl"])
        for stream in opened_remote(source, 1000, source.num_bytes):
            stream.read(1000)
            fails[0] = place == "end"

    with pytest.raises(LedomError) as caught:
        run()
    shown = "".join(traceback.format_exception(caught.value))
    assert "SECRETSIG" not in shown
    assert "ClientResponseError" not in shown
    if (place, status) != ("listing", 404):
        assert str(status) in str(caught.value)


def test_signed_links_of_a_page_are_neither_read_nor_listed(site: Site) -> None:
    page = f'<a href="a.jsonl?{SIGNED}">a</a> <a href="b.jsonl">b</a>'.encode()
    site.wrong = lambda method, path, asked: (200, page, {"Content-Type": "text/html"}) if path in ("/d", "/d/") else None
    sources, skipped = find_inputs([f"{site.url}/d/"])
    assert [source.path for source in sources] == [f"{site.url}/d/b.jsonl"]
    assert [entry.path for entry in skipped] == [f"{site.url}/d//**/*.jsonl"]
    page = b'<a href="get?h=SECRETSIG&amp;name=a.jsonl">a</a>'
    with pytest.raises(UsageError, match="may contain credentials") as caught:
        find_inputs([f"{site.url}/d/"])
    assert "SECRETSIG" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "sftp://user:password9@host/a.jsonl",
        "smb://user:password9@host/a.jsonl",
        "hdfs://user:password9@host/a.jsonl",
        "github://user:token9@/a.jsonl",
        "abfs://container:password9@account/a.jsonl",
        "simplecache::https://user:password9@host/a.jsonl",
        "zip://a.jsonl::sftp://user:password9@host/a.zip",
        "https://user:pass@word9@host/a.jsonl",
        "https://host/a?e=1&h=SIGNED9",
        "https://host/get?SIGNED9&name=a.jsonl",
        "https://host/a.jsonl#access_token=9",
        "gs://bucket/a.jsonl?token=9",
    ],
)
def test_credentials_of_every_protocol_are_refused(address: str) -> None:
    with pytest.raises(UsageError, match="credentials") as caught:
        expand_inputs([address])
    assert "9" not in str(caught.value)


def test_addresses_without_credentials_are_accepted_and_shown() -> None:
    for address in (
        "https://host/get?name=a.jsonl&download=true",
        "sftp://user@host/a.jsonl",
        "abfs://container@account.dfs.core.windows.net/a.jsonl",
        "hf://datasets/org/name@main/a?.jsonl",
        "s3://bucket/a?.jsonl",
        "https://[::1]:8000/a@b.jsonl",
    ):
        check_no_secrets(address)
    assert (
        without_secrets("s3://bucket/a?.jsonl, hf://gpt2/a, https://u:p@ss@h/x")
        == "s3://bucket/a?.jsonl, hf://gpt2/a, https://***@h/x"
    )


def test_a_secret_that_a_server_repeats_is_hidden_by_its_value(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fsspec.config.conf, "https", {"headers": {"Authorization": "Bearer plainvalue1"}})
    monkeypatch.setitem(fsspec.config.conf, "sftp", {"username": "someone", "password": "plainvalue2"})
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "plainvalue3")
    shown = without_secrets("no access for plainvalue1, someone, plainvalue2 or plainvalue3")
    assert shown == "no access for ***, someone, *** or ***"


def test_an_object_of_a_store_without_checks_that_was_replaced_is_refused() -> None:
    store = fsspec.filesystem("memory")
    store.pipe("/replaced/a.jsonl", CONTENT)
    try:
        (source,) = expand_inputs(["memory://replaced/a.jsonl"])
        assert source.version
        assert read(source) == CONTENT
        blocks = opened_remote(source, 1000, source.num_bytes)
        next(blocks).read(1000)
        store.pipe("/replaced/a.jsonl", CONTENT.replace(b"1", b"2"))
        with pytest.raises(DataError, match=r"another version .*start over with --overwrite"):
            next(blocks, None)
    finally:
        store.rm("/replaced", recursive=True)
