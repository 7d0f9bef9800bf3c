"""DiLoCo (arXiv:2311.08105), blocking, and one round late: ``AsyncDiLoCo``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pyccl.codecs import codec_of
from pyccl.communicator import Communicator
from pyccl.errors import PycclError, UsageError
from pyccl.guards import Guard
from pyccl.optim import codes, rules
from pyccl.optim.base import Array, OuterOptimizer, real
from pyccl.optim.exchange import RETRIED, Exchange, pieces_of
from pyccl.optim.group import StatesDifferedError, log
from pyccl.optim.params import Vectors
from pyccl.optim.saved import check_arrays, check_counts, entry, load
from pyccl.state import SharedState


class OuterStep:
    """The outer optimizer of some vectors: SGD, Nesterov or heavy-ball. momentum: None where mu is 0."""

    def __init__(self, lr: float, mu: float, nesterov: bool) -> None:
        if not 0 < real(lr) < math.inf:
            raise UsageError(f"outer_lr={lr!r}: a finite number above 0 is needed")
        if not 0 <= real(mu) < 1:
            raise UsageError(f"outer_momentum={mu!r}: a number of 0 <= mu < 1 is needed")
        if not isinstance(nesterov, bool):
            raise UsageError(f"nesterov={nesterov!r}: True or False is needed")
        self.lr, self.mu, self.nesterov = float(lr), float(mu), nesterov

    @property
    def has_momentum(self) -> bool:
        return self.mu != 0

    def settings(self) -> dict[str, object]:
        return {"outer_lr": self.lr, "outer_momentum": self.mu, "nesterov": self.nesterov}

    def apply(self, theta: Vectors, momentum: Vectors | None, g: Vectors) -> None:
        buffers: Sequence[Array | None] = [None] * len(g.vectors) if momentum is None else momentum.vectors
        for t, b, d in zip(theta.vectors, buffers, g.vectors, strict=True):
            rules.outer_sgd(t, b, d, lr=self.lr, mu=self.mu, nesterov=self.nesterov)


class Contribution:
    """What a replica sends: its pseudo-gradient, with what the codec lost in earlier rounds if that is fed back.

    send: what goes into an exchange. own: what the others decode of it; `send` itself where nothing is quantized.
    """

    def __init__(self, like: Vectors, quantize: str | None, error_feedback: bool) -> None:
        if quantize is not None:
            codec_of(quantize)
        if not isinstance(error_feedback, bool):
            raise UsageError(f"error_feedback={error_feedback!r}: True or False is needed")
        if error_feedback and quantize is None:
            raise UsageError("error_feedback=True: without quantize= nothing is lost that could be fed back")
        self.quantize = quantize
        self.send = like.like()
        self.residual = like.like() if error_feedback else None
        self.own = self.send if quantize is None else like.like()

    def settings(self) -> dict[str, object]:
        return {"quantize": self.quantize, "error_feedback": self.residual is not None}

    def is_refused_by(self, guard: Guard | None) -> bool:
        """Whether an exchange of what ``launch`` would send now will fail. `own` is overwritten."""
        if guard is None:
            return False
        for i, vector in enumerate(self.send.vectors):
            for part in pieces_of(vector):
                piece = vector[part]
                if self.residual is not None:
                    piece = piece + self.residual.vectors[i][part]
                if self.quantize is not None:
                    decoded = self.own.vectors[i][part]
                    codes.decode(codes.encode(piece, self.quantize), self.quantize, decoded)
                    piece = decoded
                if guard.refuses(*codes.magnitude(piece)):
                    return True
        return False

    def launch(self, exchange: Exchange) -> Exchange:
        """`send` holds the pseudo-gradient: add what was lost before, and start."""
        if self.residual is not None:
            for sent, lost in zip(self.send.vectors, self.residual.vectors, strict=True):
                np.add(sent, lost, out=sent)
        if self.quantize is not None:
            exchange.own = self.own.vectors
        return exchange.launch()

    def committed(self) -> None:
        """What was sent counts: carry what the codec lost of it."""
        if self.residual is not None:
            for lost, sent, own in zip(self.residual.vectors, self.send.vectors, self.own.vectors, strict=True):
                np.subtract(sent, own, out=lost)


class DiLoCo(OuterOptimizer):
    """Every ``sync_every`` inner steps the mean of theta - w over the replicas is a gradient for an outer optimizer.

    theta and the outer momentum are equal, bit for bit, on all members after each round, and the live weights begin
    each round from theta. A round with fewer than ``min_peers`` is rolled back: the live weights return to theta, the
    round does not count, and ``step()`` waits for company. The inner optimizer's state stays with its replica.

    Args:
        comm: connected. With other members there the constructor is collective: it brings this replica in step.
        params: see ``Params``.
        sync_every: inner steps of a round.
        outer_lr, outer_momentum, nesterov: as of torch.optim.SGD; momentum without nesterov is heavy-ball.
        quantize: None, or a codec of ``all_reduce``: every pseudo-gradient travels as codes and is rounded once; the
            mean is of what all decode.
        error_feedback: what the codec lost of this replica's pseudo-gradient is added to its next one.
        min_peers: replicas that a round needs.
        guard: None, "finite" or a ``Guard``: a pseudo-gradient that it refuses fails the round on all members
            (PoisonError, which names the replica); theta stays, the live weights return to it. Limits are for each
            vector that is exchanged, in pieces of 256 MiB.
        All but `comm` equal on all members.
    Raises:
        UsageError: arguments. MismatchError: the others' are different; `fields` names what.
    """

    def __init__(
        self,
        comm: Communicator,
        params: Any,
        sync_every: int,
        *,
        outer_lr: float = 0.7,
        outer_momentum: float = 0.9,
        nesterov: bool = True,
        quantize: str | None = None,
        error_feedback: bool = False,
        min_peers: int = 2,
        guard: Guard | str | None = None,
    ) -> None:
        self._set_up(
            comm, params, sync_every, OuterStep(outer_lr, outer_momentum, nesterov), quantize, error_feedback,
            min_peers, guard,
        )  # fmt: skip
        self._come_in()

    def _set_up(
        self,
        comm: Communicator,
        params: Any,
        sync_every: int,
        outer: OuterStep,
        quantize: str | None,
        error_feedback: bool,
        min_peers: int,
        guard: Guard | str | None,
        *,
        per_replica: bool = False,
        **settings: object,
    ) -> None:
        self._outer = outer
        super().__init__(
            comm, params, sync_every=sync_every, min_peers=min_peers, per_replica=per_replica, guard=guard,
            buffers=("momentum",) if outer.has_momentum else (),
            settings={
                **outer.settings(), "quantize": quantize, "error_feedback": error_feedback, **settings,
            },
        )  # fmt: skip
        self._momentum = self._buffers.get("momentum")
        self._contribution = Contribution(self._theta, quantize, error_feedback)
        self._mean = self._theta.like()

    def _launch(self) -> Exchange:
        """The exchange of the pseudo-gradient in the contribution's `send`."""
        mine = self._contribution
        return mine.launch(
            Exchange(
                self.comm,
                mine.send.vectors,
                self._mean.vectors,
                self.group.vow,
                quantize=mine.quantize,
                guard=self.guard,
            )
        )

    def _exchange_round(self) -> None:
        self.params.pseudo_gradient(self._theta, self._contribution.send)
        outcome = self._wait(self._launch())
        if outcome.world_size < self.min_peers:
            self._roll_back()
            self._wait_for_company()
            return
        self._outer.apply(self._theta, self._momentum, self._mean)
        self._contribution.committed()
        self._committed(outcome.world_size)
        self._begin_round()
        self._end_round(pending=outcome.pending, watched=outcome.watched)

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        residual = self._contribution.residual
        return super().state_dict() | {"residual": None if residual is None else self.params.kept(residual)}

    def _check_state(self, state: Any) -> None:
        super()._check_state(state)
        if self._contribution.residual is not None:
            check_arrays(self._contribution.residual, state, "residual")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if self._contribution.residual is not None:
            load(self._contribution.residual, state["residual"])


class AsyncDiLoCo(DiLoCo):
    """DiLoCo one round late: an exchange runs while the next round's inner steps do.

    Round t ends so: wait for the exchange of round t - 1 and make an outer step with its mean; launch the exchange of
    this round's theta - w, taken from the theta that the round began with; begin the next round from theta. The first
    round makes no outer step. Late gradients want less momentum than the defaults: see docs/optimizers.md.

    eager: the own share is taken fresh, those of the others one round old (arXiv:2502.12996). Each replica has a theta
    and a momentum of its own then; a newcomer takes those of one of the members. A share that the guard refuses is not
    taken, as if this replica had not moved.

    An exchange that can't be completed is skipped by all, as if it had not been launched. ``finish()`` applies the last
    one and puts theta into the live weights; inner steps since the last round are dropped. Other arguments and errors
    as of ``DiLoCo``.
    """

    def __init__(
        self,
        comm: Communicator,
        params: Any,
        sync_every: int,
        *,
        outer_lr: float = 0.7,
        outer_momentum: float = 0.9,
        nesterov: bool = True,
        quantize: str | None = None,
        error_feedback: bool = False,
        min_peers: int = 2,
        guard: Guard | str | None = None,
        eager: bool = False,
    ) -> None:
        if not isinstance(eager, bool):
            raise UsageError(f"eager={eager!r}: True or False is needed")
        self._set_up(
            comm, params, sync_every, OuterStep(outer_lr, outer_momentum, nesterov), quantize, error_feedback,
            min_peers, guard, per_replica=eager, eager=eager,
        )  # fmt: skip
        self._before = self._theta.like() if eager else None  # our share of the mean that was not applied yet
        self._late = _Late(self._mean)
        self._is_in = False  # whether we have a share in it
        self._too_few = self._pending = self._watched = False  # as the last exchange told
        self.group.more = self._late_states
        self._come_in()

    def _exchange_round(self) -> None:
        self._drain()
        mine = self._contribution
        self.params.pseudo_gradient(self._theta, mine.send)
        is_refused = self._before is not None and mine.is_refused_by(self.guard)  # which all find out a round later
        self._apply(mine.send.like() if is_refused else mine.send)
        if self._too_few:
            self._roll_back()
            self._wait_for_company()
            self._forget()
            return
        with self._counting():  # this round, which is another than the one that was applied
            self._flight = self._launch()
            self._late.launched()
            self._begin_round()
            self._end_round(pending=self._pending, watched=self._watched)

    def _admit(self) -> None:
        super()._admit()
        self._forget()

    def _forget(self) -> None:
        """What the last exchange told: a newcomer knows nothing of it."""
        self._too_few = self._pending = self._watched = False

    def _agree(self) -> bool:
        changed = super()._agree()
        self._forget()
        return changed

    def _drain(self) -> None:
        """The mean of what was in flight is here then, or it is agreed that there is none; nothing is applied."""
        if self._flight is None:
            return
        self._forget()
        self._late.world = 0
        if self._before is not None:
            self._before.copy_from(self._contribution.own)
        try:
            outcome = self._wait(self._flight)
        except PycclError as e:
            self.stats.rollbacks += 1
            if not isinstance(e, RETRIED) or isinstance(e, StatesDifferedError):
                raise
            log.warning("outer_step_skipped cause=%r", e)
            return
        self._too_few = outcome.world_size < self.min_peers
        self._pending, self._watched = outcome.pending, outcome.watched
        if not self._too_few:
            self._late.world, self._is_in = outcome.world_size, True
            self._contribution.committed()

    def _apply(self, newest: Vectors) -> None:
        """An outer step with the mean that is there; `newest` is our pseudo-gradient of now."""
        world = self._late.world
        if world == 0:
            return
        if self._before is not None:
            triples = zip(self._mean.vectors, newest.vectors, self._before.vectors, strict=True)
            for mean, fresh, before in triples:
                if self._is_in:
                    rules.eager(mean, fresh, before, world)
                else:
                    rules.eager_joining(mean, fresh, world, out=mean)
        self._outer.apply(self._theta, self._momentum, self._mean)
        self._late.world = 0
        self._committed(world)

    def _abandon(self) -> None:
        super()._abandon()
        self._late.world = 0

    def finish(self) -> None:
        self.params.check()
        with self._finishing():
            self._drain()
            if self._too_few:
                self.stats.rollbacks += 1
                self._too_few = False
            elif self._late.world:
                self._contribution.send.fill(0.0)  # no inner steps of ours are newer than what is in the mean
                self._apply(self._contribution.send)
        self._begin_round()

    def _late_states(self) -> Sequence[SharedState]:
        """The mean that everybody will apply at the end of the round, for a newcomer."""
        if not self.group.keeps_own:
            self._is_in = False
        return (self._late.settled(),)

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """As of every optimizer; waits for the exchange in flight. If it failed, the state is one without it, and what
        follows from that, an error too, comes with the end of the round, whoever saves."""
        if self._flight is not None:
            with self._blocked():
                ends_well = self._flight.ends_well()
            if ends_well:
                self._drain()
        late = {"numbers": self._late.numbers, "is_in": self._is_in, "mean": self.params.kept(self._mean)}
        before = None if self._before is None else self.params.kept(self._before)
        return super().state_dict() | {"late": late, "before": before}

    def _check_state(self, state: Any) -> None:
        super()._check_state(state)
        check_arrays(self._mean, state, "late", "mean")
        check_counts(len(self._late.numbers), state, "late", "numbers")
        if not isinstance(entry(state, "late", "is_in"), bool):
            raise UsageError("load_state_dict: late/is_in: True or False is needed")
        if self._before is not None:
            check_arrays(self._before, state, "before")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        load(self._mean, state["late"]["mean"])
        self._late.loaded(state["late"]["numbers"])
        self._is_in = bool(state["late"]["is_in"])
        if self._before is not None:
            load(self._before, state["before"])


class _Late:
    """A mean that is not applied yet, as a shared state of its own: newcomers get it, at no other time is it compared.

    world: over how many replicas; 0: there is none.
    """

    def __init__(self, mean: Vectors) -> None:
        self._mean = mean
        self._numbers = np.zeros(2, np.int64)  # [world, exchanges launched]
        views = {f"late/{name}": view for name, view in mean.views.items()}
        self._state = SharedState({**views, "numbers": self._numbers})

    @property
    def world(self) -> int:
        return int(self._numbers[0])

    @world.setter
    def world(self, value: int) -> None:
        self._numbers[0] = value

    def launched(self) -> None:
        self._numbers[1] += 1

    def loaded(self, numbers: Sequence[int]) -> None:
        self._numbers[:] = numbers
        self._state.voter = None

    @property
    def numbers(self) -> list[int]:
        return [int(number) for number in self._numbers]

    def settled(self) -> SharedState:
        """Nothing is in flight: the same bits on all who were there, and newer than a newcomer's."""
        if self.world == 0:
            self._mean.fill(0.0)
        self._state.revision = int(self._numbers[1])
        return self._state
