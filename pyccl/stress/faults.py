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
from pyccl.stress.sockets import Connection, connections

HEALTHY_LEFT: Final = 2  # members that no fault touches, so that the state survives
STALLS_AT_ONCE: Final = 2  # so that the group gets on between them


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
    def stop_master(self) -> None: ...
    def resume_master(self) -> None: ...
    def leave(self, peer: int) -> None:
        """As ``kill``."""

    def join(self, count: int, then: Callable[[list[int]], None] = ...) -> None: ...
    def surplus(self) -> int:
        """Processes beyond those to keep up."""

    def excuse(self, peer: int, why: str) -> None: ...
    def excuse_ends(self, peer: int, after_s: float) -> None: ...
    def complain(self, text: str) -> None: ...


class Fault(abc.ABC):
    """One fault at one time."""

    name: ClassVar[str]
    weight: ClassVar[float] = 1.0
    needs_victim: ClassVar[bool] = True
    needs_links: ClassVar[bool] = False
    stalls: ClassVar[bool] = False  # the group may stand still while it lasts

    def __init__(self, lab: Lab, rng: random.Random, victim: int | None) -> None:
        self.lab, self.rng = lab, rng
        self._victim = victim
        self.detail = ""  # for the report

    @property
    def victim(self) -> int:
        assert self._victim is not None
        return self._victim

    @abc.abstractmethod
    def apply(self) -> float:
        """Begin; seconds until `heal` is to be called."""

    def heal(self) -> None:  # noqa: B027  many have nothing to undo
        """End it. Called once, also when the run is cut short."""

    @classmethod
    def possible(cls, lab: Lab) -> bool:
        """Whether it makes sense now."""
        return True


class Kill(Fault):
    """SIGKILL; another process takes its place."""

    name, weight = "kill", 2.0

    def apply(self) -> float:
        self.lab.kill(self.victim)
        return 0.0


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

    name = "stop-long"

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


class StopMaster(Fault):
    """SIGSTOP of the master, up to twice the time-out: nobody who is healthy may be evicted."""

    name, needs_victim, stalls = "stop-master", False, True

    def apply(self) -> float:
        self.lab.stop_master()
        seconds = self.lab.peer_timeout_s * self.rng.choice([self.rng.uniform(0.05, 0.5), self.rng.uniform(1.0, 2.0)])
        self.detail = f"{seconds:.1f} s"
        return seconds

    def heal(self) -> None:
        self.lab.resume_master()


class JoinMany(Fault):
    """Two to four processes connect at once, beyond those there are."""

    name, needs_victim = "join-many", False

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

    name, needs_victim = "joiner-dies", False

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

    name, needs_victim = "garbage", False
    SECONDS, POLL_S = 3.0, 0.1

    def apply(self) -> float:
        self._sender = Sender(self.lab.master_address, self.rng.getrandbits(32))
        self._sender.start()
        return self.SECONDS

    def heal(self) -> None:
        if not self._sender.stop():
            self.lab.after(self.POLL_S, self.heal)  # nobody waits here: other faults have their times
            return
        self.detail = f"{self._sender.sent} shots at {self._sender.ports} ports"
        for what in self._sender.not_cut_off:
            self.lab.complain(f"garbage was not cut off: {what}")


KINDS: Final[dict[str, type[Fault]]] = {
    kind.name: kind
    for kind in (
        Kill, StopShort, StopLong, Slow, ResetData, ResetControl, StopMaster, JoinMany, JoinerDies, Garbage, Leave,
    )
}  # fmt: skip
# What the contract names and processes on one loopback can't show: each pair needs a line of its own.
OF_LINKS: Final = ("silence", "partition", "loss", "delay")


def choose(names: Sequence[str], *, links: bool) -> list[type[Fault]]:
    """The kinds of these names, or all that the network can carry.

    Raises:
        FaultsError: one is unknown, or needs what the network does not have.
    """
    if not names:
        return [kind for kind in KINDS.values() if links or not kind.needs_links]
    for name in names:
        known = KINDS.get(name)
        if (name in OF_LINKS or (known is not None and known.needs_links)) and not links:
            raise FaultsError(
                f"{name!r} cuts or bends lines between processes: it needs network namespaces, and on plain loopback "
                "there are none"
            )
        if known is None:
            raise FaultsError(f"there is no fault {name!r}; known are {', '.join(KINDS)}")
    return [KINDS[name] for name in dict.fromkeys(names)]


class Drawer:
    """Which fault comes next, and upon whom: from the seed, among those that are possible now."""

    def __init__(self, kinds: Sequence[type[Fault]], rng: random.Random) -> None:
        self._kinds, self._rng = kinds, rng

    def draw(self, lab: Lab, in_step: Sequence[int], stalling: int) -> Fault | None:
        """in_step: members that no fault touches. stalling: faults under way under which the group may stand still."""
        able = len(in_step) > HEALTHY_LEFT
        kinds = [
            kind
            for kind in self._kinds
            if (able or not kind.needs_victim)
            and (stalling < STALLS_AT_ONCE or not kind.stalls)
            and kind.possible(lab)
        ]
        if not kinds:
            return None
        kind = self._rng.choices(kinds, [kind.weight for kind in kinds])[0]
        victim = self._rng.choice(sorted(in_step)) if kind.needs_victim else None
        return kind(lab, random.Random(self._rng.getrandbits(64)), victim)
