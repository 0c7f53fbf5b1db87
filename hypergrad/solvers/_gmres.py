"""GMRES(m): the x of smallest residual in the Krylov space of b, for an A that need not be symmetric.

    A V_j = V_{j+1} H̄_j  (Arnoldi),     x = x₀ + V_j y,     y = argmin ‖β e₁ − H̄_j y‖

Use it for inner problems given by a residual that is no gradient: fixed points, proximal and projected gradients.
A is only needed by its products, never its transpose.

Reference: Saad & Schultz, GMRES: a generalized minimal residual algorithm for solving nonsymmetric linear systems,
SIAM J. Sci. Stat. Comput. 7(3), 1986.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from hypergrad import tree, validate
from hypergrad.solvers import _block
from hypergrad.solvers._base import (
    WORST_START,
    LinearSolver,
    ScaledSystem,
    Solution,
    Status,
    WarmStart,
    assemble,
    divide,
    iterate,
    normalized,
)
from hypergrad.types import Array, PyTree

__all__ = ["gmres"]

_GAIN = 0.999  # a cycle that reduces the residual by less is taken back, and ends the solve


def gmres(
    max_products: int, restart: int, rtol: float = 1e-5, *, warm_start: bool = False, unroll: int | bool = 1
) -> LinearSolver:
    """Solve A x = b by GMRES, restarted every ``restart`` steps, until ‖b − A x‖ ≤ rtol·‖b‖.

    Args:
      max_products: largest number of products with A, ≥ 2, or ≥ 3 with ``warm_start``. One at the end of every cycle
        measures the residual.
      restart: m ≥ 1, the dimension of the Krylov space. Memory: m + 1 vectors; XLA on CPUs holds about twice as many.
        Cost per step, besides the product: up to 4m vector operations.
      rtol: relative residual at which to stop, ≥ 0. float32 reaches about 1e-6.
      warm_start: start from the previous solution, if its residual is below 3 ‖b‖; measuring that takes one product.
      unroll: True or an int for a scan so unrolled, in which steps after convergence are paid for
        (convolutions on CPU); 1 is a loop that stops early.

    Returns:
      A ``LinearSolver``, whose ``residual`` is measured. The residual never increases from one cycle to the next. If a
      cycle reduces the residual by less than 0.1 %, the solver discards this cycle and stops. This happens when A is
      singular, and it can happen when ``restart`` is smaller than the number of unknowns.

    Raises:
      ValueError: ``max_products`` too small, ``restart`` < 1, ``rtol`` < 0.
      TypeError: one of them is not a number.

    Valid when A is invertible; on a singular one x may have a large part that A does not see. Fast when the eigenvalues
    of A lie in few clusters away from 0, as those of a contraction's I − ∂T/∂w do.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> turn = jnp.array([[1.0, -2.0], [2.0, 1.0]])
    >>> solver, b = gmres(10, restart=5), jnp.array([5.0, 0.0])
    >>> x, _, info = solver.solve(hg.solvers.LinearSystem(lambda v: turn @ v, symmetric=False), b, solver.init(b))
    >>> [round(float(v), 4) for v in x], int(info.num_products)
    ([1.0, -2.0], 3)

    Reference: Saad & Schultz, 1986.
    """
    validate.positive_int("max_products", max_products)
    validate.positive_int("restart", restart)
    validate.unroll(unroll)
    least = 3 if warm_start else 2
    if max_products < least:
        fix = f"The last product measures the residual, and one more a warm start: pass max_products={least} or more."
        raise ValueError(validate.message(f"max_products of at least {least}", str(max_products), fix))

    def init(b_like: PyTree) -> PyTree:
        return WarmStart(tree.promoted_zeros_like(b_like)) if warm_start else ()

    def solve_scaled(scaled: ScaledSystem, state: PyTree) -> Solution:
        stop = rtol if scaled.limit is None else scaled.limit
        b, size, dtype = scaled.b, scaled.size, scaled.size.dtype
        guess = tree.scale(state.solution, size) if warm_start else tree.promoted_zeros_like(b)
        trial = (tree.norm(guess) > 0) if warm_start else jnp.array(False)
        empty = _Cycle(
            x=guess,
            before=tree.promoted_zeros_like(b),
            basis=_first(_block.zeros(b, restart + 1), b, size),
            triangle=jnp.eye(restart, dtype=dtype),
            rotations=jnp.zeros((restart, 2), dtype),
            target=jnp.zeros(restart + 1, dtype).at[0].set(size),
            place=jnp.zeros((), jnp.int32),
            remainder=b,
            residual=jnp.ones((), dtype),
            num_products=jnp.zeros((), jnp.int32),
            measuring=trial,
            done=(size == 0) | (~trial & (stop >= 1.0)),
        )

        def step(c: _Cycle) -> _Cycle:
            at = jax.tree.map(lambda rows: rows[c.place], c.basis)
            image = scaled.matvec(optax.tree.where(c.measuring, c.x, at))
            return optax.tree.where(
                c.measuring,
                _measured(scaled, c, image, stop, max_products),
                _extended(c, image, stop * size, max_products),
            )

        final = iterate(step, empty, length=max_products, unroll=unroll)
        kept = WarmStart(normalized(final.x, size)) if warm_start else ()
        status = jnp.where(jnp.isfinite(final.residual), Status.TRUNCATED, Status.NOT_FINITE)
        return Solution(final.x, kept, final.num_products, final.remainder, final.residual, status)

    return assemble(init, solve_scaled, rtol=rtol)


class _Cycle(NamedTuple):
    x: PyTree
    before: PyTree  # x at the start of the cycle
    basis: PyTree  # V, orthonormal
    triangle: Array  # R of the QR factorisation of H̄; the identity beyond ``place``
    rotations: Array  # its Givens rotations (cos, sin)
    target: Array  # Qᵀ β e₁; the entry at ``place`` is the norm of the residual
    place: Array  # j
    remainder: PyTree
    residual: Array
    num_products: Array
    measuring: Array  # the next product is A x
    done: Array


def _first(basis: PyTree, remainder: PyTree, size: Array) -> PyTree:
    return _block.put(basis, normalized(remainder, size), jnp.zeros((), jnp.int32))


def _measured(scaled: ScaledSystem, c: _Cycle, image: PyTree, stop: Any, max_products: int) -> _Cycle:
    """Begin a cycle at x, with its measured residual."""
    remainder = tree.add_scaled(scaled.b, -1.0, image)
    size = tree.norm(remainder)
    dropped = (c.num_products == 0) & ~(size < WORST_START * scaled.size)
    zeros = tree.promoted_zeros_like(c.x)
    x, remainder = optax.tree.where(dropped, (zeros, scaled.b), (c.x, remainder))
    size = jnp.where(dropped, scaled.size, size)
    # The remainder at the start of the cycle is its first basis vector times its norm.
    first, old = jax.tree.map(lambda rows: rows[0], c.basis), c.residual * scaled.size
    worse = (c.num_products > 0) & jnp.isfinite(size) & (size >= _GAIN * old)
    x, remainder = optax.tree.where(worse, (c.before, tree.scale(first, old)), (x, remainder))
    size = jnp.where(worse, old, size)
    residual, count = divide(size, scaled.size), c.num_products + 1
    return _Cycle(
        x=x,
        before=x,
        basis=_first(jax.tree.map(jnp.zeros_like, c.basis), remainder, size),
        triangle=jnp.eye(len(c.triangle), dtype=c.triangle.dtype),
        rotations=jnp.zeros_like(c.rotations),
        target=jnp.zeros_like(c.target).at[0].set(size),
        place=jnp.zeros_like(c.place),
        remainder=remainder,
        residual=residual,
        num_products=count,
        measuring=jnp.zeros_like(c.measuring),
        done=worse
        | ~(residual > stop)
        | (count >= max_products - 1),  # a cycle takes a product, and measuring it another
    )


def _extended(c: _Cycle, image: PyTree, goal: Array, max_products: int) -> _Cycle:
    """Take one Arnoldi step; at the end of the cycle, move x."""
    length = len(c.triangle)
    before = tree.norm(image)
    column = jnp.zeros(length + 1, c.target.dtype)
    for _ in range(2):  # once is not enough (Kahan and Parlett)
        shares = _block.inner(c.basis, image)
        image, column = tree.add_scaled(image, -1.0, _block.combine(c.basis, shares)), column + shares
    left = tree.norm(image)
    exhausted = ~(left > 10 * jnp.finfo(left.dtype).eps * before)  # the space holds the solution
    left = jnp.where(exhausted, 0.0, left)
    column = column.at[c.place + 1].set(left)

    def rotate(i: Array, column: Array) -> Array:
        cos, sin = c.rotations[i, 0], c.rotations[i, 1]
        low, high = column[i], column[i + 1]
        turned = column.at[i].set(cos * low + sin * high).at[i + 1].set(cos * high - sin * low)
        return jnp.where(lax.convert_element_type(i, jnp.int32) < c.place, turned, column)

    column = lax.fori_loop(0, length, rotate, column)
    low = column[c.place]
    # √(low² + left²) without overflow; jnp.hypot computes 0/0 where both are 0.
    longer, shorter = jnp.maximum(jnp.abs(low), jnp.abs(left)), jnp.minimum(jnp.abs(low), jnp.abs(left))
    radius = longer * jnp.sqrt(1 + divide(shorter, longer) ** 2)
    cos, sin = jnp.where(radius > 0, divide(low, radius), 1.0), divide(left, radius)
    target = c.target.at[c.place + 1].set(-sin * c.target[c.place]).at[c.place].multiply(cos)
    upper = jnp.where(jnp.arange(length, dtype=jnp.int32) < c.place, column[:length], 0.0).at[c.place].set(radius)
    triangle = c.triangle.at[:, c.place].set(upper)
    basis = _block.put(c.basis, normalized(image, left), c.place + 1)
    place, count = c.place + 1, c.num_products + 1
    ended = exhausted | ~(jnp.abs(target[place]) > goal) | (place >= length) | (count >= max_products - 1)
    # A zero on the diagonal belongs to a direction that A does not move: no step along it.
    diagonal = jnp.diag(triangle)
    smallest = jnp.finfo(diagonal.dtype).eps ** 0.5 * jnp.max(jnp.abs(triangle))  # below, x would be rounding
    usable = (jnp.arange(length, dtype=jnp.int32) < place) & (diagonal > smallest)
    safe = jnp.where(usable[:, None], triangle, jnp.eye(length, dtype=triangle.dtype))
    shares = lax.linalg.triangular_solve(safe, jnp.where(usable, target[:length], 0.0)[:, None], left_side=True)[:, 0]
    moved = tree.add_scaled(c.x, 1.0, _block.combine(c.basis, jnp.append(shares, jnp.zeros_like(left))))
    return c._replace(
        x=optax.tree.where(ended, moved, c.x),
        basis=basis,
        triangle=triangle,
        rotations=c.rotations.at[c.place].set(jnp.stack([cos, sin])),
        target=target,
        place=place,
        num_products=count,
        measuring=ended,
    )
