"""Self-tuning layers: gates equal weights of each example's own; what STN and Δ-STN train; what they learn."""

import contextlib
import functools

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import hypergrad as hg
from hypergrad import responses
from hypergrad.responses.layers import Run, displaced_weights, intercepted
from tests.problems import finite_differences, relative_error
from tests.self_tuned_models import (
    F64,
    MODELS,
    Mlp,
    NnxModel,
    Normalized,
    inputs,
    outputs_by_definition,
    train_response,
)

pytestmark = pytest.mark.usefixtures("x64")

H = {"a": jnp.array(0.3), "b": jnp.array([0.1, -0.2])}
VARIANTS = {"stn": responses.stn(gate_std=0.3), "delta": responses.delta_stn()}
VARIANTS["delta, nonlinear"] = responses.delta_stn(linearized=False)


def hyper():
    """Return three hyperparameters in two leaves, in 64 bit."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), H)


def init(problem, params, x, h=None, **options):
    """Return response parameters with random gates and directions; nothing is compiled."""
    at = params, hyper() if h is None else h, x
    shapes, rng = jax.eval_shape(lambda *at: responses.init(problem, 0, *at, **options), *at), np.random.default_rng(0)
    layers = jax.tree.map(lambda s: jnp.asarray(0.5 * rng.normal(size=s.shape), s.dtype), shapes.layers)
    return shapes._replace(params=params, layers=layers)


def rows(displacement):
    """Return hyperparameters with a leading batch axis, from displacements of their entries."""
    return jax.tree.map(jnp.add, hyper(), {"a": displacement[:, 0], "b": displacement[:, 1:]})


def gated(apply, start, x):
    """Return the outputs with gates at a random displacement, by layers and by definition, and without any gates."""
    displacement = 0.3 * jax.random.normal(jax.random.key(1), (len(x), 3))

    def outputs(start):
        with intercepted(Run(start.params, start.layers, displacement)):
            by_gates = apply(start.params, x)
        exact = outputs_by_definition(apply, start.params, start.layers, displacement, x)
        return by_gates, exact, apply(start.params, x)

    return jax.jit(outputs)(start)


def squares(apply):
    """Return a problem with a loss per example that depends on its hyperparameters."""

    def inner(w, h, x, key):
        per_example = jnp.mean(jnp.reshape(apply(w, x) - 1.0, (x.shape[0], -1)) ** 2, 1)
        return jnp.mean(jnp.exp(h["a"]) * per_example + jnp.sum(h["b"], -1))

    return hg.BilevelProblem(inner, lambda w, h, x, key: jnp.mean((apply(w, x) + 1.0) ** 2))


@functools.cache
def linen(name):
    """Return a Linen model's apply, its weights and a batch."""
    with jax.enable_x64(True):
        model, kind = MODELS[name]
        x = inputs(kind)
        params = jax.jit(model.init)(jax.random.key(0), x)["params"]
        return (lambda w, x: model.apply({"params": w}, x)), params, x


RARER = ("transformer", "OptimizedLSTMCell", "LSTMCell", "GRUCell", "MGUCell", "SimpleCell")


@pytest.mark.parametrize("name", [pytest.param(m, marks=[pytest.mark.slow] * (m in RARER)) for m in MODELS])
def test_gates_an_example_equal_weights_an_example(name):
    """Two products a layer, and no copies: the outputs are those of weights W₀ + (V h̃) ⊙ W₁ of each example's own."""
    apply, params, x = linen(name)
    start = init(responses.self_tuning(squares(apply)), params, x)
    got, exact, plain = gated(apply, start, x)
    assert relative_error(got, exact) < 1e-13
    assert relative_error(exact, plain) > 0.01
    kernels = sum(path[-1].key in ("kernel", "embedding") for path, _ in jax.tree.leaves_with_path(params))
    assert len(start.layers) == kernels  # every layer that is linear in its weights responds


@pytest.mark.parametrize(
    "name", ["mlp", *(pytest.param(m, marks=pytest.mark.slow) for m in ("cnn", "transformer", "OptimizedLSTMCell"))]
)
def test_the_linearized_loss_trains_weights_plainly_and_the_response_on_one_jvp(name):
    """Its gradient by definition: of L(net(x; 0); λ) in the weights, of L(o + ȯ; λ + σε) in the response."""
    apply, params, x = linen(name)
    plain = squares(apply)
    problem = responses.self_tuning(plain)
    start = init(problem, params, x)
    displacement = 0.3 * jax.random.normal(jax.random.key(1), (len(x), 3))
    noisy, inner = rows(displacement), problem.response.losses_at(hyper())[0]
    value, grad = jax.jit(jax.value_and_grad(inner))(start, noisy, x, None)

    want_value, want = jax.jit(jax.value_and_grad(plain.inner_loss))(params, rows(jnp.zeros((len(x), 3))), x, None)

    def response_loss(layers):
        run = lambda t: outputs_by_definition(apply, params, layers, t * displacement, x)  # noqa: E731
        output, slope = jax.jvp(run, (0.0,), (1.0,))
        return squares(lambda w, x: output + slope).inner_loss(None, noisy, x, None)

    assert float(value) == pytest.approx(float(want_value), rel=1e-12)
    assert relative_error(grad.params, want) < 1e-12
    assert relative_error(grad.layers, jax.jit(jax.grad(response_loss))(start.layers)) < 1e-10


@pytest.mark.parametrize("variant", VARIANTS)
def test_hypergradients_by_two_other_routes(variant):
    """``direct`` = chain rule with the response's Jacobian = finite differences about a fixed centre."""
    apply, params, x = linen("mlp")
    plain = squares(apply)
    problem = responses.self_tuning(plain, variant=VARIANTS[variant])
    start, h = init(problem, params, x), hyper()
    got = jax.jit(functools.partial(hg.hypergrad(hg.direct(problem)), key=None))(start, h, x, x)

    @jax.jit
    def outer(h):
        center = (
            hyper() if problem.response.losses_at and VARIANTS[variant].centered else jax.tree.map(jnp.zeros_like, h)
        )
        displacement = jnp.concatenate([jnp.ravel(v) for v in jax.tree.leaves(optax.tree.sub(h, center))])
        return plain.outer_loss(displaced_weights(start.params, start.layers, displacement), h, x, None)

    assert relative_error(got, finite_differences(outer, h)) < 1e-7
    outer_loss = problem.response.losses_at(h)[1]
    each = jax.jit(jax.grad(outer_loss, argnums=1))(start, rows(jnp.zeros((len(x), 3))), x, None)
    assert relative_error(got, jax.tree.map(lambda g: g.sum(0), each)) < 1e-10


@pytest.mark.parametrize("variant", [pytest.param(v, marks=[pytest.mark.slow] * (v != "delta")) for v in VARIANTS])
def test_exported_weights_are_those_of_the_unmodified_model(variant):
    apply, params, x = linen("transformer" if variant == "stn" else "mlp")
    problem = responses.perturbed(responses.self_tuning(squares(apply), variant=VARIANTS[variant]), scale=0.5)
    start = init(problem, params, x)
    weights = responses.deployable_params(hg.BilevelParams(start, hyper()))
    assert jax.tree.structure(weights) == jax.tree.structure(params)
    tuned = jax.jit(problem.outer_loss)(start, hyper(), x, None)
    plain = jax.jit(squares(apply).outer_loss)(weights, hyper(), x, None)
    assert float(tuned) == pytest.approx(float(plain), rel=1e-12)
    assert (relative_error(weights, params) == 0.0) == (variant != "stn")


@pytest.mark.slow
def test_linen_and_nnx_agree_with_the_definition():
    """Module surgery leaves the state as it was, and adds the same response as the interceptor does."""
    model = NnxModel(nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    tunable, same, _ = nnx.split(responses.self_tunable(model), nnx.Param, ...)
    assert jax.tree.structure(same) == jax.tree.structure(params)
    apply = lambda w, x: nnx.merge(tunable, w, rest, copy=True)(x)  # noqa: E731
    plain = lambda w, x: nnx.merge(graphdef, w, rest, copy=True)(x)  # noqa: E731
    x = inputs("images")
    np.testing.assert_array_equal(jax.jit(apply)(params, x), jax.jit(plain)(params, x))

    problem = responses.self_tuning(squares(apply), variant=responses.stn())
    start = init(problem, params, x)
    layers = {"attention/key", "attention/out", "attention/query", "attention/value"}
    assert set(start.layers) == layers | {"conv", "embed", "layers/0", "layers/1"}
    got, exact, _ = gated(apply, start, x)
    assert relative_error(got, exact) < 1e-12
    weights = responses.deployable_params(hg.BilevelParams(start, hyper()))
    assert jax.tree.structure(weights) == jax.tree.structure(params)
    tuned = jax.jit(problem.outer_loss)(start, hyper(), x, None)
    assert float(tuned) == pytest.approx(float(jax.jit(squares(plain).outer_loss)(weights, None, x, None)), rel=1e-12)


class Shared(nnx.Module):
    """One layer called twice, and once more under another name."""

    def __init__(self, rngs):
        self.one = nnx.Linear(4, 4, rngs=rngs, **F64)
        self.again = self.one

    def __call__(self, x):
        return self.again(nnx.tanh(self.one(inputs=nnx.tanh(self.one(x)))))


def test_a_layer_of_nnx_may_run_several_times_and_keeps_its_weights():
    tunable, params, rest = nnx.split(responses.self_tunable(Shared(nnx.Rngs(0))), nnx.Param, ...)
    apply = lambda w, x: nnx.merge(tunable, w, rest)(x)  # noqa: E731  no copy: variables are shared with params
    x = inputs("vectors")
    start = init(responses.self_tuning(squares(apply)), params, x)
    before = jax.tree.map(jnp.copy, start.params)
    displacement = 0.3 * jax.random.normal(jax.random.key(1), (len(x), 3))
    with intercepted(Run(start.params, start.layers, displacement)):
        got = apply(start.params, x)
    assert relative_error(start.params, before) == 0.0
    assert relative_error(got, gated(apply, start, x)[1]) < 1e-12


def test_nnx_is_linearized_too():
    tunable, params, rest = nnx.split(responses.self_tunable(Shared(nnx.Rngs(0))), nnx.Param, ...)
    apply = lambda w, x: nnx.merge(tunable, w, rest, copy=True)(x)  # noqa: E731
    x = inputs("vectors")
    problem = responses.self_tuning(squares(apply))
    start = init(problem, params, x)
    displacement = 0.3 * jax.random.normal(jax.random.key(1), (len(x), 3))
    noisy = rows(displacement)

    def response_loss(layers):
        run = lambda t: outputs_by_definition(apply, params, layers, t * displacement, x)  # noqa: E731
        output, slope = jax.jvp(run, (0.0,), (1.0,))
        return squares(lambda w, x: output + slope).inner_loss(None, noisy, x, None)

    got = jax.jit(jax.grad(problem.response.losses_at(hyper())[0]))(start, noisy, x, None)
    assert relative_error(got.layers, jax.jit(jax.grad(response_loss))(start.layers)) < 1e-10


def test_what_acts_on_weights_is_perturbed_once_a_batch_and_seen_by_penalties():
    """A penalty's decay is marked False: the loss gets weights with that part of the response in them."""
    apply, params, x = linen("mlp")
    seen = {}

    def inner(w, h, batch, key):
        seen.update(rate=h["rate"].shape, decay=h["decay"].shape)
        return jnp.mean(h["rate"] * jnp.mean(apply(w, batch) ** 2, (1, 2))) + hg.penalties.l2(w, jnp.exp(h["decay"]))

    plain = hg.BilevelProblem(inner, lambda w, h, batch, key: jnp.mean(apply(w, batch) ** 2))
    h = {"decay": jnp.array(0.2), "rate": jnp.array(0.1)}
    marks = {"decay": False, "rate": True}
    problem = responses.self_tuning(plain, variant=responses.delta_stn(linearized=False), per_example=marks)
    start = init(problem, params, x, h)
    rates = 0.1 + 0.2 * jax.random.normal(jax.random.key(1), (len(x),))
    noisy = {"decay": jnp.array(0.5), "rate": rates}
    got = jax.jit(problem.response.losses_at(h)[0])(start, noisy, x, None)
    assert seen == {"rate": (len(x),), "decay": ()}

    @jax.jit
    def by_definition(start):
        displacement = jnp.stack([jnp.full(len(x), 0.3), rates - 0.1], 1)
        outputs = outputs_by_definition(apply, start.params, start.layers, displacement, x)
        weights = displaced_weights(start.params, start.layers, jnp.array([0.3, 0.0]))
        return jnp.mean(rates * jnp.mean(outputs**2, (1, 2))) + hg.penalties.l2(weights, jnp.exp(0.5))

    assert float(got) == pytest.approx(float(by_definition(start)), rel=1e-12)
    drawn = jax.jit(responses.perturbed(problem, scale=0.5).inner_loss)
    assert np.isfinite(float(drawn(start, h, x, jax.random.key(0))))


@pytest.mark.parametrize(("groups", "each"), [(None, 1), (3, 2)])
def test_examples_of_a_group_share_a_perturbation(groups, each):
    """Without groups each example has its own; the hyperparameter that is marked False has one per batch."""
    model, x = nn.Dense(2, **F64), inputs("vectors", 6)
    loss = lambda w, h, x, key: (jnp.mean(model.apply({"params": w}, x)), h)  # noqa: E731
    problem = hg.BilevelProblem(loss, loss, has_aux=True)
    problem = responses.self_tuning(problem, variant=VARIANTS["stn"], per_example={"a": True, "b": False})
    start = init(problem, jax.jit(model.init)(jax.random.key(0), x)["params"], x)
    noisy = responses.perturbed(problem, scale=0.5, num_groups=groups)
    seen = jax.jit(noisy.inner_loss)(start, hyper(), x, jax.random.key(0))[1]
    assert seen["b"].shape == (2,)
    by_group = np.asarray(seen["a"]).reshape(-1, each)
    assert (by_group == by_group[:, :1]).all()
    assert len(set(by_group[:, 0])) == len(by_group) == 6 // each


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "steps", "tolerance"), [("delta", 2000, 0.01), ("stn", 4000, 0.03)])
def test_a_linear_network_learns_its_exact_response(variant, steps, tolerance):
    """Two linear layers with a Jacobian penalty per input: w*(λ) in closed form, which gates can represent.

    Perturbations from a fixed design with the mean and covariance of σε have no sampling noise: an error of order σ² is
    left, and what training leaves.
    """
    rng = np.random.default_rng(0)
    scales = np.geomspace(1.5, 0.4, 3)
    x, xv = (jnp.asarray(rng.normal(size=(100, 3)) * scales) for _ in range(2))
    y, yv = (jnp.asarray(m @ np.array([1.0, -0.5, 0.3]) + 0.5 * rng.normal(size=100)) for m in (x, xv))
    net = nn.Sequential([nn.Dense(8, use_bias=False, **F64), nn.Dense(1, use_bias=False, **F64)])
    apply = lambda w, x: net.apply({"params": w}, x)[..., 0]  # noqa: E731

    def inner(w, coefficients, batch, key):
        jacobian = apply(w, jnp.broadcast_to(jnp.eye(3), (len(batch[0]), 3, 3)))  # of a linear map: at the unit vectors
        return jnp.mean((apply(w, batch[0]) - batch[1]) ** 2 + jnp.sum(coefficients * jacobian**2, 1))

    outer = lambda w, h, batch, key: jnp.mean((apply(w, batch[0]) - batch[1]) ** 2)  # noqa: E731
    problem = hg.reparameterize(hg.BilevelProblem(inner, outer), hg.bijectors.exp())
    tuned = responses.self_tuning(problem, variant=VARIANTS[variant] if variant == "delta" else responses.stn())
    h, many = jnp.array([-1.0, 0.0, -2.0]), (jnp.tile(x, (6, 1)), jnp.tile(y, 6))
    design = 0.1 * jnp.sqrt(3.0) * jnp.repeat(jnp.concatenate([jnp.eye(3), -jnp.eye(3)]), len(x), 0)
    around = lambda w, h, batch, key: tuned.response.losses_at(h)[0](w, h + design, batch, key)  # noqa: E731
    start = responses.init(tuned, 1, net.init(jax.random.key(0), x)["params"], h, many)
    rates = {"weights": 3e-3, "response": 3e-2}
    learned = train_response(hg.BilevelProblem(around, outer), start, h, many, rates, steps=steps)
    end = lambda w: (w["layers_0"]["kernel"] @ w["layers_1"]["kernel"])[:, 0]  # noqa: E731
    solve = lambda h: jnp.linalg.solve(x.T @ x / 100 + jnp.diag(jnp.exp(h)), x.T @ y / 100)  # noqa: E731
    exact, got = (jax.jacfwd(f)(h) for f in (solve, lambda h: end(tuned.response.weights(learned, h))))
    assert relative_error(got, exact) < tolerance
    gradient = hg.hypergrad(hg.direct(tuned))(learned, h, (x, y), (xv, yv), key=0)
    true = jax.grad(lambda h: jnp.mean((xv @ solve(h) - yv) ** 2))(h)
    assert float(jnp.vdot(gradient, true) / jnp.linalg.norm(gradient) / jnp.linalg.norm(true)) > 0.999
    if variant == "delta":  # law: the centre is w*(λ) whatever the scale
        assert relative_error(end(learned.params), solve(h)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("variant", [pytest.param(v, marks=[pytest.mark.slow] * (v != "delta")) for v in VARIANTS])
def test_batch_norm_keeps_its_statistics(variant):
    model, x = Normalized(), inputs("vectors", 8)
    first = jax.jit(model.init)(jax.random.key(0), x)

    def inner(w, h, x, key, stats):
        y, new = model.apply({"params": w, "batch_stats": stats}, x, mutable=["batch_stats"])
        return jnp.mean(jnp.exp(h) * jnp.mean((y - 1.0) ** 2, 1)), new["batch_stats"]

    def outer(w, h, x, key, stats):
        return jnp.mean((model.apply({"params": w, "batch_stats": stats}, x, train=False) - 1.0) ** 2), stats

    problem = responses.self_tuning(hg.BilevelProblem(inner, outer, stateful=True), variant=VARIANTS[variant])
    problem = responses.perturbed(problem, scale=0.5)
    stats, h = first["batch_stats"], jnp.array(0.0)
    start = jax.jit(lambda w: responses.init(problem, 0, w, h, x, model_state=stats))(first["params"])
    tx = hg.bilevel(hg.direct(problem), inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.sgd(0.1), every=2,
                    window=2, model_state=stats)  # fmt: skip
    variables = hg.BilevelParams(start, h)
    state = tx.init(variables)
    step = jax.jit(tx.update)
    for _ in range(2):
        updates, state = step(None, state, variables, inner_batch=jnp.stack([x, x]), outer_batch=x)
        variables = optax.apply_updates(variables, updates)
    assert not bool(state.info.skipped)
    assert relative_error(state.model_state, stats) > 0.01
    if variant == "delta":  # the weights' own pass alone makes the statistics: those of a plain run
        w, plain, slope = first["params"], stats, jax.jit(jax.grad(inner, has_aux=True))
        for _ in range(4):
            grads, plain = slope(w, jnp.zeros(8), x, None, plain)
            w = optax.apply_updates(w, optax.tree.scale(-0.1, grads))
        assert relative_error(state.model_state, plain) < 1e-6  # statistics are kept in float32
        assert relative_error(variables.params.params, w) < 1e-6


@pytest.mark.slow
def test_a_rate_through_which_nothing_differentiates_gets_the_exact_hypergradient():
    """Dropout at rate p on the inputs of a linear model is ridge regression, in closed form (Wager et al., 1307.1493).

    E ‖y − (X ∘ m/(1−p)) w‖²/n = ‖y − X w‖²/n + p/(1−p) Σⱼ wⱼ² ‖Xⱼ‖²/n
    """
    rng = np.random.default_rng(1)
    x, xv = (jnp.asarray(rng.normal(size=(n, 4)) * np.geomspace(2.0, 0.5, 4)) for n in (20, 200))
    y, yv = (m @ jnp.array([1.0, -1.0, 0.5, 2.0]) + jnp.asarray(rng.normal(size=len(m))) for m in (x, xv))
    model = nn.Dense(1, use_bias=False, **F64)
    apply = lambda w, x: model.apply({"params": w}, x)[:, 0]  # noqa: E731

    def inner(w, rate, batch, key):
        return jnp.mean((apply(w, hg.noise.dropout(key, batch[0], rate)) - batch[1]) ** 2)

    outer = lambda w, rate, batch, key: jnp.mean((apply(w, batch[0]) - batch[1]) ** 2)  # noqa: E731
    problem = hg.reparameterize(hg.BilevelProblem(inner, outer), hg.bijectors.sigmoid())
    problem = responses.perturbed(responses.self_tuning(problem), scale=0.3)
    h, many = jnp.array(-1.0), (jnp.tile(x, (50, 1)), jnp.tile(y, 50))  # 1,000 masks and perturbations per step
    start = responses.init(problem, 0, model.init(jax.random.key(0), x)["params"], h, many)
    learned = train_response(problem, start, h, many, {"weights": 1e-2, "response": 1e-2}, steps=2000)

    def ridge(h):
        odds = jax.nn.sigmoid(h) / jax.nn.sigmoid(-h)
        weights = jnp.linalg.solve(x.T @ x + odds * jnp.diag(jnp.sum(x**2, 0)), x.T @ y)
        return jnp.mean((xv @ weights - yv) ** 2)

    got = hg.hypergrad(hg.direct(problem))(learned, h, many, (xv, yv), key=0)
    assert float(got) == pytest.approx(float(jax.grad(ridge)(h)), rel=0.1)
    assert abs(float(got)) > 0.01


@pytest.mark.parametrize("through", ["msgpack", "orbax"])
def test_response_parameters_are_saved_and_restored(through, tmp_path):
    apply, params, x = linen("cnn")
    problem = responses.self_tuning(squares(apply))
    tree = init(problem, params, x), responses.HyperparamsWithScale(hyper(), jnp.array(0.1))
    blank = jax.tree.map(jnp.zeros_like, tree)
    if through == "msgpack":
        restored = flax.serialization.from_bytes(blank, flax.serialization.to_bytes(tree))
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", tree)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "state", jax.tree.map(ocp.utils.to_shape_dtype_struct, blank))
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, restored, tree)


class Positions(nn.Module):
    """A positional embedding looked up without the batch's axis."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, **F64)(x) + nn.Embed(4, 8, name="places", **F64)(jnp.arange(3)).mean(0)


class Body(nn.Module):
    """One of several layers that a scan runs."""

    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(4, **F64)(x), None


class Scanned(nn.Module):
    """Layers under a scan over their weights."""

    @nn.compact
    def __call__(self, x):
        body = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return nn.Dense(3, **F64)(body(name="inner")(x, None)[0])


def tuned(model, **options):
    """Return the self-tuning problem of a Linen model, and its initial weights."""
    params = jax.jit(model.init)(jax.random.key(0), inputs("vectors"))["params"]
    return responses.self_tuning(squares(lambda w, x: model.apply({"params": w}, x)), **options), params


def trace(problem, start, h, batch):
    """Trace the perturbed inner loss, without computing anything."""
    return jax.eval_shape(responses.perturbed(problem, scale=0.1).inner_loss, start, h, batch, jax.random.key(0))


def test_layers_that_cannot_respond_are_refused_or_left_out():
    x, h = inputs("vectors"), hyper()
    problem, params = tuned(Positions())
    start = init(problem, params, x)
    with pytest.raises(ValueError, match="layer places to have outputs with one row for each of 5"):
        trace(problem, start, h, x)
    chosen, _ = tuned(Positions(), layers=lambda path: path != "places")
    start = init(chosen, params, x)
    assert list(start.layers) == ["Dense_0"]
    assert trace(chosen, start, h, x).shape == ()
    problem, params = tuned(Scanned())
    with pytest.raises(ValueError, match=r"layer inner/Dense_0 to run with weights .*nn\.scan"):
        responses.init(problem, 0, params, h, x)
    with pytest.raises(ValueError, match="runs layers that can be tuned; got none"):
        responses.init(responses.self_tuning(squares(lambda w, x: x @ w)), 0, jnp.ones((4, 2)), h, x)
    nothing, params = tuned(Mlp(), layers=lambda path: False)
    with pytest.raises(ValueError, match=r"got 'Dense_0', 'DenseGeneral_0', of which layers\(\) selected none"):
        responses.init(nothing, 0, params, h, x)
    with pytest.raises(ValueError, match="linear in its weights"):
        responses.self_tunable(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))


def test_refusals_of_arguments():
    x, h = inputs("vectors"), hyper()
    problem, params = tuned(Mlp())
    start = init(problem, params, x)
    with pytest.raises(ValueError, match="a batch, to trace the inner loss"):
        responses.init(problem, 0, params, h)
    with pytest.raises(ValueError, match="per_example to be a tree prefix of hyperparams"):
        responses.init(tuned(Mlp(), per_example={"a": True})[0], 0, params, h, x)
    for wrong in ({"variant": "stn"}, {"per_example": "yes"}, {"per_example": None}, {"layers": "head"}):
        with pytest.raises(TypeError, match="expected"):
            tuned(Mlp(), **wrong)
    with pytest.raises(TypeError, match=r"a flax.nnx.Module; got a Mlp"):
        responses.self_tunable(Mlp())
    with pytest.raises(TypeError, match=r"self-tuning response parameters \(CenteredParams\); got dict"):
        problem.inner_loss(params, h, x, None)
    with pytest.raises(TypeError, match="without a scale"):
        trace(problem, start, responses.HyperparamsWithScale(h, jnp.array(0.0)), x)
    with pytest.raises(ValueError, match="with 3 entries, for which the self-tuning response was made; got 5"):
        trace(problem, start, {**h, "c": jnp.zeros(2)}, x)
    two = lambda w, h, b, k: jnp.mean(Mlp().apply({"params": w}, b[0])) * jnp.mean(h["a"])  # noqa: E731
    with pytest.raises(ValueError, match="share their leading axis"):
        trace(responses.self_tuning(hg.BilevelProblem(two, two)), start, h, (x, jnp.ones(3)))
    undeclared = hg.BilevelProblem(lambda w, h, b, k: (two(w, h, b, k), 1.0), two)
    with pytest.raises(TypeError, match=r"inner_loss to return a scalar; got tuple.*has_aux=True"):
        responses.init(responses.self_tuning(undeclared), 0, params, h, (x, x))


def test_two_models_in_one_loss_and_one_that_is_not_tuned():
    """Models are found by where their weights are, not by their layers' names; a teacher is left alone."""
    model, x = MODELS["mlp"][0], inputs("vectors")
    new = jax.jit(lambda seed: model.init(jax.random.key(seed), x)["params"])
    parts, teacher = {"left": new(0), "right": new(1)}, new(9)
    apply = lambda w, x: model.apply({"params": w["left"]}, x) * model.apply({"params": w["right"]}, x)  # noqa: E731
    distilled = lambda w, x: apply(w, x) - model.apply({"params": teacher}, x)  # noqa: E731
    problem = responses.self_tuning(squares(distilled))
    start = init(problem, parts, x)
    assert set(start.layers) == {f"{part}/{layer}" for part in parts for layer in ("Dense_0", "DenseGeneral_0")}
    got, exact, _ = gated(distilled, start, x)  # compiled, so that constants can be told from weights
    assert relative_error(got, exact) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [jax.jit, pytest.param(jax.checkpoint, marks=pytest.mark.slow)])
def test_a_trace_that_the_loss_keeps_has_the_gates_of_its_run(wrap):
    """The loss's own jit was traced without gates before, by itself and by init."""
    apply, params, x = linen("mlp")
    wrapped = wrap(apply)
    wrapped(params, x)
    for variant in ("stn", "delta, nonlinear"):
        plain, kept = (responses.self_tuning(squares(f), variant=VARIANTS[variant]) for f in (apply, wrapped))
        start = init(kept, params, x)
        slopes = (jax.jit(jax.grad(responses.perturbed(p, scale=0.3).inner_loss)) for p in (plain, kept))
        want, got = (slope(start, hyper(), x, jax.random.key(0)) for slope in slopes)
        assert relative_error(got, want) < 1e-12
    with pytest.raises(ValueError, match=r"outside of jax.grad, jit, .*linearized=False"):
        trace(responses.self_tuning(squares(wrapped)), start, hyper(), x)


def test_a_model_under_vmap_over_examples_is_refused():
    """Each example has a leading axis of 1 there, which is not that of the gates."""
    apply, params, x = linen("mlp")
    one_by_one = lambda w, x: jax.vmap(lambda e: apply(w, e[None])[0])(x)  # noqa: E731
    problem = responses.self_tuning(squares(one_by_one), variant=responses.stn())
    start = init(problem, params, x)
    with pytest.raises(ValueError, match=r"one row for each of 5 examples; got shape \(1, 7\)"):
        trace(problem, start, hyper(), x)


def test_an_average_of_the_weights_is_refused_unless_it_is_marked():
    apply, params, x = linen("mlp")

    def inner(mark):
        def loss(w, h, x, key, mean):
            with responses.disable_self_tuning() if mark else contextlib.nullcontext():
                target = apply(mean, x)
            return jnp.mean(jnp.exp(h["a"]) * jnp.mean((apply(w, x) - target) ** 2, (1, 2))), mean

        return loss

    def value(mark):
        problem = hg.BilevelProblem(inner(mark), inner(mark), stateful=True)
        problem = responses.self_tuning(problem, variant=responses.stn())
        start = init(problem, params, x, model_state=params)
        noisy = responses.perturbed(problem, scale=0.0)
        mean = jax.tree.map(lambda w: 0.9 * w, params)

        @jax.jit
        def run(start, mean):
            student = apply(responses.deployable_params(hg.BilevelParams(start, hyper())), x)
            want = jnp.exp(hyper()["a"]) * jnp.mean((student - apply(mean, x)) ** 2)
            return noisy.inner_loss(start, hyper(), x, jax.random.key(0), mean)[0], want

        return run(start, mean)

    with pytest.raises(ValueError, match=r"two models .*disable_self_tuning"):
        value(mark=False)
    got, want = value(mark=True)
    assert float(got) == pytest.approx(float(want), rel=1e-12)


class Named(nn.Module):
    """Layers with names of arrays, normalised weights, and a cell of one's own."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 8, name="embedding", **F64)(inputs=ids)
        x = nn.WeightNorm(nn.Dense(6, **F64))(x)
        x = nn.RNN(OwnCell(6, **F64))(x)
        return nn.DenseGeneral((2, 3), use_bias=False, name="kernel", **F64)(x)


class OwnCell(nn.OptimizedLSTMCell):
    """Adds its inputs to what an LSTM gives."""

    @nn.compact
    def __call__(self, carry, inputs):
        carry, output = super().__call__(carry, inputs)
        return carry, output + 7.0 * inputs


@pytest.mark.slow
def test_odd_names_own_cells_and_normalised_weights():
    """Layers that cannot respond do not change; the others have one gate per output unit, with or without bias."""
    model, ids = Named(), inputs("tokens")
    params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
    apply = lambda w, x: model.apply({"params": w}, x)  # noqa: E731
    start = init(responses.self_tuning(squares(apply)), params, ids)
    assert set(start.layers) == {"embedding", "kernel"}
    assert start.layers["kernel"].gate.shape == (3, 2, 3)
    got, exact, _ = gated(apply, start, ids)
    assert relative_error(got, exact) < 1e-12


def test_a_bare_cell_a_batch_by_index_and_a_cast():
    cell, x = nn.OptimizedLSTMCell(6, **F64), inputs("vectors")
    carry = (jnp.zeros((5, 6)), jnp.zeros((5, 6)))
    params = jax.jit(cell.init)(jax.random.key(0), carry, x)["params"]
    problem = responses.self_tuning(squares(lambda w, x: cell.apply({"params": w}, carry, x)[1]))
    start = init(problem, params, hg.IndexedBatch(jnp.tile(x, (3, 1)), jnp.arange(5)))
    assert {"ii", "ho"} < set(start.layers)

    apply, params, x = linen("mlp")
    half = lambda w, x: apply(jax.tree.map(lambda v: v.astype(jnp.float32), w), x.astype(jnp.float32))  # noqa: E731
    start = init(responses.self_tuning(squares(half)), params, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(start)} == {jnp.dtype(jnp.float64)}  # as the weights, not the cast


def test_weights_that_the_loss_changes_are_found_by_their_structure():
    """Weight drop hands the model other arrays than the loss was given."""
    apply, params, x = linen("mlp")
    dropped = lambda w, x: apply(jax.tree.map(lambda v: 0.5 * v, w), x)  # noqa: E731
    problem = responses.self_tuning(squares(dropped))
    start = init(problem, params, x)
    assert len(start.layers) == 2
    displacement = 0.3 * jax.random.normal(jax.random.key(1), (len(x), 3))

    @jax.jit
    def outputs(start):
        with intercepted(Run(start.params, start.layers, displacement)):
            got = dropped(start.params, x)
        halved = jax.tree.map(lambda v: 0.5 * v, start.params)
        return got, outputs_by_definition(apply, halved, start.layers, displacement, x)

    assert relative_error(*outputs(start)) < 1e-12
