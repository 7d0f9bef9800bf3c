"""Port mappings against routers by script: what is asked for and taken away, refusals, restarts, hostile answers.

Under a virtual clock that jumps when nothing has happened for a while; that a jump comes too early, on a busy machine,
costs a repeated question.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
import trio
from fake_routers import GATEWAY, HOST, OUTER, FakeIgd, FakePcp, routers
from trio.testing import MockClock

from pyccl._io.gateway import Gateway
from pyccl._io.portmap import Mapping, NoMappingError, Terms, open_mapping

PORT = 5000
JUMP_S = 0.2


def run(main: Callable[[], Awaitable[None]]) -> None:
    trio.run(main, clock=MockClock(autojump_threshold=JUMP_S))


def refusals(pcp: FakePcp | None, igd: FakeIgd | None) -> dict[str, str]:
    """Why there is no mapping."""
    reasons: dict[str, str] = {}

    async def main() -> None:
        async with routers(pcp, igd) as terms:
            with pytest.raises(NoMappingError) as caught:
                async with open_mapping(PORT, gateway=GATEWAY, terms=terms):
                    raise AssertionError("there is a mapping")
            reasons.update(caught.value.reasons)

    run(main)
    return reasons


def mapped(
    pcp: FakePcp | None, igd: FakeIgd | None, during: Callable[[Mapping], Awaitable[None]] | None = None
) -> None:
    async def main() -> None:
        async with (
            routers(pcp, igd) as terms,
            open_mapping(PORT, gateway=GATEWAY, terms=terms) as mapping,
        ):
            if during is not None:
                await during(mapping)

    run(main)


# ---- what is given


@pytest.mark.parametrize(("version", "method"), [(2, "pcp"), (0, "nat-pmp")])
def test_a_port_is_mapped_and_the_mapping_taken_away_on_exit(version: int, method: str) -> None:
    router = FakePcp(speaks=(version,))

    async def during(mapping: Mapping) -> None:
        assert (mapping.external, mapping.method, mapping.lifetime_s) == ((OUTER, PORT), method, 3600)
        assert router.table == {PORT: PORT}

    mapped(router, None, during)
    assert router.table == {}
    assert router.maps[0] == (version, PORT, PORT, 3600)
    assert router.maps[-1] == (version, PORT, 0, 0)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_a_firewall_of_ipv6_is_opened_by_pcp() -> None:
    router = FakePcp(host="::1", outer="2001:db8::7")

    async def main() -> None:
        async with (
            routers(router) as terms,
            open_mapping(PORT, gateway=Gateway("::1", "lo", "::1"), terms=terms) as mapping,
        ):
            assert (mapping.external, mapping.method) == (("2001:db8::7", PORT), "pcp")
        assert router.table == {}

    run(main)


def test_another_external_port_than_ours_is_told() -> None:
    router = FakePcp(speaks=(0,), taken={PORT})

    async def during(mapping: Mapping) -> None:
        assert mapping.external == (OUTER, PORT + 1)

    mapped(router, None, during)


@pytest.mark.parametrize("version", [1, 2])
def test_upnp_maps_a_port_with_both_versions_of_igd(version: int) -> None:
    router = FakeIgd(version)

    async def during(mapping: Mapping) -> None:
        assert (mapping.external, mapping.method) == ((OUTER, PORT), "upnp")
        assert router.table == {PORT: (HOST, PORT, 3600)}

    mapped(None, router, during)
    assert router.table == {}
    assert ("AddAnyPortMapping" in router.calls) == (version == 2)


def test_a_router_of_igd_2_without_add_any_is_asked_as_one_of_igd_1() -> None:
    router = FakeIgd(has_add_any=False)

    async def during(_: Mapping) -> None:
        assert router.table == {PORT: (HOST, PORT, 3600)}

    mapped(None, router, during)


@pytest.mark.parametrize("version", [1, 2])
def test_a_port_that_another_host_has_is_left_to_it(version: int) -> None:
    theirs = ("192.0.2.1", 80, 0)
    router = FakeIgd(version, table={PORT: theirs})

    async def during(mapping: Mapping) -> None:
        assert mapping.external is not None and mapping.external[1] != PORT
        assert router.table[mapping.external[1]] == (HOST, PORT, 3600)

    mapped(None, router, during)
    assert router.table == {PORT: theirs}


def test_a_router_that_has_permanent_leases_only_gives_one_that_is_taken_away() -> None:
    router = FakeIgd(1, permanent_only=True)

    async def during(mapping: Mapping) -> None:
        assert mapping.lifetime_s is None
        assert router.table == {PORT: (HOST, PORT, 0)}

    mapped(None, router, during)
    assert router.table == {}


def test_a_router_of_many_protocols_holds_one_mapping() -> None:
    pcp, igd = FakePcp(), FakeIgd()

    async def during(mapping: Mapping) -> None:
        assert len(pcp.table) + len(igd.table) == 1
        assert mapping.external == (OUTER, PORT)

    mapped(pcp, igd, during)
    assert (pcp.table, igd.table) == ({}, {})


def test_where_one_protocol_is_refused_another_gives_the_mapping() -> None:
    pcp, igd = FakePcp(result=2), FakeIgd()

    async def during(mapping: Mapping) -> None:
        assert mapping.method == "upnp"

    mapped(pcp, igd, during)
    assert {version for version, *_ in pcp.maps} == {0, 2}


def test_a_lost_question_is_asked_again() -> None:
    router = FakePcp(drops=4)
    mapped(router, None)
    assert router.maps[-1][3] == 0


# ---- what is not given


def test_refusals_come_in_words() -> None:
    assert refusals(FakePcp(result=2, speaks=(2,)), None) == {
        "pcp": "not allowed",
        "nat-pmp": "it speaks another version",
        "upnp": "no answer",
    }
    assert refusals(FakePcp(result=4, speaks=(0,)), None)["nat-pmp"] == "no room for another mapping"
    assert refusals(FakePcp(result=200), None)["pcp"] == "refused with code 200"


def test_a_router_that_listens_to_nothing_is_told() -> None:
    reasons = refusals(None, None)
    assert reasons.keys() == {"pcp", "nat-pmp", "upnp"}
    assert reasons["pcp"] == reasons["nat-pmp"] == "Connection refused"


def test_a_router_that_does_not_answer_is_given_up() -> None:
    router = FakePcp(is_deaf=True)
    assert refusals(router, None)["pcp"] == "no answer"


def test_answers_from_elsewhere_are_not_looked_at() -> None:
    reasons = refusals(FakePcp(answers_from_elsewhere=True), FakeIgd(answers_from_elsewhere=True))
    assert reasons == {"pcp": "no answer", "nat-pmp": "no answer", "upnp": "no answer"}


def test_a_location_elsewhere_is_not_asked() -> None:
    router = FakeIgd(location="http://127.0.0.2:{port}/root.xml")
    assert refusals(None, router)["upnp"] == "no answer"


def test_a_router_that_accepts_and_says_nothing_is_given_up() -> None:
    assert "did not answer" in refusals(None, FakeIgd(is_stuck=True))["upnp"]


@pytest.mark.parametrize("body", [b"", b"<html>", b"<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>", b"<a>" * 1000])
def test_hostile_answers_of_upnp_are_refusals(body: bytes) -> None:
    assert "can't be used" in refusals(None, FakeIgd(body=body))["upnp"]


@pytest.mark.parametrize("outer", ["0.0.0.0", "127.0.0.1", "224.0.0.1"])
def test_an_address_at_which_nobody_is_reached_is_no_mapping(outer: str) -> None:
    pcp, igd = FakePcp(outer=outer), FakeIgd(outer=outer)
    assert refusals(pcp, igd).keys() == {"pcp", "nat-pmp", "upnp"}
    assert (pcp.table, igd.table) == ({}, {})


def test_malformed_answers_before_the_right_one_are_passed_over() -> None:
    foreign = struct.pack("!BBBBII12x", 2, 0x81, 0, 0, 3600, 1) + bytes(12) + b"\x06\0\0\0\x13\x88\x13\x88" + bytes(16)
    router = FakePcp(noise=(b"\xff" * 1200, foreign, b"\2"))  # the second: of another nonce

    async def during(mapping: Mapping) -> None:
        assert mapping.external == (OUTER, PORT)

    mapped(router, None, during)


# ---- what is kept


@pytest.mark.parametrize("version", [0, 2])
def test_a_mapping_is_renewed_at_half_of_its_lifetime(version: int) -> None:
    router = FakePcp(speaks=(version,), lifetime_s=100)

    async def during(_: Mapping) -> None:
        start_s = trio.current_time()
        await router.until(lambda: len(router.maps) == 2)
        assert 50 <= trio.current_time() - start_s < 60

    mapped(router, None, during)


def test_a_lifetime_of_nothing_but_a_moment_does_not_make_us_ask_all_the_time() -> None:
    router = FakePcp(speaks=(2,), lifetime_s=1)

    async def during(_: Mapping) -> None:
        await trio.sleep(60)
        assert 2 <= len(router.maps) <= 13

    mapped(router, None, during)


@pytest.mark.parametrize("version", [0, 2])
def test_a_router_that_restarted_is_asked_anew(version: int) -> None:
    router = FakePcp(speaks=(version,))

    async def during(mapping: Mapping) -> None:
        await trio.sleep(100)
        assert len(router.maps) == 1
        router.restart()
        await router.until(lambda: router.table == {PORT: PORT})
        assert mapping.external == (OUTER, PORT)
        assert len(router.maps) == 2

    mapped(router, None, during)


def test_upnp_mappings_that_were_lost_are_made_again() -> None:
    router = FakeIgd()

    async def during(_: Mapping) -> None:
        router.table.clear()
        await router.until(lambda: router.table == {PORT: (HOST, PORT, 3600)})

    mapped(None, router, during)


def test_another_external_address_is_told_to_who_waits() -> None:
    for pcp, igd in ((FakePcp(speaks=(0,)), None), (None, FakeIgd())):
        router: FakePcp | FakeIgd = pcp or igd or FakeIgd()

        async def during(mapping: Mapping, router: FakePcp | FakeIgd = router) -> None:
            router.outer = "198.51.100.9"
            assert await mapping.changed((OUTER, PORT)) == ("198.51.100.9", PORT)

        mapped(pcp, igd, during)


def test_a_mapping_that_the_router_no_longer_has_is_none_until_it_gives_another() -> None:
    router = FakePcp(speaks=(2,), lifetime_s=20)

    async def during(mapping: Mapping) -> None:
        router.is_deaf = True
        start_s = trio.current_time()
        assert await mapping.changed((OUTER, PORT)) is None
        assert trio.current_time() - start_s >= 20  # until then it may still be there
        router.restart()
        router.is_deaf = False
        assert await mapping.changed(None) == (OUTER, PORT)
        assert router.table == {PORT: PORT}

    mapped(router, None, during)


def test_a_router_that_came_back_on_another_port_is_found_again() -> None:
    """As miniupnpd does: its HTTP server takes a free one."""

    async def main() -> None:
        first = FakeIgd()
        async with trio.open_nursery() as nursery:
            async with routers(None, first) as terms:
                mapping = await nursery.start(hold, terms)
            second = FakeIgd(ssdp_port=first.ssdp_port)
            await nursery.start(second.run)
            await second.until(lambda: second.table == {PORT: (HOST, PORT, 3600)})
            assert mapping.external == (OUTER, PORT)
            nursery.cancel_scope.cancel()

    async def hold(terms: Terms, task_status: trio.TaskStatus[Mapping]) -> None:
        async with open_mapping(PORT, gateway=GATEWAY, terms=terms) as mapping:
            task_status.started(mapping)
            await trio.sleep_forever()

    run(main)


# ---- how it ends


def test_a_cancelled_block_takes_its_mapping_away() -> None:
    for pcp, igd in ((FakePcp(speaks=(2,)), None), (FakePcp(speaks=(0,)), None), (None, FakeIgd())):

        async def main(pcp: FakePcp | None = pcp, igd: FakeIgd | None = igd) -> None:
            async with routers(pcp, igd) as terms:
                with trio.CancelScope() as scope:
                    async with open_mapping(PORT, gateway=GATEWAY, terms=terms):
                        assert (pcp or igd or FakeIgd()).table
                        scope.cancel()
                        await trio.sleep_forever()
                assert not (pcp or igd or FakeIgd()).table

        run(main)


def test_a_router_that_is_gone_does_not_hold_up_the_end() -> None:
    router = FakePcp()

    async def main() -> None:
        async with routers(router) as terms:
            async with open_mapping(PORT, gateway=GATEWAY, terms=terms):
                router.is_deaf = True
                start_s = trio.current_time()
            assert trio.current_time() - start_s <= 4

    run(main)


def test_the_search_is_bounded_whatever_routers_do() -> None:
    async def main() -> None:
        async with routers(FakePcp(is_deaf=True), FakeIgd(is_stuck=True)) as terms:
            start_s = trio.current_time()
            with pytest.raises(NoMappingError) as caught:
                async with open_mapping(PORT, gateway=GATEWAY, terms=replace(terms, search_s=1.0)):
                    raise AssertionError("there is a mapping")
            assert trio.current_time() - start_s <= 1.5
            assert set(caught.value.reasons.values()) == {"too slow"}

    run(main)


def test_without_a_router_there_is_no_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyccl._io.portmap.find_gateway", lambda _family: None)

    async def main() -> None:
        with pytest.raises(NoMappingError, match="no default route"):
            async with open_mapping(PORT):
                raise AssertionError("there is a mapping")

    run(main)
