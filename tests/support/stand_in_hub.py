"""A Hugging Face hub on this machine, for the real `huggingface_hub` client: two HTTP servers on loopback, one for the hub and one for the
host that large files are redirected to.

    with stand_in_hub() as hub:
        first = hub.commit("datasets/org/name", {"a.jsonl": b"...", "data/b.parquet": b"..."})   # `main` is at this commit
        second = hub.commit("datasets/org/name", {"a.jsonl": b"other"})      # a file that is not given stays; None removes it
        hub.repo("datasets/org/name").branches["v1"] = first                 # branches and tags are names of commits
        with hub.used_here():                                                # this process, and processes that it forks
            fsspec.filesystem("hf").open(f"hf://datasets/org/name@{first}/a.jsonl")
        subprocess.run([...], env=hub.environment())                         # another process

It answers as the public hub does: the commit of a revision, pages of `tree`, `paths-info`, `auth-check`, and `resolve` with HEAD, GET and
ranges. With a known token it takes new repositories and commits (`hub_commits`).
Files that match `hub.lfs` are redirected (302) to the other host with a signed address that needs no token, the others to
`/api/resolve-cache` (307). Answers have ETag, X-Repo-Commit, X-Linked-Etag and X-Linked-Size; refusals have X-Error-Code.

    hub.tokens.add("hf_secret")                  # tokens that the hub knows; any other one gets 401
    hub.expired.add("hf_secret")                 # a known token that has expired: 401
    hub.repo(NAME).readers = {"hf_secret"}       # private: seen with these tokens only; None is public
    hub.repo(NAME).gated_for = {"hf_secret"}     # gated: listed for everyone, read with these tokens only; None is not gated

    hub.failures.append(Failure(on="content", skip=2, break_after=1000))         # the third GET of content breaks after 1,000 bytes
    hub.failures.append(Failure(on="tree", status=429, headers={"Retry-After": "0"}, times=3))

`hub.requests` lists what was asked and answered, and `hub.leaks` every request that took a token to the host of large files.
"""

import contextlib
import fnmatch
import hashlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest

from tests.support.hub_commits import take

Files = dict[str, bytes]
SIGNATURE = "X-Amz-Signature"
REPO = r"(?P<kind>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)"
API = re.compile(
    rf"/api/{REPO}(?:/(?P<what>revision|tree|paths-info|auth-check|refs)(?:/(?P<revision>[^/]+))?(?:/(?P<path>.*))?)?$"
)
RESOLVE = re.compile(r"/(?:(?P<kind>datasets|spaces)/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)$")
CACHED = re.compile(
    r"/api/resolve-cache/(?P<kind>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)/(?P<revision>[^/]+)/(?P<path>.+)$"
)


@dataclass(kw_only=True)
class Failure:
    """A failure that some requests meet. A request meets the first one that fits it."""

    on: str = ""
    """Kind of the request: `info` (a commit), `tree`, `paths-info`, `auth-check`, `resolve` (before the redirect), `content`
    (the bytes of a file, from either host), `write`; empty for all."""
    method: str = ""
    path: str = "*"
    """Pattern of the path in the repository (of its file, for `content`)."""
    skip: int = 0
    """Number of such requests that pass before."""
    times: int | None = 1
    """Number of requests that meet the failure; None for all."""
    status: int | None = None
    """Answer with this status and `headers`."""
    headers: Mapping[str, str] = field(default_factory=dict)
    message: str = "made for a test"
    break_after: int | None = None
    """Break the connection after so many bytes of the content; -1: before any answer."""
    short: int | None = None
    """Send only so many bytes, as a complete answer."""
    wrong: bool = False
    """Send other bytes of the same number."""
    ignore_range: bool = False
    """Answer with 200 and the whole file."""
    wait_seconds: float = 0.0
    """Wait before the answer."""
    met: int = 0

    def fits(self, on: str, method: str, path: str) -> bool:
        """Count a request, and return True if it meets the failure."""
        if self.on not in ("", on) or self.method not in ("", method) or not fnmatch.fnmatch(path, self.path):
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.times is not None and self.met >= self.times:
            return False
        self.met += 1
        return True


@dataclass
class Seen:
    """A request, and the status of its answer (0: the connection was broken)."""

    on: str
    method: str
    path: str
    range: str
    token: str
    status: int


@dataclass
class Repo:
    """The commits of a repository, the names of its revisions, and who may read it."""

    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    readers: set[str] | None = None
    gated_for: set[str] | None = None

    def commit_of(self, revision: str) -> str | None:
        """Return the commit of a branch, a tag or a commit."""
        return self.branches.get(revision, revision if revision in self.commits else None)


class StandInHub:
    """The repositories, the tokens, the failures to meet, and the two servers."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens: set[str] = set()
        self.expired: set[str] = set()
        self.lfs: list[str] = ["*.parquet", "*.gz", "*.zst", "*.arrow"]
        self.page_size = 1000
        """Entries of one page of `tree`."""
        self.failures: list[Failure] = []
        self.requests: list[Seen] = []
        self.leaks: list[Seen] = []
        self.lock = threading.Lock()
        self.hub, self.storage = _Server(self, _HubHandler), _Server(self, _StorageHandler)

    @property
    def url(self) -> str:
        """The address for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.hub.server_port}"

    def repo(self, name: str) -> Repo:
        """Return the repository `datasets/org/name` (`org/name` for a model), made if it is new."""
        return self.repos.setdefault(_full(name), Repo())

    def commit(self, name: str, files: Mapping[str, bytes | None], branch: str = "main") -> str:
        """Add or replace files, move the branch, and return the new commit."""
        repo = self.repo(name)
        before = repo.commits.get(repo.branches.get(branch, ""), {})
        now = {path: content for path, content in {**before, **files}.items() if content is not None}
        described = json.dumps([repo.branches.get(branch), {path: _sha256(content) for path, content in sorted(now.items())}])
        commit = hashlib.sha1(described.encode()).hexdigest()
        repo.commits[commit], repo.branches[branch] = now, commit
        return commit

    def is_lfs(self, path: str) -> bool:
        """Return True if a file is on the host of large files."""
        return any(fnmatch.fnmatch(path, pattern) for pattern in self.lfs)

    def failure(self, on: str, method: str, path: str) -> Failure | None:
        """Return the failure that a request meets."""
        with self.lock:
            return next((failure for failure in self.failures if failure.fits(on, method, path)), None)

    def count(self, on: str, method: str = "") -> int:
        """Return the number of requests of a kind."""
        return sum(seen.on == on and method in ("", seen.method) for seen in self.requests)

    def environment(self, **changes: str) -> dict[str, str]:
        """Return the environment of a process that uses this hub, without the user's own token and files."""
        hidden = ("HF_", "HUGGING", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        base = {name: value for name, value in os.environ.items() if not name.upper().startswith(hidden)}
        return {**base, "HF_ENDPOINT": self.url, "HF_HOME": "/nonexistent", "HF_HUB_DISABLE_TELEMETRY": "1", **changes}

    @contextlib.contextmanager
    def used_here(self, token: str | None = None) -> Iterator[None]:
        """Let `huggingface_hub` in this process use this hub, with a token in HF_TOKEN or with none."""
        from huggingface_hub import HfFileSystem, constants

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(constants, "ENDPOINT", self.url)
            patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}")
            patch.setattr(constants, "HF_HUB_OFFLINE", False)
            patch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
            patch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
            patch.delenv("HF_TOKEN", raising=False)
            if token is not None:
                patch.setenv("HF_TOKEN", token)
            HfFileSystem.clear_instance_cache()
            try:
                yield
            finally:
                HfFileSystem.clear_instance_cache()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: StandInHub, handler: type["_Handler"]) -> None:
        self.of = hub
        super().__init__(("127.0.0.1", 0), handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing if a client has left."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    server: _Server
    on = ""

    def log_message(self, *_: Any) -> None:
        """Print nothing to stderr."""

    @property
    def hub(self) -> StandInHub:
        return self.server.of

    @property
    def token(self) -> str:
        return str(self.headers.get("Authorization", "")).removeprefix("Bearer ")

    def seen(self, status: int) -> Seen:
        with self.hub.lock:
            seen = Seen(self.on, self.command, self.path, self.headers.get("Range", ""), self.token, status)
            self.hub.requests.append(seen)
        return seen

    def meets_failure(self, on: str, path: str) -> Failure | None:
        """Return the failure that shapes the content, after one that replaces the whole answer was sent; `self.on` is then empty."""
        self.on = on
        failure = self.hub.failure(on, self.command, path)
        if failure is None:
            return None
        if failure.wait_seconds:
            time.sleep(failure.wait_seconds)
        if failure.break_after == -1:
            self.seen(0)
            self.cut()
            self.on = ""
        elif failure.status is not None:
            self.send(failure.status, json.dumps({"error": failure.message}).encode(), failure.headers)
            self.on = ""
        return failure

    def send(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.seen(status)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def cut(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    def send_content(self, content: bytes, headers: Mapping[str, str], failure: Failure | None) -> None:
        """Send a file or a range of it, as the failure has it."""
        failure = failure or Failure()
        size = len(content)
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        status, more = 200, dict(headers)
        if match and not failure.ignore_range:
            first, last = match.groups()
            start = int(first) if first else max(0, size - int(last))
            end = min(size, int(last) + 1) if last and first else size
            if start >= size:
                self.send(416, b"", {"Content-Range": f"bytes */{size}"})
                return
            status, content = 206, content[start:end]
            more["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        if failure.wrong:
            content = bytes(byte ^ 1 for byte in content)
        content = content if failure.short is None else content[: failure.short]
        if failure.break_after is None:
            self.send(status, content, {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **more})
            return
        self.seen(0)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **more}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: failure.break_after])
        self.cut()


class _HubHandler(_Handler):
    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        if match := CACHED.match(path) or RESOLVE.match(path):
            self.resolve(match, is_cached=CACHED.match(path) is not None)
        elif match := API.match(path):
            on = match["what"] or "info"
            inside = unquote(match["path"] or "")
            self.meets_failure("info" if on == "revision" else on, inside)
            if self.on and (repo := self.allowed(match["kind"], match["name"])):
                self.api(on, repo, match, inside, {**query, **parse_qs(body.decode())})
        elif not self.meets_failure("write", path) and not take(self, path, body):
            self.on = "unknown"
            self.refuse(404, "", "not found")

    do_GET = do_HEAD = do_POST = answer

    def refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        body = json.dumps({"error": message}).encode()
        self.send(status, body, {name: value for name, value in headers.items() if value})

    def allowed(self, kind: str, name: str) -> Repo | None:
        """Return the repository; None after a refusal, if the token does not permit it or there is none."""
        token, hub = self.token, self.hub
        if token in hub.expired:
            return self.refuse(401, "", 'User Access Token "test" is expired')
        if token and token not in hub.tokens:
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        repo = hub.repos.get(f"{kind}/{name}")
        if repo is None or (repo.readers is not None and token not in repo.readers):
            return self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        return repo

    def api(self, on: str, repo: Repo, match: re.Match[str], inside: str, query: Mapping[str, list[str]]) -> None:
        if on == "auth-check":
            return self.send(200, b"{}") if self.may_read(repo, match["name"]) else None
        if on == "refs":
            branches = [{"name": name, "ref": name, "targetCommit": commit} for name, commit in repo.branches.items()]
            return self.send(200, json.dumps({"branches": branches, "tags": [], "converts": []}).encode())
        revision = unquote(match["revision"] or "main")
        commit = repo.commit_of(revision)
        if commit is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repo.commits[commit]
        if on in ("info", "revision"):
            siblings = [{"rfilename": path} for path in sorted(files)]
            gated = "manual" if repo.gated_for is not None else False
            info = {
                "id": match["name"],
                "sha": commit,
                "siblings": siblings,
                "private": repo.readers is not None,
                "gated": gated,
            }
            return self.send(200, json.dumps(info).encode())
        if on == "paths-info":
            entries = {entry["path"]: entry for entry in _tree(self.hub, files, "", True)}
            return self.send(200, json.dumps([entries[path] for path in query["paths"] if path in entries]).encode())
        entries_below = _tree(self.hub, files, inside, query.get("recursive", [""])[0].lower() == "true")
        if inside and not entries_below:
            return self.refuse(404, "EntryNotFound", f"{inside} does not exist on {revision}")
        first = int(query.get("cursor", ["0"])[0])
        page = entries_below[first : first + self.hub.page_size]
        links = {}
        if first + len(page) < len(entries_below):
            recursive = query.get("recursive", ["false"])[0]
            following = f"{self.hub.url}{urlsplit(self.path).path}?recursive={recursive}&cursor={first + len(page)}"
            links = {"Link": f'<{following}>; rel="next"'}
        return self.send(200, json.dumps(page).encode(), links)

    def may_read(self, repo: Repo, name: str) -> bool:
        if repo.gated_for is None or self.token in repo.gated_for:
            return True
        self.refuse(
            403 if self.token else 401, "GatedRepo", f"Access to {name} is restricted and you are not in the authorized list"
        )
        return False

    def resolve(self, match: re.Match[str], *, is_cached: bool) -> None:
        kind, path, revision = match["kind"] or "models", unquote(match["path"]), unquote(match["revision"])
        failure = self.meets_failure("content" if is_cached else "resolve", path)
        if not self.on or not (repo := self.allowed(kind, match["name"])) or not self.may_read(repo, match["name"]):
            return
        commit = repo.commit_of(revision)
        if commit is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        content = repo.commits[commit].get(path)
        if content is None:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        etag = _sha256(content) if self.hub.is_lfs(path) else _blob(content)
        common = {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}
        if is_cached:
            return self.send_content(content, common, failure)
        common |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        if self.hub.is_lfs(path):
            place = f"http://127.0.0.1:{self.hub.storage.server_port}/{quote(match['name'])}/{etag}"
            signed = f"{place}?X-Amz-Expires=3600&{SIGNATURE}={_signature(etag)}&name={quote(path, safe='')}"
            return self.send(302, b"", {**common, "Location": signed})
        cached = f"/api/resolve-cache/{kind}/{match['name']}/{commit}/{quote(path)}"
        return self.send(307, b"", {**common, "Location": cached})


class _StorageHandler(_Handler):
    def answer(self) -> None:
        place, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        sha256 = place.rsplit("/", 1)[1]
        failure = self.meets_failure("content", query.get("name", [""])[0])
        if not self.on:
            return
        every = (content for repo in self.hub.repos.values() for files in repo.commits.values() for content in files.values())
        content = next((content for content in every if _sha256(content) == sha256), None)
        if content is None or query.get(SIGNATURE) != [_signature(sha256)]:
            self.send(403, b"<Error><Code>AccessDenied</Code></Error>", {"Content-Type": "application/xml"})
        else:
            self.send_content(content, {"ETag": f'"{sha256[:32]}"'}, failure)

    do_GET = do_HEAD = answer

    def seen(self, status: int) -> Seen:
        seen = super().seen(status)
        if seen.token:
            self.hub.leaks.append(seen)
        return seen


def _full(name: str) -> str:
    return name if name.split("/")[0] in ("datasets", "models", "spaces") and name.count("/") == 2 else f"models/{name}"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _signature(sha256: str) -> str:
    return _sha256(f"signed {sha256}".encode())


def _blob(content: bytes) -> str:
    """Return the id that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _tree(hub: StandInHub, files: Files, folder: str, recursive: bool) -> list[dict[str, Any]]:
    """Return the entries below a folder, as `tree` and `paths-info` list them."""
    start = f"{folder}/" if folder else ""
    found: dict[str, dict[str, Any]] = {}
    for path, content in sorted(files.items()):
        if not path.startswith(start):
            continue
        parts = path.removeprefix(start).split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            inner = start + "/".join(parts[:depth])
            found.setdefault(inner, {"type": "directory", "oid": _blob(inner.encode()), "size": 0, "path": inner})
        if recursive or len(parts) == 1:
            found[path] = _file_entry(hub, path, content)
    return list(found.values())


def _file_entry(hub: StandInHub, path: str, content: bytes) -> dict[str, Any]:
    if not hub.is_lfs(path):
        return {"type": "file", "oid": _blob(content), "size": len(content), "path": path}
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{_sha256(content)}\nsize {len(content)}\n".encode()
    lfs = {"oid": _sha256(content), "size": len(content), "pointerSize": len(pointer)}
    return {"type": "file", "oid": _blob(pointer), "size": len(content), "lfs": lfs, "path": path}


@contextlib.contextmanager
def stand_in_hub() -> Iterator[StandInHub]:
    """Start an empty hub, and stop it at the end."""
    hub = StandInHub()
    servers = (hub.hub, hub.storage)
    threads = [threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
