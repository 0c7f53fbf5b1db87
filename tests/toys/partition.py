"""Different leaves of the hyperparameters to different estimators, in one training run.

λ = (λ_a, λ_b):    dL_out/dλ_a by estimator a with λ_b fixed,    dL_out/dλ_b by estimator b with λ_a fixed
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

import hypergrad as hg


def partition(estimators: dict[str, hg.Estimator], labels: Any) -> hg.Estimator:
    """Combine estimators of one problem; ``labels`` is a tree prefix of the hyperparameters with their names."""
    problem = next(iter(estimators.values())).problem

    def fill(mine: Any, others: Any) -> Any:
        return jax.tree.map(lambda a, b: b if a is None else a, mine, others, is_leaf=lambda x: x is None)

    def part(ctx: hg.Context, name: str) -> hg.Context:
        """Return ``ctx`` restricted to the leaves of one estimator, None in place of the others."""
        marks = jax.tree.broadcast(labels, ctx.hyperparams)
        mine = jax.tree.map(lambda mark, x: x if mark == name else None, marks, ctx.hyperparams)
        whole: Callable[[Any], Any] = lambda h: fill(h, ctx.hyperparams)  # noqa: E731
        over = lambda loss: lambda w, h, *rest: loss(w, whole(h), *rest)  # noqa: E731
        restricted = dataclasses.replace(
            ctx.problem,
            inner_loss=over(ctx.problem.inner_loss),
            outer_loss=over(ctx.problem.outer_loss),
            constrain=lambda h: ctx.problem.constrain(whole(h)),
        )
        tape = ctx.tape.get(name, ()) if isinstance(ctx.tape, dict) else ()
        return ctx._replace(problem=restricted, hyperparams=mine, tape=tape)

    def init(ctx: hg.Context) -> tuple[Any, Any]:
        made = {name: e.init(part(ctx, name)) for name, e in estimators.items()}
        return {name: state for name, (state, _) in made.items()}, {name: info for name, (_, info) in made.items()}

    def train(state: Any, ctx: hg.Context) -> tuple[hg.Trained, Any, Any]:
        reached, state, tapes = [], dict(state), {}
        for name, e in estimators.items():
            if e.train is not None:
                at, state[name], tapes[name] = e.train(state[name], part(ctx, name))
                reached.append(at)
        return reached[0], state, tapes

    def advance(state: Any, ctx: hg.Context) -> Any:
        return {n: e.advance(state[n], part(ctx, n)) if e.advance else state[n] for n, e in estimators.items()}

    def estimate(state: Any, ctx: hg.Context) -> hg.Estimate:
        results = {name: e.estimate(state[name], part(ctx, name)) for name, e in estimators.items()}
        grad = jax.tree.map(lambda _: None, ctx.hyperparams)
        for result in results.values():
            grad = fill(grad, result.hypergrad)
        first = next(iter(results.values()))
        new, infos = ({n: getattr(r, field) for n, r in results.items()} for field in ("state", "info"))
        return hg.Estimate(first.value, grad, new, infos, first.aux)

    trains, advances = (any(getattr(e, hook) for e in estimators.values()) for hook in ("train", "advance"))
    return hg.Estimator(problem, init, estimate, advance if advances else None, train if trains else None)
