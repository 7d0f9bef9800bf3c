"""Everything about a run but its events: a pure function of the seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

# What fails, and where. `mute`, `deaf` and the names with `_way` are partitions of one direction.
FAULT_KINDS: Final = (
    *("crash", "restart", "twin", "leave", "join"),
    *("stop", "hold", "slow", "clock"),
    *("silence", "mute", "deaf", "pair", "pair_way", "uplink", "uplink_way"),
    *("reset_data", "reset_control", "stale", "tangle"),
    *("master_stop", "master_cut", "master_clock", "master_crash", "journal_lost", "disk_full", "disk_full_crash"),
)
PEERS: Final = (4, 4, 4, 4, 5, 5, 5, 6, 6, 7, 8, 10, 12)
PEERS_MAX: Final = 12
SECONDS_MIN: Final = 120.0
PEERS_MIN: Final = 4
FAULTS_MIN: Final = 20
OPERATIONS_MIN: Final = 200


@dataclass(frozen=True)
class Options:
    peers: int = 4
    groups: int = 1
    observers: int = 0  # with them: sim_saved
    connections: int = 2
    journaled: bool = True
    secure: bool = False  # the master signs, and a later one believes only that
    sync_s: float = 0.01  # at most, for a write to be durable
    peer_timeout: float = 1.0
    mismatch_grace: float = 1.0  # as peer_timeout: what a link does not bring for that long is reported as silence
    stall_s: float = 30.0
    unreachable_s: float = 60.0
    master_timeout_s: float = 20.0
    delay_s: float = 0.004
    spike_rate: float = 0.0
    spike_s: float = 0.3
    think_s: float = 0.1
    chaos_s: float = 20.0
    fault_rate: float = 0.5  # per second
    faults: tuple[str, ...] = FAULT_KINDS
    peers_min: int = 0  # fewer do not stay so few while faults last
    peers_max: int = 10
    faults_min: int = 0  # faults last until there were so many, and so many operations have ended
    operations_min: int = 0
    deadline_rate: float = 0.0  # operations whose deadline is short at one peer
    cancel_rate: float = 0.0
    flip_rate: float = 0.0  # results that are wrong at one peer
    mismatch_rate: float = 0.0
    strict: bool = True  # no program does anything that the others do not
    background: bool = False  # a second thread that does not mind safe points
    wire_check: bool = False
    measures: bool = False  # members tell the master of lines that change: it makes plans


def draw_options(seed: int) -> Options:
    rng = random.Random(f"options {seed}")
    kinds = rng.sample(FAULT_KINDS, rng.choice((4, 8, len(FAULT_KINDS), len(FAULT_KINDS))))
    strict = rng.random() < 0.7
    peer_timeout = rng.choice((1.0, 1.0, 2.0))
    peers = rng.choice(PEERS)
    background = strict and rng.random() < 0.3  # while it submits no mismatch of the first is seen
    return Options(
        peers=peers,
        groups=2 if peers >= 8 or rng.random() < 0.2 else 1,
        connections=rng.randint(1, 3),
        journaled=rng.random() < 0.85,
        sync_s=rng.choice((0.001, 0.02, 0.5)),
        peer_timeout=peer_timeout,
        mismatch_grace=6.0 if background else peer_timeout,  # two threads that pause for longer are a mismatch
        stall_s=rng.choice((30.0, 30.0, 4.0)),
        unreachable_s=60.0 if strict else rng.choice((60.0, 3.0)),
        master_timeout_s=rng.choice((20.0, 1.0)),
        delay_s=rng.choice((0.001, 0.004, 0.03)),
        spike_rate=rng.choice((0.0, 0.01, 0.05)),
        spike_s=rng.choice((0.1, 0.4)),
        think_s=rng.choice((1.0, 1.5, 2.0)),
        chaos_s=SECONDS_MIN,
        fault_rate=rng.choice((0.2, 0.3, 0.6)),
        faults=tuple(kinds),
        peers_min=PEERS_MIN,
        peers_max=min(PEERS_MAX, peers + 2),
        faults_min=FAULTS_MIN,
        operations_min=OPERATIONS_MIN,
        deadline_rate=rng.choice((0.0, 0.02, 0.1, 0.2)),
        cancel_rate=rng.choice((0.0, 0.0, 0.03)),
        flip_rate=rng.choice((0.0, 0.0, 0.0, 0.02)),
        mismatch_rate=0.0 if strict else rng.choice((0.0, 0.02, 0.05)),
        strict=strict,
        background=background,
        measures=rng.random() < 0.5,
        secure=rng.random() < 0.5,
    )
