"""pyccl-master --relay and pyccl-peer --relay, plain and with invites: members that take nothing but relayed links."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np
import pytest
from at_once import both
from masters import started_master

import pyccl
from pyccl.cli.options import RELAY_MAX_BYTES_S, relay_cap, relay_options

TIMEOUT_S = 60.0
COUNT = 1_000_000  # of float32: more than buffers hold

pytestmark = pytest.mark.usefixtures("home")


def invite_to(master: str) -> str:
    command = [sys.executable, "-P", "-m", "pyccl.cli.master", "invite", "--master", master]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@contextmanager
def peer_that_relays(address: str, directory: Path) -> Iterator[str]:
    """Its id."""
    command = [sys.executable, "-P", "-m", "pyccl.cli.peer", address, "--dir", str(directory), "--relay"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield next(found[1] for line in process.stdout if (found := re.match(r"observing run \w+ as (\w+)", line)))
        finally:
            process.terminate()


def one_at_a_time(address: str, modes: tuple[str, ...]) -> list[pyccl.Communicator]:
    members: list[pyccl.Communicator] = []
    for mode in modes:
        joining = pyccl.Communicator(address, relay=mode)
        is_in = threading.Event()

        def connect(comm: pyccl.Communicator = joining, is_in: threading.Event = is_in) -> None:
            try:
                comm.connect(TIMEOUT_S, TIMEOUT_S)
            finally:
                is_in.set()

        def admit(comm: pyccl.Communicator, size: int = len(members) + 1, is_in: threading.Event = is_in) -> None:
            while comm.world_size < size and not is_in.is_set():
                comm.update_topology(TIMEOUT_S)

        both(connect, *(lambda comm=comm: admit(comm) for comm in members))
        members.append(joining)
    return members


def check(members: list[pyccl.Communicator], relay: str | None) -> None:
    """Values are right, and all of them went through this relay; None: the master."""
    inputs = [np.arange(COUNT, dtype=np.float32) + rank for rank in range(len(members))]
    expected = np.sum(inputs, axis=0)
    both(*(lambda c=c, x=x: c.all_reduce(x, timeout=TIMEOUT_S) for c, x in zip(members, inputs, strict=True)))
    assert all((x == expected).all() for x in inputs)
    for comm in members:
        links = {link.peer: (link.path, link.relay) for link in comm.peers}
        assert links == {other.peer_id: ("relayed", relay) for other in members if other is not comm}


@pytest.mark.parametrize(
    ("options", "cap"),
    [
        ([], None),
        (["--relay"], RELAY_MAX_BYTES_S),
        (["--relay", "--relay-max", "unlimited"], 0),
        (["--relay-max", "16mbit", "--relay"], 2_000_000),
    ],
)
def test_what_is_relayed_has_a_cap_unless_none_is_wanted(options: list[str], cap: int | None) -> None:
    told: list[int | None] = []

    @click.command()
    @relay_options
    def command(relay: bool, relay_max: int | None) -> None:
        told.append(relay_cap(relay=relay, relay_max=relay_max))

    command(options, standalone_mode=False)
    assert told == [cap]


@pytest.mark.parametrize("wanted", ["unlimited", "16mbit"])
def test_a_cap_without_a_relay_is_an_error(wanted: str) -> None:
    command = [sys.executable, "-P", "-m", "pyccl.cli.master", "--listen", "127.0.0.1:0", "--relay-max", wanted]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ended.returncode and "--relay-max goes with --relay" in ended.stderr


ALL = ("only", "only", "only")


@pytest.mark.parametrize(
    ("relays", "encrypted", "modes"),
    [
        ("master", False, ALL),
        ("master", True, ALL),
        ("peer", False, ALL),
        ("peer", True, ALL),
        ("master", False, ("only", "auto")),
        ("peer", True, ("auto", "only")),
    ],
)
def test_members_that_want_a_relay_only_are_linked_by_one(
    relays: str, encrypted: bool, modes: tuple[str, ...], home: Path
) -> None:
    options = ["--journal", str(home / "journal"), "--secure" if encrypted else "--insecure"]
    with started_master(*options, *(["--relay"] if relays == "master" else [])) as master:
        address = invite_to(master) if encrypted else master
        if relays == "master":
            members = one_at_a_time(address, modes)
            check(members, None)
        else:
            with peer_that_relays(address, home / "kept") as relay:
                members = one_at_a_time(address, modes)
                check(members, relay)
        for comm in members:
            comm.close()
