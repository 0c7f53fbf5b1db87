"""Several estimators in one run, each for its own leaves of the hyperparameters.

    λ = (λ_a, λ_b, …):    dL_out/dλ_a by estimator a,  dL_out/dλ_b by estimator b,  …      at the same weights

Each estimator sees a problem in its own leaves alone; the others are constants there. The weights are trained once.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import lax

from hypergrad import data, tree, validate
from hypergrad.estimators import _probe
from hypergrad.estimators._protocol import Estimate, Estimator
from hypergrad.problem import BilevelProblem
from hypergrad.training import Context, Trained, resolve_optimizer
from hypergrad.types import Hyperparams, PyTree

__all__ = ["partition"]


def partition(estimators: Mapping[str, Estimator], labels: PyTree | Callable[[Hyperparams], PyTree]) -> Estimator:
    """Give different leaves of the hyperparameters to different estimators, as ``optax.partition`` does for weights.

    dL_out/dλ leaf by leaf: each leaf has the hypergradient that its estimator alone would give it.

    Args:
      estimators: by label. All are of the same problem. Beside ``direct`` of a learned response, those that take no
        inner steps (``implicit``) may be of the problem over plain weights that the response was made for: they see the
        weights that it gives. Settings that are trees like λ (``sigma``) have an entry for each leaf of λ; only
        those of the estimator's own leaves count.
      labels: a tree prefix of the hyperparameters with a label in place of each leaf, or a function from the
        hyperparameters to one.

    Returns:
      An ``Estimator``. Its state and info are dicts by label. The guard looks at the linear solves of all. One of the
      estimators may differentiate the training steps (``unrolled``): the weights are trained once, by it or as usual.

    Raises:
      TypeError: something else than estimators by name.
      ValueError: estimators of different problems, or two that differentiate the training; at ``init``, labels that
        are no tree prefix of the hyperparameters, a label without estimator, or an estimator without a leaf. What an
        estimator refuses names the leaf.

    Valid where each estimator is, with the other leaves held fixed.

    >>> import hypergrad as hg, jax.numpy as jnp, optax
    >>> inner = lambda w, h, b, k: 0.5 * ((w - h["target"]) ** 2).sum()
    >>> problem = hg.BilevelProblem(inner, lambda w, h, b, k: (w**2).sum())
    >>> estimator = partition({"by ift": hg.implicit(problem, hg.solvers.cg(2)), "by unroll": hg.unrolled(problem)},
    ...                       labels={"target": "by ift", "rate": "by unroll"})
    >>> fn = hg.hypergrad(estimator, lambda h: optax.sgd(h["rate"]))
    >>> grad = fn(jnp.zeros(1), {"target": jnp.ones(1), "rate": jnp.array(0.5)}, jnp.arange(2), (), key=None)
    >>> round(float(grad["target"][0]), 3), float(grad["rate"])                 # 2 w at w = 3/4, and d w²/d rate
    (1.5, 1.5)
    """
    problem = _common_problem(estimators)
    trains = [label for label, estimator in estimators.items() if estimator.train is not None]
    if len(trains) > 1:
        fix = "Give their leaves one label, or tune one of them by hg.implicit, hg.evolution or the optimizer itself."
        got = f"{len(trains)}: {', '.join(map(repr, trains))}"
        raise ValueError(validate.message("at most one estimator that differentiates the training steps", got, fix))
    spread = functools.partial(_spread, labels, tuple(estimators))
    solves = any(estimator.unknowns is not None for estimator in estimators.values())
    restricted = functools.partial(_restricted, solves=solves)

    def init(ctx: Context) -> tuple[PyTree, PyTree]:
        marks = spread(ctx.hyperparams)
        made = {label: each.init(restricted(ctx, each, label, marks)) for label, each in estimators.items()}
        return {label: state for label, (state, _) in made.items()}, {label: info for label, (_, info) in made.items()}

    def train(state: Any, ctx: Context) -> tuple[Trained, PyTree, Any]:
        (label,) = trains
        each = estimators[label]
        assert each.train is not None
        if (
            each.best_response is not None
        ):  # steps that are differentiated; its own λ hides the optimizer from its check
            make = lambda h: resolve_optimizer(ctx.inner_optimizer, ctx.problem.constrain(h))  # noqa: E731
            _probe.check_differentiable(
                make,
                ctx.start.params,
                ctx.hyperparams,
                steps=data.window_length(ctx.inner_batches),
                reverse=False,
                cache_key=(ctx.inner_optimizer, ctx.problem.constrain),
            )
        at, own, tape = each.train(state[label], restricted(ctx, each, label, spread(ctx.hyperparams)))
        return at, {**state, label: own}, tape

    def advance(state: Any, ctx: Context) -> PyTree:
        marks, new = spread(ctx.hyperparams), dict(state)
        for label, each in estimators.items():
            if each.advance is not None:
                new[label] = each.advance(state[label], restricted(ctx, each, label, marks))
        return new

    def estimate(state: Any, ctx: Context) -> Estimate:
        marks, found = spread(ctx.hyperparams), {}
        for label, each in estimators.items():
            found[label] = each.estimate(state[label], restricted(ctx, each, label, marks))
        leaves = {label: iter(jax.tree.leaves(result.hypergrad)) for label, result in found.items()}
        hypergrad = jax.tree.map(lambda label: next(leaves[label]), marks)
        first = found[trains[0]] if trains else next(iter(found.values()))
        states, infos = ({label: getattr(r, part) for label, r in found.items()} for part in ("state", "info"))
        return Estimate(first.value, hypergrad, states, infos, first.aux)

    advances = any(estimator.advance is not None for estimator in estimators.values())
    unchecked = (
        "Check each of its estimators, on a problem in its own leaves: write the other hyperparameters into the losses "
        "as constants."
    )
    methods: dict[str, Any] = {"advance": advance if advances else None, "train": train if trains else None}
    return Estimator(problem, init, estimate, **methods, unchecked=unchecked)


def _common_problem(estimators: Any) -> BilevelProblem:
    """Return the problem of all; the one with a response where they are of it and of its base."""
    wanted = "a dict from labels to estimators"
    if not (isinstance(estimators, Mapping) and estimators):
        fix = 'Pass e.g. {"decay": hg.implicit(problem), "rate": hg.unrolled(problem)}.'
        raise TypeError(validate.message(wanted, validate.describe(estimators), fix))
    for label, estimator in estimators.items():
        if not (isinstance(label, str) and isinstance(estimator, Estimator)):
            got = f"{label!r}: {validate.describe(estimator)}"
            raise TypeError(validate.message(wanted, got, "Pass strings and e.g. hg.implicit(problem)."))
    problems = [estimator.problem for estimator in estimators.values()]
    main = next((problem for problem in problems if problem.response is not None), problems[0])
    allowed = [main] if main.response is None else [main, main.response.base_problem]
    for label, problem in zip(estimators, problems, strict=True):
        if not any(problem is other for other in allowed):
            fix = (
                "Build the problem once and hand the same object to each. Beside a learned response: the problem that "
                "it was made for, or the one with the response."
            )
            raise ValueError(validate.message("estimators of one problem", f"another one for {label!r}", fix))
    for label, estimator in estimators.items():
        if estimator.problem is not main and (estimator.train or estimator.advance):
            fix = (
                f"Hand {label!r} the problem with the response, or use hg.implicit: plain weights are not trained here."
            )
            wanted = "an estimator without inner steps for the plain problem beside a response"
            raise ValueError(validate.message(wanted, f"one that takes steps, {label!r}", fix))
    return main


def _spread(labels: Any, known: tuple[str, ...], hyperparams: Hyperparams) -> PyTree:
    """Return a label per leaf of the hyperparameters."""
    given = labels(hyperparams) if callable(labels) else labels
    try:
        marks = jax.tree.broadcast(given, hyperparams)
    except (ValueError, TypeError) as error:
        fix = "Use the structure of the hyperparameters with labels in place of subtrees, or one label."
        have, want = tree.labels("hyperparams", given), tree.labels("hyperparams", hyperparams)
        without = [name for name in want if not any(map(name.startswith, have))]
        beyond = [label for label in have if not any(name.startswith(label) for name in want)]
        parts = [f"no label for {', '.join(without)}"] * bool(without) + [f"a label for {', '.join(beyond)}"] * bool(
            beyond
        )
        got = " and ".join(parts) or f"{jax.tree.structure(given)} for {jax.tree.structure(hyperparams)}"
        raise ValueError(validate.message("labels that are a tree prefix of the hyperparameters", got, fix)) from error
    names, used = tree.labels("hyperparams", hyperparams), jax.tree.leaves(marks)
    for name, label in zip(names, used, strict=True):
        if label not in known:
            fix = f"The estimators are {', '.join(map(repr, known))}."
            raise ValueError(validate.message(f"the label of an estimator for {name}", repr(label), fix))
    idle = [label for label in known if label not in used]
    if idle:
        fix = "Label a leaf with it, or leave the estimator out."
        raise ValueError(validate.message("a leaf for each estimator", f"none for {', '.join(map(repr, idle))}", fix))
    return marks


def _restricted(ctx: Context, estimator: Estimator, label: str, marks: PyTree, *, solves: bool) -> Context:
    """Return what an estimator knows of a call: its own leaves; the others are constants of the problem."""
    problem, hyperparams = ctx.problem, ctx.hyperparams
    mine = jax.tree.map(lambda mark: mark == label, marks)
    if estimator.unknowns is None and solves:
        ctx = ctx._replace(solve_batch=None)  # it is for those that solve a linear system
    if estimator.problem.response is None and problem.response is not None:
        response = problem.response
        if response.weights is None:
            fix = "Use a response over weights, hg.responses.with_response or self_tuning."
            raise ValueError(validate.message("a response that gives plain weights", "one that does not", fix))
        plain = [
            at._replace(params=response.weights(at.params, hyperparams), inner_state=None) for at in (ctx.start, ctx.at)
        ]
        problem, hyperparams = response.base_problem, response.base_hyperparams(hyperparams)
        mine = response.base_hyperparams(mine)
        ctx = ctx._replace(start=plain[0], at=plain[1], inner_optimizer=None)
    # None in place of the other leaves: paths to the own ones stay.
    own = tree.selected(mine, hyperparams)
    return ctx._replace(problem=_in_own_leaves(problem, hyperparams, mine), hyperparams=own)


def _in_own_leaves(problem: BilevelProblem, hyperparams: Hyperparams, mine: PyTree) -> BilevelProblem:
    """Return the problem as one in the leaves marked as ``mine``, the others fixed at ``hyperparams``."""
    fixed = lax.stop_gradient(hyperparams)
    whole = lambda own: tree.filled(mine, own, fixed)  # noqa: E731

    def of_whole(fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def in_own(params: PyTree, own: Hyperparams, *rest: Any) -> Any:
            return fn(params, whole(own), *rest)

        return in_own

    response, prior, residual = problem.response, problem.prior, problem.residual
    base, of_base, own_response = fixed, mine, None
    if response is not None:
        weights = response.weights
        base, of_base = response.base_hyperparams(fixed), response.base_hyperparams(mine)
        own_response = response._replace(
            weights=None if weights is None else of_whole(weights),
            base_problem=_in_own_leaves(response.base_problem, base, of_base),
            base_hyperparams=lambda own: tree.selected(of_base, response.base_hyperparams(whole(own))),
        )

    return dataclasses.replace(
        problem,
        inner_loss=of_whole(problem.inner_loss),
        outer_loss=of_whole(problem.outer_loss),
        residual=None if residual is None else of_whole(residual),
        prior=None if prior is None else lambda own: prior(tree.filled(of_base, own, base)),
        constrain=lambda own: problem.constrain(whole(own)),
        response=own_response,
    )
