"""MAID's certificates on random strongly convex problems, against solutions by dense Newton steps in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad.methods._base import Oracle, Point
from hypergrad.methods._bounds import estimated_bounds

SIZE, MU, SMOOTHNESS, CURVE = 5, 0.3, 2.0, 0.5  # the spectrum of A begins at MU; CᵀC and b have norms SMOOTHNESS, 1


def inner(w, h, batch, key):
    a, b, _, _ = batch
    return (
        0.5 * w @ (a @ w) - b @ w + 0.5 * jnp.sum(2 * jax.nn.sigmoid(h) * w**2) + CURVE * jnp.sum(jnp.log(jnp.cosh(w)))
    )


def outer(w, h, batch, key):
    _, _, c, d = batch
    return 0.5 * jnp.sum((c @ w - d) ** 2)


PROBLEM = hg.BilevelProblem(inner, outer)
RECORDS = []


@pytest.fixture
def x64_in_callbacks():
    """Enable float64 in all threads: callbacks run in their own."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def exact_constants():
    """Return bounds that hold everywhere: |d sech²| < 0.77, |d 2 sigmoid| ≤ ½, and ‖w*‖ ≤ ‖b‖/μ."""
    mu = lambda h: MU + 2 * jax.nn.sigmoid(h).min()  # noqa: E731
    return {
        "strong_convexity": mu,
        "outer_smoothness": SMOOTHNESS,
        "mixed_norm": lambda h: 0.5 / mu(h),
        "hessian_lipschitz": 0.77 * CURVE,
        "mixed_lipschitz": 0.5,
    }


def recorded(method):
    """Return the method, writing down where it stands after each step."""

    def step(oracle, point, state):
        made = method.step(oracle, point, state)
        at = made.point
        jax.debug.callback(
            lambda *found: RECORDS.append([np.asarray(f) for f in found]),
            *(at.hyperparams, at.params, at.hypergrad, at.value, at.inner_residual),
            *(made.error_bound, made.accepted, made.step_size),
            ordered=True,
        )
        return made

    return hg.methods.Method(method.init, step)


def random_batch(seed):
    """Return A, b, C, d with the norms that the constants are for."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0]
    a = basis @ np.diag(np.concatenate([[MU], rng.uniform(MU, 3.0, SIZE - 1)])) @ basis.T
    b, c = rng.normal(size=SIZE), rng.normal(size=(SIZE, SIZE))
    c *= np.sqrt(SMOOTHNESS) / np.linalg.norm(c, 2)
    return a, b / np.linalg.norm(b), c, c @ rng.normal(size=SIZE) * 0.3


def solution(h, batch):
    """Return w* and dL_out/dλ there, by NumPy."""
    a, b, c, d = batch
    w, share = np.zeros(SIZE), 1 / (1 + np.exp(-h))
    for _ in range(50):
        slope = a @ w - b + 2 * share * w + CURVE * np.tanh(w)
        hessian = a + np.diag(2 * share + CURVE / np.cosh(w) ** 2)
        w = w - np.linalg.solve(hessian, slope)
    assert np.linalg.norm(slope) < 1e-12
    return w, -2 * share * (1 - share) * w * np.linalg.solve(hessian, c.T @ (c @ w - d))


def value(w, batch):
    _, _, c, d = batch
    return 0.5 * np.sum((c @ w - d) ** 2)


def violations(batch, records):
    """Count the claims of a run that do not hold, and the claims."""
    broken = claims = 0
    before = None
    for h, w, z, at, residual, bound, accepted, step_size in records:
        if not accepted:
            continue
        w_star, exact = solution(h, batch)
        rounding = 1e-12
        held = [
            np.linalg.norm(w - w_star) <= residual / (MU + (2 / (1 + np.exp(-h))).min()) + rounding,
            np.linalg.norm(z - exact) <= bound + rounding,
            abs(at - value(w, batch)) <= 1e-12,
        ]
        if step_size > 0:
            held.append(value(w_star, batch) < before)  # the true outer loss fell
        before = value(w_star, batch)
        broken, claims = broken + sum(not bool(h) for h in held), claims + len(held)
    return broken, claims


def run(seed, method, **options):
    start = hg.BilevelParams(jnp.zeros(SIZE), jnp.asarray(np.random.default_rng(seed).uniform(-2, 1, SIZE)))
    batch = random_batch(seed)
    RECORDS.clear()
    found = hg.minimize(PROBLEM, start, batch, batch, method=method, **options)
    jax.effects_barrier()
    return batch, found


@pytest.mark.usefixtures("x64_in_callbacks")
@pytest.mark.parametrize("count", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_no_certificate_is_violated(count):
    method = recorded(hg.methods.maid(**exact_constants()))
    broken = claims = converged = moved = 0
    for seed in range(count):
        batch, found = run(seed, method, max_steps=150, tol=1e-3)
        one, some = violations(batch, RECORDS)
        broken, claims, converged = broken + one, claims + some, converged + int(found.converged)
        moved += sum(bool(r[6]) and r[7] > 0 for r in RECORDS)
        if found.converged:
            _, exact = solution(np.asarray(found.hyperparams), batch)
            assert np.linalg.norm(exact) <= 2e-3
    assert broken == 0
    assert claims > 25 * count
    assert moved > 5 * count
    assert converged > 0.9 * count


@pytest.mark.slow
@pytest.mark.usefixtures("x64_in_callbacks")
def test_an_unsolved_linear_system_counts_in_the_bound():
    method, errors = recorded(hg.methods.maid(**exact_constants(), tolerance=1e-6)), []
    for seed in range(5):
        batch, _ = run(seed, method, max_steps=10, tol=1e-3, linear_solver=hg.solvers.cg(1))
        assert violations(batch, RECORDS)[0] == 0
        errors += [np.linalg.norm(r[2] - solution(r[0], batch)[1]) / np.linalg.norm(r[2]) for r in RECORDS]
    assert max(errors) > 0.05  # far from exact, though the inner problem is solved


@pytest.mark.slow
@pytest.mark.usefixtures("x64_in_callbacks")
def test_wrong_constants_break_certificates():
    """The counts above can fail: with a tenth of each constant many claims do not hold."""
    wrong = {
        name: 0.01 * c if isinstance(c, float) else (lambda h, c=c: 0.01 * c(h))
        for name, c in exact_constants().items()
    }
    wrong["strong_convexity"] = 5.0
    method = recorded(hg.methods.maid(**wrong))
    broken = 0
    for seed in range(5):
        batch, _ = run(seed, method, max_steps=60, tol=1e-3)
        broken += violations(batch, RECORDS)[0]
    assert broken > 10


@pytest.mark.slow
@pytest.mark.usefixtures("x64_in_callbacks")
@pytest.mark.parametrize("constants", ["given", pytest.param("estimated", marks=pytest.mark.slow)])
def test_the_result_does_not_depend_on_the_tolerance_to_begin_with(constants):
    values, spent = [], []
    for tolerance in (10.0, 0.1, 1e-3, 1e-5):
        given = exact_constants() if constants == "given" else {"uncertified": True}
        method = recorded(hg.methods.maid(tolerance=tolerance, **given))
        _, found = run(3, method, max_steps=200, tol=1e-3)
        assert found.converged, found.message
        assert float(found.history.error_bound[-1]) <= 1e-3
        values.append(float(found.value))
        spent.append(int(found.history.num_gradients.sum() + found.history.num_products.sum()))
    assert max(values) < 1.01 * min(values)
    assert max(spent) < 3 * min(spent)


@pytest.mark.slow
@pytest.mark.usefixtures("x64_in_callbacks")
def test_estimated_constants_are_near_the_dense_ones():
    a, b, c, d = random_batch(0)
    w, h = jnp.asarray(np.random.default_rng(1).normal(size=SIZE)), jnp.linspace(-1.0, 1.0, SIZE)
    batch = tuple(map(jnp.asarray, (a, b, c, d)))
    found, products = estimated_bounds(
        lambda w, h: inner(w, h, batch, None), lambda w, h: outer(w, h, batch, None), w, h
    )
    hessian = jax.hessian(lambda w: inner(w, h, batch, None))(w)
    mixed = jax.jacobian(lambda h: jax.grad(inner)(w, h, batch, None))(h)
    assert float(found.strong_convexity) == pytest.approx(np.linalg.eigvalsh(hessian)[0] / 2, rel=1e-6)
    assert float(found.outer_smoothness) == pytest.approx(2 * SMOOTHNESS, rel=1e-6)
    assert float(found.mixed_norm) == pytest.approx(2 * np.linalg.norm(mixed, 2), rel=1e-6)
    slope = np.asarray(jax.grad(outer)(w, h, batch, None))
    along = slope / np.linalg.norm(slope)
    size = 1e-5
    bend = lambda matrix: np.linalg.norm((matrix(w + size * along) - matrix(w - size * along)) / (2 * size))  # noqa: E731
    hessian_along = lambda w: np.asarray(jax.hessian(lambda w: inner(w, h, batch, None))(w)) @ along  # noqa: E731
    mixed_along = lambda w: np.asarray(jax.jacobian(lambda h: jax.grad(inner)(w, h, batch, None))(h)).T @ along  # noqa: E731
    assert float(found.hessian_lipschitz) == pytest.approx(2 * bend(hessian_along), rel=1e-6)
    assert float(found.mixed_lipschitz) == pytest.approx(2 * bend(mixed_along), rel=1e-6)
    assert 10 < int(products) < 40


def test_uncertified_must_be_asked_for():
    with pytest.raises(ValueError, match=r"strong_convexity.*uncertified=True"):
        hg.methods.maid()
    with pytest.raises(ValueError, match="mixed_lipschitz"):
        hg.methods.maid(**{**exact_constants(), "mixed_lipschitz": None})
    with pytest.raises(ValueError, match="strong_convexity"):
        hg.methods.maid(0.0, uncertified=True)
    with pytest.raises(ValueError, match="tolerance"):
        hg.methods.maid(1.0, uncertified=True, tolerance=0.0)
    with pytest.raises(TypeError, match="uncertified"):
        hg.methods.maid(1.0, uncertified="yes")


def test_without_strong_convexity_it_stops_and_says_why():
    flat = hg.BilevelProblem(
        lambda w, h, b, k: jnp.sum(h**2) * w[0] ** 2 - w[0] * h[0], lambda w, h, b, k: jnp.sum(w**2)
    )
    at = hg.BilevelParams(jnp.ones(2), jnp.ones(2))
    found = hg.minimize(flat, at, (), (), method=hg.methods.maid(uncertified=True), max_steps=100)
    assert not found.converged
    assert "error of the hypergradient" in found.message


def test_a_step_that_lands_on_nan_is_shortened(x64):
    problem = hg.BilevelProblem(
        lambda w, h, b, k: 0.5 * jnp.sum((w - jnp.log(h)) ** 2), lambda w, h, b, k: 0.5 * jnp.sum((w + 2.0) ** 2)
    )
    method = hg.methods.maid(
        1.0,
        outer_smoothness=1.0,
        mixed_norm=lambda h: 1 / jnp.abs(h).min(),
        hessian_lipschitz=0.0,
        mixed_lipschitz=0.0,
    )
    found = hg.minimize(problem, hg.BilevelParams(jnp.zeros(1), jnp.array([0.6])), (), (), method=method, max_steps=200)
    assert found.converged, found.message
    assert float(found.hyperparams[0]) == pytest.approx(np.exp(-2.0), rel=1e-3)


def test_constants_must_be_scalars():
    method = hg.methods.maid(**{**exact_constants(), "strong_convexity": jnp.exp})
    batch = random_batch(0)
    with pytest.raises(ValueError, match="strong_convexity to be a scalar"):
        hg.minimize(PROBLEM, hg.BilevelParams(jnp.zeros(SIZE), jnp.zeros(SIZE)), batch, batch, method=method)


@pytest.mark.parametrize(("decrease", "accepted"), [(0.15, False), (0.25, True)])
def test_a_decrease_counts_only_beyond_the_error_of_both_losses(decrease, accepted):
    """Residuals of 0.1 at μ = 1 and an outer slope of 1: each loss is known to 0.1."""
    zero, count = jnp.zeros(()), jnp.zeros((), jnp.int32)
    done = jnp.asarray(hg.inner_solvers.InnerStatus.CONVERGED, jnp.int32)
    here = Point(
        jnp.zeros(1), zero, (), (), jnp.ones(()), jnp.full(1, 0.01), zero + 0.1, done, done, zero, count, count
    )
    oracle = Oracle(
        solve=lambda hyperparams, point, _: point._replace(hyperparams=hyperparams, value=point.value - decrease),
        differentiate=lambda point, _: point,
        outer_slope=lambda _: jnp.ones(()),
        estimate_bounds=lambda _: None,
    )
    method = hg.methods.maid(1.0, outer_smoothness=0.0, mixed_norm=0.0, hessian_lipschitz=0.0, mixed_lipschitz=0.0)
    state = method.init(here)._replace(step_size=zero + 1.0, searching=jnp.array(True), num_steps=count + 1)
    assert bool(method.step(oracle, here, state).accepted) == accepted
