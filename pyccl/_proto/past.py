"""What a master must still know after it has died: its records, and the state they add up to. Pure values.

A journal is a `Past` and the records that came after it. A record is durable before anything that depends on it is
sent, and nothing else is: proposals, ballots and what peers said are made or told again after a restart.
Spec: proto/wire.md 5.12; the file: _io/journal.py.

Invariant: applying the records in order gives the same Past as the machine that wrote them would restore.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

from pyccl._proto import limits
from pyccl._proto.epoch import NO_ID
from pyccl._proto.messages import EpochCommit, from_wire_untrusted, to_wire
from pyccl.errors import RemoteProtocolError

NONCE_BITS: Final = 32
START_MAX: Final = 1 << 31  # no master is started that often: who tells of one does not tell the truth


class Fenced(NamedTuple):
    """An incarnation that is out of the run, and what it is told if it comes back."""

    peer: bytes
    incarnation: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class Record:
    """One entry behind the Past that a journal begins with."""


@dataclass(frozen=True, slots=True)
class Began(Record):
    """A master has started, with this term.

    follows: above that of another master that has kept the run since, and may have decided for any group.
    """

    term: int
    follows: bool = False


@dataclass(frozen=True, slots=True)
class Adopted(Record):
    """A master that knew nothing has taken over this run from its members; what it held before is void."""

    run: bytes
    term: int


@dataclass(frozen=True, slots=True)
class Committed(Record):
    """The epoch of a group has changed: members, verdicts, kind. ``fenced``: who is out since the one before.

    recalled: not this master's decision but its members' word, in a run that was taken over.
    """

    group: int
    commit: EpochCommit
    fenced: tuple[Fenced, ...] = ()
    recalled: bool = False


@dataclass(frozen=True, slots=True)
class Dissolved(Record):
    """All members of the group are out: whoever comes next founds it anew."""

    group: int
    fenced: tuple[Fenced, ...] = ()


@dataclass(frozen=True, slots=True)
class Forgotten(Record):
    """The group had nobody, and its place was needed: not even its numbers are kept."""

    group: int


@dataclass(frozen=True, slots=True)
class Used(Record):
    """This identity came in, at this time of day, with an invite for so many, which ends then."""

    invite: bytes
    ends: int
    identity: bytes
    at: int


@dataclass(frozen=True, slots=True)
class Revoked(Record):
    """Nobody comes in with this invite, of which it is not known when it ends: not later than that."""

    invite: bytes
    ends: int
    at: int


@dataclass(frozen=True, slots=True)
class Banned(Record):
    """This identity was kicked out of the run, and does not come in again."""

    identity: bytes


@dataclass(frozen=True, slots=True)
class Came(Record):
    """This peer, of that identity, came in. Another one may be forgotten for it."""

    peer: bytes
    identity: bytes
    instead_of: bytes | None


@dataclass(slots=True)
class Admissions:
    """What is remembered of who came in, and who must not. Of an invite that has ended nothing need be known."""

    used: dict[bytes, tuple[int, list[bytes]]] = field(default_factory=dict)  # invite -> its end, identities
    revoked: dict[bytes, int] = field(default_factory=dict)  # invite -> its end
    banned: dict[bytes, None] = field(default_factory=dict)  # identities, in order
    came: dict[bytes, bytes] = field(default_factory=dict)  # peer -> identity; the oldest first

    def apply(self, record: Used | Revoked | Banned | Came) -> None:
        if isinstance(record, Used):
            self._forget_ended(record.at)
            self.used.setdefault(record.invite, (record.ends, []))[1].append(record.identity)
        elif isinstance(record, Revoked):
            self._forget_ended(record.at)
            self.revoked[record.invite] = record.ends
        elif isinstance(record, Came):
            if record.instead_of is not None:
                self.came.pop(record.instead_of, None)
            self.came[record.peer] = record.identity
        else:
            self.banned[record.identity] = None

    def identities(self, invite: bytes) -> list[bytes]:
        return self.used.get(invite, (0, []))[1]

    def used_count(self, now_s: int) -> int:
        return sum(len(identities) for ends, identities in self.used.values() if ends > now_s)

    def revoked_count(self, now_s: int) -> int:
        return sum(ends > now_s for ends in self.revoked.values())

    def copy(self) -> Admissions:
        used = {invite: (ends, identities.copy()) for invite, (ends, identities) in self.used.items()}
        return Admissions(used, self.revoked.copy(), self.banned.copy(), self.came.copy())

    def to_plain(self) -> list[Any]:
        used = [[invite, ends, identities] for invite, (ends, identities) in self.used.items()]
        came = [list(item) for item in self.came.items()]
        return [used, [list(item) for item in self.revoked.items()], list(self.banned), came]

    @classmethod
    def from_plain(cls, plain: Any) -> Admissions:
        used, revoked, banned, came = plain
        return cls(
            {_sized(i, limits.INVITE_ID_BYTES): (_int(ends), [_key(k) for k in keys]) for i, ends, keys in used},
            {_sized(invite, limits.INVITE_ID_BYTES): _int(ends) for invite, ends in revoked},
            dict.fromkeys(_key(identity) for identity in banned),
            {_bytes(peer): _key(identity) for peer, identity in came},
        )

    def _forget_ended(self, now_s: int) -> None:
        self.used = {invite: entry for invite, entry in self.used.items() if entry[0] > now_s}
        self.revoked = {invite: ends for invite, ends in self.revoked.items() if ends > now_s}


@dataclass(slots=True)
class PastGroup:
    """`number` and `id` outlive an epoch that lost all its members."""

    number: int = 0
    id: bytes = NO_ID
    commit: EpochCommit | None = None


@dataclass(slots=True)
class Past:
    """recalled: the groups of which the last epoch is their members' word; None: the run was never taken over."""

    run: bytes
    term: int = 0
    groups: dict[int, PastGroup] = field(default_factory=dict)
    gone: OrderedDict[tuple[bytes, bytes], str] = field(default_factory=OrderedDict)
    recalled: frozenset[int] | None = None
    admissions: Admissions = field(default_factory=Admissions)

    def apply(self, record: Record) -> None:
        if isinstance(record, Used | Revoked | Banned | Came):
            self.admissions.apply(record)
            return
        if isinstance(record, Began):
            self.term = record.term
            if record.follows:
                self.recalled = frozenset(self.groups)
            return
        if isinstance(record, Adopted):
            self.run, self.term, self.recalled = record.run, record.term, frozenset()
            self.groups.clear()
            self.gone.clear()
            return
        if isinstance(record, Forgotten):
            self.groups.pop(record.group, None)
            self._recall(record.group, False)
            return
        assert isinstance(record, Committed | Dissolved), record
        group = self.groups.setdefault(record.group, PastGroup())
        if isinstance(record, Committed):
            group.commit = record.commit
            group.number, group.id = record.commit.epoch.number, record.commit.epoch.id
            self._recall(record.group, record.recalled)
        else:
            group.commit = None
        fence(self.gone, record.fenced)

    def _recall(self, group: int, recalled: bool) -> None:
        if self.recalled is not None:
            self.recalled = self.recalled | {group} if recalled else self.recalled - {group}

    def copy(self) -> Past:
        groups = {number: replace(group) for number, group in self.groups.items()}
        return Past(self.run, self.term, groups, self.gone.copy(), self.recalled, self.admissions.copy())

    def to_plain(self) -> list[Any]:
        groups = [
            [number, group.number, group.id, None if group.commit is None else to_wire(group.commit)]
            for number, group in sorted(self.groups.items())
        ]
        recalled = None if self.recalled is None else sorted(self.recalled)
        gone = [[*key, reason] for key, reason in self.gone.items()]
        return [self.run, self.term, groups, gone, recalled, self.admissions.to_plain()]

    @classmethod
    def from_plain(cls, plain: Any) -> Past:
        """ValueError: it is none."""
        try:
            run, term, groups, gone, recalled, admissions = plain
            past = cls(_bytes(run), _int(term), admissions=Admissions.from_plain(admissions))
            past.recalled = None if recalled is None else frozenset(map(_int, recalled))
            for number, last, last_id, commit in groups:
                past.groups[_int(number)] = PastGroup(
                    _int(last), _bytes(last_id), None if commit is None else _commit(commit)
                )
            fence(past.gone, _fenced(gone))
        except (TypeError, ValueError) as e:
            raise ValueError(f"not the state of a run: {e}") from e
        return past


def make_term(start: int, nonce: int) -> int:
    """The number of the start above, a random nonce below: no two masters ever mean different things by one term."""
    assert 0 <= nonce < 1 << NONCE_BITS, nonce
    return start << NONCE_BITS | nonce


def start_of(term: int) -> int:
    return term >> NONCE_BITS


def fence(gone: OrderedDict[tuple[bytes, bytes], str], fenced: Iterable[Fenced]) -> None:
    """Remember these, and forget the oldest beyond what is kept."""
    for peer, incarnation, reason in fenced:
        gone[peer, incarnation] = reason
    while len(gone) > limits.GONE_MAX:
        gone.popitem(last=False)


# ---- records as plain values: lists, ints, bytes, str, None

_BEGAN: Final = 1
_COMMITTED: Final = 2
_DISSOLVED: Final = 3
_ADOPTED: Final = 4
_FORGOTTEN: Final = 5
_USED: Final = 6
_REVOKED: Final = 7
_BANNED: Final = 8
_CAME: Final = 9


def record_to_plain(record: Record) -> list[Any]:
    if isinstance(record, Began):
        return [_BEGAN, record.term, record.follows]
    if isinstance(record, Adopted):
        return [_ADOPTED, record.run, record.term]
    if isinstance(record, Committed):
        fenced = [list(f) for f in record.fenced]
        return [_COMMITTED, record.group, to_wire(record.commit), fenced, record.recalled]
    if isinstance(record, Forgotten):
        return [_FORGOTTEN, record.group]
    if isinstance(record, Used):
        return [_USED, record.invite, record.ends, record.identity, record.at]
    if isinstance(record, Revoked):
        return [_REVOKED, record.invite, record.ends, record.at]
    if isinstance(record, Banned):
        return [_BANNED, record.identity]
    if isinstance(record, Came):
        return [_CAME, record.peer, record.identity, record.instead_of]
    assert isinstance(record, Dissolved), record
    return [_DISSOLVED, record.group, [list(f) for f in record.fenced]]


def record_from_plain(plain: Any) -> Record:
    """ValueError: it is none."""
    try:
        kind, *rest = plain
        if kind == _BEGAN:
            term, follows = rest
            return Began(_int(term), _bool(follows))
        if kind == _ADOPTED:
            run, term = rest
            return Adopted(_bytes(run), _int(term))
        if kind == _COMMITTED:
            group, commit, fenced, recalled = rest
            return Committed(_int(group), _commit(commit), _fenced(fenced), _bool(recalled))
        if kind == _FORGOTTEN:
            (group,) = rest
            return Forgotten(_int(group))
        if kind == _DISSOLVED:
            group, fenced = rest
            return Dissolved(_int(group), _fenced(fenced))
        if kind == _USED:
            invite, ends, identity, at = rest
            return Used(_sized(invite, limits.INVITE_ID_BYTES), _int(ends), _key(identity), _int(at))
        if kind == _REVOKED:
            invite, ends, at = rest
            return Revoked(_sized(invite, limits.INVITE_ID_BYTES), _int(ends), _int(at))
        if kind == _BANNED:
            (identity,) = rest
            return Banned(_key(identity))
        if kind == _CAME:
            peer, identity, instead_of = rest
            return Came(_bytes(peer), _key(identity), None if instead_of is None else _bytes(instead_of))
    except (TypeError, ValueError) as e:
        raise ValueError(f"not a record: {e}") from e
    raise ValueError(f"no record is of kind {kind!r}")


def _commit(plain: Any) -> EpochCommit:
    try:
        commit = from_wire_untrusted(plain)
    except RemoteProtocolError as e:
        raise ValueError(str(e)) from e
    if not isinstance(commit, EpochCommit):
        raise ValueError(f"{type(commit).__name__} is no EpochCommit")
    return commit


def _fenced(plain: Any) -> tuple[Fenced, ...]:
    return tuple(Fenced(_bytes(peer), _bytes(incarnation), str(reason)) for peer, incarnation, reason in plain)


def _int(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= limits.U64_MAX:
        raise ValueError(f"{value!r} is not an unsigned integer of 64 bits")
    return value


def _bool(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{value!r} is no truth value")
    return value


def _bytes(value: Any) -> bytes:
    return _sized(value, limits.ID_BYTES)


def _key(value: Any) -> bytes:
    return _sized(value, limits.KEY_BYTES)


def _sized(value: Any, size: int) -> bytes:
    if type(value) is not bytes or len(value) != size:
        raise ValueError(f"{size} bytes are needed")
    return value
