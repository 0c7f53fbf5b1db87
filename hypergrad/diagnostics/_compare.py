"""Compare hypergradients of several methods with one that is known to be right, and short windows with a long one.

    cosine = ⟨a, b⟩/‖a‖‖b‖ says whether the direction of a step is right, norm ratio = ‖a‖/‖b‖ whether its length is.

A scale-free outer optimizer makes up for a small norm (few Neumann terms), but not for a small or negative cosine (a
short window for a learning rate).

Reference: Lorraine, Vicol & Duvenaud, arXiv 1911.02590 (a comparison of inversion methods); Wu et al., Understanding
short-horizon bias in stochastic meta-optimization, arXiv 1803.02021.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from hypergrad import data, tree, validate
from hypergrad.diagnostics._base import align, digits, flat, table
from hypergrad.drivers import value_and_hypergrad
from hypergrad.estimators import Estimator
from hypergrad.problem import BilevelParams, check_variables
from hypergrad.solvers import SolveInfo
from hypergrad.types import Batch, Hyperparams, Key, ModelState

__all__ = ["Agreement", "Comparison", "HorizonBias", "compare", "horizon_bias"]


class Agreement(NamedTuple):
    """One method compared with the oracle.

    Attributes:
      name: of the method, or the length of the window.
      cosine: between its hypergradient a and the oracle's b, over all leaves; NaN where one of them is zero.
      norm_ratio: ‖a‖/‖b‖.
      error: ‖a − b‖/‖b‖.
      outer_loss: outer loss at the weights of the estimate.
      residual: of its linear solve, ‖b − A x‖/‖b‖; NaN for methods without one.
      leaves: cosine per leaf of the hyperparameters, by its path.
    """

    name: str
    cosine: float
    norm_ratio: float
    error: float
    outer_loss: float
    residual: float
    leaves: dict[str, float]


class Comparison(NamedTuple):
    """Several methods compared with one oracle. ``str()`` of it is a table.

    Attributes:
      rows: one ``Agreement`` per method, in the order given.
      oracle: the oracle's hypergradient.
    """

    rows: tuple[Agreement, ...]
    oracle: Hyperparams

    def __str__(self) -> str:
        """Return the rows as a table."""
        return _rows("method", self.rows)


class HorizonBias(NamedTuple):
    """Hypergradients of short windows compared with that of the longest. ``str()`` of it is a table with a verdict.

    Attributes:
      rows: one ``Agreement`` per window length, shortest first; the last is the longest with itself.
      horizons: the lengths.
    """

    rows: tuple[Agreement, ...]
    horizons: tuple[int, ...]

    def __str__(self) -> str:
        """Return the rows as a table, and from which length on they agree in direction with the longest."""
        return f"{_rows('steps', self.rows)}\n{self._verdict()}"

    def _verdict(self) -> str:
        bad = [row for row in self.rows if not row.cosine > 0.9]
        if not bad:
            return "every window tried agrees in direction with the longest window (cosine > 0.9)"
        after = [h for h in self.horizons if h > int(bad[-1].name)]
        opposed = [f"{row.name} ({digits(row.cosine)})" for row in bad if not row.cosine > 0]
        text = (
            f"windows agree in direction with the longest window (cosine > 0.9) from {after[0]} steps on"
            if after
            else "no shorter window agrees in direction with the longest window"
        )
        return text + (f"; opposed to it, with their cosine: {', '.join(opposed)}" if opposed else "")


def compare(
    estimators: Mapping[str, Estimator | Callable[..., Any]],
    oracle: Estimator | Callable[..., Any] | Hyperparams,
    variables: BilevelParams,
    inner_batch: Batch,
    outer_batch: Batch,
    *,
    key: Key,
    inner_optimizer: Any = None,
    model_state: ModelState = None,
) -> Comparison:
    """Compare hypergradients a of several methods with an oracle's b, at one point, on one batch, with one key.

    cosine = ⟨a, b⟩/‖a‖‖b‖, norm ratio = ‖a‖/‖b‖, error = ‖a − b‖/‖b‖.

    Args:
      estimators: by name: estimators, or functions as ``hg.value_and_hypergrad`` returns them, for those that take
        other steps (``lambda w, h, batch, valid, *, key, model_state=None: fn(w, h, windows, valid, key=key)``).
      oracle: what they are compared with: ``hg.implicit(problem, hg.solvers.dense())`` on a small problem, ``cg``
        with many steps on a larger one, a long unroll; such a function; or a known hypergradient.
      variables: where.
      inner_batch: with an ``inner_optimizer``, leaves have a window axis.
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

    Valid as far as the oracle is right: check it with ``check_hypergrad``.

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
    key = validate.as_key(key)

    def run(method: Any) -> Any:
        fn = value_and_hypergrad(method, inner_optimizer) if isinstance(method, Estimator) else method
        if not callable(fn):
            fix = "Pass an estimator, or a function as hg.value_and_hypergrad returns it."
            raise TypeError(validate.message("an estimator or a function", validate.describe(fn), fix))
        result = fn(*variables, inner_batch, outer_batch, key=key, model_state=model_state)
        if not (isinstance(result, tuple) and len(result) == 2 and hasattr(result[1], "solver")):
            fix = "Pass what hg.value_and_hypergrad returns; hg.hypergrad's result has no info."
            raise TypeError(
                validate.message("a function that returns ((value, hypergrad), info)", "another result", fix)
            )
        return result

    if isinstance(oracle, Estimator) or callable(oracle):
        truth = run(oracle)[0][1]
    else:
        truth = oracle
        validate.same_structure("the known hypergradient", truth, "the hyperparameters", variables.hyperparams)
    _check_usable(truth)
    return Comparison(tuple(_agreement(name, run(method), truth) for name, method in estimators.items()), truth)


def horizon_bias(
    estimator: Estimator,
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
      inner_batch: leaves have a window axis K: the longest window.
      outer_batch: of the outer loss.
      inner_optimizer: an optax transformation, or a function of the constrained hyperparameters that returns one.
      key: of the losses, or None.
      horizons: lengths 1 ≤ k ≤ K to try; K is added. None: 1, 4, 16, …, K. Each is compiled separately.
      model_state: of a stateful problem.

    Returns:
      A ``HorizonBias`` of Python numbers; ``print`` it.

    Raises:
      ValueError: an estimator that does not differentiate steps; a length outside 1 … K; a hypergradient of the
        longest window that is zero or not finite.

    A cosine of −1 for one hyperparameter says that short windows push it in the opposite direction: learning rates,
    which they shrink. Valid for windows from this start; look at several, early and late in training.

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
    if not isinstance(estimator, Estimator) or estimator.train is None:
        fix = "Pass hg.unrolled(problem): the others do not depend on the number of steps."
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
    fn, key = value_and_hypergrad(estimator, inner_optimizer), validate.as_key(key)
    windows = [data.take(inner_batch, slice(length)) for length in lengths]
    found = [fn(*variables, window, outer_batch, key=key, model_state=model_state) for window in windows]
    truth = found[-1][0][1]
    _check_usable(truth)
    rows = [_agreement(str(length), result, truth) for length, result in zip(lengths, found, strict=True)]
    return HorizonBias(tuple(rows), tuple(lengths))


def _check_usable(truth: Hyperparams) -> None:
    size = float(np.linalg.norm(flat(truth)))
    if not 0 < size < math.inf:
        fix = "Nothing can be compared with it: read the oracle's info, or choose another point."
        raise ValueError(validate.message("an oracle with a finite hypergradient other than zero", digits(size), fix))


def _agreement(name: str, result: Any, truth: Hyperparams) -> Agreement:
    (value, gradient), info = result
    residual = float(info.solver.residual) if isinstance(info.solver, SolveInfo) else math.nan
    pairs = zip(tree.leaf_names(truth), jax.tree.leaves(gradient), jax.tree.leaves(truth), strict=True)
    leaves = {path: align(a, b).cosine for path, a, b in pairs}
    return Agreement(name, *align(gradient, truth), float(value), residual, leaves)


def _rows(what: str, rows: Sequence[Agreement]) -> str:
    head = (what, "cosine", "norm ratio", "error", "outer loss", "residual")
    return table([head, *((row.name, *map(digits, row[1:6])) for row in rows)])
