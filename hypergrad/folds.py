"""K-fold cross-validation as a bilevel problem: one set of weights per fold, one set of hyperparameters.

    min_λ 1/K Σ_k L_out(w_k, λ; valid_k)   subject to   w_k = argmin_w L_in(w, λ; train_k)

The folds share nothing but λ, so the Hessian is block diagonal, and one linear solve serves all of them.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad import data, tree, validate
from hypergrad.problem import (
    BilevelParams,
    BilevelProblem,
    LossValue,
    check_problem,
    evaluate_inner,
    evaluate_outer,
    evaluate_residual,
    refuse_response,
)
from hypergrad.types import Array, Batch, Hyperparams, Params, PyTree

__all__ = ["cross_validation"]


def cross_validation(problem: BilevelProblem, folds: Iterable[tuple[Any, Any]]) -> BilevelProblem:
    """Return the problem whose outer loss is the mean of the outer losses over K folds of the data.

    Args:
      problem: over plain weights, not stateful; losses that are means over the examples of a batch.
      folds: K ≥ 2 pairs of row numbers (train, valid), as ``sklearn.model_selection.KFold(5).split(x)`` yields.

    Returns:
      A ``BilevelProblem`` whose weights have a leading axis K, one row per fold, and whose two batches are the whole
      data: both losses take their own rows of it. The inner loss is the sum over folds, so that each fold trains as it
      would alone. Fold k has the key ``fold_in(key, k)``; aux has a leading axis K, or is a tuple of K where the folds
      differ in size. Folds of one size are computed by ``vmap`` together.

    Raises:
      TypeError: ``problem`` is not a ``BilevelProblem``, or ``folds`` does not hold pairs of integer arrays.
      ValueError: a stateful problem, one with a response, or fewer than two folds; at a call, weights without the axis.

    Valid where each fold's inner problem has a solution. A prior of the problem counts once. A ``prox`` of
    ``hg.inner_solvers.proximal`` sees the stacked weights: ``jax.vmap(prox, (0, None, None))``, unless it acts entry by
    entry.

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> x, y = jax.random.normal(jax.random.key(0), (12, 3)), jnp.arange(12.0) / 12
    >>> error = lambda w, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2)
    >>> train = lambda w, log_decay, batch, key: error(w, batch) + hg.penalties.l2(w, jnp.exp(log_decay))
    >>> problem = hg.BilevelProblem(train, lambda w, log_decay, batch, key: error(w, batch))
    >>> rows = jnp.arange(12)
    >>> folds = [(rows[rows % 3 != k], rows[rows % 3 == k]) for k in range(3)]
    >>> start = hg.BilevelParams(jnp.zeros((3, 3)), jnp.array(0.0))
    >>> found = hg.minimize(cross_validation(problem, folds), start, (x, y), (x, y))
    >>> found.params.shape, bool(found.converged)
    ((3, 3), True)

    Reference: Stone, Cross-validatory choice and assessment of statistical predictions, 1974.
    """
    check_problem(problem)
    refuse_response("cross_validation", problem)
    if problem.stateful:
        fix = "Carry the state in the losses, or tune on one split."
        raise ValueError(validate.message("a problem without model state", "a stateful one", fix))
    train_rows, valid_rows = _rows(folds)

    def each(name: str, rows: list[np.ndarray], evaluate: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``fn(params, hyperparams, batch, key)`` of all folds: what ``evaluate`` returns, stacked or listed."""

        def one(params: Params, hyperparams: Hyperparams, batch: Batch, chosen: Any, key: Array | None) -> Any:
            rows_of = data.IndexedBatch(batch, chosen)
            return evaluate(problem, BilevelParams(params, hyperparams), rows_of, key, ())

        def all_folds(params: Params, hyperparams: Hyperparams, batch: Batch, key: Array | None) -> Any:
            _check_axis(name, params, len(rows))
            batch, numbers = data.gathered(batch), jnp.arange(len(rows), dtype=jnp.int32)
            _check_rows(name, batch, max(int(chosen.max()) for chosen in rows))
            keys = None if key is None else jax.vmap(lambda k: jax.random.fold_in(key, k))(numbers)

            def of_folds(places: list[int]) -> Any:
                mine, my_keys = jax.tree.map(lambda w: w[np.array(places)], (params, keys))
                chosen, over = jnp.asarray(np.stack([rows[k] for k in places])), (0, None, None, 0, 0)
                return jax.vmap(one, over)(mine, hyperparams, batch, chosen, my_keys)

            sizes = [len(chosen) for chosen in rows]
            if len(set(sizes)) == 1:
                return of_folds([*range(len(rows))])
            found: list[Any] = [None] * len(rows)
            for size in sorted(set(sizes)):
                places = [k for k, other in enumerate(sizes) if other == size]
                stacked = of_folds(places)
                for place, k in enumerate(places):
                    found[k] = jax.tree.map(lambda leaf, place=place: leaf[place], stacked)
            return found

        return all_folds

    def loss(name: str, rows: list[np.ndarray], evaluate: Callable[..., LossValue], *, mean: bool) -> Any:
        all_folds = each(name, rows, evaluate)

        @functools.wraps(getattr(problem, name))
        def total(params: Params, hyperparams: Hyperparams, batch: Batch, key: Array | None) -> Any:
            found = all_folds(params, hyperparams, batch, key)
            values = [v.value for v in found] if isinstance(found, list) else list(found.value)
            value = tree.total(values) / (len(rows) if mean else 1)
            aux = tuple(v.aux for v in found) if isinstance(found, list) else found.aux
            return (value, aux) if problem.has_aux else value

        return total

    residuals = each("residual", train_rows, evaluate_residual)

    def residual(params: Params, hyperparams: Hyperparams, batch: Batch, key: Array | None) -> Params:
        found = residuals(params, hyperparams, batch, key)
        return jax.tree.map(lambda *parts: jnp.stack(parts), *found) if isinstance(found, list) else found

    without_prior = dataclasses.replace(problem, prior=None)
    return dataclasses.replace(
        problem,
        inner_loss=loss("inner_loss", train_rows, evaluate_inner, mean=False),
        outer_loss=loss("outer_loss", valid_rows, lambda _, *rest: evaluate_outer(without_prior, *rest), mean=True),
        residual=None if problem.residual is None else residual,
    )


def _rows(folds: Iterable[tuple[Any, Any]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    fix = "Pass pairs (train_rows, valid_rows), e.g. list(sklearn.model_selection.KFold(5).split(x))."
    pairs = list(folds)
    if len(pairs) < 2:
        raise ValueError(validate.message("two folds or more", f"{len(pairs)}", fix))
    sides: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    for pair in pairs:
        if not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise TypeError(validate.message("folds of pairs", validate.describe(pair), fix))
        for side, given in zip(sides, pair, strict=True):
            rows = np.asarray(given)
            if rows.ndim != 1 or rows.dtype.kind not in "iu" or len(rows) == 0:
                got = f"{validate.describe(given)}"
                raise TypeError(validate.message("row numbers: a vector of integers, not empty", got, fix))
            side.append(rows)
    return sides


def _check_rows(name: str, batch: Batch, last: int) -> None:
    count = data.num_examples(batch)[1]
    if count and last >= count:
        fix = "Pass the whole data as both batches, inner and outer: each loss takes its own rows."
        got = f"{count} examples"
        raise ValueError(validate.message(f"a batch with row {last}, which a fold of {name} asks for", got, fix))


def _check_axis(name: str, params: PyTree, count: int) -> None:
    for label, leaf in zip(tree.labels("params", params), jax.tree.leaves(params), strict=True):
        if jnp.ndim(leaf) == 0 or leaf.shape[0] != count:
            fix = "Stack one copy per fold: jax.tree.map(lambda w: jnp.stack([w] * K), params)."
            wanted = f"{label} with a leading axis of {count} folds in {name}"
            raise ValueError(validate.message(wanted, f"shape {jnp.shape(leaf)}", fix))
