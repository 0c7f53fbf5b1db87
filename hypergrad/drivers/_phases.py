"""The phases of one call, for every driver: train, advance, estimate."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hypergrad import tree, validate
from hypergrad.drivers._guard import Guard
from hypergrad.estimators import Estimate, Estimator
from hypergrad.problem import warn_of_overfitting
from hypergrad.training import Context, train_with_updates
from hypergrad.types import Array, Params, PyTree

__all__ = ["check_estimator", "compile_once", "estimate", "first_state", "train_and_advance"]


_KEPT_PROGRAMS = 4


def compile_once(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Compile ``fn(*args)``, once for all arguments of the same form.

    Leaves that are no numbers (strings, True and False, functions and other objects) are constants of the program: a
    loss may be handed them in a batch, a line search its ``value_fn``. Objects are told apart by identity, not by
    ``==``: a bound method of an object that changed is another one. A new function compiles anew; the programs of the
    last four are kept.
    """
    programs: dict[Any, tuple[Any, list[Any]]] = {}

    def call(*args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        numbers = [leaf for leaf in leaves if tree.is_number(leaf)]
        constants = [(place, leaf) for place, leaf in enumerate(leaves) if not tree.is_number(leaf)]
        plain = all(isinstance(leaf, str | bool) for _, leaf in constants)
        form = (
            structure,
            tuple((place, leaf if isinstance(leaf, str | bool) else id(leaf)) for place, leaf in constants),
        )

        def run(numbers: list[Any]) -> Any:
            filled = list(numbers)
            for place, leaf in constants:
                filled.insert(place, leaf)
            return fn(*jax.tree.unflatten(structure, filled))

        if form not in programs:
            programs[form] = (
                jax.jit(run),
                [] if plain else [leaf for _, leaf in constants],
            )  # an id lives with its object
            objects = [form for form, (_, kept) in programs.items() if kept]
            for old in objects[:-_KEPT_PROGRAMS]:
                del programs[old]
        return programs[form][0](numbers)

    return call


def first_state(estimator: Estimator, ctx: Context) -> tuple[PyTree, PyTree]:
    """Return the estimator's first state and its blank info."""
    made = estimator.init(ctx)
    if type(made) is not tuple or len(made) != 2:
        fix = "Return a pair; () for a method without a state or without an info."
        raise TypeError(validate.message("init to return (state, blank_info)", validate.describe(made), fix))
    return made


def check_estimator(estimator: Any, guard: Any) -> None:
    """Refuse anything but an ``Estimator`` and a ``Guard`` or None."""
    if not isinstance(estimator, Estimator):
        fix = "Pass e.g. hg.implicit(problem, hg.solvers.neumann(20))."
        raise TypeError(validate.message("an Estimator", validate.describe(estimator), fix))
    if not (guard is None or isinstance(guard, Guard)):
        fix = "Pass guard=hg.guard(), or None to take every outer step."
        raise TypeError(validate.message("guard to be a Guard or None", validate.describe(guard), fix))


def train_and_advance(
    estimator: Estimator, guard: Guard | None, state: PyTree, ctx: Context, grads: Any = None
) -> tuple[PyTree, Context, Params, Array]:
    """Take the inner steps and advance the estimator's state: what happens on every call.

    Returns:
      The state, ``ctx`` with ``at`` and ``tape``, the updates of the weights, and whether the state had to return to
      the call's start because it was not finite.
    """
    new, updates = state, None
    if estimator.train is not None:
        at, new, tape = estimator.train(state, ctx)
        ctx = ctx._replace(at=at, tape=tape)
    elif ctx.inner_optimizer is not None:
        at, updates = train_with_updates(ctx, grads=grads)
        ctx = ctx._replace(at=at)
    if estimator.advance is not None:
        new = estimator.advance(new, ctx)
    lost = jnp.array(False)
    if estimator.train is not None or estimator.advance is not None:
        new = same_form("the estimator's state after train and advance", new, state)
        if guard is not None:
            lost = tree.newly_bad(new, state)
            new = optax.tree.where(lost, state, new)
    return new, ctx, updates, lost


def estimate(estimator: Estimator, state: PyTree, ctx: Context) -> Estimate:
    """Return the estimate, its state in the form of ``state``."""
    warn_of_overfitting(ctx.problem, ctx.hyperparams, ctx.outer_batch)
    result = estimator.estimate(state, ctx)
    if not isinstance(result, Estimate):
        fix = "Return hg.Estimate(value, hypergrad, state, info, aux)."
        raise TypeError(validate.message("estimate to return an Estimate", validate.describe(result), fix))
    validate.same_structure("the hypergradient", result.hypergrad, "the hyperparameters", ctx.hyperparams)
    value = validate.scalar_loss("value of the estimate", result.value, "Return one number.")
    return result._replace(value=value, state=same_form("the estimator's state after estimate", result.state, state))


def same_form(what: str, new: PyTree, old: PyTree) -> PyTree:
    """Return ``new`` in the dtypes of ``old``; refuse another structure or other shapes."""
    validate.same_structure(what, new, "the state that init returned", old)
    return tree.match_dtypes(new, old)
