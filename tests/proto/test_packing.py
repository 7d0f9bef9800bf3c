"""When state is packed on its way: the decision, and how a fetch comes to it. Every number is an argument."""

from __future__ import annotations

import pytest

from pyccl._proto.packing import GAIN_MIN, SAMPLING, Measured, Packing, decide

MB = 1e6
PIECE = 1_000_000  # bytes


@pytest.mark.parametrize(
    ("line", "ratio", "pack", "unpack", "packed", "by"),
    [
        (12.5, 0.5, 500, 1000, True, "line"),  # 100 Mbit/s
        (12.5, 1.0, 500, 1000, False, "line"),  # incompressible
        (12.5, 0.92, 500, 1000, False, "line"),  # weights: too little
        (731, 0.01, 500, 1000, False, "packing"),  # loopback
        (731, 0.01, 1500, 700, False, "unpacking"),
        (731, 0.01, 6000, 5000, True, "unpacking"),  # by cores we have never seen
        (12.5, 0.01, 13, 1000, False, "packing"),  # a very slow holder
        (1.0, 0.89, 500, 1000, True, "line"),
    ],
)
def test_the_slowest_stage_decides(
    line: float, ratio: float, pack: float, unpack: float, packed: bool, by: str
) -> None:
    decided, reason = decide(Measured(line * MB, ratio, pack * MB, unpack * MB))
    assert decided is packed and reason.endswith(f"by {by}")


def test_the_gain_must_be_clear() -> None:
    assert decide(Measured(MB, GAIN_MIN - 0.001, 1e9, 1e9))[0]
    assert not decide(Measured(MB, GAIN_MIN, 1e9, 1e9))[0]


class Fetch:
    """Pieces that come one after the other at the rate that holders, line and packing give."""

    def __init__(self, holders: int = 3) -> None:
        self.now = 100.0
        self.packing = Packing(holders)
        self.asked: list[bool] = []
        self.samples = 0

    def pieces(self, count: int, line: float, ratio: float, *, pack: float = 500 * MB, seen: float = 1e12) -> None:
        """pack: as a sample says; seen: as fast as packed pieces come at most."""
        for _ in range(count):
            packed = self.packing.packed
            self.asked.append(packed)
            wire = int(PIECE * min(ratio, 1.0)) if packed else PIECE
            self.now += max(wire / line, PIECE / seen if packed else 0.0)
            self.packing.arrived(self.now, wire, PIECE, asked_packed=packed)
            if not packed and self.packing.wants_sample(self.now):
                self.samples += 1
                self.packing.sampled(PIECE, int(PIECE * ratio), PIECE / pack, PIECE / (2 * pack))


def test_a_slow_line_and_bytes_that_pack_well_are_found_and_it_stays_so() -> None:
    fetch = Fetch()
    fetch.pieces(200, line=37 * MB, ratio=0.4)
    assert fetch.packing.packed and fetch.asked.index(True) < 20 and all(fetch.asked[20:])
    assert "to 40%" in fetch.packing.reason


def test_a_fast_line_is_never_packed_for_and_sampled_once() -> None:
    fetch = Fetch()
    fetch.pieces(5000, line=2500 * MB, ratio=0.01)
    assert not any(fetch.asked) and fetch.samples == 1


def test_bytes_that_do_not_pack_cost_few_samples() -> None:
    fetch = Fetch()
    started = fetch.now
    fetch.pieces(2000, line=37 * MB, ratio=1.0, pack=50 * MB)
    assert not any(fetch.asked)
    spent_s = fetch.samples * 1.5 * PIECE / (50 * MB)
    assert fetch.samples > 1 and spent_s <= SAMPLING * (fetch.now - started) + 1.5 * PIECE / (50 * MB)


def test_what_is_sent_as_it_is_although_it_was_asked_for_packed_ends_it_and_packable_bytes_begin_it_again() -> None:
    fetch = Fetch()
    fetch.pieces(100, line=37 * MB, ratio=0.4)
    assert fetch.packing.packed
    fetch.pieces(100, line=37 * MB, ratio=1.0)
    assert not fetch.packing.packed
    fetch.pieces(300, line=37 * MB, ratio=0.4)
    assert fetch.packing.packed


def test_holders_that_pack_slower_than_the_line_are_noticed_and_tried_again_later() -> None:
    fetch = Fetch()
    fetch.pieces(2000, line=37 * MB, ratio=0.4, seen=20 * MB)
    share = sum(fetch.asked) / len(fetch.asked)
    assert 0 < share < 0.4
    fetch.pieces(400, line=37 * MB, ratio=0.4)
    assert fetch.packing.packed


def test_before_anything_is_measured_nothing_is_packed() -> None:
    packing = Packing(1)
    assert not packing.packed and not packing.wants_sample(0.0)
    packing.arrived(1.0, PIECE, PIECE, asked_packed=False)
    assert not packing.packed and not packing.wants_sample(1.0) and packing.reason == "not measured"
