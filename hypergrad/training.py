"""Inner training: optax steps on the inner loss, K of them in one ``lax.scan``, in little memory.

    w_{i+1}, s_{i+1} = optimizer(∇_w L_in(w_i, λ, batch_i), s_i, w_i)          i = 0 … K−1

The random keys of a call are fixed here, so that wrapper and estimators agree: ``inner``, ``outer`` and
``solve`` are split from the call's key, step i of a window uses ``fold_in(inner, i)``, and all products of one
linear solve share ``solve``.

Differentiated in reverse, a rollout needs what each step saw. With a checkpoint every c steps the scan keeps weights
and optimizer state K/c times, and of the c steps that it computes again at a time c times: 2√K at c = √K. A step
that is computed again takes its inner gradient from memory, so only the optimizer's arithmetic is repeated.

Reference: Griewank, Achieving logarithmic growth of temporal and spatial complexity in reverse automatic
differentiation, Optimization Methods and Software 1992.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from hypergrad import data, tree, validate
from hypergrad.types import Array, Batch, Hyperparams, ModelState, Params, PyTree

InnerGradient: TypeAlias = Callable[[Params, Batch, Array | None, ModelState], tuple[Params, ModelState]]
"""``(params, batch, key, model_state) -> (∇_w L_in, model_state)`` at fixed hyperparameters."""

_INNER_GRADIENT = "inner_gradient"
_TWO_LEVELS_FROM = 50  # steps: below, what a second level saves is not worth a third forward pass


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


class Window(NamedTuple):
    """What a rollout steps over.

    Attributes:
      numbers: int32 (K,), the steps' numbers inside the call.
      batches: leaves with leading axis K, or ``IndexedBatch``.
      key: the call's ``inner`` key, or None.
    """

    numbers: Array
    batches: Batch
    key: Array | None


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


def make_window(batches: Batch, key: Array | None) -> Window:
    """Return the window over ``batches``, of the length that their leaves have."""
    length = data.window_length(batches)
    return Window(jnp.arange(length, dtype=jnp.int32), batches, key)


def split_window(window: Window, at: int) -> tuple[Window, Window]:
    """Return the window's first ``at`` steps, and the others."""

    def part(chosen: slice) -> Window:
        return Window(window.numbers[chosen], data.take(window.batches, chosen), window.key)

    return part(slice(None, at)), part(slice(at, None))


def checkpoint_interval(length: int) -> int:
    """Return the default steps between checkpoints: 1, and about √K for long windows, which divides K if it can."""
    if length < _TWO_LEVELS_FROM:
        return 1
    root = math.sqrt(length)
    near = [c for c in range(math.ceil(root / 2), math.floor(2 * root) + 1) if length % c == 0]
    return min(near, key=lambda c: c + length // c, default=round(root))


def rollout(
    gradient: InnerGradient,
    optimizer: optax.GradientTransformationExtraArgs,
    start: Rollout,
    window: Window,
    *,
    unroll: int | bool = 1,
    checkpoint_every: float = math.inf,
) -> Rollout:
    """Take one inner step a batch from ``start``.

    Args:
      gradient: ``(params, batch, key, model_state) -> (grads, model_state)``, the inner loss's.
      optimizer: an optax transformation of gradients shaped like the weights.
      start: where to begin.
      window: data and keys of the steps.
      unroll: of the innermost scan.
      checkpoint_every: steps between checkpoints; infinite for none. Acts on reverse-mode differentiation alone.

    Returns:
      Weights, optimizer state and model state after K steps.
    """

    def step(at: Rollout, indexed: tuple[Array, Batch]) -> tuple[Rollout, None]:
        index, part = indexed
        batch = data.gathered(data.with_windowed(window.batches, part))
        grads, model_state = gradient(at.params, batch, step_key(window.key, index), at.model_state)
        grads = checkpoint_name(grads, _INNER_GRADIENT)
        updates, inner_state = optimizer.update(grads, at.inner_state, at.params)
        inner_state = tree.match_dtypes(inner_state, at.inner_state)  # a float32 momentum widens bfloat16 traces
        return Rollout(optax.apply_updates(at.params, updates), inner_state, model_state), None

    steps = window.numbers, data.windowed(window.batches)
    length = len(window.numbers)
    if length == 1:  # nothing to scan over, and a loop around a convolution is dear on CPU
        return step(start, jax.tree.map(lambda x: x[0], steps))[0]
    if checkpoint_every == math.inf:
        return lax.scan(step, start, steps, unroll=unroll)[0]
    # Without a loop around it, the compiler would find a step's second computation to be its first.
    keep, separate = jax.checkpoint_policies.save_only_these_names(_INNER_GRADIENT), unroll != 1
    step = jax.checkpoint(step, prevent_cse=separate, policy=keep)
    if checkpoint_every == 1:
        return lax.scan(step, start, steps, unroll=unroll)[0]
    size = min(int(checkpoint_every), length)
    whole = length - length % size

    def segment(at: Rollout, steps: Any) -> tuple[Rollout, None]:
        return lax.scan(step, at, steps, unroll=unroll)

    stacked = jax.tree.map(lambda x: x[:whole].reshape(whole // size, size, *x.shape[1:]), steps)
    reached, _ = lax.scan(jax.checkpoint(segment, prevent_cse=False), start, stacked)
    if whole < length:
        reached, _ = jax.checkpoint(segment)(reached, jax.tree.map(lambda x: x[whole:], steps))
    return reached


def step_key(key: Array | None, index: Any) -> Array | None:
    """Return the key of step ``index`` of a window, from the call's ``inner`` key."""
    return None if key is None else jax.random.fold_in(key, index)


def resolve_optimizer(inner_optimizer: Any, constrained: Hyperparams) -> optax.GradientTransformationExtraArgs:
    """Return the inner optimizer, built from the constrained hyperparameters where it is a function of them."""
    if not depends_on_hyperparams(inner_optimizer):
        return validate.transformation("inner_optimizer", inner_optimizer)
    return validate.transformation("inner_optimizer(hyperparams)", inner_optimizer(constrained))


def depends_on_hyperparams(inner_optimizer: Any) -> bool:
    """Return whether the inner optimizer is given as a function of the hyperparameters."""
    return callable(inner_optimizer) and not isinstance(
        inner_optimizer, optax.GradientTransformation | optax.MultiSteps
    )


def with_keywords(inner_optimizer: Any, keywords: Mapping[str, Any]) -> Any:
    """Return the inner optimizer, or the function that gives it, with ``keywords`` handed to every update."""
    if not keywords:
        return inner_optimizer
    if depends_on_hyperparams(inner_optimizer):
        return lambda constrained: with_keywords(resolve_optimizer(inner_optimizer, constrained), keywords)
    optimizer = resolve_optimizer(inner_optimizer, None)

    def update(grads: Params, state: PyTree, params: Params | None = None, **others: Any) -> tuple[Params, PyTree]:
        return optimizer.update(grads, state, params, **{**keywords, **others})

    return optax.GradientTransformationExtraArgs(optimizer.init, update)
