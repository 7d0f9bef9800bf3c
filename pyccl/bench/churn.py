"""``pyccl bench join``, ``sync``, ``loss`` and ``restart``: a group in a loop of all-reduces that one comes to or goes
from, or that is without its master for a while.

arrivals   a process that is loaded and waits is told to go: connect(), sync_shared_state(), some rounds, leave
losses     a member is killed (SIGKILL), or stopped (SIGSTOP) so that it falls silent; then another takes its place
restarts   the master is killed (SIGKILL) and comes back with its journal; then a newcomer that waits is told to go
A pause is the time between two completed all-reduces of one member. All times are from inside the processes, but for
the moment of a kill or stop, which is read on the same clock just before the signal is sent.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from pyccl.bench import lines
from pyccl.bench.all_reduce import SILENCE_BEYOND_S, TIMEOUT_S
from pyccl.bench.conductor import BenchError, Conductor, ExitStatus, Fields
from pyccl.bench.figures import GIB, NS, Summary, gaps_within_ns, longest_gap_ns, summarize
from pyccl.bench.places import InLab
from pyccl.netlab import Lab, NetworkError, Scenario
from pyccl.processes.children import Children

VECTOR_BYTES: Final = 4096
SMALL_STATE_BYTES: Final = 64 << 10
ROUNDS_OF_A_NEWCOMER: Final = 50  # it stays for these, so that its going is told apart from its coming
STATE_SEED: Final = 1
OTHER_SEED: Final = 1000
CAUSES: Final = ("killed", "silent")
PEER_TIMEOUT_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class ArrivalPlan:
    """world: members once the newcomer is in. data: a kind of `content`. timeout_s: of a sync, and of all else.
    relay: the master does."""

    world: int = 4
    iterations: int = 5
    state_bytes: int = SMALL_STATE_BYTES
    vector_bytes: int = VECTOR_BYTES
    data: str = "random"
    timeout_s: float = TIMEOUT_S
    relay: bool = False


@dataclass(frozen=True, slots=True)
class Arrival:
    """One newcomer.

    stall_s: longest pause of any member that overlaps its coming. chunk_bytes: of state; rx_bytes: as they came, some
    perhaps packed; packing: what was measured of that. wire_rx_bytes: on its TCP sockets from connect() to the end of
    the sync. cpu_s: of all processes but the master's, while they were in the sync.
    extra_bytes: most resident memory beyond what it had, with its state, just before the sync.
    """

    connect_s: float
    sync_s: float
    stall_s: float
    rx_bytes: int
    chunk_bytes: int
    packing: str
    source_bytes: tuple[int, ...]  # sent by each holder
    wire_rx_bytes: int
    cpu_s: float
    extra_bytes: int

    @property
    def total_s(self) -> float:
        return self.connect_s + self.sync_s

    @property
    def mb_per_s(self) -> float:
        return self.chunk_bytes / self.sync_s / 1e6

    @property
    def cpu_s_per_gib(self) -> float:
        return self.cpu_s / (self.chunk_bytes / GIB)


@dataclass(frozen=True, slots=True)
class Quiet:
    """The members before anybody came or went: median and longest pause between all-reduces."""

    median_s: float
    longest_s: float


@dataclass(frozen=True, slots=True)
class Arrivals:
    """holder_extra_bytes: as `Arrival.extra_bytes`, of the member with the most, over all syncs."""

    plan: ArrivalPlan
    arrivals: tuple[Arrival, ...]
    quiet: Quiet
    holder_extra_bytes: int

    def summary(self, name: str) -> Summary:
        return summarize([getattr(arrival, name) for arrival in self.arrivals])

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": asdict(self.plan),
            **{name: self.summary(name).to_json() for name in ("connect_s", "sync_s", "total_s", "stall_s", "cpu_s")},
            "sync_mb_per_s": self.summary("mb_per_s").to_json(),
            "sync_cpu_s_per_gib": self.summary("cpu_s_per_gib").to_json(),
            "extra_bytes": self.summary("extra_bytes").to_json(),
            "holder_extra_bytes": self.holder_extra_bytes,
            "quiet": asdict(self.quiet),
            "arrivals": [asdict(arrival) for arrival in self.arrivals],
        }


@dataclass(frozen=True, slots=True)
class LossPlan:
    world: int = 3
    iterations: int = 5
    peer_timeout_s: float = PEER_TIMEOUT_S
    vector_bytes: int = 1 << 20
    causes: tuple[str, ...] = CAUSES


@dataclass(frozen=True, slots=True)
class Loss:
    """One member lost. gap_s: longest pause of any survivor; recovered_s: from the signal to the last survivor's next
    completed all-reduce."""

    cause: str
    gap_s: float
    recovered_s: float


@dataclass(frozen=True, slots=True)
class Losses:
    plan: LossPlan
    losses: tuple[Loss, ...]
    quiet: Quiet

    def summary(self, cause: str, name: str) -> Summary:
        return summarize([getattr(loss, name) for loss in self.losses if loss.cause == cause])

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": asdict(self.plan),
            **{
                cause: {name: self.summary(cause, name).to_json() for name in ("gap_s", "recovered_s")}
                for cause in self.plan.causes
            },
            "quiet": asdict(self.quiet),
            "losses": [asdict(loss) for loss in self.losses],
        }


@dataclass(frozen=True, slots=True)
class RestartPlan:
    world: int = 4  # with the newcomer
    iterations: int = 5
    down_s: float = 1.0
    vector_bytes: int = VECTOR_BYTES


@dataclass(frozen=True, slots=True)
class Restart:
    """One death of the master. All-reduces, of all members, until the newcomer was in; none failed, or there would be
    no result. gap_s: longest pause of a member while there was no master. join_s: from its listening again until the
    newcomer was a member."""

    operations: int
    gap_s: float
    join_s: float


@dataclass(frozen=True, slots=True)
class Restarts:
    plan: RestartPlan
    restarts: tuple[Restart, ...]
    quiet: Quiet

    def summary(self, name: str) -> Summary:
        return summarize([getattr(restart, name) for restart in self.restarts])

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": asdict(self.plan),
            **{name: self.summary(name).to_json() for name in ("operations", "gap_s", "join_s")},
            "quiet": asdict(self.quiet),
            "restarts": [asdict(restart) for restart in self.restarts],
        }


class _Group:
    """The founders, and who comes later."""

    def __init__(
        self,
        conductor: Conductor,
        vector_bytes: int,
        state_bytes: int,
        peer_timeout_s: float,
        journal: Path | None = None,
        data: str = "random",
        timeout_s: float = TIMEOUT_S,
        relay: bool = False,
    ) -> None:
        self._conductor = conductor
        self._timeout_s = timeout_s
        conductor.silence_s = timeout_s + SILENCE_BEYOND_S
        self._vector_bytes, self._state_bytes = vector_bytes, max(state_bytes, 1)
        self._data = data
        self._later = 0
        self.started_ns = 0  # the founders were synchronised
        conductor.start_master(peer_timeout_s, journal, relay=relay)

    def found(self, count: int) -> list[str]:
        names = [f"founder {number}" for number in range(count)]
        self._conductor.start_all(names, "member", lambda number: self._settings(count, STATE_SEED, 0))
        joined = self._conductor.wait("joined", names)
        self.wait_until_steady(names, count)
        self.started_ns = max(fields["synced_ns"] for fields in joined.values())
        return names

    def newcomer(self, leave_after: int) -> str:
        """A process that is ready to go and knows another content of the state."""
        self._later += 1
        name = f"newcomer {self._later}"
        self._conductor.start(name, "member", self._settings(0, OTHER_SEED + self._later, leave_after))
        self._conductor.wait("ready", [name])
        return name

    def _settings(self, founders: int, seed: int, leave_after: int) -> dict[str, object]:
        return {
            "founders": founders, "size_bytes": self._vector_bytes, "state_bytes": self._state_bytes,
            "seed": seed, "data": self._data, "leave_after": leave_after,
            "timeout_s": self._timeout_s,
        }  # fmt: skip

    def wait_for_world(self, names: Sequence[str], members: int) -> dict[str, Fields]:
        return self._conductor.wait("world", names, lambda fields: bool(fields["members"] == members))

    def wait_until_steady(self, names: Sequence[str], members: int) -> None:
        """Until they have gone through some rounds in a group of this size."""
        self._conductor.wait("steady", names, lambda fields: bool(fields["members"] == members))

    def finish(self, names: Sequence[str]) -> dict[str, Fields]:
        """Stop those who stay; their records."""
        self._conductor.tell(names[:1], "stop")
        return self._conductor.wait("done", names)


def measure_arrivals(plan: ArrivalPlan, conductor: Conductor) -> Arrivals:
    """Let one newcomer after the other join world - 1 members.

    Raises:
        BenchError: a process failed, or a newcomer did not get the members' state.
    """
    group = _Group(
        conductor, plan.vector_bytes, plan.state_bytes, peer_timeout_s=30.0, data=plan.data, timeout_s=plan.timeout_s,
        relay=plan.relay,
    )  # fmt: skip
    founders = group.found(plan.world - 1)
    comings: list[tuple[Fields, Fields]] = []
    quiet_until_ns = 0
    for _ in range(plan.iterations):
        newcomer = group.newcomer(ROUNDS_OF_A_NEWCOMER)
        quiet_until_ns = quiet_until_ns or time.monotonic_ns()
        conductor.tell([newcomer], "go")
        joined = conductor.wait("joined", [newcomer])[newcomer]
        comings.append((joined, conductor.wait("done", [newcomer])[newcomer]))
        group.wait_until_steady(founders, plan.world - 1)
    records = group.finish(founders)
    _check_state(records, [done for _, done in comings])
    ends = [records[name]["ends_ns"] for name in founders]
    arrivals = tuple(
        _arrival(joined, done, ends, [records[name]["served"] for name in founders], number)
        for number, (joined, done) in enumerate(comings)
    )
    holder_extra_bytes = max(int(records[name]["extra_bytes"]) for name in founders)
    return Arrivals(plan, arrivals, _quiet(ends, group.started_ns, quiet_until_ns), holder_extra_bytes)


def measure_arrivals_in(scenario: Scenario, plan: ArrivalPlan, children: Children) -> Arrivals:
    """As `measure_arrivals`, over the lines of a lab: founders on its first hosts, newcomers on the last, the master on
    the first that all can dial.

    Args:
        plan: its world is that of the scenario, its time-out what the lines make of it.

    Raises:
        BenchError: no lab can be had here, no host is there that all can dial, or as `measure_arrivals`.
    """
    master, timeout_s = lines.master_rank(scenario), lines.transfer_timeout_s(scenario, plan.state_bytes)
    last = len(scenario.hosts) - 1

    def host_of(name: str) -> int:
        kind, _, number = name.partition(" ")
        return {"founder": int(number or 0), "newcomer": last}.get(kind, master)

    plan = replace(plan, world=last + 1, timeout_s=timeout_s, relay=lines.need_relay(scenario))
    try:
        with Lab(scenario) as lab:
            return measure_arrivals(plan, Conductor(children, InLab(lab, host_of)))
    except NetworkError as error:
        raise BenchError(ExitStatus.NO_LAB, str(error)) from error


def _check_state(members: dict[str, Fields], newcomers: Sequence[Fields]) -> None:
    digests = {fields["digest"] for fields in (*members.values(), *newcomers)}
    if len(digests) != 1:
        raise BenchError(ExitStatus.WRONG_VALUES, f"members and newcomers hold different states: {sorted(digests)}")


def _arrival(
    joined: Fields,
    done: Fields,
    ends: Sequence[Sequence[int]],
    served: Sequence[Sequence[dict[str, float]]],
    number: int,
) -> Arrival:
    started, member, synced = joined["started_ns"], joined["member_ns"], joined["synced_ns"]
    if not joined["changed"]:
        raise BenchError(ExitStatus.WRONG_VALUES, "a newcomer with another content was not given the state")
    return Arrival(
        connect_s=(member - started) / NS,
        sync_s=(synced - member) / NS,
        stall_s=_longest(ends, started, synced),
        rx_bytes=joined["rx_bytes"],
        chunk_bytes=joined["chunk_bytes"],
        packing=joined["packing"],
        source_bytes=tuple(int(syncs[number]["tx_bytes"]) for syncs in served),
        wire_rx_bytes=joined["wire_rx_bytes"],
        cpu_s=joined["cpu_s"] + sum(syncs[number]["cpu_s"] for syncs in served),
        extra_bytes=done["extra_bytes"],
    )


def _longest(ends: Sequence[Sequence[int]], start_ns: int, end_ns: int) -> float:
    return max(longest_gap_ns(times, start_ns, end_ns) or 0 for times in ends) / NS


def _quiet(ends: Sequence[Sequence[int]], start_ns: int, end_ns: int) -> Quiet:
    gaps = [gap for times in ends for gap in gaps_within_ns(times, start_ns, end_ns)]
    summary = summarize(gaps or [0])
    return Quiet(summary.median / NS, summary.max / NS)


def measure_losses(plan: LossPlan, conductor: Conductor) -> Losses:
    """Lose one member after the other, each of whom is replaced.

    Raises:
        BenchError: a process failed, or the survivors did not go on.
    """
    group = _Group(conductor, plan.vector_bytes, SMALL_STATE_BYTES, plan.peer_timeout_s)
    *survivors, victim = group.found(plan.world)
    lost: list[tuple[str, int, int]] = []  # cause, when, last survivor's first completion after it
    quiet_until_ns = time.monotonic_ns()
    for cause in plan.causes:
        for _ in range(plan.iterations):
            conductor.may_end(victim)
            at_ns = time.monotonic_ns()
            os.kill(conductor.pid(victim), signal.SIGKILL if cause == "killed" else signal.SIGSTOP)
            told = group.wait_for_world(survivors, plan.world - 1)
            lost.append((cause, at_ns, max(fields["at_ns"] for fields in told.values())))
            conductor.kill(victim)
            victim = group.newcomer(0)
            conductor.tell([victim], "go")
            conductor.wait("joined", [victim])
            group.wait_until_steady([*survivors, victim], plan.world)
    records = group.finish([*survivors, victim])
    ends = [records[name]["ends_ns"] for name in survivors]
    losses = tuple(Loss(cause, _longest(ends, at, after), (after - at) / NS) for cause, at, after in lost)
    return Losses(plan, losses, _quiet(ends, group.started_ns, quiet_until_ns))


def measure_restarts(plan: RestartPlan, conductor: Conductor) -> Restarts:
    """Kill the master and start it again, some times.

    Raises:
        BenchError: a process failed; an all-reduce did, or the newcomer was not let in.
    """
    with tempfile.TemporaryDirectory(prefix="pyccl-bench-") as directory:
        journal = Path(directory) / "journal"
        group = _Group(conductor, plan.vector_bytes, SMALL_STATE_BYTES, peer_timeout_s=PEER_TIMEOUT_S, journal=journal)
        founders = group.found(plan.world - 1)
        outages: list[tuple[int, int, int]] = []  # death, listening again, the newcomer is in
        quiet_until_ns = time.monotonic_ns()
        for _ in range(plan.iterations):
            newcomer = group.newcomer(ROUNDS_OF_A_NEWCOMER)
            killed_ns = time.monotonic_ns()
            conductor.kill_master()
            time.sleep(plan.down_s)
            conductor.restart_master()
            back_ns = time.monotonic_ns()
            conductor.tell([newcomer], "go")
            joined = conductor.wait("joined", [newcomer])[newcomer]
            outages.append((killed_ns, back_ns, joined["member_ns"]))
            conductor.wait("done", [newcomer])
            group.wait_until_steady(founders, plan.world - 1)
        records = group.finish(founders)
    ends = [records[name]["ends_ns"] for name in founders]
    restarts = tuple(
        Restart(
            operations=sum(killed <= end <= member for times in ends for end in times),
            gap_s=_longest(ends, killed, back),
            join_s=(member - back) / NS,
        )
        for killed, back, member in outages
    )
    return Restarts(plan, restarts, _quiet(ends, group.started_ns, quiet_until_ns))
