"""Specs and mismatch texts: numbers as in pyccl.h, and the text read back as it was written."""

from __future__ import annotations

import enum
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyccl._proto import messages, spec
from pyccl._proto.mismatch import make_detail, parse_detail
from pyccl.errors import RemoteProtocolError

HEADER = (Path(__file__).resolve().parents[2] / "native/include/pyccl.h").read_text(encoding="utf-8")


def numbers_in_header(name: str) -> dict[str, int]:
    body = re.search(rf"typedef enum pyccl_{name} \{{(.*?)\}}", HEADER, re.DOTALL)
    assert body is not None, name
    return {key: int(value) for key, value in re.findall(r"PYCCL_(?:STATE_|VERDICT_)?(\w+) = (\d+)", body[1])}


@pytest.mark.parametrize(
    ("ours", "name"),
    [(spec.Kind, "kind"), (spec.Dtype, "dtype"), (spec.ReduceOp, "reduce_op"), (spec.Algorithm, "algorithm")],
)
def test_numbers_are_those_of_the_c_header(ours: type[enum.IntEnum], name: str) -> None:
    assert {member.name: member.value for member in ours} == numbers_in_header(name)


@pytest.mark.parametrize(("ours", "name"), [(messages.OpState, "op_state"), (messages.Verdict, "verdict")])
def test_states_and_verdicts_are_those_of_the_c_header(ours: type, name: str) -> None:
    assert {key: value for key, value in vars(ours).items() if key.isupper()} == numbers_in_header(name)


def test_spec_of_another_length_is_refused_and_unknown_numbers_are_shown() -> None:
    with pytest.raises(RemoteProtocolError):
        spec.decode_untrusted(bytes(39))
    decoded = spec.decode_untrusted(bytes([1, 250]) + bytes(38))
    assert (spec.show(decoded, "kind"), spec.show(decoded, "dtype"), spec.show(decoded, "root")) == (
        "all_reduce", "250", "none",
    )  # fmt: skip


@given(st.lists(st.binary(min_size=16, max_size=16), max_size=5), st.lists(st.sampled_from(["count", "op"])), st.text())
def test_names_in_a_detail_are_read_back(peers: list[bytes], fields: list[str], text: str) -> None:
    detail = make_detail(peers, fields, text)
    assert len(detail) <= 1000
    assert parse_detail(detail) == (tuple(p.hex()[:8] for p in sorted(set(peers))), tuple(fields[:16]))


@given(st.text())
def test_any_other_text_names_nobody(text: str) -> None:
    parse_detail(text)
    assert parse_detail("x" + text) == ((), ())
