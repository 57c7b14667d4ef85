"""Read files of web servers with the client of fsspec, and check each answer."""

from typing import Any

from megatron_ledom.data.readers.answers import check_header, check_range, completed
from megatron_ledom.data.readers.byte_ranges import InputPath
from megatron_ledom.data.readers.remote import UnusableAnswerError, check_same, remote_file_system, version_of


def open_file(source: InputPath) -> Any:
    """Open a file of a web server. Each read is one request, and checks that the answer is the range that was asked for, of the listed version.

    Raises DataError if the file has changed.
    """
    from fsspec.asyn import sync
    from fsspec.implementations.http import HTTPFile

    system = remote_file_system(source.path)
    entry = system.info(source.path)
    check_same(source, entry)
    listed = {name: entry[name] for name in ("ETag", "Content-MD5", "Digest", "Last-Modified") if entry.get(name)}
    named = [(name, value) for name, value in listed.items() if value == version_of(entry)][:1]

    class CheckedFile(HTTPFile):  # type: ignore[misc]
        """A file of a web server; the client itself takes any status 206, and any short answer, for the range."""

        def _fetch_range(self, start: int, end: int) -> bytes:
            try:
                return bytes(sync(self.loop, self._asked, start, min(end, source.num_bytes)))
            except UnusableAnswerError:
                check_same(source, self.fs.info(source.path))  # else one answer was wrong, and the next one may be right
                raise

        async def _asked(self, start: int, end: int) -> bytes:
            asked = {**self.kwargs.get("headers", {}), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
            async with self.session.get(self.fs.encode_url(self.url), **{**self.kwargs, "headers": asked}) as answer:
                answer.raise_for_status()
                check_range(answer.status, answer.headers, start, end, source.num_bytes)
                for name, value in named:
                    check_header(name, value, answer.headers)
                content = bytearray()
                try:
                    async for block in answer.content.iter_any():
                        content += block
                except Exception as error:
                    return completed(content, end - start, error)
                return completed(content, end - start)

    session = sync(system.loop, system.set_session)
    options = {"session": session, "loop": system.loop, "cache_type": "none", "size": source.num_bytes}
    return CheckedFile(system, source.path, **options, **system.kwargs)
