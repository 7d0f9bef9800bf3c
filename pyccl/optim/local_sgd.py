"""LocalSGD: the live weights themselves are averaged (arXiv:1805.09767)."""

from __future__ import annotations

from typing import Any

from pyccl.communicator import Communicator
from pyccl.guards import Guard
from pyccl.optim.base import OuterOptimizer
from pyccl.optim.exchange import Exchange


class LocalSGD(OuterOptimizer):
    """Every ``sync_every`` inner steps the live weights become the mean over the replicas.

    theta is the last mean, which is what a newcomer begins with. A round with fewer than ``min_peers`` leaves the live
    weights as they are, does not count, and ``step()`` waits for company.

    Args:
        comm: connected. With other members there the constructor is collective: it brings this replica in step.
        params: see ``Params``.
        sync_every: inner steps between two averages, equal on all members.
        min_peers: replicas that an average needs.
        guard: as of ``all_reduce``, for the weights; see ``DiLoCo``.
    """

    def __init__(
        self,
        comm: Communicator,
        params: Any,
        sync_every: int,
        *,
        min_peers: int = 2,
        guard: Guard | str | None = None,
    ) -> None:
        super().__init__(comm, params, sync_every=sync_every, min_peers=min_peers, settings={}, guard=guard)
        self._send, self._mean = self._theta.like(), self._theta.like()
        self._come_in()

    def _exchange_round(self) -> None:
        self.params.read(self._send)
        exchange = Exchange(
            self.comm, self._send.vectors, self._mean.vectors, vow=self.group.vow, guard=self.guard
        )
        outcome = self._wait(exchange.launch())
        if outcome.world_size < self.min_peers:
            self._wait_for_company()
            return
        self._theta.copy_from(self._mean)
        self._committed(outcome.world_size)
        self._begin_round()
        self._end_round(pending=outcome.pending, watched=outcome.watched)

    def _roll_back(self) -> None:
        """The live weights are all that there is of the round: they stay."""
        self._inner = 0
