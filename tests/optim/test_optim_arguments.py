"""Arguments: what is refused, before anything is sent; and what an exchange carries."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from reference import H
from replicas import Replicas, move, weights

import pyccl
from pyccl.optim import AsyncDiLoCo, DiLoCo, LocalSGD


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sync_every": 0}, "sync_every"),
        ({"sync_every": 2.5}, "sync_every"),
        ({"min_peers": 0}, "min_peers"),
        ({"outer_lr": 0.0}, "outer_lr"),
        ({"outer_lr": float("nan")}, "outer_lr"),
        ({"outer_momentum": 1.0}, "outer_momentum"),
        ({"outer_momentum": -0.1}, "outer_momentum"),
        ({"nesterov": 1}, "nesterov"),
        ({"quantize": "uint7"}, "quantize"),
        ({"error_feedback": True}, "nothing is lost"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], match: str) -> None:
    comm = pyccl.Communicator("127.0.0.1:1")  # never connected
    for kind in (DiLoCo, AsyncDiLoCo):
        with pytest.raises(pyccl.UsageError, match=match):
            kind(comm, weights(), **{"sync_every": H, **options})


def test_options_are_given_by_name_only() -> None:
    comm = pyccl.Communicator("127.0.0.1:1")
    with pytest.raises(TypeError, match="positional"):
        DiLoCo(comm, weights(), H, 0.7)  # type: ignore[misc]
    with pytest.raises(pyccl.UsageError, match="eager"):
        AsyncDiLoCo(comm, weights(), H, eager=1)  # type: ignore[arg-type]
    with pytest.raises(pyccl.UsageError, match="register_step_post_hook"):
        LocalSGD(comm, weights(), H).attach(object())


def test_a_step_without_a_connection_says_so() -> None:
    opt = DiLoCo(pyccl.Communicator("127.0.0.1:1"), weights(), 1)
    with pytest.raises(pyccl.UsageError, match="not connected"):
        opt.step()


def test_a_quantized_exchange_of_two_moves_an_eighth(replicas: Replicas, seed: int) -> None:
    def train(comm: pyccl.Communicator, rank: int) -> list[int]:
        sent = []
        for codec in (None, "fp4_e3m0"):
            params = {"w": np.zeros(1 << 18, np.float32)}
            opt = DiLoCo(comm, params, 1, quantize=codec)
            before = opt.stats.tx_bytes
            move(params, seed, rank, 0)
            opt.step()
            sent.append(opt.stats.tx_bytes - before)
        return sent

    for plain, coded in replicas.run(2, train):
        assert plain >= 1 << 20 and 7.5 < plain / coded < 8.5


def test_tied_parameters_have_one_theta_under_both_names(replicas: Replicas, seed: int) -> None:
    def train(comm: pyccl.Communicator, rank: int) -> Any:
        x = weights()["a.weight"]
        params = {"embedding": x, "head": x}
        opt = DiLoCo(comm, params, H)
        assert opt.theta["head"] is opt.theta["embedding"] and set(opt.theta) == {"embedding", "head"}
        for step in range(H):
            move({"x": x}, seed, rank, step)
            opt.step()
        assert x.tobytes() == opt.theta["head"].tobytes()
        return opt.shared.digest()

    told = replicas.run(2, train)
    assert told[0] == told[1]


@pytest.mark.parametrize("kind", [DiLoCo, AsyncDiLoCo])
def test_seconds_are_hidden_where_an_exchange_ran_while_the_caller_did_not_wait(
    replicas: Replicas, seed: int, kind: type[DiLoCo]
) -> None:
    def train(comm: pyccl.Communicator, rank: int) -> tuple[float, float]:
        params = weights()
        opt = kind(comm, params, H)
        for step in range(3 * H):
            move(params, seed, rank, step)
            opt.step()
        return opt.stats.seconds_hidden, opt.stats.seconds_blocked

    for hidden, blocked in replicas.run(2, train):
        assert blocked > 0
        assert hidden > 0 or kind is DiLoCo
