"""Saved states: observers beside the members, files that outlive their processes, and total losses.

Real: MasterMachine with its observers, what the members' machines are told of them, the election, and every decision
of `_proto/restoring.py`. Replaced, as `_io` carries them out: connections for state are a delay during which both must
live and reach each other, a file is a `File`, which is torn until it is durable. Faults come at any time; when a
group has gone back behind what an observer keeps; and when members have asked observers.

The checks know all files. Where nobody has a right to vote, which they count themselves, no sync may go on with less
than the newest whole file that some member of it could reach, nor with less than the newest state that was brought. No
observer may let go of the newest that it has, nor offer again what was found damaged.
"""

from __future__ import annotations

import random
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sim_engine import U64, Op
from sim_native import lib
from sim_options import Options
from sim_program import INTERNAL, Program, State, Steps
from sim_world import CLOSE, Conn, Process

from pyccl._proto import limits, restoring
from pyccl._proto.election import Elected, Record, elect
from pyccl._proto.epoch import Address, Member
from pyccl._proto.messages import Evicted, Heartbeat, Members, Observe, Rejected, Welcome

if TYPE_CHECKING:
    from sim_cluster import SimCluster
    from sim_peer import SimPeer

OBSERVER_INDEX: Final = 1000  # of the first; the others' are their own
KEEP: Final = 3
TRANSFER_S: Final = 0.4  # at most
WRITE_S: Final = 0.05  # at most, until a file is durable
OFFER_S: Final = 5.0  # as observed.py
LOOK_S: Final = 0.25
FILL_S: Final = 10.0
PEERS_FEW: Final = 3
BACK_S: Final = 15.0  # at most, until what was lost with everything else is back
LATE_S: Final = 25.0  # observers that come when the group has long gone on without them
SAVED_KINDS: Final = (
    *("all_killed", "everything_killed", "observer_crash", "observer_stop", "observer_cut"),
    *("torn_file", "damaged_file"),
)
USUAL_KINDS: Final = ("crash", "restart", "leave", "join", "stop", "silence", "uplink", "reset_control", "master_crash")
Call = Generator[Any, None, Any]


def draw_saved_options(seed: int) -> Options:
    rng = random.Random(f"saved {seed}")
    peers = rng.choice((4, 4, 5, 6))
    return Options(
        peers=peers,
        observers=rng.choice((1, 2, 3)),
        sync_s=rng.choice((0.001, 0.02, 0.5)),
        delay_s=rng.choice((0.001, 0.004, 0.03)),
        spike_rate=rng.choice((0.0, 0.02)),
        think_s=rng.choice((0.5, 1.0)),
        chaos_s=120.0,
        fault_rate=0.2,
        faults=(*SAVED_KINDS, "everything_killed", *USUAL_KINDS),
        peers_min=0,
        peers_max=peers + 2,
        faults_min=20,
        operations_min=200,
    )


@dataclass(eq=False)
class File:
    state: State
    written_ns: int
    whole: bool = False
    refused: bool = False  # fetched, and found damaged

    @property
    def revision(self) -> int:
        return self.state.revision


@dataclass(frozen=True)
class Offer:
    """What an observer has told a member."""

    observer: SimObserver
    file: File

    @property
    def revision(self) -> int:
        return self.file.revision

    @property
    def name(self) -> str:
        return self.observer.peer.hex()


@dataclass(eq=False)
class Place:
    """What outlives an observer's processes: its directory."""

    group: int
    files: list[File] = field(default_factory=list)
    process: SimObserver | None = None

    @property
    def newest_revision(self) -> int:
        """As the checks see it: of what is whole; -1: nothing."""
        return max((file.revision for file in self.files if file.whole), default=-1)


class SimObserver(Process):
    """As _io/observer.py."""

    def __init__(self, cluster: SimCluster, number: int, place: Place) -> None:
        super().__init__(cluster.world, f"observer {number}", OBSERVER_INDEX + number)
        rng = self.world.rng
        self.cluster, self.place = cluster, place
        self.peer, self.incarnation = rng.randbytes(16), rng.randbytes(16)
        self.address = Address("sim", OBSERVER_INDEX + number)
        self.kept = sorted((file for file in place.files if file.whole), key=lambda file: file.written_ns)
        self.have = self._last()
        self.every = rng.choice((1, 1, 3))
        self.members: tuple[Member, ...] = ()
        self.source: Member | None = None
        self.control: Conn | None = None
        self._sources = restoring.Sources()
        self._receiving = False
        self._waiting: tuple[Member, State] | None = None  # the newest that came meanwhile
        self._welcomed = False
        self.soon(rng.random(), self._tick)

    @property
    def newest(self) -> File | None:
        return restoring.newest(self.kept)

    def _last(self) -> int:
        return self.kept[-1].revision + 1 if self.kept else 0

    def fetched(self) -> None:
        """What it offers is read once more."""
        while (newest := self.newest) is not None and not newest.whole:
            self.world.note("%s sets revision %d aside", self.name, newest.revision)
            self.kept.remove(newest)
            self.place.files.remove(newest)
            self.have = self._last()

    def crash(self) -> None:
        self.world.note("%s crashes", self.name)
        self.alive = False
        if self.control is not None:
            self.control.close(self, lossy=True)

    # ---- the master

    def _tick(self) -> None:
        self.soon(self.cluster.options.peer_timeout / limits.HEARTBEATS_PER_TIMEOUT, self._tick)
        if self.control is None:
            self._dial()
        elif self._welcomed:
            self.control.send(self, Heartbeat())
        if self.source not in self.members or not self._reaches(self.source):
            self.source = self._sources.next(self.members, self.now_s)

    def _dial(self) -> None:
        master = self.cluster.master
        if not master.alive or self.world.apart(self, master):
            return
        self.control = Conn(self.world, (self, master), (self._hear, master.deliver), engine=False)
        self._welcomed = False
        master.accepted.append(self.control)
        observe = Observe(
            limits.PROTOCOL_VERSION, "sim", self.place.group, self.peer, self.incarnation, (self.address,)
        )
        self.control.send(self, observe)

    def _hear(self, conn: Conn, message: Any) -> bool:
        if conn is not self.control:
            return True
        if message is CLOSE:
            conn.close(self, lossy=False)
            self.control = None
        elif isinstance(message, Members):
            self.members = message.members
        elif isinstance(message, Welcome):
            self._welcomed = True
        elif isinstance(message, Rejected | Evicted):
            self.cluster.checks.fail(f"{self.name} is refused: {message}")
        return True

    # ---- following

    def _reaches(self, member: Member | None) -> SimPeer | None:
        if member is None:
            return None
        for peer in self.cluster.living():
            if peer.incarnation == member.incarnation and not peer.stopped and not self.world.apart(peer, self):
                return peer
        return None

    def published(self, peer: SimPeer, state: State) -> None:
        """A sync was committed at `peer`."""
        if self.source is None or self.source.incarnation != peer.incarnation or self.world.apart(peer, self):
            return
        if not restoring.wants(self.have, self.every, state.revision):
            return
        if self._receiving:
            self._waiting = self.source, state
        else:
            self._receive(self.source, state)

    def _receive(self, source: Member, state: State) -> None:
        self._receiving = True
        self.have = state.revision + 1
        self.soon(self.world.rng.random() * TRANSFER_S, self._received, source, state)

    def _received(self, source: Member, state: State) -> None:
        if self._reaches(source) is None:  # it ended on the way: what it waits with is gone, too
            self._receiving, self._waiting = False, None
            self.have = self._last()
            return
        file = File(state, self.world.now)
        self.place.files.append(file)
        self.soon(self.world.rng.random() * WRITE_S, self._durable, file)

    def _durable(self, file: File) -> None:
        file.whole = True
        self.kept.append(file)
        self.world.note("%s keeps revision %d", self.name, file.revision)
        most = max(one.revision for one in self.kept)
        for old in restoring.to_drop(self.kept, KEEP):
            self.kept.remove(old)
            self.place.files.remove(old)
        if most > max(one.revision for one in self.kept):
            self.cluster.checks.fail(f"{self.name} lets go of revision {most}, the newest that it has")
        if most > file.revision:
            assert self.cluster.saved is not None
            self.cluster.saved.went_back()
        self._receiving, waiting, self._waiting = False, self._waiting, None
        if waiting is not None:
            self._receive(*waiting)


class Saved:
    """Of one cluster: the observers, the files, what is lost at once, and the checks of all that."""

    def __init__(self, cluster: SimCluster) -> None:
        self.cluster, self.world = cluster, cluster.world
        self.places = [Place(cluster.rng.randrange(cluster.options.groups)) for _ in range(cluster.options.observers)]
        self.own: dict[bytes, State] = {}  # files that peers saved for themselves
        self.losses = self.restored = self.refounded = self.backs = self.refused = 0
        self.alone = 0  # revisions made by one that nobody else has agreed with
        for place in self.places:
            self.start(place)
        self.world.at(FILL_S, self._fill)

    def _fill(self) -> None:
        """Somebody comes where few are left: who was there before, or somebody new."""
        rng, cluster = self.world.rng, self.cluster
        self.world.at(FILL_S * rng.random(), self._fill)
        if cluster.chaos and cluster.peers and len(cluster.living()) < PEERS_FEW:
            cluster.come(rng.choice(cluster.peers) if rng.random() < 0.7 else None)

    def start(self, place: Place) -> None:
        if place.process is None or not place.process.alive:
            place.process = SimObserver(self.cluster, self.places.index(place), place)

    def observers(self) -> list[SimObserver]:
        return [place.process for place in self.places if place.process is not None and place.process.alive]

    # ---- faults

    def strike(self, kind: str, length_s: float) -> bool:
        rng, cluster = self.world.rng, self.cluster
        place = rng.choice(self.places)
        match kind:
            case "all_killed" | "everything_killed":
                self._lose(everything=kind == "everything_killed")
            case "observer_crash" if place.process is not None and place.process.alive:
                place.process.crash()
                self.world.at(rng.random() * BACK_S / 2, self.start, place)
            case "observer_stop" if place.process is not None and place.process.alive:
                place.process.stop()
                self.world.at(length_s * 3, place.process.resume)
            case "observer_cut" if place.process is not None and place.process.alive:
                self.world.cut(place.process, None, length_s * 3)
            case "torn_file" if place.process is not None and place.files:
                place.process.crash()
                rng.choice(place.files).whole = False
                self.world.at(rng.random() * BACK_S / 2, self.start, place)
            case "damaged_file" if place.process is not None and place.process.newest is not None:
                place.process.newest.whole = False  # and the process goes on
                if rng.random() < 0.5:
                    self._lose(everything=False)
            case _:
                return False
        cluster.world.note("fault of saved states: %s", kind)
        return True

    def _lose(self, *, everything: bool) -> None:
        rng, cluster = self.world.rng, self.cluster
        self.losses += 1
        gone = cluster.living()
        for peer in gone:
            peer.crash()
        for peer in rng.sample(gone, rng.randint(1, len(gone))) if gone else ():  # those with stale files may be first
            self.world.at(rng.random() * BACK_S, cluster.come, peer)
        if not everything:
            return
        cluster.crash_master(rng.random() * BACK_S / 2, journal_lost=rng.random() < 0.7)
        late = rng.random() < 0.5
        if late and rng.random() < 0.7:
            self.own.clear()  # and their disks: what they begin anew is far behind what the observers bring
        for place in self.places:
            if place.process is not None and place.process.alive:
                place.process.crash()
            self.world.at(rng.random() * BACK_S + late * LATE_S, self.start, place)

    def went_back(self) -> None:
        """The group is behind what an observer keeps: if it is lost now, that is what must come back."""
        self.backs += 1
        if self.cluster.chaos and self.world.rng.random() < 0.3:
            self.world.at(self.world.rng.random() * 2, self._lose_now)

    def asked(self, group: int) -> None:
        """Members know what observers offer, and take it only if nobody holds as much: who did is lost now."""
        cluster = self.cluster
        living = [peer for peer in cluster.living() if peer.group == group]
        if cluster.chaos and len(living) > 1 and self.world.rng.random() < 0.15:
            lost = max(living, key=lambda peer: cluster.programs[peer.index].state.revision)
            self.world.note("fault of saved states: who brought the newest crashes")
            lost.crash()
            self.world.at(self.world.rng.random() * BACK_S, cluster.come, lost)

    def _lose_now(self) -> None:
        if self.cluster.chaos:
            self._lose(everything=False)

    def serves(self, observer: SimObserver, peer: SimPeer) -> bool:
        """It is there, and the master has told it of the peer."""
        knows = peer.incarnation in {member.incarnation for member in observer.members}
        return knows and observer.alive and not observer.stopped and not self.world.apart(peer, observer)

    def newest_of(self, observers: set[bytes], peer: SimPeer) -> int:
        """The newest revision that these incarnations could give it now."""
        there = [one for one in self.observers() if one.incarnation in observers and self.serves(one, peer)]
        return max((one.place.newest_revision for one in there), default=-1)

    # ---- checks

    def refuses(self, file: File) -> None:
        """It was fetched, and is damaged."""
        self.refused += 1
        if file.refused:
            self.cluster.checks.fail(f"revision {file.revision} is offered again, though it was found damaged")
        file.refused = True

    def committed(self, peer: SimPeer, said: dict[bytes, Said], state: State, reachable: int) -> None:
        """reachable: the newest that a member of this sync was offered, or had to be."""
        if any(label.by_right for label in said.values()):
            return
        checks = self.cluster.checks
        self.refounded += 1
        most = max(label.state.revision for label in said.values())
        if state.revision < most:
            checks.fail(f"{peer.name} goes on with revision {state.revision}; a peer brought {most}")
        if state.revision < reachable:
            checks.fail(f"{peer.name} goes on with revision {state.revision}; a reachable file held {reachable}")


class Said(NamedTuple):
    """What one says of its state at a sync. by_right: as the checks see it."""

    voter: bool
    asks: bool
    by_right: bool
    state: State

    @staticmethod
    def of(label: tuple[int, ...]) -> Said:
        return Said(bool(label[0]), bool(label[1]), bool(label[2]), State(*label[3:]))

    def record(self, peer: bytes) -> Record:
        state = self.state
        lineage, root = state.lineage.to_bytes(16), state.root.to_bytes(32)
        return Record(peer, self.voter, lineage, state.revision, root, b"", asks=self.asks)


class SavedProgram(Program):
    """As sync_shared_state with observers; peers that come back may bring a file."""

    def __init__(self, peer: SimPeer) -> None:
        super().__init__(peer)
        assert peer.cluster.saved is not None
        self.saved = peer.cluster.saved
        self.restored = False
        self.from_file = self.by_right = False  # for the checks
        self.reachable = -1
        own = self.saved.own.get(peer.peer)
        if own is not None and self.rng.random() < 0.7:
            self._load(own)

    def _load(self, state: State) -> None:
        self.state, self.voter, self.restored = state, False, True
        self.from_file, self.by_right = True, False

    def _sync(self) -> Steps:
        self.syncing = True
        self.reachable = -1
        self.peer.cluster.faults.on_event("sync_started")
        newest_held = yield from self._attempt(asks=True, least=0)
        if newest_held is not None:
            least = yield from self._restore(newest_held)
            if least is not None:
                yield from self._attempt(asks=False, least=least)
        self.syncing = False

    def _advance(self, collectives: list[Op]) -> None:
        """Alone, too: what nobody else does with it is its own until the next sync, so the checks don't compare it."""
        if not any(op.status == lib.PYCCL_ERR_ALONE for op in collectives):
            super()._advance(collectives)
        elif all(op.status in (0, lib.PYCCL_ERR_ALONE) for op in collectives):
            self.state = self.state.after([frozenset({(self.peer.index, op.cookie)}) for op in collectives])
            self.saved.alone += 1

    def _gather(self, label: tuple[int, ...]) -> Call:
        """(what all say, by peer, in order; a number of this gather, the same for all); None: it failed."""
        op = self._submit(INTERNAL, 1, lib.PYCCL_ALL_GATHER, label)
        yield from self._wait([op])
        if op.status == lib.PYCCL_ERR_ALONE:
            return {self.peer.peer: label}, hash((op.cookie,))
        if op.status != 0:
            return None
        values = [value for value in op.result or () if len(value) == 4]
        said = {self.peer.cluster.peer(value[0]).peer: value[3] for value in values}
        return dict(sorted(said.items())), hash(tuple(sorted(value[1] for value in values)))

    def _attempt(self, *, asks: bool, least: int) -> Call:
        """The newest revision that members hold, if observers are to be asked before this goes on."""
        known = {member.incarnation for member in self.peer.machine.observers}
        told = yield from self._gather((int(self.voter), int(len(known) > 0), int(self.by_right), *self.state))
        if told is None:
            return None
        labels, gathered = told
        said = {peer: Said.of(label) for peer, label in labels.items()}
        records = [one.record(peer) for peer, one in said.items()]
        newest_held = max(record.revision for record in records)
        if asks and restoring.asks_first(records):
            return newest_held
        if newest_held < least:
            return None  # it could not be had from its observer: all fail, and try again
        elected = elect(records)
        assert isinstance(elected, Elected)
        state = said[elected.holders[0]].state
        has_it = [self.peer.peer in elected.holders]
        if not has_it[0]:
            yield from self._fetch(state, elected.holders, has_it)
        # The chain of _io/statesync.py, but that of no other sync: those who go on with one file, each for itself,
        # would have two states of one lineage and revision, which the checks take for a fork.
        lineage = hash((int.from_bytes(elected.lineage), state.root, state.revision, gathered)) & U64
        state = state._replace(lineage=lineage)
        if asks:  # not asked: as if it had been
            self.reachable = self.saved.newest_of(known, self.peer)
        done = yield from self._gather((int(has_it[0]), self.reachable + 1))
        if done is None or not all(label[0] for label in done[0].values()):
            return None
        self.saved.committed(self.peer, said, state, max(label[1] for label in done[0].values()) - 1)
        self._commit(state, tuple(done[0]))
        return None

    def _commit(self, state: State, members: tuple[bytes, ...]) -> None:
        alone = members == (self.peer.peer,)
        self.world.note("%s has revision %d of %d", self.peer.name, state.revision, len(members))
        self.peer.checks.syncs += 1
        self.peer.checks.advanced(self.peer, state)
        self.restored, self.voter = restoring.after_sync(self.restored, alone=alone)
        self.from_file = self.from_file and alone
        self.by_right = not self.from_file
        self.state, self.needs_sync, self.root = state, False, members[0]
        for observer in self.saved.observers():
            observer.published(self.peer, state)
        if self.rng.random() < 0.4:
            self.saved.own[self.peer.peer] = state

    def _restore(self, newest_held: int) -> Call:
        """The least revision that somebody must hold now; None: it failed."""
        offers: list[Offer] = []
        yield from self._ask(offers)
        self.saved.asked(self.peer.group)
        offer = restoring.best(offers)
        told = yield from self._gather((0 if offer is None else offer.revision + 1,))
        if told is None:
            return None
        members = tuple(told[0])
        least, taker = restoring.taker(members, [label[0] for label in told[0].values()], newest_held)
        if taker == self.peer.peer and offer is not None:
            yield from self._sleep(self.rng.random() * TRANSFER_S)
            if self.saved.serves(offer.observer, self.peer):
                if offer.file.whole:  # it is checked whole, as in _io
                    self.saved.restored += 1
                    self._load(offer.file.state)
                else:
                    self.saved.refuses(offer.file)
                offer.observer.fetched()
        return least

    def _ask(self, offers: list[Offer]) -> Steps:
        """All observers at once, within OFFER_S."""
        until = self.peer.now_s + OFFER_S
        open_ = {member.incarnation for member in self.peer.machine.observers}
        while open_ and self.peer.now_s < until:
            yield from self._sleep(LOOK_S * self.rng.random())
            for observer in self.saved.observers():
                if observer.incarnation in open_ and self.saved.serves(observer, self.peer):
                    open_.discard(observer.incarnation)
                    self.reachable = max(self.reachable, observer.place.newest_revision)
                    newest = observer.newest
                    if newest is not None:
                        offers.append(Offer(observer, newest))
