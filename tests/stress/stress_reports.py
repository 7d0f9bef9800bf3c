"""A run of three peers told to an oracle, right in everything; tests spoil one report of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from pyccl.stress import workload
from pyccl.stress.oracle import Oracle
from pyccl.stress.workload import Outcome

SEED = 5
HANG_S = 30.0
PEERS = {number: f"{number:032x}" for number in range(3)}
Report = dict[str, Any]


def reports(rounds: int) -> list[tuple[int, Report]]:
    """Of three peers that join in one epoch and make so many rounds; a report a second."""
    told: list[tuple[int, Report]] = []
    members = tuple(PEERS.values())

    def say(number: int, event: str, **fields: Any) -> None:
        told.append((number, {"event": event, "t": float(len(told)), **copy.deepcopy(fields)}))

    for number, peer in PEERS.items():
        say(number, "ready", peer=peer)
    for number in PEERS:
        say(number, "member", epoch=3, members=members)
    state = workload.new_state()
    for revision in range(rounds + 1):
        for number in PEERS:
            say(
                number, "sync", revision=revision, digest=state.digest(), epoch=3, changed=(), rx_bytes=0, liars=()
            )  # fmt: skip
        outcomes = [
            Outcome(op.index, workload.bits(workload.expected(SEED, revision, op, list(PEERS))), 3, members)
            for op in workload.plan(SEED, revision)
        ]
        for number in PEERS if revision < rounds else ():
            say(
                number, "round", revision=revision, done=True, seconds=0.1, rosters=[(3, members)],
                ops=[(outcome.index, outcome.bits, 0) for outcome in outcomes], retries=0, moved_bytes=9, errors=[],
                exchange=exchange_of(number, revision),
            )  # fmt: skip
        workload.advance(state, outcomes)
    return told


def exchange_of(number: int, revision: int) -> Report | None:
    members = list(PEERS.values())
    partner = workload.partner(SEED, revision, members, PEERS[number])
    if partner is None:
        return None
    theirs = workload.exchange_input(SEED, members.index(partner), revision)
    return {"partner": partner, "bits": workload.bits(theirs), "attempts": 1, "kept": True}


def judged(told: list[tuple[int, Report]]) -> Oracle:
    oracle = Oracle(SEED, HANG_S)
    for number in PEERS:
        oracle.started(number, 0.0)
    for number, report in told:
        oracle.take(number, report)
    return oracle


def spoilt(
    rounds: int, number: int, event: str, revision: int, spoil: Callable[[Report], None]
) -> list[tuple[int, Report]]:
    """The same, but for one report of one peer."""
    told = reports(rounds)
    (at,) = [
        at
        for at, (who, report) in enumerate(told)
        if who == number and report["event"] == event and report.get("revision", revision) == revision
    ]
    spoil(told[at][1])
    return told


def kinds(oracle: Oracle) -> list[str]:
    return [violation.kind for violation in oracle.violations]
