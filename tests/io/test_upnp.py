"""UPnP as text: answers of real routers in short, and of hostile ones; HTTP as bytes come in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyccl._io import httpreply, upnp
from pyccl._io.httpreply import HttpReply
from pyccl._io.upnp import FaultError, Service, Url
from pyccl.errors import RemoteProtocolError

ROUTER = "192.168.7.1"
LOCATION = Url(ROUTER, 5000, "/rootDesc.xml")
V1, V2, PPP = upnp.SERVICE_TYPES[1], upnp.SERVICE_TYPES[0], upnp.SERVICE_TYPES[2]
SERVICE = Service(V2, Url(ROUTER, 5000, "/ctl/IPConn"))
FOUND = (
    b"HTTP/1.1 200 OK\r\nCACHE-CONTROL: max-age=120\r\nST: urn:schemas-upnp-org:device:InternetGatewayDevice:1\r\n"
    b"Location: http://192.168.7.1:5000/rootDesc.xml\r\n\r\n"
)


def description(*services: tuple[str, str], head: str = "") -> bytes:
    inner = "".join(
        f"<service><serviceType>{kind}</serviceType><serviceId>x</serviceId><controlURL>{url}</controlURL></service>"
        for kind, url in services
    )
    return (
        f'<?xml version="1.0"?><root xmlns="urn:schemas-upnp-org:device-1-0">{head}<device><deviceList><device>'
        f"<serviceList>{inner}</serviceList></device></deviceList></device></root>\r\n"
    ).encode()


def answer(inner: str) -> bytes:
    return (
        '<?xml version="1.0"?><s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/"><s:Body>'
        f"{inner}</s:Body></s:Envelope>"
    ).encode()


def fault(code: str, text: str) -> bytes:
    return answer(
        "<s:Fault><faultcode>s:Client</faultcode><faultstring>UPnPError</faultstring><detail>"
        f'<UPnPError xmlns="urn:schemas-upnp-org:control-1-0"><errorCode>{code}</errorCode>'
        f"<errorDescription>{text}</errorDescription></UPnPError></detail></s:Fault>"
    )


# ---- discovery


def test_an_answer_to_a_search_says_where_the_description_is() -> None:
    assert upnp.read_found_untrusted(FOUND, ROUTER) == LOCATION


@pytest.mark.parametrize(
    "data",
    [
        b"",
        FOUND.replace(b"200", b"404"),
        FOUND.replace(b"InternetGatewayDevice", b"MediaServer"),
        FOUND.replace(b"Location", b"X-Location"),
        b"NOTIFY * HTTP/1.1\r\n" + FOUND,
        FOUND.replace(b"192.168.7.1", b"192.168.7.99"),
        FOUND + bytes(upnp.SSDP_BYTES_MAX),
    ],
)
def test_another_answer_to_a_search_is_none(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        upnp.read_found_untrusted(data, ROUTER)


@pytest.mark.parametrize(
    "text",
    [
        "http://192.168.7.99/x",  # another host
        "http://127.0.0.1/x",
        "http://router.local/x",
        "https://192.168.7.1/x",
        "file:///etc/passwd",
        "http://user@192.168.7.1/x",
        "http://192.168.7.1:99999/x",
        "http://192.168.7.1/x\r\nX-Header: 1",
        "http://192.168.7.1/x y",
        "http://192.168.7.1/\u00e9",
        "http://[::1/x",
        "http://192.168.7.1/" + "x" * upnp.URL_CHARS_MAX,
        "",
    ],
)
def test_a_url_that_does_not_point_to_the_router_is_refused(text: str) -> None:
    with pytest.raises(RemoteProtocolError):
        upnp.url_untrusted(text, ROUTER)


# ---- description


def test_services_that_map_ports_are_found_the_newest_first() -> None:
    body = description(
        (PPP, "/ppp"), (V1, "ctl/one"), ("urn:schemas-upnp-org:service:Layer3Forwarding:1", "/l3"), (V2, "/two?a=b")
    )
    assert upnp.read_description_untrusted(body, Url(ROUTER, 5000, "/dir/root.xml")) == [
        Service(V2, Url(ROUTER, 5000, "/two?a=b")),
        Service(V1, Url(ROUTER, 5000, "/dir/ctl/one")),
        Service(PPP, Url(ROUTER, 5000, "/ppp")),
    ]


def test_control_urls_are_relative_to_the_base_url_where_there_is_one() -> None:
    body = description((V1, "/ctl"), head="<URLBase>http://192.168.7.1:8080/</URLBase>")
    assert upnp.read_description_untrusted(body, LOCATION) == [Service(V1, Url(ROUTER, 8080, "/ctl"))]


@pytest.mark.parametrize("url", ["http://10.0.0.1/ctl", "//evil.example/ctl", "http://[::1/ctl"])
def test_a_description_that_sends_us_to_another_host_is_refused(url: str) -> None:
    with pytest.raises(RemoteProtocolError):
        upnp.read_description_untrusted(description((V1, url)), LOCATION)
    with pytest.raises(RemoteProtocolError):
        upnp.read_description_untrusted(description((V1, "ctl"), head=f"<URLBase>{url}</URLBase>"), LOCATION)


LAUGHS = (
    b'<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;&b;">]>'
    b"<root>&c;</root>"
)
READS_A_FILE = b'<?xml version="1.0"?><!DOCTYPE r [<!ENTITY x SYSTEM "file:///etc/passwd">]><root>&x;</root>'


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not XML",
        b"<root>",
        b"<root>&undefined;</root>",
        b'<?xml version="1.0" encoding="no-such-encoding"?><root/>',
        LAUGHS,
        READS_A_FILE,
        b"<a>" * (upnp.XML_DEPTH_MAX + 1) + b"</a>" * (upnp.XML_DEPTH_MAX + 1),
        b"<r>" + b"<a/>" * (upnp.XML_ELEMENTS_MAX + 1) + b"</r>",
        b"<r>" + b"x" * (upnp.TEXT_CHARS_MAX + 1) + b"</r>",
    ],
)
def test_hostile_xml_is_refused_everywhere(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        upnp.read_description_untrusted(body, LOCATION)
    with pytest.raises(RemoteProtocolError):
        upnp.read_call_untrusted(200, body)


@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_any_bytes_are_a_description_an_answer_or_a_protocol_error(data: bytes) -> None:
    for read in (
        lambda: upnp.read_description_untrusted(data, LOCATION),
        lambda: upnp.read_description_untrusted(description((V1, "/ctl")) + data, LOCATION),
        lambda: upnp.read_found_untrusted(FOUND[:-4] + data, ROUTER),
        lambda: upnp.read_call_untrusted(200, data),
    ):
        try:
            read()
        except (RemoteProtocolError, FaultError):
            continue


# ---- calls


def test_a_call_names_service_and_action_and_escapes_its_arguments() -> None:
    request = upnp.call_request(SERVICE, "DeletePortMapping", [("NewRemoteHost", ""), ("NewProtocol", "<&>")])
    head, _, body = request.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /ctl/IPConn HTTP/1.1"
    assert f'SOAPAction: "{V2}#DeletePortMapping"'.encode() in lines
    assert f"Content-Length: {len(body)}".encode() in lines
    assert f'<u:DeletePortMapping xmlns:u="{V2}"><NewRemoteHost></NewRemoteHost>'.encode() in body
    assert b"<NewProtocol>&lt;&amp;&gt;</NewProtocol>" in body


def test_answers_of_calls_are_read_by_name() -> None:
    inner = f'<u:X xmlns:u="{V2}"><NewExternalIPAddress>203.0.113.7</NewExternalIPAddress><NewReservedPort>5001'
    values = upnp.read_call_untrusted(200, answer(inner + "</NewReservedPort></u:X>"))
    assert upnp.address_of_untrusted(values) == "203.0.113.7"
    assert upnp.port_of_untrusted(values) == 5001


@pytest.mark.parametrize(
    ("status", "body", "code", "text"),
    [
        (500, fault("718", "ConflictInMappingEntry"), 718, "ConflictInMappingEntry (error 718)"),
        (200, fault("725", "OnlyPermanentLeasesSupported"), 725, "OnlyPermanentLeasesSupported (error 725)"),
        (500, fault("-1", "x\ny"), 0, "xy"),
        (500, fault("99999", ""), 0, "HTTP status 500"),
        (404, b"<html><p>no</p></html>", 0, "HTTP status 404"),
    ],
)
def test_a_routers_no_gives_its_code_and_words_fit_for_a_log(status: int, body: bytes, code: int, text: str) -> None:
    with pytest.raises(FaultError) as caught:
        upnp.read_call_untrusted(status, body)
    assert (caught.value.code, str(caught.value)) == (code, text)


@pytest.mark.parametrize("text", ["", "0.0.0.0"])
def test_a_router_that_is_not_connected_has_no_address(text: str) -> None:
    with pytest.raises(FaultError, match="no external address"):
        upnp.address_of_untrusted({"NewExternalIPAddress": text})


def test_addresses_and_ports_that_are_none_are_refused() -> None:
    for text in ("1.2.3", "::1", "203.0.113.7; rm -rf /"):
        with pytest.raises(RemoteProtocolError):
            upnp.address_of_untrusted({"NewExternalIPAddress": text})
    for text in ("", "0", "65536", "-1", "٥", "1e3", "9" * 5000):
        with pytest.raises(RemoteProtocolError):
            upnp.port_of_untrusted({"NewReservedPort": text})


# ---- HTTP

PLAIN = b"HTTP/1.1 200 OK\r\nContent-Type: text/xml\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 500 Oh\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"
UNTIL_CLOSED = b"HTTP/1.0 200\r\n\r\nhello"


@pytest.mark.parametrize(("data", "status"), [(PLAIN, 200), (CHUNKED, 500)])
def test_an_answer_is_whole_at_its_last_byte_however_it_comes(data: bytes, status: int) -> None:
    whole = HttpReply()
    assert whole.feed(data + b"trailing")
    slow = HttpReply()
    done = [slow.feed(data[n : n + 1]) for n in range(len(data))]
    assert True in done
    for reply in (whole, slow):
        assert (reply.status, reply.body) == (status, b"hello")


def test_an_answer_without_a_length_is_whole_when_the_connection_ends() -> None:
    reply = HttpReply()
    assert not reply.feed(UNTIL_CLOSED)
    reply.end()
    assert (reply.status, reply.body) == (200, b"hello")


@pytest.mark.parametrize("data", [b"", PLAIN[:20], PLAIN[:-1], CHUNKED[:-6]])
def test_an_answer_that_was_cut_off_is_none(data: bytes) -> None:
    reply = HttpReply()
    assert not reply.feed(data)
    with pytest.raises(RemoteProtocolError, match="cut off"):
        reply.end()


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 999 x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * httpreply.HEAD_BYTES_MAX,
        b"HTTP/1.1 200 OK\r\nContent-Length: 999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n" + bytes(httpreply.BODY_BYTES_MAX + 1),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffff\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 100,
    ],
)
def test_an_answer_that_is_none_or_too_long_is_refused_at_once(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        HttpReply().feed(data)


def test_chunks_that_together_are_too_long_are_refused() -> None:
    reply = HttpReply()
    reply.feed(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    chunk = b"1000\r\n" + bytes(4096) + b"\r\n"
    for _ in range(httpreply.BODY_BYTES_MAX // 4096):
        assert not reply.feed(chunk)
    with pytest.raises(RemoteProtocolError):
        reply.feed(chunk)


@given(st.lists(st.binary(max_size=200), max_size=10), st.sampled_from([b"", PLAIN[:30], CHUNKED[:47]]))
def test_any_bytes_are_an_http_answer_in_bounds_or_a_protocol_error(pieces: list[bytes], head: bytes) -> None:
    reply = HttpReply()
    try:
        for piece in [head, *pieces]:
            if reply.feed(piece):
                break
        else:
            reply.end()
    except RemoteProtocolError:
        return
    assert len(reply.body) <= httpreply.BODY_BYTES_MAX and 100 <= reply.status <= 599
