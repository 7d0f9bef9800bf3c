"""StreamingDiLoCo: one fragment of the model at a time, exchanged while inner steps run (arXiv:2501.18512).

    after S - delay steps of a slot   send    g = theta - w + residual         a snapshot, in the background
    after S                           apply   theta, b <- OuterSGD(theta, b, mean(g));  w <- alpha w + (1 - alpha) theta

all of them of the slot's fragment alone (schedule.py says which); nothing of the others is touched. At the end of a
slot nothing is in flight, and there newcomers are let in.

What is not committed (fewer than ``min_peers`` took part, or it failed on all) leaves theta, b and the counter as they
were: the fragment's live weights go back to theta, and it has the next slot too.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pyccl import errors
from pyccl.calls import check_range
from pyccl.communicator import Communicator
from pyccl.guards import Guard
from pyccl.optim import rules
from pyccl.optim.base import OuterOptimizer, real
from pyccl.optim.diloco import Contribution, OuterStep
from pyccl.optim.exchange import RETRIED, Exchange
from pyccl.optim.fragments import split_fragments
from pyccl.optim.group import StatesDifferedError, log
from pyccl.optim.params import Params, Vectors
from pyccl.optim.saved import check_arrays, entry, load
from pyccl.optim.schedule import Schedule

_DELAY, _SENT = "delay", "sent in round"  # what members tell one another
_SLOTS_TOLD: Final = 256  # outcomes that are kept
_NOT_COMMITTED: Final = (errors.PeerLostError, errors.DeadlineError, errors.MasterUnavailableError)


@dataclass(frozen=True, slots=True)
class SlotOutcome:
    """How the exchange of a slot ended.

    fragment: whose. committed: whether theta took a step. world_size: replicas whose share was in the mean; 0 where
    the exchange failed on all. round: outer steps committed by then, this one too if it was; ``round`` of the optimizer
    after the slot.
    """

    fragment: int
    committed: bool
    world_size: int
    round: int


class StreamingDiLoCo(OuterOptimizer):
    """DiLoCo by fragments: every ``sync_every / P`` inner steps one of P fragments is exchanged, in turn.

    Args:
        comm: connected. With other members there the constructor is collective: it brings this replica in step.
        params: see ``Params``.
        sync_every: inner steps between two exchanges of the same fragment; a multiple of P.
        fragments: P, "strided:P", "sequential:P", or names or patterns for each; see ``split_fragments``.
        delay: inner steps between sending a fragment and applying its mean, less than ``sync_every / P``. The exchange
            runs meanwhile; 0 waits for it. May differ between replicas, and from that of a state that is loaded.
        alpha: 0..1, how much of its live weights a replica keeps: w <- alpha w + (1 - alpha) theta.
        outer_lr, outer_momentum, nesterov: of the outer SGD, one for each fragment.
        quantize: None or a codec: each replica's share is rounded once, its own too, and added in float32.
        error_feedback: what the codec took from a share is added to the next one of that fragment.
        min_peers: replicas that a mean needs.
        guard: as of ``DiLoCo``, for the fragment's share.
        All but ``delay`` equal on all members.
    Raises:
        UsageError: arguments; ``sync_every`` is no multiple of the fragments; a parameter in none of them or in two.

    ``outcomes``: of the last slots, as ``SlotOutcome``, newest last. ``fragments``: the names of each.
    """

    _rounds_begin_at_theta = False  # the other fragments are on their way

    def __init__(
        self,
        comm: Communicator,
        params: Any,
        sync_every: int,
        *,
        fragments: int | str | Sequence[Sequence[str]],
        delay: int = 0,
        alpha: float = 0.0,
        outer_lr: float = 0.4,
        outer_momentum: float = 0.9,
        nesterov: bool = True,
        quantize: str | None = None,
        error_feedback: bool = False,
        min_peers: int = 2,
        guard: Guard | str | None = None,
    ) -> None:
        self._outer = OuterStep(outer_lr, outer_momentum, nesterov)
        if not 0.0 <= real(alpha) <= 1.0:
            raise errors.UsageError(f"alpha={alpha!r}: a number of 0..1 is needed")
        named = Params(params)
        self.fragments = split_fragments(named.sizes(), fragments, named.ties)
        self._schedule = Schedule(sync_every, len(self.fragments), delay)
        self._alpha = float(alpha)
        self._contributions = [Contribution(named.vectors(names), quantize, error_feedback) for names in self.fragments]
        super().__init__(
            comm, named, sync_every=sync_every, min_peers=min_peers, guard=guard,
            buffers=("momentum",) if self._outer.has_momentum else (),
            settings={
                **self._outer.settings(), **self._contributions[0].settings(),
                "alpha": self._alpha, "fragments": json.dumps(self.fragments),
            },
        )  # fmt: skip
        self._mean = Vectors(())  # of what is in flight
        self._is_to_send_again = False  # loaded: what was in flight when the state was taken
        self.group.tells = self._tells
        self.outcomes: deque[SlotOutcome] = deque(maxlen=_SLOTS_TOLD)
        self._come_in()

    # ---- a slot

    def _stepped(self) -> bool:
        with self._staying():
            self._send_if(is_due=self._schedule.is_due(self._inner))
            if self._schedule.ends(self._inner):
                self._exchange_round()
                return True
        return False

    def _send_if(self, *, is_due: bool) -> None:
        """Once in a slot, which what was loaded belongs to, too."""
        if self._is_to_send_again:
            self._launch()
        elif is_due and self._flight is None:
            self._send()

    def _send(self) -> None:
        if self.group.has_strangers() and self._agree():
            return  # theta is another now, and a new slot has begun
        contribution = self._contributions[self._fragment]
        self.params.pseudo_gradient(self._theta, contribution.send)
        self._launch()

    def _launch(self) -> None:
        contribution = self._contributions[self._fragment]
        self._mean = contribution.send.like()
        exchange = Exchange(
            self.comm,
            contribution.send.vectors,
            self._mean.vectors,
            self.group.vow,
            contribution.quantize,
            guard=self.guard,
        )
        if self._is_to_send_again:  # as it was sent, with what was fed back
            exchange.own = contribution.own.vectors if contribution.quantize is not None else ()
            self._flight = exchange.launch()
        else:
            self._flight = contribution.launch(exchange)
        self._is_to_send_again = False

    def _exchange_round(self) -> None:
        self._end_slot(waits=True)

    def _end_slot(self, *, waits: bool) -> None:
        """Apply what was sent, or undo the slot where that is not committed. waits: for company, with too few."""
        assert self._flight is not None, "it was due"
        self._inner = 0
        fragment, world_size, pending, watched = self._fragment, 0, False, False
        try:
            outcome = self._wait(self._flight)
            world_size, pending, watched = outcome.world_size, outcome.pending, outcome.watched
        except errors.PycclError as e:  # of RETRIED: it failed on all members alike
            if not isinstance(e, RETRIED) or isinstance(e, StatesDifferedError):
                self.outcomes.append(SlotOutcome(fragment, False, 0, self.round))
                raise
            log.warning("not_committed fragment=%d cause=%r", fragment, e)
        committed = world_size >= self.min_peers
        if committed:
            self._apply(world_size)
        else:
            self._roll_back()
        self.outcomes.append(SlotOutcome(fragment, committed, world_size, self.round))
        if committed:
            self._end_round(pending=pending, watched=watched)
        elif waits and world_size:
            self._wait_for_company()
        else:
            self.stats.rollbacks += 1

    def _apply(self, world_size: int) -> None:
        outer, momentum = self._outer, self._buffers.get("momentum")
        for name, g in self._mean.views.items():
            b = None if momentum is None else momentum.views[name].reshape(-1)
            theta = self._theta.views[name].reshape(-1)
            rules.outer_sgd(theta, b, g.reshape(-1), lr=outer.lr, mu=outer.mu, nesterov=outer.nesterov)
        self._contributions[self._fragment].committed()
        if self._alpha != 1.0:
            self._put_live(self._mean, self._alpha)
        self._committed(world_size)

    def _roll_back(self) -> None:
        """The slot does not count: of its fragment, live weights start from theta again; the others keep theirs."""
        self._inner = 0
        self._put_live(self._contributions[self._fragment].send.like(), 0.0)

    def _put_live(self, live: Vectors, alpha: float) -> None:
        """w <- alpha w + (1 - alpha) theta of one fragment; `live` is used for it."""
        if alpha:
            self.params.read(live)
        for name, view in live.views.items():
            rules.mix(view.reshape(-1), self._theta.views[name].reshape(-1), alpha)
        self.params.write(live)

    @property
    def _fragment(self) -> int:
        """Whose slot it is."""
        return self._schedule.fragment(self.round)

    # ---- around it

    def finish(self) -> None:
        """Wait for what is in flight and apply its mean; a new slot begins then. Where nothing is, nothing happens.

        After the same step on all members. What was sent by those whose delay is longer alone needs the others' shares:
        so all send theirs here, whatever their delay. With fewer than ``min_peers`` the slot does not count, and nobody
        is waited for.
        """
        self.params.check()
        if self._inner == 0:
            return
        with self._finishing():
            if self.group.is_new and self._agree():
                return  # what was loaded is not what the others have
            self._send_if(is_due=self._is_sent_by_others())
            if self._flight is not None:
                self._end_slot(waits=False)

    def _tells(self) -> dict[str, str]:
        sent = str(self.round) if self._flight is not None or self._is_to_send_again else ""
        return {_DELAY: str(self._schedule.delay), _SENT: sent}

    def _is_sent_by_others(self) -> bool:
        """This slot's fragment, by a member that was there when all last agreed; who came later begins with a slot."""
        told = [self.group.told[peer] for peer in self.comm.members if peer in self.group.told]
        by_delay = (self._schedule.is_due(self._inner, _number(one.get(_DELAY, ""))) for one in told)
        return any(by_delay) or any(one.get(_SENT) == str(self.round) for one in told)

    def state_dict(self) -> dict[str, Any]:
        """As of every optimizer; with what was in flight, which is sent again after ``load_state_dict``."""
        is_flying = self._flight is not None or self._is_to_send_again
        return super().state_dict() | {
            "residuals": [self.params.kept(residual) for residual in self._residuals],
            "in_flight": self.params.kept(self._contributions[self._fragment].send) if is_flying else None,
        }

    def _check_state(self, state: Any) -> None:
        super()._check_state(state)
        least = 0 if entry(state, "in_flight") is None else 1
        check_range("load_state_dict: inner_steps", state["inner_steps"], least, self._schedule.slot - 1)
        residuals = entry(state, "residuals")
        if not isinstance(residuals, list | tuple) or len(residuals) != len(self._residuals):
            raise errors.UsageError(f"load_state_dict: residuals: {len(self._residuals)} of them are needed")
        for i, residual in enumerate(self._residuals):
            check_arrays(residual, {"residuals": {str(i): residuals[i]}}, "residuals", str(i))
        if state["in_flight"] is not None:
            fragment = self._schedule.fragment(int(state["counters"][0]))
            check_arrays(self._contributions[fragment].send, state, "in_flight")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As of every optimizer, but the live weights are the caller's in any case: they are not at theta in a slot."""
        super().load_state_dict(state)
        for residual, arrays in zip(self._residuals, state["residuals"], strict=True):
            load(residual, arrays)
        if state["in_flight"] is not None:
            load(self._contributions[self._fragment].send, state["in_flight"])
            self._is_to_send_again = True

    @property
    def _residuals(self) -> list[Vectors]:
        return [c.residual for c in self._contributions if c.residual is not None]

    def _took(self, changed: bool) -> bool:
        if changed:
            self._abandon()
        return super()._took(changed)

    def _drain(self) -> None:
        """Nothing is in flight at the end of a slot."""
        assert self._flight is None

    def _abandon(self) -> None:
        super()._abandon()
        self._is_to_send_again = False


def _number(text: str) -> int:
    """What a member told; 0: it is none."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
