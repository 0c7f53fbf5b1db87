"""Second derivatives of a scalar function as linear maps, never as matrices.

    hvp(f, w)              v ↦ (∂²f/∂w²) v  =  ∂_w ⟨∂f/∂w, v⟩          symmetric
    mixed_vjp(f, w, λ)     q ↦ (∂²f/∂w∂λ)ᵀ q  =  ∂_λ ⟨∂f/∂w, q⟩        from weights to hyperparameters
    residual_vjp(r, w, λ)  q ↦ (∂r/∂w)ᵀ q and (∂r/∂λ)ᵀ q           where a residual takes the place of ∂f/∂w
    residual_jvp(r, w)     v ↦ (∂r/∂w) v

The first two are reverse over forward: the gradient of a directional derivative, which is one ``jvp``. The choice of
mode is made here alone, by ``benchmarks/results/hessian_modes.md``: on CPU this mode is the fastest, or within a few
per cent of it, on MLPs of every width (``linearize`` and ``jvp(grad)`` are about 1.5 times slower at 1.9 million
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
from jax.extend import core as jex_core

from hypergrad import dataflow, tree
from hypergrad.types import Array, Hyperparams, MatVec, ModelState, Params, PyTree

__all__ = ["hvp", "mixed_mode_gradient", "mixed_vjp", "residual_jvp", "residual_vjp"]


def hvp(fn: Callable[[Params], Array], params: Params) -> MatVec:
    """Return v ↦ ∇²fn(params) v, on trees shaped like ``params`` in the promoted dtypes.

    Right where ``fn`` is twice differentiable at ``params``; at a kink (ReLU at 0) JAX's one-sided
    convention enters. Cost: about two gradients of ``fn`` per product.
    """
    wide, widened = tree.promote(params), _widened(fn, params)
    if _has_custom_vjp(widened, wide):
        _, pull_back = jax.vjp(jax.grad(widened), wide)
        return lambda vector: pull_back(vector)[0]
    return lambda vector: jax.grad(lambda w: jax.jvp(widened, (w,), (vector,))[1])(wide)


def mixed_vjp(fn: Callable[[Params, Hyperparams], Array], params: Params, hyperparams: Hyperparams) -> MatVec:
    """Return q ↦ (∂²fn/∂params∂hyperparams)ᵀ q, from trees like ``params`` to trees like ``hyperparams``.

    Only the part of ∇_w fn that depends on the hyperparameters is differentiated: for a penalty such as
    ½ Σ λᵢ wᵢ² the compiled product is elementwise and the network is not run.
    """
    wide = tree.promote(params)

    def at(h: Hyperparams) -> Callable[[Params], Array]:
        return _widened(lambda w: fn(w, h), params)

    if _has_custom_vjp(at(hyperparams), wide):
        _, pull_back = jax.vjp(lambda h: jax.grad(at(h))(wide), hyperparams)
        return lambda vector: pull_back(vector)[0]
    return lambda vector: jax.grad(lambda h: jax.jvp(at(h), (wide,), (vector,))[1])(hyperparams)


def residual_vjp(
    residual: Callable[[Params, Hyperparams], Params], params: Params, hyperparams: Hyperparams
) -> tuple[MatVec, MatVec]:
    """Return q ↦ (∂r/∂w)ᵀ q and q ↦ (∂r/∂λ)ᵀ q for a residual r(w, λ) shaped like the weights."""
    wide = tree.promote(params)

    def widened(w: Params, h: Hyperparams) -> Params:
        return tree.promote(residual(optax.tree.cast_like(w, params), h))

    _, of_params = jax.vjp(lambda w: widened(w, hyperparams), wide)
    _, of_hyperparams = jax.vjp(lambda h: widened(wide, h), hyperparams)
    return (lambda q: of_params(q)[0]), (lambda q: of_hyperparams(q)[0])


def residual_jvp(residual: Callable[[Params], Params], params: Params) -> MatVec:
    """Return v ↦ (∂r/∂w) v for a residual r(w) shaped like the weights; through ``custom_vjp`` as vjp of a vjp."""
    wide = tree.promote(params)

    def widened(w: Params) -> Params:
        return tree.promote(residual(optax.tree.cast_like(w, params)))

    if not _has_custom_vjp(widened, wide):
        return lambda vector: jax.jvp(widened, (wide,), (vector,))[1]
    _, pull_back = jax.vjp(widened, wide)
    _, push_forward = jax.vjp(lambda q: pull_back(q)[0], wide)
    return lambda vector: push_forward(vector)[0]


def mixed_mode_gradient(
    loss: Callable[[Params, Hyperparams, ModelState, PyTree], tuple[Array, ModelState]],
) -> Callable[[Params, Hyperparams, ModelState, PyTree], tuple[Params, ModelState]]:
    """Return (w, λ, state, data) ↦ (∂loss/∂w, new state) with a derivative rule of its own for reverse mode.

    A cotangent v of the gradient is pulled back as ∂_{w,λ,…} ⟨∂loss/∂w, v⟩, where ⟨∂loss/∂w, v⟩ is one ``jvp`` of the
    loss. The backward pass of a training step then keeps the weights alone, where reverse over reverse keeps every
    intermediate of the gradient, and costs two gradients. The result has no forward-mode derivative. Models with a
    ``custom_vjp``, which no ``jvp`` passes, get plain autodiff.

    Reference: Kemaev et al., Scalable meta-learning via mixed-mode differentiation, arXiv 2505.00793.
    """

    def gradient(*at: Any) -> tuple[Params, ModelState]:
        # What the loss closes over becomes an argument: a rule may not close over traced values.
        closed, shapes = jax.make_jaxpr(loss, return_shape=True)(*at)
        if _contains_custom_vjp(closed.jaxpr):
            return jax.grad(loss, has_aux=True)(*at)
        structure = jax.tree.structure(shapes)

        def pure(*at_and_constants: Any) -> tuple[Array, ModelState]:
            *at, constants = at_and_constants
            run = jex_core.jaxpr_as_fun(jex_core.ClosedJaxpr(closed.jaxpr, constants))
            return jax.tree.unflatten(structure, run(*jax.tree.leaves(at)))

        return _with_mixed_rule(pure)(*at, closed.consts)

    return gradient


def _with_mixed_rule(loss: Callable[..., tuple[Array, ModelState]]) -> Callable[..., tuple[Params, ModelState]]:
    """Return the gradient of ``loss`` in its first argument, with the rule; all it depends on are its arguments."""
    gradient: Any = jax.custom_vjp(jax.grad(loss, has_aux=True))

    def forward(*at: Any) -> Any:
        return jax.grad(loss, has_aux=True)(*at), at

    def backward(at: Any, cotangents: tuple[Params, ModelState]) -> Any:
        along, of_state = cotangents

        def paired(w: Params, *others: Any) -> Array:
            _, slope, new_state = jax.jvp(lambda w: loss(w, *others), (w,), (along,), has_aux=True)
            pairs = zip(jax.tree.leaves(of_state), jax.tree.leaves(new_state), strict=True)
            return tree.total([slope, *((c * x).sum() for c, x in pairs if c.dtype != jax.dtypes.float0)])

        return jax.grad(paired, argnums=tuple(range(len(at))), allow_int=True)(*at)

    gradient.defvjp(forward, backward)
    return gradient


def _widened(fn: Callable[[Params], Array], params: Params) -> Callable[[Params], Array]:
    return lambda wide: fn(optax.tree.cast_like(wide, params))


def _has_custom_vjp(fn: Callable[[Params], PyTree], params: Params) -> bool:
    return _contains_custom_vjp(jax.make_jaxpr(fn)(params).jaxpr)


def _contains_custom_vjp(jaxpr: Any) -> bool:
    """Return whether a jaxpr calls an operation with a derivative rule for reverse mode only."""
    return any("custom_vjp" in name for name in dataflow.operations(jaxpr))
