"""The gradient check passes what is right, fails what is wrong, and says why; each fault is tried and mended."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.diagnostics import _check, _differences
from hypergrad.diagnostics._kinks import weights_at_kinks
from hypergrad.inner_solvers._newton_cg import newton, root
from hypergrad.training import split_keys
from tests import problems

check = hg.diagnostics.check_hypergrad
CG = hg.solvers.cg(50, rtol=1e-10)


def on(example, estimator, **options):
    return check(estimator, example.variables, example.inner_batch, example.outer_batch, key=None, **options)


@pytest.mark.slow
def test_passes_a_solved_problem_in_float64_also_from_float32():
    example = problems.ridge()
    found = on(example, hg.implicit(example.problem, CG))
    assert found.passed
    assert found.reasons == ()
    assert found.dtype == "float64"
    assert jax.tree.leaves(example.variables)[0].dtype == jnp.float32
    assert [row.leaf for row in found.rows] == ["['a']"] * 2 + ["['b'][0]"] * 2 + ["['b'][1]['c']"]  # one number: once
    assert max(row.error for row in found.rows) < 1e-4  # weights that float32 has rounded
    assert max(row.uncertainty for row in found.rows) < 1e-4
    assert "passed" in str(found)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_agrees_with_an_exact_hypergradient_beyond_its_tolerance():
    example = problems.ridge()
    found = on(example, hg.implicit(example.problem, CG), rtol=1e-5)
    assert found.passed, str(found)
    assert max(row.error for row in found.rows) < 1e-9
    exact = jax.tree.leaves(example.exact)[0]
    assert found.rows[0].measured == pytest.approx(float((exact * exact).sum() / jnp.abs(exact).max()), rel=1e-9)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_few_products_and_damping_are_a_number_and_no_failure():
    """The code is right; what its solver leaves out is reported beside a converged, undamped solve."""
    example = problems.ridge()
    exact = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(example.exact)])
    for solver in (hg.solvers.neumann(3, 0.3), None, hg.solvers.cg(50, damping=0.5)):
        estimator = hg.implicit(example.problem, solver)
        found = on(example, estimator)
        own = hg.hypergrad(estimator)(*example.variables, example.inner_batch, example.outer_batch, key=None)
        own = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(own)])
        assert found.passed, str(found)
        assert found.solver_error == pytest.approx(
            float(jnp.linalg.norm(own - exact) / jnp.linalg.norm(exact)), rel=1e-3
        )
        assert found.solver_error > 1e-3
        cosine = own @ exact / jnp.linalg.norm(own) / jnp.linalg.norm(exact)
        assert found.solver_cosine == pytest.approx(float(cosine), rel=1e-3)
        assert "The estimator's own hypergradient beside it, with its products and damping" in str(found)
    many = on(example, hg.implicit(example.problem, hg.solvers.neumann(200, 0.3)))
    assert many.passed, str(many)
    assert np.isnan(many.solver_error)
    assert "own solver" not in str(many)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_an_own_estimate_whose_solve_converged_is_judged_itself():
    """A wrong formula around a converged solve cannot hide behind the reference."""
    example = problems.ridge()
    right = hg.implicit(example.problem, CG)

    def estimate(state, ctx):
        found = right.estimate(state, ctx)
        return found._replace(hypergrad=jax.tree.map(lambda leaf: 1.5 * leaf, found.hypergrad))

    assert not on(example, right._replace(estimate=estimate)).passed


@pytest.mark.usefixtures("x64")
def test_unconverged_weights_fail_and_the_solution_passes():
    bend = jnp.array([1.0, -2.0, 3.0])
    inner = lambda w, h, batch, key: jnp.sum(jnp.cosh(w) - bend * w + 0.5 * jnp.exp(h) * w**2)  # noqa: E731
    problem = hg.BilevelProblem(inner, lambda w, h, batch, key: jnp.sum(w**3))
    h = jnp.array([0.1, -0.2, 0.3])
    solved = newton(lambda w: inner(w, h, None, None), jnp.zeros(3)).params
    early, late = (check(hg.implicit(problem, CG), hg.BilevelParams(c * solved, h), (), (), key=None) for c in (0.7, 1))
    assert not early.passed
    assert early.verdict == "not at a solution of the inner problem"
    assert "FAILED" not in str(early)
    assert early.reasons[0].startswith("the inner problem is not solved at these weights")
    assert "the estimate is right" in early.reasons[0]
    assert early.error_at_optimum < 1e-6
    assert early.inner_gradient_norm > 1e-3
    assert late.passed


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_unconverged_weights_with_few_terms():
    example = problems.ridge()
    early = example.variables._replace(params=jax.tree.map(lambda w: 0.5 * w, example.variables.params))
    found = on(example._replace(variables=early), hg.implicit(example.problem, hg.solvers.neumann(8, 0.3)))
    assert found.verdict == "not at a solution of the inner problem"
    assert found.reasons[0].startswith("the inner problem is not solved at these weights")
    assert found.error_at_optimum < 1e-6
    assert found.solver_error > 0.01


def dropped_out(key):
    """Ridge regression with dropout on its inputs, solved under the mask that an estimate's products share."""
    rng = np.random.default_rng(0)
    x, y, xv, yv = (jnp.asarray(rng.normal(size=s)) for s in ((30, 4), 30, (20, 4), 20))

    def inner(w, h, batch, key):
        mask = jax.random.bernoulli(key, 0.5, x.shape)
        return 0.5 * jnp.mean(((2 * mask * x) @ w["w"] - y) ** 2) + 0.5 * jnp.exp(h["decay"]) * jnp.sum(w["w"] ** 2)

    def outer(w, h, batch, key):
        return 0.5 * jnp.mean((xv @ w["w"] - yv) ** 2)

    problem, hyper = hg.BilevelProblem(inner, outer), {"decay": jnp.array(-1.0)}
    solved = newton(lambda w: inner(w, hyper, None, split_keys(key).solve), {"w": jnp.zeros(4)})
    return problem, hg.BilevelParams(solved.params, hyper)


def by_hand(problem, *, fresh):
    """A Neumann series as one writes it by hand: all products with one key, or each with a key of its own."""

    def estimate(state, ctx):
        keys, w, h, problem = ctx.keys, ctx.at.params, ctx.hyperparams, ctx.problem

        def product(v, number):
            own = jax.random.fold_in(keys.solve, number) if fresh else keys.solve
            return jax.jvp(lambda w: jax.grad(problem.inner_loss)(w, h, (), own), (w,), (v,))[1]

        value, slope = jax.value_and_grad(problem.outer_loss)(w, h, (), keys.outer)

        def add(number, c):
            term = jax.tree.map(lambda t, p: t - 0.2 * p, c[0], product(c[0], number))
            return term, optax.tree.add(c[1], term)

        q = optax.tree.scale(0.2, jax.lax.fori_loop(0, 200, add, (slope, slope))[1])
        mixed = jax.grad(lambda h: optax.tree.vdot(jax.grad(problem.inner_loss)(w, h, (), keys.solve), q))(h)
        return hg.Estimate(value, optax.tree.scale(-1.0, mixed), state, ())

    return hg.Estimator(problem, lambda ctx: ((), ()), estimate)


@pytest.mark.slow
def test_a_fresh_dropout_key_a_product_fails_and_one_key_passes():
    """An estimator with losses of its own draws other masks in float64; with those of ``ctx.problem`` it does not."""
    key = jax.random.key(3)
    problem, variables = dropped_out(key)
    wrong = check(by_hand(problem, fresh=True), variables, (), (), key=key)
    assert not wrong.passed
    assert wrong.dtype == "float64"
    assert not wrong.note
    assert wrong.inner_gradient_norm < 1e-6
    assert "share one key" in wrong.reasons[0]
    assert "error" in str(wrong)
    mended = check(by_hand(problem, fresh=False), variables, (), (), key=key)
    assert mended.passed, str(mended)
    assert (mended.dtype, mended.note) == ("float64", "")
    closed = by_hand(problem, fresh=False)
    own = closed._replace(estimate=lambda state, ctx: closed.estimate(state, ctx._replace(problem=problem)))
    found = check(own, variables, (), (), key=key)
    assert found.passed, str(found)
    assert found.dtype == "float32"
    assert "losses from ctx.problem?" in found.note


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_loss_that_draws_its_own_numbers_is_named():
    count = itertools.count()

    def inner(w, h, batch, key):
        noise = jax.random.normal(jax.random.key(next(count)), (4,))  # another one at every trace
        return 0.5 * jnp.sum((1 + noise**2) * w**2) - jnp.sum(w) + jnp.exp(h) * jnp.sum(w**2)

    problem = hg.BilevelProblem(inner, lambda w, h, batch, key: jnp.sum(w))
    found = check(hg.implicit(problem, CG), hg.BilevelParams(jnp.ones(4), jnp.array(0.0)), (), (), key=None)
    assert not found.passed
    assert found.reasons[0].startswith("the inner loss is no function of its arguments")

    noisy = hg.BilevelProblem(lambda w, h, batch, key: inner(w, h, batch, key) * 1e-3, problem.outer_loss)
    at, window = hg.BilevelParams(jnp.ones(4), jnp.array(0.0)), jnp.zeros((2, 1))
    found = check(hg.unrolled(noisy), at, window, (), key=None, inner_optimizer=optax.sgd(1e-3), rtol=0.5)
    assert found.verdict == "FAILED"  # also where the differences agree by chance
    assert found.reasons[0].startswith("the inner loss is no function of its arguments")


@pytest.mark.usefixtures("x64")
def test_unrolled_passes_and_a_truncated_unroll_fails():
    example = problems.ridge()
    start = example.variables._replace(params=optax.tree.zeros_like(example.variables.params))
    case = example._replace(variables=start, inner_batch=problems.window_of(example.inner_batch, 5))
    whole, part = (
        on(case, hg.unrolled(example.problem, mode), inner_optimizer=optax.sgd(0.2), rtol=1e-6)
        for mode in (hg.reverse(), hg.reverse(truncate=2))
    )
    assert whole.passed, str(whole)
    assert not part.passed
    assert "truncated" in part.reasons[0]


@pytest.mark.slow
def test_model_state_is_followed_through_a_window():
    problem, variables, model_state, batch = problems.batch_norm()
    options = {"key": None, "rtol": 1e-5, "model_state": model_state, "inner_optimizer": optax.sgd(0.5)}
    assert check(hg.unrolled(problem), variables, problems.window_of(batch, 3), batch, **options).passed


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_window_that_implicit_takes_first_is_taken():
    example = problems.ridge()
    start = example.variables._replace(params=optax.tree.zeros_like(example.variables.params))
    case = example._replace(variables=start, inner_batch=problems.window_of(example.inner_batch, 200))
    assert on(case, hg.implicit(example.problem, CG), inner_optimizer=optax.sgd(0.5)).passed


def _where_a_hardly_counts(problem):
    """Return the problem with decays of the first leaf that move a ten-thousandth as far."""
    small = lambda loss: lambda w, h, batch, key: loss(w, h | {"a": 1e-4 * h["a"]}, batch, key)  # noqa: E731
    return hg.BilevelProblem(small(problem.inner_loss), small(problem.outer_loss))


@pytest.mark.usefixtures("x64")
def test_one_wrong_leaf_is_named():
    example = problems.ridge()
    right = hg.implicit(example.problem, CG)

    def estimate(state, ctx):
        found = right.estimate(state, ctx)
        return found._replace(hypergrad=found.hypergrad | {"a": 1.2 * found.hypergrad["a"]})

    found = on(example, right._replace(estimate=estimate))
    assert {row.leaf for row in found.rows if row.error > found.rtol} == {"['a']"}
    assert found.rows[0].error == pytest.approx(1 / 6, rel=1e-4)

    assert found.reasons
    assert "custom derivative" in found.reasons[0]


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_wrong_leaf_that_hardly_counts_is_named():
    def backwards(state, ctx):
        found = right.estimate(state, ctx)
        return found._replace(hypergrad=found.hypergrad | {"a": -1e-7 * found.hypergrad["a"]})

    example = problems.ridge()
    scaled = example.variables.hyperparams | {"a": 1e4 * example.variables.hyperparams["a"]}
    small = example._replace(
        problem=_where_a_hardly_counts(example.problem), variables=example.variables._replace(hyperparams=scaled)
    )
    right = hg.implicit(small.problem, CG)
    assert on(small, right).passed
    assert not on(small, right._replace(estimate=backwards)).passed


def kinked(offset):
    inner = lambda w, h, batch, key: 0.5 * (w - h) ** 2  # noqa: E731                               w* = h
    return hg.BilevelProblem(inner, lambda w, h, batch, key: jnp.abs(w - 1 - offset) + 2 * w)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("offset", "step"), [(1e-4, 1e-5), (1e-6, 1e-7)])
def test_a_kink_nearby_is_passed_with_a_smaller_step(offset, step):
    """At 1e-6 the differences of the widest step agree with each other to 1e-3, and are wrong by half."""
    at = hg.BilevelParams(jnp.array(1.0), jnp.array(1.0))
    found = check(hg.implicit(kinked(offset), CG), at, (), (), key=None)
    assert found.passed, str(found)
    assert found.step == step
    assert found.rows[0].measured == pytest.approx(1.0, rel=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_solver_that_turns_the_hypergradient_does_not_pass():
    """A solver of the user's own is judged itself, one of the library by its direction."""
    example = problems.ridge()
    own = hg.solvers.from_callable(lambda matvec, b, x0: jax.tree.map(lambda v: -0.3 * v, b))
    assert on(example, hg.implicit(example.problem, own)).verdict == "FAILED"

    def turned(system, b, state, *, tolerance=None):
        x, state, info = hg.solvers.cg(2).solve(system, b, state, tolerance=tolerance)
        return jax.tree.map(jnp.negative, x), state, info._replace(status=jnp.asarray(hg.solvers.Status.TRUNCATED))

    found = on(example, hg.implicit(example.problem, hg.LinearSolver(lambda b: (), turned)))
    assert found.verdict == "FAILED"
    assert "turns the hypergradient" in found.reasons[0]
    assert found.solver_cosine < 0


@pytest.mark.usefixtures("x64")
def test_stationary_hyperparameters_are_inconclusive():
    problem = hg.BilevelProblem(lambda w, h, b, k: jnp.sum((w - h) ** 2), lambda w, h, b, k: jnp.sum((w - 2.0) ** 2))
    at = hg.BilevelParams(jnp.full(3, 2.0), jnp.full(3, 2.0))
    found = check(hg.implicit(problem, CG), at, (), (), key=None)
    assert found.verdict == "inconclusive"
    assert "λ is stationary" in found.reasons[0]


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_weights_that_the_optimizer_freezes_stay_frozen_at_the_optimum():
    """Far from the solution the estimate there decides, and it knows the same unknowns."""
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(24, 5))), jnp.asarray(rng.normal(size=24))
    fit = lambda w, s: 0.5 * jnp.mean((x[s] @ (w["fixed"] + w["moved"]) - y[s]) ** 2)  # noqa: E731
    penalty = lambda w, h: 0.5 * jnp.sum(jnp.exp(h) * w["moved"] ** 2) + 0.05 * jnp.sum(w["fixed"] ** 2)  # noqa: E731
    problem = hg.BilevelProblem(
        lambda w, h, b, k: fit(w, slice(12)) + penalty(w, h), lambda w, h, b, k: fit(w, slice(12, 24))
    )
    at = hg.BilevelParams({"fixed": jnp.ones(5), "moved": jnp.ones(5)}, jnp.full(5, -2.0))
    tx = optax.partition({"t": optax.sgd(1e-2), "f": optax.set_to_zero()}, {"fixed": "f", "moved": "t"})
    window = hg.IndexedBatch((), jnp.arange(1))
    found = check(hg.implicit(problem, CG), at, window, (), key=None, inner_optimizer=tx)
    assert found.verdict == "not at a solution of the inner problem", str(found)
    assert found.error_at_optimum < 1e-6


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_check_tells_how_far_it_is_and_ends_when_its_time_is_over():
    example, lines = problems.ridge(), []
    estimator = hg.implicit(example.problem, CG)
    assert on(example, estimator, progress=lines.append, max_seconds=float("inf")).passed
    assert lines[0] == "the estimate"
    assert "solving the inner problem" in lines
    number = [line.split(":")[0] for line in lines if line.startswith("difference")]
    assert number == [f"difference {i} of {len(number)}" for i in range(1, len(number) + 1)]
    assert len(number) >= 2
    late = on(example, estimator, max_seconds=1e-9)
    assert late.verdict == "inconclusive"
    assert "Pass a larger max_seconds" in late.reasons[0]
    assert np.isnan([row.measured for row in late.rows]).all()
    steps = hg.unrolled(example.problem)
    window = hg.IndexedBatch(example.inner_batch, jnp.tile(jnp.arange(40), (2, 1)))
    given = (steps, example.variables, window, example.outer_batch)
    late = check(*given, key=None, inner_optimizer=optax.sgd(0.1), max_seconds=1e-9)
    assert "max_seconds" in late.reasons[0]
    with pytest.raises(ValueError, match="max_seconds to be finite and > 0"):
        on(example, estimator, max_seconds=0.0)
    with pytest.raises(TypeError, match="progress as a function"):
        on(example, estimator, progress=True)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_solve_inner_gets_to_where_the_check_passes():
    example = problems.ridge()
    params, hyperparams = example.variables
    away = hg.BilevelParams(jax.tree.map(lambda w: w + 1.0, params), hyperparams)
    found = hg.diagnostics.solve_inner(example.problem, away, example.inner_batch)
    assert bool(found.converged)
    assert problems.relative_error(found.params, params) < 1e-8
    part = hg.diagnostics.solve_inner(
        example.problem, away, example.inner_batch, trainable={name: name == "a" for name in params}
    )
    slope = jax.grad(example.problem.inner_loss)(part.params, hyperparams, example.inner_batch, None)
    for name in params:
        held = problems.relative_error(part.params[name], away.params[name]) == 0.0
        assert held == (name != "a")
        assert (max(float(jnp.abs(g).max()) for g in jax.tree.leaves(slope[name])) < 1e-8) == (name == "a")


@pytest.mark.usefixtures("x64")
def test_solve_inner_solves_a_residual_and_checks_its_arguments():
    step = lambda w, h, b, k: jnp.cos(h * w)  # noqa: E731
    problem = hg.BilevelProblem(lambda w, h, b, k: jnp.sum(w**2), lambda w, h, b, k: jnp.sum(w))
    problem = hg.with_residual(problem, hg.residuals.fixed_point(step))
    at = hg.BilevelParams(jnp.ones(2), jnp.array([1.0, 0.5]))
    found = hg.diagnostics.solve_inner(problem, at, ())
    np.testing.assert_allclose(found.params, jnp.cos(at.hyperparams * found.params), rtol=1e-10)
    with pytest.raises(TypeError, match="a BilevelParams"):
        hg.diagnostics.solve_inner(problem, jnp.ones(2), ())
    with pytest.raises(ValueError, match="max_products to be at least 1"):
        hg.diagnostics.solve_inner(problem, at, (), max_products=0)


@pytest.mark.usefixtures("x64")
def test_a_step_across_a_kink_is_inconclusive():
    at = hg.BilevelParams(jnp.array(1.0), jnp.array(1.0))
    crossed = check(hg.implicit(kinked(1e-4), CG), at, (), (), key=None, step=1.5e-4)
    assert crossed.verdict == "inconclusive"
    assert crossed.reasons[0].startswith("inconclusive for hyperparams: its difference quotient is uncertain by")


def relu_net(w, x):
    for kernel in w["hidden"]:
        x = jax.nn.relu(x @ kernel)
    return x @ w["last"]


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_network_with_relus_passes():
    """A hundred large steps: φ has kinks closer than 1e-5."""
    rng = np.random.default_rng(2)
    x, y = jnp.asarray(rng.normal(size=(128, 4))), jnp.asarray(rng.integers(0, 3, 128))

    def loss(w, rate, batch, key):
        return optax.losses.softmax_cross_entropy_with_integer_labels(relu_net(w, batch[0]), batch[1]).mean()

    shapes = (4, 8), (8, 8), (8, 3)
    *hidden, last = [jnp.asarray(rng.normal(size=s) * np.sqrt(2 / s[0])) for s in shapes]
    at = hg.BilevelParams({"hidden": hidden, "last": last}, jnp.array(1.0))
    window = hg.IndexedBatch((x[:64], y[:64]), jnp.asarray(rng.integers(0, 64, (100, 16))))
    estimator = hg.unrolled(hg.BilevelProblem(loss, loss))
    found = check(estimator, at, window, (x[64:], y[64:]), key=None, inner_optimizer=optax.sgd)
    assert found.passed, str(found)
    assert found.step == 1e-7


@pytest.mark.slow
def test_what_casts_down_or_refuses_float64_is_checked_in_float64():
    example = problems.ridge()

    def narrow(loss):
        return lambda w, h, batch, key: loss(optax.tree.cast(w, jnp.float32), h, batch, key)

    def fixed(loss):
        def checked(w, h, batch, key):
            if batch[0].dtype != jnp.float32:
                raise TypeError("this model takes float32")
            return loss(w, h, batch, key)

        return checked

    for wrap in (narrow, fixed):
        problem = hg.BilevelProblem(wrap(example.problem.inner_loss), wrap(example.problem.outer_loss))
        found = on(example, hg.implicit(problem, hg.solvers.cg(50, 1e-6)))
        assert found.dtype == "float64"
        assert found.passed, str(found)
        assert not found.note


@pytest.mark.usefixtures("x64")
def test_a_response_is_compared_with_the_problem_over_plain_weights():
    inner = lambda w, h, batch, key: jnp.sum(0.5 * jnp.exp(h) * w**2 - w)  # noqa: E731             w* = exp(−h)
    problem = hg.BilevelProblem(inner, lambda w, h, batch, key: jnp.sum(w**2))
    problem = hg.responses.with_response(problem, hg.responses.linear())
    h = jnp.array([0.5, -0.5])
    for slope, passes in ((-jnp.diag(jnp.exp(-h)), True), (jnp.zeros((2, 2)), False)):
        variables = hg.BilevelParams(hg.responses.LinearParams(jnp.exp(-h), slope, ()), h)
        found = check(hg.direct(problem), variables, (), (), key=None)
        assert found.passed == passes
        assert passes or "response has not learned" in found.reasons[0]


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_solve_that_the_guard_skips_is_a_note_where_a_converged_one_is_right():
    example = problems.ridge()

    def poor(system, b, state, *, tolerance=None):
        x, state, info = hg.solvers.cg(2).solve(system, b, state, tolerance=tolerance)
        info = info._replace(status=jnp.asarray(hg.solvers.Status.TRUNCATED, jnp.int32), residual=jnp.asarray(5.0))
        return jax.tree.map(lambda v: -3.0 * v, x), state, info

    found = on(example, hg.implicit(example.problem, hg.LinearSolver(lambda b: (), poor)))
    assert found.passed, str(found)
    assert "own solve has a residual of 5. The guard skips steps above 3" in found.note


@pytest.mark.usefixtures("x64")
def test_what_is_not_finite_is_said_to_be():
    inner = lambda w, h, batch, key: jnp.sum((w - h) ** 2)  # noqa: E731
    problem = hg.BilevelProblem(inner, lambda w, h, batch, key: jnp.sum(jnp.sqrt(w - h)))
    found = check(hg.implicit(problem, CG), hg.BilevelParams(jnp.ones(2), jnp.ones(2)), (), (), key=None)
    assert not found.passed
    assert "not finite" in found.reasons[0]


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_solve_that_broke_down_is_named_before_the_weights():
    example = problems.ridge()
    lost = hg.solvers.from_callable(lambda matvec, b, x0: jax.tree.map(lambda x: 1e3 * x, b))
    found = on(example, hg.implicit(example.problem, lost))
    assert len(found.reasons) == 1
    assert "broke down (TRUNCATED, residual" in found.reasons[0]
    assert "damping" in found.reasons[0]


def test_a_random_loss_under_a_response_is_inconclusive():
    def inner(w, h, batch, key):
        return jnp.sum((w - h * (1 + jax.random.normal(key))) ** 2)

    problem = hg.BilevelProblem(inner, lambda w, h, batch, key: jnp.sum(w**2))
    problem = hg.responses.with_response(problem, hg.responses.linear())
    at = hg.BilevelParams(hg.responses.LinearParams(jnp.ones(1), jnp.ones((1, 1)), ()), jnp.ones(1))
    found = check(hg.direct(problem), at, (), (), key=1)
    assert found.verdict == "inconclusive"
    assert len(found.reasons) == 1
    assert "mean over draws" in found.reasons[0]


def test_an_aux_that_is_cast_down_does_not_count():
    def loss(w, h, batch, key):
        return jnp.sum((w - jnp.exp(h)) ** 2), w.astype(jnp.bfloat16)

    problem = hg.BilevelProblem(loss, loss, has_aux=True)
    assert (
        check(hg.implicit(problem, CG), hg.BilevelParams(jnp.ones(2), jnp.zeros(2)), (), (), key=None).dtype
        == "float64"
    )


def test_refuses_what_it_cannot_check():
    example = problems.ridge()
    with pytest.raises(TypeError, match=r"outside jax\.jit"):
        jax.jit(lambda at: on(example._replace(variables=at), hg.implicit(example.problem, CG)))(example.variables)
    with pytest.raises(TypeError, match="expected an Estimator"):
        on(example, example.problem)
    with pytest.raises(ValueError, match="rtol"):
        on(example, hg.implicit(example.problem, CG), rtol=0.0)
    with pytest.raises(ValueError, match="step"):
        on(example, hg.implicit(example.problem, CG), step=-1.0)
    with pytest.raises(ValueError, match="inner_optimizer"):
        on(example, hg.unrolled(example.problem))


@pytest.mark.usefixtures("x64")
def test_a_hypergradient_of_zeros_fails():
    """Both routes agree on zero where the outer loss cannot see the weights: that says nothing."""
    inner = lambda w, h, batch, key: jnp.sum((w - h) ** 2)  # noqa: E731
    dead = lambda w, h, batch, key: jnp.sum(jax.nn.relu(w - 100.0))  # noqa: E731
    at = hg.BilevelParams(jnp.ones(2), jnp.ones(2))
    found = check(hg.implicit(hg.BilevelProblem(inner, dead), CG), at, (), (), key=None)
    assert found.verdict == "FAILED"
    assert len(found.reasons) == 1
    assert found.reasons[0].startswith("every entry of the hypergradient is zero")


def unknown_operation(*args, **kwargs):
    raise NotImplementedError("no rule")


def test_what_bfloat16_rounds_away_is_no_number(monkeypatch):
    """Where float64 is no way out, a direction whose difference is noise has an estimate, a ±, and no verdict."""

    def loss(w, h, batch, key):
        narrow = w.astype(jnp.bfloat16) - jnp.exp(h).astype(jnp.bfloat16)
        return 3e3 + jnp.sum(narrow**2).astype(jnp.float32)

    at = hg.BilevelParams(1.5 * jnp.ones(3), jnp.zeros(3))
    estimator = problems.autodiff_steps(hg.BilevelProblem(loss, loss))
    found = check(estimator, at, jnp.arange(2), (), key=None, inner_optimizer=optax.sgd(0.1))
    assert found.dtype == "float64"
    assert "the losses compute in bfloat16: there the hypergradient differs" in found.note
    monkeypatch.setattr(_check._float64, "problem_in_float64", unknown_operation)
    found = check(estimator, at, jnp.arange(2), (), key=None, inner_optimizer=optax.sgd(0.1))
    assert found.dtype == "bfloat16"
    assert "not in float64: there they raise NotImplementedError: no rule" in found.note
    assert found.verdict == "inconclusive"
    assert "rounding of bfloat16" in found.reasons[0]
    assert all(row.uncertainty > 1 for row in found.rows)
    for line in str(found).splitlines()[4:6]:
        _, _, _, measured, uncertainty, error = line.split()
        assert (measured, error) == ("-", "-")
        assert float(uncertainty) > 1


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_without_an_inner_solution_nothing_is_measured(monkeypatch):
    """Neither where the inner loss has no minimum, nor where the Hessian products run out."""
    inner = lambda w, h, batch, key: jnp.sum(jnp.exp(-w) + h * w)  # noqa: E731   w* = −log h where h is positive
    implicit = hg.implicit(hg.BilevelProblem(inner, lambda w, h, batch, key: jnp.sum(w)), CG)
    endless = check(implicit, hg.BilevelParams(jnp.zeros(2), -jnp.ones(2)), (), (), key=None)
    assert endless.verdict == "inconclusive"
    assert "led to no inner solution to rounding" in endless.reasons[0]
    assert np.isnan([row.measured for row in endless.rows]).all()

    at = hg.BilevelParams(jnp.zeros(2), jnp.ones(2))
    assert check(implicit, at, (), (), key=None).passed
    monkeypatch.setattr(_differences, "MAX_PRODUCTS", 10)
    short = check(implicit, at, (), (), key=None)
    assert short.verdict == "inconclusive"
    assert "the limit of a check" in short.reasons[0]
    assert np.isnan(short.rows[-1].measured)


MATRIX = np.array([[2.0, 0.5, -0.8, 0.3], [0.5, 1.0, 0.4, 0.2], [-0.8, 0.4, 1.5, -0.1], [0.3, 0.2, -0.1, 1.0]])
SPARSE = np.array([1.5, -1.0, 0.0, 0.0])
STRENGTH = 0.3
# A w − b + λ z = 0 with z = sign(w) where w is not 0, else within ±1: the lasso's solution is SPARSE.
OFFSET = MATRIX @ SPARSE + STRENGTH * np.array([1.0, -1.0, 0.4, -0.6])
TARGET = np.array([0.2, 0.1, 0.7, -0.4])


def quadratic(w, h, batch, key):
    return 0.5 * w @ MATRIX @ w - OFFSET @ w


def lasso(w, h, batch, key):
    return quadratic(w, h, batch, key) + jnp.exp(h) * jnp.sum(jnp.abs(w))


def to_target(w, h, batch, key):
    return 0.5 * jnp.sum((w - TARGET) ** 2)


def lasso_derivative():
    """|dφ/dh|, that along the gradient, by the closed form on the support: dw/dλ = −A⁻¹ sign(w) there."""
    slope = np.linalg.solve(MATRIX[:2, :2], -np.sign(SPARSE[:2]))
    return abs(STRENGTH * slope @ (SPARSE - TARGET)[:2])


def soft(w, h, step):
    return jnp.sign(w) * jnp.maximum(jnp.abs(w) - step * jnp.exp(h), 0.0)


def proximal():
    problem = hg.BilevelProblem(quadratic, to_target)
    return hg.with_residual(problem, hg.residuals.proximal_gradient(problem, soft, 0.3))


def sparse(weights=SPARSE):
    return hg.BilevelParams(jnp.asarray(weights), jnp.log(jnp.array(STRENGTH)))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_lasso_given_plainly_is_named_and_its_residual_passes():
    """The first is wrong, the second right, beside the closed form; the report of the first names the second."""
    plain = check(hg.implicit(hg.BilevelProblem(lasso, to_target), hg.solvers.dense()), sparse(), (), (), key=None)
    want = lasso_derivative()
    assert plain.verdict == "at a kink of the inner loss"
    assert plain.kinks == {"": 2}
    assert len(plain.reasons) == 1
    assert "2 of the weights" in str(plain)
    assert "hg.residuals.proximal_gradient" in str(plain)
    assert abs(plain.rows[0].estimated - want) > 0.05 * want
    right = check(hg.implicit(proximal(), hg.solvers.dense()), sparse(), (), (), key=None)
    assert right.passed, str(right)
    assert right.rows[0].estimated == pytest.approx(want, rel=1e-9)
    assert right.rows[0].measured == pytest.approx(want, rel=1e-6)
    assert right.kinks == {}
    assert right.inner_gradient_norm < 1e-12


def trained(loss, optimizer, start, num_steps=5000):
    def step(_, at):
        updates, state = optimizer.update(jax.grad(loss)(at[0]), at[1], at[0])
        return optax.apply_updates(at[0], updates), state

    run = jax.jit(lambda w: jax.lax.fori_loop(0, num_steps, step, (w, optimizer.init(w)))[0])
    return run(start)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weights_near_their_kinks_are_found(dtype, x64):
    """At 0, or where steps of a finite length leave them: up to 0.1 away."""
    fn, epsilon = (lambda w: lasso(w, np.log(STRENGTH), (), None)), float(jnp.finfo(dtype).eps)
    start = jnp.full(4, 0.1, dtype)
    away = [trained(fn, each, start) for each in (optax.sgd(0.3), optax.sgd(0.01), optax.adam(0.05), optax.adam(1e-3))]
    assert 0.01 < np.abs(away[0][2:]).max() < 0.1
    gradient = jax.jit(jax.grad(fn))
    for weights in (jnp.asarray(SPARSE, dtype), *away):
        assert weights.dtype == dtype
        assert weights_at_kinks(gradient, weights, epsilon) == {"": 2}


@pytest.mark.usefixtures("x64")
def test_a_norm_at_zero_is_a_kink_and_leaves_are_counted():
    def fn(w):
        norms = jnp.linalg.norm(w["rows"], axis=1)
        return jnp.sum((w["rows"][0] - 2.0) ** 2) + jnp.sum(norms) + jnp.sum((w["bias"] - 1.0) ** 2)

    weights = {"bias": jnp.ones(2), "rows": jnp.zeros((3, 2)).at[0].set(2.0 - 0.5 / np.sqrt(2))}
    assert weights_at_kinks(jax.jit(jax.grad(fn)), weights, 1e-16) == {"['rows']": 4}


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "float64"])
def test_smooth_losses_have_no_kinks(dtype, x64):
    """Neither a bend narrower than most steps, nor a saturated loss, nor weights that are no solution."""
    epsilon = float(jnp.finfo(dtype).eps)
    bend = lambda w: quadratic(w, 0, (), None) + hg.penalties.l1(w, STRENGTH, smoothing=1e-3)  # noqa: E731
    at_bend = newton(bend, jnp.asarray(SPARSE, dtype)).params
    assert np.abs(at_bend[2:]).max() < 1e-2
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(20, 4)), dtype)
    labels = jnp.sign(x @ jnp.array([1.0, -1.0, 0.5, 0.2], dtype))
    logistic = lambda w: jnp.mean(jax.nn.softplus(-labels * (x @ w)))  # noqa: E731
    separable = trained(logistic, optax.sgd(5.0), jnp.zeros(4, dtype), 2000)
    for fn, weights in (
        (bend, at_bend),
        (logistic, separable),
        (lambda w: quadratic(w, 0, (), None), jnp.asarray(np.linalg.solve(MATRIX, OFFSET), dtype)),
        (lambda w: quadratic(w, 0, (), None), jnp.zeros(4, dtype)),
        (lambda w: lasso(w, np.log(STRENGTH), (), None), jnp.full(4, 5.0, dtype)),
    ):
        assert weights_at_kinks(jax.jit(jax.grad(fn)), weights, epsilon) == {}


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_networks_with_relus_have_no_kinks_that_count():
    """Training ends at kinks that examples make; with one input they cross little more than one bias."""
    for seed in (0, 2):
        rng = np.random.default_rng(seed)
        x, y = jnp.asarray(rng.normal(size=(64, 1))), jnp.asarray(rng.normal(size=64))

        def fn(w, x=x, y=y):
            fitted = jax.nn.relu(x @ w["hidden"] + w["bias"]) @ w["last"]
            return jnp.mean((fitted - y) ** 2) + 1e-2 * optax.tree.norm(w, squared=True)

        hidden, last = (jnp.asarray(rng.normal(size=s) * np.sqrt(2 / s[0])) for s in ((1, 2), (2,)))
        start = {"hidden": hidden, "bias": jnp.zeros(2), "last": last}
        for weights in (start, trained(fn, optax.adam(1e-2), start, 3000)):
            assert weights_at_kinks(jax.jit(jax.grad(fn)), weights, 2e-16) == {}


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_smoothed_penalty_passes():
    inner = lambda w, h, b, k: quadratic(w, h, b, k) + hg.penalties.l1(w, jnp.exp(h))  # noqa: E731
    at = sparse()
    solved = newton(lambda w: inner(w, at.hyperparams, (), None), at.params).params
    problem = hg.BilevelProblem(inner, to_target)
    found = check(hg.implicit(problem, hg.solvers.dense()), at._replace(params=solved), (), (), key=None)
    assert found.passed, str(found)
    assert found.kinks == {}


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_kinks_of_frozen_weights_do_not_count():
    """Weights that nothing moves sit at 0, where the loss has |w|; those that are solved for are at a kink of data."""
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(9, 3))), jnp.asarray(rng.normal(size=9))

    def inner(w, h, batch, key):
        fit = jnp.mean(jnp.abs(x @ w["moved"] - y)) + 0.01 * jnp.exp(h) * jnp.sum(w["moved"] ** 2)
        return fit + jnp.sum(jnp.abs(w["frozen"]))

    problem = hg.BilevelProblem(inner, lambda w, h, b, k: jnp.sum((w["moved"] - 1.0) ** 2))
    frozen = jnp.zeros(2)
    moved = trained(
        lambda w: inner({"moved": w, "frozen": frozen}, 0.0, (), None), optax.adam(1e-4), jnp.zeros(3), 20_000
    )
    at = hg.BilevelParams({"moved": moved, "frozen": frozen}, jnp.array(0.0))
    found = check(hg.implicit(problem, CG, trainable={"moved": True, "frozen": False}), at, (), (), key=None)
    assert found.verdict == "inconclusive"
    assert found.kinks == {}
    assert check(hg.implicit(problem, CG), at, (), (), key=None).kinks == {"['frozen']": 2}


@pytest.mark.usefixtures("x64")
def test_a_kink_of_data_is_inconclusive_and_not_taken_for_a_penalty():
    """Least absolute errors: the solution fits some of the examples exactly, at kinks that cross all weights."""
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(9, 3))), jnp.asarray(rng.normal(size=9))
    inner = lambda w, h, b, k: jnp.mean(jnp.abs(x @ w - y)) + 0.01 * jnp.exp(h) * jnp.sum(w**2)  # noqa: E731
    problem = hg.BilevelProblem(inner, lambda w, h, b, k: jnp.sum((w - 1.0) ** 2))
    fitted = trained(lambda w: inner(w, 0.0, (), None), optax.adam(1e-4), jnp.zeros(3), 20_000)
    assert int((jnp.abs(x @ fitted - y) < 1e-3).sum()) >= 2
    found = check(hg.implicit(problem, CG), hg.BilevelParams(fitted, jnp.array(0.0)), (), (), key=None)
    assert found.verdict == "inconclusive"
    assert "kink" in found.reasons[0]
    assert found.kinks == {}


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_wrong_hypergradient_of_a_residual_fails_and_early_weights_are_named():
    right = hg.implicit(proximal(), hg.solvers.dense())

    def estimate(state, ctx):
        found = right.estimate(state, ctx)
        return found._replace(hypergrad=1.2 * found.hypergrad)

    wrong = check(right._replace(estimate=estimate), sparse(), (), (), key=None)
    assert wrong.verdict == "FAILED"
    early = check(right, sparse(0.8 * SPARSE), (), (), key=None)
    assert early.verdict == "not at a solution of the inner problem"
    assert "‖residual‖ = " in early.reasons[0]
    assert early.inner_gradient_norm > 0.01
    assert early.error_at_optimum < 1e-6
    assert early.rows[0].measured == pytest.approx(lasso_derivative(), rel=1e-6)


@pytest.mark.usefixtures("x64")
def test_a_residual_without_a_solution_is_inconclusive():
    loss = lambda w, h, batch, key: jnp.sum(w**2)  # noqa: E731
    problem = hg.with_residual(hg.BilevelProblem(loss, loss), lambda w, h, batch, key: w**2 + jnp.exp(h))
    found = check(hg.implicit(problem), hg.BilevelParams(jnp.ones(2), jnp.array(0.0)), (), (), key=None)
    assert found.verdict == "inconclusive"
    assert "the iteration w ← w − residual did not converge, ‖residual‖ =" in found.reasons[0]
    assert np.isnan(found.rows[0].measured)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_root_takes_the_better_of_two_steps():
    """A lasso from far away, a fixed point that repels plain steps, and one on which Newton's method alone diverges."""
    residual = lambda w: proximal().residual(w, jnp.log(STRENGTH), (), None)  # noqa: E731
    far = root(residual, jnp.array([30.0, 50.0, -40.0, 20.0]))
    assert bool(far.converged)
    np.testing.assert_allclose(far.params, SPARSE, atol=1e-12)
    repelled = root(lambda w: 3.0 * (w - jnp.cos(w)), jnp.array([0.5]))
    assert bool(repelled.converged)
    np.testing.assert_allclose(repelled.params, jnp.cos(repelled.params), rtol=1e-12)
    overshot = root(jnp.arctan, jnp.array([3.0]))
    assert bool(overshot.converged)
    assert abs(float(overshot.params[0])) < 1e-12


@pytest.mark.slow
def test_frozen_weights_stay_frozen_in_the_check(x64):
    """Their gradient is far from zero: solved for as well, the difference would be that of another problem."""
    x, y = jax.random.normal(jax.random.key(0), (30, 4)), jax.random.normal(jax.random.key(1), (30,))

    def error(w, batch):
        return jnp.mean((jnp.tanh(batch[0] @ w["body"]) @ w["head"] - batch[1]) ** 2)

    problem = hg.BilevelProblem(
        lambda w, h, batch, key: error(w, batch) + jnp.exp(h) * jnp.sum(w["head"] ** 2),
        lambda w, h, batch, key: error(w, batch),
    )
    at = hg.BilevelParams({"body": jax.random.normal(jax.random.key(2), (4, 3)), "head": jnp.ones(3)}, jnp.array(-2.0))
    estimator = hg.implicit(problem, trainable={"body": False, "head": True})
    found = hg.diagnostics.check_hypergrad(estimator, at, (x, y), (x[:9], -y[:9]), key=None)
    assert found.error_at_optimum < 1e-6
    assert found.verdict == "not at a solution of the inner problem"
    features = jnp.tanh(x @ at.params["body"])
    head = jnp.linalg.solve(features.T @ features / 30 + jnp.exp(-2.0) * jnp.eye(3), features.T @ y / 30)
    solved = hg.BilevelParams({**at.params, "head": head}, at.hyperparams)
    found = hg.diagnostics.check_hypergrad(estimator, solved, (x, y), (x[:9], -y[:9]), key=None)
    assert found.passed
    assert found.inner_gradient_norm < 1e-12


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("wrong", [None, "w3"])
def test_many_leaves_are_moved_together_first(wrong):
    """When the time ends early, all leaves have been moved, and a wrong one shows."""
    names = [f"w{i}" for i in range(6)]
    inner = lambda w, h, b, k: sum(jnp.sum(0.5 * jnp.exp(h[n]) * w[n] ** 2 - w[n]) for n in names)  # noqa: E731
    problem = hg.BilevelProblem(inner, lambda w, h, b, k: sum(jnp.sum((w[n] - 1.0) ** 2) for n in names))
    hyperparams = {n: jnp.linspace(0.2, 0.5, 1 + i) for i, n in enumerate(names)}
    at = hg.BilevelParams({n: jnp.exp(-h) for n, h in hyperparams.items()}, hyperparams)
    right = hg.implicit(problem, CG)

    def estimate(state, ctx):
        found = right.estimate(state, ctx)
        changed = {n: (0.5 if n == wrong else 1.0) * g for n, g in found.hypergrad.items()}
        return found._replace(hypergrad=changed)

    estimator = right._replace(estimate=estimate, reference=None)
    whole = check(estimator, at, (), (), key=None)
    assert [row.leaf for row in whole.rows[:2]] == ["all leaves together"] * 2
    assert {row.leaf for row in whole.rows[2:]} == {f"['{n}']" for n in names}
    assert whole.passed == (wrong is None), str(whole)
    short = None

    def stop(line):  # let the time be over once a few leaves were moved one by one
        nonlocal short
        if line.startswith("difference 5 of"):
            short = _differences.Budget.seconds_left
            _differences.Budget.seconds_left = lambda self: 0.0

    try:
        cut = check(estimator, at, (), (), key=None, progress=stop)
    finally:
        if short is not None:
            _differences.Budget.seconds_left = short
    assert len(cut.rows) == 4
    assert "2 of 6 leaves were moved one by one" in cut.note
    assert cut.passed == (wrong is None), str(cut)
    assert [row.error <= row.uncertainty + 1e-2 for row in cut.rows[:2]] == [wrong is None] * 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda problem: hg.first_order(problem, penalty=10.0), "1/penalty"),
        (hg.sama, "one optimizer step"),
        (lambda problem: hg.evolution(problem, sigma=0.1, num_pairs=2), "standard_error"),
        (lambda problem: hg.partition({"a": hg.implicit(problem)}, "a"), "each of its estimators"),
    ],
)
def test_methods_that_are_no_derivative_of_the_outer_loss_are_refused_not_accused(make, words):
    example = problems.ridge()
    with pytest.raises(ValueError, match=words):
        on(example, make(example.problem))
