"""Weights sampled by Langevin dynamics, and the derivative of a mean over them as a covariance.

    w ~ exp(−L_in(w, λ)/T):      d E[L_out]/dλ = E[∂_λ L_out] − Cov(L_out, ∂_λ L_in)/T

The chains move on every call; w ← w − η ∇_w L_in + √(2ηT) z. Reference: Marion et al., Implicit diffusion,
arXiv 2402.05468.
"""

from typing import Any

import jax
import jax.numpy as jnp

import hypergrad as hg


def langevin(
    problem: hg.BilevelProblem, *, num_chains: int, step_size: float, temperature: float = 1.0
) -> hg.Estimator:
    """Estimate from N chains, which start at the weights."""

    def init(ctx: hg.Context) -> tuple[Any, Any]:
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (num_chains, *x.shape)), ctx.start.params), ()

    def advance(chains: Any, ctx: hg.Context) -> Any:
        loss = hg.inner_loss_fn(ctx)
        scale = (2 * step_size * temperature) ** 0.5

        def move(w: Any, key: Any) -> Any:
            leaves, structure = jax.tree.flatten(w)
            keys = jax.random.split(key, len(leaves))
            slopes = jax.tree.leaves(jax.grad(loss)(w, ctx.hyperparams))
            noise = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
            moved = [x - step_size * g + scale * z for x, g, z in zip(leaves, slopes, noise, strict=True)]
            good = jnp.all(jnp.array([jnp.isfinite(x).all() for x in moved]))
            return jax.tree.unflatten(structure, [jnp.where(good, a, b) for a, b in zip(moved, leaves, strict=True)])

        return jax.vmap(move)(chains, jax.random.split(ctx.keys.advance, num_chains))

    def estimate(chains: Any, ctx: hg.Context) -> hg.Estimate:
        inner, outer = hg.inner_loss_fn(ctx), hg.outer_loss_fn(ctx)
        values = jax.vmap(lambda w: outer(w, ctx.hyperparams)[0])(chains)
        weights = (values - values.mean()) * num_chains / ((num_chains - 1) * temperature)

        def mean(h: Any) -> jax.Array:
            return jnp.mean(jax.vmap(lambda w, c: outer(w, h)[0] - c * inner(w, h))(chains, weights))

        return hg.Estimate(values.mean(), jax.grad(mean)(ctx.hyperparams), chains, ())

    return hg.Estimator(problem, init, estimate, advance=advance)
