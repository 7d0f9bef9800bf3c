"""python fsdp_worker.py JSON: one of two ranks of an island, with FSDP2 inside it and an outer optimizer across.

JSON: {"address", "store", "island", "shard", "group", "seed", "rounds", "every"}. Ranks of an island meet in the file
`store`; those of one shard, of all islands, in peer group `group` + shard. Prints JSON lines:
    {"phase": "diloco", "theta", "again", "shapes", "live"}   theta after each round; after a restart in the middle
    {"phase": "streaming", "theta", "fragments"}
    {"phase": "noloco", "phi"}                                after each round
    {"phase": "mixed up", "fields"}                           of the error, when both shards meet in one group

Before every outer step there is a forward pass without a backward pass, as of an evaluation: it leaves FSDP's root with
gathered parameters, which no outer step reaches.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
from fsdp_model import Net, batch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import pyccl
from pyccl.optim import DiLoCo, NoLoCo, StreamingDiLoCo

LR = 0.1


def say(**told: Any) -> None:
    print(json.dumps(told), flush=True)


def listed(arrays: Any) -> dict[str, Any]:
    return {name: array.tolist() for name, array in arrays.items()}


def connected(address: str, group: int) -> pyccl.Communicator:
    comm = pyccl.connect(address, group=group)
    while comm.group_world_size < 2:
        comm.update_topology()
    return comm


class Rank:
    def __init__(self, told: dict[str, Any]) -> None:
        self.told = told
        self.mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("shard",))

    def net(self) -> Net:
        net = Net(self.told["seed"])
        fully_shard(net.first, mesh=self.mesh)
        return fully_shard(net, mesh=self.mesh)

    def inner_step(self, net: Net, inner: torch.optim.Optimizer, step: int) -> None:
        x, y = batch(self.told["seed"], self.told["island"], self.told["shard"], step)
        (net(torch.from_numpy(x)) - torch.from_numpy(y)).square().mean().backward()
        inner.step()
        inner.zero_grad()
        with torch.no_grad():
            net(torch.from_numpy(x))
        assert not hasattr(net.out, "to_local"), "gathered: what this test is about"

    def diloco(self) -> None:
        every, rounds, group = self.told["every"], self.told["rounds"], self.told["group"] + self.told["shard"]
        net = self.net()
        self.inner_step(net, torch.optim.SGD(net.parameters(), lr=0.0), 0)  # gathered when the optimizer is made
        inner, thetas, kept = None, [], None
        with pyccl.connect(self.told["address"], group=group) as comm:
            opt = DiLoCo(comm, net, every)
            inner = torch.optim.SGD(net.parameters(), lr=LR)
            for step in range(rounds * every):
                self.inner_step(net, inner, step)
                if opt.step():
                    thetas.append(listed(opt.theta))
                if step == rounds * every // 2:
                    kept = opt.state_dict(), copy.deepcopy(net.state_dict())
            shapes = {name: list(array.shape) for name, array in opt.theta.items()}
            live = listed({name: p.to_local().detach() for name, p in net.named_parameters()})
        assert kept is not None
        net = self.net()
        with connected(self.told["address"], group + 100) as comm:
            opt = DiLoCo(comm, net, every)
            opt.load_state_dict(kept[0])
            net.load_state_dict(kept[1])
            inner = torch.optim.SGD(net.parameters(), lr=LR)
            for step in range(rounds * every // 2 + 1, rounds * every):
                self.inner_step(net, inner, step)
                opt.step()
            again = listed(opt.theta)
        say(phase="diloco", theta=thetas, again=again, shapes=shapes, live=live)

    def streaming(self) -> None:
        net = self.net()
        with connected(self.told["address"], self.told["group"] + 200 + self.told["shard"]) as comm:
            opt = StreamingDiLoCo(comm, net, 4, fragments=2, delay=1, alpha=0.5, quantize="fp4_e3m0")
            inner = torch.optim.SGD(net.parameters(), lr=LR)
            for step in range(8):
                self.inner_step(net, inner, step)
                opt.step()
            say(phase="streaming", theta=listed(opt.theta), fragments=opt.fragments)

    def noloco(self) -> None:
        net = self.net()
        with connected(self.told["address"], self.told["group"] + 400 + self.told["shard"]) as comm:
            opt = NoLoCo(comm, net, self.told["every"], seed=self.told["seed"])
            inner, phis = torch.optim.SGD(net.parameters(), lr=LR), []
            for step in range(self.told["rounds"] * self.told["every"]):
                self.inner_step(net, inner, step)
                if opt.step():
                    phis.append(listed(opt.theta))
            opt.finish()
        say(phase="noloco", phi=phis)

    def mixed_up(self) -> None:
        with connected(self.told["address"], self.told["group"] + 300 + self.told["island"]) as comm:
            try:
                DiLoCo(comm, {"w": self.net().first.weight}, 1)
            except pyccl.MismatchError as e:
                say(phase="mixed up", fields=e.fields)


def main() -> None:
    told = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(told["store"], 2), rank=told["shard"], world_size=2)
    rank = Rank(told)
    rank.diloco()
    rank.streaming()
    rank.noloco()
    rank.mixed_up()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
