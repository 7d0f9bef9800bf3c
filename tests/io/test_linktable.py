"""What a member knows of its links: rounds measure, traffic raises and confirms, the master hears of what is new."""

from __future__ import annotations

from pyccl._io.linktable import FRESH_S, LinkTable
from pyccl._proto import limits
from pyccl._proto.messages import LinkMeasure, Measured, Path
from pyccl._proto.topology import Cpu

A, B, C = (bytes([n]) * 16 for n in (1, 2, 3))


def measured() -> LinkTable:
    table = LinkTable()
    for peer, rate in ((A, 1000.0), (B, 4000.0)):
        table.measured(peer, rate, 0.02, now=0.0)
        table.crowded(peer, rate / 2)
    table.works(Cpu(2e9, 1e9, 3e9))
    table.works(Cpu(0.0, 0.0, 4e9))
    return table


def rates(table: LinkTable) -> dict[bytes, int]:
    news = table.news((A, B, C))
    return {link.peer: link.rate for link in news.links} if news is not None else {}


def test_what_was_measured_is_told_once() -> None:
    table = measured()
    links = LinkMeasure(A, 1000, 500, 20_000), LinkMeasure(B, 4000, 2000, 20_000)
    told = Measured(2 * 10**9, 10**9, 4 * 10**9, 0, links)
    assert table.news((A, B, C)) == told
    assert table.news((A, B, C)) is None
    table.measured(B, 4100.0, 0.02, now=1.0)
    assert table.news((A, B, C)) is None  # about the same
    table.measured(B, 1500.0, 0.02, now=1.0)
    assert rates(table) == {A: 1000, B: 1500}


def test_it_is_measured_again_when_nothing_has_confirmed_it_for_long() -> None:
    table = measured()
    assert table.lacks(C, 0.0)
    assert not table.lacks(A, FRESH_S - 1) and table.lacks(A, FRESH_S)
    table.measured(A, 0.0, 0.0, now=FRESH_S)  # nothing came: that is no measurement
    assert table.lacks(A, FRESH_S)


def test_traffic_confirms_what_it_comes_near_to_and_raises_what_it_exceeds() -> None:
    table = measured()
    table.carried({A: 0, B: 0}, now=100.0)
    table.carried({A: 3000, B: 2500}, now=101.0)
    assert rates(table) == {A: 3000, B: 4000}
    assert not table.lacks(A, FRESH_S + 50) and not table.lacks(B, FRESH_S + 50)
    table.carried({A: 3100, B: 2600}, now=102.0)  # little traffic says nothing
    assert table.news((A, B, C)) is None
    assert table.lacks(A, FRESH_S + 101.5)


def test_more_at_the_same_time_than_in_the_crowd_is_what_a_host_can_do() -> None:
    table = measured()
    table.carried({A: 0, B: 0, C: 0}, now=100.0)
    table.carried({A: 900, B: 1000, C: 700}, now=101.0)
    news = table.news((A, B, C))
    assert news is not None
    assert {link.peer: link.crowd for link in news.links} == {A: 900, B: 1000, C: 700}
    table.carried({A: 901, B: 1001, C: 701}, now=102.0)
    assert table.news((A, B, C)) is None


def test_more_to_one_alone_does_not_say_that_the_others_get_nothing() -> None:
    table = measured()
    table.carried({A: 0, B: 0}, now=100.0)
    table.carried({A: 10, B: 4000}, now=101.0)
    news = table.news((A, B))
    assert news is not None and {link.peer: link.crowd for link in news.links} == {A: 500, B: 2000}


def test_of_a_link_that_was_not_measured_or_was_made_anew_traffic_says_nothing_wrong() -> None:
    table = measured()
    table.carried({A: 10**6}, now=100.0)
    table.carried({A: 10, C: 10**9}, now=101.0)  # A's counter began again
    assert rates(table) == {A: 1000, B: 4000}


def test_who_left_is_forgotten_and_not_told_of() -> None:
    table = measured()
    news = table.news((B, C))
    assert news is not None and [link.peer for link in news.links] == [B]
    table.keep((B, C))
    assert table.lacks(A, 0.0) and not table.lacks(B, 0.0)


def test_what_came_alone_is_forgotten_when_somebody_leaves_that_it_may_have_come_from() -> None:
    table = measured()
    table.received(9000.0)
    for members, down in (((A, B, C), 9000), ((B, C), 0)):
        table.keep(members)
        news = table.news(members)
        assert news is not None and news.down == down


def test_what_is_told_keeps_the_limits_of_the_wire() -> None:
    table = LinkTable()
    table.measured(A, 1e30, 1e9, now=0.0)
    assert table.news((A,)) == Measured(0, 0, 0, 0, (LinkMeasure(A, limits.RATE_MAX, 0, limits.RTT_US_MAX),))


def by_c(peer: bytes) -> dict[bytes, tuple[int, bytes]]:
    return {peer: (Path.RELAYED, C)}


def test_a_link_that_comes_to_be_relayed_is_news_measured_or_not() -> None:
    table = LinkTable()
    table.measured(A, 1000.0, 0.0, 1.0)
    assert table.news((A, B)) == Measured(0, 0, 0, 0, (LinkMeasure(A, 1000, 0, 0),))
    both = LinkMeasure(A, 1000, 0, 0), LinkMeasure(B, 0, 0, 0, 3, C)
    assert table.news((A, B), by_c(B)) == Measured(0, 0, 0, 0, both)
    assert table.news((A, B), by_c(B)) is None
    assert table.news((A, B)) == Measured(0, 0, 0, 0, (LinkMeasure(A, 1000, 0, 0),))
    assert table.news((A, B)) is None
    assert table.news((A, B), by_c(A)) == Measured(0, 0, 0, 0, (LinkMeasure(A, 1000, 0, 0, 3, C),))
    assert table.news((A, B)) == Measured(0, 0, 0, 0, (LinkMeasure(A, 1000, 0, 0),))


def test_what_came_from_several_is_news_where_it_differs() -> None:
    table = LinkTable()
    table.measured(A, 1000, 0.0, 0.0)
    table.received(500.0)
    told = table.news((A,))
    assert told is not None and told.down == 500
    table.received(550.0)
    assert table.news((A,)) is None
    table.received(900.0)
    again = table.news((A,))
    assert again is not None and again.down == 900
