"""The site builds without warnings and without the network, and its generated pages match the code."""

import os
import re
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest
import yaml

from docs.generator import import_picture
from docs.generator.__main__ import PAGES
from docs.generator.cli_page import SUBJECTS
from docs.generator.config_page import config_page
from tests.support.paths import ROOT

DOCS = ROOT / "docs"
WITHOUT_NETWORK = """
import socket, sys
from mkdocs.__main__ import cli

def refuse(*arguments, **named):
    raise AssertionError(f"the build of the site used the network: {arguments}")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
sys.argv = ["mkdocs", *sys.argv[1:]]
cli()
"""
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//|<link\b[^>]*\bhref=["']?(?:https?:)?//[^>]*>"""
)
"""Elements that a browser fetches from another host; `<a href>` is not among them."""
MERMAID = "```mermaid"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. The strict build fails for a broken link, a missing anchor or a page outside the navigation."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-c", WITHOUT_NETWORK, "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_builds_and_no_page_fetches_from_another_host(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    found = [
        f"{page.relative_to(site)}: {match[0]}"
        for page in pages
        for match in FETCHED.finditer(page.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_make_docs_builds_strictly() -> None:
    """With --quiet, mkdocs counts no warnings, so a broken link would pass."""
    [options] = re.findall(r"/mkdocs (build.*)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert options.split() == ["build", "--strict"]


def test_the_site_shows_what_the_package_exports(site: Path) -> None:
    page = (site / "reference/python_api.html").read_text(encoding="utf-8")
    for name in (
        "inference.ReverseLM",
        "inference.ReverseLM.from_pretrained",
        "training.Callback.on_step_end",
        "convert.export_hf",
    ):
        assert f'id="megatron_ledom.{name}"' in page, name


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_current(name: str) -> None:
    stored = (ROOT / name).read_text(encoding="utf-8")
    assert stored == PAGES[name](), f"{name} is stale; write it with: python -m docs.generator"


def test_every_page_is_in_the_navigation_once() -> None:
    text = re.sub(r"!!python/\S+", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = list(leaves(yaml.safe_load(text)["nav"]))
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def leaves(entry: object) -> list[str]:
    """Return the pages of a part of the navigation."""
    if isinstance(entry, str):
        return [entry]
    inside = entry.values() if isinstance(entry, dict) else entry
    return [page for part in inside for page in leaves(part)]  # type: ignore[attr-defined]


def test_no_page_needs_a_script_from_the_network() -> None:
    assert not [str(path) for path in DOCS.rglob("*.md") if MERMAID in path.read_text(encoding="utf-8")]


def test_the_command_line_page_has_every_option() -> None:
    page = (DOCS / "reference/cli.md").read_text(encoding="utf-8")
    for name in (name for names in SUBJECTS.values() for name in names):
        assert f"\n### ledom {name}\n" in page
    for option in ("--input GLOB [GLOB ...]", "--dry-run", "--weight", "--verify {auto,whole,layers}", "section.key=value"):
        assert f"`{option}" in page or f"[{option}" in page, option


def test_the_configuration_page_has_every_key_and_its_docstring() -> None:
    page = config_page()
    named = set(re.findall(r"^\| `([\w.]+)` \|.*\| \S.* \|$", page, re.MULTILINE))
    assert named == set((ROOT / "tests/assets/config_keys.txt").read_text(encoding="utf-8").split())


def test_the_import_picture_has_every_room_and_every_arrow_that_no_longer_way_replaces() -> None:
    graph = import_picture.rooms()
    assert {"cli", "training", "data"} < set(graph)
    assert graph.has_edge("training", "checkpoint")
    picture = import_picture.import_picture()
    assert all(f">{name}</text>" in picture for name in graph)
    direct = [way for way in graph.edges if len(list(nx.all_simple_paths(graph, *way, cutoff=2))) == 1]
    assert len(nx.transitive_reduction(graph).edges) == picture.count('class="arrow"') <= len(direct) < len(graph.edges)


def test_the_task_in_contributing_is_one() -> None:
    """The example of "Add an evaluation task" runs with the imports of its target file."""
    from megatron_ledom.evaluation.tasks import benchmarks

    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```text\n( *def _my_set.*?)```", text, re.DOTALL)
    code = "\n".join(line[3:] for line in example.splitlines()).replace("\nTask(", "\ntask = Task(")
    names = dict(vars(benchmarks))
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    item = names["task"].row_formats[0].read({"question": "What burns?", "options": ["ice", "fire"], "answer": 1})
    assert (item.choices, item.gold, item.values["answer"]) == (("ice", "fire"), 1, "fire")


def test_paths_that_the_pages_name_exist() -> None:
    top = ("megatron_ledom", "tests", "docs", "csrc", "examples", "tools")
    rooms = [path.name for path in (ROOT / "megatron_ledom").iterdir() if path.is_dir()]
    pages = [
        ROOT / "CONTRIBUTING.md",
        ROOT / "DECISIONS.md",
        *(DOCS / f"{name}.md" for name in ("architecture", "benchmarks", "planner", "study")),
    ]
    missing = []
    for page in pages:
        for path in re.findall(rf"`((?:{'|'.join([*top, *rooms])})/[\w./]*)`", page.read_text(encoding="utf-8")):
            is_pattern = re.search(r"\b(NAME|OP)\b", path)
            if not is_pattern and not (ROOT / path).exists() and not (ROOT / "megatron_ledom" / path).exists():
                missing.append(f"{page.name}: {path}")
    assert not missing


def test_names_that_contributing_names_exist() -> None:
    """Checks classes, constants and functions; the test above checks file names."""
    text = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("megatron_ledom", "tests", "csrc")
        for path in (ROOT / folder).rglob("*.py")
    )
    named = set(re.findall(r"`(?:\w+\.)?(\w*[A-Z_]\w*)(?:\(.*?\))?`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
    assert {"TASKS", "FAMILY", "ARCHITECTURES", "build_callbacks"} <= named
    assert not sorted(name for name in named - {"text_ids"} if not re.search(rf"\b{name}\b", text))
