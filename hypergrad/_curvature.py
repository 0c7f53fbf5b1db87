"""Second derivatives of a scalar function as linear maps, never as matrices.

    hvp(f, w)           v ↦ (∂²f/∂w²) v                    symmetric
    mixed_vjp(f, w, λ)  q ↦ (∂²f/∂w∂λ)ᵀ q                  from weights to hyperparameters

Both are pull-backs of the gradient (``vjp`` of ``grad``). By the Hessian's symmetry the pull-back is the
product itself. Measured on CPU this mode is as fast as ``jvp(grad)`` and ``linearize`` on small networks and
about 1.5 times faster at 1.9 million weights (``benchmarks/hessian_modes.py``); it also passes models with
``custom_vjp`` operations, which reverse-over-forward does not. The choice of mode is made here alone.

Low-precision weights are widened to float32 first and cast back inside ``f``: the network computes in its
own precision, vectors and sums of the linear solve do not.

Reference: Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6(1), 1994.
"""

from collections.abc import Callable

import jax
import optax

from hypergrad import _tree
from hypergrad._types import Array, Hyperparams, MatVec, Params


def hvp(fn: Callable[[Params], Array], params: Params) -> MatVec:
    """Return v ↦ ∇²fn(params) v, on trees shaped like ``params`` in the promoted dtypes.

    Right where ``fn`` is twice differentiable at ``params``; at a kink (ReLU at 0) JAX's one-sided
    convention enters. Cost: about two gradients of ``fn`` a product.
    """
    _, pull_back = jax.vjp(jax.grad(_widened(fn, params)), _tree.promote(params))
    return lambda vector: pull_back(vector)[0]


def mixed_vjp(fn: Callable[[Params, Hyperparams], Array], params: Params, hyperparams: Hyperparams) -> MatVec:
    """Return q ↦ (∂²fn/∂params∂hyperparams)ᵀ q, from trees like ``params`` to trees like ``hyperparams``.

    Only the part of ∇_w fn that depends on the hyperparameters is differentiated: for a penalty such as
    ½ Σ λᵢ wᵢ² the compiled product is elementwise and the network is not run.
    """

    def gradient(h: Hyperparams) -> Params:
        return jax.grad(_widened(lambda w: fn(w, h), params))(_tree.promote(params))

    _, pull_back = jax.vjp(gradient, hyperparams)
    return lambda vector: pull_back(vector)[0]


def _widened(fn: Callable[[Params], Array], params: Params) -> Callable[[Params], Array]:
    return lambda wide: fn(optax.tree.cast_like(wide, params))
