"""Learned optimizers: an optax transformation of weights of any shape, trained by any estimator."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import hypergrad as hg

NETWORK = hg.optimizers.per_parameter_mlp(8, step=0.01)
W = {"a": np.array([[1.0, -2.0], [0.5, 3.0]]), "b": np.array([0.3]), "c": np.array(-1.0)}


def learned(theta, **options):
    return hg.optimizers.learned(NETWORK.apply, theta, **options)


def loss(w, h, batch, key):
    return 0.5 * jnp.sum(w["a"] ** 2) + 3.0 * jnp.sum((w["b"] - 1.0) ** 2) + w["c"] ** 2


def steps(tx, count, scale=1.0):
    """Return all updates of some steps, on gradients of the loss times a number."""
    w = jax.tree.map(jnp.asarray, W)
    state, found = tx.init(w), []
    for _ in range(count):
        grads = jax.tree.map(lambda g: scale * g, jax.grad(loss)(w, None, None, None))
        updates, state = tx.update(grads, state, w)
        w = optax.apply_updates(w, updates)
        found.append(updates)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_updates_do_not_depend_on_the_scale_of_the_loss(scale, x64):
    theta = NETWORK.init(0)
    one, other = (steps(learned(theta), 5, s) for s in (1.0, scale))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-8), one, other)


def test_features_are_what_an_optimizer_knows(x64):
    """The features of the second step, by numpy: averages without bias, mean square 1 over the leaf."""
    seen = []

    def apply(theta, features):
        seen.append(np.asarray(features))
        return jnp.zeros(features.shape[:-1])

    tx, w = hg.optimizers.learned(apply, ()), jnp.array([2.0, 1.0, -1.0])
    first, second = np.array([1.0, 0.0, 2.0]), np.array([-1.0, 0.5, 2.0])
    _, state = tx.update(jnp.asarray(first), tx.init(w), w)
    tx.update(jnp.asarray(second), state, w)
    average = lambda d: ((1 - d) * d * first + (1 - d) * second) / (1 - d**2)  # noqa: E731
    square = (0.001 * 0.999 * first**2 + 0.001 * second**2) / (1 - 0.999**2)
    moments = [average(d) for d in (0.5, 0.9, 0.99)]
    wanted = [np.asarray(w), second, *moments, second / np.sqrt(square), *(m / np.sqrt(square) for m in moments)]
    wanted.append(1 / np.sqrt(square))
    for place, feature in enumerate(wanted):
        np.testing.assert_allclose(seen[1][:, place], feature / np.sqrt(np.mean(feature**2)), rtol=1e-6)
    times = np.tanh(2 / np.array([3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4]) - 1)
    np.testing.assert_allclose(seen[1][0, len(wanted) :], times, rtol=1e-6)


def test_state_is_four_copies_and_dtypes_stay():
    w = {"a": jnp.ones((3, 2), jnp.bfloat16), "b": jnp.ones(2)}
    tx = learned(NETWORK.init(0))
    state = tx.init(w)
    assert sum(np.size(leaf) for leaf in jax.tree.leaves(state)) == 4 * 8 + 1
    updates, new = jax.jit(tx.update)(w, state, w)
    for one, other in ((updates, w), (new, state)):
        assert jax.tree.map(lambda x: x.dtype, one) == jax.tree.map(lambda x: x.dtype, other)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(updates))


def test_averages_of_bfloat16_gradients_are_float32():
    """0.999 is 1 in bfloat16: an average of that dtype would never forget."""
    w = jnp.ones(2, jnp.bfloat16)
    tx = learned(NETWORK.init(0))
    state, update = tx.init(w), jax.jit(tx.update)
    for size in [10.0] * 5 + [0.01] * 200:
        _, state = update(jnp.full(2, size, jnp.bfloat16), state, w)
    assert state.squares.dtype == jnp.float32
    np.testing.assert_allclose(state.squares, 0.5 * 0.998 * 0.999**200, rtol=0.01)


@pytest.mark.slow
def test_strict_settings_and_a_leaf_without_entries():
    w = {"a": jnp.ones((3, 2), jnp.bfloat16), "b": jnp.ones((0,)), "c": jnp.ones(())}
    tx = learned(NETWORK.init(0), widths={"a": jnp.ones((1, 2)), "b": 1.0, "c": 2.0})
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
        updates, _ = tx.update(w, tx.init(w), w)
    assert updates["b"].shape == (0,)


@pytest.mark.slow
def test_a_gradient_of_zero_gives_finite_updates_and_derivatives():
    w = jnp.ones(3)

    def moved(theta):
        tx = learned(theta)
        return jnp.sum(tx.update(jnp.zeros(3), tx.init(w), w)[0])

    value, slope = jax.value_and_grad(moved)(NETWORK.init(0))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((value, slope)))


@pytest.mark.slow
def test_widths_divide_updates():
    theta = NETWORK.init(0)
    (plain,) = steps(learned(theta), 1)
    (divided,) = steps(learned(theta, widths={"a": 4.0, "b": 1.0, "c": 1.0}), 1)
    np.testing.assert_allclose(divided["a"], plain["a"] / 4.0, rtol=1e-6)
    np.testing.assert_allclose(divided["b"], plain["b"], rtol=1e-6)


@pytest.mark.slow
def test_the_mu_variant_starts_at_rest():
    network = hg.optimizers.per_parameter_mlp(8, mu_scaled=True)
    (updates,) = steps(hg.optimizers.learned(network.apply, network.init(0)), 1)
    assert float(optax.tree.norm(updates)) == 0.0
    slope = jax.grad(lambda theta: jnp.sum(network.apply(theta, jnp.ones((2, 19)))))(network.init(0))
    assert float(jnp.abs(slope["w2"]).max()) > 0


PROBLEM = hg.BilevelProblem(loss, loss)
BEGIN = hg.BilevelParams(W, NETWORK.init(1))


@pytest.mark.slow
def test_its_hypergradient_equals_differences(x64):
    theta = jax.tree.map(lambda x: jnp.asarray(x, float), NETWORK.init(1))
    w = jax.tree.map(jnp.asarray, W)
    fn = hg.value_and_hypergrad(hg.unrolled(PROBLEM), learned)
    batches = hg.IndexedBatch((), jnp.arange(8))
    (_, grad), _ = fn(w, theta, batches, (), key=None)
    direction = jax.tree.map(lambda g: jax.random.normal(jax.random.key(g.size), g.shape), grad)
    value_at = lambda t: fn(w, optax.tree.add(theta, optax.tree.scale(t, direction)), batches, (), key=None)[0][0]  # noqa: E731
    measured = (float(value_at(1e-5)) - float(value_at(-1e-5))) / 2e-5
    assert float(optax.tree.vdot(grad, direction)) == pytest.approx(measured, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        hg.unrolled,
        pytest.param(
            lambda problem: hg.evolution(problem, sigma=0.05, num_pairs=16, persistent=True, horizon=20),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["unrolled", "evolution"],
)
def test_it_is_meta_trained_by_one_line_or_another(make):
    """From fresh weights each time, 20 steps of the trained optimizer end lower than 20 of the untrained one."""
    tx = hg.bilevel(make(PROBLEM), inner_optimizer=learned, outer_optimizer=optax.adam(0.02), window=20, key=0)
    begin = jax.tree.map(jnp.asarray, BEGIN)
    none = hg.IndexedBatch((), jnp.arange(20))

    @jax.jit
    def episode(theta, state):
        variables = hg.BilevelParams(begin.params, theta)
        updates, state = tx.update(None, state, variables, inner_batch=none, outer_batch=())
        return optax.apply_updates(variables, updates).hyperparams, state

    first = state = tx.init(begin)
    theta, losses = begin.hyperparams, []
    for _ in range(80):
        theta, state = episode(theta, state._replace(inner=first.inner))
        losses.append(float(state.info.outer_loss))
    assert losses[-1] < 0.2 * losses[0]
    assert int(state.info.num_skipped) == 0


def test_in_a_train_state():
    state = TrainState.create(apply_fn=None, params=jax.tree.map(jnp.asarray, W), tx=learned(NETWORK.init(0)))
    state = state.apply_gradients(grads=state.params)
    assert int(state.opt_state.num_steps) == 1


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: hg.optimizers.per_parameter_mlp(0), ValueError, "hidden"),
        (lambda: hg.optimizers.per_parameter_mlp(step=0.0), ValueError, "step"),
        (lambda: hg.optimizers.learned(3, ()), TypeError, "apply to be callable"),
        (lambda: learned(NETWORK.init(0)).update(W, learned(NETWORK.init(0)).init(W)), ValueError, "params"),
        (lambda: NETWORK.init(None), TypeError, "key"),
    ],
)
def test_bad_arguments_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
