"""Runs a stress run: a master, the peers, a calm phase, faults from the seed, and the wait until all is well again.

What was reported and what was done go into `oracle.Oracle` and `report.Record`, which judge and count; here things are
started, stopped and waited for. One thread: timers and reports are taken in turn, so a fault never races a report.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import math
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from pyccl._io import journal
from pyccl.processes.children import ONE_THREAD, Children, Event, Exited, Line
from pyccl.stress import disk
from pyccl.stress.faults import MASTER_FAULTS_IN_A_ROW, Drawer, Fault
from pyccl.stress.network import Line as NetworkLine
from pyccl.stress.network import Network
from pyccl.stress.oracle import Oracle, Violation
from pyccl.stress.peer import CANARIES_OF_ALL
from pyccl.stress.report import Mark, Memory, Phase, Record

MASTER: Final = "master"
GROUP: Final = 0  # of all peers
EXIT_ADDRESS: Final = 3  # of pyccl-master: somebody else took the port meanwhile
LISTENING: Final = "listening on "
START_TIMEOUT_S: Final = 60.0
AFTERMATH_S: Final = 1.5  # after a violation, for others to tell theirs
REFUSED_S: Final = 30.0  # a host outlives its process, and refuses connections to it
SAMPLE_S: Final = 30.0  # between looks at the memory
RETRY_S: Final = 0.2  # after no fault was possible
TICK_S: Final = 0.1
PAUSE_S: Final = 2.0
HANG_S: Final = 60.0  # without progress; processes start slowly on a loaded machine
HANG_TIMEOUTS_MIN: Final = 6  # so many peer_timeouts are no hang yet: faults come one upon the other
STOP_SHARE_MAX: Final = 0.6  # of peer_timeout: who was stopped for longer may have been evicted for it
TRACE_LINES: Final = 20_000  # of stderr, per process


@dataclass(frozen=True)
class Plan:
    """What a run shall do."""

    peers: int = 8
    minutes: float = 1.0
    fault_every_s: float = 2.0
    seed: int = 1
    peer_timeout_s: float = 5.0
    calm_s: float = 5.0
    hang_s: float = HANG_S
    canary: str = ""


class Screen(Protocol):
    """Where progress is shown."""

    def say(self, text: str) -> None: ...
    def update(self, record: Record, oracle: Oracle, now_s: float) -> None: ...


class _OverError(Exception):
    """The run ended early: a violation was found."""


def _nothing(peers: list[int]) -> None:
    """Nobody waits for the newcomers."""


class Conductor:
    """One run. It is the `faults.Lab` too."""

    def __init__(
        self,
        plan: Plan,
        kinds: Sequence[type[Fault]],
        network: Network,
        screen: Screen,
        children: Children,
        directory: Path,
    ) -> None:
        """directory: for the journal; empty, and ours alone."""
        self.plan, self._network, self._screen, self._children = plan, network, screen, children
        self.peer_timeout_s = plan.peer_timeout_s
        self.master_address = ""
        rng = random.Random(plan.seed)
        self._drawer, self._pauses = Drawer(kinds, random.Random(rng.getrandbits(64))), rng
        self.start_s = time.monotonic()
        self.oracle = Oracle(plan.seed, plan.hang_s, digest="sha256" if plan.seed % 2 else "fast")
        self.record = Record(self.start_s, [kind.name for kind in kinds])
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer_numbers = itertools.count()
        self._numbers = itertools.count()
        self._alive: set[int] = set()
        self._doomed: set[int] = set()  # killed, or to be killed
        self._leaving: set[int] = set()
        self._active: dict[int, Fault] = {}  # by number of the fault
        self._told: list[tuple[Mark, Fault]] = []  # all there were
        self._joining: list[tuple[set[int], list[int], Callable[[list[int]], None]]] = []
        self._stopped_at_s: dict[int, float] = {}
        self._lines: dict[int, NetworkLine] = {}  # of ended ones too: faults may still hold them
        self._journal = directory / "master.journal"
        self._journaled = 0  # newest epoch that was seen in it
        self._master_up = False
        self._master_killed = False
        self._master_hindered = False  # by a fault
        self._disk_full = False  # of the master that is started next, too
        self._still_until_s = self.start_s  # nobody could make progress before it
        self._faults_until_s = 0.0
        self._stalled_at, self._stalled, self._master_faults = 0, 0, 0  # faults since this revision

    def execute(self) -> None:
        """The whole run. What is wrong ends up in ``oracle.violations``.

        Raises:
            Interrupted: a signal asked the program to end.
        """
        try:
            self._start_master()
            self._until(lambda: self._master_up, "the master starts")
            self.join(self.plan.peers)
            self._until(self._all_in_step, "the peers join")
            self._calm()
            self._faulty()
            self._recover()
        except _OverError:
            self._aftermath()
        finally:
            for fault in list(self._active.values()):
                fault.heal()
        for name in (MASTER, *(_name(number) for number in sorted(self._alive))):
            if name in self._children:
                self._keep_trace(name)
        for mark, fault in self._told:
            mark.detail = fault.detail
        self.oracle.finish(self._now())
        self.record.end_s = self._now()

    # ---- phases

    def _start_master(self) -> None:
        """Again, too: where it listened before, with the journal of the one before."""
        again = ["--listen", self.master_address, "--insecure"]
        where = again if self.master_address else self._network.master_options()
        options = [*where, "--peer-timeout", str(self.peer_timeout_s), "--journal", str(self._journal)]
        before = self._network.place(MASTER)
        with disk.full_for_children() if self._disk_full else contextlib.nullcontext():
            self._children.start(MASTER, "pyccl.processes.leash", ["pyccl.cli.master", *options], before=before)

    def _calm(self) -> None:
        """Without faults, to compare with."""
        phase = self._begin("calm")
        self._until_time(phase.start_s + self.plan.calm_s)
        self._end(phase)
        self._sample()

    def _faulty(self) -> None:
        phase = self._begin("faults")
        self.after(SAMPLE_S, self._sample_again)
        self._faults_until_s = phase.start_s + self.plan.minutes * 60
        self._plan_fault()
        self._until_time(self._faults_until_s)
        self._end(phase)

    def _recover(self) -> None:
        """Faults end; all that live must be members in step again."""
        phase = self._begin("recovery")
        self._until(lambda: not self._active and not self._joining and self._master_up, "the faults end")
        since_s = self._now()
        self._until(lambda: self._all_in_step(since_s), "all are in step again")
        self._end(phase)
        self._sample()

    def _begin(self, name: str) -> Phase:
        self._screen.say(f"{self._now() - self.start_s:6.1f} s  phase: {name}")
        return self.record.begin(name, self._now(), self.oracle.revision)

    def _end(self, phase: Phase) -> None:
        phase.end_s, phase.last_revision = self._now(), self.oracle.revision

    def _all_in_step(self, since_s: float = 0.0) -> bool:
        return len(self._alive) >= self.plan.peers and self.oracle.settled(since_s, self._now())

    def _aftermath(self) -> None:
        """A violation was found: hear the others out, then keep what all of them know."""
        until_s = self._now() + AFTERMATH_S
        while (left_s := until_s - self._now()) > 0:
            event = self._children.next_event(left_s)
            if event is not None:
                self._take(event)
        hung = [v for v in self.oracle.violations if v.kind == "hang"]
        if hung:
            self._ask_for_stacks()

    def _ask_for_stacks(self) -> None:
        for number in self._alive:
            self._children.signal(_name(number), signal.SIGUSR1)
        until_s = self._now() + AFTERMATH_S
        while (left_s := until_s - self._now()) > 0:
            self._children.next_event(left_s)

    # ---- waiting

    def _now(self) -> float:
        return time.monotonic()

    def _until_time(self, until_s: float) -> None:
        while self._now() < until_s:
            self._turn(until_s)

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait; the watchdog sees to it that this ends."""
        deadline_s = self._now() + max(self.plan.hang_s, START_TIMEOUT_S) * 2
        while not condition():
            self._turn(math.inf)
            if self._now() > deadline_s:
                self._violate("hang", f"waited for ever until {what}")

    def _turn(self, until_s: float) -> None:
        """Timers that are due, then one report, or a moment without any."""
        now_s = self._now()
        while self._timers and self._timers[0][0] <= now_s:
            heapq.heappop(self._timers)[2]()
        next_s = min(until_s, self._timers[0][0] if self._timers else math.inf, now_s + TICK_S)
        event = self._children.next_event(max(0.0, next_s - now_s))
        if self._now() - now_s > PAUSE_S:
            self._still_until_s = self._now()  # we were stopped ourselves, and perhaps not alone
        if event is not None:
            self._take(event)
        else:
            self._watch()
        self._screen.update(self.record, self.oracle, self._now())
        if self.oracle.violations:
            raise _OverError

    def _watch(self) -> None:
        if not self._master_is_well():
            self._still_until_s = self._now()
        self.oracle.watch(self._now(), self._still_until_s)

    def _violate(self, kind: str, text: str) -> None:
        self.oracle.violations.append(Violation(kind, None, self._now(), text))
        raise _OverError

    # ---- reports

    def _take(self, event: Event) -> None:
        if event.child == MASTER:
            self._take_master(event)
            return
        number = int(event.child.split()[1])
        if isinstance(event, Exited):
            self._take_exit(number, event)
            return
        try:
            report = json.loads(event.text)
            self.oracle.take(number, report)
            self._note(number, report)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            text = f"{event.child} printed {event.text[:200]!r}: {error!r}"
            self.oracle.violations.append(Violation("report", number, self._now(), text))

    def _take_master(self, event: Event) -> None:
        if isinstance(event, Line) and event.text.startswith(LISTENING):
            self.master_address = event.text.removeprefix(LISTENING).strip()
            self._master_up = True
        elif isinstance(event, Exited):
            self._keep_trace(MASTER)
            tail = self._children.stderr_tail(MASTER)
            self._children.forget(MASTER)
            if self._master_killed and event.returncode == -signal.SIGKILL:
                if not self._master_hindered or self._disk_full:
                    self._restart_now()
            elif not self._master_up and self.master_address and event.returncode == EXIT_ADDRESS:
                self.after(RETRY_S, self._start_master)
            else:
                self._violate("crash", f"the master ended with {event.returncode}: {' | '.join(tail[-3:])}")

    def _take_exit(self, number: int, event: Exited) -> None:
        expected = (number in self._doomed and event.returncode == -signal.SIGKILL) or (
            number in self._leaving and event.returncode == 0
        )
        tail = self._children.stderr_tail(event.child)
        if not expected:
            self._keep_trace(event.child)
        how = f"ended with {event.returncode}: {' | '.join(tail[-3:])}"
        self.oracle.ended(number, expected, how, self._now())
        self._alive.discard(number)
        self._children.forget(event.child)
        self.after(REFUSED_S, lambda: self._network.release(event.child))

    def _keep_trace(self, name: str) -> None:
        self.record.traces.setdefault(name, []).extend(self._children.stderr_tail(name))

    def _note(self, number: int, report: dict[str, Any]) -> None:
        """What the record wants to know, and who waits for it."""
        self.record.lag_s = max(self.record.lag_s, self._now() - report["t"])
        epochs = [epoch for epoch, _ in report["rosters"]] if report["event"] == "round" else [report.get("epoch", 0)]
        self._check_journal(number, max(epochs, default=0))
        if report["event"] == "round":
            self.record.round(report["t"], report["moved_bytes"], report["retries"], len(report["ops"]))
        elif report["event"] == "ready":
            for group in list(self._joining):
                waiting, members, then = group
                waiting.discard(number)
                if not waiting:
                    self._joining.remove(group)
                    self._let_go(members, then)

    def _check_journal(self, number: int, epoch: int) -> None:
        """Nobody is in an epoch that the master could forget."""
        if epoch <= self._journaled:
            return
        try:
            self._journaled = journal.read_past(self._journal).groups[GROUP].number
        except journal.JournalError as error:
            self.oracle.violations.append(Violation("journal", None, self._now(), str(error)))
            return
        if epoch > self._journaled:
            text = f"is in epoch {epoch}, and the journal knows {self._journaled} only"
            self.oracle.violations.append(Violation("journal", number, self._now(), text))

    def _let_go(self, numbers: list[int], then: Callable[[list[int]], None]) -> None:
        there = [number for number in numbers if number in self._alive]
        for number in there:
            self._children.tell(_name(number), "go")
        then(there)

    # ---- faults

    def _plan_fault(self) -> None:
        self.after(self.plan.fault_every_s * self._pauses.uniform(0.5, 1.5), self._fault)

    def _fault(self) -> None:
        if self._now() >= self._faults_until_s:
            return
        touched = {victim for fault in self._active.values() for victim in fault.victims}
        in_step = [number for number in self.oracle.in_step() if number not in touched | self._leaving | self._doomed]
        stalling = sum(fault.stalls for fault in self._active.values())
        if self.oracle.revision > self._stalled_at:
            self._stalled_at, self._stalled, self._master_faults = self.oracle.revision, 0, 0
        fault = self._drawer.draw(self, in_step, stalling, self._stalled)
        if fault is None:
            self.record.postponed += 1
            self.after(RETRY_S, self._fault)
            return
        self._plan_fault()
        at_s = self._now()
        self._stalled += fault.stalls
        self._master_faults += fault.needs_master
        seconds = fault.apply()
        victim = fault.victim if fault.victims else None
        mark = self.record.fault(fault.name, victim, at_s, at_s + seconds)
        self._active[mark.number] = fault

        self._told.append((mark, fault))

        def heal() -> None:
            del self._active[mark.number]
            fault.heal()
            mark.until_s = self._now()

        who = "" if victim is None else f"peer {victim}"
        self._screen.say(f"{at_s - self.start_s:6.1f} s  {fault.name} {who} {fault.detail}".rstrip())
        if seconds:
            self.after(seconds, heal)
        else:
            heal()

    def _sample(self) -> None:
        if not self._master_up:
            return
        told = {number: Memory.of(self.pid(number)) for number in sorted(self._alive)}
        peers = {number: memory for number, memory in told.items() if memory is not None}
        master = Memory.of(self.master_pid())
        if master is not None and peers:
            self.record.samples.append((self._now(), master, peers))

    def _sample_again(self) -> None:
        self._sample()
        self.after(SAMPLE_S, self._sample_again)

    # ---- faults.Lab

    def after(self, delay_s: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (self._now() + delay_s, next(self._timer_numbers), call))

    def pid(self, peer: int) -> int:
        return self._children.pid(_name(peer))

    def master_pid(self) -> int:
        return self._children.pid(MASTER)

    def kill(self, peer: int) -> None:
        if peer in self._alive:
            self._doomed.add(peer)
            self.oracle.excuse(peer, "kill")
            self._children.kill(_name(peer))
            self._top_up()

    def kill_later(self, peer: int, delay_s: float) -> None:
        self._doomed.add(peer)
        self.after(delay_s, lambda: self.kill(peer))

    def stop(self, peer: int) -> None:
        if peer in self._alive:
            self.oracle.stop(peer)
            self._stopped_at_s.setdefault(peer, self._now())
            self._children.signal(_name(peer), signal.SIGSTOP)

    def resume(self, peer: int) -> None:
        since_s = self._stopped_at_s.pop(peer, None)
        if peer not in self._alive or since_s is None:
            return
        if self._now() - since_s > STOP_SHARE_MAX * self.peer_timeout_s and not self.oracle.processes[peer].excuse:
            self.record.late_resumes += 1  # this machine let us wait, not the fault
            self.oracle.excuse(peer, "a stop that became too long")
            self.excuse_ends(peer, 2 * self.peer_timeout_s)
        self._children.signal(_name(peer), signal.SIGCONT)
        self.oracle.resume(peer, self._now())

    def _master_is_well(self) -> bool:
        return self._master_up and not self._master_hindered

    def master_may_fail(self) -> bool:
        return self._master_is_well() and self._master_faults < MASTER_FAULTS_IN_A_ROW

    def _hinder_master(self) -> None:
        self._master_hindered = True
        self.oracle.master_away()

    def _master_free(self) -> None:
        self._master_hindered = False
        self._still_until_s = self._now()
        self.oracle.master_back(self._now())

    def stop_master(self) -> None:
        self._hinder_master()
        self._children.signal(MASTER, signal.SIGSTOP)

    def resume_master(self) -> None:
        self._children.signal(MASTER, signal.SIGCONT)
        self._master_free()

    def kill_master(self) -> None:
        self._hinder_master()
        self._master_killed, self._master_up = True, False
        self._children.kill(MASTER)

    def restart_master(self) -> None:
        self._master_free()
        if MASTER not in self._children:
            self._restart_now()

    def _restart_now(self) -> None:
        self._master_killed = False
        self._start_master()

    def cut_master(self) -> None:
        self._hinder_master()
        self.master_line().cut()

    def mend_master(self) -> None:
        self.master_line().mend()
        self._master_free()

    def fill_journal(self) -> None:
        self._hinder_master()
        self._disk_full = True
        disk.fill(self.master_pid())

    def empty_journal(self) -> None:
        self._disk_full = False
        if MASTER in self._children:  # or it is started when the one before is reaped
            disk.empty(self.master_pid())
        self._master_free()

    def line(self, peer: int) -> NetworkLine:
        return self._lines[peer]

    def master_line(self) -> NetworkLine:
        return self._network.line(MASTER)

    def enter_network(self) -> None:
        self._network.enter()

    def evictions(self, peer: int) -> int:
        return self.oracle.processes[peer].evictions

    def leave(self, peer: int) -> None:
        self._leaving.add(peer)
        self._children.tell(_name(peer), "leave")
        self._top_up()

    def join(self, count: int, then: Callable[[list[int]], None] = _nothing) -> None:
        """Start processes; when all of them are loaded they connect at once, and `then` is told."""
        numbers = [next(self._numbers) for _ in range(count)]
        for number in numbers:
            settings = {
                "master": self.master_address, "number": number, "seed": self.plan.seed,
                "digest": self.oracle.digest,
                "canary": self.plan.canary if number == 1 or self.plan.canary in CANARIES_OF_ALL else "",
            }  # fmt: skip
            self._alive.add(number)
            self.oracle.started(number, self._now())
            name = _name(number)
            before = self._network.place(name)
            if self._network.links:
                self._lines[number] = self._network.line(name)
            self._children.start(name, "pyccl.stress.peer", [json.dumps(settings)], ONE_THREAD, before)
        self._joining.append((set(numbers), numbers, then))

    def surplus(self) -> int:
        return len(self._alive - self._doomed - self._leaving) - self.plan.peers

    def _top_up(self) -> None:
        if self.surplus() < 0:
            self.join(-self.surplus())

    def excuse(self, peer: int, why: str) -> None:
        self.oracle.excuse(peer, why)

    def excuse_ends(self, peer: int, after_s: float) -> None:
        self.oracle.excuse_ends(peer, self._now() + after_s)

    def complain(self, kind: str, text: str) -> None:
        self.oracle.violations.append(Violation(kind, None, self._now(), text))


def _name(number: int) -> str:
    return f"peer {number}"
