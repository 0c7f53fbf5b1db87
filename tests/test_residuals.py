"""Inner problems that are not unconstrained minima: hypergradients beside closed forms and finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import hypergrad as hg
from tests.problems import relative_error

RNG = np.random.default_rng(3)
X, XV = RNG.normal(size=(30, 6)), RNG.normal(size=(20, 6))
TRUTH = np.array([2.0, -1.5, 0.0, 0.7, 0.0, 0.05])
Y, YV = X @ TRUTH + 0.1 * RNG.normal(size=30), XV @ TRUTH + 0.1 * RNG.normal(size=20)
STEP = 0.5 / np.linalg.eigvalsh(X.T @ X / 30).max()


def square(w, x, y):
    return 0.5 * jnp.mean((x @ w - y) ** 2)


def least_squares(w, h, batch, key):
    return square(w, *batch)


def ridge(w, h, batch, key):
    return square(w, *batch) + 0.5 * jnp.exp(h["decay"]) * jnp.sum(w**2)


def scaled_targets(w, h, batch, key):
    return square(w, batch[0], h["scale"] * batch[1])


def outer(w, h, batch, key):
    return square(w, *batch)


def soft(w, h, step):
    return jnp.sign(w) * jnp.maximum(jnp.abs(w) - step * jnp.exp(h["strength"]), 0.0)


def groups(w, h, step):
    """Shrink the norms of three pairs."""
    pairs = w.reshape(3, 2)
    norms = jnp.linalg.norm(pairs, axis=1, keepdims=True)
    factor = jnp.maximum(1.0 - step * jnp.exp(h["strength"]) / jnp.where(norms > 0, norms, 1.0), 0.0)
    return (factor * pairs).reshape(6)


def box(w, h):
    return jnp.clip(w, -h["bound"], h["bound"])


CASES = {
    "lasso": (least_squares, {"strength": jnp.log(0.3)}, "prox", soft),
    "group lasso": (least_squares, {"strength": jnp.log(0.4)}, "prox", groups),
    "box-constrained ridge": (ridge, {"decay": -2.0, "bound": 1.0}, "projection", box),
    "non-negative least squares": (
        scaled_targets,
        {"scale": 0.9},
        "projection",
        lambda w, h: optax.projections.projection_non_negative(w),
    ),
    "simplex": (scaled_targets, {"scale": 0.3}, "projection", lambda w, h: optax.projections.projection_simplex(w)),
}


def made(name):
    """Return the problem with its residual, the hyperparameters, and λ ↦ w*(λ) by many steps."""
    inner, hyperparams, kind, map_ = CASES[name]
    hyperparams = jax.tree.map(lambda v: jnp.asarray(v, float), hyperparams)
    problem = hg.BilevelProblem(inner, outer)
    make = hg.residuals.proximal_gradient if kind == "prox" else hg.residuals.projected_gradient
    residual = make(problem, map_, STEP)

    @jax.jit
    def solve(h):
        step = lambda _, w: w - residual(w, h, (X, Y), None)  # noqa: E731
        return lax.fori_loop(0, 20_000, step, jnp.full(6, 0.1))

    return hg.with_residual(problem, residual), hyperparams, solve


def differences(value, h, size=1e-5):
    """Return the central difference quotients of ``value`` in each hyperparameter, all of them scalars."""
    up = lambda name, s: {**h, name: h[name] + s * size}  # noqa: E731
    return {name: (value(up(name, 1)) - value(up(name, -1))) / (2 * size) for name in h}


@pytest.mark.parametrize("name", CASES)
def test_hypergradients_equal_finite_differences(name, x64):
    problem, h, solve = made(name)
    w = solve(h)
    assert int((jnp.abs(w) < 1e-9).sum()) > 0 or name == "box-constrained ridge"  # some weights are at their kink
    fn = hg.value_and_hypergrad(hg.implicit(problem))
    (_, grad), info = fn(w, h, (X, Y), (XV, YV), key=None)
    want = differences(lambda h: outer(solve(h), h, (XV, YV), None), h)
    assert relative_error(grad, want) < 1e-6
    assert bool(info.solver.converged)


def test_the_lasso_s_closed_form(x64):
    """On the active set A: dw_A/dλ = −(X_AᵀX_A/n)⁻¹ sign(w_A), and 0 elsewhere; taking |w| for smooth is wrong."""
    problem, h, solve = made("lasso")
    w = np.asarray(solve(h))
    active = np.abs(w) > 1e-9
    gram = X[:, active].T @ X[:, active] / 30
    slope = -np.linalg.solve(gram, np.sign(w[active])) * float(jnp.exp(h["strength"]))
    want = (XV.T @ (XV @ w - YV) / 20)[active] @ slope
    found = hg.hypergrad(hg.implicit(problem))(jnp.asarray(w), h, (X, Y), (XV, YV), key=None)["strength"]
    assert float(found) == pytest.approx(want, rel=1e-8)
    kinked = lambda w, h, b, k: square(w, *b) + jnp.exp(h["strength"]) * jnp.abs(w).sum()  # noqa: E731
    naive = hg.hypergrad(hg.implicit(hg.BilevelProblem(kinked, outer), hg.solvers.dense()))
    wrong = float(naive(jnp.asarray(w), h, (X, Y), (XV, YV), key=None)["strength"])
    assert abs(wrong - want) > 1e-3 * abs(want)


def equilibrium(size=8):
    rng = np.random.default_rng(0)
    h = {
        "weight": jnp.asarray(0.6 * rng.normal(size=(size, size)) / np.sqrt(size)),
        "input": jnp.asarray(rng.normal(size=(size, 3))),
    }
    batch = jnp.asarray(rng.normal(size=3))
    step = lambda z, h, batch, key: jnp.tanh(h["weight"] @ z + h["input"] @ batch)  # noqa: E731
    solve = jax.jit(lambda h: lax.fori_loop(0, 500, lambda _, z: step(z, h, batch, None), jnp.zeros(size)))
    loss = lambda z, h, batch, key: jnp.sum(jnp.sin(z))  # noqa: E731
    problem = hg.BilevelProblem(loss, loss)
    return hg.with_residual(problem, hg.residuals.fixed_point(step)), h, batch, solve, step


def test_a_deep_equilibrium_model(x64):
    problem, h, batch, solve, _ = equilibrium()
    grad = hg.hypergrad(hg.implicit(problem))(solve(h), h, batch, (), key=None)
    rng = np.random.default_rng(1)
    along = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), h)
    at = lambda t: float(jnp.sum(jnp.sin(solve(optax.tree.add_scale(h, t, along)))))  # noqa: E731
    want = (at(1e-5) - at(-1e-5)) / 2e-5
    assert float(optax.tree.vdot(grad, along)) == pytest.approx(want, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [None, hg.solvers.dense(), hg.solvers.gmres(20, 20)], ids=["none", "dense", "gmres"])
def test_best_response_of_a_fixed_point_is_differentiable(solver, x64):
    """In reverse and forward mode, and twice: the transposed system is solved, too."""
    problem, h, batch, solve, step = equilibrium(4)
    fn = hg.best_response(hg.implicit(problem, solver))
    z = solve(h)
    value = lambda h: jnp.sum(fn(z, h, batch, key=None) ** 2)  # noqa: E731
    unrolled = lambda h: jnp.sum(lax.scan(lambda z, _: (step(z, h, batch, None), None), z, None, length=200)[0] ** 2)  # noqa: E731
    assert relative_error(jax.grad(value)(h), jax.grad(unrolled)(h)) < 1e-5
    along = jax.tree.map(jnp.ones_like, h)
    forward = jax.jvp(value, (h,), (along,))[1]
    assert float(forward) == pytest.approx(float(jax.jvp(unrolled, (h,), (along,))[1]), rel=1e-5)


def test_a_later_reparameterization_wraps_the_residual(x64):
    inner = lambda w, h, b, k: 0.5 * jnp.sum((w - h) ** 2)  # noqa: E731
    problem = hg.BilevelProblem(inner, lambda w, h, b, k: jnp.sum(w**2))
    residual = hg.residuals.projected_gradient(problem, lambda w, h: jnp.maximum(w, 0.0), 0.5)
    fn = hg.hypergrad(hg.implicit(hg.reparameterize(hg.with_residual(problem, residual), hg.bijectors.exp())))
    log = jnp.log(jnp.array([2.0, 3.0]))
    np.testing.assert_allclose(fn(jnp.exp(log), log, (), (), key=None), 2 * jnp.exp(2 * log), rtol=1e-9)


def test_frozen_weights_and_model_state(x64):
    """The residual's leaves of frozen weights are no equations; a stateful residual receives the state."""
    residual = lambda w, h, b, k, state: {"a": w["a"] - state * h * w["b"], "b": w["b"] - 1.0}  # noqa: E731
    loss = lambda w, h, b, k, state: (jnp.sum(w["a"] ** 2 + w["b"]), state)  # noqa: E731
    problem = hg.with_residual(hg.BilevelProblem(loss, loss, stateful=True), residual)
    estimator = hg.implicit(problem, trainable={"a": True, "b": False})
    at = {"a": jnp.array(12.0), "b": jnp.array(2.0)}
    grad = hg.hypergrad(estimator)(at, jnp.array(2.0), (), (), key=None, model_state=jnp.array(3.0))
    assert float(grad) == pytest.approx(2 * 12.0 * 3.0 * 2.0, rel=1e-6)


@pytest.mark.slow
def test_bilevel_tunes_the_lasso():
    """Proximal steps inside, one cycle of GMRES outside: the strength moves to that of a grid."""
    with jax.enable_x64(True):
        problem, h, solve = made("lasso")
        shrink = lambda h: optax.GradientTransformation(  # noqa: E731
            lambda w: (), lambda g, s, w=None: (soft(w - STEP * g, h, STEP) - w, s)
        )
        tx = hg.bilevel(
            hg.implicit(problem, hg.solvers.gmres(8, 7)),
            inner_optimizer=shrink,
            outer_optimizer=optax.adam(0.2),
            every=5,
        )
        variables = hg.BilevelParams(solve(h), h)

        @jax.jit
        def run(variables, state):
            def step(_, at):
                updates, state = tx.update(None, at[1], at[0], inner_batch=(X, Y), outer_batch=(XV, YV))
                return optax.apply_updates(at[0], updates), state

            return lax.fori_loop(0, 1500, step, (variables, state))

        end, state = run(variables, tx.init(variables))
        grid = jnp.linspace(-6.0, 0.0, 61)
        losses = [float(outer(solve({"strength": s}), {}, (XV, YV), None)) for s in grid]
        reached = float(outer(end.params, {}, (XV, YV), None))
        assert reached < min(losses) * 1.01
        assert int(state.info.num_skipped) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: hg.with_residual(p, 3), "residual to be callable"),
        (lambda p: hg.with_residual(p, lambda w: w), "residual to take"),
        (lambda p: hg.residuals.fixed_point(None), "step to be callable"),
        (lambda p: hg.residuals.projected_gradient(p, None, 0.1), "projection to be callable"),
        (lambda p: hg.residuals.proximal_gradient(p, soft, 0.0), "step_size"),
        (lambda p: hg.residuals.proximal_gradient(None, soft, 0.1), "a BilevelProblem"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make(hg.BilevelProblem(least_squares, outer))


def test_what_takes_the_solution_for_a_minimum_refuses_a_residual():
    problem, *_ = made("lasso")
    with pytest.raises(ValueError, match="without a residual for with_response"):
        hg.responses.with_response(problem, hg.responses.linear())


def test_a_residual_of_another_structure_is_refused():
    problem = hg.with_residual(hg.BilevelProblem(least_squares, outer), lambda w, h, b, k: {"w": w})
    with pytest.raises((TypeError, ValueError), match="the residual"):
        hg.hypergrad(hg.implicit(problem))(jnp.ones(6), {"strength": jnp.zeros(())}, (X, Y), (XV, YV), key=None)


@functools.cache
def symmetric_only():
    return hg.solvers.cg(5), hg.solvers.recycled_cg(5, 2)


@pytest.mark.parametrize("place", [0, 1])
def test_conjugate_gradients_refuse_a_residual(place):
    problem, h, _ = made("lasso")
    with pytest.raises(ValueError, match=r"symmetric system.*gmres"):
        hg.hypergrad(hg.implicit(problem, symmetric_only()[place]))(jnp.ones(6), h, (X, Y), (XV, YV), key=None)
