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

__all__ = ["UnrollMode", "forward", "least_memory", "reverse"]

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
      persistent: in forward mode, carry the tangents on from window to window.
      horizon: inner steps after which they start at zero again; None: never.
    """

    value_and_grad: Callable[[Window, OuterLoss, Hyperparams], tuple[tuple[Array, Any], PyTree, Hyperparams]]
    is_reverse: bool
    checkpoint_every: float | None
    truncate: int | None
    mixed: bool
    unroll: int | bool
    persistent: bool = False
    horizon: int | None = None

    def interval(self, length: int) -> float:
        """Return the steps between checkpoints in a window: by default 1, and about √K from K = 50 on, dividing K."""
        if self.checkpoint_every is not None:
            return self.checkpoint_every
        return 1 if length < _TWO_LEVELS_FROM else least_memory(length)


def least_memory(length: int) -> int:
    """Return the steps between checkpoints at which K steps take close to the least memory: about √K, dividing K.

    >>> least_memory(50), least_memory(20), least_memory(7)
    (5, 4, 3)
    """
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


def forward(*, persistent: bool = False, horizon: int | None = None, unroll: int | bool = 1) -> UnrollMode:
    """Differentiate an unroll forward, by tangents carried along: for few hyperparameters and long windows.

    Cost and memory: about one forward unroll and one copy of weights and optimizer state per hyperparameter.

    With ``persistent`` they go on from window to window (real-time recurrent learning): Z = d(w, s)/dλ, with s the
    optimizer's state, so that a short window sees the effect of λ on all steps since the start. The hypergradient is
    exact for a λ that was the same all the time, and close to it while λ moves slowly. Where training is chaotic Z
    grows without bound: watch ``tangent_norm`` of the info, give a ``horizon``, or take the sign of the hypergradient
    (``optax.rprop``).

    Args:
      persistent: keep Z in the estimator's state, for ``hg.bilevel``; a functional call starts anew each time.
      horizon: of ``persistent``: inner steps after which Z starts at zero again, before a window; None: never.
      unroll: of the scan over steps.

    Returns:
      An ``UnrollMode``, for ``hg.unrolled(problem, mode=...)``; it refuses more than 1,000 hyperparameters.

    Raises:
      TypeError: a setting of another type.
      ValueError: ``horizon`` without ``persistent``, or below 1.

    >>> forward().is_reverse
    False

    Reference: Franceschi et al., arXiv 1703.01785; Micaelli & Storkey, Gradient-based hyperparameter optimization over
    long horizons, arXiv 2007.07869 (sharing over windows, signs).
    """
    validate.unroll(unroll)
    validate.flag("persistent", persistent)
    if horizon is not None:
        validate.positive_int("horizon", horizon)
        if not persistent:
            fix = "Pass persistent=True, or leave horizon out: without it every window starts anew."
            raise ValueError(validate.message("no horizon without persistent=True", f"horizon={horizon}", fix))
    return UnrollMode(_forward_value_and_grad, False, math.inf, None, False, unroll, persistent, horizon)


def _reverse_value_and_grad(run_window: Window, outer_loss_fn: OuterLoss, hyperparams: Hyperparams) -> Any:
    def outcome(hyperparams: Hyperparams) -> tuple[Array, tuple[PyTree, Any]]:
        reached = run_window(hyperparams)
        value, aux = outer_loss_fn(hyperparams, reached)
        return value, (reached, aux)

    (value, (reached, aux)), gradient = jax.value_and_grad(outcome, has_aux=True)(hyperparams)
    return (value, aux), reached, gradient


def _forward_value_and_grad(run_window: Window, outer_loss_fn: OuterLoss, hyperparams: Hyperparams) -> Any:
    """Carry one tangent per hyperparameter through the window; then pair them with the outer loss's slope."""
    tangents, reached = _push(run_window, (hyperparams,), (basis(hyperparams),))
    outcome, gradient = paired(tangents, reached, outer_loss_fn, hyperparams)
    return outcome, reached, gradient


def basis(hyperparams: Hyperparams) -> Hyperparams:
    """Return a tree like λ with a leading axis: the unit tangent of each hyperparameter."""
    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, hyperparams))
    count = sum(leaf.size for leaf in leaves)
    if count > _MOST_FORWARD:
        fix = "Each costs a forward unroll here: use mode=hg.reverse()."
        raise ValueError(
            validate.message(f"at most {_MOST_FORWARD:,} hyperparameters in forward mode", f"{count:,}", fix)
        )
    rows = jnp.split(jnp.eye(count), _ends(leaves), axis=1)
    units = [row.reshape(count, *x.shape).astype(x.dtype) for row, x in zip(rows, leaves, strict=True)]
    return jax.tree.unflatten(structure, units)


def carried(
    run_window: Callable[..., PyTree], hyperparams: Hyperparams, *start: list[Array]
) -> tuple[list[Array], PyTree]:
    """Return dz_K/dλ and what the window reached, z_K = run_window(λ, z_0).

    ``start`` is the floating leaves of z_0, and dz_0/dλ with a leading axis of hyperparameters. Without: z_K =
    run_window(λ), from a z_0 that does not depend on λ.
    """
    given, tangents = start[:1], start[1:]
    return _push(run_window, (hyperparams, *given), (basis(hyperparams), *tangents))


def paired(tangents: list[Array], reached: PyTree, outer_loss_fn: OuterLoss, hyperparams: Hyperparams) -> Any:
    """Return ``((value, aux), gradient)``: ∂L_out/∂λ + (dz_K/dλ)ᵀ ∂L_out/∂z_K."""
    floats, restore = tree.split_floating(reached)
    both = jax.value_and_grad(lambda h, floats: outer_loss_fn(h, restore(floats)), argnums=(0, 1), has_aux=True)
    (value, aux), (direct, slopes) = both(hyperparams, floats)
    indirect = jax.vmap(lambda tangents: tree.vdot(tangents, slopes))(tangents)
    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, hyperparams))
    parts = zip(jnp.split(indirect, _ends(leaves)), leaves, strict=True)
    shaped = [part.reshape(x.shape).astype(x.dtype) for part, x in parts]
    return (value, aux), jax.tree.map(jnp.add, direct, jax.tree.unflatten(structure, shaped))


def _ends(leaves: list[Array]) -> np.ndarray:
    return np.cumsum([leaf.size for leaf in leaves])[:-1]


def _push(fn: Callable[..., PyTree], at: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[list[Array], PyTree]:
    """Return ``fn``'s tangents along each row of ``tangents``, those of its floating leaves; and ``fn(*at)``."""

    def floating(*at: Any) -> tuple[list[Array], PyTree]:
        reached = fn(*at)
        return tree.split_floating(reached)[0], reached

    def along(tangents: tuple[Any, ...]) -> tuple[list[Array], PyTree]:
        _, pushed, reached = jax.jvp(floating, at, tangents, has_aux=True)
        return pushed, reached

    if len(jax.tree.leaves(tangents)[0]) == 1:  # a batch of one costs more than one: 1.2 to 1.35 times on a transformer
        one, reached = along(jax.tree.map(lambda x: x[0], tangents))
        return [x[None] for x in one], reached
    return jax.vmap(along, out_axes=(0, None))(tangents)
