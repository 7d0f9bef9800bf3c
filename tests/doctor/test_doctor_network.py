"""Findings about the way to a master and back: each judgement, and whole looks at masters that run here."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

import pyccl
from pyccl._io import envelope
from pyccl._io.address import Master, invite_text
from pyccl._io.identity import Identity
from pyccl._io.master_server import MasterServer
from pyccl._io.portmap import Mapping, NoMappingError
from pyccl._io.probe import DIALS_MAX, Prober, Seen, probe
from pyccl._io.routers import Lease
from pyccl._io.sampling import Rate, Sampler
from pyccl._io.tls import Credentials, Line, Ticket
from pyccl._proto import dialback, limits, member
from pyccl._proto.candidates import seen_at
from pyccl._proto.invites import Invite, seal
from pyccl._proto.messages import DialTold, Probe, Probed, Rejected, Sample
from pyccl._proto.past import Past
from pyccl.doctor import network
from pyccl.doctor.finding import Finding, Level
from pyccl.doctor.network import Forwarded
from pyccl.errors import MasterUnavailableError, RejectedError, RemoteProtocolError

HOST = "127.0.0.1"
RUN = b"R" * 16
MASTER = Identity.new()
FAR = 1 << 40
HERE = Seen((HOST, 40_000), (HOST, 40_000), 0.1, 0.0, 0.05, True, "")
BEHIND = replace(HERE, local=("192.168.1.2", 40_000), observed=("8.8.8.8", 40_000))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYCCL_IDENTITY", str(tmp_path / "ours.pem"))
    monkeypatch.delenv("PYCCL_INVITE", raising=False)
    return tmp_path


def token(ends: int = FAR, uses: int = 0) -> bytes:
    return seal(MASTER.run_key(), Invite(RUN, b"12345678", ends, uses, 7, ""))


def invited(port: int, sealed: bytes) -> Master:
    return Master(HOST, port, Ticket(MASTER.public, sealed))


@asynccontextmanager
async def served(identity: Identity | None = None) -> AsyncIterator[int]:
    """The port of a master that knows no journal."""
    (listener,) = await trio.open_tcp_listeners(0, host=HOST)
    server = MasterServer(Past(RUN, 1 << 32), None, 5.0, "0.0.9", identity=identity)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve, listener)
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def member_of(port: int) -> AsyncIterator[str]:
    """The id of one that is there meanwhile. Its calls block, and the master is in this thread."""
    comm = pyccl.Communicator(f"{HOST}:{port}")
    try:
        await trio.to_thread.run_sync(comm.connect)
        yield comm.peer_id
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(comm.close)


@asynccontextmanager
async def no_router(_port: int) -> AsyncIterator[Mapping]:
    raise NoMappingError({"gateway": "none here"})
    yield Mapping(_port, "", Lease("", 0, None))


@asynccontextmanager
async def router(port: int) -> AsyncIterator[Mapping]:
    yield Mapping(port, "pcp", Lease("8.8.8.8", port, 3600))


def looked(
    identity: Identity | None = None, sealed: bytes | None = None, open_mapping: network.OpenMapping = no_router
) -> dict[str, Finding]:
    found: list[Finding] = []

    async def main() -> None:
        async with served(identity) as port:
            master = Master(HOST, port) if sealed is None else invited(port, sealed)
            found.extend(await network.look(master, "0.1.0", open_mapping))

    trio.run(main)
    assert len({finding.name for finding in found}) == len(found)
    return {finding.name: finding for finding in found}


# ---- judged


def test_a_clock_that_is_off_is_a_warning_and_says_in_which_direction() -> None:
    assert network.judge_clock(replace(HERE, offset_s=-29.0)).level is Level.OK
    assert network.judge_clock(replace(HERE, offset_s=35.0, error_s=10.0)).level is Level.OK
    late = network.judge_clock(replace(HERE, offset_s=100.0))
    assert late.level is Level.WARNING and "100.0 s behind the master's" in late.text and late.advice
    assert "ahead of" in network.judge_clock(replace(HERE, offset_s=-100.0)).text


def test_latency_is_the_median_of_round_trips() -> None:
    finding = network.judge_latency([replace(HERE, connect_s=s) for s in (0.3, 0.1, 0.2)])
    assert "200.0 ms" in finding.text and finding.data == {"round_trip_ms": [100.0, 200.0, 300.0]}


def test_kinds_of_nat_are_told_by_ports_and_addresses_that_the_master_sees() -> None:
    assert network.judge_nat([HERE]).level is Level.OK
    kept = network.judge_nat([BEHIND, replace(BEHIND, local=("192.168.1.2", 5), observed=("8.8.8.8", 5))])
    assert kept.level is Level.NOTE and "hole punching can work" in kept.text
    changed = network.judge_nat([BEHIND, replace(BEHIND, observed=("8.8.8.8", 50_001))])
    assert changed.level is Level.WARNING and "1 of 2 kept" in changed.text and "relay" in changed.advice
    several = network.judge_nat([BEHIND, replace(BEHIND, observed=("9.9.9.9", 40_000))])
    assert several.level is Level.WARNING and "8.8.8.8, 9.9.9.9" in several.text


@pytest.mark.parametrize(
    ("host", "level"), [("8.8.8.8", Level.OK), ("127.0.0.1", Level.NOTE), ("100.64.3.4", Level.NOTE)]
)
def test_an_address_is_public_or_not(host: str, level: Level) -> None:
    finding = network.judge_address(replace(HERE, observed=(host, 1)))
    assert finding.level is level and finding.data == {"host": host}


def test_a_mapping_matters_behind_a_nat() -> None:
    none = Forwarded(None, "", None, {"upnp": "no answer"})
    assert network.judge_mapping(none, is_behind_nat=False).level is Level.NOTE
    missing = network.judge_mapping(none, is_behind_nat=True)
    assert missing.level is Level.WARNING and "upnp: no answer" in missing.text and "UPnP" in missing.advice
    given = Forwarded(("8.8.8.8", 5000), "pcp", 3600, {})
    assert network.judge_mapping(given, True).level is Level.OK
    assert network.judge_mapping(replace(given, lifetime_s=None), True).level is Level.NOTE
    double = network.judge_mapping(replace(given, external=("192.168.1.7", 5000)), True)
    assert double.level is Level.WARNING and "another NAT" in double.text


def test_an_invite_is_read_before_it_is_shown() -> None:
    at = invited(1, token(ends=1_000_000))
    assert network.judge_invite(at, 1_000_000.0 - 7 * 86_400).level is Level.OK
    assert "7.0 d" in network.judge_invite(at, 1_000_000.0 - 7 * 86_400).text
    assert network.judge_invite(at, 1_000_000.0 - 3600).level is Level.NOTE
    ended = network.judge_invite(at, 1_000_000.0 + 60)
    assert ended.level is Level.ERROR and "ended 1.0 min ago" in ended.text and ended.advice
    assert ended.data == {"id": b"12345678".hex(), "ends": 1_000_000, "uses": 0, "group": 7}
    for broken in (b"", b"x" * 80, token()[:40], b"\2" + token()[1:]):
        assert network.judge_invite(invited(1, broken), 0.0).level is Level.ERROR


def test_failures_say_what_to_do() -> None:
    plain, secret = Master(HOST, 1), invited(1, token())
    advices = {
        network.judge_failure(plain, MasterUnavailableError("no")).advice,
        network.judge_failure(plain, RejectedError("no")).advice,
        network.judge_failure(secret, RejectedError("no")).advice,
        network.judge_failure(secret, RemoteProtocolError("no")).advice,
    }
    assert len(advices) == 4 and all(advices)


def test_members_that_are_not_reached_are_named() -> None:
    assert network.judge_peers({}).level is Level.NOTE
    assert network.judge_peers({"a" * 32: ""}).level is Level.OK
    some = network.judge_peers({"a" * 32: "", "b" * 32: "Connection refused"})
    assert some.level is Level.WARNING and "1 of 2" in some.text and "bbbbbbbb: Connection refused" in some.text


def test_members_that_do_not_reach_us_are_named() -> None:
    finding = network.judge_reached_by_peers(HERE, 7)
    assert finding.level is Level.NOTE and finding.data == {"port": 7, "tried": {}}
    for host in (HOST, "192.168.1.2", "100.64.3.4"):
        text = network.judge_reached_by_peers(replace(HERE, observed=(host, 1)), 7).text
        assert text == f"members are not asked to connect to {host}, which is not public"
    assert "none elsewhere" in network.judge_reached_by_peers(BEHIND, 7).text
    both = {"a" * 32: "", "b" * 32: ""}
    assert network.judge_reached_by_peers(replace(HERE, peers=both), 7).level is Level.OK
    some = network.judge_reached_by_peers(replace(HERE, peers={**both, "c" * 32: "no answer"}), 7)
    assert some.level is Level.WARNING and "2 of 3" in some.text and "cccccccc: no answer" in some.text
    none = network.judge_reached_by_peers(replace(HERE, peers={"c" * 32: "no answer"}), 7)
    assert none.level is Level.WARNING and "0 of 1" in none.text and "forward it" in none.advice
    assert none.advice != some.advice and f"{HOST} port 7" in none.text


def test_a_slow_line_up_is_a_warning_and_one_that_was_not_measured_a_note() -> None:
    fast, slow = Rate(4e6, 1 << 22), Rate(5e5, 1 << 20)
    good = network.judge_bandwidth(fast, slow, "")
    assert good.level is Level.OK and "up 32 Mbit/s, down 4.0 Mbit/s" in good.text and "several" in good.text
    assert good.data["up"] == {"bits_per_s": 32_000_000, "size_bytes": 1 << 22}
    bad = network.judge_bandwidth(slow, fast, "")
    assert bad.level is Level.WARNING and "quantize" in bad.advice
    assert "up at least 67 Mbit/s" in network.judge_bandwidth(Rate(8 << 20, 1 << 22), fast, "").text
    assert "up less than 16 KiB in 2 s" in network.judge_bandwidth(Rate(0.0, 0), fast, "").text
    half = network.judge_bandwidth(fast, None, "ask again in 7 s")
    assert half.level is Level.NOTE and "up 32" in half.text and "down not measured: ask again" in half.text
    unmeasured = network.judge_bandwidth(None, None, "ask again in 7 s")
    assert unmeasured.level is Level.NOTE and unmeasured.text == "up and down not measured: ask again in 7 s"


def test_another_version_at_the_master_is_a_note() -> None:
    assert network.judge_library("1", "1").level is Level.OK
    assert network.judge_library("1", "2").level is Level.NOTE


@pytest.mark.parametrize(
    "status", [{}, {"groups": 1}, {"groups": [{}]}, {"groups": [{"members": [{"peer": "a", "addresses": ["x:y"]}]}]}]
)
def test_a_status_that_is_none_is_a_protocol_error(status: dict[str, object]) -> None:
    with pytest.raises(RemoteProtocolError):
        network.members_untrusted(status)


# ---- looks


def test_a_plain_master_here_is_reached_and_reaches_us() -> None:
    found = looked(open_mapping=router)
    names = ("master", "clock", "latency", "NAT", "reachability", "port mapping")
    assert {found[name].level for name in names} == {Level.OK}
    assert found["public address"].level is Level.NOTE
    assert found["library"].text == "0.1.0 here, 0.0.9 at the master"
    assert found["peers"].data == {"tried": {}}
    assert found["reached by peers"].level is Level.NOTE
    rates = found["bandwidth"].data
    assert all(rates[way]["bits_per_s"] > 0 and rates[way]["size_bytes"] > 0 for way in ("up", "down"))
    assert found["port mapping"].data["method"] == "pcp"
    assert "invite" not in found


def test_members_are_not_dialed_at_what_is_none_of_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    dialed: list[str] = []

    async def note(host: str, port: int, allowed: Callable[[str], bool]) -> str:
        dialed.append(host)
        return "" if allowed(host) else "not allowed"

    monkeypatch.setattr(network, "dial", note)
    hosts = ("127.0.0.1", "10.0.0.1", "169.254.169.254", "198.51.100.7", "db.internal")
    addresses = [f"{host}:5" for host in hosts]
    told = {"peer": "ab", "addresses": addresses, "seen": "198.51.100.7"}
    members = network.members_untrusted({"groups": [{"members": [told]}]})
    assert trio.run(network._tried, members, seen_at("127.0.0.1", "10.0.0.2")) == {"ab": ""}
    assert sorted(dialed) == ["198.51.100.7", "db.internal"]
    dialed.clear()
    assert trio.run(network._tried, {"ab": replace(members["ab"], seen=HOST)}, HOST) == {"ab": ""}
    assert sorted(dialed) == ["10.0.0.1", "127.0.0.1", "198.51.100.7", "db.internal"]


def test_members_are_not_asked_to_dial_what_is_not_public() -> None:
    async def main() -> None:
        async with served() as port, member_of(port):
            findings = await network.look(Master(HOST, port), "0.1.0", no_router)
            found = {finding.name: finding for finding in findings}["reached by peers"]
            assert found.level is Level.NOTE and found.data["tried"] == {}
            assert "127.0.0.1, which is not public" in found.text

    trio.run(main)


def test_members_dial_us_as_the_master_does_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this machine's loopback were public, and another place at each look."""
    places = itertools.count(1)
    monkeypatch.setattr(dialback, "is_public", lambda host: True)
    monkeypatch.setattr(dialback, "place", lambda host: str(next(places)))
    monkeypatch.setattr(member, "may_dial", lambda host, own: True)

    async def main() -> None:
        async with served() as port, member_of(port) as peer:
            findings = await network.look(Master(HOST, port), "0.1.0", no_router)
            found = {finding.name: finding for finding in findings}
            assert found["reached by peers"].data["tried"] == {peer: ""}
            assert found["reached by peers"].level is Level.OK
            with socket.create_server((HOST, 0)) as closed:
                back = closed.getsockname()[1]
            seen = await probe(HOST, port, None, back)
            assert list(seen.peers) == [peer] and "refused" in seen.peers[peer]
            assert (await probe(HOST, port, None)).peers == {}  # nobody dials unasked

    trio.run(main)


def test_a_master_that_measures_nothing_for_now_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(self: Sampler, line: Line, sample: Sample) -> None:
        await line.send_all(envelope.pack(Rejected("ask again in 7 s")))

    monkeypatch.setattr(Sampler, "serve", refuse)
    found = looked()
    assert found["bandwidth"].level is Level.NOTE and "ask again in 7 s" in found["bandwidth"].text
    assert found["library"].level is Level.NOTE and found["master"].level is Level.OK


def test_an_invite_is_looked_at_without_spending_a_use(home: Path) -> None:
    async def main() -> None:
        async with served(MASTER) as port:
            for n in range(3):  # as three identities
                (found,) = [
                    finding
                    for finding in await network.look(invited(port, token(uses=1)), "0.1.0", no_router)
                    if finding.name == "master"
                ]
                assert found.level is Level.OK and "encrypted" in found.text, (n, found.text)
                (home / "ours.pem").unlink()

    trio.run(main)


def test_an_invite_that_does_not_let_in_is_an_error_with_the_masters_reason() -> None:
    expired = looked(MASTER, token(ends=1_000_000))
    assert expired["invite"].level is expired["master"].level is Level.ERROR
    assert "expired" in expired["master"].text
    altered = looked(MASTER, token()[:-1] + bytes([token()[-1] ^ 1]))
    assert altered["invite"].level is Level.OK  # nobody but the master can tell
    assert altered["master"].level is Level.ERROR and "altered" in altered["master"].text
    plain = looked(MASTER)
    assert plain["master"].level is Level.ERROR and "invite" in plain["master"].advice
    assert "NAT" not in plain


def test_an_address_without_a_master_is_an_error() -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
    found = trio.run(network.look, Master(HOST, port), "0.1.0", no_router)
    assert [(finding.name, finding.level) for finding in found] == [
        ("master", Level.ERROR),
        ("port mapping", Level.NOTE),
    ]


# ---- the master's side


def test_a_master_connects_to_who_asks_and_says_why_it_can_not() -> None:
    async def main() -> None:
        async with served() as port:
            with socket.create_server((HOST, 0)) as listener:
                back = listener.getsockname()[1]
                seen = await probe(HOST, port, None, back)
                assert seen.reached and seen.reason == "" and seen.local == seen.observed
                assert abs(seen.offset_s) < 3600
            closed = await probe(HOST, port, None, back)
            assert not closed.reached and "refused" in closed.reason
            unasked = await probe(HOST, port, None)
            assert not unasked.reached and unasked.reason == "no port was named"

    trio.run(main)


def test_a_secure_master_dials_nobody_without_an_invite() -> None:
    async def main() -> None:
        async with served(MASTER) as port:
            with socket.create_server((HOST, 0)) as listener:
                listener.setblocking(False)
                credentials = Credentials(Identity.new(), b"s" * 16, Ticket(MASTER.public, b""))
                with pytest.raises(RejectedError, match="no invite"):
                    await probe(HOST, port, credentials, listener.getsockname()[1])
                with pytest.raises(BlockingIOError):
                    listener.accept()

    trio.run(main)


def test_a_master_dials_a_few_at_a_time() -> None:
    async def main() -> None:
        prober = Prober(nobody, lambda: 12.5)
        answers: list[object] = []
        with contextlib.ExitStack() as stack:
            # A queue that is full answers no SYN: who is dialled there waits.
            full = stack.enter_context(socket.socket())
            full.bind((HOST, 0))
            full.listen(0)
            back = full.getsockname()[1]
            stack.enter_context(socket.create_connection((HOST, back)))
            ours, theirs = await _pair()
            async with ours, theirs, trio.open_nursery() as nursery:

                async def ask() -> None:
                    answers.append(await prober.answer(theirs, Probe(limits.PROTOCOL_VERSION, back)))

                for _ in range(DIALS_MAX):
                    nursery.start_soon(ask)
                await trio.testing.wait_all_tasks_blocked()
                beyond = await prober.answer(theirs, Probe(limits.PROTOCOL_VERSION, back))
                assert isinstance(beyond, Probed)
                assert not beyond.reached and "others are being tried" in beyond.reason and beyond.time_ms == 12_500
                assert isinstance(await prober.answer(theirs, Probe(limits.PROTOCOL_VERSION + 1, 0)), Rejected)
                nursery.cancel_scope.cancel()
        assert answers == []

    trio.run(main)


async def nobody(host: str, port: int) -> tuple[DialTold, ...]:
    return ()


async def _pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    (listener,) = await trio.open_tcp_listeners(0, host=HOST)
    async with listener:
        ours = await trio.testing.open_stream_to_socket_listener(listener)
        return ours, await listener.accept()


# ---- the command


def test_the_command_prints_findings_and_ends_with_the_worst(home: Path) -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
    command = [sys.executable, "-P", "-m", "pyccl", "doctor", "--no-port-mapping"]
    done = subprocess.run([*command, f"{HOST}:{port}", "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    told = json.loads(done.stdout)
    levels = {finding["name"]: finding["level"] for finding in told["findings"]}
    assert told["level"] == levels["master"] == "error"
    assert "port mapping" not in levels
    assert levels["kernel self-test"] == "ok" and levels["identity"] == "note"
    secret = invite_text(f"{HOST}:{port}", Ticket(MASTER.public, token()))
    lines = subprocess.run([*command, secret], capture_output=True, text=True, check=False)
    assert lines.returncode == 3 and "error   master" in lines.stdout and "-> " in lines.stdout
    assert secret not in lines.stdout + lines.stderr
    bad = subprocess.run([*command, "host:99999"], capture_output=True, text=True, check=False)
    assert bad.returncode == 2 and "1..65535" in bad.stderr
