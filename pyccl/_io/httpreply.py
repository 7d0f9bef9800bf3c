"""One answer of HTTP/1.x, as bytes come in. Knows no socket, and holds no more than it is told to."""

from __future__ import annotations

import re
from typing import Final

from pyccl.errors import RemoteProtocolError

HEAD_BYTES_MAX: Final = 8192
BODY_BYTES_MAX: Final = 1 << 17
_HEAD_END: Final = b"\r\n\r\n"
_CHUNK_LINE_BYTES_MAX: Final = 64
_STATUS: Final = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})(?: |$)")


class HttpReply:
    """``feed`` until it says that the answer is whole, ``end`` when the other side has closed; then status and body."""

    def __init__(self) -> None:
        self.status = 0
        self.body = b""
        self._buffer = bytearray()
        self._headers: dict[str, str] | None = None
        self._length: int | None = None
        self._is_chunked = False

    def feed(self, data: bytes) -> bool:
        """Whether the answer is whole. RemoteProtocolError: it is none, or too long."""
        self._buffer += data
        if self._headers is None and not self._read_head():
            return False
        if self._is_chunked:
            return self._read_chunks()
        return self._read_plain()

    def end(self) -> None:
        """RemoteProtocolError: it was cut off."""
        if self._headers is None or self._is_chunked or self._length is not None:
            raise RemoteProtocolError("an HTTP answer that was cut off")
        self.body = bytes(self._buffer)

    def _read_head(self) -> bool:
        end = self._buffer.find(_HEAD_END)
        if end > HEAD_BYTES_MAX or (end < 0 and len(self._buffer) > HEAD_BYTES_MAX):
            raise RemoteProtocolError(f"an HTTP header of more than {HEAD_BYTES_MAX} bytes")
        if end < 0:
            return False
        head = bytes(self._buffer[:end])
        del self._buffer[: end + len(_HEAD_END)]
        self.status, self._headers = read_head_untrusted(head)
        self._is_chunked = self._headers.get("transfer-encoding", "").lower() == "chunked"
        length = self._headers.get("content-length")
        if length is not None and not self._is_chunked:
            if not re.fullmatch(r"[0-9]{1,9}", length) or int(length) > BODY_BYTES_MAX:
                raise RemoteProtocolError(f"an HTTP answer of more than {BODY_BYTES_MAX} bytes")
            self._length = int(length)
        return True

    def _read_plain(self) -> bool:
        if self._length is None:
            if len(self._buffer) > BODY_BYTES_MAX:
                raise RemoteProtocolError(f"an HTTP answer of more than {BODY_BYTES_MAX} bytes")
            return False
        if len(self._buffer) < self._length:
            return False
        self.body = bytes(self._buffer[: self._length])
        return True

    def _read_chunks(self) -> bool:
        while True:
            end = self._buffer.find(b"\r\n", 0, _CHUNK_LINE_BYTES_MAX)
            if end < 0:
                if len(self._buffer) >= _CHUNK_LINE_BYTES_MAX:
                    raise RemoteProtocolError("an HTTP chunk without a length")
                return False
            size_text = bytes(self._buffer[:end]).split(b";")[0].strip()
            if not re.fullmatch(rb"[0-9a-fA-F]{1,7}", size_text):
                raise RemoteProtocolError("an HTTP chunk without a length")
            size = int(size_text, 16)
            if len(self.body) + size > BODY_BYTES_MAX:
                raise RemoteProtocolError(f"an HTTP answer of more than {BODY_BYTES_MAX} bytes")
            if size == 0:  # trailers are not waited for
                return True
            after = end + 2 + size + 2
            if len(self._buffer) < after:
                return False
            self.body += bytes(self._buffer[end + 2 : after - 2])
            del self._buffer[:after]


def read_head_untrusted(head: bytes) -> tuple[int, dict[str, str]]:
    """Status and headers (names in lower case; of several alike, the first). RemoteProtocolError: no head of HTTP."""
    lines = head.split(b"\r\n")
    status = _STATUS.match(lines[0])
    if status is None:
        raise RemoteProtocolError("no answer of HTTP")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.decode("latin-1").partition(":")
        if colon:
            headers.setdefault(name.strip().lower(), value.strip())
    return int(status[1]), headers
