"""What a sender of garbage sends: noise, lengths that lie, messages with a wrong end. From a seed.

It goes to the master's port and to the data ports that the master's status names, on a connection for each shot. Every
one of them must be cut off by the other side; those that were not are told.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Final

import trio

from pyccl import errors
from pyccl._io import envelope
from pyccl._io.address import parse_address
from pyccl._io.ask import ask_status
from pyccl._proto import limits
from pyccl._proto.messages import Hello, PeerHello

SHOTS_PER_PORT: Final = 12
HOSTILE_GROUPS: Final = range(70_000, 70_100)  # of peers that are let in: never the group of the run
STATUS_S: Final = 2.0
POLL_S: Final = 0.25


def _ids(rng: random.Random) -> tuple[bytes, bytes, bytes, bytes]:
    return rng.randbytes(16), rng.randbytes(16), rng.randbytes(16), rng.randbytes(16)


def shot(rng: random.Random, run: bytes) -> bytes:
    """One connection's bytes. `run`: its id, which whoever asks for the status knows."""
    hello = envelope.pack(
        Hello(limits.PROTOCOL_VERSION, "garbage", rng.choice(HOSTILE_GROUPS), rng.randbytes(16), rng.randbytes(16))
    )
    greeting = envelope.pack(PeerHello(limits.PROTOCOL_VERSION, run, *_ids(rng)))
    noise = rng.randbytes(rng.randint(1, 4000))
    spoilt = bytearray(rng.choice([hello, greeting]))
    spoilt[rng.randrange(4, len(spoilt))] ^= 1 << rng.randrange(8)
    kinds = [
        b"\xff" + noise,  # a length above every limit
        struct.pack(">I", len(noise)) + noise,
        bytes(spoilt) + b"\xff\xff\xff\xff",
        hello + b"\xff" + noise,
        greeting + noise,
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    ]
    return rng.choice(kinds)


class Sender:
    """Fires from a thread of its own, so that nobody waits for it."""

    def __init__(self, master: str, seed: int, enter_network: Callable[[], None]) -> None:
        self._master, self._rng, self._enter_network = master, random.Random(seed), enter_network
        self._stopping = threading.Event()
        self._error: BaseException | None = None
        self.sent = 0
        self.ports = 0
        self.not_cut_off: list[str] = []
        self._thread = threading.Thread(target=self._main, daemon=True, name="garbage")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> bool:
        """True: it has ended; raises what it met. False: it will soon."""
        self._stopping.set()
        if self._thread.is_alive():
            return False
        if self._error is not None:
            raise self._error
        return True

    def _main(self) -> None:
        try:
            self._enter_network()
            self._fire()
        except BaseException as error:  # noqa: BLE001  it is raised where stop() is called
            self._error = error

    def _ask(self) -> tuple[bytes, list[str]]:
        """The run's id and the peers' addresses; a master that is stopped or gone tells nothing."""

        async def ask() -> dict[str, object]:
            with trio.fail_after(STATUS_S):
                return await ask_status(*parse_address(self._master))

        try:
            told = trio.run(ask)
        except (trio.TooSlowError, errors.MasterUnavailableError):
            return self._rng.randbytes(16), []
        return bytes.fromhex(str(told["run"])), _addresses(told)

    def _fire(self) -> None:
        run, peers = self._ask()
        addresses = [self._master, *peers]
        self.ports = len(addresses)
        shots = [(address, shot(self._rng, run)) for address in addresses * SHOTS_PER_PORT]
        self._rng.shuffle(shots)
        for address, data in shots:
            if self._stopping.is_set():
                return
            self._send(address, data)

    def _send(self, address: str, data: bytes) -> None:
        self.sent += 1
        try:
            with socket.create_connection(parse_address(address), timeout=POLL_S) as sock:
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)  # after it a message cut short is over as well
                self._await_end(sock, address, data)
        except OSError:
            pass  # refused or reset: a peer that is gone, or it cut us off; or one that is stopped

    def _await_end(self, sock: socket.socket, address: str, data: bytes) -> None:
        until = time.monotonic() + 2 * limits.GREETING_S
        while not self._stopping.is_set():
            try:
                if not sock.recv(1 << 16):
                    return
            except TimeoutError:
                if time.monotonic() > until:
                    self.not_cut_off.append(f"{address}: {data[:40].hex()} ({len(data)} bytes)")
                    return


def _addresses(told: dict[str, object]) -> list[str]:
    try:
        groups = told["groups"]
        assert isinstance(groups, list)
        members = [member for group in groups if group["group"] == 0 for member in group["members"]]
        return [str(member["addresses"][0]) for member in members]
    except (KeyError, TypeError, IndexError) as error:
        raise errors.RemoteProtocolError("the status names no addresses") from error
