"""MemberMachine: one communicator's side of membership. Messages, engine answers and calls in, effects out.

It knows nothing of sockets, threads, arrays or clocks. The shell carries out the effects in order and feeds back what
comes of them. Spec: proto/wire.md 4.1, 4.2, 4.4; the rules behind it: design.md 5.

Two small machines, each with a table:
    State   where this incarnation stands in the run     GREETING -> PENDING -> LINKING -> MEMBER -> ENDED
    Link    where the control connection stands          DOWN -> GREETED (Hello sent) -> UP (Welcome received)
A member that loses its control connection stays a MEMBER: collectives need no master. A newcomer that loses it
starts again from GREETING.

Invariants: the epoch only ever changes to one that names ours as its predecessor and contains this incarnation; no
message leaves unless Link is UP (but Hello); whatever the master may have missed is told again after a resume, and
whatever we may have missed it tells us again; once ENDED nothing happens any more.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pyccl._proto import limits
from pyccl._proto.budget import Budget
from pyccl._proto.candidates import may_dial
from pyccl._proto.epoch import Address, Epoch, Member
from pyccl._proto.messages import (
    KIND_FOUND,
    KIND_JOIN,
    KIND_MISMATCH,
    SUSPECT_CAUSES,
    Addresses,
    Alive,
    Arrive,
    Behind,
    Blocked,
    Cancelled,
    Count,
    DialAsk,
    Dialed,
    Differs,
    Entered,
    EpochCommit,
    EpochPropose,
    Evicted,
    Flush,
    Heartbeat,
    Hello,
    Key,
    Leave,
    Measured,
    Message,
    Moved,
    Observers,
    OpReport,
    OpState,
    OpVerdict,
    Pending,
    Punch,
    PunchAsk,
    PunchGo,
    Ready,
    Recall,
    Rejected,
    RelayAsk,
    RelayCall,
    Relays,
    Report,
    Resume,
    Settle,
    Suspect,
    Term,
    Trust,
    Unblocked,
    Undecided,
    Unknown,
    Unreachable,
    Welcome,
    Withdraw,
    clip,
)
from pyccl._proto.mismatch import parse_detail
from pyccl.errors import RemoteProtocolError, UsageError

# ---- effects --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Effect:
    """One thing for the shell to do. Effects of one call are done in order, and before the next input is fed."""


@dataclass(frozen=True, slots=True)
class Send(Effect):
    """Put the message on the control connection. If that has just gone, drop it: it is told again after a resume."""

    message: Message


@dataclass(frozen=True, slots=True)
class OpenLinks(Effect):
    """Be linked to all of `peers`, then ``links_ready(version)``; or ``links_failed(version, who, why)``.

    A later OpenLinks replaces an earlier one: stop trying for peers it does not name, keep links that are up, and
    answer for the new version only. Answer ready for an empty list at once.
    """

    version: int
    number: int
    peers: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class SetCut(Effect):
    """pyccl_engine_cut(counts): ``behind(version, our counts)`` if it says so, else ``drained(version)`` in time."""

    version: int
    counts: tuple[Count, ...]


@dataclass(frozen=True, slots=True)
class ClearCut(Effect):
    """pyccl_engine_cut(open=1): no safe point for now. (Enter ends a cut by itself.)"""


@dataclass(frozen=True, slots=True)
class Freeze(Effect):
    """pyccl_engine_freeze, then ``frozen(ballot, its report)``. Idempotent; also when frozen already."""

    ballot: int


@dataclass(frozen=True, slots=True)
class Enter(Effect):
    """pyccl_engine_epoch: epoch and verdicts in one step; then ``entered(number)``. Links of all members exist or are
    on their way. Ends a freeze and a cut."""

    epoch: Epoch
    verdicts: tuple[OpVerdict, ...]
    restart: bool
    mismatch: bool
    rank: int
    world_size: int


@dataclass(frozen=True, slots=True)
class KeepLinks(Effect):
    """Close data links to everybody else: no engine peer, and no connection attempt, remains but these."""

    peers: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Joined(Effect):
    """connect() ends well."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class NeedCounts(Effect):
    """The safe point starts over in the epoch just entered: ``arrive(pyccl_engine_counts())`` once more."""


@dataclass(frozen=True, slots=True)
class SafePointDone(Effect):
    """update_topology() ends: error None is success, else MismatchError with this text. kind: of the epoch commit."""

    error: str | None
    kind: str


@dataclass(frozen=True, slots=True)
class PendingChanged(Effect):
    """So many newcomers wait for a safe point."""

    count: int


@dataclass(frozen=True, slots=True)
class ObserversChanged(Effect):
    """These hold the shared state without being members: they may ask us for it, and we them."""

    observers: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class PeerMoved(Effect):
    """It is reached at other addresses from now on."""

    peer: Member


@dataclass(frozen=True, slots=True)
class OfferPunch(Effect):
    """That peer would punch so many connections: ``punch`` if we do, too."""

    peer: bytes
    count: int


@dataclass(frozen=True, slots=True)
class BeginPunch(Effect):
    """Connect to these in so many seconds, from what was offered."""

    peer: bytes
    endpoints: tuple[Address, ...]
    delay_s: float


@dataclass(frozen=True, slots=True)
class MeetAtRelay(Effect):
    """That peer is at this relay, to be connected with us."""

    peer: bytes
    relay: bytes


@dataclass(frozen=True, slots=True)
class DialBack(Effect):
    """Connect there once within limits.DIAL_BACK_S, send nothing, then ``dialed(ticket, why not)``."""

    ticket: int
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class RelaysChanged(Effect):
    """These offer to relay and are no members; see messages.Relays."""

    relays: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class MismatchNotice(Effect):
    """Comes before the Enter that fails open operations with MISMATCH: what their MismatchError says."""

    detail: str
    peers: tuple[str, ...]
    fields: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ended(Effect):
    """Out of the run: pyccl_engine_end; open calls fail. kind: "rejected", "evicted" or "left". The last effect ever.

    A new connect() needs a new machine with a new incarnation: the master remembers this one as gone.
    """

    kind: str
    reason: str


# ---- states and moves -----------------------------------------------------------------------------------------------


class State(enum.Enum):
    GREETING = "not yet admitted, the master does not know us"
    PENDING = "the master knows us; the members have not reached a safe point"
    LINKING = "a newcomer in a proposal"
    MEMBER = "in an epoch"
    ENDED = "out of the run"


class Link(enum.Enum):
    DOWN = "no control connection"
    GREETED = "Hello sent"
    UP = "Welcome received"


_KNOWN: Final = (State.PENDING, State.LINKING, State.MEMBER)

# (state, message) -> state. A missing row is a protocol error of the master's.
MOVES: Final[Mapping[tuple[State, type[Message]], State]] = {
    (State.GREETING, Welcome): State.PENDING,
    (State.GREETING, Rejected): State.ENDED,
    (State.GREETING, Evicted): State.ENDED,
    (State.PENDING, Pending): State.PENDING,
    (State.PENDING, Alive): State.PENDING,
    (State.PENDING, Observers): State.PENDING,
    (State.PENDING, Term): State.PENDING,
    (State.PENDING, EpochPropose): State.LINKING,
    (State.PENDING, EpochCommit): State.MEMBER,  # founded with us, or the commit we missed while disconnected
    (State.PENDING, Cancelled): State.PENDING,
    (State.PENDING, Rejected): State.ENDED,
    (State.PENDING, Evicted): State.ENDED,
    (State.LINKING, Pending): State.LINKING,
    (State.LINKING, Alive): State.LINKING,
    (State.LINKING, Observers): State.LINKING,
    (State.LINKING, Term): State.LINKING,
    (State.LINKING, EpochPropose): State.LINKING,
    (State.LINKING, EpochCommit): State.MEMBER,
    (State.LINKING, Cancelled): State.PENDING,
    (State.LINKING, Rejected): State.ENDED,
    (State.LINKING, Evicted): State.ENDED,
    (State.MEMBER, Welcome): State.MEMBER,  # the control connection came back
    (State.MEMBER, Pending): State.MEMBER,
    (State.MEMBER, Alive): State.MEMBER,
    (State.MEMBER, Observers): State.MEMBER,
    (State.MEMBER, Term): State.MEMBER,
    (State.MEMBER, EpochPropose): State.MEMBER,
    (State.MEMBER, EpochCommit): State.MEMBER,
    (State.MEMBER, Cancelled): State.MEMBER,
    (State.MEMBER, Flush): State.MEMBER,
    (State.MEMBER, Undecided): State.MEMBER,
    (State.MEMBER, DialAsk): State.MEMBER,
    (State.MEMBER, Unknown): State.MEMBER,  # a master that lost its journal, or another run's
    (State.MEMBER, Rejected): State.ENDED,  # a resume that the master refuses
    (State.MEMBER, Evicted): State.ENDED,
    **{(state, each): state for state in _KNOWN for each in (Moved, PunchAsk, PunchGo, RelayCall, Relays)},
}

# Before its Welcome a master may only greet or refuse.
GREETINGS: Final = (Welcome, Rejected, Evicted, Unknown)


@dataclass(slots=True)
class _Proposal:
    """The open EpochPropose and what the shell has answered to it."""

    version: int
    epoch: Epoch
    linked: bool = False
    drained: bool = False
    answer: Message | None = None  # the last one given, for a master that may have missed it


@dataclass(slots=True)
class _Standing:
    """What holds only for the current epoch: replaced whole when the next one is entered."""

    proposal: _Proposal | None = None
    ballot: int = 0  # 0: not frozen
    report: Report | None = None
    undecided: bool = False
    settle: bool = False
    differs: Differs | None = None
    blocked: Blocked | None = None
    entered: bool = False


@dataclass(slots=True)
class _Complaint:
    cause: str
    detail: str


class MemberMachine:
    """All inputs take `now` in seconds of any one clock and return effects; ``receive`` may raise RemoteProtocolError.

    After that error the shell closes the control connection and calls ``disconnected``: nothing of the message was
    applied.
    """

    def __init__(
        self,
        peer: bytes,
        incarnation: bytes,
        group: int,
        addresses: tuple[Address, ...],
        library: str,
    ) -> None:
        self.peer: Final = peer
        self.incarnation: Final = incarnation
        self.group: Final = group
        self.addresses = addresses
        self.library: Final = library
        self.state = State.GREETING
        self.link = Link.DOWN
        self._commit: EpochCommit | None = None
        self.run: bytes | None = None
        self.term = 0
        self._term_signature = b""
        self.peer_timeout = 0.0  # the master's word, from Welcome
        self.observed = ""  # where it sees us, from Welcome
        self.remote = False  # whether peers of other machines may come, from Welcome
        self.world_size = 0
        self.pending = 0
        self.observers: tuple[Member, ...] = ()
        self.relays: tuple[Member, ...] = ()
        self._standing = _Standing()
        self._arrived: tuple[Count, ...] | None = None
        self._measured: Measured | None = None  # what was last told of the links
        self._complaints: dict[bytes, _Complaint] = {}
        self._beat_at = 0.0
        self._heard_at = 0.0
        self._trusted_at = float("-inf")
        self._dials, self._dialing = Budget(limits.DIALS_BURST, limits.DIAL_EVERY_S), False
        self._dial_ticket: int | None = None  # of what is being dialed, if the master that asked is there

    @property
    def epoch(self) -> Epoch | None:
        return self._commit.epoch if self._commit is not None else None

    # ---- the control connection

    def connected(self, now: float) -> list[Effect]:
        if self.state is State.ENDED:
            return []
        self.link = Link.GREETED
        resume = None
        if self.epoch is not None and self.run is not None:
            resume = Resume(self.run, self.epoch.number, self.epoch.id, self._standing.ballot > 0, self.term)
        hello = Hello(
            limits.PROTOCOL_VERSION, self.library, self.group, self.peer, self.incarnation, self.addresses, resume
        )
        self._beat_at = self._heard_at = now
        return [Send(hello)]

    def disconnected(self, now: float) -> list[Effect]:
        self.link = Link.DOWN
        self._dial_ticket = None
        if self.state in (State.PENDING, State.LINKING):
            self.state = State.GREETING
            self._standing = _Standing()
        return []

    def receive(self, message: Message, now: float) -> list[Effect]:
        """Judge the message whole, then move: a refused message leaves every field as it was."""
        if self.state is State.ENDED or self.link is Link.DOWN:
            return []
        state_next = MOVES.get((self.state, type(message)))
        greeting = isinstance(message, GREETINGS)
        if (
            state_next is None
            or (self.link is Link.GREETED and not greeting)
            or (self.link is Link.UP and isinstance(message, Welcome | Unknown))
        ):
            raise RemoteProtocolError(
                f"{type(message).__name__} is not legal in {self.state.name} with the link {self.link.name}"
            )
        effects: list[Effect] = _HANDLERS[type(message)](self, message, now)
        self.state = state_next
        self._heard_at = now
        return effects

    def master_is_away(self, now: float) -> bool:
        """No control connection; one on which nothing came for peer_timeout although every heartbeat is answered; or a
        master that may not decide what we wait for."""
        return self.link is not Link.UP or self._standing.undecided or now - self._heard_at >= self.peer_timeout

    def master_silent_s(self, now: float) -> float:
        """Since when nothing came on this control connection."""
        return now - self._heard_at

    @property
    def lost(self) -> tuple[bytes, ...]:
        """Members that we complain of: what concerns them needs the master."""
        return tuple(sorted(self._complaints))

    @property
    def needs_master(self) -> bool:
        """Operations may wait here for what only a master can give: a verdict, or the end of a cut."""
        standing = self._standing
        return self.state is State.MEMBER and bool(self._complaints or standing.ballot or standing.proposal)

    # ---- answers of the shell and the engine

    def links_ready(self, version: int, now: float) -> list[Effect]:
        proposal = self._proposal_of(version)
        if proposal is None:
            return []
        proposal.linked = True
        return self._ready_if_complete(proposal, now)

    def links_failed(self, version: int, peers: tuple[bytes, ...], reason: str, now: float) -> list[Effect]:
        proposal = self._proposal_of(version)
        named = tuple([peer for peer in peers if proposal and peer != self.peer and peer in proposal.epoch.peers])
        if proposal is None or not named:
            return []
        proposal.linked = False
        return self._answer(proposal, Unreachable(proposal.epoch.number, version, named, clip(reason)), now)

    def behind(self, version: int, counts: tuple[Count, ...], now: float) -> list[Effect]:
        proposal = self._proposal_of(version)
        if proposal is None or self.state is not State.MEMBER:
            return []
        self._arrived = counts
        return self._answer(proposal, Behind(proposal.epoch.number, version, counts), now)

    def drained(self, version: int, now: float) -> list[Effect]:
        proposal = self._proposal_of(version)
        if proposal is None:
            return []
        proposal.drained = True
        return self._ready_if_complete(proposal, now)

    def frozen(self, ballot: int, ops: tuple[OpReport, ...], now: float) -> list[Effect]:
        standing = self._standing
        if self.state is not State.MEMBER or ballot != standing.ballot or ballot == 0:
            return []
        if len(ops) > limits.KEYS_MAX:  # what is running or failed decides the same unreported
            ops = tuple([op for op in ops if op.state in (OpState.PREPARED, OpState.COMMITTED)])
        standing.report = Report(self._number, ballot, ops)
        return self._send(standing.report, now)

    def entered(self, number: int, now: float) -> list[Effect]:
        if self.state is not State.MEMBER or number != self._number:
            return []
        self._standing.entered = True
        return self._send(Entered(number), now)

    # ---- how we are reached, and reach others

    def readdress(self, addresses: tuple[Address, ...], now: float) -> list[Effect]:
        if addresses == self.addresses or self.state is State.ENDED:
            return []
        self.addresses = addresses
        return self._send(Addresses(addresses), now)

    def punch(self, to: bytes, endpoints: tuple[Address, ...], rtt_s: float, now: float) -> list[Effect]:
        """Offer it, or take the other's offer: ``BeginPunch`` follows when both have."""
        if self.state is State.ENDED:
            return []
        return self._send(Punch(to, endpoints, min(round(rtt_s * 1e6), limits.RTT_US_MAX)), now)

    def ask_relay(self, to: bytes, relay: bytes, now: float) -> list[Effect]:
        """We dial this relay to be connected with that peer, who should come there, too."""
        if self.state is State.ENDED:
            return []
        return self._send(RelayAsk(to, relay), now)

    def dialed(self, ticket: int, reason: str, now: float) -> list[Effect]:
        """``DialBack`` was tried. reason: why it was in vain; "": it was not."""
        asked, self._dial_ticket, self._dialing = self._dial_ticket, None, False
        if self.state is not State.MEMBER or asked != ticket:  # the next master may use the same numbers for others
            return []
        return self._send(Dialed(ticket, clip(reason, limits.DIAL_REASON_CHARS_MAX)), now)

    # ---- what the engine sees of the others

    def suspect(self, peer: bytes, cause: str, detail: str, now: float) -> list[Effect]:
        if self.state is not State.MEMBER or peer == self.peer or peer not in self._members:
            return []
        assert cause in SUSPECT_CAUSES, cause
        complaint = _Complaint(cause, clip(detail))
        if self._complaints.get(peer) == complaint:
            return []
        self._complaints[peer] = complaint
        return self._send(Suspect(peer, complaint.cause, complaint.detail), now)

    def trust(self, peer: bytes, now: float) -> list[Effect]:
        if self._complaints.pop(peer, None) is None or self.state is not State.MEMBER:
            return []
        self._trusted_at = now
        return self.unblocked(now) + self._send(Trust(peer), now)

    def settle(self, now: float) -> list[Effect]:
        """An operation here is prepared and past its deadline: only a ballot can tell what became of it."""
        if self.state is not State.MEMBER:
            return []
        self._standing.settle = True
        return self._send(Settle(self._number), now)

    def differs(self, key: Key, peer: bytes, mine: bytes, theirs: bytes, now: float) -> list[Effect]:
        if self.state is not State.MEMBER or self._standing.differs is not None or peer not in self._members:
            return []  # the first is enough: the verdict ends every open call
        self._standing.differs = Differs(self._number, key, peer, mine, theirs)
        return self._send(self._standing.differs, now)

    def blocked(self, lacking: tuple[Key, ...], below_cut: bool, now: float) -> list[Effect]:
        """Every thread here waits and nothing was submitted for mismatch_grace; `lacking`: open here, not elsewhere."""
        if self.state is not State.MEMBER:
            return []
        if now - self._trusted_at < self.peer_timeout:
            return self.unblocked(now)  # a link has come back, and what we lack may be on its way over it
        blocked = Blocked(self._number, tuple(lacking[: limits.LACKING_MAX]), self._arrived is not None, below_cut)
        if self._standing.blocked == blocked:
            return []
        self._standing.blocked = blocked
        return self._send(blocked, now)

    def unblocked(self, now: float) -> list[Effect]:
        if self.state is not State.MEMBER or self._standing.blocked is None:
            return []
        self._standing.blocked = None
        return self._send(Unblocked(self._number), now)

    # ---- calls of the user

    def arrive(self, counts: tuple[Count, ...], now: float) -> list[Effect]:
        """update_topology() begins, or NeedCounts is answered."""
        if self.state is State.ENDED:
            return []
        if self.state is not State.MEMBER:
            raise UsageError("update_topology() needs a connected communicator")
        effects = self.unblocked(now)  # whoever arrives has just moved
        self._arrived = counts
        if self._standing.ballot == 0:  # frozen: the safe point starts in the next epoch, with NeedCounts
            effects += self._send(Arrive(self._number, counts), now)
        return effects

    def measured(self, message: Measured, now: float) -> list[Effect]:
        """The links were measured, or their traffic tells something new. Before ``arrive``, so that the plan of the
        next epoch may rest on it."""
        if self.state is not State.MEMBER:
            return []
        self._measured = message
        return self._send(message, now)

    def withdraw(self, now: float) -> list[Effect]:
        """update_topology() was given up. Should the commit be on its way already, it is entered all the same.

        So after Ready the cut stays: nothing may start in an epoch that the others have perhaps left. It goes with
        Cancelled, or with the next epoch.
        """
        if self.state is not State.MEMBER or self._arrived is None:
            return []
        effects = self.unblocked(now)
        self._arrived = None
        effects += self._send(Withdraw(self._number), now)
        proposal = self._standing.proposal
        if proposal is not None and isinstance(proposal.answer, Ready):
            return effects
        return effects + self._drop_proposal()

    def leave(self, now: float) -> list[Effect]:
        if self.state is State.ENDED:
            return []
        effects = self._send(Leave(), now)
        return [*effects, *self._end("left", "left the run")]

    def tick(self, now: float) -> list[Effect]:
        """A heartbeat at regular times, whatever else was sent: its answer tells that the master lives."""
        if self.link is not Link.UP or now - self._beat_at < self.peer_timeout / limits.HEARTBEATS_PER_TIMEOUT:
            return []
        self._beat_at = now
        return self._send(Heartbeat(), now)

    # ---- handlers: check everything first, then change

    def _on_welcome(self, message: Welcome, now: float) -> list[Effect]:
        if message.version != limits.PROTOCOL_VERSION:
            raise RemoteProtocolError(f"the master speaks protocol {message.version}, not {limits.PROTOCOL_VERSION}")
        if self.epoch is not None and not (message.resumed and message.run == self.run):
            raise RemoteProtocolError("the master welcomed a returning member as somebody new")
        if self.epoch is not None and message.term < self.term:
            raise RemoteProtocolError(f"the master's term {message.term} is older than {self.term}")
        self.link = Link.UP
        self.run, self.term, self.peer_timeout = message.run, message.term, message.peer_timeout_ms / 1000
        self._term_signature = message.term_signature
        self.observed, self.remote = message.observed, message.remote
        # A master tells of observers and relays when there are some: those of before may be gone.
        changed = self._on_observers(Observers(()), now) if self.observers else []
        if self.relays:
            changed += self._on_relays(Relays(()), now)
        return changed + (self._tell_again(now) if self.state is State.MEMBER else [])

    def _on_term(self, message: Term, now: float) -> list[Effect]:
        """What a later master has to begin above, should this one's journal be lost."""
        if message.term < self.term:
            raise RemoteProtocolError(f"the master's term goes back from {self.term} to {message.term}")
        self.term, self._term_signature = message.term, message.signature
        return []

    def _on_observers(self, message: Observers, now: float) -> list[Effect]:
        self.observers = message.observers
        return [ObserversChanged(message.observers)]

    def _on_moved(self, message: Moved, now: float) -> list[Effect]:
        return [PeerMoved(message.member)] if message.member.peer != self.peer else []

    def _on_punch_ask(self, message: PunchAsk, now: float) -> list[Effect]:
        return [OfferPunch(message.peer, message.count)]

    def _on_punch_go(self, message: PunchGo, now: float) -> list[Effect]:
        return [BeginPunch(message.peer, message.endpoints, message.delay_us / 1e6)]

    def _on_relay_call(self, message: RelayCall, now: float) -> list[Effect]:
        return [MeetAtRelay(message.peer, message.relay)]

    def _on_dial_ask(self, message: DialAsk, now: float) -> list[Effect]:
        """One at a time and so often, whatever the master asks for: it makes nobody flood or scan others."""
        if self._dialing or not may_dial(message.host, self.observed) or not self._dials.take(now):
            return []
        self._dialing, self._dial_ticket = True, message.ticket
        return [DialBack(message.ticket, message.host, message.port)]

    def _on_relays(self, message: Relays, now: float) -> list[Effect]:
        self.relays = message.relays
        return [RelaysChanged(message.relays)]

    def _on_unknown(self, message: Unknown, now: float) -> list[Effect]:
        commit, run = self._commit, self.run
        assert commit is not None and run is not None  # a member
        if not message.asks:
            return []  # it hangs up, and we try again: perhaps it is not the master of this run
        recall = Recall(
            *(run, self.term, commit.epoch, commit.kind, commit.verdicts, commit.detail),
            *(commit.world_size, commit.journaled, commit.signature, self._term_signature),
        )
        return [Send(recall)]

    def _on_undecided(self, message: Undecided, now: float) -> list[Effect]:
        if message.ballot == self._standing.ballot:
            self._standing.undecided = True
        return []

    def _on_rejected(self, message: Rejected, now: float) -> list[Effect]:
        return self._end("rejected", message.reason)

    def _on_evicted(self, message: Evicted, now: float) -> list[Effect]:
        return self._end("evicted", message.reason)

    def _on_pending(self, message: Pending, now: float) -> list[Effect]:
        if message.count == self.pending:
            return []
        self.pending = message.count
        return [PendingChanged(message.count)]

    def _on_propose(self, message: EpochPropose, now: float) -> list[Effect]:
        self._check_epoch(message.epoch)
        if self._standing.ballot:
            raise RemoteProtocolError("an epoch was proposed in the middle of a ballot")
        proposal = self._standing.proposal
        if proposal is not None and message.version < proposal.version:
            return []
        if self.state is State.MEMBER and self._arrived is None:  # withdrawn while it was on its way
            return self._send(Withdraw(self._number), now)
        if proposal is not None and message.version == proposal.version:  # repeated after a resume
            return self._send(proposal.answer, now) if proposal.answer is not None else []
        self._standing.proposal = _Proposal(message.version, message.epoch)
        others = tuple([member for member in message.epoch.members if member.peer != self.peer])
        effects: list[Effect] = [OpenLinks(message.version, message.epoch.number, others)]
        if self.state is State.MEMBER:
            effects.append(SetCut(message.version, message.cut))
        return effects

    def _on_alive(self, message: Alive, now: float) -> list[Effect]:
        return []

    def _on_cancelled(self, message: Cancelled, now: float) -> list[Effect]:
        proposal = self._standing.proposal
        if proposal is None:
            return []
        if proposal.version > message.version:
            raise RemoteProtocolError(f"proposal {message.version} is cancelled after {proposal.version} was made")
        return self._drop_proposal()

    def _on_flush(self, message: Flush, now: float) -> list[Effect]:
        if message.epoch < self._number or message.ballot < self._standing.ballot:
            return []
        if message.epoch != self._number or message.proposed != self._number + 1:
            raise RemoteProtocolError(f"a flush of epoch {message.epoch} while in {self._number}")
        if self.peer not in message.members or not set(message.members) <= set(self._members):
            raise RemoteProtocolError("a flush names members that are not ours, or leaves us out")
        if message.ballot == 0:
            raise RemoteProtocolError("ballots are numbered from 1")
        standing = self._standing
        if message.ballot == standing.ballot:  # repeated after a resume
            return self._send(standing.report, now) if standing.report is not None else []
        standing.ballot, standing.report, standing.undecided = message.ballot, None, False
        standing.proposal = None  # the cut ends with the Enter that every ballot leads to
        return [Freeze(message.ballot)]

    def _on_commit(self, message: EpochCommit, now: float) -> list[Effect]:
        epoch = message.epoch
        if self.epoch is not None and epoch.id == self.epoch.id:
            return []  # repeated after a resume
        self._check_epoch(epoch)
        if len({verdict.key for verdict in message.verdicts}) != len(message.verdicts):
            raise RemoteProtocolError("two verdicts for one operation")
        newcomer = self.epoch is None
        mismatch = message.kind == KIND_MISMATCH and not newcomer
        restart = newcomer or message.kind in (KIND_FOUND, KIND_JOIN, KIND_MISMATCH)
        rank = epoch.rank_of(self.peer)
        assert rank is not None  # _check_epoch
        self._commit, self.world_size, self._standing = message, message.world_size, _Standing()
        others = tuple([peer for peer in epoch.peers if peer != self.peer])
        self._complaints = {peer: self._complaints[peer] for peer in others if peer in self._complaints}
        effects: list[Effect] = []
        if mismatch:
            effects.append(MismatchNotice(message.detail, *self._named(message.detail)))
        verdicts = () if newcomer else message.verdicts  # who was not in the epoch has nothing it could decide
        effects.append(Enter(epoch, verdicts, restart, mismatch, rank, message.world_size))
        effects.append(KeepLinks(others))
        if newcomer:
            effects.append(Joined(epoch))
        return effects + self._after_enter(message)

    def _after_enter(self, message: EpochCommit) -> list[Effect]:
        """What becomes of an update_topology() call that was outstanding when the epoch changed."""
        if self._arrived is None:
            return []
        if message.kind not in (KIND_JOIN, KIND_FOUND, KIND_MISMATCH):
            return [NeedCounts()]  # a loss: the call goes on in the epoch of those who are left
        self._arrived = None
        return [SafePointDone(message.detail if message.kind == KIND_MISMATCH else None, message.kind)]

    # ---- helpers

    @property
    def _number(self) -> int:
        assert self.epoch is not None
        return self.epoch.number

    @property
    def _members(self) -> tuple[bytes, ...]:
        return self.epoch.peers if self.epoch is not None else ()

    def _check_epoch(self, epoch: Epoch) -> None:
        """A proposed or committed epoch: well formed, ours, and the direct successor of the one we are in."""
        epoch.check_untrusted()
        if not epoch.has(self.peer, self.incarnation):
            raise RemoteProtocolError(f"epoch {epoch.number} is without us")
        if self.epoch is None:
            return
        if epoch.previous != self.epoch.id or epoch.number != self.epoch.number + 1:
            raise RemoteProtocolError(f"epoch {epoch.number} does not follow ours, {self.epoch.number}")
        if epoch.term < self.epoch.term:
            raise RemoteProtocolError(f"epoch {epoch.number} is of an older term")

    def _named(self, detail: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Full ids of the peers a mismatch names by their first digits, and the fields that differ."""
        prefixes, differing = parse_detail(detail)
        ids = [peer.hex() for peer in self._members]
        return tuple(next((i for i in ids if i.startswith(p)), p) for p in prefixes), differing

    def _proposal_of(self, version: int) -> _Proposal | None:
        """The open proposal, if it is this one: answers to an older one have no effect."""
        proposal = self._standing.proposal
        return proposal if proposal is not None and proposal.version == version else None

    def _ready_if_complete(self, proposal: _Proposal, now: float) -> list[Effect]:
        if not proposal.linked or (self.state is State.MEMBER and not proposal.drained):
            return []
        return self._answer(proposal, Ready(proposal.epoch.number, proposal.version), now)

    def _answer(self, proposal: _Proposal, answer: Message, now: float) -> list[Effect]:
        if proposal.answer == answer:
            return []
        proposal.answer = answer
        return self._send(answer, now)

    def _drop_proposal(self) -> list[Effect]:
        if self._standing.proposal is None:
            return []
        self._standing.proposal = None
        return [ClearCut()] if self.state is State.MEMBER else []

    def _tell_again(self, now: float) -> list[Effect]:
        """After a resume: all that holds and that the master forgot, or may not have heard, while we were away.

        Answers to a flush or a proposal are not among it: the master repeats the question.
        """
        standing, number = self._standing, self._number
        again: list[Message] = []
        if standing.entered:
            again.append(Entered(number))
        if self._measured is not None:
            again.append(self._measured)
        if standing.ballot == 0:
            again.append(Withdraw(number) if self._arrived is None else Arrive(number, self._arrived))
        again += [Suspect(peer, c.cause, c.detail) for peer, c in sorted(self._complaints.items())]
        if standing.settle:
            again.append(Settle(number))
        again += [message for message in (standing.differs, standing.blocked) if message is not None]
        return [effect for message in again for effect in self._send(message, now)]

    def _send(self, message: Message, now: float) -> list[Effect]:
        if self.link is not Link.UP:
            return []
        return [Send(message)]

    def _end(self, kind: str, reason: str) -> list[Effect]:
        self.state, self.link = State.ENDED, Link.DOWN
        self._standing, self._arrived, self._complaints = _Standing(), None, {}
        return [Ended(kind, reason)]


_HANDLERS: Final[Mapping[type[Message], Callable[[MemberMachine, Any, float], list[Effect]]]] = {
    Welcome: MemberMachine._on_welcome,
    Rejected: MemberMachine._on_rejected,
    Evicted: MemberMachine._on_evicted,
    Pending: MemberMachine._on_pending,
    Alive: MemberMachine._on_alive,
    EpochPropose: MemberMachine._on_propose,
    EpochCommit: MemberMachine._on_commit,
    Cancelled: MemberMachine._on_cancelled,
    Flush: MemberMachine._on_flush,
    Unknown: MemberMachine._on_unknown,
    Undecided: MemberMachine._on_undecided,
    Observers: MemberMachine._on_observers,
    Term: MemberMachine._on_term,
    Moved: MemberMachine._on_moved,
    PunchAsk: MemberMachine._on_punch_ask,
    PunchGo: MemberMachine._on_punch_go,
    RelayCall: MemberMachine._on_relay_call,
    Relays: MemberMachine._on_relays,
    DialAsk: MemberMachine._on_dial_ask,
}
