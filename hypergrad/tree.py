"""Pytree operations that ``optax.tree`` lacks: precision, norms, weak types, aliasing, names.

Vectors of a linear solve live in ``promote_types(leaf dtype, float32)``: bfloat16 becomes float32,
float64 stays. No function here ravels a tree, so shardings survive.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from hypergrad.types import Array, PyTree

__all__ = [
    "add_scaled",
    "all_finite",
    "beside",
    "filled",
    "is_key",
    "is_number",
    "is_traced",
    "labels",
    "leaf_names",
    "match_dtypes",
    "max_abs",
    "newly_bad",
    "norm",
    "num_bytes",
    "placed_like",
    "promote",
    "promoted_zeros_like",
    "refuses_nan",
    "replicated",
    "replicated_sharding",
    "scale",
    "scaled_norm",
    "selected",
    "split_floating",
    "strip_weak_types",
    "total",
    "unalias",
    "vdot",
    "wider",
]


def promote(tree: PyTree) -> PyTree:
    """Cast every leaf to at least float32: ``promote_types(leaf dtype, float32)``."""
    return jax.tree.map(lambda x: jnp.asarray(x, _wide(x)), tree)


def promoted_zeros_like(tree: PyTree) -> PyTree:
    """Return zeros with the shapes (and, eagerly, the shardings) of ``tree`` in the promoted dtypes."""
    return jax.tree.map(lambda x: jnp.zeros_like(x, dtype=_wide(x)), tree)


def vdot(a: PyTree, b: PyTree) -> Array:
    """Return Σ aᵢbᵢ over all leaves; 0 for an empty tree. Cast to the promoted dtype first."""
    terms = jax.tree.leaves(jax.tree.map(lambda x, y: jnp.sum(x * y), a, b))
    return total(terms)


def norm(tree: PyTree) -> Array:
    """Return the Euclidean norm over all leaves. Entries above 1e19 or below 1e-19 need ``scaled_norm``."""
    return jnp.sqrt(vdot(tree, tree))


def scaled_norm(tree: PyTree) -> Array:
    """Return the Euclidean norm over all leaves, where squares overflow or underflow too; inf or NaN as entries are.

    ‖x‖ = s ‖x/s‖ with s = 1, and the root of the largest number (2⁶⁴ in float32) or of the smallest where that fails: a
    loop, because a norm written twice compiles twice.
    It divides, because XLA turns (x f)(x f) into x² f² where x is constant, and both factors may leave the range.
    """
    tree = promote(tree)
    dtype = wider(*(x.dtype for x in jax.tree.leaves(tree)))
    limits = jnp.finfo(dtype)
    root = 2.0 ** (int(limits.maxexp) // 2)
    floor = float(limits.tiny) ** 0.5 / float(limits.eps) ** 0.5  # squares below lose digits

    def attempt(at: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        _, unit, count = at
        size = norm(jax.tree.map(lambda x: x.astype(dtype) / unit, tree))
        other = jnp.where(size > 1, root, 1.0 / root).astype(dtype)
        usable = jnp.isfinite(size) & (size > floor)
        return size * unit, jnp.where(usable, unit, other), jnp.where(usable, 2, count + 1)

    start = jnp.zeros((), dtype), jnp.ones((), dtype), jnp.zeros((), jnp.int32)
    return lax.while_loop(lambda at: at[2] < 2, attempt, start)[0]


def max_abs(tree: PyTree) -> Array:
    """Return the largest magnitude over all leaves; 0 for an empty tree. NaN where an entry is NaN."""
    tops = [jnp.max(jnp.abs(x), initial=0.0) for x in jax.tree.leaves(tree)]
    dtype = wider(*(top.dtype for top in tops))
    result = jnp.zeros((), dtype)
    for top in tops:
        result = jnp.maximum(result, top.astype(dtype))
    return result


def add_scaled(x: PyTree, scale: Any, y: PyTree) -> PyTree:
    """Return x + scale·y, leaf by leaf, in the dtype of x."""
    return jax.tree.map(lambda a, b: a + jnp.asarray(scale, a.dtype) * b, x, y)


def scale(tree: PyTree, factor: Any) -> PyTree:
    """Return factor·tree in the leaves' own dtypes."""
    return jax.tree.map(lambda a: a * jnp.asarray(factor, a.dtype), tree)


def newly_bad(new: PyTree, old: PyTree) -> Array:
    """Return whether an entry of ``new`` is not finite where that of ``old`` was: a state may hold inf by design."""
    pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    lost = [jnp.any(jnp.isfinite(b) & ~jnp.isfinite(a)) for a, b in pairs if _is_inexact(a)]
    return functools.reduce(jnp.logical_or, lost, jnp.array(False))


def all_finite(tree: PyTree) -> Array:
    """Return whether every entry of every leaf is finite; True for an empty tree.

    A reduction of bools: XLA on CPU writes what a sum of floats reads to memory first, a copy of each leaf.
    """
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree) if _is_inexact(leaf)]
    return functools.reduce(jnp.logical_and, finite, jnp.array(True))


def selected(marks: PyTree, tree: PyTree) -> PyTree:
    """Return ``tree`` with None in place of the leaves that are not marked in a tree of bools."""
    return jax.tree.map(lambda mark, leaf: leaf if mark else None, marks, tree)


def filled(marks: PyTree, chosen: PyTree, tree: PyTree) -> PyTree:
    """Return ``tree`` with the leaves of ``chosen``, which ``selected`` has made, in the marked places."""
    return jax.tree.map(lambda mark, new, leaf: new if mark else leaf, marks, chosen, tree)


def replicated_sharding(x: Array, ndim: int) -> NamedSharding | None:
    """Return that of an array copied to all devices of the mesh of ``x``; None unless the mesh has explicit axes.

    On explicit axes a sharding is part of the type, and JAX asks for that of a contraction over a sharded axis.
    """
    mesh = jax.typeof(x).sharding.mesh
    return NamedSharding(mesh, PartitionSpec(*[None] * ndim)) if AxisType.Explicit in mesh.axis_types else None


def replicated(tree: PyTree) -> PyTree:
    """Copy every leaf that lies on a mesh of explicit axes to all its devices."""

    def copied(x: Array) -> Array:
        sharding = replicated_sharding(x, x.ndim)
        return x if sharding is None else jax.sharding.reshard(x, sharding)

    return jax.tree.map(copied, tree)


def placed_like(tree: PyTree, like: PyTree) -> PyTree:
    """Return ``tree`` in the explicit shardings of ``like``, a tree from ``jax.eval_shape``."""
    move = lambda x, y: x if y.sharding is None else jax.sharding.reshard(x, y.sharding)  # noqa: E731
    return jax.tree.map(move, tree, like)


def strip_weak_types(tree: PyTree) -> PyTree:
    """Make every array leaf strongly typed: a weakly typed one costs an extra trace."""
    return jax.tree.map(lambda x: x if is_key(x) else lax.convert_element_type(x, jnp.asarray(x).dtype), tree)


def unalias(tree: PyTree, *others: PyTree) -> PyTree:
    """Copy leaves of ``tree`` that are the very object of another leaf: donation rejects duplicates."""
    seen = {id(leaf) for other in others for leaf in jax.tree.leaves(other)}

    def fresh(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and id(leaf) in seen:
            return jnp.copy(leaf)
        seen.add(id(leaf))
        return leaf

    return jax.tree.map(fresh, tree)


def beside(tree: PyTree, variables: PyTree) -> PyTree:
    """Commit uncommitted arrays to the devices of ``variables``, replicated on a mesh, so that a step compiles once.

    ``jax.jit`` returns committed arrays if one argument is committed, and compiles again for arguments that were not.
    """
    leaves = [x for x in jax.tree.leaves(variables) if isinstance(x, jax.Array) and not is_traced(x)]
    shardings = {x.sharding for x in leaves if x.committed}
    meshes = {s.mesh for s in shardings if isinstance(s, NamedSharding)}
    mesh = meshes.pop() if len(meshes) == 1 else None
    if mesh is None and (len(shardings) != 1 or not all(isinstance(s, SingleDeviceSharding) for s in shardings)):
        return tree

    def place(x: Array) -> Array:
        if is_traced(x) or not x.sharding.is_fully_replicated:
            return x
        if mesh is None:
            return x if x.committed else jax.device_put(x, *shardings)
        axes = [None] * x.ndim if AxisType.Explicit in mesh.axis_types else []  # as a compiled step returns it
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    return jax.tree.map(place, tree)


def match_dtypes(tree: PyTree, like: PyTree) -> PyTree:
    """Cast ``tree`` leaf by leaf to the dtypes of ``like``, strongly typed, so that branches agree; keys stay."""

    def cast(x: Any, y: Any) -> Any:
        return x if is_key(x) else lax.convert_element_type(x, jnp.asarray(y).dtype)

    return jax.tree.map(cast, tree, like)


def split_floating(tree: PyTree) -> tuple[list[Array], Callable[[list[Array]], PyTree]]:
    """Return the floating-point leaves, and a function that puts others in their place."""
    leaves, structure = jax.tree.flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating)]

    def restore(floats: list[Array]) -> PyTree:
        filled = list(leaves)
        for place, leaf in zip(places, floats, strict=True):
            filled[place] = leaf
        return jax.tree.unflatten(structure, filled)

    return [jnp.asarray(leaves[i]) for i in places], restore


def leaf_names(tree: PyTree) -> list[str]:
    """Return the path of every leaf, as messages print it: ``['dense']['kernel']``; "" for a bare array."""
    paths, _ = jax.tree.flatten_with_path(tree)
    return [jax.tree_util.keystr(path) for path, _ in paths]


def labels(what: str, tree: PyTree) -> list[str]:
    """Return a name of every leaf for a message: ``params leaf ['kernel']``, or ``params`` for a bare array."""
    return [f"{what} leaf {name}" if name else what for name in leaf_names(tree)]


def wider(*dtypes: Any) -> Any:
    """Return the widest of the floating dtypes, at least float32; under strict promotion too."""
    floats = [jnp.dtype(d) for d in dtypes if jnp.issubdtype(d, jnp.floating)]
    return max([jnp.dtype(jnp.float32), *floats], key=lambda d: d.itemsize)


def total(terms: list[Array]) -> Array:
    """Return the sum of arrays of one shape in the widest of their dtypes, at least float32; 0 of none."""
    dtype = wider(*(term.dtype for term in terms))
    result = jnp.zeros((), dtype)
    for term in terms:
        result = result + term.astype(dtype)
    return result


def refuses_nan() -> bool:
    """Return whether ``jax_debug_nans`` is set, under which a NaN that stands for "not known" stops a program."""
    return bool(jax.debug_nans.value)


def is_number(x: Any) -> bool:
    """Return whether a leaf is a number or an array: not a Python flag, a string or a function."""
    if isinstance(x, np.ndarray | np.generic):
        return x.dtype.kind not in "OSU"
    return isinstance(x, jax.Array | int | float | complex) and not isinstance(x, bool)


def is_traced(x: Any) -> bool:
    """Return whether ``x`` is a value that is being traced."""
    return isinstance(x, Tracer)


def _wide(x: Any) -> Any:
    return wider(jnp.result_type(x))


def _is_inexact(x: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(x), jnp.inexact))


def num_bytes(tree: PyTree) -> int:
    """Return the size of all arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def is_key(x: Any) -> bool:
    """Return whether a leaf is an array of typed random keys."""
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
