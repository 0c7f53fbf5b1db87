"""The check of ``implicit`` with too many weights to solve again: its formula at the weights given, part by part."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.diagnostics import _float64, _linearized
from hypergrad.diagnostics._differences import Budget
from hypergrad.diagnostics._kinks import weights_at_kinks
from hypergrad.training import Context, Trained, split_keys

check = hg.diagnostics.check_hypergrad
CG = hg.solvers.cg(300, 1e-8)
KEY = jax.random.key(5)
CLASSES = 4


def unchanged(value, *_):
    return value


def problem_of(inner_change=unchanged, outer_change=unchanged):
    """Softmax regression with 2,400 weights, dropout on its inputs, and a log decay per class."""
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels

    def inner(w, h, batch, key):
        kept = batch[0] * jax.random.bernoulli(key, 0.8, batch[0].shape)
        loss = cross_entropy(kept @ w["w"], batch[1]).mean() + hg.penalties.l2(w["w"], jnp.exp(h["decay"]))
        return inner_change(loss, w, h, batch)

    def outer(w, h, batch, key):
        return cross_entropy(batch[0] @ outer_change(w["w"]), batch[1]).mean() + 0.1 * h["shift"] ** 2

    return hg.BilevelProblem(inner, outer)


def data_and_weights():
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(2, 24, 600)), jnp.float32), jnp.asarray(rng.integers(0, CLASSES, (2, 24)))
    weights = {"w": jnp.asarray(0.1 * rng.normal(size=(600, CLASSES)), jnp.float32)}
    hyper = {"decay": jnp.linspace(-1.0, 0.0, CLASSES), "shift": jnp.array(0.5)}
    return hg.BilevelParams(weights, hyper), (x[0], y[0]), (x[1], y[1])


def checked(estimator, **options):
    return check(estimator, *data_and_weights(), key=KEY, **options)


def wrong(estimator, change):
    def estimate(state, ctx):
        return change(estimator, state, ctx)

    return estimator._replace(estimate=estimate, reference=None)


def test_passes_away_from_a_solution_and_says_where():
    found = checked(hg.implicit(problem_of(), CG))
    assert found.passed, str(found)
    assert max(row.error for row in found.rows) < 1e-6
    assert {row.leaf for row in found.rows} == {"['decay']", "['shift']"}
    assert found.dtype == "float64"
    assert found.residual < 1e-6
    assert found.inner_gradient_norm > 0.01
    assert "2,400 weights" in found.note
    assert "(0 at a solution)" in found.note
    assert "converged" in found.note


@pytest.mark.parametrize("solver", [pytest.param(None, marks=pytest.mark.slow), hg.solvers.cg(5, damping=1.0)])
def test_few_damped_products_pass_with_the_residual_that_they_leave(solver):
    found = checked(hg.implicit(problem_of(), solver))
    assert found.passed, str(found)
    assert 1e-6 < found.residual < 1
    assert "used all its products" in found.note


def negated(estimator, state, ctx):
    found = estimator.estimate(state, ctx)
    return found._replace(hypergrad=jax.tree.map(jnp.negative, found.hypergrad))


def scaled(estimator, state, ctx):
    found = estimator.estimate(state, ctx)
    return found._replace(hypergrad=jax.tree.map(lambda g: 1.05 * g, found.hypergrad))


def of_another_batch(estimator, state, ctx):
    return estimator.estimate(state, ctx._replace(inner_batches=jax.tree.map(lambda x: x[:, ::-1], ctx.inner_batches)))


def with_another_mask(estimator, state, ctx):
    return estimator.estimate(state, ctx._replace(keys=ctx.keys._replace(solve=jax.random.fold_in(ctx.keys.solve, 1))))


def without_one_leaf(estimator, state, ctx):
    found = estimator.estimate(state, ctx)
    first, *others = jax.tree.leaves(found.hypergrad)
    return found._replace(hypergrad=jax.tree.unflatten(jax.tree.structure(found.hypergrad), [0.0 * first, *others]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (negated, "solves another system"),
        pytest.param(scaled, "solves another system", marks=pytest.mark.slow),
        pytest.param(with_another_mask, "solves another system", marks=pytest.mark.slow),
        pytest.param(without_one_leaf, "with its own q", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_estimator_fails(change, reason):
    found = checked(wrong(hg.implicit(problem_of(), CG), change))
    assert found.verdict == "FAILED"
    assert reason in found.reasons[0]


@pytest.mark.slow
def test_another_order_of_a_batch_with_a_mask_is_another_batch():
    found = checked(wrong(hg.implicit(problem_of(), CG), of_another_batch))
    assert found.verdict == "FAILED"
    assert "another batch" in found.reasons[0]


@jax.custom_vjp
def doubled_backward(x):
    return x


doubled_backward.defvjp(lambda x: (x, ()), lambda _, ct: (2.0 * ct,))


def lasso(loss, w, h, batch):
    return loss + (jnp.exp(h["decay"]) * jnp.abs(w["w"])).sum()


@pytest.mark.slow
def test_a_stopped_gradient_is_refused_or_fails():
    more = lambda loss, w, h, batch: loss + (jnp.exp(jax.lax.stop_gradient(h["decay"])) * w["w"] ** 2).sum()  # noqa: E731
    problem = problem_of(more)
    found = checked(hg.implicit(problem, CG))
    assert found.verdict == "FAILED"
    assert "with its own q" in found.reasons[0]


@pytest.mark.slow
def test_what_the_estimator_refuses_is_refused_in_its_names():
    problem = problem_of()
    held = lambda w, h, batch, key: problem.inner_loss(w, jax.lax.stop_gradient(h), batch, key)  # noqa: E731
    with pytest.raises(ValueError, match=r"got hyperparams leaf \['decay'\]"):
        checked(hg.implicit(dataclasses.replace(problem, inner_loss=held), CG))


@pytest.mark.slow
def test_a_wrong_derivative_rule_is_named_with_its_loss():
    found = checked(hg.implicit(problem_of(outer_change=doubled_backward), CG))
    assert found.verdict == "FAILED"
    assert found.reasons[0].startswith("jax.grad of the outer loss in the weights is not its derivative")


@pytest.mark.slow
def test_weights_at_a_kink_are_found():
    at, inner_batch, outer_batch = data_and_weights()
    at = at._replace(params={"w": at.params["w"].at[:300].set(0.0)})
    found = check(hg.implicit(problem_of(lasso), CG), at, inner_batch, outer_batch, key=KEY)
    assert found.verdict == "at a kink of the inner loss"
    assert found.kinks["['w']"] >= 1200


def test_a_narrow_bend_is_no_kink():
    """Away from a solution, where a weight in the bend of a smoothed |w| has a gradient."""
    target = jnp.linspace(-0.3, 0.3, 40)
    bend = jax.jit(jax.grad(lambda w: hg.penalties.l1(w, 0.5) + 0.5 * ((w - target) ** 2).sum()))
    kink = jax.jit(jax.grad(lambda w: 0.5 * jnp.abs(w).sum() + 0.5 * ((w - target) ** 2).sum()))
    weights = jnp.linspace(-0.1, 0.1, 40).at[:5].set(2e-4)
    at_zero = target.at[:5].set(0.0)
    smooth = jax.jit(jax.grad(lambda w: 0.5 * ((w - at_zero) ** 2).sum()))
    with jax.enable_x64(True):
        assert weights_at_kinks(smooth, at_zero.astype(float), 2e-16) == {}
        assert weights_at_kinks(bend, weights.astype(float), 2e-16) == {}
        assert weights_at_kinks(kink, weights.astype(float), 2e-16)[""] >= 5


@pytest.mark.slow
def test_a_solve_that_stops_at_once_says_nothing_of_the_formula():
    saddle = lambda loss, w, h, batch: loss - 20 * (jnp.exp(h["decay"]) * w["w"] ** 2).sum()  # noqa: E731
    found = checked(hg.implicit(problem_of(saddle), CG))
    assert found.verdict == "FAILED"
    assert "broke down (INDEFINITE" in found.reasons[0]


@pytest.mark.slow
def test_a_solver_that_does_not_say_how_far_it_came_is_measured():
    tenth = hg.solvers.from_callable(lambda matvec, b, x0: jax.tree.map(lambda v: 0.1 * v, b))
    found = checked(hg.implicit(problem_of(), tenth))
    assert found.verdict == "FAILED"
    assert "the linear solve stopped at a residual of" in found.reasons[0]


@pytest.mark.slow
def test_a_residual_problem_is_compared_with_its_transpose():
    problem = problem_of()

    def residual(w, h, batch, key):
        slope = jax.grad(problem.inner_loss)(w, h, batch, key)
        return jax.tree.map(lambda g: g + 0.05 * jnp.roll(g, 1, axis=0), slope)

    found = checked(hg.implicit(hg.with_residual(problem, residual), hg.solvers.gmres(200, 100, 1e-8)))
    assert found.passed, str(found)
    assert found.residual < 1e-6


@pytest.mark.slow
def test_the_solution_of_an_estimate_solves_its_system():
    with jax.enable_x64(True):
        at, inner_batch, outer_batch = _float64.to_float64(data_and_weights())
        given = at, inner_batch, outer_batch, KEY, ()
        found = _linearized.with_solution(hg.implicit(problem_of(), CG), None, given, {"w": True})
        alone = hg.hypergrad(hg.implicit(problem_of(), CG))(
            at.params, at.hyperparams, inner_batch, outer_batch, key=KEY
        )
        for a, b in zip(jax.tree.leaves(found.estimate.hypergrad), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12)
        one = jax.tree.map(lambda x: x[None], inner_batch)
        start = Trained(at.params, None)
        ctx = Context(problem_of(), at.hyperparams, start, start, one, outer_batch, split_keys(KEY), None)
        parts = _linearized.parts(ctx, {"w": True})
        assert _linearized.measured_residual(parts, found.solution, 0.0) < 1e-6
        assert _linearized.measured_residual(parts, jax.tree.map(jnp.zeros_like, found.solution), 0.0) == 1.0
        assert (
            _linearized.measured_residual(parts, jax.tree.map(lambda q: q * math.inf, found.solution), 0.0) == math.inf
        )


@pytest.mark.slow
def test_a_leaf_that_the_outer_loss_does_not_differentiate_is_found():
    """``stop_gradient`` on all weights of a leaf: the gradient there is zero, and the loss changes."""
    problem = problem_of()

    def split(w):
        return {"w": jnp.concatenate([w["first"], w["rest"]])}

    def inner(w, h, batch, key):
        return problem.inner_loss(split(w), h, batch, key)

    def outer(w, h, batch, key):
        return problem.outer_loss(split({**w, "first": jax.lax.stop_gradient(w["first"])}), h, batch, key)

    at, inner_batch, outer_batch = data_and_weights()
    at = at._replace(params={"first": at.params["w"][:200], "rest": at.params["w"][200:]})
    found = check(hg.implicit(hg.BilevelProblem(inner, outer), CG), at, inner_batch, outer_batch, key=KEY)
    assert found.verdict == "FAILED"
    assert found.reasons[0].startswith("jax.grad of the outer loss in the weights is not its derivative")


@pytest.mark.slow
def test_labels_in_numpy_integers_are_taken_as_in_training():
    at, (x, y), (x2, y2) = data_and_weights()
    batches = (np.asarray(x), np.asarray(y, np.int64)), (np.asarray(x2), np.asarray(y2, np.int64))
    found = check(hg.implicit(problem_of(), CG), at, *batches, key=KEY)
    assert found.passed, str(found)
    assert found.dtype == "float64"


@jax.custom_vjp
def squared(x):
    return x**2


squared.defvjp(lambda x: (x**2, x), lambda x, ct: (2 * ct * jax.lax.stop_gradient(x),))


@pytest.mark.slow
def test_a_wrong_second_derivative_is_named():
    """A rule that is right once and wrong twice: the solve takes wrong products."""
    problem = problem_of(lambda loss, w, h, batch: loss + squared(batch[0] @ w["w"]).mean())
    found = checked(hg.implicit(problem, CG))
    assert found.verdict == "FAILED"
    assert found.reasons[0].startswith("jax.grad of ∇_w L_in along q in the weights is not its derivative")


@pytest.mark.slow
def test_an_estimator_that_reads_the_hyperparameters_is_checked_at_a_solution():
    def with_reading(estimator, state, ctx):
        assert ctx.hyperparams["decay"].shape == (CLASSES,)
        return estimator.estimate(state, ctx)

    found = checked(wrong(hg.implicit(problem_of(), CG), with_reading), max_seconds=20.0)
    assert "the formula of the implicit function theorem" not in found.note


@pytest.mark.slow
def test_a_search_for_kinks_that_did_not_end_is_told(monkeypatch):
    gradient, over = jax.grad(lambda w: jnp.sum(jnp.abs(w))), Budget(deadline=0.0)
    assert weights_at_kinks(gradient, jnp.zeros(3), 1e-7, over) is None
    assert weights_at_kinks(gradient, jnp.zeros(3), float(jnp.finfo(jnp.bfloat16).eps)) is None
    monkeypatch.setattr("hypergrad.diagnostics._kinks.weights_at_kinks", lambda *_: None)
    found = checked(hg.implicit(problem_of(), CG))
    assert found.passed
    assert "The search for weights at kinks of the inner loss did not end" in found.note


@pytest.mark.slow
def test_an_ill_conditioned_solve_in_float32_is_no_failure():
    """A linear solve inside keeps float32; its rounding is no other system."""

    def inner_change(loss, w, h, batch):
        jax.debug.callback(lambda x: None, h["shift"])
        return loss + 1e-4 * jnp.linalg.solve(jnp.eye(CLASSES), w["w"].T @ w["w"]).trace()

    found = checked(hg.implicit(problem_of(inner_change), hg.solvers.cg(300)))
    assert "solves another system" not in str(found)
