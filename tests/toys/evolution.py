"""Evolution strategies over inner training, antithetic, with particles that persist between outer steps.

    ξ_i ← ξ_i + ε_i,  ε_i ~ N(0, σ²I):      dL_out/dλ ≈ 1/N Σ_i ξ_i [L_out(w_i⁺) − L_out(w_i⁻)] / 2σ²

w_i⁺ and w_i⁻ train at λ + ε_i and λ − ε_i with the same batches and keys. Reference: Vicol et al., arXiv 2112.13835.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import hypergrad as hg


class Particles(NamedTuple):
    """What persists between calls."""

    at: hg.Trained  # leaves (2, N, ...): where the pairs stand
    summed: Any  # leaves (N, ...): ξ


class EvolutionInfo(NamedTuple):
    """Diagnostics."""

    standard_error: jax.Array  # of the hypergradient, in Euclidean norm


def evolution(problem: hg.BilevelProblem, *, sigma: float, num_pairs: int) -> hg.Estimator:
    """Estimate by N antithetic pairs of particles."""

    def draw(ctx: hg.Context) -> Any:
        leaves, structure = jax.tree.flatten(ctx.hyperparams)
        keys = jax.random.split(ctx.keys.advance, len(leaves))
        noise = [
            sigma * jax.random.normal(k, (num_pairs, *x.shape), x.dtype) for k, x in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, noise)

    def signed(ctx: hg.Context, noise: Any) -> Any:
        return jax.tree.map(lambda x, e: jnp.stack([x + e, x - e]), ctx.hyperparams, noise)

    def init(ctx: hg.Context) -> tuple[Any, Any]:
        start = ctx.start._replace(inner_loss=jnp.zeros(()))
        at = jax.tree.map(lambda x: jnp.broadcast_to(x, (2, num_pairs, *jnp.shape(x))), start)
        zeros = jax.tree.map(lambda x: jnp.zeros((num_pairs, *x.shape), x.dtype), ctx.hyperparams)
        return Particles(at, zeros), EvolutionInfo(jnp.zeros(()))

    def advance(state: Particles, ctx: hg.Context) -> Particles:
        noise = draw(ctx)
        run = jax.vmap(jax.vmap(lambda at, h: hg.train(ctx, start=at, hyperparams=h)))
        return Particles(run(state.at, signed(ctx, noise)), jax.tree.map(jnp.add, state.summed, noise))

    def estimate(state: Particles, ctx: hg.Context) -> hg.Estimate:
        def loss(at: hg.Trained, h: Any) -> jax.Array:
            return hg.outer_loss_fn(ctx._replace(at=at))(at.params, h)[0]

        value, aux = hg.outer_loss_fn(ctx)(ctx.at.params, ctx.hyperparams)
        up, down = jax.vmap(jax.vmap(loss))(state.at, signed(ctx, draw(ctx)))
        slope = (up - down) / (2 * sigma**2)
        each = jax.tree.map(lambda xi: jax.vmap(jnp.multiply)(xi, slope), state.summed)
        spread = sum(jnp.sum(jnp.var(g, 0)) for g in jax.tree.leaves(each))
        grad = jax.tree.map(lambda g: g.mean(0), each)
        return hg.Estimate(value, grad, state, EvolutionInfo(jnp.sqrt(spread / num_pairs)), aux)

    return hg.Estimator(problem, init, estimate, advance=advance)
