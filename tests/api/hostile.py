"""What a hostile sender sends: 10,000 different wrong things from one seed, each on a connection of its own.

A shot is the bytes of one connection. About half of the shots are right up to their last field; all must end with the
other side closing the connection, which ``volley`` waits for. What the messages look like comes from the table in
``pyccl._proto.messages``, so that a new message is fuzzed without a word here.
"""

from __future__ import annotations

import random
import selectors
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import msgpack

from pyccl._native._pyccl import ffi, lib
from pyccl._proto import channel, limits, messages
from pyccl._proto.epoch import Epoch, Member, make_epoch
from pyccl._proto.messages import MESSAGE_TYPES, Hello, Message, PeerHello, Pulse, StatusAsk

DEADLINE_S: Final = 60.0
GROUPS: Final = range(1000, 1050)  # of hostile peers that are let in: never the group of the run


@dataclass
class Secrets:
    """What a member knows of the run, and a hostile sender may have overheard."""

    run: bytes
    me: Member
    epoch: Epoch
    others: list[Member] = field(default_factory=list)

    @classmethod
    def told(cls, answer: dict[str, Any]) -> Secrets:
        """From the answer of Agent.do_secrets."""
        members = [Member(bytes.fromhex(p), bytes.fromhex(i)) for p, i in answer["members"]]
        epoch = Epoch(answer["epoch"], bytes.fromhex(answer["epoch_id"]), bytes(16), 1, tuple(members), b"")
        me = next(m for m in members if m.peer.hex() == answer["peer"])
        return cls(bytes.fromhex(answer["run"]), me, epoch, [m for m in members if m is not me])


@dataclass(frozen=True)
class Shot:
    """name: for the message of a failure. end: "wait" for the other side, or "shut" our side first."""

    name: str
    data: bytes
    end: str = "wait"
    to_the_last: bool = False  # right up to the last field


# ---- control messages -----------------------------------------------------------------------------------------------


def envelope(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


def wire(fields: Any) -> bytes:
    return envelope(msgpack.packb(fields, use_bin_type=True))


def plain(message: Message) -> list[Any]:
    return messages.to_wire(message)


def valid(kind: Any, rng: random.Random) -> Any:
    """A value that the field takes, small ones and limits alike."""
    match kind:
        case messages._Maybe():
            return rng.choice([None, valid(kind.kind, rng)])
        case messages._UInt():
            return rng.choice([kind.low, kind.high, rng.randint(kind.low, kind.high), min(kind.high, kind.low + 1)])
        case messages._Bool():
            return rng.random() < 0.5
        case messages._Bytes():
            return rng.randbytes(rng.choice([kind.low, min(kind.high, kind.low + 3)]))
        case messages._Str():
            return rng.choice(kind.one_of) if kind.one_of else rng.choice(["", "x", "é" * min(4, kind.chars_max)])
        case messages._Array():
            return [valid(kind.kind, rng) for _ in range(rng.choice([0, 1, 3]))]
        case messages._Record() if kind.cls is Epoch:
            members = {rng.randbytes(16): rng.randbytes(16) for _ in range(rng.randint(1, 3))}
            return kind.dump(make_epoch(rng.randint(1, 9), bytes(16), 1, tuple(Member(*m) for m in members.items())))
        case messages._Record() if kind.check is channel.check_untrusted:
            return _of_a_channel([valid(inner, rng) for inner in kind.kinds], rng)
        case messages._Record():
            return [valid(inner, rng) for inner in kind.kinds]
    raise AssertionError(kind)


def _of_a_channel(record: list[Any], rng: random.Random) -> list[Any]:
    """What starts with a space and a number (channel.py), with a number that the space has."""
    space, number = record[:2]
    low = rng.choice([0, rng.randrange(limits.MEMBERS_MAX - 1)])
    ranks = low | rng.choice([low + 1, limits.MEMBERS_MAX - 1]) << 8 if space == channel.SPACE_PAIR else 0
    return [space, number & limits.U32_MAX | ranks << 32, *record[2:]]


_NOTHING_TAKES: Final[list[Any]] = [
    *(float("nan"), float("inf"), -0.0, 1.0, -1, -(1 << 63), (1 << 64) - 1, {}, {1: 2}, {"a": {"a": None}}),
    *(msgpack.ExtType(5, b"x"), msgpack.Timestamp(1), [[[[[[[[]]]]]]]], "x" * 300, b"x" * 300, "\0", [None] * 700),
]


def refused(kind: Any, value: Any) -> bool:
    """Whether the field must not take the value; as it looks after msgpack."""
    if isinstance(value, (msgpack.ExtType, msgpack.Timestamp, dict)):
        return True
    try:
        kind.load(value)
    except messages.RemoteProtocolError:
        return True
    return False


def spoil(kind: Any, rng: random.Random) -> Any:
    """A value that the field must refuse."""
    candidates = [*_NOTHING_TAKES, None, True, 0, b"", "", [], b"x" * 15, b"x" * 41, [[]], [b"x" * 16, 1]]
    if isinstance(kind, messages._UInt):
        candidates += [kind.high + 1, kind.low - 1] * 4
    if isinstance(kind, messages._Record):
        candidates += [[*(valid(k, rng) for k in kind.kinds), 0], [valid(k, rng) for k in kind.kinds][:-1]] * 4
        whole = [valid(k, rng) for k in kind.kinds]
        whole[-1] = spoil(kind.kinds[-1], rng)
        candidates += [whole] * 4
    if isinstance(kind, messages._Array):
        candidates += [[*(valid(kind.kind, rng) for _ in range(2)), spoil(kind.kind, rng)]] * 4
    sendable = [c for c in candidates if type(c) is not int or -(1 << 63) <= c < 1 << 64]
    return rng.choice([c for c in sendable if refused(kind, c)])


def spoilt_messages(cls: type[Message], rng: random.Random) -> Iterator[tuple[str, bytes, bool]]:
    """(what, bytes, right up to the last field) of wrong messages of this type, without end."""
    name = cls.__name__
    while True:
        fields = [cls.TYPE, *(valid(kind, rng) for kind in cls.KINDS)]
        if cls.KINDS:
            yield f"{name}, last field", wire([*fields[:-1], spoil(cls.KINDS[-1], rng)]), True
            yield f"{name}, last field missing", wire(fields[:-1]), True
            at = rng.randrange(len(cls.KINDS))
            yield f"{name}, field {at}", wire([*fields[: at + 1], spoil(cls.KINDS[at], rng), *fields[at + 2 :]]), False
        yield f"{name}, one field more", wire([*fields, rng.choice([None, 0, b"", []])]), True
        body = msgpack.packb(fields, use_bin_type=True)
        yield f"{name}, bytes behind it", envelope(body + rng.randbytes(rng.randint(1, 9))), True
        yield f"{name}, cut", envelope(body[: rng.randrange(len(body))] or b"\xc1"), False
        flipped = bytearray(body)
        flipped[0] ^= 0x40  # no array any more
        yield f"{name}, no array", envelope(bytes(flipped)), False


def bombs(rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Bodies that are dear to whoever unpacks them without thinking; each fits the limit of a greeting."""
    big = [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff"]
    while True:
        yield "deep arrays", envelope(b"\x91" * rng.randint(500, 4000) + b"\xc0")
        yield "deep maps", envelope(b"\x81\xc0" * rng.randint(500, 2000) + b"\xc0")
        yield "a huge size", envelope(rng.choice(big) + rng.randbytes(3))
        yield "a huge size inside", envelope(b"\x98\x01" + rng.choice(big))
        yield "empty arrays", envelope(b"\xdc\x0f\xf0" + b"\x90" * 0x0FF0)
        yield "keys twice", envelope(b"\x82\x01\x02\x01\x02")
        yield "an extension", envelope(b"\xc7\x08\x05" + rng.randbytes(8))
        yield "a time", envelope(b"\xd6\xff" + rng.randbytes(4))
        yield "no UTF-8", envelope(b"\x93\x01\x01\xa4\xff\xfe\x80\x80")
        yield "an unused code", envelope(b"\x92\xc1\xc1")
        yield "a long type", envelope(b"\x91\xcf\x00\x00\x00\x00\x00\x00\x00\x63")


def garbage(rng: random.Random) -> Iterator[tuple[str, bytes]]:
    while True:
        # the first byte is no length that is allowed, or the rest would be waited for
        yield "noise", bytes([rng.randint(1, 255)]) + rng.randbytes(rng.randint(3, 3000))
        yield "HTTP", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
        yield "SSH", b"SSH-2.0-OpenSSH_9.7\r\n"
        yield "TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(500)
        yield "a length of nothing", struct.pack(">I", 0)
        yield "a length too long", struct.pack(">I", limits.BODY_GREETING_MAX_BYTES + 1 + rng.randrange(1 << 20))
        yield "the greatest length", b"\xff\xff\xff\xff" + rng.randbytes(8)


# ---- data frames ----------------------------------------------------------------------------------------------------


def frame(epoch: Epoch | None, **fields: int) -> bytes:
    """A data frame's header, with a right checksum; the C encoder takes what is right by itself only."""
    epoch_tag = struct.unpack("<Q", epoch.id[:8])[0] if epoch is not None else 0
    layout = {"type": 8, "phase": 0, "space": 0, "zero": 0, "number": epoch.number if epoch else 0, "tag8": epoch_tag}
    layout |= {"seq": 0, "tag": 0, "length": 0, "offset": 0, "value": 0, "spec": 0, **fields}
    return sealed(struct.pack("<4sBBBBQQQIIQQI", b"PYC1", *layout.values()))


def sealed(header: bytes) -> bytes:
    digest = lib.pyccl_xxh3_64(ffi.from_buffer(header), len(header), 0)
    return header + struct.pack("<I", digest & 0xFFFFFFFF)


_ONE, _NAN = 0x3FF0 << 48, 0x7FF8 << 48  # as doubles
_SPEC: Final = struct.pack("<8BIIQ16s", 1, 4, 1, 0, 1, 1, 0, 0, 0, 0, 1000, bytes(16))


WRONG_FRAMES: Final[dict[str, bool]] = {  # what is wrong -> whether it is right up to the last field
    "a checksum": True,
    "a magic": False,
    "a type": False,
    "an epoch of the same number": True,
    "a length": False,
    "the greatest length": False,
    "DONE with a payload": False,
    "OPEN of another tag": True,
    "OPEN without a weight": False,
    "a field that must be zero": False,
    "a state of no bytes": True,
    "early DATA without end": False,
}


def wrong_frame(what: str, epoch: Epoch, rng: random.Random) -> bytes:
    """What a member may not send on a data connection: it costs it the link."""
    good = frame(epoch, type=3, seq=rng.getrandbits(40))
    match what:
        case "a checksum":
            return good[:60] + bytes(byte ^ 0x55 for byte in good[60:])
        case "a magic":
            return sealed(b"PYC2" + good[4:60])
        case "a type":
            return frame(epoch, type=rng.choice([0, 12, 255]))
        case "an epoch of the same number":
            return frame(Epoch(epoch.number, rng.randbytes(16), bytes(16), 1, epoch.members, b""), type=3)
        case "a length":
            return frame(epoch, type=2, length=(1 << 20) + 1)
        case "the greatest length":
            return frame(epoch, type=2, length=0xFFFFFFFF)
        case "DONE with a payload":
            return frame(epoch, type=3, length=1) + b"x"
        case "OPEN of another tag":
            return frame(epoch, type=1, tag=7, length=40, offset=_ONE) + _SPEC
        case "OPEN without a weight":
            return frame(epoch, type=1, length=40, offset=_NAN) + _SPEC
        case "a field that must be zero":
            return frame(epoch, type=3, zero=1)
        case "a state of no bytes":
            return frame(epoch, type=9, value=0)
        case "early DATA without end":
            pieces = (frame(epoch, type=2, seq=1 << 40, length=1 << 20, offset=k << 20) for k in range(5))
            return b"".join(piece + bytes(1 << 20) for piece in pieces)
    raise AssertionError(what)


# ---- shots ----------------------------------------------------------------------------------------------------------


def at_master(known: Secrets, rng: random.Random, count: int) -> list[Shot]:
    """For the control port. Each is refused at its first message, or at the first after a greeting that was right."""
    firsts = [spoilt_messages(cls, rng) for cls in (Hello, Pulse, StatusAsk)]
    later = [spoilt_messages(cls, rng) for cls in MESSAGE_TYPES.values()]
    noise, bomb = garbage(rng), bombs(rng)

    def hello(**other: Any) -> bytes:
        fields = {"group": rng.choice(GROUPS), "peer": rng.randbytes(16), "incarnation": rng.randbytes(16), **other}
        return wire(plain(Hello(limits.PROTOCOL_VERSION, "hostile", **fields)))

    def first() -> Shot:
        what, data, last = next(rng.choice(firsts))
        return Shot(what, data, to_the_last=last)

    def greeted() -> Shot:
        what, data, last = next(rng.choice(later))
        return Shot(f"a peer of another group, then {what}", hello() + data, to_the_last=last)

    def out_of_place() -> Shot:
        cls = rng.choice([c for c in MESSAGE_TYPES.values() if c not in (Hello, StatusAsk)])
        data = wire([cls.TYPE, *(valid(kind, rng) for kind in cls.KINDS)])
        return Shot(f"{cls.__name__} first", data)

    def foreign() -> Shot:
        member = rng.choice(known.epoch.members)
        its = {"peer": member.peer, "incarnation": member.incarnation}
        resume = messages.Resume(known.run, known.epoch.number, known.epoch.id, rng.random() < 0.5)
        of_another_run = resume._replace(run=rng.randbytes(16))
        wrong = plain(Hello(limits.PROTOCOL_VERSION + 1, "hostile", 0, member.peer, member.incarnation))
        return rng.choice(
            [
                Shot("Hello, resume of another run", hello(group=0, resume=of_another_run), to_the_last=True),
                Shot("Hello, resume of nobody", hello(group=0, resume=resume), to_the_last=True),
                Shot("Hello, incarnation of nobody", hello(group=0, peer=member.peer, resume=resume)),
                Shot("Hello of a member, another group", hello(group=7, **its)),
                Shot("Hello of a member, another version", wire(wrong)),
            ]
        )

    def pulse() -> Shot:
        member = rng.choice(known.epoch.members)
        ours = wire(plain(Pulse(limits.PROTOCOL_VERSION, member.peer, member.incarnation)))
        nobody = wire(plain(Pulse(limits.PROTOCOL_VERSION, member.peer, rng.randbytes(16))))
        beat = frame(None)
        return rng.choice(
            [
                Shot("pulse of nobody", nobody + beat, to_the_last=True),
                Shot("pulse, then a wrong checksum", ours + beat + beat[:60] + b"\0\0\0\0", to_the_last=True),
                Shot("pulse, then another frame", ours + beat * 3 + frame(known.epoch, type=3), to_the_last=True),
                Shot("pulse, then noise", ours + rng.randbytes(64)),
                Shot("pulse, then half a beat", ours + beat + beat[:40], "shut"),
            ]
        )

    def cut_short() -> Shot:
        whole = hello() + wire([5, 1, []])
        return Shot("cut short", whole[: rng.randrange(1, len(whole))], "shut")

    def lying_length() -> Shot:
        body = hello()[4:]
        return Shot("a length that lies", struct.pack(">I", len(body) - rng.randint(1, 9)) + body, to_the_last=True)

    makers: list[tuple[int, Callable[[], Shot]]] = [
        *((20, first), (30, greeted), (6, out_of_place), (10, foreign), (8, pulse), (4, cut_short), (4, lying_length)),
        (10, lambda: Shot(*next(noise))),
        (8, lambda: Shot(*next(bomb))),
    ]
    return _drawn(makers, rng, count)


def at_peer(known: Secrets, rng: random.Random, count: int) -> list[Shot]:
    """For the data port of `known.me`. All end in its greeting; what a greeted link may do is for ``wrong_frames``."""
    spoilt, others = spoilt_messages(PeerHello, rng), [c for c in MESSAGE_TYPES.values() if c is not PeerHello]
    noise, bomb = garbage(rng), bombs(rng)

    def greeting(**wrong: Any) -> bytes:
        other = rng.choice(known.others)
        fields = {"version": limits.PROTOCOL_VERSION, "run": known.run, "from_peer": other.peer}
        fields |= {"from_incarnation": other.incarnation, "to_peer": known.me.peer}
        return wire(plain(PeerHello(**{**fields, "to_incarnation": known.me.incarnation, **wrong})))  # type: ignore[arg-type]

    def first() -> Shot:
        what, data, last = next(spoilt)
        return Shot(what, data, to_the_last=last)

    def foreign() -> Shot:
        which = rng.choice(["run", "to_peer", "to_incarnation", "to_incarnation", "to_incarnation"])
        return Shot(f"{which} of nobody", greeting(**{which: rng.randbytes(16)}), to_the_last=which == "to_incarnation")

    def old() -> Shot:
        return Shot("another version", greeting(version=rng.choice([0, 2, limits.U32_MAX])))

    def out_of_place() -> Shot:
        cls = rng.choice(others)
        return Shot(f"{cls.__name__} first", wire([cls.TYPE, *(valid(kind, rng) for kind in cls.KINDS)]))

    def ungreeted() -> Shot:
        what = rng.choice(list(WRONG_FRAMES))
        return Shot(f"{what}, without a greeting", wrong_frame(what, known.epoch, rng)[:4096])

    def no_member() -> Shot:
        hello = greeting(to_incarnation=rng.randbytes(16))
        return Shot("DONE from nobody", hello + frame(known.epoch, type=3), to_the_last=True)

    def cut_short() -> Shot:
        whole = greeting()
        return Shot("cut short", whole[: rng.randrange(1, len(whole))], "shut")

    def behind() -> Shot:
        whole = greeting()[4:] + rng.randbytes(rng.randint(1, 50))
        return Shot("bytes behind the greeting", envelope(whole), to_the_last=True)

    makers: list[tuple[int, Callable[[], Shot]]] = [
        *((26, first), (18, foreign), (4, old), (6, out_of_place), (4, ungreeted), (10, no_member), (4, cut_short)),
        (10, behind),
        (10, lambda: Shot(*next(noise))),
        (8, lambda: Shot(*next(bomb))),
    ]
    return _drawn(makers, rng, count)


def _drawn(makers: list[tuple[int, Callable[[], Shot]]], rng: random.Random, count: int) -> list[Shot]:
    weights, makes = zip(*makers, strict=True)
    return [make() for make in rng.choices(makes, weights, k=count)]


def replay(known: Secrets, rng: random.Random, what: str) -> Shot:
    """A member's own greeting, overheard, then what no member sends. To the data port of `known.me`."""
    other = rng.choice(known.others)
    hello = PeerHello(
        *(limits.PROTOCOL_VERSION, known.run, other.peer, other.incarnation), known.me.peer, known.me.incarnation
    )
    return Shot(f"a member's greeting, then {what}", wire(plain(hello)) + wrong_frame(what, known.epoch, rng))


# ---- sending --------------------------------------------------------------------------------------------------------


class _Flight:
    """One connection on its way: sends its bytes, then reads until the other side has closed it."""

    def __init__(self, address: tuple[str, int], shot: Shot) -> None:
        self.shot, self.left = shot, memoryview(shot.data)
        self.sock = socket.socket()
        self.sock.setblocking(False)
        self.sock.connect_ex(address)

    def move(self, ready: int) -> int:
        """What to wait for next; 0: the other side has cut it off."""
        try:
            if ready & selectors.EVENT_READ and not self.sock.recv(1 << 16):
                return 0
            if ready & selectors.EVENT_WRITE and self.left:
                self.left = self.left[self.sock.send(self.left) :]
                if not self.left and self.shot.end == "shut":
                    self.sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass
        except (ConnectionResetError, BrokenPipeError):
            return 0
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self.left else 0)


def volley(address: str, shots: Iterable[Shot], at_once: int = 32) -> int:
    """Send them all, so many at a time. Every one must be cut off; returns how many were."""
    host, port = address.rsplit(":", 1)
    waiting, flying, cut = iter(shots), selectors.DefaultSelector(), 0
    until = time.monotonic() + DEADLINE_S
    more = True
    with flying:
        while more or flying.get_map():
            while more and len(flying.get_map()) < at_once:
                shot = next(waiting, None)
                more = shot is not None
                if shot is not None:
                    flight = _Flight((host, int(port)), shot)
                    flying.register(flight.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, flight)
            for key, ready in flying.select(1.0):
                wanted = key.data.move(ready)
                if wanted:
                    flying.modify(key.fileobj, wanted, key.data)
                    continue
                flying.unregister(key.fileobj)
                key.data.sock.close()
                cut += 1
                until = time.monotonic() + DEADLINE_S
            left = [key.data.shot.name for key in flying.get_map().values()]
            assert time.monotonic() < until, f"not cut off: {left}"
    return cut
