"""What happens to routers, addresses and relays in the middle of a run: it goes on, with right values. As root.

The runs are secure: whatever is connected anew has to be agreed on anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyccl.bench import nat
from pyccl.netlab import Lab
from pyccl.netlab.scenario import Nat

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces and TUN devices need root"),
    pytest.mark.skipif(shutil.which("nft") is None, reason="no nft: apt-get install nftables"),
]

AGENT = Path(__file__).with_name("nat_agent.py")
MASTER = 0  # rank of its host
COMMAND = ("-m", "pyccl.cli.master")
WAIT_S = 200.0
ROUNDS = 10  # after what happened


Heard = dict[str, Any]


class Group:
    """A secure master on the first host, and agents on others by rank, which is their number, too.

    Each host has an identity of its own, in `directory`.
    """

    def __init__(self, lab: Lab, stack: contextlib.ExitStack, directory: Path) -> None:
        self._lab, self._stack, self._directory = lab, stack, directory
        self._told: queue.Queue[Heard] = queue.Queue()
        self._agents: list[int] = []
        master = self.start(MASTER, *COMMAND, "--listen", f"{lab.addresses[MASTER]}:0", "--no-journal")
        assert master.stdout is not None
        address = master.stdout.readline().removeprefix("listening on ").strip()
        self.invite = self._ask(*COMMAND, "invite", "--master", address).strip()

    def _environment(self, rank: int) -> dict[str, str]:
        return {"PYCCL_IDENTITY": str(self._directory / f"identity-{rank}.pem")}

    def _ask(self, *arguments: str) -> str:
        """What this command says on the host of the master, as its operator."""
        asking = self._lab.start(
            MASTER, [sys.executable, "-P", *arguments], self._environment(MASTER), stdout=subprocess.PIPE, text=True
        )
        told, _ = asking.communicate()
        assert asking.returncode == 0
        return str(told)

    def start(self, rank: int, *arguments: str) -> subprocess.Popen[str]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        command = [sys.executable, "-P", *arguments]
        process = self._lab.start(rank, command, self._environment(rank), text=True, **pipes)
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            self._stack.callback(pipe.close)
        return process

    def start_agents(self, *ranks: int) -> None:
        for rank in ranks:
            self._agents.append(rank)
            process = self.start(rank, str(AGENT), self.invite, str(rank))
            reader = threading.Thread(target=self._read, args=(rank, process), daemon=True)
            reader.start()
            self._stack.callback(reader.join)
            self._stack.callback(process.kill)

    def _read(self, rank: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._told.put(json.loads(line))
        self._told.put({"ended": rank})

    def wait(self, enough: Callable[[Heard], bool], rounds: int = 1, after_s: float = 0.0) -> list[Heard]:
        """For so many operations of each agent with all the others, begun after that moment, of which this holds."""
        everyone = sum(1 << rank for rank in self._agents)
        missing = dict.fromkeys(self._agents, rounds)
        found: list[Heard] = []
        deadline_s = time.monotonic() + WAIT_S
        heard: Heard = {}
        while any(missing.values()):
            try:
                heard = self._told.get(timeout=max(deadline_s - time.monotonic(), 0))
            except queue.Empty:
                pytest.fail(f"operations of {missing} are missing; the last that was heard: {heard}")
            assert "ended" not in heard, f"agent {heard['ended']} failed"
            if heard.get("who") == everyone and heard["began_s"] >= after_s and enough(heard):
                missing[heard["number"]] = max(missing[heard["number"]] - 1, 0)
                found.append(heard)
        print(f"{rounds} operations of each, each has joined so often: { {h['number']: h['joins'] for h in found} }")
        return found

    def observers(self) -> list[dict[str, Any]]:
        """As the master tells of them."""
        return list(json.loads(self._ask("-m", "pyccl.cli.main", "status", self.invite, "--json"))["observers"])


def is_linked_by(*paths: str) -> Callable[[Heard], bool]:
    return lambda heard: all(link[0] in paths for link in heard["links"].values())


def test_a_router_that_forgets_its_mappings_is_passed_again(tmp_path: Path) -> None:
    with Lab(nat.scenario((Nat.PORT_RESTRICTED, Nat.PORT_RESTRICTED), "5ms")) as lab, contextlib.ExitStack() as stack:
        run = Group(lab, stack, tmp_path)
        run.start_agents(1, 2)
        run.wait(is_linked_by("punched"))
        lab.reboot_nat(1)
        run.wait(is_linked_by("punched"), ROUNDS, time.monotonic())


@pytest.mark.parametrize("kind", [Nat.OPEN, Nat.PORT_RESTRICTED])
def test_a_peer_whose_address_changes_is_reached_at_the_new_one(kind: Nat, tmp_path: Path) -> None:
    with Lab(nat.scenario((kind, Nat.PORT_RESTRICTED), "5ms")) as lab, contextlib.ExitStack() as stack:
        run = Group(lab, stack, tmp_path)
        run.start_agents(1, 2)
        run.wait(is_linked_by("direct" if kind is Nat.OPEN else "punched"))
        lab.change_address(1)
        run.wait(is_linked_by("direct", "punched"), ROUNDS, time.monotonic())


def test_another_relay_takes_over_from_one_that_dies(tmp_path: Path) -> None:
    kinds = (Nat.SYMMETRIC, Nat.SYMMETRIC, Nat.OPEN, Nat.OPEN)
    with Lab(nat.scenario(kinds, "5ms")) as lab, contextlib.ExitStack() as stack:
        run, relays = Group(lab, stack, tmp_path), {}
        for rank in (3, 4):
            command = ["-m", "pyccl.cli.peer", run.invite, "--dir", str(tmp_path / str(rank)), "--relay"]
            relays[lab.addresses[rank]] = run.start(rank, *command)
        while len(known := run.observers()) < len(relays):
            pass
        run.start_agents(1, 2)
        heard = run.wait(is_linked_by("relayed"))
        ids = {relay for one in heard for _, relay in one["links"].values() if relay is not None}
        used = ids.pop()
        (address,) = [one["addresses"][0].rpartition(":")[0] for one in known if one["peer"] == used]
        relays[address].kill()
        heard = run.wait(is_linked_by("relayed"), ROUNDS, time.monotonic())
        (other,) = {one["peer"] for one in known} - {used}
        assert other in {relay for one in heard for _, relay in one["links"].values()}
