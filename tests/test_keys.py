"""A ledger of random keys: losses that are ``uniform(key)``, against keys split by hand, in every driver.

Call n (from 0) of a run has the key ``fold_in(root, n)``, split into (inner, outer, solve, advance, estimate). Inner
step i uses ``fold_in(inner, i)``.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg

ROOT = jax.random.key(7)
RATE = 0.25
OUTER = jnp.array(2.0)  # the outer batch


def draw(key):
    """Return the number that a key stands for."""
    return jax.random.uniform(key)


def inner(w, h, batch, key):
    """Curvature 1 + u(key) + batch, and a slope in λ of −1."""
    return 0.5 * (1.0 + draw(key) + batch) * w**2 - h * w


def outer(w, h, batch, key):
    """A slope in w of u(key)·batch."""
    return draw(key) * batch * w


PROBLEM = hg.BilevelProblem(inner, outer)
START = hg.BilevelParams(jnp.array(0.7), jnp.array(0.3))


def keys_of(call, root=ROOT):
    """Return the five keys of a call, split by hand."""
    return jax.random.split(jax.random.fold_in(root, call), 5)


def by_hand(keys, w, h, batches):
    """Return the weights after a window's steps, the outer loss and the implicit hypergradient there."""
    for i, batch in enumerate(batches):
        w = w - RATE * ((1.0 + draw(jax.random.fold_in(keys[0], i)) + batch) * w - h)
    slope = draw(keys[1]) * OUTER
    return w, slope * w, slope / (1.0 + draw(keys[2]) + batches[-1])


@pytest.mark.parametrize("window", [1, 3])
def test_bilevel(window):
    batches = jnp.arange(1.0, window + 1.0) / 4
    tx = hg.bilevel(
        hg.implicit(PROBLEM, hg.solvers.dense()),
        inner_optimizer=optax.sgd(RATE),
        outer_optimizer=optax.sgd(1.0),
        window=window,
        key=ROOT,
    )
    variables, state, update = START, tx.init(START), jax.jit(tx.update)
    for call in range(3):
        before = variables
        w, value, grad = by_hand(keys_of(call), *before, batches)
        given = batches if window > 1 else batches[0]
        updates, state = update(None, state, variables, inner_batch=given, outer_batch=OUTER)
        variables = optax.apply_updates(variables, updates)
        np.testing.assert_allclose(variables.params, w, rtol=1e-6)
        np.testing.assert_allclose(state.info.outer_loss, value, rtol=1e-6)
        np.testing.assert_allclose(-updates.hyperparams, grad, rtol=1e-6)
        if window == 1:
            key = jax.random.fold_in(keys_of(call)[0], 0)
            np.testing.assert_allclose(state.info.inner_loss, inner(*before, batches[0], key), rtol=1e-6)


def test_the_functional_form_with_and_without_steps():
    fn = hg.value_and_hypergrad(hg.implicit(PROBLEM, hg.solvers.dense()))
    keys, batch = jax.random.split(ROOT, 5), jnp.array(0.5)
    (value, grad), _ = fn(*START, batch, OUTER, key=ROOT)
    slope = draw(keys[1]) * OUTER
    np.testing.assert_allclose(value, slope * START.params, rtol=1e-6)
    np.testing.assert_allclose(grad, slope / (1.0 + draw(keys[2]) + batch), rtol=1e-6)
    batches = jnp.array([0.25, 0.75])
    (value, grad), _ = hg.value_and_hypergrad(hg.implicit(PROBLEM, hg.solvers.dense()), optax.sgd(RATE))(
        *START, batches, OUTER, key=ROOT
    )
    _, want, want_grad = by_hand(keys, *START, batches)
    np.testing.assert_allclose((value, grad), (want, want_grad), rtol=1e-6)


@pytest.mark.parametrize("mode", [hg.reverse(), hg.reverse(2, mixed=False), hg.reverse(truncate=2), hg.forward()])
def test_unrolled(mode):
    keys, batches = jax.random.split(ROOT, 5), jnp.array([0.25, 0.5, 0.75])
    depth = mode.truncate or len(batches)

    def reached(h):
        w = START.params
        for i, batch in enumerate(batches):
            w, own = (jax.lax.stop_gradient(w), jax.lax.stop_gradient(h)) if i < len(batches) - depth else (w, h)
            w = w - RATE * ((1.0 + draw(jax.random.fold_in(keys[0], i)) + batch) * w - own)
        return draw(keys[1]) * OUTER * w

    want = jax.value_and_grad(reached)(START.hyperparams)
    got, _ = hg.value_and_hypergrad(hg.unrolled(PROBLEM, mode), optax.sgd(RATE))(*START, batches, OUTER, key=ROOT)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_direct():
    problem = hg.BilevelProblem(inner, lambda w, h, batch, key: draw(key) * batch * w * h)
    (value, grad), _ = hg.value_and_hypergrad(hg.direct(problem))(*START, jnp.array(0.5), OUTER, key=ROOT)
    u = draw(jax.random.split(ROOT, 5)[1])
    np.testing.assert_allclose(
        (value, grad), (u * OUTER * START.params * START.hyperparams, u * OUTER * START.params), rtol=1e-6
    )


def test_best_response_and_its_derivative():
    keys, batches = jax.random.split(ROOT, 5), jnp.array([0.25, 0.5])
    fn = hg.best_response(hg.implicit(PROBLEM, hg.solvers.dense()), optax.sgd(RATE))
    got, slope = jax.value_and_grad(lambda h: fn(START.params, h, batches, key=ROOT))(START.hyperparams)
    w, _, _ = by_hand(keys, *START, batches)
    np.testing.assert_allclose((got, slope), (w, 1 / (1.0 + draw(keys[2]) + batches[-1])), rtol=1e-6)


def test_a_solver_gets_the_key_of_the_estimate_and_init_a_key_of_its_own():
    def solve(system, b, state, *, tolerance=None):
        one = jnp.ones(())
        info = hg.SolveInfo(jnp.ones((), jnp.int32), one, one, one, jnp.ones((), jnp.int32))
        return jax.tree.map(lambda x: x * 0 + draw(system.key), b), state, info

    solver = hg.LinearSolver(lambda b: (), solve)
    (_, grad), _ = hg.value_and_hypergrad(hg.implicit(PROBLEM, solver))(*START, jnp.array(0.5), OUTER, key=ROOT)
    np.testing.assert_allclose(grad, draw(jax.random.split(ROOT, 5)[4]), rtol=1e-6)

    base = hg.implicit(PROBLEM, hg.solvers.dense())
    noisy = base._replace(
        init=lambda ctx: (draw(ctx.keys.advance), base.init(ctx)[1]),
        estimate=lambda state, ctx: base.estimate((), ctx)._replace(state=state),
    )
    tx = hg.bilevel(noisy, inner_optimizer=optax.sgd(RATE), outer_optimizer=optax.sgd(1.0), key=ROOT)
    want = draw(keys_of(2**32 - 1)[3])
    assert float(tx.init(START).estimator) == float(want)
    _, info = hg.value_and_hypergrad(noisy)(*START, jnp.array(0.5), OUTER, key=ROOT)
    assert float(info.state) == float(want)


def test_model_state_flows_through_a_window_with_its_keys():
    """The state counts steps and sums the draws; the outer loss reads what the window reached."""

    def stateful_inner(w, h, batch, key, state):
        return inner(w, h, batch, key), {"count": state["count"] + 1, "sum": state["sum"] + draw(key)}

    def stateful_outer(w, h, batch, key, state):
        return outer(w, h, batch, key) * state["sum"], state

    problem = hg.BilevelProblem(stateful_inner, stateful_outer, stateful=True)
    first = {"count": jnp.zeros((), jnp.int32), "sum": jnp.zeros(())}
    batches = jnp.array([0.25, 0.5, 0.75])
    for estimator in (hg.implicit(problem, hg.solvers.dense()), hg.unrolled(problem)):
        tx = hg.bilevel(
            estimator,
            inner_optimizer=optax.sgd(RATE),
            outer_optimizer=optax.sgd(0.0),
            window=3,
            key=ROOT,
            model_state=first,
        )
        _, state = jax.jit(tx.update)(None, tx.init(START), START, inner_batch=batches, outer_batch=OUTER)
        keys = keys_of(0)
        want = sum(draw(jax.random.fold_in(keys[0], i)) for i in range(3))
        assert int(state.model_state["count"]) == 3
        np.testing.assert_allclose(state.model_state["sum"], want, rtol=1e-6)
        np.testing.assert_allclose(state.info.outer_loss, by_hand(keys, *START, batches)[1] * want, rtol=1e-6)


def test_the_retraining_test_uses_each_key_once():
    """Starts, batches and losses have streams of their own, and no two steps share a key."""
    seen = []

    def record(*values):
        seen.append(tuple(float(v) for v in values))

    def counted(w, h, batch, key):
        jax.debug.callback(record, batch, draw(key))
        return 0.5 * (w - h) ** 2

    problem = hg.BilevelProblem(counted, lambda w, h, batch, key: w**2)
    hg.diagnostics.retrain(
        problem,
        START,
        lambda key: draw(key),
        lambda step, key: draw(key),
        OUTER,
        inner_optimizer=optax.sgd(RATE),
        num_steps=4,
        num_starts=2,
        key=ROOT,
    )
    jax.effects_barrier()
    losses = {value for _, value in seen}
    batches = {value for value, _ in seen}
    assert len(losses) == len(batches) == 8
    assert not losses & batches


def test_compare_hands_its_key_to_every_method():
    methods = {"dense": hg.implicit(PROBLEM, hg.solvers.dense())}
    compare = functools.partial(hg.diagnostics.compare, methods, methods["dense"], START, jnp.array(0.5), OUTER)
    first, second = (compare(key=key) for key in (ROOT, jax.random.key(8)))
    for found, key in ((first, ROOT), (second, jax.random.key(8))):
        want = draw(jax.random.split(key, 5)[1]) * OUTER * START.params
        assert found.rows[0].outer_loss == pytest.approx(float(want), rel=1e-6)
