"""Replies of servers that end: no more of one is read than was asked for, whatever the server says or sends.

fsspec's file systems read a reply to its end, also where a server ignores the range asked for, or never ends. Those of HTTP and S3
read through aiohttp, whose responses are replaced here by ones that stop.
"""

from __future__ import annotations

import re
from typing import Any

from fastretina.errors import RemoteError

_MOST = 32 << 20  # bytes of a reply that no range was asked of: a listing (of 99,999 shards: some 20 MB)
_ERROR_TEXT = 1 << 20  # bytes that are read of the text to a status of 400 or more
_ENCODED = frozenset({"gzip", "x-gzip", "deflate", "compress", "br", "zstd"})


class WrongBytes(Exception):
    """What arrived is not what was asked for, or not what the file's checksums say."""


def bound_replies(fs: Any) -> None:
    """Have a file system of HTTP or S3, which nothing was asked of yet, read as is said above, and ask for nothing compressed."""
    library = type(fs).__module__.partition(".")[0]
    if library == "fsspec" and hasattr(fs, "client_kwargs"):
        given = fs.client_kwargs
        headers = {"Accept-Encoding": "identity", **given.get("headers", {})}
        # Decompressed by aiohttp, a reply would have no bound.
        fs.client_kwargs = {**given, "headers": headers, "auto_decompress": False, "response_class": _response_class()}
    elif library == "s3fs":
        from aiobotocore.httpsession import AIOHTTPSession

        class Session(AIOHTTPSession):  # type: ignore[misc]
            async def _get_session(self, proxy_url: Any) -> Any:
                session = await super()._get_session(proxy_url)
                session._response_class = _response_class()
                return session

        fs.config_kwargs = {"http_session_cls": Session, **fs.config_kwargs}


def _response_class() -> type[Any]:
    import aiohttp

    class Response(aiohttp.ClientResponse):
        async def start(self, connection: Any) -> Any:
            await super().start(connection)
            self.content = _Bounded(self)  # type: ignore[assignment]
            return self

    return Response


class _Bounded:
    """The content of a response; all of it is as much as was asked for."""

    def __init__(self, response: Any) -> None:
        self._response, self._stream = response, response.content

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    async def read(self, size: int = -1) -> bytes:
        if size >= 0:
            return bytes(await self._stream.read(size))
        response = self._response
        url, failed = str(response.url), response.status >= 400
        encoding = response.headers.get("Content-Encoding", "").strip().lower()
        if encoding in _ENCODED and not failed:
            raise RemoteError(url, f"the server sends the file encoded ({encoding}); have it sent as it is")
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", response.request_info.headers.get("Range", ""))
        most = _ERROR_TEXT if failed else int(asked[2]) - int(asked[1]) + 1 if asked else _MOST
        parts, held = [], 0
        while held <= most and (part := await self._stream.readany()):
            parts.append(part)
            held += len(part)
        if held > most:
            response.close()  # the rest is not waited for
            if not failed:
                if asked and response.status == 206:
                    raise WrongBytes(f"more than the {most:,} bytes that were asked for")
                reason = "the server ignores ranges, which are needed" if asked else f"its listing is longer than {most:,} bytes"
                raise RemoteError(url, reason)
        return b"".join(parts)
