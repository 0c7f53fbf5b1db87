"""Richardson iteration: gradient descent on the linear system, continued from solve to solve.

    s = α (b − A x) + β s;   x ← x + s                 α = 1/λ̂

Use it if you can afford only one product per outer step. Each solve continues from the result of the last solve, while
weights and batches change (SOBA). Over many outer steps, the products add up to as many as the system needs.

Reference: Dagréou, Ablin, Vaiter & Moreau, A framework for bilevel optimization that enables stochastic and global
variance reduction algorithms, arXiv 2201.13409 (SOBA); Hao, Gong & Liu, arXiv 2401.09587.
"""

from typing import NamedTuple

import jax.numpy as jnp
import optax

from hypergrad import tree, validate
from hypergrad.solvers._base import (
    DIVERGED,
    WORST_START,
    LinearSolver,
    ScaledSystem,
    Solution,
    Status,
    assemble,
    divide,
    iterate,
    normalized,
)
from hypergrad.solvers._power import iterate_power
from hypergrad.types import Array, PyTree

__all__ = ["richardson"]


class RichardsonState(NamedTuple):
    """Where the next solve goes on.

    Attributes:
      solution: tree like b, the next x divided by ‖b‖; zeros at first.
      velocity: tree like b, the last step divided by ‖b‖; () without momentum.
      direction: tree like b, unit norm, close to the eigenvector of A's largest |eigenvalue|; zeros at first.
    """

    solution: PyTree
    velocity: PyTree
    direction: PyTree


def richardson(
    num_products: int, *, momentum: float = 0.0, relative_damping: float = 0.0, unroll: int | bool = 1
) -> LinearSolver:
    """Continue x ← x + α (b − A x) + β (x − x_previous) from the last solve, by ``num_products`` products.

    A warm solve spends its first product on the residual of its start; the other K − 1 products give a step each. The
    first solve starts from 0, whose residual is known, and takes K steps. The residual reported is that of the x
    returned. The state keeps the x of one step more, which needs no product; the next solve starts there.

    Args:
      num_products: K ≥ 1. To find α = 1/(λ̂ + δ), λ̂ an estimate of A's largest |eigenvalue|, a power iteration takes
        one product more, and 12 more at the first solve.
      momentum: β, 0 ≤ β < 1 (heavy ball). It goes on from solve to solve.
      relative_damping: ρ ≥ 0, solves (A + ρ λ̂ I) x = b.
      unroll: True or an int for a scan so unrolled (convolutions on CPU); 1 is a loop that stops early.

    Returns:
      A ``LinearSolver``. Where the residual passes 1000 it stops with status ``DIVERGED``; a start whose residual is
      above 3 is dropped for 0.

    Raises:
      ValueError: ``num_products`` < 1, ``momentum`` outside [0, 1), ``relative_damping`` < 0.
      TypeError: one of them is not a number.

    Valid when A is positive definite, or ρ λ̂ exceeds its most negative eigenvalue, and A and b change little from solve
    to solve. With K = 1 each solve moves x by one step.

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> solver, b = richardson(1), jnp.array([2.0, 1.0])
    >>> system, state = hg.solvers.LinearSystem(lambda v: jnp.array([2.0, 1.0]) * v), solver.init(b)
    >>> solve = jax.jit(lambda state: solver.solve(system, b, state))
    >>> for _ in range(20):
    ...     x, state, info = solve(state)
    >>> [round(float(v), 3) for v in x], int(info.num_products)
    ([1.0, 1.0], 2)

    Reference: Dagréou et al., arXiv 2201.13409.
    """
    validate.positive_int("num_products", num_products)
    validate.number("momentum", momentum, low=0.0)
    validate.number("relative_damping", relative_damping, low=0.0)
    validate.unroll(unroll)
    if momentum >= 1.0:
        fix = "Pass e.g. momentum=0.8."
        raise ValueError(validate.message("momentum below 1", str(momentum), fix))

    def init(b_like: PyTree) -> RichardsonState:
        zeros = lambda: tree.promoted_zeros_like(b_like)  # noqa: E731
        return RichardsonState(zeros(), zeros() if momentum > 0 else (), zeros())

    def solve_scaled(scaled: ScaledSystem, state: RichardsonState) -> Solution:
        b, size = scaled.b, scaled.size
        power = iterate_power(scaled, state.direction, warm_steps=1, unroll=unroll)
        damping = relative_damping * power.top
        alpha, stop = divide(1.0, power.top + damping), -1.0 if scaled.limit is None else scaled.limit
        velocity = tree.scale(state.velocity, size) if momentum > 0 else tree.promoted_zeros_like(b)

        def move(remainder: PyTree, velocity: PyTree) -> PyTree:
            step = tree.scale(remainder, alpha)
            return tree.add_scaled(step, momentum, velocity) if momentum > 0 else step

        def step(c: _Iteration) -> _Iteration:
            vector = optax.tree.where(c.trial, c.x, move(c.remainder, c.velocity))
            image = tree.add_scaled(scaled.product(c.num_products, vector), damping, vector)
            remainder = tree.add_scaled(c.remainder, -1.0, image)
            residual = divide(tree.norm(remainder), size)
            dropped = c.trial & ~(residual < WORST_START)
            zeros = tree.promoted_zeros_like(b)
            x = optax.tree.where(c.trial, vector, tree.add_scaled(c.x, 1.0, vector))
            velocity = optax.tree.where(c.trial, c.velocity, vector)
            x, velocity, remainder = optax.tree.where(dropped, (zeros, zeros, b), (x, velocity, remainder))
            residual = jnp.where(dropped, 1.0, residual)
            done = ~(residual <= DIVERGED) | (residual <= stop)
            return _Iteration(x, velocity, remainder, residual, c.num_products + 1, jnp.zeros_like(c.trial), done)

        start = tree.scale(state.solution, size)
        start_sq = tree.vdot(start, start)
        trial, one = (start_sq > 0) & jnp.isfinite(start_sq), jnp.ones_like(size)
        done = (size == 0) | (~trial & (stop >= one))
        # A start too small or too large to be squared is dropped, so that ``remainder`` belongs to x.
        start, velocity = optax.tree.where(trial, (start, velocity), optax.tree.zeros_like((start, velocity)))
        first = _Iteration(start, velocity, b, one, jnp.zeros((), jnp.int32), trial, done)
        final = iterate(step, first, length=num_products, unroll=unroll)
        diverged = ~(final.residual <= DIVERGED)
        last = move(final.remainder, final.velocity)
        zeros = tree.promoted_zeros_like(b)
        goes_on = normalized(tree.add_scaled(final.x, 1.0, last), size), normalized(last, size)
        solution, velocity = optax.tree.where(diverged | (size == 0), (zeros, zeros), goes_on)
        state = RichardsonState(solution, velocity if momentum > 0 else (), power.direction)
        status, count = jnp.where(diverged, Status.DIVERGED, Status.TRUNCATED), final.num_products + power.num_products
        return Solution(final.x, state, count, final.remainder, final.residual, status, damping)

    return assemble(init, solve_scaled, averages=True)


class _Iteration(NamedTuple):
    x: PyTree
    velocity: PyTree
    remainder: PyTree
    residual: Array
    num_products: Array
    trial: Array  # the next product measures the start
    done: Array
