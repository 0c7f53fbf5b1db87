"""The protocol holds what comes next: three small estimators, each exact where theory says so, in both drivers."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from tests.problems import relative_error, window_of
from tests.toys import evolution, langevin, partition

TARGET = jnp.array([1.0, -2.0])


def inner(w, h, batch, key):
    """w*(λ) = decayed λ: a quadratic whose solution is λ/(1 + e^decay)."""
    return 0.5 * jnp.sum((w - h["center"]) ** 2) + 0.5 * jnp.exp(h["log_decay"]) * jnp.sum(w**2) + 0.0 * jnp.sum(batch)


def outer(w, h, batch, key):
    """The distance to a target, which a batch may poison."""
    return 0.5 * jnp.sum((w - TARGET) ** 2) + jnp.sum(batch)


PROBLEM = hg.BilevelProblem(inner, outer)
START = hg.BilevelParams(jnp.zeros(2), {"center": jnp.array([0.5, 0.5]), "log_decay": jnp.array(-1.0)})
BATCH = jnp.zeros(1)
WINDOW = 3


def split(problem):
    """Centre by implicit differentiation, decay by unrolling."""
    parts = {"solve": hg.implicit(problem, hg.solvers.cg(5)), "steps": hg.unrolled(problem)}
    return partition(parts, {"center": "solve", "log_decay": "steps"})


TOYS = {
    "evolution": lambda problem: evolution(problem, sigma=0.05, num_pairs=8),
    "first_order": lambda problem: hg.first_order(problem, penalty=10.0),
    "langevin": lambda problem: langevin(problem, num_chains=8, step_size=0.05, temperature=0.1),
    "partition": split,
}
rows = pytest.mark.parametrize("name", TOYS)


class Run(NamedTuple):
    """A compiled run of one toy."""

    tx: Any
    step: Any


@functools.cache
def run(name) -> Run:
    """Return the transformation and its compiled step, made once per toy."""
    options = {"inner_optimizer": optax.sgd(0.3), "outer_optimizer": optax.adam(0.05), "window": WINDOW, "every": 2}
    tx = hg.bilevel(TOYS[name](PROBLEM), **options)

    @jax.jit
    def step(variables, state, outer_batch):
        batches = window_of(BATCH, WINDOW)
        updates, state = tx.update(None, state, variables, inner_batch=batches, outer_batch=outer_batch)
        return optax.apply_updates(variables, updates), state

    return Run(tx, step)


@rows
def test_it_improves_the_outer_loss(name):
    tx, step = run(name)
    variables, state = START, tx.init(START)
    before = float(outer(*START, BATCH, None))
    for _ in range(60):
        variables, state = step(variables, state, BATCH)
    assert float(outer(*variables, BATCH, None)) < 0.7 * before
    assert int(state.info.num_skipped) == 0
    assert int(state.info.step) == 60


@rows
def test_a_resumed_run_is_bit_identical(name):
    tx, step = run(name)
    variables, state = START, tx.init(START)
    for _ in range(3):
        variables, state = step(variables, state, BATCH)
    saved = jax.tree.map(np.asarray, (variables, state))
    for _ in range(3):
        variables, state = step(variables, state, BATCH)
    again, other = jax.tree.map(jnp.asarray, saved)
    for _ in range(3):
        again, other = step(again, other, BATCH)
    for a, b in zip(jax.tree.leaves((variables, state)), jax.tree.leaves((again, other)), strict=True):
        np.testing.assert_array_equal(a, b)


@rows
@pytest.mark.parametrize("poison", [jnp.nan, pytest.param(jnp.inf, marks=pytest.mark.slow)])
def test_a_poisoned_outer_batch_is_skipped_whole(name, poison):
    """Hyperparameters and outer state stay, the estimator stays usable, and the next good batch proceeds."""
    tx, step = run(name)
    variables, state = START, tx.init(START)
    for _ in range(3):
        variables, state = step(variables, state, BATCH)
    after, skipped = step(variables, state, jnp.full(1, poison))
    assert hg.SkipReason(int(skipped.info.skip_reason)) == hg.SkipReason.OUTER_LOSS
    assert int(skipped.info.num_skipped) == 1
    for a, b in zip(
        jax.tree.leaves((after.hyperparams, skipped.outer)),
        jax.tree.leaves((variables.hyperparams, state.outer)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    for leaf in jax.tree.leaves(skipped.estimator):
        assert np.isfinite(leaf).all()
    for _ in range(2):
        after, skipped = step(after, skipped, BATCH)
    assert not bool(skipped.info.skipped)
    assert relative_error(after.hyperparams, variables.hyperparams) > 0


@rows
def test_the_functional_form_returns_a_state_to_go_on_with(name):
    fn = hg.value_and_hypergrad(TOYS[name](PROBLEM), optax.sgd(0.3))
    batches = window_of(BATCH, WINDOW)
    (value, grad), info = fn(*START, batches, BATCH, key=0)
    assert jnp.isfinite(value)
    assert float(info.hypergrad_norm) > 0
    assert jax.tree.structure(grad) == jax.tree.structure(START.hyperparams)
    (_, second), _ = fn(*START, batches, BATCH, key=0, state=info.state)
    same = relative_error(second, grad) == 0
    assert same == (name == "partition")  # the others hold particles, a copy or chains, which have moved


def test_evolution_is_exact_for_a_quadratic_up_to_the_sample_of_its_noise(x64):
    """L_out is quadratic in λ here: an antithetic pair gives ε ⟨ε, ∇⟩/σ² exactly, within one window."""
    sigma, num_pairs = 0.3, 5
    base = hg.BilevelProblem(
        lambda w, h, b, k: 0.5 * jnp.sum((w - h) ** 2), lambda w, h, b, k: 0.5 * jnp.sum((w - 3.0) ** 2)
    )
    w, h = jnp.zeros(2), jnp.array([0.5, -1.0])
    batches, key = hg.IndexedBatch((), jnp.arange(WINDOW)), jax.random.key(4)
    fn = hg.value_and_hypergrad(evolution(base, sigma=sigma, num_pairs=num_pairs), optax.sgd(0.3))
    (_, got), info = fn(w, h, batches, (), key=key)
    exact = hg.hypergrad(hg.unrolled(base), optax.sgd(0.3))(w, h, batches, (), key=key)
    noise = sigma * jax.random.normal(jax.random.split(jax.random.split(key, 5)[3], 1)[0], (num_pairs, 2))
    want = jnp.mean(noise * (noise @ exact)[:, None], 0) / sigma**2
    assert relative_error(got, want) < 1e-10
    assert float(info.method.standard_error) > 0


def test_the_covariance_of_a_gaussian_is_its_derivative():
    """w ~ N(λ, T/a): d E[w]/dλ = 1. Tolerance: five standard errors of a covariance of 4,000 independent chains."""
    count, a, temperature = 4000, 2.0, 0.5
    base = hg.BilevelProblem(lambda w, h, b, k: 0.5 * a * (w - h) ** 2, lambda w, h, b, k: w)
    method = langevin(base, num_chains=count, step_size=0.05, temperature=temperature)
    tx = hg.bilevel(method, inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.sgd(0.0))
    variables, update = hg.BilevelParams(jnp.array(0.7), jnp.array(0.7)), jax.jit(tx.update)
    state = tx.init(variables)
    for _ in range(80):
        _, state = update(None, state, variables, inner_batch=(), outer_batch=())
    assert abs(float(state.info.outer_loss) - 0.7) < 5 * (temperature / a / count) ** 0.5
    # Euler steps of size η widen the variance by 1/(1 − ηa/2); a covariance of N Gaussians has relative error √(2/N).
    assert abs(float(state.info.hypergrad_norm) - 1 / (1 - 0.05 * a / 2)) < 5 * (2 / count) ** 0.5


@pytest.mark.slow
def test_a_partition_gives_each_leaf_what_its_estimator_alone_gives(x64):
    batches = window_of(BATCH, WINDOW)
    got = hg.hypergrad(split(PROBLEM), optax.sgd(0.3))(*START, batches, BATCH, key=0)
    solve = hg.hypergrad(hg.implicit(PROBLEM, hg.solvers.cg(5)), optax.sgd(0.3))(*START, batches, BATCH, key=0)
    steps = hg.hypergrad(hg.unrolled(PROBLEM), optax.sgd(0.3))(*START, batches, BATCH, key=0)
    assert relative_error(got["center"], solve["center"]) < 1e-10
    assert relative_error(got["log_decay"], steps["log_decay"]) < 1e-10
    info = hg.value_and_hypergrad(split(PROBLEM), optax.sgd(0.3))(*START, batches, BATCH, key=0)[1]
    assert int(info.solver.num_products) > 0  # found inside the partition's info
