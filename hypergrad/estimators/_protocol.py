"""The protocol of a hypergradient estimator: how dL_out/dλ is obtained, apart from what is differentiated.

    dL_out/dλ  =  ∂L_out/∂λ  +  (dw*/dλ)ᵀ ∂L_out/∂w

One call of a driver: ``train`` (the estimator's own, or plain training), then ``advance``, then ``estimate`` where an
outer step is due. The driver owns keys, windows, what is due, and the guard.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import lax

from hypergrad.problem import BilevelProblem
from hypergrad.training import Context, Trained, train
from hypergrad.types import Array, Hyperparams, Params, PyTree

__all__ = ["Estimate", "Estimator", "train_first"]


class Estimate(NamedTuple):
    """The result of an estimate.

    Attributes:
      value: scalar, the outer loss at ``ctx.at`` and ``ctx.hyperparams``.
      hypergrad: tree like the hyperparameters, d value/dλ.
      state: the estimator's state for the next call.
      info: diagnostics of the method; a pytree of the structure, shapes and dtypes of ``init``'s blank info.
      aux: what the outer loss returned as aux; () without ``has_aux``.
    """

    value: Array
    hypergrad: Hyperparams
    state: PyTree
    info: PyTree
    aux: Any = ()


class Estimator(NamedTuple):
    """A method bound to a problem, as pure functions of its state and a ``Context``.

    Attributes:
      problem: the ``BilevelProblem``.
      init: ``init(ctx) -> (state, blank_info)``: pytrees of arrays that share no buffer with the variables. ``ctx`` has
        no batches; ``ctx.start.inner_state`` is made.
      estimate: ``estimate(state, ctx) -> Estimate``, where an outer step is due, after ``train`` and ``advance``.
      advance: None, or ``advance(state, ctx) -> state``, on every call after training: particles, second copies of the
        weights, samplers. It sees all K batches. Draw its own noise from ``ctx.keys.advance``; share the noise of
        training with ``ctx.keys.inner``.
      train: None, or ``train(state, ctx) -> (Trained, state, tape)``: takes the inner steps in place of plain training,
        for methods that differentiate them. ``tape`` reaches ``estimate`` as ``ctx.tape``.
      best_response: None, or ``best_response(ctx) -> params``, differentiable in λ, for ``hg.best_response``.
        ``ctx.at`` is ``ctx.start``: no step has been taken yet.
      reference: None, or ``reference() -> Estimator``: the one that this approximates on purpose, by few products or
        damping. ``check_hypergrad`` judges it, and reports the difference as a number.
      unknowns: None, or ``unknowns(ctx) -> tree of bools``: which weights the inner problem solves for; others are
        frozen. ``check_hypergrad`` solves for the same ones.
      unchecked: "", or why differences of the outer loss do not judge this method and what to check in its place; then
        ``check_hypergrad`` refuses it with this sentence.
    """

    problem: BilevelProblem
    init: Callable[[Context], tuple[PyTree, PyTree]]
    estimate: Callable[[PyTree, Context], Estimate]
    advance: Callable[[PyTree, Context], PyTree] | None = None
    train: Callable[[PyTree, Context], tuple[Trained, PyTree, Any]] | None = None
    best_response: Callable[[Context], Params] | None = None
    reference: Callable[[], "Estimator"] | None = None
    unknowns: Callable[[Context], PyTree] | None = None
    unchecked: str = ""


def train_first(ctx: Context) -> Context:
    """Return ``ctx`` after its inner steps, undifferentiated; as it is where it has no inner optimizer."""
    if ctx.inner_optimizer is None:
        return ctx
    start, hyperparams = lax.stop_gradient((ctx.start, ctx.hyperparams))
    return ctx._replace(at=train(ctx, start=start, hyperparams=hyperparams))
