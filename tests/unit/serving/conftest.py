"""One running server for all tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.browser import Page, chromium
from tests.support.served import Served, serving
from tests.support.tiny_models import forward_and_reverse


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of the forward and the reverse model."""
    return forward_and_reverse(tmp_path_factory.mktemp("served"), "sentencepiece", "sentencepiece")


@pytest.fixture(scope="session")
def served(folders: tuple[Path, Path]) -> Iterator[Served]:
    """A server of both models."""
    with serving("--forward", folders[0], "--reverse", folders[1]) as server:
        yield server


@pytest.fixture(scope="session")
def browser() -> Iterator[Page]:
    """One browser for all tests of the page."""
    with chromium() as page:
        yield page


@pytest.fixture
def page(browser: Page) -> Iterator[Page]:
    """The browser; a violation of the content policy or an error in a module fails the test."""
    browser.complaints()
    yield browser
    assert browser.complaints() == []


@pytest.fixture(scope="session")
def lone(folders: tuple[Path, Path]) -> Iterator[Served]:
    """A server with the key `right key` and without a forward model."""
    with serving("--reverse", folders[1], LEDOM_API_KEY="right key") as server:
        yield server
