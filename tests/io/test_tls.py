"""A secure master's connections: who comes in, who does not and why, mix-ups with plain ones, attackers on the line."""

from __future__ import annotations

import base64
import contextlib
import logging
import socket
import ssl
import string
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from pyccl import Communicator
from pyccl._io import envelope, probe, sampling, tls
from pyccl._io.address import SCHEME, Master, invite_text, parse_master
from pyccl._io.admission import PLAIN_REFUSED
from pyccl._io.ask import ask, ask_status
from pyccl._io.identity import Identity
from pyccl._io.journal import Journal
from pyccl._io.master_server import MasterServer
from pyccl._io.sealed import SealedStream
from pyccl._io.tls import Credentials, Ticket
from pyccl._native.handles import FRAME_BYTES
from pyccl._proto import limits
from pyccl._proto.epoch import Address, Member, make_epoch
from pyccl._proto.invites import Invite, seal
from pyccl._proto.messages import (
    Alive,
    Challenge,
    Done,
    EpochCommit,
    EpochPropose,
    Evicted,
    Heartbeat,
    Hello,
    InviteAsk,
    Invited,
    Join,
    Kick,
    Message,
    Observe,
    Probe,
    Pulse,
    PulseKeys,
    Ready,
    Recall,
    Reflect,
    Rejected,
    RelayHello,
    Resume,
    Revoke,
    Sample,
    StatusAsk,
    Unknown,
    Welcome,
)
from pyccl._proto.past import Past
from pyccl.errors import RejectedError, RemoteProtocolError, UsageError

HANG_S = 60.0
RUN, INCARNATION = b"R" * 16, b"i" * 16
MASTER, ANN, BOB = Identity.new(), Identity.new(), Identity.new()
HOST = "127.0.0.1"
VERSION = limits.PROTOCOL_VERSION


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        with trio.fail_after(HANG_S):
            await main()

    trio.run(limited)


@asynccontextmanager
async def served(
    identity: Identity | None = MASTER, journal: Journal | None = None, run_id: bytes = RUN, **options: Any
) -> AsyncIterator[int]:
    """The port of a master. Without a journal it takes runs over. options: of MasterServer."""
    past = Past(run_id, 1 << 32) if journal is None or journal.past is None else journal.past
    unkept = journal is None
    options |= {"needs_majority": unkept, "adopts": unkept, "identity": identity}
    server = MasterServer(past, journal, 60.0, "test", **options)
    (listener,) = await trio.open_tcp_listeners(0, host=HOST)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve, listener)
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


def token(uses: int = 0, group: int | None = None, id_: bytes = b"12345678", ends: int = 1 << 40) -> bytes:
    return seal(MASTER.run_key(), Invite(RUN, id_, ends, uses, group, ""))


def of(identity: Identity, sealed: bytes | None = None, key: bytes = MASTER.public) -> Credentials:
    return Credentials(identity, b"s" * 16, Ticket(key, token() if sealed is None else sealed))


def of_run(run_id: bytes, credentials: Credentials) -> Credentials:
    sealed = seal(MASTER.run_key(), Invite(run_id, b"12345678", 1 << 40, 0, None, ""))
    return replace(credentials, ticket=Ticket(MASTER.public, sealed))


def operator() -> Credentials:
    return of(MASTER, b"")


def hello(credentials: Credentials, group: int = 0, incarnation: bytes = INCARNATION) -> Hello:
    return Hello(VERSION, "test", group, credentials.peer, incarnation, (Address(HOST, 1),))


async def answer(port: int, credentials: Credentials | None, message: Message) -> Message | None:
    """To a first message."""
    line = await tls.reach(HOST, port, credentials)
    async with tls.socket_of(line):
        await line.send_all(envelope.pack(message))
        return await envelope.receive(line)


async def reason(port: int, credentials: Credentials, message: Message | None = None) -> str:
    told = await answer(port, credentials, message or hello(credentials))
    assert isinstance(told, Rejected), told
    return told.reason


async def member(port: int, credentials: Credentials, incarnation: bytes = INCARNATION) -> tls.Line:
    line = await tls.reach(HOST, port, credentials)
    await line.send_all(envelope.pack(hello(credentials, incarnation=incarnation)))
    while True:
        message = await envelope.receive(line)
        if isinstance(message, EpochPropose):
            await line.send_all(envelope.pack(Ready(message.epoch.number, message.version)))
        if isinstance(message, EpochCommit):
            return line
        assert message is not None and not isinstance(message, Rejected), message


def test_who_has_an_invite_comes_in_and_who_has_none_does_not() -> None:
    async def main() -> None:
        async with served() as port:
            assert "no invite" in await reason(port, of(BOB, b""))
            assert "no invite" in await reason(port, of(BOB, b""), StatusAsk(VERSION))
            assert "altered" in await reason(port, of(BOB, token()[:-1] + bytes([token()[-1] ^ 1])))
            assert "expired" in await reason(port, of(BOB, token(ends=1_000_000)))
            assert "for group 7" in await reason(port, of(BOB, token(group=7)))
            once = token(uses=1, id_=b"for once")
            assert isinstance(await answer(port, of(ANN, once), hello(of(ANN))), Welcome)
            assert isinstance(await answer(port, of(ANN, once), hello(of(ANN), incarnation=b"j" * 16)), Welcome)
            assert isinstance(await answer(port, of(ANN, b""), hello(of(ANN))), Welcome)  # is in: it needs none
            assert "used up" in await reason(port, of(BOB, once))
            assert (await ask_status(HOST, port, of(ANN)))["run"] == RUN.hex()

    run(main)


def test_a_peer_id_belongs_to_its_identity() -> None:
    async def main() -> None:
        async with served() as port:
            for message in (hello(of(ANN)), Observe(VERSION, "test", 0, of(ANN).peer, INCARNATION, ())):
                assert "another identity's" in await reason(port, of(BOB), message)
            async with tls.socket_of(await member(port, of(ANN))):
                assert "another identity's" in await reason(port, of(BOB), Pulse(VERSION, of(ANN).peer, INCARNATION))

    run(main)


def test_a_pulse_is_opened_encrypted_and_goes_on_sealed() -> None:
    async def main() -> None:
        async with served() as port, tls.socket_of(await member(port, of(ANN))):
            line = await tls.reach(HOST, port, of(ANN))
            await line.send_all(envelope.pack(Pulse(VERSION, of(ANN).peer, INCARNATION)))
            keys = await tls.leave(line)
            raw = tls.socket_of(line)
            async with raw:
                await SealedStream(raw, keys).send_all(b"x" * FRAME_BYTES)  # no heartbeat: it ends the pulse
                assert await raw.receive_some(1) == b""

    run(main)


def test_a_peer_has_one_pulse_connection_the_newest() -> None:
    async def main() -> None:
        async with served() as port, contextlib.AsyncExitStack() as opened:
            me = of(ANN)
            await opened.enter_async_context(tls.socket_of(await member(port, me)))
            before: trio.SocketStream | None = None
            for _ in range(5):
                line = await tls.reach(HOST, port, me)
                stream = await opened.enter_async_context(tls.socket_of(line))
                await line.send_all(envelope.pack(Pulse(VERSION, me.peer, INCARNATION)))
                assert isinstance(await envelope.receive(line), PulseKeys)
                if before is not None:
                    assert await before.receive_some(1) == b""
                before = stream

    run(main)


def test_an_identity_has_so_many_connections_and_leaves_room_for_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(limits, "CONTROLS_OF_IDENTITY_MAX", 3)

    async def main() -> None:
        async with served() as port, contextlib.AsyncExitStack() as opened:
            streams = []
            for number in range(3):
                mine = Credentials(ANN, bytes([number]) * 16, Ticket(MASTER.public, token()))
                line = await tls.reach(HOST, port, mine)
                await line.send_all(envelope.pack(hello(mine, group=number)))
                assert isinstance(await envelope.receive(line), Welcome)
                streams.append(await opened.enter_async_context(tls.socket_of(line)))
            mine = Credentials(ANN, b"z" * 16, Ticket(MASTER.public, token()))
            for message in (hello(mine), Observe(VERSION, "test", 0, mine.peer, INCARNATION, (Address(HOST, 1),))):
                assert await answer(port, mine, message) is None  # to try again; what is Rejected does not
            assert "3 peers of this identity" in caplog.text and caplog.text.count("identity_full") == 1
            assert isinstance(await answer(port, of(BOB), hello(of(BOB), group=9)), Welcome)
            await streams[0].aclose()
            while not isinstance(await answer(port, mine, hello(mine, group=7)), Welcome):
                pass  # the master has not seen the end of it yet

    run(main)


def test_who_is_in_stays_when_the_invite_is_revoked_and_nobody_else_comes_in(tmp_path: Path) -> None:
    async def main() -> None:
        journal = Journal.open(tmp_path / "journal")
        journal.begin(Past(RUN, 1 << 32))
        async with served(journal=journal) as port:
            async with tls.socket_of(await member(port, of(ANN))):
                assert isinstance(await ask(HOST, port, operator(), Revoke(b"12345678")), Done)
                assert isinstance(await answer(port, of(ANN), Pulse(VERSION, of(ANN).peer, INCARNATION)), PulseKeys)
                assert "revoked" in await reason(port, of(BOB))
            assert journal.past is not None and b"12345678" in journal.past.admissions.revoked
        async with served(journal=journal) as port:  # a master started later
            assert "revoked" in await reason(port, of(BOB))
        journal.close()

    run(main)


def test_a_use_is_in_the_journal_before_anybody_is_welcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        journal = Journal.open(tmp_path / "journal")
        journal.begin(Past(RUN, 1 << 32))
        failed = trio.Event()
        trio_token = trio.lowlevel.current_trio_token()
        append = journal.append

        def full(records: object) -> None:
            trio_token.run_sync_soon(failed.set)
            raise OSError(28, "No space left on device")

        async with served(journal=journal) as port:
            monkeypatch.setattr(journal, "append", full)
            line = await tls.reach(HOST, port, of(ANN, token(uses=1)))
            async with tls.socket_of(line):
                await line.send_all(envelope.pack(hello(of(ANN))))
                await failed.wait()
                monkeypatch.setattr(journal, "append", append)
                assert isinstance(await envelope.receive(line), Welcome)
                assert journal.past is not None
                assert journal.past.admissions.identities(b"12345678") == [ANN.public]
        journal.close()

    run(main)


def test_the_next_master_of_the_key_believes_what_the_first_has_signed_and_nothing_else() -> None:
    """A guest with a good invite invents a run of its own, and nobody is put out for it."""

    async def recalled(port: int, me: Credentials, welcome: Welcome, commit: EpochCommit) -> Message | None:
        """What comes after it was told this."""
        epoch, term = commit.epoch, (welcome.term, welcome.term_signature)
        line = await tls.reach(HOST, port, me)
        async with tls.socket_of(line):
            resume = Resume(RUN, epoch.number, epoch.id, False, term[0])
            await line.send_all(envelope.pack(replace(hello(me), resume=resume)))
            assert await envelope.receive(line) == Unknown(b"N" * 16, asks=True)
            told = commit.kind, commit.verdicts, commit.detail, commit.world_size, commit.journaled, commit.signature
            await line.send_all(envelope.pack(Recall(RUN, term[0], epoch, *told, term[1])))
            return await envelope.receive(line)

    async def main() -> None:
        async with served() as port:
            line = await tls.reach(HOST, port, of(ANN))
            async with tls.socket_of(line):
                await line.send_all(envelope.pack(hello(of(ANN))))
                welcome, _, commit = [await envelope.receive(line) for _ in range(3)]
            assert isinstance(welcome, Welcome) and isinstance(commit, EpochCommit)
        async with served(run_id=b"N" * 16) as port:
            founder = await member(port, of_run(b"N" * 16, replace(of(ANN), salt=b"f" * 16)))
            async with tls.socket_of(founder):
                bob = Member(of(BOB).peer, INCARNATION)
                invented = replace(commit, epoch=make_epoch(9, b"p" * 16, 5 << 32, (bob,)))
                assert await recalled(port, of(BOB), welcome, invented) is None
                await founder.send_all(envelope.pack(Heartbeat()))
                while not isinstance(message := await envelope.receive(founder), Alive):
                    assert message is not None and not isinstance(message, Evicted)
                back = await recalled(port, of(ANN), welcome, commit)
                assert isinstance(back, Welcome) and back.resumed and back.run == RUN
                while not isinstance(message := await envelope.receive(founder), Evicted):
                    assert message is not None

    run(main)


def test_the_operator_invites_and_kicks_and_nobody_else_does() -> None:
    async def main() -> None:
        async with served() as port:
            invited = await ask(HOST, port, operator(), InviteAsk(3600, 0, None, "ann"))
            assert isinstance(invited, Invited)
            line = await member(port, of(ANN, invited.token))
            for message in (InviteAsk(60, 0, None, ""), Revoke(invited.invite), Kick(of(ANN).peer)):
                assert "the operator's" in await reason(port, of(BOB), message)
            observer = await tls.reach(HOST, port, replace(of(ANN), salt=b"o" * 16))
            peer = replace(of(ANN), salt=b"o" * 16).peer
            await observer.send_all(envelope.pack(Observe(VERSION, "test", 0, peer, INCARNATION, ())))
            assert isinstance(await envelope.receive(observer), Welcome)
            assert isinstance(await ask(HOST, port, operator(), Kick(of(ANN).peer)), Done)
            async with tls.socket_of(line):
                while not isinstance(message := await envelope.receive(line), Evicted):
                    assert message is not None
            async with tls.socket_of(observer):  # of the same identity
                while await envelope.receive(observer) is not None:
                    pass
            assert "kicked" in await reason(port, of(ANN, invited.token))
            with pytest.raises(RejectedError, match="no such peer"):
                await ask(HOST, port, operator(), Kick(b"?" * 16))

    run(main)


def test_plain_and_encrypted_are_told_apart_and_never_mixed() -> None:
    async def main() -> None:
        async with served() as secure, served(None) as plain:
            assert "come with an invite" in str(await answer(secure, None, hello(of(ANN))))
            with pytest.raises(RejectedError, match="not encrypted"):
                await tls.reach(HOST, plain, of(ANN))
            assert isinstance(await answer(plain, None, hello(of(ANN))), Welcome)
            assert "operator" in str(await answer(plain, None, Kick(bytes(16))))

    run(main)


ANNS = of(ANN).peer
IN_CLEAR = (
    hello(of(ANN)),
    Observe(VERSION, "test", 0, ANNS, INCARNATION),
    Pulse(VERSION, ANNS, INCARNATION),
    Reflect(VERSION, ANNS, INCARNATION),
    RelayHello(VERSION, RUN, ANNS, INCARNATION, bytes(16), bytes(16)),
    StatusAsk(VERSION),
    Probe(VERSION, 1),
    Sample(VERSION, True),
    InviteAsk(60, 1, None, ""),
    Kick(ANNS),
    Challenge(VERSION, bytes(32)),
)


@pytest.mark.parametrize("first", IN_CLEAR, ids=lambda first: type(first).__name__)
def test_whatever_comes_in_clear_to_a_secure_master_is_told_to_bring_an_invite_and_no_more(first: Message) -> None:
    async def main() -> None:
        async with served() as port, tls.socket_of(await member(port, of(ANN))):  # whom it would know
            async with await trio.open_tcp_stream(HOST, port) as stream:
                await stream.send_all(envelope.pack(first))
                come = b""
                while part := await stream.receive_some():
                    come += part
            assert come == envelope.pack(Rejected(PLAIN_REFUSED))
            assert "an invite (pyccl-master invite)" in PLAIN_REFUSED

    run(main)


@pytest.mark.parametrize("question", ["reach", "status", "probe", "sample"])
def test_who_has_an_invite_tells_a_plain_master_nothing_of_it(question: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    me = of(ANN)
    ways: dict[str, Callable[[int], Awaitable[object]]] = {
        "reach": lambda port: tls.reach(HOST, port, me),
        "status": lambda port: ask_status(HOST, port, me),
        "probe": lambda port: probe.probe(HOST, port, me),
        "sample": lambda port: sampling.measure(HOST, port, me, upwards=True),
    }

    async def main() -> None:
        async with served(None) as plain, tapped(plain) as (port, seen, to_master):
            with pytest.raises(RejectedError, match=r"not encrypted .*--insecure"):
                await ways[question](port)
            captured = b"".join(seen)
            assert sum(to_master) > 0 and captured.endswith(tls.PLAIN_HERE)
            for secret in (token(), token()[-32:], ANN.public, me.peer, me.salt, MASTER.public, RUN):
                assert secret not in captured

    run(main)
    assert "it begins encrypted, and this master is plain" in caplog.text


def test_what_answers_with_another_key_or_without_tls_is_not_spoken_to() -> None:
    async def main() -> None:
        got: list[bytes] = []

        async def echo(stream: trio.SocketStream) -> None:
            got.append(await stream.receive_some(4096))
            await stream.send_all(b"HTTP/1.0 400 Bad Request\r\n\r\n")

        async with served(BOB) as impostor, trio.open_nursery() as nursery:
            with pytest.raises(RemoteProtocolError, match="another key"):
                await tls.reach(HOST, impostor, of(ANN))
            (listener,) = await trio.open_tcp_listeners(0, host=HOST)
            nursery.start_soon(trio.serve_listeners, echo, [listener])
            with pytest.raises(RemoteProtocolError, match="does not speak TLS"):
                await tls.reach(HOST, listener.socket.getsockname()[1], of(ANN))
            assert token() not in got[0] and ANN.public not in got[0]
            nursery.cancel_scope.cancel()

    run(main)


async def challenged(port: int) -> tuple[trio.SSLStream[trio.SocketStream], bytes]:
    """A TLS connection to the master by hand, and its nonce."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    line = trio.SSLStream(await trio.open_tcp_stream(HOST, port), context, https_compatible=True)
    challenge = await envelope.receive(line)
    assert isinstance(challenge, Challenge)
    return line, challenge.nonce


def test_a_proof_is_worth_nothing_on_another_connection_to_another_master_or_altered() -> None:
    async def main() -> None:
        async with served() as port:
            salt, sealed = b"s" * 16, token()

            def join(nonce: bytes, master: Identity = MASTER) -> Join:
                signed = tls._signed(master.public, nonce, salt, sealed)
                return Join(ANN.public, salt, sealed, ANN.sign(signed))

            async def comes_in(make: Callable[[bytes], Join]) -> bool:
                line, nonce = await challenged(port)
                async with tls.socket_of(line):
                    await line.send_all(envelope.pack(make(nonce)) + envelope.pack(hello(of(ANN))))
                    return isinstance(await envelope.receive(line), Welcome)

            old, nonce = await challenged(port)
            replayed = join(nonce)
            await trio.aclose_forcefully(old)
            assert await comes_in(join)
            assert not await comes_in(lambda _: replayed)
            assert not await comes_in(lambda nonce: join(nonce, BOB))
            assert not await comes_in(lambda nonce: replace(join(nonce), token=token(id_=b"stolen!!")))
            assert not await comes_in(lambda nonce: replace(join(nonce), salt=b"t" * 16))
            assert not await comes_in(lambda nonce: replace(join(nonce), identity=BOB.public))

    run(main)


def test_tls_1_2_is_refused() -> None:
    async def main() -> None:
        async with served() as port:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            line = trio.SSLStream(await trio.open_tcp_stream(HOST, port), context)
            with pytest.raises(trio.BrokenResourceError):
                await line.do_handshake()
            await trio.aclose_forcefully(line)

    run(main)


@asynccontextmanager
async def tapped(port: int, alter_at: int | None = None) -> AsyncIterator[tuple[int, list[bytes], list[int]]]:
    """A man in the middle: its port, all that went by, how many bytes went to the master. alter_at: of these, the one
    that comes out flipped."""
    seen: list[bytes] = []
    to_master: list[int] = []

    async def pipe(
        source: trio.SocketStream, sink: trio.SocketStream, flip: int | None, scope: trio.CancelScope
    ) -> None:
        at = 0
        try:
            async for part in source:
                data = bytearray(part)
                if flip is not None and at <= flip < at + len(data):
                    data[flip - at] ^= 1
                at += len(data)
                seen.append(bytes(data))
                if sink.socket.getpeername()[1] == port:
                    to_master.append(len(data))
                await sink.send_all(data)
        except trio.BrokenResourceError:
            pass
        scope.cancel()

    async def carry(near: trio.SocketStream) -> None:
        async with near, await trio.open_tcp_stream(HOST, port) as far, trio.open_nursery() as nursery:
            nursery.start_soon(pipe, near, far, alter_at, nursery.cancel_scope)
            nursery.start_soon(pipe, far, near, None, nursery.cancel_scope)

    (listener,) = await trio.open_tcp_listeners(0, host=HOST)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, carry, [listener])
        yield listener.socket.getsockname()[1], seen, to_master
        nursery.cancel_scope.cancel()


def test_the_line_shows_no_token_identity_peer_or_incarnation() -> None:
    async def main() -> None:
        async with served() as port, tapped(port) as (tap, seen, _):
            assert isinstance(await answer(tap, of(ANN), hello(of(ANN))), Welcome)
            captured = b"".join(seen)
            assert len(captured) > 500
            for secret in (token(), token()[-32:], ANN.public, of(ANN).peer, INCARNATION, RUN):
                assert secret not in captured

    run(main)


def test_a_byte_changed_anywhere_ends_that_connection_and_nothing_else() -> None:
    async def main() -> None:
        async with served() as port, tapped(port) as (tap, _, to_master):
            whole = await tls.reach(HOST, tap, of(ANN))
            await whole.send_all(envelope.pack(hello(of(ANN))))
            assert isinstance(await envelope.receive(whole), Welcome)
            before = sum(to_master)
            for at in range(5, before, before // 16):  # from 5: the version in the first record's head means nothing
                async with tapped(port, at) as (altered, _, _):
                    told: Message | None = None
                    with contextlib.suppress(RejectedError, RemoteProtocolError, OSError, trio.BrokenResourceError):
                        told = await answer(altered, of(BOB), hello(of(BOB)))
                    assert told is None, at
            async with tls.socket_of(whole):
                await whole.send_all(envelope.pack(Heartbeat()))
                while not isinstance(message := await envelope.receive(whole), Alive):
                    assert message is not None

    run(main)


def test_strangers_that_begin_tls_and_stop_take_nobodys_place() -> None:
    async def main() -> None:
        async with served() as port:
            socks = [socket.create_connection((HOST, port)) for _ in range(300)]  # more than there are places
            try:
                for sock in socks:
                    sock.sendall(b"\x16\x03\x01")
                assert isinstance(await answer(port, of(ANN), hello(of(ANN))), Welcome)
            finally:
                for sock in socks:
                    sock.close()

    run(main)


def test_secrets_are_in_no_log_and_no_repr(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    sealed = token(uses=1)

    async def main() -> None:
        async with served() as port, tls.socket_of(await member(port, of(ANN, sealed))):
            await reason(port, of(BOB, sealed))
            await ask(HOST, port, operator(), InviteAsk(60, 1, None, "x"))

    run(main)
    text = invite_text("h:1", Ticket(MASTER.public, sealed))
    values = of(ANN, sealed), parse_master(text), Join(ANN.public, bytes(16), sealed, bytes(64))
    shown = caplog.text + "".join(map(repr, values))
    assert caplog.records
    for form in (sealed.hex(), repr(sealed)[2:-1], base64.urlsafe_b64encode(sealed).decode(), text.rpartition("/")[2]):
        assert form[-40:] not in shown


def test_invites_are_read_as_they_are_written_and_errors_never_repeat_them(monkeypatch: pytest.MonkeyPatch) -> None:
    ticket = Ticket(MASTER.public, token())
    for address, host in (("h.example:1", "h.example"), ("[2001:db8::1]:1", "2001:db8::1")):
        assert parse_master(f" {invite_text(address, ticket)}\n") == Master(host, 1, ticket)
    text = invite_text("h:1", ticket)
    monkeypatch.setenv("PYCCL_INVITE", text)
    assert parse_master(None) == Master("h", 1, ticket)
    secret = text.rpartition("/")[2]
    broken = text[:40], text + "A" * 400, text.replace("h:1/", "h:1"), text + "!", text.replace("h:1", "h:99999")
    for wrong in broken:
        monkeypatch.setenv("PYCCL_INVITE", wrong)
        with pytest.raises(UsageError) as caught:
            parse_master(None)
        assert secret[:20] not in str(caught.value)
    for last in {*string.ascii_letters, *string.digits, *"-_+/=", secret[-1] + "="} - {secret[-1]}:
        with contextlib.suppress(UsageError):  # else another token: also where it differs in bits that mean nothing
            assert parse_master(text[:-1] + last).ticket != ticket
    monkeypatch.setenv("PYCCL_INVITE", "127.0.0.1:1")
    with pytest.raises(UsageError, match="holds no invite"):
        parse_master(None)
    monkeypatch.delenv("PYCCL_INVITE")
    with pytest.raises(UsageError, match="which master"):
        parse_master(None)


FORMS: dict[str, Callable[[str], object]] = {
    "as it is": str,
    "as bytes": str.encode,
    "in a list": lambda text: [text],
    "without its scheme": lambda text: text.removeprefix(SCHEME),
}
ARGUMENTS = ("address", "listen", "advertise", "relay", "group")
MISPLACED = [(a, form) for a in ARGUMENTS for form in FORMS if (a, form) != ("address", "as it is")]


@pytest.mark.parametrize(("argument", "form"), MISPLACED)
def test_an_invite_in_the_wrong_place_is_not_repeated(argument: str, form: str) -> None:
    wrong: Any = FORMS[form](invite_text("h:1", Ticket(MASTER.public, token())))
    with pytest.raises(UsageError) as caught:
        Communicator(**{"address": "127.0.0.1:1", argument: wrong})
    assert base64.urlsafe_b64encode(MASTER.public)[:20].decode() not in str(caught.value)
