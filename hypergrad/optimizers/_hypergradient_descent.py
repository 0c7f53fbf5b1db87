"""Online hypergradient descent: the optimizer tunes its own learning rate while it trains.

    w_{t+1} = w_t − α_t d_t,      dL_{t+1}/dα_t = −⟨g_{t+1}, d_t⟩       g the gradient, d the optimizer's direction

    additive         α ← α + β ⟨g, d⟩
    multiplicative   α ← α exp(β cos(g, d))

The rate grows while the new gradient points along the last direction, and falls where it points back. There is no
validation set: it is the training loss that falls faster. The derivative is that of one step, so a rate that pays only
later, as a decay at the end of training does, is not found.

Reference: Baydin et al., Online learning rate adaptation with hypergradient descent, arXiv 1703.04782.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hypergrad import tree, validate
from hypergrad.optimizers._differentiable import root
from hypergrad.types import Array, Params, PyTree

__all__ = [
    "HypergradientDescentState",
    "RateRule",
    "additive",
    "clipped",
    "hypergradient_descent",
    "multiplicative",
]

_EXAMPLE = "Pass e.g. hg.optimizers.multiplicative(0.02)."


class RateRule(NamedTuple):
    """How a rate follows its hypergradient.

    Attributes:
      step: ``step(rate, inner, cosine) -> rate``, all float32 scalars: α_t, ⟨g_{t+1}, d_t⟩ and their cosine. Both are
        0 at the first step, and where a gradient is zero or not finite.
    """

    step: Callable[[Array, Array, Array], Array]


def additive(rate: float) -> RateRule:
    """Return α ← max(0, α + β ⟨g, d⟩): the rule of the paper, with a rate that stays ≥ 0.

    Args:
      rate: β > 0. It must fit the scale of the loss, and that of the optimizer's direction.

    Returns:
      A ``RateRule``.

    Raises:
      TypeError, ValueError: ``rate`` is no positive number.

    >>> round(float(additive(0.1).step(0.01, 0.5, 1.0)), 3)
    0.06

    Reference: Baydin et al., arXiv 1703.04782, eq. 7.
    """
    validate.number("rate", rate, low=0.0, strict=True)

    def step(now: Array, inner: Array, cosine: Array) -> Array:
        del cosine
        return jnp.maximum(now + rate * inner, 0.0)

    return RateRule(step)


def multiplicative(rate: float) -> RateRule:
    """Return α ← α exp(β cos(g, d)): the same for every scale of the loss.

    Args:
      rate: β > 0, the largest relative change of the learning rate in a step. With β = 0.02 it can grow by a factor of
        10 in 115 steps.

    Returns:
      A ``RateRule``.

    Raises:
      TypeError, ValueError: ``rate`` is no positive number.

    >>> round(float(multiplicative(0.1).step(1.0, 123.0, 1.0)), 3)
    1.105

    Reference: Baydin et al., arXiv 1703.04782, §3, in the form α (1 + β cos), to first order in β the same.
    """
    validate.number("rate", rate, low=0.0, strict=True)

    def step(now: Array, inner: Array, cosine: Array) -> Array:
        del inner
        return now * jnp.exp(rate * cosine)

    return RateRule(step)


def clipped(rule: RateRule, low: float, high: float) -> RateRule:
    """Return a rule whose rates stay in [low, high], from the first step on.

    Args:
      rule: a ``RateRule``.
      low: ≥ 0, the smallest learning rate.
      high: > ``low``, the largest one.

    Returns:
      A ``RateRule``.

    Raises:
      TypeError: ``rule`` is not a ``RateRule``, or a bound is not a number.
      ValueError: bounds that are negative or in the wrong order.

    >>> round(float(clipped(additive(1.0), 1e-3, 0.1).step(0.01, 5.0, 1.0)), 3)
    0.1

    Reference: Wang et al., FedHyper, arXiv 2310.03156, §3.4.
    """
    _check_rule(rule)
    validate.number("low", low, low=0.0)
    validate.number("high", high, low=low, strict=True)
    return RateRule(lambda now, inner, cosine: jnp.clip(rule.step(now, inner, cosine), low, high))


class HypergradientDescentState(NamedTuple):
    """State of ``hypergradient_descent``.

    Attributes:
      rate: float32 scalar, the learning rate of the last step; with ``per_leaf`` a tree of them like the weights.
      direction: tree like the weights, d of the last step, without the rate.
      cosine: like ``rate``, cos(g, d) of the last step: about 0 at a good rate, near 1 where the rate is far too small.
      inner_state: state of the optimizer.
    """

    rate: PyTree
    direction: Params
    cosine: PyTree
    inner_state: optax.OptState


def hypergradient_descent(
    make_optimizer: Callable[..., optax.GradientTransformation],
    rule: RateRule,
    *,
    init_rate: float,
    per_leaf: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that its learning rate follows the hypergradient of each step.

    w_{t+1} = w_t − α_t d_t, with α_t from ``rule``, ⟨g_t, d_{t−1}⟩ and their cosine.

    Args:
      make_optimizer: function from a learning rate to an optax optimizer whose update is proportional to the rate:
        ``optax.adam``, ``lambda rate: optax.adamw(rate, weight_decay=1e-2)``. It is called with 1.0.
      rule: a ``RateRule``: ``multiplicative(0.02)``, ``additive(β)``, ``clipped(rule, low, high)``.
      init_rate: α_0 > 0.
      per_leaf: one rate per leaf of the weights, each from the products of its own leaf.

    Returns:
      An optax transformation, to use in place of the optimizer: in a loop, a Flax ``TrainState``, or as the
      ``inner_optimizer`` of ``hg.bilevel``. Its state is the optimizer's and one copy of the weights.

    Raises:
      TypeError: ``make_optimizer`` is not callable or makes something else, or ``rule`` is not a ``RateRule``.
      ValueError: ``init_rate`` ≤ 0; at ``init``, outside of ``jax.jit``, an update that is not proportional to the
        rate; at ``update``, a rule that returns no scalar.

    Give it the gradient of the loss itself: clip inside of ``make_optimizer``, not in front. A rule that returns NaN or
    infinity leaves the rate as it is.

    >>> import hypergrad as hg, jax, jax.numpy as jnp, optax
    >>> tx = hypergradient_descent(optax.adam, multiplicative(0.1), init_rate=1e-3)
    >>> loss, w = lambda w: 0.5 * jnp.sum((w - 3.0) ** 2), jnp.zeros(4)
    >>> state, update = tx.init(w), jax.jit(tx.update)
    >>> for _ in range(60):
    ...     updates, state = update(jax.grad(loss)(w), state, w)
    ...     w = optax.apply_updates(w, updates)
    >>> bool(loss(w) < 0.1), bool(state.rate > 0.1)
    (True, True)

    Reference: Baydin et al., arXiv 1703.04782.
    """
    if not callable(make_optimizer):
        fix = "Pass a function from a learning rate to an optimizer, e.g. optax.adam."
        raise TypeError(validate.message("make_optimizer to be callable", validate.describe(make_optimizer), fix))
    _check_rule(rule)
    validate.number("init_rate", init_rate, low=0.0, strict=True)
    validate.flag("per_leaf", per_leaf)
    optimizer = optax.with_extra_args_support(_made(make_optimizer, 1.0))

    def init(params: Params) -> HypergradientDescentState:
        if jax.tree.leaves(params):  # optax.partition may leave none
            validate.floating_leaves("params", params)
            _check_proportional(make_optimizer, params)
        count = len(jax.tree.leaves(params))
        each = lambda value: [jnp.asarray(value, jnp.float32) for _ in range(count)]  # noqa: E731
        rate, cosine = jnp.asarray(init_rate, jnp.float32), jnp.zeros((), jnp.float32)
        if per_leaf:
            rate, cosine = (jax.tree.unflatten(jax.tree.structure(params), each(v)) for v in (init_rate, 0.0))
        return HypergradientDescentState(rate, optax.tree.zeros_like(params), cosine, optimizer.init(params))

    def update(
        updates: Params, state: Any, params: Params | None = None, **extra: Any
    ) -> tuple[Params, HypergradientDescentState]:
        given, last = jax.tree.leaves(updates), jax.tree.leaves(state.direction)
        products = [(_vdot(g, d), _vdot(g, g), _vdot(d, d)) for g, d in zip(given, last, strict=True)]
        groups = products
        if given and not per_leaf:
            inner, square, other = (tree.total(list(parts)) for parts in zip(*products, strict=True))
            groups = [(inner, square, other)]
        rates, cosines = jax.tree.leaves(state.rate), []
        for place, (inner, square, other) in enumerate(groups):
            # Each root apart: the product of the squares can overflow or vanish where the cosine does not.
            size = root(square) * root(other)
            usable = (size > 0) & jnp.isfinite(size) & jnp.isfinite(inner)
            inner = jnp.where(usable, inner, 0.0)
            cosine = jnp.clip(inner / jnp.where(usable, size, 1.0), -1.0, 1.0)
            new = jnp.asarray(rule.step(rates[place], inner, cosine), jnp.float32)
            if new.ndim:
                fix = "Return one number: the next rate."
                raise ValueError(validate.message("a rule that returns a scalar", f"shape {new.shape}", fix))
            rates[place] = jnp.where(jnp.isfinite(new), new, rates[place])
            cosines.append(cosine)
        updates, inner_state = optimizer.update(updates, state.inner_state, params, **extra)
        direction = jax.tree.map(jnp.negative, updates)
        whose = rates if per_leaf else rates * len(given)
        scaled = [(rate.astype(u.dtype) * u) for rate, u in zip(whose, jax.tree.leaves(updates), strict=True)]
        cosines = cosines or jax.tree.leaves(state.cosine)
        as_before = lambda leaves: jax.tree.unflatten(jax.tree.structure(state.rate), leaves)  # noqa: E731
        new_state = HypergradientDescentState(as_before(rates), direction, as_before(cosines), inner_state)
        return jax.tree.unflatten(jax.tree.structure(updates), scaled), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _vdot(left: Array, right: Array) -> Array:
    return jnp.sum(left.astype(jnp.float32) * right.astype(jnp.float32))


def _check_rule(rule: Any) -> None:
    if not isinstance(rule, RateRule):
        raise TypeError(validate.message("rule to be a RateRule", validate.describe(rule), _EXAMPLE))


def _made(make_optimizer: Callable[..., Any], rate: float) -> optax.GradientTransformation:
    made = make_optimizer(rate)
    if not isinstance(made, optax.GradientTransformation):
        fix = "Pass a function from a learning rate to an optimizer, e.g. optax.adam."
        wanted = "make_optimizer to return an optax.GradientTransformation"
        raise TypeError(validate.message(wanted, validate.describe(made), fix))
    return made


def _check_proportional(make_optimizer: Callable[..., Any], params: Params) -> None:
    """Refuse an optimizer with a part that does not scale with the rate: tried on weights and gradients of 0 and 1."""
    ones = jax.tree.map(lambda w: jnp.ones(jnp.shape(w), jnp.float32), params)

    def first_update(rate: float, grads: Params) -> Params:
        tx = _made(make_optimizer, rate)
        return optax.with_extra_args_support(tx).update(grads, tx.init(ones), ones)[0]

    for grads in (optax.tree.zeros_like(ones), ones):
        try:
            one, two = first_update(1.0, grads), first_update(2.0, grads)
        except (TypeError, ValueError):
            return  # it asks for more than gradients: a value, a loss function
        if any(map(tree.is_traced, jax.tree.leaves((one, two)))):
            return
        pairs = zip(tree.labels("params", params), jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
        for name, a, b in pairs:
            if not np.allclose(2.0 * np.asarray(a), np.asarray(b), rtol=1e-4, equal_nan=True):
                fix = (
                    "Put what does not scale with the rate outside, e.g. in optax.chain behind this transformation, or "
                    "in the loss."
                )
                wanted = "make_optimizer to return an update that is proportional to the learning rate"
                raise ValueError(validate.message(wanted, f"one that is not, for {name}", fix))
