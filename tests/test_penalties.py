"""Penalties over tree prefixes, against the sums written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg

PARAMS = {
    "first": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.array([1.0, -2.0, 0.5])},
    "second": jnp.array(-3.0),
}


def flat(tree):
    """Return all entries in one vector."""
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


PREFIXES = {
    "one number": (0.7, lambda: np.full(10, 0.7)),
    "one per layer": ({"first": 0.5, "second": jnp.array(2.0)}, lambda: np.r_[np.full(9, 0.5), 2.0]),
    "one a leaf": (
        {"first": {"kernel": 1.0, "bias": 2.0}, "second": 3.0},
        lambda: np.r_[np.full(3, 2.0), np.full(6, 1.0), 3.0],
    ),
    "one per weight": (jax.tree.map(lambda w: jnp.abs(w) + 0.1, PARAMS), lambda: np.abs(flat(PARAMS)) + 0.1),
    "one a row": (
        {"first": {"kernel": jnp.array([[1.0], [2.0]]), "bias": 0.0}, "second": 0.0},
        lambda: np.r_[np.zeros(3), np.full(3, 1.0), np.full(3, 2.0), 0.0],
    ),
}


@pytest.mark.parametrize("name", PREFIXES)
def test_against_the_sum_written_out(name, hard_mode):
    coefficients, expanded = PREFIXES[name]
    w, c = flat(PARAMS), expanded()
    assert float(hg.penalties.l2(PARAMS, coefficients)) == pytest.approx(0.5 * np.sum(c * w**2), rel=1e-6)
    s = 0.01
    want = np.sum(c * (np.sqrt(w**2 + s**2) - s))
    assert float(hg.penalties.l1(PARAMS, coefficients, smoothing=s)) == pytest.approx(want, rel=1e-5)


def test_gradients_and_curvature():
    c = PREFIXES["one per weight"][0]
    gradient = jax.grad(hg.penalties.l2)(PARAMS, c)
    np.testing.assert_allclose(flat(gradient), flat(c) * flat(PARAMS), rtol=1e-6)
    by_coefficient = jax.grad(hg.penalties.l2, argnums=1)(PARAMS, c)
    np.testing.assert_allclose(flat(by_coefficient), 0.5 * flat(PARAMS) ** 2, rtol=1e-6)
    at_zero = jax.grad(jax.grad(lambda w: hg.penalties.l1(w, 2.0, smoothing=0.1)))(0.0)
    assert float(at_zero) == pytest.approx(2.0 / 0.1, rel=1e-5)


def test_low_precision_weights_are_summed_in_float32(hard_mode):
    w = jnp.full(4096, 0.1, jnp.bfloat16)
    value = hg.penalties.l2(w, jnp.full(4096, 2.0, jnp.float32))
    assert value.dtype == jnp.float32
    assert float(value) == pytest.approx(4096 * float(w[0]) ** 2, rel=1e-5)


def test_a_python_number_keeps_the_weights_dtype(x64):
    assert hg.penalties.l2(jnp.ones(2, jnp.float32), 0.5).dtype == jnp.float32
    assert hg.penalties.l2(jnp.ones(2, jnp.float64), 0.5).dtype == jnp.float64
