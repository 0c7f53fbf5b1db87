"""A user's script for the type checkers: losses of four arguments, the state and its info, a new estimator."""

from typing import assert_type

import jax
import jax.numpy as jnp
import optax

import hypergrad as hg


def train_loss(params: jax.Array, decay: jax.Array, batch: jax.Array, key: jax.Array | None) -> jax.Array:
    """Four arguments, as every loss has."""
    return jnp.mean((batch @ params - 1.0) ** 2) + hg.penalties.l2(params, decay)


def valid_loss(params: jax.Array, decay: jax.Array, batch: jax.Array, key: jax.Array | None) -> jax.Array:
    """The same without the penalty."""
    return jnp.mean((batch @ params - 1.0) ** 2)


problem = hg.reparameterize(hg.BilevelProblem(train_loss, valid_loss), hg.bijectors.exp())
tx = hg.bilevel(
    hg.implicit(problem, hg.solvers.cg(5)),
    inner_optimizer=optax.adam(1e-3),
    outer_optimizer=optax.adam(1e-2),
    every=10,
    guard=hg.guard(max_residual=3.0),
)
variables = hg.BilevelParams(jnp.zeros(3), jnp.zeros(3))
state = tx.init(variables)
assert_type(state, hg.BilevelState)
updates, state = tx.update(None, state, variables, inner_batch=jnp.eye(3), outer_batch=jnp.eye(3))
assert_type(updates, hg.BilevelParams)
assert_type(state.info, hg.HypergradInfo)
assert_type(state.info.skipped, jax.Array)
assert_type(state.step, jax.Array)

(value, gradient), info = hg.value_and_hypergrad(hg.implicit(problem, hg.solvers.cg(5)))(
    variables.params, variables.hyperparams, jnp.eye(3), jnp.eye(3), key=None
)
assert_type(value, jax.Array)
assert_type(info, hg.HypergradInfo)


def estimate(state: None, ctx: hg.Context) -> hg.Estimate:
    """An estimator of one's own: the direct derivative alone."""
    outer = hg.outer_loss_fn(ctx)
    value, slope = jax.value_and_grad(lambda h: outer(ctx.at.params, h)[0])(ctx.hyperparams)
    return hg.Estimate(value, slope, state, ())


own: hg.Estimator = hg.Estimator(problem, lambda ctx: (None, ()), estimate)
