"""Second derivatives of a scalar function as linear maps, never as matrices.

    hvp(f, w)           v ↦ (∂²f/∂w²) v  =  ∂_w ⟨∂f/∂w, v⟩          symmetric
    mixed_vjp(f, w, λ)  q ↦ (∂²f/∂w∂λ)ᵀ q  =  ∂_λ ⟨∂f/∂w, q⟩        from weights to hyperparameters

Both are reverse over forward: the gradient of a directional derivative, which is one ``jvp``. The choice of mode
is made here alone, by ``benchmarks/results/hessian_modes.md``: on CPU this mode is the fastest, or within a few per
cent of it, on MLPs of every width (``linearize`` and ``jvp(grad)`` are about 1.5 times slower at 1.9 million
weights) and on an unrolled CNN, where ``vjp(grad)`` is 5 times slower; on a transformer it lies between ``linearize``
and ``vjp(grad)``. Forward mode does not pass ``custom_vjp`` operations (some attention kernels): models that have
one get ``vjp(grad)``, which by the Hessian's symmetry is the same product.

Low-precision weights are widened to float32 first and cast back inside ``f``: the network computes in its
own precision, vectors and sums of the linear solve do not.

Reference: Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6(1), 1994.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

from hypergrad import _tree
from hypergrad._types import Array, Hyperparams, MatVec, Params


def hvp(fn: Callable[[Params], Array], params: Params) -> MatVec:
    """Return v ↦ ∇²fn(params) v, on trees shaped like ``params`` in the promoted dtypes.

    Right where ``fn`` is twice differentiable at ``params``; at a kink (ReLU at 0) JAX's one-sided
    convention enters. Cost: about two gradients of ``fn`` a product.
    """
    wide, widened = _tree.promote(params), _widened(fn, params)
    if _has_custom_vjp(widened, wide):
        _, pull_back = jax.vjp(jax.grad(widened), wide)
        return lambda vector: pull_back(vector)[0]
    return lambda vector: jax.grad(lambda w: jax.jvp(widened, (w,), (vector,))[1])(wide)


def mixed_vjp(fn: Callable[[Params, Hyperparams], Array], params: Params, hyperparams: Hyperparams) -> MatVec:
    """Return q ↦ (∂²fn/∂params∂hyperparams)ᵀ q, from trees like ``params`` to trees like ``hyperparams``.

    Only the part of ∇_w fn that depends on the hyperparameters is differentiated: for a penalty such as
    ½ Σ λᵢ wᵢ² the compiled product is elementwise and the network is not run.
    """
    wide = _tree.promote(params)

    def at(h: Hyperparams) -> Callable[[Params], Array]:
        return _widened(lambda w: fn(w, h), params)

    if _has_custom_vjp(at(hyperparams), wide):
        _, pull_back = jax.vjp(lambda h: jax.grad(at(h))(wide), hyperparams)
        return lambda vector: pull_back(vector)[0]
    return lambda vector: jax.grad(lambda h: jax.jvp(at(h), (wide,), (vector,))[1])(hyperparams)


def _widened(fn: Callable[[Params], Array], params: Params) -> Callable[[Params], Array]:
    return lambda wide: fn(optax.tree.cast_like(wide, params))


def _has_custom_vjp(fn: Callable[[Params], Array], params: Params) -> bool:
    """Return whether ``fn`` calls an operation with a derivative rule for reverse mode only."""

    def search(jaxpr: Any) -> bool:
        for eqn in jaxpr.eqns:
            if "custom_vjp" in eqn.primitive.name:
                return True
            for parameter in eqn.params.values():
                for item in parameter if isinstance(parameter, list | tuple) else [parameter]:
                    inner = getattr(item, "jaxpr", item)
                    if hasattr(inner, "eqns") and search(inner):
                        return True
        return False

    return search(jax.make_jaxpr(fn)(params).jaxpr)
