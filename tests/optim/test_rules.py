"""The update rules by themselves: worked examples of docs/optimizers.md, and NumPy written down plainly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pyccl
from pyccl.optim import codes, rules
from pyccl.optim.gossip import gossip_step

Array = np.ndarray[Any, Any]

SIZES = [1, 7, rules.BLOCK - 1, rules.BLOCK, 2 * rules.BLOCK + 5]


def test_the_worked_example_of_nesterov() -> None:
    theta, b = np.array([1.0]), np.zeros(1)
    for w, expected in (([0.8, 0.4], 0.468), ([0.368, 0.368], 0.1082)):
        g = np.array([np.mean(theta[0] - np.array(w))])
        rules.outer_sgd(theta, b, g, lr=0.7, mu=0.9, nesterov=True)
        assert theta[0] == pytest.approx(expected, abs=1e-12)
    assert b[0] == pytest.approx(0.46, abs=1e-12)


def test_the_first_nesterov_step_is_1_33_and_under_a_constant_gradient_it_tends_to_7() -> None:
    theta, b, g = np.zeros(1), np.zeros(1), np.ones(1)
    steps = []
    for _ in range(300):
        before = theta[0]
        rules.outer_sgd(theta, b, g, lr=0.7, mu=0.9, nesterov=True)
        steps.append(before - theta[0])
    assert steps[0] == pytest.approx(1.33) and steps[-1] == pytest.approx(7.0, rel=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("mu", "nesterov"), [(0.9, True), (0.5, False), (0.0, True)])
def test_blocks_give_the_bits_of_the_rule_on_whole_arrays(
    dtype: type[np.floating], size: int, mu: float, nesterov: bool
) -> None:
    rng = np.random.default_rng(size)
    theta, plain = (rng.standard_normal(size).astype(dtype) for _ in range(2))
    theta[:] = plain
    b, kept = np.zeros(size, dtype), np.zeros(size, dtype)
    lr, keep = dtype(0.7), dtype(mu)
    for _ in range(3):
        g = rng.standard_normal(size).astype(dtype)
        before = g.copy()
        rules.outer_sgd(theta, b if mu else None, g, lr=0.7, mu=mu, nesterov=nesterov)
        kept = keep * kept + g
        d = g + keep * kept if nesterov else kept
        plain = plain - lr * d
        assert theta.tobytes() == plain.tobytes() and g.tobytes() == before.tobytes()
        assert not mu or b.tobytes() == kept.tobytes()


@pytest.mark.parametrize("size", [0, 1, 1000, (1 << 20) + 3])
def test_a_difference_has_numpys_bits_whatever_the_strides(size: int) -> None:
    rng = np.random.default_rng(size)
    a, b = (rng.standard_normal(2 * size + 2).astype(np.float32) for _ in range(2))
    for step, dtype in ((1, np.float32), (2, np.float32), (1, np.float64)):
        x, y = (
            a[1 : 1 + step * size : step].astype(dtype, copy=False),
            b[: step * size : step].astype(dtype, copy=False),
        )
        out = np.zeros(size + 1, dtype)
        rules.difference(x, y, out[:size])
        assert out[:size].tobytes() == (x - y).tobytes() and out[size] == 0


@pytest.mark.parametrize("size", SIZES)
def test_eager_replaces_the_own_share_by_a_fresh_one(size: int) -> None:
    rng = np.random.default_rng(size)
    shares = [rng.standard_normal(size).astype(np.float32) for _ in range(3)]
    fresh, late = rng.standard_normal(size).astype(np.float32), np.mean(shares, axis=0, dtype=np.float32)
    out = np.empty(size, np.float32)
    rules.eager_joining(late, fresh, 3, out)
    np.testing.assert_allclose(out, (sum(shares) + fresh) / 4, rtol=0, atol=1e-5)
    for dtype in (np.float32, np.float64):
        mean, mine, before = (array.astype(dtype) for array in (late, fresh, shares[1]))
        wanted = mean + (mine - before) / dtype(3)
        rules.eager(mean, mine, before, 3)
        assert mean.tobytes() == wanted.tobytes()
        np.testing.assert_allclose(mean, (shares[0] + fresh + shares[2]) / 3, rtol=0, atol=1e-5)


@given(st.floats(0, 1, width=32), st.integers(0, 3000), st.sampled_from([np.float32, np.float64]))
def test_mixing_has_the_bits_of_the_rule(alpha: float, count: int, dtype: type) -> None:
    live, theta = np.linspace(-1, 1, count, dtype=dtype), np.linspace(5, 3, count, dtype=dtype)
    expected = dtype(alpha) * live + dtype(1 - alpha) * theta if alpha else theta.copy()
    rules.mix(live, theta, alpha)
    assert live.tobytes() == expected.tobytes()


def test_mixing_nothing_takes_the_bits_of_theta() -> None:
    live, theta = np.float32([np.nan, np.inf, 1.0]), np.float32([-0.0, 1.0, np.nan])
    rules.mix(live, theta, 0.0)
    assert live.tobytes() == theta.tobytes()


@pytest.mark.parametrize(("lr", "mu", "late", "last_stable"), [
    (0.7, 0.9, False, 1.94), (0.7, 0.9, True, 0.36), (0.4, 0.9, True, 0.63), (0.7, 0.0, True, 1.43),
])  # fmt: skip
def test_a_late_step_is_stable_for_less_local_progress(lr: float, mu: float, late: bool, last_stable: float) -> None:
    """A replica covers the part q of the way to its optimum, 0, in a round: g = q*theta. See docs/optimizers.md."""

    def ends_at(q: float) -> float:
        theta, b = np.ones(1), np.zeros(1)
        flying = None
        for _ in range(3000):
            g = q * theta
            used, flying = (flying, g.copy()) if late else (g, None)
            if used is not None:
                rules.outer_sgd(theta, b if mu else None, used, lr=lr, mu=mu, nesterov=True)
            if abs(theta[0]) > 1e6:
                break
        return abs(float(theta[0]))

    assert ends_at(last_stable - 0.02) < 1e-3 < 1e3 < ends_at(last_stable + 0.02)


def test_arrays_that_do_not_fit_never_reach_the_core() -> None:
    """Which would read and write behind their ends."""
    x, short, wide = np.zeros(100, np.float32), np.zeros(4, np.float32), np.zeros(100)
    gaps, locked = np.zeros(200, np.float32)[::2], np.zeros(100, np.float32)
    locked.setflags(write=False)
    encoded = codes.encode(x, "uint8")

    def gossip(phi: Array, v: Array, moved: Sequence[Array] = (x,), phis: Sequence[Array] = (x,)) -> None:
        gossip_step(phi, v, moved, phis, alpha=0.5, beta=0.7, gamma=0.7)

    for call in (
        lambda: rules.difference(x, short, x.copy()),
        lambda: rules.difference(short, x, x.copy()),
        lambda: rules.difference(x, x, short),
        lambda: rules.difference(x, x.reshape(10, 10), x.copy()),
        lambda: rules.difference(x, x, locked),
        *(lambda b=b: rules.outer_sgd(x, None, b, lr=0.7, mu=0.0, nesterov=True) for b in (short, wide, gaps)),
        *(lambda b=b: rules.outer_sgd(x, b, x, lr=0.7, mu=0.9, nesterov=True) for b in (short, wide, gaps, locked)),
        lambda: rules.outer_sgd(locked, None, x, lr=0.7, mu=0.0, nesterov=True),
        *(lambda b=b: rules.eager(x, b, x, 2) for b in (short, wide, gaps)),
        *(lambda b=b: rules.eager(x, x, b, 2) for b in (short, wide, gaps)),
        lambda: rules.eager(locked, x, x, 2),
        *(lambda b=b: rules.mix(x, b, 0.5) for b in (short, wide, gaps)),
        lambda: rules.mix(locked, x, 0.5),
        *(lambda b=b: gossip(b, x) for b in (short, wide, gaps, locked)),
        *(lambda b=b: gossip(x, b, [x, x], [x, x]) for b in (short, wide, gaps, locked)),
        *(lambda b=b: gossip(x, x.copy(), [x, b], [x, x]) for b in (short, wide, gaps)),
        *(lambda b=b: gossip(x, x.copy(), [x, x], [x, b]) for b in (short, wide, gaps)),
        lambda: gossip(x, x.copy(), [x, x], [x]),
        lambda: gossip(x, x.copy(), [], []),
        lambda: codes.decode(encoded[:-1], "uint8", x),
        lambda: codes.average([encoded, encoded[:-1]], "uint8", x),
    ):
        with pytest.raises(pyccl.UsageError):
            call()
