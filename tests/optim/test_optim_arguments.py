"""Arguments: what is refused, before anything is sent; and what an exchange carries."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from reference import H
from replicas import Replicas, move, weights

import pyccl
from pyccl.optim import AsyncDiLoCo, DiLoCo, LocalSGD, NoLoCo, StreamingDiLoCo


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sync_every": 0}, "sync_every"),
        ({"sync_every": 2.5}, "sync_every"),
        ({"min_peers": 0}, "min_peers"),
        ({"outer_lr": 0.0}, "outer_lr"),
        ({"outer_lr": float("nan")}, "outer_lr"),
        ({"outer_lr": True}, "outer_lr"),
        ({"outer_lr": np.bool_(True)}, "outer_lr"),
        ({"outer_lr": "0.7"}, "outer_lr"),
        ({"outer_lr": 10**400}, "outer_lr"),
        ({"outer_momentum": np.float32("nan")}, "outer_momentum"),
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


def test_rates_are_real_numbers_of_any_kind_and_equal_where_their_values_are(replicas: Replicas) -> None:
    def train(comm: pyccl.Communicator, rank: int) -> None:
        half, one = (0.5, 1.0) if rank == 0 else (np.float32(0.5), 1)
        DiLoCo(comm, weights(), H, outer_lr=one, outer_momentum=half)
        StreamingDiLoCo(comm, weights(), H, fragments=1, alpha=half, outer_lr=Fraction(1, 2) if rank else 0.5)
        with pytest.warns(UserWarning, match="gamma"):
            NoLoCo(comm, weights(), H, alpha=half, beta=one, gamma=2.0 if rank else np.int64(2))
        for rate in ("alpha", "beta", "gamma"):
            for wrong in (True, "1", None, float("inf"), np.float64("nan")):
                with pytest.raises(pyccl.UsageError, match=rate):
                    NoLoCo(comm, weights(), H, **{rate: wrong})  # type: ignore[arg-type]

    replicas.run(2, train)


def test_a_communicator_that_was_closed_is_refused(replicas: Replicas) -> None:
    (comm,) = replicas.members(1)
    comm.close()
    for kind in (LocalSGD, DiLoCo, AsyncDiLoCo, NoLoCo):
        with pytest.raises(pyccl.UsageError, match="closed"):
            kind(comm, weights(), H)


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
