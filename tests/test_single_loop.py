"""SOBA and BO-REP as recipes of public pieces: invariant to the scale of the outer loss, and good at data cleaning."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

import hypergrad as hg


def bo_rep(problem, variables, inner_batch, outer_batch, *, steps, every=2, inner_steps=5, rate=0.5, length=0.3):
    """Return the hyperparameters of each iteration."""
    estimate = hg.value_and_hypergrad(hg.implicit(problem, hg.solvers.richardson(1)))
    inner = optax.sgd(rate)
    outer = optax.chain(
        optax.ema(0.9, debias=False),
        hg.optimizers.normalize_by_update_norm(eps=1e-30),
        optax.scale_by_learning_rate(optax.exponential_decay(length, steps // 3, 0.5)),
    )

    @jax.jit
    def train(params, hyperparams):
        def step(params, _):
            grads = jax.grad(problem.inner_loss)(params, hyperparams, inner_batch, None)
            return optax.apply_updates(params, inner.update(grads, inner.init(params), params)[0]), None

        return jax.lax.scan(step, params, length=inner_steps)[0]

    @jax.jit
    def outer_step(params, hyperparams, outer_state, linear_state):
        (_, hypergrad), info = estimate(params, hyperparams, inner_batch, outer_batch, key=None, state=linear_state)
        updates, outer_state = outer.update(hypergrad, outer_state, hyperparams)
        return optax.apply_updates(hyperparams, updates), outer_state, info.state

    params, hyperparams = variables
    outer_state, linear_state, path = outer.init(hyperparams), None, []
    for k in range(steps):
        if k % every == 0:
            params = train(params, hyperparams)
        hyperparams, outer_state, linear_state = outer_step(params, hyperparams, outer_state, linear_state)
        path.append(hyperparams)
    return path


@pytest.mark.parametrize("scale", [1e-3, pytest.param(1e3, marks=pytest.mark.slow)])
def test_bo_rep_does_not_see_the_scale_of_the_outer_loss(scale, x64):
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(40, 5))), jnp.asarray(rng.normal(size=40))
    error = lambda w, rows: 0.5 * jnp.mean((x[rows] @ w - y[rows]) ** 2)  # noqa: E731
    inner = lambda w, h, b, k: error(w, slice(20)) + hg.penalties.l2(w, jnp.exp(h))  # noqa: E731
    at = hg.BilevelParams(jnp.zeros(5), jnp.zeros(5))
    paths = [
        bo_rep(hg.BilevelProblem(inner, lambda w, h, b, k, s=s: s * error(w, slice(20, 40))), at, (), (), steps=30)
        for s in (1.0, scale)
    ]
    assert float(jnp.abs(paths[0][-1]).max()) > 0.5  # it moves
    np.testing.assert_allclose(np.stack(paths[0]), np.stack(paths[1]), atol=1e-9)


@pytest.mark.slow
def test_bo_rep_and_soba_find_wrong_labels():
    """Softmax regression on 1,000 digits, 40 % of the labels wrong: area under the ROC curve of the weights."""
    rng = np.random.default_rng(0)
    images, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(labels))
    x, y = jnp.asarray(images[order] / 16.0, jnp.float32), labels[order]
    wrong = rng.random(1000) < 0.4
    noisy = jnp.asarray(np.where(wrong, (y[:1000] + rng.integers(1, 10, 1000)) % 10, y[:1000]))
    train, valid = (x[:1000], noisy), (x[1000:1400], jnp.asarray(y[1000:1400]))
    losses = lambda w, b: optax.losses.softmax_cross_entropy_with_integer_labels(b[0] @ w, b[1])  # noqa: E731
    problem = hg.BilevelProblem(
        lambda w, h, b, k: jnp.mean(h * losses(w, b)) + hg.penalties.l2(w, 1e-3),
        lambda w, h, b, k: losses(w, b).mean(),
    )
    problem = hg.reparameterize(problem, hg.bijectors.sigmoid())
    start = hg.BilevelParams(jnp.zeros((64, 10)), jnp.zeros(1000))
    path = bo_rep(problem, start, train, valid, steps=600, rate=1.0, length=1.0)
    assert roc_auc_score(wrong, -path[-1]) >= 0.90

    soba = hg.implicit(problem, hg.solvers.richardson(1))
    tx = hg.bilevel(soba, inner_optimizer=optax.sgd(1.0), outer_optimizer=optax.adam(0.05))
    state, variables, update = tx.init(start), start, jax.jit(tx.update)
    for _ in range(600):
        updates, state = update(None, state, variables, inner_batch=train, outer_batch=valid)
        variables = optax.apply_updates(variables, updates)
    assert roc_auc_score(wrong, -variables.hyperparams) >= 0.90
