"""Pieces of optax optimizers whose numbers may be hyperparameters: one a weight, one a layer, one a step.

    scale_by_learning_rate(α):  uᵢ ← −αᵢ uᵢ            add_decayed_weights(c):  uᵢ ← uᵢ + cᵢ wᵢ

optax takes traced scalars (learning rate, momentum, Adam's betas) as they are; it takes no tree of rates or decays.
Use these inside an ``inner_optimizer`` that is a function of the constrained hyperparameters, with ``hg.unrolled``:

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


def scale_by_learning_rate(rates: PyTree | Callable[[Array], PyTree]) -> optax.GradientTransformation:
    """Multiply updates by minus a learning rate: one number, one a layer, or one a weight.

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
    """Add a decoupled weight decay to the updates: one number, one a layer, or one a weight.

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

    def update(
        updates: PyTree, state: optax.EmptyState, params: Params | None = None
    ) -> tuple[PyTree, optax.EmptyState]:
        if params is None:
            fix = "Call update(updates, state, params)."
            raise ValueError(validate.message("params for optimizers.add_decayed_weights", "None", fix))
        found = validate.by_prefix("optimizers.add_decayed_weights", "decays", params, decays)
        pairs = zip(jax.tree.leaves(updates), found, strict=True)
        decayed = [_in_dtype_of(u, lambda u, c, w: u + c * w, u, c, w) for u, (_, w, c) in pairs]
        return jax.tree.unflatten(jax.tree.structure(updates), decayed), state

    return optax.GradientTransformation(init, update)


def schedule(values: PyTree) -> Callable[[Array], PyTree]:
    """Return the schedule that reads off K values, one a step, and begins anew after K steps.

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
        fix = "Pass one value a step, e.g. jnp.full(K, 0.1)."
        wanted = "optimizers.schedule: values whose leaves have a common leading axis K"
        raise ValueError(validate.message(wanted, f"leading axes {sorted(shapes)}", fix))
    (length,) = shapes.pop()
    return lambda count: jax.tree.map(lambda leaf: jnp.asarray(leaf)[count % length], values)


def _in_dtype_of(like: Array, fn: Callable[..., Array], *values: Any) -> Array:
    """Compute in the widest of the dtypes, give the result in that of ``like``, as optax's transformations do."""
    dtype = tree.wider(*(v.dtype for v in values if hasattr(v, "dtype")))
    return fn(*(jnp.asarray(v, dtype) for v in values)).astype(like.dtype)
