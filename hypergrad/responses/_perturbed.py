"""Train a response around the current hyperparameters: the inner loss averaged over Gaussian perturbations.

    L_in'(φ, λ) = E_ε L_in(φ, λ + σε; centre sg(λ)),        ε ~ N(0, I)
    L_out'(φ, (λ, log σ)) = E_ε L_out(φ, λ + σε) − τ Σᵢ log(σᵢ √(2πe))        where the scale is learned

Too small a σ is lost in the noise of minibatches, too large a one leaves the region where the response can hold; a
learned one finds its own size, kept up by the entropy term and inside bounds.

Reference: MacKay et al., Self-tuning networks, arXiv 1903.03088; Lorraine & Duvenaud, arXiv 1802.09419.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hypergrad import tree, validate
from hypergrad.problem import BilevelProblem, ResponseSpec, check_problem
from hypergrad.responses._base import Perturbed, marks_of
from hypergrad.types import Array, Batch, Hyperparams, Loss, ModelState, Params, PyTree

_ENTROPY_OF_ONE = 0.5 * math.log(2 * math.pi * math.e)


class LearnedScale(NamedTuple):
    """A perturbation scale that is learned with the hyperparameters.

    Attributes:
      entropy: τ ≥ 0, weight of the entropy in the outer loss.
      low: σ is at least this.
      high: σ is at most this.
    """

    entropy: float
    low: float
    high: float


def learned_scale(entropy: float = 1e-3, low: float = 0.05, high: float = 1.5) -> LearnedScale:
    """Return the scale of ``perturbed`` that is learned: hyperparameters become ``Perturbed(hyperparams, log_scale)``.

    σ = clip(exp(log_scale), low, high); the gradient that would push ``log_scale`` further out of its bounds is zero.
    The outer loss loses τ Σ log(σᵢ √(2πe)), the sum over all entries of the hyperparameters. σ moves at the outer
    optimizer's rate: where it falls too soon, raise ``low``.

    Args:
      entropy: τ; 0 lets σ collapse to ``low``, large values send it to ``high``. 1e-3 to 1e-5 are usual.
      low: > 0.
      high: > ``low``. At σ = 2 hypergradients of logistic hyperparameters have been seen to change sign.

    Returns:
      A ``LearnedScale``.

    Raises:
      TypeError: an argument is not a number.
      ValueError: τ < 0, or bounds out of order.

    >>> learned_scale(entropy=1e-4).high
    1.5

    Reference: MacKay et al., arXiv 1903.03088.
    """
    for name, value, least in (("entropy", entropy, 0.0), ("low", low, 0.0), ("high", high, low)):
        validate.number(name, value, low=float(least), strict=name != "entropy")
    return LearnedScale(entropy, low, high)


def perturbed(
    problem: BilevelProblem, *, scale: PyTree | LearnedScale, num_samples: int = 1, num_groups: int | None = None
) -> BilevelProblem:
    """Return the problem with its inner loss averaged over Gaussian perturbations of the hyperparameters.

    L_in'(φ, λ) = 1/S Σ_s L_in(φ, λ + σ ε_s), the response centred at ``stop_gradient(λ)``. The outer loss stays as
    it is; with a learned scale it is perturbed too, minus τ times the entropy.

    A perturbation is drawn for the whole batch; with ``num_groups`` one for each of so many equal parts of it, taken in
    order; for hyperparameters that a problem takes one an example (``self_tuning``) one for each example.

    Args:
      problem: over unconstrained hyperparameters: ``perturbed(with_response(reparameterize(p)))``.
      scale: σ ≥ 0: one number or a tree prefix of the hyperparameters; or ``learned_scale()``.
      num_samples: S ≥ 1, perturbations of everything; costs S times as much.
      num_groups: parts of the batch with a perturbation each; divides the batch. Right for losses that are means over
        examples, and noisy where the parts' data differ by more than the perturbations do: for decays rather take
        ``num_samples``. None: the whole batch, or one an example where the problem takes that.

    Returns:
      A ``BilevelProblem``; both losses want a ``key`` where they are perturbed. Model state and aux of several samples
      or groups are averaged (of integers the first one's is kept).

    Raises:
      TypeError: wrong ``problem``, ``scale``, ``num_samples`` or ``num_groups``; a missing key.
      ValueError: a problem perturbed before; a scale that is negative or no prefix; a batch that does not divide.

    Right for a linear response as σ → 0; the error of its Jacobian grows with σ and the curvature of w*(λ).

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> loss = lambda w, h, batch, key: ((w - h) ** 2).sum()
    >>> problem = hg.responses.with_response(hg.BilevelProblem(loss, loss), hg.responses.linear())
    >>> noisy = perturbed(problem, scale=0.1, num_samples=4)
    >>> start = hg.responses.init(noisy, 0, jnp.zeros(2), jnp.zeros(2))
    >>> bool(noisy.inner_loss(start, jnp.zeros(2), None, jax.random.key(0)) > 0)
    True

    Reference: MacKay et al., arXiv 1903.03088; Lorraine & Duvenaud, arXiv 1802.09419.
    """
    if not isinstance(scale, LearnedScale):
        _check_scale(scale)

    def draw(key: Array, hyperparams: Hyperparams, shape: Any) -> Hyperparams:
        center, sigma = _spread(hyperparams, scale)
        return _noisy(key, center, sigma, shape)

    return _averaged(problem, draw, scale if isinstance(scale, LearnedScale) else None, num_samples, num_groups)


def sampled(
    problem: BilevelProblem,
    draw: Callable[[Array, Hyperparams], Hyperparams],
    *,
    num_samples: int = 1,
    num_groups: int | None = None,
) -> BilevelProblem:
    """Return the problem with its inner loss averaged over hyperparameters from a fixed distribution.

    L_in'(φ, λ) = 1/S Σ_s L_in(φ, λ_s), λ_s = draw(key_s, λ): a global response, over a whole range at once, where
    ``perturbed`` learns one around the current λ. The outer loss stays as it is.

    Args:
      problem: as for ``perturbed``.
      draw: ``draw(key, hyperparams) -> hyperparams``, a tree of the same shapes, e.g. uniform in a box.
      num_samples: S ≥ 1.
      num_groups: as for ``perturbed``.

    Returns:
      A ``BilevelProblem`` whose inner loss wants a ``key``.

    Raises:
      TypeError: ``draw`` is not callable; as for ``perturbed``.
      ValueError: as for ``perturbed``; hyperparameters that are taken one an example.

    Right where the response can hold w*(λ) over all of the distribution, which must cover where λ goes.

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> loss = lambda w, h, batch, key: ((w - h) ** 2).sum()
    >>> problem = hg.responses.with_response(hg.BilevelProblem(loss, loss), hg.responses.linear())
    >>> anywhere = sampled(problem, lambda key, h: jax.random.uniform(key, h.shape, minval=-4.0, maxval=2.0))

    Reference: Lorraine & Duvenaud, arXiv 1802.09419 (global hypernetwork).
    """
    if not callable(draw):
        fix = "Pass draw(key, hyperparams) -> hyperparams."
        raise TypeError(validate.message("draw to be callable", validate.describe(draw), fix))

    def one(key: Array, hyperparams: Hyperparams, shape: Any) -> Hyperparams:
        if any(jax.tree.leaves(shape)):
            fix = "Build it with self_tuning(..., per_example=False), or use perturbed."
            wanted = "a problem that takes one value of each hyperparameter a batch"
            raise ValueError(validate.message(wanted, "one that takes a value an example", fix))
        drawn = draw(key, hyperparams)
        validate.same_structure("what draw returned", drawn, "the hyperparameters", hyperparams)
        return tree.match_dtypes(drawn, hyperparams)

    return _averaged(problem, one, None, num_samples, num_groups)


def _averaged(
    problem: BilevelProblem, draw: Any, learned: LearnedScale | None, num_samples: int, num_groups: int | None
) -> BilevelProblem:
    check_problem(problem)
    view = problem.response or ResponseSpec(
        init=_no_response,
        weights=None,
        losses_at=lambda _center: (problem.inner_loss, problem.outer_loss),
        base_problem=problem,
    )
    if view.losses_at is None:
        fix = "Perturb once, last of all transforms."
        raise ValueError(validate.message("a problem that is not perturbed yet", "a perturbed one", fix))
    num_samples = validate.positive_int("num_samples", num_samples)
    groups = None if num_groups is None else validate.positive_int("num_groups", num_groups)
    around, strip, bounded = view.losses_at, _stripper(learned), _bounder(learned)

    def perturb(which: int) -> Loss:
        def loss(params: Params, hyperparams: Hyperparams, batch: Batch, key: Any, *state: ModelState) -> Any:
            of_center = around(lax.stop_gradient(strip(hyperparams)))[which]
            marks = marks_of(view.per_example, strip(hyperparams))

            def one(key: Array, batch: Batch, size: int | None) -> Any:
                draw_key, loss_key = jax.random.split(key)
                shape = jax.tree.map(lambda mark: (size or 1,) if mark else (), marks)
                noisy = draw(draw_key, hyperparams, shape)
                if size is not None and groups is not None:
                    repeats = _group_size(batch, groups)
                    noisy = jax.tree.map(lambda m, h: jnp.repeat(h, repeats, 0) if m else h, marks, noisy)
                return of_center(params, noisy, batch, loss_key, *state)

            return _sample(one, validate.required_key(key), batch, num_samples, groups, any(jax.tree.leaves(marks)))

        return loss

    def outer_with_entropy(params: Params, hyperparams: Hyperparams, *rest: Any) -> Any:
        assert learned is not None
        hyperparams = bounded(hyperparams)  # once for both terms: their sum decides whether it may move
        result = perturb(1)(params, hyperparams, *rest)
        bonus = learned.entropy * _entropy(hyperparams)
        return (result[0] - bonus, *result[1:]) if isinstance(result, tuple) else result - bonus

    weights = view.weights
    new_view = ResponseSpec(
        init=lambda key, params, hyperparams, *rest: view.init(key, params, strip(hyperparams), *rest),
        weights=None if weights is None else lambda params, hyperparams: weights(params, strip(hyperparams)),
        losses_at=None,
        base_problem=view.base_problem,
        base_hyperparams=strip,
    )
    outer = problem.outer_loss if learned is None else outer_with_entropy
    constrain = lambda hyperparams: problem.constrain(strip(hyperparams))  # noqa: E731
    inner = lambda params, hyperparams, *rest: perturb(0)(params, bounded(hyperparams), *rest)  # noqa: E731
    losses = {"inner_loss": inner, "outer_loss": outer}
    return dataclasses.replace(problem, **losses, constrain=constrain, response=new_view)  # type: ignore[arg-type]


def _sample(one: Any, key: Array, batch: Batch, num_samples: int, groups: int | None, per_example: bool) -> Any:
    """Run ``one(key, batch, size)`` for all samples and groups, and average."""
    split_groups = groups is not None and not per_example
    size = validate.batch_size(batch) if per_example or split_groups else None
    if split_groups:
        assert groups is not None
        each = _group_size(batch, groups)
        parts = jax.tree.map(lambda x: jnp.reshape(x, (groups, each, *jnp.shape(x)[1:])), batch)

        def run(key: Array) -> Any:
            return _mean(jax.vmap(lambda k, part: one(k, part, None))(jax.random.split(key, groups), parts))
    else:

        def run(key: Array) -> Any:
            return one(key, batch, None if size is None else (groups or size))

    if num_samples == 1:
        return run(key)
    return _mean(jax.vmap(run)(jax.random.split(key, num_samples)))


def _mean(stacked: Any) -> Any:
    average = lambda x: jnp.mean(x, 0) if jnp.issubdtype(x.dtype, jnp.inexact) else x[0]  # noqa: E731
    return jax.tree.map(average, stacked)


def _group_size(batch: Batch, groups: int) -> int:
    size = validate.batch_size(batch)
    if size % groups:
        fix = "Choose num_groups that divides the batch."
        raise ValueError(validate.message(f"a batch that divides into {groups} groups", f"{size} examples", fix))
    return size // groups


def _spread(hyperparams: Hyperparams, scale: PyTree | LearnedScale) -> tuple[Hyperparams, PyTree]:
    """Return the centre and σ, leaf by leaf."""
    if isinstance(scale, LearnedScale):
        center, log_scale = _check_perturbed(hyperparams)
        sigma = jax.tree.map(jnp.exp, log_scale)
    else:
        if isinstance(hyperparams, Perturbed):
            fix = "Pass the hyperparameters alone, or scale=hg.responses.learned_scale()."
            raise TypeError(validate.message("hyperparams without a scale, for a fixed one", "a Perturbed", fix))
        center, sigma = hyperparams, scale
    found = validate.by_prefix("perturbed", "scale", center, sigma, of="hyperparams")
    return center, jax.tree.unflatten(jax.tree.structure(center), [s for _, _, s in found])


def _noisy(key: Array, center: Hyperparams, sigma: PyTree, shape: PyTree) -> Hyperparams:
    leaves: list[Any]
    structure: Any
    leaves, structure = jax.tree.flatten(center)
    keys = jax.random.split(key, len(leaves))
    shapes = structure.flatten_up_to(shape)
    noisy = []
    for k, h, s, lead in zip(keys, leaves, structure.flatten_up_to(sigma), shapes, strict=True):
        noise = jax.random.normal(k, (*lead, *jnp.shape(h)), jnp.asarray(h).dtype)
        noisy.append(h + jnp.asarray(s, noise.dtype) * noise)
    return jax.tree.unflatten(structure, noisy)


def _entropy(hyperparams: Any) -> Array:
    """Return Σ log(σᵢ √(2πe)) over all entries of the hyperparameters."""
    found = validate.by_prefix("perturbed", "log_scale", *_check_perturbed(hyperparams), of="hyperparams")
    terms = [jnp.sum(jnp.broadcast_to(s, jnp.shape(h)) + _ENTROPY_OF_ONE) for _, h, s in found]
    return tree.total(terms)


def _bounder(learned: LearnedScale | None) -> Callable[[Any], Any]:
    if learned is None:
        return lambda hyperparams: hyperparams

    def bounded(hyperparams: Any) -> Perturbed:
        center, log_scale = _check_perturbed(hyperparams)
        return Perturbed(center, jax.tree.map(lambda s: _projected(jnp.asarray(s), learned), log_scale))

    return bounded


def _projected(log_scale: Array, learned: LearnedScale) -> Array:
    """Return log σ inside its bounds; a descent step may bring it back but not push it further out."""
    low, high = math.log(learned.low), math.log(learned.high)

    @jax.custom_vjp
    def clip(s: Array) -> Array:
        return jnp.clip(s, low, high)

    def backward(s: Array, cotangent: Array) -> tuple[Array]:
        outwards = ((s >= high) & (cotangent < 0)) | ((s <= low) & (cotangent > 0))
        return (jnp.where(outwards, 0.0, cotangent),)

    clip.defvjp(lambda s: (clip(s), s), backward)
    return clip(log_scale)


def _stripper(learned: LearnedScale | None) -> Callable[[Any], Hyperparams]:
    if learned is None:
        return lambda hyperparams: hyperparams
    return lambda hyperparams: _check_perturbed(hyperparams).hyperparams


def _check_perturbed(hyperparams: Any) -> Perturbed:
    if not isinstance(hyperparams, Perturbed):
        got, fix = type(hyperparams).__name__, "Pass hg.responses.Perturbed(hyperparams, log_scale)."
        raise TypeError(validate.message("hyperparams to be a Perturbed, for a learned scale", got, fix))
    return hyperparams


def _check_scale(scale: PyTree) -> None:
    if not jax.tree.leaves(scale):
        fix = "Pass one number, a tree prefix of the hyperparameters, or hg.responses.learned_scale()."
        raise ValueError(validate.message("scale with at least one number", validate.describe(scale), fix))
    for leaf in jax.tree.leaves(scale):
        if not isinstance(leaf, jax.core.Tracer) and isinstance(leaf, jax.Array | np.ndarray) and jnp.ndim(leaf):
            leaf = jnp.min(leaf)
        validate.number("scale", leaf, low=0.0)


def _no_response(*_: Any) -> PyTree:
    fix = "Apply hg.responses.with_response or hg.responses.self_tuning first."
    raise ValueError(validate.message("a problem over a response", "one over plain weights", fix))
