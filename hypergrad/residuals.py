"""Residuals of inner problems that are not unconstrained minima, for ``hg.with_residual``.

    r(w*(λ), λ) = 0   ⇒   dw*/dλ = −(∂r/∂w)⁻¹ ∂r/∂λ

    fixed_point          r = w − T(w, λ)                                        equilibrium models, iterations
    projected_gradient   r = w − P_λ(w − η ∇_w L_in(w, λ))                      constraints
    proximal_gradient    r = w − prox_λ(w − η ∇_w L_in(w, λ), η)                L_in + a penalty with kinks (lasso)

∂r/∂w is not symmetric: ``hg.implicit`` solves with ``gmres`` then. At a solution the derivative lives on the support: a
weight at a bound, or at the kink of a penalty, stays there, and its row of ∂r/∂w is that of the identity.

Reference: Blondel et al., Efficient and modular implicit differentiation, arXiv 2105.15183; Bertrand et al., Implicit
differentiation for fast hyperparameter selection in non-smooth convex learning, arXiv 2105.01637.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

from hypergrad import validate
from hypergrad.problem import BilevelParams, BilevelProblem, check_problem, evaluate_inner
from hypergrad.types import Array, Batch, Hyperparams, Loss, Params

__all__ = ["fixed_point", "projected_gradient", "proximal_gradient"]


def fixed_point(step: Loss) -> Loss:
    """Return the residual w − T(w, λ) of the fixed point w* = T(w*, λ).

    Args:
      step: ``step(params, hyperparams, batch, key) -> params``, T; with ``model_state`` as fifth argument where the
        problem is stateful.

    Returns:
      ``residual(params, hyperparams, batch, key)``, a tree like the weights, for ``hg.with_residual``.

    Raises:
      TypeError: ``step`` is not callable.

    Valid when I − ∂T/∂w is invertible at the fixed point, as for a contraction.

    >>> import jax.numpy as jnp
    >>> residual = fixed_point(lambda w, h, batch, key: 0.5 * w + h)
    >>> float(residual(jnp.array(3.0), jnp.array(1.0), None, None))
    0.5

    Reference: Bai, Kolter & Koltun, Deep equilibrium models, arXiv 1909.01377.
    """
    _check_callable("step", step, "step(params, hyperparams, batch, key) -> params")

    def residual(params: Params, hyperparams: Hyperparams, batch: Batch, key: Array | None, *state: Any) -> Params:
        image = step(params, hyperparams, batch, key, *state)
        validate.same_structure("what step returns", image, "params", params)
        return optax.tree.sub(params, image)

    return residual


def projected_gradient(
    problem: BilevelProblem, projection: Callable[[Params, Hyperparams], Params], step_size: float
) -> Loss:
    """Return the residual w − P_λ(w − η ∇_w L_in(w, λ)) of min L_in over the set that P projects on.

    Args:
      problem: gives the inner loss.
      projection: ``projection(params, hyperparams) -> params``, the Euclidean projection on a convex set;
        ``optax.projections`` has many.
      step_size: η > 0. The solution does not depend on it; below 2/λmax of the Hessian the residual is that of a
        contraction, which is easy to solve with.

    Returns:
      ``residual(params, hyperparams, batch, key)``, for ``hg.with_residual(problem, residual)``.

    Raises:
      ValueError: ``step_size`` ≤ 0.
      TypeError: ``problem`` is not a ``BilevelProblem``, or ``projection`` is not callable.

    Valid when the projection is differentiable at w − η ∇L: no weight lies exactly on the edge of its bound with a
    gradient of zero.

    >>> import hypergrad as hg, jax.numpy as jnp, optax
    >>> inner = lambda w, h, batch, key: 0.5 * jnp.sum((w - h) ** 2)
    >>> problem = hg.BilevelProblem(inner, lambda w, h, batch, key: jnp.sum(w))
    >>> residual = projected_gradient(problem, lambda w, h: optax.projections.projection_non_negative(w), 1.0)
    >>> fn = hg.hypergrad(hg.implicit(hg.with_residual(problem, residual)))
    >>> solution, bounds = jnp.array([0.0, 2.0]), jnp.array([-1.0, 2.0])
    >>> [round(float(v), 4) for v in fn(solution, bounds, (), (), key=None)]
    [0.0, 1.0]

    Reference: Blondel et al., arXiv 2105.15183.
    """
    _check_callable("projection", projection, "projection(params, hyperparams) -> params")
    return _after_a_gradient_step(problem, lambda w, h, _: projection(w, h), step_size)


def proximal_gradient(
    problem: BilevelProblem, prox: Callable[[Params, Hyperparams, float], Params], step_size: float
) -> Loss:
    """Return the residual w − prox_λ(w − η ∇_w L_in(w, λ), η) of min L_in + Ω_λ, Ω convex with kinks.

    Args:
      problem: gives the inner loss, without Ω.
      prox: ``prox(params, hyperparams, step_size) -> params``, argmin_u Ω_λ(u) + ‖u − w‖²/(2η). For the lasso
        Ω = λ‖w‖₁ it is soft thresholding by η λ.
      step_size: η > 0, as for ``projected_gradient``.

    Returns:
      ``residual(params, hyperparams, batch, key)``, for ``hg.with_residual(problem, residual)``.

    Raises:
      ValueError: ``step_size`` ≤ 0.
      TypeError: ``problem`` is not a ``BilevelProblem``, or ``prox`` is not callable.

    Valid when the prox is differentiable at w − η ∇L. This fails only if a weight lies exactly on the boundary between
    staying at the kink and moving away from it (for the lasso, |w − η ∇L| = ηλ). Differentiating a loss that contains
    |w| by ``hg.implicit`` alone is silently wrong: it takes the kink for smooth.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> inner = lambda w, h, batch, key: 0.5 * jnp.sum((w - batch) ** 2)
    >>> problem = hg.BilevelProblem(inner, lambda w, h, batch, key: 0.5 * jnp.sum(w**2))
    >>> soft = lambda w, h, step: jnp.sign(w) * jnp.maximum(jnp.abs(w) - step * h, 0.0)
    >>> fn = hg.hypergrad(hg.implicit(hg.with_residual(problem, proximal_gradient(problem, soft, 1.0))))
    >>> float(fn(jnp.array([2.0, 0.0]), jnp.array(1.0), jnp.array([3.0, 0.5]), (), key=None))  # w* = 3 - h; 0
    -2.0

    Reference: Bertrand et al., arXiv 2105.01637.
    """
    _check_callable("prox", prox, "prox(params, hyperparams, step_size) -> params")
    return _after_a_gradient_step(problem, prox, step_size)


def _after_a_gradient_step(problem: BilevelProblem, then: Callable[..., Params], step_size: float) -> Loss:
    check_problem(problem)
    validate.number("step_size", step_size, low=0.0, strict=True)

    def residual(params: Params, hyperparams: Hyperparams, batch: Batch, key: Array | None, *state: Any) -> Params:
        def loss(w: Params) -> Array:
            return evaluate_inner(problem, BilevelParams(w, hyperparams), batch, key, *(state or ((),))).value

        moved = optax.tree.add_scale(params, -step_size, jax.grad(loss)(params))
        image = then(moved, hyperparams, step_size)
        validate.same_structure("what the projection or prox returns", image, "params", params)
        return optax.tree.sub(params, image)

    return residual


def _check_callable(name: str, value: Any, form: str) -> None:
    if not callable(value):
        raise TypeError(validate.message(f"{name} to be callable", validate.describe(value), f"Pass {form}."))
