"""Planning: the better plan for a group's next epoch. The master's part of topology; the search itself is a thread's.

For a set of members and what they have told there is one `Job`. The shell searches it in a thread (``search``, pure and
bounded by its effort) and brings the `Found`; the safe point waits for that, though not for ever. Of more members than
are searched exactly there is a second, longer job, for which nobody waits: its plan is there for a later safe point.
Only a plan that predicts a gain over what the epoch would have without it becomes news that is `better`: never for two
members, who swap whole vectors, but they are told what that is predicted to take.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from pyccl._proto import limits, topology
from pyccl._proto.plan import NEVER, PACE_DIRECT, Plan, decode_untrusted
from pyccl._proto.ring_order import EXACT_MAX
from pyccl._proto.shares import equal_shares
from pyccl._proto.topology import REFERENCE_BYTES, Choice, Line, Network

EFFORT: Final = 300_000  # steps; about 0.1 s
EFFORT_LONG: Final = 3_000_000  # about 1 s, several with hundreds of members
AWAITED_S: Final = 2.0  # a search that a safe point waits for takes no longer, or comes too late for it
_WEIGHTS: Final = 1_000_000  # that shares are rounded to
_SHARES_LOGGED: Final = 16


@dataclass(frozen=True, slots=True)
class Job:
    """present: the plan that the next epoch would have anyway, as its bytes."""

    peers: tuple[bytes, ...]
    network: Network
    present: bytes
    effort: int


@dataclass(frozen=True, slots=True)
class Found:
    best: Choice
    present: Choice


@dataclass(frozen=True, slots=True)
class News:
    """A search's end. peers: in rank order, for whom `plan` is."""

    peers: tuple[bytes, ...]
    plan: Plan
    found: Found

    @property
    def better(self) -> bool:
        return topology.is_better(self.found.best, self.found.present)

    def fields(self) -> dict[str, Any]:
        """For the log and the status: seconds are predicted for REFERENCE_BYTES."""
        best, present = self.found.best, self.found.present
        shares = [round(share, 4) for share in best.shares[:_SHARES_LOGGED]]
        return {
            "adopt": self.better,
            "algorithm": best.algorithm(REFERENCE_BYTES),
            "bytes": REFERENCE_BYTES,
            "predicted_s": _told(best.seconds(REFERENCE_BYTES)),
            "present_s": _told(present.seconds(REFERENCE_BYTES)),
            "direct": _line_told(best.direct),
            "ring": _line_told(best.ring),
            "coded": _line_told(best.coded),
            "present_direct": _line_told(present.direct),
            "present_ring": _line_told(present.ring),
            "present_coded": _line_told(present.coded),
            "piece_bytes": best.piece_bytes,
            "ring_from_bytes": self.plan.ring_from_bytes if self.plan.ring_from_bytes != NEVER else "never",
            "shares": shares if len(best.shares) <= _SHARES_LOGGED else [*shares, "..."],
        }


def search(job: Job) -> Found:
    plan = decode_untrusted(job.present, len(job.peers))
    ring_from_bytes = topology.NEVER if plan.ring_from_bytes == NEVER else plan.ring_from_bytes
    ring = plan.ring or range(len(job.peers))
    present = topology.judged(
        job.network, _parts(plan, len(job.peers)), ring, ring_from_bytes, plan.piece_bytes or topology.PIECE_BYTES
    )
    return Found(topology.choose(job.network, job.effort), present)


def plan_of(choice: Choice) -> Plan:
    """As it travels: shares as weights, rounded."""
    shares = tuple(round(share * _WEIGHTS) for share in choice.shares)
    size = choice.ring_from_bytes
    piece = choice.piece_bytes % topology.PIECE_BYTES
    if size == topology.NEVER:
        return Plan(shares, choice.order, NEVER, piece)
    pace = int(PACE_DIRECT * choice.ring.pace / choice.direct.pace)  # 0 where direct can't be done
    return Plan(shares, choice.order, min(int(size), limits.U64_MAX - 1), piece, min(pace, PACE_DIRECT - 1))


class Planning:
    """Of one group."""

    def __init__(self) -> None:
        self.version = 0  # of what the members have told
        self.ticket = 0  # of the newest job
        self.since = 0.0
        self.waits = False
        self._key: tuple[int, tuple[bytes, ...]] = (0, ())
        self._job: Job | None = None

    def has(self, peers: tuple[bytes, ...]) -> bool:
        """A job was made for these, as things stand."""
        return self._key == (self.version, peers)

    def begin(self, peers: tuple[bytes, ...], network: Network | None, present: bytes, now: float) -> Job | None:
        """The job for these members, which is waited for; None: there is nothing to plan, or nothing to plan by."""
        self._key, self._job = (self.version, peers), None
        if network is None:
            self.waits = False
            return None
        return self._next(Job(peers, network, present, EFFORT), now, waits=True)

    def found(self, ticket: int, found: Found, now: float) -> tuple[Job | None, News | None]:
        """A job has ended: another one for the same members, if more effort may find more; and what it brought."""
        job = self._job
        if ticket != self.ticket or job is None:
            return None, None
        news = News(job.peers, plan_of(found.best), found)
        self.waits, self._job = False, None
        if job.effort == EFFORT_LONG or len(job.peers) <= EXACT_MAX:
            return None, news
        present = news.plan.encode(len(job.peers)) if news.better else job.present
        return self._next(Job(job.peers, job.network, present, EFFORT_LONG), now, waits=False), news

    def awaited(self, now: float) -> bool:
        return self.waits and now - self.since < AWAITED_S

    def restart_timers(self, now: float) -> None:
        self.since = now

    def _next(self, job: Job, now: float, *, waits: bool) -> Job:
        """Who tells something new all the time makes nobody wait longer."""
        if not self.awaited(now):
            self.since = now
        self.ticket += 1
        self._job, self.waits = job, waits
        return job


def _parts(plan: Plan, world: int) -> tuple[float, ...]:
    if not plan.shares:
        return equal_shares(world)
    total = sum(plan.shares)
    return tuple(share / total for share in plan.shares)


def _line_told(line: Line) -> list[Any]:
    return [_told(line.delay_s), line.pace, line.lag_bytes, line.lag_pace]


def _told(seconds: float) -> float | str:
    return round(seconds, 4) if seconds < topology.UNKNOWN else "impossible"
