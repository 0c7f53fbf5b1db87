"""The bilevel problem: two losses over weights w and hyperparameters λ.

    w*(λ) = argmin_w L_in(w, λ)            λ* = argmin_λ L_out(w*(λ), λ)

A problem says what is differentiated; an estimator says how. ``reparameterize`` moves a problem whose losses
take constrained hyperparameters (positive decays, probabilities) to unconstrained ones that an optimizer may
step in freely; it composes with itself.
"""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hypergrad import data, tree, validate
from hypergrad.bijectors import check_bijectors, constrain
from hypergrad.types import Array, Batch, Hyperparams, Loss, ModelState, Params, PyTree

__all__ = [
    "BilevelParams",
    "BilevelProblem",
    "LossValue",
    "OverfittingWarning",
    "ResponseSpec",
    "check_model_state",
    "check_problem",
    "check_variables",
    "evaluate_inner",
    "evaluate_outer",
    "evaluate_residual",
    "microbatched",
    "refuse_residual",
    "refuse_response",
    "reparameterize",
    "warn_of_overfitting",
    "with_prior",
    "with_residual",
]


class OverfittingWarning(UserWarning):
    """More hyperparameters than validation examples, and no prior: they can fit the noise of the validation set.

    Given where an outer batch is an ``IndexedBatch`` whose data has fewer examples than there are hyperparameters, or a
    plain batch with more than ten hyperparameters per example: a plain batch does not tell how large the validation set
    is. If that is large, silence the warning by ``warnings.filterwarnings("ignore", category=hg.OverfittingWarning)``.
    """


class BilevelParams(NamedTuple):
    """The joint pytree that ``bilevel`` optimizes, and that hypergradients are taken at.

    Attributes:
      params: weights w, a pytree of floating-point arrays.
      hyperparams: unconstrained hyperparameters λ, a pytree of floating-point arrays. If you create hyperparameters by
        hand, set their dtype. A weakly typed value such as ``jnp.log(0.1)`` causes a jitted step to be traced a second
        time after the first update.
    """

    params: Params
    hyperparams: Hyperparams


def _unchanged(hyperparams: Hyperparams) -> Hyperparams:
    return hyperparams


class ResponseSpec(NamedTuple):
    """What a problem whose inner variable is a learned response tells transforms and estimators about it.

    Attributes:
      init: ``init(key, params, hyperparams, batch, model_state) -> response_params``.
      weights: ``weights(response_params, hyperparams) -> params``, w(λ), differentiable; None where there are none.
      losses_at: ``losses_at(center) -> (inner_loss, outer_loss)``, the losses with the response centred at given
        hyperparameters; they take the leaves that are marked in ``per_example`` with a leading batch axis. None once
        the problem is perturbed.
      base_problem: the problem over plain weights; it takes ``base_hyperparams(hyperparams)``.
      base_hyperparams: from the hyperparameters of this problem to those of ``base_problem``: all but learned scales.
      per_example: tree prefix of bools over the hyperparameters: which take one value per example.
    """

    init: Callable[..., PyTree]
    weights: Callable[[PyTree, Hyperparams], Params] | None
    losses_at: Callable[[Hyperparams], tuple[Loss, Loss]] | None
    base_problem: "BilevelProblem"
    base_hyperparams: Callable[[Hyperparams], Hyperparams] = _unchanged
    per_example: PyTree = False


@dataclasses.dataclass(frozen=True)
class BilevelProblem:
    """An inner loss that trains the weights and an outer loss that measures the hyperparameters.

    min_λ L_out(w*(λ), λ)  subject to  w*(λ) = argmin_w L_in(w, λ).

    Both losses are called as ``loss(params, hyperparams, batch, key)``; ``key`` is a typed ``jax.random.key``,
    or None where neither draws random numbers. A ``stateful`` loss takes ``model_state`` as fifth argument.

    Attributes:
      inner_loss: trains the weights; twice differentiable in them for ``implicit``.
      outer_loss: measures the hyperparameters at the trained weights, on other data.
      has_aux: both losses return ``(scalar, aux)``.
      stateful: both losses return ``(scalar, model_state)``, or ``(scalar, (model_state, aux))`` with aux.
      constrain: maps unconstrained hyperparameters to those that the original losses see.
      prior: set by ``with_prior``: what is added to the outer loss, a function of the hyperparameters; None without.
      residual: set by ``with_residual``: what is zero at the inner solution in place of ∇_w L_in; None for a minimum.
      response: set by ``hg.responses``, whose transforms make the inner variable a learned response; None otherwise.

    Raises:
      TypeError: a loss is not callable or takes another number of arguments, or a flag is not a bool.

    >>> problem = BilevelProblem(lambda w, h, b, k: ((w - h) ** 2).sum(), lambda w, h, b, k: (w ** 2).sum())
    >>> problem.has_aux
    False
    """

    inner_loss: Loss
    outer_loss: Loss
    has_aux: bool = False
    stateful: bool = False
    constrain: Callable[[Hyperparams], Hyperparams] = dataclasses.field(default=_unchanged, kw_only=True)
    prior: Callable[[Hyperparams], Array] | None = dataclasses.field(default=None, kw_only=True)
    residual: Loss | None = dataclasses.field(default=None, kw_only=True)
    response: ResponseSpec | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("inner_loss", "outer_loss", "constrain"):
            if not callable(getattr(self, name)):
                fix = "Pass loss(params, hyperparams, batch, key) -> scalar."
                got = validate.describe(getattr(self, name))
                raise TypeError(validate.message(f"BilevelProblem's {name} to be callable", got, fix))
        for name in ("has_aux", "stateful"):
            validate.flag(f"BilevelProblem's {name}", getattr(self, name))
        for name in ("inner_loss", "outer_loss"):
            _check_arguments(name, getattr(self, name), 5 if self.stateful else 4)


def _check_arguments(name: str, loss: Loss, count: int) -> None:
    """Refuse a loss that cannot be called with ``count`` positional arguments."""
    try:
        signature = inspect.signature(loss)
    except (ValueError, TypeError):  # a builtin tells nothing
        return
    try:
        signature.bind(*range(count))
    except TypeError as error:
        form = "(params, hyperparams, batch, key" + (", model_state)" if count == 5 else ")")
        fix = "Take all of them, also those that the loss does not use; stateful=True adds model_state."
        raise TypeError(validate.message(f"{name} to take {form}", f"{name}{signature}", fix)) from error


class LossValue(NamedTuple):
    """A loss's result in one form, whatever the problem's flags.

    Attributes:
      value: scalar.
      model_state: what the loss returned as such; () for a stateless problem.
      aux: what the loss returned as such; () without ``has_aux``.
    """

    value: Array
    model_state: ModelState
    aux: Any


def reparameterize(problem: BilevelProblem, bijectors: PyTree) -> BilevelProblem:
    """Return the problem over unconstrained hyperparameters λ, with losses at ``constrain(bijectors, λ)``.

    L'(w, λ) = L(w, forward(λ)), so the hypergradient gains the factor forward'(λ).

    Args:
      problem: a problem over constrained hyperparameters.
      bijectors: one ``Bijector``, or a tree prefix of the hyperparameters with bijectors as leaves.

    Returns:
      A ``BilevelProblem``, whose ``constrain`` is the composition of all reparameterizations so far.

    Raises:
      TypeError: ``problem`` is not a ``BilevelProblem``, or ``bijectors`` holds something else than bijectors.
      ValueError: ``problem`` is already one over a learned response.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> loss = lambda w, decay, batch, key: (decay * w ** 2).sum()
    >>> problem = hg.reparameterize(hg.BilevelProblem(loss, loss), hg.bijectors.exp())
    >>> float(problem.inner_loss(jnp.array(3.0), jnp.array(0.0), None, None))
    9.0
    """
    check_problem(problem)
    check_bijectors("reparameterize", bijectors)
    refuse_response("reparameterize", problem)

    def over_unconstrained(loss: Loss) -> Loss:
        @functools.wraps(loss)
        def reparameterized(params: Params, hyperparams: Hyperparams, *args: Any, **kwargs: Any) -> Any:
            return loss(params, constrain(bijectors, hyperparams), *args, **kwargs)

        return reparameterized

    return dataclasses.replace(
        problem,
        inner_loss=over_unconstrained(problem.inner_loss),
        outer_loss=over_unconstrained(problem.outer_loss),
        prior=None if problem.prior is None else lambda h: problem.prior(constrain(bijectors, h)),  # type: ignore[misc]
        residual=None if problem.residual is None else over_unconstrained(problem.residual),
        constrain=lambda hyperparams: problem.constrain(constrain(bijectors, hyperparams)),
    )


def microbatched(problem: BilevelProblem, num_microbatches: int) -> BilevelProblem:
    """Return the problem whose losses are means over microbatches, evaluated one after the other.

    L'(w, λ; batch) = 1/m Σᵢ L(w, λ; part i of the batch),   parts along the leading axis of its leaves

    Gradients and Hessian products of a batch then take the memory of one microbatch: each part is computed again in
    the backward pass. A penalty that does not depend on the batch is not counted m times: it has the same value in each
    part, so the mean over the parts does not change it.

    Args:
      problem: losses that are means over the examples of a batch; not stateful.
      num_microbatches: m ≥ 1; it divides the leading axis of every leaf of a batch.

    Returns:
      A ``BilevelProblem``. Part i has the key ``fold_in(key, i)``. aux has a leading axis m.

    Raises:
      TypeError: ``problem`` is not a ``BilevelProblem``, ``num_microbatches`` is not an int.
      ValueError: a stateful problem, or one with a residual or a response; at a call, a batch that does not divide.

    Valid when each loss is a mean over examples: without random numbers, nothing changes but the rounding.

    >>> import jax.numpy as jnp
    >>> loss = lambda w, h, batch, key: jnp.mean((w - batch) ** 2)
    >>> problem = microbatched(BilevelProblem(loss, loss), 4)
    >>> float(problem.inner_loss(jnp.array(1.0), None, jnp.arange(8.0), None))
    11.5
    """
    check_problem(problem)
    refuse_response("microbatched", problem)
    count = validate.positive_int("num_microbatches", num_microbatches)
    if problem.stateful or problem.residual is not None:
        fix = "Split the batch inside the loss, by lax.scan over jax.checkpoint."
        raise ValueError(validate.message("a problem without model state and residual", "one with", fix))

    def over_parts(name: str) -> Loss:
        @functools.wraps(getattr(problem, name))
        def mean(params: Params, hyperparams: Hyperparams, batch: Batch, key: Array | None) -> Any:
            parts = data.split(batch, count)

            @jax.checkpoint
            def one(params: Params, hyperparams: Hyperparams, index: Array, part: PyTree) -> tuple[Array, Any]:
                own = None if key is None else jax.random.fold_in(key, index)
                at = BilevelParams(params, hyperparams)
                result = _evaluate(problem, name, at, data.with_windowed(batch, part), own, ())
                return result.value, result.aux

            def step(total: Array, at: tuple[Array, PyTree]) -> tuple[Array, Any]:
                value, aux = one(params, hyperparams, *at)
                return total + value.astype(total.dtype) / count, aux

            first = jnp.zeros((), jnp.int32), jax.tree.map(lambda x: x[0], parts)
            dtype = tree.wider(jax.eval_shape(one, params, hyperparams, *first)[0].dtype)
            numbers = jnp.arange(count, dtype=jnp.int32)
            value, aux = jax.lax.scan(step, jnp.zeros((), dtype), (numbers, parts))
            return (value, aux) if problem.has_aux else value

        return mean

    return dataclasses.replace(problem, inner_loss=over_parts("inner_loss"), outer_loss=over_parts("outer_loss"))


def with_prior(problem: BilevelProblem, prior: Callable[[Hyperparams], Array], *, num_examples: int) -> BilevelProblem:
    """Return the problem with a prior on its hyperparameters: what is minimised becomes L_out(w, λ) + prior(λ) / N.

    With L_out the mean negative log-likelihood of N validation examples, λ* is then the most probable λ given them
    (MAP). Use it where hyperparameters outnumber validation examples. The value of an estimate and ``info.outer_loss``
    contain the prior; ``problem.outer_loss`` itself stays as it is.

    Args:
      problem: over plain weights.
      prior: ``prior(hyperparams) -> scalar``, −log p(λ) up to a constant, e.g. ``hg.priors.normal(start, 1.0)``. It
        receives the hyperparameters that the losses of ``problem`` receive: after ``reparameterize`` the unconstrained
        ones; a later ``reparameterize`` wraps it with the losses.
      num_examples: N ≥ 1, the examples of the whole validation set, also where an outer batch has fewer.

    Returns:
      A ``BilevelProblem``.

    Raises:
      TypeError: ``problem`` is not a ``BilevelProblem``, ``prior`` is not callable, ``num_examples`` is not an int.
      ValueError: ``num_examples`` < 1, or ``problem`` is one over a learned response; at a call, a prior that returns
        no scalar.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> inner = lambda w, h, batch, key: 0.5 * jnp.sum((w - h) ** 2)                            # w*(h) = h
    >>> problem = hg.BilevelProblem(inner, lambda w, h, batch, key: jnp.sum(w**2))
    >>> problem = with_prior(problem, hg.priors.normal(0.0, scale=1.0), num_examples=100)
    >>> at = jnp.array([1.0, 3.0])
    >>> (value, grad), _ = hg.value_and_hypergrad(hg.implicit(problem, hg.solvers.cg(2)))(at, at, (), (), key=None)
    >>> round(float(value), 4), [round(float(g), 4) for g in grad]                              # 10 + ½ (1 + 9) / 100
    (10.05, [2.01, 6.03])

    Reference: Lorraine, Vicol & Duvenaud, arXiv 1911.02590, section 5.1 (overfitting a small validation set).
    """
    check_problem(problem)
    refuse_response("with_prior", problem)
    if not callable(prior):
        fix = "Pass prior(hyperparams) -> scalar, e.g. hg.priors.normal(start, 1.0)."
        raise TypeError(validate.message("prior to be callable", validate.describe(prior), fix))
    count = validate.positive_int("num_examples", num_examples)

    def scaled(hyperparams: Hyperparams) -> Array:
        value = validate.scalar_loss("prior", prior(hyperparams), "Return one number, −log p(λ).") / count
        return value if problem.prior is None else value + problem.prior(hyperparams)

    return dataclasses.replace(problem, prior=scaled)


def warn_of_overfitting(problem: BilevelProblem, hyperparams: Hyperparams, outer_batch: Batch) -> None:
    """Warn where hyperparameters outnumber validation examples and there is no prior.

    An ``IndexedBatch`` says how many examples there are. A plain batch may be a small part of them: the bound is then
    ten hyperparameters per example of the batch.
    """
    known, found = data.num_examples(outer_batch)
    count = sum(leaf.size for leaf in jax.tree.leaves(hyperparams))
    if problem.prior is not None or problem.response is not None or not found or count <= found * (1 if known else 10):
        return
    examples = f"{found:,} validation examples" if known else f"outer batches of size {found:,}"
    warnings.warn(
        f"{count:,} hyperparameters are learned from {examples} without a prior: they can fit the noise of the "
        "validation set. Keep a third split, and stop where its loss rises; or learn fewer, such as one per layer or "
        "group; or add a prior, hg.with_prior(problem, hg.priors.normal(start, scale), num_examples=...), and choose "
        "its scale on the third split: a narrow prior keeps weights of examples from being learned. If the whole "
        "validation set is larger than that, ignore hg.OverfittingWarning.",
        OverfittingWarning,
        stacklevel=2,
    )


def with_residual(problem: BilevelProblem, residual: Loss) -> BilevelProblem:
    """Return the problem whose inner solution is given by r(w*, λ) = 0 in place of ∇_w L_in(w*, λ) = 0.

    dw*/dλ = −(∂r/∂w)⁻¹ ∂r/∂λ, by ``hg.implicit``. Training goes on with the inner loss: use an optimizer whose
    iterates approach the solution (projected or proximal steps). ``hg.residuals`` has the usual residuals.

    Args:
      problem: over plain weights.
      residual: ``residual(params, hyperparams, batch, key) -> tree like params``, differentiable in both; with
        ``model_state`` as fifth argument where the problem is stateful. It receives the hyperparameters that the losses
        of ``problem`` receive; a later ``reparameterize`` wraps it with them.

    Returns:
      A ``BilevelProblem``.

    Raises:
      TypeError: ``problem`` is not a ``BilevelProblem``, or ``residual`` is not callable with four arguments (five
        where the problem is stateful).
      ValueError: ``problem`` is one over a learned response, which is trained by its loss.

    Valid when ∂r/∂w is invertible at the solution.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> problem = hg.BilevelProblem(lambda w, h, b, k: jnp.sum(w**2), lambda w, h, b, k: jnp.sum(w))
    >>> problem = with_residual(problem, lambda w, h, batch, key: w - jnp.cos(h * w))       # w* = cos(h w*)
    >>> fn = hg.hypergrad(hg.implicit(problem))
    >>> round(float(fn(jnp.array(0.739085), jnp.array(1.0), (), (), key=None)), 4)          # −w sin w / (1 + sin w)
    -0.2975

    Reference: Blondel et al., Efficient and modular implicit differentiation, arXiv 2105.15183.
    """
    check_problem(problem)
    refuse_response("with_residual", problem)
    if not callable(residual):
        fix = "Pass residual(params, hyperparams, batch, key) -> tree like params, e.g. one of hg.residuals."
        raise TypeError(validate.message("residual to be callable", validate.describe(residual), fix))
    _check_arguments("residual", residual, 5 if problem.stateful else 4)
    return dataclasses.replace(problem, residual=residual)


def evaluate_residual(
    problem: BilevelProblem, variables: BilevelParams, batch: Batch, key: Array | None, model_state: ModelState
) -> Params:
    """Return the residual of the inner solution, checked."""
    assert problem.residual is not None
    arguments = (*variables, data.gathered(batch), None if key is None else jax.random.clone(key))
    result = problem.residual(*arguments, model_state) if problem.stateful else problem.residual(*arguments)
    validate.same_structure("the residual", result, "params", variables.params)
    return result


def evaluate_inner(
    problem: BilevelProblem, variables: BilevelParams, batch: Batch, key: Array | None, model_state: ModelState
) -> LossValue:
    """Return the inner loss's value, model state and aux, checked."""
    return _evaluate(problem, "inner_loss", variables, batch, key, model_state)


def evaluate_outer(
    problem: BilevelProblem, variables: BilevelParams, batch: Batch, key: Array | None, model_state: ModelState
) -> LossValue:
    """Return the outer loss's value with the prior, model state and aux, checked."""
    result = _evaluate(problem, "outer_loss", variables, batch, key, model_state)
    if problem.prior is None:
        return result
    hyperparams = (
        variables.hyperparams if problem.response is None else problem.response.base_hyperparams(variables.hyperparams)
    )
    return result._replace(value=result.value + problem.prior(hyperparams).astype(result.value.dtype))


def check_problem(problem: Any) -> None:
    """Refuse anything but a ``BilevelProblem``."""
    if not isinstance(problem, BilevelProblem):
        got, fix = validate.describe(problem), "Build it with hg.BilevelProblem(inner_loss, outer_loss)."
        raise TypeError(validate.message("a BilevelProblem", got, fix))


def refuse_response(name: str, problem: BilevelProblem) -> None:
    """Refuse a problem over a learned response, in transforms that must come before it."""
    if problem.response is not None:
        wanted = f"{name} to be applied to a problem over plain weights"
        fix = "The order is hg.reparameterize, then with_response or self_tuning, then perturbed, each at most once."
        raise ValueError(validate.message(wanted, "one that already has a response or is perturbed", fix))


def refuse_residual(name: str, problem: BilevelProblem) -> None:
    """Refuse a problem whose inner solution is given by a residual, in what takes it for a minimum."""
    if problem.residual is not None:
        wanted = f"a problem without a residual for {name}, which takes the inner solution for a minimum of the loss"
        fix = "Use hg.implicit: it differentiates the solution of a residual."
        raise ValueError(validate.message(wanted, "one made by hg.with_residual", fix))


def check_variables(variables: Any) -> BilevelParams:
    """Return ``variables`` if it is a ``BilevelParams`` of floating-point trees."""
    if not isinstance(variables, BilevelParams):
        got = validate.describe(variables)
        fix = "Pass hg.BilevelParams(params, hyperparams); for a Flax NNX module use hg.integrations.nnx.Optimizer."
        raise TypeError(validate.message("a BilevelParams", got, fix))
    validate.floating_leaves("params", variables.params)
    validate.floating_leaves("hyperparams", variables.hyperparams)
    return variables


def check_model_state(problem: BilevelProblem, model_state: ModelState) -> ModelState:
    """Refuse a missing model state of a stateful problem, and a given one of another; None becomes ()."""
    if problem.stateful and model_state is None:
        fix = "Pass model_state=..., e.g. the batch_stats collection."
        raise ValueError(validate.message("model_state for a stateful problem", "None", fix))
    if not problem.stateful and not (model_state is None or (isinstance(model_state, tuple) and not model_state)):
        fix = "Declare BilevelProblem(..., stateful=True), or drop model_state."
        raise ValueError(
            validate.message("no model_state for a stateless problem", validate.describe(model_state), fix)
        )
    return () if model_state is None else model_state


def _evaluate(
    problem: BilevelProblem, name: str, variables: BilevelParams, batch: Batch, key: Array | None, state: ModelState
) -> LossValue:
    loss: Loss = getattr(problem, name)
    # A clone says that the key is shared on purpose: a solve evaluates one loss many times with one draw.
    arguments = (*variables, data.gathered(batch), None if key is None else jax.random.clone(key))
    result = loss(*arguments, state) if problem.stateful else loss(*arguments)
    value, new_state, aux = result, (), ()
    if problem.stateful or problem.has_aux:
        form = {
            (True, True): "(scalar, (model_state, aux))",
            (True, False): "(scalar, model_state)",
            (False, True): "(scalar, aux)",
        }[problem.stateful, problem.has_aux]
        fix = f"Return {form}, or change has_aux/stateful of the BilevelProblem."
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(validate.message(f"{name} to return {form}", validate.describe(result), fix))
        value, extra = result
        if problem.stateful and problem.has_aux:
            if not (isinstance(extra, tuple) and len(extra) == 2):
                raise TypeError(validate.message(f"{name} to return {form}", validate.describe(extra), fix))
            new_state, aux = extra
        else:
            new_state, aux = (extra, ()) if problem.stateful else ((), extra)
        if problem.stateful:
            validate.same_structure(f"the model_state that {name} returned", new_state, "the given one", state)
    fix = "Return the scalar alone, or declare has_aux=True / stateful=True."
    value = validate.scalar_loss(name, value, fix)
    return LossValue(value, tree.match_dtypes(new_state, state) if problem.stateful else (), aux)
