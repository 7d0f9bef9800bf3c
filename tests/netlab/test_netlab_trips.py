"""How many one-way trips a small operation takes, over lines on which nothing but the delay takes time. As root.

An operation ends on a member when it knows that the others have the result, too. Of two, each sends the other its
input, then word that the result is there. Of more, inputs go to the owners of shares, and results back, before that.
"""

from __future__ import annotations

import os

import pytest
from lab_peers import peers

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces and TUN devices need root")

DELAY_S = 0.25  # the best of several operations is late by less, however busy the machine is
TIMES = 4


@pytest.mark.parametrize(("world", "trips"), [(2, 2), (3, 3)])
def test_a_small_all_reduce_takes_a_trip_for_each_step_and_no_other(world: int, trips: int) -> None:
    with peers(f"[[host]]\ncount = {world}\n[[router]]\nname = 'r'\ndelay = '{DELAY_S}s'", 4096) as group:
        group.reduce(1)
        seconds = [second for of_peer in group.reduce(TIMES) for second in of_peer]
    assert min(seconds) >= trips * DELAY_S  # whoever calls last: its input goes a whole way, and word of it comes back
    assert min(seconds) < (trips + 1) * DELAY_S
