"""Faults that were found once, each as the smallest member of its kind."""

import functools
import gc
import pathlib
import resource

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.drivers import _phases
from hypergrad.solvers import Status
from hypergrad.tree import scaled_norm

ONE = jnp.ones(3)
SCALES = jnp.array([1.0, 3.0, 10.0])


def inner(w, h, batch, key):
    """A quadratic with a decay per weight; an empty or poisoned batch makes it NaN."""
    return 0.5 * jnp.sum(SCALES * w**2) + 0.5 * jnp.sum(jnp.exp(h) * w**2) - jnp.sum(w) + sum(map(jnp.mean, batch))


def outer(w, h, batch, key):
    """A distance to ones."""
    return jnp.sum((w - 1.0) ** 2) + sum(map(jnp.mean, batch))


PROBLEM = hg.BilevelProblem(inner, outer)


def make(estimator=None, **kwargs):
    """Return ``bilevel`` with defaults that a test may replace."""
    options = {"inner_optimizer": optax.sgd(0.05), "outer_optimizer": optax.sgd(0.1), **kwargs}
    return hg.bilevel(estimator or hg.implicit(PROBLEM, hg.solvers.cg(5)), **options)


def run(tx, params=ONE, hyperparams=None, *, calls=1, inner_batch=(), outer_batch=()):
    """Return variables and state after some calls."""
    variables = hg.BilevelParams(params, jnp.zeros(3) if hyperparams is None else hyperparams)
    state, update = tx.init(variables), jax.jit(tx.update)
    for _ in range(calls):
        updates, state = update(None, state, variables, inner_batch=inner_batch, outer_batch=outer_batch)
        variables = optax.apply_updates(variables, updates)
    return variables, state


# An outer loss that does not see the weights.
BLIND = {
    "enclosing scope": lambda w, h, b, k: jnp.sum((ONE - 1.0) ** 2) + 0.0 * jnp.sum(h),
    "stop_gradient": lambda w, h, b, k: jnp.sum((jax.lax.stop_gradient(w) - 1.0) ** 2),
    "accuracy": lambda w, h, b, k: (jnp.argmax(w) == 1).astype(jnp.float32),
    "constant": lambda w, h, b, k: jnp.float32(3.0),
}
METHODS = {
    "implicit": lambda problem: hg.implicit(problem, hg.solvers.cg(5)),
    "unrolled": hg.unrolled,
    "direct": hg.direct,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loss", BLIND)
def test_an_outer_loss_that_does_not_see_the_weights_is_refused(loss, method):
    problem = hg.BilevelProblem(lambda w, h, b, k: inner(w, h, (), k), BLIND[loss])
    fn = hg.hypergrad(METHODS[method](problem), optax.sgd(0.05))
    with pytest.raises(ValueError, match="expected an outer loss that depends on params"):
        fn(ONE, jnp.zeros(3), hg.IndexedBatch((), jnp.arange(2)), (), key=None)


def test_a_singular_hessian_does_not_move_the_hyperparameters_far():
    """Ten examples, forty weights: b has a component outside the range of H, where CG would step to 1e8."""
    x, y = jax.random.normal(jax.random.key(0), (10, 40)), jnp.ones(10)
    problem = hg.BilevelProblem(
        lambda w, h, b, k: 0.5 * jnp.mean((x @ w - y) ** 2) - 1e-3 * jnp.sum(h * w),
        lambda w, h, b, k: 0.5 * jnp.mean((w - 1.0) ** 2),
    )
    variables, state = run(make(hg.implicit(problem, hg.solvers.cg(50))), jnp.zeros(40), jnp.zeros(40))
    assert int(state.info.solver.status) == Status.INDEFINITE
    assert float(jnp.abs(variables.hyperparams).max()) < 1.0


def broken_optimizer(where):
    """Return an outer optimizer whose second update, or state, is not finite."""

    def update(grads, state, params=None):
        bad = jnp.where(state["count"] == 1, jnp.inf, 1.0)
        updates = jax.tree.map(lambda g: -0.1 * g * (bad if where == "updates" else 1.0), grads)
        return updates, {"count": state["count"] + 1, "scale": state["scale"] * (bad if where == "state" else 1.0)}

    return optax.GradientTransformation(lambda _: {"count": jnp.zeros((), jnp.int32), "scale": jnp.ones(())}, update)


@pytest.mark.parametrize(("where", "reason"), [("updates", "HYPERPARAMS"), ("state", "OUTER_STATE")])
def test_an_outer_optimizer_that_breaks_is_skipped_whole(where, reason):
    tx = make(outer_optimizer=broken_optimizer(where))
    good, _ = run(tx, calls=1)
    bad, state = run(tx, calls=2)
    assert hg.SkipReason(int(state.info.skip_reason)).name == reason
    assert int(state.info.num_skipped) == 1
    np.testing.assert_array_equal(bad.hyperparams, good.hyperparams)
    assert int(state.outer["count"]) == 1
    assert float(state.outer["scale"]) == 1.0


def test_a_state_that_holds_infinity_by_design_is_no_reason_to_skip():
    rule = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
    _, state = run(make(outer_optimizer=rule), calls=2)
    assert int(state.info.num_skipped) == 0


def test_a_decay_of_zero_by_a_logarithm_of_minus_infinity_stays():
    start = jnp.array([0.0, -jnp.inf, 0.0])
    variables, state = run(make(outer_optimizer=optax.adam(0.1)), ONE, start, calls=3)
    assert int(state.info.num_skipped) == 0
    assert (jnp.isinf(variables.hyperparams) == jnp.isinf(start)).all()
    assert (jnp.abs(variables.hyperparams)[jnp.array([0, 2])] > 0.05).all()


def test_the_inner_loss_of_a_window_is_that_of_its_last_step():
    problem = hg.BilevelProblem(lambda w, h, b, k: inner(w, h, (), k) + jnp.sum(b[0]), outer)
    batches = (jnp.array([[10.0], [20.0], [30.0]]),)
    _, state = run(make(hg.implicit(problem, hg.solvers.cg(5)), window=3), inner_batch=batches)
    two, _ = run(make(hg.implicit(problem, hg.solvers.cg(5)), window=2, every=5), inner_batch=(batches[0][:2],))
    np.testing.assert_allclose(state.info.inner_loss, inner(two.params, jnp.zeros(3), (), None) + 30.0, rtol=1e-6)


def test_without_a_guard_every_step_is_taken():
    variables, state = run(make(outer_optimizer=broken_optimizer("updates"), guard=None), calls=2)
    assert not jnp.isfinite(variables.hyperparams).all()
    assert int(state.info.num_skipped) == 0


@pytest.mark.parametrize("transform", ["with_response", "self_tuning"])
def test_a_response_that_nothing_trains_is_refused(transform):
    if transform == "with_response":
        problem, params = hg.responses.with_response(PROBLEM, hg.responses.linear()), ONE
        params = hg.responses.init(problem, 0, ONE, jnp.zeros(3))
    else:
        import flax.linen as nn

        model, x = nn.Dense(2), jnp.ones((4, 3))
        loss = lambda w, h, b, k: jnp.mean(h * jnp.sum(model.apply({"params": w}, x) ** 2, 1))  # noqa: E731
        problem = hg.responses.self_tuning(hg.BilevelProblem(loss, loss))
        first = model.init(jax.random.key(0), x)["params"]
        params = hg.responses.init(problem, 0, first, jnp.zeros(()), x)
    with pytest.raises(ValueError, match=r"one that nothing trains. Wrap it: hg.responses.perturbed"):
        make(hg.direct(problem)).init(hg.BilevelParams(params, jnp.zeros(3)))


KEY64 = jax.random.key(0, impl="rbg")
OTHERS = {
    "outer adam, was sgd": ({}, {"outer_optimizer": optax.adam(0.1)}, r"state leaf \.outer\[0\]\.count.*no such leaf"),
    "outer sgd, was adam": ({"outer_optimizer": optax.adam(0.1)}, {}, r"state leaf \.outer\[0\]\.count.*no such leaf"),
    "inner adam": ({}, {"inner_optimizer": optax.adam(0.1)}, r"\.inner\[0\]\.count"),
    "momentum": ({}, {"inner_optimizer": optax.sgd(0.1, 0.9)}, r"\.inner\[0\]\.trace"),
    "solver": (
        {"estimator": hg.implicit(PROBLEM, hg.solvers.neumann(3))},
        {"estimator": hg.implicit(PROBLEM, hg.solvers.cg(3, warm_start=True))},
        r"\.estimator\.",
    ),
    "key": ({"key": KEY64}, {}, r"\.key"),
    "other wrapper": ({"outer_optimizer": optax.chain(optax.sgd(0.1))}, {}, "structure"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_state_of_another_transformation_is_refused_by_leaf(name):
    old, new, match = OTHERS[name]
    variables = hg.BilevelParams(ONE, jnp.zeros(3))
    state = make(**old).init(variables)
    with pytest.raises(ValueError, match=match):
        make(**new).update(None, state, variables, inner_batch=(), outer_batch=())


@pytest.mark.parametrize(
    "variables",
    [
        hg.BilevelParams({"a": ONE}, jnp.zeros(3)),
        hg.BilevelParams(jnp.ones(1), jnp.zeros(3)),
        hg.BilevelParams(ONE.astype(jnp.bfloat16), jnp.zeros(3)),
        hg.BilevelParams(ONE, jnp.zeros(1)),
    ],
    ids=["tree", "shape", "dtype", "hyperparams"],
)
def test_a_state_of_other_weights_is_refused_by_leaf(variables):
    tx = make(inner_optimizer=optax.adam(0.1), outer_optimizer=optax.adam(0.1))
    state = tx.init(hg.BilevelParams(ONE, jnp.zeros(3)))
    with pytest.raises(ValueError, match=r"state leaf \.(inner|outer)\[0\]\.mu"):
        tx.update(None, state, variables, inner_batch=(), outer_batch=())


def resident_mib():
    """Return the process's memory: what it holds now where the system tells, else its peak."""
    statm = pathlib.Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def test_eager_calls_compile_once_and_leak_nothing():
    traces = []

    def counted(w, h, b, k):
        traces.append(1)
        return outer(w, h, b, k)

    fn = hg.value_and_hypergrad(hg.implicit(hg.BilevelProblem(inner, counted), hg.solvers.neumann(3)))

    def calls(number, grad, info):
        for i in range(number):
            state = None if i % 2 else info.state  # fresh and given: one program
            (_, _), info = fn(ONE, grad * i, (), (), key=None, state=state)

    (_, grad), info = fn(ONE, jnp.zeros(3), (), (), key=None)
    calls(2, grad, info)
    seen = len(traces)
    gc.collect()
    objects, memory = len(gc.get_objects()), resident_mib()
    calls(500, grad, info)
    gc.collect()
    assert len(traces) == seen
    assert len(gc.get_objects()) - objects < 200
    assert resident_mib() - memory < 20


def test_eager_updates_compile_once():
    """One program where an outer step is due, one where none is; strings and functions in a batch are constants."""
    traces = []

    def counted(w, h, batch, key):
        traces.append(1)
        assert batch["mode"] == "mean"
        return inner(w, h, (batch["x"],), key)

    tx = make(hg.implicit(hg.BilevelProblem(counted, outer), hg.solvers.cg(3)), every=2)
    variables = hg.BilevelParams(ONE, jnp.zeros(3))
    state, seen = tx.init(variables), []
    for i in range(8):
        batch = {"mode": "mean", "x": jnp.full(2, float(i))}
        _, state = tx.update(None, state, variables, inner_batch=batch, outer_batch=() if i % 2 else None)
        seen.append(len(traces))
    assert seen[1] > seen[0]
    assert seen[2:] == [seen[1]] * 6
    assert int(state.info.step) == 8


def test_a_state_warms_the_next_solve():
    fn = hg.value_and_hypergrad(hg.implicit(PROBLEM, hg.solvers.cg(5, warm_start=True)))
    _, cold = fn(0.5 * ONE, jnp.zeros(3), (), (), key=None)
    _, warm = fn(0.5 * ONE, jnp.zeros(3), (), (), key=None, state=cold.state)
    assert int(warm.solver.num_products) == 1  # the residual of the start, which is the solution
    assert bool(warm.solver.converged)
    with pytest.raises(ValueError, match=r"structure of a fresh one, state leaf \.solution"):
        fn(ONE, jnp.zeros(3), (), (), key=None, state={"solution": ONE})


def test_a_series_far_from_its_sum_is_truncated():
    scales = jnp.array([1.0, 1e-4])
    problem = hg.BilevelProblem(
        lambda w, h, b, k: 0.5 * jnp.sum(scales * w**2) - jnp.sum(h * w), lambda w, h, b, k: jnp.sum(w)
    )
    fn = hg.value_and_hypergrad(hg.implicit(problem, hg.solvers.neumann(20)))
    _, info = fn(jnp.zeros(2), jnp.zeros(2), (), (), key=None)
    assert int(info.solver.status) == Status.TRUNCATED
    assert not bool(info.solver.converged)
    assert int(info.solver.num_products) == 32  # 12 to find the step, 20 terms


@pytest.mark.parametrize("bad", [jnp.zeros(0), jnp.full(2, jnp.nan)], ids=["empty", "nan"])
def test_an_inner_loss_that_is_not_finite_skips_the_outer_step(bad):
    assert not bool(run(make(), inner_batch=(jnp.zeros(2),))[1].info.skipped)
    variables, state = run(make(), inner_batch=(bad,))
    assert hg.SkipReason(int(state.info.skip_reason)) == hg.SkipReason.INNER_LOSS
    np.testing.assert_array_equal(variables.hyperparams, jnp.zeros(3))


def test_a_restored_direction_that_is_not_finite_counts_as_cold():
    tx = make(hg.implicit(PROBLEM, hg.solvers.neumann(20)))
    variables, state = run(tx, calls=2)
    broken = state._replace(estimator=jax.tree.map(lambda x: x * jnp.nan, state.estimator))
    updates, after = jax.jit(tx.update)(None, broken, variables, inner_batch=(), outer_batch=())
    assert int(after.info.solver.num_products) == 32
    assert not bool(after.info.skipped)
    assert float(jnp.abs(updates.hyperparams).max()) > 0
    assert jnp.isfinite(after.estimator.direction).all()


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_norms_of_small_and_large_gradients(scale):
    problem = hg.BilevelProblem(lambda w, h, b, k: 0.5 * jnp.sum((w - h) ** 2), lambda w, h, b, k: scale * jnp.sum(w))
    (_, grad), info = hg.value_and_hypergrad(hg.implicit(problem, hg.solvers.cg(5)))(ONE, ONE, (), (), key=None)
    assert float(info.hypergrad_norm) == pytest.approx(3**0.5 * scale, rel=1e-5, abs=0)
    np.testing.assert_allclose(grad, scale * ONE, rtol=1e-5)
    assert not bool(info.skipped)


def test_norms_of_entries_on_both_sides_of_what_squares_hold():
    """A third of the square is in entries whose own squares are below the smallest numbers of float32."""
    x = jnp.concatenate([jnp.array([1.5e-19]), jnp.full(1_000_000, 1e-22)])
    assert float(scaled_norm(x)) == pytest.approx((1.5e-19**2 + 1e6 * 1e-22**2) ** 0.5, rel=1e-5, abs=0)


@pytest.mark.parametrize("method", ["implicit", "unrolled"])
def test_applied_updates_reach_the_weights_of_a_low_precision_window(method):
    estimator = hg.unrolled(PROBLEM) if method == "unrolled" else None
    tx = make(estimator, inner_optimizer=optax.sgd(0.05), window=3)
    start = hg.BilevelParams(jnp.array([1.0, 3.0, 0.01], jnp.bfloat16), jnp.zeros(3))
    updates, _ = jax.jit(tx.update)(None, tx.init(start), start, inner_batch=(), outer_batch=())
    assert updates.params.dtype == jnp.float32
    reached = start.params.astype(jnp.float32) + updates.params
    np.testing.assert_array_equal(reached, reached.astype(jnp.bfloat16).astype(jnp.float32))  # exact differences
    assert float(jnp.abs(updates.params).max()) > 0.01


def test_a_series_that_diverges_takes_no_step():
    problem = hg.BilevelProblem(
        lambda w, h, b, k: 0.5 * (w[0] ** 2 - 50.0 * w[1] ** 2) - jnp.sum(h * w), lambda w, h, b, k: -jnp.sum(w)
    )
    tx = make(hg.implicit(problem, hg.solvers.neumann(20)), inner_optimizer=optax.sgd(0.0))
    variables, state = run(tx, jnp.ones(2), jnp.zeros(2))
    assert int(state.info.solver.status) == Status.DIVERGED
    assert hg.SkipReason(int(state.info.skip_reason)) == hg.SkipReason.SOLVE
    np.testing.assert_array_equal(variables.hyperparams, jnp.zeros(2))


FROZEN = jnp.array([[2.0, 1.9], [1.9, 2.0]])


def half(w, h, b, k):
    """Two coupled weights, of which one may be frozen."""
    both = jnp.concatenate([w["train"], w["keep"]])
    return 0.5 * both @ FROZEN @ both - h * w["train"][0]


HALF = hg.BilevelProblem(half, lambda w, h, b, k: jnp.sum((w["train"] - 1.0) ** 2) + 3.0 * jnp.sum(w["keep"]))
FREEZERS = {
    "partition": optax.partition(
        {"train": optax.sgd(0.3), "keep": optax.set_to_zero()}, {"train": "train", "keep": "keep"}
    ),
    "masked": optax.chain(optax.sgd(0.3, 0.5), optax.masked(optax.set_to_zero(), {"train": False, "keep": True})),
}


@pytest.mark.parametrize("name", FREEZERS)
def test_weights_that_the_inner_optimizer_never_moves_are_no_unknowns(name):
    """The problem over the trained half alone: w* = (λ − 1.9)/2, dL_out/dλ = w* − 1."""
    tx = make(hg.implicit(HALF, hg.solvers.cg(5)), inner_optimizer=FREEZERS[name], outer_optimizer=optax.sgd(1.0))
    exact = (1.0 - 1.9) / 2
    start = {"train": jnp.array([exact]), "keep": jnp.ones(1)}
    variables, _ = run(tx, start, jnp.array(1.0))
    assert 1.0 - float(variables.hyperparams) == pytest.approx(exact - 1.0, rel=1e-5)


def test_trainable_weights_are_named_in_the_functional_forms():
    exact = (1.0 - 1.9) / 2
    w, h = {"train": jnp.array([exact]), "keep": jnp.ones(1)}, jnp.array(1.0)
    frozen = hg.implicit(HALF, hg.solvers.cg(5), trainable={"train": True, "keep": False})
    assert float(hg.hypergrad(frozen)(w, h, (), (), key=None)) == pytest.approx(exact - 1.0, rel=1e-5)
    response = hg.best_response(frozen)
    slope = jax.grad(lambda h: response(w, h, (), key=None)["train"][0])(h)
    assert float(slope) == pytest.approx(0.5, rel=1e-5)
    joint = hg.hypergrad(hg.implicit(HALF, hg.solvers.cg(5)))(w, h, (), (), key=None)
    assert abs(float(joint) - (exact - 1.0)) > 0.1
    with pytest.raises(ValueError, match="at least one weight that is trained; got none"):
        hg.hypergrad(hg.implicit(HALF, hg.solvers.cg(5), trainable=False))(w, h, (), (), key=None)
    with pytest.raises(ValueError, match="trainable to be a tree prefix of params"):
        hg.hypergrad(hg.implicit(HALF, hg.solvers.cg(5), trainable={"a": True}))(w, h, (), (), key=None)


def test_a_product_with_a_frozen_prefix_costs_a_third_at_most():
    """Nine tenths of the weights lie before the trained ones; operations as XLA counts them."""
    layers = [jnp.eye(16)] * 10

    def loss(w, h, batch, key):
        out = functools.reduce(lambda x, matrix: jnp.tanh(x @ matrix), w, batch)
        return jnp.mean(out**2) + h * jnp.sum(w[-1] ** 2)

    problem = hg.BilevelProblem(loss, lambda w, h, batch, key: loss(w, 0.0, batch, key))

    def operations(trainable, terms):
        solver = hg.solvers.neumann(terms, 0.1, unroll=True)
        fn = hg.value_and_hypergrad(hg.implicit(problem, solver, trainable=trainable))
        call = jax.jit(lambda w, h, batch: fn(w, h, batch, batch, key=None))
        return call.lower(layers, jnp.array(0.1), jnp.ones((8, 16))).compile().cost_analysis()["flops"]

    everything, last = (operations(of, 2) - operations(of, 1) for of in (True, [False] * 9 + [True]))
    assert everything > 3 * last > 0


def test_optimizers_of_another_interface_are_refused_by_name():
    with pytest.raises(TypeError, match=r"inner_optimizer to update from.*lookahead"):
        run(make(inner_optimizer=optax.lookahead(optax.sgd(0.1), 5, 0.5)))
    with pytest.raises(TypeError, match=r"outer_optimizer to update from gradients.*lbfgs"):
        run(make(outer_optimizer=optax.lbfgs()))
    variables, tx = hg.BilevelParams(ONE, jnp.zeros(3)), make(inner_optimizer=optax.lbfgs())
    with pytest.raises(TypeError, match=r"inner_optimizer to update from gradients"):  # they bring no loss with them
        tx.update(ONE, tx.init(variables), variables, inner_batch=(), outer_batch=())


def test_a_line_search_is_given_the_loss_of_its_step():
    variables, state = run(make(inner_optimizer=optax.lbfgs(), every=100), calls=15)
    np.testing.assert_allclose(variables.params, 1 / (SCALES + 1), rtol=1e-4)
    assert int(state.step) == 15


@pytest.mark.filterwarnings("default")
def test_decoupled_decay_is_no_part_of_the_inner_loss():
    variables = hg.BilevelParams(ONE, jnp.zeros(3))
    with pytest.warns(UserWarning, match=r"decoupled weight decay.*penalties\.l2"):
        make(inner_optimizer=optax.adamw(0.1)).init(variables)


def test_no_warning_without_decoupled_decay():
    for rule in (optax.adam(0.1), optax.sgd(0.1, 0.9), optax.chain(optax.clip_by_global_norm(1.0), optax.rmsprop(0.1))):
        make(inner_optimizer=rule).init(hg.BilevelParams(ONE, jnp.zeros(3)))


MISUSES = {
    "two arguments": (
        lambda: hg.BilevelProblem(lambda w, h: 0.0, outer),
        TypeError,
        r"inner_loss to take \(params, hyperparams, batch, key\); got inner_loss\(w, h\)",
    ),
    "stateful": (
        lambda: hg.BilevelProblem(inner, outer, stateful=True),
        TypeError,
        r"to take \(params, hyperparams, batch, key, model_state\)",
    ),
    "integer weights": (lambda: run(make(), jnp.arange(3)), TypeError, "params of a floating dtype; got int32"),
    "a bare array": (lambda: run(make(), ["a"]), TypeError, r"params leaf \[0\] to be an array; got str"),
    "penalty": (lambda: hg.penalties.l2(ONE, "0.1"), TypeError, "coefficients to be numbers or arrays; got str"),
    "penalty shape": (lambda: hg.penalties.l2(ONE, jnp.ones(2)), ValueError, r"for params that broadcast to its shape"),
    "large seed": (lambda: make(key=2**70), ValueError, "key to fit into a signed 64-bit integer"),
    "window": (
        lambda: make(hg.unrolled(PROBLEM)),
        ValueError,
        "window for an estimator that differentiates the inner steps; got None. Write window=K",
    ),
    "guard": (lambda: make(guard=3.0), TypeError, "guard to be a Guard or None"),
    "max_residual": (lambda: hg.guard(0.0), ValueError, "max_residual to be finite and > 0"),
}


@pytest.mark.parametrize("name", MISUSES)
def test_misuses_say_what_was_expected(name):
    build, error, match = MISUSES[name]
    with pytest.raises(error, match=match):
        build()


def test_an_outer_batch_may_be_missing_where_nothing_is_due():
    tx, variables = make(every=2), hg.BilevelParams(ONE, jnp.zeros(3))
    state, update = tx.init(variables), jax.jit(tx.update)
    _, state = update(None, state, variables, inner_batch=(), outer_batch=None)
    assert int(state.info.num_skipped) == 0
    # Under jit the number of the call is not known while tracing: a step that turns out due is skipped and counted.
    _, late = update(None, state, variables, inner_batch=(), outer_batch=None)
    assert hg.SkipReason(int(late.info.skip_reason)) == hg.SkipReason.NO_OUTER_BATCH
    assert int(late.info.num_skipped) == 1
    # In Python calls it is known.
    with pytest.raises(ValueError, match=r"expected outer_batch; got None"):
        tx.update(None, state, variables, inner_batch=(), outer_batch=None)
    for every in (1, lambda n: n > 3):
        tx = make(every=every)
        with pytest.raises(ValueError, match=r"expected outer_batch.*got None"):
            jax.jit(tx.update)(None, tx.init(variables), variables, inner_batch=(), outer_batch=None)


def test_a_running_inner_optimizer_is_adopted():
    rule, params = optax.adam(0.05), ONE
    state = rule.init(params)
    for _ in range(3):
        updates, state = rule.update(jax.grad(inner)(params, jnp.zeros(3), (), None), state, params)
        params = optax.apply_updates(params, updates)
    tx = make(inner_optimizer=rule, every=10)
    variables = hg.BilevelParams(params, jnp.zeros(3))
    adopted = tx.init(variables, inner_state=state)
    updates, after = jax.jit(tx.update)(None, adopted, variables, inner_batch=(), outer_batch=())
    want, want_state = rule.update(jax.grad(inner)(params, jnp.zeros(3), (), None), state, params)
    np.testing.assert_allclose(updates.params, want, rtol=1e-6)
    assert int(after.inner[0].count) == int(want_state[0].count) == 4
    with pytest.raises(
        ValueError, match=r"structure of inner_optimizer\.init\(params\), inner_state leaf \[0\]\.count"
    ):
        tx.init(variables, inner_state=optax.sgd(0.1).init(params))


def test_given_gradients_bring_their_loss_or_none():
    tx, variables = make(), hg.BilevelParams(ONE, jnp.zeros(3))
    grads = jax.grad(inner)(*variables, (), None)
    update = jax.jit(tx.update)
    _, state = update(grads, tx.init(variables), variables, inner_batch=(), outer_batch=())
    assert jnp.isnan(state.info.inner_loss)
    assert not bool(state.info.skipped)
    _, state = update(grads, tx.init(variables), variables, inner_batch=(), outer_batch=(), value=jnp.array(2.5))
    assert float(state.info.inner_loss) == 2.5
    _, state = update(grads, tx.init(variables), variables, inner_batch=(), outer_batch=(), value=jnp.array(jnp.nan))
    assert hg.SkipReason(int(state.info.skip_reason)) == hg.SkipReason.INNER_LOSS


def test_a_dropped_step_with_given_gradients_keeps_the_model_state():
    """Also where the given loss alone is not finite."""

    def loss(w, h, batch, key, model_state):
        return jnp.sum(h * w**2), model_state

    problem = hg.BilevelProblem(loss, loss, stateful=True)
    tx = make(hg.implicit(problem, hg.solvers.cg(2)), guard=hg.guard(inner=True), model_state=jnp.zeros(()))
    variables = hg.BilevelParams(ONE, ONE)
    for grads, value, kept in ((ONE, 1.0, 7.0), (ONE, jnp.nan, 0.0), (ONE * jnp.nan, 1.0, 0.0)):
        given = {"model_state": jnp.array(7.0), "value": jnp.asarray(value), "inner_batch": (), "outer_batch": ()}
        updates, state = tx.update(grads, tx.init(variables), variables, **given)
        assert float(state.model_state) == kept
        assert bool((updates.params == 0).all()) == (kept == 0.0)
    given["model_state"] = jnp.array(jnp.nan)
    _, state = tx.update(ONE, tx.init(variables), variables, **given)
    assert float(state.model_state) == 0.0


def test_guarded_inner_steps_are_dropped_where_they_are_not_finite():
    tx = make(guard=hg.guard(inner=True), inner_optimizer=optax.adam(0.05))
    variables, state = run(tx, inner_batch=(jnp.full(1, jnp.nan),))
    np.testing.assert_array_equal(variables.params, ONE)
    assert int(state.inner[0].count) == 0
    assert hg.SkipReason(int(state.info.skip_reason)) == hg.SkipReason.INNER_LOSS
    window = make(guard=hg.guard(inner=True), inner_optimizer=optax.sgd(0.05), window=3)
    poisoned, _ = run(window, inner_batch=(jnp.array([[0.0], [jnp.nan], [0.0]]),))
    two, _ = run(make(window=2, guard=hg.guard(inner=True)), inner_batch=(jnp.zeros((2, 1)),))
    np.testing.assert_allclose(poisoned.params, two.params, rtol=1e-6)


def batches_of(share, steps, rng):
    """Return batches of one example and its weight, this share of them poisoned: NaN, inf, empty or 1e30."""
    clean = np.stack([rng.normal(size=steps) * 0.01, np.ones(steps)], -1)
    kinds = np.array([[np.nan, 1], [np.inf, 1], [-np.inf, 1], [0, 0], [1e30, 1]])
    return np.where(rng.random((steps, 1)) < share, rng.choice(kinds, steps), clean).astype(np.float32)


@functools.cache
def poisonable(inner_optimizer):
    """Return the first carry of a run, and the compiled run on given batches."""

    def mean(values, batch):
        return jnp.sum(values) * batch[1] / batch[1]  # NaN where the batch is empty

    problem = hg.BilevelProblem(
        lambda w, h, b, k: mean(inner(w, h, (), k) - b[0] * jnp.sum(w), b),
        lambda w, h, b, k: mean((w - 1.0 - b[0]) ** 2, b),
    )
    made = {"inner_optimizer": inner_optimizer} if inner_optimizer else {}
    tx = make(hg.implicit(problem, hg.solvers.cg(3)), outer_optimizer=optax.adam(0.01), **made)

    def body(carry, batches):
        variables, state = carry
        updates, state = tx.update(None, state, variables, inner_batch=batches[0], outer_batch=batches[1])
        variables = optax.apply_updates(variables, updates)
        return (variables, state), (jnp.isfinite(variables.hyperparams).all(), state.info.skip_reason)

    start = hg.BilevelParams(ONE, jnp.zeros(3))
    return (start, tx.init(start)), jax.jit(functools.partial(jax.lax.scan, body))


@functools.cache
def poisoned_run(inner_share, outer_share, inner_optimizer=None, steps=10_000):
    """Return the final loss and the skips by reason, of a run with these shares of poisoned batches."""
    rng = np.random.default_rng(0)
    batches = batches_of(inner_share, steps, rng), batches_of(outer_share, steps, rng)
    first, run = poisonable(inner_optimizer)
    (variables, _), (finite, reasons) = run(first, batches)
    assert finite.all()
    numbers = {reason.name: int((reasons == reason).sum()) for reason in hg.SkipReason}
    return float(jnp.sum((variables.params - 1.0) ** 2)), {name: n for name, n in numbers.items() if n}


def test_ten_thousand_outer_steps_with_poisoned_batches():
    """NaN and inf are skipped; 1e30 is finite in the loss's gradient and is cut by Adam's scale-free steps."""
    clean, reasons = poisoned_run(0.0, 0.0)
    assert reasons == {"NONE": 10_000}
    loss, reasons = poisoned_run(0.0, 0.05)
    assert 400 < 10_000 - reasons["NONE"] < 600
    assert loss == pytest.approx(clean, rel=0.05)


def test_ten_thousand_steps_with_poisoned_inner_batches():
    """``apply_if_finite`` and clipping keep the weights; without them NaN stays, and every outer step is skipped."""
    kept = optax.apply_if_finite(
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), max_consecutive_errors=10_000
    )
    clean, _ = poisoned_run(0.0, 0.0, kept)
    loss, reasons = poisoned_run(0.05, 0.0, kept)
    assert 350 < reasons["INNER_LOSS"] < 450  # 1e30 is finite, and clipped
    assert reasons["NONE"] + reasons["INNER_LOSS"] == 10_000
    assert loss == pytest.approx(clean, rel=0.05)
    loss, reasons = poisoned_run(0.05, 0.0)
    assert not np.isfinite(loss)
    assert reasons["NONE"] < 200


def test_flags_in_a_batch_are_constants_of_the_program():
    """In inner batches too, plain and in a window, eager and compiled."""

    def switched(w, h, batch, key):
        return inner(w, h, (batch["x"],), key) if batch["train"] else jnp.nan * jnp.sum(w)

    problem = hg.BilevelProblem(switched, outer)
    batch, variables = {"x": jnp.ones(2), "train": True}, hg.BilevelParams(ONE, jnp.zeros(3))
    window = {"x": jnp.ones((2, 2)), "train": True}
    fn = hg.value_and_hypergrad(hg.implicit(problem, hg.solvers.cg(3)))
    assert np.isfinite(fn(*variables, batch, (), key=None)[1].hypergrad_norm)
    assert np.isfinite(
        jax.jit(lambda w: hg.best_response(hg.implicit(problem, hg.solvers.cg(3)))(w, ONE, batch, key=None))(ONE)
    ).all()
    for given, options in ((batch, {}), (window, {"window": 2})):
        tx = make(hg.implicit(problem, hg.solvers.cg(3)), **options)
        _, state = tx.update(None, tx.init(variables), variables, inner_batch=given, outer_batch=())
        assert int(state.info.num_skipped) == 0


def test_objects_handed_to_update_are_told_apart_by_identity():
    """A bound method equals the same method of the same object, whose data may have changed."""

    class Loss:
        scale = 1.0

        def value(self, w):
            return self.scale * inner(w, jnp.zeros(3), (), None)

    loss, variables = Loss(), hg.BilevelParams(ONE, jnp.zeros(3))
    search = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5))
    tx, found = make(inner_optimizer=search, every=1000), []
    for loss.scale in (1.0, 1e-3):
        value, grads = jax.value_and_grad(loss.value)(ONE)
        given = {"value": value, "grad": grads, "value_fn": loss.value}
        updates, _ = tx.update(grads, tx.init(variables), variables, inner_batch=(), **given)
        expected, _ = search.update(grads, search.init(ONE), ONE, **given)
        np.testing.assert_allclose(updates.params, expected, rtol=1e-6)
        found.append(updates.params)
    assert jax.tree.leaves(found[0])[0] is not found[1]


def test_new_functions_leak_no_programs():
    @_phases.compile_once
    def apply(fn, x):
        return fn(x)

    def programs():
        gc.collect()
        kinds = (getattr(o, "__qualname__", "") for o in gc.get_objects() if type(o).__name__ == "PjitFunction")
        return sum("compile_once" in kind for kind in kinds)

    before = programs()  # of other tests
    for i in range(12):
        np.testing.assert_allclose(apply(lambda x, i=i: x + i, jnp.zeros(2)), i)
    assert programs() - before <= 5


def test_keywords_that_an_optimizer_does_not_take_are_left_out():
    seen = []

    def update(grads, state, params=None, *, gain=1.0):
        seen.append(gain)
        return jax.tree.map(lambda g: -0.1 * gain * g, grads), state

    own = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx, variables = make(inner_optimizer=own), hg.BilevelParams(ONE, jnp.zeros(3))
    for grads, extra in ((None, {"gain": 2.0}), (ONE, {"value": 2.0}), (None, {"value": None}), (ONE, {"gain": 3.0})):
        _, state = tx.update(grads, tx.init(variables), variables, inner_batch=(), outer_batch=(), **extra)
        assert int(state.info.num_skipped) == 0
    assert seen[-1] is not None


def test_a_bad_batch_costs_no_warm_start():
    fn = hg.value_and_hypergrad(hg.implicit(PROBLEM, hg.solvers.cg(5, warm_start=True)))
    _, good = fn(0.5 * ONE, jnp.zeros(3), (), (), key=None)
    poisoned = lambda w, h, batch, key: inner(w, h, (), key) * jnp.mean(batch)  # noqa: E731
    bad_fn = hg.value_and_hypergrad(hg.implicit(hg.BilevelProblem(poisoned, outer), hg.solvers.cg(5, warm_start=True)))
    _, bad = bad_fn(0.5 * ONE, jnp.zeros(3), jnp.full(2, jnp.nan), (), key=None, state=good.state)
    assert hg.SkipReason(int(bad.skip_reason)).name == "SOLVE"
    np.testing.assert_array_equal(bad.state.solution, good.state.solution)


def test_eager_updates_under_a_transfer_guard():
    variables = hg.BilevelParams(ONE, jnp.zeros(3))
    for every in (1, 2):
        tx = make(every=every)
        state = tx.init(variables)
        with jax.transfer_guard("disallow"):
            tx.update(None, state, variables, inner_batch=(), outer_batch=())


@pytest.mark.parametrize("solver", [hg.solvers.cg(50), hg.solvers.neumann(100), hg.solvers.dense()])
def test_products_in_low_precision_do_not_claim_more(solver):
    """Float32 weights, a loss in bfloat16: a recurrence in float32 knows nothing of the products' rounding."""
    half = lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)  # noqa: E731
    low = lambda w, h, b, k: jnp.sum(half(SCALES * w * w)) + jnp.sum(jnp.exp(h) * w**2) - jnp.sum(w)  # noqa: E731
    fn = hg.value_and_hypergrad(hg.implicit(hg.BilevelProblem(low, outer), solver))
    _, info = fn(0.3 * ONE, jnp.zeros(3), (), (), key=None)
    assert float(info.solver.residual) >= float(jnp.finfo(jnp.bfloat16).eps)
    assert Status(int(info.solver.status)) == Status.TRUNCATED


@pytest.mark.parametrize("size", [1e-200, 1e-160, 1.0, 1e160, 1e200])
def test_norms_in_float64_have_its_whole_range(size):
    with jax.enable_x64(True):
        assert float(scaled_norm(jnp.full(4, size, jnp.float64))) == pytest.approx(2 * size, rel=1e-12)
        b, solver = jnp.full(3, size, jnp.float64), hg.solvers.cg(5)
        x, _, info = solver.solve(hg.LinearSystem(lambda v: 2 * v), b, solver.init(b))
        np.testing.assert_allclose(x / size, 0.5, rtol=1e-12)
        assert bool(info.converged)


def test_a_zero_right_hand_side_of_a_singular_system():
    _, _, info = hg.solvers.dense().solve(hg.LinearSystem(lambda v: 0 * v), jnp.zeros(3), ())
    assert Status(int(info.status)) == Status.CONVERGED
    assert float(info.residual) == 0.0


def test_norms_of_leaves_of_several_precisions():
    with jax.enable_x64(True):
        mixed = {"a": jnp.zeros(3), "b": jnp.zeros((2, 2), jnp.float32)}
        assert float(scaled_norm(mixed)) == 0.0
        _, _, info = hg.solvers.cg(3).solve(hg.LinearSystem(lambda v: v), mixed, ())
        assert Status(int(info.status)) == Status.CONVERGED
        assert float(scaled_norm({"a": jnp.array(1e-200), "b": jnp.zeros(2, jnp.float32)})) == pytest.approx(1e-200)
