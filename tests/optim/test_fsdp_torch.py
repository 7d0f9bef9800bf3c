"""Beside FSDP2: a rank exchanges its shards with those who hold the same; what is no shard is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fsdp_model import SHAPES, batch, weights
from replicas import TIMEOUT_S, Replicas, ended
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import pyccl
from pyccl.optim import DiLoCo
from pyccl.optim.params import Params

EVERY, ROUNDS, LR = 3, 3, 0.1
Arrays = dict[str, Any]


# ---- one rank of several, with nobody to talk to


@pytest.fixture(scope="module")
def rank_3_of_4() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=4)
    yield
    dist.destroy_process_group()


def dtensor(local: torch.Tensor, mesh_shape: tuple[int, ...], placements: list[Placement]) -> DTensor:
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("island", "rank")[: len(mesh_shape)])
    return DTensor.from_local(local, mesh, placements, run_check=False)


def test_of_a_dtensor_the_shard_is_used_in_place(rank_3_of_4: None) -> None:
    local = torch.arange(6.0).reshape(2, 3)
    parameter = torch.nn.Parameter(dtensor(local, (4,), [Shard(0)]))
    params = Params([("w", parameter), ("plain", torch.ones(2))])
    assert params.layout() == "plain:float32[2];w:float32[2, 3] of [8, 3] S(0)"
    assert params.shards() == "island=3/4" and params.sizes() == {"plain": 2, "w": 24}
    values = params.vectors()
    params.read(values)
    assert np.array_equal(values.views["w"], local.numpy())
    values.views["w"][:] += 1
    params.write(values)
    assert torch.equal(parameter.to_local(), torch.arange(1.0, 7.0).reshape(2, 3))
    g = params.vectors()
    params.pseudo_gradient(values, g)
    assert not g.vectors[0].any() and isinstance(parameter, DTensor) and parameter.requires_grad


def test_a_shard_that_was_moved_is_found(rank_3_of_4: None) -> None:
    """As FSDP moves them when it first runs, pads them, or pins them."""
    tensor = dtensor(torch.zeros(2), (4,), [Shard(0)])
    params = Params([("w", tensor)])
    tensor._local_tensor = torch.full((2,), 5.0)
    values = params.vectors()
    params.read(values)
    assert values.views["w"].tolist() == [5.0, 5.0]
    values.vectors[0][:] = 7
    params.write(values)
    assert tensor.to_local().tolist() == [7.0, 7.0]


def test_shards_along_two_dimensions_of_a_mesh(rank_3_of_4: None) -> None:
    params = Params([("w", dtensor(torch.zeros(2, 3), (2, 2), [Shard(0), Shard(1)]))])
    assert params.shards() == "island=1/2,rank=1/2" and params.sizes() == {"w": 24}
    alone = Params([("w", dtensor(torch.zeros(2, 3), (1, 4), [Replicate(), Shard(1)]))])
    assert alone.shards() == "island=0/1,rank=3/4"


@pytest.mark.parametrize(
    ("mesh", "placements", "told"),
    [
        ((4,), [Replicate()], "w: a DTensor that is R over the 4 ranks of mesh dimension 'island'"),
        ((2, 2), [Replicate(), Shard(0)], "w: a DTensor that is R over the 2 ranks of mesh dimension 'island'"),
        ((2, 2), [Shard(0), Partial()], r"w: a DTensor that is P\(sum\) over the 2 ranks of mesh dimension 'rank'"),
    ],
    ids=["replicated", "replicated along one dimension", "partial"],
)
def test_what_several_ranks_hold_is_refused(
    rank_3_of_4: None, mesh: tuple[int, ...], placements: list[Placement], told: str
) -> None:
    with pytest.raises(pyccl.UsageError, match=told):
        Params([("w", dtensor(torch.zeros(2, 2), mesh, placements))])


def test_a_rank_outside_the_mesh_is_told(rank_3_of_4: None) -> None:
    tensor = DTensor.from_local(torch.zeros(2), DeviceMesh("cpu", [0, 1]), [Shard(0)], run_check=False)
    with pytest.raises(pyccl.UsageError, match="w: this rank is not in the mesh"):
        Params([("w", tensor)])


def test_a_rank_begins_when_there_is_another_island(rank_3_of_4: None, replicas: Replicas) -> None:
    """The ranks of its island may not be members of their groups yet, and can't take part in a first step."""

    def begin(comm: pyccl.Communicator) -> int:
        DiLoCo(comm, {"w": dtensor(torch.zeros(2), (4,), [Shard(0)])}, 1)
        return comm.group_world_size

    first, second = replicas.communicator(), replicas.communicator()
    first.connect(TIMEOUT_S)
    begun = replicas.start(begin, first)
    second.connect(TIMEOUT_S)  # the first lets it in, from its constructor
    assert ended([begun, replicas.start(begin, second)]) == [2, 2]


# ---- two islands of two processes


def gradients(w: Arrays, x: np.ndarray, y: np.ndarray) -> Arrays:
    """Of mean((out . tanh(first(x)) + sum(shift) - y)^2)."""
    hidden = np.tanh(x @ w["first.weight"].T + w["first.bias"])  # (batch, 4)
    back = 2 * (hidden @ w["out"][0] + w["shift"].sum() - y) / len(y)
    before = back[:, None] * w["out"] * (1 - hidden**2)
    return {
        "first.weight": before.T @ x, "first.bias": before.sum(0),
        "out": (back @ hidden)[None], "shift": np.full(SHAPES["shift"], back.sum()),
    }  # fmt: skip


def moved(theta: Arrays, seed: int, island: int, round_: int) -> Arrays:
    """The island's weights after a round's inner steps from theta: SGD on both ranks' batches."""
    w = {name: value.copy() for name, value in theta.items()}
    for step in range(round_ * EVERY, (round_ + 1) * EVERY):
        (x0, y0), (x1, y1) = batch(seed, island, 0, step), batch(seed, island, 1, step)
        for name, g in gradients(w, np.concatenate([x0, x1]), np.concatenate([y0, y1])).items():
            w[name] -= LR * g
    return w


def start(seed: int) -> Arrays:
    return {name: value.astype(np.float64) for name, value in weights(seed).items()}


def reference(seed: int) -> list[Arrays]:
    """theta after each round of DiLoCo: Nesterov 0.7 / 0.9 across."""
    theta = start(seed)
    b = {name: np.zeros_like(value) for name, value in theta.items()}
    thetas = []
    for round_ in range(ROUNDS):
        w0, w1 = (moved(theta, seed, island, round_) for island in range(2))
        for name, t in theta.items():
            g = t - (w0[name] + w1[name]) / 2
            b[name] = 0.9 * b[name] + g
            theta[name] = t - 0.7 * (g + 0.9 * b[name])
        thetas.append({name: t.copy() for name, t in theta.items()})
    return thetas


def gossip(seed: int) -> list[list[Arrays]]:
    """phi of both islands after each round of NoLoCo: two are partners in every round."""
    phis = [start(seed), start(seed)]
    vs = [{name: np.zeros_like(value) for name, value in phi.items()} for phi in phis]
    told = []
    for round_ in range(ROUNDS):
        w = [moved(phi, seed, island, round_) for island, phi in enumerate(phis)]
        for name in SHAPES:
            shift = sum(w[island][name] - phis[island][name] for island in range(2)) / 2
            middle = (phis[0][name] + phis[1][name]) / 2
            for v, phi in zip(vs, phis, strict=True):
                v[name] = 0.5 * v[name] + 0.7 * shift - 0.7 * (phi[name] - middle)
            for v, phi in zip(vs, phis, strict=True):
                phi[name] = phi[name] + v[name]
        told.append([{name: p.copy() for name, p in phi.items()} for phi in phis])
    return told


@pytest.fixture(scope="module")
def islands(master: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Any]]:
    """The seed, and what each rank told: (island, shard) -> phase -> report."""
    seed, stores = 3, tmp_path_factory.mktemp("stores")
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    ranks = {}
    try:
        for place in ((0, 0), (0, 1), (1, 0), (1, 1)):
            told = {
                "address": master, "store": str(stores / str(place[0])), "island": place[0], "shard": place[1],
                "group": 9000, "seed": seed, "rounds": ROUNDS, "every": EVERY,
            }  # fmt: skip
            command = [sys.executable, str(Path(__file__).with_name("fsdp_worker.py")), json.dumps(told)]
            ranks[place] = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        reports = {}
        for place, process in ranks.items():
            lines = process.communicate(timeout=240)[0].splitlines()
            assert process.returncode == 0, place
            reports[place] = {report["phase"]: report for report in map(json.loads, lines)}
        yield seed, reports
    finally:
        for process in ranks.values():
            process.kill()
            process.communicate()


def whole(*parts: Arrays) -> Arrays:
    """The parameters of an island, of both shards."""
    return {
        name: np.concatenate([np.array(part[name]).reshape(-1, *SHAPES[name][1:]) for part in parts]) for name in SHAPES
    }


def test_theta_of_islands_follows_the_reference(islands: Any) -> None:
    seed, reports = islands
    expected = reference(seed)
    assert {n: np.shape(t) for n, t in expected[0].items()} == SHAPES
    for round_ in range(ROUNDS):
        for island in (0, 1):
            found = whole(*(reports[island, shard]["diloco"]["theta"][round_] for shard in (0, 1)))
            for name, values in expected[round_].items():
                np.testing.assert_allclose(found[name], values, rtol=2e-4, atol=2e-5, err_msg=f"{name} in {round_}")


def test_islands_hold_the_same_bits_and_ranks_their_shards(islands: Any) -> None:
    _, reports = islands
    for shard in (0, 1):
        mine, theirs = reports[0, shard]["diloco"], reports[1, shard]["diloco"]
        assert mine["theta"] == theirs["theta"] and mine["live"] == theirs["live"] == mine["theta"][-1]
    assert reports[0, 0]["diloco"]["shapes"] == {
        "first.bias": [2], "first.weight": [2, 3], "out": [1, 4], "shift": [3],
    }  # fmt: skip
    assert reports[0, 1]["diloco"]["shapes"] == {
        "first.bias": [2], "first.weight": [2, 3], "out": [0, 4], "shift": [2],
    }  # fmt: skip


def test_islands_go_on_from_a_checkpoint_bit_for_bit(islands: Any) -> None:
    for report in islands[1].values():
        assert report["diloco"]["again"] == report["diloco"]["theta"][-1]


def test_all_ranks_cut_the_same_fragments_though_shards_differ_in_size(islands: Any) -> None:
    _, reports = islands
    told = {place: report["streaming"] for place, report in reports.items()}
    assert len({json.dumps(report["fragments"]) for report in told.values()}) == 1
    for shard in (0, 1):
        assert told[0, shard]["theta"] == told[1, shard]["theta"]
    moved, start = whole(told[0, 0]["theta"], told[0, 1]["theta"]), weights(islands[0])
    assert all(np.any(moved[name] != start[name]) for name in SHAPES)


def test_phi_of_islands_that_gossip_follows_the_reference(islands: Any) -> None:
    seed, reports = islands
    expected = gossip(seed)
    for round_ in range(ROUNDS):
        for island in (0, 1):
            found = whole(*(reports[island, shard]["noloco"]["phi"][round_] for shard in (0, 1)))
            for name, values in expected[round_][island].items():
                np.testing.assert_allclose(found[name], values, rtol=2e-4, atol=2e-5, err_msg=f"{name} in {round_}")


def test_shards_that_meet_in_one_group_are_told(islands: Any) -> None:
    """Their shapes are equal: without a check they would be averaged."""
    for report in islands[1].values():
        assert report["mixed up"]["fields"] == ["shard"]
