"""Gradient-based hyperparameter optimization for JAX, behind one optax interface.

    w*(λ) = argmin_w L_in(w, λ),        λ* = argmin_λ L_out(w*(λ), λ)

What is where:

    problem       BilevelProblem, BilevelParams, reparameterize; bijectors, penalties, noise
                  with_prior, priors; with_residual, residuals; microbatched, cross_validation
                  IndexedBatch, FreshBatches
    estimators    implicit (with solvers, preconditioners), unrolled (reverse, forward), direct (with responses)
                  first_order, sama: without second derivatives; evolution: without derivatives in λ
                  partition: different leaves of λ to different estimators
    drivers       bilevel (one optax transformation), value_and_hypergrad, hypergrad, best_response; guard
                  minimize (with inner_solvers, methods): problems small enough to solve
                  metagradient (with stores): the exact gradient of a whole training run
    diagnostics   check_hypergrad, compare, retrain, plots
    optimizers    optimizers whose settings are learned, as hyperparameters or online
    a new method  Estimator, Estimate, Context, Keys, Trained, train; LinearSolver, LinearSystem, SolveInfo

One log decay per weight, tuned by the validation loss while the weights train:

    >>> import hypergrad as hg, jax.numpy as jnp, optax
    >>> error = lambda w, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2)
    >>> problem = hg.BilevelProblem(
    ...     inner_loss=lambda w, decay, batch, key: error(w, batch) + hg.penalties.l2(w, jnp.exp(decay)),
    ...     outer_loss=lambda w, decay, batch, key: error(w, batch))
    >>> tx = hg.bilevel(hg.implicit(problem), inner_optimizer=optax.adam(1e-2),
    ...                 outer_optimizer=optax.adam(1e-2), every=10)
    >>> variables, batch = hg.BilevelParams(jnp.zeros(3), jnp.full(3, -3.0)), (jnp.eye(3), jnp.ones(3))
    >>> updates, state = tx.update(None, tx.init(variables), variables, inner_batch=batch, outer_batch=batch)
"""

from hypergrad import _installation  # noqa: F401, I001  first: it names a foreign package of the same name

from hypergrad import bijectors, diagnostics, integrations, noise, optimizers, penalties, priors, residuals, responses
from hypergrad import inner_solvers, methods, solvers, stores
from hypergrad.bijectors import Bijector, constrain, unconstrain
from hypergrad.data import FreshBatches, IndexedBatch
from hypergrad.folds import cross_validation
from hypergrad.drivers import (
    BilevelState,
    BilevelTransformation,
    Guard,
    History,
    HypergradInfo,
    MemoryPlan,
    MetagradientInfo,
    MetagradientPlan,
    MetagradientStatus,
    MinimizeResult,
    MinimizeStatus,
    SkipReason,
    best_response,
    bilevel,
    guard,
    hypergrad,
    metagradient,
    metagradient_plan,
    minimize,
    plan,
    value_and_hypergrad,
)
from hypergrad.estimators import (
    Estimate,
    Estimator,
    EvolutionInfo,
    FirstOrderInfo,
    ForwardInfo,
    UnrollMode,
    centered_ranks,
    direct,
    evolution,
    first_order,
    forward,
    implicit,
    partition,
    reverse,
    sama,
    unrolled,
)
from hypergrad.problem import (
    BilevelParams,
    BilevelProblem,
    OverfittingWarning,
    microbatched,
    reparameterize,
    with_prior,
    with_residual,
)
from hypergrad.solvers import LinearSolver, LinearSystem, SolveInfo, preconditioners
from hypergrad.training import Context, Keys, Trained, inner_loss_fn, outer_loss_fn, train

__version__ = "0.1.0"

__all__ = [
    # the problem
    "BilevelParams",
    "BilevelProblem",
    "FreshBatches",
    "IndexedBatch",
    "OverfittingWarning",
    "cross_validation",
    "microbatched",
    "priors",
    "reparameterize",
    "residuals",
    "with_prior",
    "with_residual",
    # constrained hyperparameters
    "Bijector",
    "bijectors",
    "constrain",
    "noise",
    "penalties",
    "unconstrain",
    # estimators, with what they are made of
    "EvolutionInfo",
    "FirstOrderInfo",
    "ForwardInfo",
    "UnrollMode",
    "centered_ranks",
    "direct",
    "evolution",
    "first_order",
    "forward",
    "implicit",
    "optimizers",
    "partition",
    "preconditioners",
    "responses",
    "reverse",
    "sama",
    "solvers",
    "unrolled",
    # drivers
    "BilevelState",
    "BilevelTransformation",
    "Guard",
    "History",
    "HypergradInfo",
    "MemoryPlan",
    "MetagradientInfo",
    "MetagradientPlan",
    "MetagradientStatus",
    "MinimizeResult",
    "MinimizeStatus",
    "SkipReason",
    "best_response",
    "bilevel",
    "guard",
    "hypergrad",
    "inner_solvers",
    "integrations",
    "metagradient",
    "metagradient_plan",
    "methods",
    "minimize",
    "plan",
    "stores",
    "value_and_hypergrad",
    # whether to trust the result
    "diagnostics",
    # writing an estimator or a solver
    "Context",
    "Estimate",
    "Estimator",
    "Keys",
    "LinearSolver",
    "LinearSystem",
    "SolveInfo",
    "Trained",
    "inner_loss_fn",
    "outer_loss_fn",
    "train",
]
