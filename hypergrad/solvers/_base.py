"""The protocol of a linear solver, and what all solvers share.

    solve(matvec, b, state) -> (x, state, info)          A x = b, A given by v ↦ A v

A is the Hessian of an inner loss: symmetric, positive definite near a minimum, indefinite elsewhere. A solver
never returns NaN: where it breaks down it stops, returns its last finite iterate and says ``converged=False``.
``residual`` is the true ‖b − A x‖/‖b‖, of the matrix with ``damping`` added where that is asked for.

Vectors are trees like b in ``promote_types(leaf dtype, float32)``; nothing is raveled. The right-hand side
is multiplied by a power of two first, which is exact, so that tiny gradients do not underflow in dot products
and scaling A and b together changes nothing.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import lax

from hypergrad import tree, validate
from hypergrad.types import Array, MatVec, PyTree


class SolveInfo(NamedTuple):
    """What a linear solve did.

    Attributes:
      num_steps: int32 scalar, terms or iterations taken; −1 where a foreign solver does not tell.
      residual: scalar, the true ‖b − A x‖/‖b‖; 0 where b = 0; inf where b or A x is not finite.
      converged: bool scalar. ``residual ≤ rtol`` for cg, dense and foreign solvers; finite and below 1 for
        neumann and identity.
    """

    num_steps: Array
    residual: Array
    converged: Array


class LinearSolver(NamedTuple):
    """A solver for A x = b on pytrees, as two pure functions.

    Attributes:
      init: ``init(b_like) -> solver_state``, a pytree of arrays; ``b_like`` gives structure and shapes only.
      solve: ``solve(matvec, b, solver_state) -> (x, solver_state, SolveInfo)``.
    """

    init: Callable[[PyTree], PyTree]
    solve: Callable[[MatVec, PyTree, PyTree], tuple[PyTree, PyTree, SolveInfo]]


ScaledSolve: TypeAlias = Callable[[MatVec, PyTree, Array, PyTree], tuple[PyTree, PyTree, Array, Array]]
"""``(matvec, b, ‖b‖, state) -> (x, state, num_steps, ‖b − A x‖)``: what a solver's own file supplies."""


def assemble(
    init: Callable[[PyTree], PyTree],
    solve_scaled: ScaledSolve,
    *,
    damping: float = 0.0,
    rtol: float | None = None,
) -> LinearSolver:
    """Build a ``LinearSolver`` from the solution of a well-scaled system.

    Handles what is common: precision, scaling, ``damping``, b = 0, a right-hand side that is not finite
    or a solution that overflows (x = 0, residual inf), a residual that is not a number (inf), and the verdict.

    Args:
      init: makes the state from a tree like b.
      solve_scaled: solves for a b whose largest entry is about 1, or b = 0. Its x is finite (0 for b = 0), its
        residual may be anything.
      damping: δ ≥ 0; the system solved is (A + δI) x = b.
      rtol: the residual up to which a solve counts as converged; None: any residual below 1.
    """
    validate.number("damping", damping, low=0.0)
    if rtol is not None:
        validate.number("rtol", rtol, low=0.0)

    def solve(matvec: MatVec, b: PyTree, state: PyTree) -> tuple[PyTree, PyTree, SolveInfo]:
        b = tree.promote(b)
        top = tree.max_abs(b)
        finite, present = jnp.isfinite(top), top >= jnp.finfo(top.dtype).tiny
        power = _power_of_two(jnp.where(finite & present, top, 1.0))
        # A quotient of scalars: XLA computes it once, where it would repeat a select inside every leaf's kernel.
        shrink = jnp.where(finite & present, 1.0, 0.0).astype(power.dtype) / power
        b = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x * shrink.astype(x.dtype), 0.0), b)
        size = tree.norm(b)

        x, state, num_steps, remainder = solve_scaled(_damped(matvec, b, damping), b, size, state)
        fits = jnp.isfinite(tree.max_abs(x) * power)
        x = tree.scale(x, jnp.where(fits, power, 0.0))
        residual = jnp.where(size > 0, remainder / jnp.where(size > 0, size, 1.0), 0.0)
        residual = jnp.where(finite & fits & ~jnp.isnan(residual), residual, jnp.inf)
        converged = residual < 1.0 if rtol is None else residual <= rtol
        return x, state, SolveInfo(num_steps.astype(jnp.int32), residual, converged)

    return LinearSolver(init, solve)


def _power_of_two(x: Array) -> Array:
    """Return the power of two nearest to x > 0, kept where it and its reciprocal are normal numbers."""
    info = jnp.finfo(x.dtype)
    power = lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=0)
    largest = 2.0 ** (info.maxexp - 28)
    return jnp.clip(power, 1.0 / largest, largest)


def normalized(x: PyTree, size: Array) -> PyTree:
    """Return x / ‖b‖: the form in which a solution is kept for a later solve, whose b has another size."""
    return tree.scale(x, 1.0 / jnp.where(size > 0, size, 1.0))


class Progress(Protocol):
    """The part of a solver's loop variables that ``iterate`` reads."""

    @property
    def num_steps(self) -> Array:
        """Steps taken so far."""
        ...

    @property
    def done(self) -> Array:
        """Whether to stop."""
        ...


LoopVars = TypeVar("LoopVars", bound=Progress)


def iterate(step: Callable[[LoopVars], LoopVars], start: LoopVars, *, length: int, unroll: int | bool) -> LoopVars:
    """Apply ``step`` until ``done`` or ``length`` times; ``step`` counts ``num_steps`` itself.

    With ``unroll=1`` a ``while_loop``: steps that are not needed cost nothing, under ``vmap`` too, and the
    loop variables are updated in place, where a scan whose body is a ``cond`` copies them (dearer by up to a
    fifth in time and 1.4 times in scratch memory: ``benchmarks/results/hessian_modes.md``). It has no
    reverse-mode derivative. With any other value a scan so unrolled, which has one, and whose steps after
    ``done`` are computed and discarded: for convolutions on CPU, which XLA runs several times slower inside a
    loop (or a ``cond``) than outside.
    """
    if unroll is not True and unroll == 1:
        return lax.while_loop(lambda c: ~c.done & (c.num_steps < length), step, start)
    final, _ = lax.scan(lambda c, _: (optax.tree.where(c.done, c, step(c)), None), start, length=length, unroll=unroll)
    return final


def no_state(_: PyTree) -> PyTree:
    """Return the state of a solver that keeps none."""
    return ()


def _damped(matvec: MatVec, b: PyTree, damping: float) -> MatVec:
    def product(vector: PyTree) -> PyTree:
        result = matvec(vector)
        validate.same_structure("matvec(v)", result, "b", b)
        result = optax.tree.cast_like(result, b)
        static_zero = isinstance(damping, int | float) and damping == 0
        return result if static_zero else tree.add_scaled(result, damping, vector)

    return product
