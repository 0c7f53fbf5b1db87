"""Batches given by index, and windows of K batches along a leading axis.

    IndexedBatch(data, indices)  stands for  data[indices]

A window of indices is sliced like a window of batches; what it points at is gathered where a loss needs it.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hypergrad import tree, validate
from hypergrad.types import Array, Batch, PyTree

__all__ = [
    "FreshBatches",
    "IndexedBatch",
    "gathered",
    "num_examples",
    "of_length",
    "one_step",
    "split",
    "take",
    "window_length",
    "windowed",
    "with_windowed",
]


class IndexedBatch(NamedTuple):
    """A batch given by where it lies in data on the device: ``leaf[indices]`` for every leaf of ``data``.

    Stands for a batch, or for any subtree of one, wherever the library takes one (inner or outer); the loss sees the
    gathered examples. A window of K steps then stores K·B indices instead of K·B examples. Each step gathers its own
    examples. If a checkpointed step is recomputed, its examples are gathered again.

    Attributes:
      data: a pytree of arrays with a common leading axis of N examples; no window axis. Sparse ones
        (``jax.experimental.sparse.BCOO``) are gathered by row, fastest in the form of ``BCOO.fromdense(x, n_batch=1)``.
      indices: integers in 0 … N−1: shape (B,) for one batch, (K, B) for a window; () and (K,) where an entry of
        ``data`` is itself a batch. One out of range is clamped, as JAX does.

    >>> import jax.numpy as jnp
    >>> batches = IndexedBatch((jnp.zeros((60, 4)), jnp.zeros(60)), jnp.arange(30).reshape(3, 10))  # K = 3, B = 10
    """

    data: PyTree
    indices: Array


class FreshBatches(NamedTuple):
    """Batches for a linear solve, another one for each product: ``solve_batch=hg.FreshBatches(batches)``.

    Product k of a solve uses batch ``k % P``. The mixed product uses the last batch, P − 1. For ``hg.solvers.neumann``
    and ``richardson``, whose iterations average over the batches; the others need one matrix per solve and refuse it.
    There is no residual then: NaN, not measured.

    Attributes:
      batches: like an inner batch, leaves with a leading axis P; ``IndexedBatch`` has it on its indices.

    Reference: Ji, Yang & Liang, Bilevel optimization: convergence analysis and enhanced design, arXiv 2010.07962
    (stocBiO).
    """

    batches: Batch


def fresh_batch(fresh: FreshBatches, place: Any, like: Batch) -> Batch:
    """Return batch ``place`` modulo their number; refuse batches that are not stacked, or unlike the inner batch."""
    fix = "Stack the batches: hg.FreshBatches(jax.tree.map(lambda *b: jnp.stack(b), *batches))."
    try:
        length = window_length(fresh.batches)
    except ValueError as error:
        got = f"leaves of shapes {[jnp.shape(leaf) for leaf in jax.tree.leaves(fresh.batches)]}"
        raise ValueError(validate.message("FreshBatches whose leaves have a common leading axis", got, fix)) from error
    found = take(fresh.batches, place % length)
    forms: list[Any] = [jax.tree.structure(jax.eval_shape(gathered, batch)) for batch in (found, like)]
    one, other = forms
    if one != other:
        wanted = f"FreshBatches of batches with the structure of the inner batch, {other}"
        raise ValueError(validate.message(wanted, str(one), fix))
    return found


def gathered(batch: Batch) -> Batch:
    """Return the batch with every ``IndexedBatch`` in it replaced by the examples that it points at.

    Raises:
      TypeError: indices that are no integers, or data that holds an ``IndexedBatch`` itself; ``FreshBatches``.
      ValueError: data whose leaves have no common leading axis.
    """
    if isinstance(batch, FreshBatches):
        fix = "Pass them as solve_batch=hg.FreshBatches(batches), and one batch as inner_batch and outer_batch."
        raise TypeError(validate.message("one batch for a loss", "hg.FreshBatches", fix))
    return jax.tree.map(lambda part: _gather(part) if _is_indexed(part) else part, batch, is_leaf=_is_indexed)


def num_examples(batch: Batch) -> tuple[bool, int]:
    """Return whether the batch tells the size of its whole data set, and that size, or else its own.

    The size is the longest leading axis; 0 where there is none.
    """
    known, found = False, 0
    for part in jax.tree.leaves(batch, is_leaf=lambda x: _is_indexed(x) or _is_sparse(x)):
        is_indexed = _is_indexed(part)
        axes = 2 if is_indexed and jnp.ndim(part.indices) == 0 else 1  # an entry of the data is itself a batch
        for leaf in jax.tree.leaves(part.data if is_indexed else part, is_leaf=_is_sparse):
            size = math.prod(jnp.shape(leaf)[:axes]) if _holds_examples(leaf) else 0
            known, found = (is_indexed, size) if size > found else (known, found)
    return known, found


def _holds_examples(leaf: Any) -> bool:
    """Return whether a leaf can have an axis of examples: a random key has none, whether typed or as uint32."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jnp.uint32:
        return False
    return jnp.ndim(leaf) > 0


def windowed(batches: Batch) -> PyTree:
    """Return what of the batches has the window axis: indices for an ``IndexedBatch``, None for what is no array."""

    def axis(part: Any) -> Any:
        return part.indices if _is_indexed(part) else (part if _is_array(part) else None)

    return jax.tree.map(axis, batches, is_leaf=_is_indexed)


def with_windowed(batches: Batch, parts: PyTree) -> Batch:
    """Return the batches with ``parts``, shaped like ``windowed(batches)``, in place of what it returns."""

    def put(old: Any, new: Any) -> Any:
        return IndexedBatch(old.data, new) if _is_indexed(old) else (new if _is_array(old) else old)

    return jax.tree.map(put, batches, parts, is_leaf=_is_indexed)


def take(batches: Batch, chosen: Any) -> Batch:
    """Return the batches at ``chosen`` (an index or a slice) along the window axis."""
    return with_windowed(batches, jax.tree.map(lambda x: x[chosen], windowed(batches)))


def one_step(batch: Batch) -> Batch:
    """Return one batch as a window's batches with K = 1."""
    return of_length(with_windowed(batch, jax.tree.map(lambda x: jnp.asarray(x)[None], windowed(batch))), 1)


def split(batch: Batch, count: int) -> PyTree:
    """Return what of a batch has an axis of examples, cut into ``count`` equal parts along a new leading axis."""

    def cut(path: Any, x: Any) -> Array:
        array = jnp.asarray(x)
        if array.ndim == 0 or array.shape[0] % count:
            got, fix = f"shape {array.shape}", "Pass batches whose size num_microbatches divides."
            name = jax.tree_util.keystr(path)
            raise ValueError(validate.message(f"batch leaf {name} with a leading axis divisible by {count}", got, fix))
        return array.reshape(count, array.shape[0] // count, *array.shape[1:])

    return jax.tree_util.tree_map_with_path(cut, windowed(batch))


def of_length(batches: Batch, length: int) -> Batch:
    """Return the batches so that they tell K, also where they have no leaves: the loss sees the same."""
    return batches if jax.tree.leaves(windowed(batches)) else IndexedBatch(batches, jnp.arange(length))


def window_length(inner_batch: Batch, window: int | None = None) -> int:
    """Return the common leading axis K of the batch's leaves; refuse a missing, unequal or unexpected one."""
    fix = "Stack K batches, e.g. jax.tree.map(lambda *b: jnp.stack(b), *batches)."
    wanted = f"a leading window axis of length {window}" if window else "a common leading window axis"
    parts = windowed(inner_batch)
    leaves, names = jax.tree.leaves(parts), tree.leaf_names(parts)
    length = window
    for leaf, name in zip(leaves, names, strict=True):
        shape = jnp.shape(leaf)
        if not shape or shape[0] == 0 or (length is not None and shape[0] != length):
            wanted_here = wanted if window or length is None else f"{wanted} ({length}, from the first leaf)"
            got = f"shape {shape}"
            raise ValueError(validate.message(f"inner_batch leaf {name} with {wanted_here}", got, fix))
        length = shape[0]
    if length is None:
        fix = "Where the loss takes no data, pass hg.IndexedBatch((), jnp.arange(K)): it sees () in each of K steps."
        raise ValueError(validate.message(f"inner_batch with {wanted}", "a batch without leaves", fix))
    return int(length)


def _gather(part: IndexedBatch) -> PyTree:
    indices = jnp.asarray(part.indices)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        fix = "Pass integers in 0 … N−1, e.g. jax.random.randint(key, (K, B), 0, N)."
        raise TypeError(validate.message("IndexedBatch indices of an integer dtype", str(indices.dtype), fix))
    if any(map(_is_indexed, jax.tree.leaves(part.data, is_leaf=_is_indexed))):
        fix = "Index the data once: data[first][second] is data[first[second]]."
        raise TypeError(validate.message("IndexedBatch data of arrays", "an IndexedBatch inside it", fix))
    leaves = jax.tree.leaves(part.data, is_leaf=_is_sparse)
    lengths = {jnp.shape(leaf)[:1] for leaf in leaves if _is_array(leaf) or _is_sparse(leaf)}
    if len(lengths) > 1 or () in lengths:
        fix = "Pass all examples: images and labels of the same N."
        got = f"leading axes {sorted(lengths)}"
        raise ValueError(validate.message("IndexedBatch data whose leaves have a common leading axis N", got, fix))

    def rows(x: Any) -> Any:
        if _is_sparse(x):
            return x[indices]
        return jnp.asarray(x)[indices] if _is_array(x) else x

    return jax.tree.map(rows, part.data, is_leaf=_is_sparse)


def _is_array(x: Any) -> bool:
    """Return whether a leaf is data: a loss may be handed strings, flags and functions too, the same in each step."""
    return tree.is_number(x)


def _is_sparse(x: Any) -> bool:
    return type(x).__module__.startswith("jax.experimental.sparse")  # by name: the module is slow to import


def _is_indexed(x: Any) -> bool:
    return isinstance(x, IndexedBatch)
