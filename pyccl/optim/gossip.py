"""Gossip: the rules of NoLoCo (arXiv:2506.10911) without communication: groups, the outer step, when it is stable.

No weights are shared. Replica i has slow weights phi_i and a momentum v_i; every outer step joins it to a group G of n:

    D_i   = w_i - phi_i                                         downhill, and so added (DiLoCo's sign is the other one)
    v_i   <- alpha v_i + beta mean_G(D) - gamma (phi_i - mean_G(phi))
    phi_i <- phi_i + v_i

The pulls of gamma cancel within a group: over all replicas the means of phi and v are those of heavy-ball DiLoCo.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from pyccl._native._pyccl import ffi, lib
from pyccl._native.status import check
from pyccl.arrays import DTYPES
from pyccl.errors import UsageError
from pyccl.optim.rules import check_vectors, pinned

Array = np.ndarray[Any, Any]


# ---- groups ----------------------------------------------------------------------------------------------------------


def draw_groups(seed: int, step: int, members: Iterable[str], group_size: int = 2) -> tuple[tuple[str, ...], ...]:
    """Deal the members into groups, at random by the seed and the number of the outer step: the same on all members.

    Args:
        seed, step: 0..2**64-1.
        members: peer ids, in any order.
    Returns:
        Groups of `group_size` members, each sorted; those left over form the last one, of one member where one is left.
    """
    drawn = sorted(set(members), key=lambda member: (_lot(seed, step, member), member))
    return tuple(tuple(sorted(drawn[at : at + group_size])) for at in range(0, len(drawn), group_size))


def _lot(seed: int, step: int, member: str) -> bytes:
    """Sorting by hashes shuffles, with the same result in every version of every library."""
    return hashlib.blake2b(struct.pack("<QQ", seed, step) + member.encode(), digest_size=16).digest()


def group_of(me: str, groups: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """The group of a member; one that was not dealt with is alone."""
    return next((group for group in groups if me in group), (me,))


# ---- the outer step --------------------------------------------------------------------------------------------------


def gossip_step(
    phi: Array, v: Array, moved: Sequence[Array], phis: Sequence[Array], *, alpha: float, beta: float, gamma: float
) -> None:
    """One outer step of one replica, in place on ``phi`` and ``v``; one pass over memory, a kernel of the core.

    Args:
        phi, v: (n,) contiguous, of one floating dtype.
        moved, phis: w - phi and phi of each member of the group, this one too (`phi` itself), in the order of their
            ids, so that all members add in the same order. One of each is a step alone: no pull.
    """
    if len(moved) != len(phis):
        raise UsageError(f"gossip_step: {len(moved)} moves and {len(phis)} phis, as many of each are needed")
    check_vectors("gossip_step", [phi, v], *moved, *phis)
    moves, slow = ([pinned(array) for array in arrays] for arrays in (moved, phis))
    inputs = ffi.new("void *[]", moves), ffi.new("void *[]", slow)
    dtype, members = DTYPES[phi.dtype.name], len(moves)
    check(
        lib.pyccl_gossip(dtype, pinned(phi), pinned(v), *inputs, members, phi.size, alpha, beta, gamma), "gossip_step"
    )


# ---- stability -------------------------------------------------------------------------------------------------------


def gamma_bound(alpha: float, group_size: int, members: float = math.inf) -> float:
    """Above which gamma the replicas drift apart, in mean square, in a linear model with random groups.

    0 < gamma < 2 (1 - alpha^2) / (1 + alpha - 2 alpha c),  c = (n-1)/n * N/(N-1).  For alpha 0.5 and n 2 it is 1.5 in
    large groups, as in the paper (eq. 74), but 0.38 for alpha 0.9, where the paper's own window diverges.
    """
    n = min(float(group_size), members)
    c = (n - 1) / n * (1.0 if math.isinf(members) else members / (members - 1))
    return 2 * (1 - alpha * alpha) / (1 + alpha - 2 * alpha * c)


def stability_warnings(alpha: float, beta: float, gamma: float, group_size: int, members: int) -> list[str]:
    """What is wrong with these values, with the numbers; empty where nothing is.

    members: of the group now; it may grow, and the bound of gamma falls with that.
    """
    if not -1 < alpha < 1:
        return [f"alpha={alpha:g}: the momentum grows for ever unless -1 < alpha < 1"]
    found = []
    if not 0 < beta < 2 * (1 + alpha):
        found.append(
            f"beta={beta:g}: the mean of the replicas is stable for 0 < beta < 2 (1 + alpha) = {2 * (1 + alpha):.3g}, "
            "where the inner steps reach a local optimum"
        )
    many = gamma_bound(alpha, group_size)
    now = gamma_bound(alpha, group_size, members) if members > 1 else many
    if not 0 < gamma < min(now, many):
        found.append(
            f"gamma={gamma:g}: replicas in groups of {group_size} stay together for 0 < gamma < "
            f"2 (1 - alpha^2) / (1 + alpha - 2 alpha c) = {many:.3g} among many members"
            + (f", {now:.3g} among the {members} here" if members > 1 else "")
        )
    return found
