"""Train a response on sampled hyperparameters: the inner loss averaged over draws around λ, or from a distribution.

    L_in'(φ, λ) = E_ε L_in(φ, λ + σε; centre sg(λ)),        ε ~ N(0, I)         perturbed: around the current λ
    L_in'(φ, λ) = E_{λ' ~ p} L_in(φ, λ')                                        sampled: over a whole range

If σ is too small, the noise of mini-batches hides the effect of the perturbations; if it is too large, the response has
to be accurate where it cannot be. ``learned_scale`` tunes σ with the hyperparameters.

Reference: MacKay et al., Self-tuning networks, arXiv 1903.03088; Lorraine & Duvenaud, arXiv 1802.09419.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hypergrad import tree, validate
from hypergrad.problem import BilevelProblem, ResponseSpec, check_problem
from hypergrad.responses._base import broadcast_per_example, refuse_plain_problem
from hypergrad.responses._learned_scale import LearnedScale, clip_scale, drop_scale, entropy_bonus
from hypergrad.types import Array, Batch, Hyperparams, Loss, ModelState, Params, PyTree

__all__ = ["perturbed", "sampled"]


def perturbed(
    problem: BilevelProblem, *, scale: PyTree | LearnedScale, num_samples: int = 1, num_groups: int | None = None
) -> BilevelProblem:
    """Return the problem with its inner loss averaged over Gaussian perturbations of the hyperparameters.

    L_in'(φ, λ) = 1/S Σ_s L_in(φ, λ + σ ε_s), the response centred at ``stop_gradient(λ)``. The outer loss does not
    change; with a learned scale it is perturbed too, minus τ times the entropy.

    By default, one perturbation is drawn per batch. Hyperparameters that the problem takes per example (see
    ``self_tuning``) get one perturbation per example. With ``num_groups``, the batch is split into ``num_groups``
    consecutive parts of equal size, and one perturbation is drawn per part.

    Args:
      problem: over unconstrained hyperparameters: ``perturbed(with_response(reparameterize(p)))``.
      scale: σ ≥ 0: one number or a tree prefix of the hyperparameters; or ``learned_scale()``.
      num_samples: S ≥ 1, independent perturbations per evaluation; the cost is proportional to it.
      num_groups: parts of the batch with one perturbation each; divides the batch. Valid for losses that are means over
        examples. Noisy if the parts' data differ by more than the perturbations do: for decays prefer ``num_samples``.
        None: the whole batch, or single examples for hyperparameters that the problem takes per example.

    Returns:
      A ``BilevelProblem``; each perturbed loss needs a ``key``. Model state and aux of several samples or groups are
      averaged (integers are taken from the first one).

    Raises:
      TypeError: wrong ``problem``, ``scale``, ``num_samples`` or ``num_groups``; a missing key.
      ValueError: a problem that is perturbed already; a scale that is negative or no tree prefix of the
        hyperparameters; a batch that ``num_groups`` does not divide.

    Valid for a linear response as σ → 0; the error of its Jacobian grows with σ and the curvature of w*(λ).

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> loss = lambda w, h, batch, key: ((w - h) ** 2).sum()
    >>> problem = hg.responses.with_response(hg.BilevelProblem(loss, loss), hg.responses.linear())
    >>> noisy = perturbed(problem, scale=0.1, num_samples=4)
    >>> start = hg.responses.init(noisy, 0, jnp.zeros(2), jnp.zeros(2))
    >>> bool(noisy.inner_loss(start, jnp.zeros(2), None, jax.random.key(0)) > 0)
    True

    Reference: MacKay et al., arXiv 1903.03088; Lorraine & Duvenaud, arXiv 1802.09419.
    """
    learned = scale if isinstance(scale, LearnedScale) else None
    if learned is None:
        _check_scale(scale)

    def draw(key: Array, hyperparams: Any, shapes: PyTree) -> Hyperparams:
        center = drop_scale(hyperparams, learned)
        sigma = scale if learned is None else jax.tree.map(jnp.exp, hyperparams.log_scale)
        name = "scale" if learned is None else "log_scale"
        found = validate.by_prefix("perturbed", name, center, sigma, of="hyperparams")
        structure: Any = jax.tree.structure(center)
        noisy = []
        for own, (_, h, s), shape in zip(
            jax.random.split(key, len(found)), found, structure.flatten_up_to(shapes), strict=True
        ):
            noise = jax.random.normal(own, (*shape, *jnp.shape(h)), jnp.asarray(h).dtype)
            h, s = (jnp.broadcast_to(jnp.asarray(x, noise.dtype), noise.shape) for x in (h, s))
            noisy.append(h + s * noise)
        return jax.tree.unflatten(structure, noisy)

    return _averaged(problem, draw, learned, num_samples, num_groups)


def sampled(
    problem: BilevelProblem,
    draw: Callable[[Array, Hyperparams], Hyperparams],
    *,
    num_samples: int = 1,
    num_groups: int | None = None,
) -> BilevelProblem:
    """Return the problem with its inner loss averaged over hyperparameters from a fixed distribution.

    L_in'(φ, λ) = 1/S Σ_s L_in(φ, λ_s), λ_s = draw(key_s, λ): trains a global response over a whole range, whereas
    ``perturbed`` trains a local one around the current λ. The outer loss does not change.

    Args:
      problem: as for ``perturbed``.
      draw: ``draw(key, hyperparams) -> hyperparams``, a tree of the same shapes, e.g. uniform in a box.
      num_samples: S ≥ 1.
      num_groups: as for ``perturbed``.

    Returns:
      A ``BilevelProblem`` whose inner loss needs a ``key``.

    Raises:
      TypeError: ``draw`` is not callable; as for ``perturbed``.
      ValueError: as for ``perturbed``; hyperparameters that the problem takes per example.

    Valid when the response can represent w*(λ) over the whole distribution, and the distribution covers every λ that
    the outer optimizer reaches.

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> loss = lambda w, h, batch, key: ((w - h) ** 2).sum()
    >>> problem = hg.responses.with_response(hg.BilevelProblem(loss, loss), hg.responses.linear())
    >>> anywhere = sampled(problem, lambda key, h: jax.random.uniform(key, h.shape, minval=-4.0, maxval=2.0))

    Reference: Lorraine & Duvenaud, arXiv 1802.09419 (global hypernetwork).
    """
    if not callable(draw):
        fix = "Pass draw(key, hyperparams) -> hyperparams."
        raise TypeError(validate.message("draw to be callable", validate.describe(draw), fix))

    def draw_one(key: Array, hyperparams: Hyperparams, shapes: PyTree) -> Hyperparams:
        if jax.tree.leaves(shapes):
            fix = "Build it with self_tuning(..., per_example=False), or use perturbed."
            wanted = "a problem that takes one value of each hyperparameter per batch"
            raise ValueError(validate.message(wanted, "one that takes a value per example", fix))
        drawn = draw(key, hyperparams)
        validate.same_structure("what draw returned", drawn, "the hyperparameters", hyperparams)
        return tree.match_dtypes(drawn, hyperparams)

    return _averaged(problem, draw_one, None, num_samples, num_groups)


def _averaged(
    problem: BilevelProblem, draw: Any, learned: LearnedScale | None, num_samples: int, num_groups: int | None
) -> BilevelProblem:
    """Return the problem with losses averaged over ``draw(key, hyperparams, shapes)``.

    ``shapes`` has the leading axes of each hyperparameter leaf: ``(rows,)`` if it is taken per example, else ``()``.
    """
    check_problem(problem)
    spec = problem.response or ResponseSpec(
        init=refuse_plain_problem,
        weights=None,
        losses_at=lambda _center: (problem.inner_loss, problem.outer_loss),
        base_problem=problem,
    )
    if spec.losses_at is None:
        fix = "Perturb once, after all other transforms."
        raise ValueError(validate.message("a problem that is not perturbed yet", "a perturbed one", fix))
    num_samples = validate.positive_int("num_samples", num_samples)
    groups = None if num_groups is None else validate.positive_int("num_groups", num_groups)
    losses_at, weights = spec.losses_at, spec.weights

    def average(which: int) -> Loss:
        def loss(params: Params, hyperparams: Hyperparams, batch: Batch, key: Any, *state: ModelState) -> Any:
            key = validate.required_key(key)
            center = lax.stop_gradient(drop_scale(hyperparams, learned))
            marks = broadcast_per_example(spec.per_example, center)
            per_example = any(jax.tree.leaves(marks))
            size = validate.batch_size(batch) if per_example or groups else 0
            if groups and size % groups:
                fix = "Choose num_groups that divides the batch."
                raise ValueError(
                    validate.message(f"a batch that divides into {groups} groups", f"{size} examples", fix)
                )

            rows = groups or size
            part = size // max(rows, 1)  # examples that share a perturbation

            def evaluate(key: Array, batch: Batch) -> Any:
                draw_key, loss_key = jax.random.split(key)
                noisy = draw(draw_key, hyperparams, jax.tree.map(lambda mark: (rows,) if mark else (), marks))
                if part > 1:
                    noisy = jax.tree.map(lambda mark, h: jnp.repeat(h, part, 0) if mark else h, marks, noisy)
                return losses_at(center)[which](params, noisy, batch, loss_key, *state)

            def sample(key: Array) -> Any:
                if groups is None or per_example:
                    return evaluate(key, batch)
                parts = jax.tree.map(lambda x: jnp.reshape(x, (groups, part, *jnp.shape(x)[1:])), batch)
                return _mean(jax.vmap(evaluate)(jax.random.split(key, groups), parts))

            return sample(key) if num_samples == 1 else _mean(jax.vmap(sample)(jax.random.split(key, num_samples)))

        return loss

    def inner(params: Params, hyperparams: Any, *rest: Any) -> Any:
        return average(0)(params, clip_scale(hyperparams, learned), *rest)

    def outer_with_entropy(params: Params, hyperparams: Any, *rest: Any) -> Any:
        assert learned is not None
        hyperparams = clip_scale(hyperparams, learned)  # once: the clip must see the gradient of both terms
        result = average(1)(params, hyperparams, *rest)
        value, *extra = result if isinstance(result, tuple) else (result,)
        value = validate.scalar_loss("outer_loss", value, "Return one number, e.g. a jnp.mean.")
        value = tree.total([value, -entropy_bonus(hyperparams, learned)])
        return (value, *extra) if isinstance(result, tuple) else value

    return dataclasses.replace(
        problem,
        inner_loss=inner,
        outer_loss=problem.outer_loss if learned is None else outer_with_entropy,
        constrain=lambda hyperparams: problem.constrain(drop_scale(hyperparams, learned)),
        response=ResponseSpec(
            init=lambda key, params, hyperparams, *rest: spec.init(
                key, params, drop_scale(hyperparams, learned), *rest
            ),
            weights=weights and (lambda params, hyperparams: weights(params, drop_scale(hyperparams, learned))),
            losses_at=None,
            base_problem=spec.base_problem,
            base_hyperparams=lambda hyperparams: drop_scale(hyperparams, learned),
        ),
    )


def _mean(stacked: Any) -> Any:
    average = lambda x: jnp.mean(x, 0) if jnp.issubdtype(x.dtype, jnp.inexact) else x[0]  # noqa: E731
    return jax.tree.map(average, stacked)


def _check_scale(scale: PyTree) -> None:
    if not jax.tree.leaves(scale):
        fix = "Pass one number, a tree prefix of the hyperparameters, or hg.responses.learned_scale()."
        raise ValueError(validate.message("scale with at least one number", validate.describe(scale), fix))
    for leaf in jax.tree.leaves(scale):
        if not tree.is_traced(leaf) and isinstance(leaf, jax.Array | np.ndarray) and jnp.ndim(leaf):
            leaf = jnp.min(leaf)
        validate.number("scale", leaf, low=0.0)
