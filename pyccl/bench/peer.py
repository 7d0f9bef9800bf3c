"""One process of a benchmark: ``python -m pyccl.bench.peer SETTINGS``, started by `conductor`, settings in JSON."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Final

from pyccl import errors
from pyccl.bench import crowd, member, memory_peer, nat_peer, passers, reduce_peer, scale_peer, topology_peer
from pyccl.bench.control import Control

TASKS: Final[Mapping[str, Callable[[dict[str, Any], Control], None]]] = {
    "all-reduce": lambda told, control: reduce_peer.run(reduce_peer.Settings(**told), control),
    "crowd": lambda told, control: crowd.run(crowd.Settings(**told), control),
    "memory": lambda told, control: memory_peer.run(memory_peer.Settings(**told), control),
    "nat": lambda told, control: nat_peer.run(nat_peer.Settings(**told), control),
    "passers": lambda told, control: passers.run(passers.Settings(**told), control),
    "scale": lambda told, control: scale_peer.run(scale_peer.Settings(**told), control),
    "topology": lambda told, control: topology_peer.run(topology_peer.Settings(**told), control),
    "member": lambda told, control: member.run(member.Settings(**told), control),
}


def main() -> None:
    """Run the task that the settings name."""
    control = Control()
    told = json.loads(sys.argv[1])
    task = TASKS[told.pop("task")]
    try:
        task(told, control)
    except Exception as error:  # noqa: BLE001  whatever it is, the owner prints it
        traceback.print_exc()
        control.say("error", usage=isinstance(error, errors.UsageError), text=f"{type(error).__name__}: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
