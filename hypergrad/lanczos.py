"""Lanczos with full reorthogonalisation: the ends of a symmetric operator's spectrum, from products alone.

    A Q = Q T + r eᵀ,   Q orthonormal, T tridiagonal k × k;   the eigenvalues θ of T approach A's ends first

One product and one more vector of memory per step.

Reference: Lanczos, An iteration method for the solution of the eigenvalue problem, 1950.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from hypergrad import tree
from hypergrad.types import Array, MatVec, PyTree

__all__ = ["Lanczos", "decomposed", "lanczos", "random_like"]


class Lanczos(NamedTuple):
    """Q and T after ``num_steps`` steps; rows that were not reached are zero."""

    basis: PyTree  # leaves (k, …)
    diagonal: Array
    off_diagonal: Array  # (k,): the last reached is the norm of the remainder
    num_steps: Array
    done: Array


def lanczos(matvec: MatVec, start: PyTree, length: int) -> Lanczos:
    """Take up to ``length`` steps from ``start``; fewer where the Krylov space ends."""
    dtype = tree.wider(*(leaf.dtype for leaf in jax.tree.leaves(start)))
    first = tree.scale(start, 1.0 / tree.norm(start))
    basis = jax.tree.map(lambda x: jnp.zeros((length, *x.shape), x.dtype).at[0].set(x), first)
    empty = jnp.zeros(length, dtype)

    def step(c: Lanczos) -> Lanczos:
        k = c.num_steps
        image = tree.promote(matvec(jax.tree.map(lambda q: q[k], c.basis)))
        remainder, along = image, jnp.zeros(length, dtype)
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            overlaps = _overlaps(c.basis, remainder)
            remainder = optax.tree.sub(remainder, _combined(c.basis, overlaps))
            along += overlaps
        size, scale = tree.norm(remainder).astype(dtype), tree.norm(image).astype(dtype)
        ended = ~(size > 100 * jnp.finfo(dtype).eps * scale)
        unit = tree.scale(remainder, jnp.where(ended, 0.0, 1.0 / jnp.where(ended, 1.0, size)))
        basis = jax.tree.map(lambda q, u: q.at[k + 1].set(u, mode="drop"), c.basis, unit)
        off_diagonal = c.off_diagonal.at[k].set(jnp.where(ended, 0.0, size))
        return Lanczos(basis, c.diagonal.at[k].set(along[k]), off_diagonal, k + 1, ended)

    begin = Lanczos(basis, empty, empty, jnp.zeros((), jnp.int32), jnp.array(False))
    return lax.while_loop(lambda c: ~c.done & (c.num_steps < length), step, begin)


def decomposed(found: Lanczos) -> tuple[Array, Array]:
    """Return eigenvalues and eigenvectors of T, those that were not reached inside the spectrum of the others."""
    reached = jnp.arange(len(found.diagonal)) < found.num_steps
    bond = jnp.where(reached[1:], found.off_diagonal[:-1], 0.0)
    # Rows that were not reached get a Rayleigh quotient of the others: inside their spectrum, never an end of it.
    filled = jnp.where(reached, found.diagonal, found.diagonal[0])
    values, vectors = jnp.linalg.eigh(jnp.diag(filled) + jnp.diag(bond, 1) + jnp.diag(bond, -1))
    return values, vectors


def random_like(like: PyTree, key: Array) -> PyTree:
    """Return normal numbers in the form of ``like``, promoted."""
    leaves, structure = jax.tree.flatten(tree.promote(like))
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        structure, [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    )


def _overlaps(basis: PyTree, vector: PyTree) -> Array:
    pairs = zip(jax.tree.leaves(basis), jax.tree.leaves(vector), strict=True)
    parts: list[Any] = [jnp.tensordot(q, v, v.ndim) for q, v in pairs]
    dtype = tree.wider(*(part.dtype for part in parts))
    return sum((part.astype(dtype) for part in parts), jnp.zeros(parts[0].shape, dtype))


def _combined(basis: PyTree, weights: Array) -> PyTree:
    return jax.tree.map(lambda q: jnp.tensordot(weights.astype(q.dtype), q, 1), basis)
