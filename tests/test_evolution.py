"""Evolution strategies: unbiased, blind only to what a window ends, and honest about noise and lost pairs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from evosax import algorithms
from evosax.core import fitness_shaping
from jax.sharding import NamedSharding, PartitionSpec

import hypergrad as hg
from hypergrad.training import split_keys

pytestmark = pytest.mark.usefixtures("x64")
SGD = optax.sgd(0.1)


def pull(w, h, batch, key):
    return 0.5 * jnp.sum((w - h) ** 2)


# The loss is linear in λ through any number of steps: smoothing does not change its gradient.
LINEAR = hg.BilevelProblem(pull, lambda w, h, batch, key: jnp.sum(w))
SQUARE = hg.BilevelProblem(pull, lambda w, h, batch, key: jnp.sum(w**2) + jnp.sum(jnp.sin(h)))
START = np.array([1.0, -2.0]), np.array([0.5, 0.25])


def steps(count):
    return hg.IndexedBatch((), jnp.arange(count))


def estimate(estimator, key=0, *, at=START, count=5, optimizer=SGD, state=None):
    fn = hg.value_and_hypergrad(estimator, optimizer)
    (value, grad), info = fn(*at, steps(count), (), key=key, state=state)
    return value, grad, info


def test_it_is_unbiased_for_the_smoothed_loss():
    """The smoothed gradient of sin is cos(λ) exp(−σ²/2); that of the square is the exact one."""
    sigma, shrunk = 0.4, np.exp(-(0.4**2) / 2)
    _, exact, _ = estimate(hg.unrolled(SQUARE))
    of_sine = np.cos(START[1])
    wanted = np.asarray(exact) + (shrunk - 1) * of_sine
    _, grad, info = estimate(hg.evolution(SQUARE, sigma=sigma, num_pairs=10_000))
    error = np.asarray(info.method.standard_error)
    assert (np.abs(np.asarray(grad) - wanted) < 3 * error).all()
    assert (error < 0.03 * np.abs(wanted).max()).all()


def test_the_value_is_that_of_the_unperturbed_run():
    value, _, _ = estimate(hg.evolution(SQUARE, sigma=0.4, num_pairs=2))
    wanted, _, _ = estimate(hg.unrolled(SQUARE))
    assert float(value) == pytest.approx(float(wanted), rel=1e-12)


def test_persistent_particles_with_one_window_are_not_persistent():
    """With a life of one window, from the same weights, the two kinds are the same numbers."""
    options = {"sigma": 0.1, "num_pairs": 7}
    plain = hg.evolution(SQUARE, **options)
    lives = hg.evolution(SQUARE, **options, persistent=True, horizon=5)
    state = None
    for key in range(3):
        _, grad, _ = estimate(plain, key)
        _, same, info = estimate(lives, key, state=state)
        state = info.state
        np.testing.assert_array_equal(grad, same)
    assert int(info.method.num_restarts) == 14  # seven at each of the last two windows


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True])
def test_persistent_particles_see_past_the_window(persistent):
    """Windows of 2 steps over a life of 20: truncation sees 2 steps of λ's influence, persistence all of it."""
    estimator = hg.evolution(LINEAR, sigma=0.1, num_pairs=4000, persistent=persistent)
    rate, state, found, errors = 0.1, None, [], []
    for key in range(10):
        _, grad, info = estimate(estimator, key, count=2, state=state)
        state = info.state
        found.append(np.asarray(grad))
        errors.append(np.asarray(info.method.standard_error))
    seen = [1 - (1 - rate) ** (2 * (k + 1) if persistent else 2) for k in range(10)]
    for grad, error, wanted in zip(found, errors, seen, strict=True):
        assert (np.abs(grad - wanted) < 4 * error).all()
    whole = sum(1 - (1 - rate) ** (2 * (k + 1)) for k in range(10))
    share = np.sum(found, axis=0) / whole
    assert (np.abs(share - 1) < 0.05).all() if persistent else (share < 0.4).all()


def test_the_standard_error_is_the_deviation_over_keys_and_falls_as_one_over_pairs():
    @functools.partial(jax.jit, static_argnums=1)
    def over_keys(keys, pairs):
        def one(key):
            _, grad, info = estimate(hg.evolution(SQUARE, sigma=0.2, num_pairs=pairs), key)
            return grad, info.method.standard_error

        return jax.vmap(one)(keys)

    keys = jax.random.split(jax.random.key(3), 1000)
    few, many = (over_keys(keys, pairs) for pairs in (2, 8))
    for grads, errors in (few, many):
        said = np.sqrt(np.mean(np.square(errors), axis=0))
        np.testing.assert_allclose(np.std(grads, axis=0), said, rtol=0.15)
    ratio = np.var(few[0], axis=0) / np.var(many[0], axis=0)
    assert ((ratio > 2.8) & (ratio < 5.6)).all()


def test_pairs_share_data_and_keys():
    """Noise of the key moves the weights a thousand times more than λ does, and cancels in each pair."""

    def noisy(w, h, batch, key):
        return pull(w, h, batch, key) + 1e3 * jnp.vdot(w, jax.random.normal(key, w.shape))

    quiet, loud = LINEAR, hg.BilevelProblem(noisy, LINEAR.outer_loss)
    _, wanted, _ = estimate(hg.evolution(quiet, sigma=0.1, num_pairs=4))
    _, grad, _ = estimate(hg.evolution(loud, sigma=0.1, num_pairs=4))
    np.testing.assert_allclose(grad, wanted, rtol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True])
def test_chunks_and_devices_change_nothing(persistent):
    wanted, got = [], []
    sharding = NamedSharding(jax.make_mesh((4,), ("pairs",)), PartitionSpec("pairs"))
    for found, options in (
        (wanted, {}),
        (got, {"pairs_per_device": 3}),
        (got, {"sharding": sharding}),
        (got, {"sharding": sharding, "pairs_per_device": 1}),
    ):
        estimator = hg.evolution(SQUARE, sigma=0.1, num_pairs=12, persistent=persistent, **options)
        state = None
        for key in range(2):
            _, grad, info = estimate(estimator, key, count=2, state=state)
            state = info.state
        found.append((grad, info.method.standard_error))
        if "sharding" in options and persistent:
            assert state.at.params.sharding.shard_shape(state.at.params.shape)[0] == 3
    for other in got:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), other, wanted[0])


def test_a_learned_sigma_has_the_derivative_of_the_smoothed_loss():
    """E (x + σz)² = x² + σ²: dσ is 2σ a coordinate, whatever the estimate in x; four pairs, in the mean of keys."""
    problem = hg.BilevelProblem(lambda w, h, b, k: pull(w, h["x"], b, k), lambda w, h, b, k: (w * h["x"] ** 2).sum())
    estimator = hg.evolution(problem, sigma=lambda h: {"x": jnp.exp(h["log_sigma"]), "log_sigma": 0.0}, num_pairs=4)
    h = {"x": jnp.array([0.3, -0.2]), "log_sigma": jnp.log(jnp.array([0.1, 0.2]))}
    fn, keys = hg.hypergrad(estimator), jax.random.split(jax.random.key(0), 100_000)
    grads = jax.jit(jax.vmap(lambda key: fn(jnp.ones(2), h, (), (), key=key)))(keys)
    grad = jax.tree.map(lambda g: g.mean(0), grads)
    np.testing.assert_allclose(grad["log_sigma"], [2 * 0.1**2, 2 * 0.2**2], rtol=0.05)
    np.testing.assert_allclose(grad["x"], [0.6, -0.4], rtol=0.05)


@pytest.mark.slow
def test_one_sigma_per_leaf():
    problem = hg.BilevelProblem(
        lambda w, h, b, k: pull(w, h["a"], b, k), lambda w, h, b, k: 1e-9 * w.sum() + jnp.abs(h["b"]).sum()
    )
    h = {"a": jnp.zeros(2), "b": jnp.array([1e-3, -1.0])}
    slopes = {}
    for name, sigma in {"narrow": {"a": 0.1, "b": jnp.array([1e-5, 1e-5])}, "wide": {"a": 1e-5, "b": 1.0}}.items():
        estimator = hg.evolution(problem, sigma=sigma, num_pairs=2000)
        _, slopes[name], _ = estimate(estimator, at=(START[0], h))
    np.testing.assert_allclose(slopes["narrow"]["b"], [1.0, -1.0], rtol=0.15)
    assert abs(float(slopes["wide"]["b"][0])) < 0.1  # the kink at 0 is smoothed


def test_a_discrete_choice_inside_the_loss_is_learned():
    """The number of features that the loss uses is a rounded hyperparameter: no derivative, and yet a minimum at 6."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 12))
    y = x[:, :6].sum(axis=1) + 0.1 * rng.normal(size=200)

    def masked(w, h, batch, key):
        mask = jnp.arange(12) < jnp.round(h)
        return jnp.mean((batch[0] @ (w * mask) - batch[1]) ** 2) + 0.2 * jnp.round(h)

    problem = hg.BilevelProblem(masked, masked)
    tx = hg.bilevel(
        hg.evolution(problem, sigma=0.5, num_pairs=8),
        inner_optimizer=optax.sgd(0.1),
        outer_optimizer=optax.adam(0.1),
        key=0,
    )
    variables = hg.BilevelParams(jnp.zeros(12), jnp.array(3.0))
    batch = jnp.asarray(x), jnp.asarray(y)

    @jax.jit
    def step(carry, _):
        variables, state = carry
        updates, state = tx.update(None, state, variables, inner_batch=batch, outer_batch=batch)
        return (optax.apply_updates(variables, updates), state), None

    (variables, state), _ = jax.lax.scan(step, (variables, tx.init(variables)), length=300)
    assert round(float(variables.hyperparams)) == 6  # five would cost 1, seven 0.2 more
    assert int(state.info.num_skipped) == 0


def cliff(w, h, batch, key):
    return jnp.sum(w) + jnp.sum(jnp.where(h > batch, jnp.nan, h))


def test_pairs_that_are_not_finite_are_dropped_and_counted():
    problem = hg.BilevelProblem(pull, cliff)
    fn = hg.value_and_hypergrad(hg.evolution(problem, sigma=0.1, num_pairs=2000), SGD)
    (_, grad), info = fn(*START, steps(2), jnp.array(0.6), key=0)
    dropped = int(info.method.num_dropped)
    assert 0.28 < dropped / 2000 < 0.36  # λ + ε or λ − ε above 0.6 from 0.5 at σ = 0.1: 2 × 16 %
    # Kept are pairs with |ε| < σ in that entry, whose E ε² is 0.291 σ²: dropping pairs biases the estimate.
    np.testing.assert_allclose(grad, (1 + (1 - 0.9**2)) * np.array([0.291, 1.0]), rtol=0.1)
    (_, grad), info = fn(*START, steps(2), jnp.array(-3.0), key=0)
    assert int(info.method.num_dropped) == 2000
    assert bool(info.skipped)
    assert np.isnan(grad).all()


def test_a_lost_particle_starts_again():
    problem = hg.BilevelProblem(pull, cliff)
    fn = hg.value_and_hypergrad(hg.evolution(problem, sigma=0.1, num_pairs=50, persistent=True), SGD)
    _, info = fn(*START, steps(2), jnp.array(0.6), key=0)
    lost = int(info.method.num_dropped)
    assert lost > 0
    _, info = fn(*START, steps(2), jnp.array(9.0), key=1, state=info.state)
    assert int(info.method.num_restarts) == lost
    assert sorted(set(np.asarray(info.state.ages).tolist())) == [2, 4]


def test_ages_begin_staggered_and_particles_start_at_the_weights_of_init():
    estimator = hg.evolution(LINEAR, sigma=1e-9, num_pairs=4, persistent=True, horizon=8)
    fn, state = hg.value_and_hypergrad(estimator, SGD), None
    for key in range(4):
        # The weights handed in move far away; the particles follow their own path.
        _, info = fn(START[0] + 100.0 * key, START[1], steps(2), (), key=key, state=state)
        state = info.state
    assert np.asarray(state.ages).tolist() == [8, 2, 4, 6]
    target = START[1]
    for age, at in zip([8, 2, 4, 6], state.at.params, strict=True):
        np.testing.assert_allclose(at, jnp.stack([target + (START[0] - target) * 0.9**age] * 2), rtol=1e-6)


@pytest.mark.slow
def test_between_outer_steps_the_noise_stays():
    tx = hg.bilevel(
        hg.evolution(LINEAR, sigma=0.1, num_pairs=3, persistent=True),
        inner_optimizer=SGD,
        outer_optimizer=optax.sgd(0.0),
        every=3,
        key=0,
    )
    variables = hg.BilevelParams(*START)
    state, noise = tx.init(variables), []
    for _ in range(6):
        updates, state = tx.update(None, state, variables, inner_batch=(), outer_batch=())
        variables = optax.apply_updates(variables, updates)
        noise.append(np.asarray(state.estimator.noise))
    np.testing.assert_array_equal(noise[0], noise[2])
    assert (noise[2] != noise[3]).all()
    np.testing.assert_allclose(state.estimator.sums, noise[0] + noise[3], rtol=1e-12)


def log_of_square(w, h, batch, key):
    return jnp.log1p(jnp.sum(w**2))


@pytest.mark.parametrize("pairs", [1, 16])
def test_particles_that_overflow_start_again_and_do_not_stop_the_run(pairs):
    """A rate of exp(−2 + 3 z) makes SGD overflow within a window, for one pair in six."""
    problem = hg.BilevelProblem(lambda w, h, b, k: 0.5 * jnp.sum(w**2), log_of_square)
    tx = hg.bilevel(
        hg.evolution(problem, sigma=3.0, num_pairs=pairs, persistent=True),
        inner_optimizer=lambda h: optax.sgd(jnp.exp(h)),
        outer_optimizer=optax.sgd(0.01),
        window=100,
        key=0,
    )
    variables = hg.BilevelParams(jnp.ones(2), jnp.array(-2.0))
    update, found, skipped = jax.jit(tx.update), tx.init(variables), []
    for _ in range(30):
        _, found = update(None, found, variables, inner_batch=steps(100), outer_batch=())
        skipped.append(int(found.info.skip_reason))
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(found.estimator))
    assert int(found.info.method.num_restarts) > 0
    assert skipped.count(0) > 10
    allowed = {hg.SkipReason.NONE, hg.SkipReason.HYPERGRAD} if pairs == 1 else {hg.SkipReason.NONE}
    assert set(skipped) <= allowed


@pytest.mark.slow
def test_ages_of_long_horizons_fit():
    state = estimate(hg.evolution(LINEAR, sigma=0.1, num_pairs=4096, persistent=True, horizon=1_000_000))[2].state
    assert int(state.ages.max()) == 4095 * 1_000_000 // 4096 + 5
    assert int(state.ages.min()) == 5


def test_one_pair_does_not_know_its_error():
    _, _, info = estimate(hg.evolution(LINEAR, sigma=0.1, num_pairs=1))
    assert np.isinf(info.method.standard_error).all()


def test_a_prior_alone_does_not_count_as_use():
    problem = hg.BilevelProblem(lambda w, h, b, k: pull(w, h["h"], b, k), LINEAR.outer_loss)
    at = (START[0], {"h": START[1], "idle": np.array(1.0)})
    problem = hg.with_prior(problem, hg.priors.normal(at[1], 1.0), num_examples=10)
    with pytest.raises(ValueError, match=r"\['idle'\], which enters neither"):
        estimate(hg.evolution(problem, sigma=0.1, num_pairs=4), at=at)


@pytest.mark.slow
def test_rounding_of_lambda_is_part_of_the_noise():
    """Around 8 a bfloat16 moves by 1/32 or 1/16: the quotient divides by the move that was made."""
    problem = hg.BilevelProblem(pull, lambda w, h, batch, key: jnp.sum(h.astype(jnp.float32)) + 0.0 * jnp.sum(w))
    at = (jnp.zeros(1, jnp.bfloat16), jnp.full(1, 8.0, jnp.bfloat16))
    _, grad, _ = estimate(hg.evolution(problem, sigma=np.float64(0.1), num_pairs=2000), at=at, optimizer=None)
    assert grad.dtype == jnp.bfloat16
    assert float(grad[0]) == pytest.approx(1.0, abs=0.15)
    tx = hg.bilevel(
        hg.evolution(problem, sigma=np.float64(0.1), num_pairs=4, persistent=True),
        inner_optimizer=SGD,
        outer_optimizer=SGD,
        key=0,
    )
    variables = hg.BilevelParams(*at)
    _, state = jax.jit(tx.update)(None, tx.init(variables), variables, inner_batch=(), outer_batch=())
    assert state.estimator.sums.dtype == jnp.bfloat16


@pytest.mark.slow
def test_ranks_and_errors_under_strict_promotion():
    with jax.numpy_rank_promotion("raise"):
        for options in ({"sigma": 0.1}, {"sigma": lambda h: 0.1 + 0.0 * h}, {"sigma": 0.1, "persistent": True}):
            grad = estimate(hg.evolution(SQUARE, num_pairs=4, **options))[1]
            assert np.isfinite(grad).all()


@pytest.mark.slow
def test_ranks_replace_losses():
    losses = jnp.array([[3.0, jnp.nan], [1e9, -2.0]])
    np.testing.assert_allclose(hg.centered_ranks(losses), [[-1 / 6, 0.5], [1 / 6, -0.5]])
    np.testing.assert_allclose(hg.centered_ranks(jnp.array([2.0, 1.0, 2.0, 2.0])), [1 / 6, -0.5, 1 / 6, 1 / 6])
    np.testing.assert_array_equal(hg.centered_ranks(jnp.zeros((2, 2))), 0.0)
    steep = hg.BilevelProblem(pull, lambda w, h, b, k: jnp.exp(30 * jnp.sum(w)))
    with_ranks = functools.partial(hg.evolution, sigma=0.1, num_pairs=50, fitness=hg.centered_ranks)
    _, one, _ = estimate(with_ranks(steep))
    _, two, _ = estimate(with_ranks(LINEAR))
    np.testing.assert_allclose(one, two)  # the order is the same


@pytest.mark.parametrize(
    ("name", "pairs", "life", "ranks"),
    [("Open_ES", 6, 1, False), ("Open_ES", 6, 1, True), ("PersistentES", 6, 9, False), ("PersistentES", 1, 3, False)],
    ids=["ES", "ES with ranks", "PES", "PES with restarts"],
)
def test_trajectories_are_those_of_evosax(name, pairs, life, ranks):
    """From the same random numbers, over eight windows; several pairs would start again at different times here."""
    sigma, root, outer = 0.3, jax.random.key(3), optax.adam(0.1)
    problem = hg.BilevelProblem(
        lambda w, h, batch, key: 0.5 * jnp.sum(jnp.exp(h) * w**2) - jnp.sum(jnp.sin(w)),
        lambda w, h, batch, key: jnp.sum((w - 1.0) ** 4) + jnp.sum(h**2),
    )
    shape = fitness_shaping.centered_rank_fitness_shaping_fn if ranks else fitness_shaping.identity_fitness_shaping_fn
    peer = getattr(algorithms, name)(
        2 * pairs,
        jnp.zeros(2),
        optimizer=outer,
        std_schedule=optax.constant_schedule(sigma),
        fitness_shaping_fn=shape,
    )
    settings, persistent = peer.default_params, name == "PersistentES"
    if persistent:
        settings = settings.replace(T=5 * life, K=5)
    their = peer.init(root, START[1], settings)
    options = {"persistent": True, "horizon": 5 * life if pairs == 1 else None} if persistent else {}
    estimator = hg.evolution(
        problem, sigma=sigma, num_pairs=pairs, fitness=hg.centered_ranks if ranks else None, **options
    )
    tx = hg.bilevel(estimator, inner_optimizer=SGD, outer_optimizer=outer, window=5, key=root)
    ours = hg.BilevelParams(*map(jnp.asarray, START))
    state, update = tx.init(ours), jax.jit(tx.update)

    @jax.jit
    @jax.vmap
    def window(w, h):
        for _ in range(5):
            w = w - 0.1 * jax.grad(problem.inner_loss)(w, h, (), None)
        return w, problem.outer_loss(w, h, (), None)

    particles = jnp.tile(START[0], (2 * pairs, 1))
    for count in range(8):
        if not persistent:
            particles = jnp.tile(ours.params, (2 * pairs, 1))
        elif count % life == 0:
            particles = jnp.tile(START[0], (2 * pairs, 1))
        (key,) = jax.random.split(split_keys(jax.random.fold_in(root, count)).advance, 1)
        population, their = peer.ask(key, their, settings)
        particles, losses = window(particles, population)
        their, _ = peer.tell(key, population, losses, their, settings)
        updates, state = update(None, state, ours, inner_batch=steps(5), outer_batch=())
        ours = optax.apply_updates(ours, updates)
        np.testing.assert_allclose(ours.hyperparams, peer.get_mean(their), rtol=1e-10)
    assert np.abs(ours.hyperparams - START[1]).max() > 0.1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sigma": 0.0}, "sigma to be finite and > 0"),
        ({"num_pairs": 0}, "num_pairs"),
        ({"sigma": np.array([0.1, 0.0])}, "sigma to be finite and > 0"),
        ({"sigma": lambda h: 0.1, "persistent": True}, "sigma as numbers with persistent"),
        ({"sigma": lambda h: 0.1, "num_pairs": 1}, "two pairs or more"),
        ({"horizon": 5}, "no horizon without persistent"),
        ({"pairs_per_device": 3}, "pairs_per_device to divide"),
        ({"sharding": NamedSharding(jax.make_mesh((8,), ("d",)), PartitionSpec("d"))}, "divides evenly"),
    ],
)
def test_bad_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        hg.evolution(LINEAR, **{"sigma": 0.1, "num_pairs": 4, **options})


def test_what_it_cannot_estimate_is_refused():
    with pytest.raises(TypeError, match="fitness to be callable"):
        hg.evolution(LINEAR, sigma=0.1, num_pairs=4, fitness="ranks")
    with pytest.raises(ValueError, match="fitness to return shape"):
        estimate(hg.evolution(LINEAR, sigma=0.1, num_pairs=4, fitness=jnp.sum))
    with pytest.raises(TypeError, match="key"):
        estimate(hg.evolution(LINEAR, sigma=0.1, num_pairs=4), None)
    two = {"h": START[1], "rate": np.array(0.1)}
    problem = hg.BilevelProblem(lambda w, h, b, k: pull(w, h["h"], b, k), LINEAR.outer_loss)
    with pytest.raises(ValueError, match=r"\['rate'\].*enters neither.*inner_optimizer"):
        estimate(hg.evolution(problem, sigma=0.1, num_pairs=4), at=(START[0], two))
    still = hg.evolution(problem, sigma=lambda h: {"h": 0.1, "rate": 0.0}, num_pairs=4)
    with pytest.raises(ValueError, match=r"sigma 0 for .*\['rate'\]"):
        estimate(still, at=(START[0], two))
    # A rate that the optimizer takes is no noise.
    by_rate = hg.evolution(problem, sigma=0.01, num_pairs=4)
    _, grad, _ = estimate(by_rate, at=(START[0], two), optimizer=lambda h: optax.sgd(h["rate"]))
    assert float(grad["rate"]) != 0.0


@pytest.mark.parametrize(("dtype", "at", "sigma"), [(jnp.bfloat16, 1.0, 1e-3), (jnp.float32, 1e6, 0.01)])
def test_a_perturbation_that_rounds_away_is_no_estimate_of_zero(dtype, at, sigma):
    h = jnp.array([at, 0.0], dtype)
    grad = hg.hypergrad(hg.evolution(SQUARE, sigma=sigma, num_pairs=4))(jnp.ones(2), h, (), (), key=0)
    assert jnp.isnan(grad).tolist()[0]
    assert jnp.isfinite(grad[1])
