"""MasterMachine: keeps the member lists of one run, opens their epochs, settles what a lost peer left open.

It knows nothing of sockets, threads, clocks or tensors: inputs carry `now` in seconds, effects come back. It never
sees data, and between safe points nobody needs it. Spec: proto/wire.md 4; the rules behind it: design.md 5 and 6.

One record per incarnation holds everything that incarnation has said (`Peer`): arrivals, answers, reports and
complaints are counted from these records and kept nowhere else. Every input changes a record and then calls
``_advance``, which derives from the records what follows: a founding, a ballot, a verdict, a proposal, a commit.

    an epoch ends in one of two ways, and only ``_commit_epoch`` ends it
    safe point   all members Arrive -> EpochPropose(v) -> Ready(v) from all -> commit "join"
                 Behind, a dropped newcomer: the same with v+1.  Withdraw: Cancelled(v).
    ballot       a loss, a settle, a mismatch -> Flush(n) -> Report(n) from all survivors -> commit with verdicts
                 another loss, or a suspect that is heard again: the same with n+1.  A ballot drops a proposal.

Invariants: numbers rise, and one (group, number) has one id and one member list; an epoch's members are all in its
predecessor (or newcomers that said Ready); an evicted incarnation is in no later epoch; no ballot ends but in an epoch.

With a journal an epoch is decided (`_decide`), made durable by the shell, and then committed; nothing that depends on
it leaves before. What is decided stays decided: a record that failed to be written may be found by the next master all
the same. Until it is durable the group decides nothing more; what its peers say is heard and waits.
"""

from __future__ import annotations

import json
from collections import OrderedDict, deque
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from pyccl._proto import ballot as ballots
from pyccl._proto import limits, measuring
from pyccl._proto import plan as plans
from pyccl._proto.candidates import place
from pyccl._proto.channel import check_told_untrusted, pair_of, participants
from pyccl._proto.dialback import DialBacks
from pyccl._proto.epoch import NO_ID, Address, Epoch, Member, make_epoch
from pyccl._proto.master_records import (
    Ballot,
    Conn,
    Group,
    MadePlan,
    Peer,
    PeerKey,
    Proposal,
    Said,
    Standing,
    has_reported,
)
from pyccl._proto.messages import (
    KIND_FOUND,
    KIND_JOIN,
    KIND_LOSS,
    KIND_MISMATCH,
    KIND_SETTLE,
    PATH_NAMES,
    Addresses,
    Alive,
    Arrive,
    Behind,
    Blocked,
    Cancelled,
    Count,
    DialAsk,
    Dialed,
    DialTold,
    Differs,
    Entered,
    EpochCommit,
    Evicted,
    Flush,
    Heartbeat,
    Hello,
    Key,
    Leave,
    Measured,
    Members,
    Message,
    Moved,
    Observe,
    OpVerdict,
    Pending,
    Punch,
    PunchAsk,
    Ready,
    Recall,
    Rejected,
    RelayAsk,
    RelayCall,
    RelayFor,
    RelayOver,
    Relays,
    Report,
    Settle,
    Status,
    StatusAsk,
    Suspect,
    Trust,
    Unblocked,
    Undecided,
    Unreachable,
    Welcome,
    Withdraw,
    clip,
)
from pyccl._proto.messages import Observers as ObserversMessage
from pyccl._proto.mismatch import blocked_detail, differs_detail, make_detail, short
from pyccl._proto.observers import Observers
from pyccl._proto.past import (
    NONCE_BITS,
    Committed,
    Dissolved,
    Fenced,
    Forgotten,
    Past,
    Record,
    fence,
    start_of,
)
from pyccl._proto.planning import Found, Job
from pyccl._proto.reaching import Offers, are_shown, begin
from pyccl._proto.suspicion import CAUSE_UNREACHABLE, Complaint, Line, Seen, lost_members, refused_at_once
from pyccl._proto.takeover import Signer, Takeover
from pyccl.errors import RemoteProtocolError

# ---- effects --------------------------------------------------------------------------------------------------------

KICKED: Final = "kicked out of the run by its operator"


@dataclass(frozen=True, slots=True)
class Effect:
    """One thing for the shell to do, in order."""


@dataclass(frozen=True, slots=True)
class Send(Effect):
    """Queue the message on the connection. A connection that can't take it is closed and ``disconnected``."""

    conn: int
    message: Message


@dataclass(frozen=True, slots=True)
class Close(Effect):
    """Flush what was sent, then close. The machine has already forgotten the connection."""

    conn: int
    reason: str


@dataclass(frozen=True, slots=True)
class Log(Effect):
    """A decision and its reason; peers are named by the first digits of their ids."""

    event: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class StrangerRefused(Effect):
    """A line for the log, if there is room: who never greeted is no event of the run."""

    reason: str


@dataclass(frozen=True, slots=True)
class Persist(Effect):
    """Write the record behind all before it, then ``persisted(ticket)``. Again and again until it is durable; and
    ``not_persisted`` as often as it fails."""

    ticket: int
    record: Record


@dataclass(frozen=True, slots=True)
class Search(Effect):
    """``planning.search(job)`` in a thread, one at a time, then ``planned(group, ticket, what was found)``."""

    group: int
    ticket: int
    job: Job


@dataclass(frozen=True, slots=True)
class Out(Effect):
    """This incarnation is out of the run: nothing is kept for it, or carried. Perhaps told twice."""

    peer: bytes
    incarnation: bytes


@dataclass(frozen=True, slots=True)
class DialsTold(Effect):
    """The answer to ``dial_back(ticket)``: what members say that tried it, perhaps none."""

    ticket: int
    told: tuple[DialTold, ...]


# ---- who may send what ---------------------------------------------------------------------------------------------

_ALL: Final = frozenset(Standing)
_MEMBER: Final = frozenset({Standing.MEMBER})

# Who may send what once greeted; a missing row is a protocol error.
LEGAL: Final[Mapping[type[Message], frozenset[Standing]]] = {
    Heartbeat: _ALL,
    Leave: _ALL,
    Ready: _ALL,
    Unreachable: _ALL,
    Addresses: _ALL,
    Punch: _ALL,
    RelayAsk: _ALL,
    Arrive: _MEMBER,
    Withdraw: _MEMBER,
    Behind: _MEMBER,
    Suspect: _MEMBER,
    Trust: _MEMBER,
    Report: _MEMBER,
    Settle: _MEMBER,
    Blocked: _MEMBER,
    Unblocked: _MEMBER,
    Differs: _MEMBER,
    Entered: _MEMBER,
    Measured: _MEMBER,
    Dialed: _MEMBER,
}


class MasterMachine:
    """Inputs: connected, receive, disconnected, heard, persisted, not_persisted, planned, dial_back, tick. Each takes
    `now` and returns effects; none raises.

    past: what an earlier master of this run left behind. Silence then counts from `now`, when its members have had
    their time to come back.

    needs_majority: it has no journal and another such master may be started for its run, so it leaves members out only
    with more than half of the epoch they were in.  adopts: it takes over the run of members that it does not know; with
    a journal it founds none before, without one theirs goes before one that it has founded, until two have met in that.

    signer: it is secure, and believes of a run that it does not know only what is signed.

    remote: peers of other machines may come. relays: the shell carries connections between peers.
    """

    def __init__(
        self,
        run: bytes,
        term: int,
        peer_timeout: float,
        library: str = "",
        *,
        journaled: bool,
        needs_majority: bool = False,
        adopts: bool = False,
        signer: Signer | None = None,
        remote: bool = False,
        relays: bool = False,
        past: Past | None = None,
        now: float = 0.0,
    ) -> None:
        self.run, self.term = run, term
        self.journaled: Final = journaled
        self.needs_majority: Final = needs_majority
        self._takeover: Final = Takeover(self, adopts, signer)
        self.peer_timeout: Final = peer_timeout
        self.library: Final = library
        self._groups: dict[int, Group] = {}
        self._peers: dict[PeerKey, Peer] = {}
        self._newcomers: dict[PeerKey, Peer] = {}  # of these, who may be pending
        self._conns: dict[int, Conn] = {}
        self._observers: Final = Observers()
        self._offers: Final = Offers()
        self._dial_backs: Final = DialBacks()
        self._remote: Final = remote
        self._relays: Final = relays
        self._gone: OrderedDict[PeerKey, str] = OrderedDict()
        self._events: deque[tuple[float, str, dict[str, Any]]] = deque(maxlen=limits.EVENTS_MAX)
        self._arrivals = 0
        self._now = 0.0
        self._ticked_at: float | None = None
        self._line_at = self._line_since = 0.0  # when somebody was heard; since when without a long gap
        self._grace_until = 0.0
        self._ticket_last = 0
        self._writing: deque[tuple[int, Group | None]] = deque()
        self._journal_error = ""
        self._out: list[Effect] = []
        if past is not None:
            self._restore(past, now)

    def _restore(self, past: Past, now: float) -> None:
        """The groups as they stood. Nobody is connected; what was proposed or asked is owed again."""
        self._now = self._line_at = self._line_since = now
        self._takeover.restore(past.recalled)
        if past.recalled is not None or any(known.commit is not None for known in past.groups.values()):
            self._grace_until = now + limits.RECONNECT_S
        self._gone = past.gone.copy()
        for number, known in sorted(past.groups.items()):
            group = self._groups[number] = self._new_group(number)
            group.commit, group.last_number, group.last_id = known.commit, known.number, known.id
            for member in known.commit.epoch.members if known.commit is not None else ():
                self._restore_member(group, member)

    def _restore_member(self, group: Group, member: Member) -> None:
        key = member.peer, member.incarnation
        if key not in self._peers:
            heard_at = self._came_back_at()
            self._peers[key] = Peer(
                *key, group.group, member.addresses, "", order=0, heard_at=heard_at, seen=member.seen
            )
        self._newcomers.pop(key, None)
        self._peers[key].standing, self._peers[key].said = Standing.MEMBER, Said()

    def _came_back_at(self) -> float:
        """Since when members that we know of only now had time to find us."""
        is_new = self._now - self._line_since <= self.peer_timeout * limits.LINE_GAP_TIMEOUTS
        return self._line_since if is_new else self._now

    def _new_group(self, number: int) -> Group:
        """Ballots and proposals are numbered from this start on: within an epoch none comes twice, in any term."""
        base = start_of(self.term) << NONCE_BITS
        return Group(number, version=base, ballot_number=base)

    # ---- inputs

    def connected(self, conn: int, now: float, host: str = "") -> list[Effect]:
        """host: where it comes from, as we see it."""
        assert conn not in self._conns, conn
        self._now = now
        self._conns[conn] = Conn(now, host)
        return self._taken()

    def receive(self, conn: int, message: Message, now: float) -> list[Effect]:
        self._now = now
        entry = self._conns.get(conn)
        if entry is None:
            return []  # we closed it: what was still on its way has no effect
        try:
            if conn in self._observers:
                self._hear_observer(conn, message)
            elif entry.peer is None:
                self._greet(conn, message)
            else:
                self._line_works()
                self._hear(entry.peer, message)
        except RemoteProtocolError as exc:
            self._refuse(conn, str(exc))
        return self._taken()

    def disconnected(self, conn: int, now: float) -> list[Effect]:
        self._now = now
        self._detach(conn)
        return self._taken()

    def heard(self, peer: bytes, incarnation: bytes, now: float) -> list[Effect]:
        """Its pulse beats: the C threads of that process live, whatever its Python does."""
        self._now = now
        record = self._peers.get((peer, incarnation))
        if record is not None:
            self._line_works()
            record.heard_at = now
            if record.lost:
                self._advance(self._groups[record.group])
        return self._taken()

    def persisted(self, ticket: int, now: float) -> list[Effect]:
        """All records up to this one are durable."""
        self._now = now
        self._journal_error = ""
        while self._writing and self._writing[0][0] <= ticket:
            written, group = self._writing.popleft()
            self._takeover.written(written)
            if group is not None:
                self._commit_epoch(group)
                self._advance(group)
        self._takeover.release(ticket)
        return self._taken()

    def not_persisted(self, reason: str, now: float) -> list[Effect]:
        """Nothing that waits for it is decided. What needs no decision goes on."""
        self._now = now
        if reason != self._journal_error:
            self._journal_error = reason
            self._log("journal_failed", reason=reason, waiting=len(self._writing))
        return self._taken()

    def planned(self, number: int, ticket: int, found: Found, now: float) -> list[Effect]:
        """A search has ended. A group, or members, that are not there any more have no use for it."""
        self._now = now
        group = self._groups.get(number)
        if group is None or group.epoch is None:
            return []
        job, news = group.planning.found(ticket, found, now)
        self._search(group, job)
        if news is not None:
            self._log("plan_found", group=number, epoch=group.epoch.number, **news.fields())
            if news.better:
                return self.plan_next(number, news.peers, news.plan, now)
        self._advance(group)
        return self._taken()

    def plan_next(self, group: int, peers: tuple[bytes, ...], plan: plans.Plan, now: float) -> list[Effect]:
        """Adopt this plan, made for these members in rank order, at the group's next safe point.

        Who is a member there gets it by ``plan.carry``, so losses and newcomers until then do no harm. A proposal that
        is open is made again with it; the last plan wins. A master that starts anew has forgotten what was not adopted.
        """
        self._now = now
        plan.encode(len(peers))  # asserts that it fits
        known = self._groups.get(group)
        if known is not None and known.epoch is not None:
            known.next_plan = MadePlan(peers, plan)
            if known.proposal is not None:
                known.proposal.stale = True
            self._advance(known)
        return self._taken()

    def kick(self, peer: bytes, now: float) -> list[Effect]:
        """Out at the operator's word, in every incarnation: a newcomer at once, a member as after a loss. Nothing of it
        is carried from here on, though members may have to wait for others to agree."""
        self._now = now
        for record in [record for record in self._peers.values() if record.peer == peer]:
            if record.standing is Standing.PENDING:
                self._drop_newcomer(record, KICKED)
            else:
                self._lose(record, KICKED, for_good=True)
                self._is_out(record)
            self._advance(self._groups[record.group])
        return self._taken()

    def dial_back(self, ticket: int, host: str, port: int, now: float) -> list[Effect]:
        """Have members try whether that address, from which somebody asks, is reached: ``DialsTold`` in time."""
        self._now = now
        members = (record for group in self._groups.values() for record in self._members(group) if not record.lost)
        seen = ((r.key, self._conns[r.conn].host) for r in members if r.conn is not None)
        for key in self._dial_backs.begin(ticket, host, seen, now):
            self._tell(self._peers[key], DialAsk(ticket, host, port))
        self._end_dial_backs()
        return self._taken()

    def reflected(self, peer: bytes, incarnation: bytes, host: str) -> None:
        """A connection of its was told that it comes from there."""
        record = self._peers.get((peer, incarnation))
        at = place(host)
        if record is not None and at not in record.shown:
            record.shown.append(at)

    def has(self, peer: bytes) -> bool:
        """Some incarnation of it is in the run, or waits to be."""
        return any(key[0] == peer for key in self._peers)

    def knows(self, peer: bytes, incarnation: bytes) -> bool:
        """Whether a pulse connection of that incarnation is worth keeping."""
        return (peer, incarnation) in self._peers

    def observes(self, peer: bytes, incarnation: bytes) -> bool:
        return self._observers.has(peer, incarnation)

    def body_bytes_max(self, conn: int) -> int:
        """How long a message of this connection may be."""
        entry = self._conns.get(conn)
        if entry is None:
            return limits.BODY_NEWCOMER_MAX_BYTES
        is_member = entry.peer is not None and entry.peer.standing is Standing.MEMBER
        recalls = entry.asked is not None
        return limits.BODY_MAX_BYTES if is_member or recalls else limits.BODY_NEWCOMER_MAX_BYTES

    def tick(self, now: float) -> list[Effect]:
        """About every 0.1 s: all timers."""
        self._now = now
        if self._ticked_at is not None and now - self._ticked_at > limits.PAUSE_S:
            self._restart_timers(now - self._ticked_at)
        self._ticked_at = now
        late = [c for c, entry in self._conns.items() if entry.peer is None and now - entry.since >= limits.GREETING_S]
        for conn in sorted(late):
            if conn not in self._observers:
                self._refuse(conn, f"no Hello within {limits.GREETING_S:.0f} s")
        for conn in self._observers.silent(now, self.peer_timeout):
            self._close(conn, "silent")
        self._end_dial_backs()
        for number in sorted(self._inhabited()):
            group = self._groups[number]
            self._drop_silent_newcomers(group)
            self._evict_silent_members(group)
            if group.epoch is None or len(group.epoch.members) == 1 or group.planning.waits:
                self._advance(group)  # it may have awaited its members, company or a plan for long enough
        self._takeover.tick()
        return self._taken()

    # ---- a new connection

    def _greet(self, conn: int, message: Message) -> None:
        if isinstance(message, StatusAsk):
            self._send(conn, Status(_status_json(self.status())))
            self._close(conn, "status told")
        elif isinstance(message, Hello):
            if self._conns[conn].greeted:
                raise RemoteProtocolError("a second Hello")
            self._conns[conn].greeted = True
            if not self._takeover.hold(conn, message):
                self._on_hello(conn, message)
        elif isinstance(message, Recall):
            self._takeover.recalled(conn, message)
        elif isinstance(message, Observe) and not self._conns[conn].greeted:
            self._on_observe(conn, message)
        else:
            raise RemoteProtocolError(f"{type(message).__name__} before Hello")

    # ---- observers: no part of what is decided

    def _on_observe(self, conn: int, observe: Observe) -> None:
        reason = self._observers.reason_to_reject(observe)
        if reason:
            self._send(conn, Rejected(clip(reason)))
            self._close(conn, reason)
            return
        for older in self._observers.add(conn, observe, self._conns[conn].host, self._now):
            self._close(older, "the same observer has come on a newer connection")
        self._log("observer_came", peer=short(observe.peer), group=observe.group)
        self._send(conn, self._welcome(conn, resumed=False))
        if observe.relays:  # it may carry for some of whom it has not heard
            gone = sorted({peer for peer, _ in self._gone} - {peer for peer, _ in self._peers})
            for first in range(0, len(gone), limits.MEMBERS_MAX):
                self._send(conn, RelayOver(tuple(gone[first : first + limits.MEMBERS_MAX])))
        self._send(conn, self._members_message(observe.group))
        self._tell_observers(observe.group)
        self._tell_relays()

    def _hear_observer(self, conn: int, message: Message) -> None:
        if isinstance(message, Heartbeat):
            self._observers.heard(conn, self._now)
            self._send(conn, Alive())
        elif isinstance(message, Addresses):
            self._observers.readdress(conn, message.addresses)
            self._tell_observers(self._observers.group_of(conn))
            self._tell_relays()
        else:
            raise RemoteProtocolError(f"{type(message).__name__} from an observer")

    def _drop_observer(self, conn: int, reason: str) -> None:
        group = self._observers.drop(conn)
        if group is not None:
            self._log("observer_gone", group=group, reason=reason)
            self._tell_observers(group)
            self._tell_relays()

    def _tell_relays(self) -> None:
        """Everybody knows who offers to carry what does not come through."""
        own = (Member(NO_ID, NO_ID),) if self._relays else ()
        relays = own + self._observers.relays()
        for record in self._peers.values():
            if record.told_relays != relays and record.conn is not None:
                record.told_relays = relays
                self._tell(record, Relays(relays))

    def _is_out(self, record: Peer) -> None:
        """Whoever carries something for it stops."""
        self._out.append(Out(*record.key))
        for conn in self._observers.relaying():
            self._send(conn, RelayOver((record.peer,)))

    def _tell_observers(self, number: int) -> None:
        """Every member knows who observes its group."""
        group = self._groups.get(number)
        observers = self._observers.of(number)
        for record in self._members(group) if group is not None else ():
            if record.told_observers != observers and record.conn is not None:
                record.told_observers = observers
                self._tell(record, ObserversMessage(observers))

    def _members_message(self, number: int) -> Members:
        group = self._groups.get(number)
        if group is None or group.epoch is None:
            return Members(0 if group is None else group.last_number, ())
        return Members(group.epoch.number, group.epoch.members)

    def _tell_of_members(self, number: int) -> None:
        """Every observer of the group knows who is in it."""
        for conn in self._observers.conns(number):
            self._send(conn, self._members_message(number))

    def _on_hello(self, conn: int, hello: Hello) -> None:
        key = (hello.peer, hello.incarnation)
        record = self._peers.get(key)
        reason = self._reason_to_reject(hello, record)
        if reason:
            self._log("peer_rejected", peer=short(hello.peer), group=hello.group, reason=reason)
            self._send(conn, Rejected(clip(reason)))
            self._close(conn, reason)
        elif hello.resume is not None and self._takeover.is_unknown(conn, hello, hello.resume):
            self._takeover.ask(conn, hello, hello.resume)
        elif record is None and (hello.resume is not None or key in self._gone):
            self._send_evicted(conn, self._gone.get(key, "this incarnation is not a member of the run"))
        elif record is None and self._takeover.awaited:
            self._close(conn, "the members of the run that this master is to take over come first")  # it tries again
        elif record is None:
            self._on_newcomer(conn, hello)
        elif record.standing is Standing.PENDING:
            self._on_newcomer_again(conn, hello, record)
        elif record.lost_for_good:
            self._send_evicted(conn, record.lost)
        else:
            self._on_return(conn, hello, record)

    def _reason_to_reject(self, hello: Hello, record: Peer | None) -> str:
        """Why this Hello can't be served; "": it can."""
        if hello.version != limits.PROTOCOL_VERSION:
            return f"the peer speaks protocol {hello.version}, this master {limits.PROTOCOL_VERSION}"
        if record is not None and record.group != hello.group:
            return f"this incarnation belongs to group {record.group}"
        if record is not None and record.standing is not Standing.MEMBER and hello.resume is not None:
            return "this incarnation was not admitted yet, there is nothing to resume"
        if record is None and hello.group not in self._groups and not self._make_room_for_a_group():
            return f"this master keeps at most {limits.GROUPS_MAX} groups"
        waiting = sum(peer.standing is Standing.PENDING for peer in self._peers.values())
        if record is None and hello.resume is None and waiting >= limits.PENDING_MAX:
            return f"{waiting} newcomers wait already"
        return ""

    def _inhabited(self) -> set[int]:
        """Groups that have somebody. The others are kept for their last epoch's number alone."""
        return {record.group for record in self._peers.values()}

    def _make_room_for_a_group(self) -> bool:
        """A group that nobody is in goes when its place is needed."""
        if len(self._groups) < limits.GROUPS_MAX:
            return True
        inhabited = self._inhabited()
        empty = next((number for number in self._groups if number not in inhabited), None)
        if empty is not None:
            del self._groups[empty]
            self._takeover.decided(empty)
            self._persist(Forgotten(empty), None)
        return empty is not None

    # ---- newcomers and members that come back

    def _on_newcomer(self, conn: int, hello: Hello) -> None:
        group = self._groups.get(hello.group)
        if group is None:
            group = self._groups[hello.group] = self._new_group(hello.group)
        for other in self._pending(group):
            if other.peer == hello.peer:
                self._drop_newcomer(other, "a newer incarnation of this peer has come")
        self._arrivals += 1
        record = Peer(
            *(hello.peer, hello.incarnation, hello.group, hello.addresses, hello.library),
            order=self._arrivals,
            heard_at=self._now,
            seen=self._conns[conn].host,
        )
        self._peers[record.key] = self._newcomers[record.key] = record
        self._attach(conn, record, resumed=False)
        self._log("peer_pending", peer=short(record.peer), group=record.group, library=record.library)
        self._advance(group)

    def _on_newcomer_again(self, conn: int, hello: Hello, record: Peer) -> None:
        """It gave up a connection whose end we have not noticed (a NAT that forgot it): it starts over."""
        reason = "the same incarnation has come on a newer connection"
        old = record.conn
        self._forget_newcomer(record, reason, stays=True)
        if old is not None:
            self._close(old, reason)
        self._on_newcomer(conn, hello)

    def _on_return(self, conn: int, hello: Hello, record: Peer) -> None:
        """A living member's control connection came back. Tell it what it may have missed; it tells us the same."""
        group = self._groups[record.group]
        epoch = group.epoch
        if record.standing is Standing.ENTERING:
            self._on_entering_again(conn, hello, record)
            return
        assert epoch is not None and group.commit is not None, record  # only members are kept without a connection
        resume = hello.resume
        if resume is not None and (resume.number, resume.id) not in epoch.stands:
            reason = f"it comes from epoch {resume.number}, which does not lead to {epoch.number}"
            self._send_evicted(conn, reason)
            self._lose(record, reason, for_good=True)
            self._advance(group)
            return
        if record.conn is not None:  # we have not seen its end: what was said on it holds no longer than behind one
            self._close(record.conn, "the same incarnation has come on a newer connection")
            record.said.blocked = None
            record.complaints.clear()
        record.heard_at = self._now
        record.library = hello.library
        self._attach(conn, record, resumed=True)
        self._log("peer_resumed", peer=short(record.peer), group=group.group, epoch=epoch.number)
        if resume is None or resume.number != epoch.number:
            self._tell(record, group.commit)
        if group.ballot is not None and record.key in group.ballot.members:
            self._tell(record, self._flush(group, group.ballot))
            if group.ballot.undecided:
                self._tell(record, Undecided(group.ballot.number, group.ballot.undecided))
        elif group.proposal is not None:
            self._tell(record, group.proposal.message_to(record))
        elif group.version:
            self._tell_cancelled(group, record)
        self._readdress(group, record, hello.addresses, self._conns[conn].host)
        self._tell_who_moved(group, record)
        if resume is not None and resume.frozen and resume.number == epoch.number:
            self._owe_ballot(group, KIND_SETTLE, "")  # one that was cut off
        self._takeover.came_back(group)
        self._advance(group)

    def _tell_cancelled(self, group: Group, record: Peer) -> None:
        """What an earlier master has proposed will not be. If we know the epoch from its members alone, one who is not
        back may hold the commit of that: nobody lets go before all are here, or a ballot is held."""
        if not self._takeover.is_adopted(group.group):
            self._tell(record, Cancelled(group.version))
        elif all(member.conn is not None for member in self._members(group)):
            for member in self._members(group):
                self._tell(member, Cancelled(group.version))

    def _on_entering_again(self, conn: int, hello: Hello, record: Peer) -> None:
        """It is to be told of its first epoch where it can hear it."""
        if record.conn is not None:
            self._close(record.conn, "the same incarnation has come on a newer connection")
        record.heard_at, record.addresses, record.seen = self._now, hello.addresses, self._conns[conn].host
        self._attach(conn, record, resumed=False)

    def _attach(self, conn: int, record: Peer, *, resumed: bool) -> None:
        self._line_works()
        self._conns[conn].peer = record
        record.conn = conn
        record.told_pending, record.told_observers, record.told_relays = -1, (), ()
        self._tell(record, self._welcome(conn, resumed=resumed))
        if record.standing is Standing.MEMBER:
            self._tell_observers(record.group)
        self._tell_relays()

    def _welcome(self, conn: int, *, resumed: bool) -> Welcome:
        timeout_ms = max(1, round(self.peer_timeout * 1000))
        return Welcome(
            *(limits.PROTOCOL_VERSION, self.library, self.run, self.term, timeout_ms, resumed),
            *(self._conns[conn].host, self._remote, self._takeover.term.signature),
        )

    def _detach(self, conn: int) -> None:
        """The connection is gone. A member stays one; a newcomer has nothing to come back to."""
        entry = self._conns.pop(conn, None)
        self._drop_observer(conn, "its control connection ended")
        if entry is None or entry.peer is None:
            return
        record, group = entry.peer, self._groups[entry.peer.group]
        record.conn = None
        if record.standing is Standing.PENDING:
            self._forget_newcomer(record, "its control connection ended")
        else:
            record.said.blocked = None  # told again when it comes back
            record.complaints.clear()
        self._advance(group)

    # ---- messages of a greeted peer

    def _hear(self, record: Peer, message: Message) -> None:
        if record.standing not in LEGAL.get(type(message), frozenset()):
            raise RemoteProtocolError(f"{type(message).__name__} from a peer that is {record.standing.name}")
        group = self._groups[record.group]
        handler = _HANDLERS.get(type(message))
        if handler is not None:
            handler(self, group, record, message)
        record.heard_at = self._now
        if isinstance(message, Heartbeat):
            self._tell(record, Alive())
        if type(message) not in _CHANGES_NOTHING or record.lost:
            self._advance(group)

    def _on_leave(self, group: Group, record: Peer, message: Leave) -> None:
        conn = record.conn
        assert conn is not None
        if record.standing is Standing.PENDING:
            self._forget_newcomer(record, "left")
        else:
            record.left = True
            self._lose(record, "left", for_good=True)
        self._close(conn, "left")

    def _on_arrive(self, group: Group, record: Peer, message: Arrive) -> None:
        if self._is_current(group, message.epoch):
            check_told_untrusted(message.counts, record.peer, self._ranks(group))
            if record.said.arrived is None:
                record.said.arrived_at = self._now
            record.said.arrived = _highest({}, message.counts)

    def _on_withdraw(self, group: Group, record: Peer, message: Withdraw) -> None:
        if self._is_current(group, message.epoch):
            record.said.arrived = None

    def _on_addresses(self, group: Group, record: Peer, message: Addresses) -> None:
        self._readdress(group, record, message.addresses, record.seen)

    def _readdress(self, group: Group, record: Peer, addresses: tuple[Address, ...], seen: str) -> None:
        """Who may be linked to it, now or soon, has to know."""
        if (record.addresses, record.seen) == (addresses, seen):
            return
        record.addresses, record.seen = addresses, seen
        self._log("addresses", peer=short(record.peer), count=len(addresses))
        in_proposal = () if group.proposal is None else group.proposal.newcomers
        if record.standing is Standing.PENDING and record.key not in in_proposal:
            return  # the proposal that names it will say it
        others = [*self._members(group), *(self._peers[key] for key in in_proposal if key in self._peers)]
        for other in others:
            if other is not record:
                self._tell(other, Moved(record.member))

    def _tell_who_moved(self, group: Group, record: Peer) -> None:
        """While it was away, or since the epoch or proposal was made that it hears of now."""
        epochs = [group.epoch, None if group.proposal is None else group.proposal.epoch]
        told = {(m.peer, m.incarnation): m for epoch in epochs if epoch is not None for m in epoch.members}
        for key, member in told.items():
            other = self._peers.get(key)
            if other is not None and other is not record and other.member != member:
                self._tell(record, Moved(other.member))

    def _on_punch(self, group: Group, record: Peer, message: Punch) -> None:
        other = self._counterpart(group, record, message.to)
        if other is None or not message.endpoints:
            return
        if not are_shown(message, {place(record.seen), *record.shown}):
            self._log("punch_refused", peer=short(record.peer), other=short(other.peer))
            return
        theirs = self._offers.add(record.key, other.key, message, self._now)
        if theirs is None:
            self._tell(other, PunchAsk(record.peer, len(message.endpoints)))
            return
        self._log("punch", peer=short(record.peer), other=short(other.peer), count=len(message.endpoints))
        self._tell(record, begin(message, theirs, other.peer))
        self._tell(other, begin(theirs, message, record.peer))

    def _on_relay_ask(self, group: Group, record: Peer, message: RelayAsk) -> None:
        """The relay, if it is an observer, learns for whom. A member knows the others."""
        other = self._counterpart(group, record, message.to)
        if other is None or not self.are_to_be_linked(record.key, other.key):
            return
        conn = self._observers.conn_of(message.relay)
        if conn is not None:
            self._send(conn, RelayFor(record.member, other.member))
        self._tell(other, RelayCall(record.peer, message.relay))

    def _on_dialed(self, group: Group, record: Peer, message: Dialed) -> None:
        self._dial_backs.told(message.ticket, record.key, message.reason)
        self._end_dial_backs()

    def _end_dial_backs(self) -> None:
        self._out += [DialsTold(ticket, told) for ticket, told in self._dial_backs.over(self._now)]

    def _counterpart(self, group: Group, record: Peer, peer: bytes) -> Peer | None:
        """Who is, or may soon be, in an epoch with it, and can be told something now."""
        known = [r for r in self._peers.values() if r.peer == peer and r.group == group.group and r is not record]
        return next((r for r in known if r.conn is not None and not r.lost), None)

    def are_to_be_linked(self, one: PeerKey, other: PeerKey) -> bool:
        """Whether a relay may carry bytes between these incarnations: both are in an epoch, or will be in the next."""
        records = self._peers.get(one), self._peers.get(other)
        if one == other or any(record is None or record.lost_for_good for record in records):
            return False
        groups = {record.group for record in records if record is not None}
        return len(groups) == 1 and any({one, other} <= keys for keys in self._linked(self._groups[groups.pop()]))

    def _linked(self, group: Group) -> list[set[PeerKey]]:
        """Of each epoch that stands, is being decided or proposed."""
        deciding, proposal = group.deciding, group.proposal
        epochs = group.epoch, None if deciding is None else deciding.epoch, None if proposal is None else proposal.epoch
        return [{(m.peer, m.incarnation) for m in epoch.members} for epoch in epochs if epoch is not None]

    def _on_ready(self, group: Group, record: Peer, message: Ready) -> None:
        if self._answered(group, record, message.number, message.version) is not None:
            record.said.ready = message.version
            for peer, complaint in list(record.complaints.items()):
                if complaint.cause == CAUSE_UNREACHABLE:
                    del record.complaints[peer]

    def _on_behind(self, group: Group, record: Peer, message: Behind) -> None:
        proposal = self._answered(group, record, message.number, message.version)
        if proposal is not None:
            check_told_untrusted(message.counts, record.peer, self._ranks(group))
            record.said.arrived = _highest(record.said.arrived or {}, message.counts)
            proposal.stale = True

    def _on_unreachable(self, group: Group, record: Peer, message: Unreachable) -> None:
        """Newcomers go; between two members it is a partition, and time may mend it."""
        proposal = self._answered(group, record, message.number, message.version)
        if proposal is None:
            return
        named = set(message.peers) & set(proposal.epoch.peers) - {record.peer}
        if not named:
            raise RemoteProtocolError("Unreachable names nobody of the proposal")
        newcomers = {key[0]: self._peers[key] for key in proposal.newcomers if key in self._peers}
        named -= {peer for peer, _ in proposal.newcomers} - newcomers.keys()  # who has left is nobody's fault
        if not named:
            return
        old = sorted(named - newcomers.keys())
        if record.standing is Standing.PENDING and any(self._is_quiet(self._member(group, peer)) for peer in old):
            proposal.stale = True  # the member's fault, it seems: try again until it is heard, or gone
        elif record.standing is Standing.PENDING and old:
            self._drop_newcomer(record, f"it could not reach {short(old[0])}: {message.reason}")
        elif record.standing is Standing.PENDING:
            last = max([record, *(newcomers[peer] for peer in named)], key=lambda r: r.order)
            self._drop_newcomer(last, f"two newcomers could not reach each other: {message.reason}")
        else:
            for peer in sorted(named & newcomers.keys()):
                self._drop_newcomer(newcomers[peer], f"{short(record.peer)} could not reach it: {message.reason}")
            for peer in old:
                self._complain(group, record, peer, CAUSE_UNREACHABLE, message.reason)

    def _is_quiet(self, record: Peer) -> bool:
        """Heartbeats are missing, though not yet for long enough to call it lost."""
        return self._now - record.heard_at > 2 * self.peer_timeout / limits.HEARTBEATS_PER_TIMEOUT

    def _on_suspect(self, group: Group, record: Peer, message: Suspect) -> None:
        if message.peer == record.peer:
            raise RemoteProtocolError("a peer suspects itself")
        self._complain(group, record, message.peer, message.cause, message.detail)

    def _complain(self, group: Group, record: Peer, against: bytes, cause: str, detail: str) -> None:
        if group.epoch is None or against not in group.epoch.peers:
            return  # evicted meanwhile
        known = record.complaints.get(against)
        since = known.since if known is not None else self._now
        record.complaints[against] = Complaint(cause, since, detail)
        if known is None or known.cause != cause:
            self._log("suspicion", peer=short(against), by=short(record.peer), cause=cause, detail=detail)

    def _on_trust(self, group: Group, record: Peer, message: Trust) -> None:
        if record.complaints.pop(message.peer, None) is not None:
            self._log("suspicion_withdrawn", peer=short(message.peer), by=short(record.peer))

    def _on_report(self, group: Group, record: Peer, message: Report) -> None:
        if len({op.key for op in message.ops}) != len(message.ops):
            raise RemoteProtocolError("two reports on one operation")
        if message.ballot > group.ballot_number:
            raise RemoteProtocolError(f"a report to ballot {message.ballot}, which was never opened")
        if self._is_current(group, message.epoch) and message.ballot == group.ballot_number:
            check_told_untrusted(message.ops, record.peer, self._ranks(group))
            record.said.report = message

    def _on_settle(self, group: Group, record: Peer, message: Settle) -> None:
        if self._is_current(group, message.epoch):
            self._owe_ballot(group, KIND_SETTLE, f"asked for by {short(record.peer)}")

    def _on_blocked(self, group: Group, record: Peer, message: Blocked) -> None:
        if self._is_current(group, message.epoch):
            check_told_untrusted(message.lacking, record.peer, self._ranks(group))
            record.said.blocked = message

    def _on_unblocked(self, group: Group, record: Peer, message: Unblocked) -> None:
        if self._is_current(group, message.epoch):
            record.said.blocked = None

    def _on_differs(self, group: Group, record: Peer, message: Differs) -> None:
        if not self._is_current(group, message.epoch):
            return
        detail = differs_detail(record.peer, message, self._ranks(group))
        concerned = participants(message.key.space, message.key.tag, self._ranks(group))
        if detail is None or not {record.peer, message.peer} <= set(concerned):
            raise RemoteProtocolError("Differs names no difference between two participants")
        self._owe_ballot(group, KIND_MISMATCH, detail)

    def _on_entered(self, group: Group, record: Peer, message: Entered) -> None:
        self._is_current(group, message.epoch)  # or it breaks the contract; nothing follows from it

    def _on_measured(self, group: Group, record: Peer, message: Measured) -> None:
        named = {link.peer for link in message.links}
        if len(named) != len(message.links) or record.peer in named:
            raise RemoteProtocolError("a link is measured twice, or to the sender itself")
        record.measured = message
        group.planning.version += 1

    def _is_current(self, group: Group, number: int) -> bool:
        """False: of an older epoch, it crossed our commit. A newer one was never committed."""
        assert group.epoch is not None
        if number > group.epoch.number:
            raise RemoteProtocolError(f"epoch {number} was never committed")
        return number == group.epoch.number

    def _answered(self, group: Group, record: Peer, number: int, version: int) -> Proposal | None:
        """The open proposal if the answer is to it; None: to an older one, no effect."""
        if version > group.version:
            raise RemoteProtocolError(f"proposal {version} was never made")
        proposal = group.proposal
        if proposal is None or proposal.version != version or group.deciding is not None:
            return None
        if number != proposal.epoch.number:
            raise RemoteProtocolError(f"proposal {version} is of epoch {proposal.epoch.number}, not {number}")
        if not proposal.epoch.has(record.peer, record.incarnation):
            raise RemoteProtocolError("an answer to somebody else's proposal")
        return proposal

    # ---- what follows from the records: asked for every message, so that members are looked through in comprehensions,
    # which take half the time of all() and any() over a generator

    def _advance(self, group: Group) -> None:
        """Take every step that the records now allow, in order of precedence, until none is left."""
        while group.deciding is None and any(step(self, group) for step in _STEPS):
            pass
        self._tell_pending(group)

    def _step_lost_at_once(self, group: Group) -> bool:
        if not [record for record in self._members(group) if record.conn is None and not record.lost]:
            return False
        lost = refused_at_once(self._seen(group))
        for peer, reason in lost:
            self._lose(self._member(group, peer), reason)
        return bool(lost)

    def _step_take_back(self, group: Group) -> bool:
        """A heartbeat before the verdict revokes a suspicion, unless somebody still can't reach it."""
        members = self._members(group)
        lost = [record for record in members if record.lost]
        if not lost:
            return False
        staying = [record for record in members if not record.lost]
        back = [
            record
            for record in lost
            if not record.lost_for_good
            and record.heard_at > record.lost_at
            and not any(record.peer in other.complaints or other.peer in record.complaints for other in staying)
        ]
        for record in back:
            self._log("peer_taken_back", peer=short(record.peer), group=group.group, lost=record.lost)
            record.lost = ""
        return bool(back)

    def _step_dissolve(self, group: Group) -> bool:
        members = self._members(group)
        if group.epoch is None or not all(record.lost for record in members):
            return False
        group.commit = group.ballot = group.proposal = None
        group.has_met = False
        self._log("group_dissolved", group=group.group, epoch=group.last_number)
        self._tell_of_members(group.group)
        fenced = tuple([Fenced(*record.key, record.lost) for record in members])
        for record in members:
            self._evict(record)
        self._persist(Dissolved(group.group, fenced), None)  # nothing waits for it: until it is there they are silent
        return True

    def _step_found(self, group: Group) -> bool:
        if group.epoch is not None or not (waiting := self._pending(group)) or self._takeover.awaits(group):
            return False
        epoch = make_epoch(self._takeover.next_number(group), group.last_id, self.term, (waiting[0].member,))
        self._decide(group, epoch, KIND_FOUND)
        return True

    def _step_ballot(self, group: Group) -> bool:
        """Open it, or open it anew, whenever those who are lost are not those it leaves out."""
        ballot = group.ballot
        if ballot is None and not [record for record in self._members(group) if record.lost]:
            return False
        if ballot is not None and ballot.members == self._staying(group):
            return False
        kind, detail = (ballot.kind, ballot.detail) if ballot is not None else (KIND_LOSS, "")
        blocked = ballot is not None and ballot.blocked
        self._open_ballot(group, KIND_LOSS if kind == KIND_SETTLE else kind, detail, blocked=blocked)
        return True

    def _step_verdict(self, group: Group) -> bool:
        ballot = group.ballot
        if ballot is None or group.epoch is None or self._takeover.awaits(group):
            return False
        if not all(has_reported(self._peers[key], ballot) for key in ballot.members):
            return False
        staying = [self._peers[key] for key in ballot.members]
        said = {record.peer: record.said.report.ops for record in staying if record.said.report is not None}
        verdicts = ballots.decide(said, group.epoch.peers)
        if len(verdicts) > limits.KEYS_MAX:
            longest = max(staying, key=lambda r: len(r.said.report.ops) if r.said.report is not None else 0)
            self._lose(longest, "it reports more operations than a verdict can hold", for_good=True)
            return True
        if not self._may_decide(group, staying):
            self._leave_undecided(group, ballot, staying)
            return False
        members = tuple([record.member for record in staying])
        plan = plans.carry_bytes(group.epoch.plan, group.epoch.peers, [member.peer for member in members])
        epoch = make_epoch(group.epoch.number + 1, group.epoch.id, self.term, members, plan)
        self._decide(group, epoch, *self._judged(group, ballot, staying), verdicts)
        return True

    def _may_decide(self, group: Group, staying: list[Peer]) -> bool:
        """Without a journal another master may speak for those who are lost: not for more than half, nor for the half
        with the lowest id. Who left by its own word is spoken for by nobody."""
        if not self.needs_majority:
            return True
        voters = [record for record in self._members(group) if not record.left]
        missing = len(voters) - len(staying)
        return missing == 0 or len(staying) > missing or (len(staying) == missing and voters[0] in staying)

    def _leave_undecided(self, group: Group, ballot: Ballot, staying: list[Peer]) -> None:
        if ballot.undecided:
            return
        ballot.undecided = f"{len(staying)} of {len(self._members(group))} members, and no journal: too few to go on"
        self._log("ballot_undecided", group=group.group, ballot=ballot.number, reason=ballot.undecided)
        for record in staying:
            self._tell(record, Undecided(ballot.number, ballot.undecided))

    def _judged(self, group: Group, ballot: Ballot, staying: list[Peer]) -> tuple[str, str]:
        """(kind, detail). What Blocked said is judged again: an Unblocked may have been on its way behind it, and a
        member's Report comes behind all that it said before it froze. What is reported all have opened."""
        if not ballot.blocked:
            return ballot.kind, ballot.detail
        opened = {op.key for record in staying if record.said.report is not None for op in record.said.report.ops}
        detail = self._blocked_in(group, staying, opened)
        if detail is not None:
            return ballot.kind, detail
        return KIND_LOSS if len(staying) < len(self._members(group)) else KIND_SETTLE, "no mismatch after all"

    def _blocked_in(self, group: Group, members: list[Peer], opened: Container[Key] = ()) -> str | None:
        """How these wait for each other; None: they do not, or a broken link explains what they miss."""
        if not [record for record in members if record.said.blocked is not None]:
            return None
        if any(record.peer in other.complaints for record in members for other in members):
            return None
        return blocked_detail({record.peer: record.said.blocked for record in members}, self._ranks(group), opened)

    def _step_mismatch(self, group: Group) -> bool:
        if group.ballot is not None or group.epoch is None:
            return False
        detail = self._blocked_in(group, self._members(group))
        if detail is None:
            return False
        self._open_ballot(group, KIND_MISMATCH, detail, blocked=True)
        return True

    def _step_propose(self, group: Group) -> bool:
        members = self._members(group)
        if group.ballot is not None or group.epoch is None:
            return False
        proposal = group.proposal
        if not all(record.said.arrived is not None for record in members):
            if proposal is not None:
                self._cancel_proposal(group, proposal)
            return False
        if proposal is not None and not proposal.stale:
            return False
        if proposal is None and self._awaits_company(group, members):
            return False
        if self._awaits_plan(group):
            return False
        return self._propose(group)

    def _awaits_company(self, group: Group, members: list[Peer]) -> bool:
        """A lone member that loops over update_topology() until others come shall not turn over epochs meanwhile."""
        if len(members) > 1 or any(True for _ in self._pending(group)):
            return False
        return self._now - members[0].said.arrived_at < limits.LONE_SAFE_POINT_S

    def _awaits_plan(self, group: Group) -> bool:
        """A search for those who would be in the next epoch; it begins here if there was none."""
        assert group.epoch is not None
        planning, everybody = group.planning, self._next_members(group)
        peers = tuple(sorted(record.peer for record in everybody))
        if not planning.has(peers):
            told = {record.peer: record.measured for record in everybody if record.measured is not None}
            network = measuring.network(peers, told) if told else None
            present = plans.carry_bytes(group.epoch.plan, group.epoch.peers, peers)
            job = planning.begin(peers, network, present, self._now)
            if job is not None:
                group.next_plan = None  # found for others, or by what is known better now
            self._search(group, job)
        return planning.awaited(self._now)

    def _search(self, group: Group, job: Job | None) -> None:
        if job is not None:
            self._out.append(Search(group.group, group.planning.ticket, job))

    def _step_join(self, group: Group) -> bool:
        proposal = group.proposal
        if proposal is None or proposal.stale:  # it waits for a plan, and may name who is gone
            return False
        if self._takeover.awaits(group):
            return False
        said = [self._peers[member.peer, member.incarnation].said for member in proposal.epoch.members]
        if not all(one.ready == proposal.version for one in said):
            return False
        self._decide(group, proposal.epoch, KIND_JOIN)
        return True

    # ---- safe points

    def _propose(self, group: Group) -> bool:
        """The next epoch: the members, and whoever waits. Made again when a count or a newcomer has changed."""
        assert group.epoch is not None
        members = self._members(group)
        everybody = self._next_members(group)
        newcomers = everybody[len(members) :]
        highest: dict[tuple[int, int], int] = {}
        for record in members:
            for key, submitted in (record.said.arrived or {}).items():
                highest[key] = max(submitted, highest.get(key, 0))
        counts = [Count(*key, submitted) for key, submitted in sorted(highest.items())]
        cut = tuple([count for count in counts if pair_of(count.space, count.tag) is None])
        of_pairs = _cuts_of_pairs(counts[len(cut) :], self._ranks(group))  # their space is the last
        longest = len(cut) + max(map(len, of_pairs.values()), default=0)
        if longest > limits.KEYS_MAX:
            text = f"{longest} different tags, a safe point holds {limits.KEYS_MAX}"
            self._open_ballot(group, KIND_MISMATCH, make_detail((), ("tag",), text))
            return True
        epoch = make_epoch(
            *(group.epoch.number + 1, group.epoch.id, self.term),
            tuple([record.member for record in everybody]),
            self._plan_for(group, sorted(record.peer for record in everybody)),
        )
        group.version += 1
        names = tuple([r.key for r in newcomers])
        group.proposal = Proposal(group.version, epoch, cut, of_pairs, names, self._now, group.next_plan)
        self._log(
            "epoch_proposed",
            group=group.group,
            epoch=epoch.number,
            version=group.version,
            newcomers=[short(record.peer) for record in newcomers],
        )
        for record in everybody:
            self._tell(record, group.proposal.message_to(record))
        return True

    def _next_members(self, group: Group) -> list[Peer]:
        """The members, then whoever waits, as many as there is room for."""
        members = self._members(group)
        taken = {record.peer for record in members}
        newcomers = [record for record in self._pending(group) if record.peer not in taken]
        return [*members, *newcomers[: limits.MEMBERS_MAX - len(members)]]

    def _plan_for(self, group: Group, peers: list[bytes]) -> bytes:
        """peers: of the proposed epoch, in rank order."""
        assert group.epoch is not None
        made = group.next_plan
        if made is None:
            return plans.carry_bytes(group.epoch.plan, group.epoch.peers, peers)
        return plans.carry(made.plan, made.peers, peers).encode(len(peers))

    def _cancel_proposal(self, group: Group, proposal: Proposal) -> None:
        group.proposal = None
        self._log("proposal_cancelled", group=group.group, version=proposal.version)
        for member in proposal.epoch.members:
            record = self._peers.get((member.peer, member.incarnation))
            if record is not None:
                self._tell(record, Cancelled(proposal.version))

    # ---- ballots

    def _owe_ballot(self, group: Group, kind: str, detail: str) -> None:
        """Open one, unless what is open or decided leads to a new epoch anyway: who still needs it then asks again."""
        if group.ballot is None and group.deciding is None:
            self._open_ballot(group, kind, detail)

    def _open_ballot(self, group: Group, kind: str, detail: str, *, blocked: bool = False) -> None:
        group.proposal = None  # the safe point starts over in the epoch this leads to
        group.ballot_number += 1
        staying = self._staying(group)
        group.ballot = Ballot(group.ballot_number, kind, detail, staying, self._now, blocked)
        self._log(
            "ballot_opened",
            group=group.group,
            ballot=group.ballot_number,
            kind=kind,
            detail=detail,
            members=[short(peer) for peer, _ in staying],
        )
        flush = self._flush(group, group.ballot)
        for key in staying:
            self._tell(self._peers[key], flush)

    def _flush(self, group: Group, ballot: Ballot) -> Flush:
        assert group.epoch is not None
        number = group.epoch.number
        return Flush(ballot.number, number, number + 1, tuple([peer for peer, _ in ballot.members]))

    def _lose(self, record: Peer, reason: str, *, for_good: bool = False) -> None:
        """Leave this member out of the ballot that ``_advance`` now opens, or opens anew."""
        if record.lost and not (for_good and not record.lost_for_good):
            return
        record.lost, record.lost_at, record.lost_for_good = clip(reason), self._now, for_good
        self._log("peer_lost", peer=short(record.peer), group=record.group, reason=reason)

    # ---- epochs

    def _decide(
        self, group: Group, epoch: Epoch, kind: str, detail: str = "", verdicts: tuple[OpVerdict, ...] = ()
    ) -> None:
        """The one place where it is decided which epoch comes next. With a journal it waits there to be durable."""
        sizes = (len(g.epoch.members) for g in self._groups.values() if g.epoch is not None and g is not group)
        group.deciding = self._takeover.signed(
            group,
            EpochCommit(epoch, kind, verdicts, detail, sum(sizes) + len(epoch.members), not self.needs_majority),
        )
        group.has_met = group.has_met or len(epoch.members) > 1
        self._takeover.decided(group.group)
        for member in epoch.members:
            record = self._peers[member.peer, member.incarnation]
            assert not record.lost, record  # so what is lost from here on is left out of the epoch behind this one
            if record.standing is Standing.PENDING:
                record.standing = Standing.ENTERING
        fenced = tuple([Fenced(*record.key, record.lost) for record in self._left_out(group, epoch)])
        self._persist(Committed(group.group, group.deciding, fenced), group)

    def _persist(self, record: Record, group: Group | None) -> None:
        """`group` waits for it."""
        if self.journaled:
            self._ticket_last += 1
            self._writing.append((self._ticket_last, group))
            self._out.append(Persist(self._ticket_last, record))
        elif group is not None:
            self._commit_epoch(group)

    def _commit_epoch(self, group: Group) -> None:
        """The one place where an epoch becomes the current one."""
        commit = group.deciding
        assert commit is not None
        epoch, kind, detail, verdicts = commit.epoch, commit.kind, commit.detail, commit.verdicts
        left_out = self._left_out(group, epoch)
        group.commit = commit
        group.last_number, group.last_id = epoch.number, epoch.id
        if group.proposal is not None and group.proposal.made_plan is group.next_plan:
            group.next_plan = None  # it has come into force
        group.proposal = group.ballot = group.deciding = None
        self._log(
            "epoch_committed",
            group=group.group,
            epoch=epoch.number,
            id=epoch.id.hex(),
            kind=kind,
            detail=detail,
            members=[short(peer) for peer in epoch.peers],
            verdicts=len(verdicts),
        )
        for record in left_out:
            self._evict(record)
        for record in self._members(group):
            self._newcomers.pop(record.key, None)
            record.standing, record.said = Standing.MEMBER, Said()
            for peer, complaint in list(record.complaints.items()):
                if peer not in epoch.peers or complaint.cause == CAUSE_UNREACHABLE:
                    del record.complaints[peer]
        self._tell_pending(group)  # first: who enters the epoch must not take for pending who enters it too
        self._tell_observers(group.group)  # and knows from the start who may hold the state
        for record in self._members(group):
            self._tell(record, commit)
        self._tell_of_members(group.group)

    def _evict(self, record: Peer) -> None:
        """Out of the run: whatever this incarnation says from now on is answered with the reason."""
        del self._peers[record.key]
        self._newcomers.pop(record.key, None)
        fence(self._gone, (Fenced(*record.key, record.lost),))
        self._log("peer_evicted", peer=short(record.peer), group=record.group, reason=record.lost)
        self._is_out(record)
        if record.conn is not None:
            self._send_evicted(record.conn, record.lost)

    # ---- newcomers

    def _drop_newcomer(self, record: Peer, reason: str) -> None:
        conn = record.conn
        self._forget_newcomer(record, reason)
        if conn is not None:
            self._send(conn, Rejected(clip(reason)))
            self._close(conn, reason)

    def _forget_newcomer(self, record: Peer, reason: str, *, stays: bool = False) -> None:
        """A proposal that names it is made again without it. stays: what is carried for it goes on."""
        if self._peers.pop(record.key, None) is None:
            return
        self._newcomers.pop(record.key, None)
        proposal = self._groups[record.group].proposal
        if proposal is not None and record.key in proposal.newcomers:
            proposal.stale = True
        self._log("newcomer_dropped", peer=short(record.peer), group=record.group, reason=reason)
        if not stays:
            self._is_out(record)

    def _drop_silent_newcomers(self, group: Group) -> None:
        dropped = False
        for record in self._pending(group):
            reason = self._newcomer_is_late(group, record)
            if reason:
                self._drop_newcomer(record, reason)
                dropped = True
        if dropped:
            self._advance(group)

    def _newcomer_is_late(self, group: Group, record: Peer) -> str:
        silent_s, proposal = self._now - max(record.heard_at, self._line().missed_since), group.proposal
        if silent_s >= self.peer_timeout:
            return f"silent for {silent_s:.1f} s"
        if proposal is None or record.key not in proposal.newcomers or record.said.ready == proposal.version:
            return ""
        waited_s = self._now - proposal.since
        return f"not linked to the members after {waited_s:.0f} s" if waited_s >= limits.STUCK_S else ""

    def _tell_pending(self, group: Group) -> None:
        """Everybody knows how many wait."""
        waiting = self._pending(group)
        count = len(waiting)
        for record in [record for record in (*self._members(group), *waiting) if record.told_pending != count]:
            if record.conn is not None:
                record.told_pending = count
                self._tell(record, Pending(count))

    # ---- silence

    def _evict_silent_members(self, group: Group) -> None:
        if group.epoch is None:
            return
        heard_since = self._now - self.peer_timeout
        if group.ballot is None and not any(r.complaints or r.heard_at <= heard_since for r in self._members(group)):
            return  # nearly always, and asked ten times a second
        seen = self._seen(group)
        judged = lost_members(seen, self._now, self.peer_timeout, self._line())
        lost = [(peer, reason, False) for peer, reason in judged]
        lost += [(peer, reason, True) for peer, reason in self._stuck(group)]
        if not lost and self._all_are_gone(group):
            lost = [(r.peer, "the whole group was lost and newcomers wait", True) for r in self._members(group)]
        for peer, reason, for_good in lost:
            self._lose(self._member(group, peer), reason, for_good=for_good)
        if lost:
            self._advance(group)

    def _stuck(self, group: Group) -> list[tuple[bytes, str]]:
        """Its C threads live and its Python does not: others stay frozen no longer than STUCK_S."""
        ballot = group.ballot
        if ballot is None or self._now - ballot.since < limits.STUCK_S:
            return []
        waited_s = self._now - ballot.since
        missing = [key for key in ballot.members if not has_reported(self._peers[key], ballot)]
        return [(peer, f"no answer to a flush for {waited_s:.0f} s") for peer, _ in missing]

    def _all_are_gone(self, group: Group) -> bool:
        """Nobody is left to complain of anybody. Only newcomers care, and only after a time no uplink is down for.

        Connections that are still open speak for the members (a stopped process, a cut uplink): they get longer.
        """
        members = self._members(group)
        open_ = any(record.conn is not None for record in members)
        patience_s = max(limits.STUCK_S if open_ else limits.TOTAL_LOSS_S, self.peer_timeout)
        return bool(self._pending(group)) and all(self._now - record.heard_at >= patience_s for record in members)

    def _line_works(self) -> None:
        """Somebody of the run is heard. After a while without, our own line may have failed: silence counts anew.

        Its members come one after the other: TCP repeats into a line that was cut at intervals that grow to more than
        peer_timeout.
        """
        if self._now - self._line_at > self.peer_timeout * limits.LINE_GAP_TIMEOUTS:
            self._line_since = self._now
            if any(group.epoch is not None for group in self._groups.values()):
                self._grace_until = max(self._grace_until, self._now + limits.RECONNECT_S)
        self._line_at = self._now

    def _line(self) -> Line:
        """Silence before this says nothing of the silent. Members that hear their peers need no time to find us."""
        quiet = self._now - self._line_at > self.peer_timeout * limits.LINE_GAP_TIMEOUTS
        since = self._now if quiet else self._line_since
        return Line(max(since, min(self._grace_until, since + limits.MISSED_S)), max(since, self._grace_until))

    def _seen(self, group: Group) -> list[Seen]:
        """The members not given up, as suspicion judges them."""
        staying = [record for record in self._members(group) if not record.lost]
        late = self._late_at_safe_point(group, staying)
        return [Seen(r.peer, r.conn is not None, r.heard_at, r.complaints, self._owes(group, r, late)) for r in staying]

    def _owes(self, group: Group, record: Peer, late: Peer | None) -> str:
        """The answer of this member that others wait for."""
        if group.ballot is not None:
            return "" if has_reported(record, group.ballot) else "its report"
        if group.proposal is not None:
            return "" if record.said.ready == group.proposal.version else "it to get ready"
        return "it at a safe point" if record is late else ""

    def _late_at_safe_point(self, group: Group, staying: list[Peer]) -> Peer | None:
        """The only one that all others have waited for long enough."""
        missing = [record for record in staying if record.said.arrived is None]
        if group.ballot is not None or group.proposal is not None or len(missing) != 1 or len(staying) == 1:
            return None
        since = max(record.said.arrived_at for record in staying if record is not missing[0])
        return missing[0] if self._now - since >= self.peer_timeout else None

    def _restart_timers(self, gap_s: float) -> None:
        """We were stopped ourselves: what arrived meanwhile is unread, so nobody is late yet."""
        self._log("master_paused", gap_s=round(gap_s, 3))
        for record in self._peers.values():
            record.heard_at = self._now
            record.said.arrived_at = self._now
            for peer, complaint in record.complaints.items():
                record.complaints[peer] = replace(complaint, since=self._now)
        for group in self._groups.values():
            for open_ in (group.ballot, group.proposal):
                if open_ is not None:
                    open_.since = self._now
            group.planning.restart_timers(self._now)
        for entry in self._conns.values():
            entry.since = self._now
        self._observers.restart_timers(self._now)

    # ---- records

    def _members(self, group: Group) -> list[Peer]:
        """In the order of the epoch: rank by rank."""
        if group.roster_of is not group.commit:
            members = group.epoch.members if group.epoch is not None else ()
            group.roster = [self._peers[member.peer, member.incarnation] for member in members]
            group.ranks = tuple([member.peer for member in members])
            group.roster_of = group.commit
        return group.roster

    def _staying(self, group: Group) -> tuple[PeerKey, ...]:
        """Whom a ballot names."""
        return tuple([(record.peer, record.incarnation) for record in self._members(group) if not record.lost])

    def _left_out(self, group: Group, epoch: Epoch) -> list[Peer]:
        """Members that are not in the epoch behind theirs."""
        staying = {(member.peer, member.incarnation) for member in epoch.members}
        return [record for record in self._members(group) if record.key not in staying]

    def _ranks(self, group: Group) -> tuple[bytes, ...]:
        """The members' ids by rank: what channels of pairs refer to."""
        self._members(group)
        return group.ranks

    def _member(self, group: Group, peer: bytes) -> Peer:
        return next(record for record in self._members(group) if record.peer == peer)

    def _pending(self, group: Group) -> list[Peer]:
        """In the order of their coming."""
        waiting = (r for r in self._newcomers.values() if r.group == group.group and r.standing is Standing.PENDING)
        return sorted(waiting, key=lambda record: record.order)

    # ---- effects

    def _taken(self) -> list[Effect]:
        out, self._out = self._out, []
        return out

    def _send(self, conn: int, message: Message) -> None:
        self._out.append(Send(conn, message))

    def _tell(self, record: Peer, message: Message) -> None:
        """Nothing is queued for an absent peer: it is told when it comes back."""
        if record.conn is not None:
            self._send(record.conn, message)

    def _send_evicted(self, conn: int, reason: str) -> None:
        self._send(conn, Evicted(clip(reason)))
        self._close(conn, f"evicted: {reason}")

    def _close(self, conn: int, reason: str) -> None:
        self._out.append(Close(conn, reason))
        entry = self._conns.pop(conn, None)
        if entry is not None and entry.peer is not None and entry.peer.conn == conn:
            entry.peer.conn = None
        self._drop_observer(conn, reason)

    def _refuse(self, conn: int, reason: str) -> None:
        """A message that breaks the contract costs its sender the connection."""
        entry = self._conns.get(conn)
        if entry is None or entry.peer is None:
            self._out.append(StrangerRefused(reason))
        else:
            self._log("connection_refused", conn=conn, peer=short(entry.peer.peer), reason=reason)
        self._out.append(Close(conn, reason))
        self._detach(conn)

    def _log(self, event: str, **fields: Any) -> None:
        self._events.append((self._now, event, fields))
        self._out.append(Log(event, fields))

    # ---- for people

    def status(self) -> dict[str, Any]:
        """The run as it stands: what Status carries and ``pyccl status`` prints."""
        return {
            "run": self.run.hex(),
            "term": self.term,
            "library": self.library,
            "peer_timeout_s": self.peer_timeout,
            "journal": {"kept": self.journaled, "waiting": len(self._writing), "error": self._journal_error},
            "needs_majority": self.needs_majority,
            "groups": [self._group_status(group) for _, group in sorted(self._groups.items())],
            "observers": self._observers.status(),
            "gone": {f"{short(peer)}/{short(inc)}": why for (peer, inc), why in list(self._gone.items())[-50:]},
            "events": [
                {"ago_s": round(self._now - at, 3), "event": event, **fields} for at, event, fields in self._events
            ],
        }

    def _group_status(self, group: Group) -> dict[str, Any]:
        epoch, ballot, proposal = group.epoch, group.ballot, group.proposal
        return {
            "group": group.group,
            "epoch": group.last_number,
            "epoch_id": group.last_id.hex(),
            "members": [self._peer_status(record) for record in self._members(group)],
            "pending": [self._peer_status(record) for record in self._pending(group)],
            "founded": epoch is not None,
            "deciding": group.deciding is not None,
            "ballot": None
            if ballot is None
            else {
                "number": ballot.number,
                "kind": ballot.kind,
                "undecided": ballot.undecided,
                "waits_for": [short(k[0]) for k in ballot.members if not has_reported(self._peers[k], ballot)],
            },
            "proposal": None
            if proposal is None
            else {
                "version": proposal.version,
                "waits_for": [
                    short(m.peer)
                    for m in proposal.epoch.members
                    if (record := self._peers.get((m.peer, m.incarnation))) is not None
                    and record.said.ready != proposal.version
                ],
            },
        }

    def _peer_status(self, record: Peer) -> dict[str, Any]:
        return {
            "peer": record.peer.hex(),
            "addresses": [f"{address.host}:{address.port}" for address in record.addresses],
            "seen": record.seen,
            "library": record.library,
            "connected": record.conn is not None,
            "heard_ago_s": round(self._now - record.heard_at, 3),
            "at_safe_point": record.said.arrived is not None,
            "blocked": record.said.blocked is not None,
            "lost": record.lost,
            "complaints": {short(peer): complaint.cause for peer, complaint in sorted(record.complaints.items())},
            "relayed": [short(link.peer) for link in record.measured.links if link.relayed] if record.measured else [],
            "paths": {
                short(link.peer): _path_name(link.path, link.via)
                for link in (record.measured.links if record.measured else ())
            },
        }


# ---- pure helpers and tables ----------------------------------------------------------------------------------------


def _path_name(path: int, via: bytes) -> str:
    """As people read it. No id: of a relay that the sender does not know, or of the master."""
    return PATH_NAMES[path] + (f" by {short(via)}" if via != NO_ID else "")


def _cuts_of_pairs(counts: Iterable[Count], members: tuple[bytes, ...]) -> dict[bytes, tuple[Count, ...]]:
    """Each member needs to know of its own pairs only."""
    cuts: dict[bytes, list[Count]] = {}
    for count in counts:
        for peer in participants(count.space, count.tag, members):
            cuts.setdefault(peer, []).append(count)
    return {peer: tuple(cut) for peer, cut in cuts.items()}


def _highest(known: Mapping[tuple[int, int], int], counts: Iterable[Count]) -> dict[tuple[int, int], int]:
    out = dict(known)
    for count in counts:
        out[count.space, count.tag] = max(count.submitted, out.get((count.space, count.tag), 0))
    return out


def _status_json(status: dict[str, Any]) -> str:
    """As JSON that fits an envelope: of a huge run the lists are left out, never cut in the middle."""
    for leave_out in ((), ("events", "gone"), ("events", "gone", "groups", "observers")):
        text = json.dumps({key: value for key, value in status.items() if key not in leave_out})
        if len(text) <= limits.STATUS_CHARS_MAX:  # and in bytes: JSON of this kind is ASCII
            break
    return text


# What a message changes. Heartbeat has no row: that it came is all it says, and it is answered.
_HANDLERS: Final[Mapping[type[Message], Callable[[MasterMachine, Group, Peer, Any], None]]] = {
    Leave: MasterMachine._on_leave,
    Arrive: MasterMachine._on_arrive,
    Withdraw: MasterMachine._on_withdraw,
    Ready: MasterMachine._on_ready,
    Behind: MasterMachine._on_behind,
    Unreachable: MasterMachine._on_unreachable,
    Addresses: MasterMachine._on_addresses,
    Punch: MasterMachine._on_punch,
    RelayAsk: MasterMachine._on_relay_ask,
    Suspect: MasterMachine._on_suspect,
    Trust: MasterMachine._on_trust,
    Report: MasterMachine._on_report,
    Settle: MasterMachine._on_settle,
    Blocked: MasterMachine._on_blocked,
    Unblocked: MasterMachine._on_unblocked,
    Differs: MasterMachine._on_differs,
    Entered: MasterMachine._on_entered,
    Measured: MasterMachine._on_measured,
    Dialed: MasterMachine._on_dialed,
}

# Of the records that steps are taken by.
_CHANGES_NOTHING: Final = frozenset({Heartbeat, Entered, Addresses, Punch, RelayAsk, Dialed})

# What may follow, first things first. Each says whether it did something; after that all are asked again.
_STEPS: Final[tuple[Callable[[MasterMachine, Group], bool], ...]] = (
    MasterMachine._step_lost_at_once,
    MasterMachine._step_take_back,
    MasterMachine._step_dissolve,
    MasterMachine._step_found,
    MasterMachine._step_ballot,
    MasterMachine._step_verdict,
    MasterMachine._step_mismatch,
    MasterMachine._step_propose,
    MasterMachine._step_join,
)
