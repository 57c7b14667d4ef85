"""The differences between versions of megatron-core: refused versions, suppressed messages, and their only place in the package."""

import ast
import logging
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from megatron_ledom.errors import UsageError
from megatron_ledom.platform import core_versions
from megatron_ledom.platform.core_fixes import CORRECTIONS
from megatron_ledom.platform.core_on_cpu import REPLACEMENTS
from megatron_ledom.platform.core_versions import (
    ANNOUNCED,
    SUPPORTED,
    check_core,
    check_muon,
    core_text,
    core_version,
    quiet_announcements,
)
from tests.distributed.hazards import GUARDS
from tests.support.paths import ROOT

OWN = ROOT / "megatron_ledom/platform/core_versions.py"


@pytest.fixture(autouse=True)
def forget_version() -> Iterator[None]:
    core_version.cache_clear()
    yield
    core_version.cache_clear()


def install(folder: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the metadata of another megatron-core first on the path."""
    (folder / f"megatron_core-{version}.dist-info").mkdir()
    text = f"Metadata-Version: 2.1\nName: megatron-core\nVersion: {version}\n"
    (folder / f"megatron_core-{version}.dist-info/METADATA").write_text(text)
    monkeypatch.syspath_prepend(str(folder))


def test_the_installed_version_is_accepted() -> None:
    check_core()
    assert core_text() == f"megatron-core {'.'.join(map(str, core_version()))}"


@pytest.mark.parametrize("version", ["0.15.3", "0.16.0", "0.20.0", "0.20.0rc1", "1.0.0"])
def test_a_version_that_nobody_tried_is_refused_with_the_one_to_install(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, version, monkeypatch)
    with pytest.raises(UsageError) as caught:
        check_core()
    found = version.removesuffix("rc1")
    tested = SUPPORTED[sys.version_info[:2]]
    assert str(caught.value) == (
        f"found megatron-core {found}, expected 0.16.1 to 0.19; this package is tested with {tested} on this Python:"
        f" pip install megatron-core=={tested}"
    )


def test_an_untested_python_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "0.15.0", monkeypatch)
    monkeypatch.setattr(core_versions, "SUPPORTED", {(3, 0): "0.16.1"})
    with pytest.raises(UsageError, match=r"use one of Python 3\.0, on which this package is tested"):
        check_core()


@pytest.mark.parametrize(("version", "is_needed"), [("0.17.1", False), ("0.18.0", True), ("0.19.2", True)])
def test_triton_is_required_from_0_18_on(
    version: str, is_needed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, version, monkeypatch)
    monkeypatch.setitem(sys.modules, "triton", None)  # as if not installed
    if not is_needed:
        check_core()
        return
    with pytest.raises(
        UsageError, match=rf"megatron-core {version} imports the package triton without requiring it, and triton is not"
    ):
        check_core()


@pytest.mark.parametrize(
    ("core", "package", "message"),
    [
        ("0.16.1", "0.3.0", "needs megatron-core 0.19 or newer, found 0.16.1 on Python"),
        ("0.18.0", "0.3.0", "needs megatron-core 0.19 or newer, found 0.18.0 on Python"),
        ("0.19.2", "0.2.0", "needs the package emerging-optimizers 0.3, found 0.2: pip install 'megatron-ledom\\[muon\\]'"),
        ("0.19.2", "0.4.0", "needs the package emerging-optimizers 0.3, found 0.4"),
        ("0.19.2", None, "needs the package emerging-optimizers 0.3, found none"),
        ("0.19.2", "0.3.1", None),
    ],
)
def test_muon_is_refused_without_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, core: str, package: str | None, message: str | None
) -> None:
    found = {"megatron-core": core} | ({"emerging-optimizers": package} if package else {})

    def version(name: str) -> str:
        if name not in found:
            raise PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(core_versions.metadata, "version", version)
    if message is None:
        check_muon()
        return
    with pytest.raises(UsageError, match=f"optimizer.optimizer=muon {message}"):
        check_muon()


def test_only_announcements_of_later_versions_are_suppressed(caplog: pytest.LogCaptureFixture) -> None:
    quiet_announcements()
    for name, text in ANNOUNCED.items():
        logging.getLogger(name).warning("%s and will be removed", text)
        logging.getLogger(name).warning("another warning of %s", name)
    assert [record.getMessage() for record in caplog.records] == [f"another warning of {name}" for name in ANNOUNCED]


def uses_of_a_version(tree: ast.AST) -> list[str]:
    """Return the uses of megatron-core's version in a module: the number itself, or an attribute of the package."""
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    found = [name for name in ("core_version", "OLDEST", "TOO_NEW", "is_torch_min_version", "get_te_version") if name in names]
    attributes = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    found += [text for text in attributes if text in ("megatron.core.__version__", "core_versions.core_version")]
    compared = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    return found + [text for text in compared if "megatron-core" in text or "megatron_core" in text]


def test_no_other_module_compares_versions() -> None:
    paths = [path for path in (ROOT / "megatron_ledom").rglob("*.py") if path != OWN]
    assert {str(path): uses for path in paths if (uses := uses_of_a_version(ast.parse(path.read_text())))} == {}
    for text in ("from a import core_version", "megatron.core.__version__", "metadata.version('megatron-core') < '1'"):
        assert uses_of_a_version(ast.parse(text))


@pytest.mark.parametrize("name", [*CORRECTIONS, *REPLACEMENTS, *GUARDS])
def test_each_correction_names_a_test_that_removes_it(name: str) -> None:
    correction = (CORRECTIONS | REPLACEMENTS | GUARDS)[name]
    path, _, function = correction.proof.partition("::")
    source = (ROOT / path).read_text(encoding="utf-8")
    tests = {
        node.name: ast.get_source_segment(source, node) + str(list(map(ast.unparse, node.decorator_list)))
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef)
    }
    assert function in tests
    tables = {"REPLACEMENTS": REPLACEMENTS, "GUARDS": GUARDS}  # a test of a whole table takes the names from it
    removed_by = {name, *(table for table, names in tables.items() if name in names)}
    assert any(text in tests[function] for text in removed_by), f"{function} does not remove {name}"
