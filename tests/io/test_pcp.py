"""PCP and NAT-PMP as bytes: vectors after the RFCs' drawings, hostile answers, and epochs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyccl._io import pcp
from pyccl._io.pcp import Answer, Mapped
from pyccl.errors import RemoteProtocolError

NONCE = bytes(range(12))
V4_LOCAL = bytes(10) + b"\xff\xff" + bytes([192, 168, 7, 2])
V4_OUTER = bytes(10) + b"\xff\xff" + bytes([203, 0, 113, 7])
MAPPED = bytes.fromhex("02 81 00 00 00000e10 0001e240 000000000000000000000000") + (
    NONCE + bytes.fromhex("06 000000 1388 1389") + V4_OUTER
)


def test_a_pcp_map_request_is_drawn_as_in_rfc_6887_figures_2_and_9() -> None:
    request = pcp.pcp_map("192.168.7.2", NONCE, 5000, ("203.0.113.7", 5001), 3600)
    assert request[:24] == bytes.fromhex("02 01 0000 00000e10") + V4_LOCAL
    assert request[24:] == NONCE + bytes.fromhex("06 000000 1388 1389") + V4_OUTER


def test_a_pcp_request_that_wants_any_address_names_that_of_its_own_family() -> None:
    assert pcp.pcp_map("192.168.7.2", NONCE, 5000, None, 0)[-16:] == bytes(10) + b"\xff\xff" + bytes(4)
    assert pcp.pcp_map("2001:db8::2", NONCE, 5000, None, 0)[-16:] == bytes(16)
    assert pcp.pcp_announce("2001:db8::2") == bytes.fromhex("02 00 0000 00000000 20010db8000000000000000000000002")


def test_a_pcp_answer_gives_address_port_lifetime_and_epoch() -> None:
    answer = Answer(0, 123_456, Mapped(5000, "203.0.113.7", 5001, 3600, NONCE))
    assert pcp.read_pcp_untrusted(MAPPED) == answer
    options = bytes.fromhex("02 00 0004 00000000")
    assert pcp.read_pcp_untrusted(MAPPED + options) == answer


def test_a_pcp_answer_to_an_announcement_is_a_success_without_a_mapping() -> None:
    assert pcp.read_pcp_untrusted(bytes.fromhex("02 80 00 00 00000000 00000007") + bytes(12)) == Answer(0, 7)


@pytest.mark.parametrize("result", sorted(pcp.PCP_RESULTS))
def test_a_pcp_refusal_gives_its_code_whatever_it_says_of_a_mapping(result: int) -> None:
    data = MAPPED[:3] + bytes([result]) + MAPPED[4:]
    assert pcp.read_pcp_untrusted(data) == Answer(result, 123_456)
    assert pcp.read_pcp_untrusted(data[:24]) == Answer(result, 123_456)


def test_a_router_that_speaks_nat_pmp_only_is_understood_when_asked_by_pcp() -> None:
    assert pcp.read_pcp_untrusted(bytes.fromhex("00 80 0001 00000007")).result == pcp.UNSUPPORTED_VERSION
    assert pcp.read_nat_pmp_untrusted(bytes.fromhex("02 80 00 01 00000000 00000007")).result == pcp.UNSUPPORTED_VERSION


@pytest.mark.parametrize(
    "data",
    [
        b"",
        MAPPED[:23],
        MAPPED[:59],  # cut off in the mapping
        MAPPED[:1] + b"\x01" + MAPPED[2:],  # a request
        MAPPED[:1] + b"\x82" + MAPPED[2:],  # an answer to PEER
        MAPPED[:36] + b"\x11" + MAPPED[37:],  # UDP
        MAPPED[:42] + bytes(2) + MAPPED[44:],  # the external port 0
        MAPPED + bytes(1100),
    ],
)
def test_a_malformed_pcp_answer_is_none(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        pcp.read_pcp_untrusted(data)


def test_nat_pmp_requests_are_drawn_as_in_rfc_6886() -> None:
    assert pcp.nat_pmp_address() == bytes(2)
    assert pcp.nat_pmp_map(5000, 5001, 3600) == bytes.fromhex("00 02 0000 1388 1389 00000e10")


def test_nat_pmp_answers_give_address_port_lifetime_and_epoch() -> None:
    address = bytes.fromhex("00 80 0000 00000007 cb007107")
    assert pcp.read_nat_pmp_untrusted(address) == Answer(0, 7, host="203.0.113.7")
    mapped = bytes.fromhex("00 82 0000 00000008 1388 1389 00000e10")
    assert pcp.read_nat_pmp_untrusted(mapped) == Answer(0, 8, Mapped(5000, "", 5001, 3600))
    assert pcp.read_nat_pmp_untrusted(bytes.fromhex("00 82 0002 00000008 1388 0000 00000000")) == Answer(2, 8)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "00 80 0000 000000",
        "00 00 0000 00000007 cb007107",  # a request
        "00 80 0000 00000007 cb0071",
        "00 81 0000 00000007 1388 1389 00000e10",  # UDP
        "00 82 0000 00000007 1388 0000 00000e10",  # the external port 0
        "00 82 0000 00000007 1388 1389 00000e",
    ],
)
def test_a_malformed_nat_pmp_answer_is_none(text: str) -> None:
    with pytest.raises(RemoteProtocolError):
        pcp.read_nat_pmp_untrusted(bytes.fromhex(text))


@given(st.binary(max_size=1200), st.sampled_from([b"", MAPPED[:4], MAPPED[:24], b"\0\x80\0\0", b"\0\x82\0\0"]))
def test_any_bytes_are_an_answer_in_bounds_or_a_protocol_error(tail: bytes, head: bytes) -> None:
    for read in (pcp.read_pcp_untrusted, pcp.read_nat_pmp_untrusted):
        try:
            answer = read(head + tail)
        except RemoteProtocolError:
            continue
        if answer.mapped is not None:
            assert answer.result == 0 and 0 <= answer.mapped.port <= 65_535
            assert answer.mapped.port or answer.mapped.lifetime_s == 0


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        ((100, 10.0), (130, 40.0), True),
        ((100, 10.0), (99, 10.0), True),  # asked twice within a second
        ((100, 10.0), (98, 10.0), False),
        ((100, 10.0), (5, 40.0), False),  # restarted
        ((100, 10.0), (102, 40.0), False),  # restarted and up for as long again
        ((1000, 10.0), (1960, 1010.0), True),  # its clock is slow by 4 %
        ((1000, 10.0), (1900, 1010.0), False),
        ((1000, 10.0), (2200, 1010.0), False),
    ],
)
def test_an_epoch_that_does_not_grow_with_time_means_lost_mappings(
    before: tuple[int, float], after: tuple[int, float], kept: bool
) -> None:
    assert pcp.kept_mappings(before, after) is kept
