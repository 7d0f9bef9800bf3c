"""The program each simulated user runs: agree on the state, do its operations, meet the others at safe points.

A round is a pure function of (seed, group, number): all peers mean the same. In an exchange the places of two partners
among all peers that ever were differ by a number of the round; whoever finds no member there has lost it.
Contributions carry what a peer means, so the checks see when numbers part. After a restart of numbers the program
elects a state as state sync does, with the real election. The revision counts rounds in which every
collective committed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import sim_fsm
from sim_engine import U64, Op
from sim_native import lib
from sim_world import S

from pyccl._proto.channel import SPACE_PAIR
from pyccl._proto.election import Elected, Record, elect

if TYPE_CHECKING:
    from sim_peer import SimPeer

LONG_S: Final = 1800.0
FETCH_S: Final = 0.2
TAGS: Final = 4
INTERNAL: Final = 1
REDUCE: Final = lib.PYCCL_ALL_REDUCE
EXCHANGE: Final = lib.PYCCL_EXCHANGE
KINDS: Final = (REDUCE, REDUCE, lib.PYCCL_ALL_GATHER, lib.PYCCL_BROADCAST, lib.PYCCL_BARRIER, EXCHANGE, EXCHANGE)
Steps = Generator[Callable[[], None], None, None]


class State(NamedTuple):
    """The shared state: what it holds is the root, which every round in which all collectives commit moves on."""

    lineage: int
    revision: int
    root: int
    round: int  # the next one; not part of what is elected, but all who hold one root agree on it

    def after(self, results: list[frozenset[tuple[Any, ...]]]) -> State:
        """Numbers only: their hashes are the same in every process."""
        root = hash((self.root, self.round, *sorted(map(hash, results)))) & U64
        return self._replace(revision=self.revision + 1, root=root)


def _record(peer: bytes, label: tuple[int, ...]) -> Record:
    voter, lineage, revision, root, _ = label
    return Record(peer, bool(voter), lineage.to_bytes(16), revision, root.to_bytes(32), b"")


class Round:
    """What all peers of a group mean by one number of a round."""

    def __init__(self, seed: int, group: int, number: int) -> None:
        rng = random.Random(f"{seed} {group} {number}")
        self.ops = [
            (rng.randrange(TAGS), rng.choice(KINDS), rng.random() < 0.85, rng.randint(1, 1000), rng.randint(1, 3))
            for _ in range(rng.randint(1, 4))
        ]
        self.parallel = rng.random() < 0.6
        self.poll = rng.random() < 0.4
        self.meet = rng.random() < 0.12


class Thread:
    """One thread of a user's process: a generator that yields what starts each wait."""

    def __init__(self, peer: SimPeer) -> None:
        self.peer, self.world, self.options = peer, peer.world, peer.options
        self.rng = peer.world.rng
        self.alone = False
        self.root = peer.peer
        self.open: set[Op] = set()
        self._steps = self.main()
        self._waits_for: list[Op] | None = None
        self._nap, self._naps = 0, False
        next(self._steps)

    def main(self) -> Steps:
        raise NotImplementedError

    def soon(self) -> None:
        self.peer.soon(self.rng.random() * 0.002, self._go)

    def _go(self) -> None:
        """Until the next wait."""
        if self.peer.over or not self.peer.alive:
            return
        try:
            wait = next(self._steps)
        except StopIteration:
            return
        wait()

    def _sleep(self, for_s: float) -> Steps:
        yield lambda: self.peer.soon(for_s, self._go)

    def _wait(self, ops: list[Op]) -> Steps:
        def wait() -> None:
            self.peer.waiting += 1
            self._waits_for = ops
            self._check_waits()

        yield wait

    def _check_waits(self) -> None:
        if self._waits_for is not None and all(op.status is not None for op in self._waits_for):
            self._waits_for = None
            self.peer.soon(self.rng.random() * 0.001, self._woken)

    def _woken(self) -> None:
        self.peer.waiting -= 1
        self._go()

    def _partner(self, apart: int) -> bytes:
        """Who stands so far from here, in a pairing that both sides know; b"": nobody was ever there."""
        ids = list(dict.fromkeys(peer.peer for peer in self.peer.cluster.peers))
        place = ids.index(self.peer.peer) ^ apart
        return ids[place] if place < len(ids) else b""

    def _submit(
        self,
        space: int,
        tag: int,
        kind: int,
        label: tuple[int, ...],
        *,
        retry: bool = True,
        count: int = 1,
        partner: bytes = b"",
    ) -> Op:
        root = self.root if kind == lib.PYCCL_BROADCAST else b""
        if kind == lib.PYCCL_BARRIER:
            count = 0
        if partner:
            root = bytes(a ^ b for a, b in zip(self.peer.peer, partner, strict=True))
        spec = sim_fsm.make_spec(kind, tag, count, space=space, retry=retry, root=root)
        deadline_s, options, chaos = LONG_S, self.options, self.peer.cluster.chaos
        if chaos and self.rng.random() < options.deadline_rate:
            deadline_s = 0.003 * 400 ** self.rng.random()
        op = Op(self.peer.cookie(), spec, label, self.peer.now + int(deadline_s * S), space, tag, kind, root)
        op.partner = partner
        op.then = self._ended
        if chaos and self.rng.random() < options.flip_rate and kind != lib.PYCCL_BARRIER:
            op.flip = True
        self.open.add(op)
        assert self.peer.engine is not None
        self.peer.engine.submit(op)
        if chaos and self.rng.random() < options.cancel_rate:
            self.peer.soon(self.rng.random() * 0.2, self._cancel, op)
        return op

    def _cancel(self, op: Op) -> None:
        if op.status is None and self.peer.engine is not None:
            self.peer.engine.cancel(op)

    def _ended(self, op: Op) -> None:
        self.open.discard(op)
        if not op.partner:
            self.alone = op.status == lib.PYCCL_ERR_ALONE
        self.ended(op)
        self._check_waits()

    def ended(self, op: Op) -> None:
        """For a subclass."""

    def _pause(self, least_s: float) -> Steps:
        """Of a second thread. Others may wait at a safe point for its next call: too late is a mismatch."""
        soon_s, late_s = self._hurry_s(), 2 * self.options.think_s
        for_s = self.rng.random() * (late_s if self.peer.topology is None else min(soon_s, late_s)) + least_s

        def wait() -> None:
            self._nap += 1
            self._naps = True
            self.peer.soon(for_s, self._wake, self._nap)

        yield wait

    def hurry(self) -> None:
        """Its pause, if it makes one, ends early."""
        if self._naps:
            self.peer.soon(self.rng.random() * self._hurry_s(), self._wake, self._nap)

    def _hurry_s(self) -> float:
        return 0.4 * self.options.mismatch_grace

    def _wake(self, nap: int) -> None:
        if self._naps and nap == self._nap:
            self._naps = False
            self._go()


class Background(Thread):
    """A second thread with a tag of its own: its operations are open while the first stands at a safe point."""

    def main(self) -> Steps:
        yield lambda: None  # until Joined
        while True:
            op = self._submit(0, TAGS, lib.PYCCL_ALL_REDUCE, (TAGS,))
            yield from self._wait([op])
            yield from self._pause(0.1 if self.alone else 0.0)


class Gossip(Thread):
    """A thread that exchanges with one and the same partner, at safe points too."""

    def main(self) -> Steps:
        yield lambda: None  # until Joined
        while True:
            partner = self._partner(1)
            if partner:
                op = self._submit(SPACE_PAIR, TAGS, EXCHANGE, (TAGS,), partner=partner)
                yield from self._wait([op])
            yield from self._pause(0.02)


class Program(Thread):
    def __init__(self, peer: SimPeer) -> None:
        self.rounds_done = 0
        own = peer.world.rng.getrandbits(64)
        self.state = State(own, 0, own, 0)  # everybody brings other initial values
        self.voter, self.needs_sync, self.syncing = False, True, False
        self.last_meeting = 1 << 62  # no safe points in later rounds
        super().__init__(peer)

    def main(self) -> Steps:
        yield lambda: None  # until Joined
        while True:
            if self.needs_sync:
                yield from self._sync()
            else:
                yield from self._one_round()
            yield from self._sleep(self.options.think_s * self.rng.random())

    def ended(self, op: Op) -> None:
        if op.status == lib.PYCCL_ERR_MISMATCH:
            self.needs_sync = True

    def _sync(self) -> Steps:
        """As sync_shared_state: all tell what they hold, who holds another state than the elected one fetches it, and
        nobody takes it unless all have it."""
        self.syncing = True
        self.peer.cluster.faults.on_event("sync_started")
        op = self._submit(INTERNAL, 1, lib.PYCCL_ALL_GATHER, (int(self.voter), *self.state))
        yield from self._wait([op])
        if op.status == 0:
            yield from self._sync_to(op)
        elif op.status == lib.PYCCL_ERR_ALONE:
            self.voter, self.needs_sync, self.root = True, False, self.peer.peer
        self.syncing = False

    def _sync_to(self, votes: Op) -> Steps:
        said = {self.peer.cluster.peer(value[0]).peer: value[3] for value in votes.result or () if len(value) == 4}
        elected = elect(_record(peer, label) for peer, label in said.items())
        assert isinstance(elected, Elected)
        state = State(*said[elected.holders[0]][1:])
        has_it = [self.peer.peer in elected.holders]
        if not has_it[0]:
            yield from self._fetch(state, elected.holders, has_it)
        op = self._submit(INTERNAL, 1, lib.PYCCL_ALL_GATHER, (int(has_it[0]),))
        yield from self._wait([op])
        if op.status == 0 and all(value[3][0] for value in op.result or () if len(value) == 4):
            self.peer.checks.synced(self.peer, self.voter, self.state, state)
            self.state, self.voter, self.needs_sync, self.root = state, True, False, op.members[0]

    def _fetch(self, state: State, holders: tuple[bytes, ...], has_it: list[bool]) -> Steps:
        """From one holder after the other, as long as one is there."""
        for holder in holders:
            yield from self._sleep(self.rng.random() * FETCH_S)
            for peer in self.peer.cluster.living():
                serves = peer.peer == holder and not peer.stopped and not self.world.apart(peer, self.peer)
                if serves and self.peer.cluster.programs[peer.index].state == state:
                    has_it[0] = True
                    return

    def _one_round(self) -> Steps:
        plan, chaos = Round(self.world.seed, self.peer.group, self.state.round), self.peer.cluster.chaos
        wrong = chaos and not self.options.strict and self.rng.random() < self.options.mismatch_rate
        order = self._order(plan)
        if wrong and self.rng.random() < 0.5:
            order = order[:-1]  # one call is left out
        ops: list[Op] = []
        for index in order:
            tag, kind, retry, count, apart = plan.ops[index]
            partner = self._partner(apart) if kind == EXCHANGE else b""
            if kind == EXCHANGE and not partner:
                continue
            if wrong and self.rng.random() < 0.3:
                count += 1
            space = SPACE_PAIR if partner else 0
            label = (self.state.round, index)
            ops.append(
                self._submit(space, tag, kind, label, retry=retry or bool(partner), count=count, partner=partner)
            )
            if not plan.parallel:
                yield from self._wait(ops[-1:])
            elif self.rng.random() < 0.5:
                yield from self._sleep(self.rng.random() * 0.01)
        if ops:
            yield from self._wait(ops)
        self.state = self.state._replace(round=self.state.round + 1)
        self.rounds_done += 1
        collectives = [op for op in ops if not op.partner]
        if collectives:
            self._advance(collectives)
        if self.needs_sync:
            return
        meets = self.state.round <= self.last_meeting
        meet = self.alone or (plan.meet and meets)
        if not meet and plan.poll and meets:
            op = self._submit(INTERNAL, 0, lib.PYCCL_ALL_GATHER, (min(1, self.peer.pending),))
            yield from self._wait([op])
            meet = self.alone or (op.status == 0 and any(value[-1][0] for value in op.result or () if len(value) == 4))
        if meet and not self.needs_sync:
            yield from self._meet()

    def _advance(self, collectives: list[Op]) -> None:
        if all(op.status == 0 for op in collectives):
            self.state = self.state.after([op.result or frozenset() for op in collectives])
            self.peer.checks.advanced(self.peer, self.state)

    def _order(self, plan: Round) -> list[int]:
        """Any order, but that of the plan within a tag."""
        order = list(range(len(plan.ops)))
        if not plan.parallel:
            return order
        self.rng.shuffle(order)
        for tag in range(TAGS):
            places = [place for place, index in enumerate(order) if plan.ops[index][0] == tag]
            for place, index in zip(places, sorted(order[place] for place in places), strict=True):
                order[place] = index
        return order

    def _meet(self) -> Steps:
        """update_topology()"""
        said: list[str] = []

        def waiter(why: str) -> None:
            said.append(why)
            self.soon()

        def wait() -> None:
            self.peer.arrive(waiter)
            for thread in self.peer.cluster.threads[self.peer.index]:
                if thread is not self:
                    thread.hurry()
            if not self.options.strict and self.peer.cluster.chaos and self.rng.random() < self.options.mismatch_rate:
                self.peer.soon(self.rng.random() * 2, self.peer.withdraw, waiter, "deadline")

        yield wait
        if said == [""] or said == ["mismatch"]:
            self.needs_sync = True
