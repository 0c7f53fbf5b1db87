"""Noise and augmentation with a strength: means and variances against closed forms, shapes, masks, refusals.

Tolerances of statistics are five standard errors of the mean of n independent draws: one wrong alarm in 2 million
comparisons, and the seeds are fixed. Variances use the fourth moment of the variable in question.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg

KEY = jax.random.key(0)
N = 20_000


def assert_bernoulli(kept, rate):
    """The fraction of zeros among independent entries is the rate, within five standard errors."""
    kept = np.asarray(kept)
    spread = 5 * math.sqrt(max(rate * (1 - rate), 1e-12) / kept.size)
    assert abs((1 - kept.mean()) - rate) <= spread


def means(fn, n=N):
    """Return n independent draws of ``fn(key)``."""
    return np.asarray(jax.jit(jax.vmap(fn))(jax.random.split(KEY, n)), np.float64)


# dropout


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_dropout_has_the_right_mean_and_variance(rate):
    draws = means(lambda key: hg.noise.dropout(key, jnp.array([2.0]), rate))
    variance = 4 * rate / (1 - rate)
    assert abs(draws.mean() - 2) <= 5 * math.sqrt(variance / N)
    assert set(np.round(np.unique(draws), 4)) <= {0.0, round(2 / (1 - rate), 4)}
    # The variance of (y − 2)², which is 4 with probability 1 − …: from the two values that y takes.
    squares = np.array([4.0, (2 / (1 - rate) - 2) ** 2])
    weights = np.array([rate, 1 - rate])
    error = math.sqrt(weights @ squares**2 - (weights @ squares) ** 2)
    assert abs(((draws - 2) ** 2).mean() - variance) <= 5 * error / math.sqrt(N) + 1e-6
    assert_bernoulli(draws != 0, rate)


def test_dropout_takes_one_rate_an_example():
    rates = [0.0, 0.2, 0.5, 0.95]
    y = hg.noise.dropout(KEY, jnp.ones((4, 100, 100)), jnp.array(rates))
    for example, rate in zip(y, rates, strict=True):
        assert_bernoulli(example != 0, rate)
        kept = example[example != 0]
        np.testing.assert_allclose(kept, 1 / (1 - rate), rtol=1e-5)


@pytest.mark.parametrize("dims", [(1,), (-2,), (0,), (0, 1), (2,)])
def test_masks_are_constant_along_broadcast_dims_and_only_there(dims):
    y = np.asarray(hg.noise.dropout(KEY, jnp.ones((6, 5, 7)), 0.5, broadcast_dims=dims))
    for axis in range(3):
        same = (y == np.take(y, [0], axis)).all()
        assert same == (axis in {d % 3 for d in dims})


def test_examples_share_random_numbers_along_the_batch_axis():
    y = hg.noise.dropout(KEY, jnp.ones((2, 10_000)), jnp.array([0.3, 0.6]), broadcast_dims=(0,))
    kept = np.asarray(y != 0)
    assert_bernoulli(kept[0], 0.3)
    assert_bernoulli(kept[1], 0.6)
    assert not (kept[1] & ~kept[0]).any()  # what the lower rate drops, the higher drops


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("rate", [0.0, 1 - 2.0**-24, 1.0])
def test_dropout_is_finite_at_both_ends_with_its_derivative(dtype, rate):
    x = jnp.full((4, 3), 0.5, dtype)

    def total(x, rate):
        return hg.noise.dropout(KEY, x, rate).astype(jnp.float32).sum()

    rates = jnp.full(4, rate, jnp.float32)
    value, grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(x, rates)
    assert math.isfinite(value)
    assert grads[0].dtype == dtype
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in grads)
    assert value == (6.0 if rate == 0 else 0.0)
    assert not grads[1].any()


def test_traced_rates_outside_the_interval_are_clipped():
    drop = jax.jit(lambda rate: hg.noise.dropout(KEY, jnp.ones(8), rate))
    np.testing.assert_array_equal(drop(-0.5), np.ones(8))
    np.testing.assert_array_equal(drop(1.5), np.zeros(8))


# the other noises


def test_gaussian_noise_has_one_scale_an_example():
    scales = [0.0, 0.5, 2.0]
    noise = hg.noise.gaussian_noise(KEY, jnp.ones((3, N)), jnp.array(scales)) - 1
    for row, scale in zip(np.asarray(noise, np.float64), scales, strict=True):
        assert abs(row.mean()) <= 5 * scale / math.sqrt(N)
        assert abs((row**2).mean() - scale**2) <= 5 * scale**2 * math.sqrt(2 / N)  # Var ε² = 2


def test_gaussian_noise_is_differentiable_in_its_scale():
    slope = jax.grad(lambda s: hg.noise.gaussian_noise(KEY, jnp.zeros(1), s)[0])(0.7)
    np.testing.assert_allclose(slope, hg.noise.gaussian_noise(KEY, jnp.zeros(1), 1.0)[0], rtol=1e-6)


def test_smooth_labels_is_the_formula():
    labels = jnp.array([[0, 1], [2, -1]])
    targets = hg.noise.smooth_labels(labels, 3, jnp.array([0.0, 0.3]))
    want = [[[1, 0, 0], [0, 1, 0]], [[0.1, 0.1, 0.8], [0.1, 0.1, 0.1]]]
    np.testing.assert_allclose(targets, want, atol=1e-7)
    assert targets.dtype == jnp.float32
    slope = jax.grad(lambda rate: hg.noise.smooth_labels(jnp.array(0), 4, rate)[0])(0.3)
    np.testing.assert_allclose(slope, 1 / 4 - 1, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 2.0, 0.25, 3.75, -1.3, -1e-9])
def test_stochastic_round_is_unbiased(value):
    draws = means(lambda key: hg.noise.stochastic_round(key, value))
    assert set(draws) <= {math.floor(value), math.floor(value) + 1}
    fraction = value - math.floor(value)
    assert abs(draws.mean() - value) <= 5 * math.sqrt(fraction * (1 - fraction) / N) + 1e-8


def test_stochastic_round_keeps_shapes_and_gives_integers():
    rounded = hg.noise.stochastic_round(KEY, jnp.full((2, 3), 1.5, jnp.bfloat16))
    assert rounded.shape == (2, 3)
    assert rounded.dtype == jnp.int32


# images


def coverage(length, size):
    """Return for each pixel the probability that a hole of the size covers it, along one axis."""
    pixel, centre = np.arange(length)[:, None], np.arange(length)[None]
    start = centre - size // 2
    return ((pixel >= start) & (pixel < start + size)).mean(1)


@pytest.mark.parametrize(
    "size", [pytest.param(1, marks=pytest.mark.slow), 2, 3, pytest.param(5, marks=pytest.mark.slow), 20]
)
def test_one_hole_covers_each_pixel_as_often_as_it_should(size):
    shape = (9, 7)
    draws = means(lambda key: hg.noise.cutout(key, jnp.ones((1, *shape)), float(size), 1.0, max_count=1)[0])
    want = np.outer(coverage(9, size), coverage(7, size))
    error = np.sqrt(want * (1 - want) / N)
    assert (np.abs((draws == 0).mean(0) - want) <= 5 * error + 1e-9).all()
    holes = draws == 0
    for holed in holes[:50]:  # a hole is a full rectangle of at most size × size
        rows, columns = holed.any(1), holed.any(0)
        assert (holed == np.outer(rows, columns)).all()
        assert 1 <= rows.sum() <= size
        assert 1 <= columns.sum() <= size


def test_holes_come_in_the_right_number_an_example():
    counts = jnp.array([0.0, 1.0, 1.5, 3.0])
    cut = means(lambda key: hg.noise.cutout(key, jnp.ones((4, 30, 30)), 1.0, counts, max_count=3), 2000)
    area = (cut == 0).sum((2, 3))
    assert (area[:, 0] == 0).all()
    assert (area[:, 1] == 1).all()
    # n holes of one pixel among P = 900 cover P (1 − (1 − 1/P)ⁿ) on average, each a variance below 1/4 by the rounding
    # of the count, and hardly any by coincidences.
    for column, chances in ((2, {1: 0.5, 2: 0.5}), (3, {3: 1.0})):
        want = sum(chance * 900 * (1 - (1 - 1 / 900) ** n) for n, chance in chances.items())
        assert abs(area[:, column].mean() - want) <= 5 * 0.5 / math.sqrt(2000)
    assert set(area[:, 3]) <= {1, 2, 3}


def test_sizes_are_rounded_once_an_example():
    sizes = jnp.array([0.0, 2.25])
    cut = means(lambda key: hg.noise.cutout(key, jnp.ones((2, 20, 20)), sizes, 1.0, max_count=1), 5000)
    assert (cut[:, 0] == 1).all()
    holes = cut[:, 1] == 0
    want = 0.75 * coverage(20, 2).sum() ** 2 + 0.25 * coverage(20, 3).sum() ** 2
    area = holes.sum((1, 2))
    assert abs(area.mean() - want) <= 5 * area.std() / math.sqrt(5000)
    inner = holes[~(holes[:, 0].any(1) | holes[:, -1].any(1) | holes[:, :, 0].any(1) | holes[:, :, -1].any(1))]
    assert set(inner.sum((1, 2))) == {4, 9}  # squares of either size, no others


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.uint8])
def test_cutout_cuts_all_channels_and_keeps_the_dtype(dtype):
    cut = hg.noise.cutout(KEY, jnp.ones((5, 8, 6, 3), dtype), 3.0, 2.0, max_count=2)
    assert cut.dtype == dtype
    assert cut.shape == (5, 8, 6, 3)
    zeros = np.asarray(cut, np.float32) == 0
    assert (zeros.all(-1) == zeros.any(-1)).all()
    assert zeros.any((1, 2, 3)).all()
    assert len({z.tobytes() for z in zeros}) > 1  # examples have their own holes


# weights and tokens


def test_drop_weights_takes_a_tree_prefix():
    params = {"a": {"kernel": jnp.ones((200, 100)), "bias": jnp.ones(100)}, "b": jnp.ones((100, 100), jnp.bfloat16)}
    dropped = hg.noise.drop_weights(KEY, params, {"a": {"kernel": 0.3, "bias": 0.0}, "b": jnp.float32(0.5)})
    assert_bernoulli(dropped["a"]["kernel"] != 0, 0.3)
    assert_bernoulli(dropped["b"] != 0, 0.5)
    assert dropped["b"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.unique(dropped["a"]["kernel"]), [0, 1 / 0.7], rtol=1e-6)
    np.testing.assert_array_equal(dropped["a"]["bias"], np.ones(100))


def test_drop_weights_draws_for_each_array_and_each_column():
    dropped = hg.noise.drop_weights(KEY, [jnp.ones((1000, 2)), jnp.ones((1000, 2))], jnp.array([0.1, 0.9]))
    assert (np.asarray(dropped[0]) != np.asarray(dropped[1])).any()
    for array in dropped:
        assert_bernoulli(array[:, 0] != 0, 0.1)
        assert_bernoulli(array[:, 1] != 0, 0.9)


def test_perturb_weights_is_relative_to_the_root_mean_square():
    params = {"a": 3 * jnp.ones(N), "b": jnp.tile(jnp.array([0.0, 2.0]), N // 2), "zeros": jnp.zeros(5)}
    scale = {"a": 0.1, "b": 0.2, "zeros": 0.5}
    noise = jax.tree.map(jnp.subtract, hg.noise.perturb_weights(KEY, params, scale), params)
    for name, spread in (("a", 0.3), ("b", 0.2 * math.sqrt(2))):
        assert abs(float(noise[name].mean())) <= 5 * spread / math.sqrt(N)
        assert abs(float((noise[name] ** 2).mean()) / spread**2 - 1) <= 5 * math.sqrt(2 / N)
    np.testing.assert_array_equal(noise["zeros"], np.zeros(5))


def test_perturb_weights_has_finite_derivatives_at_zero_weights():
    total = lambda w, s: hg.noise.perturb_weights(KEY, w, s).sum()  # noqa: E731
    by_weight, by_scale = jax.grad(total, argnums=(0, 1))(jnp.zeros(3), 0.5)
    np.testing.assert_array_equal(by_weight, np.ones(3))
    assert by_scale == 0
    assert jax.grad(total, argnums=1)(jnp.ones(3), 0.5) != 0


def test_drop_tokens_drops_word_types_in_a_sequence():
    vocabulary, rates = 50, [0.0, 0.4, 0.9]
    ids = jax.random.randint(KEY, (3, 200), 0, vocabulary)
    embedded = jnp.ones((3, 200, 4))
    draw = jax.jit(lambda key: hg.noise.drop_tokens(key, ids, embedded, jnp.array(rates), vocabulary=vocabulary))
    kept = np.stack([np.asarray(draw(key)) for key in jax.random.split(KEY, 200)])
    assert (kept == kept[..., :1]).all()  # whole embeddings
    for b, rate in enumerate(rates):
        types = []
        for word in np.unique(ids[b]):
            places = kept[:, b, np.asarray(ids[b]) == word, 0]
            assert (places == places[:, :1]).all()  # everywhere at once
            types.append(places[:, 0] != 0)
        assert_bernoulli(np.stack(types), rate)
    np.testing.assert_allclose(np.unique(kept[:, 2]), [0, 10], rtol=1e-5)


# the module


class Block(nn.Module):
    rate: float | None = None

    @nn.compact
    def __call__(self, x, *, deterministic):
        x = nn.Dense(64)(x)
        return hg.noise.HyperDropout(0.25)(x, deterministic=deterministic, rate=self.rate)


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, *, deterministic):
        for _ in range(2):
            x = Block()(x, deterministic=deterministic)
        return hg.noise.HyperDropout(0.5, broadcast_dims=(1,), name="last")(x, deterministic=deterministic)


def test_a_nested_model_keeps_its_rates_in_the_collection():
    variables = Network().init(KEY, jnp.ones((3, 4)), deterministic=True)
    assert jax.tree.map(float, variables["hyper"]) == {
        "Block_0": {"HyperDropout_0": {"rate": 0.25}},
        "Block_1": {"HyperDropout_0": {"rate": 0.25}},
        "last": {"rate": 0.5},
    }
    assert set(variables["params"]) == {"Block_0", "Block_1"}
    noisy = Network().init({"params": KEY, "dropout": KEY}, jnp.ones((3, 4)), deterministic=False)
    assert jax.tree.structure(noisy) == jax.tree.structure(variables)


def test_a_nested_model_uses_the_rates_that_it_is_given():
    model, x = Network(), jnp.ones((3, 4))
    params = model.init(KEY, x, deterministic=True)["params"]
    rates = {
        "Block_0": {"HyperDropout_0": {"rate": jnp.zeros(3)}},
        "Block_1": {"HyperDropout_0": {"rate": jnp.array([0.0, 0.5, 0.999999])}},
        "last": {"rate": jnp.float32(0.0)},
    }
    run = lambda **options: model.apply({"params": params, "hyper": rates}, x, **options)  # noqa: E731
    plain = model.apply({"params": params}, x, deterministic=True)  # needs no rates
    np.testing.assert_array_equal(run(deterministic=True), plain)
    y = run(deterministic=False, rngs={"dropout": KEY})
    np.testing.assert_allclose(y[0], plain[0], rtol=1e-6)
    assert 0 < (np.asarray(y[1]) == 0).sum() < 64
    assert not np.asarray(y[2]).any()
    again = run(deterministic=False, rngs={"dropout": jax.random.key(1)})
    assert (np.asarray(again) != np.asarray(y)).any()


def test_the_module_equals_the_function():
    """Both drop what the same key drops; and a rate given to the call stands in for the collection."""
    x, rates = jnp.ones((4, 500)), jnp.array([0.0, 0.2, 0.4, 0.6])

    class Keyed(nn.Module):
        @nn.compact
        def __call__(self, x, key_only=False):
            layer = hg.noise.HyperDropout(0.4, deterministic=False, name="layer")
            return layer(x)

    read = Keyed().apply({"hyper": {"layer": {"rate": rates}}}, x, rngs={"dropout": KEY})
    alone = hg.noise.HyperDropout(deterministic=False)
    top = alone.apply({"hyper": {"rate": jnp.float32(0.4)}}, x, rngs={"dropout": KEY})
    given = alone.apply({}, x, rate=0.4, rngs={"dropout": KEY})
    np.testing.assert_array_equal(top, given)
    key = nn.apply(lambda module: module.make_rng("dropout"), alone)({}, rngs={"dropout": KEY})
    np.testing.assert_array_equal(given, hg.noise.dropout(key, x, 0.4))
    for row, rate in zip(read, rates, strict=True):
        assert_bernoulli(row != 0, float(rate))


def test_the_module_uses_its_own_random_numbers():
    layer = hg.noise.HyperDropout(0.5, rng_collection="noise", deterministic=False)
    y = layer.apply({"hyper": {"rate": 0.5}}, jnp.ones(100), rngs={"noise": KEY})
    assert 0 < (np.asarray(y) == 0).sum() < 100


# transformations, dtypes, estimators


CALLS = {
    "dropout": lambda key, x, s: hg.noise.dropout(key, x, s),
    "gaussian_noise": lambda key, x, s: hg.noise.gaussian_noise(key, x, s),
    "cutout": lambda key, x, s: hg.noise.cutout(key, x, 4 * s, 2 * s, max_count=2),
    "drop_weights": lambda key, x, s: hg.noise.drop_weights(key, x, s),
    "perturb_weights": lambda key, x, s: hg.noise.perturb_weights(key, x, s),
    "drop_tokens": lambda key, x, s: hg.noise.drop_tokens(key, jnp.zeros(x.shape[:2], jnp.int32), x, s, vocabulary=3),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow)])
def test_jit_vmap_grad_and_dtype(name, dtype, hard_mode):
    call, x = CALLS[name], jnp.linspace(0.5, 1.5, 60).reshape(3, 4, 5).astype(dtype)
    strength = jnp.float32(0.4)
    y = call(KEY, x, strength)
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (jax.jit(call)(KEY, x, strength), y)), rtol=1e-2)
    keys = jax.random.split(KEY, 2)
    both = jax.jit(jax.vmap(call, in_axes=(0, None, 0)))(keys, x, jnp.array([0.4, 0.0], jnp.float32))
    one = call(keys[0], x, strength)
    np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (both[0], one)), rtol=1e-2)
    np.testing.assert_array_equal(both[1], x)  # strength 0 changes nothing
    grads = jax.jit(jax.grad(lambda x, s: call(KEY, x, s).astype(jnp.float32).sum(), argnums=(0, 1)))(x, strength)
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in grads)
    assert grads[0].dtype == dtype


def test_double_precision_stays(x64):
    y = hg.noise.dropout(KEY, jnp.ones(9, jnp.float64), jnp.float64(1 / 3))
    assert y.dtype == jnp.float64
    assert set(np.unique(y)) == {0.0, 1 / (1 - np.float64(1 / 3))}
    assert hg.noise.smooth_labels(jnp.array([0]), 2, jnp.float64(0.1)).dtype == jnp.float64


def test_implicit_differentiation_refuses_a_dropout_rate():
    """A mask passes no derivative, so its hypergradient would be zero by construction."""

    def train(params, rate, batch, key):
        return jnp.mean((hg.noise.dropout(key, batch, rate) @ params - 1) ** 2)

    def valid(params, rate, batch, key):
        return jnp.mean((batch @ params - 1) ** 2)

    problem = hg.reparameterize(hg.BilevelProblem(train, valid), hg.bijectors.sigmoid())
    fn = hg.hypergrad(hg.implicit(problem, solver=hg.solvers.dense()))
    with pytest.raises(ValueError, match="zero by construction"):
        fn(jnp.ones(2), jnp.float32(0.0), jnp.ones((5, 2)), jnp.ones((5, 2)), key=KEY)


@pytest.mark.slow
def test_a_learned_response_tunes_what_implicit_differentiation_refuses():
    """The rates of a model's own collection are hyperparameters as they are, one perturbation an example."""
    model, x = Network(), jax.random.normal(KEY, (16, 4))
    variables = jax.jit(functools.partial(model.init, deterministic=True))(KEY, x)

    def train(params, rates, batch, key):
        y = model.apply({"params": params, "hyper": rates}, batch, deterministic=False, rngs={"dropout": key})
        return jnp.mean((y - 1) ** 2)

    def valid(params, rates, batch, key):
        return jnp.mean((model.apply({"params": params}, batch, deterministic=True) - 1) ** 2)

    problem = hg.reparameterize(hg.BilevelProblem(train, valid), hg.bijectors.interval(0.0, 0.9))
    problem = hg.responses.perturbed(hg.responses.self_tuning(problem), scale=0.5)
    rates = hg.unconstrain(hg.bijectors.interval(0.0, 0.9), variables["hyper"])
    start = jax.jit(lambda *at: hg.responses.init(problem, 0, *at))(variables["params"], rates, x)
    tx = hg.bilevel(
        hg.direct(problem), inner_optimizer=optax.adam(1e-2), outer_optimizer=optax.sgd(1.0), window=5, every=2
    )
    at = hg.BilevelParams(start, rates)
    state = tx.init(at)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(None, state, at, inner_batch=jnp.stack([x] * 5), outer_batch=x)
        at = optax.apply_updates(at, updates)
    gradient = hg.hypergrad(hg.direct(problem))(at.params, rates, x, x, key=None)
    for step, slope in zip(jax.tree.leaves(updates.hyperparams), jax.tree.leaves(gradient), strict=True):
        assert float(step) == pytest.approx(-float(slope), rel=1e-4)
        assert abs(float(slope)) > 1e-6


# refusals

X = jnp.ones((3, 4))
IDS = jnp.zeros((3, 4), jnp.int32)
REFUSED = [
    ("no key", ValueError, "random key; got None", lambda: hg.noise.dropout(None, X, 0.1)),
    ("key", TypeError, "expected key", lambda: hg.noise.dropout(0.5, X, 0.1)),
    (
        "rate shape",
        ValueError,
        r"shape \(\) or \(3,\); got shape \(4,\)",
        lambda: hg.noise.dropout(KEY, X, jnp.ones(4)),
    ),
    ("rate matrix", ValueError, "got shape", lambda: hg.noise.dropout(KEY, X, jnp.zeros((3, 1)))),
    ("traced shape", ValueError, "got shape", lambda: jax.jit(lambda r: hg.noise.dropout(KEY, X, r))(jnp.ones(4))),
    ("rate 1", ValueError, r"rate in \[0, 1\)", lambda: hg.noise.dropout(KEY, X, 1.0)),
    ("rate -", ValueError, r"\[-0.1", lambda: hg.noise.dropout(KEY, X, jnp.array([0.1, 0.2, -0.1]))),
    ("rate nan", ValueError, "nan", lambda: hg.noise.dropout(KEY, X, float("nan"))),
    ("rate bool", TypeError, "to be a number", lambda: hg.noise.dropout(KEY, X, True)),
    ("rate None", TypeError, "to be a number", lambda: hg.noise.dropout(KEY, X, None)),
    ("axis", ValueError, "broadcast_dims among the 2 axes", lambda: hg.noise.dropout(KEY, X, 0.1, broadcast_dims=(2,))),
    ("integers", TypeError, "x of floating dtype; got int32", lambda: hg.noise.dropout(KEY, IDS, 0.1)),
    ("scale", ValueError, r"scale in \[0, inf\)", lambda: hg.noise.gaussian_noise(KEY, X, -1.0)),
    ("scale shape", ValueError, "got shape", lambda: hg.noise.gaussian_noise(KEY, X, jnp.ones(2))),
    ("labels", TypeError, "labels of integer dtype", lambda: hg.noise.smooth_labels(X, 3, 0.1)),
    ("classes", ValueError, "num_classes", lambda: hg.noise.smooth_labels(IDS, 0, 0.1)),
    ("label rate", ValueError, r"rate in \[0, 1\)", lambda: hg.noise.smooth_labels(IDS, 3, 1.5)),
    ("round key", ValueError, "got None", lambda: hg.noise.stochastic_round(None, 0.5)),
    ("round integers", TypeError, "floating", lambda: hg.noise.stochastic_round(KEY, 3)),
    ("image rank", ValueError, "images", lambda: hg.noise.cutout(KEY, X, 1.0, 1.0, max_count=1)),
    ("size", ValueError, r"size in \[0, inf\)", lambda: hg.noise.cutout(KEY, X[..., None], -1.0, 1.0, max_count=1)),
    ("count", ValueError, r"count in \[0, 2\]", lambda: hg.noise.cutout(KEY, X[..., None], 1.0, 2.5, max_count=2)),
    ("max", TypeError, "max_count", lambda: hg.noise.cutout(KEY, X[..., None], 1.0, 1.0, max_count=1.5)),
    ("image key", ValueError, "got None", lambda: hg.noise.cutout(None, X[..., None], 1.0, 1.0, max_count=1)),
    ("no prefix", ValueError, "tree prefix", lambda: hg.noise.drop_weights(KEY, {"a": X}, {"b": 0.1})),
    ("no broadcast", ValueError, "broadcast", lambda: hg.noise.drop_weights(KEY, X, jnp.zeros(3))),
    ("weight rate", ValueError, r"rate in \[0, 1\)", lambda: hg.noise.drop_weights(KEY, X, 1.0)),
    ("weight key", ValueError, "got None", lambda: hg.noise.drop_weights(None, X, 0.1)),
    ("weight scale", ValueError, "scale in", lambda: hg.noise.perturb_weights(KEY, X, -0.1)),
    ("weight dtype", TypeError, r"params leaf \['a'\] of", lambda: hg.noise.perturb_weights(KEY, {"a": IDS}, 0.1)),
    ("bare weight", TypeError, "expected params of floating", lambda: hg.noise.drop_weights(KEY, IDS, 0.1)),
    ("ids", TypeError, "ids of integer", lambda: hg.noise.drop_tokens(KEY, X, X[..., None], 0.1, vocabulary=2)),
    ("embedded", ValueError, "embedded of shape", lambda: hg.noise.drop_tokens(KEY, IDS, X, 0.1, vocabulary=2)),
    ("words", ValueError, "vocabulary", lambda: hg.noise.drop_tokens(KEY, IDS, X[..., None], 0.1, vocabulary=0)),
    ("first rate", ValueError, "initial_rate", lambda: hg.noise.HyperDropout(1.0).init(KEY, X, deterministic=True)),
    (
        "no collection",
        ValueError,
        'collection "hyper"',
        lambda: hg.noise.HyperDropout(deterministic=False).apply({}, X, rngs={"dropout": KEY}),
    ),
]


@pytest.mark.parametrize(("error", "words", "call"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refusals_say_expected_got_and_fix(error, words, call):
    with pytest.raises(error, match=words) as caught:
        call()
    assert "expected" in str(caught.value)
    assert "; got " in str(caught.value)
