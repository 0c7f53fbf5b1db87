"""The ends of the inner Hessian's spectrum by Lanczos: which steps are safe, and how indefinite it is.

    H Q = Q T + r eᵀ,   Q orthonormal, T tridiagonal k × k;   Ritz values θ of T approach H's ends first

A Neumann series with step α needs 0 < αθ < 2 for all eigenvalues θ; CG needs them positive, or ``damping`` above the
magnitude of the most negative one. Both follow from the ends of the spectrum, at one product with H per step.

Reference: Lanczos 1950; Ghorbani, Krishnan & Xiao, An investigation into neural net optimization via Hessian
eigenvalue density, arXiv 1901.10159 (shares of the spectrum by the same run).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hypergrad import curvature, validate
from hypergrad.diagnostics._base import digits
from hypergrad.lanczos import Lanczos, decomposed, lanczos, random_like
from hypergrad.problem import (
    BilevelParams,
    BilevelProblem,
    check_model_state,
    check_problem,
    check_variables,
    evaluate_inner,
    refuse_residual,
)
from hypergrad.training import split_keys
from hypergrad.types import Array, Batch, Key, ModelState, PyTree

__all__ = ["Spectrum", "extreme_eigenvalues"]

_EPSILONS = 10  # of the largest eigenvalue: what rounding of the products may move an eigenvalue by


class Spectrum(NamedTuple):
    """Extreme eigenvalues of the Hessian of the inner loss. ``str()`` of it says what follows for the solvers.

    Attributes:
      largest: scalar, estimate of λ_max from below.
      largest_error: scalar, an eigenvalue lies within this distance of ``largest``.
      smallest: scalar, estimate of λ_min from above; below −``smallest_error``: H is indefinite for certain.
      smallest_error: scalar, an eigenvalue lies within this distance of ``smallest``.
      safe_step: scalar, 1/max|θ|: a ``step_size`` for ``hg.solvers.neumann``, half of the smallest that diverges.
      negative_share: scalar in [0, 1], the share of negative eigenvalues as one random vector sees it: a rough number.
      num_steps: int32 scalar, Lanczos steps, each a product with H; fewer than asked for where the Krylov space ended.
    """

    largest: Array
    largest_error: Array
    smallest: Array
    smallest_error: Array
    safe_step: Array
    negative_share: Array
    num_steps: Array

    def __str__(self) -> str:
        """Return the figures, and the solver to use."""
        low, high, step = float(self.smallest), float(self.largest), float(self.safe_step)
        if not low > -float("inf"):
            return "the Hessian is not finite at these weights"
        text = [
            f"largest eigenvalue   {digits(high)}  (± {digits(float(self.largest_error))})",
            f"smallest eigenvalue  {digits(low)}  (± {digits(float(self.smallest_error))})",
            f"safe Neumann step    {digits(step)}  (a series diverges from {digits(2 * step)} on)",
        ]
        noise = _EPSILONS * float(jnp.finfo(self.smallest.dtype).eps) * max(abs(low), abs(high))
        if low > noise:
            ratio = high / low
            text.append(f"positive definite as far as seen, condition number at least {digits(ratio)}: use cg")
        elif low >= -noise:
            text.append("singular to rounding: use cg with damping, or give the loss a decay")
        else:
            share = 100 * float(self.negative_share)
            text.append(
                f"indefinite: λ_min/λ_max = {digits(low / high if high else float('nan'))}, about {share:.2g} % of the "
                f"eigenvalues negative; cg needs damping > {digits(-low)}, a Neumann series stays finite for few terms"
            )
        return "\n".join(text)


def extreme_eigenvalues(
    problem: BilevelProblem,
    variables: BilevelParams,
    inner_batch: Batch,
    *,
    key: Key,
    num_steps: int = 30,
    model_state: ModelState = None,
) -> Spectrum:
    """Estimate the largest and smallest eigenvalue of ∂²L_in/∂w² by Lanczos with full reorthogonalisation.

    H Q = Q T + r eᵀ from a random start; the Ritz pair (θ, Q s) has ‖H Q s − θ Q s‖ = |β_k s_k|, which bounds the
    distance from θ to an eigenvalue.

    Args:
      problem: its inner loss is used, with the key that all products of an estimate with ``key`` share.
      variables: where.
      inner_batch: one batch, or an ``IndexedBatch``; no window axis.
      key: of the losses, as an estimate takes it; None where they draw no random numbers. The start comes from it too.
      num_steps: k ≥ 1 products; memory for as many copies of the weights.
      model_state: of a stateful problem.

    Returns:
      A ``Spectrum`` of scalars. Pure: may be jitted.

    Raises:
      TypeError: no ``BilevelProblem`` or ``BilevelParams``.
      ValueError: ``num_steps`` < 1; a problem with a residual, whose Jacobian is not symmetric.

    Valid for the batch given. ``largest`` is a lower bound, within a few per cent after 20 to 30 steps on networks;
    ``smallest`` converges later where many eigenvalues are near zero, and is then an upper bound with a small "error".

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> inner = lambda w, h, batch, key: 0.5 * jnp.sum(jnp.array([4.0, 1.0, -2.0]) * w**2)
    >>> problem, at = hg.BilevelProblem(inner, inner), hg.BilevelParams(jnp.ones(3), jnp.ones(1))
    >>> found = hg.diagnostics.extreme_eigenvalues(problem, at, (), key=None)
    >>> round(float(found.largest), 3), round(float(found.smallest), 3), int(found.num_steps)
    (4.0, -2.0, 3)

    Reference: Lanczos 1950; Ghorbani, Krishnan & Xiao, arXiv 1901.10159.
    """
    check_problem(problem)
    refuse_residual("extreme_eigenvalues", problem)
    check_variables(variables)
    num_steps = validate.positive_int("num_steps", num_steps)
    model_state = check_model_state(problem, model_state)

    @jax.jit
    def run(at: BilevelParams, batch: Batch, key: Array | None, model_state: ModelState) -> Spectrum:
        def inner(params: PyTree) -> Array:
            return evaluate_inner(problem, at._replace(params=params), batch, split_keys(key).solve, model_state).value

        size = sum(jnp.size(leaf) for leaf in jax.tree.leaves(at.params))
        start = random_like(at.params, jax.random.key(0) if key is None else jax.random.fold_in(key, num_steps))
        return _read(lanczos(curvature.hvp(inner, at.params), start, min(num_steps, size)))

    return run(variables, inner_batch, validate.as_key(key), model_state)


def _read(found: Lanczos) -> Spectrum:
    """Return the ends of T's spectrum."""
    values, vectors = decomposed(found)
    top, bottom = jnp.argmax(values), jnp.argmin(values)
    last = jnp.abs(found.off_diagonal[found.num_steps - 1] * vectors[found.num_steps - 1]) + _noise(values)
    share = jnp.where(values < -_noise(values), vectors[0] ** 2, 0.0).sum()
    widest = jnp.maximum(jnp.abs(values[top]), jnp.abs(values[bottom]))
    is_valid = jnp.isfinite(widest)
    figures = Spectrum(
        values[top], last[top], values[bottom], last[bottom], 1.0 / widest, jnp.clip(share, 0.0, 1.0), found.num_steps
    )
    return jax.tree.map(lambda x: jnp.where(is_valid, x, jnp.nan) if x.dtype != jnp.int32 else x, figures)


def _noise(values: Array) -> Array:
    return _EPSILONS * jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values))
