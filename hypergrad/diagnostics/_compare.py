"""Hypergradients of several methods beside one that is known to be right, or beside each other's long windows.

    cosine = ⟨a, b⟩/‖a‖‖b‖ says whether a step goes the right way, norm ratio = ‖a‖/‖b‖ how far.

A method with cosine near one and a small norm (few Neumann terms) is mended by a scale-free outer optimizer; one with a
small or negative cosine (a short window for a learning rate) is not.

Reference: Lorraine, Vicol & Duvenaud, arXiv 1911.02590 (inversion methods beside each other); Wu et al., Understanding
short-horizon bias in stochastic meta-optimization, arXiv 1803.02021.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from hypergrad import data, tree, validate
from hypergrad.diagnostics._base import align, digits, table
from hypergrad.drivers._functional import value_and_hypergrad
from hypergrad.estimators import HypergradEstimator
from hypergrad.problem import BilevelParams, check_variables
from hypergrad.solvers import SolveInfo
from hypergrad.types import Batch, Hyperparams, Key, ModelState


class Agreement(NamedTuple):
    """One method beside the oracle.

    Attributes:
      name: of the method, or the length of the window.
      cosine: between its hypergradient and the oracle's, over all leaves; NaN where one of them is zero.
      norm_ratio: norm of its hypergradient over that of the oracle's.
      error: norm of the difference over that of the oracle's.
      outer_loss: outer loss at the weights of the estimate.
      residual: of its linear solve, ‖b − A x‖/‖b‖; NaN for methods without one.
      leaves: cosine for each leaf of the hyperparameters, by its path.
    """

    name: str
    cosine: float
    norm_ratio: float
    error: float
    outer_loss: float
    residual: float
    leaves: dict[str, float]


class Comparison(NamedTuple):
    """Several methods beside one oracle. ``str()`` of it is a table.

    Attributes:
      rows: one ``Agreement`` a method, in the order given.
      oracle: the oracle's hypergradient.
    """

    rows: tuple[Agreement, ...]
    oracle: Hyperparams

    def __str__(self) -> str:
        """Return the rows as a table."""
        return _rows("method", self.rows)


class HorizonBias(NamedTuple):
    """Hypergradients of short windows beside that of the longest. ``str()`` of it is a table with a verdict.

    Attributes:
      rows: one ``Agreement`` a window length, shortest first; the last is the longest with itself.
      horizons: the lengths.
    """

    rows: tuple[Agreement, ...]
    horizons: tuple[int, ...]

    def __str__(self) -> str:
        """Return the rows as a table, and from which length on they go the way of the longest."""
        return f"{_rows('steps', self.rows)}\n{self._verdict()}"

    def _verdict(self) -> str:
        bad = [row for row in self.rows if not row.cosine > 0.9]
        if not bad:
            return "every window tried goes the way of the longest (cosine > 0.9)"
        after = [h for h in self.horizons if h > int(bad[-1].name)]
        against = [f"{row.name} ({digits(row.cosine)})" for row in bad if not row.cosine > 0]
        text = (
            f"windows go the way of the longest (cosine > 0.9) from {after[0]} steps on"
            if after
            else "no window but the longest goes its way"
        )
        return text + (f"; against it, by their cosine: {', '.join(against)}" if against else "")


def compare(
    estimators: Mapping[str, HypergradEstimator | Callable[..., Any]],
    oracle: HypergradEstimator | Callable[..., Any] | Hyperparams,
    variables: BilevelParams,
    inner_batch: Batch,
    outer_batch: Batch,
    *,
    key: Key,
    inner_optimizer: Any = None,
    model_state: ModelState = None,
) -> Comparison:
    """Compare hypergradients at one point, on one batch, with one key.

    For each: cosine and norm ratio to the oracle's, and ‖a − b‖/‖b‖.

    Args:
      estimators: by name: estimators, or functions as ``hg.value_and_hypergrad`` returns them, for those that take
        other steps (``lambda w, h, batch, valid, *, key, model_state=None: fn(w, h, windows, valid, key=key)``).
      oracle: what they are compared with: ``hg.implicit(problem, hg.solvers.dense())`` on a small problem, ``cg``
        with many steps on a larger one, a long unroll; such a function; or a known hypergradient.
      variables: where.
      inner_batch: with an ``inner_optimizer``, leaves carry a window axis.
      outer_batch: of the outer loss.
      key: the same for all, or None.
      inner_optimizer: as for ``hg.value_and_hypergrad``; handed to every estimator.
      model_state: of a stateful problem.

    Returns:
      A ``Comparison`` of Python numbers; ``print`` it.

    Raises:
      TypeError: nothing to compare, or what is neither an estimator nor a function.
      ValueError: a known hypergradient of another structure than the hyperparameters; an oracle's that is zero or not
        finite.

    Right as far as the oracle is: check that one with ``check_hypergrad``.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> inner = lambda w, h, batch, key: 0.5 * jnp.sum(jnp.exp(h) * w**2 - 2 * w)           # w* = exp(-h)
    >>> problem = hg.BilevelProblem(inner, lambda w, h, batch, key: jnp.sum(w))
    >>> at = hg.BilevelParams(jnp.exp(-jnp.array([0.0, 1.0])), jnp.array([0.0, 1.0]))
    >>> methods = {"T1-T2": hg.implicit(problem, hg.solvers.identity())}
    >>> found = compare(methods, hg.implicit(problem, hg.solvers.dense()), at, (), (), key=None)
    >>> round(found.rows[0].norm_ratio, 2)
    1.33

    Reference: Lorraine, Vicol & Duvenaud, arXiv 1911.02590.
    """
    check_variables(variables)
    if not isinstance(estimators, Mapping) or not estimators:
        fix = 'Pass e.g. {"neumann": hg.implicit(problem, hg.solvers.neumann(20))}.'
        raise TypeError(validate.message("estimators as a dict by name", validate.describe(estimators), fix))
    batches = inner_batch, outer_batch

    def run(method: Any) -> Any:
        fn = value_and_hypergrad(method, inner_optimizer) if isinstance(method, HypergradEstimator) else method
        if not callable(fn):
            fix = "Pass an estimator, or a function as hg.value_and_hypergrad returns it."
            raise TypeError(validate.message("an estimator or a function", validate.describe(fn), fix))
        result = jax.jit(fn)(*variables, *batches, key=validate.as_key(key), model_state=model_state)
        if not (isinstance(result, tuple) and len(result) == 2 and hasattr(result[1], "solver")):
            fix = "Pass what hg.value_and_hypergrad returns; hg.hypergrad's result has no info."
            raise TypeError(
                validate.message("a function that returns ((value, hypergrad), info)", "another result", fix)
            )
        return result

    if isinstance(oracle, HypergradEstimator) or callable(oracle):
        truth = run(oracle)[0][1]
    else:
        truth = oracle
        validate.same_structure("the known hypergradient", truth, "the hyperparameters", variables.hyperparams)
    _usable(truth)
    return Comparison(tuple(_agreement(name, run(method), truth) for name, method in estimators.items()), truth)


def horizon_bias(
    estimator: HypergradEstimator,
    variables: BilevelParams,
    inner_batch: Batch,
    outer_batch: Batch,
    *,
    inner_optimizer: Any,
    key: Key,
    horizons: Sequence[int] | None = None,
    model_state: ModelState = None,
) -> HorizonBias:
    """Compare the hypergradients of short windows with that of the longest, all from one start.

    Window k takes the first k of the K steps, with their batches and keys, from a fresh optimizer state, and judges
    the weights that it reaches.

    Args:
      estimator: one that differentiates steps, e.g. ``hg.unrolled(problem)``.
      variables: where the windows start.
      inner_batch: leaves carry a window axis K: the longest window.
      outer_batch: of the outer loss.
      inner_optimizer: an optax transformation, or a function of the constrained hyperparameters that returns one.
      key: of the losses, or None.
      horizons: lengths 1 ≤ k ≤ K to try; K is added. None: 1, 4, 16, …, K. Each is compiled by itself.
      model_state: of a stateful problem.

    Returns:
      A ``HorizonBias`` of Python numbers; ``print`` it.

    Raises:
      ValueError: an estimator that does not differentiate steps; a length outside 1 … K; a hypergradient of the
        longest window that is zero or not finite.

    A cosine of −1 for one hyperparameter says that short windows push it the other way: learning rates, which they
    shrink. Right for windows from this start; look at several, early and late in training.

    >>> import hypergrad as hg, jax.numpy as jnp, optax
    >>> curved = jnp.array([1.0, 0.02])                                        # fast and slow directions
    >>> loss = lambda w, rate, batch, key: 0.5 * jnp.sum(curved * w**2)
    >>> noisy = lambda w, rate, batch, key: loss(w, rate, batch, key) + batch * w[0]
    >>> noise, at = jnp.tile(jnp.array([0.5, -0.5]), 32), hg.BilevelParams(jnp.array([0.0, 10.0]), jnp.array(0.7))
    >>> unrolled = hg.unrolled(hg.BilevelProblem(noisy, loss))
    >>> found = horizon_bias(unrolled, at, noise, (), inner_optimizer=optax.sgd, key=None)
    >>> found.horizons, round(found.rows[0].cosine)
    ((1, 4, 16, 64), -1)

    Reference: Wu et al., arXiv 1803.02021.
    """
    check_variables(variables)
    if not isinstance(estimator, HypergradEstimator) or not estimator.needs_rollout:
        fix = "Pass hg.unrolled(problem): only what differentiates steps depends on how many there are."
        raise ValueError(validate.message("an estimator that differentiates steps", validate.describe(estimator), fix))
    longest = data.window_length(inner_batch)
    if horizons is not None and not isinstance(horizons, Sequence):
        fix = "Pass a list of lengths, e.g. horizons=[1, 10, 100]."
        raise TypeError(validate.message("horizons as a sequence of ints", validate.describe(horizons), fix))
    lengths = [4**i for i in range(longest.bit_length())] if horizons is None else list(horizons)
    for length in lengths if horizons is not None else []:
        if validate.positive_int("horizon", length) > longest:
            fix = "Stack more batches, or ask for shorter windows."
            raise ValueError(validate.message(f"horizons of at most {longest}, the window's length", str(length), fix))
    lengths = sorted({length for length in lengths if length < longest} | {longest})
    fn = jax.jit(value_and_hypergrad(estimator, inner_optimizer))
    found = {
        length: fn(
            *variables,
            data.take(inner_batch, slice(length)),
            outer_batch,
            key=validate.as_key(key),
            model_state=model_state,
        )
        for length in lengths
    }
    truth = found[longest][0][1]
    _usable(truth)
    rows = tuple(_agreement(str(length), result, truth) for length, result in found.items())
    return HorizonBias(rows, tuple(lengths))


def _usable(truth: Hyperparams) -> None:
    size = float(tree.norm(tree.promote(truth)))
    if not 0 < size < float("inf"):
        fix = "Where it is zero or not finite nothing can be compared with it: look at its info, or move the point."
        raise ValueError(validate.message("an oracle with a finite hypergradient other than zero", digits(size), fix))


def _agreement(name: str, result: Any, truth: Hyperparams) -> Agreement:
    (value, gradient), info = result
    solver = info.solver
    residual = float(solver.residual) if isinstance(solver, SolveInfo) else float("nan")
    pairs = zip(tree.leaf_names(truth), jax.tree.leaves(gradient), jax.tree.leaves(truth), strict=True)
    leaves = {path: align(a, b).cosine for path, a, b in pairs}
    return Agreement(name, *align(gradient, truth), float(value), residual, leaves)


def _rows(what: str, rows: Sequence[Agreement]) -> str:
    head = (what, "cosine", "norm ratio", "error", "outer loss", "residual")
    return table([head, *((row.name, *map(digits, row[1:6])) for row in rows)])
