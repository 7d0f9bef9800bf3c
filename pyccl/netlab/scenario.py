"""What a lab is made of, read from TOML and checked, and the route of every packet through it. Reads files, else pure.

    description = "..."                    one sentence
    seed = 1                               of the losses

    [[host]]                               ranks are given in the order of these tables
    name = "peer"                          of one; of several alike: peer0, peer1, ...
    count = 2
    rate = "400mbit"                       of its line, both ways; or `up` and `down`; left out: unlimited
    queue = "50ms"                         in front of each rate, drop tail; or a size ("256kB")
    delay = "0ms"                          one way, on its line, each way
    loss = 0.0                             of each packet on its line, each way
    router = "internet"                    what its line leads to; left out: the first router
    nat = "port_restricted"                its own router, at the end of its line; left out: none ("open")
    lan = "home"                           hosts behind the same one, on the same line; left out: it is there alone
    ipv6 = "dual"                          beside IPv4; or "only"; left out: "none"

    [[router]]                             left out: one that adds nothing
    name = "internet"
    delay = "75ms"                         of what crosses it
    loss = 1e-4
    flow_cap = "20mbit"                    of each TCP flow that crosses it (each direction by itself)
    queue = "50ms"                         in front of the cap

    [[link]]                               between routers
    between = ["europe", "america"]
    rate = "1gbit"
    queue = "50ms"
    delay = "40ms"
    loss = 0.0

Kinds of `nat`, all of which drop what nobody inside asked for:

    open             none: a public address of its own
    full_cone        a port that sent something out is open to everybody
    port_restricted  a port is open to whom it sent something to; ports are kept
    symmetric        the same, and each flow gets a random port
    upnp             port_restricted, and maps ports for who asks by UPnP, NAT-PMP or PCP
    double           port_restricted, twice: two routers
    firewall         a public address; only flows that began inside

Rates count IP packets; delays are one way. A packet goes up the sender's line (queue, rate, delay), through routers and
links on the way with the least delay, and down the receiver's line. Losses are drawn where they are named: on a host's
line behind the rate on the way up, before it on the way down.
"""

from __future__ import annotations

import enum
import heapq
import itertools
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Final, TypeVar

from pyccl import units

T = TypeVar("T")
K = TypeVar("K", bound=enum.StrEnum)
HOSTS_MAX: Final = 250
QUEUE: Final = "50ms"
_NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,31}")


class ScenarioError(ValueError):
    """No scenario; the text says where and why."""


class Nat(enum.StrEnum):
    """What stands between a host and its line."""

    OPEN = "open"
    FULL_CONE = "full_cone"
    PORT_RESTRICTED = "port_restricted"
    SYMMETRIC = "symmetric"
    UPNP = "upnp"
    DOUBLE = "double"
    FIREWALL = "firewall"

    @property
    def translates(self) -> bool:
        return self not in (Nat.OPEN, Nat.FIREWALL)


class IPv6(enum.StrEnum):
    NONE = "none"
    DUAL = "dual"
    ONLY = "only"


@dataclass(frozen=True, slots=True)
class Line:
    """A rate of one direction and its queue. rate: bits a second, None: unlimited."""

    rate: int | None = None
    queue_ns: int = 0


@dataclass(frozen=True, slots=True)
class Host:
    name: str
    router: str
    up: Line = Line()
    down: Line = Line()
    delay_ns: int = 0
    loss: float = 0.0
    nat: Nat = Nat.OPEN
    lan: str = ""
    ipv6: IPv6 = IPv6.NONE

    @property
    def line_name(self) -> str:
        """Hosts of one LAN share their line."""
        return self.lan or self.name


@dataclass(frozen=True, slots=True)
class Router:
    name: str
    delay_ns: int = 0
    loss: float = 0.0
    flow_cap: Line = Line()


@dataclass(frozen=True, slots=True)
class Link:
    """Between two routers, the same both ways."""

    between: tuple[str, str]
    line: Line = Line()
    delay_ns: int = 0
    loss: float = 0.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """A lab to be built. kinds: how many hosts each [[host]] table made."""

    name: str
    description: str
    seed: int
    hosts: tuple[Host, ...]
    routers: tuple[Router, ...]
    links: tuple[Link, ...] = ()
    kinds: tuple[int, ...] = field(default=())

    def with_options(
        self,
        *,
        rate: str | None = None,
        delay: str | None = None,
        loss: float | None = None,
        hosts: int | None = None,
        seed: int | None = None,
    ) -> Scenario:
        """This one, changed.

        Args:
            rate: of all hosts' lines, both ways.
            delay: one way, between any two hosts. Only with one router.
            loss: on the way between any two hosts. Only with one router.
            hosts: so many in all; the number of the first kind changes.
            seed: of the losses.

        Raises:
            ScenarioError: it can't be changed so.
        """
        made = self
        if seed is not None:
            made = replace(made, seed=_seed(seed))
        if rate is not None:
            with _at("rate"):
                bps = units.rate_bps(rate)
            made = replace(made, hosts=tuple(_with_rate(host, bps) for host in made.hosts))
        if delay is not None or loss is not None:
            made = made._with_path(delay, loss)
        return made if hosts is None or hosts == len(made.hosts) else made._with_hosts(hosts)

    def _with_path(self, delay: str | None, loss: float | None) -> Scenario:
        if len(self.routers) != 1:
            raise ScenarioError(f"{self.name} has several routers: change delay and loss in a file of your own")
        (router,), hosts = self.routers, self.hosts
        with _at("options"):
            if delay is not None:
                router = replace(router, delay_ns=units.time_ns(delay))
                hosts = tuple(replace(host, delay_ns=0) for host in hosts)
            if loss is not None:
                router = replace(router, loss=units.share(loss))
                hosts = tuple(replace(host, loss=0.0) for host in hosts)
        return replace(self, routers=(router,), hosts=hosts)

    def _with_hosts(self, count: int) -> Scenario:
        first, *others = self.kinds
        left = count - sum(others)
        if left < 1 or count < 2 or count > HOSTS_MAX:
            least = max(2, 1 + sum(others))
            raise ScenarioError(f"{count} hosts: {self.name} can have {least} to {HOSTS_MAX}")
        base = re.sub(r"\d+$", "", self.hosts[0].name)
        alike = tuple(replace(self.hosts[0], name=name) for name in _names(base, left))
        made = replace(self, hosts=alike + self.hosts[first:], kinds=(left, *others))
        _check(made)
        return made

    def without_nat(self) -> Scenario:
        """The same lines, each host with a public address."""
        return replace(self, hosts=tuple(replace(host, nat=Nat.OPEN) for host in self.hosts))

    @property
    def sites(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that have one public address: of a host, or of a LAN's router. In the order of their first hosts."""
        found: dict[str, list[int]] = {}
        for rank, host in enumerate(self.hosts):
            found.setdefault(host.line_name if host.nat is not Nat.OPEN else host.name, []).append(rank)
        return tuple(tuple(ranks) for ranks in found.values())

    @property
    def rtt_ns(self) -> int:
        """The longest round trip of two hosts, of empty lines."""
        pairs = itertools.combinations(range(len(self.hosts)), 2)
        return max(self.delay_ns(a, b) + self.delay_ns(b, a) for a, b in pairs)

    def delay_ns(self, source: int, target: int) -> int:
        """One way, of an empty line and a packet without length."""
        return sum(step.ns for step in self.route(source, target) if isinstance(step, Delay))

    def loss(self, source: int, target: int) -> float:
        """Of a packet on its way."""
        passes = 1.0
        for step in self.route(source, target):
            if isinstance(step, Loss):
                passes *= 1 - step.share
        return 1 - passes

    def rate(self, source: int, target: int) -> int | None:
        """Bits a second of the narrowest line on the way; None: unlimited."""
        rates = [step.line.rate for step in self.route(source, target) if isinstance(step, Pipe)]
        return min((rate for rate in rates if rate is not None), default=None)

    def flow_cap(self, source: int, target: int) -> int | None:
        """Bits a second of one TCP flow; None: as much as the lines carry."""
        caps = [step.line.rate for step in self.route(source, target) if isinstance(step, Cap)]
        return min((cap for cap in caps if cap is not None), default=None)

    def route(self, source: int, target: int) -> list[Step]:
        """What a packet from one host (by rank) to another meets, in this order. Within a LAN: nothing."""
        a, b = self.hosts[source], self.hosts[target]
        if a.nat is not Nat.OPEN and a.line_name == b.line_name:
            return []
        steps: list[Step] = [Pipe(f"{a.line_name} up", a.up), Delay(a.delay_ns), Loss(a.loss)]
        for router, link in self._way(a.router, b.router):
            steps += [Delay(router.delay_ns), Loss(router.loss)]
            if router.flow_cap.rate is not None:
                steps.append(Cap(f"{router.name} flow cap", router.flow_cap))
            if link is not None:
                to = link.between[link.between[0] == router.name]
                steps += [Pipe(f"{router.name} to {to}", link.line), Delay(link.delay_ns), Loss(link.loss)]
        steps += [Loss(b.loss), Pipe(f"{b.line_name} down", b.down), Delay(b.delay_ns)]
        return [step for step in steps if step.counts()]

    def _way(self, start: str, end: str) -> list[tuple[Router, Link | None]]:
        """Routers from one to the other, and the link behind each, by least delay, then fewest links (Dijkstra)."""
        routers = {router.name: router for router in self.routers}
        ways: list[tuple[int, int, list[str], list[tuple[Router, Link | None]]]] = [(0, 0, [start], [])]
        seen: set[str] = set()
        while ways:
            delay, hops, names, way = heapq.heappop(ways)
            here = names[-1]
            if here == end:
                return [*way, (routers[here], None)]
            if here in seen:
                continue
            seen.add(here)
            for number, link in enumerate(self.links):
                if here in link.between:
                    there = link.between[link.between[0] == here]
                    if there not in seen:
                        more = delay + routers[there].delay_ns + link.delay_ns
                        farther = (more, hops + 1, [*names, str(number), there], [*way, (routers[here], link)])
                        heapq.heappush(ways, farther)
        raise ScenarioError(f"{self.name}: no way from router {start!r} to {end!r}")


@dataclass(frozen=True, slots=True)
class Pipe:
    """A direction of a line, which all that goes there shares: told from others by its name."""

    name: str
    line: Line

    def counts(self) -> bool:
        return self.line.rate is not None


@dataclass(frozen=True, slots=True)
class Delay:
    ns: int

    def counts(self) -> bool:
        return self.ns > 0


@dataclass(frozen=True, slots=True)
class Loss:
    share: float

    def counts(self) -> bool:
        return self.share > 0


@dataclass(frozen=True, slots=True)
class Cap:
    """Of each TCP flow: by its router, as a pipe by its name."""

    name: str
    line: Line

    def counts(self) -> bool:
        return self.line.rate is not None


Step = Pipe | Delay | Loss | Cap


# ---- reading


class _at:  # noqa: N801  used as a statement
    """Say where in the file a unit is wrong."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if isinstance(error, units.UnitError):
            raise ScenarioError(f"{self._where}: {error}") from error


class _Table:
    """A TOML table whose keys are taken one by one; what nobody took is an error."""

    def __init__(self, values: object, where: str) -> None:
        if not isinstance(values, Mapping):
            raise ScenarioError(f"{where} is no table")
        self._left, self._where = dict(values), where

    def take(self, key: str, read: Callable[[Any], T], default: T) -> T:
        if key not in self._left:
            return default
        with _at(f"{self._where}.{key}"):
            try:
                return read(self._left.pop(key))
            except ScenarioError as error:
                raise ScenarioError(f"{self._where}.{key}: {error}") from error

    def tables(self, key: str) -> Iterator[tuple[_Table, str]]:
        """Each of the tables [[key]], and what to call it."""
        found = self._left.pop(key, [])
        if not isinstance(found, list):
            raise ScenarioError(f"{self._where}: write [[{key}]], not {key}")
        for number, values in enumerate(found):
            where = f"{self._where}: {key}[{number}]"
            yield _Table(values, where), where

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def end(self, known: Sequence[str]) -> None:
        if self._left:
            raise ScenarioError(f"{self._where}: unknown key {next(iter(self._left))!r} (known: {', '.join(known)})")


def names() -> list[str]:
    """Of the scenarios that come with this package."""
    files = resources.files(__package__).joinpath("scenarios").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def load(name: str) -> Scenario:
    """One that comes with this package, by its name, or one in a file, by a path with a slash or a suffix.

    Raises:
        ScenarioError: there is none, or it is wrong.
    """
    if "/" in name or name.endswith(".toml"):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ScenarioError(f"{name}: {error}") from error
        return parse(text, Path(name).stem)
    if name not in names():
        raise ScenarioError(f"no scenario {name!r}: {', '.join(names())}, or the path of a file (./{name}.toml)")
    return parse(resources.files(__package__).joinpath("scenarios", f"{name}.toml").read_text(encoding="utf-8"), name)


def parse(text: str, name: str) -> Scenario:
    """Read a scenario's TOML. ScenarioError: it is wrong; the text names the key."""
    try:
        table = _Table(tomllib.loads(text), name)
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError(f"{name}: no TOML: {error}") from error
    description = table.take("description", _text, "")
    seed = table.take("seed", _seed, 1)
    routers = [_router(*one) for one in table.tables("router")] or [Router("internet")]
    kinds = [_hosts(*one, routers[0].name) for one in table.tables("host")]
    links = [_link(*one) for one in table.tables("link")]
    table.end(("description", "seed", "host", "router", "link"))
    hosts = tuple(host for kind in kinds for host in kind)
    made = Scenario(
        name, description, seed, hosts, tuple(routers), tuple(links), tuple(len(kind) for kind in kinds)
    )  # fmt: skip
    _check(made)
    return made


def _check(scenario: Scenario) -> None:
    """What no table can know by itself."""
    where = scenario.name
    if not 2 <= len(scenario.hosts) <= HOSTS_MAX:
        raise ScenarioError(f"{where}: {len(scenario.hosts)} hosts: a scenario has 2 to {HOSTS_MAX}")
    routers = {router.name for router in scenario.routers}
    called = [host.name for host in scenario.hosts]
    for name in called:
        if called.count(name) > 1:
            raise ScenarioError(f"{where}: two hosts are called {name!r}")
    if len(routers) < len(scenario.routers):
        raise ScenarioError(f"{where}: two routers have one name")
    for host in scenario.hosts:
        if host.router not in routers:
            raise ScenarioError(f"{where}: host {host.name!r} hangs on {host.router!r}, which is no router")
    for link in scenario.links:
        for end in link.between:
            if end not in routers:
                raise ScenarioError(f"{where}: a link ends at {end!r}, which is no router")
    for lan in sorted({host.lan for host in scenario.hosts if host.lan}):
        _check_lan(scenario, lan)
    if len(scenario.sites) < 2:
        raise ScenarioError(f"{where}: all hosts are in one LAN, so no line is used")
    used = sorted({host.router for host in scenario.hosts})
    for start, end in itertools.pairwise(used):
        scenario._way(start, end)


def _check_lan(scenario: Scenario, lan: str) -> None:
    where = f"{scenario.name}: lan {lan!r}"
    first, *others = [host for host in scenario.hosts if host.lan == lan]
    if not first.nat.translates:
        raise ScenarioError(f"{where}: behind which kind of nat? ({first.nat} has no LAN: its address is public)")
    if lan in {host.name for host in scenario.hosts}:
        raise ScenarioError(f"{where}: a host has that name")
    for host in others:
        if replace(host, name=first.name, ipv6=first.ipv6) != first:
            raise ScenarioError(f"{where}: {first.name!r} and {host.name!r} have one router and line, but differ")


def _line(table: _Table, *keys: str) -> Line:
    """The first of these rates that is there, and `queue`, which stays for another line."""
    rate: int | None = None
    for key in keys:
        rate = table.take(key, units.rate_bps, rate)
    return Line(rate)


def _queued(line: Line, text: object) -> Line:
    return replace(line, queue_ns=units.queue_ns(text, line.rate)) if line.rate is not None else line


def _hosts(table: _Table, where: str, router: str) -> list[Host]:
    name, count = table.take("name", _name, "host"), table.take("count", _count, 1)
    if "rate" in table and ("up" in table or "down" in table):
        raise ScenarioError(f"{where}: either rate, or up and down")
    both = _line(table, "rate")
    up, down = (both, both) if both.rate is not None else (_line(table, "up"), _line(table, "down"))
    up, down = table.take("queue", lambda text: (_queued(up, text), _queued(down, text)), _default(up, down))
    host = Host(
        name, table.take("router", _name, router), up, down,
        table.take("delay", units.time_ns, 0), table.take("loss", units.share, 0.0),
        table.take("nat", _one_of(Nat), Nat.OPEN), table.take("lan", _name, ""),
        table.take("ipv6", _one_of(IPv6), IPv6.NONE),
    )  # fmt: skip
    if host.ipv6 is IPv6.ONLY and host.nat.translates:
        raise ScenarioError(f"{where}.ipv6: {host.nat} translates IPv4; without that it is a firewall")
    table.end(("name", "count", "rate", "up", "down", "queue", "delay", "loss", "router", "nat", "lan", "ipv6"))
    return [host] if count == 1 else [replace(host, name=one) for one in _names(name, count)]


def _default(up: Line, down: Line) -> tuple[Line, Line]:
    return _queued(up, QUEUE), _queued(down, QUEUE)


def _names(base: str, count: int) -> Iterator[str]:
    return (f"{base}{number}" for number in range(count))


def _router(table: _Table, where: str) -> Router:
    name = table.take("name", _name, "")
    if not name:
        raise ScenarioError(f"{where}: a router needs a name")
    cap = _line(table, "flow_cap")
    if cap.rate is None and "queue" in table:
        raise ScenarioError(f"{where}.queue: it stands in front of flow_cap, and there is none")
    made = Router(
        name, table.take("delay", units.time_ns, 0), table.take("loss", units.share, 0.0),
        table.take("queue", lambda text: _queued(cap, text), _queued(cap, QUEUE)),
    )  # fmt: skip
    table.end(("name", "delay", "loss", "flow_cap", "queue"))
    return made


def _link(table: _Table, where: str) -> Link:
    between = table.take("between", _pair, None)
    if between is None:
        raise ScenarioError(f"{where}: which routers is it between?")
    line = _line(table, "rate")
    made = Link(
        between, table.take("queue", lambda text: _queued(line, text), _queued(line, QUEUE)),
        table.take("delay", units.time_ns, 0), table.take("loss", units.share, 0.0),
    )  # fmt: skip
    table.end(("between", "rate", "queue", "delay", "loss"))
    return made


def _with_rate(host: Host, rate: int) -> Host:
    def changed(line: Line) -> Line:
        return Line(rate, line.queue_ns) if line.rate is not None else _queued(Line(rate), QUEUE)

    return replace(host, up=changed(host.up), down=changed(host.down))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ScenarioError(f"{value!r} is no text")
    return value


def _name(value: object) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ScenarioError(f"{value!r} is no name: small letters, digits, - and _, at most 32, a letter first")
    return value


def _integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ScenarioError(f"{value!r} is no whole number")
    return value


def _one_of(kind: type[K]) -> Callable[[object], K]:
    def read(value: object) -> K:
        if not isinstance(value, str) or value not in tuple(kind):
            raise ScenarioError(f"{value!r} is none of {', '.join(kind)}")
        return kind(value)

    return read


def _count(value: object) -> int:
    if not 1 <= _integer(value) <= HOSTS_MAX:
        raise ScenarioError(f"{value} is not 1 to {HOSTS_MAX}")
    return _integer(value)


def _seed(value: object) -> int:
    if not 0 <= _integer(value) < 1 << 63:
        raise ScenarioError(f"{value} is not 0 to 2**63-1")
    return _integer(value)


def _pair(value: object) -> tuple[str, str]:
    if not isinstance(value, list) or len(value) != 2 or value[0] == value[1]:
        raise ScenarioError(f"{value!r} is no pair of routers")
    return _name(value[0]), _name(value[1])
