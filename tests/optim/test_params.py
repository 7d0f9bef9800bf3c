"""What an optimizer takes as parameters, in NumPy: names, strides, ties, half precision."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from changed import refused_after

import pyccl
from pyccl.optim.params import Params

F32 = np.float32


def test_arrays_of_any_strides_are_read_and_written_in_place() -> None:
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    given = {"t": whole[:, :3].T, "s": whole[::2, 4], "back": whole[::-1, 5], "scalar": np.array(7.0, np.float32)}
    params = Params(given)
    vectors = params.vectors()
    params.read(vectors)
    for name, array in given.items():
        assert np.array_equal(vectors.views[name], array)
    assert vectors.vectors[0].flags.c_contiguous and vectors.vectors[0].size == 12 + 2 + 4 + 1
    (vector,) = vectors.vectors
    vector *= -1
    params.write(vectors)
    assert np.array_equal(whole[:, :3], -np.arange(24).reshape(4, 6)[:, :3]) and given["scalar"] == -7
    assert whole[1, 4] == 10.0  # between strides


def test_names_are_in_one_order_whatever_the_order_given() -> None:
    x, y = np.zeros(2, np.float32), np.zeros(3, np.float32)
    assert Params({"b": x, "a": y}).names == Params([("a", y), ("b", x)]).names == ("a", "b")


def test_tied_arrays_are_exchanged_once_and_arrays_that_overlap_in_part_are_refused() -> None:
    x = np.zeros((3, 4), np.float32)
    params = Params({"head": x, "embedding": x, "tied.view": x[:]})
    assert params.names == ("embedding",) and params.aliases == {"head": "embedding", "tied.view": "embedding"}
    with pytest.raises(pyccl.UsageError, match=r"b and a share memory in part"):
        Params({"a": x[:2], "b": x[1:]})
    with pytest.raises(pyccl.UsageError, match="share memory"):
        Params({"a": x, "b": x.T})
    assert len(Params({"even": x[:, ::2], "odd": x[:, 1::2]}).names) == 2


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({}, "there are none"),
        ({"": np.zeros(2, np.float32)}, "no name"),
        ([("a", np.zeros(2, np.float32))] * 2, "two parameters are called a"),
        ([np.zeros(3, np.float32)], r"pairs are needed"),
        (7, r"pairs are needed"),
        ({"a": np.zeros(2, np.int32)}, "dtype int32"),
        ({"a": np.zeros(2, ">f4")}, "foreign byte order"),
        ({"a": np.broadcast_to(np.float32(1), 3)}, "read-only"),
        ({"a": np.lib.stride_tricks.as_strided(np.zeros(2, np.float32), (3,), (0,))}, "share memory"),
        ({"a": [1.0, 2.0]}, "not list"),
    ],
)
def test_what_is_no_parameter_is_refused(given: Any, match: str) -> None:
    with pytest.raises(pyccl.UsageError, match=match):
        Params(given)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_has_a_float32_theta_and_who_did_not_move_contributes_nothing(dtype: Any) -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal(500).astype(dtype)
    x[0] = 0
    params = Params({"x": x})
    theta, g = params.vectors(), params.vectors()
    params.read(theta)
    assert theta.vectors[0].dtype == np.float32 and np.array_equal(theta.vectors[0], x.astype(np.float32))
    theta.vectors[0][:] += rng.standard_normal(500).astype(np.float32) * 1e-4  # below what x can hold
    params.write(theta)
    assert np.array_equal(x, theta.vectors[0].astype(dtype))  # rounded to nearest even, as NumPy does
    params.pseudo_gradient(theta, g)
    assert not g.vectors[0].any()
    moved = x.astype(np.float32) - np.float32(0.5)
    x[:] = moved.astype(dtype)
    base = theta.vectors[0].astype(dtype).astype(np.float32)
    params.pseudo_gradient(theta, g)
    assert np.array_equal(g.vectors[0], base - x.astype(np.float32))


def test_bfloat16_is_rounded_as_ml_dtypes_rounds_and_keeps_infinities_and_nan() -> None:
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1e30, 3.4e38, np.inf, -np.inf, np.nan, 2.0**-140], np.float32)
    x = np.zeros(8, ml_dtypes.bfloat16)
    params = Params({"x": x})
    theta = params.vectors()
    theta.vectors[0][:] = values
    params.write(theta)
    expected = values.astype(ml_dtypes.bfloat16)
    assert x[~np.isnan(values)].tobytes() == expected[~np.isnan(values)].tobytes()
    assert np.isnan(x[6].astype(np.float32))


def test_float64_parameters_keep_their_precision_beside_float32_ones() -> None:
    params = Params({"d": np.array([1 + 2.0**-40]), "f": np.ones(3, np.float32)})
    theta = params.vectors()
    params.read(theta)
    assert [v.dtype for v in theta.vectors] == [np.float32, np.float64]
    assert theta.views["d"][0] == 1 + 2.0**-40


def shrink(a: Any) -> None:
    a.resize(4, refcheck=False)


def grow(a: Any) -> None:
    a.resize(4000, refcheck=False)


def fold(a: Any) -> None:
    a.shape = (20, 100)


def lock(a: Any) -> None:
    a.setflags(write=False)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (shrink, r"a: was float32\[2000\], is float32\[4\]"),
        (grow, r"a: was float32\[2000\], is float32\[4000\]"),
        (fold, r"a: was float32\[2000\], is float32\[20, 100\]"),
        (lock, "a: the array is read-only"),
    ],
)
def test_an_array_that_is_not_what_it_was_is_neither_read_nor_written(change: Any, match: str) -> None:
    a, b = np.ones(2000, F32), np.ones(3, F32)
    params = Params({"a": a, "b": b})
    refused_after(lambda: change(a), params, match)
    assert b.tolist() == [1.0] * 3


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_an_array_of_every_dtype_that_shrank_is_told(dtype: Any) -> None:
    a = np.ones(2000, dtype)
    params = Params({"a": a})
    out = params.vectors()
    a.resize(4, refcheck=False)
    with pytest.raises(pyccl.UsageError, match=r"a: was \w+\[2000\], is \w+\[4\]"):
        params.pseudo_gradient(params.vectors(), out)
    a.resize(2000, refcheck=False)
    a[:] = 2
    params.read(out)
    assert bool((out.vectors[0] == 2).all())  # where it is now


def test_another_array_in_a_dict_that_was_given_is_told() -> None:
    a, given = np.ones(3, F32), {"a": np.ones(2, F32)}
    given |= {"b": a, "tied": a}
    params = Params(given)
    params.check()
    for name in given:
        kept, given[name] = given[name], given[name] + F32(1)
        with pytest.raises(pyccl.UsageError, match=f"{name}: the dict has another array"):
            params.check()
        given[name] = kept
    del given["tied"]  # of no use to anybody: what is exchanged is trained
    params.check()
