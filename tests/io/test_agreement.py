"""Keys between two peers: who gets the same ones, and that nobody else gets any or can pass for a peer."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from pyccl._io import agreement, envelope
from pyccl._io.identity import Identity
from pyccl._io.tls import Credentials, Ticket
from pyccl._native.handles import CIPHER_AES, CIPHER_CHACHA, Keys, cipher_best
from pyccl._proto import limits
from pyccl._proto.messages import PeerHello, PeerOffer, PeerProof, PeerRefused, PeerWelcome
from pyccl.errors import RemoteProtocolError

HANG_S = 20.0
RUN = b"R" * 16
ANN, BOB, EVE = (Credentials(Identity.new(), bytes([n]) * 16, Ticket(bytes(32), b"")) for n in range(3))
HELLO = PeerHello(limits.PROTOCOL_VERSION, RUN, ANN.peer, b"a" * 16, BOB.peer, b"b" * 16)


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        with trio.fail_after(HANG_S):
            await main()

    trio.run(limited)


@dataclass
class Meeting:
    """Ann dials Bob, and somebody holds the line: what becomes of both."""

    dialer: Credentials = ANN
    acceptor: Credentials = BOB
    dialed: Keys | str | None = None
    accepted: Keys | None = None
    said: list[tuple[str, bytes]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    async def hold(self, alter: Callable[[str, int, bytes], bytes] = lambda way, n, data: data) -> Meeting:
        near, middle_near = trio.testing.memory_stream_pair()
        middle_far, far = trio.testing.memory_stream_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._dial, near)
            nursery.start_soon(self._accept, far)
            nursery.start_soon(self._pass, "there", middle_near, middle_far, alter)
            nursery.start_soon(self._pass, "back", middle_far, middle_near, alter)
        return self

    async def _dial(self, stream: trio.abc.Stream) -> None:
        try:
            self.dialed = await agreement.dial(stream, HELLO, BOB.peer, self.dialer)
        except RemoteProtocolError as e:
            self.errors.append(f"dialer: {e}")
        await stream.aclose()

    async def _accept(self, stream: trio.abc.Stream) -> None:
        try:
            hello = await envelope.receive(stream)
            assert isinstance(hello, PeerHello)
            self.accepted = await agreement.accept(stream, hello, ANN.peer, self.acceptor)
        except RemoteProtocolError as e:
            self.errors.append(f"acceptor: {e}")
        await stream.aclose()

    async def _pass(
        self, way: str, source: trio.abc.Stream, sink: trio.abc.Stream, alter: Callable[[str, int, bytes], bytes]
    ) -> None:
        number = 0
        with contextlib.suppress(RemoteProtocolError, trio.BrokenResourceError, trio.ClosedResourceError):
            while (message := await envelope.receive(source)) is not None:
                data = alter(way, number, envelope.pack(message))
                number += 1
                self.said.append((way, data))
                await sink.send_all(data)
        await sink.aclose()


def test_both_get_the_same_secrets_each_its_own_way_round_and_others_each_time() -> None:
    async def main() -> None:
        one, two = await Meeting().hold(), await Meeting().hold()
        for met in (one, two):
            assert isinstance(met.dialed, Keys) and met.accepted is not None and not met.errors
            assert (met.dialed.tx, met.dialed.rx) == (met.accepted.rx, met.accepted.tx)
            assert met.dialed.cipher == met.accepted.cipher == cipher_best()
            assert met.dialed.dialed and not met.accepted.dialed
        secrets = {secret for met in (one, two) if met.accepted for secret in (met.accepted.tx, met.accepted.rx)}
        assert len(secrets) == 4 and all(len(secret) == 32 for secret in secrets)
        line = b"".join(data for _, data in one.said)
        assert not any(secret in line for secret in secrets)
        assert repr(one.accepted) == f"Keys(cipher={cipher_best()}, dialed=False)"

    run(main)


@pytest.mark.parametrize("who", ["dialer", "acceptor"])
def test_who_has_another_identity_is_not_taken_for_the_peer(who: str) -> None:
    async def main() -> None:
        met = await Meeting(**{who: EVE}).hold()
        assert met.accepted is None
        assert any("does not prove" in error for error in met.errors)
        if who == "acceptor":
            assert not isinstance(met.dialed, Keys)

    run(main)


@pytest.mark.parametrize("victim", [("there", 0), ("there", 1), ("there", 2), ("back", 0), ("back", 1)])
def test_whatever_is_altered_on_the_way_nobody_gets_keys_that_somebody_else_made(victim: tuple[str, int]) -> None:
    async def main() -> None:
        way, number = victim
        for at in range(1, 36, 3):

            def flip(w: str, n: int, data: bytes, at: int = at) -> bytes:
                if (w, n) != (way, number):
                    return data
                return data[:-at] + bytes([data[-at] ^ 1]) + data[len(data) - at + 1 :]

            met = await Meeting().hold(flip)
            assert met.accepted is None, at
            assert not isinstance(met.dialed, Keys) or victim == ("there", 2), at

    run(main)


def test_a_dial_that_is_replayed_gets_nowhere() -> None:
    async def main() -> None:
        old = await Meeting().hold()
        replayed = b"".join(data for way, data in old.said if way == "there")
        near, far = trio.testing.memory_stream_pair()
        await near.send_all(replayed)
        hello = await envelope.receive(far)
        assert isinstance(hello, PeerHello)
        with pytest.raises(RemoteProtocolError, match="does not prove"):
            await agreement.accept(far, hello, ANN.peer, BOB)

    run(main)


def test_what_wants_no_encryption_is_refused_and_a_refusal_is_told() -> None:
    async def main() -> None:
        near, far = trio.testing.memory_stream_pair()
        await far.send_all(envelope.pack(PeerWelcome(limits.PROTOCOL_VERSION)))
        with pytest.raises(RemoteProtocolError, match="wants no encryption"):
            await agreement.dial(near, HELLO, BOB.peer, ANN)
        near, far = trio.testing.memory_stream_pair()
        await near.send_all(envelope.pack(PeerProof(ANN.identity.public, ANN.salt, bytes(64))))
        with pytest.raises(RemoteProtocolError, match="wants no encryption"):
            await agreement.accept(far, HELLO, ANN.peer, BOB)
        near, far = trio.testing.memory_stream_pair()
        await far.send_all(envelope.pack(PeerRefused("full")))
        assert await agreement.dial(near, HELLO, BOB.peer, ANN) == "full"

    run(main)


def test_a_key_of_small_order_is_no_key() -> None:
    async def main() -> None:
        near, far = trio.testing.memory_stream_pair()
        await near.send_all(envelope.pack(PeerOffer(bytes(32), CIPHER_AES)))
        with pytest.raises(RemoteProtocolError, match="is no key"):
            await agreement.accept(far, HELLO, ANN.peer, BOB)

    run(main)


def test_aes_is_taken_where_it_is_faster_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        for first, second, taken in (
            (CIPHER_AES, CIPHER_AES, CIPHER_AES),
            (CIPHER_AES, CIPHER_CHACHA, CIPHER_CHACHA),
            (CIPHER_CHACHA, CIPHER_CHACHA, CIPHER_CHACHA),
        ):
            best = iter((first, second))
            monkeypatch.setattr(agreement, "cipher_best", lambda best=best: next(best))
            met = await Meeting().hold()
            assert met.accepted is not None and met.accepted.cipher == taken

    run(main)
