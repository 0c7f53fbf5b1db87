"""The laws of a linear solver, for every row of the catalogue, and what is particular to each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import checkify

import hypergrad as hg
from hypergrad.solvers import LinearSystem, Status
from hypergrad.solvers._base import blank_info
from tests.catalogue import SOLVERS
from tests.problems import relative_error, tree_of, vector_of

# Of each solver one row runs each time; of ``cg`` a cold one, and the default, which is warm.
RARER = (
    "cg_unrolled",
    "cg_kept",
    "cg_warm",
    "neumann",
    "neumann_unrolled",
    "richardson_heavy",
    "gmres_warm",
    "foreign_warm",
)


def over_rows(chosen, *, common=None):
    """Return a mark of the rows that are chosen; slow are ``RARER``, or all but those in ``common``."""
    rare = lambda row: row.name in RARER if common is None else row.name not in common  # noqa: E731
    slow = lambda row: [pytest.mark.slow] * rare(row)  # noqa: E731
    return pytest.mark.parametrize(
        "row", [pytest.param(row, marks=slow(row), id=row.name) for row in SOLVERS if chosen(row)]
    )


rows = over_rows(lambda row: True)
rows_of_cg = over_rows(lambda row: True, common=("cg", "recycled_cg"))  # seconds each
solving = over_rows(lambda row: row.rtol)
keeping = over_rows(lambda row: row.keeps_state)
INDEFINITE = np.array([1, 1, -1, 1, 1, 1])

# Solvers of the catalogue and of several tests: what is compiled for one test serves the others.
MADE = {row.name: row.make() for row in SOLVERS}
short = pytest.mark.parametrize(
    "solver", [MADE[n] for n in ("cg", "neumann_auto", "dense")], ids=["cg", "auto", "dense"]
)
THREE, FOUR, FOUR_WARM = hg.solvers.cg(3), hg.solvers.cg(4), hg.solvers.cg(4, warm_start=True)
pytestmark = pytest.mark.usefixtures("hard_mode")


def system(condition=5.0, seed=0, signs=None):
    """Return a matvec on a tree of coupled leaves, a right-hand side, the matrix and the solution."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    values = np.geomspace(1.0, condition, 6) * (np.ones(6) if signs is None else signs)
    matrix = jnp.asarray(q @ np.diag(values) @ q.T, float)
    b = jnp.asarray(rng.normal(size=6), float)
    return (lambda v: tree_of(matrix @ vector_of(v))), tree_of(b), matrix, tree_of(jnp.linalg.solve(matrix, b))


def counted(matvec):
    """Return the product and a list that grows by one for each time it really runs."""
    calls = []

    def product(v):
        jax.debug.callback(lambda: calls.append(1))
        return matvec(v)

    return product, calls


def product_of(matrix):
    """Return the system of a dense matrix, on trees."""
    return LinearSystem(lambda v: tree_of(matrix @ vector_of(v)))


CALLS = []  # one entry for each product that ``solve`` has really run


@functools.partial(jax.jit, static_argnums=0)
def solve(solver, matrix, b, state, tolerance=None):
    """Solve with a dense matrix; compiled once per solver."""

    def product(v):
        jax.debug.callback(lambda: CALLS.append(1))
        return product_of(matrix).matvec(v)

    return solver.solve(LinearSystem(product), b, state, tolerance=tolerance)


@functools.partial(jax.jit, static_argnums=0)
def solve_diagonal(solver, values, b, state):
    """Solve with a diagonal matrix; compiled once per solver and size."""
    return solver.solve(LinearSystem(lambda v: values * v), b, state)


def run(solver, matrix, b, tolerance=None):
    """Solve from a fresh state."""
    return solve(solver, matrix, b, solver.init(b), tolerance)


def run_diagonal(solver, values, b):
    """Solve with a diagonal matrix from a fresh state."""
    return solve_diagonal(solver, jnp.asarray(values), b, solver.init(b))


def true_residual(matvec, b, x):
    """Return ‖b − A x‖/‖b‖, written out."""
    return float(optax.tree.norm(optax.tree.sub(b, matvec(x))) / optax.tree.norm(b))


def named(info):
    """Return the status by its printable name."""
    return Status(int(info.status)).name


@solving
def test_solves_a_system_whose_leaves_are_coupled(row):
    _, b, matrix, want = system()
    solver = row.make()
    x, state, info = run(solver, matrix, b)
    assert relative_error(x, want) < 10 * row.rtol
    assert named(info) == "CONVERGED"
    assert bool(info.converged)
    assert jax.tree.structure(state) == jax.tree.structure(solver.init(b))


@rows_of_cg
@pytest.mark.parametrize("signs", [None, INDEFINITE], ids=["definite", "indefinite"])
def test_residual_is_the_true_one(row, signs, x64):
    matvec, b, matrix, _ = system(condition=50.0, signs=signs)
    x, _, info = run(row.make(), matrix, b)
    assert bool(jnp.isfinite(vector_of(x)).all())
    # Diverging series lose digits in ‖b − A x‖ itself, by cancellation against a large x.
    if row.name == "identity":
        assert np.isnan([info.residual, info.undamped_residual]).all()
        return
    damped = lambda v: optax.tree.add_scale(matvec(v), info.damping, v)  # noqa: E731
    assert float(info.residual) == pytest.approx(true_residual(damped, b, x), rel=1e-6, abs=1e-13)
    assert float(info.undamped_residual) == pytest.approx(true_residual(matvec, b, x), rel=1e-6, abs=1e-13)
    assert (float(info.damping) > 0) == (row.name == "cg_default")


@rows_of_cg
def test_info_has_the_dtypes_of_the_vectors_and_the_form_of_its_blank(row):
    _, b, matrix, _ = system()
    _, _, info = run(row.make(), matrix, b)
    strong = lambda info: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), info)  # noqa: E731
    assert strong(info) == strong(blank_info())
    assert named(blank_info()) == "TRUNCATED"


@rows
def test_zero_right_hand_side_gives_zero(row):
    _, b, matrix, _ = system()
    x, state, info = run(row.make(), matrix, optax.tree.zeros_like(b))
    assert optax.tree.norm(x) == 0.0
    assert info.residual == info.undamped_residual == 0.0
    assert named(info) == "CONVERGED"
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state))


@rows
@pytest.mark.parametrize("factor", [1e-25, 1e-20, 1e20, 1e25])
def test_scaling_the_right_hand_side_scales_the_solution(row, factor):
    _, b, matrix, _ = system()
    solver = row.make()
    x, _, info = run(solver, matrix, b)
    scaled, _, scaled_info = run(solver, matrix, optax.tree.scale(factor, b))
    assert relative_error(optax.tree.scale(1 / factor, scaled), x) < 2e-5  # float32, a few hundred terms
    assert float(scaled_info.residual) == pytest.approx(float(info.residual), rel=0.1, abs=2e-6, nan_ok=True)
    assert int(scaled_info.status) == int(info.status)


@short
def test_scaling_matrix_and_right_hand_side_together_changes_nothing(solver):
    _, b, matrix, _ = system()
    x, _, _ = run(solver, matrix, b)
    for factor in (1e-9, 1e9):
        scaled, _, info = run(solver, factor * matrix, optax.tree.scale(factor, b))
        assert relative_error(scaled, x) < 1e-4
        assert bool(info.converged)


@short
@pytest.mark.parametrize("factor", [1e-25, 1e-20, 1e20, 1e25])
def test_a_matrix_of_any_scale(solver, factor):
    """Products whose squares under- or overflow in float32 are no obstacle."""
    values, b = jnp.array([1.0, 2.0, 4.0]), jnp.array([1.0, 2.0, -1.0])
    x, _, info = run_diagonal(solver, factor * values, b)
    np.testing.assert_allclose(factor * x, b / values, rtol=1e-4)
    assert bool(info.converged)


@short
def test_a_solution_that_overflows_is_reported(solver):
    x, _, info = run_diagonal(solver, jnp.full(3, 1e-15), jnp.array([1e30, 2e30, 0.0]))
    assert bool((x == 0).all())
    assert named(info) == "NOT_FINITE"
    assert float(info.residual) == jnp.inf


@rows_of_cg
def test_a_scalar_unknown_of_low_precision_is_solved_in_float32(row):
    solver, b = row.make(), jnp.array(3.0, jnp.bfloat16)
    x, state, info = run_diagonal(solver, 2.0, b)
    assert x.shape == ()
    assert {leaf.dtype for leaf in jax.tree.leaves((x, state))} == {jnp.dtype(jnp.float32)}
    assert info.residual.dtype == jnp.float32
    if row.rtol:
        assert float(x) == pytest.approx(1.5, rel=10 * row.rtol)
        assert bool(info.converged)


@pytest.mark.slow
@rows_of_cg
def test_vmap_under_strict_settings_equals_a_loop(row):
    """Strict promotion, NaN checks and no implicit transfer."""
    systems = [system(seed=s) for s in range(3)]
    matrices = jnp.stack([m for _, _, m, _ in systems])
    bs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[b for _, b, _, _ in systems])
    solver, at = row.make(), lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree)
    states = jax.vmap(solver.init)(bs)

    def fn(matrix, b, state):
        x, _, info = solver.solve(product_of(matrix), b, state)
        return x, info.num_products, info.converged, *((info.residual, info.undamped_residual) if row.rtol else ())

    batch, one = jax.jit(jax.vmap(fn)), jax.jit(fn)
    with jax.debug_nans(True):  # under which identity measures its residual
        with jax.transfer_guard("disallow"):
            batched = batch(matrices, bs, states)
        for i in range(3):
            x, num_products, converged, *_ = one(matrices[i], at(bs, i), at(states, i))
            assert relative_error(at(batched[0], i), x) < 2e-5
            assert int(batched[1][i]) == int(num_products)
            assert bool(batched[2][i]) == bool(converged)


@rows
def test_a_matrix_that_is_not_finite_is_reported(row):
    _, b, matrix, _ = system()
    x, state, info = run(row.make(), matrix * jnp.nan, b)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((x, state)))
    assert not bool(info.converged)
    if row.rtol:  # identity does not look at it
        assert optax.tree.norm(x) == 0.0
        assert named(info) == "NOT_FINITE"
        assert info.residual == info.undamped_residual == jnp.inf


@rows
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_right_hand_side_that_is_not_finite_is_reported(row, bad):
    _, b, matrix, _ = system()
    b = {**b, "a": b["a"].at[0].set(bad)}
    x, state, info = run(row.make(), matrix, b)
    assert optax.tree.norm(x) == 0.0
    assert info.residual == jnp.inf
    assert named(info) == "NOT_FINITE"
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state))


@pytest.mark.slow
@keeping
@pytest.mark.parametrize("bad", [jnp.nan, pytest.param(jnp.inf, marks=pytest.mark.slow)])
def test_a_state_that_is_not_finite_counts_as_a_fresh_one(row, bad):
    _, b, matrix, _ = system()
    solver = row.make()
    fresh = run(solver, matrix, b)
    _, poisoned = jax.tree.flatten(solver.init(b))
    leaves = [leaf.at[(0,) * leaf.ndim].set(bad) for leaf in jax.tree.leaves(fresh[1])]
    again = solve(solver, matrix, b, jax.tree.unflatten(poisoned, leaves))
    assert jax.tree.all(jax.tree.map(lambda p, q: bool((p == q).all()), again, fresh))


@pytest.mark.parametrize("make", [hg.solvers.cg, hg.solvers.neumann], ids=["cg", "neumann"])
def test_damping_leaves_a_residual_of_the_undamped_system(make, x64):
    matvec, b, _, _ = system()
    solver = make(40, damping=0.7)
    x, _, info = solver.solve(LinearSystem(matvec), b, solver.init(b))
    left = optax.tree.sub(b, matvec(x))
    assert float(info.undamped_residual) == pytest.approx(float(optax.tree.norm(left) / optax.tree.norm(b)), rel=1e-8)
    assert float(info.undamped_residual) > 0.1 > float(info.residual)


@over_rows(lambda row: row.rtol, common="cg")
def test_matvec_of_another_structure_is_refused(row):
    solver = row.make()
    b = {"p": jnp.ones(2)}
    with pytest.raises((ValueError, TypeError), match=r"structure|shape|pytree"):
        solver.solve(LinearSystem(lambda v: v["p"]), b, solver.init(b))


@pytest.mark.parametrize("make", [
    lambda d: hg.solvers.neumann(300, damping=d),
    lambda d: hg.solvers.cg(30, damping=d),
    lambda d: hg.solvers.cg(30, damping=d, warm_start=True),
    lambda d: hg.solvers.dense(damping=d),
    lambda d: hg.solvers.from_callable(lambda A, b, x0: jax.scipy.sparse.linalg.cg(A, b, x0)[0], damping=d),
])  # fmt: skip
def test_damping_adds_to_the_diagonal(make, x64):
    matvec, b, matrix, _ = system(signs=INDEFINITE)
    solver = make(3.0)
    x, _, info = run(solver, matrix, b)
    want = tree_of(jnp.linalg.solve(matrix + 3.0 * jnp.eye(6), vector_of(b)))
    assert relative_error(x, want) < 1e-4
    assert bool(info.converged)
    assert float(info.damping) == 3.0
    assert float(info.residual) <= 1e-5
    assert float(info.undamped_residual) == pytest.approx(true_residual(matvec, b, x), rel=1e-6)


@solving
def test_tolerance_is_absolute_in_the_units_of_the_right_hand_side(row):
    matvec, b, matrix, _ = system()
    solver = row.make()
    counts = []
    for scale in (1.0, 1e-20, 1e12):
        scaled = optax.tree.scale(scale, b)
        size = scale * float(optax.tree.norm(b))
        x, _, loose = run(solver, matrix, scaled, 0.2 * size)
        assert named(loose) == "CONVERGED"
        assert true_residual(matvec, b, optax.tree.scale(1 / scale, x)) <= 0.2
        counts.append(int(loose.num_products))
        if "neumann" not in row.name and "richardson" not in row.name:  # their recurrence has no rounding of x
            assert named(run(solver, matrix, scaled, 1e-12 * size)[2]) == "TRUNCATED"
        nothing, _, idle = run(solver, matrix, scaled, 1.1 * size)
        assert named(idle) == "CONVERGED"
    assert len(set(counts)) == 1
    if row.name.startswith(("cg", "neumann")):
        assert counts[0] < int(run(solver, matrix, b)[2].num_products)
        assert optax.tree.norm(nothing) == 0.0


@over_rows(lambda row: row.name != "dense" and "foreign" not in row.name)
def test_every_product_is_counted(row):
    """Set-up, warm starts and measured residuals included; what ``unroll`` computes and discards is not."""
    solver = row.make()
    _, b, matrix, _ = system()
    state, told = solver.init(b), 0
    jax.effects_barrier()
    before = len(CALLS)
    for scale in (1.0, 2.0):
        _, state, info = solve(solver, matrix, jax.tree.map(lambda x, s=scale: x + s, b), state)
        told += int(info.num_products)
    jax.effects_barrier()
    assert len(CALLS) - before == told or row.name == "cg_unrolled"
    assert told <= len(CALLS) - before


@over_rows(lambda row: row.rtol and "foreign" not in row.name, common=("cg",))
def test_no_nan_is_computed_even_where_it_would_be_discarded(row):
    """Checked after each operation, also inside loops, where an unrolled one goes on after its end."""
    _, b, matrix, _ = system()
    solver = row.make()

    def fn(b, state):
        return solver.solve(product_of(matrix), b, state)

    checked = jax.jit(checkify.checkify(fn, errors=checkify.nan_checks))
    state = solver.init(b)
    for right in (b, b, optax.tree.zeros_like(b), tree_of(jnp.linalg.eigh(matrix)[1][:, 0])):  # the last takes one step
        error, (_, state, _) = checked(right, state)
        error.throw()


# Neumann


@pytest.mark.parametrize(("num_terms", "unroll"), [(1, 1), (7, 1), (30, 1), (7, True)])
def test_neumann_is_its_truncated_sum(num_terms, unroll, x64):
    _, b, matrix, _ = system(condition=20.0)
    alpha = 0.03
    power, total = vector_of(b), jnp.zeros(6)
    for _ in range(num_terms):
        total, power = total + alpha * power, power - alpha * matrix @ power
    x, _, info = run(hg.solvers.neumann(num_terms, alpha, unroll=unroll), matrix, b)
    assert relative_error(x, tree_of(total)) < 1e-12
    assert float(info.residual) == pytest.approx(float(jnp.linalg.norm(power) / jnp.linalg.norm(vector_of(b))))
    assert int(info.num_products) == num_terms


def test_identity_is_the_first_neumann_term_with_step_one_and_takes_no_product():
    _, b, matrix, _ = system()
    identity, _, info = hg.solvers.identity().solve(LinearSystem(None), b, ())
    first, _, _ = run(hg.solvers.neumann(1, 1.0), matrix, b)
    assert jax.tree.all(jax.tree.map(lambda p, q, r: bool((p == q).all() & (p == r).all()), identity, first, b))
    assert int(info.num_products) == 0
    assert named(info) == "TRUNCATED"
    assert np.isnan([info.residual, info.undamped_residual]).all()


def test_neumann_that_diverges_stops_finite_and_says_so():
    _, b, matrix, _ = system(condition=10.0)
    x, _, info = run(hg.solvers.neumann(500, 1.0), matrix, b)  # α λmax = 10
    assert named(info) == "DIVERGED"
    assert bool(jnp.isfinite(vector_of(x)).all())
    assert float(info.residual) > 1000.0
    assert int(info.num_products) < 20


def test_neumann_whose_negative_curvature_makes_it_grow_diverges():
    _, _, info = run_diagonal(hg.solvers.neumann(20), [1.0, -50.0], jnp.ones(2))
    assert named(info) == "DIVERGED"
    assert float(info.residual) > 1000.0


def test_neumann_far_from_its_sum_is_truncated():
    _, _, info = run_diagonal(hg.solvers.neumann(20), [1.0, 1e-4], jnp.ones(2))
    assert float(info.residual) == pytest.approx(np.sqrt(0.5), rel=0.01)  # nothing is left of 1, nearly all of 1e-4
    assert named(info) == "TRUNCATED"
    assert not bool(info.converged)


def test_neumann_follows_a_growing_matrix():
    """The step that it finds for itself stays below 2/λmax while one eigenvalue grows from 1 to 10,000."""
    values = jnp.array([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    solver = hg.solvers.neumann(30)
    rng = np.random.default_rng(0)
    state = solver.init(values)
    for i in range(100):
        b = jnp.asarray(rng.normal(size=6), jnp.float32)
        _, state, info = solve_diagonal(solver, values.at[4].multiply(1.1**i), b, state)
        assert float(info.residual) < 1.0, (i, info)


def test_neumann_recovers_from_an_eigenvalue_that_jumps():
    """One bad solve is allowed: its residual is the missing eigenvector, and mends the next."""
    solver = hg.solvers.neumann(30)
    b = jnp.array([1.0, 1.0, 1e-6])
    _, state, _ = run_diagonal(solver, [1.0, 0.5, 0.2], b)
    _, state, first = solve_diagonal(solver, jnp.array([1.0, 0.5, 50.0]), b, state)
    _, _, second = solve_diagonal(solver, jnp.array([1.0, 0.5, 50.0]), b, state)
    assert named(first) == "DIVERGED"
    assert float(second.residual) < 1.0


def test_neumann_keeps_its_step_where_negative_curvature_makes_terms_grow():
    """The residual then is no top eigenvector: taking it for one would lengthen the next step."""
    solver = hg.solvers.neumann(10)
    b, state = jnp.ones(3), solver.init(jnp.ones(3))
    residuals = []
    for _ in range(4):
        _, state, info = solve_diagonal(solver, jnp.array([1.0, 0.5, -0.3]), b, state)
        residuals.append(float(info.residual))
    assert 1.0 < max(residuals) < 1.01 * min(residuals)


def test_neumann_counts_twelve_products_at_first_and_two_later_for_its_step():
    solver = hg.solvers.neumann(5)
    values, b = jnp.array([1.0, 2.0, 4.0]), jnp.ones(3)
    _, state, first = solve_diagonal(solver, values, b, solver.init(b))
    _, _, later = solve_diagonal(solver, values, b, state)
    assert int(first.num_products) == 5 + 12
    assert int(later.num_products) == 5 + 2


# Conjugate gradients


def reference_cg(matrix, b, num_steps):
    """Return the iterates of CG, written out in NumPy, until one meets negative curvature."""
    x, r, found = np.zeros_like(b), b, [np.zeros_like(b)]
    p = r
    for _ in range(num_steps):
        image = matrix @ p
        if p @ image <= 0:
            break
        length = r @ r / (p @ image)
        x, left = x + length * p, r - length * image
        p, r = left + (left @ left) / (r @ r) * p, left
        found.append(x)
    return found


def test_cg_that_converges_in_three_steps_costs_three_products():
    values = [1.0, 2.0, 4.0, 4.0, 2.0, 1.0]  # three distinct eigenvalues
    b = jnp.arange(1.0, 7.0)
    x, _, info = run_diagonal(hg.solvers.cg(200, 1e-5), values, b)
    assert int(info.num_products) == 3  # as many as really run: test_every_product_is_counted
    np.testing.assert_allclose(x, b / jnp.asarray(values), rtol=1e-5)


@pytest.mark.slow
def test_cg_unrolled_pays_for_all_its_steps_and_can_be_differentiated():
    """What ``unroll`` trades: products after convergence are computed, and reverse mode passes."""
    solver = hg.solvers.cg(8, 1e-5, unroll=2)
    product, calls = counted(lambda v: jnp.array([1.0, 2.0, 4.0]) * v)
    _, _, info = jax.jit(lambda b: solver.solve(LinearSystem(product), b, ()))(jnp.ones(3))
    jax.effects_barrier()
    assert int(info.num_products) == 3
    assert len(calls) == 8
    slope = jax.jit(jax.grad(lambda a: solver.solve(LinearSystem(lambda v: a * v), jnp.ones(2), ())[0].sum()))(2.0)
    assert float(slope) == pytest.approx(-0.5, rel=1e-5)


def test_cg_solves_a_multiple_of_the_identity_in_one_step():
    _, b, _, _ = system()
    x, _, info = run(MADE["cg"], 7.0 * jnp.eye(6), b)
    assert int(info.num_products) == 1
    assert relative_error(x, optax.tree.scale(1 / 7, b)) < 1e-6


def test_cg_stops_at_negative_curvature():
    _, b, matrix, _ = system(signs=-np.ones(6))
    x, _, info = run(MADE["cg"], matrix, b)
    assert optax.tree.norm(x) == 0.0
    assert int(info.num_products) == 1
    assert named(info) == "INDEFINITE"
    assert float(info.residual) == pytest.approx(1.0)


def test_cg_returns_its_last_accepted_iterate_where_curvature_turns_negative(x64):
    _, b, matrix, _ = system(condition=50.0, signs=INDEFINITE)
    found = reference_cg(np.asarray(matrix), np.asarray(vector_of(b)), 20)
    assert 1 < len(found) < 7
    x, _, info = run(MADE["cg"], matrix, b)
    assert relative_error(x, tree_of(jnp.asarray(found[-1]))) < 1e-10
    assert named(info) == "INDEFINITE"
    assert int(info.num_products) == len(found)  # the accepted steps, and the one that is not


def test_cg_returns_its_last_iterate_though_an_earlier_one_has_a_smaller_residual(x64):
    """CG minimises ½ xᵀAx − bᵀx, which falls with every step, while the residual may grow."""
    _, _, matrix, _ = system(condition=1e4)
    vectors = jnp.linalg.eigh(matrix)[1]
    b = np.asarray(vectors @ jnp.array([1.0, 0.5, 0.3, 0.2, 0.1, 0.05]))
    found = reference_cg(np.asarray(matrix), b, 3)
    residuals = [np.linalg.norm(b - matrix @ x) for x in found]
    assert residuals[-1] > 1.5 * min(residuals)
    x, _, info = run(THREE, matrix, tree_of(jnp.asarray(b)))
    assert relative_error(x, tree_of(jnp.asarray(found[-1]))) < 1e-10
    assert named(info) == "TRUNCATED"


@pytest.mark.parametrize("size", [2, 200_000])
def test_cg_stops_at_curvature_of_rounding_size_whatever_the_number_of_unknowns(size):
    """Eigenvalues 1 and s in equal parts: the second direction has a curvature of s, and λ̂ is ½."""
    epsilon = float(jnp.finfo(jnp.float32).eps)
    b = jnp.ones(size)
    for s, accepted in ((8 * epsilon, True), (3 * epsilon, False)):
        values = jnp.tile(jnp.array([1.0, s]), size // 2)
        x, _, info = run_diagonal(hg.solvers.cg(2), values, b)
        assert (named(info) != "INDEFINITE") == accepted
        assert float(jnp.max(x)) == pytest.approx(1 / s if accepted else 2.0, rel=1e-3)


def test_cg_on_a_singular_system_goes_no_further_than_exact_arithmetic_does():
    """Ten examples, forty weights, b not in the range: there is no solution, and rounding alone makes an x of 1e8."""
    data = jax.random.normal(jax.random.key(0), (10, 40))
    b = jnp.full(40, -1 / 40)
    x, _, info = hg.solvers.cg(50).solve(LinearSystem(lambda v: data.T @ (data @ v) / 10), b, ())
    wide = np.asarray(data, np.float64)
    steps = reference_cg(wide.T @ wide / 10, np.asarray(b, np.float64), int(info.num_products) - 1)
    assert named(info) == "INDEFINITE"
    assert np.linalg.norm(x - steps[-1]) < 0.05 * np.linalg.norm(steps[-1])
    assert float(jnp.max(jnp.abs(x))) < 1e4
    residual = np.linalg.norm(b - wide.T @ (wide @ np.asarray(x, np.float64)) / 10) / np.linalg.norm(b)
    assert float(info.residual) == pytest.approx(residual, rel=1e-2)


def test_cg_solves_a_singular_system_whose_right_hand_side_is_in_its_range():
    data = jax.random.normal(jax.random.key(0), (10, 40))
    matrix = data.T @ data / 10
    b = matrix @ jnp.ones(40)
    x, _, info = jax.jit(lambda b: hg.solvers.cg(50).solve(LinearSystem(lambda v: matrix @ v), b, ()))(b)
    assert named(info) == "CONVERGED"
    np.testing.assert_allclose(x, jnp.linalg.pinv(matrix, rtol=1e-4) @ b, atol=1e-3)


def test_cg_starts_warm_and_recognises_a_solution():
    _, b, matrix, want = system(condition=20.0)
    solver = MADE["cg_warm"]
    _, state, cold = run(solver, matrix, b)
    x, _, warm = solve(solver, matrix, optax.tree.scale(3.0, b), state)
    assert int(warm.num_products) == 1 < int(cold.num_products)
    assert relative_error(x, optax.tree.scale(3.0, want)) < 1e-4


@pytest.mark.slow
def test_cg_pays_for_a_warm_start_from_its_products(x64):
    """A fresh state costs none; a poor one costs one and is dropped; a good one is one step ahead of a cold start."""
    _, b, matrix, _ = system(condition=50.0)
    cold, warm = THREE, FOUR_WARM
    x3, _, _ = run(cold, matrix, b)
    x, good, info = run(warm, matrix, b)
    assert int(info.num_products) == 4
    assert relative_error(x, run(FOUR, matrix, b)[0]) < 1e-12
    poor = jax.tree.map(lambda x: -10 * x, good)
    x, _, info = solve(warm, matrix, b, poor)
    assert int(info.num_products) == 4
    assert relative_error(x, x3) < 1e-12
    _, _, ahead = solve(warm, matrix, b, good)
    assert int(ahead.num_products) == 4
    assert float(ahead.residual) < float(info.residual)


def test_a_warm_start_tells_cg_how_large_curvature_is():
    """Warm at the solution in the range, what is left of b is in the null space, where all curvature is rounding."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(40, 40)))
    values = np.concatenate([np.geomspace(1.0, 10.0, 20), np.zeros(20)])
    matrix = jnp.asarray(q * values @ q.T, jnp.float32)
    inside, outside = jnp.asarray(q[:, :20].sum(1), jnp.float32), jnp.asarray(q[:, 20:].sum(1), jnp.float32)
    want, b = jnp.asarray((q[:, :20] / values[:20]).sum(1), jnp.float32), inside + outside
    solver = hg.solvers.cg(50, warm_start=True)
    state = jax.tree.map(lambda _: want / jnp.linalg.norm(b), solver.init(b))
    x, _, info = jax.jit(lambda b, state: solver.solve(LinearSystem(lambda v: matrix @ v), b, state))(b, state)
    assert named(info) == "INDEFINITE"
    assert int(info.num_products) == 2
    np.testing.assert_allclose(x, want, rtol=1e-5)


@pytest.mark.parametrize("rtol", [1e-5, 0.0])
def test_cg_measures_the_residual_where_rounding_spoils_its_recurrence(rtol):
    """In float32 at condition 10,000 the recurrence claims a residual of 1e-5 that ‖b − A x‖ does not have."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(60, 60)))
    matrix = jnp.asarray(q @ np.diag(np.geomspace(1e-4, 1.0, 60)) @ q.T, jnp.float32)
    b = jnp.asarray(rng.normal(size=60), jnp.float32)
    product, calls = counted(lambda v: matrix @ v)
    x, _, info = jax.jit(lambda b: hg.solvers.cg(320, rtol).solve(LinearSystem(product), b, ()))(b)
    jax.effects_barrier()
    # Summing A x in float32 in another order moves it by 1e-7 ‖A‖ ‖x‖/‖b‖, a few per cent of this residual.
    assert float(info.residual) == pytest.approx(true_residual(lambda v: matrix @ v, b, x), rel=0.1)
    assert float(info.residual) > 5e-5
    assert named(info) == "TRUNCATED"
    assert int(info.num_products) == len(calls)
    assert len(calls) == 321 if rtol == 0 else len(calls) < 320  # the verifying product may come on top


def test_cg_refuses_what_it_cannot_solve():
    with pytest.raises(ValueError, match="max_products to be at least 2 with warm_start; got 1"):
        hg.solvers.cg(1, warm_start=True)
    crooked = LinearSystem(lambda v: v, symmetric=False)
    with pytest.raises(ValueError, match=r"symmetric system for cg; got symmetric=False.*gmres.*dense"):
        hg.solvers.cg(3).solve(crooked, jnp.ones(3), ())
    recycled = hg.solvers.recycled_cg(3, 2)
    with pytest.raises(ValueError, match="symmetric system for recycled_cg"):
        recycled.solve(crooked, jnp.ones(3), recycled.init(jnp.ones(3)))


# Dense and foreign


def test_dense_solves_a_system_that_is_not_symmetric():
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(6, 6)), float)
    crooked = product_of(matrix)._replace(symmetric=False)
    _, b, _, _ = system()
    x, _, info = hg.solvers.dense().solve(crooked, b, ())
    assert relative_error(x, tree_of(jnp.linalg.solve(matrix, vector_of(b)))) < 1e-4
    assert bool(info.converged)


def test_dense_counts_a_product_per_column():
    _, b, matrix, _ = system()
    assert int(run(MADE["dense"], matrix, b)[2].num_products) == 6


def test_dense_says_so_where_the_matrix_is_singular():
    x, _, info = run_diagonal(MADE["dense"], [1.0, 1.0, 0.0], jnp.ones(3))
    assert bool((x == 0).all())
    assert named(info) == "NOT_FINITE"


def test_dense_refuses_what_does_not_fit():
    b = jnp.ones(20_000)
    with pytest.raises(ValueError, match=r"at most 10000 unknowns.*20000"):
        hg.solvers.dense().solve(LinearSystem(lambda v: v), b, ())


def test_foreign_solver_that_returns_a_pair_is_refused():
    solver = hg.solvers.from_callable(jax.scipy.sparse.linalg.cg)
    with pytest.raises(ValueError, match="structure of b"):
        solver.solve(LinearSystem(lambda v: v), jnp.ones(3), ())


def test_foreign_solver_that_returns_nan_is_reported_and_keeps_its_warm_start():
    solver = hg.solvers.from_callable(lambda matvec, b, x0: jnp.where(b < 0, jnp.nan, b), warm_start=True)
    _, good, info = run_diagonal(solver, jnp.ones(3), jnp.ones(3))
    assert bool(info.converged)
    assert int(info.num_products) == -1
    x, kept, info = solve_diagonal(solver, jnp.ones(3), -jnp.ones(3), good)
    assert bool((x == 0).all())
    assert named(info) == "NOT_FINITE"
    np.testing.assert_allclose(kept.solution, good.solution, rtol=1e-6)


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
    "cg": (hg.solvers.cg(100, 1e-8), 1e-8),
    "cg_warm": (hg.solvers.cg(100, 1e-8, warm_start=True), 1e-8),
    "neumann_auto": (hg.solvers.neumann(50), 1e-5),
    "neumann": (hg.solvers.neumann(50, 1.5), 1e-5),
    "dense": (hg.solvers.dense(1e-8), 1e-8),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "cg")) for name in QUADRATIC_SOLVERS]
)
@pytest.mark.parametrize("negative", [0, 2, 6])
@given(data=st.data())
def test_random_quadratics(name, negative, data):
    """Finite, with the residual that it has; converged where the solver promises it."""
    matrix, b = data.draw(quadratics(negative))
    solver, rtol = QUADRATIC_SOLVERS[name]
    with jax.enable_x64(True):
        x, _, info = run(solver, jnp.asarray(matrix), tree_of(jnp.asarray(b)))
        vector = np.asarray(vector_of(x))
    assert np.isfinite(vector).all()
    residual = np.linalg.norm(b - matrix @ vector) / np.linalg.norm(b)
    rounding = 1e-14 * (1 + np.linalg.norm(vector) / np.linalg.norm(b))  # ‖A‖ = 1
    assert float(info.residual) == pytest.approx(residual, rel=1e-6, abs=rounding)
    assert bool(info.converged) == (float(info.residual) <= rtol)
    assert (named(info) == "DIVERGED") == ("neumann" in name and float(info.residual) > 1000)
    if name == "dense" or ("cg" in name and negative == 0):
        assert bool(info.converged)
    if "neumann" in name and negative == 0:
        assert float(info.residual) < 1.0
    if negative == 6 and name != "dense":
        assert not bool(info.converged)
    if negative == 6 and "cg" in name:
        assert named(info) == "INDEFINITE"
