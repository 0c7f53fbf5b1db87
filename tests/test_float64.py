"""The losses in float64 are the user's own: same random numbers, loops and derivative rules, without rounding."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import hypergrad as hg
from hypergrad import curvature
from hypergrad.diagnostics import _float64

W = 0.3 * jnp.arange(1.0, 5.0)


def scanned(w, h, batch, key):
    """Sums with a loop, what it stacks, and a reversed loop."""
    final, rows = lax.scan(lambda c, x: (c * jnp.tanh(x) + h, c + x), jnp.ones(()), w)
    _, back = lax.scan(lambda c, x: (c + x**2, c), 0.0, rows, reverse=True)
    return final + rows.sum() + (back * w).sum()


def counted(w, h, batch, key):
    """A loop of a fixed number of rounds, and a condition on an integer."""
    doubled = lax.fori_loop(0, 3, lambda i, x: x * (1 + h) / (i + 1.0), w)
    return lax.cond(batch > 1, lambda x: jnp.sin(x).sum(), lambda x: x.prod(), doubled)


def stable(w, h, batch, key):
    """Functions with ``custom_jvp`` rules, one inside another, recomputed in the backward pass."""
    return jax.checkpoint(lambda x: jax.nn.softplus(jax.nn.relu(x) - h).sum() + jax.nn.softmax(x)[0])(w)


@jax.custom_vjp
def cubed(x, factor):
    return factor * x**3


cubed.defvjp(
    lambda x, factor: (cubed(x, factor), (x, factor)), lambda kept, ct: (3 * kept[1] * kept[0] ** 2 * ct, None)
)


def ruled(w, h, batch, key):
    """A ``custom_vjp`` rule, which leaves out one derivative."""
    return cubed(w * h, 2.0).sum()


def masked(w, h, batch, key):
    """Random numbers: a mask, normal and uniform noise, and a permutation."""
    keys = jax.random.split(key, 4)
    kept = w * jax.random.bernoulli(keys[0], 0.5, w.shape) + 0.1 * jax.random.normal(keys[1], w.shape)
    return (jax.random.permutation(keys[2], kept) * jax.random.uniform(keys[3], w.shape)).sum() * h


def narrow(w, h, batch, key):
    """Products and sums in bfloat16, and a table that the loss closes over."""
    table = jnp.asarray(np.linspace(-1.0, 1.0, 16).reshape(4, 4), jnp.bfloat16)
    return jnp.tanh(table @ w.astype(jnp.bfloat16)).astype(jnp.float32).sum() * h + jnp.asarray(h, jnp.float16) ** 2


def scattered(w, h, batch, key):
    """Scatters, a checkpointed function in a jitted one with a print, a reduction with a function of its own."""

    @jax.jit
    def printed(x):
        jax.debug.print("{}", x[0])
        return jnp.tanh(x.astype(jnp.bfloat16)).astype(jnp.float32) * 0 + jnp.tanh(x)

    rows = jnp.zeros(3).at[jnp.array([0, 2, 0, 1])].add(w**2 * h)
    spread = jnp.ones(4).at[jnp.array([1, 3])].set(printed(w)[:2])
    total = lax.reduce(jax.checkpoint(jnp.sin)(spread), -jnp.inf, jnp.logaddexp, (0,))
    return jax.ops.segment_max(rows, jnp.array([0, 0, 1]), 2).sum() + total


def sorted_and_solved(w, h, batch, key):
    """Operations with functions inside that are computed in their own dtype, and complex numbers."""
    matrix = jnp.eye(4) + 0.1 * jnp.outer(w, w)
    found = jnp.linalg.solve(matrix, jnp.sort(w)) + jnp.abs(jnp.fft.fft(w + h))
    return found.sum() + jnp.linalg.slogdet(matrix)[1]


def called_back(w, h, batch, key):
    """A callback and a print, which see arrays of the user's dtypes."""
    like = jax.ShapeDtypeStruct((), jnp.float32)
    scale = jax.pure_callback(lambda x: np.asarray(2 * x, np.float32), like, jax.lax.stop_gradient(h))
    jax.debug.print("{}", h, ordered=False)
    return scale * (w**2).sum() + batch * 0.5


SLOW = [called_back, scattered, counted, stable, sorted_and_solved, masked, scanned]


@pytest.mark.parametrize("loss", [narrow, ruled, *(pytest.param(loss, marks=pytest.mark.slow) for loss in SLOW)])
def test_values_gradients_and_products_are_those_of_the_loss(loss):
    key, batch, h = jax.random.key(1), jnp.array(2), jnp.array(0.7)
    inexact = 0.02 if loss is narrow else 2e-6
    problem = hg.BilevelProblem(loss, loss)

    def results(problem, w, h):
        of = lambda w: problem.inner_loss(w, h, batch, key)  # noqa: E731
        return (
            of(w),
            jax.grad(of)(w),
            jax.grad(lambda h: problem.inner_loss(w, h, batch, key))(h),
            curvature.hvp(of, w)(w),
        )

    own = results(problem, W, h)
    with jax.enable_x64(True):
        wide = _float64.problem_in_float64(problem, W, h, (), x64=False)
        found = jax.jit(lambda w, h: results(wide, w, h))(*_float64.to_float64((W, h)))
        for expected, value in zip(own, found, strict=True):
            assert value.dtype == jnp.float64
            np.testing.assert_allclose(value, expected, rtol=inexact, atol=inexact)
        step = 1e-6
        ends = [wide.inner_loss(jnp.float64(W) + t * jnp.ones(4), jnp.float64(h), batch, key) for t in (step, -step)]
        measured, slope = float(ends[0] - ends[1]) / (2 * step), float(found[1].sum())
    if loss in (sorted_and_solved, scattered):  # the linear solve and the reduction inside are computed in float32
        assert measured == pytest.approx(slope, rel=0.1)
    else:
        assert measured == pytest.approx(slope, rel=1e-7)


def test_a_straight_through_estimator_keeps_its_rule():
    @jax.custom_vjp
    def rounded(x):
        return jnp.round(x)

    rounded.defvjp(lambda x: (jnp.round(x), ()), lambda _, ct: (ct,))
    problem = hg.BilevelProblem(lambda w, h, b, k: (rounded(w) * h).sum(), lambda w, h, b, k: w.sum())
    with jax.enable_x64(True):
        wide = _float64.problem_in_float64(problem, W, jnp.array(2.0), (), x64=False)
        slope = jax.grad(wide.inner_loss)(jnp.float64(W), jnp.float64(2.0), (), None)
    assert slope.tolist() == [2.0] * 4


@pytest.mark.slow
def test_batch_statistics_and_a_bfloat16_network_are_followed():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dense(8, dtype=jnp.bfloat16)(x)
            x = nn.BatchNorm(use_running_average=not train, dtype=jnp.bfloat16)(x)
            return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(nn.gelu(x))).astype(jnp.float32)

    net, x, key = Net(), jax.random.normal(jax.random.key(0), (12, 5)), jax.random.key(2)
    state = net.init(key, x, train=False)
    params = state.pop("params")

    def inner(w, h, batch, key, state):
        out, new = net.apply({"params": w, **state}, batch, train=True, rngs={"dropout": key}, mutable=["batch_stats"])
        return (out**2).mean() + h * optax.tree.norm(w, squared=True), new

    problem = hg.BilevelProblem(inner, inner, stateful=True)
    own, own_state = inner(params, 0.1, x, key, state)
    with jax.enable_x64(True):
        wide = _float64.problem_in_float64(problem, params, 0.1, state, x64=False)
        at = _float64.to_float64((params, 0.1)), _float64.to_float64(state)
        value, new = wide.inner_loss(*at[0], x, key, at[1])
        assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves((value, new)))
    assert float(value) == pytest.approx(float(own), rel=0.02)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(own_state), strict=True):
        np.testing.assert_allclose(a, b, rtol=0.05, atol=0.02)
