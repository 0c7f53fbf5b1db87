"""Every gradient by two routes: closed form, dense oracle, finite differences, unrolled steps; all in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.drivers import one_estimate
from tests.problems import autodiff_steps, finite_differences, logistic, network, relative_error, ridge, window_of

pytestmark = pytest.mark.usefixtures("x64")


@functools.cache
def example(name):
    """Return a problem, built once in 64-bit mode."""
    with jax.enable_x64(True):
        return {"ridge": ridge, "stiff": functools.partial(ridge, spread=0.1), "logistic": logistic}[name]()


def estimate(case, solver):
    """Return the hypergradient and info at the solved weights."""
    fn = hg.value_and_hypergrad(hg.implicit(case.problem, solver))
    (_, grad), info = jax.jit(functools.partial(fn, key=None))(*case.variables, case.inner_batch, case.outer_batch)
    return grad, info


@pytest.mark.parametrize("name", ["ridge", "stiff"])
@pytest.mark.parametrize(
    ("solver", "tolerance"),
    [(hg.solvers.dense(), 1e-9), (hg.solvers.cg(50, 1e-12), 1e-8)],
    ids=["dense", "cg"],
)
def test_ridge_against_the_closed_form(name, solver, tolerance):
    case = example(name)
    grad, info = estimate(case, solver)
    assert relative_error(grad, case.exact) < tolerance
    assert bool(info.solver.converged)


@pytest.mark.parametrize("name", ["ridge", "logistic"])
def test_closed_form_and_oracle_against_finite_differences(name):
    case = example(name)
    differences = finite_differences(case.value_at, case.variables.hyperparams)
    assert relative_error(case.exact, differences) < 1e-8
    grad, _ = estimate(case, hg.solvers.dense())
    assert relative_error(grad, differences) < 1e-7  # central differences at step 1e-5


@pytest.mark.parametrize(
    ("solver", "tolerance"),
    [
        (hg.solvers.cg(100, 1e-11), 1e-8),
        pytest.param(hg.solvers.neumann(3000), 1e-8, marks=pytest.mark.slow),
        pytest.param(hg.solvers.neumann(3000, 0.5), 1e-8, marks=pytest.mark.slow),
    ],
    ids=["cg", "neumann_auto", "neumann"],
)
@pytest.mark.parametrize("name", [pytest.param("ridge", marks=pytest.mark.slow), "logistic"])
def test_iterative_solvers_reach_the_dense_oracle(name, solver, tolerance):
    case = example(name)
    oracle, _ = estimate(case, hg.solvers.dense())
    grad, info = estimate(case, solver)
    assert relative_error(grad, oracle) < tolerance
    assert bool(info.solver.converged)


@pytest.mark.parametrize(
    "num_terms", [pytest.param(1, marks=pytest.mark.slow), 5, pytest.param(25, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", ["ridge", "logistic"])
def test_neumann_equals_its_truncated_sum_in_the_hypergradient(name, num_terms):
    """The series written out with the dense Hessian and the mixed block, both by jax.jacobian."""
    case = example(name)
    (params, hyper), alpha = case.variables, 0.3
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    flat_h, unravel_h = jax.flatten_util.ravel_pytree(hyper)

    def inner(w, h):
        return case.problem.inner_loss(unravel(w), unravel_h(h), case.inner_batch, None)

    def outer(w, h):
        return case.problem.outer_loss(unravel(w), unravel_h(h), case.outer_batch, None)

    @jax.jit
    def blocks(w, h):
        mixed = jax.jacobian(jax.grad(inner), argnums=1)(w, h)
        return jax.hessian(inner)(w, h), mixed, *jax.grad(outer, argnums=(0, 1))(w, h)

    hessian, mixed, slope, direct = blocks(flat, flat_h)
    solution, term = jnp.zeros_like(slope), slope
    for _ in range(num_terms):
        solution, term = solution + alpha * term, term - alpha * hessian @ term
    want = unravel_h(direct - mixed.T @ solution)
    grad, info = estimate(case, hg.solvers.neumann(num_terms, alpha))
    assert relative_error(grad, want) < 1e-10
    residual = jnp.linalg.norm(slope - hessian @ solution) / jnp.linalg.norm(slope)
    assert float(info.solver.residual) == pytest.approx(float(residual), rel=1e-10)


@pytest.mark.parametrize(
    "steps", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(20, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", ["ridge", "logistic"])
def test_k_neumann_terms_equal_k_unrolled_steps_at_the_optimum(name, steps):
    case, alpha = example(name), 0.3
    unrolled = hg.hypergrad(autodiff_steps(case.problem), inner_optimizer=optax.sgd(alpha))
    unrolled = jax.jit(functools.partial(unrolled, key=None))
    want = unrolled(*case.variables, window_of(case.inner_batch, steps), case.outer_batch)
    grad, _ = estimate(case, hg.solvers.neumann(steps, alpha))
    assert relative_error(grad, want) < 1e-10


def test_identity_is_the_hypergradient_with_h_replaced_by_one():
    case = example("ridge")
    grad, _ = estimate(case, hg.solvers.identity())
    one_step = hg.hypergrad(autodiff_steps(case.problem), inner_optimizer=optax.sgd(1.0))
    one_step = jax.jit(functools.partial(one_step, key=None))
    want = one_step(*case.variables, window_of(case.inner_batch, 1), case.outer_batch)
    assert relative_error(grad, want) < 1e-10


@pytest.mark.slow
def test_a_window_estimates_at_the_weights_it_reaches():
    """With an inner optimizer: K steps first, then what would be got there without one."""
    case = example("ridge")
    estimator = hg.implicit(case.problem, hg.solvers.cg(20, 1e-10))
    start = case.variables._replace(params=optax.tree.scale(2.0, case.variables.params))
    optimizer = optax.sgd(0.2, momentum=0.9)
    batches = jax.tree.map(lambda x: x[:24].reshape(4, 6, *x.shape[1:]), case.inner_batch)
    params, state = start.params, optimizer.init(start.params)
    result, at = one_estimate(estimator, optimizer)(start, batches, case.outer_batch, None)
    gradient = jax.jit(lambda w, batch: jax.grad(case.problem.inner_loss)(w, start.hyperparams, batch, None))
    for i in range(4):
        batch = jax.tree.map(lambda x, i=i: x[i], batches)
        updates, state = optimizer.update(gradient(params, batch), state, params)
        params = optax.apply_updates(params, updates)
    assert relative_error(at.params, params) < 1e-12
    assert relative_error(at.inner_state, state) < 1e-12
    (value, grad), _ = hg.value_and_hypergrad(estimator)(params, start.hyperparams, batch, case.outer_batch, key=None)
    assert relative_error(result.hypergrad, grad) < 1e-10
    assert float(result.value) == pytest.approx(float(value), rel=1e-12)


def test_the_hypergradient_vanishes_at_the_grid_optimum():
    """One decay for all weights: the hypergradient changes sign where a fine grid of outer losses is lowest."""
    case = example("ridge")

    def spread(h):
        return jax.tree.map(lambda x: jnp.full_like(x, h), case.variables.hyperparams)

    tied = hg.BilevelProblem(
        lambda w, h, b, k: case.problem.inner_loss(w, spread(h), b, k),
        lambda w, h, b, k: case.problem.outer_loss(w, spread(h), b, k),
    )
    gradient = hg.hypergrad(hg.implicit(tied, hg.solvers.cg(20, 1e-10)))

    def at(h):
        slope = gradient(case.response(spread(h)), h, case.inner_batch, case.outer_batch, key=None)
        return case.value_at(spread(h)), slope

    grid = jnp.linspace(-8.0, 3.0, 221)
    values, slopes = jax.jit(jax.vmap(at))(grid)
    best = int(jnp.argmin(values))
    assert 0 < best < 220
    assert np.all(np.sign(slopes[:best]) == -1)
    assert np.all(np.sign(slopes[best + 1 :]) == 1)


@pytest.mark.slow
def test_a_shared_key_makes_the_estimate_deterministic():
    """Dropout is the same mask in all products of one solve: two solves with one key agree to the last bit."""
    case = network(dropout=0.5)
    fn = jax.jit(hg.value_and_hypergrad(hg.implicit(case.problem, hg.solvers.neumann(10, 0.1))))
    args = (*case.variables, case.inner_batch, case.outer_batch)
    (_, first), info = fn(*args, key=jax.random.key(1))
    (_, second), _ = fn(*args, key=jax.random.key(1))
    (_, other), _ = fn(*args, key=jax.random.key(2))
    assert relative_error(first, second) == 0.0
    assert relative_error(first, other) > 1e-3
    assert float(info.solver.residual) < 1.0


@pytest.mark.slow
def test_dropout_solve_matches_the_dense_hessian_of_that_mask():
    """The operator is one Hessian: CG against the oracle under the same key, which a fresh mask a product fails."""
    case = network(dropout=0.5)
    args = (*case.variables, case.inner_batch, case.outer_batch)
    cg = hg.hypergrad(hg.implicit(case.problem, hg.solvers.cg(200, 1e-10, damping=1.0)))
    dense = hg.hypergrad(hg.implicit(case.problem, hg.solvers.dense(damping=1.0)))
    key = jax.random.key(3)
    assert relative_error(jax.jit(cg)(*args, key=key), jax.jit(dense)(*args, key=key)) < 1e-4  # float32 network
