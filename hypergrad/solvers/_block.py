"""Blocks of m vectors: trees whose leaves have a leading axis m. Dot products, combinations, low-rank inverses.

    M = E + B S (SᵀB S)⁺ SᵀB,   E diagonal                  the Nyström approximation of E + B on span S
    M⁻¹ r = r/E − U (w ⊙ Uᵀr)                                U: m vectors, found once

Contractions run over the axes of each leaf, which is never raveled, so that a block is sharded like its vectors.

Reference: Frangella, Tropp & Udell, Randomized Nyström preconditioning, arXiv 2110.02820.
"""

import jax
import jax.numpy as jnp

from hypergrad import tree
from hypergrad.types import Array, MatVec, PyTree

__all__ = ["combine", "gram", "inner", "low_rank_inverse", "over", "put", "ritz", "times", "zeros"]

_REST = 0.3  # of the smallest eigenvalue of a low-rank approximation: what the others are taken to be


def zeros(like: PyTree, size: int) -> PyTree:
    """Return ``size`` zero vectors like ``like`` in the promoted dtypes."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x[None], (size, *x.shape)), tree.promoted_zeros_like(like))


def put(block: PyTree, vector: PyTree, place: Array) -> PyTree:
    """Return the block with ``vector`` at index ``place``."""
    return jax.tree.map(lambda rows, x: rows.at[place].set(x), block, vector)


def inner(block: PyTree, vector: PyTree) -> Array:
    """Return the m dot products of the block's vectors with ``vector``."""
    return tree.total(jax.tree.leaves(jax.tree.map(lambda rows, x: _dot(rows, x, x.ndim, 0), block, vector)))


def gram(a: PyTree, b: PyTree) -> Array:
    """Return the matrix aᵢ·bⱼ."""
    return tree.total(jax.tree.leaves(jax.tree.map(lambda p, q: _dot(p, q, p.ndim - 1, 1), a, b)))


def combine(block: PyTree, coefficients: Array) -> PyTree:
    """Return Σᵢ cᵢ vᵢ; a block of n vectors for coefficients of shape (m, n)."""

    def mix(rows: Array) -> Array:
        weights = jnp.moveaxis(coefficients.astype(rows.dtype), 0, -1)
        return jnp.tensordot(weights, rows, axes=1, precision="highest")

    return jax.tree.map(mix, block)


def over(vector: PyTree, divisor: PyTree) -> PyTree:
    """Return a vector or a block divided by a tree like a vector, whose leaves may be scalars."""
    return jax.tree.map(lambda x, d: x / _aligned(d, x), vector, divisor)


def times(block: PyTree, factor: PyTree) -> PyTree:
    """Return a block times a tree like a vector."""
    return jax.tree.map(lambda x, f: x * _aligned(f, x), block, factor)


def low_rank_inverse(basis: PyTree, products: PyTree, diagonal: PyTree, damping: Array) -> MatVec:
    """Return r ↦ M⁻¹ r for M = E + the Nyström approximation of B on the span of ``basis``, M ≈ D + δI + B.

    E = D + δ + 0.3 τ: the smallest eigenvalue τ of the approximation stands for what S does not span. Without it a
    cluster of eigenvalues just below τ would be torn apart by the part of it that S happens to hold.

    Args:
      basis: S, m vectors, zeros among them allowed.
      products: B S.
      diagonal: D + δ > 0, a tree like a vector, or None where D = 0.
      damping: δ.

    Directions of S in which B is not positive count as zero, so that M is positive definite.
    """
    factor = _inverse_root(gram(basis, products))
    epsilon = jnp.finfo(factor.dtype).eps
    own = jnp.linalg.eigvalsh(_symmetric(factor.T @ gram(products, products) @ factor))
    rest = _REST * jnp.min(jnp.where(own > 10 * epsilon * own[-1], own, jnp.inf))
    rest = jnp.where(jnp.isfinite(rest), rest, 0.0)
    if diagonal is None:
        rest = rest + damping
        shifted: PyTree = jax.tree.map(lambda _: jnp.where(rest > 0, rest, 1.0), products)
    else:
        shifted = jax.tree.map(lambda d: d + rest.astype(d.dtype), diagonal)
    scaled = over(products, shifted)
    sizes, turns = jnp.linalg.eigh(_symmetric(factor.T @ gram(products, scaled) @ factor))
    used = sizes > 10 * epsilon * jnp.maximum(sizes[-1], 1.0)
    sizes = jnp.where(used, sizes, 1.0)
    directions = combine(scaled, factor @ turns * jnp.where(used, sizes**-0.5, 0.0)[None, :])
    # Beyond 1/(100 ε) rounding of the directions would make M⁻¹ indefinite.
    weights = jnp.where(used, 1.0 - 1.0 / (1.0 + jnp.minimum(sizes, 0.01 / epsilon)), 0.0)

    def apply(r: PyTree) -> PyTree:
        return tree.add_scaled(over(r, shifted), -1.0, combine(directions, weights * inner(directions, r)))

    return apply


def ritz(basis: PyTree, products: PyTree, diagonal: PyTree, size: int) -> tuple[PyTree, PyTree]:
    """Return the ``size`` largest Ritz vectors of B relative to D (I for None) in the span of ``basis``, and B of them.

    Rows are zero where the span has fewer dimensions, or B is not positive.
    """
    white = _inverse_root(gram(basis, basis if diagonal is None else times(basis, diagonal)))
    values, vectors = jnp.linalg.eigh(_symmetric(white.T @ gram(basis, products) @ white))
    chosen = white @ jnp.where(values[None, -size:] > 0, vectors[:, -size:], 0.0)
    return combine(basis, chosen), combine(products, chosen)


def _inverse_root(matrix: Array) -> Array:
    """Return R with RᵀGR = I on the directions in which a symmetric G is positive, and R = 0 on the others.

    G is scaled to a unit diagonal first, so that directions of very different length all count.
    """
    diagonal = jnp.diag(matrix)
    unit = jnp.where(diagonal > 0, jnp.where(diagonal > 0, diagonal, 1.0) ** -0.5, 0.0)
    values, vectors = jnp.linalg.eigh(_symmetric(matrix * unit[:, None] * unit[None, :]))
    kept = values > 10 * len(values) * jnp.finfo(values.dtype).eps
    return unit[:, None] * vectors * jnp.where(kept, jnp.where(kept, values, 1.0) ** -0.5, 0.0)[None, :]


def _symmetric(matrix: Array) -> Array:
    return 0.5 * (matrix + matrix.T)


def _dot(a: Array, b: Array, count: int, skipped: int) -> Array:
    """Contract the last ``count`` axes of ``a`` with those of ``b`` after its first ``skipped``."""
    axes = (tuple(range(1, count + 1)), tuple(range(skipped, skipped + count)))
    sharding = tree.replicated_sharding(a, a.ndim + b.ndim - 2 * count)
    return jnp.tensordot(a, b, axes=axes, precision="highest", out_sharding=sharding)


def _aligned(vector: Array, like: Array) -> Array:
    """Return a leaf of a vector so that it multiplies a leaf of a block, without implicit promotion."""
    return jnp.reshape(vector, (1,) * (like.ndim - vector.ndim) + vector.shape).astype(like.dtype)
