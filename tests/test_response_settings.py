"""Responses under the strict settings of JAX: promotion of ranks and dtypes, NaNs, reused keys, implicit transfers."""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad import responses

MODEL = nn.Dense(3)
PER_EXAMPLE = {"decay": False, "rate": True}
VARIANTS = {
    "delta": responses.delta_stn(),
    "delta, nonlinear": responses.delta_stn(linearized=False),
    "stn": responses.stn(),
}
ENCODING = responses.magnitude_invariant(-8.0, 8.0)
RESPONSES = {
    "linear": responses.linear(rank=2, encoding=ENCODING),
    "gated": responses.gated(),
    "hypernetwork": responses.hypernetwork(lambda size: nn.Dense(size), chunk_size=4),
}


def inner_loss(w, h, batch, key):
    """Dropout on the inputs, and one decay per output unit; the hyperparameters have different dtypes."""
    x, y = batch
    outputs = MODEL.apply({"params": w}, hg.noise.dropout(key, x, jax.nn.sigmoid(h["rate"])))
    decay = jnp.exp(h["decay"]).astype(jnp.float32)
    return jnp.mean((outputs - y) ** 2) + jnp.sum(decay[None] * w["kernel"] ** 2)


def outer_loss(w, h, batch, key):
    """The mean squared error."""
    return jnp.mean((MODEL.apply({"params": w}, batch[0]) - batch[1]) ** 2)


def tuned(name):
    """Return the problem over a response, before it is perturbed."""
    plain = hg.BilevelProblem(inner_loss, outer_loss)
    if name in RESPONSES:
        return responses.with_response(plain, RESPONSES[name])
    return responses.self_tuning(plain, variant=VARIANTS[name], per_example=PER_EXAMPLE)


@contextlib.contextmanager
def strict():
    """Turn every check on."""
    with contextlib.ExitStack() as stack:
        for setting in (
            jax.numpy_rank_promotion("raise"),
            jax.numpy_dtype_promotion("strict"),
            jax.debug_nans(True),
            jax.debug_key_reuse(True),
            jax.transfer_guard("disallow"),
        ):
            stack.enter_context(setting)
        yield


def arguments(problem, learned):
    """Return initial response parameters, hyperparameters of two dtypes, a batch and a key."""
    batch = jnp.linspace(-1.0, 1.0, 24).reshape(6, 4), jnp.linspace(0.0, 1.0, 18).reshape(6, 3)
    params = MODEL.init(jax.random.key(0), batch[0])["params"]
    h = {"decay": jnp.full(3, -2.0, jnp.bfloat16), "rate": jnp.array(-1.0)}
    if learned:
        h = responses.HyperparamsWithScale(h, jax.tree.map(lambda x: jnp.zeros((), x.dtype), h))
    return responses.init(problem, 0, params, h, batch), h, batch, jax.random.key(1)


RARER = (("delta, nonlinear", False), ("linear", False), ("delta", True), ("gated", True), ("hypernetwork", False))


@pytest.mark.parametrize(
    ("name", "learned"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] * (case in RARER))
        for case in (*((name, False) for name in (*VARIANTS, *RESPONSES)), ("delta", True), ("gated", True))
    ],
)
def test_a_step_of_training_and_a_hypergradient_pass_all_checks_of_jax(name, learned):
    """The response learns and the hypergradient flows through it: nothing is zero because nothing ran."""
    scale = responses.learned_scale() if learned else 0.3
    problem = responses.perturbed(tuned(name), scale=scale, num_samples=1 if name in VARIANTS else 2)
    values = arguments(problem, learned)

    @jax.jit
    def step(params, h, batch, key):
        inner_key, outer_key = jax.random.split(key)
        value, slopes = jax.value_and_grad(problem.inner_loss)(params, h, batch, inner_key)
        params = jax.tree.map(lambda w, g: w - jnp.asarray(0.1, w.dtype) * g, params, slopes)
        hypergrad = hg.hypergrad(hg.direct(problem))(params, h, batch, batch, key=outer_key)
        return value, slopes, hypergrad

    with strict():
        value, slopes, hypergrad = step(*values)
    assert float(value) > 0.0
    labels = responses.optimizer_labels(slopes)
    sizes = {"weights": 0.0, "response": 0.0}
    for label, slope in zip(jax.tree.leaves(labels), jax.tree.leaves(slopes), strict=True):
        sizes[label] += float(jnp.sum(jnp.abs(slope)))
    assert min(sizes.values()) > 0.0
    for leaf in jax.tree.leaves(hypergrad):
        assert np.abs(np.asarray(leaf, np.float32)).max() > 0.0
