"""The same hypergradients in plain JAX, as one would write them without a library: the yardstick.

    v = ∂L_out/∂w;   q ≈ H⁻¹ v;   dL_out/dλ = −(∂²L_in/∂w∂λ)ᵀ q

``jax.jit``, ``lax.scan`` and products by reverse over forward (``hessian_modes.py`` compares the ways), a
fixed number of products, and nothing else: no residual, no check for divergence, no refusal, no scaling.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from networks import Network, Tree

Step = Callable[..., Any]


def inner_loss(network: Network) -> Callable[[Tree, Tree, Tree], jax.Array]:
    """Return ``(params, log_decays, batch) -> cross-entropy + ½ Σ exp(λᵢ) wᵢ²``."""

    def loss(params: Tree, log_decays: Tree, batch: Tree) -> jax.Array:
        terms = jax.tree.map(lambda w, d: 0.5 * jnp.sum(jnp.exp(d) * w * w), params, log_decays)
        return network.cross_entropy(params, batch) + sum(jax.tree.leaves(terms))

    return loss


def stiffness(network: Network) -> float:
    """Return an estimate of the Hessian's largest eigenvalue at the initial weights, by 30 power iterations."""
    loss = inner_loss(network)

    @jax.jit
    def estimate(params: Tree, log_decays: Tree, batch: Tree) -> jax.Array:
        _, pull_back = jax.vjp(lambda w: jax.grad(loss)(w, log_decays, batch), params)
        direction = jax.grad(network.cross_entropy)(params, network.outer_batch)
        turn = lambda _, v: pull_back(_scaled(1 / _norm(v), v))[0]  # noqa: E731
        return _norm(lax.fori_loop(0, 30, turn, direction))

    return float(estimate(network.params, network.log_decays, network.inner_batch))


def neumann(network: Network, num_terms: int, step_size: float, unroll: int | bool) -> Step:
    """Return ``(params, log_decays, inner_batch, outer_batch) -> (value, hypergradient)`` by K Neumann terms."""

    def solve(product: Step, b: Tree) -> Tree:
        return _series(product, b, step_size, num_terms, unroll)

    return _hypergradient(network, solve)


def neumann_warm(network: Network, num_terms: int, unroll: int | bool) -> Step:
    """Return the same with two power iterations for the step: takes and returns a direction as well."""
    loss = inner_loss(network)

    def fn(params: Tree, log_decays: Tree, direction: Tree, inner_batch: Tree, outer_batch: Tree) -> Any:
        kept = []

        def solve(product: Step, b: Tree) -> Tree:
            def power(direction: Tree, _: None) -> tuple[Tree, jax.Array]:
                image = product(direction)
                return _scaled(1 / _norm(image), image), _norm(image)

            new_direction, tops = lax.scan(power, direction, length=2, unroll=unroll)
            kept.append(new_direction)
            return _series(product, b, 1 / tops[-1], num_terms, unroll)

        value, gradient = _implicit(network, loss, solve, params, log_decays, inner_batch, outer_batch)
        return value, gradient, kept[0]

    return fn


def cg(network: Network, num_steps: int, unroll: int | bool) -> Step:
    """Return ``(params, log_decays, inner_batch, outer_batch) -> (value, hypergradient)`` by conjugate gradients."""

    def solve(product: Step, b: Tree) -> Tree:
        def step(carry: Any, _: None) -> tuple[Any, None]:
            x, r, p, rr = carry
            image = product(p)
            length = rr / _dot(p, image)
            x, r = _axpy(length, p, x), _axpy(-length, image, r)
            new = _dot(r, r)
            return (x, r, _axpy(new / rr, p, r), new), None

        start = (jax.tree.map(jnp.zeros_like, b), b, b, _dot(b, b))
        return lax.scan(step, start, length=num_steps, unroll=unroll)[0][0]

    return _hypergradient(network, solve)


def warm_cg(network: Network, num_products: int, ratio: float) -> Step:
    """Return ``(params, log_decays, state, inner_batch, outer_batch) -> (value, hypergradient, state)``.

    By warm, relatively damped conjugate gradients. ``state`` is the last solution over the norm of its right-hand side,
    and the largest curvature seen.
    """
    loss = inner_loss(network)

    def fn(params: Tree, log_decays: Tree, state: Tree, inner_batch: Tree, outer_batch: Tree) -> Any:
        kept = []

        def solve(product: Step, b: Tree) -> Tree:
            last, top = state
            size = _norm(b)
            damping = ratio * top

            def step(count: jax.Array, carry: Any) -> Any:
                x, r, p, rr, seen = carry
                image = product(p)
                curvature, pp = _dot(p, image), _dot(p, p)
                image, curvature = _axpy(damping, p, image), curvature + damping * pp
                length = jnp.where((count == 0) & (top > 0), 1.0, rr / curvature)
                left = _axpy(-length, image, r)
                square = _dot(left, left)
                bad = (count == 0) & ~(square < 9 * rr) | ~(curvature > 0.1 * damping * pp)
                length, square = jnp.where(bad, 0.0, length), jnp.where(bad, rr, square)
                x, r = _axpy(length, p, x), _axpy(-length, image, r)
                turn = jnp.where((count == 0) & (top > 0), 0.0, square / rr)
                return x, r, _axpy(turn, p, r), square, jnp.maximum(seen, jnp.abs(curvature / pp - damping))

            first = jax.tree.map(lambda q, v: jnp.where(top > 0, size * q, v), last, b)
            start = jax.tree.map(jnp.zeros_like, b), b, first, size * size, 0.9 * top
            x, *_, seen = lax.fori_loop(0, num_products, step, start)
            kept.append((_scaled(1 / size, x), seen))
            return x

        value, gradient = _implicit(network, loss, solve, params, log_decays, inner_batch, outer_batch)
        return value, gradient, kept[0]

    return fn


def plain_step(network: Network, optimizer: optax.GradientTransformation) -> Step:
    """Return ``(params, state, log_decays, batch) -> (params, state)``: one training step at fixed decays."""
    loss = inner_loss(network)

    def step(params: Tree, state: Tree, log_decays: Tree, batch: Tree) -> tuple[Tree, Tree]:
        updates, state = optimizer.update(jax.grad(loss)(params, log_decays, batch), state, params)
        return optax.apply_updates(params, updates), state

    return step


def joint_step(
    network: Network,
    inner: optax.GradientTransformation,
    outer: optax.GradientTransformation,
    hypergradient: Step,
    every: int,
) -> Step:
    """Return ``(variables, state, inner_batch, outer_batch) -> (variables, state)``, an outer step every so often.

    ``variables`` is (params, log_decays), ``state`` (inner state, outer state, count).
    """
    plain = plain_step(network, inner)

    def step(variables: Tree, state: Tree, inner_batch: Tree, outer_batch: Tree) -> tuple[Tree, Tree]:
        (params, log_decays), (inner_state, outer_state, count) = variables, state
        params, inner_state = plain(params, inner_state, log_decays, inner_batch)
        count = count + 1

        def learn(log_decays: Tree, outer_state: Tree) -> tuple[Tree, Tree]:
            return _outer_step(outer, hypergradient, params, log_decays, outer_state, inner_batch, outer_batch)

        log_decays, outer_state = lax.cond(
            count % every == 0, learn, lambda *unchanged: unchanged, log_decays, outer_state
        )
        return (params, log_decays), (inner_state, outer_state, count)

    return step


def warm_joint_step(
    network: Network,
    inner: optax.GradientTransformation,
    outer: optax.GradientTransformation,
    hypergradient: Step,
    every: int,
) -> Step:
    """Return the joint step of a solver that keeps a state, which joins the optimizers' states."""
    plain = plain_step(network, inner)

    def step(variables: Tree, state: Tree, inner_batch: Tree, outer_batch: Tree) -> tuple[Tree, Tree]:
        (params, log_decays), (inner_state, outer_state, count, solver_state) = variables, state
        params, inner_state = plain(params, inner_state, log_decays, inner_batch)
        count = count + 1

        def learn(log_decays: Tree, outer_state: Tree, solver_state: Tree) -> tuple[Tree, Tree, Tree]:
            _, gradient, solver_state = hypergradient(params, log_decays, solver_state, inner_batch, outer_batch)
            updates, outer_state = outer.update(gradient, outer_state, log_decays)
            return optax.apply_updates(log_decays, updates), outer_state, solver_state

        log_decays, outer_state, solver_state = lax.cond(
            count % every == 0, learn, lambda *unchanged: unchanged, log_decays, outer_state, solver_state
        )
        return (params, log_decays), (inner_state, outer_state, count, solver_state)

    return step


def joint_window(
    network: Network, inner: optax.GradientTransformation, outer: optax.GradientTransformation, hypergradient: Step
) -> Step:
    """Return ``(variables, state, window, outer_batch) -> (variables, state)``: a scan of steps, then an outer one."""
    plain = plain_step(network, inner)

    def step(variables: Tree, state: Tree, window: Tree, outer_batch: Tree) -> tuple[Tree, Tree]:
        (params, log_decays), (inner_state, outer_state, count) = variables, state

        def train(carry: Tree, batch: Tree) -> tuple[Tree, None]:
            return plain(*carry, log_decays, batch), None

        (params, inner_state), _ = lax.scan(train, (params, inner_state), window)
        last = jax.tree.map(lambda x: x[-1], window)
        log_decays, outer_state = _outer_step(outer, hypergradient, params, log_decays, outer_state, last, outer_batch)
        return (params, log_decays), (inner_state, outer_state, count + 1)

    return step


def _outer_step(
    outer: optax.GradientTransformation,
    hypergradient: Step,
    params: Tree,
    log_decays: Tree,
    state: Tree,
    inner_batch: Tree,
    outer_batch: Tree,
) -> tuple[Tree, Tree]:
    _, gradient = hypergradient(params, log_decays, inner_batch, outer_batch)
    updates, state = outer.update(gradient, state, log_decays)
    return optax.apply_updates(log_decays, updates), state


def _hypergradient(network: Network, solve: Callable[[Step, Tree], Tree]) -> Step:
    loss = inner_loss(network)

    def fn(params: Tree, log_decays: Tree, inner_batch: Tree, outer_batch: Tree) -> tuple[jax.Array, Tree]:
        return _implicit(network, loss, solve, params, log_decays, inner_batch, outer_batch)

    return fn


def _implicit(
    network: Network,
    loss: Step,
    solve: Callable[[Step, Tree], Tree],
    params: Tree,
    log_decays: Tree,
    inner_batch: Tree,
    outer_batch: Tree,
) -> tuple[jax.Array, Tree]:
    value, slope = jax.value_and_grad(network.cross_entropy)(params, outer_batch)

    def along(w: Tree, d: Tree, v: Tree) -> jax.Array:
        return jax.jvp(lambda w: loss(w, d, inner_batch), (w,), (v,))[1]

    solution = solve(lambda v: jax.grad(along)(params, log_decays, v), slope)
    mixed = jax.grad(along, argnums=1)(params, log_decays, solution)
    return value, jax.tree.map(jnp.negative, mixed)


def _series(product: Step, b: Tree, step_size: Any, num_terms: int, unroll: int | bool) -> Tree:
    def step(carry: Any, _: None) -> tuple[Any, None]:
        term, total = carry
        return (_axpy(-step_size, product(term), term), _axpy(step_size, term, total)), None

    start = (b, jax.tree.map(jnp.zeros_like, b))
    return lax.scan(step, start, length=num_terms, unroll=unroll)[0][1]


def _axpy(a: Any, x: Tree, y: Tree) -> Tree:
    return jax.tree.map(lambda p, q: a * p + q, x, y)


def _scaled(a: Any, x: Tree) -> Tree:
    return jax.tree.map(lambda p: a * p, x)


def _dot(x: Tree, y: Tree) -> jax.Array:
    return jnp.asarray(sum(jax.tree.leaves(jax.tree.map(lambda p, q: jnp.sum(p * q), x, y))))


def _norm(x: Tree) -> jax.Array:
    return jnp.sqrt(_dot(x, x))
