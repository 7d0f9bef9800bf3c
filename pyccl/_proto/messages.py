"""Every control message of proto/wire.md 4, as frozen values, and their one declarative schema.

``to_wire`` and ``from_wire_untrusted`` both walk that schema, so a limit is written once.  Lists, ints, bytes, str,
bool and None go in and out; msgpack is ``_io``'s business.  A message is judged whole: either a complete, correct
object comes back or RemoteProtocolError is raised, and nothing else ever is.  What depends on state (is this epoch
the current one?) is judged by the machines.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Final, NamedTuple

from pyccl._proto import channel, limits
from pyccl._proto.epoch import Address, Epoch, Member
from pyccl.errors import RemoteProtocolError

# ---- small values ---------------------------------------------------------------------------------------------------


class Count(NamedTuple):
    """So many operations of a channel were submitted since numbers restarted."""

    space: int
    tag: int  # of SPACE_PAIR: tag and ranks, see channel.py; so in all of these
    submitted: int  # not "count": a tuple has a method of that name


class Key(NamedTuple):
    """Names one operation."""

    space: int
    tag: int
    seq: int


class OpReport(NamedTuple):
    """What a frozen member knows of one operation; state: see OpState."""

    space: int
    tag: int
    seq: int
    state: int
    hash: int

    @property
    def key(self) -> Key:
        return Key(self.space, self.tag, self.seq)


class OpVerdict(NamedTuple):
    """How a flush decided one operation; verdict: see Verdict. An operation without one is retried."""

    space: int
    tag: int
    seq: int
    verdict: int

    @property
    def key(self) -> Key:
        return Key(self.space, self.tag, self.seq)


class Resume(NamedTuple):
    """Where a returning member stands."""

    run: bytes
    number: int
    id: bytes
    frozen: bool
    term: int = 0  # of the last master it was welcome to


class LinkMeasure(NamedTuple):
    """What a member received from another one: bytes per second. 0: not measured."""

    peer: bytes
    rate: int  # while neither received from anybody else
    crowd: int  # while both received from several
    rtt_us: int
    relayed: bool = False  # through a third member, as far as the sender knows: who was dialed does not


class OpState:
    """pyccl_op_state of pyccl.h."""

    RUNNING: Final = 1
    PREPARED: Final = 2
    COMMITTED: Final = 3
    FAILED: Final = 4


class Verdict:
    """pyccl_verdict of pyccl.h."""

    COMMIT: Final = 1
    FAIL: Final = 2


KIND_FOUND: Final = "found"
KIND_JOIN: Final = "join"
KIND_LOSS: Final = "loss"
KIND_SETTLE: Final = "settle"
KIND_MISMATCH: Final = "mismatch"
EPOCH_KINDS: Final = (KIND_FOUND, KIND_JOIN, KIND_LOSS, KIND_SETTLE, KIND_MISMATCH)

CAUSE_SILENT: Final = "silent"
CAUSE_REFUSED: Final = "refused"
CAUSE_PROTOCOL: Final = "protocol"
SUSPECT_CAUSES: Final = (CAUSE_SILENT, CAUSE_REFUSED, CAUSE_PROTOCOL)


# ---- kinds of fields: each judges a value, on its way out as on its way in -------------------------------------------


class _Kind:
    """``load`` turns a foreign value into ours or raises; ``dump`` turns ours into plain lists, ints, bytes, str."""

    def load(self, value: object) -> Any:
        raise NotImplementedError

    def dump(self, value: Any) -> object:
        return self.load(value)


class _UInt(_Kind):
    def __init__(self, high: int, low: int = 0) -> None:
        self.low, self.high = low, high

    def load(self, value: object) -> int:
        if type(value) is not int:  # not isinstance: True is no number
            raise RemoteProtocolError(f"an integer is needed, not {type(value).__name__}")
        if not self.low <= value <= self.high:  # the value is not repeated: printing a huge int may itself fail
            raise RemoteProtocolError(f"the number is outside {self.low}..{self.high}")
        return value


class _Bool(_Kind):
    def load(self, value: object) -> bool:
        if type(value) is not bool:
            raise RemoteProtocolError(f"a bool is needed, not {type(value).__name__}")
        return value


class _Bytes(_Kind):
    def __init__(self, high: int, low: int = 0) -> None:
        self.low, self.high = low, high

    def load(self, value: object) -> bytes:
        if type(value) is not bytes:
            raise RemoteProtocolError(f"bytes are needed, not {type(value).__name__}")
        if not self.low <= len(value) <= self.high:
            raise RemoteProtocolError(f"{len(value)} bytes, allowed are {self.low}..{self.high}")
        return value


class _Str(_Kind):
    def __init__(self, chars_max: int, one_of: tuple[str, ...] = ()) -> None:
        self.chars_max, self.one_of = chars_max, one_of

    def load(self, value: object) -> str:
        if type(value) is not str:
            raise RemoteProtocolError(f"text is needed, not {type(value).__name__}")
        if len(value) > self.chars_max:
            raise RemoteProtocolError(f"{len(value)} characters, allowed are {self.chars_max}")
        if self.one_of and value not in self.one_of:
            raise RemoteProtocolError(f"the word is none of {', '.join(self.one_of)}")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RemoteProtocolError("the text is not UTF-8") from None
        return value


class _Array(_Kind):
    def __init__(self, kind: _Kind, count_max: int) -> None:
        self.kind, self.count_max = kind, count_max

    def _judge(self, value: object) -> list[object] | tuple[object, ...]:
        if type(value) is not list and type(value) is not tuple:
            raise RemoteProtocolError(f"an array is needed, not {type(value).__name__}")
        if len(value) > self.count_max:
            raise RemoteProtocolError(f"{len(value)} entries, allowed are {self.count_max}")
        return value

    def load(self, value: object) -> tuple[Any, ...]:
        return tuple([self.kind.load(entry) for entry in self._judge(value)])

    def dump(self, value: Any) -> list[object]:
        return [self.kind.dump(entry) for entry in self._judge(value)]


class _Record(_Kind):
    """A fixed array that becomes an object of `cls`; `check` judges what no single field can."""

    def __init__(self, cls: type[Any], *kinds: _Kind, check: Any = None) -> None:
        self.cls, self.kinds, self.check = cls, kinds, check
        self.names: tuple[str, ...] = getattr(cls, "_fields", ()) or tuple(f.name for f in fields(cls))
        assert len(self.names) == len(kinds), cls

    def load(self, value: object) -> Any:
        if type(value) is not list and type(value) is not tuple:
            raise RemoteProtocolError(f"{self.cls.__name__} is an array, not {type(value).__name__}")
        if len(value) != len(self.kinds):
            raise RemoteProtocolError(f"{self.cls.__name__} has {len(self.kinds)} fields, not {len(value)}")
        loaded = self.cls(*[kind.load(entry) for kind, entry in zip(self.kinds, value, strict=True)])
        if self.check is not None:
            self.check(loaded)
        return loaded

    def dump(self, value: Any) -> list[object]:
        return [kind.dump(getattr(value, name)) for kind, name in zip(self.kinds, self.names, strict=True)]


class _EpochRecord(_Record):
    """Goes to each of its members, in a proposal that may differ for each and in a commit: the same list for all."""

    def __init__(self, cls: type[Any], *kinds: _Kind, check: Any = None) -> None:
        super().__init__(cls, *kinds, check=check)
        self.dump = functools.lru_cache(maxsize=8)(self.dump)  # type: ignore[method-assign]


class _Maybe(_Kind):
    def __init__(self, kind: _Kind) -> None:
        self.kind = kind

    def load(self, value: object) -> Any:
        return None if value is None else self.kind.load(value)

    def dump(self, value: Any) -> object:
        return None if value is None else self.kind.dump(value)


_U32: Final = _UInt(limits.U32_MAX)
_U64: Final = _UInt(limits.U64_MAX)
_BOOL: Final = _Bool()
_ID: Final = _Bytes(limits.ID_BYTES, low=limits.ID_BYTES)
_SPEC: Final = _Bytes(limits.SPEC_BYTES, low=limits.SPEC_BYTES)
_SPACE: Final = _UInt(limits.SPACE_MAX)
_REASON: Final = _Str(limits.REASON_CHARS_MAX)
_LIBRARY: Final = _Str(limits.LIBRARY_CHARS_MAX)
_ADDRESSES: Final = _Array(
    _Record(Address, _Str(limits.HOST_CHARS_MAX), _UInt(limits.PORT_MAX, low=1)), limits.ADDRESSES_MAX
)
_COUNTS: Final = _Array(_Record(Count, _SPACE, _U64, _U64, check=channel.check_untrusted), limits.KEYS_MAX)
_KEY: Final = _Record(Key, _SPACE, _U64, _U64, check=channel.check_untrusted)
_REPORTS: Final = _Array(
    _Record(OpReport, _SPACE, _U64, _U64, _UInt(4, low=1), _U64, check=channel.check_untrusted), limits.KEYS_MAX
)
_VERDICTS: Final = _Array(
    _Record(OpVerdict, _SPACE, _U64, _U64, _UInt(2, low=1), check=channel.check_untrusted), limits.KEYS_MAX
)
_RESUME: Final = _Maybe(_Record(Resume, _ID, _U64, _ID, _BOOL, _U64))
_MEMBERS: Final = _Array(_Record(Member, _ID, _ID, _ADDRESSES), limits.MEMBERS_MAX)
_PEERS: Final = _Array(_ID, limits.MEMBERS_MAX)
_RATE: Final = _UInt(limits.RATE_MAX)
_LINKS: Final = _Array(_Record(LinkMeasure, _ID, _RATE, _RATE, _UInt(limits.RTT_US_MAX), _BOOL), limits.MEMBERS_MAX)
_EPOCH: Final = _EpochRecord(
    Epoch, _U64, _ID, _ID, _U64, _MEMBERS, _Bytes(limits.PLAN_BYTES_MAX), check=Epoch.check_untrusted
)


_COMMIT: Final = (_Str(8, one_of=EPOCH_KINDS), _VERDICTS, _Str(limits.DETAIL_CHARS_MAX), _U32, _BOOL)


# ---- messages: fields in the order of wire.md, KINDS beside them ----------------------------------------------------


@dataclass(frozen=True, slots=True)
class Message:
    """Base of all messages. TYPE is the number on the wire, KINDS judges the fields in order."""

    TYPE: ClassVar[int]
    KINDS: ClassVar[tuple[_Kind, ...]]


# -- peer to master


@dataclass(frozen=True, slots=True)
class Hello(Message):
    TYPE = 1
    KINDS = (_U32, _LIBRARY, _U32, _ID, _ID, _ADDRESSES, _RESUME)
    version: int
    library: str
    group: int
    peer: bytes
    incarnation: bytes
    addresses: tuple[Address, ...] = ()
    resume: Resume | None = None


@dataclass(frozen=True, slots=True)
class Pulse(Message):
    TYPE = 2
    KINDS = (_U32, _ID, _ID)
    version: int
    peer: bytes
    incarnation: bytes


@dataclass(frozen=True, slots=True)
class Heartbeat(Message):
    TYPE = 3
    KINDS = ()


@dataclass(frozen=True, slots=True)
class Leave(Message):
    TYPE = 4
    KINDS = ()


@dataclass(frozen=True, slots=True)
class Arrive(Message):
    TYPE = 5
    KINDS = (_U64, _COUNTS)
    epoch: int
    counts: tuple[Count, ...] = ()


@dataclass(frozen=True, slots=True)
class Withdraw(Message):
    TYPE = 6
    KINDS = (_U64,)
    epoch: int


@dataclass(frozen=True, slots=True)
class Ready(Message):
    TYPE = 7
    KINDS = (_U64, _U64)
    number: int  # of the proposed epoch
    version: int


@dataclass(frozen=True, slots=True)
class Behind(Message):
    TYPE = 8
    KINDS = (_U64, _U64, _COUNTS)
    number: int
    version: int
    counts: tuple[Count, ...]


@dataclass(frozen=True, slots=True)
class Unreachable(Message):
    TYPE = 9
    KINDS = (_U64, _U64, _PEERS, _REASON)
    number: int
    version: int
    peers: tuple[bytes, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Suspect(Message):
    TYPE = 10
    KINDS = (_ID, _Str(16, one_of=SUSPECT_CAUSES), _REASON)
    peer: bytes
    cause: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Trust(Message):
    TYPE = 11
    KINDS = (_ID,)
    peer: bytes


@dataclass(frozen=True, slots=True)
class Report(Message):
    TYPE = 12
    KINDS = (_U64, _U64, _REPORTS)
    epoch: int
    ballot: int
    ops: tuple[OpReport, ...] = ()


@dataclass(frozen=True, slots=True)
class Settle(Message):
    TYPE = 13
    KINDS = (_U64,)
    epoch: int


@dataclass(frozen=True, slots=True)
class Blocked(Message):
    TYPE = 14
    KINDS = (_U64, _Array(_KEY, limits.LACKING_MAX), _BOOL, _BOOL)
    epoch: int
    lacking: tuple[Key, ...]
    at_safe_point: bool
    below_cut: bool


@dataclass(frozen=True, slots=True)
class Unblocked(Message):
    TYPE = 15
    KINDS = (_U64,)
    epoch: int


@dataclass(frozen=True, slots=True)
class Differs(Message):
    TYPE = 16
    KINDS = (_U64, _KEY, _ID, _SPEC, _SPEC)
    epoch: int
    key: Key
    peer: bytes
    mine: bytes
    theirs: bytes


@dataclass(frozen=True, slots=True)
class Entered(Message):
    TYPE = 17
    KINDS = (_U64,)
    epoch: int


@dataclass(frozen=True, slots=True)
class StatusAsk(Message):
    TYPE = 18
    KINDS = (_U32,)
    version: int


@dataclass(frozen=True, slots=True)
class Recall(Message):
    """The answer to Unknown: where the run stands, from a member. The fields behind `term` are its last EpochCommit."""

    TYPE = 19
    KINDS = (_ID, _U64, _EPOCH, *_COMMIT)
    run: bytes
    term: int
    epoch: Epoch
    kind: str
    verdicts: tuple[OpVerdict, ...]
    detail: str
    world_size: int
    journaled: bool


@dataclass(frozen=True, slots=True)
class Observe(Message):
    """A first message instead of Hello: not to be a member, but to know who they are."""

    TYPE = 20
    KINDS = (_U32, _LIBRARY, _U32, _ID, _ID, _ADDRESSES)
    version: int
    library: str
    group: int
    peer: bytes
    incarnation: bytes
    addresses: tuple[Address, ...] = ()


@dataclass(frozen=True, slots=True)
class Measured(Message):
    """All that the sender knows of its links; takes the place of what it told before."""

    TYPE = 21
    KINDS = (_RATE, _RATE, _RATE, _LINKS)
    move: int  # bytes per second that one of its processors sends or receives,
    fold: int  # reads to add,
    code: int  # has coded or decoded; 0: not known
    links: tuple[LinkMeasure, ...]


# -- master to peer


@dataclass(frozen=True, slots=True)
class Welcome(Message):
    TYPE = 32
    KINDS = (_U32, _LIBRARY, _ID, _U64, _UInt(limits.PEER_TIMEOUT_MS_MAX, low=1), _BOOL)
    version: int
    library: str
    run: bytes
    term: int
    peer_timeout_ms: int
    resumed: bool


@dataclass(frozen=True, slots=True)
class Rejected(Message):
    TYPE = 33
    KINDS = (_REASON,)
    reason: str


@dataclass(frozen=True, slots=True)
class EpochPropose(Message):
    TYPE = 34
    KINDS = (_U64, _EPOCH, _COUNTS)
    version: int
    epoch: Epoch
    cut: tuple[Count, ...] = ()


@dataclass(frozen=True, slots=True)
class EpochCommit(Message):
    TYPE = 35
    KINDS = (_EPOCH, *_COMMIT)
    epoch: Epoch
    kind: str
    verdicts: tuple[OpVerdict, ...] = ()
    detail: str = ""
    world_size: int = 0  # members of all groups
    journaled: bool = True  # no: it rests on a majority of the epoch before, where members were lost


@dataclass(frozen=True, slots=True)
class Flush(Message):
    TYPE = 36
    KINDS = (_U64, _U64, _U64, _PEERS)
    ballot: int
    epoch: int
    proposed: int
    members: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Evicted(Message):
    TYPE = 37
    KINDS = (_REASON,)
    reason: str


@dataclass(frozen=True, slots=True)
class Pending(Message):
    TYPE = 38
    KINDS = (_U32,)
    count: int


@dataclass(frozen=True, slots=True)
class Status(Message):
    TYPE = 39
    KINDS = (_Str(limits.STATUS_CHARS_MAX),)
    json: str


@dataclass(frozen=True, slots=True)
class Cancelled(Message):
    """Proposals up to this version are void: a member went back from the safe point. The others' cut is open again."""

    TYPE = 40
    KINDS = (_U64,)
    version: int


@dataclass(frozen=True, slots=True)
class Alive(Message):
    """The answer to a Heartbeat: a master that was stopped keeps its connections, and gives none."""

    TYPE = 41
    KINDS = ()


@dataclass(frozen=True, slots=True)
class Unknown(Message):
    """The master knows nothing of the peer's epoch. asks: tell it with Recall. Else the connection ends, not the peer:
    the master that knows it may come back."""

    TYPE = 42
    KINDS = (_ID, _BOOL)
    run: bytes  # the master's
    asks: bool


@dataclass(frozen=True, slots=True)
class Undecided(Message):
    """All of the ballot's members have reported, and they are too few to decide without a journal."""

    TYPE = 43
    KINDS = (_U64, _REASON)
    ballot: int
    reason: str


@dataclass(frozen=True, slots=True)
class Members(Message):
    """To an observer: who is in its group."""

    TYPE = 44
    KINDS = (_U64, _MEMBERS)
    epoch: int
    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class Observers(Message):
    """To the members: who observes their group."""

    TYPE = 45
    KINDS = (_Array(_Record(Member, _ID, _ID, _ADDRESSES), limits.OBSERVERS_MAX),)
    observers: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class Term(Message):
    """To whom it has welcomed: the master has heard of a later term than its own, and begun one above that."""

    TYPE = 46
    KINDS = (_U64,)
    term: int


# -- peer to peer, the handshake of data connections


@dataclass(frozen=True, slots=True)
class _Hello(Message):
    KINDS = (_U32, _ID, _ID, _ID, _ID, _ID)
    version: int
    run: bytes
    from_peer: bytes
    from_incarnation: bytes
    to_peer: bytes
    to_incarnation: bytes


@dataclass(frozen=True, slots=True)
class PeerHello(_Hello):
    TYPE = 64


@dataclass(frozen=True, slots=True)
class PeerWelcome(Message):
    TYPE = 65
    KINDS = (_U32,)
    version: int


@dataclass(frozen=True, slots=True)
class PeerRefused(Message):
    TYPE = 66
    KINDS = (_REASON,)
    reason: str


@dataclass(frozen=True, slots=True)
class RelayHello(_Hello):
    """To a third member: carry this connection to `to`, whom the sender does not reach. PeerWelcome: it does."""

    TYPE = 70


# -- peer to peer, state files


@dataclass(frozen=True, slots=True)
class StateHello(Message):
    """Between a member and an observer of its group, one way or the other: state files are wanted."""

    TYPE = 67
    KINDS = (_U32, _ID, _ID, _ID, _ID, _ID, _U64, _U64)
    version: int
    run: bytes
    from_peer: bytes
    from_incarnation: bytes
    to_peer: bytes
    to_incarnation: bytes
    have: int  # revision + 1 of what the sender has; 0: nothing
    every: int  # so many revisions apart, as they come; 0: what there is now, once


@dataclass(frozen=True, slots=True)
class StateOffer(Message):
    """The `size_bytes` of a state file follow. Who does not want them closes the connection."""

    TYPE = 68
    KINDS = (_UInt(limits.STATE_BYTES_MAX), _UInt(limits.STATE_BYTES_MAX), _Bytes(limits.HASH_BYTES, limits.HASH_BYTES))
    revision: int
    size_bytes: int
    layout: bytes


@dataclass(frozen=True, slots=True)
class StateNone(Message):
    """There is nothing (more) for now. The last message if the asker wants what there is, else told again and again."""

    TYPE = 69
    KINDS = ()


MESSAGE_TYPES: Final[dict[int, type[Message]]] = {
    cls.TYPE: cls
    for cls in (
        *(Hello, Pulse, Heartbeat, Leave, Arrive, Withdraw, Ready, Behind, Unreachable, Suspect, Trust, Report),
        *(Settle, Blocked, Unblocked, Differs, Entered, StatusAsk, Recall, Observe, Measured),
        *(Welcome, Rejected, EpochPropose, EpochCommit, Flush, Evicted, Pending, Status, Cancelled, Alive),
        *(Unknown, Undecided, Members, Observers, Term),
        *(PeerHello, PeerWelcome, PeerRefused, StateHello, StateOffer, StateNone, RelayHello),
    )
}
_NAMES: Final[dict[type[Message], tuple[str, ...]]] = {
    cls: tuple(field.name for field in fields(cls)) for cls in MESSAGE_TYPES.values()
}


def to_wire(message: Message) -> list[object]:
    """The array [type, field, ...] of a message. ValueError: a field is outside its limits, which is a bug of ours."""
    cls = type(message)
    out: list[object] = [cls.TYPE]
    for name, kind in zip(_NAMES[cls], cls.KINDS, strict=True):
        try:
            out.append(kind.dump(getattr(message, name)))
        except RemoteProtocolError as exc:
            raise ValueError(f"{cls.__name__}.{name}: {exc}") from exc
    return out


def from_wire_untrusted(value: object) -> Message:
    """Judge a decoded body whole. Raises RemoteProtocolError and nothing else, whatever `value` is."""
    if type(value) is not list and type(value) is not tuple:
        raise RemoteProtocolError(f"a message is an array, not {type(value).__name__}")
    if not value or type(value[0]) is not int:
        raise RemoteProtocolError("a message starts with its type")
    cls = MESSAGE_TYPES.get(value[0])
    if cls is None:
        raise RemoteProtocolError("no message has this type")
    if len(value) - 1 != len(cls.KINDS):
        raise RemoteProtocolError(f"{cls.__name__} has {len(cls.KINDS)} fields, not {len(value) - 1}")
    loaded = []
    for name, kind, entry in zip(_NAMES[cls], cls.KINDS, value[1:], strict=True):
        try:
            loaded.append(kind.load(entry))
        except RemoteProtocolError as exc:
            raise RemoteProtocolError(f"{cls.__name__}.{name}: {exc}") from None
    return cls(*loaded)


def clip(text: str, chars_max: int = limits.REASON_CHARS_MAX) -> str:
    """Cut a text of ours to what its field holds, and make it encodable."""
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= chars_max else text[: chars_max - 3] + "..."
