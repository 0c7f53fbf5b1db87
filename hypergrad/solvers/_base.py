"""The protocol of a linear solver, and what all solvers share.

    solve(system, b, state) -> (x, state, info)          A x = b, A given by v ↦ A v

A is the Hessian of an inner loss: symmetric, positive definite near a minimum, indefinite elsewhere. x is never
NaN: a solver that breaks down stops, returns its last accepted iterate, and reports why in ``info.status``.

Vectors are trees like b in ``promote_types(leaf dtype, float32)``; nothing is raveled. The right-hand side is
multiplied by a power of two first, which is exact, so that small gradients do not underflow in dot products and
scaling A and b together changes nothing.
"""

import enum
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import lax

from hypergrad import tree, validate
from hypergrad.types import Array, MatVec, PyTree

__all__ = [
    "DIVERGED",
    "LinearSolver",
    "LinearSystem",
    "Preconditioner",
    "ScaledSystem",
    "SolveInfo",
    "Solution",
    "Status",
    "WORST_START",
    "WarmStart",
    "at_most_once",
    "assemble",
    "blank_info",
    "check_preconditioner",
    "divide",
    "iterate",
    "normalized",
    "refuse_asymmetric",
    "shifted_diagonal",
]


WORST_START = 3.0  # a warm start whose residual is larger is dropped; a bound of 1 drops nearly all on mini-batches
DIVERGED = 1e3  # a residual that grew this far only grows: ‖(I − αA)ᵏ b‖ is log-convex in k


class Status(enum.IntEnum):
    """Why a solve ended. ``Status(int(info.status)).name`` is its printable name.

    CONVERGED: the residual is at most rtol, or at most ``tolerance`` where one is given.
    TRUNCATED: x is finite, but the products, or the digits of the dtype, ran out first.
    INDEFINITE: stopped at a direction of curvature that is negative, or zero to rounding.
    DIVERGED: stopped because the error of the iteration grows.
    NOT_FINITE: b or A x is not finite, or x overflows. x is 0 and the residual inf.
    """

    CONVERGED = 0
    TRUNCATED = 1
    INDEFINITE = 2
    DIVERGED = 3
    NOT_FINITE = 4


class LinearSystem(NamedTuple):
    """The matrix A of A x = b, and what is known about it. It holds functions: close over it under ``jit``.

    Attributes:
      matvec: ``v -> A v`` on trees like b.
      symmetric: whether A is symmetric.
      key: random key for solvers that draw numbers, or None.
      diagonal: ``() -> tree`` like b, an approximate diagonal of A; it returns None where none is known.
      inner_state: the state of the inner optimizer, for preconditioners that read it, or None.
      precision: dtype in which products are computed, where it is lower than that of the vectors, or None.
      matvec_at: None, or ``(k, v) -> A_k v``: the matrix of product k is another one (``hg.FreshBatches``).
    """

    matvec: MatVec
    symmetric: bool = True
    key: Array | None = None
    diagonal: Callable[[], PyTree | None] = lambda: None
    inner_state: PyTree = None
    precision: Any = None
    matvec_at: Callable[[Array, PyTree], PyTree] | None = None


class SolveInfo(NamedTuple):
    """Diagnostics of one linear solve, of the system (A + δI) x = b.

    Attributes:
      num_products: int32 scalar, products with A, set-up included; −1 where a wrapped solver does not tell.
      residual: scalar, ‖b − (A + δI) x‖/‖b‖; 0 where b = 0, inf for ``NOT_FINITE``, NaN where not measured. Where
        products are computed in a lower precision than the vectors, at least the machine epsilon of it.
      undamped_residual: scalar, ‖b − A x‖/‖b‖, with the same exceptions.
      damping: scalar, δ.
      status: int32 scalar, a ``Status``.
    """

    num_products: Array
    residual: Array
    undamped_residual: Array
    damping: Array
    status: Array

    @property
    def converged(self) -> Array:
        """Whether ``status`` is ``CONVERGED``: a bool array of the shape of ``status``."""
        return self.status == Status.CONVERGED


class LinearSolver(NamedTuple):
    """A solver for A x = b on pytrees, as two pure functions.

    Attributes:
      init: ``init(b_like) -> state``, a pytree of arrays; ``b_like`` gives structure and shapes only.
      solve: ``solve(system, b, state, *, tolerance=None) -> (x, state, SolveInfo)``. ``tolerance`` is absolute, on
        ‖b − A x‖, and replaces the solver's relative one. A state that is not finite counts as a new one.
    """

    init: Callable[[PyTree], PyTree]
    solve: Callable[..., tuple[PyTree, PyTree, SolveInfo]]


class WarmStart(NamedTuple):
    """State of a solver that starts from its previous solution.

    Attributes:
      solution: tree like b, the last x divided by ‖b‖; zeros at first.
    """

    solution: PyTree


class Preconditioner(NamedTuple):
    """A preconditioner as two pure functions.

    Attributes:
      init: ``init(b_like) -> state``, a pytree of arrays.
      prepare: ``prepare(system, b_like, damping, largest, state) -> (apply, state, num_products)`` before each solve.
        ``apply(r)`` is M⁻¹ r, symmetric positive definite; M approximates A + δI, ``damping`` is δ, and ``largest`` a
        lower bound of ‖A‖, 0 where none is known. ``num_products`` counts the products that it took.
    """

    init: Callable[[PyTree], PyTree]
    prepare: Callable[[LinearSystem, PyTree, Array, Array, PyTree], tuple[MatVec, PyTree, Array]]


class ScaledSystem(NamedTuple):
    """What a solver's own file is asked to solve: (A + δI) x = b with ‖b‖ between 0.5 and 2, or b = 0.

    ``matvec`` includes the constant damping, ``system.matvec`` does not; both return the dtypes of b. ``size`` is ‖b‖,
    ``limit`` the given tolerance over ‖b‖, or None. ``damping`` is the constant one.
    """

    matvec: MatVec
    b: PyTree
    size: Array
    limit: Array | None
    system: LinearSystem
    damping: float

    def product(self, place: Array, vector: PyTree) -> PyTree:
        """Return the product with the matrix of this place in the iteration."""
        if self.system.matvec_at is None:
            return self.matvec(vector)
        result = optax.tree.cast_like(self.system.matvec_at(place, vector), self.b)
        return result if _is_zero(self.damping) else tree.add_scaled(result, self.damping, vector)

    def measure(self, x: PyTree) -> tuple[PyTree, Array]:
        """Return b − (A + δI) x and its norm over ‖b‖, by one product."""
        remainder = tree.add_scaled(self.b, -1.0, self.matvec(x))
        return remainder, divide(tree.norm(remainder), self.size)


class Solution(NamedTuple):
    """What it returns: x may hold anything, the state is finite.

    ``remainder`` is the vector b − (A + δI) x, ``residual`` its norm over ‖b‖; None and NaN where not measured.
    ``damping`` is what the solver added to A by itself: δ is the sum of it and of the constant damping.
    """

    x: PyTree
    state: PyTree
    num_products: Any
    remainder: PyTree
    residual: Any
    status: Any = Status.TRUNCATED
    damping: Any = 0.0


def assemble(
    init: Callable[[PyTree], PyTree],
    solve_scaled: Callable[[ScaledSystem, PyTree], Solution],
    *,
    damping: float = 0.0,
    rtol: float = 1e-5,
    averages: bool = False,
) -> LinearSolver:
    """Build a ``LinearSolver`` from the solution of a well-scaled system.

    Handles what is common: precision, scaling, ``damping``, ``tolerance``, b = 0, states, right-hand sides and
    solutions that are not finite, the undamped residual, and the status.

    Args:
      init: makes the state from a tree like b.
      solve_scaled: ``(scaled_system, state) -> Solution``.
      damping: δ ≥ 0; the system solved is (A + δI) x = b.
      rtol: the residual up to which a solve without ``tolerance`` counts as converged.
      averages: whether each product may have a matrix of its own; the residual is not measured then.
    """
    validate.number("damping", damping, low=0.0)
    validate.number("rtol", rtol, low=0.0)

    def solve(
        system: LinearSystem, b: PyTree, state: PyTree, *, tolerance: Any = None
    ) -> tuple[PyTree, PyTree, SolveInfo]:
        b = tree.promote(b)
        size = tree.scaled_norm(b)
        finite = jnp.isfinite(size)
        usable = finite & (size >= jnp.finfo(size.dtype).tiny)
        power = _power_of_two(jnp.where(usable, size, 1.0))
        b = jax.tree.map(lambda x: jnp.where(usable, x / power.astype(x.dtype), 0.0), b)
        size, limit = jnp.where(usable, size, 0.0) / power, None
        if tolerance is not None:
            validate.number("tolerance", tolerance, low=0.0)
            limit = divide(jnp.asarray(tolerance, size.dtype) / power, size)

        system = system._replace(matvec=_checked(system.matvec, b))
        scaled = ScaledSystem(_damped(system.matvec, damping), b, size, limit, system, damping)
        if system.matvec_at is not None and not averages:
            fix = "Use hg.solvers.neumann or hg.solvers.richardson with hg.FreshBatches, or pass one solve_batch."
            raise ValueError(validate.message("one matrix for all products of this solver", "FreshBatches", fix))
        given = optax.tree.where(tree.all_finite(state), state, init(b))
        x, state, num_products, remainder, residual, status, own_damping = solve_scaled(scaled, given)
        total_damping = own_damping + damping
        if system.matvec_at is not None and not tree.refuses_nan():
            remainder, residual = None, jnp.nan
        if system.precision is not None:  # a recurrence tells nothing of the products' own rounding
            residual = jnp.maximum(residual, float(jnp.finfo(system.precision).eps))
        residual = undamped = jnp.where(size > 0, residual, 0.0).astype(size.dtype)
        if remainder is not None and not _is_zero(total_damping):
            undamped = divide(tree.norm(tree.add_scaled(remainder, total_damping, x)), size)
            if system.precision is not None:
                undamped = jnp.maximum(undamped, jnp.where(size > 0, float(jnp.finfo(system.precision).eps), 0.0))
        is_valid = finite & tree.all_finite(tree.scale(x, power)) & (status != Status.NOT_FINITE)
        is_valid &= jnp.isfinite(residual) | (remainder is None)
        is_zero = finite & (size == 0)
        is_valid |= is_zero
        state = optax.tree.where(is_valid, state, given)  # one bad batch must not cost a warm start
        x = jax.tree.map(lambda leaf: jnp.where(is_valid & ~is_zero, leaf * power.astype(leaf.dtype), 0.0), x)
        residual, undamped = jnp.where(is_valid, residual, jnp.inf), jnp.where(is_valid, undamped, jnp.inf)
        status = jnp.where(residual <= (rtol if limit is None else limit), Status.CONVERGED, status)
        status = jnp.where(is_valid, status, Status.NOT_FINITE).astype(jnp.int32)
        info = jnp.asarray(num_products, jnp.int32), residual, undamped, jnp.asarray(total_damping, size.dtype), status
        return x, state, SolveInfo(*info)

    return LinearSolver(init, solve)


def blank_info() -> SolveInfo:
    """Return the info of before the first solve, as states hold it."""
    zero = jnp.zeros((), float)
    return SolveInfo(jnp.zeros((), jnp.int32), zero, zero, zero, jnp.asarray(Status.TRUNCATED, jnp.int32))


def check_preconditioner(preconditioner: Any) -> None:
    """Refuse anything but a ``Preconditioner`` or None."""
    if preconditioner is not None and not isinstance(preconditioner, Preconditioner):
        got, fix = validate.describe(preconditioner), "Pass e.g. preconditioner=hg.preconditioners.jacobi()."
        raise TypeError(validate.message("a Preconditioner or None", got, fix))


def shifted_diagonal(system: LinearSystem, b_like: PyTree, damping: Array, largest: Array) -> PyTree | None:
    """Return D + δ, at least of rounding size; None where the system has no diagonal."""
    own = system.diagonal()
    if own is None:
        return None
    validate.same_structure("system.diagonal()", own, "b", b_like)
    top = jnp.maximum(tree.max_abs(own), jnp.maximum(largest, damping))
    top = jnp.where(top > 0, top, 1.0 / jnp.finfo(top.dtype).eps)  # nothing is known: the identity
    return jax.tree.map(
        lambda d, b: jnp.maximum(
            d.astype(b.dtype) + damping.astype(b.dtype),
            jnp.maximum(jnp.finfo(b.dtype).eps * top.astype(b.dtype), jnp.finfo(b.dtype).tiny),
        ),
        own,
        b_like,
    )


def refuse_asymmetric(name: str, scaled: ScaledSystem) -> None:
    """Refuse a system whose matrix is not symmetric."""
    if not scaled.system.symmetric:
        fix = "Use hg.solvers.gmres(50, 25), or hg.solvers.dense() for a small one."
        raise ValueError(validate.message(f"a symmetric system for {name}", "symmetric=False", fix))


def divide(a: Any, b: Array) -> Array:
    """Return a/b, and 0 where b is not positive; 0/0 is never computed."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)


def normalized(x: PyTree, size: Array) -> PyTree:
    """Return x / ‖b‖: the form in which a solution is kept for a later solve, whose b has another size."""
    return tree.scale(x, divide(1.0, size))


LoopVars = TypeVar("LoopVars", bound=Any)
"""A NamedTuple with ``num_products``, the steps taken so far, and ``done``."""


def iterate(step: Callable[[LoopVars], LoopVars], start: LoopVars, *, length: int, unroll: int | bool) -> LoopVars:
    """Apply ``step`` until ``done`` or ``length`` times; ``step`` counts ``num_products`` itself.

    ``unroll=1`` is a ``while_loop``: steps that are not needed cost nothing, under ``vmap`` too, and the loop variables
    are updated in place, where a scan over a ``cond`` copies them (up to a fifth slower, 1.4 times the scratch memory:
    ``benchmarks/results/hessian_modes.md``). It has no reverse-mode derivative. Any other value is a scan so unrolled,
    which has one, and which computes and discards the steps after ``done``: for convolutions on CPU, which XLA runs
    several times slower inside a loop or a ``cond`` than outside.
    """
    if unroll is not True and unroll == 1:
        return lax.while_loop(lambda c: ~c.done & (c.num_products < length), step, start)
    final, _ = lax.scan(lambda c, _: (optax.tree.where(c.done, c, step(c)), None), start, length=length, unroll=unroll)
    return final


def at_most_once(needed: Array, fn: Callable[[Any], Any], start: Any, *, unroll: int | bool) -> Any:
    """Return ``fn(start)`` where ``needed``, and ``start`` elsewhere."""
    if unroll is not True and unroll == 1:  # a loop of one round, which ``vmap`` does not run for all
        one_round = lambda c: (fn(c[0]), jnp.zeros_like(needed))  # noqa: E731
        return lax.while_loop(lambda c: c[1], one_round, (start, needed))[0]
    return lax.cond(needed, fn, lambda c: c, start)


def _power_of_two(x: Array) -> Array:
    """Return the power of two nearest to x > 0, kept where it and its reciprocal are normal numbers."""
    info = jnp.finfo(x.dtype)
    power = lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=0)
    largest = 2.0 ** (info.maxexp - 28)
    return jnp.clip(power, 1.0 / largest, largest)


def _is_zero(damping: Any) -> bool:
    return isinstance(damping, int | float) and damping == 0


def _checked(matvec: MatVec, b: PyTree) -> MatVec:
    def product(vector: PyTree) -> PyTree:
        result = matvec(vector)
        validate.same_structure("matvec(v)", result, "b", b)
        return optax.tree.cast_like(result, b)

    return product


def _damped(matvec: MatVec, damping: float) -> MatVec:
    return matvec if _is_zero(damping) else lambda vector: tree.add_scaled(matvec(vector), damping, vector)
