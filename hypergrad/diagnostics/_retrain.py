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

from hypergrad import _batches, _checks, _tree
from hypergrad._problem import (
    BilevelParams,
    BilevelProblem,
    check_model_state,
    check_problem,
    check_variables,
    evaluate_outer,
    inner_gradient,
)
from hypergrad._rollout import resolve_optimizer, step_key
from hypergrad._types import Array, Batch, Hyperparams, Key, ModelState, Params, PyTree
from hypergrad.diagnostics._base import digits, readable, table


class Retrained(NamedTuple):
    """Scores of carried and of retrained weights. ``str()`` of it is a table with what it says.

    Attributes:
      carried: tree of scalars, the score of the weights given.
      retrained: tree of arrays (num_starts,), the scores after training from fresh weights.
      baseline: the same at other hyperparameters, from the same fresh weights; () where none were given.
      params: tree like the weights, each leaf with a leading axis of the starts.
      finite: bool array (num_starts,), whether that start's weights stayed finite.
    """

    carried: PyTree
    retrained: PyTree
    baseline: PyTree
    params: Params
    finite: np.ndarray

    def __str__(self) -> str:
        """Return the scores as a table, and how far the carried one lies outside the retrained ones."""
        lines = [("score", "carried", "retrained", "spread", "baseline", "spread")]
        outside = []
        leaves = [jax.tree.leaves(scores) for scores in (self.carried, self.retrained, self.baseline)]
        names = [readable(name) for name in _tree.leaf_names(self.carried)]
        names = ["score"] if jax.tree_util.treedef_is_leaf(jax.tree.structure(self.carried)) else names
        nothing = [np.full(1, np.nan)] * len(names)
        for name, one, many, other in zip(names, *leaves[:2], leaves[2] or nothing, strict=True):
            columns = float(one), np.mean(many), np.std(many), np.mean(other), np.std(other)
            lines.append((name, *(digits(float(x)) for x in columns)))
            if not float(np.min(many)) <= float(one) <= float(np.max(many)):
                outside.append(name)
        text = [table(lines)]
        if outside:
            where = f"carried weights lie outside all {len(self.finite)} starts in {', '.join(outside)}"
            text.append(f"{where}: that difference is in what they remember, or in how long they trained")
        else:
            text.append(f"carried weights lie within the {len(self.finite)} starts: the values alone give as much")
        if not np.all(self.finite):
            text.append(f"{int(np.sum(~np.asarray(self.finite)))} of the starts diverged: no score of theirs counts")
        return "\n".join(text)


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
            raise TypeError(_checks.message(f"{name} to be callable", _checks.describe(value), fix))
    num_steps = _checks.positive_int("num_steps", num_steps)
    num_starts = _checks.positive_int("num_starts", num_starts)
    model_state = check_model_state(problem, model_state)
    root = _checks.required_key(key)
    if baseline is not None:
        _checks.same_structure("baseline", baseline, "the hyperparameters", hyperparams)
    if problem.response is not None:
        center = problem.response.center
        baseline = baseline if baseline is None else center(baseline)
        problem, params, hyperparams = _over_plain_weights(problem, params, hyperparams)

    def fresh(key: Array) -> tuple[Params, ModelState]:
        first = init(key)
        return first if problem.stateful else (first, ())

    def judge(params: Params, hyperparams: Hyperparams, model_state: ModelState) -> PyTree:
        if score is not None:
            return score(params, _batches.gathered(outer_batch), *([model_state] if problem.stateful else []))
        at = BilevelParams(params, hyperparams)
        return evaluate_outer(problem, at, outer_batch, jax.random.fold_in(root, 0), model_state).value

    _checks.same_structure("init(key)", jax.eval_shape(fresh, root)[0], "the carried weights", params)

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

        begin = _tree.strip_weak_types((params, optimizer.init(params), model_state))
        params, _, model_state = lax.fori_loop(0, num_steps, step, begin)
        return judge(params, hyperparams, model_state), params, _tree.all_finite(params)

    run = jax.jit(jax.vmap(train, in_axes=(0, None)))
    keys = jax.random.split(jax.random.fold_in(root, 1), num_starts)
    scores, trained, finite = run(keys, hyperparams)
    others = () if baseline is None else run(keys, baseline)[0]
    carried = jax.jit(judge)(params, hyperparams, model_state)
    carried, scores, others = jax.tree.map(np.asarray, (carried, scores, others))
    return Retrained(carried, scores, others, trained, np.asarray(finite))


def _over_plain_weights(
    problem: BilevelProblem, params: Params, hyperparams: Hyperparams
) -> tuple[BilevelProblem, Params, Hyperparams]:
    view = problem.response
    if view is None or view.weights is None:
        fix = "Apply hg.responses.with_response or hg.responses.self_tuning to the problem."
        raise ValueError(_checks.message("a response that gives plain weights", "one without", fix))
    return view.plain, view.weights(params, hyperparams), view.center(hyperparams)
