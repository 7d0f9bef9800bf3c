"""The text of a mismatch: written by the master, shown to users, and read back for MismatchError.peers and .fields.

EpochCommit carries one line of text; the two lists stand in front of it in a fixed form, so that a program and a
person can both read it:  "peers 0123abcd 4567cdef; fields count dtype; <what happened>"
"""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from typing import Final

from pyccl._proto import limits, spec
from pyccl._proto.channel import pair_of, participants, user_tag
from pyccl._proto.messages import Blocked, Differs, Key, clip

PEER_DIGITS: Final = 8
_NAMED_MAX: Final = 16  # peers and fields named; further ones are left out
_FORM: Final = re.compile(r"peers((?: [0-9a-f]{8})*); fields((?: [a-z_]+)*); ")


def short(peer: bytes) -> str:
    """A peer as people read it: the first digits of its id."""
    return peer.hex()[:PEER_DIGITS]


def make_detail(peers: Iterable[bytes], fields: Iterable[str], text: str) -> str:
    named = "".join(f" {short(peer)}" for peer in sorted(set(peers))[:_NAMED_MAX])
    differing = "".join(f" {name}" for name in list(fields)[:_NAMED_MAX])
    return clip(f"peers{named}; fields{differing}; {text}", limits.DETAIL_CHARS_MAX)


def parse_detail(detail: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(peer id prefixes, fields); both empty where the text has another form."""
    found = _FORM.match(detail)
    if found is None:
        return (), ()
    return tuple(found[1].split()), tuple(found[2].split())


def differs_detail(sender: bytes, message: Differs, members: Sequence[bytes]) -> str | None:
    """Two participants gave one number to different operations. None: the two specs are equal, nothing differs."""
    mine, theirs = spec.decode_untrusted(message.mine), spec.decode_untrusted(message.theirs)
    differing = spec.differing_fields(mine, theirs)
    if not differing:
        return None
    parts = [
        f"{spec.field_name(name)} is {spec.show(mine, name)} at {short(sender)} and {spec.show(theirs, name)} at "
        f"{short(message.peer)}"
        for name in differing
    ]
    text = f"{show_key(message.key, members)}: {', '.join(parts)}"
    return make_detail((sender, message.peer), map(spec.field_name, differing), text)


def blocked_detail(
    blocked: Mapping[bytes, Blocked | None], members: Sequence[bytes], opened: Container[Key] = ()
) -> str | None:
    """Whether some members wait for each other in a way that none can end, and in what way. None: not (yet).

    `blocked` has an entry for every member that stays; None where one still moves. So does one whose open operations
    all the others have opened too and that is at no safe point: they only take their time. An operation that all whom
    it concerns wait in, and one that is known to be opened by all, is lacked by nobody: its OPEN is late on some link.
    Of a collective or a safe point all must be blocked; two that exchange may be while others move.
    `members`: of the epoch, in rank order.
    """
    live = {peer: message for peer, message in sorted(blocked.items()) if message is not None}
    below = [peer for peer, message in live.items() if message.below_cut]
    if below:
        text = f"{_peers(below)} did not call an operation that others called before update_topology"
        return make_detail(below, ("below_cut",), text)
    waiting: dict[Key, list[bytes]] = {}
    for peer, message in live.items():
        for key in message.lacking:
            waiting.setdefault(key, []).append(peer)
    lacking: dict[Key, Collection[bytes]] = {}  # key -> whom it concerns
    for key, peers in sorted(waiting.items()):
        pair = pair_of(key.space, key.tag) is not None
        concerned = blocked.keys() & participants(key.space, key.tag, members) if pair else blocked.keys()
        if len(peers) < len(concerned) and key not in opened:
            lacking[key] = concerned
    stuck = _stuck(blocked, live, lacking)
    if not stuck:
        return None
    parts = [
        f"{_peers(waiting[key])} wait in {show_key(key, members)}, which others did not call"
        for key in [key for key in lacking if stuck.issuperset(waiting[key])][:_NAMED_MAX]
    ]
    inside = [peer for peer in sorted(stuck) if live[peer].at_safe_point]
    outside = [peer for peer in sorted(stuck) if not live[peer].at_safe_point]
    if inside and outside:
        parts.insert(0, f"{_peers(inside)} wait in update_topology, {_peers(outside)} do not")
    return make_detail(stuck, ("call",), "; ".join(parts))


def _stuck(
    blocked: Mapping[bytes, Blocked | None], live: Mapping[bytes, Blocked], lacking: Mapping[Key, Collection[bytes]]
) -> set[bytes]:
    """The largest set of members of whom each waits, and only for things that need others of the set to move first."""

    def may_move(message: Blocked) -> bool:
        in_lacked = [key for key in message.lacking if key in lacking]
        if message.at_safe_point and (len(stuck) < len(blocked) or inside.issuperset(stuck)):
            return True  # somebody moves, and may yet arrive; or all are there
        if not message.at_safe_point and not in_lacked:
            return True
        return any(not stuck.issuperset(lacking[key]) for key in in_lacked)

    stuck = set(live)
    inside = {peer for peer, message in live.items() if message.at_safe_point}
    while movers := {peer for peer in stuck if may_move(live[peer])}:
        stuck -= movers
    return stuck


def show_key(key: Key, members: Sequence[bytes]) -> str:
    if pair_of(key.space, key.tag) is not None:
        pair = participants(key.space, key.tag, members)
        return f"exchange {key.seq} of tag {user_tag(key.tag)} between {' and '.join(map(short, pair))}"
    return f"operation {key.seq} of {'tag' if key.space == 0 else 'internal tag'} {key.tag}"


def _peers(peers: Iterable[bytes]) -> str:
    return " ".join(short(peer) for peer in peers)
