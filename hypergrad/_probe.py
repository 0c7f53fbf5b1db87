"""Is an optimizer's update differentiable where a gradient is exactly zero?

    u = −α m̂ / (√v̂ + ε):   ∂√v̂/∂g = g/√v̂  →  0/0  at g = 0

A dead unit has gradients that are exactly zero, and one NaN there spreads to the whole hypergradient. Adam-like
optimizers have ``eps_root`` for it: √(v̂ + ε_root) is smooth. The update is tried while tracing on a few numbers (on
zeros shaped like the weights where the optimizer wants their tree), once with zero gradients and once without: what
fails at zero alone is refused.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hypergrad import _checks, _tree
from hypergrad._types import Hyperparams, Params, PyTree

MakeOptimizer = Callable[[Hyperparams], optax.GradientTransformationExtraArgs]

_STEPS = 2
_ANYWHERE = 0.5  # a value that rates, momenta and decays may have; the true ones may be traced


def check_differentiable(make: MakeOptimizer, params: Params, hyperparams: Hyperparams, *, reverse: bool) -> None:
    """Refuse an optimizer whose update has no finite derivative at a zero gradient, or none in reverse mode.

    Args:
      make: ``make(hyperparams) -> optimizer``.
      params: weights, of which structure, shapes and dtypes are used.
      hyperparams: likewise.
      reverse: the mode that will differentiate the update.

    Raises:
      ValueError: says what to set. An optimizer that cannot be tried (it closes over traced values) passes.
    """
    anywhere = jax.tree.map(lambda x: jnp.full(jnp.shape(x), _ANYWHERE, jnp.result_type(x)), hyperparams)
    for weights in (_few(), params):
        with jax.ensure_compile_time_eval():
            if not _can_be_tried(make, anywhere, weights):
                continue
            verdict = _verdict(make, anywhere, weights, dead=True, reverse=reverse)
            smooth = verdict is False and _verdict(make, anywhere, weights, dead=False, reverse=reverse) is True
        if isinstance(verdict, Exception):
            fix = "Choose another optimizer, or differentiate forward: mode=hg.forward()."
            wanted = "an inner optimizer that reverse-mode differentiation passes"
            raise ValueError(_checks.message(wanted, f"one that raises: {str(verdict)[:200]}", fix)) from verdict
        if smooth:  # so it is the zero that it fails at
            wanted = "an inner optimizer whose update has a finite derivative where a gradient is exactly zero"
            fix = (
                "One dead unit would make the hypergradient NaN. Set eps_root, e.g. optax.adam(rate, eps_root=1e-8), "
                "where the optimizer has it; else choose another, e.g. optax.sgd, rmsprop, adabelief or yogi."
            )
            raise ValueError(_checks.message(wanted, "NaN or infinity: a square root at zero", fix))
        return


def _few() -> Params:
    return {"first": jnp.ones(2), "second": jnp.ones(2)}


def _can_be_tried(make: MakeOptimizer, hyperparams: Hyperparams, weights: Params) -> bool:
    try:
        jax.eval_shape(lambda w: _tried(make, hyperparams, w, w), weights)
    except TypeError as error:
        if "required keyword" in str(error):
            wanted = "an inner optimizer that updates weights from gradients, state and params alone"
            fix = "Inside a window there is no line search and no loss value for it: choose one without."
            raise TypeError(_checks.message(wanted, f"one that raises: {error}", fix)) from error
        return False
    except Exception:  # a tree of rates that does not fit two leaves, say: what is wrong for all shows in the real run
        return False
    return True


def _verdict(make: MakeOptimizer, hyperparams: Hyperparams, weights: Params, *, dead: bool, reverse: bool) -> Any:
    """Return whether all derivatives of a try are finite (True where they cannot be had), or the error."""
    leaves, structure = jax.tree.flatten(weights)
    grads = jax.tree.unflatten(structure, [_gradient(x, dead=dead and i % 2 == 0) for i, x in enumerate(leaves)])
    params = jax.tree.map(lambda x: jnp.full(jnp.shape(x), _ANYWHERE, jnp.result_type(x)), weights)
    fn = lambda h, g: _tried(make, h, params, g)  # noqa: E731
    try:
        if reverse:
            derivatives = jax.jit(jax.grad(fn, argnums=(0, 1)))(hyperparams, grads)
        else:
            ones = jax.tree.map(jnp.ones_like, (hyperparams, grads))
            derivatives = jax.jit(lambda h, g: jax.jvp(fn, (h, g), ones)[1])(hyperparams, grads)
        return bool(_tree.all_finite(derivatives))
    except jax.errors.JAXTypeError:
        return True
    except ValueError as error:
        return error


def _tried(make: MakeOptimizer, hyperparams: Hyperparams, params: Params, grads: PyTree) -> Any:
    """Return the sum of the updates of a few steps on the same gradient."""
    optimizer = make(hyperparams)
    state, total = optimizer.init(params), jnp.zeros(())
    for _ in range(_STEPS):
        updates, state = optimizer.update(grads, state, params)
        total = total + sum(jnp.sum(u).astype(total.dtype) for u in jax.tree.leaves(updates))
    return total


def _gradient(leaf: Any, *, dead: bool) -> Any:
    """Return a gradient for a leaf: its first half zero where dead (all of it, where the leaf is small)."""
    ones = jnp.ones(jnp.shape(leaf), jnp.result_type(leaf))
    if not dead:
        return ones
    zero = jnp.arange(ones.size).reshape(ones.shape) < ones.size // 2
    return jnp.where(zero, jnp.zeros_like(ones), ones) if ones.size > 4 else jnp.zeros_like(ones)
