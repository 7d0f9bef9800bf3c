"""A whole run in one program, and somebody who holds all its lines: what he reads there, and what he can do."""

from __future__ import annotations

import base64
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from at_once import both
from wiretap import GREETING, HOST, KINDS, OTHER, SEALED, TLS, Wire

import pyccl
from pyccl._io.address import credentials_for, invite_text, parse_master
from pyccl._io.identity import Identity
from pyccl._io.master_server import MasterServer
from pyccl._io.observer import Observer, ObserverConfig
from pyccl._io.statestore import StateStore
from pyccl._io.tls import Ticket
from pyccl._proto.invites import Invite, seal
from pyccl._proto.past import Past

RUN = b"R" * 16
HANG_S = 120.0
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


def joined(address: str, *members: pyccl.Communicator) -> pyccl.Communicator:
    """One more, let in by these at a safe point."""
    comm = pyccl.Communicator(address)
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


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("plane", [SEALED, TLS])
def test_an_attacker_on_the_line_ends_connections_and_nothing_else(
    wire: Wire, secure: Run, plane: str, how: str
) -> None:
    a = joined(secure.address)
    b = joined(secure.address, a)
    epoch = a.epoch

    def round_(number: int) -> None:
        x, y = np.full(300_000, number, np.float32), np.full(300_000, 2 * number, np.float32)
        both(lambda: a.all_reduce(x), lambda: b.all_reduce(y))
        assert (x == 3 * number).all() and (y == x).all()

    round_(1)
    wire.arm(how, plane)
    for number in range(2, 10_000):
        if wire.struck.is_set():
            break
        round_(number)
    assert wire.struck.is_set()
    for number in range(3):
        round_(number)
    assert a.epoch == b.epoch == epoch  # nobody was lost, nothing was begun anew
    both(a.update_topology, b.update_topology)  # both masters' connections stand, or stand again
    assert a.world_size == b.world_size == 2 and a.epoch == b.epoch
    round_(5)
    a.close()
    b.close()
