"""``hg.minimize``: the optimum of a grid and of closed forms, and an honest end."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import optimize

import hypergrad as hg
from hypergrad import MinimizeStatus

RNG = np.random.default_rng(0)
TRUTH = RNG.normal(size=8) * (np.arange(8) < 4)
X = RNG.normal(size=(120, 8))
Y = X @ TRUTH + 1.5 * RNG.normal(size=120)
TRAIN, VALID = (X[:30], Y[:30]), (X[30:], Y[30:])
METHODS = {
    "hoag": hg.methods.hoag(),
    "gradient_descent": hg.methods.gradient_descent(optax.adam(0.3)),
    "lbfgs": hg.methods.lbfgs(),
}


def error(w, batch):
    return 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2)


def train_loss(w, log_decay, batch, key):
    return error(w, batch) + hg.penalties.l2(w, jnp.exp(log_decay))


def valid_loss(w, log_decay, batch, key):
    return error(w, batch)


RIDGE = hg.BilevelProblem(train_loss, valid_loss)


def ridge_value(log_decay):
    """Return the validation loss at the closed form of the inner solution, by numpy."""
    x, y = TRAIN
    gram = x.T @ x / len(x) + np.diag(np.broadcast_to(np.exp(log_decay), 8))
    w = np.linalg.solve(gram, x.T @ y / len(x))
    return 0.5 * np.mean((VALID[0] @ w - VALID[1]) ** 2)


def at(log_decay):
    return hg.BilevelParams(jnp.zeros(8), jnp.asarray(log_decay, float))


def run(problem=RIDGE, start=0.0, **options):
    return hg.minimize(problem, at(start), TRAIN, VALID, **options)


@pytest.mark.parametrize("start", [-4.0, 0.0, 4.0])
def test_hoag_is_within_one_percent_of_a_grid_in_fifteen_steps(start, x64):
    found = run(start=start, max_steps=15)
    best = min(ridge_value(h) for h in np.linspace(-8, 8, 100))
    assert float(found.value) <= 1.01 * best
    assert ridge_value(float(found.hyperparams)) <= 1.01 * best


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "hoag")) for n in METHODS])
def test_a_decay_per_weight_reaches_the_optimum_of_the_closed_form(name, x64):
    """L-BFGS-B of scipy on the closed form, log decays bounded where the data no longer tell."""
    problem = hg.reparameterize(RIDGE, hg.bijectors.interval(-6.0, 3.0))
    wanted = optimize.minimize(ridge_value, np.zeros(8), method="L-BFGS-B", bounds=[(-6, 3)] * 8).fun
    start = hg.unconstrain(hg.bijectors.interval(-6.0, 3.0), jnp.zeros(8))
    found = hg.minimize(
        problem, hg.BilevelParams(jnp.zeros(8), start), TRAIN, VALID, method=METHODS[name], max_steps=200, tol=1e-4
    )
    learned = np.asarray(problem.constrain(found.hyperparams))
    assert ridge_value(learned) <= wanted * 1.003
    assert float(found.value) == pytest.approx(ridge_value(learned), rel=1e-4)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "hoag")) for n in METHODS])
def test_the_end_is_where_the_hypergradient_vanishes(name, x64):
    found = run(method=METHODS[name], tol=1e-4, max_steps=300)
    assert bool(found.converged)
    assert found.message.startswith("converged: ‖dL_out/dλ‖ = ")
    h, step = float(found.hyperparams), 1e-5
    slope = (ridge_value(h + step) - ridge_value(h - step)) / (2 * step)
    assert abs(slope) < 2e-3  # hoag's own tolerance is 1e-3 · 0.9ᵏ
    np.testing.assert_allclose(found.params, np.linalg.solve(*normal_equations(h)), atol=2e-2)


def normal_equations(log_decay):
    x, y = TRAIN
    return x.T @ x / len(x) + np.exp(log_decay) * np.eye(8), x.T @ y / len(x)


def test_the_history_tells_every_step(x64):
    results = []
    found = run(callback=results.append)
    count = int(found.num_steps)
    assert len(results) == count
    assert [int(result.num_steps) for result in results] == list(range(1, count + 1))
    assert all(entries.shape == (count,) for entries in found.history)
    assert {int(result.status) for result in results[:-1]} == {MinimizeStatus.RUNNING}
    assert results[0].message.startswith("running: ")
    assert bool(jnp.all(found.history.num_gradients > 0))
    assert float(found.history.step_size[0]) == 0.0
    whole = run()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), whole, found)


def test_looser_tolerances_spend_less(x64):
    """HOAG against the same method with exact tolerances from the start."""
    inexact = run(max_steps=15)
    exact = run(method=hg.methods.hoag(lambda step: jnp.asarray(1e-10)), max_steps=15)
    for counts in ("num_gradients", "num_products"):
        spent = [int(jnp.sum(getattr(found.history, counts))) for found in (inexact, exact)]
        assert spent[0] <= 0.6 * spent[1], counts
    assert float(inexact.value) == pytest.approx(float(exact.value), rel=1e-3)


def test_linear_solves_start_warm(x64):
    """Along short steps of λ the last solution is near: each later solve takes fewer products than the first."""
    found = run(method=hg.methods.gradient_descent(optax.sgd(0.3), 1e-3), max_steps=6, tol=0.0)
    products = found.history.num_products
    assert bool(jnp.all(products[1:] < products[0]))


def test_the_same_call_gives_the_same_bits_and_compiles_once():
    traced = []

    def counted(w, h, batch, key):
        traced.append(None)
        return train_loss(w, h, batch, key)

    problem = hg.BilevelProblem(counted, valid_loss)
    first = run(problem)
    before = len(traced)
    second = run(problem)
    assert len(traced) == before
    jax.tree.map(np.testing.assert_array_equal, first, second)
    run(problem, tol=1e-2)
    assert len(traced) == before


@pytest.mark.slow
def test_vmap_over_folds_equals_a_loop(x64):
    folds = [np.arange(120) % 3 == fold for fold in range(3)]
    train, valid = (
        tuple(np.stack([part[rows if held else ~rows] for rows in folds]) for part in (X, Y)) for held in (False, True)
    )
    options = {"max_steps": 12, "tol": 1e-3}
    together = jax.vmap(lambda train, valid: hg.minimize(RIDGE, at(0.0), train, valid, **options))(train, valid)
    assert len(together.message.splitlines()) == 3
    for fold in range(3):
        one = hg.minimize(RIDGE, at(0.0), *([part[fold] for part in of] for of in (train, valid)), **options)
        count = int(one.num_steps)
        assert int(together.num_steps[fold]) == count
        np.testing.assert_allclose(together.hyperparams[fold], one.hyperparams, rtol=1e-6)
        np.testing.assert_allclose(together.history.outer_loss[fold][:count], one.history.outer_loss, rtol=1e-6)
        assert bool(jnp.all(jnp.isnan(together.history.outer_loss[fold][count:])))


def test_a_callback_stops_and_what_it_saw_is_kept():
    def stop(result):
        if int(result.num_steps) == 2:
            raise StopIteration

    found = run(start=4.0, callback=stop)
    assert MinimizeStatus(int(found.status)) == MinimizeStatus.CALLBACK
    assert int(found.num_steps) == 2
    assert found.message.startswith("stopped by the callback")
    seen = []

    def fail(result):
        seen.append(result)
        if len(seen) == 2:
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="the disk is full"):
        run(start=4.0, callback=fail)
    assert int(seen[-1].num_steps) == 2


def test_the_best_iterate_is_returned_where_the_steps_run_out(x64):
    """Steps too long for this loss: the error grows by a half in each."""
    inner = lambda w, h, batch, key: 0.5 * jnp.sum((w - h) ** 2)  # noqa: E731
    problem = hg.BilevelProblem(inner, lambda w, h, batch, key: 0.5 * jnp.sum((w - 3.0) ** 2))
    method, start = hg.methods.gradient_descent(optax.sgd(2.5)), hg.BilevelParams(jnp.zeros(1), jnp.ones(1))
    found = hg.minimize(problem, start, (), (), method=method, max_steps=4)
    np.testing.assert_allclose(found.history.outer_loss, [2.0, 4.5, 10.125, 22.78125], rtol=1e-4)
    assert float(found.hyperparams[0]) == 1.0
    assert float(found.value) == pytest.approx(2.0, rel=1e-4)
    assert found.message.startswith("max_steps reached")


def test_lbfgs_shortens_a_step_that_is_too_long(x64):
    """The first step has length 1, and the minimum is at 0.3."""
    inner = lambda w, h, batch, key: 0.5 * jnp.sum((w - h) ** 2)  # noqa: E731
    problem = hg.BilevelProblem(inner, lambda w, h, batch, key: 50.0 * jnp.sum((w - 0.3) ** 2))
    start = hg.BilevelParams(jnp.zeros(1), jnp.zeros(1))
    found = hg.minimize(problem, start, (), (), method=METHODS["lbfgs"])
    assert bool(found.converged)
    assert found.history.accepted[:3].tolist() == [True, False, True]
    assert found.history.step_size[1:3].tolist() == [1.0, 0.5]


def test_a_loss_that_is_not_finite_far_away_is_a_rejected_step(x64):
    """√(2 − w): the first step of HOAG leaves its domain; at 2 the loss is finite, and its derivative is not."""
    inner = lambda w, h, batch, key: 0.5 * jnp.sum((w - h) ** 2)  # noqa: E731
    outer = lambda w, h, batch, key: jnp.sum((w - 1.9) ** 2) + 0.0 * jnp.sum(jnp.sqrt(2.0 - w))  # noqa: E731
    problem, start = hg.BilevelProblem(inner, outer), hg.BilevelParams(jnp.zeros(1), jnp.array([1.5]))
    found = hg.minimize(problem, start, (), (), tol=1e-3)
    assert bool(found.converged)
    assert not bool(jnp.all(found.history.accepted))
    assert float(found.hyperparams[0]) == pytest.approx(1.9, abs=1e-2)


@pytest.mark.parametrize(
    ("problem", "options", "status", "words"),
    [
        (RIDGE, {"max_steps": 1}, MinimizeStatus.MAX_STEPS, "larger max_steps"),
        (
            RIDGE,
            {"inner_solver": hg.inner_solvers.gradient(optax.sgd(1e-4), 3), "tol": 1e9},
            MinimizeStatus.INNER_SOLVER,
            "ended with MAX_STEPS",
        ),
        (
            RIDGE,
            {"linear_solver": hg.solvers.cg(1), "tol": 1e9, "method": hg.methods.hoag(1e-9)},
            MinimizeStatus.LINEAR_SOLVER,
            "ended with TRUNCATED",
        ),
        (
            hg.BilevelProblem(lambda *args: train_loss(*args) / jnp.zeros(()), valid_loss),
            {},
            MinimizeStatus.NOT_FINITE,
            "start from other hyperparameters",
        ),
        (
            hg.BilevelProblem(train_loss, lambda w, h, b, k: jnp.log(error(w, b) - 1e9)),
            {},
            MinimizeStatus.NOT_FINITE,
            "NaN or infinite",
        ),
    ],
)
def test_every_end_has_its_message(problem, options, status, words, x64):
    found = run(problem, **options)
    assert MinimizeStatus(int(found.status)) == status
    assert words in found.message
    assert not bool(found.converged)
    assert bool(jnp.all(jnp.isfinite(found.params)))
    assert str(found) == found.message


def soft(w, strength, step):
    return jnp.sign(w) * jnp.maximum(jnp.abs(w) - step * strength, 0.0)


@pytest.mark.parametrize("kind", [*(pytest.param(x, marks=pytest.mark.slow) for x in ("lasso", "box")), "simplex"])
def test_hypergradients_at_its_own_solutions_equal_differences(kind, x64):
    """Some weights are at the kink, or at the bound; each side of the difference is solved by proximal gradients."""
    problem = hg.BilevelProblem(lambda w, h, batch, key: error(w, batch), valid_loss)
    if kind == "lasso":
        prox = soft
        residual = hg.residuals.proximal_gradient(problem, prox, 0.3)
    else:
        if kind == "box":
            prox = lambda w, h, step: jnp.clip(w, -h, h)  # noqa: E731
        else:
            prox = lambda w, h, step: optax.projections.projection_simplex(w, h)  # noqa: E731
        residual = hg.residuals.projected_gradient(problem, lambda w, h: prox(w, h, 0.0), 0.3)
    problem = hg.reparameterize(hg.with_residual(problem, residual), hg.bijectors.exp())
    solver, method = hg.inner_solvers.proximal(prox), hg.methods.gradient_descent(optax.sgd(1.0), 1e-11)

    def value_at(h):
        return hg.minimize(problem, at(h), TRAIN, VALID, max_steps=1, inner_solver=solver, method=method)

    start = np.log(0.3)
    found, step = value_at(start), 1e-4
    pinned = np.isclose(np.abs(found.params), 0.3) if kind == "box" else np.asarray(found.params) == 0
    assert pinned.any()
    assert not pinned.all()
    measured = (float(value_at(start + step).value) - float(value_at(start - step).value)) / (2 * step)
    assert float(found.history.hypergrad_norm[0]) == pytest.approx(abs(measured), rel=1e-5)
    tuned = hg.minimize(problem, at(start), TRAIN, VALID, inner_solver=solver, max_steps=20)
    grid = min(float(value_at(h).value) for h in np.linspace(-4.0, 1.0, 21))
    assert float(tuned.value) <= 1.01 * grid


@pytest.mark.slow
def test_stateful_problems_and_keys(x64):
    """The model state is held fixed, and one key gives one mask."""

    def inner(w, h, batch, key, state):
        mask = jax.random.bernoulli(key, 0.8, batch[0].shape)
        return error(w, (batch[0] * mask * state["scale"], batch[1])) + hg.penalties.l2(w, jnp.exp(h)), state

    outer = lambda w, h, batch, key, state: (error(w, batch), state)  # noqa: E731
    problem = hg.BilevelProblem(inner, outer, stateful=True)
    options = {"model_state": {"scale": jnp.ones(())}, "key": 0}
    one, two = (hg.minimize(problem, at(0.0), TRAIN, VALID, **options) for _ in range(2))
    assert bool(one.converged)
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"method": "hoag"}, TypeError, "method to be of type Method"),
        ({"inner_solver": optax.adam(0.1)}, TypeError, "inner_solver to be of type InnerSolver"),
        ({"linear_solver": 3}, TypeError, "linear_solver to be of type LinearSolver"),
        ({"max_steps": 0}, ValueError, "max_steps"),
        ({"tol": -1.0}, ValueError, "tol"),
        ({"callback": 3}, TypeError, "callback to be callable"),
        ({"model_state": {"a": 1.0}}, ValueError, "no model_state"),
    ],
)
def test_bad_arguments_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        run(**options)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: hg.methods.hoag(0.0), "tolerance"),
        (lambda: hg.methods.hoag(decay=1.0), "decay below 1"),
        (lambda: hg.methods.gradient_descent(optax.sgd(1.0), 0.0), "tolerance"),
        (lambda: hg.methods.gradient_descent("adam"), "optimizer"),
        (lambda: hg.methods.lbfgs(memory_size=0), "memory_size"),
        (lambda: hg.methods.lbfgs(max_length=0.0), "max_length"),
    ],
)
def test_bad_settings_of_methods_are_refused(make, words):
    with pytest.raises((TypeError, ValueError), match=words):
        make()


@pytest.mark.slow
def test_lbfgs_leaves_a_region_where_the_loss_curves_down(x64):
    """From a decay of e⁵ and of e¹⁰ the hypergradient is small and the loss concave: steps must grow."""
    best = min(ridge_value(h) for h in np.linspace(-8, 8, 400))
    for start, most in ((5.0, 15), (10.0, 25)):
        found = run(start=start, method=hg.methods.lbfgs(), max_steps=most, tol=1e-6)
        assert float(found.value) <= 1.001 * best
        assert float(found.history.step_size.max()) > 4.0
    near = run(start=-1.0, method=hg.methods.lbfgs(), tol=1e-6)
    assert bool(near.converged)
    assert int(near.num_steps) <= 10


def test_the_message_names_a_hyperparameter_that_runs_off(x64):
    far = run(start=9.0, method=hg.methods.gradient_descent(optax.sgd(0.0)), max_steps=2)
    assert "An unconstrained hyperparameter is at ±9" in far.message
    assert "runs off" not in run().message
