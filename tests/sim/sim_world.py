"""The simulated world: one clock, one seed, one queue of events; processes, and pipes between them that can fail.

It knows nothing of pyccl. Time is an integer number of nanoseconds that only ``World.run`` moves; all randomness comes
from ``World.rng``. A pipe keeps its order, as TCP does: what can't be delivered now (the path is cut, the receiver is
stopped, or leaves it unread) stays in it with all that is behind it. What a closing end leaves in it arrives whole, in
part or not at all.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Final

S: Final = 1_000_000_000
CLOSE: Final = object()  # the last item of a pipe
SENT_KEPT: Final = 24


class SimError(AssertionError):
    """Something that must always hold did not."""


class Process:
    """What the path and the pipes know of a process. ``stopped``: SIGSTOP; ``held``: its control thread hangs."""

    def __init__(self, world: World, name: str, index: int | None = None) -> None:
        """index: of the process whose place it takes."""
        self.world, self.name = world, name
        self.index = world.process_count if index is None else index
        world.process_count += index is None
        self.alive, self.stopped, self.held = True, False, False
        self.skew = 0  # its clock is so many ns ahead
        self.slow_s = 0.0  # what it does and sends comes so much later, at most
        self.backlog: list[tuple[Callable[..., Any], tuple[Any, ...], bool]] = []

    @property
    def now(self) -> int:
        """By its own clock, which rises and may jump."""
        return self.world.now + self.skew

    @property
    def now_s(self) -> float:
        return (self.world.now + self.skew) / S

    def soon(self, delay_s: float, fn: Callable[..., Any], *args: Any, engine: bool = False) -> None:
        """Run in this process after the delay; while it is stopped (its control thread held) it waits."""
        if self.slow_s:
            delay_s += self.slow_s * self.world.rng.random()
        self.world.at(delay_s, self._do, fn, args, engine)

    def _do(self, fn: Callable[..., Any], args: tuple[Any, ...], engine: bool) -> None:
        if not self.alive:
            return
        if self.stopped or (self.held and not engine):
            self.backlog.append((fn, args, engine))
            return
        fn(*args)

    def stop(self) -> None:
        self.stopped = True

    def hold(self) -> None:
        self.held = True

    def resume(self) -> None:
        """Runs again: what waited is done in random order between what its sockets hold, timers first or last."""
        self.stopped = self.held = False
        waiting, self.backlog = self.backlog, []
        late = self.world.rng.random() * 0.01
        for fn, args, engine in waiting:
            self.soon(late, fn, *args, engine=engine)
        self.world.repump(0.005)


class World:
    def __init__(self, seed: int, trace_max: int | None = 400) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.random = self.rng.random
        self.now = 0
        self.process_count = 1  # 0 is the master
        self.trace: deque[tuple[int, str, tuple[Any, ...]]] = deque(maxlen=trace_max)
        self.prints_trace = False  # as it happens: also of a run that ends in an abort of the C code
        self.events = 0
        self._queue: list[tuple[int, int, Callable[..., Any], tuple[Any, ...]]] = []
        self._order = 0
        self._stalled: dict[Pipe, None] = {}
        self.mute: Counter[int] = Counter()  # nothing leaves these processes
        self.deaf: Counter[int] = Counter()  # nothing reaches these
        self.cuts: Counter[tuple[int, int]] = Counter()  # (from, to)
        self.delay_s = 0.002
        self.spike_rate, self.spike_s = 0.0, 0.0

    @property
    def now_s(self) -> float:
        return self.now / S

    def at(self, delay_s: float, fn: Callable[..., Any], *args: Any) -> None:
        self._order += 1
        heapq.heappush(self._queue, (self.now + int(delay_s * S), self._order, fn, args))

    def at_ns(self, at: int, fn: Callable[[], Any]) -> None:
        self._order += 1
        heapq.heappush(self._queue, (at, self._order, fn, ()))

    def run(self, until_s: float, stop: Callable[[], bool] | None = None) -> bool:
        """False: the time ran out before ``stop`` was true."""
        until, queue = int(until_s * S), self._queue
        while queue and queue[0][0] <= until:
            at, _, fn, args = heapq.heappop(queue)
            self.now = at
            self.events += 1
            fn(*args)
            if stop is not None and stop():
                return True
        self.now = max(self.now, until)
        return stop is None

    def note(self, text: str, *args: Any) -> None:
        self.trace.append((self.now, text, args))
        if self.prints_trace:
            print(f"{self.now / S:10.4f} {text % args if args else text}", flush=True)

    def trace_text(self) -> str:
        return "\n".join(f"{at / S:10.4f} {text % args if args else text}" for at, text, args in self.trace)

    def latency(self) -> float:
        if self.spike_rate and self.random() < self.spike_rate:
            return self.random() * self.spike_s
        return self.random() * self.delay_s

    # ---- paths

    def blocked(self, src: Process, dst: Process) -> bool:
        """Nothing passes from one to the other."""
        if not self.mute and not self.deaf and not self.cuts:
            return False
        return src.index in self.mute or dst.index in self.deaf or (src.index, dst.index) in self.cuts

    def apart(self, a: Process, b: Process) -> bool:
        """They cannot connect, which needs both ways."""
        return self.blocked(a, b) or self.blocked(b, a)

    def cut(self, a: Process, b: Process | None, for_s: float) -> None:
        """Nothing passes between a and b (None: between a and anybody); what is sent meanwhile arrives afterwards."""
        self.cut_way(a, b, for_s)
        self.cut_way(b, a, for_s)

    def cut_way(self, src: Process | None, dst: Process | None, for_s: float) -> None:
        """Nothing passes from src to dst; None: anybody."""
        counter, key = self._way(src, dst)
        counter[key] += 1
        self.at(for_s, self._mend, src, dst)

    def _way(self, src: Process | None, dst: Process | None) -> tuple[Counter[Any], Any]:
        if dst is None:
            assert src is not None
            return self.mute, src.index
        return (self.deaf, dst.index) if src is None else (self.cuts, (src.index, dst.index))

    def _mend(self, src: Process | None, dst: Process | None) -> None:
        counter, key = self._way(src, dst)
        counter[key] -= 1
        if counter[key] <= 0:
            del counter[key]
        self.repump(0.2)

    def stalled(self, pipe: Pipe) -> None:
        self._stalled[pipe] = None

    def repump(self, within_s: float) -> None:
        """Something changed: what waited may move."""
        waiting, self._stalled = list(self._stalled), {}
        for pipe in waiting:
            pipe.retry(self.rng.random() * within_s)


class Pipe:
    """One way of one connection."""

    __slots__ = ("_last", "_queue", "_waits", "deliver", "dst", "engine", "sent", "src", "world")

    def __init__(
        self, world: World, src: Process, dst: Process, deliver: Callable[[Any], bool], *, engine: bool
    ) -> None:
        self.world, self.src, self.dst, self.deliver, self.engine = world, src, dst, deliver, engine
        self._queue: deque[tuple[int, Any]] = deque()
        self.sent: deque[Any] = deque(maxlen=SENT_KEPT)  # what a fault may bring once more
        self._last = 0
        self._waits = False

    def send(self, item: Any, delay_s: float) -> None:
        world = self.world
        at = world.now + int(delay_s * S)
        if at < self._last:
            at = self._last
        self._last = at
        self._queue.append((at, item))
        if item is not CLOSE:
            self.sent.append(item)
        if not self._waits:
            self._waits = True
            world.at_ns(at, self._pump)

    def retry(self, delay_s: float) -> None:
        if not self._waits:
            self._waits = True
            self.world.at(delay_s, self._pump)

    def cut_off(self, keep: int) -> None:
        """Only the first `keep` items still arrive."""
        while len(self._queue) > keep:
            self._queue.pop()

    def __len__(self) -> int:
        return len(self._queue)

    def _pump(self) -> None:
        self._waits = False
        queue, world, dst = self._queue, self.world, self.dst
        while queue:
            at, item = queue[0]
            if at > world.now:
                self._waits = True
                world.at_ns(at, self._pump)
                return
            if not dst.alive:
                queue.clear()
                return
            cuts = world.mute or world.deaf or world.cuts
            if dst.stopped or (dst.held and not self.engine) or (cuts and world.blocked(self.src, dst)):
                world.stalled(self)
                return
            queue.popleft()
            if not self.deliver(item):
                queue.appendleft((at, item))
                world.stalled(self)
                return


class Conn:
    """A connection between two processes: a pipe each way. Ends are 0 and 1."""

    __slots__ = ("adopted", "closed", "owners", "pipes", "world")

    def __init__(
        self,
        world: World,
        ends: tuple[Process, Process],
        deliver: tuple[Callable[[Conn, Any], bool], Callable[[Conn, Any], bool]],
        *,
        engine: bool,
    ) -> None:
        """deliver[i] takes what arrives at end i; CLOSE comes last."""
        self.world, self.owners = world, ends
        self.closed = [False, False]
        self.adopted = [False, False]  # that end reads it
        self.pipes = (
            Pipe(world, ends[0], ends[1], lambda item: deliver[1](self, item), engine=engine),
            Pipe(world, ends[1], ends[0], lambda item: deliver[0](self, item), engine=engine),
        )

    @property
    def whole(self) -> bool:
        return not (self.closed[0] or self.closed[1])

    def end_of(self, process: Process) -> int:
        return 0 if self.owners[0] is process else 1

    def send(self, process: Process, item: Any) -> None:
        if self.closed[0] or self.closed[1]:
            return
        delay_s = self.world.latency()
        if process.slow_s:
            delay_s += process.slow_s * self.world.rng.random()
        self.pipes[0 if self.owners[0] is process else 1].send(item, delay_s)

    def close(self, process: Process, *, lossy: bool) -> None:
        """This end is closed; the other learns it behind what was sent before, or behind a part of that."""
        end = self.end_of(process)
        self.pipes[1 - end].cut_off(0)
        if not self.closed[end]:
            self._fail(end, lossy=lossy)

    def reset(self) -> None:
        """It breaks in the middle: both ends learn it, each in its time; what was on its way may be lost."""
        for end in (0, 1):
            if not self.closed[end]:
                self._fail(end, lossy=True)

    def _fail(self, end: int, *, lossy: bool) -> None:
        self.closed[end] = True
        pipe, rng = self.pipes[end], self.world.rng
        if lossy and rng.random() < 0.7:
            pipe.cut_off(rng.randint(0, len(pipe)))
        pipe.send(CLOSE, self.world.latency())
