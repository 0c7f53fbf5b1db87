"""A fully first-order penalty method: a second copy of the weights trains on L_in + L_out/σ on every call.

    dL_out/dλ ≈ ∂_λ L_out(w_σ) + σ [∂_λ L_in(w_σ) − ∂_λ L_in(w)],      w_σ ≈ argmin L_in + L_out/σ,   error O(1/σ)

Reference: Kwon et al., A fully first-order method for stochastic bilevel optimization, arXiv 2301.10945.
"""

from typing import Any

import jax
import jax.numpy as jnp

import hypergrad as hg


def penalty(problem: hg.BilevelProblem, *, sigma: float) -> hg.Estimator:
    """Estimate from two copies of the weights, without second derivatives."""

    def init(ctx: hg.Context) -> tuple[Any, Any]:
        copy = ctx.start._replace(inner_loss=jnp.zeros(()))
        return jax.tree.map(jnp.copy, copy), ()

    def advance(copy: hg.Trained, ctx: hg.Context) -> hg.Trained:
        if ctx.outer_batch is None:
            raise ValueError("penalty trains its second copy on the outer batch: pass outer_batch on every call")

        outer = hg.outer_loss_fn(ctx)

        def loss(w: Any, h: Any, batch: Any, key: Any, model_state: Any) -> tuple[jax.Array, Any]:
            return ctx.problem.inner_loss(w, h, batch, key) + outer(w, h)[0] / sigma, model_state

        return hg.train(ctx, start=copy, loss=loss)

    def estimate(copy: hg.Trained, ctx: hg.Context) -> hg.Estimate:
        inner, outer = hg.inner_loss_fn(ctx), hg.outer_loss_fn(ctx)

        def gap(h: Any) -> jax.Array:
            return outer(copy.params, h)[0] + sigma * (inner(copy.params, h) - inner(ctx.at.params, h))

        value, aux = outer(ctx.at.params, ctx.hyperparams)
        return hg.Estimate(value, jax.grad(gap)(ctx.hyperparams), copy, (), aux)

    return hg.Estimator(problem, init, estimate, advance=advance)
