"""Ways to differentiate what a window of steps reached: in reverse, or forward.

    λ ↦ L_out(λ, w_K(λ)):   reverse  (∂w_K)ᵀ ∂L_out, backwards through the steps, any number of λ
                            forward  one tangent ∂w_K·e per hyperparameter, carried along, few λ

How to differentiate is a value that ``hg.unrolled`` takes.

Reference: Franceschi et al., Forward and reverse gradient-based hyperparameter optimization, arXiv 1703.01785.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad import tree, validate
from hypergrad.types import Array, Hyperparams, PyTree

__all__ = ["UnrollMode", "forward", "reverse"]

Window: TypeAlias = Callable[[Hyperparams], PyTree]
"""λ ↦ what the window reached."""

OuterLoss: TypeAlias = Callable[[Hyperparams, PyTree], tuple[Array, Any]]
"""(λ, what the window reached) ↦ (outer loss, aux)."""

_MOST_FORWARD = 1_000
_TWO_LEVELS_FROM = 50  # steps: below, what a second level saves is not worth a third forward pass


class UnrollMode(NamedTuple):
    """How an unroll is differentiated: made by ``hg.reverse`` or ``hg.forward``.

    Attributes:
      value_and_grad: ``(run_window, outer_loss_fn, λ) -> ((value, aux), reached, gradient)`` of
        λ ↦ outer_loss_fn(λ, run_window(λ)), where ``run_window`` gives what the window reached and ``outer_loss_fn``
        the outer loss ``(value, aux)`` there.
      is_reverse: whether it differentiates in reverse, so that checkpoints and the mixed mode apply.
      checkpoint_every: steps between checkpoints; None for the default of the window's length, infinite for none.
      truncate: differentiate the window's last steps only, this many; None for all.
      mixed: take the derivative of a step's gradient by reverse over forward.
      unroll: of the scan over steps.
    """

    value_and_grad: Callable[[Window, OuterLoss, Hyperparams], tuple[tuple[Array, Any], PyTree, Hyperparams]]
    is_reverse: bool
    checkpoint_every: float | None
    truncate: int | None
    mixed: bool
    unroll: int | bool

    def interval(self, length: int) -> float:
        """Return the steps between checkpoints in a window: by default 1, and about √K from K = 50 on, dividing K."""
        if self.checkpoint_every is not None:
            return self.checkpoint_every
        if length < _TWO_LEVELS_FROM:
            return 1
        root = math.sqrt(length)
        near = [c for c in range(math.ceil(root / 2), math.floor(2 * root) + 1) if length % c == 0]
        return min(near, key=lambda c: c + length // c, default=round(root))


def reverse(
    checkpoint_every: float | None = None, truncate: int | None = None, *, mixed: bool = True, unroll: int | bool = 1
) -> UnrollMode:
    """Differentiate an unroll in reverse: for any number of hyperparameters.

    Cost: 3 to 4 forward unrolls, one more with two levels of checkpoints. Memory, measured in copies of the weights and
    the optimizer state: K copies with a checkpoint at each step, or K/c + c copies with a checkpoint every c steps. If
    the update is not linear in the gradient (Adam, or a learned learning rate), add one copy of the gradient for each
    of the K (or c) steps.

    Args:
      checkpoint_every: c ≥ 1, steps between checkpoints. ``None``: each step, and from K = 50 on about every √K, two
        levels. ``math.inf``: none, every intermediate of every step is kept.
      truncate: T ≥ 1: only the last T steps of the window are differentiated, the others taken without. The
        hypergradient is then biased. The bias is small if the inner loss is strongly convex along the optimization
        path. The hypergradient is exactly zero for hyperparameters that only affect the first K − T steps. ``None``, or
        T ≥ K: all.
      mixed: take the derivative of a step's gradient by one reverse pass over one ``jvp`` of the loss, instead of
        reverse over reverse. Same values, less memory and time; ``False`` leaves all to JAX's autodiff, as models
        with ``custom_vjp`` operations get in any case.
      unroll: of the scan over steps; on CPU a network with convolutions needs ``True`` and a short window to be fast.

    Returns:
      An ``UnrollMode``, for ``hg.unrolled(problem, mode=...)``.

    Raises:
      ValueError: a number below 1.
      TypeError: something that is not a number.

    >>> reverse(checkpoint_every=10).checkpoint_every
    10

    Reference: Shaban et al., arXiv 1810.10667; Kemaev et al., arXiv 2505.00793.
    """
    if checkpoint_every is not None and checkpoint_every != math.inf:
        validate.positive_int("checkpoint_every", checkpoint_every)
    if truncate is not None:
        validate.positive_int("truncate", truncate)
    validate.flag("mixed", mixed)
    validate.unroll(unroll)
    return UnrollMode(_reverse_value_and_grad, True, checkpoint_every, truncate, mixed, unroll)


def forward(*, unroll: int | bool = 1) -> UnrollMode:
    """Differentiate an unroll forward, by tangents carried along: for few hyperparameters and long windows.

    Cost and memory: about one forward unroll and one copy of weights and optimizer state per hyperparameter.

    Args:
      unroll: of the scan over steps.

    Returns:
      An ``UnrollMode``, for ``hg.unrolled(problem, mode=...)``; it refuses more than 1,000 hyperparameters.

    >>> forward().is_reverse
    False

    Reference: Franceschi et al., arXiv 1703.01785.
    """
    validate.unroll(unroll)
    return UnrollMode(_forward_value_and_grad, False, math.inf, None, False, unroll)


def _reverse_value_and_grad(run_window: Window, outer_loss_fn: OuterLoss, hyperparams: Hyperparams) -> Any:
    def outcome(hyperparams: Hyperparams) -> tuple[Array, tuple[PyTree, Any]]:
        reached = run_window(hyperparams)
        value, aux = outer_loss_fn(hyperparams, reached)
        return value, (reached, aux)

    (value, (reached, aux)), gradient = jax.value_and_grad(outcome, has_aux=True)(hyperparams)
    return (value, aux), reached, gradient


def _forward_value_and_grad(run_window: Window, outer_loss_fn: OuterLoss, hyperparams: Hyperparams) -> Any:
    """Carry one tangent per hyperparameter through the window; then pair them with the outer loss's slope."""
    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, hyperparams))
    count = sum(leaf.size for leaf in leaves)
    if count > _MOST_FORWARD:
        fix = "Each costs a forward unroll here: use mode=hg.reverse()."
        raise ValueError(
            validate.message(f"at most {_MOST_FORWARD:,} hyperparameters in forward mode", f"{count:,}", fix)
        )
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
    rows = jnp.split(jnp.eye(count), ends, axis=1)
    basis = [row.reshape(count, *x.shape).astype(x.dtype) for row, x in zip(rows, leaves, strict=True)]

    def along(direction: list[Array]) -> tuple[list[Array], PyTree]:
        def floating(hyperparams: Hyperparams) -> tuple[list[Array], PyTree]:
            reached = run_window(hyperparams)
            return tree.split_floating(reached)[0], reached

        tangent = jax.tree.unflatten(structure, direction)
        _, tangents, reached = jax.jvp(floating, (hyperparams,), (tangent,), has_aux=True)
        return tangents, reached

    if count == 1:  # a batch of one costs more than one: 1.2 to 1.35 times on a scanned transformer
        one, reached = along([row[0] for row in basis])
        tangents = [x[None] for x in one]
    else:
        tangents, reached = jax.vmap(along, out_axes=(0, None))(basis)
    floats, restore = tree.split_floating(reached)
    both = jax.value_and_grad(lambda h, floats: outer_loss_fn(h, restore(floats)), argnums=(0, 1), has_aux=True)
    (value, aux), (direct, slopes) = both(hyperparams, floats)
    indirect = jax.vmap(lambda tangents: tree.vdot(tangents, slopes))(tangents)
    parts = [part.reshape(x.shape).astype(x.dtype) for part, x in zip(jnp.split(indirect, ends), leaves, strict=True)]
    return (value, aux), reached, jax.tree.map(jnp.add, direct, jax.tree.unflatten(structure, parts))
