"""Online hypergradient descent: the derivative of one step, rates that recover from any start, and no surprise."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import hypergrad as hg

hd, multiplicative, additive, clipped = (
    hg.optimizers.hypergradient_descent,
    hg.optimizers.multiplicative,
    hg.optimizers.additive,
    hg.optimizers.clipped,
)
ADAM = functools.partial(optax.adam, b1=0.9)


def loss(w):
    return 0.5 * jnp.sum(w["a"] ** 2) + 2.0 * jnp.sum((w["b"] - 1.0) ** 2)


W = {"a": np.array([1.0, -2.0]), "b": np.array([[3.0]])}


def run(tx, steps, w=None):
    """Return the weights and the states after each step."""
    w = jax.tree.map(jnp.asarray, W if w is None else w)
    state, states = tx.init(w), []
    for _ in range(steps):
        updates, state = tx.update(jax.grad(loss)(w), state, w)
        w = optax.apply_updates(w, updates)
        states.append(state)
    return w, states


def moved(w, rate, direction):
    return jax.tree.map(lambda w, d: w - rate * d, w, direction)


@pytest.mark.parametrize("make", [optax.sgd, ADAM], ids=["sgd", "adam"])
def test_the_additive_rule_descends_the_loss_after_one_step(make, x64):
    """α moves by −β times the derivative of the loss after the step, here by ``jax.grad`` and by a difference."""
    beta, rate = 1e-3, 0.01
    w, (first, second) = run(hd(make, additive(beta), init_rate=rate), 2)
    one = moved(W, rate, first.direction)
    of_rate = lambda alpha: loss(moved(W, alpha, first.direction))  # noqa: E731
    slope = jax.grad(of_rate)(rate)
    measured = (of_rate(rate + 1e-5) - of_rate(rate - 1e-5)) / 2e-5
    assert float(slope) == pytest.approx(float(measured), rel=1e-6)
    assert float(second.rate) == pytest.approx(rate - beta * float(slope), rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), w, moved(one, float(second.rate), second.direction)
    )


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_multiplicative_rule_ignores_the_scale_of_the_loss(scale, x64):
    def rates(scale):
        tx, w = hd(ADAM, multiplicative(0.1), init_rate=1e-3), jax.tree.map(jnp.asarray, W)
        state, found = tx.init(w), []
        for _ in range(5):
            grads = jax.tree.map(lambda g: scale * g, jax.grad(loss)(w))
            updates, state = tx.update(grads, state, w)
            w = optax.apply_updates(w, updates)
            found.append(float(state.rate))
        return found

    np.testing.assert_allclose(rates(scale), rates(1.0), rtol=1e-2)  # Adam has its own small constant
    assert rates(1.0)[-1] > 1e-3


@pytest.mark.slow
def test_one_rate_per_leaf_is_that_of_the_leaf_alone():
    rule = multiplicative(0.2)
    _, states = run(hd(optax.sgd, rule, init_rate=0.3, per_leaf=True), 6)
    rates = states[-1].rate
    assert jax.tree.structure(rates) == jax.tree.structure(W)
    assert abs(float(rates["a"]) - float(rates["b"])) > 1e-3
    alone, w = hd(optax.sgd, rule, init_rate=0.3), jnp.asarray(W["a"])
    state = alone.init(w)
    for _ in range(6):
        updates, state = alone.update(w, state, w)
        w = optax.apply_updates(w, updates)
    assert float(state.rate) == pytest.approx(float(rates["a"]), rel=1e-6)


def test_bounds_hold():
    _, states = run(hd(optax.sgd, clipped(multiplicative(5.0), 0.05, 0.2), init_rate=0.1), 10)
    rates = [float(state.rate) for state in states]
    assert max(rates) == pytest.approx(0.2)
    assert min(rates) >= 0.05
    assert rates[0] == pytest.approx(0.1)


@pytest.mark.parametrize("grad", [0.0, np.nan, np.inf])
def test_a_gradient_that_says_nothing_leaves_the_rate(grad):
    tx, w = hd(optax.sgd, multiplicative(0.5), init_rate=0.1), jnp.ones(3)
    _, state = tx.update(jnp.ones(3), tx.init(w), w)
    _, state = tx.update(jnp.full(3, grad), state, w)
    assert float(state.rate) == pytest.approx(0.1)
    assert float(state.cosine) == 0.0
    _, state = tx.update(jnp.ones(3), state, w)
    assert float(state.rate) == pytest.approx(0.1)


def test_a_rule_of_ones_own_and_one_that_fails():
    halves = hg.optimizers.RateRule(lambda rate, inner, cosine: rate / 2)
    _, states = run(hd(optax.sgd, halves, init_rate=0.4), 3)
    assert [float(s.rate) for s in states] == pytest.approx([0.2, 0.1, 0.05])
    fails = hg.optimizers.RateRule(lambda rate, inner, cosine: jnp.nan)
    assert float(run(hd(optax.sgd, fails, init_rate=0.4), 3)[1][-1].rate) == pytest.approx(0.4)


def test_bounds_hold_from_the_first_step():
    _, states = run(hd(optax.sgd, clipped(multiplicative(0.1), 1e-3, 0.1), init_rate=5.0), 1)
    assert float(states[0].rate) == pytest.approx(0.1)


def test_a_rule_that_returns_a_vector_is_refused():
    pair = hg.optimizers.RateRule(lambda rate, inner, cosine: jnp.stack([rate, rate]))
    with pytest.raises(ValueError, match="returns a scalar"):
        run(hd(optax.sgd, pair, init_rate=0.4), 1)


def test_no_leaf_and_complex_leaves():
    parts = {"a": hd(optax.sgd, multiplicative(0.1), init_rate=0.1), "b": optax.sgd(0.1)}
    tx, w = optax.partition(parts, {"w": "b"}), {"w": jnp.ones(2)}
    updates, _ = tx.update(w, tx.init(w), w)
    np.testing.assert_allclose(updates["w"], -0.1)
    with pytest.raises(TypeError, match="floating dtype"):
        hd(optax.sgd, multiplicative(0.1), init_rate=0.1).init(jnp.ones(2, jnp.complex64))


@pytest.mark.slow
@pytest.mark.parametrize("per_leaf", [False, True])
def test_an_unroll_through_it_is_finite_where_a_gradient_is_zero(per_leaf, x64):
    """A bias at zero has a gradient of zero: reverse and forward mode agree."""

    def inner(w, h, batch, key):
        return 0.5 * jnp.sum((w["a"] - 2.0) ** 2) + 0.5 * jnp.exp(h) * jnp.sum(w["bias"] ** 2)

    problem = hg.BilevelProblem(inner, lambda w, h, batch, key: jnp.sum(w["a"] ** 2) + jnp.sum(w["bias"]) + h)
    rule = multiplicative(0.1)
    make = lambda h: hd(lambda rate: optax.sgd(rate * jnp.exp(h)), rule, init_rate=0.1, per_leaf=per_leaf)  # noqa: E731
    w, steps = {"a": jnp.ones(2), "bias": jnp.zeros(2)}, hg.IndexedBatch((), jnp.arange(4))
    grads = [
        hg.hypergrad(hg.unrolled(problem, mode), make)(w, jnp.array(0.3), steps, (), key=None)
        for mode in (hg.reverse(), hg.forward())
    ]
    assert np.isfinite(float(grads[0]))
    assert float(grads[0]) == pytest.approx(float(grads[1]), rel=1e-6)  # rates are float32


def test_large_and_small_gradients_have_a_cosine():
    for size in (1e18, 1e-18):
        tx, w = hd(optax.sgd, multiplicative(1.0), init_rate=0.1), jnp.ones(4)
        _, state = tx.update(jnp.full(4, size), tx.init(w), w)
        _, state = tx.update(jnp.full(4, size), state, w)
        assert float(state.cosine) == pytest.approx(1.0, rel=1e-5)


def test_memory_is_one_copy_and_dtypes_stay():
    w = {"a": jnp.ones((3, 2), jnp.bfloat16), "b": jnp.ones(2)}
    tx = hd(optax.adam, multiplicative(0.1), init_rate=0.1)
    count = lambda tree: sum(np.size(leaf) for leaf in jax.tree.leaves(tree))  # noqa: E731
    state = tx.init(w)
    assert count(state) == count(optax.adam(1.0).init(w)) + count(w) + 2
    updates, new = jax.jit(tx.update)(w, state, w)
    for one, other in ((updates, w), (new, state)):
        assert jax.tree.map(lambda x: x.dtype, one) == jax.tree.map(lambda x: x.dtype, other)


@pytest.mark.parametrize("make", [optax.sgd, ADAM], ids=["sgd", "adam"])
def test_a_step_costs_eight_operations_and_one_copy_more_per_weight(make):
    """Three products of two operations, a negation, a scaling; a network takes four and more per weight and example."""
    batch, widths = 128, (64, 128, 128, 10)
    w = {f"w{i}": jnp.zeros(shape) for i, shape in enumerate(itertools.pairwise(widths))}
    w |= {f"b{i}": jnp.zeros(width) for i, width in enumerate(widths[1:])}
    weights, scalars = sum(x.size for x in w.values()), 100

    def compiled(tx):
        def step(w, state, x, y):
            def of(w):
                hidden = jax.nn.relu(jax.nn.relu(x @ w["w0"] + w["b0"]) @ w["w1"] + w["b1"])
                return cross_entropy(hidden @ w["w2"] + w["b2"], y)

            updates, state = tx.update(jax.grad(of)(w), state, w)
            return optax.apply_updates(w, updates), state

        data = jnp.zeros((batch, 64)), jnp.zeros(batch, jnp.int32)
        return jax.jit(step, donate_argnums=(0, 1)).lower(w, tx.init(w), *data).compile()

    plain, online = compiled(make(1e-3)), compiled(hd(make, multiplicative(0.1), init_rate=1e-3))
    costs, memories = (
        [getattr(program, analysis)() for program in (plain, online)]
        for analysis in ("cost_analysis", "memory_analysis")
    )
    more = {name: costs[1][name] - costs[0][name] for name in ("flops", "bytes accessed")}
    assert 6 * weights <= more["flops"] <= 8 * weights + scalars
    assert costs[1]["flops"] <= (1 + 8 / (4 * batch)) * costs[0]["flops"] + scalars
    # Floats: a product reads two, writes and reads one where nothing is fused; the others read one and write one.
    assert more["bytes accessed"] <= 4 * ((3 * 4 + 2 * 2) * weights + scalars)
    sizes = [memory.argument_size_in_bytes for memory in memories]
    assert sizes[1] - sizes[0] == 4 * (weights + 1)  # the direction, and the rate; nothing reads the last cosine
    assert memories[1].temp_size_in_bytes - memories[0].temp_size_in_bytes <= 4 * weights


def test_in_a_train_state_that_knows_nothing_of_it():
    model, x = nn.Dense(1), jnp.ones((4, 2))
    tx = hd(optax.adam, multiplicative(0.1), init_rate=1e-4)
    state = TrainState.create(apply_fn=model.apply, params=model.init(jax.random.key(0), x), tx=tx)

    @jax.jit
    def step(state):
        return state.apply_gradients(
            grads=jax.grad(lambda p: jnp.mean((state.apply_fn(p, x) - 3.0) ** 2))(state.params)
        )

    for _ in range(200):
        state = step(state)
    assert float(jnp.abs(state.apply_fn(state.params, x) - 3.0).max()) < 0.05
    assert float(state.opt_state.rate) > 1e-2


@pytest.mark.slow
def test_as_the_inner_optimizer_of_bilevel():
    error = lambda w, b: jnp.mean((b[0] @ w - b[1]) ** 2)  # noqa: E731
    problem = hg.BilevelProblem(
        lambda w, h, b, k: error(w, b) + hg.penalties.l2(w, jnp.exp(h)), lambda w, h, b, k: error(w, b)
    )
    rng = np.random.default_rng(0)
    batches = [(rng.normal(size=(20, 3)).astype(np.float32), rng.normal(size=20).astype(np.float32)) for _ in range(2)]
    tx = hg.bilevel(
        hg.implicit(problem),
        inner_optimizer=hd(optax.adam, multiplicative(0.05), init_rate=1e-3),
        outer_optimizer=optax.adam(0.05),
    )
    variables = hg.BilevelParams(jnp.zeros(3), jnp.zeros(3))
    state, update = tx.init(variables), jax.jit(tx.update)
    for _ in range(50):
        updates, state = update(None, state, variables, inner_batch=batches[0], outer_batch=batches[1])
        variables = optax.apply_updates(variables, updates)
    assert float(state.inner.rate) > 2e-3
    assert int(state.info.num_skipped) == 0


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: hd(optax.adam(1e-3), multiplicative(0.1), init_rate=0.1), TypeError, "make_optimizer to be callable"),
        (lambda: hd(lambda rate: 3, multiplicative(0.1), init_rate=0.1), TypeError, "to return an optax"),
        (lambda: hd(optax.adam, 0.1, init_rate=0.1), TypeError, "rule to be a RateRule"),
        (lambda: hd(optax.adam, multiplicative(0.1), init_rate=0.0), ValueError, "init_rate"),
        (lambda: multiplicative(-1.0), ValueError, "rate"),
        (lambda: additive(0.0), ValueError, "rate"),
        (lambda: clipped(multiplicative(0.1), 1.0, 0.5), ValueError, "high"),
        (lambda: clipped(0.1, 0.5, 1.0), TypeError, "rule to be a RateRule"),
        (lambda: hd(optax.adam, multiplicative(0.1), init_rate=0.1, per_leaf=1), TypeError, "per_leaf"),
    ],
)
def test_bad_settings_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_part_that_does_not_scale_with_the_rate_is_refused_by_leaf():
    def decoupled(rate):
        return optax.chain(optax.adam(rate), optax.add_decayed_weights(-1e-2))

    for scale in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"proportional to the learning rate.*\['a'\]"):
            hd(decoupled, multiplicative(0.1), init_rate=0.1).init(
                {name: jnp.asarray(scale * w) for name, w in W.items()}
            )
    hd(lambda rate: optax.adamw(rate), multiplicative(0.1), init_rate=0.1).init(jax.tree.map(jnp.asarray, W))


IMAGES, LABELS = load_digits(return_X_y=True)
IMAGES, LABELS = np.float32(IMAGES / 16.0), np.int32(LABELS)


def cross_entropy(logits, y):
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def _network(w, x):
    return jax.nn.relu(x @ w["in"]) @ w["out"]


def _start(*shape):
    return np.float32(np.random.default_rng(1).normal(size=shape) * np.sqrt(2.0 / shape[0]))


PROBLEMS = {
    "network": ({"in": _start(64, 64), "out": _start(64, 10)}, lambda w, x, y: cross_entropy(_network(w, x), y)),
    "softmax": (np.zeros((64, 10), np.float32), lambda w, x, y: cross_entropy(x @ w, y)),
    "squares": (np.zeros(64, np.float32), lambda w, x, y: jnp.mean((x @ w - y / 4.5) ** 2)),
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def final(name, online, rate):
    """Return the loss on all examples after 1,000 steps on batches of 64, by Adam at a rate or from it."""
    w, of = PROBLEMS[name]
    x, y = jnp.asarray(IMAGES), jnp.asarray(LABELS)
    tx = hd(optax.adam, multiplicative(0.1), init_rate=1.0) if online else optax.adam(rate)
    state = tx.init(w)
    state = state._replace(rate=rate) if online else state

    def step(carry, key):
        w, state = carry
        rows = jax.random.randint(key, (64,), 0, len(y))
        updates, state = tx.update(jax.grad(of)(w, x[rows], y[rows]), state, w)
        return (optax.apply_updates(w, updates), state), None

    (w, _), _ = jax.lax.scan(step, (w, state), jax.random.split(jax.random.key(2), 1000))
    return of(w, x, y)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["squares", *(pytest.param(n, marks=pytest.mark.slow) for n in ("network", "softmax"))]
)
def test_from_any_start_it_ends_as_a_rate_within_a_factor_of_three(name):
    grid = np.float32(np.geomspace(1e-4, 1.0, 13))
    best = grid[np.nanargmin([float(final(name, False, rate)) for rate in grid])]
    near = max(float(final(name, False, np.float32(best * factor))) for factor in (1 / 3, 3.0))
    ends = [float(final(name, True, np.float32(rate))) for rate in (1e-4, 1e-3, 1e-2, 1e-1)]
    assert max(ends) <= near


@pytest.mark.slow
def test_it_never_diverges_where_the_optimizer_does_not():
    """A hundred random least-squares problems with noise, SGD at random stable rates."""

    @jax.jit
    @jax.vmap
    def ends(key):
        keys = jax.random.split(key, 5)
        scales = 10.0 ** jax.random.uniform(keys[0], (10,), minval=-3.0, maxval=3.0)
        rate = 10.0 ** jax.random.uniform(keys[1], (), minval=-3.0, maxval=0.25) / scales.max()
        w0 = jax.random.normal(keys[2], (10,))

        def path(online):
            tx = hd(optax.sgd, multiplicative(0.1), init_rate=1.0) if online else optax.sgd(rate)
            state = tx.init(w0)
            state = state._replace(rate=rate) if online else state

            def step(carry, key):
                w, state = carry
                grads = scales * (w + 0.1 * jax.random.normal(key, (10,)))
                updates, state = tx.update(grads, state, w)
                return (w + updates, state), 0.5 * jnp.sum(scales * w**2)

            return jax.lax.scan(step, (w0, state), jax.random.split(keys[3], 2000))[1]

        constant, online = path(False), path(True)
        return constant[0], constant.max(), constant[-200:].mean(), online.max(), online[-200:].mean()

    begin, top, last, online_top, online_last = (np.asarray(x) for x in ends(jax.random.split(jax.random.key(0), 100)))
    stable = np.isfinite(top) & (last < 10 * begin)
    assert stable.sum() >= 80
    assert np.isfinite(online_top).all()
    assert (online_last[stable] < 10 * begin[stable]).all()
