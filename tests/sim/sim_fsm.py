"""The compiled operation machine behind Python names: the same code that the engine drives."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from sim_native import ffi, lib

PASS: Final = lib.PYCCL_GATE_PASS
DROP: Final = lib.PYCCL_GATE_DROP
LATER: Final = lib.PYCCL_GATE_LATER
REFUSE: Final = lib.PYCCL_GATE_REFUSE
MESSAGE_SIZE: Final = ffi.sizeof("pyccl_message")
NO_TIMER: Final = (1 << 63) - 1
MESSAGES: Final = {1: "OPEN", 3: "DONE", 4: "ABORT", 5: "ASK", 6: "ANSWER", 7: "SETTLED"}


def status_name(status: int) -> str:
    return str(ffi.string(lib.pyccl_status_name(status)).decode()).removeprefix("PYCCL_ERR_")


def make_spec(kind: int, tag: int, count: int, *, space: int = 0, retry: bool = True, root: bytes = b"") -> Any:
    spec = ffi.new("pyccl_spec *")
    spec.kind, spec.dtype, spec.algorithm, spec.retry, spec.space = (
        kind,
        lib.PYCCL_FLOAT32,
        lib.PYCCL_DIRECT,
        retry,
        space,
    )
    spec.op = lib.PYCCL_SUM if kind == lib.PYCCL_ALL_REDUCE else 0
    spec.tag, spec.count = tag, count
    ffi.memmove(spec.root, root.ljust(16, b"\0"), 16)
    return spec


def spec_bytes(spec: Any) -> bytes:
    out = ffi.new("uint8_t[]", lib.PYCCL_SPEC_SIZE)
    lib.pyccl_spec_encode(spec, out)
    return bytes(ffi.buffer(out))


class Fsm:
    def __init__(self, settle_ns: int, stall_ns: int, tell_ns: int) -> None:
        options = ffi.new("pyccl_fsm_options *", {"settle_ns": settle_ns, "stall_ns": stall_ns, "tell_ns": tell_ns})
        slot = ffi.new("pyccl_fsm **")
        assert lib.pyccl_fsm_new(options, slot) == 0
        self.handle = ffi.gc(slot[0], lib.pyccl_fsm_free)
        self.action = ffi.new("pyccl_action *")
        self._action_message = ffi.addressof(self.action, "message")
        self._message = ffi.new("pyccl_message *")
        self._cookie = ffi.new("uint64_t *")

    def action_message(self) -> bytes:
        return bytes(ffi.buffer(self._action_message, MESSAGE_SIZE))

    def action_peer(self) -> bytes:
        return bytes(ffi.buffer(self.action.peer, 16))

    def receive(self, raw: bytes, rank: int, now: int) -> int:
        ffi.memmove(self._message, raw, MESSAGE_SIZE)
        self._message.rank = rank
        return int(lib.pyccl_fsm_receive(self.handle, self._message, now))

    def data(self, rank: int, space: int, tag: int, seq: int) -> tuple[int, int]:
        gate = lib.pyccl_fsm_data(self.handle, rank, space, tag, seq, self._cookie)
        return gate, self._cookie[0]

    def epoch(
        self,
        number: int,
        epoch_id: bytes,
        members: tuple[bytes, ...],
        rank: int,
        restart: bool,
        mismatch: bool,
        verdicts: Iterable[tuple[int, int, int, int]],
        now: int,
    ) -> int:
        packed = ffi.from_buffer("uint8_t[]", b"".join(members))
        epoch = ffi.new("pyccl_epoch *")
        epoch.number, epoch.world, epoch.rank = number, len(members), rank
        epoch.restart, epoch.mismatch, epoch.members = restart, mismatch, packed
        ffi.memmove(epoch.id, epoch_id, 16)
        given = list(verdicts)
        array = ffi.new("pyccl_op_verdict[]", max(1, len(given)))
        for i, (space, tag, seq, verdict) in enumerate(given):
            array[i].space, array[i].tag, array[i].seq, array[i].verdict = space, tag, seq, verdict
        return int(lib.pyccl_fsm_epoch(self.handle, epoch, array, len(given), now))

    def report(self) -> list[tuple[int, int, int, int, int]]:
        cap = lib.pyccl_fsm_report(self.handle, ffi.NULL, 0)
        out = ffi.new("pyccl_op_report[]", max(1, cap))
        lib.pyccl_fsm_report(self.handle, out, cap)
        return [(r.space, r.tag, r.seq, r.state, r.hash) for r in out[0:cap]]

    def counts(self) -> list[tuple[int, int, int]]:
        cap = lib.pyccl_fsm_counts(self.handle, ffi.NULL, 0)
        out = ffi.new("pyccl_op_count[]", max(1, cap))
        lib.pyccl_fsm_counts(self.handle, out, cap)
        return [(c.space, c.tag, c.count) for c in out[0:cap]]

    def lacking(self) -> list[tuple[int, int, int]]:
        cap = lib.pyccl_fsm_lacking(self.handle, ffi.NULL, 0)
        out = ffi.new("pyccl_op_lack[]", max(1, cap))
        lib.pyccl_fsm_lacking(self.handle, out, cap)
        return [(k.space, k.tag, k.seq) for k in out[0:cap]]

    def cut(self, counts: Iterable[tuple[int, int, int]], open_: bool, now: int) -> bool:
        given = list(counts)
        array = ffi.new("pyccl_op_count[]", max(1, len(given)))
        for i, (space, tag, count) in enumerate(given):
            array[i].space, array[i].tag, array[i].count = space, tag, count
        return bool(lib.pyccl_fsm_cut(self.handle, array, len(given), open_, now))
