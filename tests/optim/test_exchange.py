"""Exchanges by themselves: what is done again starts from the original, whoever gave up; records of members."""

from __future__ import annotations

import json
import threading
from typing import Any

import numpy as np
import pytest
from replicas import TIMEOUT_S, Replicas

import pyccl
from pyccl.optim import exchange as exchange_module
from pyccl.optim.exchange import Exchange, Vow
from pyccl.optim.group import _decode_untrusted


def vectors(rank: int) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(rank)
    return [rng.standard_normal(5000).astype(np.float32), rng.standard_normal(70)]


@pytest.mark.parametrize("quantize", [None, "uint8"])
def test_a_piece_that_a_member_gave_up_is_done_again_by_all(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch, quantize: str | None
) -> None:
    monkeypatch.setattr(exchange_module, "PIECE_BYTES", 8192)  # three pieces and one
    gave_up = threading.Event()

    def swap(comm: pyccl.Communicator, rank: int) -> Any:
        send = vectors(rank)
        recv = [np.full_like(x, np.nan) for x in send]
        ride = Exchange(comm, send, recv, lambda: Vow((7, 1 << 63), rank == 1, False), quantize=quantize)
        if rank == 0:
            ride.launch()
            work = ride._pieces[1].work
            assert work is not None
            work._settle()  # the other has not begun
            gave_up.set()
        else:
            assert gave_up.wait(TIMEOUT_S)
            ride.launch()
        outcome = ride.wait()
        assert all(x.tobytes() == y.tobytes() for x, y in zip(send, vectors(rank), strict=True))
        assert (outcome.world_size, outcome.kept, outcome.pending, outcome.watched) == (2, True, True, False)
        assert outcome.attempts == 2 and outcome.tx_bytes > 0
        return recv

    first, second = replicas.run(2, swap)
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        assert a.tobytes() == b.tobytes()
        wanted = (vectors(0)[i] + vectors(1)[i]) / 2
        if quantize is None:
            assert a.tobytes() == wanted.tobytes()
        else:
            np.testing.assert_allclose(a, wanted, rtol=0, atol=0.05)


def test_vows_that_differ_in_any_bit_are_seen_by_all(replicas: Replicas) -> None:
    def swap(comm: pyccl.Communicator, rank: int) -> list[bool]:
        kept = []
        for words in ((5, 6), (5, 6 ^ (rank == 2) << 62), (5 + (rank == 0), 6)):
            send = [np.ones(3, np.float32)]
            ride = Exchange(comm, send, [np.empty(3, np.float32)], lambda words=words: Vow(words, False, rank == 1))
            outcome = ride.launch().wait()
            assert outcome.watched and not outcome.pending
            kept.append(outcome.kept)
        return kept

    assert replicas.run(3, swap) == [[True, False, False]] * 3


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\xff\xfe", b"[]", b"{}", b"7", b"[" * 100_000,
        json.dumps({"new": 1, "settings": {}, "parts": {}, "tells": {}}).encode(),
        json.dumps({"new": True, "settings": [], "parts": {}, "tells": {}}).encode(),
        json.dumps({"new": True, "settings": {"a": 1}, "parts": {}, "tells": {}}).encode(),
        json.dumps({"new": True, "settings": {}, "parts": {"a": None}, "tells": {}}).encode(),
        json.dumps({"new": True, "settings": {}, "parts": {}, "tells": {"a": 1}}).encode(),
        json.dumps({"new": True, "settings": {}, "parts": {}}).encode(),
    ],
)  # fmt: skip
def test_a_record_of_another_kind_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(pyccl.RemoteProtocolError, match="optimizer record of abcdabcd"):
        _decode_untrusted("abcdabcd" * 4, data)
