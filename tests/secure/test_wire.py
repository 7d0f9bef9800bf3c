"""A whole run in one program, and somebody who holds all its lines: what he reads there, and what he can do."""

from __future__ import annotations

import base64
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from at_once import both
from wiretap import (
    DATA,
    FOLLOWED,
    GREETING,
    HOST,
    KINDS,
    MASTER,
    OTHER,
    PUNCHED,
    RELAYED,
    SEALED,
    TLS,
    Units,
    Wire,
)

import pyccl
from pyccl._io import links, observer, statestream
from pyccl._io.address import credentials_for, invite_text, parse_master
from pyccl._io.identity import Identity
from pyccl._io.master_server import MasterServer
from pyccl._io.observer import Observer, ObserverConfig
from pyccl._io.sealed import SealedStream
from pyccl._io.statestore import StateStore
from pyccl._io.tls import Ticket
from pyccl._proto.invites import Invite, seal
from pyccl._proto.past import Past

RUN = b"R" * 16
HANG_S = 60.0
TENSOR, STATE = b"SECRET-OF-TENSOR", b"SECRET-OF-STATE!"


class Background:
    """Trio in a thread."""

    def __init__(self, main: Callable[..., Any], *args: object) -> None:
        self._scope = trio.CancelScope()
        self._token: trio.lowlevel.TrioToken | None = None
        self._begun = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._run, main, *args))
        self._thread.start()
        assert self._begun.wait(HANG_S)

    async def _run(self, main: Callable[..., Any], *args: object) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with self._scope:
            self._begun.set()
            await main(*args)

    def end(self) -> None:
        assert self._token is not None
        self._token.run_sync_soon(self._scope.cancel)
        self._thread.join(HANG_S)
        assert not self._thread.is_alive()


class Run:
    """A master with this identity, or a plain one; where peers find it."""

    def __init__(self, identity: Identity | None) -> None:
        listening = socket.create_server((HOST, 0))
        self.address = f"{HOST}:{listening.getsockname()[1]}"
        self.token = b""
        if identity is not None:
            self.token = seal(identity.run_key(), Invite(RUN, b"12345678", 1 << 40, 0, None, ""))
            self.address = invite_text(self.address, Ticket(identity.public, self.token))

        async def serve() -> None:
            server = MasterServer(Past(RUN, 1 << 32), None, 5.0, "test", needs_majority=True, identity=identity)
            await server.serve(trio.SocketListener(trio.socket.from_stdlib_socket(listening)))

        self._serving = Background(serve)

    def end(self) -> None:
        self._serving.end()


@pytest.fixture
def wire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    monkeypatch.setenv("PYCCL_IDENTITY", str(tmp_path / "ours.pem"))
    held = Wire(monkeypatch)
    yield held
    held.close()


@pytest.fixture
def secure(wire: Wire) -> Iterator[Run]:
    run = Run(Identity.new())
    yield run
    run.end()


def joined(address: str, *members: pyccl.Communicator, **options: Any) -> pyccl.Communicator:
    """One more, let in by these at a safe point."""
    comm = pyccl.Communicator(address, **options)
    if not members:
        comm.connect()
        return comm
    joining = threading.Thread(target=comm.connect, daemon=True)
    joining.start()
    until(lambda: members[0]._pending_known or not joining.is_alive())
    both(*(member.update_topology for member in members))
    joining.join(HANG_S)
    assert not joining.is_alive() and comm.epoch == members[0].epoch
    return comm


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + HANG_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def pattern(of: bytes, count: int = 200_000) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.frombuffer(of * (count // len(of)), np.uint8).copy()


def a_run(address: str, directory: Path) -> None:
    """Everything that travels in a run: tensors, measurements, state between members and to and from an observer."""
    where = parse_master(address)
    told: list[str] = []
    config = ObserverConfig(where.host, where.port, 0, 1, "test", credentials_for(where))
    store = StateStore(directory, 3)
    a = joined(address)
    b = joined(address, a)
    x, y = pattern(TENSOR), pattern(TENSOR)
    both(lambda: a.all_reduce(x, op="max"), lambda: b.all_reduce(y, op="max"))
    assert x.tobytes() == y.tobytes() == pattern(TENSOR).tobytes()
    both(a.optimize_topology, b.optimize_topology)
    states = [pyccl.SharedState({"w": pattern(STATE)}, 7), pyccl.SharedState({"w": pattern(b"\1" * 16)}, 0)]
    _, there = both(lambda: a.sync_shared_state(states[0]), lambda: b.sync_shared_state(states[1]))
    assert there.changed == ("w",) and there.rx_bytes > 0
    observing = Background(Observer(config, store, told.append).run)
    while not any(line.startswith("kept revision") for line in told):
        for state in states:
            state.revision += 1
        both(lambda: a.sync_shared_state(states[0]), lambda: b.sync_shared_state(states[1]))
    a.close()
    b.close()
    c = joined(address)
    until(lambda: c._is_watched)
    back = pyccl.SharedState({"w": pattern(b"\1" * 16)}, 0)
    c.sync_shared_state(back)  # nobody else holds it: from the observer
    assert back.revision > 7 and back.arrays["w"].tobytes() == pattern(STATE).tobytes()
    c.close()
    observing.end()
    store.close()


def test_who_keeps_all_that_a_secure_run_sends_reads_nothing_of_it(
    wire: Wire, secure: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    a_run(secure.address, tmp_path / "states")
    seen = wire.captured()
    assert len(seen) > 1_000_000 and {GREETING, TLS, SEALED} <= wire.kinds and OTHER not in wire.kinds
    private = Identity.load()._key.private_bytes_raw()
    for secret in (TENSOR, STATE, secure.token, secure.token[-32:], private, bytes(64), b"safetensors", b"revision"):
        assert secret not in seen, secret
    shown = caplog.text
    assert caplog.records
    word = secure.address.rpartition("/")[2]
    for form in (word, secure.token.hex(), private.hex(), base64.b64encode(private).decode()):
        assert form[-30:] not in shown


def test_who_keeps_what_a_plain_run_sends_reads_all_of_it(wire: Wire, tmp_path: Path) -> None:
    """That the other test would find it."""
    run = Run(None)
    wire.splits = False
    a_run(run.address, tmp_path / "states")
    run.end()
    seen = wire.captured()
    for plain in (TENSOR, STATE, bytes(64), b"revision"):
        assert plain in seen, plain


class Pair:
    """Two members. What they do over the lines is checked."""

    def __init__(self, address: str, **options: Any) -> None:
        self._address, self._options = address, options
        self.a = joined(address, **options)
        self.b = joined(address, self.a, **options)
        self._revision = 0

    def close(self) -> None:
        self.a.close()
        self.b.close()

    def reduce(self) -> None:
        x, y = np.arange(300_000, dtype=np.float32), np.ones(300_000, np.float32)
        both(lambda: self.a.all_reduce(x), lambda: self.b.all_reduce(y))
        assert (x == np.arange(1, 300_001)).all() and (y == x).all()

    def sync(self) -> None:
        """What one of them has goes to the other."""
        self._revision += 1
        states = [state_of(self._revision), state_of(0)]
        both(*(lambda c=c, s=s: c.sync_shared_state(s) for c, s in zip((self.a, self.b), states, strict=True)))
        assert [state.digest() for state in states] == [state_of(self._revision).digest()] * 2

    def advance(self) -> None:
        """Both have the same next state; who follows gets it from one of them."""
        self._revision += 1
        states = [state_of(self._revision), state_of(self._revision)]
        both(*(lambda c=c, s=s: c.sync_shared_state(s) for c, s in zip((self.a, self.b), states, strict=True)))

    def measure(self) -> None:
        both(self.a.optimize_topology, self.b.optimize_topology)
        self.reduce()


class Watched(Pair):
    """And an observer, which follows one of them; it may relay."""

    def __init__(self, address: str, directory: Path, *, relays: bool = False, **options: Any) -> None:
        where = parse_master(address)
        self.told: list[str] = []
        self._store = StateStore(directory, 3)
        config = ObserverConfig(
            where.host, where.port, 0, 1, "test", credentials_for(where), relay_max=0 if relays else None
        )
        self._observing = Background(Observer(config, self._store, self.told.append).run)
        until(lambda: any(line.startswith("observing") for line in self.told))
        super().__init__(address, **options)

    def advance_until_kept(self) -> None:
        """Another one."""
        before = len(self.told)
        while not any(line.startswith("kept") for line in self.told[before:]):
            self.advance()

    def close(self) -> None:
        super().close()
        self._observing.end()
        for kept in self._store.kept:
            assert pyccl.SharedState.load(kept.path).digest() == state_of(kept.revision).digest()
        self._store.close()


def state_of(revision: int) -> pyccl.SharedState:
    return pyccl.SharedState({"w": pattern(b"%16d" % revision)}, revision)


@dataclass(frozen=True)
class Plane:
    """units: those that are struck. use: what sends such. strikes: on the unit behind so many others, each time when
    all those connections have ended and are made anew; none: on the first that comes by. opens: a ``Pair``."""

    units: Units
    use: Callable[[Any], None] = Pair.reduce
    strikes: Sequence[int] = ()
    opens: Callable[[Wire, str, Path], Pair] = lambda wire, address, directory: Pair(address)


def watched(wire: Wire, address: str, directory: Path) -> Pair:
    return Watched(address, directory)


def relayed(wire: Wire, address: str, directory: Path) -> Pair:
    made = Watched(address, directory, relays=True, relay="only")
    assert [link.path for comm in (made.a, made.b) for link in comm.peers] == ["relayed"] * 2
    return made


def punched(wire: Wire, address: str, directory: Path) -> Pair:
    wire.allow_punching_alone()
    made = Pair(address)
    assert [link.path for comm in (made.a, made.b) for link in comm.peers] == ["punched"] * 2
    return made


PATIENCE = (  # with who greets or is silent; here, where lines are short
    (statestream, "STILL_S", 1.0),
    (statestream, "SILENCE_S", 3.0),
    (statestream, "_KNOWN_S", 3.0),
    (observer, "_GREET_S", 3.0),
    (links, "_GREET_S", 3.0),
)
LARGE = 1000  # no heartbeat
ALL = range(5)  # hello and offer, offer and proof, proof
RELAYS = (0, 12, 14, 18)  # of 6 between each of both and the relay, and ALL between them, twice
PLANES = {
    "tensors": Plane(Units(DATA, SEALED, LARGE)),
    "heartbeats of peers": Plane(Units(DATA, SEALED, most=LARGE)),
    "greetings": Plane(Units(DATA, GREETING), strikes=ALL),
    "states": Plane(Units(DATA, SEALED, LARGE), Pair.sync),
    "measurements": Plane(Units(DATA, SEALED, LARGE), Pair.measure),
    "control": Plane(Units(MASTER, TLS)),
    "pulses": Plane(Units(MASTER, SEALED)),
    "states of observers": Plane(Units(FOLLOWED, SEALED, LARGE), Pair.advance, opens=watched),
    "what observers are told": Plane(Units(FOLLOWED, SEALED, most=LARGE), Pair.advance, opens=watched),
    "greetings of observers": Plane(Units(FOLLOWED, GREETING), Pair.advance, ALL, watched),
    "tensors through a relay": Plane(Units(RELAYED, SEALED, LARGE), opens=relayed),
    "greetings through a relay": Plane(Units(RELAYED, GREETING), Pair.reduce, RELAYS, relayed),
    "tensors, punched": Plane(Units(PUNCHED, SEALED, LARGE), opens=punched),
    "greetings, punched": Plane(Units(PUNCHED, GREETING), Pair.reduce, (0,), punched),
}


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("name", PLANES)
def test_an_attacker_on_the_line_ends_connections_and_nothing_else(
    name: str, how: str, wire: Wire, secure: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, wait, seconds in PATIENCE:
        monkeypatch.setattr(module, wait, seconds)
    plane = PLANES[name]
    pair = plane.opens(wire, secure.address, tmp_path / "states")
    epoch = pair.a.epoch

    def strike(how: str, skipped: int = 0) -> None:
        wire.arm(how, plane.units, skipped)
        if plane.strikes:
            wire.sever(plane.units.purpose)
        used_until(wire.struck)

    def used_until(event: threading.Event) -> None:
        until(lambda: [event.is_set() or plane.use(pair), event.is_set()][1])

    plane.use(pair)
    for skipped in plane.strikes or (0,):
        strike(how, skipped)
        assert wire.struck_line is not None
        used_until(wire.struck_line.over)
    strike("")  # such units go by again
    if plane.use is not Pair.measure:  # which may begin an epoch
        assert pair.a.epoch == pair.b.epoch == epoch  # nobody was lost, nothing was begun anew
    both(pair.a.update_topology, pair.b.update_topology)  # both masters' connections stand, or stand again
    assert pair.a.world_size == pair.b.world_size == 2 and pair.a.epoch == pair.b.epoch
    pair.reduce()
    pair.close()


def test_who_follows_is_given_new_keys_in_each_epoch(
    secure: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renewed, renew = [], SealedStream.renew

    def counted(stream: SealedStream, shared: bytes, said: bytes) -> None:
        renewed.append(said)
        renew(stream, shared, said)

    monkeypatch.setattr(SealedStream, "renew", counted)
    pair = Watched(secure.address, tmp_path / "states")
    pair.advance_until_kept()
    for _ in range(2):
        before = set(renewed)
        newcomer = joined(secure.address, pair.a, pair.b)
        until(lambda before=before: any(renewed.count(said) == 2 for said in set(renewed) - before))  # by both sides
        newcomer.close()
        both(pair.a.update_topology, pair.b.update_topology)
        pair.advance_until_kept()
    pair.close()
