"""Every optimizer of optax as an inner optimizer, on a ReLU network with dead units: right, or refused in our words.

Every other hidden unit is dead for all data, so that its weights' gradients are exactly zero, and a bias starts at
zero. Then all are dead, and a whole layer's gradient is zero. Then no example of the first and third batch counts, and
the whole gradient is zero there. The program is smooth around the weights: live units stay live. So central differences
of all K steps, in float64 with relative steps of 1e-5, are right to about 1e-8.
"""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from tests.optimizers import BEGIN, DOCS, END, REFUSED, ROWS, hyperparameters, table

STEPS = 6  # radam rectifies from the sixth on
MODES = {"reverse": hg.reverse(), "forward": hg.forward()}
RTOL = 1e-6


def batches(seed, *shape, masked=()):
    """Return examples with positive inputs, smooth targets, and what each batch counts: 1, or 0 where masked."""
    x = np.random.default_rng(seed).uniform(0.2, 1.0, (*shape, 4, 3))
    counts = ~np.isin(np.arange(np.prod(shape, dtype=int)).reshape(shape), masked)
    return jax.tree.map(jnp.asarray, (x, np.sin(x @ np.array([1.0, -2.0, 1.5])), counts.astype(float)))


def start(*, dead_layer):
    """Return weights with every other hidden unit dead, or all."""
    rng = np.random.default_rng(5)
    signs = np.full(4, -1.0) if dead_layer else np.array([1.0, -1.0, 1.0, -1.0])
    params = {
        "in": signs * rng.uniform(0.3, 1.0, (3, 4)),
        "out": {"bias": np.zeros(3), "kernel": rng.normal(size=(4, 3)), "last": rng.normal(size=3)},
    }
    return jax.tree.map(jnp.asarray, params)


def predict(params, x):
    """Return the network's outputs."""
    features = jnp.tanh(jax.nn.relu(x @ params["in"]) @ params["out"]["kernel"] + 0.5 + params["out"]["bias"])
    return features @ params["out"]["last"]


def outer_loss(params, hyperparams, batch, key):
    return batch[2] * jnp.mean((predict(params, batch[0]) - batch[1]) ** 2)


def inner_loss(params, hyperparams, batch, key):
    fit = outer_loss(params, hyperparams, batch, key)
    if "loss" not in hyperparams:
        return fit
    return fit + batch[2] * hg.penalties.l2(params["out"]["last"], jnp.exp(hyperparams["loss"]))


def at(row, *, loss=None):
    """Return the hyperparameters to differentiate at."""
    own = {name: jnp.asarray(value) for name, value in row.at.items()}
    return {"loss": jnp.log(jnp.array([0.02, 0.05, 0.1])), **own} if (row.loss if loss is None else loss) else own


def hypergrad(make, mode):
    """Return the function of weights, hyperparameters and batches under test."""
    fn = hg.hypergrad(hg.unrolled(hg.BilevelProblem(inner_loss, outer_loss), MODES[mode]), inner_optimizer=make)
    return lambda params, h, inner=None: fn(params, h, inner or batches(0, STEPS), batches(1), key=None)


def reached_loss(make, params, h, inner):
    """Return the outer loss after K steps, from optax alone."""
    optimizer = make(h)
    state = optimizer.init(params)

    def step(now, batch):
        params, state = now
        grads = jax.grad(inner_loss)(params, h, batch, None)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, state), inner)
    return outer_loss(params, h, batches(1), None)


def differences(make, h):
    """Return the function of weights and batches that gives central differences."""
    flat, restore = jax.flatten_util.ravel_pytree(h)
    steps = jnp.diag(1e-5 * jnp.abs(flat))

    def fn(params, inner):
        values = jax.vmap(lambda x: reached_loss(make, params, restore(x), inner))
        points = jnp.concatenate([flat + steps, flat - steps])
        up, down = jnp.split(values(points), 2)
        return restore((up - down) / (2 * jnp.diag(steps)))

    return fn


COMMON = {"adam", "adamw", "lion", "rmsprop", "sgd with momentum", "chain(hg.optimizers.clip_by_global_norm, sgd)"}


def by_row(rows, common=COMMON):
    """Return parameters for the rows; those of less common optimizers, seconds each, are slow: `pytest -m slow`."""
    return [pytest.param(r, id=r.name, marks=[] if r.name in common else [pytest.mark.slow]) for r in rows]


@pytest.mark.parametrize(
    "row", by_row((row for row in ROWS if row.verdict != REFUSED), common={"adam", "sgd with momentum"})
)
def test_hypergradients_equal_finite_differences(row, x64):
    h = at(row)
    want = jax.jit(differences(row.make, h))
    got = {mode: jax.jit(hypergrad(row.make, mode)) for mode in row.modes}
    for case, (params, inner) in {
        "dead units": (start(dead_layer=False), batches(0, STEPS)),
        "layers": (start(dead_layer=True), batches(0, STEPS)),
        "masked": (start(dead_layer=False), batches(0, STEPS, masked=(0, 2))),
    }.items():
        by_differences = want(params, inner)
        results = {mode: fn(params, h, inner) for mode, fn in got.items()}
        finite = all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(results))
        is_right = getattr(row, case, True)
        assert finite or not is_right, case
        for mode in results if finite else ():
            for name, value in by_differences.items():
                scale = float(jnp.max(jnp.abs(value)))
                assert scale > 1e-6 or case == "layers", f"{name} has no effect to check"
                atol = RTOL * max(scale, 1e-4)  # differences are right to some 1e-11 of the loss, which is about 1
                np.testing.assert_allclose(results[mode][name], value, rtol=0, atol=atol, err_msg=f"{mode} {name}")
        assert is_right or not finite, f"right with {case} too: say so in the row"


@pytest.mark.parametrize(
    "row", by_row((row for row in ROWS if row.without or row.modes != ("reverse", "forward")), common={"adam"})
)
def test_refusals_say_what_to_do(row, x64):
    for mode in MODES:
        if row.without or mode not in row.modes:
            with pytest.raises((TypeError, ValueError), match=row.message):
                jax.eval_shape(hypergrad(row.without or row.make, mode), start(dead_layer=False), at(row))


def test_a_refusal_needs_no_jit(x64):
    row = next(row for row in ROWS if row.name == "adam")
    with pytest.raises(ValueError, match=row.message):
        hypergrad(row.without, "reverse")(start(dead_layer=False), at(row))


@pytest.mark.parametrize("row", by_row(row for row in ROWS if not row.loss))
def test_a_loss_hyperparameter_that_only_passes_signs_is_refused(row, x64):
    """Its hypergradient is zero almost everywhere, by finite differences too."""
    h = at(row, loss=True)
    params = start(dead_layer=False)
    assert not np.any(jax.jit(differences(row.make, h))(params, batches(0, STEPS))["loss"])
    for mode in MODES:
        with pytest.raises(ValueError, match=r"leaf \['loss'\], which enters neither"):
            jax.eval_shape(hypergrad(row.make, mode), params, h)


TWINS = {
    "clip_by_global_norm": (1.5,),
    "clip_by_block_rms": (0.4,),
    "normalize_by_update_norm": (0.7, 0.01),
}


def updates_of_size(size, dtype=float):
    rng = np.random.default_rng(0)
    return {"a": jnp.asarray(size * rng.normal(size=(3, 2)), dtype), "b": jnp.asarray(size * rng.normal(size=4), dtype)}


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize(
    "dtype",
    [pytest.param(jnp.float64, marks=pytest.mark.slow), jnp.float32, jnp.bfloat16],
    ids=lambda dtype: jnp.dtype(dtype).name,
)
def test_twins_have_the_values_of_optax(name, dtype, x64):
    """Bit by bit; what bfloat16 rounds in each operation is rounded once, so it may differ by two units."""
    ours, theirs = (getattr(where, name)(*TWINS[name]) for where in (hg.optimizers, optax))
    for size in (0.0, 1e-3, 0.2, 1.0, 30.0):
        updates = updates_of_size(size, dtype)
        got, want = (tx.update(updates, tx.init(updates))[0] for tx in (ours, theirs))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert a.dtype == b.dtype == dtype
            rtol = 2 * float(jnp.finfo(dtype).eps) if dtype == jnp.bfloat16 else 0.0
            np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=rtol, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("size", [0.0, 1.0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1e-3, 0.2, 30.0))])
def test_derivatives_of_twins_equal_finite_differences(name, size, x64):
    """In the updates and in the numbers, in both modes, and where the updates are zero."""
    flat, restore = jax.flatten_util.ravel_pytree(updates_of_size(size))
    point = jnp.concatenate([flat, jnp.array(TWINS[name])])

    def fn(x):
        tx = getattr(hg.optimizers, name)(*x[len(flat) :])
        return jax.flatten_util.ravel_pytree(tx.update(restore(x[: len(flat)]), tx.init(None))[0])[0]

    steps = 1e-6 * jnp.diag(jnp.maximum(jnp.abs(point), 1e-3))
    differences = jnp.stack([(fn(point + s) - fn(point - s)) / (2 * s.sum()) for s in steps], axis=1)
    for jacobian in (jax.jacrev(fn)(point), jax.jacfwd(fn)(point)):
        np.testing.assert_allclose(jacobian, differences, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_twins_hold_under_strict_promotion(hard_mode):
    updates = updates_of_size(1.0, jnp.float32)
    for name, numbers in TWINS.items():
        tx = getattr(hg.optimizers, name)(*numbers)
        jax.grad(lambda u, tx=tx: sum(x.sum() for x in jax.tree.leaves(tx.update(u, tx.init(u))[0])))(updates)


def test_the_documentation_shows_the_catalogue():
    shown = DOCS.read_text().split(BEGIN)[1].split(END)[0]
    version, found = shown.strip().split("\n\n")
    assert version.startswith("Tested with optax ")
    assert found == table().strip()


def test_rows_have_distinct_names_and_check_something():
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert all(hyperparameters(row) for row in ROWS if row.verdict != REFUSED)
