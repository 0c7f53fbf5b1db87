"""Inner training: K optax steps on the inner loss, and what one call of an estimator knows.

    w_{i+1}, s_{i+1} = optimizer(∇_w L_in(w_i, λ, batch_i, key_i), s_i, w_i)     i = 0 … K−1, key_i = fold_in(inner, i)

``train`` is the only training loop: drivers, estimators, diagnostics and learned second copies of the weights all call
it, so that they see the same batches and the same random numbers. It takes the steps in one ``lax.scan``.

Differentiated in reverse, a window needs what each step saw. With a checkpoint every c steps the scan keeps weights
and optimizer state K/c times, and those of the c steps that it computes again c times: 2√K at c = √K. A step that is
computed again takes its inner gradient from memory, so that only the optimizer's arithmetic is repeated.

Reference: Griewank, Achieving logarithmic growth of temporal and spatial complexity in reverse automatic
differentiation, Optimization Methods and Software 1992.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from hypergrad import curvature, data, tree, validate
from hypergrad.problem import BilevelParams, BilevelProblem, evaluate_inner, evaluate_outer, evaluate_residual
from hypergrad.types import Array, Batch, Hyperparams, ModelState, Params, PyTree

__all__ = [
    "INIT",
    "Context",
    "Keys",
    "Trained",
    "accepted_keywords",
    "depends_on_hyperparams",
    "inner_loss_fn",
    "is_known",
    "outer_loss_fn",
    "residual_fn",
    "solve_batch_at",
    "resolve_optimizer",
    "split_keys",
    "train",
    "train_with_updates",
    "update_with",
    "with_keywords",
]

INIT = 2**32 - 1
"""The number of ``init`` where calls are numbered 0, 1, …: its key is ``fold_in(root, INIT)``."""

_INNER_GRADIENT = "inner_gradient"


class Trained(NamedTuple):
    """Where inner training stands.

    Attributes:
      params: tree like the weights.
      inner_state: state of the inner optimizer; None for a fresh one, which ``train`` makes.
      model_state: of a stateful problem; () otherwise.
      inner_loss: scalar, the inner loss of the last step, before it; NaN where it is unknown.
    """

    params: Params
    inner_state: PyTree
    model_state: ModelState = ()
    inner_loss: Any = math.nan


class Keys(NamedTuple):
    """The random keys of one call, ``jax.random.split(call key, 5)``; each None where the call has no key.

    Attributes:
      inner: of the inner steps; step i uses ``fold_in(inner, i)``.
      outer: of the outer loss at the end of the call.
      solve: of every product of the call's linear solve.
      advance: of the estimator's own random numbers in ``train`` and ``advance``.
      estimate: of the estimator's own random numbers in ``estimate``.
    """

    inner: Array | None
    outer: Array | None
    solve: Array | None
    advance: Array | None
    estimate: Array | None


class Context(NamedTuple):
    """What one call knows. Close over it; never pass it through a transformation such as ``jax.jit``.

    Attributes:
      problem: the ``BilevelProblem``.
      hyperparams: unconstrained hyperparameters λ of this call.
      start: ``Trained`` before the call's inner steps.
      at: ``Trained`` after them; equal to ``start`` in an estimator's ``init`` and ``train``.
      inner_batches: batches of the inner steps, leaves with leading axis K; None in ``init``.
      outer_batch: batch of the outer loss; None in ``init`` and where the user gave none.
      keys: ``Keys`` of the call.
      inner_optimizer: an optax transformation, or a function from the constrained hyperparameters to one; None in a
        functional call that takes no steps.
      due: True, False or a traced bool: whether ``estimate`` follows in this call.
      tape: what the estimator's ``train`` handed on to ``estimate``; () without.
      guarded: whether inner steps that are not finite are dropped (``hg.guard(inner=True)``).
      solve_batch: batch of the linear solve, or ``hg.FreshBatches``; None: the last of ``inner_batches``.
      tolerance: absolute tolerance of the linear solve, on ‖Hq − ∂L_out/∂w‖; None: the solver's own, which is relative.
    """

    problem: BilevelProblem
    hyperparams: Hyperparams
    start: Trained
    at: Trained
    inner_batches: Batch
    outer_batch: Batch
    keys: Keys
    inner_optimizer: Any
    due: Any = True
    tape: Any = ()
    guarded: bool = False
    solve_batch: Batch = None
    tolerance: Any = None


InnerLoss = Callable[[Params, Hyperparams, Batch, Array | None, ModelState], tuple[Array, ModelState]]


def train(
    ctx: Context,
    *,
    start: Trained | None = None,
    hyperparams: Hyperparams = None,
    loss: InnerLoss | None = None,
    steps: slice | None = None,
    first_step: Any = 0,
    mixed: bool = False,
    checkpoint_every: float = math.inf,
    unroll: int | bool = 1,
) -> Trained:
    """Take the call's K inner steps.

    w_{i+1}, s_{i+1} = optimizer(∇_w loss(w_i, λ, batch_i, fold_in(keys.inner, i)), s_i, w_i).

    Args:
      ctx: of the call.
      start: where to begin; None: ``ctx.start``. An ``inner_state`` of None is a fresh one, made here from λ.
      hyperparams: λ; None: ``ctx.hyperparams``.
      loss: ``loss(params, hyperparams, batch, key, model_state) -> (value, model_state)`` in place of the inner loss.
      steps: which of the K steps to take, with their own keys; None: all.
      first_step: number of the first of the K steps, where they are a part of a longer run: step i uses
        ``fold_in(keys.inner, first_step + i)``.
      mixed: give the gradient of a step the reverse-mode rule of ``curvature.mixed_mode_gradient``.
      checkpoint_every: steps between checkpoints in reverse mode; infinite for none.
      unroll: of the innermost scan.

    Returns:
      A ``Trained``: weights, optimizer state and model state after the steps, and the last step's loss. Where
      ``ctx.guarded``, steps with a loss, gradient or model state that is not finite are left out.

    Raises:
      ValueError: ``ctx`` has no inner optimizer: a functional call without one takes no steps.
      TypeError: the optimizer wants a keyword that a step does not have.

    >>> import hypergrad as hg, jax.numpy as jnp, optax
    >>> problem = hg.BilevelProblem(lambda w, h, b, k: 0.5 * ((w - h) ** 2).sum(), lambda w, h, b, k: w.sum())
    >>> start = hg.Trained(jnp.zeros(1), None)
    >>> batches = hg.IndexedBatch((), jnp.arange(2))                             # two steps of a loss without data
    >>> ctx = hg.Context(problem, jnp.ones(1), start, start, batches, (), split_keys(None), optax.sgd(0.5))
    >>> train(ctx).params.tolist()
    [0.75]
    """
    options: dict[str, Any] = {"mixed": mixed, "checkpoint_every": checkpoint_every, "unroll": unroll}
    return train_with_updates(ctx, start, hyperparams, loss, steps=steps, first_step=first_step, **options)[0]


def train_with_updates(
    ctx: Context,
    start: Trained | None = None,
    hyperparams: Hyperparams = None,
    loss: InnerLoss | None = None,
    *,
    grads: tuple[Params, ModelState] | None = None,
    steps: slice | None = None,
    first_step: Any = 0,
    mixed: bool = False,
    checkpoint_every: float = math.inf,
    unroll: int | bool = 1,
) -> tuple[Trained, Params]:
    """Return what ``train`` returns, and the sum of the updates: of one step as the optimizer gave it, else w_K − w_0.

    Differences are taken in at least float32. ``grads`` are the gradients of a single step, handed in by the
    user, and the model state after it.
    """
    start = ctx.start if start is None else start
    if not isinstance(start, Trained):
        fix = "Pass hg.Trained(params, inner_state), e.g. the copy of ctx.start that init kept."
        raise TypeError(validate.message("start to be a Trained", validate.describe(start), fix))
    hyperparams = ctx.hyperparams if hyperparams is None else hyperparams
    if ctx.inner_optimizer is None:
        fix = "Pass inner_optimizer=optax.sgd(...), and batches with a leading window axis."
        raise ValueError(validate.message("an inner_optimizer, to take inner steps", "None", fix))
    optimizer = resolve_optimizer(ctx.inner_optimizer, ctx.problem.constrain(hyperparams))
    if start.inner_state is None:
        start = start._replace(inner_state=optimizer.init(start.params))
    if loss is None:
        loss = _inner_loss(ctx)
    elif isinstance(optimizer, _WithKeywords):
        optimizer = optimizer.on_another_loss

    def objective(
        params: Params, hyperparams: Hyperparams, model_state: ModelState, drawn: tuple[Batch, Array | None]
    ) -> tuple[Array, tuple[Array, ModelState]]:
        value, model_state = loss(params, hyperparams, *drawn, model_state)
        return value, (lax.stop_gradient(value), model_state)

    gradient = curvature.mixed_mode_gradient(objective) if mixed else jax.grad(objective, has_aux=True)

    def step(at: Trained, indexed: tuple[Array, Batch]) -> tuple[Trained, Array, Params]:
        index, part = indexed
        batch = data.gathered(data.with_windowed(ctx.inner_batches, part))
        drawn = batch, None if ctx.keys.inner is None else jax.random.fold_in(ctx.keys.inner, index)
        if grads is None:
            slope, (value, model_state) = gradient(at.params, hyperparams, at.model_state, drawn)
            line = lambda w: objective(w, hyperparams, at.model_state, drawn)[0]  # noqa: E731
            keywords = accepted_keywords(optimizer, {"value": value, "grad": slope, "value_fn": line})
        else:
            (slope, model_state), value, keywords = grads, at.inner_loss, {}
            if not is_known(value) and tree.refuses_nan():
                value = objective(at.params, hyperparams, at.model_state, drawn)[0]
        slope = checkpoint_name(slope, _INNER_GRADIENT)
        updates, inner_state = update_with("inner_optimizer", optimizer, slope, at.inner_state, at.params, **keywords)
        inner_state = tree.match_dtypes(inner_state, at.inner_state)  # a float32 momentum widens bfloat16 traces
        new = Trained(optax.apply_updates(at.params, updates), inner_state, model_state)
        if ctx.guarded:
            finite = tree.all_finite((slope, model_state)) & (jnp.isfinite(value) if is_known(value) else True)
            new = optax.tree.where(finite, new, at._replace(inner_loss=new.inner_loss))
            updates = jax.tree.map(lambda u: jnp.where(finite, u, jnp.zeros_like(u)), updates)
        return new, value, updates

    chosen = slice(None) if steps is None else steps
    length = data.window_length(ctx.inner_batches)
    indexed = (
        first_step + jnp.arange(length, dtype=jnp.int32)[chosen],
        jax.tree.map(lambda x: x[chosen], data.windowed(ctx.inner_batches)),
    )
    length = len(indexed[0])
    if length == 1:  # nothing to scan over, and a loop around a convolution is slow on CPU
        at, value, updates = step(start, jax.tree.map(lambda x: x[0], indexed))
        return at._replace(inner_loss=value), updates
    begin = start._replace(inner_loss=())
    at, values = _scan(
        lambda at, x: step(at._replace(inner_loss=math.nan), x), begin, indexed, length, checkpoint_every, unroll
    )
    updates = jax.tree.map(lambda new, old: tree.promote(new) - tree.promote(old), at.params, start.params)
    return at._replace(inner_loss=values[-1]), updates


def _scan(
    step: Callable[[Trained, Any], tuple[Trained, Array, Params]],
    start: Trained,
    indexed: Any,
    length: int,
    checkpoint_every: float,
    unroll: int | bool,
) -> tuple[Trained, Array]:
    """Scan ``step`` over the window, with checkpoints; return what it reached and the loss of every step."""

    def body(at: Trained, x: Any) -> tuple[Trained, Array]:
        new, value, _ = step(at, x)
        return new._replace(inner_loss=()), value

    if checkpoint_every != math.inf:
        # Without a loop around it, the compiler would find a step's second computation to be its first.
        keep, separate = jax.checkpoint_policies.save_only_these_names(_INNER_GRADIENT), unroll != 1
        body = jax.checkpoint(body, prevent_cse=separate, policy=keep)
    if checkpoint_every in (1, math.inf):
        return lax.scan(body, start, indexed, unroll=unroll)
    size = min(int(checkpoint_every), length)
    whole = length - length % size

    def segment(at: Trained, steps: Any) -> tuple[Trained, Array]:
        return lax.scan(body, at, steps, unroll=unroll)

    stacked = jax.tree.map(lambda x: x[:whole].reshape(whole // size, size, *x.shape[1:]), indexed)
    at, values = lax.scan(jax.checkpoint(segment, prevent_cse=False), start, stacked)
    values = values[-1]
    if whole < length:
        at, values = jax.checkpoint(segment)(at, jax.tree.map(lambda x: x[whole:], indexed))
    return at, values


def update_with(
    name: str,
    optimizer: optax.GradientTransformationExtraArgs,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    **keywords: Any,
) -> tuple[PyTree, PyTree]:
    """Return ``optimizer.update(...)``; refuse by name an optimizer of another interface."""
    try:
        return optimizer.update(grads, state, params, **keywords)
    except (TypeError, AttributeError) as error:
        if "required keyword" in str(error):
            fix = "Choose one without it (optax.lbfgs takes linesearch=None), or hand the keyword to update(...)."
        elif "no attribute fast" in str(error) or "attribute 'fast'" in str(error):
            fix = "optax.lookahead updates optax.LookaheadParams: pass its fast optimizer alone."
        else:
            raise
        got = f"one that raises {type(error).__name__}: {error}"
        raise TypeError(validate.message(f"{name} to update from gradients, state and params", got, fix)) from error


def accepted_keywords(optimizer: optax.GradientTransformationExtraArgs, keywords: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords that the optimizer's update takes: line searches read them, optax.contrib.sam takes none."""
    names = inspect.signature(optimizer.update).parameters
    if any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in names.values()):
        return keywords
    return {name: value for name, value in keywords.items() if name in names}


def is_known(loss: Any) -> bool:
    """Return whether a loss was computed or given: NaN as a Python number stands for an unknown one."""
    return not (isinstance(loss, float) and math.isnan(loss))


def _inner_loss(ctx: Context) -> InnerLoss:
    def loss(
        params: Params, hyperparams: Hyperparams, batch: Batch, key: Array | None, model_state: ModelState
    ) -> tuple[Array, ModelState]:
        result = evaluate_inner(ctx.problem, BilevelParams(params, hyperparams), batch, key, model_state)
        return result.value, result.model_state

    return loss


def inner_loss_fn(ctx: Context) -> Callable[[Params, Hyperparams], Array]:
    """Return (w, λ) ↦ L_in on the batch of the solve, with the key of all its products, ``keys.solve``.

    That batch is ``ctx.solve_batch`` where there is one, else the window's last inner batch.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> problem = hg.BilevelProblem(lambda w, h, b, k: b * w * h, lambda w, h, b, k: b * w)
    >>> at = hg.Trained(jnp.array(2.0), ())
    >>> batches, keys = jnp.array([1.0, 5.0]), split_keys(None)
    >>> ctx = hg.Context(problem, jnp.array(3.0), at, at, batches, jnp.array(4.0), keys, None)
    >>> float(inner_loss_fn(ctx)(ctx.at.params, ctx.hyperparams))
    30.0
    """
    batch = solve_batch_at(ctx, -1)

    def inner(params: Params, hyperparams: Hyperparams) -> Array:
        at = BilevelParams(params, hyperparams)
        return evaluate_inner(ctx.problem, at, batch, ctx.keys.solve, ctx.at.model_state).value

    return inner


def solve_batch_at(ctx: Context, place: Any) -> Batch:
    """Return the batch of the linear solve; of ``hg.FreshBatches`` the one at ``place``, modulo their number."""
    if ctx.solve_batch is None:
        return data.take(ctx.inner_batches, -1)
    if not isinstance(ctx.solve_batch, data.FreshBatches):
        return ctx.solve_batch
    return data.fresh_batch(ctx.solve_batch, place, data.take(ctx.inner_batches, -1))


def residual_fn(ctx: Context) -> Callable[[Params, Hyperparams], Params]:
    """Return (w, λ) ↦ r, the residual of ``hg.with_residual``, on the same batch and key as ``inner_loss_fn``."""
    batch = solve_batch_at(ctx, -1)

    def residual(params: Params, hyperparams: Hyperparams) -> Params:
        at = BilevelParams(params, hyperparams)
        return evaluate_residual(ctx.problem, at, batch, ctx.keys.solve, ctx.at.model_state)

    return residual


def outer_loss_fn(ctx: Context) -> Callable[[Params, Hyperparams], tuple[Array, Any]]:
    """Return (w, λ) ↦ (L_out, aux) on the outer batch, with ``keys.outer`` and the model state reached.

    Raises:
      ValueError: the call has no outer batch, as ``bilevel`` allows where no outer step is due.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> problem = hg.BilevelProblem(lambda w, h, b, k: b * w * h, lambda w, h, b, k: b * w)
    >>> at = hg.Trained(jnp.array(2.0), ())
    >>> batches, keys = jnp.array([1.0, 5.0]), split_keys(None)
    >>> ctx = hg.Context(problem, jnp.array(3.0), at, at, batches, jnp.array(4.0), keys, None)
    >>> float(outer_loss_fn(ctx)(ctx.at.params, ctx.hyperparams)[0])
    8.0
    """
    if ctx.outer_batch is None and ctx.due is not True:
        fix = "This method needs it on every call; pass () for a loss without data."
        raise ValueError(validate.message("outer_batch on a call where no outer step is due", "None", fix))

    def outer(params: Params, hyperparams: Hyperparams) -> tuple[Array, Any]:
        at = BilevelParams(params, hyperparams)
        result = evaluate_outer(ctx.problem, at, ctx.outer_batch, ctx.keys.outer, ctx.at.model_state)
        return result.value, result.aux

    return outer


def split_keys(key: Array | None) -> Keys:
    """Split a call's key into its five uses; None where there is none."""
    return Keys(*[None] * 5) if key is None else Keys(*jax.random.split(key, 5))


def resolve_optimizer(inner_optimizer: Any, constrained: Hyperparams) -> optax.GradientTransformationExtraArgs:
    """Return the inner optimizer, built from the constrained hyperparameters where it is a function of them."""
    if not depends_on_hyperparams(inner_optimizer):
        return validate.transformation("inner_optimizer", inner_optimizer)
    return validate.transformation("inner_optimizer(hyperparams)", inner_optimizer(constrained))


def depends_on_hyperparams(inner_optimizer: Any) -> bool:
    """Return whether the inner optimizer is given as a function of the hyperparameters."""
    return callable(inner_optimizer) and not isinstance(
        inner_optimizer, optax.GradientTransformation | optax.MultiSteps
    )


def with_keywords(inner_optimizer: Any, keywords: Mapping[str, Any]) -> Any:
    """Return the inner optimizer, or the function that gives it, with ``keywords`` handed to every update.

    They count before what a step computes itself, a ``value`` say; but not in training on another loss.
    """
    if not keywords:
        return inner_optimizer
    if depends_on_hyperparams(inner_optimizer):
        return lambda constrained: with_keywords(resolve_optimizer(inner_optimizer, constrained), keywords)
    optimizer = resolve_optimizer(inner_optimizer, None)

    def updating(merged: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[..., tuple[Params, PyTree]]:
        def update(
            updates: Params, state: PyTree, params: Params | None = None, **others: Any
        ) -> tuple[Params, PyTree]:
            return optimizer.update(updates, state, params, **accepted_keywords(optimizer, merged(others)))

        return update

    made = _WithKeywords(optimizer.init, updating(lambda others: {**others, **keywords}))
    on_another_loss = updating(lambda others: {**keywords, **others})
    made.on_another_loss = optax.GradientTransformationExtraArgs(optimizer.init, on_another_loss)
    return made


class _WithKeywords(optax.GradientTransformationExtraArgs):  # type: ignore[misc]
    """An optimizer with keywords of the user's, and the same one for training on another loss than the problem's."""

    on_another_loss: optax.GradientTransformationExtraArgs
