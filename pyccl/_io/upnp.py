"""UPnP-IGD 1 and 2: how a router is found and asked for a port of its own, as text. Knows no socket.

    M-SEARCH (UDP) -> LOCATION of a description -> services and their control URLs -> SOAP calls

Whatever a router sends is read with bounds: XML by expat without document types, so without entities, to a depth and
a number of elements; URLs must point to the router itself.
"""

from __future__ import annotations

import ipaddress
import xml.parsers.expat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import urljoin, urlsplit
from xml.sax.saxutils import escape

from pyccl._io.httpreply import read_head_untrusted
from pyccl.errors import RemoteProtocolError

SSDP_GROUP: Final = "239.255.255.250"
SSDP_PORT: Final = 1900
SSDP_BYTES_MAX: Final = 4096
URL_CHARS_MAX: Final = 1024
XML_DEPTH_MAX: Final = 32
XML_ELEMENTS_MAX: Final = 2000
TEXT_CHARS_MAX: Final = 1024
SERVICES_MAX: Final = 8
DESCRIPTION: Final = "pyccl"
# In the order in which they are asked.
SERVICE_TYPES: Final = (
    "urn:schemas-upnp-org:service:WANIPConnection:2",
    "urn:schemas-upnp-org:service:WANIPConnection:1",
    "urn:schemas-upnp-org:service:WANPPPConnection:1",
)
# Error codes of a call: UPnP Device Architecture and WANIPConnection:2, 2.5.
INVALID_ACTION: Final = 401
OPTIONAL_ACTION: Final = 602
NO_SUCH_ENTRY: Final = 714
CONFLICT: Final = 718
PERMANENT_LEASES_ONLY: Final = 725
# Of XML. Python's own would do, too, but it keeps every name that it was ever asked for and does not know.
_ENCODINGS: Final = ("utf-8", "utf8", "utf-16", "us-ascii", "ascii", "iso-8859-1", "iso-8859-15", "windows-1252")
_SEARCH_TARGETS: Final = (
    "urn:schemas-upnp-org:device:InternetGatewayDevice:2",
    "urn:schemas-upnp-org:device:InternetGatewayDevice:1",
)


@dataclass(frozen=True, slots=True)
class Url:
    """Of a router: plain HTTP at its own address. path: with the query; begins with "/"."""

    host: str
    port: int
    path: str

    def __str__(self) -> str:
        return f"http://{self.host}:{self.port}{self.path}"


@dataclass(frozen=True, slots=True)
class Service:
    """What can be called, and where."""

    type: str
    control: Url


class FaultError(Exception):
    """A router's "no" to a call. code: of UPnP; 0: it gave none."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{text} (error {code})" if code else text)
        self.code = code


# ---- discovery


def searches() -> list[bytes]:
    """Datagrams for SSDP_GROUP and the router."""
    return [
        f"M-SEARCH * HTTP/1.1\r\nHOST: {SSDP_GROUP}:{SSDP_PORT}\r\n"
        f'MAN: "ssdp:discover"\r\nMX: 1\r\nST: {target}\r\n\r\n'.encode()
        for target in _SEARCH_TARGETS
    ]


def read_found_untrusted(data: bytes, router: str) -> Url:
    """Where the description is. RemoteProtocolError: it is no answer to a search of ours, or sends us elsewhere."""
    if len(data) > SSDP_BYTES_MAX:
        raise RemoteProtocolError("too long an answer to a search")
    status, headers = read_head_untrusted(data.split(b"\r\n\r\n")[0])
    if status != 200 or headers.get("st") not in _SEARCH_TARGETS:
        raise RemoteProtocolError("an answer to another search")
    return url_untrusted(headers.get("location", ""), router)


def url_untrusted(text: str, router: str) -> Url:
    """RemoteProtocolError: it is no URL of plain HTTP at the router's own address."""
    if len(text) > URL_CHARS_MAX or not text.isascii() or any(c <= " " or c == "\x7f" for c in text):
        raise RemoteProtocolError("a URL with strange characters, or too long")
    try:
        parts = urlsplit(text)
        port = parts.port or 80
        is_router = ipaddress.ip_address(parts.hostname or "") == ipaddress.ip_address(router)
    except ValueError as e:
        raise RemoteProtocolError("a URL that is none, or names no address") from e
    if parts.scheme != "http" or parts.username is not None or not is_router:
        raise RemoteProtocolError("a URL that does not point to the router")
    path = parts.path or "/"
    return Url(router, port, f"{path}?{parts.query}" if parts.query else path)


# ---- description


def read_description_untrusted(body: bytes, location: Url) -> list[Service]:
    """Services that map ports, the newest first. RemoteProtocolError: no description, or it sends us elsewhere."""
    base = str(location)
    found: list[tuple[str, str]] = []
    current: dict[str, str] = {}
    for name, text in _elements(body):
        if name == "URLBase" and text:
            base = text
        elif name in ("serviceType", "controlURL"):
            current[name] = text
        elif name == "service":
            if current.get("serviceType") in SERVICE_TYPES and len(found) < SERVICES_MAX:
                found.append((current["serviceType"], current.get("controlURL", "")))
            current = {}
    services = []
    for kind, control in found:
        try:
            absolute = urljoin(base, control)
        except ValueError as e:
            raise RemoteProtocolError("a URL that is none") from e
        services.append(Service(kind, url_untrusted(absolute, location.host)))
    return sorted(services, key=lambda service: SERVICE_TYPES.index(service.type))


# ---- calls


def get_request(url: Url) -> bytes:
    return f"GET {url.path} HTTP/1.1\r\nHost: {url.host}:{url.port}\r\nConnection: close\r\n\r\n".encode()


def call_request(service: Service, action: str, arguments: Iterable[tuple[str, str]]) -> bytes:
    """A SOAP call. The order of arguments matters to some routers."""
    inner = "".join(f"<{name}>{escape(value)}</{name}>" for name, value in arguments)
    body = (
        '<?xml version="1.0"?>\r\n'
        '<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/" '
        's:encodingStyle="http://schemas.xmlsoap.org/soap/encoding/"><s:Body>'
        f'<u:{action} xmlns:u="{service.type}">{inner}</u:{action}></s:Body></s:Envelope>\r\n'
    ).encode()
    url = service.control
    head = (
        f"POST {url.path} HTTP/1.1\r\nHost: {url.host}:{url.port}\r\n"
        f'Content-Type: text/xml; charset="utf-8"\r\nSOAPAction: "{service.type}#{action}"\r\n'
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    ).encode()
    return head + body


def read_call_untrusted(status: int, body: bytes) -> dict[str, str]:
    """The answer's arguments. FaultError: the router says no. RemoteProtocolError: it is no answer to a call."""
    values: dict[str, str] = {}
    for name, text in _elements(body):
        values.setdefault(name, text)
    if status == 200 and "Fault" not in values:
        return values
    code = values.get("errorCode", "")
    words = "".join(c for c in values.get("errorDescription", "") if c.isprintable())[:80]
    raise FaultError(
        int(code) if code.isascii() and code.isdigit() and len(code) <= 4 else 0, words or f"HTTP status {status}"
    )


def address_of_untrusted(values: Mapping[str, str]) -> str:
    """The external address. FaultError: the router has none now. RemoteProtocolError: it is none."""
    text = values.get("NewExternalIPAddress", "")
    if text in ("", "0.0.0.0"):
        raise FaultError(0, "the router has no external address")
    try:
        return str(ipaddress.IPv4Address(text))
    except ValueError as e:
        raise RemoteProtocolError("an external address that is none") from e


def port_of_untrusted(values: Mapping[str, str]) -> int:
    """RemoteProtocolError: there is none."""
    text = values.get("NewReservedPort", "")
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65_535):
        raise RemoteProtocolError("a reserved port that is none")
    return int(text)


def _elements(body: bytes) -> list[tuple[str, str]]:
    """Local names and texts of all elements, in the order in which they end. RemoteProtocolError: no such XML."""
    ended: list[tuple[str, str]] = []
    texts: list[list[str]] = []

    def start(_name: str, _attributes: object) -> None:
        if len(texts) >= XML_DEPTH_MAX or len(ended) + len(texts) >= XML_ELEMENTS_MAX:
            raise RemoteProtocolError("XML of too many elements")
        texts.append([])

    def data(text: str) -> None:
        if texts:
            texts[-1].append(text)

    def end(name: str) -> None:
        text = "".join(texts.pop()).strip()
        if len(text) > TEXT_CHARS_MAX:
            raise RemoteProtocolError("XML with too long a text")
        ended.append((name.rpartition(":")[2], text))

    def declaration(_version: str, encoding: str | None, _standalone: int) -> None:
        if encoding is not None and encoding.lower() not in _ENCODINGS:
            raise RemoteProtocolError("XML in an unknown encoding")

    def document_type(*_: object) -> None:
        raise RemoteProtocolError("XML with a document type")

    parser = xml.parsers.expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, data
    parser.XmlDeclHandler, parser.StartDoctypeDeclHandler = declaration, document_type
    try:
        parser.Parse(body.rstrip(b"\0 \r\n\t"), True)
    except xml.parsers.expat.ExpatError as e:
        raise RemoteProtocolError(f"no XML: {xml.parsers.expat.errors.messages[e.code]}") from e
    return ended
