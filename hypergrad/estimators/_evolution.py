"""Evolution strategies over unrolls: the hypergradient of a smoothed outer loss, from values alone.

    L_σ(λ) = E_ε L_out(w_K(λ + ε), λ + ε),   ε ~ N(0, σ²)
    ES:   dL_σ/dλ ≈ 1/(2n) Σ_i ε_i/σ² (L_i⁺ − L_i⁻)            particles i±: K steps under λ ± ε_i from the same weights
    PES:  dL_σ/dλ ≈ 1/(2n) Σ_i ξ_i/σ² (L_i⁺ − L_i⁻)            particles live on over windows; ξ_i = Σ of their ε_i

Nothing is differentiated in λ: it may enter a comparison, a rounding, a sampler, or a loss that is itself not
differentiable. ES is blind to what comes after its window. PES sums the effects of all earlier perturbations on the
present loss, so that short windows have the gradient of the whole life of a particle, at a higher variance.

Reference: Vicol, Metz & Sohl-Dickstein, Unbiased gradient estimation in unrolled computation graphs with persistent
evolution strategies, arXiv 2112.13835; Salimans et al., arXiv 1703.03864 (antithetic pairs, ranks).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding

from hypergrad import data, dataflow, tree, validate
from hypergrad.estimators._paths import ZERO_GRADIENT_HINTS, refuse_solve_batch
from hypergrad.estimators._protocol import Estimate, Estimator
from hypergrad.problem import BilevelProblem, check_problem, refuse_response
from hypergrad.training import Context, Trained, outer_loss_fn, train
from hypergrad.types import Array, Hyperparams, PyTree

__all__ = ["EvolutionInfo", "centered_ranks", "evolution"]


class EvolutionInfo(NamedTuple):
    """What the last estimate knows of itself.

    Attributes:
      standard_error: tree like the hyperparameters: of the mean over pairs, √(variance over pairs / pairs); infinite
        where it is not known: one pair, or a leaf that is not perturbed.
      num_dropped: int32 scalar, pairs with a loss that was not finite: they do not count.
      num_restarts: int32 scalar, pairs that started again so far, at ``horizon`` or because they were not finite; 0
        without ``persistent``.
    """

    standard_error: Hyperparams
    num_dropped: Array
    num_restarts: Array


class _Particles(NamedTuple):
    """Of persistent evolution.

    Attributes:
      born: ``Trained`` at ``init``, where every particle starts.
      at: ``Trained`` with two leading axes, (2, pairs): + and −.
      noise: tree like λ with a leading axis of pairs: z of the present outer period.
      sums: likewise, Σ of ε over a particle's life.
      losses: (pairs, 2), the outer losses of the last outer step; 0 for pairs that must start again.
      ages: (pairs,) int32, inner steps since the start; the largest number for pairs that must start again.
      renew: bool scalar, whether the next call draws noise: it follows an outer step.
      restarts: int32 scalar.
    """

    born: Trained
    at: Trained
    noise: Hyperparams
    sums: Hyperparams
    losses: Array
    ages: Array
    renew: Array
    restarts: Array


def centered_ranks(losses: Array) -> Array:
    """Return the ranks of losses, scaled to [−½, ½]: a ``fitness`` that no outlier and no scale can change.

    Args:
      losses: an array of any shape; one that is not finite ranks highest. Equal losses share the mean of their ranks.

    Returns:
      A float array of that shape: rank/(n − 1) − ½. The estimate is then no gradient of the loss, but a direction.

    >>> import jax.numpy as jnp
    >>> centered_ranks(jnp.array([3.0, 1e9, -2.0])).tolist()
    [0.0, 0.5, -0.5]

    Reference: Salimans et al., Evolution strategies as a scalable alternative, arXiv 1703.03864 §2.1.
    """
    flat = jnp.where(jnp.isfinite(losses), losses, jnp.inf).ravel()
    ordered = jnp.sort(flat)
    below, up_to = (jnp.searchsorted(ordered, flat, side=side).astype(float) for side in ("left", "right"))
    return ((below + up_to - 1.0) / (2.0 * max(1, flat.size - 1)) - 0.5).reshape(losses.shape)


def evolution(
    problem: BilevelProblem,
    *,
    sigma: Any,
    num_pairs: int,
    persistent: bool = False,
    horizon: int | None = None,
    fitness: Callable[[Array], Array] | None = None,
    pairs_per_device: int | None = None,
    sharding: Sharding | None = None,
) -> Estimator:
    """Estimate the hypergradient from outer losses at perturbed hyperparameters, without a derivative in them.

    dL_σ/dλ ≈ 1/(2n) Σ_i ξ_i/σ² (L_i⁺ − L_i⁻), with ξ_i = ε_i of a window, or the sum over a particle's life.

    Args:
      problem: over plain weights; its inner loss must be differentiable in the weights, nothing in λ.
      sigma: σ > 0, the standard deviation of ε in unconstrained λ: one number, or a tree prefix of λ with a number or
        an array per leaf. Or, without ``persistent``, a function from λ to such a tree, for a learned σ: then its
        derivative is added by the score function, and a leaf that only sets σ has the Python number 0.
      num_pairs: n ≥ 1, antithetic pairs; more lower the variance as 1/n.
      persistent: let the particles live on over the windows (PES): the hypergradient of short windows has then no
        short-horizon bias.
      horizon: of ``persistent``, inner steps after which a particle starts again, before a window, with the weights,
        optimizer state and model state of ``init``. Ages begin staggered. None: never.
      fitness: function from the (pairs, 2) losses to as many numbers, which take their place, e.g.
        ``hg.centered_ranks``; None: the losses.
      pairs_per_device: pairs that are trained at a time: memory for 2 × so many copies of the weights. None: all.
      sharding: of the axis of pairs, e.g. ``NamedSharding(mesh, PartitionSpec("pairs"))``: particles are spread over
        that axis of a mesh.

    Returns:
      An ``Estimator`` that needs a key on every call. With an inner optimizer a particle takes the call's K steps on
      the batches and keys of the training itself, so that only λ differs; the weights train at the unperturbed λ.
      Without one, the outer loss is taken at the weights as they are. Without ``persistent`` it has no state; with it,
      2n + 1 copies of the weights and the optimizer's state, and 2n of λ. A pair of which one loss is not finite is
      left out, and the estimate is then biased; a persistent pair starts again. Its info is an ``EvolutionInfo``.

    Raises:
      TypeError: no ``BilevelProblem``, or a setting of another type; at a call, no key.
      ValueError: a number out of its range, ``horizon`` without ``persistent``, a learned σ with it or with one pair, a
        problem with a response; at a call, a leaf of λ that is not perturbed and does not set σ, or that the losses and
        the optimizer do not use, or a ``fitness`` of another shape.

    Valid as an unbiased estimate of the gradient of the smoothed loss, not of the loss: the two differ by O(σ²) where
    the loss is smooth. With persistent particles it is unbiased if λ changes little during a particle's life. If all
    pairs are left out it is NaN, which the guard reports, and so is an entry where λ ± ε rounds to λ in every pair: σ
    must be above the rounding of λ.

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> problem = hg.BilevelProblem(lambda w, h, b, k: ((w - h) ** 2).sum(), lambda w, h, b, k: jnp.round(10 * h).sum())
    >>> fn = hg.hypergrad(evolution(problem, sigma=0.3, num_pairs=2000))
    >>> grad = fn(jnp.zeros(1), jnp.zeros(1), (), (), key=jax.random.key(0))   # of the smoothed staircase: about 10
    >>> abs(float(grad[0]) - 10) < 0.5
    True

    Reference: Vicol, Metz & Sohl-Dickstein, arXiv 2112.13835.
    """
    check_problem(problem)
    refuse_response("evolution", problem)
    validate.positive_int("num_pairs", num_pairs)
    validate.flag("persistent", persistent)
    _check_sigma(sigma, num_pairs, persistent=persistent)
    if not (fitness is None or callable(fitness)):
        fix = "Pass e.g. hg.centered_ranks, or None."
        raise TypeError(validate.message("fitness to be callable", validate.describe(fitness), fix))
    if horizon is not None:
        validate.positive_int("horizon", horizon)
        if not persistent:
            fix = "Pass persistent=True, or leave horizon out: without it every window starts at the present weights."
            raise ValueError(validate.message("no horizon without persistent=True", f"horizon={horizon}", fix))
    chunks = _Chunks.of(num_pairs, pairs_per_device, sharding)

    def scales(hyperparams: Hyperparams) -> list[Any]:
        given = sigma(hyperparams) if callable(sigma) else sigma
        return [scale for *_, scale in validate.by_prefix("evolution", "sigma", hyperparams, given, of="hyperparams")]

    def draw(ctx: Context) -> Hyperparams:
        """Return ε with a leading axis of pairs."""
        leaves, structure = jax.tree.flatten(ctx.hyperparams)
        # A clone: jax.debug_key_reuse takes the loop of at most one round around an outer step for one of many.
        keys = jax.random.split(jax.random.clone(validate.required_key(ctx.keys.advance)), len(leaves))
        sizes = lax.stop_gradient(scales(ctx.hyperparams))
        drawn = [_noise(key, leaf, size, num_pairs) for key, leaf, size in zip(keys, leaves, sizes, strict=True)]
        return jax.tree.unflatten(structure, chunks.placed(drawn))

    def trained(ctx: Context, start: Trained, hyperparams: Hyperparams) -> Trained:
        return start if ctx.inner_optimizer is None else train(ctx, start=start, hyperparams=hyperparams)

    def loss(ctx: Context, at: Trained, hyperparams: Hyperparams) -> Array:
        there = ctx._replace(at=at, hyperparams=hyperparams)
        return outer_loss_fn(there)(at.params, hyperparams)[0]

    def init(ctx: Context) -> tuple[PyTree, EvolutionInfo]:
        none = jnp.zeros((), jnp.int32)
        blank = EvolutionInfo(optax.tree.zeros_like(ctx.hyperparams), none, none)
        if not persistent:
            return (), blank
        born = jax.tree.map(jnp.copy, ctx.start._replace(inner_loss=jnp.zeros(())))
        at = chunks.placed(jax.tree.map(lambda x: jnp.broadcast_to(x, (num_pairs, 2, *jnp.shape(x))), born))
        per_pair = lambda: chunks.placed(  # noqa: E731
            jax.tree.map(lambda h: jnp.broadcast_to(jnp.zeros_like(h), (num_pairs, *h.shape)), ctx.hyperparams)
        )
        ages = jnp.asarray(np.arange(num_pairs) * (horizon or 0) // num_pairs, jnp.int32)
        losses = jnp.zeros((num_pairs, 2))
        return _Particles(born, at, per_pair(), per_pair(), losses, ages, jnp.array(True), none), blank

    def advance(state: _Particles, ctx: Context) -> _Particles:
        again = state.ages >= (_NEVER if horizon is None else horizon)
        at = jax.tree.map(lambda x, born: _rows(~again, x, born.astype(x.dtype)), state.at, state.born)
        noise = lax.cond(state.renew, lambda: draw(ctx), lambda: state.noise)
        begun = jax.tree.map(lambda x: _rows(~again, x, jnp.zeros((), x.dtype)), state.sums)
        added = jax.tree.map(lambda e: _rows(state.renew | again, e, jnp.zeros((), e.dtype)), noise)
        sums = jax.tree.map(jnp.add, begun, added)

        def move(at: Trained, hyperparams: Hyperparams) -> Trained:
            return tree.match_dtypes(trained(ctx, at, hyperparams), at)

        at = chunks.map(_both_signs(move, ctx.hyperparams), at, noise)
        steps = 0 if ctx.inner_optimizer is None else data.window_length(ctx.inner_batches)
        alive = _finite_rows(at, num_pairs)
        at = jax.tree.map(lambda x, born: _rows(alive, x, born.astype(x.dtype)), at, state.born)
        due = jnp.asarray(ctx.due)

        def losses_at() -> Array:
            of_pair = lambda at, hyperparams: loss(ctx, at, hyperparams)  # noqa: E731
            return chunks.map(_both_signs(of_pair, ctx.hyperparams), at, noise).astype(state.losses.dtype)

        losses = state.losses if ctx.due is False else lax.cond(due, losses_at, lambda: state.losses)
        alive = alive & jnp.isfinite(losses).all(axis=1)
        losses = jnp.where(alive[:, None], losses, jnp.zeros((), losses.dtype))  # a state with NaN would be refused
        ages = jnp.where(alive, jnp.where(again, 0, state.ages) + steps, _NEVER)
        restarts = state.restarts + jnp.sum(again, dtype=jnp.int32)
        # The next call draws noise after an outer step, whether that is taken or skipped.
        return _Particles(state.born, at, noise, sums, losses, ages, due, restarts)

    def estimate(state: PyTree, ctx: Context) -> Estimate:
        refuse_solve_batch("evolution", ctx)
        _check_paths(ctx, scales, lambda h: (trained(ctx, ctx.start, h), h), loss)
        value, aux = outer_loss_fn(ctx)(ctx.at.params, ctx.hyperparams)
        if persistent:
            noise, sums = state.noise, state.sums
            losses = jnp.where((state.ages < _NEVER)[:, None], state.losses, jnp.full_like(state.losses, jnp.nan))
        else:
            noise = sums = draw(ctx)
            of_pair = lambda _, h: loss(ctx, lax.optimization_barrier(trained(ctx, ctx.start, h)), h)  # noqa: E731
            losses = chunks.map(_both_signs(of_pair, ctx.hyperparams), jnp.zeros((num_pairs, 2)), noise)
        # Barriers: to the last bit the same numbers for particles that live on over one window, and that do not.
        noise, sums, losses = lax.optimization_barrier((noise, sums, losses.astype(float)))
        finite = jnp.isfinite(losses).all(axis=1)
        fits = losses if fitness is None else jnp.asarray(fitness(losses))
        if fits.shape != losses.shape:
            fix = "Return one number per loss, as hg.centered_ranks does."
            raise ValueError(validate.message(f"fitness to return shape {losses.shape}", f"{fits.shape}", fix))
        halves = jnp.where(finite, (fits[:, 0] - fits[:, 1]) / 2, 0.0)
        count, sizes = jnp.sum(finite), scales(ctx.hyperparams)
        structure = jax.tree.structure(ctx.hyperparams)
        pairs = [
            _over_square(leaf, size) * _column(halves, leaf.ndim).astype(leaf.dtype)
            for leaf, size in zip(jax.tree.leaves(sums), sizes, strict=True)
        ]
        means = [jnp.sum(leaf, axis=0) / count.astype(leaf.dtype) for leaf in pairs]  # 0/0: no pair is left
        # Where λ + ε rounds to λ in every pair, 0 would look like a certain estimate.
        means = [
            mean if _is_still(size) else jnp.where((h[None] + drawn != h[None]).any(axis=0), mean, jnp.nan)
            for mean, h, drawn, size in zip(
                means, jax.tree.leaves(ctx.hyperparams), jax.tree.leaves(sums), sizes, strict=True
            )
        ]
        errors = [
            jnp.full_like(mean, jnp.inf) if _is_still(size) else _standard_error(leaf, mean, finite, count)
            for leaf, mean, size in zip(pairs, means, sizes, strict=True)
        ]
        hypergrad = jax.tree.unflatten(structure, means)
        if callable(sigma):
            middles = jnp.where(finite, fits.mean(axis=1), 0.0)
            slopes = _score_of_scales(jax.tree.leaves(noise), sizes, middles, finite, count)
            scored = jax.vjp(lambda h: _arrays(scales(h)), ctx.hyperparams)[1](slopes)[0]
            hypergrad = jax.tree.map(lambda a, b: a + b.astype(a.dtype), hypergrad, scored)
        restarts = state.restarts if persistent else jnp.zeros((), jnp.int32)
        dropped = (num_pairs - count).astype(jnp.int32)
        info = EvolutionInfo(jax.tree.unflatten(structure, errors), dropped, restarts)
        return Estimate(value, hypergrad, state, info, aux)

    unchecked = (
        "It samples the gradient of a smoothed loss: info.method.standard_error is its error. Where λ is smooth, "
        "check hg.unrolled(problem) here, which proves losses, keys and batches."
    )
    return Estimator(problem, init, estimate, advance=advance if persistent else None, unchecked=unchecked)


_NEVER = np.iinfo(np.int32).max


def _check_sigma(sigma: Any, num_pairs: int, *, persistent: bool) -> None:
    if callable(sigma):
        fix = "Pass numbers, or leave one of the two out."
        if persistent:
            wanted = "sigma as numbers with persistent=True: a particle's life has one sigma"
            raise ValueError(validate.message(wanted, "a function of λ", fix))
        if num_pairs < 2:
            raise ValueError(validate.message("two pairs or more for a learned sigma", f"{num_pairs}", fix))
        return
    for scale in jax.tree.leaves(sigma):
        if np.ndim(scale) == 0:
            validate.number("sigma", scale, low=0.0, strict=True)
        elif not (np.isfinite(np.asarray(scale, float)) & (np.asarray(scale, float) > 0)).all():
            fix = "Choose sigma finite and > 0."
            raise ValueError(validate.message("sigma to be finite and > 0", f"{scale}", fix))


def _noise(key: Array, leaf: Any, scale: Any, count: int) -> Array:
    """Return ε with a leading axis of pairs; in low precision (λ + ε) − λ, so that rounding of λ + ε is part of it."""
    leaf = jnp.asarray(leaf)
    size = jnp.broadcast_to(jnp.asarray(scale, leaf.dtype), leaf.shape)[None]
    drawn = size * jax.random.normal(key, (count, *leaf.shape), leaf.dtype)
    drawn = drawn + jnp.zeros_like(leaf)[None]  # on explicit axes: in the leaf's sharding
    if jnp.finfo(leaf.dtype).bits >= 32:
        return drawn
    return lax.optimization_barrier(leaf[None] + drawn) - leaf[None]  # a barrier: it may be added in float32


def _column(of_pairs: Array, ndim: int) -> Array:
    """Return a vector over pairs in the shape (pairs, 1, …) of an array of ``ndim`` axes."""
    return of_pairs.reshape(-1, *[1] * (ndim - 1))


def _rows(marks: Array, x: Array, other: Array) -> Array:
    """Return the rows of marked pairs from ``x``, others from ``other``."""
    return jnp.where(_column(marks, x.ndim), x, jnp.broadcast_to(other, x.shape))


def _finite_rows(of_pairs: PyTree, count: int) -> Array:
    """Return which pairs have finite floating leaves only."""
    marks = jnp.ones(count, bool)
    for leaf in tree.split_floating(of_pairs)[0]:
        marks = marks & jnp.isfinite(leaf).all(axis=tuple(range(1, leaf.ndim)))
    return marks


def _both_signs(fn: Callable[[Any, Hyperparams], Any], hyperparams: Hyperparams) -> Callable[[Any, Hyperparams], Any]:
    """Return a function of a pair: its two states, and its ε, which is added and subtracted."""

    def pair(at: Any, noise: Hyperparams) -> Any:
        signs = jnp.array([1.0, -1.0])

        def one(at: Any, sign: Array) -> Any:
            return fn(
                at,
                lax.optimization_barrier(jax.tree.map(lambda h, e: h + sign.astype(h.dtype) * e, hyperparams, noise)),
            )

        return jax.vmap(one)(at, signs)

    return pair


class _Chunks(NamedTuple):
    """How pairs are spread over devices and time: ``each`` pairs on every device at a time, ``rounds`` times."""

    num_pairs: int
    devices: int
    each: int
    rounds: int
    sharding: Sharding | None

    @classmethod
    def of(cls, num_pairs: int, per_device: int | None, sharding: Sharding | None) -> "_Chunks":
        if not (sharding is None or isinstance(sharding, Sharding)):
            fix = 'Pass e.g. NamedSharding(mesh, PartitionSpec("pairs")).'
            raise TypeError(validate.message("sharding to be a Sharding", validate.describe(sharding), fix))
        devices = 1
        if sharding is not None:
            if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
                mesh = sharding.mesh  # constraints are for axes that the compiler may use as it likes
                auto = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
                sharding = NamedSharding(auto, sharding.spec)
            try:
                devices = num_pairs // sharding.shard_shape((num_pairs,))[0]
            except ValueError as refused:
                fix = "Choose num_pairs as a multiple of the number of devices on that axis."
                got = f"{num_pairs} pairs ({str(refused).splitlines()[0]})"
                raise ValueError(validate.message("pairs that the sharding divides evenly", got, fix)) from None
        local = num_pairs // devices
        if per_device is None:
            return cls(num_pairs, devices, local, 1, sharding)
        validate.positive_int("pairs_per_device", per_device)
        if local % per_device:
            fix = f"Choose a divisor of {local}."
            wanted = "pairs_per_device to divide the pairs of a device"
            raise ValueError(validate.message(wanted, f"{per_device} for {local} pairs", fix))
        return cls(num_pairs, devices, per_device, local // per_device, sharding)

    def placed(self, of_pairs: PyTree) -> PyTree:
        """Return leaves with a leading axis of pairs, spread over the mesh."""
        if self.sharding is None:
            return of_pairs
        return jax.tree.map(lambda x: lax.with_sharding_constraint(x, self.sharding), of_pairs)

    def map(self, fn: Callable[..., Any], *of_pairs: PyTree) -> PyTree:
        """Return ``vmap(fn)``, in chunks one after the other."""
        if self.rounds == 1:
            return self.placed(jax.vmap(fn)(*of_pairs))
        split = self.devices, self.rounds, self.each

        def to_chunks(x: Array) -> Array:
            return jnp.swapaxes(x.reshape(*split, *x.shape[1:]), 0, 1)

        def from_chunks(x: Array) -> Array:
            x = x.reshape(self.rounds, self.devices, self.each, *x.shape[2:])
            return jnp.swapaxes(x, 0, 1).reshape(self.num_pairs, *x.shape[3:])

        def body(_: None, chunk: Any) -> tuple[None, Any]:
            flat = jax.tree.map(lambda x: x.reshape(self.devices * self.each, *x.shape[2:]), chunk)
            return None, self.placed(jax.vmap(fn)(*self.placed(flat)))

        _, found = lax.scan(body, None, jax.tree.map(to_chunks, of_pairs))
        return self.placed(jax.tree.map(from_chunks, found))


def _over_square(of_pairs: Array, scale: Any) -> Array:
    """Return ξ/σ²; 0 for a leaf that is not perturbed."""
    if _is_still(scale):
        return jnp.zeros_like(of_pairs)
    shape = of_pairs.shape[1:]
    return of_pairs / jnp.square(jnp.broadcast_to(jnp.asarray(scale, of_pairs.dtype), shape))[None]


def _is_still(scale: Any) -> bool:
    """Return whether σ is the Python number 0: a leaf that is not perturbed, and not one whose σ became 0."""
    return isinstance(scale, int | float) and scale == 0


def _standard_error(of_pairs: Array, mean: Array, finite: Array, count: Array) -> Array:
    apart = jnp.where(_column(finite, of_pairs.ndim), of_pairs - mean[None], 0.0)
    several = count > 1
    n = jnp.where(several, count, 2).astype(of_pairs.dtype)
    found = jnp.sqrt(jnp.sum(jnp.square(apart), axis=0) / (n * (n - 1)))
    return jnp.where(several, found, jnp.inf).astype(of_pairs.dtype)


def _arrays(scales: list[Any]) -> list[Array]:
    return [jnp.asarray(scale, float) for scale in scales]


def _score_of_scales(noise: list[Array], scales: list[Any], middles: Array, finite: Array, count: Array) -> list[Array]:
    """Return dL_σ/dσ = E[(z² − 1)/σ L], z = ε/σ, with the mean of the other pairs as baseline."""
    n = count.astype(middles.dtype)
    centered = jnp.where(finite, middles - jnp.sum(middles) / n, 0.0) / jnp.maximum(n - 1, 1)
    found = []
    for drawn, scale in zip(noise, scales, strict=True):
        size = jnp.asarray(scale, float)
        if _is_still(scale):
            found.append(jnp.zeros_like(size))
            continue
        wide = jnp.broadcast_to(size.astype(drawn.dtype), drawn.shape[1:])
        z = drawn / wide[None]
        each = jnp.tensordot(centered.astype(drawn.dtype), jnp.square(z) - 1, axes=1) / wide
        axes = tuple(range(each.ndim - size.ndim))
        summed = jnp.sum(each, axis=axes)
        kept = tuple(i for i, width in enumerate(size.shape) if width == 1)
        found.append(jnp.sum(summed, axis=kept, keepdims=True).reshape(size.shape).astype(size.dtype))
    return found


def _check_paths(
    ctx: Context,
    scales: Callable[[Hyperparams], list[Any]],
    reach: Callable[[Hyperparams], tuple[Trained, Hyperparams]],
    loss: Callable[[Context, Trained, Hyperparams], Array],
) -> None:
    """Refuse leaves whose estimate would be zero, or noise alone."""
    hyperparams, count = ctx.hyperparams, len(jax.tree.leaves(ctx.hyperparams))
    one_leaf = [[i == j for j in range(count)] for i in range(count)]
    names, sizes = tree.labels("hyperparams", hyperparams), scales(hyperparams)
    set_scales = dataflow.dependence(lambda h: _arrays(scales(h)), hyperparams)
    still = [i for i in range(count) if _is_still(sizes[i]) and not any(set_scales(one_leaf[i]))]
    if still:
        fix = "Give it a positive sigma, or leave it to another estimator."
        got = f"sigma 0 for {', '.join(names[i] for i in still)}, which sets no other sigma"
        raise ValueError(validate.message("every hyperparameter leaf to be perturbed", got, fix))
    # Without the prior, which every leaf may enter and which measures none.
    measured = ctx._replace(problem=dataclasses.replace(ctx.problem, prior=None))
    depends = dataflow.dependence(lambda h: loss(measured, *reach(h)), hyperparams)
    unseen = [i for i in range(count) if not _is_still(sizes[i]) and not any(depends(one_leaf[i]))]
    if unseen:
        path, hint = ZERO_GRADIENT_HINTS["evolution"]
        got = f"{', '.join(names[i] for i in unseen)}, which enters neither"
        fix = f"Its estimate would be noise alone. {hint}"
        raise ValueError(validate.message(f"every hyperparameter leaf to enter {path}", got, fix))
