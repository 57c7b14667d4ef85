"""The files of the web page: their headers, that they need no key, and that they load and run nothing from elsewhere."""

import re

import httpx
import pytest

from megatron_ledom.reports import curves, explanation
from megatron_ledom.serving.page_files import read_page
from tests.support.paths import ROOT
from tests.support.served import Served

FOLDER = ROOT / "megatron_ledom/serving/page"
FILES = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
UNSAFE = ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "DOMParser", "srcdoc"]
"""Ways in which a text could become part of the document's structure or code."""


def test_the_page_and_its_files_need_no_key_and_have_strict_headers(lone: Served) -> None:
    assert len(read_page()) == len(FILES) + 1
    for path, (kind, content) in read_page().items():
        for method in ("GET", "HEAD"):
            answer = httpx.request(method, lone.url + path, timeout=60)
            assert answer.status_code == 200
            assert answer.headers["content-type"] == kind
            assert answer.content == (content if method == "GET" else b"")
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/page/../page_files.py", "/page/%2e%2e/page_files.py", "/page/", "/page/none.js", "/page"])
def test_no_other_file_is_served(lone: Served, path: str) -> None:
    assert httpx.get(lone.url + path, timeout=60).status_code == 401
    headers = {"Authorization": "Bearer right key"}
    assert httpx.get(lone.url + path, headers=headers, timeout=60).status_code == 404


def test_the_schema_has_no_route_of_the_page(lone: Served) -> None:
    schema = httpx.get(f"{lone.url}/openapi.json", headers={"Authorization": "Bearer right key"}, timeout=60).json()
    assert "/v1/reward" in schema["paths"]
    assert not [path for path in schema["paths"] if path == "/" or path.startswith("/page")]


def test_nothing_is_loaded_from_elsewhere_and_no_text_becomes_html() -> None:
    namespace = "http://www.w3.org/2000/svg"
    for name, text in FILES.items():
        assert not re.search(r"(https?:)?//[a-z0-9.-]+\.[a-z]{2,}", text.replace(namespace, "")), name
        assert not [word for word in UNSAFE if word in text], name
    html = FILES["index.html"]
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son[a-z]+=|\sstyle=", html)
    names = re.findall(r'(?:src|href)="([^"]+)"', html)
    assert names
    assert {*names} <= {*read_page()}


def test_every_module_that_is_imported_is_served() -> None:
    for name, text in FILES.items():
        for imported in re.findall(r'from "\./([^"]+)"', text):
            assert imported in FILES, (name, imported)


def test_colours_are_those_of_the_reports() -> None:
    style = FILES["style.css"]
    for name, colour in (("low", explanation.LIGHT), ("high", explanation.DARK)):
        assert f"--{name}: light-dark(rgb({', '.join(map(str, colour))})," in style
    light, dark = (curves.COLOURS[theme]["reverse"][0] for theme in ("light", "dark"))
    assert f"--accent: light-dark({light}, {dark})" in style
