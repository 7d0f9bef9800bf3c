"""A peer under test: JSON commands on stdin, one JSON line on stdout for each answer and event.

    {"id": 3, "do": "all_reduce", "seed": 7, "count": 100}  ->  {"id": 3, "value": {...}}  or  {"id": 3, "error": {...}}

Commands run one after the other in the main thread, or with "thread": NAME in a thread of that name, so that two can
be blocked at a time and Ctrl-C has a main thread to go to. When stdin ends, so does the process, at once.
"agent.py --zygote FD" forks peers and masters on request: see zygote.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import json
import logging
import math
import os
import posix
import queue
import resource
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import ml_dtypes
import numpy as np
from cases import run_cases
from hooks import Hook, install, serve_master_traps
from oracle import draw, sha
from zygote import serve

import pyccl
from pyccl import communicator
from pyccl._io import front, links, packer, session, staging, statestream, statesync
from pyccl._native import handles
from pyccl._native._pyccl import ffi, lib
from pyccl._proto import limits, packing
from pyccl._proto.epoch import Address, Member
from pyccl.cli import master, peer
from pyccl.cli.log import without_traceback

DEADLINE_S = 60.0
Command = dict[str, Any]


def error_of(error: BaseException) -> dict[str, Any]:
    """An exception as JSON, with the fields that pyccl promises."""
    told = {"class": type(error).__name__, "text": str(error), "pyccl": isinstance(error, pyccl.PycclError)}
    for name in ("peer", "peers", "fields"):
        if hasattr(error, name):
            told[name] = getattr(error, name)
    return told


class CommandError(Exception):
    """A command failed; `told` goes with the error into the answer."""

    def __init__(self, error: BaseException, **told: Any) -> None:
        super().__init__(str(error))
        self.error, self.told = error, told


class Agent:
    def __init__(self) -> None:
        self.index = -1
        self.comm: pyccl.Communicator | None = None
        self.address = ""
        self.works: dict[str, tuple[pyccl.Work, Reduce]] = {}
        self.state: pyccl.SharedState | None = None
        self.hooks: dict[str, Hook] = {}
        self.stop_wanted = False
        self.exit_wanted = False
        self.baseline: dict[str, Any] = {}
        self._out = threading.Lock()
        self._main: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._threads: dict[str, queue.SimpleQueue[Command]] = {}

    # ---- the line protocol

    def run(self) -> None:
        threading.Thread(target=self._read, name="agent-stdin", daemon=True).start()
        self.say(event="ready")
        while not self.exit_wanted:
            try:
                command = self._main.get()
            except KeyboardInterrupt:
                self.say(event="interrupted")
                continue
            self._execute(command)

    def say(self, **line: Any) -> None:
        data = json.dumps(line).encode() + b"\n"
        with self._out:
            while data:
                data = data[os.write(1, data) :]

    def _read(self) -> None:
        rest = b""
        while part := os.read(0, 1 << 16):
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                self._dispatch(json.loads(line))
        os._exit(0)

    def _dispatch(self, command: Command) -> None:
        thread = command.pop("thread", None)
        if command["do"] in ("release", "stop_loop"):  # what others wait for must not wait behind them
            self._execute(command)
        elif thread is None:
            self._main.put(command)
        else:
            if thread not in self._threads:
                self._threads[thread] = queue.SimpleQueue()
                threading.Thread(
                    target=self._work, args=(self._threads[thread],), name=f"agent-{thread}", daemon=True
                ).start()
            self._threads[thread].put(command)

    def _work(self, commands: queue.SimpleQueue[Command]) -> None:
        while True:
            self._execute(commands.get())

    def _execute(self, command: Command) -> None:
        number, do = command.pop("id"), command.pop("do")
        started = time.monotonic()
        try:
            handler: Callable[..., Any] = getattr(self, f"do_{do}")
            answer: dict[str, Any] = {"value": handler(**command)}
        except CommandError as e:
            answer = {"error": {**error_of(e.error), **e.told}}
        except BaseException as e:  # noqa: BLE001  also KeyboardInterrupt: it is an answer like others
            answer = {"error": error_of(e)}
        self.say(id=number, took=time.monotonic() - started, view=self.view(), **answer)

    def view(self) -> dict[str, Any]:
        comm = self.comm
        if comm is None:
            return {}
        return {
            "epoch": comm.epoch,
            "members": comm.members,
            "world": comm.world_size,
            "group_world": comm.group_world_size,
        }

    # ---- membership

    def need(self) -> pyccl.Communicator:
        assert self.comm is not None, "no communicator was made"
        return self.comm

    def session(self) -> Any:
        return self.comm._session if self.comm is not None else None

    def do_make(
        self,
        address: str,
        index: int,
        peer: str,
        group: int = 0,
        connections: int | str = "auto",
        max_upload: str | None = None,
        mismatch_grace: float | None = None,
        stall_timeout: float | None = None,
        master_timeout: float | None = None,
        reach_timeout: float | None = None,
    ) -> str:
        """A communicator with a given peer id; times that would make tests long are shortened here."""
        self.baseline = self.resources()
        self.comm = pyccl.Communicator(address, group=group, connections=connections, max_upload=max_upload)
        self.comm._id = bytes.fromhex(peer)
        self.index, self.address = index, address
        given = {
            "mismatch_grace": mismatch_grace,
            "stall_timeout": stall_timeout,
            "master_timeout": master_timeout,
        }
        self.comm._config = replace(self.comm._config, **{k: v for k, v in given.items() if v is not None})
        if reach_timeout is not None:
            communicator.REACH_TIMEOUT_S = reach_timeout  # type: ignore[misc]  of update_topology
        return self.comm.peer_id

    def do_connect(self, timeout: float = DEADLINE_S, reach_timeout: float = 10.0) -> str:
        comm = self.need()
        comm.connect(timeout=timeout, reach_timeout=reach_timeout)
        return comm.peer_id

    def do_update_topology(self, timeout: float = DEADLINE_S) -> None:
        self.need().update_topology(timeout)

    def do_optimize_topology(self, timeout: float = DEADLINE_S) -> None:
        self.need().optimize_topology(timeout)

    def do_links(self) -> dict[str, dict[str, float]]:
        """What was measured of the links to others."""
        return {peer.hex(): asdict(known) for peer, known in self.session().table._known.items()}

    def do_grow(self, world: int) -> None:
        """As a program would: safe points until so many are there."""
        while self.need().group_world_size < world:
            self.need().update_topology(DEADLINE_S)

    def do_wait_pending(self, count: int) -> None:
        """Until the master has told of so many newcomers."""
        until = time.monotonic() + DEADLINE_S
        while self.session().pending < count:
            assert time.monotonic() < until, f"{self.session().pending} of {count} newcomers"
            time.sleep(0.005)

    def do_wait_world(self, world: int) -> None:
        """Until an epoch of so many members was entered."""
        until = time.monotonic() + DEADLINE_S
        while len(self.session().view.members) != world:
            assert time.monotonic() < until, f"{len(self.session().view.members)} members, not {world}"
            time.sleep(0.005)

    def do_wait_blocked(self) -> None:
        """Until a thread here waits for an operation."""
        until = time.monotonic() + DEADLINE_S
        while not self.session().blocked:
            assert time.monotonic() < until, "no thread waits"
            time.sleep(0.005)

    def do_wait_safe_point(self) -> None:
        """Until a thread here stands at the safe point."""
        until = time.monotonic() + DEADLINE_S
        while self.session()._topology is None:
            assert time.monotonic() < until, "no thread is at the safe point"
            time.sleep(0.005)

    def do_wait_watched(self) -> None:
        """Until the control thread has once more judged whether the master is away."""
        session, judged = self.session(), threading.Event()
        watch = session._watch_master

        def watch_and_tell(now: float) -> None:
            watch(now)
            judged.set()

        session._watch_master = watch_and_tell  # type: ignore[method-assign]
        assert judged.wait(DEADLINE_S), "the control thread stands still"
        session._watch_master = watch  # type: ignore[method-assign]

    def do_sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def do_are_peers_pending(self, timeout: float = DEADLINE_S) -> bool:
        return self.need().are_peers_pending(timeout)

    def do_members(self) -> tuple[str, ...]:
        return self.need().members

    def do_close(self) -> None:
        self.need().close()

    def do_exit(self) -> None:
        """The program ends without close()."""
        self.exit_wanted = True

    def do_drop_communicator(self) -> None:
        """The last reference goes, without close()."""
        self.comm = None
        gc.collect()

    def do_wait_gone(self) -> None:
        """Until the threads of a dropped communicator have ended."""
        for thread in threading.enumerate():
            if thread.name.startswith("pyccl"):
                thread.join(DEADLINE_S)

    # ---- what goes wrong with connections

    def connections(self, what: str) -> Iterator[socket.socket]:
        """Copies of all connections to the master, or of all others ("peers")."""
        host, port = self.address.rsplit(":", 1)
        for fd in os.listdir("/proc/self/fd"):
            try:
                copy = os.dup(int(fd))
            except OSError:
                continue
            if not stat.S_ISSOCK(os.fstat(copy).st_mode):
                os.close(copy)
                continue
            with socket.socket(fileno=copy) as sock:
                try:
                    to_master = sock.getpeername() == (host, int(port))
                except OSError:
                    continue  # a listener
                if sock.family == socket.AF_INET and to_master == (what == "master"):
                    yield sock

    def do_cut(self, what: str) -> int:
        """Shut them down, as a router that forgets them would."""
        cut = 0
        for sock in self.connections(what):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
                cut += 1
        return cut

    def do_inject(self, what: str, data: str, forever: bool = False) -> int:
        """Send bytes (hex) over them that the library would not: once, or over each new one until the run is left."""
        seen: set[tuple[Any, Any]] = set()
        while True:
            for sock in self.connections(what):
                with contextlib.suppress(OSError):  # it has ended; or it is full: then with the next round
                    ends = sock.getsockname(), sock.getpeername()
                    if ends not in seen:
                        sock.send(bytes.fromhex(data), socket.MSG_DONTWAIT)
                        seen.add(ends)
            if not forever or self.session().error is not None:
                return len(seen)
            time.sleep(0.005)

    def do_secrets(self) -> dict[str, Any]:
        """What a member knows of the run: see hostile.Secrets."""
        machine = self.session()._machine
        epoch, (address, *_) = machine.epoch, machine.addresses
        return {
            "run": machine.run.hex(),
            "peer": machine.peer.hex(),
            "members": [(m.peer.hex(), m.incarnation.hex()) for m in epoch.members],
            "epoch": epoch.number,
            "epoch_id": epoch.id.hex(),
            "address": f"{address.host}:{address.port}",
        }

    def do_renumber(self, peer: str) -> str:
        """Another peer id, before connect."""
        self.need()._id = bytes.fromhex(peer)
        return self.need().peer_id

    def do_links_timeout(self, seconds: float) -> None:
        links.LINKS_TIMEOUT_S = seconds  # type: ignore[misc]

    def do_hide(self) -> None:
        """Advertise an address where nobody listens, and look for everybody there."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            nowhere = (Address("127.0.0.1", free.getsockname()[1]),)
        know = links.Links._know
        front.Front._all = lambda self: nowhere  # type: ignore[method-assign]
        links.Links._know = lambda self, member: know(  # type: ignore[method-assign]
            self, replace(member, addresses=nowhere)
        )

    def do_wall(self, peers: list[str], bricks: int) -> None:
        """From now on these are dialed at a port where nobody listens."""
        walled = [bytes.fromhex(peer) for peer in peers]
        nowhere = (Address("127.0.0.1", bricks),)
        know = links.Links._know

        def know_walled(self: links.Links, member: Member) -> Any:
            return know(self, replace(member, addresses=nowhere) if member.peer in walled else member)

        links.Links._know = know_walled  # type: ignore[method-assign]
        known = self.session()._links._peers if self.session() is not None else {}
        for walled_peer in set(walled) & set(known):
            known[walled_peer].member = replace(known[walled_peer].member, addresses=nowhere)

    def do_relays(self) -> dict[str, str]:
        """Peer -> the member that carries the connection to it."""
        return {peer.hex(): relay.hex() for peer, relay in self.session()._links.relayed().items()}

    def do_relay_max(self) -> int:
        """Bytes per second that it carries for others; 0: no cap."""
        return int(self.session()._links._relay._max_bytes_s)

    def do_wait_relay(self, peer: str, other_than: str = "") -> str:
        """Until a connection to this peer goes through a member, another than this one."""
        until = time.monotonic() + DEADLINE_S
        while (relay := self.do_relays().get(peer, other_than)) == other_than:
            assert time.monotonic() < until, "no relay"
            time.sleep(0.005)
        return relay

    def do_hold_gil(self, seconds: float, fifo: str) -> None:
        """No other thread runs Python for so long, and until there is a byte in the FIFO."""
        with open(fifo, "r+b", buffering=0) as gate:
            self.say(event="held")
            libc = ctypes.PyDLL(None)  # calls of it keep the GIL
            libc.usleep(int(seconds * 1e6))
            libc.read(gate.fileno(), ctypes.create_string_buffer(1), 1)

    def do_speak_version(self, version: int) -> None:
        limits.PROTOCOL_VERSION = version  # type: ignore[misc]

    # ---- collectives

    def do_all_reduce(self, **wanted: Any) -> dict[str, Any]:
        reduce = Reduce(self.index, wanted)
        return reduce.outcome(lambda: self.need().all_reduce(reduce.x, out=reduce.out, **reduce.keywords))

    def do_kernel(self, name: str) -> str:
        """Use this instruction set from here on."""
        assert lib.pyccl_kernel_select(name.encode()) == lib.PYCCL_OK, name
        return str(ffi.string(lib.pyccl_kernel_name()).decode())

    def do_cases(self, seed: int, rounds: int, first: int, last: int) -> list[Any]:
        return run_cases(self.need(), seed, rounds, slice(first, last))

    def do_submit(self, name: str, **wanted: Any) -> None:
        reduce = Reduce(self.index, wanted)
        self.works[name] = reduce.start(self.need()), reduce

    def do_wait(self, name: str, timeout: float | None = None) -> dict[str, Any]:
        work, reduce = self.works[name]
        return reduce.outcome(lambda: work.wait(timeout))

    def do_done(self, name: str) -> bool:
        return self.works[name][0].done()

    def do_drop(self, **wanted: Any) -> None:
        """Start an operation and lose the handle."""
        Reduce(self.index, wanted).start(self.need())
        gc.collect()

    def do_loop(self, seed: int, count: int = 1000, tag: int = 0, report: int = 0) -> list[dict[str, Any]]:
        """All-reduces of int64 until every member wants to stop: [stop?, step, random...]. One record for each."""
        records: list[dict[str, Any]] = []
        comm = self.need()
        while True:
            step = len(records)
            x = draw(seed + step, self.index, count, "int64")
            x[:2] = self.stop_wanted, step
            info = comm.all_reduce(x, op="sum", tag=tag, timeout=DEADLINE_S)
            records.append(
                {
                    "sha": sha(x[2:]),
                    "members": info.members,
                    "epoch": info.epoch,
                    "attempts": info.attempts,
                    "stops": int(x[0]),
                    "step_sum": int(x[1]),
                }
            )
            if len(records) == report:
                self.say(event="loop")
            if x[0] == info.world_size:
                return records

    def do_run_ahead(self, calls: int, factor: int) -> list[int]:
        """All-reduces of one int64 each, all of them submitted before the first is waited for. [result of each]"""
        comm = self.need()
        x = np.arange(calls, dtype=np.int64) * factor
        works = [comm.all_reduce_async(x[k : k + 1], "sum", timeout=DEADLINE_S) for k in range(calls)]
        self.say(event="submitted")
        for work in works:
            work.wait()
        return [int(value) for value in x]

    def do_call_in_vain(self, calls: int, timeout: float) -> list[str]:
        """How each of so many all-reduces ends: the class of its error, and "restored" where the input is back."""
        comm = self.need()
        x = np.arange(calls, dtype=np.int64)
        works = [comm.all_reduce_async(x[k : k + 1], "sum", timeout=timeout) for k in range(calls)]
        ends = []
        for k, work in enumerate(works):
            try:
                work.wait()
                ends.append("OK")
            except pyccl.PycclError as e:
                ends.append(type(e).__name__ + (" restored" if x[k] == k else ""))
        return ends

    def do_stop_loop(self) -> None:
        self.stop_wanted = True

    def do_broadcast(
        self, seed: int, count: int, dtype: str, root: str, tag: int = 0, retry: bool = True
    ) -> dict[str, Any]:
        x = draw(seed, self.index, count, dtype)
        before = x.copy()
        try:
            info = self.need().broadcast(x, root, tag=tag, retry=retry, timeout=DEADLINE_S)
        except pyccl.PycclError as e:
            raise CommandError(e, restored=same(x, before)) from e
        return {"sha": sha(x), "info": told_info(info)}

    def do_reduce_scatter(self, shape: list[int], **wanted: Any) -> dict[str, Any]:
        reduce = Reduce(self.index, {**wanted, "count": math.prod(shape)})
        try:
            part = self.need().reduce_scatter(reduce.x.reshape(shape), **reduce.keywords)
        except pyccl.PycclError as e:
            raise CommandError(e, restored=same(reduce.x, reduce.before)) from e
        return {"sha": sha(part), "shape": part.shape, "kept": same(reduce.x, reduce.before)}

    def do_exchange(self, partner: str, **wanted: Any) -> dict[str, Any]:
        exchange = Reduce(self.index, wanted)
        return exchange.outcome(
            lambda: self.need().exchange(exchange.x, out=exchange.out, partner=partner, **exchange.keywords)
        )

    def do_barrier(self, tag: int = 0, timeout: float = DEADLINE_S) -> dict[str, Any]:
        return {"info": told_info(self.need().barrier(tag=tag, timeout=timeout))}

    # ---- shared state

    def do_state(self, arrays: dict[str, dict[str, Any]], revision: int = 0, **options: Any) -> str:
        """arrays: name -> {seed, index, count, dtype, shape}; any dtype. options: further keywords of SharedState."""
        made = {}
        for name, how in arrays.items():
            dtype = np.dtype(how["dtype"])
            raw = draw(how["seed"], how.get("index", self.index), -(-how["count"] * dtype.itemsize // 8), "int64")
            if dtype.kind == "b":
                raw &= 0x0101010101010101
            array = raw.view(np.uint8)[: how["count"] * dtype.itemsize].view(dtype)
            made[name] = array.reshape(how.get("shape", array.shape))
        self.state = pyccl.SharedState(made, revision=revision, **options)
        return self.state.digest()

    def do_save(self, path: str) -> None:
        assert self.state is not None
        self.state.save(path)

    def do_load(self, path: str) -> int:
        self.state = pyccl.SharedState.load(path)
        return self.state.revision

    def do_lie(self, what: str) -> None:
        """Serve other "arrays" than those that were hashed, or another "table"."""
        inner = handles.Engine.publish

        def publish(engine: handles.Engine, sync: int, buffers: Any) -> None:
            *arrays, table = buffers
            if what == "arrays":
                inner(engine, sync, [*(np.bitwise_xor(array, 1) for array in arrays), table])
            else:
                inner(engine, sync, [*arrays, np.bitwise_xor(table, 1)])

        handles.Engine.publish = publish  # type: ignore[method-assign,assignment]

    def do_mishear(self) -> None:
        """Once: as if another member had sent this one another record than the others, of the same hash, in a sync."""
        inner = statesync._records

        def records(gather: Any, mine: Any, deadline: float) -> Any:
            statesync._records = inner

            def heard(tag: int, data: bytes, deadline: float) -> tuple[tuple[bytes, ...], list[bytes]]:
                members, packed = gather(tag, data, deadline)
                at = next(i for i, peer in enumerate(members) if peer != mine.peer)
                told = bytearray(packed[at])
                told[96] ^= 1  # of the sync id, which may be any number
                packed[at] = bytes(told)
                return members, packed

            return inner(heard, mine, deadline)

        statesync._records = records

    def do_followed(self) -> bool:
        """Whether an observer waits here for the next state."""
        return len(self.session().observed._server._followers) > 0

    def do_observers(self) -> list[str]:
        return [observer.peer.hex() for observer in self.session().observed.observers]

    def do_break_next_offer(self) -> None:
        """What an observer offers here next does not come."""
        inner = statestream.receive_file

        async def receive_file(*args: Any) -> None:
            statestream.receive_file = inner
            raise OSError(errno.ECONNRESET, "broken on purpose")

        statestream.receive_file = receive_file

    def do_spoil_snapshots(self) -> None:
        """What observers get from here is no whole state any more."""
        inner = pyccl.SharedState.save_to

        def save_to(state: pyccl.SharedState, fd: int) -> None:
            inner(state, fd)
            os.pwrite(fd, b"\xaa\x55", os.fstat(fd).st_size - 2)

        pyccl.SharedState.save_to = save_to  # type: ignore[method-assign]

    def do_starve(self) -> None:
        """Whatever is asked of a holder from now on does not come."""
        session.Session.fetch = lambda *args, **keywords: 0  # type: ignore[method-assign]

    def do_staging(self, memory_bytes: int, directory: str, file_bytes: int | None = None) -> None:
        """How much is staged in memory, where the rest goes, and the longest file that this process may write."""
        staging.MEMORY_BYTES_MAX = memory_bytes  # type: ignore[misc]
        os.environ["TMPDIR"] = directory
        limit = resource.RLIM_INFINITY if file_bytes is None else file_bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    def do_break_disk(self) -> None:
        """What was staged can't be read any more."""

        def broken(*args: object) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        os.preadv = broken

    def do_mend_disk(self) -> None:
        os.preadv = posix.preadv

    def do_open_files(self, directory: str) -> list[str]:
        """Files of a directory that are open here, those without a name too."""
        links = []
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                links.append(os.readlink(f"/proc/self/fd/{fd}"))
        return [link for link in links if link.startswith(directory + "/")]

    def do_memory(self) -> dict[str, int]:
        """Resident bytes: now, and the most that ever were."""
        with open("/proc/self/status", encoding="ascii") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return {name: int(fields[name].split()[0]) << 10 for name in ("VmRSS", "VmHWM")}

    def do_forget_peak(self) -> None:
        """VmHWM starts anew from what is resident."""
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")

    def do_footprint(
        self, elements: int, ops: int, in_place: bool, quantize: str | None = None, rounds: int = 3
    ) -> int:
        """Most resident bytes beyond those with the arrays, while so many all-reduces of float32 are in flight."""
        comm = self.need()
        arrays = [np.full(elements, self.index + 1, np.float32) for _ in range(ops)]
        outs = [None if in_place else np.ones_like(array) for array in arrays]
        comm.all_reduce(np.ones(1000, np.float32), quantize=quantize, timeout=DEADLINE_S)  # what is loaded late is
        before = self.do_memory()["VmRSS"]
        self.do_forget_peak()
        for _ in range(rounds):
            works = [
                comm.all_reduce_async(array, "avg", out=out, tag=tag, quantize=quantize, timeout=DEADLINE_S)
                for tag, (array, out) in enumerate(zip(arrays, outs, strict=True))
            ]
            for work in works:
                work.wait()
        return self.do_memory()["VmHWM"] - before

    def do_blocks_gained(self, rounds: int) -> int:
        """Of Python's allocator, in rounds of every kind of call. No collector meanwhile: it empties free lists."""
        comm, x = self.need(), np.ones(1000, np.float32)
        (partner,) = (peer for peer in comm.members if peer != comm.peer_id)
        before = 0
        gc.collect()
        gc.disable()
        try:
            for turn in range(2 * rounds):
                if turn == rounds:
                    before = sys.getallocatedblocks()
                comm.all_reduce(x, "avg", tag=turn, timeout=DEADLINE_S)
                comm.all_gather(x, timeout=DEADLINE_S)
                comm.exchange(x, partner=partner, timeout=DEADLINE_S)
                comm.update_topology(DEADLINE_S)
                self.do_sync(tell_state=False)
            return sys.getallocatedblocks() - before
        finally:
            gc.enable()

    def do_fork_off(self) -> None:
        """As if it had gone on alone: another lineage, and still a vote."""
        assert self.state is not None
        self.state.lineage = bytes(range(16))

    def do_poke(self, name: str, at: int, value: int) -> None:
        """Change one byte."""
        assert self.state is not None
        self.state.arrays[name].reshape(-1).view(np.uint8)[at] = value

    def do_advance(self, by: int = 1) -> None:
        assert self.state is not None
        self.state.revision += by

    def do_sync(self, timeout: float = DEADLINE_S, tell_state: bool = True, **options: Any) -> dict[str, Any]:
        """tell_state: it takes copies of the arrays."""
        assert self.state is not None
        before = self.told_state() if tell_state else None
        try:
            info = self.need().sync_shared_state(self.state, timeout=timeout, **options)
        except BaseException as e:
            raise CommandError(e, restored=self.told_state() == before) from e
        return {
            "state": self.told_state() if tell_state else None,
            "revision": info.revision,
            "rx_bytes": info.rx_bytes,
            "tx_bytes": info.tx_bytes,
            "changed": info.changed,
            "holders": info.holders,
            "members": info.members,
            "apart": info.apart,
            "chunk_bytes": info.chunk_bytes,
            "packing": info.packing,
            "liars": info.liars,
        }

    def do_always_pack(self, spoil: bool = False) -> None:
        """As if it had been measured that packing pays. spoil: as a holder, pack other bytes than were asked for."""

        class Always(packing.Packing):
            packed = True

            def __setattr__(self, name: str, value: Any) -> None:
                if name != "packed":
                    super().__setattr__(name, value)

        statesync.Packing = Always  # type: ignore[misc]
        if spoil:
            pack = packer.pack
            packer.pack = lambda data: pack(data ^ 1)

    def do_told_state(self) -> dict[str, Any]:
        return self.told_state()

    def told_state(self) -> dict[str, Any]:
        assert self.state is not None
        arrays = {name: sha(array.reshape(-1)) for name, array in self.state.arrays.items()}
        return {"digest": self.state.digest(), "revision": self.state.revision, "arrays": arrays}

    def do_digest(self) -> str:
        assert self.state is not None
        return self.state.digest()

    # ---- traps and remains

    def do_hook(self, phase: str, when: str = "before", **keywords: Any) -> None:
        hook = Hook(phase, lambda at: self.say(event="hook", phase=at), **keywords)
        self.hooks[phase] = hook
        install(hook, when, self.session)

    def do_release(self, phase: str) -> None:
        self.hooks[phase].released.set()

    def resources(self) -> dict[str, Any]:
        fds = {}
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # the one of listdir itself
                fds[fd] = os.readlink(f"/proc/self/fd/{fd}")
        children = []
        for task in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{task}/children") as text:
                children += text.read().split()
        names = sorted(t.name for t in threading.enumerate() if not t.name.startswith("agent-"))
        ours = len(threading.enumerate()) - len(names)
        return {
            "threads": names,
            "tasks": len(os.listdir("/proc/self/task")) - ours,
            "fds": sorted(kind for kind in (target.split(":")[0] for target in fds.values())),
            "children": children,
        }

    def do_resources(self) -> dict[str, Any]:
        gc.collect()
        return {"before": self.baseline, "now": self.resources()}

    def do_sessions(self) -> int:
        """How many there are in memory, those that are over too."""
        gc.collect()
        return sum(isinstance(found, session.Session) for found in gc.get_objects())

    def do_fork(self, exit_normally: bool = False) -> dict[str, Any]:
        """Use the communicator in a forked child."""
        comm, (receive, send) = self.need(), os.pipe()
        child = os.fork()
        if child == 0:
            try:
                comm.all_reduce(np.zeros(4, np.float32))
                told: dict[str, Any] = {"class": None}
            except BaseException as e:  # noqa: BLE001
                told = error_of(e)
            comm.close()
            os.write(send, json.dumps(told).encode())
            if not exit_normally:
                os._exit(0)
            os.dup2(os.open(os.devnull, os.O_RDWR), 1)  # the answers are the parent's
            self.exit_wanted = True
            return {}
        os.close(send)
        told = json.loads(os.read(receive, 1 << 16))
        os.close(receive)
        until = time.monotonic() + DEADLINE_S
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > until:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
        return {**told, "status": os.waitstatus_to_exitcode(ended[1])}


class Reduce:
    """One all-reduce, or exchange, with its arrays."""

    def __init__(self, index: int, wanted: dict[str, Any]) -> None:
        known = ("op", "tag", "retry", "quantize", "quantize_block", "weight", "algorithm")
        self.keywords = {k: wanted[k] for k in known if k in wanted}
        self.keywords["timeout"] = wanted.get("timeout", DEADLINE_S)
        dtype, kind = wanted.get("dtype", "float32"), wanted.get("kind", "plain")
        if dtype == "bfloat16":  # any bits: for what is moved, not folded
            self.x = draw(wanted["seed"], index, wanted["count"], "int16").view(ml_dtypes.bfloat16)
        else:
            self.x = draw(wanted["seed"], index, wanted["count"], dtype, kind)
        self.before = self.x.copy()
        self.out = np.full_like(self.x, 77) if wanted.get("out") else None

    def start(self, comm: pyccl.Communicator) -> pyccl.Work:
        return comm.all_reduce_async(self.x, out=self.out, **self.keywords)

    def outcome(self, run: Callable[[], pyccl.ReduceInfo]) -> dict[str, Any]:
        try:
            info = run()
        except BaseException as e:
            raise CommandError(e, restored=same(self.x, self.before)) from e
        result = self.x if self.out is None else self.out
        kept = self.out is None or same(self.x, self.before)
        return {"sha": sha(result), "kept": kept, "info": told_info(info)}


def same(a: Any, b: Any) -> bool:
    return bool(np.array_equal(a.view(np.uint8), b.view(np.uint8)))


def told_info(info: pyccl.ReduceInfo) -> dict[str, Any]:
    return {name: getattr(info, name) for name in info.__slots__}


def main() -> None:
    arguments = serve(int(sys.argv[2])) if sys.argv[1:2] == ["--zygote"] else ["agent"]
    if arguments[0] == "master":
        sys.argv = arguments
        serve_master_traps()
        master.main()
    if arguments[0] == "peer":
        sys.argv = arguments
        peer.main()
    logging.basicConfig(
        level=logging.DEBUG, stream=sys.stderr, format="%(asctime)s.%(msecs)03d %(levelname)s %(name)s %(message)s",
        datefmt="%H:%M:%S",
    )  # fmt: skip
    logging.getLogger("trio.serve_listeners").addFilter(without_traceback)
    Agent().run()


if __name__ == "__main__":
    main()
