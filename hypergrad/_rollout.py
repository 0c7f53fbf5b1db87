"""Inner training: optax steps on the inner loss, K of them in one ``lax.scan``.

    w_{i+1}, s_{i+1} = optimizer(∇_w L_in(w_i, λ, batch_i), s_i, w_i)          i = 0 … K−1

The random keys of a call are fixed here, so that wrapper and estimators agree: ``inner``, ``outer`` and
``solve`` are split from the call's key, step i of a window uses ``fold_in(inner, i)``, and all products of one
linear solve share ``solve``.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax

from hypergrad import _checks
from hypergrad._types import Array, Batch, Hyperparams, ModelState, Params, PyTree

InnerGradient: TypeAlias = Callable[[Params, Batch, Array | None, ModelState], tuple[Params, ModelState]]
"""``(params, batch, key, model_state) -> (∇_w L_in, model_state)`` at fixed hyperparameters."""


class CallKeys(NamedTuple):
    """The keys of one call; each None where the call has none.

    Attributes:
      inner: folded with the step's index inside the window.
      outer: for the outer loss.
      solve: for every product of the call's linear solve.
    """

    inner: Array | None
    outer: Array | None
    solve: Array | None


class Rollout(NamedTuple):
    """Where inner training stands.

    Attributes:
      params: tree like the weights.
      inner_state: the inner optimizer's state.
      model_state: the model's state; () for a stateless problem.
    """

    params: Params
    inner_state: PyTree
    model_state: ModelState


def split_keys(key: Array | None) -> CallKeys:
    """Split a call's key into those for inner steps, outer loss and linear solve."""
    return CallKeys(None, None, None) if key is None else CallKeys(*jax.random.split(key, 3))


def rollout(
    gradient: InnerGradient,
    optimizer: optax.GradientTransformationExtraArgs,
    start: Rollout,
    batches: Batch,
    *,
    key: Array | None,
    length: int | None = None,
    extra: Mapping[str, Any] = MappingProxyType({}),
    unroll: int | bool = 1,
) -> Rollout:
    """Take one inner step a batch from ``start``; leaves of ``batches`` carry the window axis first.

    Args:
      gradient: ``(params, batch, key, model_state) -> (grads, model_state)``, the inner loss's.
      optimizer: an optax transformation of gradients shaped like the weights.
      start: where to begin.
      batches: leaves with leading axis K.
      key: the call's ``inner`` key, or None.
      length: K, needed only where the batch has no leaves.
      extra: keywords passed on to the optimizer's ``update``.
      unroll: of the scan.

    Returns:
      Weights, optimizer state and model state after K steps.
    """
    if length is None:
        length = _checks.window_length(batches)

    def step(at: Rollout, indexed: tuple[Array, Batch]) -> tuple[Rollout, None]:
        index, batch = indexed
        grads, model_state = gradient(at.params, batch, step_key(key, index), at.model_state)
        updates, inner_state = optimizer.update(grads, at.inner_state, at.params, **extra)
        return Rollout(optax.apply_updates(at.params, updates), inner_state, model_state), None

    final, _ = lax.scan(step, start, (jnp.arange(length), batches), unroll=unroll)
    return final


def step_key(key: Array | None, index: Any) -> Array | None:
    """Return the key of step ``index`` of a window, from the call's ``inner`` key."""
    return None if key is None else jax.random.fold_in(key, index)


def last_batch(batches: Batch) -> Batch:
    """Return the last batch of a window."""
    return jax.tree.map(lambda x: x[-1], batches)


def resolve_optimizer(inner_optimizer: Any, constrained: Hyperparams) -> optax.GradientTransformationExtraArgs:
    """Return the inner optimizer, built from the constrained hyperparameters where it is a function of them."""
    if not depends_on_hyperparams(inner_optimizer):
        return _checks.transformation("inner_optimizer", inner_optimizer)
    return _checks.transformation("inner_optimizer(hyperparams)", inner_optimizer(constrained))


def depends_on_hyperparams(inner_optimizer: Any) -> bool:
    """Return whether the inner optimizer is given as a function of the hyperparameters."""
    return callable(inner_optimizer) and not isinstance(
        inner_optimizer, optax.GradientTransformation | optax.MultiSteps
    )
