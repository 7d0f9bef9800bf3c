"""NoLoCo: no collective carries weights; replicas swap with one another in groups drawn anew (arXiv:2506.10911).

    round k begins    the groups are drawn from (seed, k, member list); phi travels to the partners, in the background
    inner steps       w moves
    round k ends      w - phi is swapped with the partners; v and phi take their step (gossip.py); w <- phi

Which members a round is drawn from must be the same on all, though they learn of losses at different times. So with
each round all members combine a few numbers, in the background (the *vow* of exchange.py: counter, settings, do
newcomers wait), and those who took part in that of round k are the member list of round k+1. It has a round of time:
nobody waits for more than a member that is a whole round behind. Who is lost since then is in a group nevertheless;
the partner finds it gone and makes its step without it.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from pyccl import errors
from pyccl.calls import check_range
from pyccl.communicator import Communicator
from pyccl.core import Work
from pyccl.optim.base import Array, OuterOptimizer, real
from pyccl.optim.exchange import RETRIED, Exchange, Outcome
from pyccl.optim.gossip import draw_groups, gossip_step, group_of, stability_warnings
from pyccl.optim.group import log
from pyccl.optim.params import Vectors

TAG_PHI: Final = 0x7063_6310  # of exchanges of two; a program's own should keep away from them
TAG_MOVED: Final = 0x7063_6311
_ROUNDS_TOLD: Final = 256
_GROUP_SIZE_MAX: Final = 256
_LOST: Final = (*RETRIED, errors.AloneError)


@dataclass(frozen=True, slots=True)
class GossipOutcome:
    """An outer step of this replica.

    round: which, from 0, as its group was drawn by: what ``round`` of the optimizer was before the step. group: as
    drawn, this replica too. lost: those of it whose share did not arrive.
    """

    round: int
    group: tuple[str, ...]
    lost: tuple[str, ...]


class _Swap:
    """Vectors on their way to a partner, and its own from there."""

    def __init__(self, comm: Communicator, partner: str, send: Vectors, tag: int) -> None:
        self.partner, self.recv = partner, send.like()
        self.started, self.seconds, self.bytes = time.monotonic(), 0.0, (0, 0)
        self._works: list[Work] = []
        self._has_arrived = True
        try:
            for mine, theirs in zip(send.vectors, self.recv.vectors, strict=True):
                self._works.append(comm._exchange_async(mine, out=theirs, partner=partner, tag=tag))
        except _LOST as e:
            self._lost(e)
        except BaseException:
            self.give_up()
            raise

    def wait(self) -> bool:
        """Whether the partner's vectors are here; it is told the same of ours."""
        while self._works:
            try:
                info = self._works[0].wait()
            except _LOST as e:
                self._lost(e)
            except BaseException:
                self.give_up()
                raise
            else:
                self._works.pop(0)
                self.seconds = max(self.seconds, info.seconds)
                self.bytes = self.bytes[0] + info.tx_bytes, self.bytes[1] + info.rx_bytes
        return self._has_arrived

    def give_up(self) -> None:
        for work in self._works:
            work._settle()
        self._works, self._has_arrived = [], False

    def _lost(self, cause: errors.PycclError) -> None:
        log.warning("partner_lost peer=%s cause=%r", self.partner[:8], cause)
        self.give_up()


class NoLoCo(OuterOptimizer):
    """Every ``sync_every`` inner steps a replica steps with the others of a random group; no weights are shared.

    theta is phi, this replica's slow weights; what is equal on all members is the member list, the seed and the round.
    ``shared`` holds phi and the momentum too: a newcomer takes those of one member (the momentum is 0 then), nobody
    else changes his. After ``load_state_dict()`` each replica keeps what it loads; all members load states of the same
    round. The replicas stay together while they pull on each other; ``merge()`` makes them one.

    Args:
        comm: connected. With other members there the constructor is collective: it brings this replica in step.
        params: see ``Params``.
        sync_every: inner steps of a round.
        alpha, beta, gamma: of the momentum, of the group's mean progress, of the pull to the group's mean; gossip.py.
            Warns, with the numbers, where the replicas would drift apart.
        group_size: replicas of a group, 2..256. Those left over make a smaller group, or the step alone.
        seed: 0..2**64-1, of the groups.
        All but `comm` equal on all members.
    Raises:
        UsageError: arguments. MismatchError: the others' are different; `fields` names what.

    A partner that is lost, or does not come within half an hour, is left out of the step: with nobody left it is
    v <- alpha v + beta (w - phi). ``outcomes`` tells of the last rounds, as ``GossipOutcome``, newest last.
    """

    def __init__(
        self,
        comm: Communicator,
        params: Any,
        sync_every: int,
        *,
        alpha: float = 0.5,
        beta: float = 0.7,
        gamma: float = 0.7,
        group_size: int = 2,
        seed: int = 0,
    ) -> None:
        given = {"alpha": alpha, "beta": beta, "gamma": gamma}
        rates = {name: real(value) for name, value in given.items()}
        for name, value in given.items():
            if not math.isfinite(rates[name]):
                raise errors.UsageError(f"{name}={value!r}: a finite number is needed")
        check_range("group_size", group_size, 2, _GROUP_SIZE_MAX)
        check_range("seed", seed, 0, (1 << 64) - 1)
        super().__init__(
            comm, params, sync_every=sync_every, min_peers=1, buffers=("momentum",), per_replica=True,
            settings={**rates, "group_size": group_size, "seed": seed},
        )  # fmt: skip
        self._alpha, self._beta, self._gamma = rates.values()
        self._group_size, self._seed = int(group_size), int(seed)
        self._v = self._buffers["momentum"]
        self._moved = self._theta.like()
        self._members: tuple[str, ...] | None = None  # of this round, once it is agreed
        self._group: tuple[str, ...] = ()  # of this round, once it is drawn; this replica is in it
        self._swaps: list[_Swap] = []  # in a round, of the partners' phi; at its end, of their w - phi
        self._news: Outcome | None = None  # of the vow of this round, once it is here
        self.outcomes: deque[GossipOutcome] = deque(maxlen=_ROUNDS_TOLD)
        for told in stability_warnings(self._alpha, self._beta, self._gamma, group_size, comm.group_world_size):
            warnings.warn(f"NoLoCo: {told}", stacklevel=2)
        self._come_in()

    # ---- a round

    def _stepped(self) -> bool:
        with self._staying():
            if not self._group:
                self._open()
            if self._inner < self.sync_every:
                return False
            self._inner = 0
            self._exchange_round()
        return True

    def _open(self) -> None:
        """Draw the groups of this round, and send phi on its way."""
        if self._members is None:
            self._members = self._wait(self._vow()).members
        self._group = group_of(self.comm.peer_id, draw_groups(self._seed, self.round, self._members, self._group_size))
        for partner in self._partners():
            self._swaps.append(_Swap(self.comm, partner, self._theta, TAG_PHI))
        self._flight, self._news = self._vow(), None

    def _vow(self) -> Exchange:
        return Exchange(self.comm, (), (), self.group.vow).launch()

    def _partners(self) -> list[str]:
        return [peer for peer in self._group if peer != self.comm.peer_id]

    def _exchange_round(self) -> None:
        shares = self._swap_moved()
        self._step_with(shares)
        self._committed(len(shares) + 1)
        self.params.write(self._theta)
        news = self._agreed()
        self._group, self._swaps, self._members = (), [], news.members
        if self.group.has_strangers():
            self._members = None
            self._agree()
        else:
            if news.pending:
                self._members = None
            self._end_round(pending=news.pending, watched=news.watched)
        self._open()

    def _swap_moved(self) -> dict[str, tuple[Vectors, Vectors]]:
        """Swap w - phi with those whose phi is here: what came from each that has sent both, (w - phi, phi)."""
        self.params.pseudo_gradient(self._theta, self._moved)
        for vector in self._moved.vectors:
            np.negative(vector, out=vector)
        phis = {swap.partner: swap.recv for swap in self._swaps if self._ended(swap)}
        self._swaps = []
        for partner in phis:
            self._swaps.append(_Swap(self.comm, partner, self._moved, TAG_MOVED))
        return {swap.partner: (swap.recv, phis[swap.partner]) for swap in self._swaps if self._ended(swap)}

    def _step_with(self, shares: Mapping[str, tuple[Vectors, Vectors]]) -> None:
        me = self.comm.peer_id
        in_order = [(self._moved, self._theta) if peer == me else shares[peer] for peer in sorted({*shares, me})]
        for i, (phi, v) in enumerate(zip(self._theta.vectors, self._v.vectors, strict=True)):
            moved, phis = [m.vectors[i] for m, _ in in_order], [p.vectors[i] for _, p in in_order]
            gossip_step(phi, v, moved, phis, alpha=self._alpha, beta=self._beta, gamma=self._gamma)
        lost = tuple(peer for peer in self._partners() if peer not in shares)
        self.outcomes.append(GossipOutcome(self.round, self._group, lost))

    def _ended(self, swap: _Swap) -> bool:
        begun = time.monotonic()
        with self._blocked():
            has_arrived = swap.wait()
        self.stats.seconds_hidden += min(swap.seconds, begun - swap.started)
        self.stats.tx_bytes += swap.bytes[0]
        self.stats.rx_bytes += swap.bytes[1]
        swap.seconds, swap.bytes = 0.0, (0, 0)
        return has_arrived

    def _agreed(self) -> Outcome:
        """How this round's vow ended."""
        if self._news is None:
            assert self._flight is not None
            self._news = self._wait(self._flight)
        return self._news

    # ---- around it

    def finish(self) -> None:
        """Wait for what is in flight, the phi of this round's partners; it is used if the round goes on."""
        if self._group:
            with self._finishing():
                for swap in self._swaps:
                    self._ended(swap)
                self._agreed()

    def merge(self) -> Mapping[str, Array]:
        """Replace the live weights and phi of all members by the mean of the live weights. Collective.

        Once, at the end: "a single merging suffices" (arXiv:2507.06542). Momenta stay. A round begins then.

        Returns: theta, equal on all members.
        Raises: as ``step``.
        """
        self.params.check()
        self.finish()
        self._abandon()
        with self._staying():
            self.params.read(self._moved)
            mean = self._theta.like()
            self._flight = Exchange(self.comm, self._moved.vectors, mean.vectors, self.group.vow).launch()
            self._wait(self._flight)
            self._theta.copy_from(mean)
            self._begin_round()
        return self.theta

    def _took(self, changed: bool) -> bool:
        if changed:
            self._abandon()
            self._v.fill(0.0)
        return super()._took(changed)

    def _drain(self) -> None:
        """Nothing is in flight between two rounds."""
        assert self._flight is None and not self._swaps

    def _abandon(self) -> None:
        super()._abandon()
        for swap in self._swaps:
            swap.give_up()
        self._swaps, self._group, self._members, self._news = [], (), None, None
