"""Priors on hyperparameters, and the warning where many hyperparameters have none."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad import data
from hypergrad.problem import evaluate_outer

WARNED = pytest.warns(hg.OverfittingWarning, match="12 hyperparameters are learned from")


def loss(params, decay, batch, _key=None):
    x, y = batch
    return jnp.mean((x @ params - y) ** 2) + hg.penalties.l2(params, jnp.exp(decay))


def outer_loss(params, _decay, batch, _key=None):
    return jnp.mean((batch[0] @ params - batch[1]) ** 2)


PROBLEM = hg.BilevelProblem(loss, outer_loss)


def batch(size, seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return jax.random.normal(keys[0], (size, 12)), jax.random.normal(keys[1], (size,))


def call(problem, outer, start=0.0, solver=hg.solvers.identity()):  # noqa: B008
    decay = jnp.full(12, start)
    at = jnp.zeros(12), decay, batch(20), outer
    return hg.value_and_hypergrad(hg.implicit(problem, solver))(*at, key=None)[0]


def quietly(fn, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return fn(*args)


def test_normal_is_half_the_squared_distance_in_scales():
    """Against jax.scipy's density, whose constant is that at the mean."""
    start = {"a": jnp.arange(3.0), "b": jnp.array(2.0)}
    at = {"a": jnp.array([1.0, -1.0, 4.0]), "b": jnp.array(0.5)}
    logpdf = lambda x, mean: jnp.sum(jax.scipy.stats.norm.logpdf(x, mean, 0.7))  # noqa: E731
    expected = sum(jax.tree.leaves(jax.tree.map(lambda x, m: logpdf(m, m) - logpdf(x, m), at, start)))
    np.testing.assert_allclose(hg.priors.normal(start, 0.7)(at), expected, rtol=1e-5)
    np.testing.assert_allclose(hg.priors.normal(0.0, 2.0)(at), (1 + 1 + 16 + 0.25) / 8, rtol=1e-6)


def test_shared_mean_leaves_the_mean_of_a_leaf_free():
    at = {"a": jnp.array([1.0, 3.0, 8.0]), "b": jnp.array([5.0, 7.0])}
    prior = hg.priors.shared_mean(0.5)
    np.testing.assert_allclose(prior(at), 0.5 * (9 + 1 + 16 + 1 + 1) / 0.25, rtol=1e-6)
    np.testing.assert_allclose(prior(jax.tree.map(lambda x: x + 3.0, at)), prior(at), rtol=1e-6)
    assert all(abs(float(g.sum())) < 1e-5 for g in jax.tree.leaves(jax.grad(prior)(at)))


def test_with_prior_adds_it_to_value_and_hypergradient():
    with jax.enable_x64(True):
        problem = hg.with_prior(PROBLEM, hg.priors.normal(0.3, 2.0), num_examples=40)
        value, gradient = call(PROBLEM, batch(40, 1), -1.0, hg.solvers.dense())
        new_value, new_gradient = call(problem, batch(40, 1), -1.0, hg.solvers.dense())
        np.testing.assert_allclose(new_value - value, 12 * 1.3**2 / 8 / 40, rtol=1e-10)
        np.testing.assert_allclose(new_gradient - gradient, np.full(12, -1.3 / 4 / 40), rtol=1e-8)


def test_with_prior_sees_the_hyperparameters_of_the_given_problem():
    exp, prior = hg.bijectors.exp(), hg.priors.normal(0.0)
    base = hg.BilevelProblem(lambda w, h, b, k: jnp.sum(w * h), lambda w, h, b, k: jnp.sum(w))
    before = hg.reparameterize(hg.with_prior(base, prior, num_examples=1), exp)
    after = hg.with_prior(hg.reparameterize(base, exp), prior, num_examples=1)
    both = hg.with_prior(after, prior, num_examples=4)
    at = hg.BilevelParams(jnp.zeros(1), jnp.array([2.0]))
    for problem, expected in ((before, 0.5 * np.exp(2.0) ** 2), (after, 2.0), (both, 2.5)):
        np.testing.assert_allclose(evaluate_outer(problem, at, None, None, ()).value, expected, rtol=1e-6)


@pytest.mark.parametrize("flags", [{"has_aux": True}, {"stateful": True}, {"has_aux": True, "stateful": True}])
def test_with_prior_keeps_aux_and_model_state(flags):
    extra = (jnp.ones(2), "aux") if len(flags) == 2 else jnp.ones(2)
    outer = lambda w, h, b, k, s=None: (jnp.sum(w), extra)  # noqa: E731
    problem = hg.with_prior(hg.BilevelProblem(outer, outer, **flags), hg.priors.normal(0.0), num_examples=2)
    state = jnp.zeros(2) if problem.stateful else ()
    found = evaluate_outer(problem, hg.BilevelParams(jnp.ones(2), jnp.full(2, 2.0)), None, None, state)
    assert float(found.value) == 4.0
    np.testing.assert_array_equal(found.model_state if problem.stateful else found.aux, jnp.ones(2))


def test_a_loss_of_another_form_is_told_as_without_a_prior():
    outer = lambda w, h, b, k: (jnp.sum(w * h), None)  # noqa: E731
    problem = hg.with_prior(hg.BilevelProblem(loss, outer), hg.priors.normal(0.0), num_examples=2)
    with pytest.raises(TypeError, match="has_aux"):
        call(problem, batch(20))


@pytest.mark.parametrize(("size", "learns_scale"), [(6, False), (6, True)])
def test_the_prior_of_a_self_tuned_problem_counts_once_per_batch(size, learns_scale):
    """Its hyperparameters are broadcast to the examples inside the losses, and perturbed: the prior sees neither."""
    model, x = nn.Dense(2), jnp.ones((size, 3))

    def outer(params, strength, batch, _key):
        return jnp.mean(model.apply({"params": params}, batch) ** 2) + 0.0 * jnp.mean(strength)

    base, center = hg.BilevelProblem(outer, outer), jnp.array([1.0, 2.0, 3.0])
    scale = hg.responses.learned_scale() if learns_scale else 0.5
    at = hg.responses.HyperparamsWithScale(center, jnp.full(3, -0.5)) if learns_scale else center
    values = []
    for problem in (base, hg.with_prior(base, hg.priors.normal(0.0), num_examples=10)):
        tuned = hg.responses.perturbed(hg.responses.self_tuning(problem), scale=scale)
        start = hg.responses.init(tuned, 0, model.init(jax.random.key(0), x)["params"], at, x)
        values.append(evaluate_outer(tuned, hg.BilevelParams(start, at), x, jax.random.key(1), ()).value)
    np.testing.assert_allclose(values[1] - values[0], 0.7, rtol=1e-4)


def test_warns_where_hyperparameters_outnumber_the_examples_of_the_data_set():
    examples = batch(11)
    with WARNED as found:
        call(PROBLEM, hg.IndexedBatch(examples, jnp.arange(40) % 11))
    assert "from 11 validation examples without a prior" in str(found[0].message)
    quietly(call, PROBLEM, hg.IndexedBatch(batch(12), jnp.arange(4)))


def test_warns_where_hyperparameters_outnumber_a_batch_tenfold():
    """A plain batch may be a small part of the validation set."""
    with WARNED:
        call(PROBLEM, batch(1))
    quietly(call, PROBLEM, batch(2))


@pytest.mark.parametrize(
    ("outer", "expected"),
    [
        (hg.IndexedBatch((jnp.ones((10, 64, 4)), jnp.ones((10, 64))), jnp.array(3)), (True, 640)),
        ({"x": jnp.ones((4000, 3)), "centers": hg.IndexedBatch(jnp.ones((10, 3)), jnp.arange(2))}, (False, 4000)),
        ({"key": jax.random.key(0), "raw": jnp.zeros(2, jnp.uint32)}, (False, 0)),
        ({"x": jnp.ones((7, 2)), "keys": jax.random.split(jax.random.key(0), 30)}, (False, 7)),
        ((), (False, 0)),
        ("name", (False, 0)),
        (3.0, (False, 0)),
    ],
)
def test_examples_of_a_batch_are_counted(outer, expected):
    assert data.num_examples(outer) == expected


def test_warns_once_for_a_run_of_bilevel():
    tx = hg.bilevel(hg.implicit(PROBLEM), inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.sgd(0.1), every=2)
    variables = hg.BilevelParams(jnp.zeros(12), jnp.zeros(12))
    state = tx.init(variables)
    with WARNED as found:
        for _ in range(4):
            _, state = tx.update(None, state, variables, inner_batch=batch(20), outer_batch=batch(1))
    assert len(found) == 1


def test_no_warning_with_a_prior_or_without_data():
    problem = hg.with_prior(PROBLEM, hg.priors.normal(0.0), num_examples=1)
    quietly(call, problem, batch(1))
    quietly(call, hg.reparameterize(problem, hg.bijectors.interval(-5.0, 5.0)), batch(1))
    toy = hg.BilevelProblem(lambda w, h, b, k: jnp.sum((w - h) ** 2), lambda w, h, b, k: jnp.sum(w**2))
    quietly(call, toy, ())


def test_bad_input_is_refused():
    prior = hg.priors.normal(0.0)
    with pytest.raises(ValueError, match=r"scale.*0"):
        hg.priors.normal(0.0, 0.0)
    with pytest.raises(ValueError, match=r"scale.*-1"):
        hg.priors.shared_mean(-1.0)
    with pytest.raises(ValueError, match="num_examples to be at least 1"):
        hg.with_prior(PROBLEM, prior, num_examples=0)
    with pytest.raises(TypeError, match="a Python int"):
        hg.with_prior(PROBLEM, prior, num_examples=10.0)  # pyright: ignore
    with pytest.raises(TypeError, match="prior to be callable"):
        hg.with_prior(PROBLEM, 1.0, num_examples=10)  # pyright: ignore
    with pytest.raises(TypeError, match="BilevelProblem"):
        hg.with_prior(loss, prior, num_examples=10)  # pyright: ignore
    with pytest.raises(ValueError, match="prior to return a scalar"):
        call(hg.with_prior(PROBLEM, lambda h: h, num_examples=10), batch(20))
    with pytest.raises(ValueError, match="mean"):
        hg.priors.normal({"a": jnp.zeros(3)})({"b": jnp.zeros(3)})


@pytest.mark.parametrize("prior", [hg.priors.normal(0.0, 1.0), hg.priors.shared_mean(1.0)])
@pytest.mark.parametrize("estimator", [hg.implicit, hg.unrolled])
def test_a_prior_hides_no_hyperparameter_that_a_method_cannot_see(prior, estimator):
    """A prior has a derivative in every leaf. That says nothing of the validation loss."""
    inner = lambda w, h, b, k: 0.5 * jnp.sum(jnp.exp(h["decay"]) * w**2) - jnp.sum(w * b)  # noqa: E731
    problem = hg.BilevelProblem(inner, lambda w, h, b, k: jnp.sum((w - b) ** 2))
    problem = hg.with_prior(problem, prior, num_examples=10)
    hyperparams = {"decay": jnp.full(3, 0.3), "rate": jnp.array(-3.0)}
    optimizer = None if estimator is hg.implicit else optax.sgd(0.1)
    batch = jnp.ones(3) if optimizer is None else jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"\['rate'\], which enters neither"):
        hg.hypergrad(estimator(problem), optimizer)(jnp.ones(3), hyperparams, batch, jnp.ones(3), key=None)
