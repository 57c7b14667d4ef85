"""The writing half of the hub for tests: new repositories, the check of a card, and commits of small files."""

import base64
import json
import re
from typing import Any

import yaml

WRITE = re.compile(r"/api/(?P<kind>datasets|models)/(?P<name>[^/]+/[^/]+)/(?P<what>preupload|commit)/(?P<branch>[^/]+)$")
LICENCES = {"mit", "cc0-1.0", "odc-by", "apache-2.0", "gpl-3.0", "unknown", "other"}
"""Some of those that the hub knows."""


def take(handler: Any, path: str, body: bytes) -> bool:
    """Answer a request that writes. Return False for another one."""
    hub, host = handler.hub, f"http://{handler.headers['Host']}"
    if path == "/api/validate-yaml":
        errors = card_errors(json.loads(body)["content"])
        handler.send(400 if errors else 200, json.dumps({"errors": errors, "warnings": []}).encode())
    elif path == "/api/repos/create":
        asked = json.loads(body)
        name = f"datasets/{asked['organization']}/{asked['name']}"
        if handler.token not in hub.tokens:
            handler.refuse(403, "", "no right to write")
        elif name in hub.repos:
            handler.refuse(409, "", "You already created this dataset repo")
        else:
            is_private = asked.get("private") or asked.get("visibility") == "private"
            hub.repo(name).readers = {handler.token} if is_private else None
            hub.commit(name, {".gitattributes": b"*.gz filter=lfs\n"})
            handler.send(200, json.dumps({"url": f"{host}/{name}"}).encode())
    elif match := WRITE.match(path):
        if handler.token not in hub.tokens:
            handler.refuse(403, "", "no right to write")
        elif match["what"] == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            handler.send(200, json.dumps({"files": files}).encode())
        else:
            commit(handler, f"{match['kind']}/{match['name']}", match["branch"], body)
    else:
        return False
    return True


def commit(handler: Any, name: str, branch: str, body: bytes) -> None:
    """Make a commit of the lines of a request, unless its parent is not the last commit."""
    changes: dict[str, bytes | None] = {}
    for line in map(json.loads, body.splitlines()):
        value = line["value"]
        if line["key"] == "header" and value.get("parentCommit") not in (None, handler.hub.repo(name).branches.get(branch)):
            handler.refuse(412, "", "A commit has happened since. Please refresh and try again.")
            return
        if line["key"] == "file":
            changes[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "deletedFile":
            changes[value["path"]] = None
    made = handler.hub.commit(name, changes, branch)
    url = f"{handler.hub.url}/{name}/commit/{made}"
    handler.send(200, json.dumps({"commitOid": made, "commitUrl": url, "success": True}).encode())


def card_errors(card: str) -> list[dict[str, str]]:
    """Return what the hub has against the metadata of a card."""
    head = yaml.safe_load(card.split("---")[1])
    found = []
    if head.get("license") not in LICENCES:
        found.append('"license" must be one of the identifiers of the hub')
    if head.get("license") == "other" and not re.fullmatch(r"[a-z0-9.-]+", head.get("license_name", "")):
        found.append('"license_name" must be an identifier')
    link = head.get("license_link", "LICENSE")
    if link not in ("LICENSE", "LICENSE.md") and not link.startswith("https://"):
        found.append('"license_link" must be LICENSE, LICENSE.md or an address')
    return [{"message": message} for message in found]
