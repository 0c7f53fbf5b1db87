"""The laws of a linear solver, for every row of the catalogue, and what is particular to each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hypergrad as hg
from tests.catalogue import SOLVERS
from tests.problems import relative_error, tree_of, vector_of

rows = pytest.mark.parametrize("row", SOLVERS, ids=lambda r: r.name)
solving = pytest.mark.parametrize("row", [r for r in SOLVERS if r.rtol], ids=lambda r: r.name)


def system(condition=5.0, seed=0, signs=None):
    """Return a matvec on a tree of coupled leaves, a right-hand side, the matrix and the solution."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    values = np.geomspace(1.0, condition, 6) * (np.ones(6) if signs is None else signs)
    matrix = jnp.asarray(q @ np.diag(values) @ q.T, float)
    b = jnp.asarray(rng.normal(size=6), float)
    return (lambda v: tree_of(matrix @ vector_of(v))), tree_of(b), matrix, tree_of(jnp.linalg.solve(matrix, b))


@functools.partial(jax.jit, static_argnums=0)
def solve(solver, matrix, b, state):
    """Solve with a dense matrix; compiled once a solver."""
    return solver.solve(lambda v: tree_of(matrix @ vector_of(v)), b, state)


def run(solver, matrix, b):
    """Solve from a fresh state."""
    return solve(solver, matrix, b, solver.init(b))


def true_residual(matvec, b, x):
    """Return ‖b − A x‖/‖b‖, written out."""
    return float(optax.tree.norm(optax.tree.sub(b, matvec(x))) / optax.tree.norm(b))


@solving
def test_solves_a_system_whose_leaves_are_coupled(row, hard_mode):
    _, b, matrix, want = system()
    solver = row.make()
    x, state, info = run(solver, matrix, b)
    assert relative_error(x, want) < 10 * row.rtol
    assert bool(info.converged)
    assert jax.tree.structure(state) == jax.tree.structure(solver.init(b))


@rows
@pytest.mark.parametrize("signs", [None, np.array([1, 1, -1, 1, 1, 1])], ids=["definite", "indefinite"])
def test_residual_is_the_true_one(row, signs, x64):
    matvec, b, matrix, _ = system(condition=50.0, signs=signs)
    x, _, info = run(row.make(), matrix, b)
    assert bool(jnp.isfinite(vector_of(x)).all())
    # Diverging series lose digits in ‖b − A x‖ itself, by cancellation against a large x.
    assert float(info.residual) == pytest.approx(true_residual(matvec, b, x), rel=1e-6, abs=1e-13)


@rows
def test_zero_right_hand_side_gives_zero(row):
    _, b, matrix, _ = system()
    x, state, info = run(row.make(), matrix, optax.tree.zeros_like(b))
    assert optax.tree.norm(x) == 0.0
    assert info.residual == 0.0
    assert bool(info.converged)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state))


@rows
@pytest.mark.parametrize("factor", [1e-25, 1e25])
def test_scaling_the_right_hand_side_scales_the_solution(row, factor):
    _, b, matrix, _ = system()
    solver = row.make()
    x, _, info = run(solver, matrix, b)
    scaled, _, scaled_info = run(solver, matrix, optax.tree.scale(factor, b))
    assert relative_error(optax.tree.scale(1 / factor, scaled), x) < 2e-5  # float32, a few hundred terms
    assert float(scaled_info.residual) == pytest.approx(float(info.residual), rel=0.1, abs=2e-6)


@pytest.mark.parametrize("make", [lambda: hg.solvers.neumann(60), lambda: hg.solvers.cg(20), hg.solvers.dense])
def test_scaling_matrix_and_right_hand_side_together_changes_nothing(make):
    _, b, matrix, _ = system()
    solver = make()
    x, _, _ = run(solver, matrix, b)
    for factor in (1e-9, 1e9):
        scaled, _, info = run(solver, factor * matrix, optax.tree.scale(factor, b))
        assert relative_error(scaled, x) < 1e-4
        assert bool(info.converged)


@pytest.mark.parametrize(
    "make",
    [lambda: hg.solvers.cg(20), lambda: hg.solvers.neumann(200), hg.solvers.dense],
    ids=["cg", "neumann_auto", "dense"],
)
@pytest.mark.parametrize("factor", [1e-25, 1e-20, 1e20, 1e25])
def test_a_matrix_of_any_scale(make, factor):
    """Products whose squares under- or overflow in float32 are no obstacle."""
    solver, b = make(), jnp.array([1.0, 2.0, -1.0])
    values = jnp.array([1.0, 2.0, 4.0])
    x, _, info = solver.solve(lambda v: factor * (values * v), b, solver.init(b))
    np.testing.assert_allclose(factor * x, b / values, rtol=1e-4)
    assert bool(info.converged)


@pytest.mark.parametrize(
    "make",
    [lambda: hg.solvers.cg(20), lambda: hg.solvers.neumann(20), hg.solvers.dense],
    ids=["cg", "neumann_auto", "dense"],
)
def test_a_solution_that_overflows_is_reported(make):
    solver, b = make(), jnp.array([1e30, 2e30])
    x, _, info = solver.solve(lambda v: 1e-15 * v, b, solver.init(b))
    assert bool(jnp.isfinite(x).all())
    assert not bool(info.converged)
    assert float(info.residual) == jnp.inf


@rows
def test_scalar_unknown(row):
    solver = row.make()
    b = jnp.array(3.0)
    x, _, info = solver.solve(lambda v: 2.0 * v, b, solver.init(b))
    assert x.shape == ()
    if row.rtol:
        assert float(x) == pytest.approx(1.5, rel=10 * row.rtol)
        assert bool(info.converged)


@rows
def test_vmap_equals_a_loop(row):
    matvecs = [system(seed=s) for s in range(3)]
    matrices = jnp.stack([m for _, _, m, _ in matvecs])
    bs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[b for _, b, _, _ in matvecs])
    solver = row.make()

    batched_x, _, batched_info = jax.vmap(functools.partial(run, solver))(matrices, bs)
    for i in range(3):
        x, _, info = run(solver, matrices[i], jax.tree.map(lambda leaf, i=i: leaf[i], bs))
        assert relative_error(jax.tree.map(lambda leaf, i=i: leaf[i], batched_x), x) < 2e-5
        assert int(batched_info.num_steps[i]) == int(info.num_steps)


@rows
def test_low_precision_right_hand_side_is_solved_in_float32(row):
    solver = row.make()
    b = {"p": jnp.array([1.0, 2.0], jnp.bfloat16), "q": jnp.array([0.5], jnp.bfloat16)}
    x, state, info = solver.solve(lambda v: optax.tree.scale(2.0, v), b, solver.init(b))
    assert {leaf.dtype for leaf in jax.tree.leaves((x, state))} == {jnp.dtype(jnp.float32)}
    assert info.residual.dtype == jnp.float32
    if row.rtol:
        np.testing.assert_allclose(x["p"], [0.5, 1.0], rtol=10 * row.rtol)


@rows
def test_never_nan_where_the_matrix_is(row):
    _, b, matrix, _ = system()
    x, state, info = run(row.make(), matrix * jnp.nan, b)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((x, state)))
    assert not bool(info.converged)
    assert not bool(jnp.isnan(info.residual))


@rows
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_right_hand_side_that_is_not_finite_is_reported(row, bad):
    _, b, matrix, _ = system()
    b = {**b, "a": b["a"].at[0].set(bad)}
    x, state, info = run(row.make(), matrix, b)
    assert optax.tree.norm(x) == 0.0
    assert info.residual == jnp.inf
    assert not bool(info.converged)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state))


@rows
def test_matvec_of_another_structure_is_refused(row):
    solver = row.make()
    b = {"p": jnp.ones(2)}
    with pytest.raises((ValueError, TypeError), match=r"structure|shape|pytree"):
        solver.solve(lambda v: v["p"], b, solver.init(b))


@pytest.mark.parametrize(
    "make",
    [
        lambda d: hg.solvers.neumann(300, damping=d),
        lambda d: hg.solvers.cg(30, damping=d),
        lambda d: hg.solvers.dense(damping=d),
    ],
)
def test_damping_adds_to_the_diagonal(make, x64):
    matvec, b, matrix, _ = system(signs=np.array([1, 1, -1, 1, 1, 1]))
    solver = make(3.0)
    x, _, info = solver.solve(matvec, b, solver.init(b))
    want = tree_of(jnp.linalg.solve(matrix + 3.0 * jnp.eye(6), vector_of(b)))
    assert relative_error(x, want) < 1e-4
    assert bool(info.converged)


# Neumann


@pytest.mark.parametrize("num_terms", [1, 2, 7, 30])
@pytest.mark.parametrize("unroll", [1, True])
def test_neumann_is_its_truncated_sum(num_terms, unroll, x64):
    matvec, b, matrix, _ = system(condition=20.0)
    alpha = 0.03
    power, total = vector_of(b), jnp.zeros(6)
    for _ in range(num_terms):
        total, power = total + alpha * power, power - alpha * matrix @ power
    solver = hg.solvers.neumann(num_terms, alpha, unroll=unroll)
    x, _, info = solver.solve(matvec, b, solver.init(b))
    assert relative_error(x, tree_of(total)) < 1e-12
    assert float(info.residual) == pytest.approx(float(jnp.linalg.norm(power) / jnp.linalg.norm(vector_of(b))))
    assert int(info.num_steps) == num_terms


def test_identity_is_the_first_neumann_term_with_step_one():
    matvec, b, _, _ = system()
    identity, _, _ = hg.solvers.identity().solve(matvec, b, ())
    first, _, _ = hg.solvers.neumann(1, 1.0).solve(matvec, b, ())
    assert jax.tree.all(jax.tree.map(lambda p, q, r: bool((p == q).all() & (p == r).all()), identity, first, b))


def test_neumann_that_diverges_stops_finite_and_says_so():
    matvec, b, _, _ = system(condition=10.0)
    x, _, info = hg.solvers.neumann(500, 1.0).solve(matvec, b, ())  # α λmax = 10
    assert not bool(info.converged)
    assert bool(jnp.isfinite(vector_of(x)).all())
    assert float(info.residual) > 1.0
    assert int(info.num_steps) < 20


def test_neumann_follows_a_growing_matrix():
    """The step that it finds for itself stays below 2/λmax while one eigenvalue grows from 1 to 10,000."""
    values = jnp.array([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    solver = hg.solvers.neumann(30)
    rng = np.random.default_rng(0)
    state = solver.init(values)
    solve = jax.jit(lambda values, b, state: solver.solve(lambda v: values * v, b, state))
    for i in range(100):
        b = jnp.asarray(rng.normal(size=6), jnp.float32)
        _, state, info = solve(values.at[4].multiply(1.1**i), b, state)
        assert bool(info.converged), (i, info)


def test_neumann_recovers_from_an_eigenvalue_that_jumps():
    """One bad solve is allowed: its residual is the missing eigenvector, and mends the next."""
    solver = hg.solvers.neumann(30)
    b = jnp.array([1.0, 1.0, 1e-6])
    _, state, _ = solver.solve(lambda v: jnp.array([1.0, 0.5, 0.2]) * v, b, solver.init(b))
    _, state, first = solver.solve(lambda v: jnp.array([1.0, 0.5, 50.0]) * v, b, state)
    _, _, second = solver.solve(lambda v: jnp.array([1.0, 0.5, 50.0]) * v, b, state)
    assert not bool(first.converged)
    assert bool(second.converged)


def test_neumann_keeps_its_step_where_negative_curvature_makes_terms_grow():
    """The residual then is no top eigenvector: taking it for one would lengthen the next step."""
    solver = hg.solvers.neumann(10)
    b, state = jnp.ones(3), solver.init(jnp.ones(3))
    residuals = []
    for _ in range(4):
        _, state, info = solver.solve(lambda v: jnp.array([1.0, 0.5, -0.3]) * v, b, state)
        residuals.append(float(info.residual))
    assert 1.0 < max(residuals) < 1.01 * min(residuals)


# Conjugate gradients


def counted(matvec):
    """Return the product and a list that grows by one for each time it really runs."""
    calls = []

    def product(v):
        jax.debug.callback(lambda: calls.append(1))
        return matvec(v)

    return product, calls


def test_cg_that_converges_in_three_steps_costs_three_products():
    values = jnp.array([1.0, 2.0, 4.0, 4.0, 2.0, 1.0])  # three distinct eigenvalues
    product, calls = counted(lambda v: values * v)
    solver = hg.solvers.cg(200, 1e-5)
    b = jnp.arange(1.0, 7.0)
    x, _, info = jax.jit(lambda b: solver.solve(product, b, solver.init(b)))(b)
    jax.effects_barrier()
    assert int(info.num_steps) == 3
    assert len(calls) == 3
    np.testing.assert_allclose(x, b / values, rtol=1e-5)


def test_cg_unrolled_pays_for_all_its_steps_and_can_be_differentiated():
    """What ``unroll`` trades: products after convergence are computed, and reverse mode passes."""
    solver = hg.solvers.cg(8, 1e-5, unroll=2)
    product, calls = counted(lambda v: jnp.array([1.0, 2.0, 4.0]) * v)
    _, _, info = jax.jit(lambda b: solver.solve(product, b, ()))(jnp.ones(3))
    jax.effects_barrier()
    assert int(info.num_steps) == 3
    assert len(calls) == 8
    slope = jax.grad(lambda a: solver.solve(lambda v: a * v, jnp.ones(2), ())[0].sum())(2.0)
    assert float(slope) == pytest.approx(-0.5, rel=1e-5)


def test_neumann_counts_twelve_products_at_first_and_two_later_for_its_step():
    solver = hg.solvers.neumann(5)
    product, calls = counted(lambda v: jnp.array([1.0, 2.0, 4.0]) * v)
    solve = jax.jit(lambda b, state: solver.solve(product, b, state))
    _, state, _ = solve(jnp.ones(3), solver.init(jnp.ones(3)))
    jax.effects_barrier()
    assert len(calls) == 5 + 12
    solve(jnp.ones(3), state)
    jax.effects_barrier()
    assert len(calls) == 5 + 12 + 5 + 2


def test_cg_solves_a_multiple_of_the_identity_in_one_step():
    b = {"p": jnp.array([1.0, -2.0]), "q": jnp.array([[3.0]])}
    x, _, info = hg.solvers.cg(10).solve(lambda v: optax.tree.scale(7.0, v), b, ())
    assert int(info.num_steps) == 1
    assert relative_error(x, optax.tree.scale(1 / 7, b)) < 1e-6


def test_cg_stops_at_negative_curvature():
    matvec, b, _, _ = system(signs=-np.ones(6))
    x, _, info = hg.solvers.cg(10).solve(matvec, b, ())
    assert optax.tree.norm(x) == 0.0
    assert int(info.num_steps) == 1
    assert not bool(info.converged)
    assert float(info.residual) == pytest.approx(1.0)


def test_cg_starts_warm_and_recognises_a_solution():
    matvec, b, _, want = system(condition=20.0)
    solver = hg.solvers.cg(50, 1e-5, warm_start=True)
    _, state, cold = solver.solve(matvec, b, solver.init(b))
    x, _, warm = solver.solve(matvec, optax.tree.scale(3.0, b), state)
    assert int(warm.num_steps) <= 1 < int(cold.num_steps)
    assert relative_error(x, optax.tree.scale(3.0, want)) < 1e-4


def test_cg_measures_the_residual_where_rounding_spoils_its_recurrence():
    """In float32 at condition 1e7 the recurrence claims a residual that ‖b − A x‖ does not have."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(60, 60)))
    matrix = jnp.asarray(q @ np.diag(np.geomspace(1e-7, 1.0, 60)) @ q.T, jnp.float32)
    b = jnp.asarray(rng.normal(size=60), jnp.float32)
    x, _, info = hg.solvers.cg(2000, 1e-6).solve(lambda v: matrix @ v, b, ())
    assert float(info.residual) == pytest.approx(true_residual(lambda v: matrix @ v, b, x), rel=1e-3)
    assert bool(info.converged) == (true_residual(lambda v: matrix @ v, b, x) <= 1e-6)


# Dense and foreign


def test_dense_says_so_where_the_matrix_is_singular():
    b = jnp.ones(3)
    x, _, info = hg.solvers.dense().solve(lambda v: jnp.array([1.0, 1.0, 0.0]) * v, b, ())
    assert bool(jnp.isfinite(x).all())
    assert not bool(info.converged)


def test_dense_refuses_what_does_not_fit():
    b = jnp.ones(20_000)
    with pytest.raises(ValueError, match=r"at most 10000 unknowns.*20000"):
        hg.solvers.dense().solve(lambda v: v, b, ())


def test_foreign_solver_that_returns_a_pair_is_refused():
    solver = hg.solvers.from_callable(jax.scipy.sparse.linalg.cg)
    with pytest.raises(ValueError, match="structure of b"):
        solver.solve(lambda v: v, jnp.ones(3), ())


def test_foreign_solver_that_returns_nan_is_reported():
    solver = hg.solvers.from_callable(lambda matvec, b, x0: b * jnp.nan)
    x, _, info = solver.solve(lambda v: v, jnp.ones(3), ())
    assert bool((x == 0).all())
    assert not bool(info.converged)


# Random quadratics


@st.composite
def quadratics(draw, negative):
    """Draw a symmetric 6×6 matrix of condition up to 1e6, with the given number of negative eigenvalues."""
    log_condition = draw(st.floats(0.0, 6.0))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    q, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    values = np.logspace(-log_condition, 0.0, 6) * np.where(np.arange(6) < negative, -1.0, 1.0)
    return q @ np.diag(values) @ q.T, rng.normal(size=6)


QUADRATIC_SOLVERS = {
    "cg": hg.solvers.cg(100, 1e-8),
    "neumann_auto": hg.solvers.neumann(50),
    "neumann": hg.solvers.neumann(50, 1.5),
    "dense": hg.solvers.dense(1e-8),
    "identity": hg.solvers.identity(),
}


@pytest.mark.parametrize("name", QUADRATIC_SOLVERS)
@pytest.mark.parametrize("negative", [0, 2, 6])
@given(data=st.data())
def test_random_quadratics(name, negative, data):
    """Finite, with the residual that it has; converged where the solver promises it."""
    matrix, b = data.draw(quadratics(negative))
    with jax.enable_x64(True):
        x, _, info = run(QUADRATIC_SOLVERS[name], jnp.asarray(matrix), tree_of(jnp.asarray(b)))
        vector = np.asarray(vector_of(x))
    assert np.isfinite(vector).all()
    residual = np.linalg.norm(b - matrix @ vector) / np.linalg.norm(b)
    rounding = 1e-14 * (1 + np.linalg.norm(vector) / np.linalg.norm(b))  # ‖A‖ = 1
    assert float(info.residual) == pytest.approx(residual, rel=1e-6, abs=rounding)
    bound = 1e-8 if name in ("cg", "dense") else 1.0
    assert bool(info.converged) == (float(info.residual) <= bound)
    if name == "dense" or (name in ("cg", "neumann", "neumann_auto") and negative == 0):
        assert bool(info.converged)
    if name in ("neumann", "neumann_auto") and negative == 6:
        assert not bool(info.converged)
