"""What ``handles`` fills by position must be in the order of pyccl.h."""

from __future__ import annotations

from pyccl._native._pyccl import ffi
from pyccl._native.handles import Spec


def fields(name: str) -> tuple[str, ...]:
    return tuple(field for field, _ in ffi.typeof(name).fields)


def test_positional_structures_follow_the_header() -> None:
    assert fields("pyccl_spec") == tuple("count" if f == "elements" else f for f in Spec._fields)
    assert fields("pyccl_op_args") == (
        "spec", "src", "dst", "dst_bytes", "weight", "timeout_ns", "user", "notify"
    )  # fmt: skip


def test_spec_fills_its_structure() -> None:
    spec = Spec(1, 2, 3, 4, 5, False, 6, 0, 7, 8, 9, bytes(range(16)))
    s = ffi.new("pyccl_spec *", spec)
    assert (s.kind, s.dtype, s.op, s.codec, s.algorithm, s.retry, s.space) == (1, 2, 3, 4, 5, 0, 6)
    assert (s.guard, s.tag, s.block, s.count, bytes(s.root)) == (0, 7, 8, 9, bytes(range(16)))
