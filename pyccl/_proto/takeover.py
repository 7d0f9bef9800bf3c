"""How a master takes over the run of members that it does not know: it was started anew, and they were not.

    Hello(resume) -> Unknown(asks) -> Recall(its last commit) -> the run and its group's epoch are adopted

The first Recall decides which run it is; whoever comes later adds its group, or the one commit that the first was
behind. From the next epoch on that this master decides, its own word counts. Spec: proto/wire.md 5.13.

A secure master signs what members may tell the next one of its key: each commit, and its term. So nothing that is told
is invented, but it may be old: of two commits of a group the later one counts, and before RECONNECT_S, in which all
who live come back, nothing is decided that rests on one. A plain master takes the word of who comes, while it has
nobody to lose by it.

A part of MasterMachine, in a file of its own: it works on the machine's records.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Protocol

from pyccl._proto import limits
from pyccl._proto.epoch import Epoch, Member
from pyccl._proto.master_records import Group
from pyccl._proto.messages import EpochCommit, Hello, Recall, Resume, Term, Unknown
from pyccl._proto.mismatch import short
from pyccl._proto.past import NONCE_BITS, START_MAX, Adopted, Began, Committed, Fenced, make_term, start_of
from pyccl.errors import RemoteProtocolError

if TYPE_CHECKING:
    from pyccl._proto.master import MasterMachine


class Signer(Protocol):
    """The key of a secure master, which every later master of its runs has, too. A Term is signed as of group 0."""

    def sign(self, run: bytes, group: int, message: EpochCommit | Term) -> bytes:
        """The message's signature, whatever it holds now."""

    def is_signed(self, run: bytes, group: int, message: EpochCommit | Term) -> bool:
        """Whether the message holds the signature that ``sign`` gives."""


class Takeover:
    def __init__(self, master: MasterMachine, adopts: bool, signer: Signer | None) -> None:
        self._master: Final = master
        self.adopts: Final = adopts
        self._signer: Final = signer
        # Whose epoch is their members' word, and until when nothing is decided there; None: the run is our own.
        self._groups: dict[int, float] | None = None
        self._held: deque[tuple[int, int, Hello]] = deque()  # (ticket, connection, what it waits to be answered)
        self._term_ticket = 0  # of the record of a later start, heard of from members
        self.term = self._signed_term()

    def restore(self, recalled: frozenset[int] | None) -> None:
        """An earlier start of this master has taken the run over; these groups have not been decided for since."""
        self._groups = None if recalled is None else dict.fromkeys(sorted(recalled), self._others_back_at())

    def tick(self) -> None:
        """What was not to be decided before."""
        for number, until in sorted((self._groups or {}).items()):
            if self._groups is not None and 0.0 < until <= self._master._now:
                self._groups[number] = 0.0
                self._master._advance(self._master._groups[number])

    @property
    def awaited(self) -> bool:
        """Nobody is founded a group for before the members of the run to be taken over have come."""
        return self.adopts and self._master.journaled and self._groups is None

    def awaits(self, group: Group) -> bool:
        """In a run that is not our own, members of a group that we do not know, or who know a later epoch of it, may be
        on their way."""
        master = self._master
        if self._groups is None:
            return False
        is_new = group.last_number == 0 and master._now < master._grace_until
        return is_new or self._groups.get(group.group, 0.0) > master._now

    def is_adopted(self, group: int) -> bool:
        """Its epoch is its members' word, and one who is not back may know a later one."""
        return self._groups is not None and group in self._groups

    def next_number(self, group: Group) -> int:
        """Of its epoch. How far a group came that we do not know is not known either: no earlier start was so far."""
        if self._groups is None or group.last_number > 0:
            return group.last_number + 1
        return (start_of(self._master.term) << NONCE_BITS) + 1

    def decided(self, group: int) -> None:
        """From here on its epoch is our word."""
        if self._groups is not None:
            self._groups.pop(group, None)

    def came_back(self, group: Group) -> None:
        """Where nothing is signed, nobody else is believed once all its members are here: none knows a later epoch."""
        if self._signer is None and all(record.conn is not None for record in self._master._members(group)):
            self.decided(group.group)

    def signed(self, group: Group, commit: EpochCommit) -> EpochCommit:
        """As the next master will believe it."""
        if self._signer is None:
            return commit
        return replace(commit, signature=self._signer.sign(self._master.run, group.group, commit))

    def _signed_term(self) -> Term:
        term = Term(self._master.term)
        return term if self._signer is None else replace(term, signature=self._signer.sign(self._master.run, 0, term))

    def _others_back_at(self) -> float:
        """When all who live have come back. What is not signed does not become truer by waiting."""
        return 0.0 if self._signer is None else self._master._now + limits.RECONNECT_S

    # ---- the journal: who may be answered when

    def hold(self, conn: int, hello: Hello) -> bool:
        """Behind the run that is being taken over."""
        if self._held:
            self._held.append((self._master._ticket_last, conn, hello))
        return bool(self._held)

    def written(self, ticket: int) -> None:
        """This record is durable."""
        if ticket == self._term_ticket:
            self._ask_again()

    def release(self, ticket: int) -> None:
        """Answer who waited for the records up to this one."""
        while self._held and self._held[0][0] <= ticket:
            _, conn, hello = self._held.popleft()
            if conn in self._master._conns:
                self._master._on_hello(conn, hello)

    # ---- members of a run that this master does not know

    def is_unknown(self, conn: int, hello: Hello, resume: Resume) -> bool:
        """Or known too well: another master has kept the run since what we know of it."""
        master = self._master
        if master._conns[conn].recalled:
            return False
        if resume.run != master.run or self._is_later(resume.term):
            return True
        if self._groups is None or (hello.peer, hello.incarnation) in master._gone:
            return False
        group = master._groups.get(hello.group)
        if group is None or group.last_number == 0:
            return True
        if hello.group not in self._groups:
            return False
        if self._signer is None:  # it had the last commit, who came before it had not
            return resume.number == group.last_number + 1
        return group.epoch is None or (resume.number, resume.id) not in group.epoch.stands

    def _is_later(self, term: int) -> bool:
        """Of another master that has begun since, or could have."""
        return term != self._master.term and start_of(term) >= start_of(self._master.term)

    def _may_adopt(self, run: bytes) -> bool:
        master = self._master
        if self._groups is not None:
            return run == master.run
        if not self.adopts:
            return False
        if master.journaled:
            return not any(group.last_number for group in master._groups.values())
        if self._signer is not None and run == master.run:
            return True  # what is signed says who decided last
        return not any(group.has_met for group in master._groups.values())

    def ask(self, conn: int, hello: Hello, resume: Resume) -> None:
        master = self._master
        asks = self._may_adopt(resume.run)
        master._send(conn, Unknown(master.run, asks))
        if asks:
            master._conns[conn].asked = hello
            return
        reason = f"this master does not know run {resume.run.hex()}, it keeps {master.run.hex()}"
        if resume.run == master.run:
            reason = f"another master has kept this run since: start {start_of(resume.term)}"
        master._log("run_unknown", peer=short(hello.peer), group=hello.group, reason=reason)
        master._close(conn, reason)

    def recalled(self, conn: int, recall: Recall) -> None:
        master = self._master
        hello, master._conns[conn].asked = master._conns[conn].asked, None
        epoch = recall.epoch
        if hello is None or hello.resume is None:
            raise RemoteProtocolError("a Recall that nobody asked for")
        if hello.resume[:3] != (recall.run, epoch.number, epoch.id) or not epoch.has(hello.peer, hello.incarnation):
            raise RemoteProtocolError("a Recall of another epoch than its Hello's")
        self._check_signed(hello.group, recall)
        term = max(recall.term, epoch.term)  # it was welcomed before its master rose to the epoch's
        if start_of(term) >= START_MAX or epoch.number > limits.U64_MAX >> 1:
            raise RemoteProtocolError("a Recall that leaves no numbers to go on with")
        if not self._may_adopt(recall.run):
            master._close(conn, "this master keeps another run by now")
            return
        if self._groups is None and (self._signer is None or recall.run != master.run):
            self._adopt_run(recall.run, term)
        elif any(self._group_of(member) not in (None, hello.group) for member in epoch.members):
            raise RemoteProtocolError("a Recall that names members of another group")
        elif self._is_later(term):
            self._follow(term)
        elif self._groups is None:
            raise RemoteProtocolError("a Recall that knows of no other master")
        group = master._groups.get(hello.group) or master._new_group(hello.group)
        if group.deciding is None:  # else it is on its way already, or what we have decided stands
            master._conns[conn].recalled = True
            if self._is_adoptable(group, epoch):
                self._adopt_epoch(group, recall.commit)
        if master._writing:  # if nothing is, nobody would let it go
            self._held.append((master._ticket_last, conn, hello))
        else:
            master._on_hello(conn, hello)

    def _check_signed(self, group: int, recall: Recall) -> None:
        if self._signer is None:
            return
        told = (group, recall.commit), (0, Term(recall.term, recall.term_signature))
        if not all(self._signer.is_signed(recall.run, number, message) for number, message in told):
            raise RemoteProtocolError("a Recall of what no master of this key has signed")

    def _is_adoptable(self, group: Group, epoch: Epoch) -> bool:
        if group.last_number == 0:
            return True
        if not self.is_adopted(group.group):
            return False
        if self._signer is None:
            return (epoch.number, epoch.previous) == (group.last_number + 1, group.last_id)
        return group.epoch is None or (epoch.term, epoch.number) > (group.epoch.term, group.epoch.number)

    def _group_of(self, member: Member) -> int | None:
        master = self._master
        record = master._peers.get((member.peer, member.incarnation))
        return None if record is None else record.group

    def _adopt_run(self, run: bytes, term: int) -> None:
        """What this master has founded before has to go."""
        master = self._master
        self._groups = {}
        for record in list(master._peers.values()):
            record.lost = "another run, older than this one, has come back: connect again"
            master._evict(record)
        master._groups.clear()
        for conn in master._observers.conns():
            master._close(conn, "another run is taken over")
        master.run = run
        self._rise_above(term)
        master._grace_until = master._now + limits.RECONNECT_S
        master._log("run_adopted", run=master.run.hex(), start=start_of(master.term))
        master._persist(Adopted(master.run, master.term), None)

    def _follow(self, term: int) -> None:
        """Another master has kept this run since. If that is certain, it may have decided for any group."""
        master = self._master
        is_certain = self._signer is not None
        if is_certain:
            self._groups = dict.fromkeys(sorted(master._groups), self._others_back_at())
        self._rise_above(term)
        master._persist(Began(master.term, follows=is_certain), None)
        self._term_ticket = master._ticket_last
        if not master.journaled:
            self._ask_again()

    def _rise_above(self, term: int) -> None:
        """Members have seen this term: ours is a later one."""
        master = self._master
        start = max(start_of(master.term), start_of(term)) + 1
        master.term = make_term(start, master.term & ((1 << NONCE_BITS) - 1))
        self.term = self._signed_term()

    def _ask_again(self) -> None:
        """The later term is durable: what is asked from here on, and what is open, has numbers that nobody has seen.

        Who sees them knows the term before, and tells it to the next master that knows nothing.
        """
        master = self._master
        for _, record in sorted(master._peers.items()):
            master._tell(record, self.term)
        base = start_of(master.term) << NONCE_BITS
        for group in master._groups.values():
            group.version = max(group.version, base)
            group.ballot_number = max(group.ballot_number, base)
            ballot = group.ballot
            if ballot is not None and group.deciding is None:
                master._open_ballot(group, ballot.kind, ballot.detail, blocked=ballot.blocked)
            elif group.proposal is not None:
                group.proposal.stale = True
            master._advance(group)

    def _adopt_epoch(self, group: Group, commit: EpochCommit) -> None:
        """By the word of one member. Another may come who is one commit ahead of it; none can be further, of those who
        tell the truth."""
        master = self._master
        assert self._groups is not None
        self._groups.setdefault(group.group, self._others_back_at())
        master._groups[group.group] = group
        group.deciding = commit
        for record in master._left_out(group, commit.epoch):
            record.lost = "it was left out of an epoch that it has not heard of"
        for member in commit.epoch.members:
            master._restore_member(group, member)
        master._log("epoch_adopted", group=group.group, epoch=commit.epoch.number, members=len(commit.epoch.members))
        out = (record for record in master._members(group) if record.lost)
        fenced = tuple(Fenced(*r.key, r.lost) for r in out)
        master._persist(Committed(group.group, commit, fenced, recalled=True), group)
