"""Runs the demo: a master, the peers, the kill at a third and the join at two thirds.

Everything happens on observed progress, never after a sleep: a peer is killed when a revision has been reported, a
newcomer connects when a later one has been. The facts go into `progress.Run`, which alone judges them.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from typing import Final

from pyccl.demo import corpus
from pyccl.demo.progress import ExitStatus, Fate, Mark, Peer, Plan, Run
from pyccl.demo.show import Screen
from pyccl.processes.children import ONE_THREAD, Children, Event, Exited, Line

MASTER: Final = "master"
LISTENING: Final = "listening on "
START_TIMEOUT_S: Final = 30.0  # for the master to name its address
STALL_S: Final = 60.0  # without any report from any peer
AFTERMATH_S: Final = 1.5  # after a failure, for the other children to report theirs
TICK_S: Final = 0.25  # how often the screen is drawn anew while nothing happens


class Orchestrator:
    """One run of the demo."""

    def __init__(
        self, plan: Plan, screen: Screen, children: Children, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._plan, self._screen, self._children, self._clock = plan, screen, children, clock
        self._start_s = clock()
        self._address = ""
        self._newcomer_ready = False
        self.run = Run(plan, corpus.unigram_entropy_bits(corpus.load().validation))

    def execute(self) -> None:
        """Run to the end; failures of children are recorded in ``run``, not raised.

        Raises:
            Interrupted: a signal asked the program to end.
        """
        self._children.start(MASTER, "pyccl.processes.leash", ["pyccl.cli.master", "--listen", "127.0.0.1:0"])
        if self._wait_for_master():
            for number in range(self._plan.peers):
                self._start_peer(number)
            self._follow()
        if self.run.failures:
            self._explain()
        self.run.seconds = self._now()

    def _now(self) -> float:
        return self._clock() - self._start_s

    def _wait_for_master(self) -> bool:
        deadline = self._clock() + START_TIMEOUT_S
        while (left_s := deadline - self._clock()) > 0:
            event = self._children.next_event(left_s)
            if isinstance(event, Line) and event.text.startswith(LISTENING):
                self._address = event.text.removeprefix(LISTENING).strip()
                return True
            if isinstance(event, Exited):
                self._fail(ExitStatus.CHILD_FAILED, _how(event))
                return False
        self._fail(ExitStatus.STALLED, f"the master did not start within {START_TIMEOUT_S:.0f} s")
        return False

    def _start_peer(self, number: int) -> None:
        plan = self._plan
        wait_for = plan.peers if number < plan.peers else 0
        arguments = ["--master", self._address, "--stream", str(number), "--seed", str(plan.seed)]
        arguments += ["--rounds", str(plan.rounds), "--steps", str(plan.steps), "--wait-for", str(wait_for)]
        self.run.peers[number] = Peer(number)
        self._children.start(_name(number), "pyccl.demo.peer", arguments, ONE_THREAD)

    def _follow(self) -> None:
        """Take in events until all peers are done or something failed."""
        heard_s = self._clock()
        while not self.run.failures and not self._all_done():
            event = self._children.next_event(TICK_S)
            if event is not None:
                heard_s = self._clock()
                self._take(event)
                self._screen.update(self.run, self._now())
                self._act()
            elif self._clock() - heard_s > STALL_S:
                where = ", ".join(f"peer {peer.number} {_standing(peer)}" for peer in self.run.peers.values())
                self._fail(ExitStatus.STALLED, f"no report for {STALL_S:.0f} s: {where}")
            self._screen.update(self.run, self._now())

    def _explain(self) -> None:
        """After a failure: hear the others out for a moment, then show what all children wrote to stderr."""
        deadline = self._clock() + AFTERMATH_S
        while (left_s := deadline - self._clock()) > 0:
            event = self._children.next_event(left_s)
            if isinstance(event, Exited) and event.returncode not in (0, -signal.SIGKILL):
                self._fail(ExitStatus.CHILD_FAILED, _how(event))
        for child in (MASTER, *(_name(number) for number in self.run.peers)):
            for line in self._children.stderr_tail(child):
                self._screen.say(f"{child}: {line}")

    def _all_done(self) -> bool:
        """Whether nobody trains any more; a newcomer that was not told to join by then is not waited for."""
        expected = [peer for peer in self.run.peers.values() if peer.number < self._plan.peers or self.run.told_to_join]
        return all(peer.fate in (Fate.FINISHED, Fate.KILLED) for peer in expected)

    def _take(self, event: Event) -> None:
        if event.child == MASTER:
            if isinstance(event, Exited):
                self._fail(ExitStatus.CHILD_FAILED, _how(event))
            return
        peer = self.run.peers[int(event.child.split()[1])]
        if isinstance(event, Exited):
            self._peer_exited(peer, event)
            return
        try:
            fields = json.loads(event.text)
            self.run.observe(peer.number, fields, self._now())
        except ValueError as error:
            self._fail(ExitStatus.CHILD_FAILED, f"{event.child} printed {event.text[:200]!r}: {error}")
            return
        self._newcomer_ready |= fields["event"] == "ready"

    def _peer_exited(self, peer: Peer, event: Exited) -> None:
        if peer.fate is Fate.KILLED and event.returncode == -signal.SIGKILL:
            return
        if event.returncode == 0 and peer.last is not None and peer.last.revision == self._plan.rounds:
            peer.fate = Fate.FINISHED
            return
        peer.fate = Fate.FAILED
        self._fail(ExitStatus.CHILD_FAILED, _how(event))

    def _act(self) -> None:
        """Kill and join when their revision has come."""
        plan, run = self._plan, self.run
        if plan.kill and run.killed is None and run.revision >= plan.kill_revision:
            victim = run.peers[plan.victim]
            self._children.kill(_name(plan.victim))
            victim.fate = Fate.KILLED
            run.killed = Mark(run.revision, self._now(), plan.victim)
            self._screen.say(f"round {run.revision}: killed peer {plan.victim} (SIGKILL, pid {self._pid(plan.victim)})")
        if not plan.join:
            return
        # The newcomer loads its text before it is needed, so that the join comes where it was planned.
        if plan.newcomer not in run.peers and run.revision >= plan.kill_revision:
            self._start_peer(plan.newcomer)
        in_time = plan.join_revision <= run.revision < plan.rounds
        if run.told_to_join is None and self._newcomer_ready and in_time:
            self._children.tell(_name(plan.newcomer), "go")
            run.told_to_join = Mark(run.revision, self._now(), plan.newcomer)
            self._screen.say(f"round {run.revision}: peer {plan.newcomer} joins (pid {self._pid(plan.newcomer)})")

    def _pid(self, number: int) -> int:
        return self._children.pid(_name(number))

    def _fail(self, status: ExitStatus, reason: str) -> None:
        self.run.fail(status, reason)
        self._screen.say(reason)


def _name(number: int) -> str:
    return f"peer {number}"


def _how(event: Exited) -> str:
    how = f"signal {-event.returncode}" if event.returncode < 0 else f"status {event.returncode}"
    return f"{event.child} ended early with {how}"


def _standing(peer: Peer) -> str:
    return f"{peer.fate.value} at round {peer.last.revision}" if peer.last is not None else peer.fate.value
