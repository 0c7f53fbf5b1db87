"""The retraining test: is what was learned in the hyperparameters, or in the weights that were trained with them?

    jointly trained:  score(w), w as they came out of joint training
    retrained:        score(w_T(λ)), trained from fresh weights for T steps at the learned λ, which stay fixed

Warm-started weights have been trained at every λ of the run and keep what they learned there: weights trained jointly
with a distilled set of three points can know ten classes, while retraining on the three points gives weights that know
few. Where the two scores differ, the jointly trained weights are good, and not the hyperparameters.

Reference: Vicol et al., On implicit bias in overparameterized bilevel optimization, arXiv 2212.14032.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad import data, tree, validate
from hypergrad.diagnostics._base import digits, readable, table
from hypergrad.problem import (
    BilevelParams,
    BilevelProblem,
    check_model_state,
    check_problem,
    check_variables,
    evaluate_inner,
    evaluate_outer,
)
from hypergrad.training import Context, Trained, split_keys, train
from hypergrad.types import Array, Batch, Hyperparams, Key, ModelState, Params, PyTree

__all__ = ["Retrained", "retrain"]


class Retrained(NamedTuple):
    """Scores of jointly trained and of retrained weights. ``str()`` of it is a table and what follows from it.

    Attributes:
      jointly_trained: tree of scalars, the score of the weights given.
      retrained: tree of arrays (num_starts,), the scores after training from fresh weights.
      baseline: the same at other hyperparameters, from the same fresh weights; () where none were given.
      params: tree like the weights, each leaf with a leading axis of the starts.
      finite: bool array (num_starts,), whether that start's weights stayed finite; the report leaves out the others.
      baseline_finite: the same at the baseline; of length 0 without one.
    """

    jointly_trained: PyTree
    retrained: PyTree
    baseline: PyTree
    params: Params
    finite: np.ndarray
    baseline_finite: np.ndarray

    def __str__(self) -> str:
        """Return a table of the scores of finite starts, and how far the given weights are from them."""
        finite, others = np.asarray(self.finite), np.asarray(self.baseline_finite)
        if not finite.any():
            return f"all {len(finite)} starts diverged at these hyperparameters: there is nothing to compare with"
        lines: list[tuple[str, ...]] = [("score", "jointly trained", "retrained", "spread", "baseline", "spread")]
        leaves = [jax.tree.leaves(scores) for scores in (self.jointly_trained, self.retrained, self.baseline)]
        names = [readable(name) or "score" for name in tree.leaf_names(self.jointly_trained)]
        nothing, verdicts = [np.full(len(others), math.nan)] * len(names), []
        for name, one, many, other in zip(names, *leaves[:2], leaves[2] or nothing, strict=True):
            columns = [(x.mean(), x.std()) if len(x) else (math.nan, math.nan) for x in (many[finite], other[others])]
            lines.append((name, *map(digits, (one, *columns[0], *columns[1]))))
            verdicts.append(_verdict(name, float(one), many[finite]))
        text = [table(lines), *verdicts]
        for what, which in (("starts", finite), ("starts of the baseline", others)):
            if not which.all():
                text.append(f"{int((~which).sum())} of the {what} diverged: their scores are left out")
        return "\n".join(text)


def _verdict(name: str, joint: float, retrained: np.ndarray) -> str:
    """Return what a score says, as Student's t of one more start: |t| > 3 in 1 of 10 tests of 3 starts by chance."""
    apart, count = joint - float(np.mean(retrained)), len(retrained)
    spread = float(np.std(retrained, ddof=1)) * math.sqrt(1 + 1 / count) if count > 1 else math.nan
    rounding = 1e-6 * max(abs(joint), abs(float(np.mean(retrained))))
    if abs(apart) <= rounding:
        return f"{name}: jointly trained and retrained weights are equal"
    text = f"{name}: jointly trained weights differ from {count} retrained by {digits(apart)}"
    if math.isnan(spread):
        return f"{text}; one start cannot tell whether that is chance"
    times = f"{digits(abs(apart) / spread)} times their spread" if spread > rounding else "they are all equal"
    if abs(apart) > 3 * spread:
        return f"{text} ({times}): the difference is in the weights, or in how long they trained, not in the values"
    return f"{text} ({times}), which may be chance"


def retrain(
    problem: BilevelProblem,
    variables: BilevelParams,
    init: Callable[[Array], Any],
    inner_batch: Batch | Callable[[Array, Array], Batch],
    outer_batch: Batch,
    *,
    inner_optimizer: Any,
    num_steps: int,
    key: Key,
    num_starts: int = 3,
    score: Callable[..., PyTree] | None = None,
    baseline: Hyperparams = None,
    model_state: ModelState = None,
) -> Retrained:
    """Score the jointly trained weights, and weights trained from scratch at the learned hyperparameters, held fixed.

    w₀ = init(key);  w_{t+1} = w_t + inner optimizer(∇_w L_in(w_t, λ)), T steps;  score(w_T) compared with score(w).

    Args:
      problem: what was optimized. Of one over a learned response the problem over plain weights is retrained, at the
        hyperparameters that the response is centred at.
      variables: the weights and hyperparameters that came out.
      init: ``init(key) -> params``, fresh weights as training began with; ``(params, model_state)`` where stateful.
      inner_batch: the batch of every step, or ``inner_batch(step, key) -> batch``, traced, for minibatches.
      outer_batch: what the score is taken on: validation data, or better a third split.
      inner_optimizer: an optax transformation; or a function of the constrained hyperparameters that returns one.
      num_steps: T ≥ 1, as many as the given weights were trained for.
      key: of the starts, batches and losses.
      num_starts: fresh starts, ≥ 1, trained at once under ``vmap``.
      score: ``score(params, outer_batch) -> scalar or tree of scalars`` (``score(params, outer_batch, model_state)``
        where stateful); None: the outer loss.
      baseline: other hyperparameters to train at, from the same fresh weights and batches: those before learning, or of
        another method. What retraining gains over them is in the values.
      model_state: of a stateful problem, with the given weights.

    Returns:
      A ``Retrained`` of NumPy numbers; ``print`` it.

    Raises:
      TypeError: no ``BilevelProblem`` or ``BilevelParams``; an ``init`` that is not callable.
      ValueError: ``num_steps`` or ``num_starts`` < 1; fresh weights of another structure than the given ones.

    Valid when training from scratch has what joint training had: steps, batches, optimizer.

    >>> import hypergrad as hg, jax, jax.numpy as jnp, optax
    >>> inner = lambda w, h, batch, key: jnp.sum((w - h) ** 2)                                  # w* = h
    >>> problem = hg.BilevelProblem(inner, lambda w, h, batch, key: jnp.sum(w**2))
    >>> learned = hg.BilevelParams(jnp.zeros(2), jnp.ones(2))               # weights that are better than their λ
    >>> found = hg.diagnostics.retrain(problem, learned, lambda key: jax.random.normal(key, (2,)), (), (),
    ...                                inner_optimizer=optax.sgd(0.5), num_steps=20, key=0)
    >>> float(found.jointly_trained), found.retrained.tolist()
    (0.0, [2.0, 2.0, 2.0])

    Reference: Vicol et al., arXiv 2212.14032.
    """
    check_problem(problem)
    params, hyperparams = check_variables(variables)
    for name, value in (("init", init), *([("score", score)] if score is not None else [])):
        if not callable(value):
            fix = "Pass init(key) -> params and score(params, outer_batch) -> scalar."
            raise TypeError(validate.message(f"{name} to be callable", validate.describe(value), fix))
    num_steps = validate.positive_int("num_steps", num_steps)
    num_starts = validate.positive_int("num_starts", num_starts)
    model_state = check_model_state(problem, model_state)
    root = validate.required_key(key)
    if baseline is not None:
        validate.same_structure("baseline", baseline, "the hyperparameters", hyperparams)
    if problem.response is not None:
        center = problem.response.base_hyperparams
        baseline = baseline if baseline is None else center(baseline)
        problem, params, hyperparams = _over_plain_weights(problem, params, hyperparams)

    without_prior = dataclasses.replace(problem, prior=None)

    def fresh(key: Array) -> tuple[Params, ModelState]:
        first = init(key)
        return first if problem.stateful else (first, ())

    def measure(params: Params, hyperparams: Hyperparams, model_state: ModelState) -> PyTree:
        if score is not None:
            return score(params, data.gathered(outer_batch), *([model_state] if problem.stateful else []))
        at = BilevelParams(params, hyperparams)
        return evaluate_outer(without_prior, at, outer_batch, jax.random.fold_in(root, 0), model_state).value

    validate.same_structure("init(key)", jax.eval_shape(fresh, root)[0], "the given weights", params)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def run(key: Array, hyperparams: Hyperparams) -> tuple[PyTree, Params, Array]:
        start_key, batch_key, loss_key = jax.random.split(key, 3)
        first, first_state = fresh(start_key)
        start = Trained(tree.strip_weak_types(first), None, first_state)

        def loss(params: Params, hyperparams: Hyperparams, i: Any, key: Array | None, state: ModelState) -> Any:
            batch = inner_batch(i, jax.random.fold_in(batch_key, i)) if callable(inner_batch) else inner_batch
            result = evaluate_inner(problem, BilevelParams(params, hyperparams), batch, key, state)
            return result.value, result.model_state

        steps, keys = jnp.arange(num_steps, dtype=jnp.int32), split_keys(None)._replace(inner=loss_key)
        ctx = Context(problem, hyperparams, start, start, steps, outer_batch, keys, inner_optimizer)
        at = train(ctx, loss=loss)
        return measure(at.params, hyperparams, at.model_state), at.params, tree.all_finite(at.params)

    keys = jax.random.split(jax.random.fold_in(root, 1), num_starts)
    scores, trained, finite = run(keys, hyperparams)
    others, _, others_finite = ((), (), np.zeros(0, bool)) if baseline is None else run(keys, baseline)
    joint, scores, others = jax.tree.map(
        np.asarray, (jax.jit(measure)(params, hyperparams, model_state), scores, others)
    )
    for path, leaf in zip(tree.leaf_names(joint), jax.tree.leaves(joint), strict=True):
        if leaf.ndim:
            raise ValueError(validate.message("score to return scalars", f"shape {leaf.shape} at {path}", "Reduce it."))
    return Retrained(joint, scores, others, trained, np.asarray(finite), np.asarray(others_finite))


def _over_plain_weights(
    problem: BilevelProblem, params: Params, hyperparams: Hyperparams
) -> tuple[BilevelProblem, Params, Hyperparams]:
    response = problem.response
    if response is None or response.weights is None:
        fix = "Apply hg.responses.with_response or hg.responses.self_tuning to the problem."
        raise ValueError(validate.message("a response that gives plain weights", "one without", fix))
    return response.base_problem, response.weights(params, hyperparams), response.base_hyperparams(hyperparams)
