"""What the master's machine keeps: groups, their peers, and what is open in them. Plain records without rules."""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field

from pyccl._proto import limits
from pyccl._proto.epoch import NO_ID, Address, Epoch, Member
from pyccl._proto.messages import Blocked, Count, EpochCommit, EpochPropose, Hello, Measured, Report
from pyccl._proto.plan import Plan
from pyccl._proto.planning import Planning
from pyccl._proto.suspicion import Complaint


class Standing(enum.Enum):
    PENDING = "a newcomer that waits for a safe point"
    ENTERING = "a newcomer in an epoch that is decided and not yet durable"
    MEMBER = "in the current epoch of its group"


PeerKey = tuple[bytes, bytes]  # peer id, incarnation


@dataclass(slots=True)
class Said:
    """What a peer has said in the current epoch; replaced whole when the epoch changes."""

    arrived: dict[tuple[int, int], int] | None = None  # (space, tag) -> submitted
    arrived_at: float = 0.0
    ready: int = 0  # version of the proposal it is ready for
    report: Report | None = None
    blocked: Blocked | None = None


@dataclass(slots=True)
class Peer:
    """The one record of an incarnation."""

    peer: bytes
    incarnation: bytes
    group: int
    addresses: tuple[Address, ...]
    library: str
    order: int  # of arrival: newcomers are served in it
    heard_at: float
    seen: str = ""  # the host that its control connection comes from, or the last one came from
    shown: deque[str] = field(default_factory=lambda: deque(maxlen=limits.PUNCHES_MAX))  # places of its reflections
    conn: int | None = None
    standing: Standing = Standing.PENDING
    said: Said = field(default_factory=Said)
    measured: Measured | None = None  # of its links: outlives the epoch
    complaints: dict[bytes, Complaint] = field(default_factory=dict)
    lost: str = ""  # why it is left out of the ballot; "": it is not
    lost_at: float = 0.0
    lost_for_good: bool = False  # it left, or does not answer: being heard does not take it back
    left: bool = False  # by its own word
    told_pending: int = -1  # -1: nothing yet on this connection
    told_observers: tuple[Member, ...] = ()
    told_relays: tuple[Member, ...] = ()

    @property
    def key(self) -> PeerKey:
        return self.peer, self.incarnation

    @property
    def member(self) -> Member:
        return Member(self.peer, self.incarnation, self.addresses, self.seen)


@dataclass(frozen=True, slots=True, eq=False)
class MadePlan:
    peers: tuple[bytes, ...]  # the members it was made for, in rank order
    plan: Plan


@dataclass(slots=True)
class Proposal:
    version: int
    epoch: Epoch
    cut: tuple[Count, ...]  # that concerns all members; newcomers have submitted nothing
    of_pairs: dict[bytes, tuple[Count, ...]]  # member -> the rest of its cut, if there is any
    newcomers: tuple[PeerKey, ...]
    since: float
    made_plan: MadePlan | None = None  # that it carries, if it is not what the epoch had
    stale: bool = False  # a count above the cut, or a newcomer gone, or another plan: to be made again

    told: dict[tuple[bool, tuple[Count, ...]], EpochPropose] = field(default_factory=dict)  # one to all of the same cut

    def message_to(self, record: Peer) -> EpochPropose:
        counted = record.key not in self.newcomers
        of_pairs = self.of_pairs.get(record.peer, ()) if counted else ()
        same = (counted and bool(self.cut), of_pairs)  # the cut of all may be long: not to be hashed for each of them
        if same not in self.told:
            self.told[same] = EpochPropose(self.version, self.epoch, self.cut + of_pairs if counted else ())
        return self.told[same]


@dataclass(slots=True)
class Ballot:
    number: int
    kind: str
    detail: str
    members: tuple[PeerKey, ...]
    since: float
    blocked: bool = False  # a mismatch seen in what Blocked says
    undecided: str = ""  # why all reports are not enough


@dataclass(slots=True)
class Group:
    group: int
    commit: EpochCommit | None = None  # of the current epoch, repeated to those who missed it
    last_number: int = 0  # outlives an epoch that lost all its members
    last_id: bytes = NO_ID
    version: int = 0  # of the newest proposal
    ballot_number: int = 0  # of the newest ballot
    proposal: Proposal | None = None
    ballot: Ballot | None = None
    deciding: EpochCommit | None = None  # on its way to the journal; proposal or ballot stay open until it is there
    planning: Planning = field(default_factory=Planning)
    next_plan: MadePlan | None = None  # for the next safe point
    has_met: bool = False  # two have been its members since it was founded here
    roster: list[Peer] = field(default_factory=list)  # of the epoch of `roster_of`: looked up for every message
    ranks: tuple[bytes, ...] = ()  # their ids
    roster_of: EpochCommit | None = None

    @property
    def epoch(self) -> Epoch | None:
        return self.commit.epoch if self.commit is not None else None


@dataclass(slots=True)
class Conn:
    since: float
    host: str = ""  # it comes from
    peer: Peer | None = None  # None until its Hello
    greeted: bool = False  # with a Hello; the answer may have to wait
    asked: Hello | None = None  # which was answered with Unknown
    recalled: bool = False  # what it told then was judged


def has_reported(record: Peer, ballot: Ballot) -> bool:
    return record.said.report is not None and record.said.report.ballot == ballot.number
