"""Gossip without a network: groups that all draw alike, the outer step and its invariants, stability."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyccl.optim.gossip import draw_groups, gamma_bound, gossip_step, group_of, stability_warnings

IDS = st.lists(st.binary(min_size=16, max_size=16).map(bytes.hex), min_size=1, max_size=12, unique=True)
SEEDS = st.integers(0, 2**64 - 1)


# ---- groups


@given(SEEDS, st.integers(0, 10**6), IDS, st.integers(1, 5), st.randoms())
def test_every_member_is_in_exactly_one_group_and_all_draw_the_same(
    seed: int, step: int, members: list[str], size: int, order: object
) -> None:
    groups = draw_groups(seed, step, members, size)
    assert sorted(itertools.chain(*groups)) == sorted(members)
    assert [len(group) for group in groups[:-1]] == [size] * (len(groups) - 1)
    assert 1 <= len(groups[-1]) <= size
    assert all(group == tuple(sorted(group)) for group in groups)
    shuffled = list(members)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    assert draw_groups(seed, step, shuffled, size) == groups
    assert all(me in group_of(me, groups) for me in members)


def test_odd_one_out_is_alone() -> None:
    groups = draw_groups(1, 2, ["a", "b", "c"])
    assert sorted(map(len, groups)) == [1, 2]
    assert group_of("d", groups) == ("d",)


def test_pairs_are_uniform_over_steps_and_depend_on_the_seed() -> None:
    members = [f"{i:032x}" for i in range(6)]
    seen = [draw_groups(7, step, members) for step in range(3000)]
    counts = dict.fromkeys(itertools.combinations(members, 2), 0)
    for groups in seen:
        for pair in groups:
            counts[pair] += 1  # type: ignore[index]
    assert set(counts) == {pair for groups in seen for pair in groups}
    assert max(abs(count - 600) for count in counts.values()) < 110  # 600 +- 5 sigma; the draw is fixed by the seed
    assert sum(a == b for a, b in zip(seen, (draw_groups(8, step, members) for step in range(3000)), strict=True)) < 400


def test_draw_is_the_same_in_every_release() -> None:
    """Peers of different installations take part in one run."""
    assert draw_groups(0, 0, ["aa", "bb", "cc", "dd", "ee"]) == (("bb", "cc"), ("aa", "ee"), ("dd",))


# ---- the outer step

ALPHA, BETA, GAMMA = 0.5, 0.7, 0.7


def step_all(
    phi: np.ndarray, v: np.ndarray, w: np.ndarray, groups: list[list[int]], alpha: float, beta: float, gamma: float
) -> None:
    """One outer step of every replica, in place; rows are replicas."""
    before, moved = phi.copy(), w - phi
    for group in groups:
        for i in group:
            phis = [phi[i] if j == i else before[j] for j in group]
            gossip_step(phi[i], v[i], list(moved[group]), phis, alpha=alpha, beta=beta, gamma=gamma)


def test_check_values_of_the_rule() -> None:
    phi, v, w = np.array([[1.0], [3.0]]), np.zeros((2, 1)), np.array([[0.8], [2.6]])
    step_all(phi, v, w, [[0, 1]], ALPHA, BETA, GAMMA)
    np.testing.assert_allclose(v, [[0.49], [-0.91]], atol=1e-15)
    np.testing.assert_allclose(phi, [[1.49], [2.09]], atol=1e-15)


@given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.integers(2, 4))
def test_means_follow_heavy_ball_diloco_whatever_the_groups(seed: int, replicas: int, size: int) -> None:
    """Invariant 1."""
    rng = np.random.default_rng(seed)
    phi, v = rng.standard_normal((2, replicas, 5))
    mean_phi, mean_v = phi.mean(axis=0), v.mean(axis=0)
    for step in range(4):
        w = phi + rng.standard_normal(phi.shape)
        mean_v = ALPHA * mean_v + BETA * (w - phi).mean(axis=0)
        mean_phi = mean_phi + mean_v
        groups = draw_groups(seed, step, [str(i) for i in range(replicas)], size)
        step_all(phi, v, w, [[int(i) for i in group] for group in groups], ALPHA, BETA, GAMMA)
        np.testing.assert_allclose(phi.mean(axis=0), mean_phi, atol=1e-12)
        np.testing.assert_allclose(v.mean(axis=0), mean_v, atol=1e-12)


def test_one_group_of_all_with_equal_phi_is_heavy_ball_diloco() -> None:
    """Invariant 2."""
    rng = np.random.default_rng(5)
    phi, v = np.tile(rng.standard_normal(7), (4, 1)), np.zeros((4, 7))
    theta, b = phi[0].copy(), np.zeros(7)
    for _ in range(5):
        w = phi + rng.standard_normal(phi.shape)
        b = ALPHA * b + (theta - w).mean(axis=0)  # DiLoCo's sign, and its learning rate outside
        theta = theta - BETA * b
        step_all(phi, v, w, [[0, 1, 2, 3]], ALPHA, BETA, GAMMA)
        np.testing.assert_allclose(phi, np.tile(theta, (4, 1)), atol=1e-13)


def test_pair_without_momentum_meets_at_its_mean() -> None:
    """Invariant 3."""
    phi, v = np.array([[1.0, -2.0], [3.0, 8.0]]), np.zeros((2, 2))
    step_all(phi, v, phi.copy(), [[0, 1]], 0.0, BETA, 1.0)
    np.testing.assert_array_equal(phi, [[2.0, 3.0], [2.0, 3.0]])


@given(st.integers(0, 2**32 - 1))
def test_order_of_a_pair_changes_no_bit(seed: int) -> None:
    """Invariant 4: both sides may compute the sums."""
    rng = np.random.default_rng(seed)
    phi, v, w = rng.standard_normal((3, 2, 33_000)).astype(np.float32)
    swapped = [a[::-1].copy() for a in (phi, v, w)]
    step_all(phi, v, w, [[0, 1]], ALPHA, BETA, GAMMA)
    step_all(*swapped, [[0, 1]], ALPHA, BETA, GAMMA)  # type: ignore[arg-type]
    np.testing.assert_array_equal(phi, swapped[0][::-1])
    np.testing.assert_array_equal(v, swapped[1][::-1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [0, 1, 127, 128, 1000])
@pytest.mark.parametrize("members", [1, 2, 3, 8])
def test_step_has_the_bits_of_the_rule_on_whole_arrays(dtype: type[np.floating], size: int, members: int) -> None:
    """Sums in the order of the members; each operation rounded by itself; nothing else is written to."""
    rng = np.random.default_rng([size, members])
    moved, phis = ([rng.standard_normal(size).astype(dtype) for _ in range(members)] for _ in range(2))
    phi, v = phis[members // 2], rng.standard_normal(size).astype(dtype)
    total, total_phi = moved[0].copy(), phis[0].copy()
    for share, other in zip(moved[1:], phis[1:], strict=True):
        total, total_phi = total + share, total_phi + other
    wanted_v = dtype(ALPHA) * v + dtype(BETA / members) * total
    if members > 1:
        wanted_v = wanted_v - dtype(0.6) * (phi - total_phi / dtype(members))
    wanted = phi + wanted_v
    others = [share.tobytes() for share in (*moved, *phis) if share is not phi]
    gossip_step(phi, v, moved, phis, alpha=ALPHA, beta=BETA, gamma=0.6)
    assert (phi.tobytes(), v.tobytes()) == (wanted.tobytes(), wanted_v.tobytes())
    assert [share.tobytes() for share in (*moved, *phis) if share is not phi] == others


def test_alone_there_is_no_pull() -> None:
    phi, v = np.float32([0.1, 3.0]), np.float32([0.5, -1.0])
    expected_v = np.float32(ALPHA) * v + np.float32(BETA) * np.float32([0.25, 0.5])
    expected_phi = phi + expected_v
    gossip_step(phi, v, [np.float32([0.25, 0.5])], [phi], alpha=ALPHA, beta=BETA, gamma=GAMMA)
    np.testing.assert_array_equal(v, expected_v)
    np.testing.assert_array_equal(phi, expected_phi)


# ---- stability


@pytest.mark.parametrize(("alpha", "bound"), [(0.5, 1.5), (0.7, 1.02), (0.9, 0.38), (0.0, 2.0)])
def test_bound_of_gamma_in_large_groups(alpha: float, bound: float) -> None:
    assert gamma_bound(alpha, 2) == pytest.approx(bound)
    assert gamma_bound(alpha, 2, 10**9) == pytest.approx(bound, rel=1e-6)


def spread_growth(alpha: float, gamma: float, members: int) -> float:
    """The mean square of the spread over a round, of the largest mode: from the moments of a random pairing."""
    c = members / (2 * (members - 1))  # E[(P x)^2] = E[x P x] = c x^2 for the projection P onto differences in pairs
    # State (x, v), v' = a v - g P x, x' = x + v'. Second moments (xx, xv, vv), P x and v - P v counted on the average.
    xx_vv = np.array(
        [
            [1 - 2 * gamma * c + gamma**2 * c, 2 * alpha * (1 - gamma * c), alpha**2],
            [-gamma * c + gamma**2 * c, alpha * (1 - 2 * gamma * c), alpha**2],
            [gamma**2 * c, -2 * alpha * gamma * c, alpha**2],
        ]
    )
    return float(max(abs(np.linalg.eigvals(xx_vv))))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("members", [4, 8, 16, 1000])
def test_bound_is_where_the_second_moment_begins_to_grow(alpha: float, members: int) -> None:
    bound = gamma_bound(alpha, 2, members)
    assert spread_growth(alpha, 0.99 * bound, members) < 1 < spread_growth(alpha, 1.01 * bound, members)


def test_papers_window_diverges_for_a_strong_momentum() -> None:
    assert spread_growth(0.9, 1.2, 16) > 1.2
    (told,) = stability_warnings(0.9, 0.95, 1.2, 2, 16)
    assert "gamma=1.2" in told and "0.38 among many" in told and "among the 16 here" in told


def test_contraction_of_the_default_values() -> None:
    """Of the variance over replicas that make no local progress."""
    for members, factor in ((4, 0.63), (8, 0.67), (10**6, 0.70)):
        assert spread_growth(0.5, 0.7, members) == pytest.approx(factor, abs=0.006)


@pytest.mark.parametrize("members", [1, 2, 3, 100])
def test_default_values_are_stable(members: int) -> None:
    assert stability_warnings(ALPHA, BETA, GAMMA, 2, members) == []


@pytest.mark.parametrize(
    ("alpha", "beta", "gamma", "told"),
    [
        (1.0, 0.7, 0.7, "alpha=1"),
        (math.nan, 0.7, 0.7, "alpha=nan"),
        (0.5, 0.0, 0.7, "beta=0"),
        (0.5, 3.0, 0.7, "beta < 2 (1 + alpha) = 3"),
        (0.5, 0.7, 0.0, "gamma=0"),
        (0.5, 0.7, 1.5, "= 1.5 among many members, 3 among the 2 here"),
        (0.5, math.nan, 0.7, "beta=nan"),
    ],
)
def test_unstable_values_are_told_with_the_numbers(alpha: float, beta: float, gamma: float, told: str) -> None:
    (found,) = stability_warnings(alpha, beta, gamma, 2, 2)
    assert told in found
