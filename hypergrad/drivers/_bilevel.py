"""``bilevel``: weights and hyperparameters behind one optax transformation.

    each call:       w ← inner optimizer (∇_w L_in), K steps          K = window
    every so often:  λ ← outer optimizer (dL_out/dλ at the new weights and the old λ)

Use it in place of the optimizer of a training loop. The hypergradient and the outer step run only where they are
due: on other calls the cost is that of a plain step.

Reference: the alternation of Luketina et al., arXiv 1511.06727, and Lorraine, Vicol & Duvenaud, arXiv 1911.02590.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import lax

from hypergrad import data, tree, validate
from hypergrad.drivers import _guard, _phases
from hypergrad.drivers._guard import Guard, HypergradInfo, SkipReason
from hypergrad.estimators import Estimator
from hypergrad.problem import BilevelParams, BilevelProblem, check_model_state, check_variables
from hypergrad.training import INIT, Context, Trained, resolve_optimizer, split_keys, update_with, with_keywords
from hypergrad.types import Array, Batch, Hyperparams, Key, ModelState, Params, PyTree

__all__ = ["BilevelState", "BilevelTransformation", "bilevel", "check_bilevel"]


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


class BilevelInit(Protocol):
    """``init(variables, *, inner_state=None, model_state=None) -> BilevelState``."""

    def __call__(
        self, params: BilevelParams, *, inner_state: PyTree = None, model_state: ModelState = None
    ) -> BilevelState:
        """Return the first state; ``inner_state`` adopts that of a running inner optimizer."""
        ...


class BilevelUpdate(Protocol):
    """``update(grads, state, variables, *, inner_batch, outer_batch, …) -> (updates, state)``."""

    def __call__(
        self,
        updates: Any,
        state: BilevelState,
        params: BilevelParams | None = None,
        *,
        inner_batch: Batch = None,
        outer_batch: Batch = None,
        solve_batch: Batch = None,
        model_state: ModelState = None,
        **extra_args: Any,
    ) -> tuple[BilevelParams, BilevelState]:
        """Take one call's inner steps, and the outer step where one is due."""
        ...


class BilevelTransformation(optax.GradientTransformationExtraArgs):  # type: ignore[misc]
    """The optax transformation that ``bilevel`` returns, with the types of its state.

    Attributes:
      init: ``init(variables, *, inner_state=None, model_state=None) -> BilevelState``.
      update: ``update(grads, state, variables, *, inner_batch, outer_batch, solve_batch=None, model_state=None,
        **extra) -> (updates, state)``.
      estimator: as it was given.
      window: inner steps per call.
    """

    init: BilevelInit  # pyright: ignore
    update: BilevelUpdate  # pyright: ignore
    estimator: Estimator
    window: int


def bilevel(
    estimator: Estimator,
    *,
    inner_optimizer: Any,
    outer_optimizer: optax.GradientTransformation,
    window: int | None = None,
    every: int | Callable[[Array], Array] = 1,
    guard: Guard | None = _guard.guard(),  # noqa: B008
    key: Key = 0,
    model_state: ModelState = None,
) -> BilevelTransformation:
    """Optimize weights by the inner loss and hyperparameters by hypergradients, as one optax transformation.

    ``update(grads, state, variables, *, inner_batch, outer_batch, solve_batch=None, model_state=None, **extra)`` takes
    and returns a ``BilevelParams``. With ``window=1``, ``grads`` is the gradient of the inner loss: a tree like the
    weights, a ``BilevelParams`` whose hyperparameter part is ignored, or None to have it computed from ``inner_batch``.
    With ``window=K > 1`` leaves of ``inner_batch`` have a leading axis K, ``grads`` is None, and one call is K inner
    steps.
    Other keywords reach the inner optimizer if it takes any; ``value=`` also tells the guard the inner loss of given
    ``grads``. ``outer_batch`` may be None on calls where no outer step is due, if ``every`` is an int. ``solve_batch``
    is the batch of ``implicit``'s linear solve and mixed product in place of the inner batch, larger for instance, or
    ``hg.FreshBatches``; it is read where an outer step is due, and costs nothing elsewhere.

    ``init(variables, *, inner_state=None, model_state=None)``: ``inner_state`` adopts the state of an inner optimizer
    that has run; ``model_state`` takes the place of the one given here.

    Args:
      estimator: e.g. ``hg.implicit(problem, hg.solvers.neumann(20))``.
      inner_optimizer: an optax transformation for the weights, or a function of the constrained hyperparameters that
        returns one.
      outer_optimizer: an optax transformation for the hyperparameters. Its updates get the outer loss as ``value``, if
        it takes keywords.
      window: K ≥ 1, inner steps per call; None: 1. Estimators that differentiate the inner steps need it given.
      every: an outer step is due on calls ``every``, 2·``every``, …; or a function from the call's number
        (int32, from 1) to a scalar bool, e.g. ``lambda n: (n > 1000) & (n % 10 == 0)`` for a warm-up.
      guard: when to skip an outer step: ``hg.guard(max_residual=3.0)``. None takes every step. With a guard the update
        of the outer optimizer is computed twice: to check it, and to apply it. This saves three copies of the
        hyperparameters.
      key: an int or a ``jax.random.key``; all randomness of the run derives from it.
      model_state: initial model state of a stateful problem, here or at ``init``.

    Returns:
      A ``BilevelTransformation``: an ``optax.GradientTransformationExtraArgs`` over ``BilevelParams`` with state
      ``BilevelState``.

    Raises:
      TypeError: an argument of the wrong kind; at ``init``, something that is not a ``BilevelParams``.
      ValueError: ``window`` or ``every`` < 1, or no ``window`` for an estimator that needs one; at ``update``, a
        missing batch, a wrong window axis or structure, a state of another transformation.

    Warns ``hg.OverfittingWarning`` where there is no prior and there are more than ten hyperparameters per example of
    the outer batch, or more than one where the batch is an ``hg.IndexedBatch``, which knows the size of its data.

    Valid under the estimator's assumption at the weights reached: for ``implicit`` they must be near the inner optimum
    when an outer step is taken, so let ``every`` leave time for training in between. Inner steps are not guarded by
    default: put ``optax.apply_if_finite`` around the inner optimizer, or pass ``guard=hg.guard(inner=True)``. Weights
    that are not finite stay so, and then every outer step is skipped.

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
    _phases.check_estimator(estimator, guard)
    problem = estimator.problem
    if not callable(inner_optimizer):
        validate.transformation("inner_optimizer", inner_optimizer)
    outer_tx = validate.transformation("outer_optimizer", outer_optimizer)
    if window is None and estimator.train is not None:
        fix = "Write window=K, the number of inner steps to differentiate per call, and give batches a leading axis K."
        raise ValueError(validate.message("window for an estimator that differentiates the inner steps", "None", fix))
    window = 1 if window is None else validate.positive_int("window", window)
    if not callable(every):
        every = validate.positive_int("every", every)
    if model_state is not None:
        check_model_state(problem, model_state)
    given_model_state = model_state
    root = validate.required_key(key)
    setup = _Setup(estimator, inner_optimizer, outer_tx, window, every, guard, jax.random.key_impl(root))

    def init(params: BilevelParams, *, inner_state: PyTree = None, model_state: ModelState = None) -> BilevelState:
        variables = check_variables(params)
        first_model_state = check_model_state(problem, given_model_state if model_state is None else model_state)
        if given_model_state is not None:
            validate.same_structure("model_state", first_model_state, "bilevel's", given_model_state)
        inner_tx = resolve_optimizer(inner_optimizer, problem.constrain(variables.hyperparams))
        made = inner_tx.init(variables.params)
        if inner_state is not None:
            validate.same_structure("inner_state", inner_state, "inner_optimizer.init(params)", made, dtypes=True)
            made = jax.tree.map(jnp.copy, inner_state)
        start = Trained(variables.params, made, first_model_state)
        keys = split_keys(_fold_in(root, INIT))
        guarded = guard is not None and guard.inner
        ctx = Context(problem, variables.hyperparams, start, start, None, None, keys, inner_optimizer, guarded=guarded)
        estimator_state, blank = _phases.first_state(estimator, ctx)
        zero, none = jnp.zeros((), float), jnp.zeros((), jnp.int32)
        state = BilevelState(
            step=none,
            inner=made,
            outer=outer_tx.init(variables.hyperparams),
            estimator=estimator_state,
            # Copies of what this closure keeps: a donated state must not take it along.
            key=jnp.copy(jax.random.key_data(root)),
            model_state=jax.tree.map(jnp.copy, first_model_state),
            info=HypergradInfo(none - 1, zero, zero, zero, none, none, blank),
        )
        return tree.beside(tree.unalias(tree.strip_weak_types(state), variables), variables)

    def update(
        updates: Any,
        state: BilevelState,
        params: BilevelParams | None = None,
        *,
        inner_batch: Batch = None,
        outer_batch: Batch = None,
        solve_batch: Batch = None,
        model_state: ModelState = None,
        **extra: Any,
    ) -> tuple[BilevelParams, BilevelState]:
        if params is None:
            fix = "Call tx.update(grads, state, variables, inner_batch=..., outer_batch=...)."
            raise ValueError(validate.message("params, the current BilevelParams, as third argument", "None", fix))
        check_variables(params)
        if not isinstance(state, BilevelState):
            raise TypeError(validate.message("a BilevelState", validate.describe(state), _STATE_FIX))
        known = lambda x: x if tree.is_traced(x) else bool(x)  # noqa: E731
        extra = {name: value for name, value in extra.items() if value is not None}
        due, missing = map(known, _is_due(setup, _next(state.step), outer_batch))
        args = due, missing, updates, state, params, inner_batch, outer_batch, solve_batch, model_state, extra
        # Called eagerly, it compiles itself: one program where an outer step is due, and one where none is.
        return (step if any(map(tree.is_traced, jax.tree.leaves(args))) else compiled_step)(*args)

    def step(
        due: Any,
        missing: Any,
        updates: Any,
        state: BilevelState,
        variables: BilevelParams,
        inner_batch: Batch,
        outer_batch: Batch,
        solve_batch: Batch,
        model_state: ModelState,
        extra: dict[str, Any],
    ) -> tuple[BilevelParams, BilevelState]:
        state = _checked_state(state, init, variables, given_model_state)
        grads = _given_gradients(setup, updates, state, variables, model_state)
        ctx = _context(setup, state, variables, inner_batch, outer_batch, grads, model_state, extra)
        ctx = ctx._replace(due=due, solve_batch=solve_batch)
        advanced, ctx, moved, lost = _phases.train_and_advance(estimator, guard, state.estimator, ctx, grads)

        def outer_step(before: _Outer) -> _Outer:
            return _outer_step(setup, ctx, before, state.step + 1, lost)

        zeros = tree.strip_weak_types(optax.tree.zeros_like(variables.hyperparams))
        after = _once_if(due, outer_step, _Outer(zeros, state.outer, advanced, state.info))
        info = after.info
        if missing is not False:
            reason, skipped = jnp.array(SkipReason.NO_OUTER_BATCH, jnp.int32), info.num_skipped + 1
            lacking = info._replace(step=state.step + 1, skip_reason=reason, num_skipped=skipped)
            info = optax.tree.where(missing, lacking, info)
        if moved is None:
            moved = jax.tree.map(
                lambda new, old: tree.promote(new) - tree.promote(old), ctx.at.params, variables.params
            )
        new_state = BilevelState(
            state.step + 1, ctx.at.inner_state, after.state, after.estimator, state.key, ctx.at.model_state, info
        )
        return BilevelParams(moved, after.updates), new_state

    compiled_step = _phases.compile_once(step)
    pure_functions: tuple[Any, Any] = init, update
    tx = BilevelTransformation(*pure_functions)
    tx.estimator, tx.window = estimator, window
    return tx


def check_bilevel(tx: Any) -> BilevelTransformation:
    """Return ``tx`` if it is from ``bilevel``: another transformation's ``init`` takes no model state."""
    if not isinstance(tx, BilevelTransformation):
        raise TypeError(validate.message("tx from hg.bilevel", validate.describe(tx), "Pass tx=hg.bilevel(...)."))
    return tx


# Compiled, so that their constants are no transfers, which jax.transfer_guard may forbid.
_next = jax.jit(lambda step: step + 1)
_is_multiple = jax.jit(lambda number, of: number % of == 0, static_argnums=1)
_fold_in = jax.jit(jax.random.fold_in, static_argnums=1)


class _Setup(NamedTuple):
    """What ``bilevel`` was built with."""

    estimator: Estimator
    inner_optimizer: Any
    outer_tx: optax.GradientTransformationExtraArgs
    window: int
    every: int | Callable[[Array], Array]
    guard: Guard | None
    key_impl: Any


class _Outer(NamedTuple):
    """What an outer step changes."""

    updates: Hyperparams
    state: PyTree
    estimator: PyTree
    info: HypergradInfo


def _outer_step(setup: _Setup, ctx: Context, before: _Outer, number: Array, lost: Array) -> _Outer:
    hyperparams, guard = ctx.hyperparams, setup.guard
    result = _phases.estimate(setup.estimator, before.estimator, ctx)

    def step(before: PyTree) -> tuple[Hyperparams, PyTree]:
        given = setup.outer_tx, result.hypergrad, before, hyperparams
        updates, state = update_with("outer_optimizer", *given, value=result.value)
        return tree.match_dtypes(updates, hyperparams), tree.match_dtypes(state, before)

    updates, state = step(before.state)
    info = _guard.settle(
        guard,
        result,
        before.estimator,
        ctx.at.inner_loss,
        lost=lost,
        number=number,
        num_skipped=before.info.num_skipped,
        changes=(
            (SkipReason.HYPERPARAMS, optax.apply_updates(hyperparams, updates), hyperparams),
            (SkipReason.OUTER_STATE, state, before.state),
        ),
    )
    if guard is not None:
        # The step above is only looked at, and taken again here: its results beside the old values are three copies.
        nothing = lambda state: (optax.tree.zeros_like(updates), state)  # noqa: E731
        updates, state = jax.lax.cond(info.skipped, nothing, step, before.state)
    validate.same_structure("the estimator's info", result.info, "the blank info of its init", before.info.method)
    kept, info = info.state, info._replace(state=(), aux=())
    return _Outer(updates, state, kept, tree.match_dtypes(info, before.info))


def _context(
    setup: _Setup,
    state: BilevelState,
    variables: BilevelParams,
    inner_batch: Batch,
    outer_batch: Batch,
    grads: tuple[Params, ModelState] | None,
    model_state: ModelState,
    extra: dict[str, Any],
) -> Context:
    problem, guard = setup.estimator.problem, setup.guard
    if inner_batch is None:
        fix = "Pass inner_batch=... on every call; () for a loss without data."
        raise ValueError(validate.message("inner_batch for update", "None", fix))
    if setup.window == 1:
        batches = data.one_step(inner_batch)
    else:
        if jax.tree.leaves(inner_batch):
            data.window_length(inner_batch, setup.window)
        batches = data.of_length(inner_batch, setup.window)
    if grads is not None or model_state is None:
        model_state = state.model_state
    else:
        model_state = _same_model_state(problem, model_state, state)
    if jnp.shape(extra.get("value", 0.0)) != ():
        got = f"one of shape {jnp.shape(extra['value'])}"
        raise ValueError(validate.message("value, the inner loss, to be one number", got, "Pass value=jnp.mean(...)."))
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl=setup.key_impl), state.step)
    start = Trained(variables.params, state.inner, model_state, extra.get("value", math.nan))
    inner_optimizer = with_keywords(setup.inner_optimizer, extra)
    ends = start, start, batches, outer_batch, split_keys(key), inner_optimizer
    return Context(problem, variables.hyperparams, *ends, guarded=guard is not None and guard.inner)


def _same_model_state(problem: BilevelProblem, model_state: ModelState, state: BilevelState) -> ModelState:
    check_model_state(problem, model_state)
    validate.same_structure("model_state", model_state, "the state's", state.model_state)
    return tree.match_dtypes(model_state, state.model_state)


def _given_gradients(
    setup: _Setup, grads: Any, state: BilevelState, variables: BilevelParams, model_state: ModelState
) -> tuple[Params, ModelState] | None:
    """Return the gradients that the user handed in, and the model state after their step."""
    if grads is None:
        return None
    problem, trains = setup.estimator.problem, setup.estimator.train is not None
    if setup.window > 1 or trains:
        wanted = f"grads=None with window={setup.window}" + (" and an estimator that takes the steps" if trains else "")
        fix = "Pass None: gradients are computed from inner_batch."
        raise ValueError(validate.message(wanted, type(grads).__name__, fix))
    grads = grads.params if isinstance(grads, BilevelParams) else grads
    validate.same_structure("grads", grads, "the weights (or of the BilevelParams)", variables.params)
    if problem.stateful and model_state is None:
        fix = "Pass the model_state that your inner loss returned, or grads=None."
        raise ValueError(validate.message("model_state with the grads of a stateful problem", "None", fix))
    return grads, state.model_state if model_state is None else _same_model_state(problem, model_state, state)


_STATE_FIX = "Pass the state from tx.init(variables) or the last update, of a bilevel(...) with the same arguments."


def _checked_state(
    state: BilevelState, init: BilevelInit, variables: BilevelParams, model_state: ModelState
) -> BilevelState:
    """Refuse a state that ``init`` would not make: of other optimizers, another solver, weights of another form.

    On a mesh of explicit axes, a state that was restored elsewhere moves to where ``init`` puts it. The inner
    optimizer's stays: it may be split over devices on purpose.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # init has warned already
        own = state.model_state if model_state is None else model_state  # that of init, where it was given there
        like = jax.eval_shape(init, variables, model_state=own)
    validate.same_structure("state", state, "what init makes of these variables", like, dtypes=True, fix=_STATE_FIX)
    return tree.placed_like(state, like)._replace(inner=state.inner)


def _is_due(setup: _Setup, number: Array, outer_batch: Batch) -> tuple[Any, Any]:
    """Return whether an outer step is due, and whether it is but cannot be taken for want of a batch."""
    fix = "Pass outer_batch=... where an outer step is due; () for a loss without data."
    if callable(setup.every):
        due: Any = jnp.asarray(setup.every(number))
        if due.shape != () or due.dtype != jnp.bool_:
            fix = "Return a scalar bool, e.g. (n > 1000) & (n % 10 == 0)."
            raise TypeError(validate.message("every(n) to return a scalar bool", validate.describe(due), fix))
    else:
        due = True if setup.every == 1 else _is_multiple(number, setup.every)
    if outer_batch is not None:
        return due, False
    if due is True or callable(setup.every) or (not tree.is_traced(due) and bool(due)):
        wanted = "outer_batch" + (" on every call, where every is a function" if callable(setup.every) else "")
        raise ValueError(validate.message(wanted, "None", fix))
    return False, due


def _once_if(due: Any, step: Callable[[Any], Any], start: Any) -> Any:
    """Return ``step(start)`` where ``due``, else ``start``.

    A loop of at most one round in place of ``lax.cond``: XLA updates what a loop carries in place, and copies what a
    branch passes through, so that a call on which nothing is due would pay for the optimizer's state.
    """
    if due is True:
        return step(start)
    if due is False:
        return start
    return lax.while_loop(lambda c: c[0], lambda c: (jnp.array(False), step(c[1])), (due, start))[1]
