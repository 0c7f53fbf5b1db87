"""``bilevel``: weights and hyperparameters behind one optax transformation.

    each call:       w ← inner optimizer (∇_w L_in), K steps          K = window
    every so often:  λ ← outer optimizer (dL_out/dλ at the new weights and the old λ)

Use it in place of the optimizer of a training loop that works. The hypergradient and everything outer run
only where they are due: a call on which no outer step is due costs a plain step.

Reference: the alternation of Luketina et al., arXiv 1511.06727, and Lorraine, Vicol & Duvenaud, arXiv 1911.02590.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from hypergrad import data, tree, validate
from hypergrad.estimators import Estimate, HypergradEstimator, HypergradInfo
from hypergrad.estimators._base import blank_info, refuse_optimizer_function
from hypergrad.problem import BilevelParams, check_model_state, check_variables, inner_gradient
from hypergrad.training import (
    Rollout,
    make_window,
    resolve_optimizer,
    rollout,
    split_keys,
    step_key,
    with_keywords,
)
from hypergrad.types import Array, Batch, Hyperparams, Key, ModelState, Params, PyTree


class BilevelState(NamedTuple):
    """The state of ``bilevel``: a pytree of arrays that shares no buffer with the variables.

    Attributes:
      step: int32 scalar, ``update`` calls so far.
      inner: state of the inner optimizer.
      outer: state of the outer optimizer.
      estimator: state of the estimator, e.g. a solver's warm start.
      key: raw uint32 data of the random key; constant, each call folds ``step`` into it.
      model_state: of a stateful problem, e.g. batch statistics; () otherwise.
      info: ``HypergradInfo`` of the last outer step that was due.
    """

    step: Array
    inner: PyTree
    outer: PyTree
    estimator: PyTree
    key: Array
    model_state: ModelState
    info: HypergradInfo


def bilevel(
    estimator: HypergradEstimator,
    *,
    inner_optimizer: Any,
    outer_optimizer: optax.GradientTransformation,
    window: int = 1,
    every: int | Callable[[Array], Array] = 1,
    key: Key = 0,
    model_state: ModelState = None,
) -> optax.GradientTransformationExtraArgs:
    """Optimize weights by the inner loss and hyperparameters by hypergradients, as one optax transformation.

    ``update(grads, state, params, *, inner_batch, outer_batch, model_state=None, **extra)`` takes a
    ``BilevelParams`` for ``params`` and returns updates shaped like it. With ``window=1``, ``grads`` is the
    gradient of the inner loss: a tree like the weights, a ``BilevelParams`` whose hyperparameter part is
    ignored, or None to have it computed from ``inner_batch``. With ``window=K > 1`` leaves of ``inner_batch``
    have a leading axis K, ``grads`` is None, and one call is K inner steps. Other keywords reach the inner
    optimizer if it takes any.

    Args:
      estimator: e.g. ``hg.implicit(problem, hg.solvers.neumann(20))``.
      inner_optimizer: an optax transformation for the weights; for estimators that differentiate the inner
        steps also a function of the constrained hyperparameters that returns one.
      outer_optimizer: an optax transformation for the hyperparameters. Its updates are handed the outer loss
        as ``value``, if it takes keywords.
      window: K ≥ 1, inner steps a call.
      every: an outer step is due on calls ``every``, 2·``every``, …; or a function from the call's number
        (int32, from 1) to a scalar bool, e.g. ``lambda n: (n > 1000) & (n % 10 == 0)`` for a warm-up.
      key: an int or a ``jax.random.key``; all randomness of the run derives from it.
      model_state: initial model state of a stateful problem.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` over ``BilevelParams`` with state ``BilevelState``. Where
      the hypergradient or the outer loss is not finite the outer step is skipped and ``info.skipped`` is True.

    Raises:
      TypeError: an argument of the wrong kind; at ``init``, something that is not a ``BilevelParams``.
      ValueError: ``window`` or ``every`` < 1; at ``update``, a missing batch, a wrong window axis or structure.

    Right under the estimator's own assumption at the weights reached; ``implicit`` wants them near the inner
    optimum, so let ``every`` leave time for training in between.

    >>> import hypergrad as hg, jax.numpy as jnp, optax
    >>> problem = hg.BilevelProblem(lambda w, h, b, k: (0.5 * jnp.exp(h) * w**2 - b * w).sum(),
    ...                             lambda w, h, b, k: (w - b).sum() ** 2)
    >>> tx = bilevel(hg.implicit(problem, hg.solvers.cg(5)), inner_optimizer=optax.sgd(0.5),
    ...              outer_optimizer=optax.sgd(0.1), every=2)
    >>> variables = hg.BilevelParams(jnp.zeros(1), jnp.ones(1))
    >>> state = tx.init(variables)
    >>> updates, state = tx.update(None, state, variables, inner_batch=1.0, outer_batch=0.5)
    >>> int(state.step), int(state.info.step)
    (1, -1)

    Reference: Lorraine, Vicol & Duvenaud, arXiv 1911.02590.
    """
    if not isinstance(estimator, HypergradEstimator):
        fix = "Pass e.g. hg.implicit(problem, hg.solvers.neumann(20))."
        raise TypeError(validate.message("a HypergradEstimator", validate.describe(estimator), fix))
    problem = estimator.problem
    if not estimator.needs_rollout:
        refuse_optimizer_function(inner_optimizer)
        validate.transformation("inner_optimizer", inner_optimizer)
    outer_tx = validate.transformation("outer_optimizer", outer_optimizer)
    window = validate.positive_int("window", window)
    if not callable(every):
        every = validate.positive_int("every", every)
    first_model_state = check_model_state(problem, model_state)
    root = validate.as_key(key)
    if root is None:
        raise TypeError(validate.message("key to be an int or a jax.random.key", "None", "Leave the default, key=0."))
    setup = _Setup(estimator, inner_optimizer, outer_tx, window, every, jax.random.key_impl(root))

    def init(params: BilevelParams) -> BilevelState:
        variables = check_variables(params)
        inner_tx = resolve_optimizer(inner_optimizer, problem.constrain(variables.hyperparams))
        state = BilevelState(
            step=jnp.zeros((), jnp.int32),
            inner=inner_tx.init(variables.params),
            outer=outer_tx.init(variables.hyperparams),
            estimator=estimator.init(variables),
            # Copies of what this closure keeps: a donated state must not take it along.
            key=jnp.copy(jax.random.key_data(root)),
            model_state=jax.tree.map(jnp.copy, first_model_state),
            info=jax.tree.map(jnp.copy, blank_info(estimator.solver_info)),
        )
        return tree.unalias(tree.strip_weak_types(state), variables)

    def update(
        grads: Any,
        state: BilevelState,
        params: BilevelParams | None = None,
        *,
        inner_batch: Batch = None,
        outer_batch: Batch = None,
        model_state: ModelState = None,
        **extra: Any,
    ) -> tuple[BilevelParams, BilevelState]:
        call = _read_call(setup, grads, state, params, inner_batch, outer_batch, model_state, extra)
        reached, updates, outer = (_differentiated_steps if estimator.needs_rollout else _plain_steps)(setup, call)
        inner_and_outer = reached.inner_state, outer.state, outer.estimator
        new_state = BilevelState(call.number, *inner_and_outer, state.key, reached.model_state, outer.info)
        return BilevelParams(updates, outer.updates), new_state

    return optax.GradientTransformationExtraArgs(init, update)


class _Setup(NamedTuple):
    """What ``bilevel`` was built with."""

    estimator: HypergradEstimator
    inner_optimizer: Any
    outer_tx: optax.GradientTransformationExtraArgs
    window: int
    every: int | Callable[[Array], Array]
    key_impl: Any


class _Call(NamedTuple):
    """One call of ``update``, checked."""

    number: Array
    key: Array
    grads: Params | None
    state: BilevelState
    variables: BilevelParams
    batches: Batch  # as given: with the window axis first where window > 1
    outer_batch: Batch
    model_state: ModelState
    extra: dict[str, Any]


class _Outer(NamedTuple):
    """What an outer step leaves behind."""

    updates: Hyperparams
    state: PyTree
    estimator: PyTree
    info: HypergradInfo


def _read_call(
    setup: _Setup,
    grads: Any,
    state: Any,
    variables: Any,
    inner_batch: Batch,
    outer_batch: Batch,
    model_state: ModelState,
    extra: dict[str, Any],
) -> _Call:
    if variables is None:
        fix = "Call tx.update(grads, state, variables, inner_batch=..., outer_batch=...)."
        raise ValueError(validate.message("params, the current BilevelParams, as third argument", "None", fix))
    variables = check_variables(variables)
    if not isinstance(state, BilevelState):
        fix = "Pass the state from tx.init(variables) or the last update."
        raise TypeError(validate.message("a BilevelState", validate.describe(state), fix))
    for name, batch in (("inner_batch", inner_batch), ("outer_batch", outer_batch)):
        if batch is None:
            fix = f"Pass {name}=... on every call, also where no outer step is due; () for a loss without data."
            raise ValueError(validate.message(f"{name} for update", "None", fix))
    if setup.window > 1 and jax.tree.leaves(inner_batch):
        data.window_length(inner_batch, setup.window)

    problem = setup.estimator.problem
    if grads is not None:
        if setup.window > 1 or setup.estimator.needs_rollout:
            wanted = f"grads=None with window={setup.window} and needs_rollout={setup.estimator.needs_rollout}"
            raise ValueError(
                validate.message(wanted, type(grads).__name__, "Pass None: gradients are computed from inner_batch.")
            )
        grads = grads.params if isinstance(grads, BilevelParams) else grads
        validate.same_structure("grads", grads, "the weights (or of the BilevelParams)", variables.params)
        if problem.stateful and model_state is None:
            wanted = "model_state with the grads of a stateful problem"
            fix = "Pass the model_state that your inner loss returned, or grads=None."
            raise ValueError(validate.message(wanted, "None", fix))
    if model_state is None:
        model_state = state.model_state
    else:
        check_model_state(problem, model_state)
        validate.same_structure("model_state", model_state, "the state's", state.model_state)
        model_state = tree.match_dtypes(model_state, state.model_state)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl=setup.key_impl), state.step)
    number = state.step + 1
    return _Call(number, key, grads, state, variables, inner_batch, outer_batch, model_state, extra)


def _plain_steps(setup: _Setup, call: _Call) -> tuple[Rollout, Params, _Outer]:
    """Take the inner steps, then estimate at the weights that they reached."""
    params, hyperparams = call.variables
    optimizer = resolve_optimizer(setup.inner_optimizer, None)
    batch = call.batches if setup.window == 1 else data.take(call.batches, -1)
    if setup.window == 1:
        grads, model_state = call.grads, call.model_state
        if grads is None:
            gradient, key = inner_gradient(setup.estimator.problem, hyperparams), split_keys(call.key).inner
            grads, model_state = gradient(params, batch, step_key(key, 0), model_state)
        updates, inner_state = optimizer.update(grads, call.state.inner, params, **call.extra)
        reached = Rollout(optax.apply_updates(params, updates), inner_state, model_state)
    else:
        reached, updates = _window(setup, call, resolve_optimizer(with_keywords(optimizer, call.extra), None))

    def estimate(before: _Outer) -> _Outer:
        at = BilevelParams(reached.params, hyperparams), reached.inner_state, before.estimator
        batches = batch, call.outer_batch
        result = setup.estimator.estimate(*at, *batches, key=call.key, model_state=reached.model_state)
        return _outer_step(setup, call, before, result)

    return reached, updates, _once_if(_is_due(setup, call), estimate, _no_outer_step(call))


def _differentiated_steps(setup: _Setup, call: _Call) -> tuple[Rollout, Params, _Outer]:
    """Let the estimator take the inner steps, or take them without it where no outer step is due."""
    hyperparams, due = call.variables.hyperparams, _is_due(setup, call)
    one = setup.window == 1
    batches = data.one_step(call.batches) if one else data.of_length(call.batches, setup.window)
    call = call._replace(batches=batches)
    inner_optimizer = with_keywords(setup.inner_optimizer, call.extra)

    def estimate() -> tuple[Rollout, Params, _Outer]:
        at = call.variables, call.state.inner, call.state.estimator
        options = {"inner_optimizer": inner_optimizer, "model_state": call.model_state}
        result = setup.estimator.estimate(*at, call.batches, call.outer_batch, key=call.key, **options)
        reached = Rollout(result.params, result.inner_state, result.model_state)
        updates = jax.tree.map(jnp.subtract, result.params, call.variables.params)
        return reached, updates, _outer_step(setup, call, _no_outer_step(call), result)

    def steps() -> tuple[Rollout, Params, _Outer]:
        optimizer = resolve_optimizer(inner_optimizer, setup.estimator.problem.constrain(hyperparams))
        return *_window(setup, call, optimizer), _no_outer_step(call)

    return estimate() if due is True else lax.cond(due, estimate, steps)


def _window(setup: _Setup, call: _Call, optimizer: Any) -> tuple[Rollout, Params]:
    start = Rollout(call.variables.params, call.state.inner, call.model_state)
    gradient, key = inner_gradient(setup.estimator.problem, call.variables.hyperparams), split_keys(call.key).inner
    window = make_window(data.of_length(call.batches, setup.window), key)
    reached = rollout(gradient, optimizer, start, window, unroll=setup.estimator.unroll)
    return reached, jax.tree.map(jnp.subtract, reached.params, start.params)


def _outer_step(setup: _Setup, call: _Call, before: _Outer, result: Estimate) -> _Outer:
    hyperparams = call.variables.hyperparams

    def take(start: tuple[Hyperparams, PyTree]) -> tuple[Hyperparams, PyTree]:
        updates, state = setup.outer_tx.update(result.hypergrad, start[1], hyperparams, value=result.value)
        return tree.match_dtypes(updates, hyperparams), state

    updates, state = _once_if(~result.info.skipped, take, (before.updates, before.state))
    info = HypergradInfo(*result.info[: len(HypergradInfo._fields)])._replace(step=call.number)
    validate.same_structure("the estimator's info", info, "its blank info (solver_info)", before.info)
    return _Outer(updates, state, result.estimator_state, tree.match_dtypes(info, before.info))


def _no_outer_step(call: _Call) -> _Outer:
    zeros = tree.strip_weak_types(optax.tree.zeros_like(call.variables.hyperparams))
    return _Outer(zeros, call.state.outer, call.state.estimator, call.state.info)


def _is_due(setup: _Setup, call: _Call) -> Any:
    """Return whether an outer step is due: True where it always is, else a traced scalar bool."""
    if not callable(setup.every):
        return True if setup.every == 1 else call.number % setup.every == 0
    due = jnp.asarray(setup.every(call.number))
    if due.shape != () or due.dtype != jnp.bool_:
        fix = "Return a scalar bool, e.g. (n > 1000) & (n % 10 == 0)."
        raise TypeError(validate.message("every(n) to return a scalar bool", validate.describe(due), fix))
    return due


def _once_if(due: Any, step: Callable[[Any], Any], start: Any) -> Any:
    """Return ``step(start)`` where ``due``, else ``start``.

    A loop of at most one round where ``lax.cond`` would do: XLA updates what a loop carries in place, and copies
    what a branch passes through, so that a call on which nothing is due would pay for the optimizer's state.
    """
    if due is True:
        return step(start)
    return lax.while_loop(lambda c: c[0], lambda c: (jnp.array(False), step(c[1])), (due, start))[1]
