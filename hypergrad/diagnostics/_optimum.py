"""The inner solution to rounding, for small problems and for checks.

Estimators never solve the inner problem; what they claim about its solution is judged at solutions found here.
"""

from hypergrad import data, tree, validate
from hypergrad.diagnostics._base import unknowns
from hypergrad.estimators import implicit
from hypergrad.inner_solvers._newton_cg import Optimum, newton, root
from hypergrad.problem import BilevelParams, BilevelProblem, check_model_state, check_problem, check_variables
from hypergrad.training import Context, Trained, inner_loss_fn, residual_fn, split_keys
from hypergrad.types import Batch, Key, ModelState, Params, PyTree

__all__ = ["solve_inner"]


def solve_inner(
    problem: BilevelProblem,
    variables: BilevelParams,
    inner_batch: Batch,
    *,
    key: Key = None,
    model_state: ModelState = None,
    trainable: PyTree = None,
    max_products: int = 40_000,
) -> Optimum:
    """Solve the inner problem, w*(λ) = argmin_w L_in(w, λ), or r(w*, λ) = 0 of a problem with a residual.

    Newton's method with CG, from the weights given, until ∇f is zero to rounding. For checks and for small problems:
    ``hg.implicit`` is exact at w*, and ``check_hypergrad`` passes there.

    Args:
      problem: its inner loss, or its residual.
      variables: where to start, and λ.
      inner_batch: the batch on which the loss is taken, all the data for instance.
      key: of the losses, as for ``hg.value_and_hypergrad``: with a key, the dropout mask that it gives.
      model_state: of a stateful problem; held fixed.
      trainable: as for ``hg.implicit``.
      max_products: Hessian products after which no further step begins.

    Returns:
      An ``Optimum``: ``params`` in the dtypes of the weights, and ``converged``.

    Raises:
      TypeError: no ``BilevelProblem`` or ``BilevelParams``.
      ValueError: ``max_products`` < 1; as ``hg.implicit`` for ``trainable``.

    Valid for a smooth inner loss near a minimum; at a kink (|w|) it stalls with ``converged=False``. From weights where
    H is indefinite it may take many products. Pure: may be jitted.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> inner = lambda w, h, batch, key: 0.5 * jnp.sum(jnp.exp(h) * w**2 - 2 * w)           # w* = exp(-h)
    >>> problem = hg.BilevelProblem(inner, lambda w, h, batch, key: jnp.sum(w))
    >>> found = hg.diagnostics.solve_inner(problem, hg.BilevelParams(jnp.zeros(2), jnp.zeros(2)), ())
    >>> found.params.tolist(), bool(found.converged)
    ([1.0, 1.0], True)
    >>> print(str(found).partition(":")[0])
    inner problem converged

    Reference: Nocedal & Wright, Numerical Optimization, 2nd ed. 2006, ch. 7.1.
    """
    check_problem(problem)
    params, hyperparams = check_variables(variables)
    validate.positive_int("max_products", max_products)
    at = Trained(params, None, check_model_state(problem, model_state))
    keys = split_keys(validate.as_key(key))
    ctx = Context(problem, hyperparams, at, at, data.one_step(inner_batch), None, keys, None)
    marks = unknowns(implicit(problem, trainable=trainable), ctx)
    start = tree.selected(marks, params)

    def full(solved: Params) -> Params:
        return tree.filled(marks, solved, params)

    if problem.residual is None:
        loss = inner_loss_fn(ctx)
        found = newton(lambda w: loss(full(w), hyperparams), start, max_products=max_products)
    else:
        residual = residual_fn(ctx)
        found = root(lambda w: tree.selected(marks, residual(full(w), hyperparams)), start, max_products=max_products)
    return found._replace(params=tree.match_dtypes(full(found.params), params))
