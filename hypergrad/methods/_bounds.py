"""Estimates of the constants in error bounds of hypergradients, from products at one point.

    μ          half of the smallest eigenvalue of H, by Lanczos
    L_g        twice the largest |eigenvalue| of ∂²L_out/∂w²
    B²         four times the largest eigenvalue of M Mᵀ, M = ∂²L_in/∂w∂λ
    L_H, L_M   twice ‖H'[d] d‖ and ‖M'[d]ᵀ d‖ along d = ∂L_out/∂w, of length 1

They are no proofs: Lanczos sees the ends of a spectrum from inside, and third derivatives are taken along one
direction.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hypergrad import curvature, tree
from hypergrad.lanczos import decomposed, lanczos, random_like
from hypergrad.methods._base import Bounds
from hypergrad.types import Array, Hyperparams, MatVec, Params

__all__ = ["estimated_bounds"]

_STEPS = 20  # of Lanczos for μ, whose end of the spectrum is the hard one
_FEW_STEPS = 8
_SAFETY = 2.0


def estimated_bounds(
    inner: Callable[[Params, Hyperparams], Array],
    outer: Callable[[Params, Hyperparams], Array],
    params: Params,
    hyperparams: Hyperparams,
) -> tuple[Bounds, Array]:
    """Return the estimates, and the number of products with H and M that they took."""
    wide = tree.promote(params)
    start = random_like(wide, jax.random.key(0))
    size = sum(leaf.size for leaf in jax.tree.leaves(wide))

    def ends(matvec: MatVec, steps: int) -> tuple[Array, Array, Array]:
        found = lanczos(matvec, start, min(steps, size))
        values, _ = decomposed(found)
        return values.min(), jnp.abs(values).max(), found.num_steps

    def gram(vector: Params) -> Params:
        into = curvature.mixed_vjp(inner, wide, hyperparams)(vector)
        into = tree.match_dtypes(into, hyperparams)
        return jax.jvp(lambda h: jax.grad(inner)(wide, h), (hyperparams,), (into,))[1]

    lowest, _, inner_steps = ends(curvature.hvp(lambda w: inner(w, hyperparams), wide), _STEPS)
    _, steepest, _ = ends(curvature.hvp(lambda w: outer(w, hyperparams), wide), _FEW_STEPS)
    _, mixed, mixed_steps = ends(gram, _FEW_STEPS)
    slope = jax.grad(lambda w: outer(w, hyperparams))(wide)
    length = tree.norm(slope)
    along = tree.scale(slope, jnp.where(length > 0, 1.0 / jnp.where(length > 0, length, 1.0), 0.0))

    def change(product_at: Callable[[Params], Params]) -> Array:
        return tree.norm(jax.jvp(product_at, (wide,), (along,))[1])

    bends = change(lambda w: curvature.hvp(lambda v: inner(v, hyperparams), w)(along))
    twists = change(lambda w: curvature.mixed_vjp(inner, w, hyperparams)(along))
    bounds = Bounds(lowest / _SAFETY, _SAFETY * steepest, _SAFETY * jnp.sqrt(mixed), _SAFETY * bends, _SAFETY * twists)
    return bounds, inner_steps + 2 * mixed_steps + 2
