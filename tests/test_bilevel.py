"""The wrapper: when it steps, what it hands on, and the optax and Flax containers that it lives in."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from tests.problems import batch_norm, network, relative_error, window_of


@functools.cache
def case():
    """Return the shared problem."""
    return network()


def make(problem=None, **kwargs):
    """Return ``bilevel`` over a short Neumann series with defaults that a test may replace."""
    options = {"inner_optimizer": optax.adam(1e-2), "outer_optimizer": optax.sgd(0.1), **kwargs}
    estimator = options.pop("estimator", None) or hg.implicit(problem or case().problem, hg.solvers.neumann(5, 0.1))
    return hg.bilevel(estimator, **options)


def runner(tx):
    """Return a compiled update-and-apply."""

    @jax.jit
    def step(grads, variables, state, inner_batch, outer_batch, extra=None):
        updates, state = tx.update(
            grads, state, variables, inner_batch=inner_batch, outer_batch=outer_batch, **(extra or {})
        )
        return optax.apply_updates(variables, updates), state

    return step


def test_the_steps_written_out_by_hand():
    """Inner step with the user's gradient, then hypergradient at the new weights and the old λ, then outer step."""
    inner_tx, outer_tx = optax.adam(1e-2), optax.adam(1e-1)
    solver = hg.solvers.neumann(5, 0.1)
    tx = make(
        estimator=hg.implicit(case().problem, solver), inner_optimizer=inner_tx, outer_optimizer=outer_tx, every=2
    )
    step, gradient = runner(tx), jax.jit(jax.grad(case().problem.inner_loss))
    variables, state = case().variables, tx.init(case().variables)
    w, h = case().variables
    s, o = inner_tx.init(w), outer_tx.init(h)
    hypergrad_fn = jax.jit(hg.value_and_hypergrad(hg.implicit(case().problem, solver)))
    for call in range(1, 5):
        grads = gradient(*variables, case().inner_batch, None)
        variables, state = step(grads, variables, state, case().inner_batch, case().outer_batch)

        updates, s = inner_tx.update(gradient(w, h, case().inner_batch, None), s, w)
        w = optax.apply_updates(w, updates)
        if call % 2 == 0:
            (value, grad), _ = hypergrad_fn(w, h, case().inner_batch, case().outer_batch, key=None)
            updates, o = outer_tx.update(grad, o, h)
            h = optax.apply_updates(h, updates)
            assert float(state.info.outer_loss) == pytest.approx(float(value), rel=1e-5)
        assert relative_error(variables.params, w) < 1e-6
        assert relative_error(variables.hyperparams, h) < 1e-6


@pytest.mark.slow
def test_gradients_may_come_in_three_forms():
    tx = make()
    step, state = runner(tx), tx.init(case().variables)
    grads = jax.grad(case().problem.inner_loss)(*case().variables, case().inner_batch, None)
    joint = hg.BilevelParams(grads, jax.tree.map(lambda x: x * jnp.nan, case().variables.hyperparams))
    results = [
        step(g, case().variables, state, case().inner_batch, case().outer_batch)[0] for g in (grads, joint, None)
    ]
    assert relative_error(results[0], results[1]) == 0.0
    assert relative_error(results[0], results[2]) < 1e-6


def test_a_fused_window_is_as_many_single_calls():
    """Same keys, same batches: only the hypergradient at the end of the window is taken."""
    noisy = network(dropout=0.3)
    batches = jax.tree.map(lambda x: x.reshape(4, 4, *x.shape[1:]), noisy.inner_batch)
    fused = make(noisy.problem, window=4)
    variables, state = runner(fused)(None, noisy.variables, fused.init(noisy.variables), batches, noisy.outer_batch)

    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 3)
    noisy_gradient = jax.jit(jax.grad(noisy.problem.inner_loss))
    inner_tx = optax.adam(1e-2)
    params, s = noisy.variables.params, inner_tx.init(noisy.variables.params)
    for i in range(4):
        batch = jax.tree.map(lambda x, i=i: x[i], batches)
        key = jax.random.fold_in(keys[0], i)
        grads = noisy_gradient(params, noisy.variables.hyperparams, batch, key)
        updates, s = inner_tx.update(grads, s, params)
        params = optax.apply_updates(params, updates)
    assert relative_error(variables.params, params) < 1e-5
    hypergrad_fn = jax.jit(hg.hypergrad(hg.implicit(noisy.problem, hg.solvers.neumann(5, 0.1))))
    grad = hypergrad_fn(
        params, noisy.variables.hyperparams, batch, noisy.outer_batch, key=jax.random.fold_in(jax.random.key(0), 0)
    )
    want = optax.tree.add_scale(noisy.variables.hyperparams, -0.1, grad)
    assert relative_error(variables.hyperparams, want) < 1e-5
    assert int(state.info.step) == 1


@pytest.mark.parametrize(
    ("every", "due"),
    [(1, [1, 2, 3, 4, 5, 6]), (3, [3, 6]), (lambda n: (n > 2) & (n % 2 == 0), [4, 6])],
    ids=["always", "third", "warm_up"],
)
def test_outer_steps_are_due_when_asked(every, due):
    tx = make(every=every)
    step = runner(tx)
    variables, state = case().variables, tx.init(case().variables)
    assert int(state.info.step) == -1
    assert not bool(state.info.solver.converged)
    assert float(state.info.outer_loss) == 0.0
    seen = []
    for call in range(1, 7):
        before = variables.hyperparams
        variables, state = step(None, variables, state, case().inner_batch, case().outer_batch)
        if relative_error(variables.hyperparams, before) > 0:
            seen.append(call)
            assert int(state.info.step) == call
    assert seen == due


def test_products_are_not_computed_where_nothing_is_due():
    calls = []

    def counted(w, decay, batch, key):
        jax.debug.callback(lambda: calls.append(1))
        return case().problem.outer_loss(w, jax.tree.map(jnp.log, decay), batch, key)

    problem = hg.BilevelProblem(
        case().problem.inner_loss, lambda w, h, b, k: counted(w, jax.tree.map(jnp.exp, h), b, k)
    )
    tx = make(problem, every=3)
    step = runner(tx)
    variables, state = case().variables, tx.init(case().variables)
    for _ in range(6):
        variables, state = step(None, variables, state, case().inner_batch, case().outer_batch)
    jax.effects_barrier()
    assert len(calls) == 2


@pytest.mark.parametrize("where", [pytest.param("outer_loss", marks=pytest.mark.slow), "hypergradient"])
def test_an_outer_step_that_is_not_finite_is_skipped(where):
    """NaN in the outer batch: hyperparameters and outer optimizer stay, weights go on, the info says so."""
    base = case().problem

    def outer(w, h, batch, key):
        scale, data = batch
        loss = base.outer_loss(w, h, data, key)
        return loss * scale if where == "outer_loss" else loss + jnp.sqrt(jnp.square(scale - 1.0)) * optax.tree.sum(w)

    problem = hg.BilevelProblem(base.inner_loss, outer)
    if where == "hypergradient":  # a finite loss whose slope is 0·inf = NaN at w = 0
        problem = hg.BilevelProblem(
            base.inner_loss,
            lambda w, h, b, k: (
                base.outer_loss(w, h, b[1], k) + jnp.where(b[0] > 2, jnp.sqrt(0.0 * optax.tree.sum(w)), 0.0)
            ),
        )
    tx = make(problem, outer_optimizer=optax.adam(0.1))
    step = runner(tx)
    variables, state = step(
        None, case().variables, tx.init(case().variables), case().inner_batch, (jnp.array(1.0), case().outer_batch)
    )
    if where == "outer_loss":
        assert not bool(state.info.skipped)
        bad = jnp.array(jnp.nan)
    else:
        assert bool(state.info.skipped)  # where() leaks its NaN derivative: the reason for this guard
        bad = jnp.array(3.0)
    after, skipped = step(None, variables, state, case().inner_batch, (bad, case().outer_batch))
    assert bool(skipped.info.skipped)
    assert int(skipped.info.step) == 2
    assert relative_error(after.hyperparams, variables.hyperparams) == 0.0
    assert optax.tree.norm(optax.tree.sub(skipped.outer[0].mu, state.outer[0].mu)) == 0.0
    assert relative_error(after.params, variables.params) > 0.0
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((after, skipped.estimator)))


def test_a_hypergradient_solve_that_diverges_is_finite_and_marked():
    tx = make(estimator=hg.implicit(case().problem, hg.solvers.neumann(200, 100.0)))
    _, state = runner(tx)(None, case().variables, tx.init(case().variables), case().inner_batch, case().outer_batch)
    assert not bool(state.info.solver.converged)
    assert float(state.info.solver.residual) > 1.0
    assert bool(jnp.isfinite(state.info.hypergrad_norm))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The inner optimizer moves weights")  # adamw
def test_every_inner_optimizer_of_the_kinds_that_optax_has():
    for inner in (
        optax.sgd(0.1, momentum=0.9),
        optax.MultiSteps(optax.adam(1e-2), 2),
        optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
        optax.inject_hyperparams(optax.adam)(learning_rate=optax.linear_schedule(1e-2, 1e-3, 10)),
        optax.masked(optax.sgd(0.1), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    ):
        tx = make(estimator=hg.implicit(case().problem, hg.solvers.identity()), inner_optimizer=inner, window=2)
        step = runner(tx)
        variables, state = case().variables, tx.init(case().variables)
        for _ in range(2):
            variables, state = step(None, variables, state, window_of(case().inner_batch, 2), case().outer_batch)
        assert int(state.info.step) == 2
        assert not bool(state.info.skipped)
        assert relative_error(variables.params, case().variables.params) > 0.0


def test_multi_steps_inside_updates_the_weights_every_second_call():
    tx = make(inner_optimizer=optax.MultiSteps(optax.sgd(0.1), 2))
    step = runner(tx)
    first, state = step(None, case().variables, tx.init(case().variables), case().inner_batch, case().outer_batch)
    second, _ = step(None, first, state, case().inner_batch, case().outer_batch)
    assert relative_error(first.params, case().variables.params) == 0.0
    assert relative_error(second.params, first.params) > 0.0


def test_extra_keywords_reach_an_inner_optimizer_that_takes_them():
    inner = optax.GradientTransformationExtraArgs(
        lambda p: (), lambda g, s, p, *, boost, **_: (optax.tree.scale(-boost, g), s)
    )
    tx = make(inner_optimizer=inner)
    step, state = runner(tx), tx.init(case().variables)
    args = (None, case().variables, state, case().inner_batch, case().outer_batch)
    one, _ = step(*args, {"boost": jnp.array(1.0)})
    two, _ = step(*args, {"boost": jnp.array(2.0)})
    moved = [optax.tree.sub(v.params, case().variables.params) for v in (one, two)]
    assert relative_error(moved[1], optax.tree.scale(2.0, moved[0])) < 1e-5


@pytest.mark.slow
def test_a_given_keyword_counts_before_that_of_the_step():
    seen = optax.GradientTransformationExtraArgs(
        lambda p: jnp.zeros(()), lambda g, s, p, *, value, **_: (optax.tree.scale(-0.1, g), value.astype(jnp.float32))
    )
    tx = make(inner_optimizer=seen)
    args = None, case().variables, tx.init(case().variables), case().inner_batch, case().outer_batch
    assert float(runner(tx)(*args, {"value": jnp.array(7.0)})[1].inner) == 7.0
    assert float(runner(tx)(*args)[1].inner) == float(case().problem.inner_loss(*case().variables, args[3], None))


def test_the_outer_optimizer_is_handed_the_outer_loss():
    seen = optax.GradientTransformationExtraArgs(
        lambda p: jnp.zeros(()), lambda g, s, p, *, value, **_: (g, value.astype(jnp.float32))
    )
    tx = make(outer_optimizer=optax.chain(optax.clip_by_global_norm(1.0), seen))
    _, state = runner(tx)(None, case().variables, tx.init(case().variables), case().inner_batch, case().outer_batch)
    assert float(state.outer[1]) == float(state.info.outer_loss)


def test_frozen_parts_stay():
    frozen = lambda tree: jax.tree.map_with_path(lambda path, _: "Dense_0" in str(path), tree)  # noqa: E731
    tx = make(
        inner_optimizer=optax.chain(optax.sgd(0.1), optax.masked(optax.set_to_zero(), frozen)),
        outer_optimizer=optax.chain(optax.sgd(0.1), optax.masked(optax.set_to_zero(), frozen)),
    )
    variables, _ = runner(tx)(None, case().variables, tx.init(case().variables), case().inner_batch, case().outer_batch)
    for now, before in zip(variables, case().variables, strict=True):
        assert relative_error(now["Dense_0"], before["Dense_0"]) == 0.0
        assert relative_error(now["Dense_1"], before["Dense_1"]) > 0.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("has_aux", "window"),
    [*(pytest.param(*case, marks=pytest.mark.slow) for case in ((False, 1), (False, 3), (True, 1))), (True, 3)],
)
def test_batch_statistics_flow(window, has_aux):
    problem, variables, stats, batch = batch_norm(has_aux=has_aux)
    # Not Adam: the bias before BatchNorm has gradient 0 up to rounding, which Adam would blow up to full steps.
    inner_tx = optax.sgd(0.1)
    tx = make(problem, inner_optimizer=inner_tx, window=window, model_state=stats)
    batches = batch if window == 1 else window_of(batch, window)
    after, state = runner(tx)(None, variables, tx.init(variables), batches, batch)

    params, want = variables.params, stats
    s = inner_tx.init(params)
    for _ in range(window):
        grads, out = jax.grad(problem.inner_loss, has_aux=True)(params, variables.hyperparams, batch, None, want)
        want = out[0] if has_aux else out
        updates, s = inner_tx.update(grads, s, params)
        params = optax.apply_updates(params, updates)
    assert relative_error(state.model_state, want) < 1e-6
    assert relative_error(after.params, params) < 1e-5
    outer = problem.outer_loss(params, variables.hyperparams, batch, None, want)[0]
    assert float(state.info.outer_loss) == pytest.approx(float(outer), rel=1e-5)


@pytest.mark.slow
def test_handed_in_gradients_of_a_stateful_problem_bring_their_model_state():
    problem, variables, stats, batch = batch_norm()
    tx = make(problem, inner_optimizer=optax.sgd(0.1), model_state=stats)
    state = tx.init(variables)
    grads, new_stats = jax.grad(problem.inner_loss, has_aux=True)(*variables, batch, None, stats)
    step = runner(tx)
    given, given_state = step(grads, variables, state, batch, batch, {"model_state": new_stats})
    computed, computed_state = step(None, variables, state, batch, batch)
    assert relative_error(given, computed) < 1e-6
    assert relative_error(given_state.model_state, computed_state.model_state) == 0.0


def test_value_and_hypergrad_hands_back_aux():
    problem, variables, stats, batch = batch_norm(has_aux=True)
    fn = hg.value_and_hypergrad(hg.implicit(problem, hg.solvers.neumann(3)))
    (value, grad), info = jax.jit(fn)(*variables, batch, batch, key=None, model_state=stats)
    want, (_, aux) = problem.outer_loss(*variables, batch, None, stats)
    assert float(value) == pytest.approx(float(want), rel=1e-6)
    np.testing.assert_allclose(info.aux["logits"], aux["logits"], rtol=1e-5, atol=1e-6)
    assert grad.shape == ()


# Estimators that differentiate the inner steps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("window", "mode"),
    [
        pytest.param(1, hg.reverse(), marks=pytest.mark.slow),
        pytest.param(3, hg.reverse(unroll=True), marks=pytest.mark.slow),
        (3, hg.forward()),
    ],
)
def test_a_rollout_estimator_takes_the_inner_steps_itself(window, mode):
    tx = make(estimator=hg.unrolled(case().problem, mode), inner_optimizer=optax.sgd(0.1), window=window, every=2)
    plain = make(inner_optimizer=optax.sgd(0.1), window=window, every=100)
    batch = case().inner_batch if window == 1 else window_of(case().inner_batch, window)
    step, plain_step = runner(tx), runner(plain)
    variables, state = case().variables, tx.init(case().variables)
    other, other_state = case().variables, plain.init(case().variables)
    for call in (1, 2):
        variables, state = step(None, variables, state, batch, case().outer_batch)
        other, other_state = plain_step(None, other, other_state, batch, case().outer_batch)
        assert relative_error(variables.params, other.params) < 1e-6
        assert (relative_error(variables.hyperparams, case().variables.hyperparams) > 0) == (call == 2)


@pytest.mark.slow
@pytest.mark.parametrize("window", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_keywords_reach_the_steps_that_are_differentiated(window):
    """The same update with and without an outer step."""
    inner = optax.GradientTransformationExtraArgs(
        lambda p: (), lambda g, s, p, *, boost=1.0, **_: (optax.tree.scale(-boost, g), s)
    )
    tx = make(estimator=hg.unrolled(case().problem), inner_optimizer=lambda _: inner, window=window, every=2)
    batch = case().inner_batch if window == 1 else window_of(case().inner_batch, window)
    step, state = runner(tx), tx.init(case().variables)
    args = case().variables, batch, case().outer_batch, {"boost": jnp.array(0.3)}
    idle, state = step(None, args[0], state, *args[1:])
    due, state = step(None, args[0], state, *args[1:])
    assert int(state.info.step) == 2
    assert relative_error(due.params, idle.params) < 1e-6
    plain, _ = step(None, args[0], state, *args[1:3])
    assert relative_error(plain.params, idle.params) > 0.0


@pytest.mark.slow
@pytest.mark.parametrize("window", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_schedule_of_a_window_starts_anew_with_every_window(window):
    """Rates by the step's number modulo the window's length, over several calls."""
    rates = jnp.array([0.1, 0.2, 0.4, 0.8])
    base = case().problem
    problem = hg.BilevelProblem(
        lambda w, h, b, k: base.inner_loss(w, h["decay"], b, k), lambda w, h, b, k: base.outer_loss(w, h["decay"], b, k)
    )
    variables = case().variables._replace(hyperparams={"decay": case().variables.hyperparams, "rates": rates})
    optimizer = lambda h: optax.sgd(hg.optimizers.schedule(h["rates"]))  # noqa: E731
    tx = make(problem, estimator=hg.unrolled(problem), inner_optimizer=optimizer, window=window, every=10**6)
    batch = case().inner_batch if window == 1 else window_of(case().inner_batch, window)
    step, state, params = runner(tx), tx.init(variables), variables.params
    for _ in range(8 // window):
        variables, state = step(None, variables, state, batch, case().outer_batch)
    for i in range(8):
        grads = jax.grad(base.inner_loss)(params, case().variables.hyperparams, case().inner_batch, None)
        params = optax.tree.add_scale(params, -rates[i % 4], grads)
    assert relative_error(variables.params, params) < 1e-5


@pytest.mark.slow
def test_an_inner_optimizer_may_depend_on_the_hyperparameters(x64):
    """The learning rate's hypergradient by the wrapper equals finite differences of the greedy loss."""
    double = network(dtype=jnp.float64)
    base = double.problem

    def only_decay(loss):
        return lambda w, h, b, k: loss(w, h["decay"], b, k)

    problem = hg.reparameterize(
        hg.BilevelProblem(only_decay(base.inner_loss), only_decay(base.outer_loss)),
        {"decay": hg.bijectors.identity(), "rate": hg.bijectors.exp()},
    )
    rate = jnp.log(jnp.array(0.1))
    variables = hg.BilevelParams(double.variables.params, {"decay": double.variables.hyperparams, "rate": rate})
    tx = make(
        estimator=hg.unrolled(problem),
        inner_optimizer=lambda h: optax.sgd(h["rate"]),
        outer_optimizer=optax.sgd(1.0),
        window=1,
    )
    after, state = runner(tx)(None, variables, tx.init(variables), double.inner_batch, double.outer_batch)

    @jax.jit
    def greedy(log_rate):
        grads = jax.grad(problem.inner_loss)(*variables, double.inner_batch, None)
        params = optax.tree.add_scale(variables.params, -jnp.exp(log_rate), grads)
        return problem.outer_loss(params, variables.hyperparams, double.outer_batch, None)

    slope = (greedy(rate + 1e-2) - greedy(rate - 1e-2)) / 2e-2
    moved = float(rate - after.hyperparams["rate"])
    assert moved == pytest.approx(float(slope), rel=1e-3)  # the losses themselves are reduced in float32
    assert int(state.info.step) == 1


@pytest.mark.slow
def test_a_hessian_that_is_not_finite_skips_the_outer_step():
    """|w|^1.5 has an infinite curvature at 0: the solve hands back x = 0, which must not pass as a hypergradient."""
    problem = hg.BilevelProblem(
        lambda w, h, b, k: 0.5 * ((w - h) ** 2).sum() + (jnp.abs(w) ** 1.5).sum(),
        lambda w, h, b, k: (w - 1.0).sum() ** 2,
    )
    for solver in (hg.solvers.cg(5), hg.solvers.neumann(5), hg.solvers.dense()):
        (_, grad), info = hg.value_and_hypergrad(hg.implicit(problem, solver))(
            jnp.zeros(2), jnp.ones(2), (), (), key=None
        )
        assert not bool(info.solver.converged)
        assert bool(info.skipped)
        assert not bool(jnp.isfinite(grad).any())
        tx = hg.bilevel(
            hg.implicit(problem, solver), inner_optimizer=optax.set_to_zero(), outer_optimizer=optax.sgd(0.1)
        )
        variables = hg.BilevelParams(jnp.zeros(2), jnp.ones(2))
        updates, state = jax.jit(tx.update)(None, tx.init(variables), variables, inner_batch=(), outer_batch=())
        assert bool(state.info.skipped)
        assert float(optax.tree.norm(updates)) == 0.0


@pytest.mark.parametrize("window", [1, 2])
def test_a_model_state_keeps_its_dtypes(window):
    """A loss that returns its statistics in another precision, or as Python numbers, does not change the state."""

    def inner(w, h, batch, key, state):
        loss = 0.5 * ((w - h) ** 2).sum()
        return loss, {"low": state["low"].astype(jnp.float32) + 1.0, "weak": 1.0}

    problem = hg.BilevelProblem(inner, lambda w, h, b, k, state: ((w**2).sum(), state), stateful=True)
    start = {"low": jnp.zeros((), jnp.bfloat16), "weak": jnp.zeros(())}
    tx = make(problem, window=window, model_state=start)
    variables = hg.BilevelParams(jnp.ones(2), jnp.zeros(2))
    step, state = runner(tx), tx.init(variables)
    batch = jnp.zeros(window) if window > 1 else jnp.zeros(())
    for _ in range(2):
        variables, state = step(None, variables, state, batch, ())
    assert state.model_state["low"].dtype == jnp.bfloat16
    assert float(state.model_state["low"]) == 2.0 * window
    assert step._cache_size() == 1


def test_a_single_batch_may_hold_what_is_no_array():
    """Outside ``jit``, with window=1: the batch reaches the losses as it is."""
    problem = hg.BilevelProblem(
        lambda w, h, b, k: b["scale"] * 0.5 * ((w - h) ** 2).sum() * (1.0 if b["mode"] == "train" else jnp.nan),
        lambda w, h, b, k: (w**2).sum(),
    )
    tx = make(problem)
    variables = hg.BilevelParams(jnp.ones(2), jnp.zeros(2))
    batch = {"scale": jnp.array(2.0), "mode": "train"}
    _, state = tx.update(None, tx.init(variables), variables, inner_batch=batch, outer_batch=())
    assert not bool(state.info.skipped)


@pytest.mark.slow
def test_inside_optax_wrappers_that_need_full_gradients():
    """``MultiSteps`` and ``apply_if_finite`` around the whole: they want a BilevelParams of gradients."""
    grads = hg.BilevelParams(
        jax.grad(case().problem.inner_loss)(*case().variables, case().inner_batch, None),
        optax.tree.zeros_like(case().variables.hyperparams),
    )
    batches = {"inner_batch": case().inner_batch, "outer_batch": case().outer_batch}
    for wrapped in (optax.apply_if_finite(make(), 3), optax.MultiSteps(make(), 2)):
        state = wrapped.init(case().variables)
        update = jax.jit(wrapped.update)
        for _ in range(2):
            updates, state = update(grads, state, case().variables, **batches)
        assert float(optax.tree.norm(updates)) > 0.0
        assert int(optax.tree.get(state, "info").step) >= 1


def test_a_guarded_call_has_a_reverse_derivative():
    """``jax.grad`` passes through a call with an outer step: a guard is no loop."""
    problem, variables = case().problem, case().variables
    tx = hg.bilevel(
        hg.implicit(problem, hg.solvers.cg(2, unroll=True)),
        inner_optimizer=optax.sgd(0.1),
        outer_optimizer=optax.inject_hyperparams(optax.sgd)(learning_rate=0.1),
    )
    state, batches = tx.init(variables), {"inner_batch": case().inner_batch, "outer_batch": case().outer_batch}

    def moved(rate):
        outer = state.outer._replace(hyperparams={"learning_rate": rate})
        updates, _ = tx.update(None, state._replace(outer=outer), variables, **batches)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(updates.hyperparams))

    rate = jnp.array(0.1)
    assert float(jax.jit(jax.grad(moved))(rate)) == pytest.approx(float(moved(rate)) / 0.1, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("moments", "most"), [(None, 46.0), (jnp.bfloat16, 44.0)])
@pytest.mark.parametrize("every", [1, 10])
def test_bytes_per_weight(moments, most, every):
    """Of weights with a decay each, Adam twice and the default solver: variables, states and scratch memory.

    28 bytes are variables and states; a solve needs x, the remainder, the direction and its product.
    """

    def predict(params, x):
        for layer in params:
            x = jnp.tanh(x @ layer)
        return x

    def outer(params, decay, batch, key):
        return jnp.mean((predict(params, batch) - 1.0) ** 2)

    def inner(params, decay, batch, key):
        return outer(params, decay, batch, key) + hg.penalties.l2(params, decay)

    tx = make(
        hg.BilevelProblem(inner, outer),
        estimator=hg.implicit(hg.BilevelProblem(inner, outer)),
        outer_optimizer=optax.adam(1e-2, mu_dtype=moments),
        every=every,
    )
    params = [jax.ShapeDtypeStruct((512, 512), jnp.float32)] * 8
    variables, batch = hg.BilevelParams(params, params), jax.ShapeDtypeStruct((4, 512), jnp.float32)
    state = jax.eval_shape(tx.init, variables)

    def step(variables, state, batch):
        updates, state = tx.update(None, state, variables, inner_batch=batch, outer_batch=batch)
        return optax.apply_updates(variables, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(variables, state, batch).compile()
    memory = compiled.memory_analysis()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    assert used / sum(leaf.size for leaf in params) <= most
