"""pyccl-peer: it holds the state, takes part in nothing, and is asked when nobody else is left that holds it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, Peer, Process
from states import give
from zygote import DEADLINE_S, Zygote

import pyccl
from pyccl._io import envelope
from pyccl._proto import limits
from pyccl._proto.messages import StateHello

MODEL: dict[str, dict[str, Any]] = {
    "w": {"seed": 1, "count": 700_000, "dtype": "float32", "index": 0},  # three chunks
    "half": {"seed": 2, "count": 33, "dtype": "float16", "shape": [3, 11], "index": 0},
    "rng": {"seed": 3, "count": 5, "dtype": "uint32"},  # each peer's own
}
OTHER: dict[str, dict[str, Any]] = {name: how | {"seed": 9} for name, how in MODEL.items()}


class Observer(Process):
    def __init__(self, zygote: Zygote, master: str, directory: Path, *options: str) -> None:
        self.address = ""
        super().__init__(zygote, "observer", ["peer", master, "--dir", str(directory), *options])
        self._lines: list[str] = []
        self._ended = False
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while line := self.read_line():
            with self._changed:
                self._lines.append(line.decode())
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def until(self, start: str) -> str:
        """The rest of the first line that starts so; lines up to it are taken."""

        def found() -> bool:
            return self._ended or any(line.startswith(start) for line in self._lines)

        with self._changed:
            assert self._changed.wait_for(found, DEADLINE_S), f"no line {start!r}: {self._lines}\n{''.join(self.log())}"
            while self._lines:
                line = self._lines.pop(0)
                if line.startswith(start):
                    return line.removeprefix(start).strip()
        raise AssertionError(f"it ended before it said {start!r}\n{''.join(self.log())}")

    def end(self) -> None:
        self._reader.join()
        super().end()


Start = Callable[..., Observer]


@pytest.fixture
def start(cluster: Cluster, tmp_path: Path) -> Start:
    """Observers of the cluster's master, in directories under tmp_path; ready when they are known to the master."""

    def started(*options: str, name: str = "kept") -> Observer:
        observer = Observer(cluster.zygote, cluster.master.address, tmp_path / name, *options)
        cluster.processes.append(observer)
        observer.address = observer.until("listening on ")
        observer.until("observing")
        return observer

    return started


def model(peers: Sequence[Peer], arrays: dict[str, dict[str, Any]], revision: int) -> None:
    give(peers, arrays, revision, allow_content_inequality=["rng"])


def agreed(peers: Sequence[Peer]) -> list[dict[str, Any]]:
    """A sync after which all hold the same, but for what is each peer's own."""
    infos = [call.value() for call in [peer.call("sync") for peer in peers]]
    assert len({info["state"]["digest"] for info in infos}) == 1
    return infos


def train(peers: Sequence[Peer], rounds: int = 1) -> None:
    for _ in range(rounds):
        for peer in peers:
            peer.ask("poke", name="w", at=4, value=peer.ask("told_state")["revision"] + 1)
            peer.ask("advance")
        agreed(peers)


def train_kept(observer: Observer, peers: Sequence[Peer], last: int) -> None:
    """From the state that they hold to revision `last`; each is kept before the next is made: of those that are made
    while the observer is busy it gets the newest."""
    first = agreed(peers)[0]["revision"]
    observer.until(f"kept revision {first}")
    for revision in range(first + 1, last + 1):
        followed(peers)
        train(peers)
        observer.until(f"kept revision {revision}")


def followed(peers: Sequence[Peer]) -> Peer:
    """The member from which the observer waits for states."""
    until = time.monotonic() + DEADLINE_S
    while True:
        for peer in peers:
            if peer.ask("followed"):
                return peer
        assert time.monotonic() < until, "nobody is followed"


def unfollowed(peers: Sequence[Peer]) -> None:
    until = time.monotonic() + DEADLINE_S
    while any(peer.ask("followed") for peer in peers):
        assert time.monotonic() < until, "the observer's end was not noticed"


def known(peers: Sequence[Peer]) -> None:
    """Until every member knows of an observer."""
    until = time.monotonic() + DEADLINE_S
    while not all(peer.ask("observers") for peer in peers):
        assert time.monotonic() < until, "no observer is known"


def left_alone(cluster: Cluster, start: Start, revision: int) -> tuple[Observer, str]:
    """An observer, and the digest of the state that it alone holds: its one member has left."""
    peers = cluster.members(1)
    model(peers, MODEL, revision)
    observer = start()
    followed(peers)
    agreed(peers)
    observer.until(f"kept revision {revision}")
    digest = str(peers[0].ask("digest"))
    peers[0].ask("close")
    return observer, digest


def come_back(cluster: Cluster, count: int) -> list[Peer]:
    """Peers of a new group that know of the observer and hold another state than it does."""
    peers = cluster.members(count)
    model(peers, OTHER, 0)
    known(peers)
    return peers


def files(directory: Path) -> list[int]:
    """Revisions."""
    return sorted(pyccl.SharedState.load(path).revision for path in directory.glob("state-*.safetensors"))


def restarted(cluster: Cluster) -> None:
    """Another master, which knows nothing of the run."""
    cluster.master.kill()
    cluster.restart_master("--journal", str(cluster.journal), "--new-run")


def test_it_keeps_what_the_members_agree_on_and_is_no_member(cluster: Cluster, start: Start, tmp_path: Path) -> None:
    peers = cluster.members(2)
    model(peers, MODEL, 0)
    observer = start()
    followed(peers)
    for revision in range(3):
        followed(peers)
        digest = agreed(peers)[0]["state"]["digest"]
        told, _, path = observer.until("kept revision ").partition(" ")
        kept = pyccl.SharedState.load(path)
        assert (int(told), kept.revision, kept.digest()) == (revision, revision, digest)
        for peer in peers:
            peer.ask("advance")
    cluster.agree(peers)  # and no third one
    cluster.reduce(peers)
    observer.signal(signal.SIGTERM)
    assert observer.wait() == 0 and files(tmp_path / "kept") == [0, 1, 2]
    cluster.reduce(peers)


def test_it_keeps_every_nth_revision_and_the_last_n(cluster: Cluster, start: Start, tmp_path: Path) -> None:
    peers = cluster.members(2)
    model(peers, MODEL, 0)
    observer = start("--every", "3", "--keep", "2")
    followed(peers)
    agreed(peers)
    observer.until("kept revision 0")
    for revision in (3, 6, 9):
        followed(peers)
        train(peers, 3)
        observer.until(f"kept revision {revision}")
    assert files(tmp_path / "kept") == [6, 9]


def test_the_last_revision_is_kept_though_it_was_made_while_an_earlier_one_was_on_its_way(
    cluster: Cluster, start: Start, tmp_path: Path
) -> None:
    peers = cluster.members(2)
    give(peers, {"w": {"seed": 1, "count": 8 << 20, "dtype": "uint8", "index": 0}}, 0)  # no socket holds it
    observer = start()
    followed(peers)
    observer.stop()
    for revision in range(4):
        digest = agreed(peers)[0]["state"]["digest"]
        if revision < 3:
            for peer in peers:
                peer.ask("advance")
    observer.resume()
    path = observer.until("kept revision 3 ")
    assert pyccl.SharedState.load(path).digest() == digest
    assert files(tmp_path / "kept")[-1] == 3 and len(files(tmp_path / "kept")) <= 2  # 0, which was on its way


def test_who_comes_back_when_all_are_gone_gets_the_state_from_it(cluster: Cluster, start: Start) -> None:
    peers = cluster.members(2)
    model(peers, MODEL, 0)
    observer = start()
    followed(peers)
    train_kept(observer, peers, 2)
    digest = peers[0].ask("digest")
    for peer in peers:
        peer.ask("close")
        peer.kill()
    back = cluster.members(2)
    model(back, OTHER, 0)
    before = [peer.ask("told_state")["arrays"]["rng"] for peer in back]
    infos = agreed(back)
    assert (infos[0]["revision"], infos[0]["state"]["digest"]) == (2, digest)
    assert all(sorted(info["changed"]) == ["half", "w"] for info in infos)
    assert all(info["rx_bytes"] > 0 for info in infos)  # of who took it from the observer, too
    assert [info["state"]["arrays"]["rng"] for info in infos] == before
    followed(back)
    train(back)
    observer.until("kept revision 3")


def test_a_state_that_can_not_be_had_fails_the_sync_on_all_and_the_next_one_has_it(
    cluster: Cluster, start: Start
) -> None:
    """Going on without it would leave the newest state behind for ever."""
    _, digest = left_alone(cluster, start, 5)
    back = cluster.members(2)
    model(back, OTHER, 0)
    for peer in back:
        peer.ask("break_next_offer")
    for call in [peer.call("sync") for peer in back]:
        error = call.error("PeerLostError")
        assert error["restored"] and "revision 5 could not be had" in error["text"]
    infos = agreed(back)
    assert (infos[0]["revision"], infos[0]["state"]["digest"]) == (5, digest)


def test_after_everything_was_lost_the_newest_whole_state_goes_on(
    cluster: Cluster, start: Start, tmp_path: Path
) -> None:
    """Two observers with states of different revisions, a peer with a file, a peer with nothing."""
    peers = cluster.members(2)
    model(peers, MODEL, 0)
    observer = start()
    followed(peers)
    peers[0].ask("save", path=str(tmp_path / "mine"))
    train_kept(observer, peers, 3)
    digest = peers[0].ask("digest")
    for process in (*peers, observer):
        process.kill()
    (tmp_path / "old").mkdir()
    (old,) = (tmp_path / "kept").glob(f"state-{1:020}-*")
    old.rename(tmp_path / "old" / old.name)
    restarted(cluster)
    start(name="old")
    start()
    back = cluster.members(2)
    back[0].ask("load", path=str(tmp_path / "mine"))
    model(back[1:], OTHER, 0)
    known(back)
    infos = agreed(back)
    assert (infos[0]["revision"], infos[0]["state"]["digest"]) == (3, digest)


def test_torn_files_are_set_aside_and_the_newest_whole_one_is_served(
    cluster: Cluster, start: Start, tmp_path: Path
) -> None:
    peers = cluster.members(1)
    model(peers, MODEL, 0)
    observer = start()
    followed(peers)
    train_kept(observer, peers, 0)
    digests = {0: peers[0].ask("digest")}
    for revision in (1, 2):
        followed(peers)
        train(peers)
        digests[revision] = peers[0].ask("digest")
        observer.until(f"kept revision {revision}")
    peers[0].ask("close")
    observer.kill()
    newest = max((tmp_path / "kept").glob("state-*.safetensors"))
    newest.write_bytes(newest.read_bytes()[: -(1 << 20)])
    (tmp_path / "kept" / ".incoming").write_bytes(b"torn")
    start()
    (back,) = come_back(cluster, 1)
    info = agreed([back])[0]
    assert (info["revision"], info["state"]["digest"]) == (1, digests[1])
    assert newest.with_name(newest.name + ".damaged").exists() and not newest.exists()


@pytest.mark.parametrize("how", ["altered", "shorter"])
def test_a_file_damaged_under_a_running_observer_fails_one_sync_and_is_set_aside(
    cluster: Cluster, start: Start, tmp_path: Path, how: str
) -> None:
    peers = cluster.members(1)
    model(peers, MODEL, 0)
    observer = start()
    followed(peers)
    train_kept(observer, peers, 1)
    digest = peers[0].ask("digest")
    followed(peers)
    train(peers)
    newest = Path(observer.until("kept revision 2 "))
    peers[0].ask("close")
    size = newest.stat().st_size
    with newest.open("r+b") as file:
        if how == "shorter":
            file.truncate(size - (1 << 20))
        else:
            file.seek(size // 2)
            file.write(bytes(64))
    (back,) = come_back(cluster, 1)
    error = back.call("sync").error("PeerLostError")
    assert "revision 2 could not be had" in error["text"]
    observer.until("holding revision 1 ")
    assert files(tmp_path / "kept") == [0, 1] and newest.with_name(newest.name + ".damaged").exists()
    info = agreed([back])[0]
    assert (info["revision"], info["state"]["digest"]) == (1, digest)
    followed([back])
    train([back])
    observer.until("kept revision 2 ")


def test_a_newest_file_that_somebody_removed_gives_way_to_the_next(
    cluster: Cluster, start: Start, tmp_path: Path
) -> None:
    peers = cluster.members(1)
    model(peers, MODEL, 50)
    observer = start()
    followed(peers)
    train_kept(observer, peers, 51)
    for process in (*peers, observer):
        process.kill()
    restarted(cluster)
    fresh = cluster.members(1)
    model(fresh, OTHER, 0)
    agreed(fresh)
    observer = start()
    followed(fresh)
    for path in (tmp_path / "kept").glob("state-*51-*"):
        path.unlink()
    train(fresh)
    observer.until("kept revision 1")
    followed(fresh)
    train(fresh)
    observer.until("kept revision 2")
    log = observer.log()
    assert sum("state_gone" in line for line in log) == 1 and not any("source_lost" in line for line in log)
    assert files(tmp_path / "kept") == [1, 2, 50]


def test_a_lone_stale_peer_takes_the_newer_state_and_overwrites_none(
    cluster: Cluster, start: Start, tmp_path: Path
) -> None:
    peers = cluster.members(2)
    model(peers, MODEL, 0)
    observer = start("--keep", "1")
    followed(peers)
    peers[0].ask("save", path=str(tmp_path / "stale"))
    train_kept(observer, peers, 4)
    digest = peers[0].ask("digest")
    for process in (*peers, observer):
        process.kill()
    restarted(cluster)
    (stale,) = cluster.members(1)
    stale.ask("load", path=str(tmp_path / "stale"))
    train([stale], 2)  # alone: the observer is not there
    start("--keep", "1")
    followed([stale])
    train([stale])
    told = stale.ask("told_state")
    assert (told["revision"], told["digest"]) == (4, digest)
    assert files(tmp_path / "kept") == [4]


def test_a_run_that_begins_anew_leaves_the_newest_state_alone(cluster: Cluster, start: Start, tmp_path: Path) -> None:
    """Its own states are kept beside it."""
    peers = cluster.members(1)
    model(peers, MODEL, 50)
    observer = start("--keep", "2")
    followed(peers)
    agreed(peers)
    observer.until("kept revision 50")
    for process in (*peers, observer):
        process.kill()
    restarted(cluster)
    fresh = cluster.members(2)
    model(fresh, OTHER, 0)
    agreed(fresh)  # nobody was there to ask: they are a run of their own from here on
    observer = start("--keep", "2")
    followed(fresh)
    for revision in (1, 2, 3):
        followed(fresh)
        train(fresh)
        observer.until(f"kept revision {revision}")
    assert files(tmp_path / "kept") == [2, 3, 50]


def test_it_outlives_the_master_and_its_own_death(cluster: Cluster, start: Start) -> None:
    peers = cluster.members(2)
    model(peers, MODEL, 0)
    observer = start()
    followed(peers)
    agreed(peers)
    observer.until("kept revision 0")
    followed(peers)
    cluster.master.kill()
    train(peers)
    observer.until("kept revision 1")  # while the master is away
    observer.wait_log("Connection refused")
    cluster.restart_master()
    observer.until("observing")
    observer.wait_log("master_back")
    told = [line for line in observer.log() if "master_away" in line]
    assert told and len(told) == len({line.partition(" cause=")[2] for line in told}), "each cause once"
    followed(peers)
    train(peers)
    observer.until("kept revision 2")
    observer.kill()
    unfollowed(peers)
    train(peers)
    observer = start()
    followed(peers)
    train(peers)
    observer.until("kept revision 4")


def test_a_source_that_serves_what_is_no_state_is_left_for_another(
    cluster: Cluster, start: Start, tmp_path: Path
) -> None:
    peers = cluster.members(2)
    model(peers, MODEL, 0)
    observer = start()
    liar = followed(peers)
    liar.ask("spoil_snapshots")
    agreed(peers)
    honest = next(peer for peer in peers if peer is not liar)
    assert followed([honest]) is honest
    train(peers)
    observer.until("kept revision 1")
    assert files(tmp_path / "kept") == [1]
    assert any("state_refused" in line and liar.id[:8] in line for line in observer.log())


def test_a_state_of_another_layout_is_not_taken(cluster: Cluster, start: Start) -> None:
    peers = cluster.members(1)
    model(peers, MODEL, 7)
    observer = start()
    followed(peers)
    agreed(peers)
    observer.until("kept revision 7")
    peers[0].ask("close")
    (back,) = cluster.members(1)
    model([back], {name: OTHER[name] for name in ("half", "rng")}, 0)
    assert agreed([back])[0]["revision"] == 0


def test_two_do_not_share_a_directory_and_a_wrong_address_is_told(
    cluster: Cluster, start: Start, tmp_path: Path
) -> None:
    cluster.members(1)
    start()
    other = Observer(cluster.zygote, cluster.master.address, tmp_path / "kept")
    cluster.processes.append(other)
    assert other.wait() == 4 and any("another process keeps states there" in line for line in other.log())
    wrong = Observer(cluster.zygote, "no port:at all", tmp_path / "wrong")
    cluster.processes.append(wrong)
    assert wrong.wait() == 2


def test_a_plain_sync_asks_no_observer_while_somebody_votes(cluster: Cluster, start: Start) -> None:
    peers = cluster.members(2)
    model(peers, MODEL, 3)
    observer = start()
    followed(peers)
    agreed(peers)
    observer.until("kept revision 3")
    (newcomer,) = cluster.spawn(1)
    cluster.make([newcomer])
    cluster.admit(peers, [newcomer])
    model([newcomer], OTHER, 0)
    known([newcomer])
    asked = sum("asked peer" in line for line in observer.log())
    assert agreed([*peers, newcomer])[0]["revision"] == 3
    assert sum("asked peer" in line for line in observer.log()) == asked


def test_a_flood_at_its_port_neither_fills_it_nor_keeps_out_who_needs_the_state(
    cluster: Cluster, start: Start
) -> None:
    """Two thousand connections: silent ones, halves of greetings, greetings for somebody else."""
    observer, digest = left_alone(cluster, start, 4)
    host, port = observer.address.rsplit(":", 1)
    before = len(os.listdir(f"/proc/{observer.pid}/fd"))
    greetings = [b"", b"\0", b"\0\0\0\x40\x98", *map(nobody, range(5))]
    with contextlib.ExitStack() as stack:
        for number in range(2000):
            conn = stack.enter_context(socket.create_connection((host, int(port)), timeout=DEADLINE_S))
            with contextlib.suppress(ConnectionError):  # it may have had to make room already
                conn.sendall(greetings[number % len(greetings)])
        assert len(os.listdir(f"/proc/{observer.pid}/fd")) - before < 300
        (back,) = come_back(cluster, 1)
        info = agreed([back])[0]
    assert (info["revision"], info["state"]["digest"]) == (4, digest)


def nobody(number: int) -> bytes:
    """A greeting for somebody else."""
    asker, target = (b"n" * 15 + bytes([number]), b"i" * 16), (b"t" * 16, b"t" * 16)
    return envelope.pack(StateHello(limits.PROTOCOL_VERSION, b"r" * 16, *asker, *target, 0, 0))


def test_all_trainers_killed_at_once_under_a_master_that_lives_and_the_state_comes_back(
    cluster: Cluster, start: Start
) -> None:
    """Nobody is evicted by hand: the master waits TOTAL_LOSS_S for them, then the newcomer founds the group anew."""
    peers = cluster.members(3)
    model(peers, MODEL, 0)
    observer = start()
    followed(peers)
    train_kept(observer, peers, 2)
    digest = peers[0].ask("digest")
    for peer in peers:
        peer.doom()
    for peer in peers:
        peer.wait()
    back = come_back(cluster, 2)
    infos = agreed(back)
    assert (infos[0]["revision"], infos[0]["state"]["digest"]) == (2, digest)
    followed(back)
    train(back)
    observer.until("kept revision 3")
