"""Hostile senders at the master's port and at a peer's, and in the run: nobody else notices, and they are cut off."""

from __future__ import annotations

import os
import random
import resource
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Self

import pytest
from cluster import DEADLINE_S, Cluster, Peer, Process
from hostile import GROUPS, WRONG_FRAMES, Secrets, at_master, at_peer, frame, plain, replay, volley, wire, wrong_frame

from pyccl._proto import limits
from pyccl._proto.messages import MESSAGE_TYPES, PeerHello, Welcome

FRAMES: Final = 10_000 if os.environ.get("PYCCL_TEST_LONG") else 5_000  # at each of the two ports
GROWTH_BYTES_MAX: Final = 400 * FRAMES // 2  # of the resident memory, in the second half: less than a record each
PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


def rss_bytes(process: Process) -> int:
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * PAGE_BYTES


def open_files(process: Process) -> int:
    return len(os.listdir(f"/proc/{process.pid}/fd"))


def told_of(process: Process, word: str) -> int:
    """Lines of its log with the word in it."""
    return sum(word in line for line in process.log())


def eventually(what: str, reached: Any) -> None:
    until = time.monotonic() + DEADLINE_S
    while not reached():
        assert time.monotonic() < until, what
        time.sleep(0.05)


class Traffic:
    """Checked all-reduces of all peers, one after the other in a thread, as long as the block lasts."""

    def __init__(self, cluster: Cluster, peers: Sequence[Peer]) -> None:
        self._cluster, self._peers = cluster, peers
        self._wanted = True
        self._error: BaseException | None = None
        self.epochs: set[int] = set()
        self.attempts: set[int] = set()
        self.count = 0

    def _run(self) -> None:
        rng = random.Random(self._cluster.seed)
        try:
            while self._wanted:
                seed, count = rng.getrandbits(32), rng.choice([100, 3000, 300_000])
                calls = [p.call("all_reduce", thread="traffic", seed=seed, count=count, tag=9) for p in self._peers]
                values = [call.value() for call in calls]
                info = self._cluster.check(values, seed, count)
                assert info["world_size"] == len(self._peers)
                self.epochs.add(info["epoch"])
                self.attempts.update(value["info"]["attempts"] for value in values)
                self.count += 1
        except BaseException as e:  # noqa: BLE001  the test raises it
            self._error = e

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._wanted = False
        self._thread.join()
        if self._error is not None:
            raise self._error


def undisturbed(traffic: Traffic, epoch: int) -> None:
    assert traffic.count > 5
    assert traffic.epochs == {epoch} and traffic.attempts == {1}


def synchronised(peers: Sequence[Peer], odd: Peer, digest: str) -> None:
    """One differs in two chunks of three, and gets what the others have."""
    for at in (5, 1 << 20):
        odd.ask("poke", name="w", at=at, value=1)
        odd.ask("poke", name="w", at=at + 1, value=254)
    infos = [call.value() for call in [peer.call("sync", thread="sync") for peer in peers]]
    assert {info["state"]["digest"] for info in infos} == {digest}


def settled(cluster: Cluster, files: dict[Process, int]) -> None:
    """Until nothing of the hostile is left: no descriptor, no member, no newcomer."""

    def clean() -> bool:
        groups = cluster.master.status()["groups"]
        return not any(g["pending"] or (g["members"] and g["group"] in GROUPS) for g in groups)

    eventually("hostile peers stay in the master's records", clean)
    for process, before in files.items():
        eventually(f"{process.name} keeps descriptors", lambda p=process, n=before: open_files(p) <= n)


def test_thousands_of_hostile_frames_at_each_port_disturb_nobody_and_are_all_cut_off(
    cluster: Cluster, seed: int
) -> None:
    peers = cluster.members(3)
    target = peers[0]
    for peer in peers:
        peer.ask("state", arrays={"w": {"seed": 1, "index": 0, "count": 700_000, "dtype": "float32"}}, revision=1)
    (digest,) = {call.value()["state"]["digest"] for call in [peer.call("sync") for peer in peers]}
    known, address = Secrets.told(target.ask("secrets")), target.ask("secrets")["address"]
    files: dict[Process, int] = {process: open_files(process) for process in (cluster.master, target)}
    rng = random.Random(seed)
    rss: list[tuple[int, int]] = []
    last = 0
    for _ in range(2):
        with Traffic(cluster, peers) as traffic:
            for part in range(2):  # control and data ports in turns, so that both go on beside everything
                for at, where in ((at_master, cluster.master.address), (at_peer, address)):
                    shots = at(known, rng, FRAMES // 4)
                    last += sum(shot.to_the_last for shot in shots)
                    assert volley(where, shots) == len(shots)
                synchronised(peers, peers[1 + part], digest)
        undisturbed(traffic, known.epoch.number)
        settled(cluster, files)
        rss.append((rss_bytes(cluster.master), rss_bytes(target)))  # with nothing on its way
    assert 0.4 < last / (2 * FRAMES) < 0.7, "about half are right up to the last field"
    for name, before, after in zip(("master", "peer"), *rss, strict=True):
        print(f"{name}: {before} bytes after the first half, {after} after the second")
        assert after - before < GROWTH_BYTES_MAX, f"the {name} grew by {after - before} bytes"
    assert len(cluster.master.log()) < FRAMES
    told = cluster.master.status()
    assert [len(g["members"]) for g in told["groups"] if g["group"] == 0] == [3]
    for call in [peer.call("update_topology") for peer in peers]:
        call.value()
    cluster.reduce(peers)


# ---- floods


@contextmanager
def flood(address: str, greetings: Sequence[bytes]) -> Iterator[list[socket.socket]]:
    """A connection for each of these first bytes; none says more, all are kept open."""
    host, port = address.rsplit(":", 1)
    with ExitStack() as stack:
        conns = []
        for greeting in greetings:
            conn = stack.enter_context(socket.create_connection((host, int(port)), timeout=DEADLINE_S))
            with suppress(ConnectionError):  # it may have had to make room already
                conn.sendall(greeting)
            conns.append(conn)
        yield conns


def all_cut_off(conns: Sequence[socket.socket]) -> None:
    for conn in conns:
        with suppress(ConnectionResetError):
            while conn.recv(1 << 16):
                pass


def early(known: Secrets, rng: random.Random) -> bytes:
    """The greeting of somebody whom the master may yet name: the peer waits for that."""
    return wire(
        plain(
            PeerHello(
                *(limits.PROTOCOL_VERSION, known.run, rng.randbytes(16), rng.randbytes(16)),
                *(known.me.peer, known.me.incarnation),
            )
        )
    )


@pytest.fixture
def descriptors() -> Iterator[None]:
    """As many as the system allows us."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("descriptors")
def test_two_thousand_connections_that_say_nothing_keep_nobody_out(cluster: Cluster, seed: int) -> None:
    rng = random.Random(seed)
    peers = cluster.members(2)
    known, address = Secrets.told(peers[0].ask("secrets")), peers[0].ask("secrets")["address"]
    files: dict[Process, int] = {process: open_files(process) for process in (cluster.master, peers[0])}
    halves = [b"", b"\0", b"\0\0\0\x40", b"\0\0\0\x40\x98\x01"]
    (newcomer,) = cluster.spawn(1)
    cluster.make([newcomer])
    at_control = [rng.choice(halves) for _ in range(2000)]
    at_data = [*(rng.choice(halves) for _ in range(1700)), *(early(known, rng) for _ in range(300))]
    with flood(cluster.master.address, at_control) as control, flood(address, at_data) as data:
        assert open_files(cluster.master) - files[cluster.master] < 300
        assert open_files(peers[0]) - files[peers[0]] < 400
        epoch = cluster.reduce(peers)["epoch"]
        cluster.admit(peers, [newcomer])
        assert cluster.reduce([*peers, newcomer])["epoch"] == epoch + 1
        all_cut_off([*control, *data])
    newcomer.ask("close")
    settled(cluster, files)


@pytest.mark.parametrize("where", ["master", "peer"])
def test_without_descriptors_for_more_connections_the_run_goes_on(cluster: Cluster, where: str) -> None:
    """Accepting fails, is tried again, and neither ends the process nor fills its log."""
    peers = cluster.members(2)
    victim, address = cluster.master, cluster.master.address
    if where == "peer":
        victim, address = peers[0], peers[0].ask("secrets")["address"]
    cluster.reduce(peers)  # whatever is imported late is imported now
    before = resource.prlimit(victim.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(victim.pid, resource.RLIMIT_NOFILE, (open_files(victim) + 8, before[1]))
    started = time.monotonic()
    with Traffic(cluster, peers) as traffic, flood(address, [b"\0"] * 40):
        eventually("accept never failed", lambda: told_of(victim, "EMFILE") > 0)
        count = traffic.count
        eventually("the run stands still", lambda: traffic.count > count + 5)
        resource.prlimit(victim.pid, resource.RLIMIT_NOFILE, before)
    assert told_of(victim, "EMFILE") <= 20 * (time.monotonic() - started) + 20, "it spins"
    assert len(traffic.epochs) == 1
    newcomer = cluster.spawn(1)
    cluster.make(newcomer)
    cluster.admit(peers, newcomer)
    cluster.reduce([*peers, *newcomer])


# ---- from inside


def test_stolen_greetings_of_members_disturb_no_operation(cluster: Cluster, seed: int) -> None:
    """A connection that a member's greeting opened sends what no member may: the link starts anew, nobody goes."""
    peers = cluster.members(3)
    target, *others = peers
    known, address = Secrets.told(target.ask("secrets")), target.ask("secrets")["address"]
    rng = random.Random(seed)
    with Traffic(cluster, peers) as traffic:
        for what in rng.sample(list(WRONG_FRAMES), 6):
            volley(address, [replay(known, rng, what)])
            count = traffic.count
            eventually("the links do not come back", lambda n=count: traffic.count > n + 1)
    undisturbed(traffic, known.epoch.number)
    # what a thief put into a member's window of early pieces takes no room from the member
    volley(address, [replay(known, rng, "early DATA without end")])
    number = cluster.rng.getrandbits(32)
    for peer in others:
        peer.ask("submit", name="x", seed=number, count=2_000_000)
        peer.call("wait", name="x", timeout=0.2).error("DeadlineError")
    target.ask("submit", name="x", seed=number, count=2_000_000)
    info = cluster.check([peer.ask("wait", name="x") for peer in peers], number, 2_000_000)
    assert (info["epoch"], info["world_size"]) == (known.epoch.number, 3)
    cluster.agree(peers)


@pytest.mark.parametrize("what", WRONG_FRAMES)
def test_a_member_that_breaks_the_protocol_once_is_linked_again(cluster: Cluster, seed: int, what: str) -> None:
    peers = cluster.members(3)
    odd = peers[2]
    known = Secrets.told(odd.ask("secrets"))
    data = wrong_frame(what, known.epoch, random.Random(seed))
    number = cluster.rng.getrandbits(32)
    for peer in peers[:2]:
        peer.ask("submit", name="x", seed=number, count=300_000)
    assert odd.ask("inject", what="peers", data=data.hex()) >= 2  # a new link may be there before all have been met
    odd.ask("submit", name="x", seed=number, count=300_000)
    info = cluster.check([peer.ask("wait", name="x") for peer in peers], number, 300_000)
    assert (info["epoch"], info["world_size"]) == (known.epoch.number, 3)
    cluster.agree(peers)


def test_a_member_that_breaks_the_protocol_again_and_again_is_evicted(cluster: Cluster, seed: int) -> None:
    """Each new connection of it starts with garbage; the others are held up for peer_timeout and a moment."""
    peers = cluster.members(4)
    *rest, odd = peers
    number = cluster.rng.getrandbits(32)
    for peer in rest:
        peer.ask("submit", name="x", seed=number, count=300_000)
    odd.ask("submit", name="x", seed=number, count=300_000, tag=1)  # it waits too, for what nobody calls
    noise = random.Random(seed).randbytes(64).hex()
    forever = odd.call("inject", thread="hostile", what="peers", data=noise, forever=True)
    info = cluster.check([peer.ask("wait", name="x") for peer in rest], number, 300_000)
    assert info["members"] == sorted(peer.id for peer in rest)
    assert forever.value() > 3
    assert odd.call("wait", name="x").error("EvictedError")["restored"]
    assert cluster.reduce(rest)["world_size"] == 3
    cluster.agree(rest)
    cluster.admit(rest, [odd])  # as a newcomer, which nobody holds its past against
    cluster.reduce(peers)


def test_asks_for_state_that_is_not_there_are_answered_and_no_offence(cluster: Cluster, seed: int) -> None:
    peers = cluster.members(3)
    for peer in peers:
        peer.ask("state", arrays={"w": {"seed": 1, "index": 0, "count": 700_000, "dtype": "float32"}}, revision=1)
    known, rng = Secrets.told(peers[2].ask("secrets")), random.Random(seed)
    asks = b""
    for _ in range(100):
        offset = rng.choice([0, 1 << 20, (1 << 64) - 1])
        asks += frame(known.epoch, type=9, seq=rng.getrandbits(64), offset=offset, value=1 << 20)
    assert peers[2].ask("inject", what="peers", data=asks.hex()) == 2
    assert cluster.reduce(peers)["epoch"] == known.epoch.number
    assert all(call.value()["changed"] == [] for call in [peer.call("sync") for peer in peers])
    assert not any("peer_suspected" in line for peer in peers for line in peer.log())


def test_a_member_that_talks_nonsense_to_the_master_loses_that_connection_and_no_more(
    cluster: Cluster, seed: int
) -> None:
    peers = cluster.members(3)
    epoch = cluster.reduce(peers)["epoch"]
    known, rng = Secrets.told(peers[1].ask("secrets")), random.Random(seed)
    its_own = {f"{cls.__name__} first" for cls in MESSAGE_TYPES.values() if cls.TYPE < Welcome.TYPE}  # may be sense
    shots = (shot for shot in at_master(known, rng, 400) if shot.name not in its_own)
    whole = (shot for shot in shots if not shot.name.startswith(("cut short", "pulse")))
    for times in range(1, 6):
        peers[1].ask("inject", what="master", data=next(whole).data.hex())
        eventually("it does not come back", lambda n=times: told_of(cluster.master, "peer_resumed") >= n)
        assert cluster.reduce(peers)["epoch"] == epoch
    for call in [peer.call("update_topology") for peer in peers]:
        call.value()
    assert cluster.reduce(peers)["epoch"] == epoch + 1
    assert told_of(cluster.master, "connection_ended") + told_of(cluster.master, "connection_refused") >= 5
