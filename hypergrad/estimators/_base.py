"""The protocol of a hypergradient estimator: how dL_out/dλ is obtained, apart from what is differentiated.

    dL_out/dλ  =  ∂L_out/∂λ  +  (dw*/dλ)ᵀ ∂L_out/∂w

Every method is one way to get the second term. State is what the next estimate needs (a solver's warm
start); info is what a person wants to see.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hypergrad import data, dataflow, tree, validate
from hypergrad.problem import BilevelProblem, inner_gradient
from hypergrad.training import Rollout, depends_on_hyperparams, make_window, resolve_optimizer, rollout
from hypergrad.types import Array, Batch, Hyperparams, ModelState, Params, PyTree


class HypergradInfo(NamedTuple):
    """What an estimate tells a person. Structure and dtypes are fixed, so it may live in a carried state.

    Attributes:
      outer_loss: scalar, the outer loss at the weights of the estimate.
      hypergrad_norm: scalar, Euclidean norm of the hypergradient over all leaves.
      solver: ``SolveInfo`` of the linear solve; () for methods without one.
      standard_error: scalar, of a stochastic estimate; () for others.
      skipped: bool scalar, the hypergradient or the outer loss was not finite; ``bilevel`` then takes no
        outer step.
      step: int32 scalar, the number (from 1) of the ``update`` call that made it; −1 for none.
    """

    outer_loss: Array
    hypergrad_norm: Array
    solver: Any
    standard_error: Any
    skipped: Array
    step: Array


class EvaluationInfo(NamedTuple):
    """``HypergradInfo`` with the outer loss's aux: what an estimate itself returns.

    Attributes:
      outer_loss: as in ``HypergradInfo``.
      hypergrad_norm: as in ``HypergradInfo``.
      solver: as in ``HypergradInfo``.
      standard_error: as in ``HypergradInfo``.
      skipped: as in ``HypergradInfo``.
      step: as in ``HypergradInfo``; −1, an estimate belongs to no call.
      aux: what the outer loss returned as aux; () without ``has_aux``.
    """

    outer_loss: Array
    hypergrad_norm: Array
    solver: Any
    standard_error: Any
    skipped: Array
    step: Array
    aux: Any


class Estimate(NamedTuple):
    """The result of an estimate.

    Attributes:
      value: scalar, the outer loss at ``params`` and the given hyperparameters.
      hypergrad: tree like the hyperparameters, d value/dλ.
      params: weights that the estimate was made at: the given ones, or those that the window reached.
      inner_state: the inner optimizer's state there, as given without an optimizer.
      estimator_state: for the next estimate.
      model_state: the model's state there, () for a stateless problem.
      info: ``EvaluationInfo``: the fields of ``HypergradInfo``, and ``aux``.
    """

    value: Array
    hypergrad: Hyperparams
    params: Params
    inner_state: PyTree
    estimator_state: PyTree
    model_state: ModelState
    info: EvaluationInfo


class HypergradEstimator(NamedTuple):
    """A method bound to a problem, as pure functions.

    Attributes:
      problem: the ``BilevelProblem``.
      init: ``init(variables) -> estimator_state``, a pytree of arrays that shares no buffer with variables.
      estimate: ``estimate(variables, inner_state, estimator_state, inner_batch, outer_batch, *, key,
        inner_optimizer=None, model_state=None) -> Estimate``. With an ``inner_optimizer``, leaves of
        ``inner_batch`` carry a window axis K and K inner steps are taken first; without one, everything is
        evaluated at ``variables.params``. A method that needs a rollout takes an ``inner_state`` of None for a
        fresh one, made from the hyperparameters inside what it differentiates.
      needs_rollout: the method differentiates the inner steps themselves and so cannot do without.
      solver_info: what ``info.solver`` holds before the first estimate; () for methods without a solve.
      respond: ``respond(params, hyperparams, inner_batch, *, key, inner_optimizer=None, model_state=None) ->
        params``, differentiable, for ``hg.best_response``; None for methods that have no derivative of their own.
      unroll: of the scan over the inner steps that ``bilevel`` takes in this method's stead where none is due.
    """

    problem: BilevelProblem
    init: Callable[..., PyTree]
    estimate: Callable[..., Estimate]
    needs_rollout: bool
    solver_info: Any = ()
    respond: Callable[..., Params] | None = None
    unroll: int | bool = 1


def blank_info(solver: Any = ()) -> HypergradInfo:
    """Return the info of before the first estimate: zeros, ``step=-1``."""
    return HypergradInfo(
        jnp.zeros((), float), jnp.zeros((), float), solver, (), jnp.array(False), jnp.array(-1, jnp.int32)
    )


def describe_estimate(
    value: Array, hypergrad: Hyperparams, *, solver: Any = (), standard_error: Any = (), aux: Any = ()
) -> EvaluationInfo:
    """Return the info of an estimate that belongs to no ``update`` call yet."""
    size = tree.norm(tree.promote(hypergrad))
    finite = jnp.isfinite(value) & jnp.isfinite(size)  # a norm that overflows counts as not finite: one pass, not two
    return EvaluationInfo(value, size, solver, standard_error, ~finite, jnp.array(-1, jnp.int32), aux)


def refuse_optimizer_function(inner_optimizer: Any) -> None:
    """Refuse an inner optimizer that depends on the hyperparameters: the implicit function theorem cannot see it."""
    if depends_on_hyperparams(inner_optimizer):
        wanted = "inner_optimizer to be an optax transformation, for an estimator that does not differentiate steps"
        fix = "The inner optimum does not depend on how it is reached: tune optimizer settings with hg.unrolled."
        raise TypeError(validate.message(wanted, "a function of the hyperparameters", fix))


def end_of_window(
    problem: BilevelProblem,
    start: Rollout,
    hyperparams: Hyperparams,
    inner_batch: Batch,
    key: Array | None,
    inner_optimizer: Any,
) -> tuple[Rollout, Batch]:
    """Take a window's inner steps, for methods that do not differentiate them; return their end and the last batch.

    An ``inner_state`` of None in ``start`` is a fresh one.
    """
    refuse_optimizer_function(inner_optimizer)
    optimizer = resolve_optimizer(inner_optimizer, None)
    if start.inner_state is None:
        start = start._replace(inner_state=optimizer.init(start.params))
    reached = rollout(inner_gradient(problem, hyperparams), optimizer, start, make_window(inner_batch, key))
    return reached, data.take(inner_batch, -1)


def refuse_zeros(
    name: str, hyperparams: Hyperparams, unseen: list[int], direct: Callable[[Hyperparams], Array]
) -> None:
    """Refuse the ``unseen`` hyperparameter leaves, of zero indirect derivative, that ``direct`` does not depend on."""
    zero = {i for i in unseen if jnp.size(jax.tree.leaves(hyperparams)[i])}
    if zero:
        value = jax.eval_shape(direct, hyperparams)
        zero &= set(dataflow.independent_leaves(lambda ct: jax.vjp(direct, hyperparams)[1](ct)[0], value))
    if not zero:
        return
    names = ", ".join(tree.leaf_names(hyperparams)[i] for i in sorted(zero))
    way, advice = _WAYS[name]
    wanted = f"every hyperparameter leaf to enter {way}, or the outer loss"
    fix = f"Its {name} hypergradient would be zero by construction. {advice} Remove a leaf that nothing uses."
    raise ValueError(validate.message(wanted, f"hyperparams leaf {names}, which enters neither", fix))


_WAYS = {
    "implicit": (
        "the inner loss's gradient in the weights",
        "A learning rate, momentum or decoupled decay acts through the optimizer: use unrolled differentiation "
        "(hg.unrolled) for it, or put a decay into the inner loss (hg.penalties.l2).",
    ),
    "unrolled": (
        "the inner steps, differentiably",
        "Make inner_optimizer a function that builds the optimizer from the constrained hyperparameters. An optimizer "
        "that takes signs (optax.lion, sign_sgd) passes no derivative of the loss: only its rate and decay have one. "
        "What enters the optimizer's initial state alone (optax.inject_hyperparams) does not act on a given state.",
    ),
    "direct": (
        "the inner loss, by which a response would learn it",
        "Learn a response to it first (hg.responses.with_response, self_tuning). A learning rate, momentum or "
        "decoupled decay acts through the optimizer, which no response sees: use hg.unrolled for it.",
    ),
}
