"""Every control message of proto/wire.md 4, as frozen values, and their one declarative schema.

``to_wire`` and ``from_wire_untrusted`` both walk that schema, so a limit is written once.  Lists, ints, bytes, str,
bool and None go in and out; msgpack is ``_io``'s business.  A message is judged whole: either a complete, correct
object comes back or RemoteProtocolError is raised, and nothing else ever is.  What depends on state (is this epoch
the current one?) is judged by the machines.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Final, NamedTuple

from pyccl._proto import channel, limits
from pyccl._proto.epoch import NO_ID, Address, AddressKind, Epoch, Member
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
    path: int = 0  # see Path
    via: bytes = NO_ID  # who relays it, if the sender knows

    @property
    def relayed(self) -> bool:
        return self.path == Path.RELAYED


class DialTold(NamedTuple):
    """What a member says of its attempt to connect to who asks. reason: why it could not; "": it could."""

    peer: bytes
    reason: str


class Path:
    """How a data link came about."""

    DIRECT: Final = 0
    MAPPED: Final = 1  # by a port that a router forwards on request
    PUNCHED: Final = 2  # both began at the same moment
    RELAYED: Final = 3  # a third carries it


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


PATH_NAMES: Final = {Path.DIRECT: "direct", Path.MAPPED: "mapped", Path.PUNCHED: "punched", Path.RELAYED: "relayed"}


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
_KEY_BYTES: Final = _Bytes(limits.KEY_BYTES, low=limits.KEY_BYTES)
_INVITE_ID: Final = _Bytes(limits.INVITE_ID_BYTES, low=limits.INVITE_ID_BYTES)
_SPACE: Final = _UInt(limits.SPACE_MAX)
_REASON: Final = _Str(limits.REASON_CHARS_MAX)
_LIBRARY: Final = _Str(limits.LIBRARY_CHARS_MAX)
_HOST: Final = _Str(limits.HOST_CHARS_MAX)
_PORT: Final = _UInt(limits.PORT_MAX, low=1)
_ADDRESS: Final = _Record(Address, _HOST, _PORT, _UInt(AddressKind.MAPPED))
_ADDRESSES: Final = _Array(_ADDRESS, limits.ADDRESSES_MAX)
_ENDPOINTS: Final = _Array(_ADDRESS, limits.PUNCHES_MAX)
_COUNTS: Final = _Array(_Record(Count, _SPACE, _U64, _U64, check=channel.check_untrusted), limits.KEYS_MAX)
_KEY: Final = _Record(Key, _SPACE, _U64, _U64, check=channel.check_untrusted)
_REPORTS: Final = _Array(
    _Record(OpReport, _SPACE, _U64, _U64, _UInt(4, low=1), _U64, check=channel.check_untrusted), limits.KEYS_MAX
)
_VERDICTS: Final = _Array(
    _Record(OpVerdict, _SPACE, _U64, _U64, _UInt(2, low=1), check=channel.check_untrusted), limits.KEYS_MAX
)
_RESUME: Final = _Maybe(_Record(Resume, _ID, _U64, _ID, _BOOL, _U64))
_MEMBER: Final = _Record(Member, _ID, _ID, _ADDRESSES, _HOST)
_MEMBERS: Final = _Array(_MEMBER, limits.MEMBERS_MAX)
_PEERS: Final = _Array(_ID, limits.MEMBERS_MAX)
_RATE: Final = _UInt(limits.RATE_MAX)
_RTT: Final = _UInt(limits.RTT_US_MAX)
_PATH: Final = _UInt(Path.RELAYED)
_DIAL_REASON: Final = _Str(limits.DIAL_REASON_CHARS_MAX)
_LINKS: Final = _Array(_Record(LinkMeasure, _ID, _RATE, _RATE, _RTT, _PATH, _ID), limits.MEMBERS_MAX)
_EPOCH: Final = _EpochRecord(
    Epoch, _U64, _ID, _ID, _U64, _MEMBERS, _Bytes(limits.PLAN_BYTES_MAX), check=Epoch.check_untrusted
)


_SIGNATURE: Final = _Bytes(limits.SIGNATURE_BYTES)  # empty: of a plain master
_COMMIT: Final = (_Str(8, one_of=EPOCH_KINDS), _VERDICTS, _Str(limits.DETAIL_CHARS_MAX), _U32, _BOOL, _SIGNATURE)


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
class Probe(Message):
    """A first message, of who takes no part: from where does it come, is it reached there? port 0: not asked."""

    TYPE = 31
    KINDS = (_U32, _UInt(limits.PORT_MAX))
    version: int
    port: int


@dataclass(frozen=True, slots=True)
class Recall(Message):
    """The answer to Unknown: where the run stands, from a member. What is between term and
    term_signature is its last EpochCommit."""

    TYPE = 19
    KINDS = (_ID, _U64, _EPOCH, *_COMMIT, _SIGNATURE)
    run: bytes
    term: int
    epoch: Epoch
    kind: str
    verdicts: tuple[OpVerdict, ...]
    detail: str
    world_size: int
    journaled: bool
    signature: bytes = b""
    term_signature: bytes = b""

    @property
    def commit(self) -> EpochCommit:
        told = (self.kind, self.verdicts, self.detail, self.world_size, self.journaled, self.signature)
        return EpochCommit(self.epoch, *told)


@dataclass(frozen=True, slots=True)
class Observe(Message):
    """A first message instead of Hello: not to be a member, but to know who they are."""

    TYPE = 20
    KINDS = (_U32, _LIBRARY, _U32, _ID, _ID, _ADDRESSES, _BOOL)
    version: int
    library: str
    group: int
    peer: bytes
    incarnation: bytes
    addresses: tuple[Address, ...] = ()
    relays: bool = False  # it offers to carry connections between members


@dataclass(frozen=True, slots=True)
class Measured(Message):
    """All that the sender knows of its links; takes the place of what it told before."""

    TYPE = 21
    KINDS = (_RATE, _RATE, _RATE, _RATE, _LINKS)
    move: int  # bytes per second that one of its processors sends or receives,
    fold: int  # reads to add,
    code: int  # has coded or decoded; 0: not known
    down: int  # that it received from several while nobody else did; 0: not measured
    links: tuple[LinkMeasure, ...]


@dataclass(frozen=True, slots=True)
class Join(Message):
    """The answer to Challenge, before the first message of an encrypted connection: who the sender is, and why it may
    come in. See invites.py."""

    TYPE = 22
    KINDS = (_KEY_BYTES, _ID, _Bytes(limits.TOKEN_BYTES_MAX), _Bytes(limits.SIGNATURE_BYTES, limits.SIGNATURE_BYTES))
    identity: bytes
    salt: bytes
    token: bytes = field(repr=False)  # empty: nothing but the identity
    signature: bytes


@dataclass(frozen=True, slots=True)
class InviteAsk(Message):
    """From the operator: an invite that ends so many seconds from now. uses: of how many identities; 0: any number."""

    TYPE = 23
    KINDS = (_UInt(limits.INVITE_S_MAX, low=1), _UInt(limits.USES_MAX), _Maybe(_U32), _Str(limits.LABEL_CHARS_MAX))
    seconds: int
    uses: int
    group: int | None
    label: str


@dataclass(frozen=True, slots=True)
class Revoke(Message):
    """From the operator: nobody comes in with this invite any more."""

    TYPE = 24
    KINDS = (_INVITE_ID,)
    invite: bytes


@dataclass(frozen=True, slots=True)
class PeersAsk(Message):
    """From the operator: who is connected, answered by Status."""

    TYPE = 25
    KINDS = ()


@dataclass(frozen=True, slots=True)
class Kick(Message):
    """From the operator: out of the run, and its identity does not come in again."""

    TYPE = 26
    KINDS = (_ID,)
    peer: bytes


@dataclass(frozen=True, slots=True)
class Reflect(Message):
    """A first message on a connection of its own: from where does it seem to come? Held open, it keeps that so."""

    TYPE = 27
    KINDS = (_U32, _ID, _ID)
    version: int
    peer: bytes
    incarnation: bytes


@dataclass(frozen=True, slots=True)
class Addresses(Message):
    """The sender is reached here from now on."""

    TYPE = 28
    KINDS = (_ADDRESSES,)
    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class Punch(Message):
    """The sender will connect from these to what `to` names in a Punch of its own, one each, when told to."""

    TYPE = 29
    KINDS = (_ID, _ENDPOINTS, _RTT)
    to: bytes
    endpoints: tuple[Address, ...]  # as the master sees them
    rtt_us: int  # between sender and master


@dataclass(frozen=True, slots=True)
class RelayAsk(Message):
    """The sender dials this relay to reach `to`, which is to do the same."""

    TYPE = 30
    KINDS = (_ID, _ID)
    to: bytes
    relay: bytes


@dataclass(frozen=True, slots=True)
class Sample(Message):
    """A first message, of who takes no part: how fast does a connection go? upwards: from the sender to the master."""

    TYPE = 80
    KINDS = (_U32, _BOOL)
    version: int
    upwards: bool


@dataclass(frozen=True, slots=True)
class Dialed(Message):
    """The answer to DialAsk. reason: why it could not be connected to; "": it could."""

    TYPE = 81
    KINDS = (_U64, _DIAL_REASON)
    ticket: int
    reason: str


# -- master to peer


@dataclass(frozen=True, slots=True)
class Welcome(Message):
    TYPE = 32
    KINDS = (_U32, _LIBRARY, _ID, _U64, _UInt(limits.PEER_TIMEOUT_MS_MAX, low=1), _BOOL, _HOST, _BOOL, _SIGNATURE)
    version: int
    library: str
    run: bytes
    term: int
    peer_timeout_ms: int
    resumed: bool
    observed: str = ""  # the host that the connection comes from, as the master sees it
    remote: bool = False  # peers of other machines may come, too
    term_signature: bytes = b""  # see Term


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
    signature: bytes = b""  # a secure master's, which the next one of its key believes; see takeover.Signer


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
class Probed(Message):
    """What the master sees of who asks. time_ms: since 1970, by its clock. reason: why it was not reached. peers: what
    members say that tried, too."""

    TYPE = 57
    KINDS = (_HOST, _PORT, _U64, _BOOL, _REASON, _Array(_Record(DialTold, _ID, _DIAL_REASON), limits.DIALERS_MAX))
    host: str
    port: int
    time_ms: int
    reached: bool
    reason: str
    peers: tuple[DialTold, ...] = ()


@dataclass(frozen=True, slots=True)
class Sampled(Message):
    """The answer to Sample: it begins, with 0. Upwards again and again: so many bytes have come."""

    TYPE = 58
    KINDS = (_UInt(limits.SAMPLE_BYTES),)
    size_bytes: int


@dataclass(frozen=True, slots=True)
class DialAsk(Message):
    """To a member: connect there once, send nothing, and answer with Dialed. Who is there has asked for it."""

    TYPE = 59
    KINDS = (_U64, _HOST, _PORT)
    ticket: int
    host: str  # an IP address
    port: int


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
    KINDS = (_Array(_MEMBER, limits.OBSERVERS_MAX),)
    observers: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class Term(Message):
    """To whom it has welcomed: the master has heard of a later term than its own, and begun one above that."""

    TYPE = 46
    KINDS = (_U64, _SIGNATURE)
    term: int
    signature: bytes = b""  # as in EpochCommit


@dataclass(frozen=True, slots=True)
class Challenge(Message):
    """The first message of an encrypted connection: what Join must sign."""

    TYPE = 47
    KINDS = (_U32, _KEY_BYTES)
    version: int
    nonce: bytes


@dataclass(frozen=True, slots=True)
class Invited(Message):
    """To the operator: an invite."""

    TYPE = 48
    KINDS = (_INVITE_ID, _Bytes(limits.TOKEN_BYTES_MAX))
    invite: bytes
    token: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Done(Message):
    """To the operator: it is so, and durable."""

    TYPE = 49
    KINDS = ()


@dataclass(frozen=True, slots=True)
class Reflected(Message):
    TYPE = 50
    KINDS = (_HOST, _PORT)
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Moved(Message):
    """This member, or newcomer of a proposal, is reached at other addresses from now on."""

    TYPE = 51
    KINDS = (_MEMBER,)
    member: Member


@dataclass(frozen=True, slots=True)
class PunchAsk(Message):
    """That peer offers so many connections: answer with a Punch."""

    TYPE = 52
    KINDS = (_ID, _UInt(limits.PUNCHES_MAX, low=1))
    peer: bytes
    count: int


@dataclass(frozen=True, slots=True)
class PunchGo(Message):
    """Connect to these, one each, so long after this has come; the peer does the same at that moment."""

    TYPE = 53
    KINDS = (_ID, _ENDPOINTS, _RTT)
    peer: bytes
    endpoints: tuple[Address, ...]
    delay_us: int


@dataclass(frozen=True, slots=True)
class RelayCall(Message):
    """That peer dials this relay to be connected with the receiver, who is to do the same."""

    TYPE = 54
    KINDS = (_ID, _ID)
    peer: bytes
    relay: bytes


@dataclass(frozen=True, slots=True)
class Relays(Message):
    """Who offers to carry connections and is no member. The master itself: with no incarnation and no address."""

    TYPE = 55
    KINDS = (_Array(_MEMBER, limits.RELAYS_MAX),)
    relays: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class RelayFor(Message):
    """To an observer that offers to relay: it will be dialed by these two, to be connected."""

    TYPE = 56
    KINDS = (_MEMBER, _MEMBER)
    one: Member
    other: Member


@dataclass(frozen=True, slots=True)
class RelayOver(Message):
    """To an observer that offers to relay: these are out of the run, and nothing of them is to be carried any more."""

    TYPE = 61
    KINDS = (_PEERS,)
    peers: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class PulseKeys(Message):
    """The answer of a secure master to Pulse, and the last that is TLS: secrets for what follows, AES-256-GCM."""

    TYPE = 60
    KINDS = (_KEY_BYTES, _KEY_BYTES)
    peers: bytes = field(repr=False)  # of what the peer sends
    masters: bytes = field(repr=False)


# -- peer to peer, the handshake of data connections


@dataclass(frozen=True, slots=True)
class _Hello(Message):
    KINDS: ClassVar[tuple[_Kind, ...]] = (_U32, _ID, _ID, _ID, _ID, _ID)
    version: int
    run: bytes
    from_peer: bytes
    from_incarnation: bytes
    to_peer: bytes
    to_incarnation: bytes


@dataclass(frozen=True, slots=True)
class PeerHello(_Hello):
    TYPE = 64
    KINDS = (*_Hello.KINDS, _PATH, _ID)
    path: int = Path.DIRECT
    via: bytes = NO_ID  # of a relayed connection


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


@dataclass(frozen=True, slots=True)
class PeerOffer(Message):
    """Behind a greeting in a secure run, and in answer to it: a key made for this connection, or an epoch of it."""

    TYPE = 71
    KINDS = (_KEY_BYTES, _UInt(2, low=1))
    key: bytes  # X25519
    cipher: int  # pyccl_cipher: the faster one there


@dataclass(frozen=True, slots=True)
class PeerProof(Message):
    """That the sender has the identity of its peer id, and made its offer."""

    TYPE = 72
    KINDS = (_KEY_BYTES, _ID, _Bytes(limits.SIGNATURE_BYTES, limits.SIGNATURE_BYTES))
    identity: bytes
    salt: bytes
    signature: bytes


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
        *(Join, InviteAsk, Revoke, PeersAsk, Kick, Probe, Reflect, Addresses, Punch, RelayAsk, Sample, Dialed),
        *(Welcome, Rejected, EpochPropose, EpochCommit, Flush, Evicted, Pending, Status, Cancelled, Alive),
        *(Unknown, Undecided, Members, Observers, Term, Challenge, Invited, Done, Probed, PulseKeys),
        *(Sampled, DialAsk),
        *(Reflected, Moved, PunchAsk, PunchGo, RelayCall, Relays, RelayFor, RelayOver),
        *(PeerHello, PeerWelcome, PeerRefused, StateHello, StateOffer, StateNone, RelayHello),
        *(PeerOffer, PeerProof),
    )
}
_NAMES: Final[dict[type[Message], tuple[str, ...]]] = {
    cls: tuple(each.name for each in fields(cls)) for cls in MESSAGE_TYPES.values()
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
