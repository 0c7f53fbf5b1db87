"""L-BFGS on λ with a backtracking search: few hyperparameters, solved exactly.

    λ' = λ − t P p,      P from the last m pairs (optax), t halved until L_out(λ') ≤ L_out(λ) − c t ⟨p, P p⟩

Every trial is one inner solve; the linear solve is spent on accepted ones only. Where the loss curves down along a
step, that step tells P nothing; the next t is then four times as large.

Reference: Liu & Nocedal, On the limited memory BFGS method for large scale optimization, 1989.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from hypergrad import tree, validate
from hypergrad.methods._base import Method, MethodStep, Oracle, Point, attempt
from hypergrad.types import Array, Hyperparams, PyTree

__all__ = ["lbfgs"]

_ENOUGH = 1e-4  # of the decrease that the slope promises
_GROWTH = 4.0
_MOST_REJECTIONS = 20


class LBFGSState(NamedTuple):
    """What the method keeps.

    Attributes:
      direction: P p at the last accepted point.
      slope: scalar, ⟨p, P p⟩.
      step_size: scalar, t that the next step tries.
      stretch: scalar, the t that it would try if no length were too far: above 1 where the loss curved down.
      memory: state of ``optax.scale_by_lbfgs``.
      num_steps: int32 scalar.
      rejections: int32 scalar, in a row.
    """

    direction: Hyperparams
    slope: Array
    step_size: Array
    stretch: Array
    memory: PyTree
    num_steps: Array
    rejections: Array


def lbfgs(tolerance: float = 1e-6, *, memory_size: int = 10, max_length: float = 3.0) -> Method:
    """Minimise the outer loss over λ by L-BFGS, at inner solutions of a fixed tolerance.

    Args:
      tolerance: > 0, of every inner and linear solve, absolute. It bounds how well the search can tell outer losses
        apart: take it small.
      memory_size: m ≥ 1, pairs kept.
      max_length: > 0, largest ‖λ' − λ‖∞ of a step: e³ per step for log hyperparameters. Far steps leave the region in
        which the inner problem can be solved.

    Returns:
      A ``Method`` for ``hg.minimize``. ``step_size`` in the history is t.

    Raises:
      TypeError, ValueError: a number out of its range.

    Valid for a smooth outer loss of λ; up to some hundreds of hyperparameters it needs the fewest steps.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> inner = lambda w, h, batch, key: 0.5 * jnp.sum((w - h) ** 2)
    >>> outer = lambda w, h, batch, key: 0.5 * jnp.sum(jnp.array([1.0, 9.0]) * (w - 3.0) ** 2)
    >>> at = hg.BilevelParams(jnp.zeros(2), jnp.zeros(2))
    >>> found = hg.minimize(hg.BilevelProblem(inner, outer), at, (), (), method=hg.methods.lbfgs())
    >>> bool(found.converged), [round(float(h), 2) for h in found.hyperparams]
    (True, [3.0, 3.0])
    """
    validate.number("tolerance", tolerance, low=0.0, strict=True)
    validate.positive_int("memory_size", memory_size)
    validate.number("max_length", max_length, low=0.0, strict=True)
    tx = optax.scale_by_lbfgs(memory_size)

    def init(point: Point) -> LBFGSState:
        zero, none = jnp.zeros((), point.value.dtype), jnp.zeros((), jnp.int32)
        memory = tree.strip_weak_types(tx.init(point.hyperparams))
        nowhere = optax.tree.zeros_like(point.hyperparams)
        return LBFGSState(nowhere, zero, zero, jnp.ones_like(zero), memory, none, none)

    def step(oracle: Oracle, point: Point, state: LBFGSState) -> MethodStep:
        dtype, first = point.value.dtype, state.num_steps == 0
        size = state.step_size
        candidate = jax.tree.map(lambda h, d: h - size.astype(h.dtype) * d, point.hyperparams, state.direction)
        rounding = 10 * jnp.finfo(dtype).eps * jnp.abs(point.value)
        enough = lambda trial: trial.value <= point.value - _ENOUGH * size * state.slope + rounding  # noqa: E731
        _, new, accepted = attempt(oracle, point, candidate, tolerance, enough, first=first)
        direction, memory = tx.update(new.hypergrad, state.memory, new.hyperparams)
        descends = tree.vdot(direction, new.hypergrad) > 0
        onwards = optax.tree.where(descends, direction, new.hypergrad), memory
        onwards = tree.match_dtypes(onwards, (state.direction, state.memory))
        direction, memory = optax.tree.where(accepted, onwards, (state.direction, state.memory))
        slope = tree.vdot(direction, new.hypergrad).astype(dtype)
        top = tree.max_abs(direction).astype(dtype)
        longest = max_length / jnp.where(top > 0, top, 1.0)
        rejections = jnp.where(accepted, 0, state.rejections + 1)
        # ⟨y, s⟩ ≤ 0 for the step s and the change y of the hypergradient: the loss curves down.
        turned = tree.vdot(new.hypergrad, state.direction) >= tree.vdot(point.hypergrad, state.direction)
        curved = accepted & ~first & turned
        stretch = jnp.where(curved, _GROWTH * state.stretch, jnp.ones_like(state.stretch))
        stretch = jnp.where(accepted, stretch, state.stretch).astype(dtype)
        next_size = jnp.where(accepted, jnp.minimum(stretch, longest), 0.5 * size).astype(dtype)
        new_state = LBFGSState(direction, slope, next_size, stretch, memory, state.num_steps + 1, rejections)
        stopped = (rejections >= _MOST_REJECTIONS) | (first & ~accepted)
        return MethodStep(new, new_state, jnp.asarray(tolerance, dtype), size, accepted, stopped)

    return Method(init, step)
