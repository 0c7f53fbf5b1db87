"""Inner solvers: to the tolerance, counted honestly, and a status where they cannot."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.inner_solvers import InnerProblem, InnerStatus

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 6)) * np.geomspace(1.0, 0.2, 6)
Y = RNG.normal(size=40)
DECAY = 0.1
SOLVERS = {
    "lbfgs": hg.inner_solvers.lbfgs(),
    "newton_cg": hg.inner_solvers.newton_cg(),
    "gradient": hg.inner_solvers.gradient(optax.sgd(0.3, momentum=0.8)),
}
ZEROS = {"a": np.zeros(2), "b": np.zeros((2, 2))}


def start():
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, float), ZEROS)


def vector(params):
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(params)])


def logistic(params, decay=DECAY):
    w = vector(params)
    x, signs = jnp.asarray(X, float), jnp.asarray(np.sign(Y), float)
    return jnp.mean(jax.nn.softplus(-signs * (x @ w))) + 0.5 * decay * jnp.sum(w**2)


def solved(name, tolerance, loss=logistic, at=None):
    solver = SOLVERS[name] if isinstance(name, str) else name
    at = start() if at is None else at
    return solver.solve(InnerProblem(loss, None, ()), at, solver.init(at), tolerance)


def name_of(found):
    return InnerStatus(int(found.status)).name


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow) if x == "lbfgs" else x for x in SOLVERS])
@pytest.mark.parametrize("tolerance", [*(pytest.param(t, marks=pytest.mark.slow) for t in (1e-2, 1e-5)), 1e-9])
def test_the_tolerance_is_kept_and_bounds_the_error(name, tolerance, x64):
    """‖w − w*‖ ≤ ‖∇L‖/μ; the solution by Newton steps of numpy."""
    found = solved(name, tolerance)
    assert name_of(found) == "CONVERGED"
    slope = jax.grad(logistic)(found.params)
    assert float(found.residual_norm) == pytest.approx(float(optax.tree.norm(slope)), rel=1e-6)
    assert float(found.residual_norm) <= tolerance
    flat = jax.flatten_util.ravel_pytree(start())
    loss, w = lambda v: logistic(flat[1](v)), np.zeros(6)
    for _ in range(20):
        w = w - np.linalg.solve(np.asarray(jax.hessian(loss)(w)), np.asarray(jax.grad(loss)(w)))
    assert np.linalg.norm(vector(found.params) - w) <= tolerance / DECAY


@pytest.mark.parametrize("name", SOLVERS)
def test_another_tolerance_compiles_nothing(name, x64):
    traced = []

    @jax.jit
    def run(tolerance):
        traced.append(None)
        return solved(name, tolerance)

    loose, tight = run(1e-2), run(1e-6)
    assert len(traced) == 1
    assert int(loose.num_gradients) < int(tight.num_gradients)


@pytest.mark.parametrize("name", ["lbfgs", "gradient"])
def test_gradients_are_counted(name, x64):
    calls = []

    def loss(params):
        jax.debug.callback(lambda: calls.append(None))
        return logistic(params)

    found = jax.block_until_ready(solved(name, 1e-6, loss))
    jax.effects_barrier()
    assert int(found.num_gradients) == len(calls)


@pytest.mark.parametrize("name", SOLVERS)
def test_what_cannot_be_solved_has_a_status(name):
    """Rounding, steps that run out, a loss that is not finite; the weights stay finite."""
    stalled = solved(name, 0.0)
    assert name_of(stalled) in ("STALLED", "MAX_STEPS")
    assert float(stalled.residual_norm) < 1e-5
    few = {
        "lbfgs": hg.inner_solvers.lbfgs(2),
        "newton_cg": hg.inner_solvers.newton_cg(1),
        "gradient": hg.inner_solvers.gradient(optax.sgd(0.3), 2),
    }
    short = solved(few[name], 1e-6)
    assert name_of(short) == "MAX_STEPS"
    bad = solved(name, 1e-6, lambda params: logistic(params) / jnp.zeros(()))
    assert name_of(bad) == "NOT_FINITE"
    assert bool(jnp.all(jnp.isfinite(vector(bad.params))))


def test_a_gradient_step_that_diverges_keeps_the_last_finite_weights():
    found = solved(hg.inner_solvers.gradient(optax.sgd(1e6)), 1e-6, lambda params: jnp.sum(vector(params) ** 4 + 1.0))
    assert name_of(found) == "CONVERGED"  # zero is the solution
    away = jax.tree.map(lambda leaf: leaf + 1.0, start())
    found = solved(hg.inner_solvers.gradient(optax.sgd(1e6)), 1e-6, lambda p: jnp.sum(vector(p) ** 4), away)
    assert name_of(found) == "NOT_FINITE"
    assert bool(jnp.all(jnp.isfinite(vector(found.params))))


@pytest.mark.parametrize("name", SOLVERS)
def test_low_precision_weights_keep_their_dtype(name):
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), start())
    found = solved(name, 1e-2, at=low)
    assert {leaf.dtype for leaf in jax.tree.leaves(found.params)} == {jnp.dtype(jnp.bfloat16)}


def soft(w, strength, step):
    return jax.tree.map(lambda leaf: jnp.sign(leaf) * jnp.maximum(jnp.abs(leaf) - step * strength, 0.0), w)


def lasso(strength=0.05):
    squares = lambda w, h, batch, key: 0.5 * jnp.mean((X @ vector(w) - Y) ** 2)  # noqa: E731
    problem = hg.BilevelProblem(squares, squares)
    residual = hg.residuals.proximal_gradient(problem, soft, 0.5)
    return InnerProblem(
        lambda w: squares(w, strength, (), None), lambda w: residual(w, strength, (), None), jnp.asarray(strength)
    )


def test_proximal_solves_the_lasso(x64):
    """Against coordinate descent by numpy; zeros are exact."""
    solver, inner = hg.inner_solvers.proximal(soft), lasso()
    found = solver.solve(inner, start(), solver.init(start()), 1e-10)
    assert name_of(found) == "CONVERGED"
    w = np.zeros(6)
    for _ in range(5000):
        for j in range(6):
            rest = Y - X @ w + X[:, j] * w[j]
            correlation, square = X[:, j] @ rest / 40, X[:, j] @ X[:, j] / 40
            w[j] = np.sign(correlation) * max(abs(correlation) - 0.05, 0.0) / square
    assert (w == 0).any()
    assert (w != 0).any()
    np.testing.assert_allclose(vector(found.params), w, atol=1e-8)
    np.testing.assert_array_equal(np.asarray(vector(found.params)) == 0, w == 0)


def test_proximal_restarts_its_momentum(x64):
    """Condition number 1e4, where momentum without restarts swings for thousands of steps."""
    scales = jnp.geomspace(1e-4, 1.0, 6)
    loss = lambda w: 0.5 * jnp.sum(scales * (vector(w) - 1.0) ** 2)  # noqa: E731
    inner = InnerProblem(loss, jax.grad(loss), ())
    solver = hg.inner_solvers.proximal(lambda w, h, step: w)
    found = solver.solve(inner, start(), solver.init(start()), 1e-8)
    assert name_of(found) == "CONVERGED"
    assert int(found.num_gradients) < 800


def test_proximal_starts_warm(x64):
    """From the solution, with the step size that it found, one look is enough."""
    solver, inner = hg.inner_solvers.proximal(soft), lasso()
    cold = solver.solve(inner, start(), solver.init(start()), 1e-8)
    warm = solver.solve(inner, cold.params, cold.state, 1e-7)
    assert int(warm.num_gradients) == 2
    assert int(cold.num_gradients) > 20


def test_newton_solves_a_residual(x64):
    inner = lasso()
    solver = SOLVERS["newton_cg"]
    found = solver.solve(inner, start(), solver.init(start()), 1e-9)
    assert name_of(found) == "CONVERGED"
    again = hg.inner_solvers.proximal(soft)
    other = again.solve(inner, start(), again.init(start()), 1e-10)
    np.testing.assert_allclose(vector(found.params), vector(other.params), atol=1e-7)


@pytest.mark.parametrize("name", ["lbfgs", "gradient"])
def test_solvers_of_a_minimum_refuse_a_residual(name):
    with pytest.raises(ValueError, match="a problem without a residual"):
        SOLVERS[name].solve(lasso(), start(), SOLVERS[name].init(start()), 1e-3)


def test_proximal_wants_a_residual():
    solver = hg.inner_solvers.proximal(soft)
    with pytest.raises(ValueError, match="with a residual for proximal"):
        solver.solve(InnerProblem(logistic, None, ()), start(), solver.init(start()), 1e-3)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: hg.inner_solvers.lbfgs(0), ValueError),
        (lambda: hg.inner_solvers.lbfgs(memory_size=0), ValueError),
        (lambda: hg.inner_solvers.newton_cg(max_products=0), ValueError),
        (lambda: hg.inner_solvers.gradient("adam"), TypeError),
        (lambda: hg.inner_solvers.gradient(optax.sgd(0.1), 0), ValueError),
        (lambda: hg.inner_solvers.proximal(3), TypeError),
    ],
)
def test_bad_settings_are_refused(make, error):
    with pytest.raises(error, match="expected"):
        make()


def test_lbfgs_goes_on_where_the_loss_is_below_rounding():
    """In float32 changes of the loss vanish at ‖∇L‖ ≈ √eps; steps without a search reach 1e-7."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(200, 50)) * np.logspace(0, -1, 50), jnp.float32)
    y = jnp.asarray(rng.random(200) < 0.5, jnp.float32)
    loss = lambda w: jnp.mean(jnp.logaddexp(0, x @ w) - y * (x @ w)) + 0.005 * jnp.sum(w**2)  # noqa: E731
    solver = hg.inner_solvers.lbfgs()
    found = solver.solve(hg.inner_solvers.InnerProblem(loss, None, ()), jnp.zeros(50), (), 1e-7)
    assert name_of(found) == "CONVERGED"
    assert float(jnp.linalg.norm(jax.grad(loss)(found.params))) < 3e-7
    assert int(found.num_gradients) < 80


@pytest.mark.parametrize("name", ["lbfgs", "newton_cg"])
def test_the_residual_is_that_of_the_weights_returned(name):
    """In bfloat16 the solution is rounded: what is left of the gradient is told."""
    loss = lambda w: 0.5 * jnp.sum((w.astype(jnp.float32) - jnp.array([1.001, 0.3337])) ** 2)  # noqa: E731
    solver = getattr(hg.inner_solvers, name)()
    found = solver.solve(hg.inner_solvers.InnerProblem(loss, None, ()), jnp.zeros(2, jnp.bfloat16), (), 1e-5)
    assert found.params.dtype == jnp.bfloat16
    true = float(jnp.linalg.norm(jax.grad(loss)(found.params.astype(jnp.float32))))
    assert float(found.residual_norm) == pytest.approx(true, rel=1e-5)
    assert name_of(found) == "STALLED"


@pytest.mark.slow
def test_lbfgs_returns_the_best_weights_that_it_met():
    """Where the loss rounds, steps are judged by the gradient, whose norm may rise; more steps are never worse."""
    loss = lambda w: 1e6 + 0.5 * jnp.sum(jnp.arange(1.0, 9.0) ** 3 * w**2)  # noqa: E731
    problem, start = hg.inner_solvers.InnerProblem(loss, None, ()), jnp.full(8, 1e-3)
    found = [hg.inner_solvers.lbfgs(steps).solve(problem, start, (), 1e-9) for steps in range(1, 15)]
    norms = [float(each.residual_norm) for each in found]
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] < 0.1 * norms[0]
    assert len(set(norms)) < len(norms), "some step made it worse"
