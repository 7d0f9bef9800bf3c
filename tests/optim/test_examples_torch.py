"""The examples with torch: each optimizer of torch_gpt.py, its command, and FSDP in islands."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import pytest
from example_runs import EXAMPLES, ended
from masters import started_master
from replicas import Replicas

LAST = re.compile(r"peer (\d)  (\w+)  theta ([0-9a-f]{16})  validation ([\d.]+) bits/character  ([\d.]+) MB  blocked")


def imported(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpt = imported("torch_gpt")
PARAMETERS = sum(p.numel() for p in gpt.GPT(0).parameters())
gpt.CONTEXT, gpt.WIDTH, gpt.HEADS, gpt.BATCH = 16, 16, 2, 8  # for the peers in this process


def trained(optimizer: str, capsys: pytest.CaptureFixture[str]) -> dict[int, tuple[str, float, float]]:
    """Two peers as threads, for ten steps: peer -> digest of theta, validation loss, MB."""
    with started_master("--no-journal", "--peer-timeout", "30") as address:
        peers = Replicas(address)
        try:
            given = ["--optimizer", optimizer, "--rounds", "1", "--every", "10", "--seed", "4", "--master", address]
            runs = [peers.start(gpt.train, gpt.arguments([*given, "--stream", str(stream)])) for stream in range(2)]
            for run in runs:
                run.result(120)
        finally:
            peers.close()
    out = capsys.readouterr().out
    assert len(re.findall(r"step   10  2 peers  training", out)) == 2
    lines = LAST.findall(out)
    assert [kind for _, kind, *_ in lines] == [optimizer] * 2
    return {int(peer): (digest, float(loss), float(mb)) for peer, _, digest, loss, mb in lines}


@pytest.fixture(scope="module")
def untrained() -> float:
    return gpt.bits_per_character(gpt.GPT(4), {}, gpt.read_text()[1])


@pytest.mark.parametrize("optimizer", gpt.OPTIMIZERS)
def test_each_optimizer_trains_the_gpt(optimizer: str, untrained: float, capsys: pytest.CaptureFixture[str]) -> None:
    told = trained(optimizer, capsys)
    assert sorted(told) == [0, 1]
    digests = {digest for digest, *_ in told.values()}
    assert len(digests) == (2 if optimizer == "eager" else 1)
    assert all(loss < untrained for _, loss, _ in told.values())
    parameters = sum(p.numel() for p in gpt.GPT(0).parameters())
    exchanges = {"every_step": 10, "noloco": 4, "streaming": 1 / 8}.get(optimizer, 1)  # phi, w - phi, phi, the merge
    for *_, mb in told.values():
        assert mb == pytest.approx(2 * 4 * parameters * exchanges / 1e6, rel=0.1, abs=0.06)


def test_the_same_seed_gives_the_same_weights(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = trained("streaming", capsys), trained("streaming", capsys)
    assert {digest for digest, *_ in first.values()} == {digest for digest, *_ in second.values()}


def test_the_command_of_the_gpt_starts_a_master_and_peers() -> None:
    assert 300_000 < PARAMETERS < 600_000
    out = ended("torch_gpt.py", "--optimizer", "late", "--rounds", "2", "--every", "2")
    assert {peer for peer, *_ in LAST.findall(out)} == {"0", "1"}
    assert len({digest for _, _, digest, *_ in LAST.findall(out)}) == 1


def test_islands_of_fsdp_ranks_hold_the_same_bits_and_learn() -> None:
    out = ended("fsdp_diloco.py", "--rounds", "3", "--every", "4")
    losses = {int(k): float(loss) for k, loss in re.findall(r"round +(\d+)  validation ([\d.]+) bits/byte", out)}
    assert sorted(losses) == [1, 2, 3] and losses[3] < losses[2] < losses[1]
    shards = re.findall(r"island (\d)  shard (\d)  theta ([0-9a-f]{16}) of 67,520 numbers: the same bits on 2", out)
    assert sorted((island, shard) for island, shard, _ in shards) == [("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")]
    assert len({digest for *_, digest in shards}) == 2
