"""Learned optimizers: the update of a weight is a small network of what an optimizer knows about it.

    uᵢ = −s · dᵢ exp(s mᵢ),   (dᵢ, mᵢ) = MLP_θ(features of weight i)       θ the hyperparameters, s a small constant

The features of a weight are its value, its gradient, averages of gradients at several decays, the same divided by the
root of an average square, and how long training has gone on. One θ serves weights of any shape. θ is meta-trained as
any other hyperparameters, by ``unrolled`` or ``evolution(persistent=True)``, and then used as an optax optimizer.

Reference: Metz et al., Understanding and correcting pathologies in the training of learned optimizers, arXiv
1810.10180; Metz et al., Practical tradeoffs between memory, compute, and performance in learned optimizers, arXiv
2203.11860.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hypergrad import tree, validate
from hypergrad.types import Array, Params, PyTree

__all__ = ["LearnedState", "PerParameterMLP", "learned", "per_parameter_mlp"]

_DECAYS = (0.5, 0.9, 0.99)
_SQUARE_DECAY = 0.999
_TIMES = (3.0, 10.0, 30.0, 100.0, 300.0, 1_000.0, 3_000.0, 10_000.0, 30_000.0)
_SMALL = 1e-8  # of a root mean square


class LearnedState(NamedTuple):
    """State of ``learned``.

    Attributes:
      num_steps: int32 scalar, steps so far.
      averages: a tuple of trees like the weights: averages of the gradients at decays 0.5, 0.9 and 0.99, in at least
        float32, as their rounding would be that of 1 − decay.
      squares: tree like the weights, average of their squares at decay 0.999, likewise.
    """

    num_steps: Array
    averages: tuple[Params, ...]
    squares: Params


class PerParameterMLP(NamedTuple):
    """A small network that is applied to every weight alike.

    Attributes:
      init: ``init(key) -> θ``, a dict of arrays.
      apply: ``apply(θ, features) -> updates``: from (…, F) to (…).
    """

    init: Callable[[Any], PyTree]
    apply: Callable[[PyTree, Array], Array]


def per_parameter_mlp(hidden: int = 16, *, step: float = 1e-3, mu_scaled: bool = False) -> PerParameterMLP:
    """Return the network of a learned optimizer: two hidden layers, tanh, two outputs (d, m), u = −s d exp(s m).

    Args:
      hidden: width of the hidden layers, ≥ 1.
      step: s > 0, the scale of an update before θ is trained.
      mu_scaled: the parametrization of μLO, for weights that get wider after meta-training: start ``learned`` with
        ``widths``. The last layer of θ starts at zero, and its outputs are multiplied by 1/hidden.

    Returns:
      A ``PerParameterMLP``.

    Raises:
      TypeError, ValueError: a number out of its range.

    >>> import jax, jax.numpy as jnp
    >>> network = per_parameter_mlp(8)
    >>> theta = network.init(0)
    >>> network.apply(theta, jnp.zeros((5, 2, 19))).shape
    (5, 2)

    Reference: Metz et al., arXiv 2203.11860; Thérien et al., μLO: compute-efficient meta-generalization of learned
    optimizers, arXiv 2406.00153.
    """
    validate.positive_int("hidden", hidden)
    validate.number("step", step, low=0.0, strict=True)
    validate.flag("mu_scaled", mu_scaled)
    sizes = _NUM_FEATURES, hidden, hidden, 2

    def init(key: Any) -> PyTree:
        keys = jax.random.split(validate.required_key(key), len(sizes) - 1)
        theta = {}
        for place, (own, rows, columns) in enumerate(zip(keys, sizes[:-1], sizes[1:], strict=True)):
            scale = 0.0 if mu_scaled and place == len(sizes) - 2 else rows**-0.5
            theta[f"w{place}"] = scale * jax.random.normal(own, (rows, columns))
            theta[f"b{place}"] = jnp.zeros(columns)
        return theta

    def apply(theta: PyTree, features: Array) -> Array:
        x = features
        for place in range(len(sizes) - 1):
            bias = theta[f"b{place}"].astype(x.dtype)
            x = x @ theta[f"w{place}"].astype(x.dtype) + jnp.broadcast_to(bias, (*x.shape[:-1], len(bias)))
            x = jnp.tanh(x) if place < len(sizes) - 2 else x
        x = x / hidden if mu_scaled else x
        return -step * x[..., 0] * jnp.exp(step * x[..., 1])

    return PerParameterMLP(init, apply)


def learned(
    apply: Callable[[PyTree, Array], Array], theta: PyTree, *, widths: PyTree = 1.0
) -> optax.GradientTransformation:
    """Return a learned optimizer with parameters θ, as an optax transformation.

    u = apply(θ, features) / width, leaf by leaf; features (…, 19) for a leaf of shape (…).

    Args:
      apply: e.g. ``per_parameter_mlp().apply``, or one of your own.
      theta: θ; as hyperparameters, ``inner_optimizer=lambda theta: hg.optimizers.learned(network.apply, theta)``.
      widths: tree prefix of the weights with a number for each leaf, by which its updates are divided: 1, and in the
        μLO parametrization the number of inputs of hidden and output matrices, relative to that in meta-training.

    Returns:
      An ``optax.GradientTransformation`` that needs ``params``. Its state is four copies of the weights.

    Raises:
      TypeError: ``apply`` is not callable.
      ValueError: at ``update``, no ``params``, or widths that do not fit.

    Valid for weights like those of meta-training: of another width, depth or data it may or may not work.

    >>> import jax, jax.numpy as jnp, optax
    >>> network = per_parameter_mlp(8)
    >>> tx, w = learned(network.apply, network.init(0)), {"a": jnp.ones((3, 2))}
    >>> updates, state = tx.update(w, tx.init(w), w)
    >>> updates["a"].shape, bool(jnp.abs(updates["a"]).max() < 0.1)
    ((3, 2), True)

    Reference: Metz et al., arXiv 2203.11860.
    """
    if not callable(apply):
        fix = "Pass e.g. hg.optimizers.per_parameter_mlp().apply."
        raise TypeError(validate.message("apply to be callable", validate.describe(apply), fix))

    def init(params: Params) -> LearnedState:
        zeros = tuple(tree.promoted_zeros_like(params) for _ in _DECAYS)
        return LearnedState(jnp.zeros((), jnp.int32), zeros, tree.promoted_zeros_like(params))

    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, LearnedState]:
        if params is None:
            fix = "Call update(updates, state, params)."
            raise ValueError(validate.message("params for optimizers.learned", "None", fix))
        found = validate.by_prefix("optimizers.learned", "widths", params, widths)
        count = jnp.asarray(optax.safe_increment(state.num_steps))
        averages = tuple(
            jax.tree.map(lambda old, g, decay=decay: decay * old + (1 - decay) * g.astype(old.dtype), old, updates)
            for decay, old in zip(_DECAYS, state.averages, strict=True)
        )
        squares = jax.tree.map(
            lambda old, g: _SQUARE_DECAY * old + (1 - _SQUARE_DECAY) * jnp.square(g.astype(old.dtype)),
            state.squares,
            updates,
        )
        leaves = zip(
            found, jax.tree.leaves(updates), *map(jax.tree.leaves, averages), jax.tree.leaves(squares), strict=True
        )
        moved = []
        for (_, w, width), g, *averaged, square in leaves:
            if not w.size:
                moved.append(g)
                continue
            u = apply(theta, _features(w, g, averaged, square, count))
            moved.append((u / jnp.broadcast_to(jnp.asarray(width, u.dtype), u.shape)).astype(g.dtype))
        new = jax.tree.unflatten(jax.tree.structure(updates), moved)
        return new, LearnedState(count, averages, squares)

    return optax.GradientTransformation(init, update)


_NUM_FEATURES = 2 + 2 * len(_DECAYS) + 2 + len(_TIMES)


def _features(w: Array, g: Array, averages: list[Array], square: Array, count: Array) -> Array:
    """Return (…, F). Each feature but those of time is scaled to a mean square of 1 over the leaf."""
    wide = square.dtype
    steps = count.astype(wide)
    root = jnp.sqrt(square.astype(wide) / (1 - _SQUARE_DECAY**steps) + _SMALL**2)
    unbiased = [m.astype(wide) / (1 - decay**steps) for m, decay in zip(averages, _DECAYS, strict=True)]
    of_weight = [
        w.astype(wide),
        g.astype(wide),
        *unbiased,
        g.astype(wide) / root,
        *(m / root for m in unbiased),
        1 / root,
    ]
    scaled = [x * jax.lax.rsqrt(jnp.mean(jnp.square(x)) + _SMALL**2) for x in of_weight]
    times = [jnp.broadcast_to(jnp.tanh(steps / time - 1), w.shape) for time in _TIMES]
    return jnp.stack([*scaled, *times], axis=-1)
