"""What peers make of a long line with a shallow queue: counted by the line, not timed. As root."""

from __future__ import annotations

import os

import pytest
from lab_peers import peers

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces and TUN devices need root")


def test_senders_keep_below_the_rate_of_their_line() -> None:
    """Eight connections, each seeking the line's rate for itself, have a quarter of what they send dropped."""
    toml = """
    [[host]]
    name = "peer"
    count = 2
    rate = "60mbit"
    queue = "20ms"
    [[router]]
    name = "internet"
    delay = "40ms"
    """
    with peers(toml, 8 << 20) as group:
        group.reduce(3)
        before = group.lab.counts()
        group.reduce(4)
        after = group.lab.counts()
    sent = sum(host.tx_packets for host in after.hosts) - sum(host.tx_packets for host in before.hosts)
    assert sent > 2 * 4 * (8 << 20) // 1500
    assert after.dropped - before.dropped < 0.04 * sent
