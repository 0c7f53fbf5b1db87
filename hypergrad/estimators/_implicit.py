"""Implicit differentiation: the best response's derivative from the implicit function theorem.

    ∇_w L_in(w*(λ), λ) = 0   ⇒   dw*/dλ = −H⁻¹ ∂²L_in/∂w∂λ,      H = ∂²L_in/∂w²
    dL_out/dλ = ∂L_out/∂λ − (∂²L_in/∂w∂λ)ᵀ q,                    H q = ∂L_out/∂w

Use it for hyperparameters that enter the inner loss, however many: memory does not grow with training steps,
and the cost is one linear solve with Hessian products. It cannot see what acts through the optimizer alone.

Weights that the inner optimizer never moves are no unknowns: H, the solve and the mixed product are restricted to the
others.

Reference: Lorraine, Vicol & Duvenaud, Optimizing millions of hyperparameters by implicit differentiation,
arXiv 1911.02590; Pedregosa, arXiv 1602.02355.
"""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree

from hypergrad import curvature, dataflow, tree, validate
from hypergrad.data import FreshBatches
from hypergrad.estimators import _probe
from hypergrad.estimators._paths import check_gradient_paths, check_outer_path, direct_path, used_leaves
from hypergrad.estimators._protocol import Estimate, Estimator, train_first
from hypergrad.problem import BilevelProblem, check_problem
from hypergrad.solvers import LinearSolver, LinearSystem, Status, cg, dense, gmres
from hypergrad.solvers._base import blank_info
from hypergrad.training import (
    Context,
    depends_on_hyperparams,
    inner_loss_fn,
    outer_loss_fn,
    residual_fn,
    resolve_optimizer,
    solve_batch_at,
)
from hypergrad.types import Array, Hyperparams, MatVec, Params, PyTree

__all__ = ["implicit"]

_IN_TRAINING = cg(3, relative_damping=0.01, warm_start=True)
_AT_SOLUTION = cg(100)
_ASYMMETRIC = gmres(50, 25)
_FEW_UNKNOWNS = 2000


def implicit(
    problem: BilevelProblem,
    solver: LinearSolver | None = None,
    *,
    diagonal: Callable[[Params, Hyperparams], PyTree] | None = None,
    trainable: PyTree = None,
) -> Estimator:
    """Differentiate through the inner optimum by the implicit function theorem.

    dL_out/dλ = ∂L_out/∂λ − (∂²L_in/∂w∂λ)ᵀ q with H q = ∂L_out/∂w solved by ``solver``.

    Args:
      problem: inner loss twice differentiable in the weights, or a residual (``hg.with_residual``), which takes the
        place of ∇_w L_in.
      solver: None: ``hg.solvers.cg(3, relative_damping=0.01, warm_start=True)``, three products per outer step, for
        weights in training; ``hg.solvers.gmres(50, 25)`` where the problem has a residual. ``hg.solvers.cg(100)`` near
        a minimum, where the exact hypergradient is wanted; ``hg.solvers.dense()`` as the oracle.
      diagonal: ``diagonal(params, hyperparams) -> tree prefix of params``, an approximate diagonal of H from the
        constrained hyperparameters, for ``recycled_cg``, ``jacobi()`` and ``nystrom``; the others, also the default
        solver, do not use it. Where each weight has a decay
        (``hg.penalties.l2``): ``lambda params, decay: decay``.
      trainable: tree prefix of bools over the weights: which ones the inner problem solves for. If None and no inner
        optimizer is given, all weights. If None and an inner optimizer is given, all weights that this optimizer
        updates: weights under a masked or partitioned ``optax.set_to_zero`` are excluded. If the optimizer updates no
        weights at all, all weights.

    Returns:
      An ``Estimator`` whose state is the solver's and whose info is its ``SolveInfo``. H and the mixed product are
      taken on the call's ``solve_batch``, or on the inner batch, the last of a window. Every product of a solve shares
      one batch (but for ``hg.FreshBatches``), one random key and one model state. Matrix products run in full float32
      precision, also where the default of the device is lower (TF32), unless ``jax_default_matmul_precision`` is set.
      If ``solver`` is None, ``hg.best_response`` uses ``hg.solvers.cg(100)``, or ``gmres(50, 25)`` for a problem with a
      residual. It does not use the default of three damped products, because those rely on a warm start and
      ``hg.best_response`` keeps no solver state between calls.

    Raises:
      TypeError: wrong ``problem``, ``solver`` or ``diagonal``.
      ValueError: ``trainable`` is no prefix, or leaves no weight; at an estimate, an outer loss that does not depend on
        the weights, or a hyperparameter leaf that enters neither ∇_w L_in nor the outer loss, and so would get zero: a
        learning rate, for instance.

    Warns:
      UserWarning: an inner optimizer moves weights where the gradient is zero (``optax.adamw``): its decay is no part
        of the inner loss, whose minimum is then not where training ends.

    Valid when ∇_w L_in = 0, H is invertible, and ``info.solver.residual`` is small. During training, ∇_w L_in is only
    close to 0, so the result is an approximation. It is accurate if H and the mixed product at the current weights are
    close to their values at the optimum. Where b or the solution is not finite (status ``NOT_FINITE``), the
    hypergradient is NaN. If the inner loss has a kink at its solution (|w|, a norm at 0, a hinge), the formula does not
    hold: use ``hg.residuals.proximal_gradient``.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> inner = lambda w, h, batch, key: jnp.sum(0.5 * jnp.exp(h) * w ** 2 - w)      # w* = exp(-h)
    >>> problem = hg.BilevelProblem(inner, lambda w, h, batch, key: jnp.sum(w))
    >>> hypergrad_fn = hg.hypergrad(hg.implicit(problem, hg.solvers.cg(5)))
    >>> float(hypergrad_fn(jnp.ones(1), jnp.zeros(1), (), (), key=None)[0])
    -1.0

    Reference: Lorraine, Vicol & Duvenaud, arXiv 1911.02590.
    """
    check_problem(problem)
    if solver is not None and not isinstance(solver, LinearSolver):
        got, fix = validate.describe(solver), "Pass e.g. solver=hg.solvers.cg(10), or leave it out for the default."
        raise TypeError(validate.message("solver to be a LinearSolver or None", got, fix))
    if diagonal is not None and not callable(diagonal):
        fix = "Pass a function (params, hyperparams) -> tree prefix of params."
        raise TypeError(validate.message("diagonal to be callable", validate.describe(diagonal), fix))
    symmetric = problem.residual is None
    in_training = solver or (_IN_TRAINING if symmetric else _ASYMMETRIC)
    at_solution = solver or (_AT_SOLUTION if symmetric else _ASYMMETRIC)

    def init(ctx: Context) -> tuple[PyTree, PyTree]:
        _warn_of_decoupled_decay(ctx)
        return in_training.init(_Unknowns(ctx, trainable).of(ctx.start.params)), blank_info()

    def estimate(state: PyTree, ctx: Context) -> Estimate:
        with _full_precision():
            return estimate_precisely(state, ctx)

    def estimate_precisely(state: PyTree, ctx: Context) -> Estimate:
        params, hyperparams = ctx.at.params, ctx.hyperparams
        unknowns = _Unknowns(ctx, trainable)
        outer, solved = outer_loss_fn(ctx), unknowns.of(params)
        product, mixed = _products(ctx, unknowns)

        value_of = lambda w: outer(w, hyperparams)[0]  # noqa: E731
        check_outer_path(
            "implicit", lambda w: value_of(unknowns.fill(w, params)), solved, lambda: used_leaves(value_of, params)
        )
        # A leaf that acts on frozen weights alone has a hypergradient of zero, and rightly so: only others are refused.
        everything = mixed if unknowns.all else _products(ctx, _Unknowns(ctx, trainable=True))[1]
        unmixed = dataflow.independent_leaves(everything, tree.promote(solved if unknowns.all else params))
        check_gradient_paths("implicit", hyperparams, unmixed, direct_path(ctx, params))

        gradient = jax.value_and_grad(unknowns.restrict(outer, params), argnums=(0, 1), has_aux=True)
        (value, aux), (slope, direct) = gradient(solved, hyperparams)
        system = LinearSystem(
            product,
            symmetric,
            ctx.keys.estimate,
            lambda: _diagonal(ctx, diagonal, unknowns),
            ctx.at.inner_state,
            _lower_precision(ctx, unknowns),
            _product_at(ctx, unknowns),
        )
        solution, state, info = in_training.solve(system, slope, state, tolerance=ctx.tolerance)
        # A solver returns a finite x, often 0, where slope or Hessian are not finite. It must not pass as a zero.
        finite = info.status != Status.NOT_FINITE
        hypergrad = jax.tree.map(lambda d, i: jnp.where(finite, d - i, jnp.nan), direct, mixed(solution))
        return Estimate(value, hypergrad, state, info, aux)

    def best_response(ctx: Context) -> Params:
        unknowns, ctx = _Unknowns(ctx, trainable), train_first(ctx)
        params, key = lax.stop_gradient(ctx.at.params), ctx.keys.estimate

        def slope(solved: Params) -> Params:
            if not symmetric:
                return unknowns.restricted(residual_fn(ctx), params)(solved, ctx.hyperparams)
            return jax.grad(unknowns.restrict(inner_loss_fn(ctx), params))(solved, ctx.hyperparams)

        def solve(matvec: MatVec, b: PyTree) -> PyTree:
            wide = tree.promote(b)
            product = lambda v: tree.promote(matvec(optax.tree.cast_like(v, b)))  # noqa: E731
            system = LinearSystem(product, symmetric, key, lambda: _diagonal(ctx, diagonal, unknowns))
            x, _, info = at_solution.solve(system, wide, at_solution.init(wide))
            finite = info.status != Status.NOT_FINITE
            return optax.tree.cast_like(jax.tree.map(lambda leaf: jnp.where(finite, leaf, jnp.nan), x), b)

        def tangent_solve(product: MatVec, b: PyTree) -> PyTree:
            # As one vector: reverse mode refuses a tree with a leaf that is constant, as a bias without decay has.
            flat, parts = ravel_pytree(b)

            def of_vectors(fn: MatVec) -> Callable[[Array], Array]:
                return lambda vector: ravel_pytree(fn(parts(vector)))[0]

            def of_trees(fn: Callable[[Array], Array]) -> MatVec:
                return lambda v: parts(fn(ravel_pytree(v)[0]))

            def solve_flat(matvec: Callable[[Array], Array], vector: Array) -> Array:
                return of_vectors(lambda v: solve(of_trees(matvec), v))(vector)

            options: dict[str, Any] = {"transpose_solve": solve_flat, "symmetric": symmetric}
            return parts(lax.custom_linear_solve(of_vectors(product), flat, solve_flat, **options))

        solved = unknowns.of(params)
        with _full_precision():
            found = lax.custom_root(slope, solved, lambda _slope, solved: solved, tangent_solve)
        return unknowns.fill(found, params)

    def reference() -> Estimator:
        return implicit(problem, _converged(symmetric=symmetric), diagonal=diagonal, trainable=trainable)

    marks = lambda ctx: _Unknowns(ctx, trainable).marks  # noqa: E731
    return Estimator(problem, init, estimate, best_response=best_response, reference=reference, unknowns=marks)


def _converged(*, symmetric: bool) -> LinearSolver:
    """Return the solver of checks: a factorisation up to 2,000 unknowns, beyond it an iteration that converges."""
    direct = dense()
    iterative = cg(5000, 1e-8) if symmetric else gmres(2000, 100, 1e-8)

    def solve(system: LinearSystem, b: PyTree, state: PyTree, *, tolerance: Any = None) -> Any:
        size = sum(leaf.size for leaf in jax.tree.leaves(b))
        return (direct if size <= _FEW_UNKNOWNS else iterative).solve(system, b, state, tolerance=tolerance)

    return LinearSolver(lambda _: (), solve)


def _products(ctx: Context, unknowns: "_Unknowns") -> tuple[MatVec, MatVec]:
    """Return v ↦ H v and q ↦ (∂²L_in/∂w∂λ)ᵀ q, or what a residual has in their place."""
    params, hyperparams = ctx.at.params, ctx.hyperparams
    solved = unknowns.of(params)
    if ctx.problem.residual is not None:
        return curvature.residual_vjp(unknowns.restricted(residual_fn(ctx), params), solved, hyperparams)
    inner = unknowns.restrict(inner_loss_fn(ctx), params)
    return curvature.hvp(lambda w: inner(w, hyperparams), solved), curvature.mixed_vjp(inner, solved, hyperparams)


def _product_at(ctx: Context, unknowns: "_Unknowns") -> Callable[[Any, PyTree], PyTree] | None:
    """Return (k, v) ↦ H_k v, H_k on batch k of ``hg.FreshBatches``; None for one batch."""
    if not isinstance(ctx.solve_batch, FreshBatches):
        return None
    return lambda k, v: _products(ctx._replace(solve_batch=solve_batch_at(ctx, k)), unknowns)[0](v)


def _diagonal(ctx: Context, diagonal: Callable[..., PyTree] | None, unknowns: "_Unknowns") -> PyTree | None:
    """Return the user's diagonal, spread over the unknowns."""
    if diagonal is None:
        return None
    params = ctx.at.params
    given = diagonal(params, ctx.problem.constrain(ctx.hyperparams))
    spread = [
        jnp.broadcast_to(jnp.asarray(d), jnp.shape(w))
        for _, w, d in validate.by_prefix("implicit", "diagonal", params, given)
    ]
    return tree.promote(unknowns.of(jax.tree.unflatten(jax.tree.structure(params), spread)))


def _full_precision() -> contextlib.AbstractContextManager[None]:
    if jax.default_matmul_precision.value is not None:
        return contextlib.nullcontext()
    return jax.default_matmul_precision("highest")


def _lower_precision(ctx: Context, unknowns: "_Unknowns") -> Any:
    """Return the dtype in which the inner loss computes where it is lower than that of the vectors, else None."""
    solved, hyperparams = unknowns.of(ctx.at.params), ctx.hyperparams
    fn: Any = inner_loss_fn(ctx) if ctx.problem.residual is None else residual_fn(ctx)
    fn, wide = unknowns.restrict(fn, ctx.at.params), tree.promote(solved)
    found = dataflow.working_precision(lambda w: fn(optax.tree.cast_like(w, solved), hyperparams), wide)
    return None if found == tree.wider(*(leaf.dtype for leaf in jax.tree.leaves(wide))) else found


class _Unknowns:
    """The weights that the inner problem solves for; the others are constants, None in the trees of the solve."""

    def __init__(self, ctx: Context, trainable: PyTree) -> None:
        params = ctx.start.params
        if trainable is not None:
            self.marks = _spread(trainable, params)
        elif ctx.inner_optimizer is None:
            self.marks = jax.tree.map(lambda _: True, params)
        else:
            never = _probe.untrained_leaves(_optimizer(ctx), params)
            none = all(jax.tree.leaves(never))  # optax.set_to_zero() holds the weights where they are: all are unknowns
            self.marks = jax.tree.map(lambda mark: none or not mark, never)
        if not any(jax.tree.leaves(self.marks)):
            fix = "The inner problem has no unknowns: let the inner optimizer move some weights, or set trainable=."
            raise ValueError(validate.message("at least one weight that is trained", "none", fix))

    @property
    def all(self) -> bool:
        """Whether every weight is an unknown."""
        return all(jax.tree.leaves(self.marks))

    def of(self, params: Params) -> Params:
        """Return the unknowns, None in place of the others."""
        return tree.selected(self.marks, params)

    def fill(self, solved: Params, params: Params) -> Params:
        """Return ``params`` with ``solved`` in the places of the unknowns."""
        return tree.filled(self.marks, solved, params)

    def restricted(self, residual: Callable[..., Params], params: Params) -> Callable[..., Params]:
        """Return a residual as a function of the unknowns, and its leaves that belong to them."""
        return lambda solved, *args: self.of(residual(self.fill(solved, params), *args))

    def restrict(self, fn: Callable[..., Any], params: Params) -> Callable[..., Any]:
        """Return ``fn`` as a function of the unknowns, the other weights as in ``params``."""
        return lambda solved, *args: fn(self.fill(solved, params), *args)


def _spread(trainable: PyTree, params: Params) -> PyTree:
    try:
        marks = jax.tree.broadcast(trainable, params)
    except ValueError as error:
        got = f"{jax.tree.structure(trainable)} for {jax.tree.structure(params)}"
        fix = "Pass True, False, or the weights' structure with bools in place of subtrees."
        raise ValueError(validate.message("trainable to be a tree prefix of params", got, fix)) from error
    marks = jax.tree.map(lambda mark: bool(mark) if isinstance(mark, np.bool_) else mark, marks)
    for mark in jax.tree.leaves(marks):
        validate.flag("trainable", mark)
    return marks


def _optimizer(ctx: Context) -> Any:
    """Return the user's own optimizer, by which results of the probe are kept; built from λ where it is a function."""
    if not depends_on_hyperparams(ctx.inner_optimizer):
        return ctx.inner_optimizer
    return resolve_optimizer(ctx.inner_optimizer, ctx.problem.constrain(ctx.hyperparams))


def _warn_of_decoupled_decay(ctx: Context) -> None:
    if ctx.inner_optimizer is None or ctx.problem.residual is not None:
        return
    if _probe.decays_weights(_optimizer(ctx), ctx.start.params):
        warnings.warn(
            "The inner optimizer moves weights where the gradient is zero (decoupled weight decay, as in optax.adamw). "
            "That decay is not part of the inner loss, so implicit differentiates at another optimum than training "
            "approaches. Put the decay into the inner loss, e.g. hg.penalties.l2(params, decay), and use optax.adam.",
            UserWarning,
            stacklevel=2,
        )
