"""Peers behind routers meet: by which way, and what happens when that goes. As root, in labs with real nftables NAT.

Runs are secure unless a test says otherwise.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pytest

from pyccl.netlab import Lab, parse

LACKING = [tool for tool in ("nft", "miniupnpd") if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces and TUN devices need root"),
    pytest.mark.skipif(bool(LACKING), reason=f"no {' and no '.join(LACKING)}: apt-get install nftables miniupnpd"),
]

TRIES = 2000  # of collectives until something has come about; each takes a round trip and more
PEER = Path(__file__).with_name("reach_peer.py")
MASTER = "pyccl.cli.master"
PEER_TIMEOUT = "5"
RELAYS = "--relay"
PORT = 48148


class Process:
    def __init__(self, lab: Lab, host: str, argv: Sequence[str], log: Path, identity: Path) -> None:
        self.log = log
        with log.open("w") as file:
            command = [sys.executable, "-P", *argv]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": file}
            self._process = lab.start(host, command, {"PYCCL_IDENTITY": str(identity)}, text=True, **pipes)

    @property
    def _out(self) -> IO[str]:
        assert self._process.stdout is not None
        return self._process.stdout

    def line(self) -> str:
        line = self._out.readline()
        assert line, "the process has ended: see its log"
        return str(line).strip()

    def until(self, pattern: str) -> re.Match[str]:
        while True:
            if found := re.search(pattern, self.line()):
                return found

    def say(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class Peer(Process):
    def has_answered(self) -> bool:
        return bool(select.select([self._out], [], [], 0)[0])

    def ask(self, word: str) -> Any:
        self.say(word)
        return json.loads(self.line())


class Town:
    """A lab with a master on the host `master`. Each host has an identity of its own."""

    def __init__(self, lab: Lab, logs: Path) -> None:
        self.lab, self._logs = lab, logs
        self._processes: list[Process] = []
        self._secure = True
        self.address = ""

    def close(self) -> None:
        for process in self._processes:
            process.close()

    def start(self, host: str, *argv: str, kind: type[Process] = Process) -> Any:
        log = self._logs / f"{len(self._processes) + 1}-{host}.log"
        self._processes.append(kind(self.lab, host, argv, log, self._logs / f"identity-{host}.pem"))
        return self._processes[-1]

    def master(self, *options: str, secure: bool = True, listen: str = "") -> None:
        self._secure = secure
        listen = listen or f"{self.lab.own('master').ipv4}:{PORT}"
        where = ("--listen", listen, "--no-journal", "--peer-timeout", PEER_TIMEOUT)
        plain = () if secure else ("--insecure",)
        self.start("master", "-m", MASTER, *where, *plain, *options).until(r"listening on (.*)")
        self.address = self.at(self.lab.own("master").ipv4)

    def at(self, host: str) -> str:
        """The master, as peers know it that reach it there: its address, or an invite to it."""
        address = f"[{host}]:{PORT}" if ":" in host else f"{host}:{PORT}"
        if not self._secure:
            return address
        return str(self.start("master", "-m", MASTER, "invite", "--master", address).line())

    def relay(self, host: str) -> tuple[Process, str]:
        """A pyccl-peer that relays, and its id."""
        directory = self._logs / f"state-{len(self._processes)}"
        started = self.start(host, "-m", "pyccl.cli.peer", self.address, "--dir", str(directory), "--relay")
        return started, started.until(r"observing run \w+ as (\w+)")[1]

    def peer(self, host: str, address: str = "", **keywords: Any) -> Peer:
        started: Peer = self.start(host, str(PEER), address or self.address, json.dumps(keywords), kind=Peer)
        return started

    def doctor(self, host: str) -> dict[str, Any]:
        """Its findings by name."""
        told = json.loads(self.start(host, "-m", "pyccl", "doctor", self.address, "--json", "--no-port-mapping").line())
        return {finding["name"]: finding for finding in told["findings"]}


@pytest.fixture
def town(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """town(hosts...): a lab; each host is a name and more keys."""

    @contextlib.contextmanager
    def make(*hosts: str) -> Iterator[Town]:
        tables = [f"[[host]]\nname = '{name}'\n{keys}\n" for name, _, keys in (host.partition(" ") for host in hosts)]
        with Lab(parse("".join(tables), "reach")) as lab:
            made = Town(lab, tmp_path)
            with contextlib.closing(made):
                yield made

    yield make
    for log in sorted(tmp_path.glob("*.log")):
        print(f"---- {log.name}\n{log.read_text()[-4000:]}")


def admit(*peers: Peer) -> None:
    """All are members of one epoch, and reduce rightly."""
    assert peers[0].ask("connect") is None
    join(*peers)


def join(*peers: Peer, members: int = 1) -> None:
    """The first so many are members; now all are."""
    for joining in peers[members:]:
        joining.say("connect")
    together(peers[:members], lambda: peers[0].ask("world") == len(peers), "admit")
    for joining in peers[members:]:
        assert json.loads(joining.line()) is None
    assert [peer.ask("world") for peer in peers] == [len(peers)] * len(peers)
    reduce(*peers)


def together(peers: Sequence[Peer], done: Callable[[], bool], word: str) -> None:
    """All call it, again and again, until it is done."""
    for _ in range(TRIES):
        if done():
            return
        for peer in peers:
            peer.say(word)
        answers = [json.loads(peer.line()) for peer in peers]
        assert all(answer in (None, True) for answer in answers), answers
    raise AssertionError("it has not come about")


def reduce(*peers: Peer) -> None:
    for peer in peers:
        peer.say("reduce")
    assert [json.loads(peer.line()) for peer in peers] == [True] * len(peers)


def paths(*peers: Peer) -> set[str]:
    """Of all links, as both ends see them."""
    return {link[0] for peer in peers for link in peer.ask("peers")}


def nat(name: str, kind: str, *keys: str) -> str:
    return f"{name} nat = '{kind}'\n" + "\n".join(keys)


def test_two_behind_routers_that_filter_are_punched_and_get_all_connections(town: Callable[..., Any]) -> None:
    with town("master", nat("a", "port_restricted"), nat("b", "double")) as made:
        made.master()
        a, b = made.peer("a"), made.peer("b")
        admit(a, b)
        together((a, b), lambda: all(p.ask("peers")[0][2] == 8 for p in (a, b)), "reduce")
        assert paths(a, b) == {"punched"}


def test_who_has_an_observed_address_that_all_may_use_is_dialed_there(town: Callable[..., Any]) -> None:
    with town("master", nat("a", "full_cone"), nat("b", "symmetric")) as made:
        made.master()
        a, b = made.peer("a"), made.peer("b")
        admit(a, b)
        together((a, b), lambda: paths(a, b) == {"direct"}, "reduce")


def test_a_router_that_forwards_on_request_makes_its_peer_reachable(town: Callable[..., Any]) -> None:
    with town("master", nat("a", "upnp"), nat("b", "symmetric")) as made:
        made.master(RELAYS)
        a, b = made.peer("a"), made.peer("b")
        assert a.ask("connect") is None
        together((a,), lambda: "portmap_opened" in a.log.read_text(), "admit")  # else b may only call it as it is seen
        join(a, b)
        together((a, b), lambda: paths(a, b) == {"mapped"}, "reduce")


def test_two_of_one_lan_meet_inside(town: Callable[..., Any]) -> None:
    home = ("lan = 'home'",)
    with town("master", nat("a", "symmetric", *home), nat("b", "symmetric", *home)) as made:
        made.master(secure=False)
        a, b = made.peer("a"), made.peer("b")
        admit(a, b)
        assert paths(a, b) == {"direct"}
        for peer in (a, b):
            assert peer.log.read_text().count("insecure master=") == 1


def test_what_can_not_be_punched_goes_through_the_master(town: Callable[..., Any]) -> None:
    with town("master", nat("a", "symmetric"), nat("b", "symmetric")) as made:
        made.master(RELAYS, secure=False)
        a, b = made.peer("a"), made.peer("b")
        admit(a, b)
        assert {tuple(p.ask("peers")[0][:2]) for p in (a, b)} == {("relayed", None)}


def test_a_relay_that_dies_is_replaced_by_another(town: Callable[..., Any]) -> None:
    with town("master", "one", "other", nat("a", "symmetric"), nat("b", "symmetric")) as made:
        made.master()
        relays = dict([made.relay("one")[::-1], made.relay("other")[::-1]])
        a, b = made.peer("a"), made.peer("b")
        admit(a, b)
        ((path, used, _),) = a.ask("peers")
        assert path == "relayed" and used in relays
        relays.pop(used).kill()
        (left,) = relays
        reduce(a, b)
        for end in (a, b):
            assert end.ask("peers")[0][:2] == ["relayed", left]


def test_who_wants_no_relay_is_not_admitted_and_told_of_whom_it_lacks(town: Callable[..., Any]) -> None:
    with town("master", nat("a", "symmetric"), nat("b", "port_restricted")) as made:
        made.master(RELAYS)
        a, b = made.peer("a"), made.peer("b", relay="never")
        assert a.ask("connect") is None
        b.say("connect")
        together((a,), b.has_answered, "admit")
        answer = json.loads(b.line())
        assert answer["error"] == "RejectedError" and "could not reach" in answer["text"], answer


def test_a_run_goes_on_when_an_address_changes(town: Callable[..., Any]) -> None:
    with town("master", nat("a", "port_restricted"), nat("b", "port_restricted")) as made:
        made.master(RELAYS, secure=False)
        a, b = made.peer("a"), made.peer("b")
        admit(a, b)
        made.lab.change_address("b")
        reduce(a, b)
        reduce(a, b)
        assert [peer.ask("world") for peer in (a, b)] == [2, 2]


def test_a_peer_that_knows_the_master_at_loopback_is_reached_by_others(town: Callable[..., Any]) -> None:
    with town("master", nat("a", "symmetric")) as made:
        made.master(listen=f"0.0.0.0:{PORT}")
        local, remote = made.peer("master", made.at("127.0.0.1")), made.peer("a")
        admit(local, remote)
        assert paths(local, remote) == {"direct"}


def test_peers_of_either_protocol_and_of_both_are_in_one_run(town: Callable[..., Any]) -> None:
    """Who shares none with another reaches it through a relay that has both."""
    with town("master ipv6 = 'dual'", "both ipv6 = 'dual'", "six ipv6 = 'only'", "four") as made:
        made.master(RELAYS, listen=f"[::]:{PORT}")
        own = made.lab.own("master")
        of4, of6 = made.at(own.ipv4), made.at(own.ipv6)
        peers = [made.peer(*at) for at in (("both", of4), ("six", of6), ("four", of4))]
        admit(*peers[:2])
        join(*peers, members=2)
        ids = [peer.ask("id") for peer in peers]
        to = [peer.ask("paths") for peer in peers]
        assert to == [
            {ids[1]: "direct", ids[2]: "direct"},
            {ids[0]: "direct", ids[2]: "relayed"},
            {ids[0]: "direct", ids[1]: "relayed"},
        ]


def test_the_doctor_is_told_by_master_and_members_whether_it_is_reached(town: Callable[..., Any]) -> None:
    with town("master", "member", "open", nat("closed", "port_restricted")) as made:
        made.master()
        member = made.peer("member")
        assert member.ask("connect") is None
        peer = member.ask("id")
        told = {host: made.doctor(host) for host in ("open", "closed")}
        assert told["open"]["reachability"]["data"]["reached"]
        assert told["open"]["reached by peers"]["data"]["tried"] == {peer: ""}
        assert told["open"]["reached by peers"]["level"] == "ok"
        assert not told["closed"]["reachability"]["data"]["reached"]
        tried = told["closed"]["reached by peers"]["data"]["tried"]
        assert list(tried) == [peer] and tried[peer]
        assert told["closed"]["reached by peers"]["level"] == told["closed"]["reachability"]["level"] == "warning"
        assert all(found["bandwidth"]["data"]["up"]["bits_per_s"] > 0 for found in told.values())
