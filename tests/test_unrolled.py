"""Unrolled differentiation: every mode against plain autodiff and finite differences, in float64, and what it keeps."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.drivers import one_estimate
from hypergrad.training import split_keys
from tests.problems import (
    autodiff_steps,
    batch_norm,
    finite_differences,
    logistic,
    network,
    relative_error,
    ridge,
    window_of,
)

STEPS = 7
MODES = {
    "default": hg.reverse(),
    "none": hg.reverse(math.inf),
    "two levels": hg.reverse(3),
    "one segment": hg.reverse(20),
    "autodiff": hg.reverse(1, mixed=False),
    "no loop": hg.reverse(2, unroll=True),
    "forward": hg.forward(),
}
others_are_slow = pytest.mark.parametrize(
    "mode", ["default", *(pytest.param(m, marks=pytest.mark.slow) for m in ("two levels", "autodiff", "forward"))]
)


def optimizer_hyperparams(params):
    """Return hyperparameters of the inner optimizer of each kind: one, one per layer, one per weight, one per step."""
    return {
        "rates": jnp.linspace(0.02, 0.06, STEPS),
        "layers": {name: jnp.array(0.5 + i) for i, name in enumerate(params)},
        "weights": jax.tree.map(lambda w: 0.5 + 0.1 * jnp.arange(w.size).reshape(w.shape), params),
        "decay": jax.tree.map(lambda w: jnp.full(w.shape, 0.1), params),
        "momentum": jnp.array(0.7),
    }


def momentum(h):
    """Return stochastic gradient descent with all of them."""
    rates = hg.optimizers.schedule(h["rates"])
    return optax.chain(
        optax.trace(h["momentum"], nesterov=True),
        hg.optimizers.add_decayed_weights(h["decay"]),
        hg.optimizers.scale_by_learning_rate(h["weights"]),
        hg.optimizers.scale_by_learning_rate(lambda n: jax.tree.map(lambda x: -x * rates(n), h["layers"])),
    )


def adam(h):
    """Return Adam with all of them: momentum is the first beta, and gives the second."""
    rates = hg.optimizers.schedule(h["rates"])
    return optax.chain(
        optax.scale_by_adam(b1=h["momentum"], b2=1 - (1 - h["momentum"]) ** 2, eps_root=1e-8),
        hg.optimizers.add_decayed_weights(h["decay"]),
        hg.optimizers.scale_by_learning_rate(h["weights"]),
        hg.optimizers.scale_by_learning_rate(lambda n: jax.tree.map(lambda x: -x * rates(n), h["layers"])),
    )


@functools.cache
def case(name):
    """Return a problem over loss and optimizer hyperparameters, away from the optimum, with a window of batches."""
    with jax.enable_x64(True):
        base = {"ridge": ridge, "logistic": logistic}[name]()
        problem = hg.BilevelProblem(
            lambda w, h, b, k: base.problem.inner_loss(w, h["loss"], b, k),
            lambda w, h, b, k: base.problem.outer_loss(w, h["loss"], b, k),
        )
        start = jax.tree.map(lambda w: 1.5 * w + 0.1, base.variables.params)
        hyper = {"loss": base.variables.hyperparams, **optimizer_hyperparams(start)}
        scale = jnp.linspace(0.5, 1.5, STEPS)
        batches = jax.tree.map(
            lambda x: jnp.stack([s * x if jnp.issubdtype(x.dtype, jnp.floating) else x for s in scale]),
            base.inner_batch,
        )
        return problem, (start, hyper, batches, base.outer_batch)


def run(estimator, optimizer, args, key=None):
    """Return ((value, hypergradient), info), compiled."""
    return jax.jit(functools.partial(hg.value_and_hypergrad(estimator, optimizer), key=key))(*args)


@functools.cache
def autodiff(name, optimizer):
    """Return the hypergradient by plain reverse mode."""
    problem, args = case(name)
    return run(autodiff_steps(problem), optimizer, args)[0][1]


@functools.cache
def differences(name, optimizer):
    """Return the hypergradient by central differences of a plain loop over the window."""
    problem, (start, hyper, batches, outer_batch) = case(name)

    @jax.jit
    def value(h):
        params, tx = start, optimizer(h)
        state = tx.init(params)
        for i in range(STEPS):
            grads = jax.grad(problem.inner_loss)(params, h, jax.tree.map(lambda x, i=i: x[i], batches), None)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return problem.outer_loss(params, h, outer_batch, None)

    return finite_differences(value, hyper)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mode", [pytest.param(m, marks=[pytest.mark.slow] * (m != "default")) for m in MODES])
@pytest.mark.parametrize(
    ("name", "optimizer"), [("ridge", momentum), pytest.param("logistic", adam, marks=pytest.mark.slow)]
)
def test_all_modes_against_autodiff_and_finite_differences(name, optimizer, mode):
    problem, args = case(name)
    (_, grad), info = run(hg.unrolled(problem, MODES[mode]), optimizer, args)
    for part in grad:
        assert relative_error(grad[part], autodiff(name, optimizer)[part]) < 1e-10, part
        assert relative_error(grad[part], differences(name, optimizer)[part]) < 1e-6, part
    assert not bool(info.skipped)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "steps"),
    [("ridge", 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("ridge", 60), ("logistic", 20)))],
)
def test_k_steps_equal_k_neumann_terms_at_the_optimum(name, steps):
    base, rate = {"ridge": ridge, "logistic": logistic}[name](), 0.3
    args = (*base.variables, window_of(base.inner_batch, steps), base.outer_batch)
    for mode in (hg.reverse(), hg.forward()):
        (_, grad), _ = run(hg.unrolled(base.problem, mode), optax.sgd(rate), args)
        (_, terms), _ = run(
            hg.implicit(base.problem, hg.solvers.neumann(steps, rate)), None, (*args[:2], base.inner_batch, args[3])
        )
        assert relative_error(grad, terms) < 1e-10


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_one_step_is_the_second_order_gradient_of_darts():
    """∂_α L_val(w', α) − ξ ∂²_{α,w} L_train(w, α) ∇_w' L_val(w', α),  w' = w − ξ ∇L_train(w, α)."""
    base, xi = logistic(), 0.2
    start, alpha = jax.tree.map(lambda w: w + 0.3, base.variables.params), base.variables.hyperparams
    (_, grad), _ = run(
        hg.unrolled(base.problem), optax.sgd(xi), (start, alpha, window_of(base.inner_batch, 1), base.outer_batch)
    )
    flat, unravel = jax.flatten_util.ravel_pytree(start)
    flat_alpha, unravel_alpha = jax.flatten_util.ravel_pytree(alpha)
    slope = jax.grad(lambda w, a: base.problem.inner_loss(unravel(w), unravel_alpha(a), base.inner_batch, None))
    outer = lambda w, a: base.problem.outer_loss(unravel(w), unravel_alpha(a), base.outer_batch, None)  # noqa: E731

    @jax.jit
    def second_order(w, a):
        at_reached, direct = jax.grad(outer, argnums=(0, 1))(w - xi * slope(w, a), a)
        return direct - xi * jax.jacobian(slope, argnums=1)(w, a).T @ at_reached

    assert relative_error(grad, unravel_alpha(second_order(flat, flat_alpha))) < 1e-12


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_truncation_differentiates_the_last_steps_from_where_they_begin():
    optimizer = adam
    problem, (start, hyper, batches, outer_batch) = case("logistic")
    tx, head = optimizer(hyper), 4
    params, state, gradient = start, tx.init(start), jax.jit(jax.grad(problem.inner_loss))
    for i in range(head):
        grads = gradient(params, hyper, jax.tree.map(lambda x, i=i: x[i], batches), None)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    rest = jax.tree.map(lambda x: x[head:], batches)
    oracle = autodiff_steps(problem)
    there = hg.Trained(params, state)
    ctx = hg.Context(problem, hyper, there, there, rest, outer_batch, split_keys(None), optimizer)
    want = oracle.estimate((), ctx._replace(tape=jax.jit(lambda: oracle.train((), ctx)[2])()))
    args = (start, hyper, batches, outer_batch)
    for mode in (hg.reverse(truncate=STEPS - head), hg.reverse(2, truncate=STEPS - head, mixed=False)):
        (value, grad), _ = run(hg.unrolled(problem, mode), optimizer, args)
        assert relative_error(grad, want.hypergrad) < 1e-10
        assert float(value) == pytest.approx(float(want.value), rel=1e-12)
    assert float(jnp.abs(grad["rates"][:head]).max()) == 0.0
    (_, whole), _ = run(hg.unrolled(problem, hg.reverse(truncate=STEPS + 5)), optimizer, args)
    (_, all_steps), _ = run(hg.unrolled(problem), optimizer, args)
    assert relative_error(whole, all_steps) == 0.0
    assert relative_error(grad, whole) > 1e-3


@pytest.mark.slow
def test_the_estimate_carries_what_the_window_reached():
    noisy = network(dropout=0.3)
    tx = optax.adam(1e-2, eps_root=1e-8)
    batches = jax.tree.map(lambda x: x.reshape(4, 4, *x.shape[1:]), noisy.inner_batch)
    key, (params, hyper) = jax.random.key(3), noisy.variables
    estimator = hg.unrolled(noisy.problem, hg.reverse(2))
    result, at = one_estimate(estimator, tx)(noisy.variables, batches, noisy.outer_batch, key)
    state, inner_key, gradient = (
        tx.init(params),
        jax.random.split(key, 3)[0],
        jax.jit(jax.grad(noisy.problem.inner_loss)),
    )
    for i in range(4):
        batch = jax.tree.map(lambda x, i=i: x[i], batches)
        grads = gradient(params, hyper, batch, jax.random.fold_in(inner_key, i))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert relative_error(at.params, params) < 1e-5
    assert relative_error(at.inner_state[0].mu, state[0].mu) < 1e-5
    assert int(at.inner_state[0].count) == 4
    value = noisy.problem.outer_loss(params, hyper, noisy.outer_batch, jax.random.split(key, 3)[1])
    assert float(result.value) == pytest.approx(float(value), rel=1e-5)
    assert result.info == ()


@pytest.mark.slow
@pytest.mark.parametrize("window", [1, 4])
def test_no_second_forward_pass(window):
    """The inner loss runs once a step and call, whether or not an outer step is due."""
    base, calls = network(), []

    def counted(w, h, batch, key):
        jax.debug.callback(lambda _: calls.append(1), optax.tree.sum(w))
        return base.problem.inner_loss(w, h, batch, key)

    problem = hg.BilevelProblem(counted, base.problem.outer_loss)
    estimator = hg.unrolled(problem, hg.reverse(math.inf, mixed=False))
    tx = hg.bilevel(estimator, inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.sgd(0.1), window=window, every=2)
    batch = base.inner_batch if window == 1 else window_of(base.inner_batch, window)
    update, state = jax.jit(tx.update), tx.init(base.variables)
    for call in range(1, 5):
        calls.clear()
        _, state = update(None, state, base.variables, inner_batch=batch, outer_batch=base.outer_batch)
        jax.effects_barrier()
        assert len(calls) == window, call


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@others_are_slow
def test_model_state_is_differentiated_through(mode):
    """The outer loss reads running statistics that the inner steps wrote: they depend on weights and decay."""
    problem, variables, stats, batch = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float64) if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating) else x,
        batch_norm(has_aux=True),
        is_leaf=lambda x: isinstance(x, hg.BilevelProblem),
    )
    variables = variables._replace(hyperparams={"decay": variables.hyperparams, "rate": jnp.array(-2.0)})
    inner = lambda w, h, *rest, loss=problem.inner_loss: loss(w, h["decay"], *rest)  # noqa: E731
    outer = lambda w, h, *rest, loss=problem.outer_loss: loss(w, h["decay"], *rest)  # noqa: E731
    problem = hg.BilevelProblem(inner, outer, stateful=True, has_aux=True)
    optimizer, batches = lambda h: optax.sgd(jnp.exp(h["rate"]), momentum=0.9), window_of(batch, 4)
    fn = jax.jit(functools.partial(hg.value_and_hypergrad(hg.unrolled(problem, MODES[mode]), optimizer), key=None))
    (_, grad), info = fn(*variables, batches, batch, model_state=stats)
    value = lambda h: fn(variables.params, h, batches, batch, model_state=stats)[0][0]  # noqa: E731
    assert relative_error(grad, finite_differences(value, variables.hyperparams)) < 1e-6
    assert info.aux["logits"].shape == (16, 3)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_models_with_a_custom_vjp_get_plain_autodiff():
    @jax.custom_vjp
    def cube(x):
        return x**3

    cube.defvjp(lambda x: (x**3, x), lambda x, ct: (3 * x**2 * ct,))
    inner = lambda w, h, b, k: jnp.sum(cube(w - h)) + jnp.sum(w**2)  # noqa: E731
    problem = hg.BilevelProblem(inner, lambda w, h, b, k: jnp.sum(cube(w)))
    args = (jnp.array([0.3, 0.5]), jnp.array([0.1, -0.1]), jnp.arange(5), ())
    value = lambda h: run(hg.unrolled(problem), optax.sgd(0.1), (args[0], h, *args[2:]))[0][0]  # noqa: E731
    differences = finite_differences(value, args[1])
    for mode in (hg.reverse(), hg.forward()):
        (_, grad), _ = run(hg.unrolled(problem, mode), optax.sgd(0.1), args)
        assert relative_error(grad, differences) < 1e-8


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_derivatives_of_a_hypergradient():
    """The mixed rule may itself be differentiated in reverse: a Hessian of the outer loss in λ."""
    problem, (start, hyper, batches, outer_batch) = case("logistic")
    grad = hg.hypergrad(hg.unrolled(problem), inner_optimizer=adam)
    pick = jax.jit(lambda h: jnp.vdot(grad(start, h, batches, outer_batch, key=None)["rates"], jnp.arange(STEPS)))
    at = lambda rates: pick({**hyper, "rates": rates})  # noqa: E731
    assert relative_error(jax.grad(at)(hyper["rates"]), finite_differences(at, hyper["rates"])) < 1e-6


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@others_are_slow
def test_a_loss_may_close_over_traced_values(mode):
    """Under jit, vmap and scan, and differentiated in what it closes over; integers too."""
    start, batches = jnp.array([0.3, 0.7]), jnp.linspace(0.1, 0.5, 6)

    def total(scale, place, mode=MODES[mode]):
        inner = lambda w, h, b, k: jnp.sum(jnp.cosh(w * h) * scale + b * w) + w[place] * h[0]  # noqa: E731
        problem = hg.BilevelProblem(inner, lambda w, h, b, k: scale * jnp.sum(w**2))
        return hg.hypergrad(hg.unrolled(problem, mode), optax.sgd(0.1))(start, jnp.ones(2), batches, (), key=None).sum()

    scales, place = jnp.array([1.3, 0.8]), jnp.array(1)
    want = jnp.stack([total(s, 1, MODES["autodiff"]) for s in scales])
    np.testing.assert_allclose(jax.jit(total)(scales[0], place), want[0], rtol=1e-12)
    np.testing.assert_allclose(jax.jit(jax.vmap(total, (0, None)))(scales, place), want, rtol=1e-12)
    np.testing.assert_allclose(jax.lax.scan(lambda c, s: (c, total(s, place)), 0, scales)[1], want, rtol=1e-12)
    slope = finite_differences(lambda s: total(s, 1, MODES["autodiff"]), scales[0])
    np.testing.assert_allclose(jax.jit(jax.grad(total))(scales[0], place), slope, rtol=1e-7)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "forward"])
def test_a_fresh_optimizer_state_may_depend_on_the_hyperparameters(mode):
    base = logistic()
    problem = hg.BilevelProblem(
        lambda w, h, b, k: base.problem.inner_loss(w, h["loss"], b, k),
        lambda w, h, b, k: base.problem.outer_loss(w, h["loss"], b, k),
    )
    optimizers = {
        "accumulator": lambda h: optax.adagrad(0.1, initial_accumulator_value=h["x"]),
        "injected": lambda h: optax.inject_hyperparams(optax.sgd)(learning_rate=h["x"]),
        "twice": lambda h: optax.adagrad(h["x"], initial_accumulator_value=h["x"]),
    }
    start, hyper = (
        jax.tree.map(lambda w: w + 0.3, base.variables.params),
        {"loss": base.variables.hyperparams, "x": jnp.array(0.2)},
    )
    batches = window_of(base.inner_batch, 3)
    for optimizer in optimizers.values():
        fn = jax.jit(functools.partial(hg.value_and_hypergrad(hg.unrolled(problem, MODES[mode]), optimizer), key=None))
        (_, grad), _ = fn(start, hyper, batches, base.outer_batch)
        value = lambda x, fn=fn: fn(start, {**hyper, "x": x}, batches, base.outer_batch)[0][0]  # noqa: E731
        assert float(grad["x"]) == pytest.approx(float(finite_differences(value, hyper["x"])), rel=1e-6)
    tx = hg.bilevel(
        hg.unrolled(problem), inner_optimizer=optimizers["injected"], outer_optimizer=optax.sgd(0.1), window=1
    )
    variables = hg.BilevelParams(start, hyper)
    with pytest.raises(ValueError, match=r"leaf \['x'\], which enters neither.*initial state alone"):
        tx.update(None, tx.init(variables), variables, inner_batch=base.inner_batch, outer_batch=base.outer_batch)


def test_losses_without_data():
    problem = hg.BilevelProblem(lambda w, h, b, k: 0.5 * jnp.sum(jnp.exp(h) * w**2 - w), lambda w, h, b, k: jnp.sum(w))
    variables = hg.BilevelParams(jnp.ones(1), jnp.zeros(1))
    for window in (1, 3):
        tx = hg.bilevel(
            hg.unrolled(problem), inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.sgd(0.1), window=window, every=2
        )
        state = tx.init(variables)
        idle, state = tx.update(None, state, variables, inner_batch=(), outer_batch=())
        due, _ = tx.update(None, state, variables, inner_batch=(), outer_batch=())
        assert float(jnp.abs(due.hyperparams[0])) > 0.0
        assert relative_error(due.params, idle.params) < 1e-6
    steps = hg.IndexedBatch((), jnp.arange(3))
    (_, grad), _ = hg.value_and_hypergrad(hg.unrolled(problem), optax.sgd(0.1))(*variables, steps, (), key=None)
    assert relative_error(optax.tree.scale(-0.1, grad), due.hyperparams) < 1e-6


def test_plain_numbers_are_hyperparameters_too():
    problem = hg.BilevelProblem(lambda w, h, b, k: jnp.sum(h["a"] * w**2), lambda w, h, b, k: jnp.sum(w**2))
    grads = [
        hg.hypergrad(hg.unrolled(problem, mode), optax.sgd(0.1))(jnp.ones(2), {"a": 1.1}, jnp.arange(2), (), key=None)
        for mode in (hg.reverse(), hg.forward())
    ]
    assert relative_error(*grads) < 1e-6


INDEXED = {
    "unrolled": hg.unrolled,
    "forward": lambda problem: hg.unrolled(problem, hg.forward()),
    "implicit": lambda problem: hg.implicit(problem, hg.solvers.neumann(3, 0.1)),
}


@pytest.mark.parametrize(
    ("window", "name"),
    [
        pytest.param(w, name, marks=[pytest.mark.slow] * ((w, name) != (1, "implicit")))
        for w in (1, 3)
        for name in INDEXED
    ],
)
def test_batches_by_index_equal_batches(name, window):
    base = network()
    indices = jnp.asarray(np.random.default_rng(0).integers(0, 16, (3, 5)))
    if window == 1:
        indices = indices[0]
    gathered = jax.tree.map(lambda x: x[indices], base.inner_batch)
    tx = hg.bilevel(
        INDEXED[name](base.problem), inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.sgd(0.1), window=window
    )
    update = jax.jit(tx.update)
    outer_indexed = hg.IndexedBatch(base.outer_batch, jnp.array([3, 1, 7]))
    outer = jax.tree.map(lambda x: x[jnp.array([3, 1, 7])], base.outer_batch)
    results = [
        update(None, tx.init(base.variables), base.variables, inner_batch=inner, outer_batch=data)[0]
        for inner, data in ((gathered, outer), (hg.IndexedBatch(base.inner_batch, indices), outer_indexed))
    ]
    assert relative_error(*results) < 1e-6


@pytest.mark.slow
def test_an_index_may_stand_for_a_part_of_a_batch():
    base, indices = network(), jnp.arange(12).reshape(3, 4)
    problem = hg.BilevelProblem(
        lambda w, h, b, k: b["weight"] * base.problem.inner_loss(w, h, b["data"], k), base.problem.outer_loss
    )
    fn = jax.jit(functools.partial(hg.hypergrad(hg.unrolled(problem), inner_optimizer=optax.sgd(0.1)), key=None))
    weight = jnp.array([1.0, 2.0, 3.0])
    data = jax.tree.map(lambda x: x[indices], base.inner_batch)
    grads = [
        fn(*base.variables, {"weight": weight, "data": part}, base.outer_batch)
        for part in (data, hg.IndexedBatch(base.inner_batch, indices))
    ]
    assert relative_error(*grads) < 1e-6
    with pytest.raises(ValueError, match=r"inner_batch leaf \['weight'\] with a common leading window axis \(3"):
        fn(*base.variables, {"weight": weight[:2], "data": hg.IndexedBatch(base.inner_batch, indices)}, ())


def scratch(mode, length, *, indexed=False, learned=False):
    """Return scratch bytes and bytes of the weights of one hypergradient, compiled as users compile it."""
    width, size = 64, 8
    rng = np.random.default_rng(0)
    params = {f"w{i}": jnp.asarray(rng.normal(size=(width, width)) / 8, jnp.float32) for i in range(2)}
    data = jnp.asarray(rng.normal(size=(32, width)), jnp.float32)

    def loss(w, h, batch, key):
        return jnp.mean((jnp.tanh(batch @ w["w0"]) @ w["w1"] - batch) ** 2) + hg.penalties.l2(
            w, jax.tree.map(jnp.exp, h)
        )

    estimator = hg.unrolled(hg.BilevelProblem(loss, loss), mode)
    indices = jnp.asarray(rng.integers(0, 32, (length, size)))
    batches = hg.IndexedBatch(data, indices) if indexed else data[indices]
    hyper = jax.tree.map(lambda w: jnp.full_like(w, -5.0), params)
    optimizer = (lambda h: optax.sgd(jnp.exp(h["w0"][0, 0]))) if learned else optax.sgd(0.1)
    fn = functools.partial(hg.hypergrad(estimator, optimizer), key=None)
    options = {"xla_backend_optimization_level": 3}
    compiled = jax.jit(fn).lower(params, hyper, batches, data).compile(compiler_options=options)
    return compiled.memory_analysis().temp_size_in_bytes, sum(4 * w.size for w in params.values())


@pytest.mark.slow
def test_memory_grows_as_promised():
    """Copies of the weights: K for a checkpoint a step, K/c + c and a few for two levels, a few for forward mode."""
    length, few = 64, 12
    each, size = scratch(hg.reverse(1), length)
    default, _ = scratch(hg.reverse(), length)
    plain, _ = scratch(hg.reverse(math.inf, mixed=False), length)
    assert length * size < each < (length + few) * size
    assert default < (8 + 8 + few) * size
    assert plain > 2 * each
    learned, _ = scratch(hg.reverse(1), length, learned=True)  # the gradient enters the rate's derivative
    assert learned < (2 * length + few) * size
    learned, _ = scratch(hg.reverse(), length, learned=True)
    assert learned < (8 + 2 * 8 + few) * size


@pytest.mark.slow
def test_batches_by_index_are_never_held_together():
    length, batch_bytes = 64, 8 * 64 * 4
    indexed, _ = scratch(hg.reverse(), length, indexed=True)
    stacked, _ = scratch(hg.reverse(), length)
    assert indexed < stacked + 16 * batch_bytes  # far from the length·batch_bytes that lie in the stacked batches


@pytest.mark.parametrize("length", [1, 2, 19, 49, 50, 53, 64, 100, 1000, 1009])
def test_the_default_interval_divides_the_window_if_it_can(length):
    every = hg.reverse().interval(length)
    if length < 50:
        assert every == 1
        return
    root = math.sqrt(length)
    assert root / 2 <= every <= 2 * root
    if length not in (53, 1009):
        assert length % every == 0


@pytest.mark.slow
@pytest.mark.parametrize("length", [53, 50])
def test_long_windows_of_awkward_length(length):
    base = network()
    args = (*base.variables, window_of(base.inner_batch, length), base.outer_batch)
    (_, grad), _ = run(hg.unrolled(base.problem), optax.sgd(0.1), args)
    (_, want), _ = run(autodiff_steps(base.problem), optax.sgd(0.1), args)
    assert relative_error(grad, want) < 1e-5


@pytest.mark.slow
def test_low_precision_weights_keep_float32_hyperparameters():
    base = network(dtype=jnp.bfloat16)
    optimizer = lambda h: optax.sgd(h["rate"], momentum=h["momentum"])  # noqa: E731
    problem = hg.BilevelProblem(
        lambda w, h, b, k: base.problem.inner_loss(w, h["decay"], b, k),
        lambda w, h, b, k: base.problem.outer_loss(w, h["decay"], b, k),
    )
    hyper = {"decay": base.variables.hyperparams, "rate": jnp.array(0.1), "momentum": jnp.array(0.9)}
    args = (base.variables.params, hyper, window_of(base.inner_batch, 3), base.outer_batch)
    wide = network()
    grads = []
    for mode in (hg.reverse(), hg.forward()):
        (_, grad), info = run(hg.unrolled(problem, mode), optimizer, args)
        assert {x.dtype for x in jax.tree.leaves(grad)} == {jnp.dtype(jnp.float32)}
        assert not bool(info.skipped)
        grads.append(grad)
    cast = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, args)
    (_, want), _ = run(
        hg.unrolled(
            hg.BilevelProblem(
                lambda w, h, b, k: wide.problem.inner_loss(w, h["decay"], b, k),
                lambda w, h, b, k: wide.problem.outer_loss(w, h["decay"], b, k),
            )
        ),
        optimizer,
        cast,
    )
    for grad in grads:  # bfloat16 has 8 bits: a per cent a step
        assert relative_error(grad["rate"], want["rate"]) < 0.1
        assert relative_error(grad["decay"], want["decay"]) < 0.1


def test_hard_mode(hard_mode):
    """Our own transformations and the rollout need no implicit promotion."""
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}
    problem = hg.BilevelProblem(
        lambda w, h, b, k: jnp.sum(w["a"] ** 2) * jnp.exp(h["c"]) + jnp.sum(w["b"] ** 2),
        lambda w, h, b, k: jnp.sum(w["a"] ** 2) + jnp.sum(w["b"]),
    )
    optimizer = lambda h: optax.chain(  # noqa: E731
        hg.optimizers.add_decayed_weights(0.1), hg.optimizers.scale_by_learning_rate(h["rates"])
    )
    hyper = {"c": jnp.array(0.0), "rates": {"a": jnp.array(0.1), "b": jnp.full(3, 0.2)}}
    for mode in (hg.reverse(2), hg.forward()):
        grad = hg.hypergrad(hg.unrolled(problem, mode), optimizer)(params, hyper, jnp.arange(4), (), key=None)
        assert all(float(jnp.abs(leaf).min()) > 0 for leaf in jax.tree.leaves(grad))
