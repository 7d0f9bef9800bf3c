"""A character model in NumPy, trained by several processes with DiLoCo.

    python examples/numpy_char_lm_diloco.py               # a master and two peers on this machine; some seconds
    python examples/numpy_char_lm_diloco.py --peers 4 --rounds 20

What it starts can as well run on machines that are far apart, each line on one of them; peers may come later, or leave:

    pyccl-master --listen 0.0.0.0:48148 --no-journal --insecure
    python examples/numpy_char_lm_diloco.py --master HOST:48148 --stream 0
    python examples/numpy_char_lm_diloco.py --master HOST:48148 --stream 1

Every peer makes `--every` Adam steps by itself, on batches of its own (`--stream`); then the peers exchange once how
far they have come, and all take the same outer step. At the end each prints the loss of the weights they share, and a
digest that shows that these are equal to the last bit.
"""

import argparse
import hashlib
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np

import pyccl
from pyccl.optim import DiLoCo

CONTEXT, WIDTH, HIDDEN, BATCH = 12, 24, 192, 128  # the model sees 12 characters and guesses the next
LETTERS = "\n" + "".join(map(chr, range(32, 127)))  # all others are one more letter


# ---- The text: Python's own standard library. One file in eight is kept for validation.


def read_text() -> tuple[np.ndarray, np.ndarray]:
    code_of = np.full(256, len(LETTERS), np.uint8)
    code_of[[ord(letter) for letter in LETTERS]] = np.arange(len(LETTERS))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        parts[hashlib.sha256(path.name.encode()).digest()[0] % 8 == 0].append(path.read_bytes())
    train, validation = (code_of[np.frombuffer(b"".join(part), np.uint8)] for part in parts)
    return train, validation


def windows(text: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(batch, CONTEXT) characters, and (batch,) the one after each."""
    cut = text[starts[:, None] + np.arange(CONTEXT + 1)]
    return cut[:, :-1], cut[:, -1]


# ---- The model: embedding -> tanh layer -> softmax. `params` is a dict of arrays; that is all pyccl needs to know.


def new_model(seed: int) -> dict[str, np.ndarray]:
    rng, letters = np.random.default_rng(seed), len(LETTERS) + 1
    shapes = {"embedding": (letters, WIDTH), "hidden": (CONTEXT * WIDTH, HIDDEN), "output": (HIDDEN, letters)}
    params = {name: rng.standard_normal(shape) * shape[0] ** -0.5 for name, shape in shapes.items()}
    params |= {"hidden_bias": np.zeros(HIDDEN), "output_bias": np.zeros(letters)}
    return {name: array.astype(np.float32) for name, array in params.items()}


def loss_and_grads(
    params: dict[str, np.ndarray], inputs: np.ndarray, targets: np.ndarray
) -> tuple[float, dict[str, np.ndarray]]:
    rows = np.arange(len(inputs))
    features = params["embedding"][inputs].reshape(len(inputs), -1)  # (batch, CONTEXT * WIDTH)
    hidden = np.tanh(features @ params["hidden"] + params["hidden_bias"])  # (batch, HIDDEN)
    logits = hidden @ params["output"] + params["output_bias"]  # (batch, letters)
    logits -= logits.max(axis=1, keepdims=True)
    p = np.exp(logits)
    p /= p.sum(axis=1, keepdims=True)
    loss = float(-np.log(p[rows, targets] + 1e-9).mean())

    p[rows, targets] -= 1  # now the gradient of the logits, times the batch
    p /= len(inputs)
    back = (p @ params["output"].T) * (1 - hidden**2)
    each = (back @ params["hidden"].T).reshape(-1, WIDTH)  # of every character's embedding
    one_hot = np.zeros((len(each), len(LETTERS) + 1), np.float32)
    one_hot[np.arange(len(each)), inputs.reshape(-1)] = 1
    return loss, {
        "output": hidden.T @ p, "output_bias": p.sum(axis=0),
        "hidden": features.T @ back, "hidden_bias": back.sum(axis=0), "embedding": one_hot.T @ each,
    }  # fmt: skip


class Adam:
    """The inner optimizer. Its state belongs to this peer and is never exchanged."""

    def __init__(self, params: dict[str, np.ndarray], rate: float) -> None:
        self.params, self.rate, self.steps = params, rate, 0
        self.mean = {name: np.zeros_like(p) for name, p in params.items()}
        self.square = {name: np.zeros_like(p) for name, p in params.items()}

    def step(self, grads: dict[str, np.ndarray]) -> None:
        self.steps += 1
        size = self.rate * (1 - 0.99**self.steps) ** 0.5 / (1 - 0.9**self.steps)
        for name, g in grads.items():
            self.mean[name] += 0.1 * (g - self.mean[name])
            self.square[name] += 0.01 * (g * g - self.square[name])
            self.params[name] -= size * self.mean[name] / (np.sqrt(self.square[name]) + 1e-8)


def bits_per_character(params: dict[str, np.ndarray], text: np.ndarray) -> float:
    starts = np.linspace(0, len(text) - CONTEXT - 1, 4096).astype(np.int64)
    return float(loss_and_grads(params, *windows(text, starts))[0] / np.log(2))


# ---- One peer. What DiLoCo adds to a training loop are the two lines with `opt`.


def train(args: argparse.Namespace) -> None:
    text, validation = read_text()
    rng = np.random.default_rng([1, args.stream])  # batches of its own
    params = new_model(seed=0)
    adam = Adam(params, rate=2e-3)
    with pyccl.connect(args.master) as comm:
        opt = DiLoCo(comm, params, sync_every=args.every, min_peers=args.peers)  # waits for company at the first step
        while opt.round < args.rounds:
            inputs, targets = windows(text, rng.integers(0, len(text) - CONTEXT, BATCH))
            loss, grads = loss_and_grads(params, inputs, targets)
            adam.step(grads)
            if opt.step():  # every `--every` steps: exchanged, and `params` are what all have agreed upon
                print(
                    f"peer {args.stream}  round {opt.round:3}  {comm.group_world_size} peers  training "
                    f"{loss / np.log(2):.3f}  validation {bits_per_character(params, validation):.3f} bits/character",
                    flush=True,
                )
        opt.finish()
        mb, blocked = opt.stats.bytes / 1e6, opt.stats.seconds_blocked
        print(f"peer {args.stream}  {opt.shared.digest()[:16]}  {mb:.1f} MB, {blocked:.1f} s blocked", flush=True)


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
        options = ["--peers", args.peers, "--rounds", args.rounds, "--every", args.every]
        for stream in range(args.peers):
            command = [sys.executable, __file__, "--master", address, "--stream", stream, *options]
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--master", metavar="HOST:PORT", help="be one peer of this run, instead of starting all")
    parser.add_argument("--stream", type=int, default=0, help="which batches this peer draws")
    parser.add_argument("--peers", type=int, default=2, help="how many to start, and the fewest to train with")
    parser.add_argument("--rounds", type=int, default=12, help="outer steps")
    parser.add_argument("--every", type=int, default=50, help="inner steps between two exchanges")
    args = parser.parse_args()
    if args.master is None:
        return start_all(args)
    train(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
