"""A small GPT in PyTorch, trained by several processes that seldom talk, with any of pyccl's optimizers.

    python examples/torch_gpt.py                         # DiLoCo: a master and two peers on this machine; a minute
    python examples/torch_gpt.py --optimizer streaming   # or local_sgd, late, eager, noloco, every_step
    python examples/torch_gpt.py --peers 4 --rounds 20 --seed 1

What it starts can as well run on machines that are far apart, each line on one of them:

    pyccl-master --listen 0.0.0.0:48148 --no-journal --insecure
    python examples/torch_gpt.py --optimizer streaming --master HOST:48148 --stream 0
    python examples/torch_gpt.py --optimizer streaming --master HOST:48148 --stream 1

Every peer makes AdamW steps on batches of its own; what the peers exchange, and when, is the optimizer's affair
(`outer_optimizer` below). All of them get the same number of steps, so their losses can be compared. At the end each
peer prints the loss of the outer weights, a digest of them, and what the exchange took: bytes sent and received,
seconds that the training loop was blocked, seconds of exchange that were hidden behind it.

The same seed gives the same bits with two peers. With more, sums are in the order of the peers' ids, which are random.
"""

import argparse
import hashlib
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import pyccl
from pyccl.optim import AsyncDiLoCo, DiLoCo, LocalSGD, NoLoCo, OuterOptimizer, StreamingDiLoCo

CONTEXT, WIDTH, HEADS, BLOCKS, BATCH = 64, 96, 4, 4, 16  # 460,000 parameters
LETTERS = "\n" + "".join(map(chr, range(32, 127)))  # all others are one more letter
OPTIMIZERS = ("local_sgd", "diloco", "late", "eager", "streaming", "noloco", "every_step")


# ---- The text: Python's own standard library. One file in eight is kept for validation.


def read_text() -> tuple[np.ndarray, np.ndarray]:
    code_of = np.full(256, len(LETTERS), np.int64)
    code_of[[ord(letter) for letter in LETTERS]] = np.arange(len(LETTERS))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        parts[hashlib.sha256(path.name.encode()).digest()[0] % 8 == 0].append(path.read_bytes())
    train, validation = (code_of[np.frombuffer(b"".join(part), np.uint8)] for part in parts)
    return train, validation


def windows(text: np.ndarray, starts: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """(batch, CONTEXT) letters, and (batch, CONTEXT) the one after each."""
    cut = torch.from_numpy(text[starts[:, None] + np.arange(CONTEXT + 1)])
    return cut[:, :-1], cut[:, 1:]


# ---- The model. Nothing in it knows of other peers; its names tell StreamingDiLoCo which parameters make a block.


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.mix = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, context, WIDTH)
        heads = self.qkv(self.norm_1(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(*heads, is_causal=True)  # (batch, HEADS, context, WIDTH / HEADS)
        x = x + self.mix(seen.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm_2(x))))


class GPT(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.letter, self.place = nn.Embedding(len(LETTERS) + 1, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.h = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, len(LETTERS) + 1, bias=False)
        self.head.weight = self.letter.weight  # tied: exchanged once
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)

    def forward(self, letters: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.letter(letters) + self.place.weight
        for block in self.h:
            x = block(x)
        return functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


@torch.no_grad()
def bits_per_character(model: GPT, theta: Mapping[str, np.ndarray], text: np.ndarray) -> float:
    """Of the outer weights, which need not be those that the model has now."""
    weights = {name: torch.from_numpy(array) for name, array in theta.items()}
    starts = np.linspace(0, len(text) - CONTEXT - 1, 256).astype(np.int64)
    return float(torch.func.functional_call(model, weights, windows(text, starts))) / float(np.log(2))


# ---- What all of this is about: how the peers' weights come together.


def outer_optimizer(args: argparse.Namespace, comm: pyccl.Communicator, model: nn.Module) -> OuterOptimizer:
    every, fewest = args.every, args.peers  # with fewer peers than at the start an exchange is undone, and waits
    match args.optimizer:
        case "every_step":  # the expensive way: all weights are averaged after every single step
            return LocalSGD(comm, model, 1, min_peers=fewest)
        case "local_sgd":  # the same, every `every` steps
            return LocalSGD(comm, model, every, min_peers=fewest)
        case "diloco":  # what the peers have moved on average is a gradient for Nesterov's method
            return DiLoCo(comm, model, every, min_peers=fewest)
        case "late":  # the exchange runs during the next round; late gradients want less momentum
            return AsyncDiLoCo(comm, model, every, outer_momentum=0.0, min_peers=fewest)
        case "eager":  # late, but for this peer's own part
            return AsyncDiLoCo(comm, model, every, outer_lr=0.4, eager=True, min_peers=fewest)
        case "streaming":  # a fragment at a time, in 4 bits, while the training goes on
            return StreamingDiLoCo(
                comm, model, every, fragments="strided:2", delay=every // 10, quantize="fp4_e3m0", min_peers=fewest
            )
        case "noloco":  # no exchange of all: every round another two meet
            return NoLoCo(comm, model, every, seed=args.seed)
    raise AssertionError(args.optimizer)


# ---- One peer.


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # the peers share this machine's cores
    text, validation = read_text()
    rng = np.random.default_rng([args.seed, args.stream])  # batches of its own
    model = GPT(args.seed)
    adam = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    with pyccl.connect(args.master) as comm:
        while comm.group_world_size < args.peers:
            comm.update_topology()  # lets others in; all are there at the first step, so that runs can be repeated
        opt = outer_optimizer(args, comm, model)
        opt.attach(adam)  # from here on adam.step() also does what is due of the exchange
        for step in range(1, args.rounds * args.every + 1):
            letters, targets = windows(text, rng.integers(0, len(text) - CONTEXT, BATCH))
            loss = model(letters, targets)
            adam.zero_grad()
            loss.backward()
            adam.step()
            if step % args.every == 0:
                print(
                    f"peer {args.stream}  step {step:4}  {comm.group_world_size} peers  training "
                    f"{loss.item() / np.log(2):.3f}  validation {bits_per_character(model, opt.theta, validation):.3f} "
                    "bits/character",
                    flush=True,
                )
        opt.finish()  # the last exchange, where one is still under way
        if isinstance(opt, NoLoCo):
            opt.merge()  # of weights that are near each other one model
        digest = hashlib.sha256(b"".join(opt.theta[name].tobytes() for name in sorted(opt.theta))).hexdigest()
        stats = opt.stats
        print(
            f"peer {args.stream}  {args.optimizer}  theta {digest[:16]}  validation "
            f"{bits_per_character(model, opt.theta, validation):.3f} bits/character  {stats.bytes / 1e6:.1f} MB  "
            f"blocked {stats.seconds_blocked:.1f} s  hidden {stats.seconds_hidden:.1f} s",
            flush=True,
        )


# ---- Everything on this machine, for a first look.


def start_all(args: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the processes would go on
    listen = ["--listen", "127.0.0.1:0", "--no-journal", "--log-level", "error"]
    command = [sys.executable, "-P", "-m", "pyccl.cli.master", *listen]  # -P: not from the folder of the source code
    master = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peers: list[subprocess.Popen[str]] = []
    try:
        assert master.stdout is not None
        address = master.stdout.readline().split()[-1]  # "listening on HOST:PORT"
        options = ["--peers", args.peers, "--rounds", args.rounds, "--every", args.every, "--seed", args.seed]
        for stream in range(args.peers):
            command = [sys.executable, __file__, "--master", address, "--stream", stream, *options]
            command += ["--optimizer", args.optimizer]
            peers.append(subprocess.Popen([str(part) for part in command], text=True))
        while not all(peer.poll() == 0 for peer in peers):
            if any(peer.poll() for peer in peers):
                return 1  # one has failed, and the others wait for company
            time.sleep(0.1)
        return 0
    finally:
        for process in [*peers, master]:
            process.kill()
            process.wait()


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="diloco")
    parser.add_argument("--master", metavar="HOST:PORT", help="be one peer of this run, instead of starting all")
    parser.add_argument("--stream", type=int, default=0, help="which batches this peer draws")
    parser.add_argument("--peers", type=int, default=2, help="how many to start, and to train with")
    parser.add_argument("--rounds", type=int, default=12, help="of `--every` inner steps")
    parser.add_argument("--every", type=int, default=50, help="inner steps between two exchanges of a weight")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    return parser.parse_args(given)


def main() -> int:
    args = arguments()
    if args.master is None:
        return start_all(args)
    train(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
