"""A master and its peers as processes on loopback, for tests: start, command, kill, stop, and always reap.

    with Cluster(zygote, seed) as cluster:
        a, b, c = cluster.members(3)
        cluster.reduce([a, b, c], count=1000, op="avg")     # checked against the oracle

Calls are sent to all peers first and awaited afterwards, so that collectives meet. Nothing sleeps: every wait is for
an answer, an event or the end of a process, and DEADLINE_S only guards against a hang.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

import trio
from oracle import draw, sha
from zygote import DEADLINE_S, Zygote

import pyccl
from pyccl._io.address import parse_address
from pyccl._io.ask import ask_status

PEER_TIMEOUT_S: Final = 2.0
LISTENING: Final = "listening on "
_TAIL_LINES: Final = 80


class DiedError(AssertionError):
    """The process ended before it answered."""


class Process:
    """One child. Its stderr goes to a file, of which the end is shown when a test fails."""

    def __init__(self, zygote: Zygote, name: str, arguments: list[str]) -> None:
        self.name = name
        self._stderr: IO[str] = tempfile.TemporaryFile(  # noqa: SIM115  end() closes it
            "w+", encoding="utf-8", errors="replace"
        )
        stdin, self._stdin = os.pipe()
        self._stdout, stdout = os.pipe()
        self._child = zygote.fork(arguments, stdin, stdout, self._stderr.fileno())
        os.close(stdin)
        os.close(stdout)
        self._line_rest = b""

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def code(self) -> int | None:
        """Exit status, or minus the signal; None while it runs."""
        return self._child.code

    def signal(self, number: int) -> None:
        assert self.code is None, f"{self.name} has ended already: {self.code}"
        self._child.send(number)

    def stop(self) -> None:
        """SIGSTOP, and until it stands."""
        self.signal(signal.SIGSTOP)
        until = time.monotonic() + DEADLINE_S
        while (state := Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]) != "T":
            assert time.monotonic() < until, f"{self.name} is {state}, not stopped"
            time.sleep(0.001)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()

    def wait(self, timeout: float = DEADLINE_S) -> int:
        return self._child.wait(timeout)

    def write_line(self, line: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended; whoever waits for an answer is told
            os.write(self._stdin, line + b"\n")

    def read_line(self) -> bytes:
        """The next whole line; b"" at the end."""
        while b"\n" not in self._line_rest:
            part = os.read(self._stdout, 1 << 16)
            if not part:
                return b""
            self._line_rest += part
        line, _, self._line_rest = self._line_rest.partition(b"\n")
        return line

    def log(self) -> list[str]:
        """Opened anew: the child writes where this descriptor of ours stands."""
        with open(f"/proc/self/fd/{self._stderr.fileno()}", encoding="utf-8", errors="replace") as text:
            return text.readlines()

    def wait_log(self, text: str) -> None:
        """Until a line of the log has it."""
        until = time.monotonic() + DEADLINE_S
        while not any(text in line for line in self.log()):
            assert time.monotonic() < until, f"{self.name} never logged {text!r}"
            time.sleep(0.01)

    def doom(self) -> None:
        """SIGKILL, whatever state it is in."""
        with contextlib.suppress(ProcessLookupError):
            self._child.send(signal.SIGKILL)

    def end(self) -> None:
        """After doom: reap it and close everything."""
        self.wait()
        self._child.close()
        os.close(self._stdin)
        os.close(self._stdout)
        self._stderr.close()


class Call:
    """A command on its way."""

    def __init__(self, peer: Peer, do: str) -> None:
        self.peer, self.do = peer, do
        self._answered = threading.Event()
        self._answer: dict[str, Any] | None = None

    def fulfil(self, answer: dict[str, Any] | None) -> None:
        """None: the process ended."""
        self._answer = answer
        self._answered.set()

    def answer(self, timeout: float = DEADLINE_S) -> dict[str, Any]:
        """The whole answer line."""
        assert self._answered.wait(timeout), f"{self.peer.name}: no answer to {self.do} within {timeout:g} s"
        if self._answer is None:
            raise DiedError(f"{self.peer.name} ended while it was in {self.do}")
        return self._answer

    @property
    def pending(self) -> bool:
        return not self._answered.is_set()

    def value(self, timeout: float = DEADLINE_S) -> Any:
        answer = self.answer(timeout)
        assert "error" not in answer, f"{self.peer.name}: {self.do} raised {answer['error']}"
        return answer["value"]

    def error(self, *classes: str, timeout: float = DEADLINE_S) -> dict[str, Any]:
        """The error it must have ended with, one of `classes`."""
        answer = self.answer(timeout)
        assert "error" in answer, f"{self.peer.name}: {self.do} did not fail but returned {answer['value']}"
        error: dict[str, Any] = answer["error"]
        assert error["class"] in classes, f"{self.peer.name}: {self.do} raised {error}, not {' or '.join(classes)}"
        return error

    def died(self) -> None:
        """The process must have ended instead."""
        assert self._answered.wait(DEADLINE_S), f"{self.peer.name} still lives and is in {self.do}"
        assert self._answer is None, f"{self.peer.name} lived to answer {self.do}: {self._answer}"


class Peer(Process):
    """An agent process. ``call`` and go on, or ``ask`` and wait."""

    def __init__(self, zygote: Zygote, index: int) -> None:
        super().__init__(zygote, f"peer {index}", ["agent"])
        self.index = index
        self.id = ""
        self._calls: dict[int, Call] = {}
        self._last = 0
        self._events: list[dict[str, Any]] = []
        self._ended = False
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def call(self, do: str, **arguments: Any) -> Call:
        call = Call(self, do)
        with self._changed:
            self._last += 1
            number = self._last
            self._calls[number] = call
            if self._ended:
                call.fulfil(None)
        self.write_line(json.dumps({"id": number, "do": do, **arguments}).encode())
        return call

    def ask(self, do: str, **arguments: Any) -> Any:
        return self.call(do, **arguments).value()

    def wait_event(self, event: str, **fields: Any) -> None:
        """Until the agent has told of it; each event is taken once."""
        wanted = {"event": event, **fields}

        def found() -> bool:
            return self._ended or any(wanted.items() <= seen.items() for seen in self._events)

        with self._changed:
            assert self._changed.wait_for(found, DEADLINE_S), f"{self.name} never told of {wanted}"
            for seen in self._events:
                if wanted.items() <= seen.items():
                    self._events.remove(seen)
                    return
        raise DiedError(f"{self.name} ended before it told of {wanted}")

    def _read(self) -> None:
        while line := self.read_line():
            self._take(json.loads(line))
        with self._changed:
            self._ended = True
            self._changed.notify_all()
            open_calls, self._calls = self._calls, {}
        for call in open_calls.values():
            call.fulfil(None)

    def _take(self, line: dict[str, Any]) -> None:
        with self._changed:
            if "event" in line:
                self._events.append(line)
                self._changed.notify_all()
                return
            call = self._calls.pop(line["id"])
        call.fulfil(line)

    def end(self) -> None:
        self._reader.join()
        super().end()


class Master(Process):
    def __init__(self, zygote: Zygote, peer_timeout: float, *journal: str, listen: str = "127.0.0.1:0") -> None:
        options = ["--listen", listen, "--peer-timeout", str(peer_timeout), *journal]
        super().__init__(zygote, "master", ["master", *options])
        self.address = ""

    def listening(self) -> str:
        line = self.read_line().decode()
        assert line.startswith(LISTENING), f"the master said {line!r}"
        self.address = line.removeprefix(LISTENING).strip()
        return self.address

    def hook(self, phase: str, when: str = "before", action: str = "kill", nth: int = 1) -> None:
        """See hooks.py."""
        self._set(phase=phase, when=when, action=action, nth=nth)

    def plan_next(self, shares: Sequence[int] = (), ring: Sequence[int] = (), ring_from_bytes: int = 0) -> None:
        """For the next safe point of group 0, made for those who are its members then."""
        self._set(plan={"shares": shares, "ring": ring, "ring_from_bytes": ring_from_bytes})

    def file_bytes_max(self, most: int | None) -> None:
        """No file grows beyond it."""
        self._set(file_bytes_max=most)

    def _set(self, **wanted: Any) -> None:
        self.write_line(json.dumps(wanted).encode())
        assert self.read_line() == b"done"

    def status(self) -> dict[str, Any]:
        host, port = parse_address(self.address)
        return trio.run(ask_status, host, port)

    def wait_status(self, found: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        until = time.monotonic() + DEADLINE_S
        while not found(told := self.status()):
            assert time.monotonic() < until, told
            time.sleep(0.01)
        return told


@dataclass
class Cluster:
    """Owner of all processes of one test."""

    zygote: Zygote
    seed: int
    peer_timeout: float = PEER_TIMEOUT_S
    journaled: bool = True
    settings: dict[str, Any] = field(default_factory=dict)  # of every communicator: see Agent.do_make
    processes: list[Process] = field(default_factory=list)
    peers: list[Peer] = field(default_factory=list)
    master: Master = field(init=False)
    journal: Path = field(init=False)

    def __enter__(self) -> Self:
        self.rng = random.Random(self.seed)
        self._state = tempfile.TemporaryDirectory()
        self.journal = Path(self._state.name) / "master.journal"
        try:
            options = ("--journal", str(self.journal)) if self.journaled else ("--no-journal",)
            self.master = Master(self.zygote, self.peer_timeout, *options)
            self.processes.append(self.master)
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Kill and reap everything; show what it logged, which pytest prints if the test failed."""
        for process in self.processes:
            process.doom()
        crashed = []
        for process in self.processes:
            process.wait()
            log = process.log()
            sys.stdout.write(f"---- {process.name}, pid {process.pid}\n" + "".join(log[-_TAIL_LINES:]))
            crashed += [process.name for line in log if line.startswith("Traceback") or "session_failed" in line]
            process.end()
        self._state.cleanup()
        assert not crashed, f"an exception that nobody caught in {', '.join(crashed)}: see the logs"

    def restart_master(self, *options: str) -> None:
        """A new process in the place of one that is dead. options: of the journal, where they are others now."""
        assert self.master.code is not None
        options = options or (("--journal", str(self.journal)) if self.journaled else ("--no-journal",))
        self.master = Master(self.zygote, self.peer_timeout, *options, listen=self.master.address)
        self.processes.append(self.master)
        self.master.listening()

    # ---- peers

    def spawn(self, count: int) -> list[Peer]:
        """Agents that have no communicator yet."""
        new = []
        for _ in range(count):
            peer = Peer(self.zygote, len(self.peers))
            self.peers.append(peer)
            self.processes.append(peer)
            new.append(peer)
        for peer in new:
            peer.wait_event("ready")
        if not self.master.address:
            self.master.listening()
        return new

    def make(self, peers: Iterable[Peer], **settings: Any) -> None:
        """Give each a communicator with an id drawn from the seed."""
        calls = []
        for peer in peers:
            peer.id = self.rng.randbytes(16).hex()
            arguments = {"address": self.master.address, "index": peer.index, "peer": peer.id}
            calls.append(peer.call("make", **{**arguments, **self.settings, **settings}))
        for call in calls:
            call.value()

    def members(self, count: int, **settings: Any) -> list[Peer]:
        """So many new members of one group: the first founds it, the others come in at one safe point."""
        peers = self.spawn(count)
        self.make(peers, **settings)
        first, *others = peers
        first.ask("connect")
        self.admit([first], others)
        return peers

    def admit(self, members: Sequence[Peer], newcomers: Sequence[Peer]) -> None:
        """Newcomers connect; when the master knows them all the members stand at one safe point."""
        if not newcomers:
            return
        joins = [peer.call("connect") for peer in newcomers]
        members[0].ask("wait_pending", count=len(newcomers))
        safe_points = [peer.call("update_topology") for peer in members]
        for call in [*joins, *safe_points]:
            call.value()
        self.agree([*members, *newcomers])

    def agree(self, peers: Sequence[Peer]) -> None:
        """All of them name exactly them as members."""
        expected = sorted(peer.id for peer in peers)
        for peer in peers:
            assert peer.ask("members") == expected, peer.name

    # ---- collectives, checked

    def inputs(self, ids: Iterable[str]) -> list[int]:
        """The indices of these members, in rank order."""
        index = {peer.id: peer.index for peer in self.peers if peer.id}
        return [index[peer] for peer in ids]

    def check(self, values: Sequence[dict[str, Any]], seed: int, count: int, **spec: Any) -> dict[str, Any]:
        """Results of one all-reduce: the same info on all, and the bits of the oracle for the members named.

        spec: of the call; ring, shares: of the plan.
        """
        infos = [{k: value["info"][k] for k in ("members", "epoch", "world_size", "algorithm")} for value in values]
        assert all(info == infos[0] for info in infos), infos
        members = infos[0]["members"]
        assert members == sorted(members) and infos[0]["world_size"] == len(members)
        dtype, kind = spec.get("dtype", "float32"), spec.get("kind", "plain")
        inputs = [draw(seed, index, count, dtype, kind) for index in self.inputs(members)]
        known = {key: spec[key] for key in ("op", "quantize", "quantize_block", "ring", "shares") if key in spec}
        expected = sha(pyccl.reference_all_reduce(inputs, algorithm=infos[0]["algorithm"], **known))
        for value in values:
            assert value["sha"] == expected, f"seed {self.seed}: other bits than the oracle's, {spec} count={count}"
            assert value["kept"], f"seed {self.seed}: the input was changed although there was an out"
        return infos[0]

    def reduce(self, peers: Sequence[Peer], count: int = 1000, **spec: Any) -> dict[str, Any]:
        """One all-reduce of all of them, checked; returns the common info."""
        seed = self.rng.getrandbits(32)
        wanted = {name: value for name, value in spec.items() if name not in ("ring", "shares")}
        calls = [peer.call("all_reduce", seed=seed, count=count, **wanted) for peer in peers]
        info = self.check([call.value() for call in calls], seed, count, **spec)
        assert info["members"] == sorted(peer.id for peer in peers)
        return info

    def check_loops(self, records: dict[Peer, list[dict[str, Any]]], seed: int, count: int = 1000) -> None:
        """Loops (Agent.do_loop) of several peers: what was reduced together has the same bits, those of the oracle.

        The n-th reduce of an epoch on one member is the n-th of that epoch on every other.
        """
        places: dict[tuple[int, int], dict[str, tuple[int, dict[str, Any]]]] = {}
        for peer, steps in records.items():
            within: dict[int, int] = {}
            for step, record in enumerate(steps):
                place = record["epoch"], within.setdefault(record["epoch"], 0)
                within[record["epoch"]] += 1
                places.setdefault(place, {})[peer.id] = step, record
        assert places, "nothing was reduced"
        for place, seen in places.items():
            told = [record for _, record in seen.values()]
            assert all(t["members"] == told[0]["members"] and t["sha"] == told[0]["sha"] for t in told), place
            if set(seen) != set(told[0]["members"]):
                continue  # somebody who took part did not live to tell
            ids = told[0]["members"]
            steps_of = [seen[id_][0] for id_ in ids]
            inputs = [draw(seed + s, i, count, "int64") for s, i in zip(steps_of, self.inputs(ids), strict=True)]
            assert told[0]["sha"] == sha(pyccl.reference_all_reduce(inputs)[2:]), f"seed {self.seed}: {place}"
