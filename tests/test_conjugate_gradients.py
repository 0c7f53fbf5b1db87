"""What is particular to damped, warm, preconditioned and recycled conjugate gradients."""

import functools
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.solvers import LinearSystem, Status
from tests.problems import relative_error, ridge

ROOT = Path(__file__).parents[1]


def matrix_of(values, seed):
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(len(values), len(values))))
    return q @ np.diag(values) @ q.T, rng.normal(size=len(values))


def by_hand(matrix, b, state, products, ratio):
    """Warm, relatively damped conjugate gradients, written from the formulas with numpy."""
    last, top = state
    size, seen, spent = np.linalg.norm(b), 0.0, 0
    x, r, damping = np.zeros_like(b), b.copy(), ratio * top if top > 0 else None
    if last.any():
        guess = last * size
        image = matrix @ guess
        spent, seen = 1, abs(guess @ image) / (guess @ guess)
        left = b - image - damping * guess
        nearer = guess @ image / (guess @ guess) + damping > 0.1 * damping and guess @ (b + left) >= 0
        if nearer or np.linalg.norm(left) < 3 * size:
            x, r = guess, left
    p, status = r.copy(), Status.TRUNCATED
    while spent < products:
        image = matrix @ p
        spent += 1
        quotient = p @ image / (p @ p)
        if damping is None:
            damping = ratio * (quotient if quotient > 0 else np.linalg.norm(image) / np.linalg.norm(p))
            seen = damping / ratio
        seen = max(seen, abs(quotient))
        if quotient + damping <= 0.1 * damping:
            status = Status.INDEFINITE
            break
        length = (r @ r) / (p @ image + damping * p @ p)
        x, new = x + length * p, r - length * (image + damping * p)
        p, r = new + (new @ new) / (r @ r) * p, new
    return x, (x / size, max(seen, 0.9 * top)), status, damping


@pytest.mark.parametrize("kind", ["definite", "indefinite", "first direction negative"])
@pytest.mark.parametrize("products", [2, 3, 5])
def test_warm_damped_iterates_are_those_of_the_formulas(kind, products, x64):
    solver = hg.solvers.cg(products, 0.0, relative_damping=0.01, warm_start=True)
    step = jax.jit(lambda matrix, b, state: solver.solve(LinearSystem(lambda v: matrix @ v), b, state))
    state, mine, statuses = solver.init(jnp.zeros(12)), (np.zeros(12), 0.0), set()
    for turn in range(6):
        values = np.geomspace(1.0, 1e-3, 12) * (1 + 0.1 * turn)
        if kind == "indefinite":
            values[-3:] = -0.02
        matrix, b = matrix_of(values, 7)
        b = b + 0.3 * np.random.default_rng(turn).normal(size=12)
        if kind == "first direction negative" and turn == 0:
            matrix = matrix - 2 * np.outer(b, b) / (b @ b)
        x, state, info = step(jnp.asarray(matrix), jnp.asarray(b), state)
        want, mine, status, damping = by_hand(matrix, b, mine, products, 0.01)
        np.testing.assert_allclose(x, want, rtol=1e-7, atol=1e-9 * np.linalg.norm(want))
        assert float(info.damping) == pytest.approx(damping, rel=1e-9)
        assert float(state.largest) == pytest.approx(mine[1], rel=1e-9)
        assert Status(int(info.status)) == status
        statuses.add(status)
    assert Status.TRUNCATED in statuses


@functools.partial(jax.jit, static_argnums=0)
def solve_dense(solver, matrix, b, state):
    """Solve with a dense matrix; compiled once per solver and size."""
    system = LinearSystem(lambda v: matrix @ v, symmetric=solver not in NOT_SYMMETRIC, key=jax.random.key(0))
    return solver.solve(system, b, state)


NOT_SYMMETRIC = [hg.solvers.gmres(50, restart) for restart in (2, 25)]


def test_a_warm_start_of_three_times_the_right_hand_side_is_dropped(x64):
    """Where it starts: the energy of the result tells whether the guess was kept."""
    solver, one_step = hg.solvers.cg(2, 0.0, warm_start=True), hg.solvers.cg(1, 0.0)
    matrix, b = jnp.diag(jnp.array([1.0, 2.0])), jnp.array([1.0, 1.0])
    for factor, kept in ((2.9, True), (3.1, False)):
        guess = jnp.linalg.solve(matrix, b + factor * jnp.array([1.0, -1.0]))  # a residual of factor ‖b‖
        state = solver.init(b)._replace(solution=guess / jnp.linalg.norm(b))
        x, _, _ = solve_dense(solver, matrix, b, state)
        cold, _, _ = solve_dense(one_step, matrix, b, ())
        assert (relative_error(x, cold) > 1e-6) == kept


def test_a_warm_start_with_a_large_residual_and_a_small_error_is_kept(x64):
    """An error along a large eigenvalue of a mini-batch: one more step removes it."""
    matrix, b, wanted = jnp.diag(jnp.array([100.0, 1.0, 2.0])), jnp.array([0.0, 1.0, 1.0]), jnp.array([0.0, 1.0, 0.5])
    solver = hg.solvers.cg(2, 0.0, warm_start=True)
    for error, kept in ((0.12, True), (0.125, False)):  # ‖error‖ against ‖solution‖ in the norm of A: 1.2² and 1.25²
        guess = wanted + jnp.array([error, 0.0, 0.0])
        assert float(jnp.linalg.norm(b - matrix @ guess)) > 3.0 * float(jnp.linalg.norm(b))
        x, _, info = solve_dense(solver, matrix, b, solver.init(b)._replace(solution=guess / jnp.linalg.norm(b)))
        assert (relative_error(x, wanted) < 1e-12) == kept
        assert (float(info.residual) < 1e-12) == kept


def test_implicit_has_a_default():
    """The same program as the one spelled out."""
    example = ridge()
    spelled = hg.solvers.cg(3, relative_damping=0.01, warm_start=True)
    args, programs = (*example.variables, example.inner_batch, example.outer_batch), []
    for estimator in (hg.implicit(example.problem), hg.implicit(example.problem, spelled)):
        fn = hg.value_and_hypergrad(estimator)
        programs.append(jax.jit(lambda *args, fn=fn: fn(*args, key=None)).lower(*args).as_text())
    assert programs[0] == programs[1]


def test_best_response_of_the_default_is_solved_well(x64):
    """It is called once: three damped products would be a wrong derivative. Twice differentiable, too."""
    example = ridge()
    fn = hg.best_response(hg.implicit(example.problem))
    value = lambda h: example.problem.outer_loss(  # noqa: E731
        fn(example.variables.params, h, example.inner_batch, key=None), h, example.outer_batch, None
    )
    h = example.variables.hyperparams
    along = jax.tree.map(jnp.ones_like, h)
    twice = lambda f: jax.jit(lambda h: jax.jvp(jax.grad(f), (h,), (along,)))(h)  # noqa: E731
    (slope, curved), (_, wanted) = twice(value), twice(example.value_at)
    assert relative_error(slope, example.exact) < 1e-6
    assert relative_error(curved, wanted) < 1e-4


class TestDiagonal:
    def test_is_given_constrained_hyperparameters_and_spread_over_the_unknowns(self):
        seen = []

        def diagonal(params, decay):
            seen.append(jax.tree.leaves(decay))
            return {"a": decay["a"], "b": 2.0, "c": decay["a"]}

        class StopError(Exception):
            pass

        def solve(system, b, state, *, tolerance=None):
            seen.append(system.diagonal())
            raise StopError

        inner = lambda w, h, batch, key: sum(jnp.sum(h["a"] * x**2) for x in jax.tree.leaves(w))  # noqa: E731
        problem = hg.reparameterize(hg.BilevelProblem(inner, inner), hg.bijectors.exp())
        solver = hg.LinearSolver(lambda b: (), solve)
        estimator = hg.implicit(problem, solver, diagonal=diagonal, trainable={"a": True, "b": True, "c": False})
        weights = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(2), "c": jnp.ones(2)}
        with pytest.raises(StopError):
            hg.hypergrad(estimator)(weights, {"a": jnp.log(3.0)}, (), (), key=None)
        found = seen[-1]
        assert found["c"] is None
        assert found["a"].shape == (2, 3)
        assert found["a"].dtype == jnp.float32
        assert found["b"].shape == (2,)

    @pytest.mark.parametrize("wrong", [lambda w, h: jnp.ones(5), lambda w, h: {"x": 1.0}])
    def test_of_another_form_is_refused(self, wrong):
        example = ridge()
        estimator = hg.implicit(
            example.problem, hg.solvers.cg(3, preconditioner=hg.preconditioners.jacobi()), diagonal=wrong
        )
        with pytest.raises(ValueError, match="diagonal"):
            hg.hypergrad(estimator)(*example.variables, example.inner_batch, example.outer_batch, key=None)

    def test_that_is_missing_is_named(self):
        example = ridge()
        estimator = hg.implicit(example.problem, hg.solvers.cg(3, preconditioner=hg.preconditioners.jacobi()))
        with pytest.raises(ValueError, match=r"a diagonal for jacobi.*diagonal=lambda"):
            hg.hypergrad(estimator)(*example.variables, example.inner_batch, example.outer_batch, key=None)
        with pytest.raises(TypeError, match="diagonal to be callable"):
            hg.implicit(example.problem, diagonal=3.0)


@pytest.mark.parametrize("make", [hg.solvers.cg, hg.solvers.neumann], ids=["cg", "neumann"])
def test_jacobi_solves_a_diagonal_system_at_once(make, x64):
    values, b = jnp.geomspace(1e-4, 1e4, 9), jnp.ones(9)
    solver = make(1, preconditioner=hg.preconditioners.jacobi())
    system = LinearSystem(lambda v: values * v, diagonal=lambda: values)
    x, _, info = solver.solve(system, b, solver.init(b))
    np.testing.assert_allclose(x, b / values, rtol=1e-9)
    assert bool(info.converged)


def test_jacobi_includes_the_damping(x64):
    values, b = jnp.array([0.0, 1.0, 4.0]), jnp.ones(3)
    solver = hg.solvers.cg(1, damping=0.5, preconditioner=hg.preconditioners.jacobi())
    x, _, _ = solver.solve(LinearSystem(lambda v: values * v, diagonal=lambda: values), b, solver.init(b))
    np.testing.assert_allclose(x, b / (values + 0.5), rtol=1e-9)


def test_nystrom_deflates_outliers_and_is_made_anew(x64):
    values = np.concatenate([np.geomspace(1e4, 1e1, 8), np.linspace(0.5, 1.0, 32)])
    matrix, b = matrix_of(values, 0)
    matrix, b = jnp.asarray(matrix), jnp.asarray(b)
    exact = jnp.linalg.solve(matrix, b)
    solver = hg.solvers.cg(6, 0.0, preconditioner=hg.preconditioners.nystrom(12, every=3))
    system = LinearSystem(lambda v: matrix @ v, key=jax.random.key(0))
    step, state, counts = jax.jit(lambda state: solver.solve(system, b, state)), solver.init(b), []
    for _ in range(5):
        x, state, info = step(state)
        counts.append(int(info.num_products))
    assert counts == [18, 6, 6, 18, 6]
    plain, _, _ = solve_dense(hg.solvers.cg(6, 0.0), matrix, b, ())
    assert relative_error(x, exact) < 1e-2 < 0.2 < relative_error(plain, exact)
    with pytest.raises(ValueError, match="random key for nystrom"):
        solver.solve(system._replace(key=None), b, solver.init(b))


def test_reorthogonalization_keeps_digits():
    """In float32, fifty steps at condition 1e4: without it the directions lose their conjugacy."""
    matrix, b = matrix_of(np.geomspace(1.0, 1e-4, 60), 0)
    exact = np.linalg.solve(matrix, b)
    system = LinearSystem(lambda v: jnp.asarray(matrix, jnp.float32) @ v)
    errors = []
    for keep in (False, True):
        solver = hg.solvers.cg(60, 0.0, reorthogonalize=keep)
        x, _, _ = jax.jit(lambda b, s=solver: s.solve(system, b, s.init(b)))(jnp.asarray(b, jnp.float32))
        errors.append(float(np.linalg.norm(x - exact) / np.linalg.norm(exact)))
    assert errors[1] < 0.2 * errors[0]


class TestRecycled:
    @pytest.mark.parametrize("diagonal", [True, False])
    def test_becomes_exact_where_the_subspace_holds_the_outliers(self, diagonal, x64):
        """And stays so while a known diagonal moves by a factor of e."""
        matrix, b = matrix_of(np.concatenate([np.geomspace(1e3, 1e1, 8), np.full(32, 1e-6)]), 1)
        matrix, b = jnp.asarray(matrix), jnp.asarray(b)
        solver = hg.solvers.recycled_cg(4, 10, 1e-10)
        state, errors = solver.init(b), []

        @jax.jit
        def step(decay, state):
            known = (lambda: decay) if diagonal else (lambda: None)
            system = LinearSystem(lambda v: matrix @ v + decay * v, diagonal=known)
            return solver.solve(system, b, state)

        rng = np.random.default_rng(0)
        for i in range(12):
            decay = jnp.asarray(np.exp((i / 12 if diagonal else 0.0) * rng.uniform(size=40)))
            x, state, info = step(decay, state)
            exact = jnp.linalg.solve(matrix + jnp.diag(decay), b)
            errors.append(relative_error(x, exact))
            assert int(info.num_products) <= 5
        assert max(errors[-3:]) < 1e-6 < errors[0]

    def test_memory_is_two_blocks_of_vectors(self):
        state = hg.solvers.recycled_cg(3, 7).init({"w": jnp.ones((2, 3), jnp.bfloat16)})
        assert state.basis["w"].shape == state.products["w"].shape == (7, 2, 3)
        assert state.basis["w"].dtype == jnp.float32

    def test_what_is_refused(self):
        for bad in ({"max_products": 1, "rank": 2}, {"max_products": 3, "rank": 0}):
            with pytest.raises(ValueError, match=r"max_products|rank"):
                hg.solvers.recycled_cg(**bad)


@functools.cache
def accuracy():
    sys.path[:0] = [str(ROOT / "benchmarks" / "quality")]
    try:
        return runpy.run_path(str(ROOT / "benchmarks" / "quality" / "solver_accuracy.py"))
    finally:
        sys.path.pop(0)


TRAJECTORIES = [("decaying", 773, 10, 1e-6), ("decaying", 1e5, 20, 2e-3), ("flat", 400, 10, 6e-3),
                ("flat", 45_000, 50, 1e-3), ("outliers", 500, 10, 1e-5), ("outliers", 63_000, 20, 1e-6)]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "condition", "products", "target"),
    [pytest.param(*row, marks=[pytest.mark.slow] * (i > 0)) for i, row in enumerate(TRAJECTORIES)],
)
def test_recycled_along_an_outer_trajectory(name, condition, products, target, x64):
    found = accuracy()["trajectory"](name, condition, hg.solvers.recycled_cg(products, 50, 0.0))
    assert found["error"] <= target


def test_richardson_continues_from_solve_to_solve(x64):
    """One product an outer step converges over many, at the rate of gradient descent; momentum is faster."""
    matrix, b = matrix_of(np.geomspace(1.0, 0.05, 10), 0)
    matrix, b = jnp.asarray(matrix), jnp.asarray(b)
    system, residuals = LinearSystem(lambda v: matrix @ v), []
    for momentum in (0.0, 0.6):
        solver = hg.solvers.richardson(1, momentum=momentum)
        step, state = jax.jit(lambda state, s=solver: s.solve(system, b, state)), solver.init(b)
        counts = []
        for _ in range(60):
            _, state, info = step(state)
            counts.append(int(info.num_products))
        assert counts[0] == 13
        assert set(counts[1:]) == {2}
        residuals.append(float(info.residual))
    assert 1e-3 < residuals[0] < 0.1
    assert residuals[1] < 0.1 * residuals[0]


@pytest.mark.parametrize("scale", [1e20, 1e-20])
def test_richardson_from_a_start_that_cannot_be_squared_tells_its_residual(scale):
    """x is of the size 1/scale; the second right-hand side is the opposite of the first."""
    solver, b = hg.solvers.richardson(1), jnp.array([1.0, 2.0])
    system = hg.LinearSystem(lambda v: scale * v)
    solve = jax.jit(lambda b, state: solver.solve(system, b, state))
    _, state, _ = solve(b, solver.init(b))
    x, _, info = solve(-b, state)
    residual = jnp.linalg.norm(b + scale * x) / jnp.linalg.norm(b)
    np.testing.assert_allclose(info.residual, residual, atol=1e-5)


def test_richardson_that_diverges_says_so_and_starts_anew():
    """A matrix that grows by a thousand within one solve is followed by the next power iteration."""
    values, b = jnp.array([1.0, 0.5, 0.1]), jnp.ones(3)
    solver = hg.solvers.richardson(20)
    _, state, _ = solve_dense(solver, jnp.diag(values), b, solver.init(b))
    _, state, info = solve_dense(solver, jnp.diag(jnp.array([-5.0, 1.0, 1.0])), b, state)
    assert Status(int(info.status)) == Status.DIVERGED
    assert not any(leaf.any() for leaf in jax.tree.leaves(state.solution))


def test_gmres_equals_the_smallest_residual_of_the_krylov_space(x64):
    rng = np.random.default_rng(0)
    matrix, b = rng.normal(size=(9, 9)) + 3 * np.eye(9), rng.normal(size=9)
    system = LinearSystem(lambda v: jnp.asarray(matrix) @ v, symmetric=False)
    for steps in (1, 3, 6):
        solver = hg.solvers.gmres(steps + 1, 9, 0.0)
        x, _, info = jax.jit(lambda b, s=solver: s.solve(system, b, ()))(jnp.asarray(b))
        space = np.stack([np.linalg.matrix_power(matrix, k) @ b for k in range(steps)], 1)
        best = space @ np.linalg.lstsq(matrix @ space, b, rcond=None)[0]
        np.testing.assert_allclose(x, best, rtol=1e-6, atol=1e-9)
        assert int(info.num_products) == steps + 1


def test_gmres_restarts(x64):
    rng = np.random.default_rng(1)
    matrix, b = np.eye(30) + 0.6 * rng.normal(size=(30, 30)) / np.sqrt(30), rng.normal(size=30)
    system = LinearSystem(lambda v: jnp.asarray(matrix) @ v, symmetric=False)
    x, _, info = jax.jit(lambda b: hg.solvers.gmres(200, 5, 1e-9).solve(system, b, ()))(jnp.asarray(b))
    np.testing.assert_allclose(x, np.linalg.solve(matrix, b), rtol=1e-6, atol=1e-8)
    assert bool(info.converged)


def test_gmres_takes_back_a_cycle_that_gains_nothing():
    """On singular matrices, where rounding would send x to 1e8 and the residual above its start."""
    for solver in NOT_SYMMETRIC:
        x, _, info = solve_dense(solver, jnp.ones((2, 2)), jnp.array([1.0, 0.3]), ())
        assert float(info.residual) <= 1.0
        assert float(jnp.linalg.norm(x)) < 2.0
        for seed in range(4):
            rng = np.random.default_rng(seed)
            q, _ = np.linalg.qr(rng.normal(size=(12, 12)))
            singular = jnp.asarray((q * np.r_[np.linspace(1, 2, 11), 0]) @ q.T, jnp.float32)
            _, _, info = solve_dense(solver, singular, jnp.asarray(rng.normal(size=12), jnp.float32), ())
            assert float(info.residual) <= 1.0


@pytest.mark.parametrize(
    "solver",
    [
        hg.solvers.recycled_cg(3, 3),
        hg.solvers.cg(3, preconditioner=hg.preconditioners.jacobi()),
        hg.solvers.neumann(400, preconditioner=hg.preconditioners.jacobi()),
    ],
)
def test_a_diagonal_of_zeros_counts_as_none(solver):
    values, b = jnp.array([1.0, 2.0, 3.0]), jnp.ones(3)
    system, state = LinearSystem(lambda v: values * v, diagonal=lambda: jnp.zeros(3)), solver.init(b)
    step = jax.jit(lambda state: solver.solve(system, b, state))
    for _ in range(3):
        x, state, _ = step(state)
    np.testing.assert_allclose(x, b / values, rtol=1e-4)


def test_small_condition_number_in_float32_does_not_claim_more_digits_than_there_are():
    """A recurrence goes on falling where b − A x rests at the rounding."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(12, 12)))
    for solver in (hg.solvers.recycled_cg(10, 12, 1e-4), hg.solvers.cg(10, 1e-12, warm_start=True)):
        matrix, b = (q * np.logspace(0, -3, 12)) @ q.T, rng.normal(size=12)
        state = solver.init(jnp.asarray(b, jnp.float32))
        for _ in range(5):
            x, state, info = solve_dense(solver, jnp.asarray(matrix, jnp.float32), jnp.asarray(b, jnp.float32), state)
            stored = np.asarray(jnp.asarray(matrix, jnp.float32), float)
            true = np.linalg.norm(b - stored @ np.asarray(x, float)) / np.linalg.norm(b)
            rounding = 1e-6 * np.linalg.norm(np.asarray(x, float)) / np.linalg.norm(b)
            assert float(info.residual) == pytest.approx(true, rel=0.5, abs=10 * rounding)


def test_what_leaves_no_product_for_the_solve_is_refused():
    with pytest.raises(ValueError, match="at least 2 with relative_damping and a preconditioner"):
        hg.solvers.cg(1, relative_damping=0.01, preconditioner=hg.preconditioners.jacobi())
    with pytest.raises(ValueError, match="max_products of at least 3"):
        hg.solvers.gmres(2, 5, warm_start=True)


def test_full_precision_is_asked_for_unless_the_user_chose():
    """Visible in the program: what a GPU with TF32 or a TPU would do with it."""
    example = ridge()
    fn = hg.value_and_hypergrad(hg.implicit(example.problem))

    def call():
        run = lambda w: fn(w, example.variables.hyperparams, example.inner_batch, example.outer_batch, key=None)[0]  # noqa: E731
        return jax.jit(run).lower(example.variables.params).as_text()

    assert "HIGHEST" in call()
    with jax.default_matmul_precision("tensorfloat32"):
        assert "HIGHEST" not in call()


@pytest.mark.slow
def test_compare_solvers_ranks_them_on_a_network():
    example = ridge(spread=0.05)
    lines = []
    found = hg.diagnostics.compare_solvers(
        example.problem,
        example.variables,
        example.inner_batch,
        example.outer_batch,
        key=None,
        diagonal=lambda params, decay: decay,
        progress=lines.append,
    )
    rows = {row.name: row for row in found.rows}
    assert len(rows) == 12
    assert rows["cg(20)"].cosine > 0.999
    assert rows["cg(20)"].damping_cosine == 1.0
    assert rows["identity()"].cosine < rows["cg(20)"].cosine
    assert rows["cg(3), the default"].num_products == 3
    assert rows["cg(3), the default"].damping > 0
    assert 0 < rows["cg(3), the default"].damping_cosine <= 1.0
    assert np.isnan(rows["identity()"].residual)
    text = str(found)
    assert text.splitlines()[0].startswith("solver")
    assert "has a cosine of at least 0.95 from the fewest products" in found.advice
    assert any("cg(20)" in line for line in lines)
    assert hg.diagnostics.plot_comparison(found).axes[0].get_xscale() == "log"


def test_compare_solvers_takes_a_factorisation_for_a_small_part_of_many_weights(monkeypatch):
    """4,000 weights of which ten are solved for: the reference is not an iteration."""
    seen = []

    def counted(**options):
        seen.append(options)
        return hg.solvers.dense(**options)

    monkeypatch.setattr("hypergrad.diagnostics._solvers.dense", counted)
    target = jnp.arange(10.0)
    inner = lambda w, h, b, k: jnp.sum(jnp.exp(h) * w["few"] ** 2 - 2 * target * w["few"]) + jnp.sum(w["many"])  # noqa: E731
    problem = hg.BilevelProblem(inner, lambda w, h, b, k: jnp.sum(w["few"]))
    at = hg.BilevelParams({"few": target, "many": jnp.zeros(3990)}, jnp.zeros(10))
    solvers, trainable = {"identity()": hg.solvers.identity()}, {"few": True, "many": False}
    found = hg.diagnostics.compare_solvers(problem, at, (), (), key=None, solvers=solvers, trainable=trainable)
    assert found.rows[0].cosine == pytest.approx(1.0)
    assert seen == [{"damping": 0.0}]
    with pytest.raises(ValueError, match="trainable to be a tree prefix"):
        hg.diagnostics.compare_solvers(problem, at, (), (), key=None, solvers=solvers, trainable={"few": True})


@pytest.mark.slow
@pytest.mark.parametrize("smallest", [0.5, -0.05])
def test_compare_solvers_judges_undamped_solvers_where_h_is_indefinite(monkeypatch, smallest):
    """Beyond a factorisation's reach: an undamped reference where H > 0, the least damped that converges elsewhere."""
    monkeypatch.setattr("hypergrad.diagnostics._solvers._FEW", 0)
    curvature = jnp.linspace(smallest, 2.0, 12)
    inner = lambda w, h, b, k: 0.5 * jnp.sum(curvature * w**2) + 1e-9 * jnp.sum(w**4) + jnp.sum(h * w)  # noqa: E731
    problem = hg.BilevelProblem(inner, lambda w, h, b, k: jnp.sum((w - 1.0) ** 2))
    at = hg.BilevelParams(jnp.zeros(12), jnp.zeros(12))
    solvers = {"cg(20)": hg.solvers.cg(20), "default": hg.solvers.cg(3, relative_damping=0.01, warm_start=True)}
    lines = []
    found = hg.diagnostics.compare_solvers(problem, at, (), (), key=None, solvers=solvers, progress=lines.append)
    plain, default = found.rows
    slope = 2 * (at.params - 1.0)
    exact = -slope / (curvature + plain.reference_damping)
    (_, own), _ = hg.value_and_hypergrad(hg.implicit(problem, hg.solvers.cg(20)))(*at, (), (), key=None)
    want = float(own @ exact / jnp.linalg.norm(own) / jnp.linalg.norm(exact))
    assert plain.cosine == pytest.approx(want, abs=2e-3)
    assert default.cosine == default.cosine
    if smallest > 0:
        assert plain.reference_damping == 0.0
        assert plain.cosine == pytest.approx(1.0, abs=1e-4)
        assert not any("damped by" in line for line in lines)
    else:
        assert plain.reference_damping > -smallest
        assert plain.damping_cosine == pytest.approx(1.0)
        assert "H is indefinite or nearly singular here" in found.advice or "No solver reaches" in found.advice
        assert any("damped by 0.03 of" in line for line in lines)


@pytest.mark.parametrize(
    ("products", "ratio", "small"), [(5, 1e-8, 1e-5), (5, 1e-4, 1e-5), (5, 0.01, 1e-4), (3, 0.01, 1e-4)]
)
def test_a_few_damped_products_claim_no_smaller_residual_than_they_reach(products, ratio, small):
    """Five large eigenvalues and many small ones: the recurrence ends far below what float32 can reach."""
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(50, 50)))[0]
    matrix = rotation @ np.diag(np.where(np.arange(50) < 5, 1.0, small)) @ rotation.T
    narrow, solver = jnp.asarray(matrix, jnp.float32), hg.solvers.cg(products, relative_damping=ratio)
    system = LinearSystem(lambda v: jnp.matmul(narrow, v, precision="highest"))
    for seed in range(5):
        b = jnp.asarray(np.random.default_rng(seed).normal(size=50), jnp.float32)
        x, _, info = jax.jit(lambda b: solver.solve(system, b, solver.init(b)))(b)
        left = np.asarray(b, float) - matrix @ np.asarray(x, float) - float(info.damping) * np.asarray(x, float)
        true = np.linalg.norm(left) / np.linalg.norm(b)
        assert float(info.residual) > 0.5 * true
        assert bool(info.converged) <= (true < 2e-5)


CURVED = jnp.array([1.0, 2.0, 3.0, 4.0, -1.0, 5.0])


def compared(solvers, *, slope=None, weights=None, curvature=CURVED, **options):
    inner = lambda w, h, b, k: 0.5 * jnp.sum(curvature * w**2) + 0.1 * jnp.sum(w**4) + jnp.sum(h * w)  # noqa: E731
    problem = hg.BilevelProblem(inner, lambda w, h, b, k: jnp.sum(w * b))
    at = hg.BilevelParams(jnp.zeros(6) if weights is None else weights, jnp.ones(6))
    b = jnp.array([1.0, 1.0, 1.0, 1.0, 3.0, 1.0]) if slope is None else slope
    return hg.diagnostics.compare_solvers(problem, at, b, b, key=None, solvers=solvers, **options)


@pytest.mark.slow
def test_advice_follows_from_what_went_wrong():
    few, across = {"cg(20)": hg.solvers.cg(20)}, jnp.array([0.1, 0.1, 0.1, 0.1, 3.0, 0.1])
    assert "returned a hypergradient of zero: H is not positive definite" in compared(few, slope=across).advice
    assert "reference is zero here" in compared(few, slope=jnp.zeros(6)).advice
    assert "not finite at these weights" in compared(few, weights=jnp.full(6, jnp.nan)).advice
    later = compared(few, slope=jnp.array([1.0, 1.0, 1.0, 1.0, 0.1, 1.0])).advice
    assert "H is not positive definite here. A solve converges from a damping of" in later
    assert "relative_damping=0.3" in later
    slow = compared({"neumann(1)": hg.solvers.neumann(1)}, curvature=jnp.geomspace(1e-3, 1.0, 6)).advice
    assert "Allow more products" in slow


@pytest.mark.slow
def test_a_loss_in_bfloat16_can_be_compared():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(12, 5)), jnp.float32)
    predict = lambda w: (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32)  # noqa: E731
    outer = lambda w, h, b, k: 0.5 * jnp.mean((predict(w) - 1.0) ** 2)  # noqa: E731
    problem = hg.BilevelProblem(lambda w, h, b, k: outer(w, h, b, k) + hg.penalties.l2(w, jnp.exp(h)), outer)
    at = hg.BilevelParams(jnp.ones(5), jnp.zeros(5))
    found = hg.diagnostics.compare_solvers(problem, at, (), (), key=None, solvers={"cg(20)": hg.solvers.cg(20)})
    assert found.rows[0].cosine > 0.999


@pytest.mark.slow
def test_compare_solvers_takes_a_model_state_that_is_one_array():
    inner = lambda w, h, b, k, s: (0.5 * jnp.sum(CURVED * w**2) + jnp.sum((h + s) * w), s)  # noqa: E731
    problem = hg.BilevelProblem(inner, lambda w, h, b, k, s: (jnp.sum((w - 1.0) ** 2), s), stateful=True)
    at, solvers = hg.BilevelParams(jnp.zeros(6), jnp.ones(6)), {"cg(3)": hg.solvers.cg(3)}
    found = hg.diagnostics.compare_solvers(problem, at, (), (), key=None, solvers=solvers, model_state=jnp.zeros(6))
    assert found.rows[0].reference_damping > 0.0  # H is indefinite: its spectrum was looked at


def test_compare_solvers_checks_its_arguments():
    loss = lambda w, h, b, k, s: (jnp.sum(jnp.exp(h) * w**2) + 0 * s.sum(), s)  # noqa: E731
    stateful, at = hg.BilevelProblem(loss, loss, stateful=True), hg.BilevelParams(jnp.ones(2), jnp.zeros(2))
    with pytest.raises(ValueError, match="model_state for a stateful problem; got None"):
        hg.diagnostics.compare_solvers(stateful, at, (), (), key=None)
    with pytest.raises(TypeError, match="progress as a function"):
        compared({"cg(3)": hg.solvers.cg(3)}, progress=True)


def test_compare_solvers_refuses_what_is_no_solver():
    example = ridge()
    args = example.problem, example.variables, example.inner_batch, example.outer_batch
    for bad in ({}, {"cg": 3}, {3: hg.solvers.cg(3)}, [hg.solvers.cg(3)]):
        with pytest.raises(TypeError, match="solvers as a dict"):
            hg.diagnostics.compare_solvers(*args, key=None, solvers=bad)


def test_default_in_joint_training_lowers_the_outer_loss():
    example = ridge(spread=0.2)
    tx = hg.bilevel(
        hg.implicit(example.problem), inner_optimizer=optax.adam(1e-2), outer_optimizer=optax.adam(5e-2), every=5
    )

    @jax.jit
    def step(variables, state):
        updates, state = tx.update(
            None, state, variables, inner_batch=example.inner_batch, outer_batch=example.outer_batch
        )
        return optax.apply_updates(variables, updates), state

    variables, state = example.variables, tx.init(example.variables)
    first = float(example.value_at(variables.hyperparams))
    for _ in range(300):
        variables, state = step(variables, state)
    assert float(example.value_at(variables.hyperparams)) < first
    assert int(state.info.num_skipped) == 0
