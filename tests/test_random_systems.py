"""Laws of every solver on random systems: no NaN, no status that lies, no conjugate gradients that climb."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hypergrad as hg
from hypergrad.solvers import LinearSystem, Status

SIZE = 6
SPLITS = {"one leaf": (6,), "leaves": (3, 2, 1)}
JACOBI, NYSTROM = hg.preconditioners.jacobi(), hg.preconditioners.nystrom(2, every=2)
CONJUGATE = {
    "default": (hg.solvers.cg(3, relative_damping=0.01, warm_start=True), 1e-5),
    "cg": (hg.solvers.cg(5), 1e-5),
    "warm": (hg.solvers.cg(4, warm_start=True, damping=0.1), 1e-5),
    "kept": (hg.solvers.cg(8, 1e-6, reorthogonalize=True), 1e-6),
    "jacobi": (hg.solvers.cg(3, relative_damping=0.03, preconditioner=JACOBI), 1e-5),
    "nystrom": (hg.solvers.cg(3, warm_start=True, preconditioner=NYSTROM), 1e-5),
    "recycled": (hg.solvers.recycled_cg(3, 2), 1e-12),
    "recycled, damped": (hg.solvers.recycled_cg(4, 3, 1e-5, relative_damping=0.01), 1e-5),
}
OTHERS = {
    "neumann": (hg.solvers.neumann(5), 1e-5),
    "neumann, jacobi": (hg.solvers.neumann(5, preconditioner=JACOBI), 1e-5),
    "neumann, nystrom": (hg.solvers.neumann(5, preconditioner=NYSTROM), 1e-5),
    "richardson": (hg.solvers.richardson(2, relative_damping=0.01), 1e-5),
    "richardson, momentum": (hg.solvers.richardson(1, momentum=0.7), 1e-5),
    "gmres": (hg.solvers.gmres(8, 3), 1e-5),
    "gmres, warm": (hg.solvers.gmres(6, 6, warm_start=True), 1e-5),
    "dense": (hg.solvers.dense(damping=0.1), 1e-5),
}
SPECTRA = {
    "definite": lambda rng: np.geomspace(1.0, 10.0 ** -rng.uniform(0, 4), SIZE),
    "clustered": lambda rng: np.where(np.arange(SIZE) < 2, 1.0, 10.0 ** -rng.uniform(0, 3)),
    "indefinite": lambda rng: rng.normal(size=SIZE),
    "negative": lambda rng: -np.geomspace(1.0, 1e-2, SIZE),
    "singular": lambda rng: np.where(np.arange(SIZE) < rng.integers(0, SIZE), rng.uniform(0.1, 1, SIZE), 0.0),
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def split(vector, sizes, dtype):
    """Return a vector as a tree; leaves of one number are scalars."""
    parts = np.split(np.asarray(vector), np.cumsum(sizes)[:-1])
    return {f"p{i}": jnp.asarray(part[0] if len(part) == 1 else part, dtype) for i, part in enumerate(parts)}


def joined(tree):
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@functools.partial(jax.jit, static_argnums=(0, 1))
def solve(solver, sizes, matrix, b, state, key):
    """Compiled once per solver, split and dtype."""

    def matvec(v):
        flat = jnp.matmul(matrix, joined(v), precision="highest")
        return restored(flat, v)

    system = LinearSystem(matvec, key=key, diagonal=lambda: restored(jnp.diag(matrix), b))
    return solver.solve(system, b, state)


def restored(flat, like):
    leaves, start = [], 0
    for leaf in jax.tree.leaves(like):
        leaves.append(jnp.reshape(flat[start : start + leaf.size], leaf.shape))
        start += leaf.size
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def energy(matrix, b, x):
    return 0.5 * x @ matrix @ x - b @ x


def check(solver, rtol, sizes, seed, spectrum, dtype, scale, *, climbs, bounded=False):
    """Solve twice, the second time from the state of the first, with another matrix and right-hand side."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))
    state, start = None, np.zeros(SIZE)  # start: where a warm solver starts, over the norm of b
    for _ in range(2):
        matrix = jnp.asarray(q @ np.diag(SPECTRA[spectrum](rng)) @ q.T, jnp.float32)
        b = split(scale * rng.normal(size=SIZE) * (rng.uniform() > 0.1), sizes, dtype)  # 0 at times
        state = solver.init(b) if state is None else state
        x, state, info = solve(solver, sizes, matrix, b, state, jax.random.key(seed))
        status, residual = Status(int(info.status)), float(info.residual)
        right, found = (np.asarray(joined(v), np.float64) for v in (b, x))
        damped = np.asarray(matrix, np.float64) + float(info.damping) * np.eye(SIZE)
        stiffness, size = np.linalg.norm(damped, 2), np.linalg.norm(right)

        assert np.isfinite(found).all()
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state))
        if status == Status.NOT_FINITE:
            assert residual == np.inf
            assert not found.any()
            start = np.zeros(SIZE)
            continue
        assert (status == Status.CONVERGED) == (residual <= rtol)
        if size == 0:
            assert not found.any()
            start = np.zeros(SIZE)
            continue
        # What float32 can tell: the products, and for the series the sum, are rounded.
        rounding = 1e-6 * (1 + stiffness * np.linalg.norm(found) / size)
        true = np.linalg.norm(right - damped @ found) / size
        if bounded:  # a few damped products spend none on the residual, and report a bound of it
            assert true <= 1.01 * residual + 10 * rounding
            assert residual <= 1.01 * true + 40 * rounding
        else:
            assert residual == pytest.approx(true, rel=1e-2, abs=10 * rounding)
        if not climbs:
            of_start = np.linalg.norm(right - damped @ start * size) / size
            warm, cold = energy(damped, right, start * size), 0.0
            limit = warm if of_start < 2.97 else cold if of_start > 3.03 else max(warm, cold)
            room = 10 * rounding * size * np.linalg.norm(found)
            assert energy(damped, right, found) <= limit + room
            keeps = hasattr(state, "solution") and state.solution != ()
            start = found / size if keeps else np.zeros(SIZE)


cases = given(
    seed=st.integers(0, 10**6),
    spectrum=st.sampled_from(sorted(SPECTRA)),
    split_name=st.sampled_from(sorted(SPLITS)),
    dtype=st.sampled_from(sorted(DTYPES)),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
)


def one_of_each(names, *fast):
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in fast)) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("name", one_of_each(CONJUGATE, "default"))
@settings(max_examples=40)
@cases
def test_conjugate_gradients_never_climb_and_never_lie(name, seed, spectrum, split_name, dtype, scale):
    solver, rtol = CONJUGATE[name]
    where = SPLITS[split_name], seed, spectrum, DTYPES[dtype], scale
    check(solver, rtol, *where, climbs=False, bounded=name == "default")


@pytest.mark.parametrize("name", one_of_each(OTHERS, "richardson"))
@settings(max_examples=40)
@cases
def test_no_status_lies(name, seed, spectrum, split_name, dtype, scale):
    solver, rtol = OTHERS[name]
    check(solver, rtol, SPLITS[split_name], seed, spectrum, DTYPES[dtype], scale, climbs=True)
