"""Estimators without second derivatives: F²SA and SAMA against closed forms and the derivative of a step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from tests.problems import relative_error

X, Y = (np.random.default_rng(0).normal(size=shape) for shape in ((30, 4), (30,)))
STEPS = hg.IndexedBatch((), jnp.arange(1500))


def start():
    """Return weights and log decays in the float dtype of the test."""
    return hg.BilevelParams(jnp.array([0.3, -0.2, 0.1, 0.4]), jnp.array([-1.0, 0.0, 0.5, -0.5]))


def ridge_train(w, h, batch, key):
    error = jnp.asarray(X[:20]) @ w - jnp.asarray(Y[:20])
    return 0.5 * jnp.mean(error**2) + hg.penalties.l2(w, jnp.exp(h))


def ridge_valid(w, h, batch, key):
    return 0.5 * jnp.mean((jnp.asarray(X[20:]) @ w - jnp.asarray(Y[20:])) ** 2)


RIDGE = hg.BilevelProblem(ridge_train, ridge_valid)


def minimum(h, penalty=np.inf):
    """Return argmin L_in + L_out/σ, by linear algebra."""
    matrix = X[:20].T @ X[:20] / 20 + np.diag(np.exp(h)) + X[20:].T @ X[20:] / 10 / penalty
    return np.linalg.solve(matrix, X[:20].T @ Y[:20] / 20 + X[20:].T @ Y[20:] / 10 / penalty)


@jax.custom_jvp
def only_once(x):
    """The identity, in a place that a first derivative evaluates and a second one differentiates."""
    return x


@only_once.defjvp
def _raise(primals, tangents):
    raise RuntimeError("a second derivative")


@jax.custom_vjp
def square(x):
    return x**2


square.defvjp(lambda x: (x**2, x), lambda x, ct: (2 * only_once(x) * ct,))


@pytest.mark.usefixtures("x64")
def test_the_error_of_f2sa_falls_as_one_over_the_penalty():
    h = start().hyperparams
    at_solution = jnp.asarray(minimum(np.asarray(h)))
    exact = hg.hypergrad(hg.implicit(RIDGE, hg.solvers.dense()))(at_solution, h, (), (), key=None)
    errors = []
    for penalty in (1e2, 1e3, 1e4):
        got = hg.hypergrad(hg.first_order(RIDGE, penalty=penalty), optax.sgd(0.3))(*start(), STEPS, (), key=None)
        there = minimum(np.asarray(h), penalty)
        want = penalty * 0.5 * np.exp(h) * (there**2 - np.asarray(at_solution) ** 2)  # ∂_λ L_in = ½ e^λ w²
        assert relative_error(got, want) < 1e-8
        errors.append(float(relative_error(got, exact)))
    assert 9 < errors[0] / errors[1] < 11
    assert 9 < errors[1] / errors[2] < 11
    assert errors[2] < 1e-2


@pytest.mark.parametrize(
    "make", [functools.partial(hg.first_order, penalty=10.0), hg.sama], ids=["first_order", "sama"]
)
def test_no_second_derivative_is_taken(make):
    loss = lambda w, h, batch, key: jnp.sum(square(w - h))  # noqa: E731
    problem = hg.BilevelProblem(loss, lambda w, h, batch, key: jnp.sum(square(w - 1.0)))
    begin = hg.BilevelParams(jnp.zeros(2), jnp.full(2, 0.1))
    run = functools.partial(hg.bilevel, inner_optimizer=optax.adam(0.1), outer_optimizer=optax.adam(0.1), every=2)
    tx = run(make(problem))
    update, state, variables = jax.jit(tx.update), tx.init(begin), begin
    for _ in range(20):
        updates, state = update(None, state, variables, inner_batch=(), outer_batch=())
        variables = optax.apply_updates(variables, updates)
    assert (variables.hyperparams > 0.4).all()  # towards 1
    assert int(state.info.num_skipped) == 0
    exact = run(hg.implicit(problem))
    with pytest.raises(RuntimeError, match="a second derivative"):
        jax.jit(exact.update)(None, exact.init(begin), begin, inner_batch=(), outer_batch=())


def test_f2sa_keeps_one_more_copy_of_weights_and_optimizer_state():
    tx = hg.bilevel(
        hg.first_order(RIDGE, penalty=10.0), inner_optimizer=optax.adam(0.1), outer_optimizer=optax.sgd(0.1)
    )
    size = lambda state: sum(np.size(leaf) for leaf in jax.tree.leaves(state))  # noqa: E731
    state = tx.init(start())
    copy = size(start().params) + size(optax.adam(0.1).init(start().params))
    assert size(state.estimator) == copy + 3  # and the loss of the copy, two counts


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "optimizer",
    [
        None,
        optax.sgd(0.1, momentum=0.9),
        optax.adam(0.1),
        optax.chain(optax.clip_by_global_norm(0.05), optax.rmsprop(0.1)),
        lambda h: optax.sgd(0.1 * jnp.exp(h[0])),
    ],
    ids=["none", "momentum", "adam", "clipped", "of the hyperparameters"],
)
def test_sama_is_the_derivative_of_one_step(optimizer):
    """Against differences of λ ↦ −⟨∂L_out/∂w, update(∂_w L_in(w, λ))⟩, with the optimizer fixed."""
    quartic = lambda w, h, b, k: ridge_train(w, h, b, k) + 0.1 * jnp.sum(w**4 * h**2)  # noqa: E731
    problem = hg.BilevelProblem(quartic, ridge_valid)
    estimator, steps = hg.sama(problem, step=1e-4), hg.IndexedBatch((), jnp.arange(3))
    h = start().hyperparams
    if optimizer is None:
        got, at, update = hg.hypergrad(estimator)(*start(), (), (), key=None), start().params, lambda g: -g
    else:
        got = hg.hypergrad(estimator, optimizer)(*start(), steps, (), key=None)
        made = optimizer if isinstance(optimizer, optax.GradientTransformation) else optimizer(h)
        at, state = start().params, made.init(start().params)
        for _ in range(3):
            updates, state = made.update(jax.grad(quartic)(at, h, (), None), state, at)
            at = optax.apply_updates(at, updates)
        update = lambda g: made.update(g, state, at)[0]  # noqa: E731
    slope = jax.grad(ridge_valid)(at, h, (), None)
    along = lambda h: jnp.vdot(slope, update(jax.grad(quartic)(at, h, (), None)))  # noqa: E731
    width = 1e-5
    want = [(along(h + width * e) - along(h - width * e)) / (2 * width) for e in jnp.eye(4)]
    assert relative_error(got, jnp.stack(want)) < 1e-6


def test_sama_takes_weights_that_never_had_a_gradient_for_fixed():
    problem = hg.BilevelProblem(
        lambda w, h, b, k: jnp.sum((w[:2] - h) ** 2), lambda w, h, b, k: jnp.sum((w - 1.0) ** 2)
    )
    steps = hg.IndexedBatch((), jnp.arange(2))
    got = hg.hypergrad(hg.sama(problem), optax.adam(0.1))(jnp.zeros(3), jnp.full(2, 0.5), steps, (), key=None)
    assert jnp.isfinite(got).all()
    assert (got < 0).all()
    zeros = hg.IndexedBatch((), jnp.arange(1))
    nowhere = hg.hypergrad(hg.sama(problem), optax.adam(0.1))(jnp.zeros(2), jnp.zeros(2), zeros, (), key=None)
    assert jnp.isnan(nowhere).all()  # no weight has a derivative of its update: no silent zero
    bad = hg.BilevelProblem(problem.inner_loss, lambda w, h, b, k: jnp.sum(jnp.sqrt(w - 9.0)))
    got = hg.hypergrad(hg.sama(bad), optax.adam(0.1))(jnp.zeros(3), jnp.full(2, 0.5), steps, (), key=None)
    assert not jnp.isfinite(got).all()


def test_a_copy_that_diverges_starts_again_from_the_weights():
    tx = hg.bilevel(
        hg.first_order(RIDGE, penalty=1e-3), inner_optimizer=optax.sgd(0.5), outer_optimizer=optax.sgd(1e-9), every=5
    )
    update, state, variables, restarts = jax.jit(tx.update), tx.init(start()), start(), 0
    for _ in range(60):
        updates, state = update(None, state, variables, inner_batch=(), outer_batch=())
        variables = optax.apply_updates(variables, updates)
        if state.estimator.num_restarts > restarts:
            restarts = int(state.estimator.num_restarts)
            jax.tree.map(np.testing.assert_array_equal, state.estimator.copy.params, variables.params)
    assert int(state.info.method.num_restarts) == restarts > 0
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((variables, state.estimator)))


def test_the_penalty_may_grow_and_the_copy_may_take_more_steps():
    growing = hg.first_order(RIDGE, penalty=lambda call: 10.0 * (call + 1))
    tx = hg.bilevel(growing, inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.sgd(0.0))
    update, state = jax.jit(tx.update), tx.init(start())
    for _ in range(4):
        _, state = update(None, state, start(), inner_batch=(), outer_batch=())
    assert float(state.info.method.penalty) == 40.0
    # Five steps of the copy per call reach where it ends: the distance does not grow any more.
    few, many = (
        hg.value_and_hypergrad(hg.first_order(RIDGE, penalty=1.0, num_steps=n), optax.sgd(0.1))(
            *start(), hg.IndexedBatch((), jnp.arange(3)), (), key=None
        )[1]
        for n in (1, 5)
    )
    once = minimum(np.asarray(start().hyperparams), 1.0)
    gap = lambda info: float(relative_error(info.state.copy.params, once))  # noqa: E731
    assert gap(many) < 0.5 * gap(few)


def test_they_refuse_what_they_cannot_see():
    steps = hg.IndexedBatch((), jnp.arange(2))
    for make in (functools.partial(hg.first_order, penalty=10.0), hg.sama):
        rate = hg.BilevelProblem(lambda w, h, b, k: jnp.sum((w - h[0]) ** 2), lambda w, h, b, k: jnp.sum(w**2))
        with pytest.raises(ValueError, match=r"hyperparams leaf \[1\], which enters neither"):
            hg.hypergrad(make(rate), lambda h: optax.sgd(h[1]))(
                jnp.zeros(2), [jnp.ones(2), jnp.array(0.1)], steps, (), key=None
            )
        apart = hg.BilevelProblem(lambda w, h, b, k: jnp.sum(w**2) + jnp.sum(h**2), lambda w, h, b, k: jnp.sum(w**2))
        with pytest.raises(ValueError, match="enters neither"):
            hg.hypergrad(make(apart), optax.sgd(0.1))(jnp.zeros(2), jnp.ones(2), steps, (), key=None)
        blind = hg.BilevelProblem(RIDGE.inner_loss, lambda w, h, b, k: jnp.sum(h))
        with pytest.raises(ValueError, match="an outer loss that depends on params"):
            hg.hypergrad(make(blind), optax.sgd(0.1))(*start(), steps, (), key=None)
        with pytest.raises(ValueError, match="without a residual"):
            make(hg.with_residual(RIDGE, hg.residuals.fixed_point(lambda w, h, b, k: w)))
        with pytest.raises(ValueError, match="plain weights"):
            make(hg.responses.with_response(RIDGE, hg.responses.linear()))
        with pytest.raises(TypeError, match="BilevelProblem"):
            make(None)
    with pytest.raises(ValueError, match="penalty"):
        hg.first_order(RIDGE, penalty=0.0)
    with pytest.raises(ValueError, match="num_steps"):
        hg.first_order(RIDGE, penalty=1.0, num_steps=0)
    with pytest.raises(ValueError, match="step"):
        hg.sama(RIDGE, step=0.0)
    with pytest.raises(ValueError, match="inner_optimizer"):
        hg.hypergrad(hg.first_order(RIDGE, penalty=1.0))(*start(), (), (), key=None)
    tx = hg.bilevel(
        hg.first_order(RIDGE, penalty=1.0), inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.sgd(0.1), every=2
    )
    with pytest.raises(ValueError, match="needs it on every call"):
        jax.jit(functools.partial(tx.update, outer_batch=None))(None, tx.init(start()), start(), inner_batch=())


def test_sama_sees_small_moves_of_bfloat16_weights():
    x = jax.random.normal(jax.random.key(0), (400, 200))
    y = x @ jnp.ones(200)
    error = lambda w, rows: 0.5 * jnp.mean((x[rows] @ w.astype(jnp.float32) - y[rows]) ** 2)  # noqa: E731
    problem = hg.BilevelProblem(
        lambda w, h, b, k: error(w, slice(200)) + 0.5 * jnp.exp(h) * jnp.sum(w.astype(jnp.float32) ** 2),
        lambda w, h, b, k: error(w, slice(200, 400)),
    )
    w, h = 0.9 + 0.05 * jax.random.normal(jax.random.key(0), (200,)), jnp.array(-1.0)
    got = hg.hypergrad(hg.sama(problem))(w.astype(jnp.bfloat16), h, (), (), key=None)
    want = hg.hypergrad(hg.implicit(problem, hg.solvers.identity()))(w.astype(jnp.bfloat16), h, (), (), key=None)
    assert float(got) == pytest.approx(float(want), rel=1e-2)


def test_sama_refuses_an_optimizer_that_takes_signs():
    steps = hg.IndexedBatch((), jnp.arange(2))
    with pytest.raises(ValueError, match="whose update has a derivative"):
        hg.hypergrad(hg.sama(RIDGE), optax.lion(1e-2))(*start(), steps, (), key=None)
    between = hg.hypergrad(hg.sama(RIDGE), optax.MultiSteps(optax.sgd(0.1), 4))(*start(), steps, (), key=None)
    assert jnp.isnan(between).all() or float(jnp.abs(between).max()) > 1e-4  # no silent zero


def poisoned(call):
    """Return a factor of the inner loss: NaN at the call with that number."""
    return jnp.where(jnp.asarray(call) == 40, jnp.nan, 1.0)


def test_a_batch_that_the_guard_drops_does_not_cost_the_copy():
    problem = hg.BilevelProblem(lambda w, h, batch, k: batch * ridge_train(w, h, (), k), ridge_valid)
    tx = hg.bilevel(
        hg.first_order(problem, penalty=10.0),
        inner_optimizer=optax.sgd(0.3),
        outer_optimizer=optax.sgd(0.0),
        guard=hg.guard(inner=True),
    )
    update, state = jax.jit(tx.update), tx.init(start())
    variables, norms = start(), []
    for call in range(44):
        updates, state = update(None, state, variables, inner_batch=poisoned(call), outer_batch=())
        variables = optax.apply_updates(variables, updates)
        norms.append(float(state.info.hypergrad_norm))
    assert int(state.info.method.num_restarts) == 0
    assert norms[42] == pytest.approx(norms[39], rel=0.05)


@pytest.mark.slow
def test_the_copy_searches_along_its_own_loss():
    """Keywords that the user hands to the weights' line search are not those of the copy."""
    tx = hg.bilevel(hg.first_order(RIDGE, penalty=10.0), inner_optimizer=optax.lbfgs(), outer_optimizer=optax.sgd(0.0))
    state, variables = tx.init(start()), start()
    loss = lambda w: ridge_train(w, variables.hyperparams, (), None)  # noqa: E731
    update = jax.jit(
        lambda g, v, s, value: tx.update(g, s, v, inner_batch=(), outer_batch=(), value=value, grad=g, value_fn=loss)
    )
    for _ in range(25):
        value, grad = jax.value_and_grad(loss)(variables.params)
        updates, state = update(grad, variables, state, value)
        variables = optax.apply_updates(variables, updates)
    want = minimum(np.asarray(variables.hyperparams), 10.0)
    assert relative_error(state.estimator.copy.params, want) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "guard", "state", "scratch"),
    [
        (lambda problem: hg.first_order(problem, penalty=10.0), None, 3, 4.5),
        (lambda problem: hg.first_order(problem, penalty=10.0), hg.guard(), 3, 8.5),
        (hg.sama, hg.guard(), 0, 3.5),
        (hg.implicit, hg.guard(), 1, 7.5),
    ],
    ids=["first_order", "first_order, guarded", "sama", "implicit"],
)
def test_memory_in_copies_of_the_weights(make, guard, state, scratch):
    """Of a joint step with Adam inside: state beside that of plain training, and scratch, where that takes 1.1."""
    w = {"a": jnp.zeros((784, 512)), "b": jnp.zeros((512, 10))}
    count = 4 * sum(x.size for x in jax.tree.leaves(w))

    def error(w, batch):
        logits = jnp.tanh(batch[0] @ w["a"]) @ w["b"]
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    problem = hg.BilevelProblem(
        lambda w, h, b, k: error(w, b) + hg.penalties.l2(w, jnp.exp(h)), lambda w, h, b, k: error(w, b)
    )
    tx = hg.bilevel(make(problem), inner_optimizer=optax.adam(1e-3), outer_optimizer=optax.sgd(0.1), guard=guard)
    variables, batch = hg.BilevelParams(w, jnp.array(-3.0)), (jnp.zeros((32, 784)), jnp.zeros(32, jnp.int32))

    def step(variables, state):
        updates, state = tx.update(None, state, variables, inner_batch=batch, outer_batch=batch)
        return optax.apply_updates(variables, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(variables, tx.init(variables)).compile()
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes / count == pytest.approx(3 + state, abs=0.1)
    assert memory.temp_size_in_bytes / count <= scratch
