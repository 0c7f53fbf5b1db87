"""Persistent forward mode: windows one after the other have the derivative of one long unroll."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg

pytestmark = pytest.mark.usefixtures("x64")
X = np.random.default_rng(0).normal(size=(12, 8, 3))
W, H = np.array([0.5, -1.0, 2.0]), {"rate": np.array(-2.0), "decay": np.array([-1.0, 0.0, 0.3])}
OPTIMIZERS = {
    "momentum": lambda h: optax.sgd(jnp.exp(h["rate"]), momentum=0.9),
    "adam": lambda h: optax.adam(jnp.exp(h["rate"]), eps_root=1e-8),
}


def inner(w, h, batch, key):
    return 0.5 * jnp.mean((batch @ w - batch.sum(axis=1)) ** 2) + hg.penalties.l2(w, jnp.exp(h["decay"]))


PROBLEM = hg.BilevelProblem(inner, lambda w, h, batch, key: 0.5 * jnp.sum((w - 1.0) ** 2) + 0.1 * h["rate"] ** 2)


def windows(mode, optimizer, length, count, *, problem=PROBLEM, **initial):
    """Return the hypergradient and the info after each window, at the same λ."""
    recorded = optax.chain(optax.trace(0.0), optax.scale(0.0))
    estimator = hg.unrolled(problem, mode)
    tx = hg.bilevel(estimator, inner_optimizer=optimizer, outer_optimizer=recorded, window=length)
    variables, found = hg.BilevelParams(W, H), []
    state, update = tx.init(variables, **initial), jax.jit(tx.update)
    for start in range(0, length * count, length):
        batches = jnp.asarray(X[start : start + length])
        updates, state = update(None, state, variables, inner_batch=batches, outer_batch=())
        variables = optax.apply_updates(variables, updates)
        found.append((state.outer[0].trace, state.info))
    return found


def whole(optimizer, length, **options):
    """Return the hypergradient of one unroll by reverse mode."""
    return windows(hg.reverse(), optimizer, length, 1, **options)[0][0]


def equal(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), one, other)


@pytest.mark.parametrize("name", [pytest.param("momentum", marks=pytest.mark.slow), "adam"])
def test_windows_add_up_to_one_unroll(name):
    found = windows(hg.forward(persistent=True), OPTIMIZERS[name], 3, 4)
    for k, (grad, info) in enumerate(found):
        equal(grad, whole(OPTIMIZERS[name], 3 * (k + 1)))
        assert int(info.method.age) == 3 * (k + 1)
        assert float(info.method.tangent_norm) > 0


@pytest.mark.slow
def test_after_the_horizon_it_starts_anew():
    optimizer = OPTIMIZERS["momentum"]
    short = windows(hg.forward(persistent=True, horizon=6), optimizer, 3, 4)
    never = windows(hg.forward(persistent=True), optimizer, 3, 4)
    plain = windows(hg.reverse(), optimizer, 3, 4)
    assert [int(info.method.age) for _, info in short] == [3, 6, 3, 6]
    for k, same in enumerate([never, never, plain]):
        equal(short[k][0], same[k][0])
    assert abs(float(short[3][0]["rate"]) - float(never[3][0]["rate"])) > 1e-6


def test_a_functional_call_starts_anew():
    batches, optimizer = jnp.asarray(X[:3]), OPTIMIZERS["adam"]
    fn = hg.value_and_hypergrad(hg.unrolled(PROBLEM, hg.forward(persistent=True)), optimizer)
    (_, first), info = fn(W, H, batches, (), key=None)
    (_, second), info = fn(W, H, batches, (), key=None, state=info.state)
    equal(second, first)
    equal(first, hg.hypergrad(hg.unrolled(PROBLEM), optimizer)(W, H, batches, (), key=None))
    assert int(info.method.age) == 3


def test_a_functional_call_differentiates_a_fresh_optimizer_state():
    square = lambda w, h, batch, key: 0.5 * jnp.sum(w**2)  # noqa: E731
    problem, none = hg.BilevelProblem(square, square), hg.IndexedBatch((), jnp.arange(5))
    injected = lambda h: optax.inject_hyperparams(optax.sgd)(learning_rate=0.1 * jnp.exp(h))  # noqa: E731
    modes = hg.forward(), hg.forward(persistent=True)
    one, two = (
        hg.hypergrad(hg.unrolled(problem, mode), injected)(jnp.ones(2), jnp.zeros(()), none, (), key=None)
        for mode in modes
    )
    assert abs(float(one)) > 0.1
    equal(one, two)


@pytest.mark.slow
def test_tangents_that_overflow_start_again():
    """The logistic map x ← r x (1 − x) is chaotic at r = 3.9: tangents double at each step."""
    chaos = lambda w, h, batch, key: -jnp.sum((h - 1) * w**2 / 2 - h * w**3 / 3)  # noqa: E731
    problem = hg.BilevelProblem(chaos, lambda w, h, batch, key: jnp.sum(w))
    tx = hg.bilevel(
        hg.unrolled(problem, hg.forward(persistent=True)),
        inner_optimizer=optax.sgd(1.0),
        outer_optimizer=optax.sgd(0.0),
        window=5,
    )
    with jax.enable_x64(False):
        variables = hg.BilevelParams(jnp.array([0.3]), jnp.array(3.9))
        state, update, reasons, ages = tx.init(variables), jax.jit(tx.update), [], []
        for _ in range(100):
            updates, state = update(
                None, state, variables, inner_batch=hg.IndexedBatch((), jnp.arange(5)), outer_batch=()
            )
            variables = optax.apply_updates(variables, updates)
            reasons.append(hg.SkipReason(int(state.info.skip_reason)))
            ages.append(int(state.info.method.age))
    assert set(reasons) == {hg.SkipReason.NONE, hg.SkipReason.HYPERGRAD}
    assert [age == 0 for age in ages] == [reason == hg.SkipReason.HYPERGRAD for reason in reasons]
    assert reasons.count(hg.SkipReason.HYPERGRAD) < 10


def test_calls_without_an_outer_step_need_no_outer_batch():
    tx = hg.bilevel(
        hg.unrolled(PROBLEM, hg.forward(persistent=True)),
        inner_optimizer=OPTIMIZERS["momentum"],
        outer_optimizer=optax.sgd(0.0),
        window=1,
        every=2,
    )
    variables = hg.BilevelParams(W, H)
    state = tx.init(variables)
    _, state = tx.update(None, state, variables, inner_batch=jnp.asarray(X[0]), outer_batch=None)
    assert int(state.estimator.age) == 1


def test_best_response_is_that_of_the_window():
    fn = lambda mode: hg.best_response(hg.unrolled(PROBLEM, mode), OPTIMIZERS["momentum"])  # noqa: E731
    one, two = (fn(mode)(W, H, jnp.asarray(X[:3]), key=None) for mode in (hg.forward(), hg.forward(persistent=True)))
    equal(one, two)


@pytest.mark.slow
def test_it_goes_on_where_no_outer_step_is_due():
    """Eight calls of one step, an outer step at every fourth: they equal unrolls of four and of eight."""
    tx = hg.bilevel(
        hg.unrolled(PROBLEM, hg.forward(persistent=True)),
        inner_optimizer=OPTIMIZERS["momentum"],
        outer_optimizer=optax.sgd(0.0),
        window=1,
        every=4,
    )
    variables = hg.BilevelParams(W, H)
    state, update = tx.init(variables), jax.jit(tx.update)
    for k in range(8):
        updates, state = update(None, state, variables, inner_batch=jnp.asarray(X[k]), outer_batch=())
        variables = optax.apply_updates(variables, updates)
        if k % 4 == 3:
            exact = whole(OPTIMIZERS["momentum"], k + 1)
            assert float(state.info.hypergrad_norm) == pytest.approx(float(optax.tree.norm(exact)), rel=1e-9)


def test_a_rate_per_step_is_learned_by_signs():
    """As in FDS: the sign of the hypergradient, smaller steps where it flips."""
    tx = hg.bilevel(
        hg.unrolled(PROBLEM, hg.forward(persistent=True, horizon=20)),
        inner_optimizer=OPTIMIZERS["momentum"],
        outer_optimizer=optax.rprop(0.05, min_step_size=1e-4, max_step_size=0.2),
        window=1,
    )
    variables = hg.BilevelParams(W, H)

    def step(carry, batch):
        variables, state = carry
        updates, state = tx.update(None, state, variables, inner_batch=batch, outer_batch=())
        return (optax.apply_updates(variables, updates), state), state.info.outer_loss

    many = jnp.asarray(np.tile(X, (20, 1, 1)))
    (variables, state), losses = jax.jit(lambda c: jax.lax.scan(step, c, many))((variables, tx.init(variables)))
    assert int(state.info.num_skipped) == 0
    assert float(losses[-20:].mean()) < 0.6 * float(losses[:20].mean())


@pytest.mark.slow
def test_model_state_is_carried_too():
    """An average of the weights in the model state enters the outer loss: its tangent lives on as well."""

    def stateful(w, h, batch, key, state):
        return inner(w, h, batch, key), {"mean": 0.9 * state["mean"] + 0.1 * w}

    outer = lambda w, h, batch, key, state: (jnp.sum((state["mean"] - 1.0) ** 2) + 0.0 * w.sum(), state)  # noqa: E731
    problem = hg.BilevelProblem(stateful, outer, stateful=True)
    options = {"problem": problem, "model_state": {"mean": jnp.zeros(3)}}
    found = windows(hg.forward(persistent=True), OPTIMIZERS["momentum"], 3, 2, **options)
    equal(found[1][0], whole(OPTIMIZERS["momentum"], 6, **options))


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="no horizon without persistent"):
        hg.forward(horizon=5)
    with pytest.raises(ValueError, match="horizon"):
        hg.forward(persistent=True, horizon=0)
    with pytest.raises(TypeError, match="persistent"):
        hg.forward(persistent=1)
    square = lambda w, h, batch, key: jnp.sum((w - h) ** 2)  # noqa: E731
    many = hg.unrolled(hg.BilevelProblem(square, square), hg.forward(persistent=True))
    with pytest.raises(ValueError, match="at most 1,000 hyperparameters"):
        hg.hypergrad(many, optax.sgd(0.1))(jnp.zeros(2000), jnp.zeros(2000), jnp.arange(1), (), key=None)
