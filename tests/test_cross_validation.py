"""K folds as one problem: the sum of the folds alone, and scikit-learn's answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LassoCV
from sklearn.model_selection import KFold

import hypergrad as hg

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 6))
Y = X @ (RNG.normal(size=6) * (np.arange(6) < 3)) + RNG.normal(size=60)


def error(w, batch):
    return 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2)


def train_loss(w, log_decay, batch, key):
    return error(w, batch) + hg.penalties.l2(w, jnp.exp(log_decay))


RIDGE = hg.BilevelProblem(train_loss, lambda w, log_decay, batch, key: error(w, batch))
EQUAL, UNEQUAL = list(KFold(4).split(X)), list(KFold(7).split(X))


def closed_form(log_decay, folds):
    """Return the mean validation loss over folds, each solved by numpy."""
    losses = []
    for train, valid in folds:
        x, y = X[train], Y[train]
        w = np.linalg.solve(x.T @ x / len(x) + np.exp(log_decay) * np.eye(6), x.T @ y / len(x))
        losses.append(0.5 * np.mean((X[valid] @ w - Y[valid]) ** 2))
    return np.mean(losses)


@pytest.mark.parametrize("folds", [EQUAL, pytest.param(UNEQUAL, marks=pytest.mark.slow)], ids=["equal", "unequal"])
def test_it_finds_the_decay_of_the_closed_form(folds, x64):
    problem = hg.cross_validation(RIDGE, folds)
    start = hg.BilevelParams(jnp.zeros((len(folds), 6)), jnp.array(0.0))
    found = hg.minimize(problem, start, (X, Y), (X, Y), method=hg.methods.lbfgs(1e-9), tol=1e-6)
    assert bool(found.converged)
    h, step = float(found.hyperparams), 1e-4
    assert float(found.value) == pytest.approx(closed_form(h, folds), rel=1e-8)
    assert abs(closed_form(h + step, folds) - closed_form(h - step, folds)) / (2 * step) < 2e-6
    first = hg.value_and_hypergrad(hg.implicit(problem, hg.solvers.cg(100)))
    solved = hg.diagnostics.solve_inner(problem, start, (X, Y)).params
    (value, slope), _ = first(solved, start.hyperparams, (X, Y), (X, Y), key=None)
    measured = (closed_form(step, folds) - closed_form(-step, folds)) / (2 * step)
    assert float(value) == pytest.approx(closed_form(0.0, folds), rel=1e-9)
    assert float(slope) == pytest.approx(measured, rel=1e-5)


@pytest.mark.slow
def test_keys_and_aux_are_those_of_the_folds(x64):
    def loss(w, h, batch, key):
        value = jnp.sum(w) * jax.random.uniform(key) * jnp.mean(batch[1])
        return value, {"rows": batch[1][0]}

    for folds in (EQUAL, UNEQUAL):
        problem = hg.cross_validation(hg.BilevelProblem(loss, loss, has_aux=True), folds)
        w, key = jnp.arange(float(len(folds))), jax.random.key(3)
        inner, aux = problem.inner_loss(w, 0.0, (X, Y), key)
        alone = [
            loss(w[k], 0.0, (X[train], Y[train]), jax.random.fold_in(key, k)) for k, (train, _) in enumerate(folds)
        ]
        assert float(inner) == pytest.approx(float(sum(value for value, _ in alone)), rel=1e-9)
        rows = [part["rows"] for part in aux] if isinstance(aux, tuple) else list(aux["rows"])
        np.testing.assert_allclose(rows, [part["rows"] for _, part in alone])
        outer, _ = problem.outer_loss(w, 0.0, (X, Y), key)
        held = [
            loss(w[k], 0.0, (X[valid], Y[valid]), jax.random.fold_in(key, k))[0] for k, (_, valid) in enumerate(folds)
        ]
        assert float(outer) == pytest.approx(float(sum(held)) / len(folds), rel=1e-9)


def test_a_prior_counts_once(x64):
    prior = hg.with_prior(RIDGE, hg.priors.normal(3.0, 1.0), num_examples=10)
    at = hg.BilevelParams(jnp.zeros((4, 6)), jnp.array(0.0))
    values = [
        float(hg.value_and_hypergrad(hg.implicit(hg.cross_validation(p, EQUAL)))(*at, (X, Y), (X, Y), key=None)[0][0])
        for p in (RIDGE, prior)
    ]
    assert values[1] - values[0] == pytest.approx(0.5 * 9.0 / 10)


@pytest.mark.parametrize("folds", [EQUAL, pytest.param(UNEQUAL, marks=pytest.mark.slow)], ids=["equal", "unequal"])
def test_the_lasso_beside_scikit_learn(folds, x64):
    """``LassoCV`` on a fine grid of strengths, with the same folds."""

    def prox(w, strength, step):
        return jnp.sign(w) * jnp.maximum(jnp.abs(w) - step * strength, 0.0)

    squares = hg.BilevelProblem(lambda w, h, batch, key: error(w, batch), lambda w, h, batch, key: error(w, batch))
    lasso = hg.with_residual(squares, hg.residuals.proximal_gradient(squares, prox, 0.3))
    problem = hg.reparameterize(hg.cross_validation(lasso, folds), hg.bijectors.exp())
    start = hg.BilevelParams(jnp.zeros((len(folds), 6)), jnp.log(0.3))
    found = hg.minimize(problem, start, (X, Y), (X, Y), inner_solver=hg.inner_solvers.proximal(prox), max_steps=25)
    grid = LassoCV(alphas=np.geomspace(1e-3, 1.0, 200), fit_intercept=False, cv=folds, tol=1e-10).fit(X, Y)
    best = 0.5 * grid.mse_path_.mean(axis=1).min()
    assert float(found.value) <= 1.01 * best


def test_what_it_does_not_take_is_refused():
    stateful = hg.BilevelProblem(lambda w, h, b, k, s: (w, s), lambda w, h, b, k, s: (w, s), stateful=True)
    with pytest.raises(ValueError, match="without model state"):
        hg.cross_validation(stateful, EQUAL)
    with pytest.raises(ValueError, match="two folds or more"):
        hg.cross_validation(RIDGE, EQUAL[:1])
    with pytest.raises(TypeError, match="folds of pairs"):
        hg.cross_validation(RIDGE, [3, 4])
    with pytest.raises(TypeError, match="row numbers"):
        hg.cross_validation(RIDGE, [(np.ones(3), np.ones(3, int)), EQUAL[0]])
    problem = hg.cross_validation(RIDGE, EQUAL)
    with pytest.raises(ValueError, match="a leading axis of 4 folds"):
        problem.inner_loss(jnp.zeros(6), jnp.array(0.0), (X, Y), None)


def test_rows_beyond_the_data_are_refused():
    error = lambda w, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2)  # noqa: E731
    problem = hg.BilevelProblem(
        lambda w, h, batch, key: error(w, batch) + jnp.exp(h) * jnp.sum(w**2), lambda w, h, batch, key: error(w, batch)
    )
    rows = np.arange(12)
    folds = hg.cross_validation(problem, [(rows[rows % 3 != k], rows[rows % 3 == k]) for k in range(3)])
    part = jnp.ones((10, 2)), jnp.ones(10)
    with pytest.raises(ValueError, match=r"a batch with row 11.*got 10 examples.*whole data"):
        hg.minimize(folds, hg.BilevelParams(jnp.zeros((3, 2)), jnp.array(0.0)), part, part)
