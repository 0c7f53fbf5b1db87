"""The retrain audit: is what was learned in the hyperparameters, or in the weights that were trained along?

    carried:    score(w), w as they came out of joint training
    retrained:  score(w_T(λ)), trained from fresh weights for T steps at the learned λ, which stay fixed: a cold start

Weights that are carried from one outer step to the next have seen every λ on the way, and remember it: a distilled set
of three points can carry a network that knows ten classes, while retraining on the three points gives one that knows
little. Where the two scores differ, it is the carried weights that are good, not the hyperparameters.

Reference: Vicol et al., On implicit bias in overparameterized bilevel optimization, arXiv 2212.14032.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import lax

from hypergrad import data, tree, validate
from hypergrad.diagnostics._base import digits, readable, table
from hypergrad.problem import (
    BilevelParams,
    BilevelProblem,
    check_model_state,
    check_problem,
    check_variables,
    evaluate_outer,
    inner_gradient,
)
from hypergrad.training import resolve_optimizer, step_key
from hypergrad.types import Array, Batch, Hyperparams, Key, ModelState, Params, PyTree


class Retrained(NamedTuple):
    """Scores of carried and of retrained weights. ``str()`` of it is a table with what it says.

    Attributes:
      carried: tree of scalars, the score of the weights given.
      retrained: tree of arrays (num_starts,), the scores after training from fresh weights.
      baseline: the same at other hyperparameters, from the same fresh weights; () where none were given.
      params: tree like the weights, each leaf with a leading axis of the starts.
      finite: bool array (num_starts,), whether that start's weights stayed finite; scores of others count for nothing.
      baseline_finite: the same at the baseline; of length 0 without one.
    """

    carried: PyTree
    retrained: PyTree
    baseline: PyTree
    params: Params
    finite: np.ndarray
    baseline_finite: np.ndarray

    def __str__(self) -> str:
        """Return the scores of the starts that stayed finite as a table, and how far the carried one lies from them."""
        finite, others = np.asarray(self.finite), np.asarray(self.baseline_finite)
        if not finite.any():
            return f"all {len(finite)} starts diverged at these hyperparameters: there is nothing to compare with"
        lines = [("score", "carried", "retrained", "spread", "baseline", "spread")]
        leaves = [jax.tree.leaves(scores) for scores in (self.carried, self.retrained, self.baseline)]
        names = [readable(name) for name in tree.leaf_names(self.carried)]
        names = ["score"] if jax.tree_util.treedef_is_leaf(jax.tree.structure(self.carried)) else names
        nothing, verdicts = [np.full(len(others), np.nan)] * len(names), []
        for name, one, many, other in zip(names, *leaves[:2], leaves[2] or nothing, strict=True):
            kept, rival = many[finite], other[others]
            columns = [(np.mean(x), np.std(x)) if len(x) else (np.nan, np.nan) for x in (kept, rival)]
            figures = [digits(float(x)) for x in (one, *columns[0], *columns[1])]
            lines.append((name, figures[0], figures[1], figures[2], figures[3], figures[4]))
            verdicts.append(_verdict(name, float(one), kept))
        text = [table(lines), *verdicts]
        for what, which in (("starts", finite), ("starts of the baseline", others)):
            if not which.all():
                text.append(f"{int((~which).sum())} of the {what} diverged: their scores are left out")
        return "\n".join(text)


def _verdict(name: str, carried: float, retrained: np.ndarray) -> str:
    """Return what a carried score says, as Student's t of one more start: |t| > 3 in 1 of 10 audits of 3 by chance."""
    apart, count = carried - float(np.mean(retrained)), len(retrained)
    spread = float(np.std(retrained, ddof=1)) * np.sqrt(1 + 1 / count) if count > 1 else np.nan
    rounding = 1e-6 * max(abs(carried), abs(float(np.mean(retrained))))
    if abs(apart) <= rounding:
        return f"{name}: carried and retrained weights are equal"
    if np.isnan(spread):
        return f"{name}: carried weights differ by {digits(apart)}; one start cannot tell whether that is chance"
    times = f"{digits(abs(apart) / spread)} times their spread" if spread > rounding else "they are all equal"
    if abs(apart) > 3 * spread:
        where = "it is in what they remember, or in how long they trained, not in the values"
        return f"{name}: carried weights differ from {count} starts by {digits(apart)} ({times}): {where}"
    return f"{name}: carried weights differ by {digits(apart)} ({times}): {count} starts do not tell that from chance"


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
    """Score the carried weights, and weights trained from scratch at the learned hyperparameters, held fixed.

    w₀ = init(key);  w_{t+1} = w_t + inner optimizer(∇_w L_in(w_t, λ)), T steps;  score(w_T) beside score(w).

    Args:
      problem: what was optimized. Of one over a learned response the problem over plain weights is retrained, at the
        hyperparameters that the response is centred at.
      variables: what came out: ``w`` and ``λ``.
      init: ``init(key) -> params``, fresh weights as training began with; ``(params, model_state)`` where stateful.
      inner_batch: the batch of every step, or ``inner_batch(step, key) -> batch``, traced, for minibatches.
      outer_batch: what the score is taken on: validation data, or better a third split.
      inner_optimizer: an optax transformation; or a function of the constrained hyperparameters that returns one.
      num_steps: T ≥ 1, as many as the carried weights were trained for.
      key: of the starts, batches and losses.
      num_starts: fresh starts, ≥ 1, trained at once under ``vmap``.
      score: ``score(params, outer_batch) -> scalar or tree of scalars`` (``score(params, outer_batch, model_state)``
        where stateful); None: the outer loss.
      baseline: hyperparameters like λ to train at alike, from the same fresh weights and batches: those before
        learning, or a rival's. What retraining gains over them is in the values.
      model_state: of a stateful problem, with the carried weights.

    Returns:
      A ``Retrained`` of NumPy numbers; ``print`` it.

    Raises:
      TypeError: no ``BilevelProblem`` or ``BilevelParams``; an ``init`` that is not callable.
      ValueError: ``num_steps`` or ``num_starts`` < 1; fresh weights of another structure than the carried ones.

    Right as an audit where training from scratch is given what the carried weights had: steps, batches, optimizer.

    >>> import hypergrad as hg, jax, jax.numpy as jnp, optax
    >>> inner = lambda w, h, batch, key: jnp.sum((w - h) ** 2)                                  # w* = h
    >>> problem = hg.BilevelProblem(inner, lambda w, h, batch, key: jnp.sum(w**2))
    >>> carried = hg.BilevelParams(jnp.zeros(2), jnp.ones(2))               # weights that are better than their λ
    >>> found = hg.diagnostics.retrain(problem, carried, lambda key: jax.random.normal(key, (2,)), (), (),
    ...                                inner_optimizer=optax.sgd(0.5), num_steps=20, key=0)
    >>> float(found.carried), found.retrained.tolist()
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

    def fresh(key: Array) -> tuple[Params, ModelState]:
        first = init(key)
        return first if problem.stateful else (first, ())

    def judge(params: Params, hyperparams: Hyperparams, model_state: ModelState) -> PyTree:
        if score is not None:
            return score(params, data.gathered(outer_batch), *([model_state] if problem.stateful else []))
        at = BilevelParams(params, hyperparams)
        return evaluate_outer(problem, at, outer_batch, jax.random.fold_in(root, 0), model_state).value

    validate.same_structure("init(key)", jax.eval_shape(fresh, root)[0], "the carried weights", params)

    def train(key: Array, hyperparams: Hyperparams) -> tuple[PyTree, Params, Array]:
        optimizer = resolve_optimizer(inner_optimizer, problem.constrain(hyperparams))
        gradient = inner_gradient(problem, hyperparams)
        start_key, batch_key, loss_key = jax.random.split(key, 3)
        params, model_state = fresh(start_key)

        def step(i: Array, at: tuple[Params, PyTree, ModelState]) -> tuple[Params, PyTree, ModelState]:
            params, state, model_state = at
            batch = inner_batch(i, jax.random.fold_in(batch_key, i)) if callable(inner_batch) else inner_batch
            grads, model_state = gradient(params, batch, step_key(loss_key, i), model_state)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state, model_state

        begin = tree.strip_weak_types((params, optimizer.init(params), model_state))
        params, _, model_state = lax.fori_loop(0, num_steps, step, begin)
        return judge(params, hyperparams, model_state), params, tree.all_finite(params)

    run = jax.jit(jax.vmap(train, in_axes=(0, None)))
    keys = jax.random.split(jax.random.fold_in(root, 1), num_starts)
    scores, trained, finite = run(keys, hyperparams)
    others, _, others_finite = ((), (), np.zeros(0, bool)) if baseline is None else run(keys, baseline)
    carried = jax.jit(judge)(params, hyperparams, model_state)
    carried, scores, others = jax.tree.map(np.asarray, (carried, scores, others))
    for path, leaf in zip(tree.leaf_names(carried), jax.tree.leaves(carried), strict=True):
        if leaf.ndim:
            raise ValueError(validate.message("score to return scalars", f"shape {leaf.shape} at {path}", "Reduce it."))
    return Retrained(carried, scores, others, trained, np.asarray(finite), np.asarray(others_finite))


def _over_plain_weights(
    problem: BilevelProblem, params: Params, hyperparams: Hyperparams
) -> tuple[BilevelProblem, Params, Hyperparams]:
    view = problem.response
    if view is None or view.weights is None:
        fix = "Apply hg.responses.with_response or hg.responses.self_tuning to the problem."
        raise ValueError(validate.message("a response that gives plain weights", "one without", fix))
    return view.base_problem, view.weights(params, hyperparams), view.base_hyperparams(hyperparams)
