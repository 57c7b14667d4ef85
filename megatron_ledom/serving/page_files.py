"""The web pages at `/`: static files of this package. A page calls the same endpoints as every other client."""

from collections.abc import Awaitable, Callable, Iterable
from importlib.resources import files

from fastapi import APIRouter, Response

TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
"""Suffixes of the files -> their media types."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""The page loads nothing from elsewhere, has no inline script or style, and no other page may show it in a frame."""


def read_page(folder: str = "page", shared: Iterable[str] = ()) -> dict[str, tuple[str, bytes]]:
    """Return for each path of a page the media type and the content of its file.

    shared: names of further files, which the page takes from the folder `page`.
    """
    root, found = files("megatron_ledom.serving"), {}
    for file in [*(root.joinpath("page", name) for name in shared), *root.joinpath(folder).iterdir()]:
        suffix = file.name.rpartition(".")[2]
        if suffix in TYPES:
            found[f"/page/{file.name}"] = (TYPES[suffix], file.read_bytes())
    return found | {"/": found["/page/index.html"]}


def page_router(page: dict[str, tuple[str, bytes]]) -> APIRouter:
    """Return a route for each file. They are no part of the API, so its schema has none of them."""
    router = APIRouter(include_in_schema=False)
    for path, (kind, content) in page.items():
        router.add_api_route(path, _answer(kind, content), methods=["GET", "HEAD"])
    return router


def _answer(kind: str, content: bytes) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    return answer
