"""HOAG: hypergradient descent with solves that become exact as it goes.

    solve w, then q, to ε_k;  p = hypergradient;  λ' = λ − p/L,  Δ = ‖p‖/L

    slack = ¼ε + 1¼ ε_before Δ                            what the inexact solves may cost
    L_out(λ') ≤ L_out(λ) + slack − LΔ²                    accept, L ← 0.95 L
    L_out(λ') ≤ L_out(λ) + slack                          accept
    else, or not finite                                   reject, L ← 2 L, ε ← ½ε, until as many are accepted;
                                                          solve at λ to ε too: what it compares with was less exact

Reference: Pedregosa, Hyperparameter optimization with approximate gradient, arXiv 1602.02355. Its published code also
accepts a rise of up to 20 %; on losses with a plateau (all weights of a lasso at zero) that ends on the plateau.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hypergrad import tree, validate
from hypergrad.methods._base import Method, MethodStep, Oracle, Point, attempt, first_rate
from hypergrad.types import Array, Hyperparams

__all__ = ["hoag"]

_MOST_REJECTIONS = 30  # a step 1e9 times shorter changes nothing in float32


class HOAGState(NamedTuple):
    """What HOAG keeps.

    Attributes:
      candidate: λ that the next step tries.
      step_size: scalar, 1/L, of the step to ``candidate``; 0 before the first hypergradient.
      shrink: scalar, the factor of ε by rejections.
      before: scalar, ε of the last accepted point.
      num_steps: int32 scalar.
      rejections: int32 scalar, in a row.
      refining: bool scalar, whether ``candidate`` is the accepted point itself, to be solved more exactly.
    """

    candidate: Hyperparams
    step_size: Array
    shrink: Array
    before: Array
    num_steps: Array
    rejections: Array
    refining: Array


def hoag(tolerance: float | Callable[[Array], Any] = 1e-3, *, decay: float = 0.9) -> Method:
    """Descend along inexact hypergradients, with tolerances that shrink and a step size that adapts.

    Args:
      tolerance: ε_0 > 0 of the first inner and linear solve, on ‖∇_w L_in‖ and on ‖Hq − ∂L_out/∂w‖; or ``step -> ε``,
        an optax schedule, whose sum must be finite for convergence.
      decay: ε_k = ε_0 decayᵏ, in (0, 1). Not with a schedule.

    Returns:
      A ``Method`` for ``hg.minimize``. Every step takes one inner solve, and a linear solve where it is accepted. After
      a rejection the next step stays where the method is and only solves more exactly; it counts, too. The first move
      of λ has the length √dim λ: a factor of e per entry of log hyperparameters.

    Raises:
      TypeError, ValueError: ``tolerance`` ≤ 0, or ``decay`` outside (0, 1).

    Valid where the inner problem is strongly convex near its solution and the hypergradient is continuous.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> inner = lambda w, h, batch, key: 0.5 * jnp.sum((w - h) ** 2)
    >>> outer = lambda w, h, batch, key: 0.5 * jnp.sum((w - 3.0) ** 2)
    >>> at = hg.BilevelParams(jnp.zeros(1), jnp.zeros(1))
    >>> found = hg.minimize(hg.BilevelProblem(inner, outer), at, (), (), method=hoag())
    >>> bool(found.converged), round(float(found.hyperparams[0]), 2)
    (True, 3.0)

    Reference: Pedregosa, arXiv 1602.02355.
    """
    if not callable(tolerance):
        validate.number("tolerance", tolerance, low=0.0, strict=True)
    validate.number("decay", decay, low=0.0, strict=True)
    if decay >= 1:
        fix = "Take 0.9; the tolerances must have a finite sum."
        raise ValueError(validate.message("decay below 1", str(decay), fix))

    def tolerance_at(step: Array, dtype: Any) -> Array:
        value = tolerance(step) if callable(tolerance) else tolerance * decay ** step.astype(dtype)
        return jnp.asarray(value, dtype)

    def init(point: Point) -> HOAGState:
        dtype = point.value.dtype
        zero, none = jnp.zeros((), dtype), jnp.zeros((), jnp.int32)
        return HOAGState(point.hyperparams, zero, jnp.ones((), dtype), zero, none, none, jnp.array(False))

    def step(oracle: Oracle, point: Point, state: HOAGState) -> MethodStep:
        dtype = point.value.dtype
        epsilon = tolerance_at(state.num_steps, dtype) * state.shrink
        first = state.num_steps == 0
        length = state.step_size * tree.norm(point.hypergrad)

        def rise(trial: Point) -> Array:
            return trial.value - point.value - 0.25 * epsilon - 1.25 * state.before * length

        allowed = lambda trial: state.refining | (rise(trial) <= 0)  # noqa: E731
        trial, new, accepted = attempt(oracle, point, state.candidate, epsilon, allowed, first=first)
        moved = accepted & ~state.refining
        good = moved & (rise(trial) * state.step_size <= -(length**2))
        factor = jnp.where(good, 1 / 0.95, jnp.where(accepted, 1.0, 0.5))
        rate = jnp.where(first, first_rate(new), state.step_size * factor).astype(dtype)
        rejections = jnp.where(moved, 0, state.rejections + jnp.where(accepted, 0, 1))
        shrink = jnp.where(moved, jnp.minimum(2.0 * state.shrink, 1.0), state.shrink * jnp.where(accepted, 1.0, 0.5))
        refining = ~accepted & (point.inner_residual > tolerance_at(state.num_steps + 1, dtype) * shrink)
        ahead = jnp.where(refining, 0.0, rate)
        new_state = HOAGState(
            jax.tree.map(lambda h, p: h - ahead.astype(h.dtype) * p, new.hyperparams, new.hypergrad),
            rate,
            shrink,
            jnp.where(accepted, epsilon, state.before),
            state.num_steps + 1,
            rejections,
            refining,
        )
        stopped = (rejections >= _MOST_REJECTIONS) | (first & ~accepted)
        taken = jnp.where(state.refining, 0.0, state.step_size)
        return MethodStep(new, new_state, epsilon, taken, accepted, stopped)

    return Method(init, step)
