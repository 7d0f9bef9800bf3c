"""Pauses between attempts to reach the master."""

from __future__ import annotations

import pytest

from pyccl._io.backoff import FIRST_S, MOST_S, Backoff


def pauses(backoff: Backoff, count: int) -> list[float]:
    return [backoff.next_pause() for _ in range(count)]


def test_pauses_double_up_to_the_most_and_begin_anew_after_a_connection_that_lived() -> None:
    backoff = Backoff(lambda: 0.5)
    assert pauses(backoff, 8) == [FIRST_S * 2**n for n in range(5)] + [MOST_S] * 3
    backoff.connected_for(MOST_S / 2)
    assert backoff.next_pause() == MOST_S
    backoff.connected_for(MOST_S * 2)
    assert backoff.next_pause() == FIRST_S


def test_jitter_is_half_the_pause_either_way() -> None:
    assert Backoff(lambda: 0.0).next_pause() == FIRST_S * 0.5
    assert Backoff(lambda: 1.0).next_pause() == FIRST_S * 1.5


@pytest.mark.parametrize("peer_timeout", [0.1, 0.5, 2.0, 5.0, 300.0])
def test_a_peer_whose_connections_break_at_once_comes_back_twice_in_a_peer_timeout(peer_timeout: float) -> None:
    backoff = Backoff(lambda: 1.0)
    pauses(backoff, 10)  # the master was away for long before
    for _ in range(20):
        backoff.bound(peer_timeout)
        backoff.connected_for(0.001)
        assert backoff.next_pause() <= min(peer_timeout / 2, MOST_S * 1.5)
