"""Pieces of optax optimizers for ``hg.unrolled``: numbers per weight, layer or step, and norms with a derivative at 0.

    scale_by_learning_rate(α):  uᵢ ← −αᵢ uᵢ            add_decayed_weights(c):  uᵢ ← uᵢ + cᵢ wᵢ
    clip_by_global_norm(m):  u ← u min(1, m / ‖u‖)     with the derivative of u ↦ u at u = 0

optax takes traced scalars (learning rate, momentum, Adam's betas) as they are, but no trees of rates or decays. Its
transformations by a norm have the derivative NaN where the norm is zero, since ∂√s/∂s is infinite at s = 0. Use these
inside an ``inner_optimizer`` that is a function of the constrained hyperparameters:

    inner_optimizer=lambda h: optax.chain(
        optax.scale_by_adam(eps_root=1e-8),
        hg.optimizers.add_decayed_weights(h["decay"]),
        hg.optimizers.scale_by_learning_rate(hg.optimizers.schedule(h["rates"])),
    )
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hypergrad import tree, validate
from hypergrad.types import Array, Params, PyTree

__all__ = [
    "add_decayed_weights",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "normalize_by_update_norm",
    "scale_by_learning_rate",
    "schedule",
]


def scale_by_learning_rate(rates: PyTree | Callable[[Array], PyTree]) -> optax.GradientTransformation:
    """Multiply updates by minus a learning rate: one number, or one per layer or per weight.

    uᵢ ← −αᵢ uᵢ.

    Args:
      rates: a tree prefix of the weights, each of whose leaves broadcasts to the shape of the weights below it; or a
        function from the number of steps taken so far (int32) to such a tree, e.g. ``hg.optimizers.schedule(...)``.

    Returns:
      An ``optax.GradientTransformation``, the last of a chain. Its state counts steps where ``rates`` is a function.

    Raises:
      ValueError: at ``update``, rates that are no tree prefix of the weights, or of a shape that does not broadcast.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_learning_rate({"a": 0.1, "b": jnp.array([1.0, 2.0])})
    >>> grads = {"a": jnp.ones(1), "b": jnp.ones(2)}
    >>> updates, _ = tx.update(grads, tx.init(grads))
    >>> updates["b"].tolist()
    [-1.0, -2.0]

    Reference: Maclaurin, Duvenaud & Adams, Gradient-based hyperparameter optimization through reversible learning,
    arXiv 1502.03492.
    """

    def init(params: Params) -> Any:
        del params
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)) if callable(rates) else optax.EmptyState()

    def update(updates: PyTree, state: Any, params: Params | None = None) -> tuple[PyTree, Any]:
        del params
        now = rates(state.count) if callable(rates) else rates
        found = validate.by_prefix("optimizers.scale_by_learning_rate", "rates", updates, now)
        scaled = [_in_dtype_of(u, lambda u, rate: -rate * u, u, rate) for _, u, rate in found]
        if callable(rates):
            state = optax.ScaleByScheduleState(optax.safe_increment(state.count))
        return jax.tree.unflatten(jax.tree.structure(updates), scaled), state

    return optax.GradientTransformation(init, update)


def add_decayed_weights(decays: PyTree) -> optax.GradientTransformation:
    """Add a decoupled weight decay to the updates: one number, or one per layer or per weight.

    uᵢ ← uᵢ + cᵢ wᵢ. Between ``optax.scale_by_adam`` and the learning rate it makes ``optax.adamw``.

    Args:
      decays: a tree prefix of the weights, each of whose leaves broadcasts to the shape of the weights below it.

    Returns:
      An ``optax.GradientTransformation`` without state, which needs ``params``.

    Raises:
      ValueError: at ``update``, no ``params``, or decays that do not fit them.

    >>> import jax.numpy as jnp
    >>> tx = add_decayed_weights(jnp.array([0.0, 0.5]))
    >>> updates, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), 2 * jnp.ones(2))
    >>> updates.tolist()
    [1.0, 2.0]

    Reference: Loshchilov & Hutter, Decoupled weight decay regularization, arXiv 1711.05101.
    """

    def init(params: Params) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(updates: PyTree, state: Any, params: Params | None = None) -> tuple[PyTree, Any]:
        if params is None:
            fix = "Call update(updates, state, params)."
            raise ValueError(validate.message("params for optimizers.add_decayed_weights", "None", fix))
        found = validate.by_prefix("optimizers.add_decayed_weights", "decays", params, decays)
        pairs = zip(jax.tree.leaves(updates), found, strict=True)
        decayed = [_in_dtype_of(u, lambda u, c, w: u + c * w, u, c, w) for u, (_, w, c) in pairs]
        return jax.tree.unflatten(jax.tree.structure(updates), decayed), state

    return optax.GradientTransformation(init, update)


def clip_by_global_norm(max_norm: Any) -> optax.GradientTransformation:
    """Scale updates down to a global norm: ``optax.clip_by_global_norm`` with a derivative at zero.

    u ← u if ‖u‖ < m, else m u / ‖u‖, where ‖u‖ is the Euclidean norm over all leaves. The derivative at u = 0 is the
    identity, while that of ``optax.clip_by_global_norm`` is NaN in reverse mode.

    Args:
      max_norm: m > 0, may be a hyperparameter.

    Returns:
      An ``optax.GradientTransformation`` without state and with the values of optax's.

    >>> import jax, jax.numpy as jnp
    >>> clip = lambda u: clip_by_global_norm(5.0).update(u, ())[0]
    >>> clip(jnp.array([6.0, 8.0])).tolist()
    [3.0, 4.0]
    >>> jax.jacrev(clip)(jnp.zeros(2)).tolist()
    [[1.0, 0.0], [0.0, 1.0]]

    Reference: Pascanu, Mikolov & Bengio, On the difficulty of training recurrent neural networks, arXiv 1211.5063.
    """

    def clip(updates: PyTree) -> PyTree:
        norm = root(optax.tree.norm(updates, squared=True))
        divisor, is_small = jnp.where(norm > 0, norm, 1), norm < max_norm
        limited = lambda u: _in_dtype_of(u, lambda u, m: u / divisor.astype(u.dtype) * m, u, max_norm)  # noqa: E731
        return jax.tree.map(lambda u: jnp.where(is_small, u, limited(u)), updates)

    return optax.stateless(lambda updates, _: clip(updates))


def clip_by_block_rms(threshold: Any) -> optax.GradientTransformation:
    """Scale each leaf of the updates down to a root mean square: ``optax.clip_by_block_rms`` with a derivative at zero.

    uᵢ ← uᵢ / max(1, rms(uᵢ) / t), leaf by leaf, where rms(u) = √mean(u²). The derivative at uᵢ = 0 is the identity,
    while that of ``optax.clip_by_block_rms`` is NaN.

    Args:
      threshold: t > 0, may be a hyperparameter.

    Returns:
      An ``optax.GradientTransformation`` without state and with the values of optax's.

    >>> import jax, jax.numpy as jnp
    >>> clip = lambda u: clip_by_block_rms(1.0).update(u, ())[0]
    >>> clip(jnp.array([2.0, -2.0])).tolist()
    [1.0, -1.0]
    >>> jax.jacrev(clip)(jnp.zeros(2)).tolist()
    [[1.0, 0.0], [0.0, 1.0]]

    Reference: Shazeer & Stern, Adafactor: adaptive learning rates with sublinear memory cost, arXiv 1804.04235 §6.
    """

    def clip(u: Array) -> Array:
        rms = root(jnp.mean(jnp.square(u)))
        return _in_dtype_of(u, lambda u, rms, t: u / jnp.maximum(1, rms / t), u, rms, threshold)

    return optax.stateless(lambda updates, _: jax.tree.map(clip, updates))


def normalize_by_update_norm(scale_factor: Any = 1.0, eps: Any = 1e-6) -> optax.GradientTransformation:
    """Divide updates by their global norm: ``optax.normalize_by_update_norm`` with a derivative at zero.

    u ← s u / (‖u‖ + ε), where ‖u‖ is the Euclidean norm over all leaves. The derivative at u = 0 is s/ε times the
    identity, while that of ``optax.normalize_by_update_norm`` is NaN.

    Args:
      scale_factor: s, may be a hyperparameter.
      eps: ε > 0. A small one makes the derivative near zero large.

    Returns:
      An ``optax.GradientTransformation`` without state and with the values of optax's.

    >>> import jax, jax.numpy as jnp
    >>> normalize = lambda u: normalize_by_update_norm(eps=0.5).update(u, ())[0]
    >>> normalize(jnp.array([1.5])).tolist()
    [0.75]
    >>> jax.jacrev(normalize)(jnp.zeros(1)).tolist()
    [[2.0]]

    Reference: Hazan, Levy & Shalev-Shwartz, Beyond convexity: stochastic quasi-convex optimization, arXiv 1507.02030.
    """

    def normalize(updates: PyTree) -> PyTree:
        divisor = (root(optax.tree.norm(updates, squared=True)) + eps) / scale_factor
        return jax.tree.map(lambda u: _in_dtype_of(u, jnp.divide, u, divisor), updates)

    return optax.stateless(lambda updates, _: normalize(updates))


def schedule(values: PyTree) -> Callable[[Any], Any]:
    """Return a schedule of K values, one per step, which starts again after K steps.

    count ↦ values[count mod K]: with a window of K steps, step i of every window gets value i.

    Args:
      values: leaves with a common leading axis K: (K,) for an optax ``learning_rate``, or a tree prefix of the
        weights with (K, …) leaves for ``scale_by_learning_rate``.

    Returns:
      A function from the number of steps taken so far to the values of the next step, as optax's schedules are.

    Raises:
      ValueError: no leaves, or leading axes that are missing or differ.

    >>> import jax.numpy as jnp
    >>> rate = schedule(jnp.array([0.1, 0.2, 0.4]))
    >>> [round(float(rate(i)), 1) for i in range(4)]
    [0.1, 0.2, 0.4, 0.1]

    Reference: Maclaurin, Duvenaud & Adams, arXiv 1502.03492.
    """
    shapes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(values)}
    if len(shapes) != 1 or shapes & {(), (0,)}:
        fix = "Pass one value per step, e.g. jnp.full(K, 0.1)."
        wanted = "optimizers.schedule: values whose leaves have a common leading axis K"
        raise ValueError(validate.message(wanted, f"leading axes {sorted(shapes)}", fix))
    (length,) = shapes.pop()
    return lambda count: jax.tree.map(lambda leaf: jnp.asarray(leaf)[count % length], values)


def root(square: Array) -> Array:
    """Return √square, with derivative 0 instead of infinity at 0."""
    is_zero = square == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))


def _in_dtype_of(like: Array, fn: Callable[..., Array], *values: Any) -> Array:
    """Compute in the widest of the dtypes, give the result in that of ``like``, as optax's transformations do."""
    dtype = tree.wider(*(v.dtype for v in values if hasattr(v, "dtype")))
    return fn(*(jnp.asarray(v, dtype) for v in values)).astype(like.dtype)
