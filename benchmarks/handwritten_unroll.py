"""Hypergradients through K training steps in plain JAX, as one would write them without a library: the yardstick.

    w_{i+1} = w_i + optimizer(∇_w L_in(w_i, λ, batch_i))          dL_out(w_K)/dλ by ``jax.grad`` or ``jax.jvp``

``lax.scan`` and ``jax.checkpoint``, and nothing else: no refusal, no norm, no check for what is not finite.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from handwritten import Step, plain_step
from jax import lax
from networks import Network, Tree


def rollout(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    checkpoint_every: int | None = None,
    unroll: int | bool = 1,
) -> Step:
    """Return ``(params, state, log_decays, window) -> (params, state)``: a training step for every batch.

    Args:
      network: what to train.
      optimizer: by what.
      checkpoint_every: steps between checkpoints, which divides the window's length; 1 for one level, None for none.
      unroll: of the scan over steps.
    """
    plain = plain_step(network, optimizer)

    def run(params: Tree, state: Tree, log_decays: Tree, window: Tree) -> tuple[Tree, Tree]:
        def step(at: tuple[Tree, Tree], batch: Tree) -> tuple[Any, None]:
            return plain(*at, log_decays, batch), None

        def steps(at: tuple[Tree, Tree], batches: Tree) -> tuple[Any, None]:
            body = step if checkpoint_every is None else jax.checkpoint(step, prevent_cse=unroll != 1)
            return lax.scan(body, at, batches, unroll=unroll)

        if checkpoint_every in (None, 1):
            return steps((params, state), window)[0]
        stacked = jax.tree.map(lambda x: x.reshape(-1, checkpoint_every, *x.shape[1:]), window)
        return lax.scan(jax.checkpoint(steps, prevent_cse=False), (params, state), stacked)[0]

    return run


def reverse(network: Network, optimizer: optax.GradientTransformation, **how: Any) -> Step:
    """Return ``(params, log_decays, window, outer_batch) -> (value, hypergradient)``; ``how`` as for ``rollout``."""
    differentiate = _differentiated(network, optimizer, **how)

    def fn(params: Tree, log_decays: Tree, window: Tree, outer_batch: Tree) -> tuple[jax.Array, Tree]:
        (value, _), gradient = differentiate(params, optimizer.init(params), log_decays, window, outer_batch)
        return value, gradient

    return fn


def forward(network: Network, optimizer: optax.GradientTransformation, *, unroll: int | bool = 1) -> Step:
    """Return ``(params, log_decay, window, outer_batch) -> (value, hypergradient)`` for one decay of all weights."""
    run = rollout(network, optimizer, unroll=unroll)

    def fn(params: Tree, log_decay: jax.Array, window: Tree, outer_batch: Tree) -> tuple[jax.Array, jax.Array]:
        def outer(log_decay: jax.Array) -> jax.Array:
            log_decays = jax.tree.map(lambda _: log_decay, params)
            return network.cross_entropy(run(params, optimizer.init(params), log_decays, window)[0], outer_batch)

        return jax.jvp(outer, (log_decay,), (jnp.ones_like(log_decay),))

    return fn


def joint_window(
    network: Network,
    inner: optax.GradientTransformation,
    outer: optax.GradientTransformation,
    every: int,
    **how: Any,
) -> Step:
    """Return ``(variables, state, window, outer_batch) -> (variables, state)``: differentiated steps, an outer one.

    ``variables`` is (params, log_decays), ``state`` (inner state, outer state, count). Where no outer step is due
    the steps are taken without differentiation.
    """
    differentiate, run = _differentiated(network, inner, **how), rollout(network, inner)

    def step(variables: Tree, state: Tree, window: Tree, outer_batch: Tree) -> tuple[Tree, Tree]:
        (params, log_decays), (inner_state, outer_state, count) = variables, state
        count = count + 1

        def learn() -> Any:
            (_, reached), gradient = differentiate(params, inner_state, log_decays, window, outer_batch)
            updates, new_state = outer.update(gradient, outer_state, log_decays)
            return reached, optax.apply_updates(log_decays, updates), new_state

        def train() -> Any:
            return run(params, inner_state, log_decays, window), log_decays, outer_state

        reached, log_decays, outer_state = learn() if every == 1 else lax.cond(count % every == 0, learn, train)
        return (reached[0], log_decays), (reached[1], outer_state, count)

    return step


def _differentiated(network: Network, optimizer: optax.GradientTransformation, **how: Any) -> Callable[..., Any]:
    run = rollout(network, optimizer, **how)

    def fn(params: Tree, state: Tree, log_decays: Tree, window: Tree, outer_batch: Tree) -> Any:
        def outer(log_decays: Tree) -> tuple[jax.Array, Any]:
            reached = run(params, state, log_decays, window)
            return network.cross_entropy(reached[0], outer_batch), reached

        return jax.value_and_grad(outer, has_aux=True)(log_decays)

    return fn
