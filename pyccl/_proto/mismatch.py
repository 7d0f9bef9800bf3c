"""The text of a mismatch: written by the master, shown to users, and read back for MismatchError.peers and .fields.

EpochCommit carries one line of text; the two lists stand in front of it in a fixed form, so that a program and a
person can both read it:  "peers 0123abcd 4567cdef; fields count dtype; <what happened>"
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from typing import Final

from pyccl._proto import limits, spec
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


def differs_detail(sender: bytes, message: Differs) -> str | None:
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
    text = f"{show_key(message.key)}: {', '.join(parts)}"
    return make_detail((sender, message.peer), map(spec.field_name, differing), text)


def blocked_detail(blocked: Mapping[bytes, Blocked | None], opened: Container[Key] = ()) -> str | None:
    """Whether the members wait for each other in a way that none can end, and in what way. None: not (yet).

    `blocked` has an entry for every member; None where a member still moves. So does one whose open operations all
    the others have opened too and that is at no safe point: they only take their time. An operation that all wait in,
    and one that is known to be opened by all, is lacked by nobody: its OPEN is late on some link.
    """
    live = {peer: message for peer, message in sorted(blocked.items()) if message is not None}
    below = [peer for peer, message in live.items() if message.below_cut]
    if below:
        text = f"{_peers(below)} did not call an operation that others called before update_topology"
        return make_detail(below, ("below_cut",), text)
    if len(live) < len(blocked) or not all(m.lacking or m.at_safe_point for m in live.values()):
        return None
    inside = [peer for peer, message in live.items() if message.at_safe_point]
    outside = [peer for peer, message in live.items() if not message.at_safe_point]
    waiting_in = {key: [peer for peer, m in live.items() if key in m.lacking] for key in _lacked(live)}
    lacking = {key: peers for key, peers in waiting_in.items() if len(peers) < len(live) and key not in opened}
    if not all(any(peer in peers for peers in lacking.values()) for peer in outside):
        return None
    if not lacking and not (inside and outside):
        return None
    parts = [
        f"{_peers(waiting)} wait in {show_key(key)}, which others did not call" for key, waiting in lacking.items()
    ]
    if inside and outside:
        parts.insert(0, f"{_peers(inside)} wait in update_topology, {_peers(outside)} do not")
    return make_detail(live, ("call",), "; ".join(parts))


def show_key(key: Key) -> str:
    return f"operation {key.seq} of {'tag' if key.space == 0 else 'internal tag'} {key.tag}"


def _lacked(live: Mapping[bytes, Blocked]) -> list[Key]:
    """The first few operations that some have open and others lack: a text names no more."""
    keys = {key for message in live.values() for key in message.lacking[:_NAMED_MAX]}
    return sorted(keys)[:_NAMED_MAX]


def _peers(peers: Iterable[bytes]) -> str:
    return " ".join(short(peer) for peer in peers)
