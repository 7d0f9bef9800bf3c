"""One rank of ``pyccl bench all-reduce``.

An iteration of a system: fill the input, agree on a moment, sleep until then, all-reduce, meet in a barrier (so that
nobody's next filling takes the processor from a rank that still reduces). pyccl is asked for both systems' moments.
Times are this rank's own start and return on the machine's monotonic clock; `all_reduce` makes durations of them.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import resource
import time
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np

import pyccl
from pyccl.bench import wire
from pyccl.bench.control import Control
from pyccl.bench.figures import NS, ring_bytes
from pyccl.bench.gloo import Gloo, Network, load
from pyccl.bench.invited import invite

CONNECT_TIMEOUT_S: Final = 60.0
BEAT_S: Final = 5.0
PERIOD: Final = 65_521  # elements after which an input repeats; prime, so that pieces and blocks do not line up with it
# Of a codec, over the largest element and rounded up (docs/codecs.md); of float8 and float4 over the element itself.
CODEC_ERROR: Final = {"uint8": 1 / 250, "int8": 1 / 250, "fp8_e4m3": 1 / 15, "fp4_e3m0": 1 / 2.9, "bfloat16": 1 / 250}
WIRE_SHARE_MIN: Final = 0.9  # of what an all-reduce must send: less was not carried by the sockets that we watch

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Settings:
    """What the owner tells a rank."""

    master: str
    world: int
    size_bytes: int
    iterations: int
    warmup: int
    dtype: str
    op: str
    quantize: str | None
    connections: int | str
    algorithm: str
    in_place: bool
    gloo: bool
    ahead_ns: int
    secure: bool
    relay: bool
    optimize: bool
    max_upload: str | None
    max_download: str | None
    timeout_s: float
    address: str  # of this rank, and the interface that it is on
    interface: str


@dataclass(slots=True)
class Record:
    """Raw figures of one system on this rank, one entry an iteration."""

    starts_ns: list[int] = field(default_factory=list)
    ends_ns: list[int] = field(default_factory=list)
    user_s: list[float] = field(default_factory=list)
    system_s: list[float] = field(default_factory=list)

    def add(self, start_ns: int, end_ns: int, before: resource.struct_rusage, after: resource.struct_rusage) -> None:
        self.starts_ns.append(start_ns)
        self.ends_ns.append(end_ns)
        self.user_s.append(after.ru_utime - before.ru_utime)
        self.system_s.append(after.ru_stime - before.ru_stime)


class System(Protocol):
    """What is measured: one all-reduce of ``run`` on the input that ``fill`` lays out; ``result`` holds the outcome."""

    name: str

    def fill(self) -> None: ...
    def run(self) -> None: ...
    def result(self) -> Array: ...
    def sockets(self) -> frozenset[int]: ...


class PycclSystem:
    """pyccl, in place or into another array."""

    name = "pyccl"

    def __init__(self, comm: pyccl.Communicator, source: Array, settings: Settings) -> None:
        self._comm, self._source = comm, source
        self._x = source.copy() if settings.in_place else source
        self._out = None if settings.in_place else np.empty_like(source)
        self._keywords: dict[str, Any] = {
            "op": settings.op, "out": self._out, "algorithm": settings.algorithm,
            "timeout": settings.timeout_s,
        }  # fmt: skip
        if settings.quantize is not None:
            self._keywords["quantize"] = settings.quantize
        self.others: frozenset[int] = frozenset()  # sockets that are not pyccl's
        self.payload_tx_bytes: list[int] = []
        self.attempts = 1
        self.algorithm = ""  # that ran

    def fill(self) -> None:
        if self._x is not self._source:
            np.copyto(self._x, self._source)

    def run(self) -> None:
        info = self._comm.all_reduce(self._x, **self._keywords)
        self.payload_tx_bytes.append(info.tx_bytes)
        self.attempts = max(self.attempts, info.attempts)
        self.algorithm = info.algorithm

    def result(self) -> Array:
        return self._x if self._out is None else self._out

    def sockets(self) -> frozenset[int]:
        return wire.sockets().tcp - self.others


class GlooSystem:
    """Gloo, which reduces in place."""

    name = "gloo"

    def __init__(self, comm: pyccl.Communicator, source: Array, settings: Settings) -> None:
        self._comm, self._source, self._x = comm, source, source.copy()
        self._timeout_s = settings.timeout_s
        rank = comm.members.index(comm.peer_id)
        network = Network(settings.address, settings.interface)
        self.gloo = Gloo(rank, settings.world, self._share, self._x, settings.op, network, settings.timeout_s)

    def _share(self, number: int) -> int:
        """The greatest of all ranks' numbers."""
        mine = np.array([number], np.int64)
        self._comm.all_reduce(mine, op="max", timeout=self._timeout_s)
        return int(mine[0])

    def fill(self) -> None:
        np.copyto(self._x, self._source)

    def run(self) -> None:
        self.gloo.run()

    def result(self) -> Array:
        return self._x

    def sockets(self) -> frozenset[int]:
        return self.gloo.sockets.tcp


def dtype_of(name: str) -> np.dtype[Any]:
    """NumPy's dtype; bfloat16 comes from ml_dtypes."""
    known: np.dtype[Any] = np.dtype(importlib.import_module("ml_dtypes").bfloat16 if name == "bfloat16" else name)
    return known


def pattern(dtype: np.dtype[Any], rank: int) -> Array:
    """The first PERIOD elements of a rank's input: 0..15 and steps of 1/16 for floats; no two ranks have the same."""
    numbers = (np.arange(PERIOD, dtype=np.int64) * (2 * rank + 1) + 5 * rank) % 16
    if dtype.kind in "iu":
        return numbers.astype(dtype)
    return (numbers / 16 + 0.5).astype(dtype)


def expected(dtype: np.dtype[Any], op: str, world: int) -> Array:
    """The result's first PERIOD elements, in float64 (integers: in their dtype, which wraps)."""
    folding = dtype if dtype.kind in "iu" else np.dtype(np.float64)
    inputs = np.stack([pattern(dtype, rank).astype(folding) for rank in range(world)])  # (world, PERIOD)
    folds = {"sum": np.add, "avg": np.add, "prod": np.multiply, "min": np.minimum, "max": np.maximum}
    folded: Array = folds[op].reduce(inputs, axis=0, dtype=folding)
    return folded / world if op == "avg" else folded


def tolerance(dtype: np.dtype[Any], op: str, world: int, quantize: str | None) -> float:
    """How far a right result may be from ``expected``: roundings of the dtype, or of trips through a codec."""
    if dtype.kind in "iu":
        return 0.0
    bits = {"float64": 52, "float32": 23, "float16": 10}.get(dtype.name, 7)
    largest = {"sum": 1.5 * world, "prod": 1.5**world}.get(op, 1.5)
    trips = world + 1 if op == "prod" else 2  # errors of factors multiply, those of terms add up to that of one
    coded = 0.0 if quantize is None else largest * ((1 + CODEC_ERROR[quantize]) ** trips - 1)
    return largest * (world + 1) * 2.0**-bits + coded


def check(result: Array, settings: Settings, quantize: str | None) -> float:
    """Greatest deviation of a result from what it must be, over what is allowed: wrong above 1."""
    dtype = result.dtype
    want = expected(dtype, settings.op, settings.world)
    allowed = tolerance(dtype, settings.op, settings.world, quantize)
    worst = 0.0
    for start in range(0, result.size, PERIOD):
        part = result[start : start + PERIOD]
        if allowed == 0.0:
            worst = max(worst, 2.0 * bool((part != want[: part.size]).any()))
            continue
        deviation = float(np.abs(part.astype(np.float64) - want[: part.size]).max())
        worst = max(worst, deviation / allowed if deviation == deviation else 2.0)  # a NaN is wrong
    return worst


def start_together(comm: pyccl.Communicator, ahead_ns: int, timeout_s: float) -> None:
    """Until a moment that all agree on, on the machine's clock: a barrier's ranks return one after the other."""
    moment_ns = np.array([time.monotonic_ns() + ahead_ns], np.int64)
    comm.all_reduce(moment_ns, op="max", timeout=timeout_s)
    while (left_ns := int(moment_ns[0]) - time.monotonic_ns()) > 0:
        time.sleep(left_ns / NS)


def run(settings: Settings, control: Control) -> None:
    """Join the others, measure, report."""
    if settings.gloo:
        load(settings.interface)
    dtype = dtype_of(settings.dtype)
    control.say("ready")
    control.wait("go")
    master = invite(settings.master) if settings.secure else settings.master
    comm = pyccl.Communicator(
        master, connections=settings.connections, max_upload=settings.max_upload, max_download=settings.max_download
    )
    comm.connect(CONNECT_TIMEOUT_S, CONNECT_TIMEOUT_S)
    with comm:
        while comm.group_world_size < settings.world:
            comm.update_topology(settings.timeout_s)
        if settings.optimize:
            comm.optimize_topology(settings.timeout_s)
            control.say("beat")
        rank = comm.members.index(comm.peer_id)
        source = np.resize(pattern(dtype, rank), settings.size_bytes // dtype.itemsize)
        systems: list[System] = [ours := PycclSystem(comm, source, settings)]
        transport: dict[str, object] = {}
        if settings.gloo:
            theirs = GlooSystem(comm, source, settings)
            ours.others = theirs.sockets()
            systems.append(theirs)
            transport = _transport(theirs.gloo)
        reports = _measure(comm, systems, settings, control)
        reports["pyccl"] |= {
            "payload_tx_bytes": ours.payload_tx_bytes[-settings.iterations :], "attempts_max": ours.attempts,
            "algorithm": ours.algorithm,
        }  # fmt: skip
        if settings.gloo:
            sent = float(str(reports["gloo"]["wire_tx_bytes"]))
            transport["carried_by_tcp"] = sent >= WIRE_SHARE_MIN * ring_bytes(settings.world, source.nbytes)
            reports["gloo"] |= {"transport": transport}
            theirs.gloo.close()
        comm.barrier(timeout=settings.timeout_s)
        control.say("result", rank=rank, systems=reports)


def _measure(
    comm: pyccl.Communicator, systems: list[System], settings: Settings, control: Control
) -> dict[str, dict[str, object]]:
    beat_s = time.monotonic()

    def iterate(system: System, record: Record) -> None:
        nonlocal beat_s
        if time.monotonic() - beat_s > BEAT_S:
            beat_s = time.monotonic()
            control.say("beat")
        system.fill()
        start_together(comm, settings.ahead_ns, settings.timeout_s)
        before = resource.getrusage(resource.RUSAGE_SELF)
        start_ns = time.monotonic_ns()
        system.run()
        end_ns = time.monotonic_ns()
        record.add(start_ns, end_ns, before, resource.getrusage(resource.RUSAGE_SELF))
        comm.barrier(timeout=settings.timeout_s)

    reports: dict[str, dict[str, object]] = {}
    for system in systems:  # one round that is checked, then those that only warm up
        iterate(system, Record())
        quantize = settings.quantize if system.name == "pyccl" else None
        reports[system.name] = {
            "deviation": check(system.result(), settings, quantize),
            "result_digest": hashlib.blake2b(system.result().view(np.uint8).data, digest_size=16).hexdigest(),
        }
    for _ in range(settings.warmup):
        for system in systems:
            iterate(system, Record())
    records = {system.name: Record() for system in systems}
    watched = {system.name: system.sockets() for system in systems}
    before = {name: wire.traffic(inodes) for name, inodes in watched.items()}
    gc.collect()
    gc.disable()
    for _ in range(settings.iterations):
        for system in systems:
            iterate(system, records[system.name])
    gc.enable()
    for name, record in records.items():
        carried = wire.traffic(watched[name]) - before[name]
        reports[name] |= {
            "starts_ns": record.starts_ns, "ends_ns": record.ends_ns,
            "user_s": record.user_s, "system_s": record.system_s,
            "wire_tx_bytes": carried.tx_bytes / settings.iterations,
            "wire_rx_bytes": carried.rx_bytes / settings.iterations,
            "tcp_sockets": len(watched[name]),
        }  # fmt: skip
    return reports


def _transport(gloo: Gloo) -> dict[str, object]:
    """What Gloo's process group has opened."""
    return {
        "tcp_sockets": len(gloo.sockets.tcp),
        "unix_sockets": len(gloo.sockets.unix),
        "shared_memory": wire.shared_memory(),
    }
