"""The way to the master and back: who is reached, as whom we are seen, whether others reach us, how fast bytes go."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Final

import trio

from pyccl import errors
from pyccl._io.address import Master, credentials_for
from pyccl._io.ask import ask_status
from pyccl._io.portmap import Mapping, NoMappingError, open_mapping
from pyccl._io.probe import Seen, dial, probe
from pyccl._io.sampling import Rate, measure
from pyccl._io.tls import Credentials
from pyccl._proto import limits
from pyccl._proto.candidates import is_public, may_reach, ordered, seen_at
from pyccl._proto.epoch import NO_ID, Address, Member
from pyccl._proto.invites import read_unproven
from pyccl.doctor.finding import Finding, Level

PROBES: Final = 3  # of different ports of ours: whether a router keeps their numbers
CLOCK_S: Final = 30.0  # a clock that is further off is told
SOON_S: Final = 86_400.0  # an invite that ends before is told
PEERS_MAX: Final = 8  # that are tried
_MASTERS_PACE: Final = 0.9  # from this part of it on it may be the master that goes no faster
SLOW_BITS_PER_S: Final = 5e6  # up; less is a warning
_TIMEOUT_S: Final = 15.0
_SAMPLES_S: Final = 2 * (limits.SAMPLE_HELD_S + limits.SAMPLE_S) + 5.0  # both, each after it was another's turn

OpenMapping = Callable[[int], AbstractAsyncContextManager[Mapping]]


@dataclass(frozen=True, slots=True)
class Forwarded:
    """What a router gives for a port. external None: nothing; reasons say why."""

    external: tuple[str, int] | None
    method: str
    lifetime_s: int | None
    reasons: dict[str, str]


# ---- judged


def judge_clock(seen: Seen) -> Finding:
    data = {"offset_s": round(seen.offset_s, 3), "error_s": round(seen.error_s, 3)}
    text = f"{abs(seen.offset_s):.1f} s {'behind' if seen.offset_s > 0 else 'ahead of'} the master's"
    if abs(seen.offset_s) <= CLOCK_S + seen.error_s:
        return Finding("clock", Level.OK, text, data=data)
    advice = "set it (timedatectl set-ntp true): logs do not fit together, and invites seem to end early or late"
    return Finding("clock", Level.WARNING, text, advice, data)


def judge_latency(seen: list[Seen]) -> Finding:
    times_ms = sorted(each.connect_s * 1000 for each in seen)
    spread = f"of {len(times_ms)}: {times_ms[0]:.1f} to {times_ms[-1]:.1f}"
    text = f"{statistics.median(times_ms):.1f} ms to the master ({spread})"
    return Finding("latency", Level.OK, text, data={"round_trip_ms": [round(each, 3) for each in times_ms]})


def judge_nat(seen: list[Seen]) -> Finding:
    """By what the master sees of connections from several ports of ours."""
    local, observed = seen[0].local, seen[0].observed
    kept = sum(each.local[1] == each.observed[1] for each in seen)
    data = {
        "local": [list(each.local) for each in seen],
        "observed": [list(each.observed) for each in seen],
        "ports_kept": kept,
    }
    if len({each.observed[0] for each in seen}) > 1:
        hosts = ", ".join(sorted({each.observed[0] for each in seen}))
        text = f"the master sees us at several addresses: {hosts}"
        return Finding("NAT", Level.WARNING, text, "others can't dial back to one of many: use a relay", data)
    if observed[0] == local[0]:
        return Finding("NAT", Level.OK, f"none on the way to the master, which sees {local[0]} as it is", data=data)
    behind = f"{local[0]} is seen as {observed[0]}"
    if kept == len(seen):
        text = f"{behind}, with the same ports: hole punching can work"
        return Finding("NAT", Level.NOTE, text, data=data)
    text = f"{behind}, with other ports ({kept} of {len(seen)} kept): symmetric, or several NATs"
    advice = "peers behind such a router reach each other by a mapped port or a relay only"
    return Finding("NAT", Level.WARNING, text, advice, data)


def judge_address(seen: Seen) -> Finding:
    host = ipaddress.ip_address(seen.observed[0])
    data = {"host": str(host)}
    if host.is_loopback:
        return Finding("public address", Level.NOTE, "the master is on this machine, and sees none", data=data)
    if host.is_global:
        return Finding("public address", Level.OK, str(host), data=data)
    text = f"{host}, which is not public: the master is in the same network, or the provider has a NAT of its own"
    return Finding("public address", Level.NOTE, text, data=data)


def judge_mapping(forwarded: Forwarded, is_behind_nat: bool) -> Finding:
    data = {
        "external": forwarded.external and list(forwarded.external),
        "method": forwarded.method,
        "lifetime_s": forwarded.lifetime_s,
        "reasons": forwarded.reasons,
    }
    if forwarded.external is None:
        reasons = "; ".join(f"{method}: {reason}" for method, reason in forwarded.reasons.items())
        level = Level.WARNING if is_behind_nat else Level.NOTE
        advice = "switch UPnP or PCP on in the router, or forward a port by hand and name it" if is_behind_nat else ""
        return Finding("port mapping", level, f"none ({reasons})", advice, data)
    host, port = forwarded.external
    text = f"{host} port {port} by {forwarded.method}"
    if forwarded.lifetime_s is None:
        return Finding("port mapping", Level.NOTE, f"{text}, without an end", "a killed process leaves it behind", data)
    if ipaddress.ip_address(host).is_private:
        advice = "ask the provider for a public address, or switch the first router to bridge mode"
        return Finding("port mapping", Level.WARNING, f"{text}: behind another NAT", advice, data)
    return Finding("port mapping", Level.OK, text, data=data)


def judge_reachability(seen: Seen, port: int) -> Finding:
    data = {"port": port, "reached": seen.reached, "reason": seen.reason}
    where = f"{seen.observed[0]} port {port}"
    if seen.reached:
        return Finding("reachability", Level.OK, f"the master has connected to {where}", data=data)
    advice = "let incoming TCP through the firewall and forward it in the router; else peers come by a relay"
    return Finding("reachability", Level.WARNING, f"the master does not reach {where}: {seen.reason}", advice, data)


def judge_reached_by_peers(seen: Seen, port: int) -> Finding:
    """By members that the master had connect back, as it does itself."""
    data = {"port": port, "tried": seen.peers}
    name, where = "reached by peers", f"{seen.observed[0]} port {port}"
    missed = {peer: reason for peer, reason in seen.peers.items() if reason}
    reached, tried = len(seen.peers) - len(missed), len(seen.peers)
    if not tried:
        text = "no member has tried: there are none elsewhere, or they were asked too often"
        if not is_public(seen.observed[0]):
            text = f"members are not asked to connect to {seen.observed[0]}, which is not public"
        return Finding(name, Level.NOTE, text, data=data)
    if not missed:
        return Finding(name, Level.OK, f"{tried} of {tried} members that tried have connected to {where}", data=data)
    text = f"{reached} of {tried} members that tried have connected to {where} ({_words(missed)})"
    advice = "let incoming TCP through the firewall and forward it in the router; else such pairs punch or use a relay"
    if reached:
        advice = "a firewall lets only some in, or does not let those out: such pairs punch or use a relay"
    return Finding(name, Level.WARNING, text, advice, data)


def judge_bandwidth(up: Rate | None, down: Rate | None, reason: str) -> Finding:
    """Of one connection to the master. None: not measured; reason: why not."""
    ways = {"up": up, "down": down}
    data: dict[str, Any] = {
        way: None if rate is None else {"bits_per_s": round(8 * rate.bytes_per_s), "size_bytes": rate.size_bytes}
        for way, rate in ways.items()
    }
    data["reason"] = reason
    told = ", ".join(f"{way} {_rate_text(rate)}" for way, rate in ways.items() if rate is not None)
    missing = f"{' and '.join(way for way, rate in ways.items() if rate is None)} not measured: {reason}"
    if not told:
        return Finding("bandwidth", Level.NOTE, missing, data=data)
    text = f"{told}, by one connection to the master: several to peers carry that or more"
    if reason:
        text += f"; {missing}"
    if up is not None and 8 * up.bytes_per_s < SLOW_BITS_PER_S:
        advice = (
            "is the line busy, or is it Wi-Fi, or the master's line? Else exchange seldom and few bits: pyccl.optim, "
            'quantize="uint8"'
        )
        return Finding("bandwidth", Level.WARNING, text, advice, data)
    return Finding("bandwidth", Level.NOTE if reason else Level.OK, text, data=data)


def judge_invite(master: Master, now_s: float) -> Finding:
    """What it says itself; whether the master takes it is told by `master`."""
    assert master.ticket is not None
    invite = read_unproven(master.ticket.token)
    if invite is None:
        text = "it is cut off, altered, or of another version of pyccl"
        return Finding("invite", Level.ERROR, text, "ask for it again, and copy it whole")
    left_s = invite.ends - now_s
    data = {"id": invite.id.hex(), "ends": invite.ends, "uses": invite.uses, "group": invite.group}
    for_whom = "any group" if invite.group is None else f"group {invite.group}"
    uses = "any number of identities" if invite.uses == 0 else f"{invite.uses} identities"
    if left_s <= 0:
        text = f"{invite.id.hex()} ended {_span(-left_s)} ago by this machine's clock"
        return Finding("invite", Level.ERROR, text, "ask for a new one: pyccl-master invite", data)
    text = f"{invite.id.hex()} for {for_whom} and {uses} ends in {_span(left_s)}"
    if left_s < SOON_S:
        return Finding("invite", Level.NOTE, text, "who is in stays in; who comes later needs a new one", data)
    return Finding("invite", Level.OK, text, data=data)


def judge_failure(master: Master, error: Exception) -> Finding:
    """Why the master can't be asked."""
    advice = "is it running, is this its address, does a firewall let TCP through to it?"
    if isinstance(error, errors.RejectedError):
        advice = "ask its operator for a new invite: pyccl-master invite"
        if master.ticket is None:
            advice = "give an invite in place of the address, or start both with the same version of pyccl"
    elif isinstance(error, errors.RemoteProtocolError):
        advice = "is this the address of a pyccl-master, of the same version, and the one that issued the invite?"
    elif isinstance(error, errors.UsageError):
        advice = "see `identity`"
    return Finding("master", Level.ERROR, str(error), advice)


def judge_library(ours: str, masters: str) -> Finding:
    data = {"ours": ours, "master": masters}
    if ours == masters:
        return Finding("library", Level.OK, f"{ours}, as the master's", data=data)
    text = f"{ours} here, {masters} at the master"
    return Finding("library", Level.NOTE, text, "versions of one protocol work together; the same one is tested", data)


def judge_peers(tried: dict[str, str]) -> Finding:
    """tried: by id, why this machine does not reach a member; "": it does."""
    missed = {peer: reason for peer, reason in tried.items() if reason}
    data = {"tried": tried}
    if not tried:
        return Finding("peers", Level.NOTE, "there are no members to try", data=data)
    if not missed:
        return Finding("peers", Level.OK, f"all of {len(tried)} members that were tried are reached", data=data)
    text = f"{len(tried) - len(missed)} of {len(tried)} members are reached ({_words(missed)})"
    advice = "they reach us, if `reached by peers` is ok; else such pairs are linked through a third member"
    return Finding("peers", Level.WARNING, text, advice, data)


# ---- asked


async def look(master: Master | None, library: str, open_mapping_: OpenMapping | None = open_mapping) -> list[Finding]:
    """All that a network tells. For Trio; bounded in time.

    Args:
        library: our version.
        open_mapping_: None: no router is asked for anything.
    """
    findings: list[Finding] = []
    with _listener() as listener:
        port = listener.getsockname()[1]
        async with _forwarded(port, open_mapping_) as forwarded:
            seen: list[Seen] = []
            if master is not None:
                if master.ticket is not None:
                    findings.append(judge_invite(master, time.time()))
                outer = forwarded.external[1] if forwarded is not None and forwarded.external is not None else port
                try:
                    with trio.fail_after(_TIMEOUT_S):
                        credentials = credentials_for(master)
                        seen = [
                            await probe(master.host, master.port, credentials, 0 if n else outer) for n in range(PROBES)
                        ]
                        status = await ask_status(master.host, master.port, credentials)
                        tried = await _tried(members_untrusted(status), seen_at(seen[0].observed[0], seen[0].local[0]))
                except trio.TooSlowError:
                    late = f"{master.address} did not answer within {_TIMEOUT_S:g} s"
                    findings.append(judge_failure(master, errors.MasterUnavailableError(late)))
                except errors.PycclError as e:
                    findings.append(judge_failure(master, e))
                else:
                    findings += judge_seen(master, seen, outer)
                    findings.append(judge_library(library, str(status.get("library", "?"))))
                    findings.append(judge_peers(tried))
                    findings.append(judge_bandwidth(*await _sampled(master, credentials)))
            is_behind_nat = bool(seen) and seen[0].local[0] != seen[0].observed[0]
            if forwarded is not None:
                findings.append(judge_mapping(forwarded, is_behind_nat))
    return findings


def judge_seen(master: Master, seen: list[Seen], port: int) -> list[Finding]:
    """seen[0]: the one for which the master was to connect to the port."""
    how = "encrypted, as the invite says" if master.ticket is not None else "in plain"
    return [
        Finding("master", Level.OK, f"{master.address} answers, {how}"),
        judge_clock(seen[0]),
        judge_latency(seen),
        judge_nat(seen),
        judge_address(seen[0]),
        judge_reachability(seen[0], port),
        judge_reached_by_peers(seen[0], port),
    ]


def members_untrusted(status: dict[str, Any]) -> dict[str, Member]:
    """Some that a status names, their addresses and where they are seen. RemoteProtocolError: it is none."""
    found: dict[str, Member] = {}
    try:
        members = [member for group in status["groups"] for member in group["members"]]
        for member in members[:PEERS_MAX]:
            addresses = [str(address).rpartition(":") for address in member["addresses"][: limits.ADDRESSES_MAX]]
            ends = tuple(Address(host, int(port)) for host, _, port in addresses)
            found[str(member["peer"])] = Member(NO_ID, NO_ID, ends, str(member["seen"]))
    except (KeyError, TypeError, ValueError) as e:
        raise errors.RemoteProtocolError("a status without members") from e
    return found


async def _tried(members: dict[str, Member], seen: str) -> dict[str, str]:
    """seen: where we are, as members would be."""
    tried = dict.fromkeys(members, "it names no address that may be dialed")
    mine = Member(NO_ID, NO_ID, (), seen)

    async def one(peer: str, at: Address) -> None:
        reason = await dial(at.host, at.port, lambda host: may_reach(host, members[peer], mine))
        if tried[peer]:  # not reached at another address
            tried[peer] = reason

    async with trio.open_nursery() as nursery:
        for peer, member in members.items():
            for address in ordered(member, mine):
                nursery.start_soon(one, peer, address)
    return tried


async def _sampled(master: Master, credentials: Credentials | None) -> tuple[Rate | None, Rate | None, str]:
    """Up, down, and why one of them was not measured."""
    up = down = None
    reason = f"no answer within {_SAMPLES_S:g} s"
    with trio.move_on_after(_SAMPLES_S):
        try:
            up = await measure(master.host, master.port, credentials, upwards=True)
            down = await measure(master.host, master.port, credentials, upwards=False)
            reason = ""
        except errors.PycclError as e:
            reason = str(e)
    return up, down, reason


def _words(missed: dict[str, str]) -> str:
    return "; ".join(f"{peer[:8]}: {reason}" for peer, reason in missed.items())


def _rate_text(rate: Rate) -> str:
    mbit = 8 * rate.bytes_per_s / 1e6
    if not rate.size_bytes:
        return f"less than {limits.SAMPLE_CHUNK_BYTES >> 10} KiB in {limits.SAMPLE_S:g} s"
    at_least = "at least " if rate.bytes_per_s > _MASTERS_PACE * limits.SAMPLE_BYTES_PER_S else ""
    return f"{at_least}{mbit:.{1 if mbit < 10 else 0}f} Mbit/s"


def _listener() -> socket.socket:
    """That a master may connect to, whichever family it comes by."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


@contextlib.asynccontextmanager
async def _forwarded(port: int, open_mapping_: OpenMapping | None) -> AsyncIterator[Forwarded | None]:
    """Whatever happens inside, the mapping is taken away."""
    if open_mapping_ is None:
        yield None
        return
    async with contextlib.AsyncExitStack() as stack:
        try:
            mapping = await stack.enter_async_context(open_mapping_(port))
            forwarded = Forwarded(mapping.external, mapping.method, mapping.lifetime_s, {})
        except NoMappingError as e:
            forwarded = Forwarded(None, "", None, e.reasons)
        yield forwarded


def _span(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
