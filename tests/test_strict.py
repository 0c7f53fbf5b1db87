"""The main paths under settings for finding bugs. optax.adam fails under strict dtype promotion by itself: sgd here."""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg

SETTINGS = {
    "debug_nans": lambda: jax.debug_nans(True),
    "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
    "dtype_promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "transfer_guard": lambda: jax.transfer_guard("disallow"),
    "key_reuse": lambda: jax.debug_key_reuse(True),
}
X = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
Y = np.arange(8) % 3
MODEL = nn.Sequential([nn.Dense(5), nn.tanh, nn.Dense(3)])


def nll(params, batch):
    """Cross-entropy of a small network, which takes one mean per batch or per example."""
    logits = MODEL.apply({"params": params}, batch[0])
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch[1])


def decayed(params, decay, batch, key):
    """A decay per weight, and noise drawn from the key."""
    noise = jnp.float32(1.0) + jnp.float32(0.01) * jax.random.normal(key, batch[1].shape)
    return jnp.mean(noise * nll(params, batch)) + hg.penalties.l2(params, decay)


def plain(params, hyperparams, batch, key):
    """The loss alone."""
    return jnp.mean(nll(params, batch))


def smoothed(params, strength, batch, key):
    """One strength per example: label smoothing by hand."""
    return jnp.mean((jnp.float32(1.0) + jax.nn.sigmoid(strength)) * nll(params, batch))


def implicit():
    """Return transformation, variables and number of inner batches."""
    problem = hg.reparameterize(hg.BilevelProblem(decayed, plain), hg.bijectors.exp())
    params = first_params()
    decay = jax.tree.map(lambda w: jnp.full_like(w, -3.0), params)
    return hg.implicit(problem, hg.solvers.neumann(3)), optax.sgd(1e-2, 0.9), hg.BilevelParams(params, decay), 1


def unrolled():
    """Return the same for decays through three steps."""
    problem = hg.reparameterize(hg.BilevelProblem(decayed, plain), hg.bijectors.exp())
    params = first_params()
    decay = jax.tree.map(lambda w: jnp.full_like(w, -3.0), params)
    return hg.unrolled(problem), optax.sgd(1e-2, 0.9), hg.BilevelParams(params, decay), 3


def by(make):
    """Return a case of another estimator of the decays through three steps."""

    def case():
        estimator, *others = unrolled()
        return make(estimator.problem), *others

    return case


def self_tuning():
    """Return the same for a self-tuning network."""
    problem = hg.responses.self_tuning(hg.BilevelProblem(smoothed, plain))
    problem = hg.responses.perturbed(problem, scale=0.3)
    strength = jnp.zeros(())
    params = hg.responses.init(problem, 0, first_params(), strength, (X, Y))
    return hg.direct(problem), optax.sgd(1e-2), hg.BilevelParams(params, strength), 1


def first_params():
    """Return the network's first weights."""
    return MODEL.init(jax.random.key(0), X)["params"]


FIRST = {"layers_0": "solve", "layers_2": "roll"}  # the layers of MODEL
CASES = {
    "implicit": implicit,
    "unrolled": unrolled,
    "self_tuning": self_tuning,
    "unrolled_persistent": by(lambda problem: hg.unrolled(problem, hg.forward(persistent=True, horizon=3))),
    "evolution": by(lambda problem: hg.evolution(problem, sigma=0.1, num_pairs=2)),
    "evolution_persistent": by(lambda p: hg.evolution(p, sigma=0.1, num_pairs=2, persistent=True, horizon=3)),
    "partition": by(lambda problem: hg.partition({"solve": hg.implicit(problem), "roll": hg.unrolled(problem)}, FIRST)),
}
ALWAYS = (("implicit", "debug_nans"), ("implicit", "key_reuse"))  # all others are slow tests


@pytest.mark.parametrize(
    ("case", "setting"),
    [
        pytest.param(case, name, marks=[pytest.mark.slow] * ((case, name) not in ALWAYS))
        for case in CASES
        for name in SETTINGS
    ],
)
def test_a_run(case, setting):
    estimator, inner_optimizer, variables, window = CASES[case]()
    tx = hg.bilevel(estimator, inner_optimizer=inner_optimizer, outer_optimizer=optax.sgd(1e-2), window=window, every=2)
    batch = jax.tree.map(jnp.asarray, (X, Y))
    windows = batch if window == 1 else jax.tree.map(lambda x: jnp.stack([x] * window), batch)
    state = tx.init(variables)
    step = jax.jit(lambda v, s: tx.update(None, s, v, inner_batch=windows, outer_batch=batch))
    with SETTINGS[setting]():
        for _ in range(2):
            _, state = step(variables, state)
    assert int(state.info.step) == 2
    assert not bool(state.info.skipped)


@pytest.mark.parametrize("solver", [hg.solvers.cg, pytest.param(hg.solvers.neumann, marks=pytest.mark.slow)])
def test_a_random_preconditioner_draws_no_key_twice(solver):
    inner = lambda w, h, b, k: 0.5 * jnp.sum(jnp.exp(h) * w**2) - jnp.sum(w * b)  # noqa: E731
    problem = hg.BilevelProblem(inner, lambda w, h, b, k: jnp.sum((w - b) ** 2))
    estimator = hg.implicit(problem, solver(3, preconditioner=hg.preconditioners.nystrom(2)))
    with jax.debug_key_reuse(True):
        found = hg.hypergrad(estimator)(jnp.ones(4), jnp.arange(4.0), jnp.ones(4), jnp.zeros(4), key=jax.random.key(0))
    assert bool(jnp.isfinite(found).all())


@pytest.mark.parametrize(
    "setting",
    [pytest.param(s, marks=[pytest.mark.slow] * (s != "debug_nans")) for s in SETTINGS],
)
def test_a_check_of_the_gradient(setting):
    inner = lambda w, h, b, k: jnp.sum(jnp.float32(0.5) * jnp.exp(h) * w**2 - w)  # noqa: E731
    problem = hg.BilevelProblem(inner, lambda w, h, b, k: jnp.sum(w))
    at = hg.BilevelParams(jnp.exp(-jnp.array([0.0, 2.0])), jnp.array([0.0, 2.0]))
    strict = (
        SETTINGS[setting]() if setting != "transfer_guard" else contextlib.nullcontext()
    )  # a check reads numbers back
    with strict:
        assert hg.diagnostics.check_hypergrad(hg.implicit(problem, hg.solvers.cg(5)), at, (), (), key=None).passed


@pytest.mark.parametrize("solver", [pytest.param(hg.solvers.cg(5), marks=pytest.mark.slow), hg.solvers.identity()])
def test_what_is_not_known_with_nan_checks(solver):
    """An inner loss that is not known, and a residual that is not measured, are NaN; the setting must find none."""
    problem = hg.BilevelProblem(lambda w, h, b, k: jnp.sum((w - h) ** 2), lambda w, h, b, k: jnp.sum(w**2))
    w, h = jnp.ones(2), jnp.zeros(2)

    def infos():
        """Compile anew: the setting is read while tracing."""
        estimator = hg.implicit(problem, solver)
        fn = hg.value_and_hypergrad(estimator)
        tx = hg.bilevel(estimator, inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.sgd(0.1))

        @jax.jit
        def both(w, h, state):
            _, info = fn(w, h, (), (), key=None)
            _, state = tx.update(jnp.ones(2), state, hg.BilevelParams(w, h), inner_batch=(), outer_batch=())
            return info, state.info

        return fn(w, h, (), (), key=None)[1], *both(w, h, tx.init(hg.BilevelParams(w, h)))

    for info in infos():
        assert np.isnan(info.inner_loss)
    with jax.debug_nans(True):
        for info in infos():
            assert float(info.inner_loss) == 2.0
            assert not bool(info.skipped)
