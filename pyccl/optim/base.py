"""OuterOptimizer: what the optimizers have in common: parameters, theta, shared state, membership, counting steps.

A round is ``sync_every`` inner steps of the user's and an exchange. A subclass says what an exchange does
(``_exchange_round``); what happens when members come, are lost or are too few is here and in ``group.py``.
"""

from __future__ import annotations

import math
import numbers
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType, TracebackType
from typing import Any, ClassVar, Final, Self

import numpy as np

from pyccl import errors
from pyccl.calls import check_range
from pyccl.communicator import Communicator
from pyccl.guards import Guard, parse_guard
from pyccl.optim.exchange import Exchange, Outcome
from pyccl.optim.group import Group, Stats, log
from pyccl.optim.params import Params
from pyccl.optim.saved import check_arrays, check_counts, entry, load
from pyccl.state import SharedState

Array = np.ndarray[Any, Any]
_COUNTERS = "counters/all"
_TAKEN_OUT: Final = (errors.EvictedError, errors.OutcomeUnknownError)


class OuterOptimizer(ABC):
    """Base of the optimizers; see them for what they do.

    theta: name -> array of the outer weights, float32 (float64 for float64 parameters); they change in place.
    shared: the SharedState that is kept in step: theta, outer buffers, counters.
    stats: see ``Stats``. params: see ``Params``.
    """

    _rounds_begin_at_theta: ClassVar[bool] = True

    def __init__(
        self,
        comm: Communicator,
        params: Any,
        *,
        sync_every: int,
        min_peers: int,
        settings: Mapping[str, object],
        buffers: Sequence[str] = (),
        per_replica: bool = False,
        guard: Guard | str | None = None,
    ) -> None:
        """settings: what else must be equal on all members. buffers: parts beside theta, each as large as theta.

        Does nothing collective: a subclass ends its own with ``_come_in``.
        """
        check_range("sync_every", sync_every, 1, 1 << 31)
        check_range("min_peers", min_peers, 1, 1 << 16)
        if comm._session is not None:
            comm._require()  # closed, say; one that was never connected may be given
        self.comm, self.stats = comm, Stats()
        self.params = params if isinstance(params, Params) else Params(params)
        self.sync_every, self.min_peers = int(sync_every), int(min_peers)
        self.guard = parse_guard(guard)
        self._theta = self.params.vectors()
        self.params.read(self._theta)
        self._buffers = {part: self._theta.like() for part in buffers}
        self._counters = np.zeros(4, np.int64)  # [outer steps, contributions, 0, 0]
        arrays = {f"theta/{name}": view for name, view in self._theta.views.items()}
        for part, vectors in self._buffers.items():
            arrays |= {f"{part}/{name}": view for name, view in vectors.views.items()}
        self.shared = SharedState({**arrays, _COUNTERS: self._counters})
        self.theta: Mapping[str, Array] = MappingProxyType(
            self._theta.views | {name: self._theta.views[first] for name, first in self.params.aliases.items()}
        )
        told = {
            "optimizer": type(self).__name__, "sync_every": sync_every, "min_peers": min_peers,
            "params": self.params.layout(), "shard": self.params.shards(), **settings,
        }  # fmt: skip
        if self.guard is not None:
            told["guard"] = self.guard
        self._settings = {name: str(value) for name, value in told.items()}
        self.group = Group(comm, self.shared, self._settings, self.min_peers, self.stats, per_replica=per_replica)
        self._inner = 0  # inner steps since the round began
        self._flight: Exchange | None = None
        self._hooks: list[Any] = []

    # ---- what a training loop calls

    @property
    def round(self) -> int:
        """Outer steps that the shared state has seen, those before this peer joined too."""
        return int(self._counters[0])

    @property
    def contributions(self) -> int:
        """Replicas that took part in an outer step, added over all of them: times the inner steps of a round and their
        batch, the samples that theta has learned from, however many replicas there were."""
        return int(self._counters[1])

    def step(self) -> bool:
        """Count a finished inner step; where a round is complete, exchange. Returns whether it was.

        Raises:
            MismatchError: the members' settings or states differ; peers and fields are named. After a difference of
                states all have been brought in step again and begin a new round.
            PeerLostError, DeadlineError, MasterUnavailableError: the exchange failed many times, on all members; the
                round does not count. Go on to try again.
            UsageError: the communicator is not connected; or a live parameter is not what it was (see
                ``Params.check``): nothing has changed then, and the step does not count.
        """
        self.params.check()
        if self.group.is_new and self._start():
            return False  # what this step had begun from is not what the others have
        self._inner += 1
        self.stats.inner_steps += 1
        return self._stepped()

    def finish(self) -> None:
        """Wait for what is in flight and apply it. Nothing is, unless an optimizer says so.

        Not for company: where too few are left, or this peer was taken out of the run, what was in flight does not
        count; who goes on afterwards waits, or comes back, in ``step()``.

        Raises: as ``step``, of what is in flight.
        """
        self._drain()

    def attach(self, optimizer: Any) -> Any:
        """Call ``step()`` after every ``optimizer.step()`` of a torch optimizer. Returns the hook's handle."""
        if not hasattr(optimizer, "register_step_post_hook"):
            raise errors.UsageError(f"attach: {type(optimizer).__name__} has no register_step_post_hook")

        def stepped(*_: Any) -> None:
            self.step()

        handle = optimizer.register_step_post_hook(stepped)
        self._hooks.append(handle)
        return handle

    def detach(self) -> None:
        """Undo every ``attach``."""
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()
        if kind is None:
            self.finish()

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Copies of all that this optimizer holds; save the live weights and the inner optimizer's state beside it.

        Tensors in host memory where the parameters are tensors, else NumPy arrays, in dicts and lists, with texts and
        whole numbers: what ``torch.load`` takes as it is, without ``weights_only=False``.
        """
        return {
            "settings": dict(self._settings),
            "theta": self.params.kept(self._theta),
            "buffers": {part: self.params.kept(vectors) for part, vectors in self._buffers.items()},
            "counters": self._counters.tolist(),
            "inner_steps": self._inner,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict()``. All members load, before their next ``step()``; the newest state wins.

        The live weights are set to theta if the state was taken at the end of a round; else they are the caller's.

        Raises:
            UsageError: it is of another optimizer, of other parameters or other settings, which are named; or what it
                lacks, or what does not fit. Nothing has changed then.
        """
        self.params.check()
        self._check_state(state)
        self._abandon()
        load(self._theta, state["theta"])
        for part, vectors in self._buffers.items():
            load(vectors, state["buffers"][part])
        self._counters[:] = state["counters"]
        self._inner = int(state["inner_steps"])
        if self._inner == 0 and self._rounds_begin_at_theta:
            self.params.write(self._theta)
        self.shared.revision = self.round
        self.group.loaded()

    # ---- for subclasses

    def _check_state(self, state: Any) -> None:
        """UsageError unless all of it can be loaded here."""
        settings = entry(state, "settings")
        if not isinstance(settings, Mapping) or not all(isinstance(x, str) for pair in settings.items() for x in pair):
            raise errors.UsageError(f"load_state_dict: settings is {settings!r}, texts by their names are needed")
        names = {*self._settings, *settings}
        differ = sorted(name for name in names if self._settings.get(name) != settings.get(name))
        if differ:
            raise errors.UsageError(f"load_state_dict: {', '.join(differ)} are not as here")
        check_arrays(self._theta, state, "theta")
        for part, vectors in self._buffers.items():
            check_arrays(vectors, state, "buffers", part)
        check_counts(self._counters.size, state, "counters")
        check_range("load_state_dict: inner_steps", entry(state, "inner_steps"), 0, self.sync_every - 1)

    def _stepped(self) -> bool:
        """An inner step was counted. Here: an exchange after every ``sync_every``."""
        if self._inner < self.sync_every:
            return False
        self._inner = 0
        with self._staying():
            if self.group.has_strangers():
                self._drain()
                self._agree()
            self._exchange_round()
        return True

    @abstractmethod
    def _exchange_round(self) -> None:
        """A round's inner steps are done: exchange, step, begin the next round. Every member is here."""

    def _drain(self) -> None:
        """Wait for what is in flight: members are about to be let in."""
        assert self._flight is None, "who launches exchanges knows how to end them"

    def _come_in(self) -> None:
        """In the constructor: with others there, get in step before the first inner step; alone, wait with that.

        But not where a shard is trained, whose first step the other ranks of the island take part in: if of two islands
        either has the first peer of one shard, each would wait for a rank that waits for the other's first step.
        """
        if self.comm.group_world_size > 1 or self.params.shards():
            self._start()

    def _start(self) -> bool:
        """Whether theta was replaced; the live weights then, too."""
        with self._blocked():
            return self._took(self.group.start())

    def _agree(self) -> bool:
        with self._blocked():
            return self._took(self.group.agree())

    def _admit(self) -> None:
        """Newcomers wait: let them in."""
        self._drain()
        with self._blocked():
            self._took(self.group.admit())

    def _end_round(self, *, pending: bool, watched: bool) -> None:
        """As the exchange told, and so on all members: let newcomers in, or show observers the new revision."""
        if pending:
            self._admit()
        elif watched:
            with self._blocked():
                self.group.show()

    def _wait_for_company(self) -> None:
        """Too few for an exchange; the round did not count."""
        self.stats.rollbacks += 1
        with self._blocked():
            self._took(self.group.gather_company())

    def _took(self, changed: bool) -> bool:
        """After a sync: a replica whose theta was replaced begins a round from it."""
        if changed:
            self.params.write(self._theta)
            self._inner = 0
        return changed

    def _wait(self, exchange: Exchange) -> Outcome:
        """The end of an exchange. MismatchError: the members' states differed; they are in step again."""
        self._flight = None
        with self._blocked():
            outcome = exchange.wait()
        self.stats.tx_bytes += outcome.tx_bytes
        self.stats.rx_bytes += outcome.rx_bytes
        self.stats.retries += outcome.attempts - 1
        self.stats.seconds_hidden += exchange.seconds_hidden
        if not outcome.kept:
            self._heal()
        return outcome

    def _heal(self) -> None:
        with self._blocked():
            error = self.group.explain()
            try:
                self.group.agree()
            except errors.MismatchError:
                log.info("in_step_again")
        self._begin_round()
        raise error

    def _roll_back(self) -> None:
        """A round that does not count."""
        self._begin_round()

    def _begin_round(self) -> None:
        """The live weights start from theta."""
        self._inner = 0
        self.params.write(self._theta)

    def _committed(self, world_size: int) -> None:
        """The shared arrays have advanced by an outer step, over so many replicas."""
        self._counters[:2] += 1, world_size
        self.shared.revision = self.round
        self.stats.rounds += 1

    @contextmanager
    def _blocked(self) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self.stats.seconds_blocked += time.monotonic() - begun

    @contextmanager
    def _staying(self) -> Iterator[None]:
        """Who was taken out of the run comes back as a newcomer; other errors leave the weights at theta."""
        try:
            with self._undoing():
                yield
        except _TAKEN_OUT:
            with self._blocked():
                self.group.rejoin()
                self._took(self.group.start())
            self._begin_round()

    @contextmanager
    def _finishing(self) -> Iterator[None]:
        """As ``_staying``, but who was taken out of the run does not wait for others here: ``step()`` will."""
        try:
            with self._undoing():
                yield
        except _TAKEN_OUT as e:
            log.warning("not_finished cause=%r", e)

    @contextmanager
    def _undoing(self) -> Iterator[None]:
        """After an error nothing is in flight, and the weights are at theta."""
        try:
            with self._counting():
                yield
        except errors.PycclError:
            self._abandon()
            self._roll_back()
            raise

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """An error ends a round that does not count, unless it is counted already."""
        ends = self.stats.rounds + self.stats.rollbacks
        try:
            yield
        except errors.PycclError:
            if self.stats.rounds + self.stats.rollbacks == ends:
                self.stats.rollbacks += 1
            raise

    def _abandon(self) -> None:
        """Give up what is in flight."""
        if self._flight is not None:
            self._flight.give_up()
            self._flight = None


def real(value: object) -> float:
    """A rate that a user gave, of Python or NumPy; NaN where it is no number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf
