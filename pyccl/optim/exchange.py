"""Exchange: the mean of everybody's vectors, in the background, agreed upon by all who took part.

Vectors are cut into pieces; each is an operation of its own, all start at once. `send` is never written, so that what
has to be done again starts from the original: pieces that failed, and pieces whose participants are not those of the
newest epoch (a member was lost between two pieces), so that all pieces are means over the same replicas. Whether an
operation ended well, and with whom, is the same on all survivors; so is everything decided here.

Unquantized a piece is an ``all_reduce`` with op "avg": one sum in float32 (float64), one division. Quantized, every
replica's piece travels as codes to all others, which decode all of them, its own too, and average in float32, in member
order: each share is rounded once, the mean is not (arXiv:2501.18512, algorithm 2). That moves (N - 1) encoded pieces
to each member.

A *vow* rides along: a few numbers that must be equal on all members (round, digest of what is shared, settings), and
whether newcomers wait or observers watch. It is an ``all_reduce`` of its own, whose size does not depend on the
membership.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from pyccl import errors
from pyccl.communicator import Communicator
from pyccl.core import Gather, ReduceInfo, Work
from pyccl.guards import Guard
from pyccl.optim import codes
from pyccl.reference import QUANTIZE_BLOCK

Array = np.ndarray[Any, Any]

PIECE_BYTES: Final = 256 << 20
TAG_VOW: Final = 0x7063_6300  # tags of the optimizers; a program's own operations should keep away from them
TAG_PIECES: Final = 0x7063_6301
TAG_RECORDS: Final = 0x7063_6302
ATTEMPTS_MAX: Final = 8
RETRIED: Final = (errors.PeerLostError, errors.DeadlineError, errors.MasterUnavailableError, errors.MismatchError)
_ALL_ONES: Final = np.uint64(0xFFFF_FFFF_FFFF_FFFF)


@dataclass(frozen=True, slots=True)
class Vow:
    """words: numbers below 2**64 that must be equal on all members. pending, watched: newcomers, or observers of the
    shared state, that this peer knows of."""

    words: tuple[int, ...]
    pending: bool
    watched: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """Equal on all members. The mean is in `recv`.

    world_size, members (hex ids in rank order): whose vectors the mean is of. kept: all had the same vow. pending,
    watched: somebody knows of newcomers, of observers. seconds: from launch until the last operation had ended.
    """

    world_size: int
    members: tuple[str, ...]
    kept: bool
    pending: bool
    watched: bool
    attempts: int
    tx_bytes: int
    rx_bytes: int
    seconds: float


@dataclass(slots=True)
class _Piece:
    send: Array
    recv: Array
    codes: Array | None = None  # of `send`
    work: Work | Gather | None = None
    info: ReduceInfo | None = None  # once it has ended well


@dataclass(slots=True)
class Exchange:
    """One exchange. ``launch()`` starts it and returns; ``wait()`` ends it.

    Args:
        comm: connected.
        send: vectors, contiguous, float32 or float64; equal sizes on all members; must not change until ``wait()``.
        recv: arrays of the same sizes and dtypes, apart from `send`; undefined until ``wait()`` has returned.
        vow: makes what rides along, when the vectors are on their way; None: nothing does.
        quantize: None or a codec.
        own: where quantized, arrays that receive `send` as the others decode it, at launch; or empty.
        guard: of each piece.
        tag: of the pieces; exchanges that are under way at a time need different ones.
    """

    comm: Communicator
    send: Sequence[Array]
    recv: Sequence[Array]
    vow: Callable[[], Vow] | None = None
    quantize: str | None = None
    own: Sequence[Array] = ()
    tag: int = TAG_PIECES
    guard: Guard | None = None
    _pieces: list[_Piece] = field(default_factory=list)
    _vow: _Piece | None = None
    _started: float = 0.0
    _tx: int = 0
    _rx: int = 0
    _seconds: float = 0.0
    _begun: float = 0.0  # the last attempt, seconds after launch
    _seconds_hidden: float = 0.0
    _ended: Outcome | errors.PycclError | None = None

    def launch(self) -> Exchange:
        self._started = time.monotonic()
        try:
            for vector, (send, recv) in enumerate(zip(self.send, self.recv, strict=True)):
                for part in pieces_of(send):
                    piece = _Piece(send[part], recv[part])
                    self._pieces.append(piece)
                    if self.quantize is not None:
                        piece.codes = codes.encode(piece.send, self.quantize)
                    piece.work = self._submit(piece)
                    if self.quantize is not None and piece.codes is not None and self.own:
                        codes.decode(piece.codes, self.quantize, self.own[vector][part])
            if self.vow is not None:  # after the pieces: making it takes as long as a pass over theta
                vow = self.vow()
                words = np.array(vow.words, np.uint64)
                sent = np.concatenate([words, words ^ _ALL_ONES, np.array([vow.pending, vow.watched], np.uint64)])
                self._vow = _Piece(sent, np.zeros_like(sent))
                self._vow.work = self._submit(self._vow)
        except BaseException:
            self.give_up()
            raise
        return self

    def wait(self) -> Outcome:
        """Wait for the end; what failed is tried again among those who are left. Called again, it ends the same way.

        Raises:
            PoisonError: the guard refuses what a member contributed, on all members alike.
            errors of RETRIED: it failed ATTEMPTS_MAX times, on all members alike.
            EvictedError, OutcomeUnknownError: this peer is out of the run.
        """
        if self._ended is None:
            begun = time.monotonic()
            try:
                self._ended = self._attempts()
            except errors.PycclError as e:
                self._ended = e
            self._seconds_hidden = min(self._seconds, begun - self._started)
        if isinstance(self._ended, errors.PycclError):
            raise self._ended
        return self._ended

    def ends_well(self) -> bool:
        """Wait, and tell whether ``wait()`` will return an outcome that all vowed alike."""
        try:
            return self.wait().kept
        except errors.PycclError:
            return False

    @property
    def seconds_hidden(self) -> float:
        """In which its operations ran before anybody waited for them."""
        return self._seconds_hidden

    def give_up(self) -> None:
        """End what is under way, with or without a result."""
        for piece in self._all():
            if piece.work is not None:
                piece.work._settle()
                piece.work = None

    # ---- inside

    def _all(self) -> list[_Piece]:
        return self._pieces if self._vow is None else [self._vow, *self._pieces]

    def _attempts(self) -> Outcome:
        for attempt in range(1, ATTEMPTS_MAX + 1):
            failed = self._end()
            if failed is None and self._same_participants():
                return self._outcome(attempt)
            if failed is not None and attempt == ATTEMPTS_MAX:
                raise failed
            self._begin()
        raise errors.PeerLostError(f"members were lost in each of {ATTEMPTS_MAX} attempts of an exchange")

    def _begin(self) -> None:
        """Start what has no result yet."""
        self._begun = time.monotonic() - self._started
        try:
            for piece in self._all():
                if piece.info is None and piece.work is None:
                    piece.work = self._submit(piece)
        except BaseException:
            self.give_up()
            raise

    def _submit(self, piece: _Piece) -> Work | Gather:
        if piece is self._vow:
            return self.comm.all_reduce_async(piece.send, out=piece.recv, op="max", tag=TAG_VOW)
        if piece.codes is None:
            return self.comm.all_reduce_async(piece.send, out=piece.recv, op="avg", tag=self.tag, guard=self.guard)
        return self.comm._all_gather_async(piece.codes, tag=self.tag)

    def _end(self) -> errors.PycclError | None:
        """Wait for all that was started. The first error that another attempt may mend; others are raised."""
        failed: errors.PycclError | None = None
        for piece in self._all():
            work, piece.work = piece.work, None
            if work is None:
                continue
            try:
                piece.info = self._finish(piece, work)
            except RETRIED as e:
                failed = failed or e
            except BaseException:
                self.give_up()
                raise
            if piece.info is not None:
                self._tx += piece.info.tx_bytes
                self._rx += piece.info.rx_bytes
                self._seconds = max(self._seconds, self._begun + piece.info.seconds)
        return failed

    def _finish(self, piece: _Piece, work: Work | Gather) -> ReduceInfo:
        try:
            ended = work.wait()
        except errors.AloneError:
            return self._alone(piece)
        if isinstance(ended, ReduceInfo):
            return ended
        gathered, info = ended
        assert self.quantize is not None
        self._look_at(gathered, info, piece)
        codes.average(list(gathered), self.quantize, piece.recv)
        return info

    def _look_at(self, gathered: Array, info: ReduceInfo, piece: _Piece) -> None:
        """All hold the same codes, so all find the same."""
        if self.guard is None:
            return
        assert self.quantize is not None
        for encoded, peer in zip(gathered, info.members, strict=True):
            codes.decode(encoded, self.quantize, piece.recv)
            self._check_share(piece.recv, peer)

    def _check_share(self, share: Array, peer: str) -> None:
        if self.guard is not None and self.guard.refuses(*codes.magnitude(share)):
            raise errors.PoisonError(
                f"exchange: the guard refuses what a member contributed (peer {peer[:8]})", peer=peer
            )

    def _alone(self, piece: _Piece) -> ReduceInfo:
        """Nobody else is left: the mean is of the own share, as others would have decoded it."""
        if piece.codes is None:
            np.copyto(piece.recv, piece.send)
        else:
            assert self.quantize is not None
            codes.average([piece.codes], self.quantize, piece.recv)
        if piece is not self._vow:
            self._check_share(piece.recv, self.comm.peer_id)
        return ReduceInfo(1, (self.comm.peer_id,), self.comm.epoch, 1, "direct", 0, 0, 0.0)

    def _same_participants(self) -> bool:
        """Drop the results of pieces in which somebody took part who was lost by the time of another."""
        infos = [piece.info for piece in self._pieces if piece.info is not None]
        fewest = min((info.world_size for info in infos), default=0)  # epochs of losses only remove members
        for piece in self._pieces:
            if piece.info is not None and piece.info.world_size != fewest:
                piece.info = None
        return all(piece.info is not None for piece in self._pieces)

    def _outcome(self, attempts: int) -> Outcome:
        info = next((piece.info for piece in reversed(self._all()) if piece.info is not None), None)
        members = (self.comm.peer_id,) if info is None else info.members
        most = max((piece.info.attempts for piece in self._all() if piece.info is not None), default=1)
        kept, pending, watched = True, False, False
        if self._vow is not None:
            count = self._vow.send.size // 2 - 1
            high, low = self._vow.recv[:count], self._vow.recv[count : 2 * count] ^ _ALL_ONES
            kept = bool(np.array_equal(high, low))
            pending, watched = (bool(flag) for flag in self._vow.recv[2 * count :])
        return Outcome(
            len(members), members, kept, pending, watched, attempts + most - 1, self._tx, self._rx,
            self._seconds,
        )  # fmt: skip


def pieces_of(vector: Array) -> Iterator[slice]:
    """What travels as an operation of its own, and what a guard looks at as one."""
    step = max(1, PIECE_BYTES // vector.itemsize // QUANTIZE_BLOCK) * QUANTIZE_BLOCK
    for at in range(0, vector.size, step):
        yield slice(at, at + step)
