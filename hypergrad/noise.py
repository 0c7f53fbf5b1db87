"""Noise and augmentation whose strength is a hyperparameter: one number for the batch, or one per example.

    y = x · m / (1 − p),   m ~ Bernoulli(1 − p)            p of shape (), or (B,) for a batch of B examples

A sampled mask is not differentiable: a dropout rate, a number of holes or a rounded size has zero derivative here. Tune
them by a learned response (``hg.direct`` with self-tuning, which perturbs the rate per example) or by evolution;
``hg.implicit`` and ``hg.unrolled`` refuse them. ``gaussian_noise``, ``smooth_labels`` and ``perturb_weights`` are
smooth in their strength, and any estimator can tune it.

Concrete strengths are checked, traced ones are not; a mask's rate is clipped to [0, 1]. Inputs keep their dtype; random
numbers and factors have the dtype of the strength, at least float32.
Reference: MacKay et al., Self-Tuning Networks, arXiv 1903.03088.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hypergrad import tree, validate
from hypergrad.types import Array, Key, Params, PyTree

__all__ = [
    "HyperDropout",
    "cutout",
    "drop_tokens",
    "drop_weights",
    "dropout",
    "gaussian_noise",
    "perturb_weights",
    "smooth_labels",
    "stochastic_round",
]


def dropout(key: Key, x: Array, rate: Any, *, broadcast_dims: Sequence[int] = ()) -> Array:
    """Zero entries with probability p and divide the others by 1 − p.

    E[y] = x, Var[y] = x² p/(1 − p). Reference: arXiv 1207.0580; with a mask shared over time, arXiv 1512.05287.

    Args:
      key: random key.
      x: floating array; with one rate per example, axis 0 is the batch.
      rate: p in [0, 1), of shape () or (B,). A traced rate cannot be checked: below 0 it counts as 0, and from 1 on
        y = 0. Give a learned rate the bijector ``hg.bijectors.sigmoid()``, which keeps it between.
      broadcast_dims: axes along which the mask is constant; 1 for x of shape (batch, time, features) is variational
        dropout. If ``broadcast_dims`` contains 0, all examples use the same random numbers. Examples with the same rate
        then have the same mask.

    Returns:
      y, of the shape and dtype of ``x``. Its derivative in ``rate`` is zero.

    Raises:
      ValueError, TypeError: no key, a rate of another shape or outside [0, 1), an axis that ``x`` does not have.

    >>> dropout(jax.random.key(0), jnp.ones((2, 4)), jnp.array([0.0, 0.5])).tolist()[0]
    [1.0, 1.0, 1.0, 1.0]
    """
    x = _typed("dropout", "x", x)
    p = _numbers("dropout", "rate", rate, like=x, high=1.0)
    inside = all(-x.ndim <= axis < x.ndim for axis in broadcast_dims)
    _require(inside, "dropout", f"broadcast_dims among the {x.ndim} axes of x", f"{broadcast_dims}", "Count from 0.")
    shared = {axis % x.ndim for axis in broadcast_dims}
    shape = [1 if i in shared else size for i, size in enumerate(x.shape)]
    return _masked(x, jax.random.uniform(_key("dropout", key), shape, p.dtype), p)


class HyperDropout(nn.Module):
    """Drop entries at a rate that is a variable of the collection "hyper": ``dropout`` as a Flax module.

    ``model.init`` gives ``{"params": …, "hyper": {…: {"rate": initial_rate}}}``. The second tree is the constrained
    hyperparameters: ``model.apply({"params": w, "hyper": h}, …)`` reads its rates from it, each of shape () or (B,).
    Reference: MacKay et al., arXiv 1903.03088.

    Attributes:
      initial_rate: p in [0, 1) that ``init`` puts into the collection.
      broadcast_dims: axes along which the mask is constant, as for ``dropout``.
      rng_collection: name of the random key among ``rngs``.
      deterministic: True returns the input; pass it here or to the call, not both.

    >>> HyperDropout(0.2).init(jax.random.key(0), jnp.ones((2, 3)), deterministic=True)
    {'hyper': {'rate': Array(0.2, dtype=float32)}}
    """

    initial_rate: float = 0.1
    broadcast_dims: Sequence[int] = ()
    rng_collection: str = "dropout"
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x: Array, *, deterministic: bool | None = None, rate: Any = None) -> Array:
        """Return ``dropout(key, x, rate)``, or ``x`` if deterministic; ``rate`` replaces that of the collection."""
        skip = nn.merge_param("deterministic", self.deterministic, deterministic)
        if rate is None and (not skip or self.is_initializing()):
            rate = self._rate()
        if skip:
            return x
        return dropout(self.make_rng(self.rng_collection), x, rate, broadcast_dims=self.broadcast_dims)

    def _rate(self) -> Any:
        found = self.is_initializing() or self.has_variable("hyper", "rate")
        wanted = f'a "rate" at "{"/".join(self.path)}" of the collection "hyper"'
        _require(found, "HyperDropout", wanted, "none", 'Pass {"params": …, "hyper": …}, or a rate to the call.')
        first = ("HyperDropout", "initial_rate", self.initial_rate)
        return self.variable("hyper", "rate", _numbers, *first, high=1.0).value


def gaussian_noise(key: Key, x: Array, scale: Any) -> Array:
    """Add Gaussian noise: y = x + s ε, ε ~ N(0, 1) per entry; smooth in s.

    Reference: MacKay et al., arXiv 1903.03088.

    Args:
      key: random key.
      x: floating array; with one scale per example, axis 0 is the batch.
      scale: s ≥ 0, of shape () or (B,).

    Returns:
      y, of the shape and dtype of ``x``.

    Raises:
      ValueError, TypeError: no key, a scale of another shape, or negative.

    >>> gaussian_noise(jax.random.key(0), jnp.ones((2, 2)), jnp.array([0.0, 0.5])).tolist()[0]
    [1.0, 1.0]
    """
    x = _typed("gaussian_noise", "x", x)
    s = _numbers("gaussian_noise", "scale", scale, like=x)
    return _plus_noise(_key("gaussian_noise", key), x, s)


def smooth_labels(labels: Array, num_classes: int, rate: Any) -> Array:
    """Mix one-hot targets with the uniform distribution: t = (1 − p) onehot + p / C; smooth in p.

    Reference: Szegedy et al., arXiv 1512.00567.

    Args:
      labels: integers (B, …) in 0 … C−1. Another integer, such as −1 for padding, gives p / C for all classes.
      num_classes: C.
      rate: p in [0, 1), of shape () or (B,).

    Returns:
      Targets (B, …, C) in the dtype of ``rate``, at least float32.

    Raises:
      ValueError, TypeError: labels that are not integers, a rate of another shape or outside [0, 1).

    >>> smooth_labels(jnp.array([0, 1]), 2, jnp.array([0.0, 0.5])).tolist()
    [[1.0, 0.0], [0.25, 0.75]]
    """
    labels = _typed("smooth_labels", "labels", labels, jnp.integer)
    onehot = jax.nn.one_hot(labels, validate.positive_int("num_classes", num_classes), dtype=jnp.float32)
    p = _numbers("smooth_labels", "rate", rate, like=onehot, high=1.0)
    return (1 - p) * onehot.astype(p.dtype) + p / num_classes


def stochastic_round(key: Key, x: Any) -> Array:
    """Round down or up at random, without bias: ⌊x⌋ + b, b ~ Bernoulli(x − ⌊x⌋).

    Reference: Gupta et al., arXiv 1502.02551.

    Args:
      key: random key.
      x: floating number or array.

    Returns:
      int32, of the shape of ``x``; valid when ⌊x⌋ + 1 fits into int32. Its derivative is zero.

    Raises:
      ValueError, TypeError: no key, or x not of a floating dtype.

    >>> stochastic_round(jax.random.key(0), jnp.array([2.0, -3.0])).tolist()
    [2, -3]
    """
    x = tree.promote(lax.stop_gradient(_typed("stochastic_round", "x", x)))
    down = jnp.floor(x)
    up = jax.random.uniform(_key("stochastic_round", key), x.shape, x.dtype) < x - down
    return down.astype(jnp.int32) + up.astype(jnp.int32)


def cutout(key: Key, images: Array, size: Any, count: Any, *, max_count: int) -> Array:
    """Set square holes in images to zero, at centres drawn uniformly from the image and clipped at its border.

    Reference: DeVries & Taylor, arXiv 1708.04552.

    Args:
      key: random key.
      images: (B, H, W) or (B, H, W, C), of any numeric dtype.
      size: side s ≥ 0 in pixels, real, of shape () or (B,): rounded by ``stochastic_round``, once per example.
      count: number of holes, real, in 0 … ``max_count``, of shape () or (B,): rounded in the same way.
      max_count: the largest number of holes, static. A traced count above it is clipped to it.

    Returns:
      Images of the same shape and dtype. Derivatives in ``size`` and ``count`` are zero.

    Raises:
      ValueError, TypeError: no key, images of another rank, a size or count of another shape, negative or too large.

    >>> cut = cutout(jax.random.key(0), jnp.ones((2, 8, 8)), 1.0, jnp.array([0.0, 1.0]), max_count=3)
    >>> cut.sum((1, 2)).tolist()
    [64.0, 63.0]
    """
    images = jnp.asarray(images)
    wanted, fix = "images (B, H, W) or (B, H, W, C)", "Reshape them; a single image needs a batch axis of size 1."
    _require(images.ndim in (3, 4), "cutout", wanted, f"shape {images.shape}", fix)
    holes = np.arange(validate.positive_int("max_count", max_count), dtype=np.int32)
    planes, batch = images.reshape(*images.shape[:3], -1)[..., 0], images.shape[:1]
    keys = jax.random.split(_key("cutout", key), 4)
    sizes = _numbers("cutout", "size", size, like=planes)
    counts = _numbers("cutout", "count", count, like=planes, high=max_count, closed=True)
    side = stochastic_round(keys[0], jnp.broadcast_to(sizes, (*batch, 1, 1)))
    drawn = stochastic_round(keys[1], jnp.broadcast_to(counts, (*batch, 1, 1)))
    inside = []
    for k, length in zip(keys[2:], planes.shape[1:], strict=True):
        centre = jax.random.randint(k, (*batch, max_count, 1), 0, length)
        past = np.arange(length, dtype=np.int32)[None, None] - centre + side // 2
        inside.append((past >= 0) & (past < side) & (holes[None, :, None] < drawn))
    cut = jnp.any(inside[0][:, :, :, None] & inside[1][:, :, None, :], axis=1)
    return jnp.where(cut.reshape(cut.shape + (1,) * (images.ndim - 3)), jnp.zeros((), images.dtype), images)


def drop_weights(key: Key, params: Params, rate: PyTree) -> Params:
    """Zero weights with probability p and divide the others by 1 − p: DropConnect, one mask per batch.

    Reference: Merity et al., arXiv 1708.02182.

    Args:
      key: random key.
      params: weights, any pytree of floating arrays.
      rate: a tree prefix of ``params``: numbers p in [0, 1) that broadcast to the weights below. A literal 0 leaves
        them unchanged.

    Returns:
      A tree like ``params``. Its derivative in ``rate`` is zero.

    Raises:
      ValueError, TypeError: no key, a rate that is not a prefix, does not broadcast, or lies outside [0, 1).

    >>> drop_weights(jax.random.key(0), {"a": jnp.ones(2), "b": jnp.ones(9)}, {"a": 0.0, "b": 0.5})["a"].tolist()
    [1.0, 1.0]
    """
    change = lambda key, w, p: _masked(w, jax.random.uniform(key, w.shape, p.dtype), p)  # noqa: E731
    return _by_weight("drop_weights", "rate", change, key, params, rate, high=1.0)


def perturb_weights(key: Key, params: Params, scale: PyTree) -> Params:
    """Add noise to weights, relative to their array's root mean square: w + s · rms(w) ε, ε ~ N(0, 1) per weight.

    One draw per batch; smooth in s; rms(w) is treated as a constant. Reference: Blundell et al., arXiv 1505.05424.

    Args:
      key: random key.
      params: weights, any pytree of floating arrays.
      scale: a tree prefix of ``params``: numbers s ≥ 0 that broadcast to the weights below. A literal 0 leaves them
        unchanged.

    Returns:
      A tree like ``params``; arrays of zeros stay zero.

    Raises:
      ValueError, TypeError: no key, a scale that is not a prefix, does not broadcast, or is negative.

    >>> perturb_weights(jax.random.key(0), {"a": jnp.ones(2), "b": jnp.ones(9)}, {"a": 0.0, "b": 0.1})["a"].tolist()
    [1.0, 1.0]
    """

    def perturb(key: Array, w: Array, s: Array) -> Array:
        wide = lax.stop_gradient(w).astype(tree.wider(w.dtype, s.dtype))
        return _plus_noise(key, w, s.astype(wide.dtype) * jnp.sqrt(jnp.mean(wide * wide)))

    return _by_weight("perturb_weights", "scale", perturb, key, params, scale)


def drop_tokens(key: Key, ids: Array, embedded: Array, rate: Any, *, vocabulary: int) -> Array:
    """Zero whole embeddings with probability p, all occurrences of a word type in a sequence together.

    Reference: Gal & Ghahramani, arXiv 1512.05287.

    Args:
      key: random key.
      ids: word types, integers (B, …) in 0 … ``vocabulary`` − 1; axis 0 holds the sequences.
      embedded: their embeddings, floating, of shape ``ids.shape + (features,)``.
      rate: p in [0, 1), of shape () or (B,).
      vocabulary: number of word types, static.

    Returns:
      Kept embeddings divided by 1 − p, zeros for the others; shape and dtype of ``embedded``, zero derivative in p.

    Raises:
      ValueError, TypeError: no key, shapes that do not match, a rate outside [0, 1).

    >>> y = drop_tokens(jax.random.key(0), jnp.array([[3, 1, 3]]), jnp.ones((1, 3, 2)), 0.5, vocabulary=4)
    >>> bool((y[0, 0] == y[0, 2]).all())
    True
    """
    ids = _typed("drop_tokens", "ids", ids, jnp.integer)
    embedded = _typed("drop_tokens", "embedded", embedded)
    fits, wanted = ids.ndim > 0 and embedded.shape[:-1] == ids.shape, f"embedded of shape {ids.shape} + (features,)"
    _require(fits, "drop_tokens", wanted, f"shape {embedded.shape}", "Pass ids (B, …) and their embeddings.")
    p = _numbers("drop_tokens", "rate", rate, like=embedded, high=1.0)
    size = (ids.shape[0], validate.positive_int("vocabulary", vocabulary))
    by_type = jax.random.uniform(_key("drop_tokens", key), size, p.dtype)
    drawn = jnp.take_along_axis(by_type, ids.reshape(ids.shape[0], -1), axis=1, mode="clip")
    return _masked(embedded, drawn.reshape(*ids.shape, 1), p)


def _masked(x: Array, uniform: Array, rate: Array) -> Array:
    """Keep entries with u < 1 − p. At p = 1 the division is avoided: its derivative would be NaN."""
    keep = 1 - jnp.clip(lax.stop_gradient(rate), 0, 1)
    factor = jnp.where(uniform < keep, 1 / jnp.where(keep > 0, keep, 1), 0)
    dtype = tree.wider(x.dtype, factor.dtype)
    return (x.astype(dtype) * factor.astype(dtype)).astype(x.dtype)


def _plus_noise(key: Array, x: Array, scale: Array) -> Array:
    dtype = tree.wider(x.dtype, scale.dtype)
    return (x.astype(dtype) + scale.astype(dtype) * jax.random.normal(key, x.shape, dtype)).astype(x.dtype)


def _by_weight(name: str, what: str, change: Any, key: Key, params: Params, strengths: PyTree, **bounds: Any) -> Params:
    """Apply ``change(key, weight, strength)`` to every array, with a key from its index in the tree."""
    one, changed = _key(name, key), []
    found = validate.by_prefix(f"noise.{name}", f"{what}s", params, strengths)
    for i, (label, (_, weight, strength)) in enumerate(zip(tree.labels("params", params), found, strict=True)):
        w, s = _typed(name, label, weight), _numbers(name, what, strength, **bounds)
        s = s.reshape((1,) * (w.ndim - s.ndim) + s.shape)
        untouched = isinstance(strength, int | float) and strength == 0
        changed.append(w if untouched else change(jax.random.fold_in(one, i), w, s))
    return jax.tree.unflatten(jax.tree.structure(params), changed)


def _key(name: str, key: Key) -> Array:
    found = validate.as_key(key)
    _require(found is not None, name, "a random key", "None", "Pass jax.random.key(seed).")
    return jnp.asarray(found)


def _typed(name: str, what: str, x: Any, kind: Any = jnp.floating) -> Array:
    dtype = jnp.result_type(x)
    _require(jnp.issubdtype(dtype, kind), name, f"{what} of {kind.__name__} dtype", f"{dtype}", "Cast it.", TypeError)
    return jnp.asarray(x)


def _numbers(name: str, what: str, value: Any, *, like: Any = None, high: Any = np.inf, closed: bool = False) -> Array:
    """Return numbers in [0, high) in at least float32; with ``like``, one or one per example, with as many axes."""
    fine = isinstance(value, int | float | np.number | jax.Array | np.ndarray) and not isinstance(value, bool)
    _require(fine, name, f"{what} to be a number", validate.describe(value), "Pass a float.", TypeError)
    shape = jnp.shape(value)
    batch, rank = (shape, len(shape)) if like is None else (like.shape[:1], like.ndim)
    fix = "Pass one number, or one per example."
    _require(shape in ((), batch), name, f"{what} of shape () or {batch}", f"shape {shape}", fix)
    if not tree.is_traced(value):
        flat = np.asarray(jax.device_get(value), np.float64)
        odd = flat[~((flat >= 0) & np.isfinite(flat) & (flat <= high if closed else flat < high))].ravel()
        fix = "Constrain it, e.g. with hg.bijectors.sigmoid() or hg.bijectors.interval(0.0, high)."
        _require(not odd.size, name, f"{what} in [0, {high:g}{']' if closed else ')'}", f"{odd[:1]}", fix)
    return tree.promote(value).reshape(shape + (1,) * (rank - len(shape)))


def _require(holds: bool, name: str, expected: str, got: str, fix: str, error: Any = ValueError) -> None:
    if not holds:
        raise error(f"noise.{name}: {validate.message(expected, got, fix)}")
