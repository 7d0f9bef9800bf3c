"""What is done to a run. A fault is an object: drawn with `weight`, begun with `apply`, which tells for how many
seconds it lasts, and ended with `heal`. What it may do to the run is `Lab`, which the conductor is.

To add one: a subclass with a name, and its place in `KINDS`. One that must cut or bend lines between processes says
``needs_links = True`` and is refused where the network has none to cut.
"""

from __future__ import annotations

import abc
import random
from collections.abc import Callable, Sequence
from typing import ClassVar, Final, Protocol

from pyccl.stress.garbage import Sender
from pyccl.stress.network import Bend, Line
from pyccl.stress.sockets import Connection, connections

HEALTHY_LEFT: Final = 2  # members that no fault touches, so that the state survives
STALLS_AT_ONCE: Final = 2  # so that the group gets on between them
STALLS_IN_A_ROW: Final = 4  # without a revision between them: under more of them nobody could tell a hang
MASTER_FAULTS_IN_A_ROW: Final = 2  # each of them starts the timers of the master anew
LONG_WEIGHT: Final = 0.5  # of faults that stop the group for about a time-out: a run is to work, too


class FaultsError(ValueError):
    """These faults can't be made here; the text says why."""


class Lab(Protocol):
    """The run, as far as faults may touch it. Peers are named by number."""

    peer_timeout_s: float
    master_address: str

    def after(self, delay_s: float, call: Callable[[], None]) -> None: ...
    def pid(self, peer: int) -> int: ...
    def master_pid(self) -> int: ...
    def kill(self, peer: int) -> None:
        """Whoever is missing afterwards is replaced."""

    def kill_later(self, peer: int, delay_s: float) -> None:
        """Until then it may become a member, but one that nobody counts on."""

    def stop(self, peer: int) -> None: ...
    def resume(self, peer: int) -> None: ...
    def master_may_fail(self) -> bool:
        """It runs, no fault touches it, and after too many of them the group has got on."""

    def stop_master(self) -> None: ...
    def resume_master(self) -> None: ...
    def kill_master(self) -> None:
        """Until `restart_master`; under a full disk another one is started at once, which can't write either."""

    def restart_master(self) -> None:
        """With the same journal, on the same address, as soon as the old one is gone."""

    def cut_master(self) -> None: ...
    def mend_master(self) -> None: ...
    def fill_journal(self) -> None:
        """Every write to the journal fails until `empty_journal`, also those of a master that is started meanwhile."""

    def empty_journal(self) -> None: ...
    def line(self, peer: int) -> Line: ...
    def master_line(self) -> Line: ...
    def enter_network(self) -> None: ...
    def evictions(self, peer: int) -> int:
        """How often it was told to be out of the run."""

    def leave(self, peer: int) -> None:
        """As ``kill``."""

    def join(self, count: int, then: Callable[[list[int]], None] = ...) -> None: ...
    def surplus(self) -> int:
        """Processes beyond those to keep up."""

    def excuse(self, peer: int, why: str) -> None: ...
    def excuse_ends(self, peer: int, after_s: float) -> None: ...
    def complain(self, kind: str, text: str) -> None: ...


class Fault(abc.ABC):
    """One fault at one time."""

    name: ClassVar[str]
    weight: ClassVar[float] = 1.0
    victims_needed: ClassVar[int] = 1
    needs_master: ClassVar[bool] = False  # it is the victim
    needs_links: ClassVar[bool] = False
    stalls: ClassVar[bool] = False  # the group may stand still while it lasts

    def __init__(self, lab: Lab, rng: random.Random, victims: Sequence[int]) -> None:
        self.lab, self.rng, self.victims = lab, rng, victims
        self.detail = ""  # for the report

    @property
    def victim(self) -> int:
        return self.victims[0]

    @abc.abstractmethod
    def apply(self) -> float:
        """Begin; seconds until `heal` is to be called."""

    def heal(self) -> None:  # noqa: B027  many have nothing to undo
        """End it. Called once, also when the run is cut short."""

    @classmethod
    def possible(cls, lab: Lab) -> bool:
        """Whether it makes sense now."""
        return not cls.needs_master or lab.master_may_fail()


class Kill(Fault):
    """SIGKILL; another process takes its place."""

    name, weight = "kill", 2.0

    def apply(self) -> float:
        self.lab.kill(self.victim)
        return 0.0


class HostDies(Fault):
    """Its line is cut and it is killed: nobody hears a word of its end."""

    name, weight, needs_links, stalls = "host-dies", LONG_WEIGHT, True, True

    def apply(self) -> float:
        self.lab.line(self.victim).cut()
        self.lab.kill(self.victim)
        return self.lab.peer_timeout_s  # others are touched after it


class Leave(Fault):
    """close() between two rounds."""

    name = "leave"

    def apply(self) -> float:
        self.lab.excuse(self.victim, self.name)
        self.lab.leave(self.victim)
        return 0.0


class _Stop(Fault):
    """SIGSTOP, later SIGCONT."""

    stalls = True

    def apply(self) -> float:
        self.lab.stop(self.victim)
        seconds = self.lab.peer_timeout_s * self.timeouts()
        self.detail = f"{seconds:.1f} s"
        return seconds

    @abc.abstractmethod
    def timeouts(self) -> float: ...

    def heal(self) -> None:
        self.lab.resume(self.victim)


class StopShort(_Stop):
    """For less than the time-out: nobody may be evicted."""

    name = "stop-short"

    def timeouts(self) -> float:
        return self.rng.uniform(0.05, 0.5)


class StopLong(_Stop):
    """For longer than the time-out: it is evicted, is told so when it wakes up, and comes back."""

    name, weight = "stop-long", LONG_WEIGHT

    def apply(self) -> float:
        self.lab.excuse(self.victim, self.name)
        return super().apply()

    def timeouts(self) -> float:
        return self.rng.uniform(1.3, 2.0)

    def heal(self) -> None:
        super().heal()
        self.lab.excuse_ends(self.victim, 2 * self.lab.peer_timeout_s)


class Slow(Fault):
    """Runs for one part in five of the time, in turns of some milliseconds."""

    name, stalls = "slow", True
    ON_S, OFF_S = 0.02, 0.08

    def apply(self) -> float:
        self._over = False
        self._pause()
        seconds = self.rng.uniform(0.5, 3.0)
        self.detail = f"{seconds:.1f} s"
        return seconds

    def _pause(self) -> None:
        if not self._over:
            self.lab.stop(self.victim)
            self.lab.after(self.OFF_S * self.rng.uniform(0.5, 1.5), self._run)

    def _run(self) -> None:
        if not self._over:
            self.lab.resume(self.victim)
            self.lab.after(self.ON_S * self.rng.uniform(0.5, 1.5), self._pause)

    def heal(self) -> None:
        self._over = True
        self.lab.resume(self.victim)


class _Reset(Fault):
    def apply(self) -> float:
        master_port = int(self.lab.master_address.rpartition(":")[2])
        try:
            with connections(self.lab.pid(self.victim)) as found:
                chosen = self.choose(found, master_port)
                for connection in chosen:
                    connection.reset()
            self.detail = f"{len(chosen)} of {len(found)} connections"
        except (ProcessLookupError, FileNotFoundError):
            self.detail = "it was gone"
        except PermissionError as error:
            raise FaultsError(
                f"{self.name} takes hold of sockets of processes that we started, which this system forbids ({error}): "
                "leave it out with --faults"
            ) from error
        return 0.0

    @abc.abstractmethod
    def choose(self, found: Sequence[Connection], master_port: int) -> Sequence[Connection]: ...


class ResetData(_Reset):
    """Connections to other peers are reset: one, some or all of them."""

    name = "reset-data"

    def choose(self, found: Sequence[Connection], master_port: int) -> Sequence[Connection]:
        data = [connection for connection in found if connection.remote[1] != master_port]
        return self.rng.sample(data, self.rng.choice([min(1, len(data)), len(data) // 2, len(data)]))


class ResetControl(_Reset):
    """Connections to the master are reset: messages, heartbeats, or both."""

    name = "reset-control"

    def choose(self, found: Sequence[Connection], master_port: int) -> Sequence[Connection]:
        control = [connection for connection in found if connection.remote[1] == master_port]
        return self.rng.sample(control, self.rng.randint(min(1, len(control)), len(control)))


class _OfMaster(Fault):
    """For up to twice the time-out, and nobody who is healthy may be evicted."""

    victims_needed, needs_master, stalls = 0, True, True

    def apply(self) -> float:
        self.begin()
        seconds = self.lab.peer_timeout_s * self.rng.choice([self.rng.uniform(0.05, 0.5), self.rng.uniform(1.0, 2.0)])
        self.detail = f"{seconds:.1f} s"
        return seconds

    @abc.abstractmethod
    def begin(self) -> None: ...


class StopMaster(_OfMaster):
    """SIGSTOP, later SIGCONT."""

    name, weight = "stop-master", LONG_WEIGHT

    def begin(self) -> None:
        self.lab.stop_master()

    def heal(self) -> None:
        self.lab.resume_master()


class KillMaster(_OfMaster):
    """SIGKILL; another one continues the run from the journal."""

    name = "kill-master"

    def begin(self) -> None:
        self.lab.kill_master()

    def heal(self) -> None:
        self.lab.restart_master()


class DiskFull(_OfMaster):
    """The system refuses to write the journal: nothing is decided meanwhile, and nothing is lost."""

    name, weight = "disk-full", LONG_WEIGHT

    def begin(self) -> None:
        self.lab.fill_journal()

    def heal(self) -> None:
        self.lab.empty_journal()


class DiskFullKillMaster(_OfMaster):
    """SIGKILL while its journal can't be written; another one starts on the same disk, which has room later."""

    name, weight = "disk-full-kill-master", LONG_WEIGHT

    def apply(self) -> float:
        self._healed = False
        seconds = super().apply()
        self.lab.after(seconds * self.rng.uniform(0.1, 0.5), self._kill)
        return seconds

    def begin(self) -> None:
        self.lab.fill_journal()

    def _kill(self) -> None:
        if not self._healed:
            self.lab.kill_master()

    def heal(self) -> None:
        self._healed = True
        self.lab.empty_journal()


class SilenceMaster(_OfMaster):
    """The master's line is cut: no peer hears it, and it hears none."""

    name, weight, needs_links = "silence-master", LONG_WEIGHT, True

    def begin(self) -> None:
        self.lab.cut_master()

    def heal(self) -> None:
        self.lab.mend_master()


class _Silence(Fault):
    """A peer's line is cut, later mended."""

    needs_links, stalls = True, True

    def apply(self) -> float:
        self.lab.line(self.victim).cut()
        seconds = self.lab.peer_timeout_s * self.timeouts()
        self.detail = f"{seconds:.1f} s"
        return seconds

    @abc.abstractmethod
    def timeouts(self) -> float: ...

    def heal(self) -> None:
        self.lab.line(self.victim).mend()


class SilenceShort(_Silence):
    """For less than the time-out: nobody may be evicted."""

    name = "silence-short"

    def timeouts(self) -> float:
        return self.rng.uniform(0.05, 0.4)


class SilenceLong(_Silence):
    """For longer: it is evicted and comes back."""

    name, weight = "silence-long", LONG_WEIGHT

    def apply(self) -> float:
        self.lab.excuse(self.victim, self.name)
        return super().apply()

    def timeouts(self) -> float:
        return self.rng.uniform(1.3, 2.0)

    def heal(self) -> None:
        super().heal()
        self.lab.excuse_ends(self.victim, 2 * self.lab.peer_timeout_s)


class Partition(Fault):
    """What one peer sends to another one is lost, at times the other way as well; both reach the master and the rest.

    One of the two may be evicted when it lasts, never both.
    """

    name, weight, victims_needed = "partition", LONG_WEIGHT, 2
    needs_links, stalls = True, True
    SETTLED_TIMEOUTS: ClassVar[float] = 3.0

    def apply(self) -> float:
        a, b = self.victims
        for peer in self.victims:
            self.lab.excuse(peer, self.name)
        self._evictions = {peer: self.lab.evictions(peer) for peer in self.victims}
        self._both = self.rng.random() < 0.3
        self.lab.line(a).block(self.lab.line(b))
        if self._both:
            self.lab.line(b).block(self.lab.line(a))
        timeouts = self.rng.choice([self.rng.uniform(0.1, 1.0), self.rng.uniform(1.5, 3.0)])
        seconds = self.lab.peer_timeout_s * timeouts
        self.detail = f"{'both ways' if self._both else 'one way'} to peer {b}, {seconds:.1f} s"
        return seconds

    def heal(self) -> None:
        a, b = self.victims
        self.lab.line(a).unblock(self.lab.line(b))
        if self._both:
            self.lab.line(b).unblock(self.lab.line(a))
        settled_s = self.SETTLED_TIMEOUTS * self.lab.peer_timeout_s
        for peer in self.victims:
            self.lab.excuse_ends(peer, settled_s)
        self.lab.after(settled_s, self._check)

    def _check(self) -> None:
        if all(self.lab.evictions(peer) > before for peer, before in self._evictions.items()):
            self.lab.complain("partition", f"both sides of a partition were evicted: peers {list(self.victims)}")


class PartitionMaster(Fault):
    """What a peer sends to the master is lost, or what the master sends to it. The others hear it all the while."""

    name, weight, needs_links, stalls = "partition-master", LONG_WEIGHT, True, True

    def apply(self) -> float:
        self.lab.excuse(self.victim, self.name)
        self._up = self.rng.random() < 0.5
        ends = self._ends()
        ends[0].block(ends[1])
        seconds = self.lab.peer_timeout_s * self.rng.uniform(0.1, 2.0)
        self.detail = f"{'to' if self._up else 'from'} the master, {seconds:.1f} s"
        return seconds

    def _ends(self) -> tuple[Line, Line]:
        peer, master = self.lab.line(self.victim), self.lab.master_line()
        return (peer, master) if self._up else (master, peer)

    def heal(self) -> None:
        ends = self._ends()
        ends[0].unblock(ends[1])
        self.lab.excuse_ends(self.victim, 2 * self.lab.peer_timeout_s)


class _Bent(Fault):
    """A peer's line is bent for a while. Nobody may be evicted."""

    needs_links, stalls = True, True

    def apply(self) -> float:
        bend, told = self.draw()
        self.lab.line(self.victim).bend(bend, self.rng.getrandbits(32))
        seconds = self.rng.uniform(2.0, 6.0)
        self.detail = f"{told}, {seconds:.1f} s"
        return seconds

    @abc.abstractmethod
    def draw(self) -> tuple[Bend, str]: ...

    def heal(self) -> None:
        self.lab.line(self.victim).straighten()


class Loss(_Bent):
    """Frames are lost at random, both ways."""

    name = "loss"

    def draw(self) -> tuple[Bend, str]:
        share = 10 ** self.rng.uniform(-3, -1.5)
        return Bend(loss=share), f"{share:.2%}"


class Delay(_Bent):
    """Both ways later."""

    name = "delay"

    def draw(self) -> tuple[Bend, str]:
        delay_s = self.rng.uniform(0.01, 0.15)
        return Bend(delay_s=delay_s), f"{delay_s * 1000:.0f} ms each way"


class Narrow(_Bent):
    """A home's uplink."""

    name = "narrow"

    def draw(self) -> tuple[Bend, str]:
        mbit_per_s = 10 * 10 ** self.rng.random()
        return Bend(bits_per_s=mbit_per_s * 1e6), f"{mbit_per_s:.0f} Mbit/s"


class JoinMany(Fault):
    """Two to four processes connect at once, beyond those there are."""

    name, victims_needed = "join-many", 0

    def apply(self) -> float:
        count = self.rng.randint(2, 4)
        self.detail = f"{count} at once"
        self.lab.join(count)
        return 0.0

    @classmethod
    def possible(cls, lab: Lab) -> bool:
        return lab.surplus() <= 0


class JoinerDies(Fault):
    """A process is killed some moments after it began to connect."""

    name, victims_needed = "joiner-dies", 0

    def apply(self) -> float:
        delay_s = 0.001 * 600 ** self.rng.random()
        self.detail = f"after {delay_s * 1000:.0f} ms"

        def joining(peers: list[int]) -> None:
            for peer in peers:
                self.lab.kill_later(peer, delay_s)

        self.lab.join(1, joining)
        return 0.0


class Garbage(Fault):
    """Somebody sends noise and spoilt messages to the master and to every peer."""

    name, victims_needed = "garbage", 0
    SECONDS, POLL_S = 3.0, 0.1

    def apply(self) -> float:
        self._sender = Sender(self.lab.master_address, self.rng.getrandbits(32), self.lab.enter_network)
        self._sender.start()
        return self.SECONDS

    def heal(self) -> None:
        if not self._sender.stop():
            self.lab.after(self.POLL_S, self.heal)  # nobody waits here: other faults have their times
            return
        self.detail = f"{self._sender.sent} shots at {self._sender.ports} ports"
        for what in self._sender.not_cut_off:
            self.lab.complain("garbage", f"garbage was not cut off: {what}")


KINDS: Final[dict[str, type[Fault]]] = {
    kind.name: kind
    for kind in (
        Kill, StopShort, StopLong, Slow, ResetData, ResetControl, KillMaster, StopMaster, DiskFull,
        DiskFullKillMaster, JoinMany, JoinerDies, Garbage, Leave,
        HostDies, SilenceShort, SilenceLong, SilenceMaster, Partition, PartitionMaster, Loss, Delay, Narrow,
    )
}  # fmt: skip


def choose(names: Sequence[str], *, links: bool) -> list[type[Fault]]:
    """The kinds of these names, or all that the network can carry.

    Raises:
        FaultsError: one is unknown, or needs what the network does not have.
    """
    if not names:
        return [kind for kind in KINDS.values() if links or not kind.needs_links]
    for name in names:
        known = KINDS.get(name)
        if known is None:
            raise FaultsError(f"there is no fault {name!r}; known are {', '.join(KINDS)}")
        if known.needs_links and not links:
            raise FaultsError(
                f"{name!r} cuts or bends lines between processes: it needs network namespaces, and on plain loopback "
                "there are none"
            )
    return [KINDS[name] for name in dict.fromkeys(names)]


class Drawer:
    """Which fault comes next, and upon whom: from the seed, among those that are possible now."""

    def __init__(self, kinds: Sequence[type[Fault]], rng: random.Random) -> None:
        self._kinds, self._rng = kinds, rng

    def draw(self, lab: Lab, in_step: Sequence[int], stalling: int, stalled: int = 0) -> Fault | None:
        """Args:
        in_step: members that no fault touches.
        stalling: faults under way under which the group may stand still.
        stalled: how many of that kind began since it last got on.
        """
        able = len(in_step) - HEALTHY_LEFT
        kinds = [
            kind
            for kind in self._kinds
            if (not kind.victims_needed or kind.victims_needed <= able)
            and (not kind.stalls or (stalling < STALLS_AT_ONCE and stalled < STALLS_IN_A_ROW))
            and kind.possible(lab)
        ]
        if not kinds:
            return None
        kind = self._rng.choices(kinds, [kind.weight for kind in kinds])[0]
        victims = self._rng.sample(sorted(in_step), kind.victims_needed)
        return kind(lab, random.Random(self._rng.getrandbits(64)), victims)
