"""Is an optimizer's update differentiable where a gradient is exactly zero?

    u = −α m̂ / (√v̂ + ε):   ∂√v̂/∂g = g/√v̂  →  0/0  at g = 0

A dead unit has gradients that are exactly zero, and one NaN there spreads to the whole hypergradient. Adam-like
optimizers have ``eps_root`` for it: √(v̂ + ε_root) is smooth. The window's first steps are tried while tracing, on
weights shrunk to two entries an axis of which half have a zero gradient, some of them zero themselves; what is finite
there, with a derivative that is not, is refused.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from hypergrad import dataflow, tree, validate
from hypergrad.types import Hyperparams, Params, PyTree

MakeOptimizer = Callable[[Hyperparams], optax.GradientTransformationExtraArgs]

_MOST_STEPS = 16  # radam begins to rectify at the sixth; gathered gradients are applied every few
_ANYWHERE = 0.37  # a value that rates, momenta and decays may have; the true ones may be traced


def check_differentiable(
    make: MakeOptimizer, params: Params, hyperparams: Hyperparams, *, steps: int, reverse: bool
) -> None:
    """Refuse an optimizer whose update has no finite derivative at a zero gradient, or none in reverse mode.

    Args:
      make: ``make(hyperparams) -> optimizer``.
      params: weights, of which structure, shapes and dtypes are used.
      hyperparams: likewise.
      steps: of the window; the first 16 are tried.
      reverse: the mode that will differentiate the update.

    Raises:
      ValueError: says what to set. An optimizer that cannot be tried (it closes over traced values) passes.
      TypeError: an optimizer that wants keywords which a window does not have.
    """
    for axis in (2, None):  # all of it where it does not fit what is shrunk, say a mask of full size
        with jax.ensure_compile_time_eval():  # not even constants may be staged out
            weights, anywhere = (
                jax.tree.map(lambda x, axis=axis: jnp.full(_shrunk(x, axis), _ANYWHERE, jnp.result_type(x)), part)
                for part in (params, hyperparams)
            )
            if not _can_be_tried(make, anywhere, weights):
                continue
            dead, alive = (_gradients(weights, min(steps, _MOST_STEPS), dead=dead) for dead in (True, False))
            verdict = _verdict(make, anywhere, _with_zeros(weights), dead, reverse=reverse)
            at_zero_alone = verdict is False and _verdict(make, anywhere, weights, alive, reverse=reverse) is True
        if isinstance(verdict, Exception):
            fix = "Choose another optimizer, or differentiate forward: mode=hg.forward()."
            wanted = "an inner optimizer that reverse-mode differentiation passes"
            raise ValueError(validate.message(wanted, f"one that raises: {str(verdict)[:200]}", fix)) from verdict
        if verdict is False and at_zero_alone:
            wanted = "an inner optimizer whose update has a finite derivative where a gradient is exactly zero"
            fix = (
                "One dead unit would make the hypergradient NaN. Set eps_root, e.g. optax.adam(rate, eps_root=1e-8), "
                "where the optimizer has it; else choose another, e.g. optax.sgd, rmsprop, adabelief or yogi."
            )
            raise ValueError(validate.message(wanted, "NaN or infinity: a square root at zero", fix))
        if verdict is False:
            wanted = "an inner optimizer whose first updates have a finite derivative"
            other = "forward" if reverse else "reverse"
            fix = (
                f"Set eps_root=1e-8 where it has it and try mode=hg.{other}(), or choose e.g. optax.sgd, rmsprop, yogi."
            )
            raise ValueError(validate.message(wanted, "NaN or infinity, whatever the gradients", fix))
        return


def _shrunk(leaf: Any, axis: int | None) -> tuple[int, ...]:
    shape = jnp.shape(leaf)
    return shape if axis is None else tuple(min(n, axis) for n in shape)


def _can_be_tried(make: MakeOptimizer, hyperparams: Hyperparams, weights: Params) -> bool:
    try:
        grads = _gradients(weights, 1, dead=False)
        jaxpr = jax.make_jaxpr(lambda g: _tried(make, hyperparams, weights, g))(grads).jaxpr
    except TypeError as error:
        if "required keyword" in str(error):
            wanted = "an inner optimizer that updates weights from gradients, state and params alone"
            fix = "Inside a window there is no line search and no loss value for it: choose one without."
            raise TypeError(validate.message(wanted, f"one that raises: {error}", fix)) from error
        return False
    except Exception:  # what is wrong with the optimizer itself shows in the real run
        return False
    if "stop_gradient" in dataflow.operations(jaxpr):
        wanted = "an inner optimizer whose updates are differentiable as a whole"
        fix = "Its derivative would not be that of its steps. For optax.lbfgs set scale_init_precond=False."
        raise ValueError(validate.message(wanted, "one with a stop_gradient in them", fix))
    return True


def _verdict(make: MakeOptimizer, hyperparams: Hyperparams, weights: Params, grads: PyTree, *, reverse: bool) -> Any:
    """Return whether derivatives of a try are finite, or the error; True where the try itself is not finite."""
    fn = lambda h, g: _tried(make, h, weights, g)  # noqa: E731
    try:
        if reverse:
            value, derivatives = jax.jit(jax.value_and_grad(fn, argnums=(0, 1)))(hyperparams, grads)
        else:
            ones = jax.tree.map(jnp.ones_like, (hyperparams, grads))
            value, derivatives = jax.jit(lambda h, g: jax.jvp(fn, (h, g), ones))(hyperparams, grads)
    except ValueError as error:
        return error
    sound = tree.all_finite(derivatives) | ~jnp.isfinite(value)
    return isinstance(sound, jax.core.Tracer) or bool(sound)  # traced: the optimizer closes over what is not known yet


def _tried(make: MakeOptimizer, hyperparams: Hyperparams, params: Params, grads: PyTree) -> Any:
    """Return the sum of the weights that one step a gradient reaches."""
    optimizer = make(hyperparams)

    def step(at: tuple[Params, PyTree], grads: Params) -> tuple[tuple[Params, PyTree], None]:
        params, state = at
        updates, new_state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), tree.match_dtypes(new_state, state)), None

    start = params, tree.strip_weak_types(optimizer.init(params))
    (reached, _), _ = lax.scan(step, start, grads)
    return tree.total([jnp.sum(leaf) for leaf in jax.tree.leaves(reached)])


def _with_zeros(weights: Params) -> Params:
    """Return weights with every second leaf zero, as biases begin."""
    leaves, structure = jax.tree.flatten(weights)
    return jax.tree.unflatten(structure, [jnp.zeros_like(x) if i % 2 else x for i, x in enumerate(leaves)])


def _gradients(weights: Params, steps: int, *, dead: bool) -> PyTree:
    """Return a gradient a step, of changing size; where dead, zero in the first half of each axis, as of dead units.

    Leaves of one entry have nothing beside it that lives: they are zero only where all leaves are so.
    """
    all_single = all(leaf.size == 1 for leaf in jax.tree.leaves(weights))

    def gradient(leaf: Any) -> Any:
        size = jnp.cos(jnp.arange(1.0, steps + 1.0)).reshape(steps, *[1] * leaf.ndim).astype(leaf.dtype)
        full = size * jnp.ones_like(leaf)
        if not dead or (leaf.size == 1 and not all_single):
            return full
        if leaf.size == 1:
            return jnp.zeros_like(full)
        for axis, width in enumerate(leaf.shape):
            unit = jnp.arange(width).reshape([width if i == axis else 1 for i in range(leaf.ndim)])
            full = jnp.where(unit < width // 2, jnp.zeros_like(full), full)
        return full

    return jax.tree.map(gradient, weights)


def untrained_leaves(optimizer, params):
    return jax.tree.map(lambda _: False, params)


def decays_weights(optimizer, params):
    return False
