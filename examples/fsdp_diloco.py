"""FSDP inside two islands, DiLoCo across them: what one machine cannot hold is sharded over fast links, what is far
apart talks seldom.

    python examples/fsdp_diloco.py                 # a master and 2 islands of 2 processes here; half a minute
    python examples/fsdp_diloco.py --rounds 20

On machines that are far apart, with torchrun on each of them (one island of 8 processes per line):

    pyccl-master --listen 0.0.0.0:48148 --no-journal --insecure
    torchrun --nproc-per-node 8 examples/fsdp_diloco.py --address HOST:48148 --island 0
    torchrun --nproc-per-node 8 examples/fsdp_diloco.py --address HOST:48148 --island 1

                  island 0                        island 1
              rank 0 -- FSDP -- rank 1        rank 0 -- FSDP -- rank 1
                |                 |             |                 |
    group 0     +--------- DiLoCo of shard 0 ---+                 |
    group 1                       +--------- DiLoCo of shard 1 ---+

Every rank holds one shard of each parameter, and exchanges it with the ranks of other islands that hold the same one:
the number of the shard is the number of the peer group. Within an island FSDP gathers parameters and averages gradients
at every step; between islands each shard travels once in `--every` steps, all shards at the same time.
"""

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

import pyccl
from pyccl.optim import DiLoCo

CONTEXT, WIDTH, BATCH = 32, 64, 16  # of each rank
ISLANDS, RANKS = 2, 2  # what is started on this machine


# ---- The model: bytes in, bytes out. The text: Python's own standard library.


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.byte, self.place = nn.Embedding(256, WIDTH), nn.Parameter(torch.zeros(CONTEXT, WIDTH))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, letters: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.byte(letters) + self.place
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return functional.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


def sharded(model: Model) -> Model:
    """Each block by itself, so that no more than one is gathered at a time, then what is left."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def batch(text: np.ndarray, starts: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    cut = torch.from_numpy(text[starts[:, None] + np.arange(CONTEXT + 1)].astype(np.int64))
    return cut[:, :-1], cut[:, 1:]


@torch.no_grad()
def bits_per_byte(model: Model, text: np.ndarray) -> float:
    """All ranks of an island take part, as in every forward pass."""
    starts = np.linspace(0, len(text) - CONTEXT - 1, 128).astype(np.int64)
    return float(model(*batch(text, starts))) / float(np.log(2))


# ---- One rank of one island.


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=args.meet, rank=args.rank, world_size=args.world)
    shard = dist.get_rank()
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text, validation = (
        np.frombuffer(b"".join(path.read_bytes() for path in part), np.uint8) for part in (files[8:], files[:8])
    )
    torch.manual_seed(0)  # the same model everywhere,
    model = sharded(Model())
    rng = np.random.default_rng([args.island, shard])  # on batches of its own
    adam = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    with pyccl.connect(args.address, group=shard) as comm:
        opt = DiLoCo(comm, model, sync_every=args.every, min_peers=args.islands)
        while opt.round < args.rounds:
            loss = model(*batch(text, rng.integers(0, len(text) - CONTEXT, BATCH)))
            loss.backward()  # FSDP: the gradient's shard, averaged over the island
            adam.step()
            adam.zero_grad()
            if opt.step():  # every `--every` steps: this shard, averaged over the islands
                bits = bits_per_byte(model, validation)
                if shard == 0:
                    print(f"island {args.island}  round {opt.round:3}  validation {bits:.3f} bits/byte", flush=True)
        opt.finish()
        digest = hashlib.sha256(b"".join(array.tobytes() for array in opt.theta.values())).digest()
        digests = comm.all_gather(np.frombuffer(digest, np.uint8))  # (islands, 32)
        same = "the same bits" if len({row.tobytes() for row in digests}) == 1 else "DIFFERENT BITS"
        numbers = sum(array.size for array in opt.theta.values())
        print(
            f"island {args.island}  shard {shard}  theta {digest.hex()[:16]} of {numbers:,} numbers: {same} on "
            f"{len(digests)} islands  {opt.stats.bytes / 1e6:.1f} MB  blocked {opt.stats.seconds_blocked:.1f} s",
            flush=True,
        )
    dist.destroy_process_group()


# ---- Everything on this machine, for a first look.


def start_all(args: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the processes would go on
    listen = ["--listen", "127.0.0.1:0", "--no-journal", "--log-level", "error"]
    command = [sys.executable, "-P", "-m", "pyccl.cli.master", *listen]  # -P: not from the folder of the source code
    master = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    ranks: list[subprocess.Popen[str]] = []
    with tempfile.TemporaryDirectory() as scratch:
        try:
            assert master.stdout is not None
            address = master.stdout.readline().split()[-1]  # "listening on HOST:PORT"
            for island in range(ISLANDS):
                for rank in range(RANKS):
                    command = [sys.executable, __file__, "--address", address, "--island", island, "--islands", ISLANDS]
                    command += ["--meet", f"file://{scratch}/island-{island}", "--rank", rank, "--world", RANKS]
                    command += ["--rounds", args.rounds, "--every", args.every]
                    environment = {"GLOO_SOCKET_IFNAME": "lo", **os.environ}
                    ranks.append(subprocess.Popen([str(part) for part in command], env=environment, text=True))
            while not all(rank.poll() == 0 for rank in ranks):
                if any(rank.poll() for rank in ranks):
                    return 1  # one has failed, and the others wait for it
                time.sleep(0.1)
            return 0
        finally:
            for process in [*ranks, master]:
                process.kill()
                process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", metavar="HOST:PORT", help="of the master: be one rank, instead of starting all")
    parser.add_argument("--island", type=int, default=0, help="which one this is")
    parser.add_argument("--islands", type=int, default=ISLANDS, help="the fewest to train with")
    parser.add_argument("--rounds", type=int, default=8, help="outer steps")
    parser.add_argument("--every", type=int, default=25, help="inner steps between two exchanges")
    parser.add_argument("--meet", default="env://", help="where the ranks of this island meet; torchrun tells them")
    parser.add_argument("--rank", type=int, default=-1, help="in the island, without torchrun")
    parser.add_argument("--world", type=int, default=-1, help="ranks of the island, without torchrun")
    args = parser.parse_args()
    if args.address is None:
        return start_all(args)
    train(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
