"""Refuse hypergradients that are zero by construction, on both sides of the chain rule.

    dL_out/dλ = ∂L_out/∂λ + (dw*/dλ)ᵀ ∂L_out/∂w:      λ → w* must have a path, or λ → L_out;   w → L_out must have one

Paths are found by following data through the traced program, not by values: a leaf multiplied by 0 passes.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from hypergrad import dataflow, tree, validate
from hypergrad.training import Context, inner_loss_fn, outer_loss_fn
from hypergrad.types import Array, Hyperparams, Params, PyTree

__all__ = [
    "ZERO_GRADIENT_HINTS",
    "check_first_order_paths",
    "check_gradient_paths",
    "check_outer_path",
    "direct_path",
    "refuse_solve_batch",
    "used_leaves",
]

_THROUGH_LOSS = (
    "the inner loss, in a term with the weights",
    "A learning rate, momentum or decoupled decay acts through the optimizer: use unrolled differentiation "
    "(hg.unrolled) for it, or put a decay into the inner loss (hg.penalties.l2).",
)

ZERO_GRADIENT_HINTS = {
    "implicit": (
        "the inner loss's gradient in the weights",
        "A learning rate, momentum or decoupled decay acts through the optimizer: use unrolled differentiation "
        "(hg.unrolled) for it, or put a decay into the inner loss (hg.penalties.l2). A rounded number, a choice or a "
        "dropout rate may have no derivative: use hg.evolution, or for dropout and noise hg.responses.self_tuning "
        "with hg.direct. A stop_gradient cuts a leaf off, too.",
    ),
    "unrolled": (
        "the inner steps, differentiably",
        "Make inner_optimizer a function that builds the optimizer from the constrained hyperparameters. An optimizer "
        "that takes signs (optax.lion, sign_sgd) passes no derivative of the loss: only its rate and decay have one. "
        "A rounded number, a choice or a dropout rate may have no derivative: use hg.evolution, or for dropout and "
        "noise hg.responses.self_tuning with hg.direct. "
        "What enters the optimizer's initial state alone (optax.inject_hyperparams) does not act on a given state.",
    ),
    "direct": (
        "the inner loss, by which a response would learn it",
        "The inner loss must use it; learn a response to it (hg.responses.with_response, self_tuning). A learning "
        "rate, momentum or decoupled decay acts through the optimizer, which no response sees: use hg.unrolled for it.",
    ),
    "evolution": (
        "the inner loss, the inner optimizer or the outer loss",
        "What acts through the optimizer needs an inner_optimizer that is a function of the hyperparameters, as for "
        "hg.unrolled. Remove a leaf that nothing uses.",
    ),
    "first_order": _THROUGH_LOSS,
    "sama": _THROUGH_LOSS,
}


def check_gradient_paths(
    name: str, hyperparams: Hyperparams, unseen: Iterable[int], direct: Callable[[Hyperparams], Array]
) -> None:
    """Refuse the ``unseen`` hyperparameter leaves, of zero indirect derivative, that ``direct`` does not depend on."""
    zero = {i for i in unseen if jnp.size(jax.tree.leaves(hyperparams)[i])}
    if zero:
        zero &= _unused_leaves(direct, hyperparams)
    if not zero:
        return
    labels = tree.labels("hyperparams", hyperparams)
    path, hint = ZERO_GRADIENT_HINTS[name]
    wanted = f"every hyperparameter leaf to enter {path}, or the outer loss"
    fix = f"Its {name} hypergradient would be zero by construction. {hint} Remove a leaf that nothing uses."
    got = f"{', '.join(labels[i] for i in sorted(zero))}, which enters neither"
    raise ValueError(validate.message(wanted, got, fix))


def check_first_order_paths(name: str, ctx: Context) -> None:
    """Refuse what an estimate from first derivatives of both losses cannot see, without a second derivative."""
    outer, inner, params = outer_loss_fn(ctx), inner_loss_fn(ctx), ctx.at.params
    check_outer_path(name, lambda w: outer(w, ctx.hyperparams)[0], params)
    unseen = dataflow.independent_leaves(lambda w: jax.grad(inner, argnums=1)(w, ctx.hyperparams), params)
    check_gradient_paths(name, ctx.hyperparams, unseen, direct_path(ctx, params))


def used_leaves(outer: Callable[[Params], Any], params: Params) -> list[str]:
    """Return the labels of the weights that a loss depends on differentiably."""
    unused = _unused_leaves(outer, params)
    return [label for place, label in enumerate(tree.labels("params", params)) if place not in unused]


def _unused_leaves(fn: Callable[[Any], Any], at: PyTree) -> set[int]:
    """Return the places of the leaves that ``fn`` has no derivative in by construction."""
    return set(dataflow.independent_leaves(lambda ct: jax.vjp(fn, at)[1](ct)[0], jax.eval_shape(fn, at)))


def direct_path(ctx: Context, params: Params) -> Callable[[Hyperparams], Array]:
    """Return λ ↦ L_out(w, λ) without the prior, which every leaf may enter and which measures none."""
    measured = outer_loss_fn(ctx._replace(problem=dataclasses.replace(ctx.problem, prior=None)))
    return lambda hyperparams: measured(params, hyperparams)[0]


def refuse_solve_batch(name: str, ctx: Context) -> None:
    """Refuse a batch for a linear solve in a method without one."""
    if ctx.solve_batch is not None:
        fix = "Drop solve_batch, or use hg.implicit."
        raise ValueError(validate.message(f"no solve_batch for {name}, which solves no linear system", "one", fix))


def check_outer_path(
    name: str, outer: Callable[[Params], Any], params: Params, everything: Callable[[], list[str]] = list
) -> None:
    """Refuse an outer loss that does not depend differentiably on the weights ``params``.

    ``everything()`` names the leaves that it does depend on among those that are no unknowns.
    """
    if jax.tree.leaves(params) and len(_unused_leaves(outer, params)) == len(jax.tree.leaves(params)):
        frozen = everything()
        if frozen:
            got = f"one that depends on {', '.join(frozen)} alone, which the inner problem holds fixed"
            fix = "Let the inner problem solve for it: see trainable= of hg.implicit, and the inner optimizer's masks."
            raise ValueError(validate.message("an outer loss that depends on weights that are trained", got, fix))
        fix = (
            f"The {name} hypergradient of such a loss says nothing about training. Use the params that the loss is "
            "given (not a variable of the enclosing scope), without stop_gradient, and a differentiable loss in place "
            "of an accuracy or argmax."
        )
        raise ValueError(
            validate.message("an outer loss that depends on params", "one with derivative zero in them", fix)
        )
