"""The program each simulated user runs: agree on the round, do its operations, meet the others at safe points.

A round is a pure function of (seed, group, number): all peers mean the same. In an exchange the places of two partners
among all peers that ever were differ by a number of the round; whoever finds no member there has lost it.
Contributions carry what a peer means, so the checks see when numbers part. After a restart of numbers the program
agrees anew on (round, revision) with an all-gather, as state sync does. The revision counts rounds in which every
collective committed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Final

import sim_fsm
from sim_engine import Op
from sim_world import S

from pyccl._native._pyccl import lib
from pyccl._proto.channel import SPACE_PAIR

if TYPE_CHECKING:
    from sim_peer import SimPeer

LONG_S: Final = 1800.0
TAGS: Final = 4
INTERNAL: Final = 1
REDUCE: Final = lib.PYCCL_ALL_REDUCE
EXCHANGE: Final = lib.PYCCL_EXCHANGE
KINDS: Final = (REDUCE, REDUCE, lib.PYCCL_ALL_GATHER, lib.PYCCL_BROADCAST, lib.PYCCL_BARRIER, EXCHANGE, EXCHANGE)
Steps = Generator[Callable[[], None], None, None]


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
        op = Op(self.peer.cookie(), spec, label, self.world.now + int(deadline_s * S), space, tag, kind, root)
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


class Background(Thread):
    """A second thread with a tag of its own: its operations are open while the first stands at a safe point."""

    def main(self) -> Steps:
        yield lambda: None  # until Joined
        while True:
            op = self._submit(0, TAGS, lib.PYCCL_ALL_REDUCE, (TAGS,))
            yield from self._wait([op])
            yield from self._sleep(self.options.think_s * 2 * self.rng.random() + (0.1 if self.alone else 0.0))


class Gossip(Thread):
    """A thread that exchanges with one and the same partner, at safe points too."""

    def main(self) -> Steps:
        yield lambda: None  # until Joined
        while True:
            partner = self._partner(1)
            if partner:
                op = self._submit(SPACE_PAIR, TAGS, EXCHANGE, (TAGS,), partner=partner)
                yield from self._wait([op])
            yield from self._sleep(self.options.think_s * 2 * self.rng.random() + 0.02)


class Program(Thread):
    def __init__(self, peer: SimPeer) -> None:
        self.round = self.revision = self.rounds_done = 0
        self.voter, self.needs_sync = False, True
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
        op = self._submit(INTERNAL, 1, lib.PYCCL_ALL_GATHER, (self.round, self.revision, int(self.voter)))
        yield from self._wait([op])
        if op.status == 0:
            said = [value[3] for value in op.result or () if len(value) == 4]
            voters = [label for label in said if label[2]] or said
            if self.options.strict and len(set(voters)) > 1:
                self.peer.checks.fail(f"members disagree on round and revision: {sorted(voters)}")
            self.round, self.revision, _ = max(voters)
            self.voter, self.needs_sync, self.root = True, False, op.members[0]
        elif op.status == lib.PYCCL_ERR_ALONE:
            self.voter, self.needs_sync, self.root = True, False, self.peer.peer
        elif op.status == lib.PYCCL_ERR_MISMATCH:
            self.needs_sync = True

    def _one_round(self) -> Steps:
        plan, chaos = Round(self.world.seed, self.peer.group, self.round), self.peer.cluster.chaos
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
            ops.append(
                self._submit(
                    space, tag, kind, (self.round, index), retry=retry or bool(partner), count=count, partner=partner
                )
            )
            if not plan.parallel:
                yield from self._wait(ops[-1:])
            elif self.rng.random() < 0.5:
                yield from self._sleep(self.rng.random() * 0.01)
        if ops:
            yield from self._wait(ops)
        self.round += 1
        self.rounds_done += 1
        collectives = [op for op in ops if not op.partner]
        if collectives and all(op.status == 0 for op in collectives):
            self.revision += 1
        if self.needs_sync:
            return
        meets = self.round <= self.last_meeting
        meet = self.alone or (plan.meet and meets)
        if not meet and plan.poll and meets:
            op = self._submit(INTERNAL, 0, lib.PYCCL_ALL_GATHER, (min(1, self.peer.pending),))
            yield from self._wait([op])
            meet = self.alone or (op.status == 0 and any(value[-1][0] for value in op.result or () if len(value) == 4))
        if meet and not self.needs_sync:
            yield from self._meet()

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
            if not self.options.strict and self.peer.cluster.chaos and self.rng.random() < self.options.mismatch_rate:
                self.peer.soon(self.rng.random() * 2, self.peer.withdraw, waiter, "deadline")

        yield wait
        if said == [""] or said == ["mismatch"]:
            self.needs_sync = True
