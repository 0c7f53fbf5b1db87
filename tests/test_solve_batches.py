"""Batches of the linear solve: another one, a fresh one for each product, and losses evaluated part by part."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.solvers import Status
from tests.problems import relative_error

RNG = np.random.default_rng(0)
X, Y = jnp.asarray(RNG.normal(size=(5, 12, 4))), jnp.asarray(RNG.normal(size=(5, 12)))
BATCHES = X, Y
VALID = jnp.asarray(RNG.normal(size=(9, 4))), jnp.asarray(RNG.normal(size=9))
AT = jnp.asarray(RNG.normal(size=4)), jnp.asarray(RNG.normal(size=4))


def inner(w, h, batch, key):
    return 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2) + hg.penalties.l2(w, jnp.exp(h))


def outer(w, h, batch, key):
    return 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2)


PROBLEM = hg.BilevelProblem(inner, outer)


def batch(i):
    return X[i], Y[i]


@pytest.mark.slow
def test_a_solve_batch_takes_the_place_of_the_inner_batch_in_the_solve():
    """In the functional form, and in ``bilevel``, where the inner step keeps its own batch."""
    estimator = hg.implicit(PROBLEM, hg.solvers.cg(8))
    fn = hg.value_and_hypergrad(estimator)
    (_, want), _ = fn(*AT, batch(1), VALID, key=None)
    (_, found), _ = fn(*AT, batch(0), VALID, key=None, solve_batch=batch(1))
    assert relative_error(found, want) < 1e-6
    whole = X.reshape(60, 4), Y.reshape(60)  # a larger one
    (_, large), _ = fn(*AT, batch(0), VALID, key=None, solve_batch=whole)
    assert relative_error(large, fn(*AT, whole, VALID, key=None)[0][1]) < 1e-6

    tx = hg.bilevel(estimator, inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.sgd(1.0))
    variables = hg.BilevelParams(*AT)
    updates, state = tx.update(
        None, tx.init(variables), variables, inner_batch=batch(0), outer_batch=VALID, solve_batch=batch(1)
    )
    np.testing.assert_allclose(updates.params, -0.1 * jax.grad(inner)(*AT, batch(0), None), rtol=1e-5)
    moved = AT[0] + updates.params
    (_, want), _ = fn(moved, AT[1], batch(1), VALID, key=None)
    assert relative_error(updates.hyperparams, -want) < 1e-5
    assert int(state.info.num_skipped) == 0


@pytest.mark.slow
@pytest.mark.parametrize("indexed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_neumann_takes_a_fresh_batch_for_each_product(indexed, x64):
    """Written out: x = α Σ Π (I − αA_k) b, the mixed product on the last batch."""
    given = hg.IndexedBatch((X.reshape(60, 4), Y.reshape(60)), jnp.arange(60).reshape(5, 12)) if indexed else BATCHES
    w, h = (jnp.asarray(a, float) for a in AT)
    hessians = [np.asarray(jax.hessian(inner)(w, h, batch(i), None)) for i in range(5)]
    slope, alpha = np.asarray(jax.grad(outer)(w, h, VALID, None)), 0.2
    term, x = slope.copy(), 0.0
    for k in range(7):  # more products than batches: they come round again
        x, term = x + alpha * term, term - alpha * hessians[k % 5] @ term
    mixed = jax.jacobian(jax.grad(inner), argnums=1)(w, h, batch(4), None)
    fn = hg.value_and_hypergrad(hg.implicit(PROBLEM, hg.solvers.neumann(7, alpha)))
    (_, found), info = fn(w, h, batch(0), VALID, key=None, solve_batch=hg.FreshBatches(given))
    np.testing.assert_allclose(found, -np.asarray(mixed).T @ x, rtol=1e-8)
    assert np.isnan([info.solver.residual, info.solver.undamped_residual]).all()
    assert Status(int(info.solver.status)) == Status.TRUNCATED
    assert int(info.solver.num_products) == 7
    assert not bool(info.skipped)


def test_richardson_takes_fresh_batches_and_averages_over_them():
    """The mean over many outer steps approaches the solution with the mean Hessian."""
    whole = X.reshape(60, 4), Y.reshape(60)
    exact = hg.hypergrad(hg.implicit(PROBLEM, hg.solvers.dense()))(*AT, whole, VALID, key=None)
    fn = hg.value_and_hypergrad(hg.implicit(PROBLEM, hg.solvers.richardson(10)))
    state, found = None, []
    for i in range(40):
        order = np.random.default_rng(i).permutation(60).reshape(5, 12)
        fresh = hg.FreshBatches(hg.IndexedBatch(whole, jnp.asarray(order)))
        (_, grad), info = fn(*AT, batch(0), VALID, key=None, solve_batch=fresh, state=state)
        state = info.state
        found.append(grad)
    last_batch_noise = relative_error(found[-1], exact)
    assert relative_error(jnp.mean(jnp.stack(found[10:]), 0), exact) < 0.3 < 1.0
    assert np.isfinite(last_batch_noise)


def test_a_neumann_series_over_fresh_batches_that_grows_is_told():
    fn = hg.value_and_hypergrad(hg.implicit(PROBLEM, hg.solvers.neumann(50, 100.0)))
    _, info = fn(*AT, batch(0), VALID, key=None, solve_batch=hg.FreshBatches(BATCHES))
    assert Status(int(info.solver.status)) == Status.DIVERGED
    assert bool(info.skipped)


@pytest.mark.parametrize("solver", [None, hg.solvers.recycled_cg(3, 2), hg.solvers.gmres(5, 5), hg.solvers.dense()])
def test_solvers_that_need_one_matrix_refuse_fresh_batches(solver):
    fn = hg.value_and_hypergrad(hg.implicit(PROBLEM, solver))
    with pytest.raises(ValueError, match=r"one matrix for all products.*neumann.*richardson"):
        fn(*AT, batch(0), VALID, key=None, solve_batch=hg.FreshBatches(BATCHES))


def test_methods_without_a_solve_refuse_a_batch_for_it():
    tx = hg.bilevel(hg.unrolled(PROBLEM), inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.sgd(0.1), window=5)
    variables = hg.BilevelParams(*AT)
    with pytest.raises(ValueError, match="no solve_batch for unrolled"):
        tx.update(None, tx.init(variables), variables, inner_batch=BATCHES, outer_batch=VALID, solve_batch=batch(0))


class TestMicrobatches:
    def test_change_nothing_but_the_rounding(self, x64):
        w, h = (jnp.asarray(a, float) for a in AT)
        valid = VALID[0][:8], VALID[1][:8]
        parts = hg.microbatched(PROBLEM, 4)
        want = hg.value_and_hypergrad(hg.implicit(PROBLEM, hg.solvers.cg(8)))(w, h, batch(0), valid, key=None)[0]
        found = hg.value_and_hypergrad(hg.implicit(parts, hg.solvers.cg(8)))(w, h, batch(0), valid, key=None)[0]
        assert relative_error(found, want) < 1e-12

    @pytest.mark.slow
    def test_take_the_memory_of_one(self):
        """A solve over 32 times the batch: scratch memory grows by little."""
        width, count = 256, 32

        def network(w, h, x, key):
            hidden = x
            for layer in w[:-1]:
                hidden = jnp.tanh(hidden @ layer)
            return jnp.mean((hidden @ w[-1]) ** 2) + hg.penalties.l2(w, jnp.exp(h))

        weights = [jnp.ones((width, width))] * 3 + [jnp.ones((width, 1))]
        problem = hg.BilevelProblem(network, network)

        def scratch(problem, size):
            fn = hg.value_and_hypergrad(hg.implicit(problem))
            big = jax.ShapeDtypeStruct((size, width), jnp.float32)
            call = lambda w, x: fn(w, jnp.zeros(()), x, x, key=None)[0]  # noqa: E731
            return jax.jit(call).lower(weights, big).compile().memory_analysis().temp_size_in_bytes

        small, large = scratch(problem, 64), scratch(problem, 64 * count)
        assert scratch(hg.microbatched(problem, count), 64 * count) < 1.5 * small + 4 * 64 * count * width
        assert large > 4 * small

    def test_draw_their_own_numbers_and_stack_aux(self):
        def loss(w, h, x, key):
            return jnp.mean(x) * w + jax.random.normal(key), jnp.sum(x)

        problem = hg.microbatched(hg.BilevelProblem(loss, loss, has_aux=True), 2)
        key = jax.random.key(0)
        value, aux = problem.inner_loss(jnp.array(1.0), None, jnp.arange(4.0), key)
        noise = [jax.random.normal(jax.random.fold_in(key, i)) for i in range(2)]
        assert float(value) == pytest.approx(1.5 + float(sum(noise)) / 2, rel=1e-6)
        np.testing.assert_allclose(aux, [1.0, 5.0])

    def test_refuse_losses_of_another_form_by_name(self):
        vector, pair = (lambda w, h, x, k: x * w), (lambda w, h, x, k: (jnp.mean(x) * w, 1.0))
        for loss, options, message in (
            (vector, {}, "scalar"),
            (pair, {}, "has_aux=True"),
            (lambda w, h, x, k: jnp.mean(x) * w, {"has_aux": True}, r"\(scalar, aux\)"),
        ):
            problem = hg.microbatched(hg.BilevelProblem(loss, loss, **options), 2)
            with pytest.raises((TypeError, ValueError), match=message):
                problem.inner_loss(jnp.array(1.0), None, jnp.arange(4.0), None)

    def test_keep_flags_and_refuse_what_does_not_divide(self):
        loss = lambda w, h, b, key: jnp.mean(b["x"] - w) if b["flag"] else jnp.nan * w  # noqa: E731
        problem = hg.microbatched(hg.BilevelProblem(loss, loss), 2)
        assert float(problem.inner_loss(jnp.array(0.0), None, {"x": jnp.arange(4.0), "flag": True}, None)) == 1.5
        with pytest.raises(ValueError, match=r"divisible by 2; got shape \(5,\)"):
            problem.inner_loss(jnp.array(0.0), None, {"x": jnp.arange(5.0), "flag": True}, None)
        stateful = hg.BilevelProblem(lambda w, h, b, k, s: (w, s), lambda w, h, b, k, s: (w, s), stateful=True)
        with pytest.raises(ValueError, match="without model state"):
            hg.microbatched(stateful, 2)


def test_fresh_batches_say_what_is_wrong_with_them():
    fn = hg.value_and_hypergrad(hg.implicit(PROBLEM, hg.solvers.neumann(3)))
    for fresh, message in (
        ([batch(0), batch(1)], "FreshBatches of batches with the structure of the inner batch"),
        (jnp.ones(()), "FreshBatches whose leaves have a common leading axis"),
        ((X, Y[:3]), "FreshBatches whose leaves have a common leading axis"),
    ):
        with pytest.raises(ValueError, match=message):
            fn(*AT, batch(0), VALID, key=None, solve_batch=hg.FreshBatches(fresh))
    for inner_batch, outer_batch in ((hg.FreshBatches(BATCHES), VALID), (batch(0), hg.FreshBatches(BATCHES))):
        with pytest.raises(TypeError, match="one batch for a loss; got"):
            fn(*AT, inner_batch, outer_batch, key=None)
    indexed = hg.IndexedBatch((X.reshape(60, 4), Y.reshape(60)), jnp.arange(12))
    found = fn(*AT, indexed, VALID, key=None, solve_batch=hg.FreshBatches(BATCHES))
    assert relative_error(found[0], fn(*AT, batch(0), VALID, key=None, solve_batch=hg.FreshBatches(BATCHES))[0]) < 1e-6
