"""Traps inside a peer or the master: at a named phase of the protocol the process kills itself, stops, waits or tells.

Phases
    submit, commit            an operation is handed to the engine; its end is taken from it
    data                      after a submit, once `bytes` have left over the data links
    serve                     once `bytes` have left over the data links, whatever for
    freeze, enter, open_links, set_cut, joined, ...   effects of the member machine
    send:NAME                 a control message; "after" is after its bytes were written to the socket
    adopt                     a data connection stands
    sync.records, sync.table, sync.fetch, sync.commit, sync.adopt, sync.replace   stages of sync_shared_state
    sync.chunk                a chunk that was fetched and checked goes into staging
Of the master
    append, fsync             of the journal: before the record is written, before it is durable, and after
    send:NAME                 as above
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import trio

from pyccl._io import envelope, journal, session, staging, statesync
from pyccl._io.links import Links
from pyccl._io.master_server import MasterServer
from pyccl._io.session import Session
from pyccl._native import handles
from pyccl._native._pyccl import ffi, lib
from pyccl._proto import member
from pyccl._proto.master import MasterMachine
from pyccl._proto.messages import Arrive, Message
from pyccl._proto.plan import Plan

DEADLINE_S = 60.0
_STAGES = {
    "sync.records": "_records",
    "sync.table": "_fetch_table",
    "sync.fetch": "_fetch",
    "sync.commit": "_commit",
    "sync.adopt": "_adopt",
    "sync.replace": "_replace",
}


@dataclasses.dataclass
class Hook:
    """Springs at the `nth` time its phase is reached."""

    phase: str
    tell: Callable[[str], None]
    action: str = "kill"  # or "stop" (SIGSTOP), "wait" (tell, then until ``release``), "tell", "interrupt" (Ctrl-C)
    nth: int = 1
    bytes: int = 0
    seen: int = 0
    released: threading.Event = dataclasses.field(default_factory=threading.Event)

    def reached(self) -> None:
        self.seen += 1
        if self.seen == self.nth:
            self.spring()

    def spring(self) -> None:
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        self.tell(self.phase)
        if self.action == "interrupt":
            raise KeyboardInterrupt
        if self.action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.action == "wait" and not self.released.wait(DEADLINE_S):
            raise AssertionError(f"nobody released the hook at {self.phase}")


def install(hook: Hook, when: str, current: Callable[[], Session | None]) -> None:
    """`current`: the session of the peer."""
    phase = hook.phase
    if phase == "submit":
        _around(handles.Engine, "submit", hook, when)
    elif phase == "commit":
        _around(handles.Op, "finish", hook, when)
    elif phase == "adopt":
        _around(Links, "_adopt", hook, when)
    elif phase == "sync.chunk":
        _around(staging.Staging, "write", hook, when)
    elif phase in _STAGES:
        _around(statesync, _STAGES[phase], hook, when)
    elif phase == "data":
        _after_submit(hook, current)
    elif phase == "serve":
        threading.Thread(target=_when_sent, args=(hook, current), daemon=True).start()
    elif phase.startswith("send:"):
        _send(hook, phase.removeprefix("send:"), when)
    else:
        _effect(hook, when)


def serve_master_traps() -> None:
    """In the master's process: each line of stdin sets a trap or a limit, each is answered by a line on stdout."""

    def serve() -> None:
        for line in sys.stdin:
            wanted = json.loads(line)
            if "file_bytes_max" in wanted:  # a disk that is full (Python ignores SIGXFSZ)
                most = wanted["file_bytes_max"]
                resource.setrlimit(
                    resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY if most is None else most, resource.RLIM_INFINITY)
                )
            elif "plan" in wanted:
                _plan_next(Plan(**{k: tuple(v) if isinstance(v, list) else v for k, v in wanted["plan"].items()}))
            else:
                when = wanted.pop("when")
                hook = Hook(tell=lambda phase: None, **wanted)
                if hook.phase == "append":
                    _around(journal.Journal, "append", hook, when)
                elif hook.phase == "fsync":
                    _around(os, "fsync", hook, when)
                else:
                    _send(hook, hook.phase.removeprefix("send:"), when)
            print("done", flush=True)

    threading.Thread(target=serve, daemon=True).start()


def _plan_next(plan: Plan) -> None:
    """Given to the machine on its own thread, with the Arrive that comes next."""
    inner = MasterMachine.receive

    def planned(self: MasterMachine, conn: int, message: Message, now: float) -> Any:
        if not isinstance(message, Arrive):
            return inner(self, conn, message, now)
        MasterMachine.receive = inner  # type: ignore[method-assign]
        epoch = self._groups[0].epoch
        assert epoch is not None
        return self.plan_next(0, epoch.peers, plan, now) + inner(self, conn, message, now)

    MasterMachine.receive = planned  # type: ignore[method-assign]


def _around(owner: Any, name: str, hook: Hook, when: str) -> None:
    inner = getattr(owner, name)

    def trapped(*args: Any, **keywords: Any) -> Any:
        if when == "before":
            hook.reached()
        result = inner(*args, **keywords)
        if when == "after":
            hook.reached()
        return result

    setattr(owner, name, trapped)


def _effect(hook: Hook, when: str) -> None:
    kind = getattr(member, hook.phase.title().replace("_", ""))
    inner = session._PERFORM[kind]

    def trapped(self: Session, effect: Any) -> None:
        if when == "before":
            hook.reached()
        inner(self, effect)
        if when == "after":
            hook.reached()

    session._PERFORM[kind] = trapped


def _send(hook: Hook, name: str, when: str) -> None:
    """The message is known when it is packed, perhaps once for many receivers; its bytes are nobody else's."""
    pack, send_all, at_once = envelope.pack, trio.SocketStream.send_all, MasterServer._written_at_once
    marked: set[bytes] = set()

    def trapped_pack(message: Any) -> bytes:
        data = pack(message)
        if type(message).__name__ == name:
            marked.add(data)
        return data

    async def trapped_send(self: trio.SocketStream, data: bytes) -> None:
        ours = data in marked
        if ours and when == "before":
            hook.reached()
        await send_all(self, data)
        if ours and when == "after":
            hook.reached()

    def trapped_at_once(conn: Any, data: bytes) -> bytes:
        ours = data in marked
        if ours and when == "before":
            hook.reached()
        left = at_once(conn, data)
        if ours and when == "after" and not left:
            hook.reached()
        return left

    envelope.pack = trapped_pack
    MasterServer._written_at_once = staticmethod(trapped_at_once)  # type: ignore[method-assign]
    trio.SocketStream.send_all = trapped_send  # type: ignore[method-assign]


def sent_bytes(of: Session | None) -> int:
    """Over all data links; 0 without any."""
    engine, links = (of.engine, of._links) if of is not None else (None, None)
    total, stats = 0, ffi.new("pyccl_link_stats *")
    for peer in list(links._peers.values()) if engine is not None and links is not None else []:
        lib.pyccl_engine_link_stats(engine._engine, peer.slot, stats)
        total += stats.tx_bytes
    return total


def _after_submit(hook: Hook, current: Callable[[], Session | None]) -> None:
    inner = handles.Engine.submit

    def trapped(*args: Any, **keywords: Any) -> Any:
        hook.seen += 1
        before = sent_bytes(current())
        op = inner(*args, **keywords)
        if hook.seen == hook.nth:
            until = time.monotonic() + DEADLINE_S
            while sent_bytes(current()) - before < hook.bytes and not op.done() and time.monotonic() < until:
                pass
            hook.spring()
        return op

    handles.Engine.submit = trapped  # type: ignore[method-assign]


def _when_sent(hook: Hook, current: Callable[[], Session | None]) -> None:
    before = sent_bytes(current())
    until = time.monotonic() + DEADLINE_S
    while sent_bytes(current()) - before < hook.bytes and time.monotonic() < until:
        time.sleep(0.0002)
    hook.spring()
