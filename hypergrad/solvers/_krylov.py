"""The iteration of conjugate gradients, for ``cg`` and ``recycled_cg``: warm starts, damping, preconditioning.

p = z = M⁻¹r;  repeat:  a = r·z / p·(A + δI)p;  x += a p;  r' = r − a (A + δI)p;  p = M⁻¹r' + (r'·z'/r·z) p
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hypergrad import tree
from hypergrad.solvers import _block
from hypergrad.solvers._base import WORST_START, ScaledSystem, Status, at_most_once, divide, iterate
from hypergrad.types import Array, MatVec, PyTree

__all__ = ["FADE", "Kept", "Krylov", "epsilon", "first_scale", "run"]

FADE = 0.9  # of λ̂ from one solve to the next, so that an old large curvature is forgotten
_FEW, _DAMPED = 5, 0.01  # products, and their ρ, of a solve whose drift is too small to be worth a product


class Kept(NamedTuple):
    """The directions of a solve, their products with A + δI, and p·(A + δI)p; zeros where there is none yet."""

    directions: PyTree
    images: PyTree
    curvatures: Array


def _nothing_kept(b: PyTree, size: int) -> Kept:
    scalar = tree.wider(*(leaf.dtype for leaf in jax.tree.leaves(b)))
    return Kept(_block.zeros(b, size), _block.zeros(b, size), jnp.zeros(size, scalar))


class Krylov(NamedTuple):
    """The state of the iteration.

    ``energy`` is r·z, and b·p where a warm start p is measured; ``damping`` is the relative one, −1 until it is known;
    ``largest`` is λ̂, a lower bound of ‖A‖; ``travelled`` bounds ‖x‖ on the way; ``square`` is ‖b − (A + δI) x‖².
    """

    x: PyTree
    remainder: PyTree
    direction: PyTree
    energy: Array
    square: Array
    direction_sq: Array
    damping: Array
    largest: Array
    travelled: Array
    num_products: Array
    status: Array
    kept: Kept | None
    trial: Array  # the next product measures a warm start, as a step of length 1 from 0
    done: Array


def first_scale(scaled: ScaledSystem, largest: Array, *, unroll: int | bool) -> tuple[Array, Array]:
    """Return λ̂ and the number of products: where it is 0, ‖A b‖/‖b‖ by one product."""

    def measure(_: Any) -> tuple[Array, Array]:
        image = tree.norm(scaled.matvec(scaled.b))
        return jnp.where(jnp.isfinite(image), divide(image, scaled.size), 0.0), jnp.ones((), jnp.int32)

    needed = ~(largest > 0) & (scaled.size > 0)
    return at_most_once(needed, measure, (largest.astype(scaled.size.dtype), jnp.zeros((), jnp.int32)), unroll=unroll)


def run(
    scaled: ScaledSystem,
    guess: PyTree | None,
    *,
    max_products: int,
    stop: Any,
    damping: Array,
    ratio: float,
    constant: float,
    largest: Array,
    num_products: Array | int,
    precondition: MatVec | None,
    keep: bool,
    unroll: int | bool,
) -> tuple[Krylov, Array]:
    """Iterate until the residual is at most ``stop``, the products are spent, or the curvature is not positive.

    Args:
      scaled: the system, which includes the constant damping.
      guess: None, or where to start. It is dropped where it is worse than 0 in both norms: its residual is above
        3 ‖b‖, and its error is larger than that of 0 in the norm of A + δI.
      max_products: bound of ``num_products``. One product on top measures the residual where rounding may have
        spoilt the recurrence. For up to five products with ρ ≥ 0.01 the bound of that error is in the residual instead.
      stop: relative residual.
      damping: δ = ρ λ̂; negative: ``ratio`` times the quotient of the first direction.
      ratio: ρ.
      constant: the damping that ``scaled`` includes.
      largest: λ̂ so far.
      num_products: those already spent.
      precondition: M⁻¹, or None.
      keep: keep all directions, and make each new one conjugate to all of them rather than to the last.
      unroll: as for ``iterate``.

    Returns:
      The last state of the iteration, and the residual ‖b − (A + δI) x‖/‖b‖.
    """
    b, size = scaled.b, scaled.size
    first = b if precondition is None else precondition(b)
    square, trial = size * size, jnp.array(False)
    energy, first_sq = (square, square) if precondition is None else (tree.vdot(b, first), tree.vdot(first, first))
    if guess is not None:
        guess_sq = tree.vdot(guess, guess)
        trial = (guess_sq > 0) & jnp.isfinite(guess_sq)
        start = guess, guess_sq, tree.vdot(b, guess)
        first, first_sq, energy = optax.tree.where(trial, start, (first, first_sq, energy))
    count = jnp.asarray(num_products, jnp.int32)
    c = Krylov(
        x=tree.promoted_zeros_like(b),
        remainder=b,
        direction=first,
        energy=energy,
        square=square,
        direction_sq=first_sq,
        damping=damping.astype(size.dtype),
        largest=largest.astype(size.dtype),
        travelled=jnp.zeros_like(size),
        num_products=count,
        status=jnp.asarray(Status.TRUNCATED, jnp.int32),
        kept=_nothing_kept(b, max_products) if keep else None,
        trial=trial,
        done=(size == 0) | (~trial & (stop >= 1.0)) | (count >= max_products),
    )
    step = lambda c: _step(scaled, c, max_products, stop, ratio, constant, precondition)  # noqa: E731
    final = iterate(step, c, length=max_products, unroll=unroll)

    residual = divide(jnp.sqrt(final.square), size)
    # The recurrence drifts from b − A x by at most about (steps)·ε·‖A‖·max‖x‖ (Greenbaum 1997): K ε/ρ with damping.
    scale = divide((final.largest + jnp.maximum(final.damping, 0.0) + constant) * final.travelled, size)
    drift = final.num_products.astype(size.dtype) * epsilon(final.x) * scale
    if max_products <= _FEW and ratio >= _DAMPED and precondition is None and not keep:
        return final, jnp.maximum(residual, drift)
    doubtful = jnp.isfinite(residual) & (drift > jnp.maximum(residual, stop))

    def measured(at: tuple[Krylov, Array]) -> tuple[Krylov, Array]:
        c, _ = at
        remainder, residual = scaled.measure(c.x)
        if ratio > 0:
            remainder = tree.add_scaled(remainder, -jnp.maximum(c.damping, 0.0), c.x)
            residual = divide(tree.norm(remainder), size)
        return c._replace(remainder=remainder, num_products=c.num_products + 1), residual

    return at_most_once(doubtful, measured, (final, residual), unroll=unroll)


def _step(
    scaled: ScaledSystem,
    c: Krylov,
    max_products: int,
    stop: Any,
    ratio: float,
    constant: float,
    precondition: MatVec | None,
) -> Krylov:
    image = scaled.matvec(c.direction)
    curvature = tree.vdot(c.direction, image)
    rayleigh = divide(curvature, c.direction_sq)
    seen, damping = jnp.abs(rayleigh - constant), c.damping
    if ratio > 0:
        unknown = damping < 0
        stretch = jnp.sqrt(divide(tree.vdot(image, image), c.direction_sq))
        seen = jnp.where(unknown & ~(rayleigh > constant), stretch, seen)
        damping = jnp.where(unknown, ratio * jnp.where(jnp.isfinite(seen), seen, 0.0), damping)
        image = tree.add_scaled(image, damping, c.direction)
        curvature, rayleigh = curvature + damping * c.direction_sq, rayleigh + damping
    largest = jnp.maximum(c.largest, jnp.where(jnp.isfinite(seen), seen, 0.0))

    length = jnp.where(c.trial, 1.0, divide(c.energy, curvature))
    finite = jnp.isfinite(curvature) & jnp.isfinite(length * jnp.sqrt(c.direction_sq))
    floor = jnp.maximum(0.1 * (damping + constant), 10 * epsilon(c.x) * largest)
    exhausted = ~(c.direction_sq > 0)  # nothing is left that is conjugate to the directions before
    accepted = finite & (c.trial | (rayleigh > floor))
    length = jnp.where(accepted, length, 0.0)
    left = tree.add_scaled(c.remainder, -length, image)
    square = tree.vdot(left, left)
    nearer = (rayleigh > floor) & (2.0 * c.energy >= curvature)  # ½ x·(A + δI)x ≤ b·x, which is 0 at x = 0
    dropped = c.trial & ~nearer & ~(jnp.sqrt(square) < WORST_START * scaled.size)
    length, square = jnp.where(dropped, 0.0, length), jnp.where(dropped, c.square, square)
    x, remainder = tree.add_scaled(c.x, length, c.direction), tree.add_scaled(c.remainder, -length, image)

    z = remainder if precondition is None else precondition(remainder)
    energy = square if precondition is None else tree.vdot(remainder, z)
    kept = c.kept
    if kept is not None:
        place = c.num_products
        kept = Kept(
            _block.put(kept.directions, c.direction, place),
            _block.put(kept.images, image, place),
            kept.curvatures.at[place].set(jnp.where(accepted & ~c.trial, curvature, 0.0)),
        )
        shares = divide(_block.inner(kept.images, z), kept.curvatures)
        direction = tree.add_scaled(z, -1.0, _block.combine(kept.directions, shares))
        energy = tree.vdot(direction, remainder)
        direction_sq, whole = tree.vdot(direction, direction), tree.vdot(z, z)
        # p = z + β p_before with z ⟂ p_before is never shorter than z in exact arithmetic: a tiny one is rounding.
        direction_sq = jnp.where(direction_sq > epsilon(c.x) * whole, direction_sq, 0.0)
    else:
        share = jnp.where(c.trial, 0.0, divide(energy, c.energy))
        direction = tree.add_scaled(z, share, c.direction)
        if precondition is None:
            direction_sq = square + share * share * c.direction_sq  # the new remainder ⟂ the old direction
        else:
            direction_sq = tree.vdot(direction, direction)

    count, residual = c.num_products + 1, divide(jnp.sqrt(square), scaled.size)
    # A square that underflows would make the next quotients meaningless.
    small = (residual <= stop) | (square <= jnp.finfo(square.dtype).tiny / epsilon(c.x))
    stopped = jnp.where(finite, Status.INDEFINITE, Status.NOT_FINITE)
    return Krylov(
        x,
        remainder,
        direction,
        energy,
        square,
        direction_sq,
        damping,
        largest,
        c.travelled + jnp.abs(length) * jnp.sqrt(c.direction_sq),
        count,
        jnp.where(accepted | exhausted, c.status, stopped).astype(jnp.int32),
        kept,
        jnp.zeros_like(c.trial),
        ~accepted | ~jnp.isfinite(square) | small | (count >= max_products),
    )


def epsilon(x: PyTree) -> float:
    """Return the machine epsilon of the coarsest leaf."""
    return max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(x))
