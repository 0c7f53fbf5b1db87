"""Small bilevel problems whose hypergradients are known by another route than the library's."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg


class Example(NamedTuple):
    """A problem with data, at weights that solve its inner problem."""

    problem: hg.BilevelProblem
    variables: hg.BilevelParams
    inner_batch: Any
    outer_batch: Any
    exact: Any  # hypergradient by an independent route
    response: Callable[[Any], Any]  # λ ↦ w*(λ), on trees
    value_at: Callable[[Any], Any]  # λ ↦ outer loss at w*(λ), for finite differences


def tree_of(vector):
    """Spread six numbers over three leaves of a nested tree, one of them a matrix."""
    return {"a": vector[:2], "b": (vector[2:5].reshape(3, 1), {"c": vector[5:]})}


def vector_of(tree):
    """Undo ``tree_of``."""
    return jnp.concatenate([tree["a"], tree["b"][0].ravel(), tree["b"][1]["c"]])


def ridge(*, seed=0, spread=1.0, dtype=None) -> Example:
    """Ridge regression with one log decay a feature; the best response in closed form.

    w*(λ) = (XᵀX/n + diag(e^λ))⁻¹ Xᵀy/n, with weights and decays in several coupled leaves.
    """
    rng = np.random.default_rng(seed)
    dtype = dtype or jnp.zeros((), float).dtype
    scales = np.geomspace(1.0, spread, 6)
    x, xv = (jnp.asarray(rng.normal(size=(n, 6)) @ _rotation(rng) * scales, dtype) for n in (40, 30))
    truth = rng.normal(size=6) / scales
    y, yv = (jnp.asarray(m @ truth + 0.3 * rng.normal(size=len(m)), dtype) for m in (x, xv))
    log_decay = jnp.asarray(rng.normal(size=6) - 1.0, dtype)

    def error(params, batch):
        return 0.5 * jnp.mean((batch[0] @ vector_of(params) - batch[1]) ** 2)

    def inner(params, decay, batch, key):
        return error(params, batch) + hg.penalties.l2(params, decay)

    def outer(params, decay, batch, key):
        return error(params, batch)

    def response(h):
        gram = x.T @ x / len(x) + jnp.diag(jnp.exp(vector_of(h)))
        return tree_of(jnp.linalg.solve(gram, x.T @ y / len(x)))

    def value_at(h):
        return error(response(h), (xv, yv))

    problem = hg.reparameterize(hg.BilevelProblem(inner, outer), hg.bijectors.exp())
    h = tree_of(log_decay)
    variables = hg.BilevelParams(response(h), h)
    return Example(problem, variables, (x, y), (xv, yv), jax.grad(value_at)(h), response, value_at)


def logistic() -> Example:
    """Softmax regression with a learned decay a weight, example weights, and a temperature in the outer loss.

    Not quadratic; the inner problem is solved by Newton's method to rounding, and the exact hypergradient
    comes from central finite differences of the outer loss at re-solved weights.
    """
    rng = np.random.default_rng(1)
    x, xv = jnp.asarray(rng.normal(size=(20, 4))), jnp.asarray(rng.normal(size=(15, 4)))
    y, yv = jnp.asarray(rng.integers(0, 3, 20)), jnp.asarray(rng.integers(0, 3, 15))

    def nll(params, batch):
        logits = batch[0] @ params["kernel"] + params["bias"]
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch[1])

    def inner(params, hyper, batch, key):
        weights = jax.nn.sigmoid(hyper["example"])
        return jnp.mean(weights * nll(params, batch)) + hg.penalties.l2(params, jax.tree.map(jnp.exp, hyper["decay"]))

    def outer(params, hyper, batch, key):
        scaled = jax.tree.map(lambda w: w * jnp.exp(hyper["temperature"]), params)
        return jnp.mean(nll(scaled, batch)) + 0.1 * jnp.mean(hyper["example"] ** 2)

    params = {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)}
    hyper = {
        "decay": jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape)) - 2.0, params),
        "example": jnp.asarray(rng.normal(size=20)),
        "temperature": jnp.asarray(0.3),
    }
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    @jax.jit
    def response(h):
        def loss(v):
            return inner(unravel(v), h, (x, y), None)

        def newton(v, _):
            return v - jnp.linalg.solve(jax.hessian(loss)(v), jax.grad(loss)(v)), None

        return unravel(jax.lax.scan(newton, flat, None, length=30)[0])

    @jax.jit
    def value_at(h):
        return outer(response(h), h, (xv, yv), None)

    problem = hg.BilevelProblem(inner, outer)
    exact = finite_differences(value_at, hyper)
    return Example(problem, hg.BilevelParams(response(hyper), hyper), (x, y), (xv, yv), exact, response, value_at)


def network(*, dropout=0.0, features=(5, 3), dtype=jnp.float32) -> Example:
    """A small tanh network with a log decay a weight; no exact answer, for contract tests. Not converged."""
    model = _Network(features, dropout, dtype)
    rng = np.random.default_rng(2)
    x, xv = (jnp.asarray(rng.normal(size=(n, 4)), dtype) for n in (16, 12))
    y, yv = (jnp.asarray(rng.integers(0, 3, n)) for n in (16, 12))

    def nll(params, batch, key):
        rngs = None if key is None or not dropout else {"dropout": key}
        logits = model.apply({"params": params}, batch[0], train=bool(rngs), rngs=rngs)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch[1]).mean()

    def inner(params, decay, batch, key):
        return nll(params, batch, key) + hg.penalties.l2(params, decay)

    def outer(params, decay, batch, key):
        return nll(params, batch, None)

    params = model.init(jax.random.key(0), x)["params"]
    hyper = jax.tree.map(lambda w: jnp.full(w.shape, -2.0, jnp.float32), params)
    problem = hg.reparameterize(hg.BilevelProblem(inner, outer), hg.bijectors.exp())
    return Example(problem, hg.BilevelParams(params, hyper), (x, y), (xv, yv), None, None, None)  # type: ignore[arg-type]


def batch_norm(*, has_aux=False):
    """A network with BatchNorm: a stateful problem, its variables, model state and batches."""
    model = _Normalized()
    rng = np.random.default_rng(3)
    x, y = jnp.asarray(rng.normal(size=(16, 4)), jnp.float32), jnp.asarray(rng.integers(0, 3, 16))

    def inner(params, decay, batch, key, model_state):
        logits, new = model.apply(
            {"params": params, "batch_stats": model_state}, batch[0], train=True, mutable=["batch_stats"]
        )
        nll = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()
        loss, state = nll + hg.penalties.l2(params, jnp.exp(decay)), new["batch_stats"]
        return (loss, (state, {"logits": logits})) if has_aux else (loss, state)

    def outer(params, decay, batch, key, model_state):
        logits = model.apply({"params": params, "batch_stats": model_state}, batch[0], train=False)
        loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()
        return (loss, (model_state, {"logits": logits})) if has_aux else (loss, model_state)

    start = model.init(jax.random.key(0), x, train=False)
    problem = hg.BilevelProblem(inner, outer, stateful=True, has_aux=has_aux)
    return problem, hg.BilevelParams(start["params"], jnp.array(-3.0)), start["batch_stats"], (x, y)


def autodiff_steps(problem) -> hg.Estimator:
    """Reverse-mode autodiff through the inner steps, written plainly: a second route, and the smallest estimator."""

    def train(state, ctx):
        def outer(h):
            at = hg.train(ctx, hyperparams=h)
            return hg.outer_loss_fn(ctx._replace(at=at))(at.params, h)[0], at

        (value, at), grad = jax.value_and_grad(outer, has_aux=True)(ctx.hyperparams)
        return at, state, (value, grad)

    def estimate(state, ctx):
        value, grad = ctx.tape
        return hg.Estimate(value, grad, state, ())

    return hg.Estimator(problem, lambda ctx: ((), ()), estimate, train=train)


def finite_differences(fn, tree, *, step=1e-5):
    """Return the gradient of ``fn`` by central differences, entry by entry."""
    flat, unravel = jax.flatten_util.ravel_pytree(tree)
    columns = [(fn(unravel(flat + step * e)) - fn(unravel(flat - step * e))) / (2 * step) for e in np.eye(flat.size)]
    return unravel(jnp.stack(columns))


def relative_error(got, want) -> float:
    """Return ‖got − want‖/‖want‖ over all leaves; in NumPy, since in JAX each shape of a leaf compiles programs."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    vectors = [[np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)] for tree in (got, want)]
    a, b = map(np.concatenate, vectors)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def window_of(batch, length):
    """Repeat a batch along a new leading axis."""
    return jax.tree.map(lambda x: jnp.stack([x] * length), batch)


class _Network(nn.Module):
    features: tuple[int, ...]
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x, train=False):
        for width in self.features[:-1]:
            x = nn.tanh(nn.Dense(width, dtype=self.dtype, param_dtype=self.dtype)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.features[-1], dtype=self.dtype, param_dtype=self.dtype)(x)


class _Normalized(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(5)(x)
        x = nn.tanh(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(3)(x)


def _rotation(rng):
    q, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    return q
