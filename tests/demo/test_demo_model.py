"""The demo's model against finite differences, and that it learns."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pyccl.demo import model

SMALL = model.Shape(context=3, width=4, hidden=5, vocabulary=7)


def batch(seed: int, size: int = 11) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, SMALL.vocabulary, (size, SMALL.context + 1)).astype(np.uint8)
    return codes[:, :-1], codes[:, -1]


def zeros_like(parameters: model.Parameters) -> model.Parameters:
    return model.Parameters.over(parameters.shape, np.zeros_like(parameters.flat))


def test_gradient_agrees_with_finite_differences_in_every_parameter() -> None:
    parameters = model.init(SMALL, seed=3, dtype=np.float64)
    flat = parameters.flat
    flat += np.random.default_rng(4).standard_normal(flat.size) * 0.1  # biases too
    inputs, targets = batch(5)
    grad, unused = zeros_like(parameters), zeros_like(parameters)
    model.loss_and_grad(parameters, inputs, targets, grad)
    step = 1e-6
    numeric = np.empty_like(flat)
    for index in range(flat.size):
        kept = flat[index]
        flat[index] = kept + step
        above = model.loss_and_grad(parameters, inputs, targets, unused)
        flat[index] = kept - step
        below = model.loss_and_grad(parameters, inputs, targets, unused)
        flat[index] = kept
        numeric[index] = (above - below) / (2 * step)
    np.testing.assert_allclose(grad.flat, numeric, rtol=1e-5, atol=1e-8)


def test_views_cover_the_flat_vector_without_copies() -> None:
    parameters = model.init(SMALL, seed=1)
    for number, view in enumerate(parameters.views.values()):
        assert view.flags.c_contiguous
        view[...] = number
    counts = [math.prod(dims) for dims in SMALL.arrays().values()]
    assert np.array_equal(parameters.flat, np.repeat(np.arange(len(counts)), counts))


def test_flat_vector_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="the model needs"):
        model.Parameters.over(SMALL, np.zeros(SMALL.count() + 1, dtype=np.float32))


def test_same_seed_gives_the_same_bits_and_another_seed_does_not() -> None:
    first, second, other = (model.init(SMALL, seed=seed).flat for seed in (1, 1, 2))
    assert first.tobytes() == second.tobytes()
    assert first.tobytes() != other.tobytes()


def test_evaluate_in_chunks_gives_the_training_loss_in_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "EVALUATE_CHUNK", 4)
    parameters = model.init(SMALL, seed=1, dtype=np.float64)
    inputs, targets = batch(2)
    nats = model.loss_and_grad(parameters, inputs, targets, zeros_like(parameters))
    assert model.evaluate(parameters, inputs, targets) == pytest.approx(nats / math.log(2))


def test_windows_pair_each_context_with_the_character_after_it() -> None:
    codes = np.arange(10, dtype=np.uint8)
    inputs, targets = model.windows(codes, np.array([0, 6]), context=3)
    assert inputs.tolist() == [[0, 1, 2], [6, 7, 8]]
    assert targets.tolist() == [3, 9]


def test_adam_learns_a_repeating_text() -> None:
    codes = np.tile(np.arange(SMALL.vocabulary, dtype=np.uint8), 30)
    inputs, targets = model.windows(codes, np.arange(100), SMALL.context)
    parameters = model.init(SMALL, seed=1)
    grad, adam = zeros_like(parameters), model.Adam(SMALL.count(), rate=1e-2)
    for _ in range(300):
        model.loss_and_grad(parameters, inputs, targets, grad)
        adam.step(parameters.flat, grad.flat)
    assert model.evaluate(parameters, inputs, targets) < 0.1
