"""What routers send, mutated: as test_untrusted_bytes.py; what is accepted leads nowhere but to the router."""

from __future__ import annotations

import contextlib
import encodings
import ipaddress
import itertools
import tracemalloc
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from untrusted import PARTS, THOROUGH, mutated, only

from pyccl._io import pcp, upnp
from pyccl._io.httpreply import BODY_BYTES_MAX, HEAD_BYTES_MAX, HttpReply
from pyccl._io.routers import Lease, RefusedError, _checked
from pyccl._proto import limits
from pyccl.errors import RemoteProtocolError

ROUTER: Final = "192.168.7.1"
LOCATION: Final = upnp.Url(ROUTER, 5000, "/root.xml")
ANY4: Final = bytes(10) + b"\xff\xff"
DATAGRAMS: Final = [
    bytes.fromhex("0280 0000 00000000 00000064") + bytes(12),
    bytes.fromhex("0281 0000 00000e10 00000064") + bytes(12) + bytes(12)
    + bytes.fromhex("06000000 bc14 bc15") + ANY4 + bytes([203, 0, 113, 7]),
    bytes.fromhex("0281 0008 00000e10 00000064") + bytes(12),
    bytes.fromhex("0080 0000 00000064 cb007107"),
    bytes.fromhex("0082 0000 00000064 bc14 bc15 00000e10"),
    bytes.fromhex("0080 0001 00000064"),
]  # fmt: skip


@THOROUGH
@given(mutated(DATAGRAMS))
def test_answer_of_pcp_or_nat_pmp(data: bytes) -> None:
    for read in (pcp.read_pcp_untrusted, pcp.read_nat_pmp_untrusted):
        answer = only(RemoteProtocolError, lambda read=read: read(data))
        if answer is None:
            continue
        assert 0 <= answer.result <= 0xFFFF and 0 <= answer.epoch_s <= limits.U32_MAX
        mapped = answer.mapped
        if mapped is not None:
            assert answer.result == pcp.SUCCESS and max(mapped.internal_port, mapped.port) <= limits.PORT_MAX
            only(RefusedError, lambda m=mapped: _checked(Lease(m.host or "203.0.113.7", m.port, m.lifetime_s)))
        assert not answer.host or ipaddress.IPv4Address(answer.host)


FOUND: Final = [
    b"HTTP/1.1 200 OK\r\nST: urn:schemas-upnp-org:device:InternetGatewayDevice:" + rest
    for rest in (
        b"1\r\nLOCATION: http://192.168.7.1:5000/root.xml\r\n\r\n",
        b"2\r\nLocation: http://192.168.7.1/a?b=c#d\r\nUSN: x\r\n\r\n",
        b"2\r\nLocation: http://[::ffff:192.168.7.1]:1/\r\n\r\n",
    )
]


def is_of_the_router(url: upnp.Url) -> bool:
    """And a request for it is one, with the headers that we write."""
    lines = upnp.get_request(url).split(b"\r\n")
    return (
        url.host == ROUTER and 1 <= url.port <= limits.PORT_MAX and url.path.startswith("/")
        and len(lines) == 5 and len(lines[0].split(b" ")) == 3 and b"\n" not in b"".join(lines)
    )  # fmt: skip


@THOROUGH
@given(mutated(FOUND))
def test_answer_to_a_search_of_routers(data: bytes) -> None:
    url = only(RemoteProtocolError, lambda: upnp.read_found_untrusted(data, ROUTER))
    assert url is None or is_of_the_router(url)


def _described(*services: tuple[str, str], base: str = "", head: str = '<?xml version="1.0"?>') -> bytes:
    inner = "".join(
        f"<service><serviceType>{kind}</serviceType><controlURL>{url}</controlURL></service>" for kind, url in services
    )
    base = f"<URLBase>{base}</URLBase>" if base else ""
    return f"{head}<root>{base}<device><serviceList>{inner}</serviceList></device></root>".encode()


DESCRIPTIONS: Final = [
    _described((upnp.SERVICE_TYPES[1], "/ctl"), (upnp.SERVICE_TYPES[0], "ctl?a=b")),
    _described((upnp.SERVICE_TYPES[2], "ctl"), base="http://192.168.7.1:80/x/"),
    _described(*[(upnp.SERVICE_TYPES[0], f"/{n}") for n in range(12)], head='<?xml version="1.0" encoding="utf-8"?>'),
    _described((upnp.SERVICE_TYPES[0], "//[::1/ctl")),
    _described((upnp.SERVICE_TYPES[0], "/ctl"), head='<?xml version="1.0" encoding="unicode_escape"?>'),
    _described((upnp.SERVICE_TYPES[0], "http://192.168.7.1:0x50/&#10;&lt;&#x202e;")),
    '<?xml version="1.0" encoding="utf-16"?><root/>'.encode("utf-16"),
]


@THOROUGH
@given(mutated(DESCRIPTIONS))
def test_description_of_a_router(body: bytes) -> None:
    services = only(RemoteProtocolError, lambda: upnp.read_description_untrusted(body, LOCATION)) or []
    assert len(services) <= upnp.SERVICES_MAX
    for service in services:
        assert service.type in upnp.SERVICE_TYPES and is_of_the_router(service.control)


def _answered(inner: str) -> bytes:
    return f'<?xml version="1.0"?><s:Envelope xmlns:s="x"><s:Body>{inner}</s:Body></s:Envelope>'.encode()


CALLS: Final = [
    _answered("<u:X><NewExternalIPAddress>203.0.113.7</NewExternalIPAddress></u:X>"),
    _answered("<u:X><NewExternalIPAddress>203.0.113.256</NewExternalIPAddress></u:X>"),
    _answered("<u:X><NewExternalIPAddress>::1</NewExternalIPAddress><NewReservedPort>65536</NewReservedPort></u:X>"),
    _answered("<u:X><NewReservedPort>5001</NewReservedPort><NewInternalPort>5</NewInternalPort></u:X>"),
    _answered("<s:Fault><errorCode>718</errorCode><errorDescription>Conflict&#10;x</errorDescription></s:Fault>"),
    _answered("<s:Fault><errorCode>&#x0665;</errorCode><errorDescription>&#x202e;</errorDescription></s:Fault>"),
]


@THOROUGH
@given(mutated(CALLS), st.integers(100, 599) | st.just(200))
def test_answer_to_a_call_of_a_router(body: bytes, status: int) -> None:
    fault = upnp.FaultError(0, "")
    try:
        values = upnp.read_call_untrusted(status, body)
        assert 1 <= (only(RemoteProtocolError, lambda: upnp.port_of_untrusted(values)) or 1) <= limits.PORT_MAX
        address = only(RemoteProtocolError, lambda: upnp.address_of_untrusted(values))
        assert address is None or ipaddress.IPv4Address(address)
    except RemoteProtocolError:
        return
    except upnp.FaultError as e:
        fault = e
    assert 0 <= fault.code <= 9999 and str(fault).isprintable() and len(str(fault)) <= 100


REPLIES: Final = [
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 500 Oh\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
    b"HTTP/1.0 200\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nContent-Length: 999999999\r\nContent-Length: 5\r\n\r\n",
]


def fed(data: bytes, parts: list[int]) -> tuple[int, bytes] | None:
    """Status and body, or None: it is no answer."""
    reply, at = HttpReply(), 0
    try:
        for size in [*parts, len(data) + 1]:
            if at < len(data) and reply.feed(data[at : at + size]):
                return reply.status, reply.body
            at += size
        reply.end()
    except RemoteProtocolError:
        return None
    return reply.status, reply.body


@THOROUGH
@given(mutated(REPLIES), PARTS)
def test_http_of_a_router(data: bytes, parts: list[int]) -> None:
    """Whatever its parts are, it is the same answer."""
    whole = fed(data, [])
    assert fed(data, parts) == whole
    assert whole is None or (100 <= whole[0] <= 599 and len(whole[1]) <= min(len(data), BODY_BYTES_MAX))


def _entities(count: int) -> bytes:
    """Each of them ten of the one before."""
    names = [f"e{n}" for n in range(count)]
    told = "".join(f'<!ENTITY {name} "{f"&{before};" * 10}">' for before, name in itertools.pairwise(names))
    return f'<?xml version="1.0"?><!DOCTYPE r [<!ENTITY e0 "ha">{told}]><r>&{names[-1]};</r>'.encode()


XML_BOMBS: Final = {
    "billion laughs": _entities(30),
    "one long entity": b'<!DOCTYPE r [<!ENTITY a "' + b"x" * 50_000 + b'">]><r>' + b"&a;" * 20_000 + b"</r>",
    "parameter entities": b'<!DOCTYPE r [<!ENTITY % a "x"><!ENTITY % b "%a;%a;">%b;%b;]><r/>',
    "outside entity": b'<!DOCTYPE r [<!ENTITY x SYSTEM "file:///dev/zero">]><r>&x;</r>',
    "outside document type": b'<!DOCTYPE r SYSTEM "file:///dev/zero"><r/>',
    "default attributes": b'<!DOCTYPE r [<!ATTLIST a b CDATA "' + b"x" * 5000 + b'">]><r>' + b"<a/>" * 20_000 + b"</r>",
    "depth": b"<a>" * 40_000,
    "elements": b"<r>" + b"<a/>" * 30_000,
    "text": b"<r>" + b"x\n" * 60_000 + b"</r>",
    "characters": b"<r>" + b"&#10;" * 25_000 + b"</r>",
    "attributes": b"<r " + b" ".join(b'a%d="x"' % n for n in range(10_000)) + b"/>",
    "one attribute": b'<r a="' + b"x" * 120_000,
    "one name": b"<" + b"x" * 120_000,
    "namespaces": b"<r " + b" ".join(b'xmlns:a%d="x"' % n for n in range(6000)) + b"/>",
    "comment": b"<!--" + b"x" * 120_000,
    "encoding": b'<?xml version="1.0" encoding="' + b"x" * 120_000 + b'"?><r/>',
    "nothing": b"\0" * 120_000,
}


@pytest.mark.parametrize("bomb", XML_BOMBS)
def test_xml_bomb_takes_no_memory(bomb: str) -> None:
    body = XML_BOMBS[bomb]
    assert len(body) <= BODY_BYTES_MAX
    tracemalloc.start()
    try:
        services = only(RemoteProtocolError, lambda: upnp.read_description_untrusted(body, LOCATION))
        assert not services
        with pytest.raises((RemoteProtocolError, upnp.FaultError)):
            upnp.read_call_untrusted(500, body)
        assert tracemalloc.get_traced_memory()[1] < 24 * BODY_BYTES_MAX
    finally:
        tracemalloc.stop()


def test_names_of_encodings_leave_nothing_behind() -> None:
    """Python looks names that it does not know up among its modules, and remembers each for ever."""
    before: int = len(encodings._cache)  # type: ignore[attr-defined]
    for number in range(20):
        with pytest.raises(RemoteProtocolError, match="unknown encoding"):
            upnp.read_call_untrusted(200, b'<?xml version="1.0" encoding="stranger%d"?><r/>' % number)
    assert len(encodings._cache) == before  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("head", "more"),
    [
        (b"", b"x"),
        (b"HTTP/1.1 200 OK\r\nX: ", b"x"),
        (b"HTTP/1.1 200 OK\r\n", b"X: x\r\n"),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"8\r\n" + b"x" * 8 + b"\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"fff\r\n" + b"x" * 4095 + b"\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1ffff\r\n", b"x"),
    ],
    ids=["no line", "one header", "headers", "body", "small chunks", "chunks", "one chunk"],
)
def test_http_without_end_takes_no_memory(head: bytes, more: bytes) -> None:
    reply = HttpReply()
    piece = more * (8192 // len(more) + 1)
    piece = piece[: len(piece) // len(more) * len(more)]
    tracemalloc.start()
    try:
        ended = False
        with contextlib.suppress(RemoteProtocolError):
            reply.feed(head)
            for _ in range(200 * BODY_BYTES_MAX // 8192):  # more than any answer in bounds needs
                ended = reply.feed(piece)
                if ended:
                    break
            else:
                pytest.fail("it was never too long")
        assert tracemalloc.get_traced_memory()[1] < 4 * (BODY_BYTES_MAX + HEAD_BYTES_MAX) + (1 << 16)
    finally:
        tracemalloc.stop()
