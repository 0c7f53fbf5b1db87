"""Bijectors: inverse of each other, inside their range, spread over prefixes, composed by reparameterize."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hypergrad as hg

RANGES = {
    "identity": (hg.bijectors.identity(), -np.inf, np.inf),
    "exp": (hg.bijectors.exp(), 0.0, np.inf),
    "softplus": (hg.bijectors.softplus(), 0.0, np.inf),
    "sigmoid": (hg.bijectors.sigmoid(), 0.0, 1.0),
    "interval": (hg.bijectors.interval(-3.0, 2.0), -3.0, 2.0),
}
rows = pytest.mark.parametrize("name", RANGES)


@rows
@given(x=st.floats(-12.0, 12.0))
def test_forward_and_inverse_undo_each_other(name, x):
    bijector, low, high = RANGES[name]
    with jax.enable_x64(True):
        y = bijector.forward(jnp.asarray(x))
        assert low < float(y) < high
        assert float(bijector.inverse(y)) == pytest.approx(x, rel=1e-8, abs=1e-8)


@rows
def test_increasing_and_dtype_kept(name, hard_mode):
    bijector, _, _ = RANGES[name]
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jnp.linspace(-3.0, 3.0, 7, dtype=dtype)
        assert bijector.forward(x).dtype == dtype
        assert bool((jnp.diff(bijector.forward(x)) > 0).all())


@rows
def test_softplus_and_friends_do_not_overflow_backwards(name):
    bijector, _, _ = RANGES[name]
    slopes = jax.vmap(jax.grad(bijector.forward))(jnp.array([-80.0, 0.0, 80.0]))
    assert bool(jnp.isfinite(slopes).all())


def test_a_prefix_of_bijectors_spreads_over_subtrees():
    tree = {"decay": {"a": jnp.zeros(2), "b": jnp.zeros(())}, "rate": jnp.zeros(3)}
    bijectors = {"decay": hg.bijectors.exp(), "rate": hg.bijectors.sigmoid()}
    got = hg.constrain(bijectors, tree)
    chex.assert_trees_all_close(got, {"decay": {"a": jnp.ones(2), "b": jnp.array(1.0)}, "rate": jnp.full(3, 0.5)})
    chex.assert_trees_all_close(hg.unconstrain(bijectors, got), tree, atol=1e-6)


def test_unconstrain_takes_plain_floats_and_gives_strong_types():
    tree = hg.unconstrain(hg.bijectors.exp(), {"decay": 1e-3})
    assert float(tree["decay"]) == pytest.approx(np.log(1e-3))
    assert not tree["decay"].weak_type


def test_unconstrain_inside_jit():
    assert float(jax.jit(lambda x: hg.unconstrain(hg.bijectors.exp(), x))(jnp.array(1.0))) == 0.0


def test_reparameterize_composes_and_constrain_follows():
    """exp after an interval of the log: a decay between 1e-4 and 1e2, learned on a log scale."""
    loss = lambda w, decay, batch, key: jnp.sum(decay * w)  # noqa: E731
    low, high = np.log(1e-4), np.log(1e2)
    problem = hg.reparameterize(hg.BilevelProblem(loss, loss), hg.bijectors.exp())
    problem = hg.reparameterize(problem, hg.bijectors.interval(low, high))
    assert float(problem.constrain(jnp.array(0.0))) == pytest.approx(1e-1, rel=1e-5)
    assert float(problem.inner_loss(jnp.array(2.0), jnp.array(0.0), None, None)) == pytest.approx(0.2, rel=1e-5)
    ends = problem.constrain(jnp.array([-50.0, 50.0]))
    np.testing.assert_allclose(ends, [1e-4, 1e2], rtol=1e-4)


def test_reparameterize_is_the_chain_rule():
    """The hypergradient in λ = log decay is the one in the decay times the decay."""
    inner = lambda w, c, batch, key: jnp.sum(0.5 * c * w**2 - w)  # noqa: E731
    outer = lambda w, c, batch, key: jnp.sum(w**2)  # noqa: E731
    plain = hg.BilevelProblem(inner, outer)
    decay = jnp.array([0.5, 2.0])
    args = ((), ())
    gradient = hg.hypergrad(hg.implicit(plain, hg.solvers.dense()))(1 / decay, decay, *args, key=None)
    logged = hg.implicit(hg.reparameterize(plain, hg.bijectors.exp()), hg.solvers.dense())
    log_gradient = hg.hypergrad(logged)(1 / decay, jnp.log(decay), *args, key=None)
    np.testing.assert_allclose(log_gradient, gradient * decay, rtol=1e-5)
    np.testing.assert_allclose(gradient, -2 / decay**3, rtol=1e-5)
