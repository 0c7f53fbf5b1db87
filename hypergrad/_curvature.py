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
from hypergrad._types import Array, Hyperparams, MatVec, ModelState, Params, PyTree


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


def mixed_mode_gradient(
    loss: Callable[[Params, Hyperparams, ModelState, PyTree], tuple[Array, ModelState]],
) -> Callable[[Params, Hyperparams, ModelState, PyTree], tuple[Params, ModelState]]:
    """Return (w, λ, state, data) ↦ (∂loss/∂w, new state) with a derivative rule that exploits symmetry.

    A cotangent v of the gradient is pulled back by v ↦ ∂_{w,λ,…} ⟨∂loss/∂w, v⟩, where ⟨∂loss/∂w, v⟩ is one ``jvp``
    of the loss. The backward pass of a training step then keeps the weights alone, where reverse over reverse keeps
    every intermediate of the gradient, and costs two gradients. Forward-mode differentiation of the result is not
    possible, nor is the rule for models with a ``custom_vjp``: these get plain autodiff.

    Reference: Kemaev et al., Scalable meta-learning via mixed-mode differentiation, arXiv 2505.00793.
    """
    plain = jax.grad(loss, has_aux=True)

    @jax.custom_vjp
    def gradient(*at: Any) -> tuple[Params, ModelState]:
        return plain(*at)

    def forward(*at: Any) -> Any:
        return plain(*at), at

    def backward(at: Any, cotangents: tuple[Params, ModelState]) -> Any:
        along, of_state = cotangents

        def paired(w: Params, h: Hyperparams, state: ModelState, data: PyTree) -> Array:
            _, slope, new_state = jax.jvp(lambda w: loss(w, h, state, data), (w,), (along,), has_aux=True)
            pairs = zip(jax.tree.leaves(of_state), jax.tree.leaves(new_state), strict=True)
            return _tree.total([slope, *((c * x).sum() for c, x in pairs if c.dtype != jax.dtypes.float0)])

        return jax.grad(paired, argnums=(0, 1, 2, 3), allow_int=True)(*at)

    gradient.defvjp(forward, backward)

    def choose(*at: Any) -> tuple[Params, ModelState]:
        has_custom_vjp = _has_custom_vjp(lambda w: loss(w, *at[1:])[0], at[0])
        return plain(*at) if has_custom_vjp else gradient(*at)

    return choose


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
