"""Learned responses: their weights, what perturbations train, and the hypergradient through them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import hypergrad as hg
from hypergrad import responses
from tests.problems import finite_differences, relative_error, ridge
from tests.self_tuned_models import train_response

pytestmark = pytest.mark.usefixtures("x64")

ENCODING = responses.magnitude_invariant(-8.0, 8.0)
RESPONSES = {
    "dense": responses.linear(),
    "low rank": responses.linear(rank=3),
    "gated": responses.gated(),
    "encoded": responses.linear(encoding=ENCODING),
    "gated, encoded": responses.gated(encoding=ENCODING),
    "hypernetwork": responses.hypernetwork(lambda size: _layers(5, size)),
    "in chunks": responses.hypernetwork(lambda size: _layers(5, size), chunk_size=4, embedding_size=2),
    "encoded hypernetwork": responses.hypernetwork(lambda size: _layers(5, size), encoding=ENCODING),
}
CENTERED = [name for name in RESPONSES if "hypernetwork" not in name and "chunks" not in name]
each = pytest.mark.parametrize("name", RESPONSES)
RARER = ("encoded", "hypernetwork", "in chunks")
common = pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in RARER)) for n in RESPONSES])


def _layers(*sizes):
    hidden = [f for size in sizes[:-1] for f in (nn.Dense(size, param_dtype=float), nn.tanh)]
    return nn.Sequential([*hidden, nn.Dense(sizes[-1], param_dtype=float)])


@functools.cache
def case():
    """Return the ridge problem, of several coupled leaves, with its closed form."""
    with jax.enable_x64(True):
        return ridge()


def trained(name):
    """Return a response's parameters, moved from where they start."""
    start = RESPONSES[name].init(0, *case().variables)
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype), start)


@common
def test_hypergradients_by_two_other_routes(name):
    """Autodiff through the response = chain rule with its Jacobian = finite differences about a fixed centre."""
    problem = responses.with_response(case().problem, RESPONSES[name])
    learned, h = trained(name), case().variables.hyperparams
    fn = jax.jit(functools.partial(hg.hypergrad(hg.direct(problem)), key=None))
    got = fn(learned, h, case().inner_batch, case().outer_batch)

    apply = lambda h, center: RESPONSES[name].apply(learned, h, center=center)  # noqa: E731
    outer = lambda w, h: case().problem.outer_loss(w, h, case().outer_batch, None)  # noqa: E731
    jacobian = jax.jit(jax.jacfwd(lambda x: apply(x, h)))(h)
    slope, straight = jax.jit(jax.grad(outer, argnums=(0, 1)))(apply(h, h), h)
    pulled = jax.tree.map(lambda s, j: jax.tree.map(lambda c: jnp.tensordot(s, c, s.ndim), j), slope, jacobian,
                          is_leaf=lambda x: isinstance(x, jax.Array))  # fmt: skip
    chained = straight
    for part in jax.tree.leaves(pulled, is_leaf=lambda x: jax.tree.structure(x) == jax.tree.structure(h)):
        chained = optax.tree.add(chained, part)
    assert relative_error(got, chained) < 1e-10
    assert relative_error(got, finite_differences(jax.jit(lambda x: outer(apply(x, h), x)), h)) < 1e-6


@each
def test_a_response_begins_at_the_given_weights_and_shares_no_buffer(name):
    start = RESPONSES[name].init(0, *case().variables)
    for mine, theirs in zip(jax.tree.leaves(start.params), jax.tree.leaves(case().variables.params), strict=True):
        np.testing.assert_array_equal(mine, theirs)
        assert mine.unsafe_buffer_pointer() != theirs.unsafe_buffer_pointer()
    if name in CENTERED:
        away = jax.tree.map(lambda x: x + 1.0, case().variables.hyperparams)
        weights = RESPONSES[name].apply(start, away, case().variables.hyperparams)
        assert relative_error(weights, case().variables.params) == 0.0


@common
def test_deployable_params_are_those_that_the_response_applies(name):
    learned, h = trained(name), case().variables.hyperparams
    plain = responses.deployable_params(hg.BilevelParams(learned, h))
    assert relative_error(RESPONSES[name].apply(learned, h), plain) < 1e-12
    problem = responses.perturbed(responses.with_response(case().problem, RESPONSES[name]), scale=0.1)
    by_response = hg.best_response(hg.direct(problem))(learned, h, (), key=None)
    assert relative_error(by_response, plain) < 1e-12
    if name in CENTERED:
        assert relative_error(plain, learned.params) == 0.0


def test_the_chunks_of_a_hypernetwork_follow_each_other():
    learned, h = trained("in chunks"), case().variables.hyperparams
    weights = RESPONSES["in chunks"].apply(learned, h)
    module = _layers(5, 4)
    vector = jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(h)])
    rows = [module.apply({"params": learned.variables}, jnp.concatenate([vector, e])) for e in learned.embeddings]
    assert learned.embeddings.shape == (2, 2)  # six weights in chunks of four
    added = jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(optax.tree.sub(weights, learned.params))])
    np.testing.assert_allclose(added, jnp.concatenate(rows)[:6], rtol=1e-12)


def test_the_encoding_has_a_constant_norm():
    encode = responses.magnitude_invariant(jnp.array([0.0, -1.0]), jnp.array([1.0, 3.0])).encode
    for vector in ([0.0, -1.0], [0.01, 0.0], [1.0, 3.0]):
        assert float(jnp.linalg.norm(encode(jnp.array(vector)))) == pytest.approx(np.sqrt(2), rel=1e-12)
    with pytest.raises(ValueError, match=r"inside \[-8.0, 8.0\]"):
        RESPONSES["encoded"].init(0, jnp.ones(2), jnp.array([9.0]))


def _learn(problem, start, h, steps):
    """Return response parameters trained on the ridge problem's data."""
    rates = {"weights": 3e-2, "response": 3e-2}
    return train_response(problem, start, h, case().inner_batch, rates, steps=steps)


@pytest.mark.slow
def test_a_linear_response_to_a_quadratic_problem_learns_the_exact_jacobian():
    """Law: as the scale goes to zero, the local linear response of a quadratic inner loss is dw*/dλ."""
    problem = responses.with_response(case().problem, responses.linear())
    h = case().variables.hyperparams
    start = jax.jit(lambda *at: responses.init(problem, 0, *at))(optax.tree.zeros_like(case().variables.params), h)
    learned = _learn(responses.perturbed(problem, scale=0.05, num_samples=16), start, h, 4000)
    exact = jax.jit(jax.jacfwd(case().response))(h)
    got = jax.jit(jax.jacfwd(lambda x: problem.response.weights(learned, x)))(h)
    assert relative_error(got, exact) < 0.05  # of the sampling noise; the curvature's part is about σ² = 0.0025
    assert relative_error(learned.params, case().variables.params) < 0.01
    gradient = hg.hypergrad(hg.direct(problem))(learned, h, case().inner_batch, case().outer_batch, key=None)
    assert relative_error(gradient, case().exact) < 0.05


@pytest.mark.slow
def test_ridge_ends_at_the_optimum_of_a_grid():
    """One log decay, tuned by ``direct`` over a learned linear response, against a grid over closed-form solutions."""
    inner_batch, outer_batch = case().inner_batch, case().outer_batch
    plain = hg.BilevelProblem(
        lambda w, c, b, k: 0.5 * jnp.mean((b[0] @ w - b[1]) ** 2) + hg.penalties.l2(w, c),
        lambda w, c, b, k: 0.5 * jnp.mean((b[0] @ w - b[1]) ** 2),
    )
    x, y = inner_batch
    y = y + jnp.asarray(np.random.default_rng(5).normal(size=len(y)))  # noisier: the optimum is inside of the grid
    problem = hg.reparameterize(plain, hg.bijectors.exp())
    problem = responses.perturbed(responses.with_response(problem, responses.linear()), scale=0.1)
    tx = hg.bilevel(
        hg.direct(problem),
        inner_optimizer=optax.adam(1e-2),
        outer_optimizer=optax.adam(optax.cosine_decay_schedule(0.1, 2000)),
        every=5,
    )
    variables = hg.BilevelParams(responses.init(problem, 0, jnp.zeros(6), jnp.array(1.0)), jnp.array(1.0))

    @jax.jit
    def run(carry):
        def step(carry, _):
            variables, state = carry
            updates, state = tx.update(None, state, variables, inner_batch=(x, y), outer_batch=outer_batch)
            return (optax.apply_updates(variables, updates), state), None

        return jax.lax.scan(step, carry, None, length=10_000)[0]

    variables, _ = run((variables, tx.init(variables)))
    grid = jnp.linspace(-8.0, 4.0, 1201)
    solve = lambda h: jnp.linalg.solve(x.T @ x / len(x) + jnp.exp(h) * jnp.eye(6), x.T @ y / len(x))  # noqa: E731
    best = grid[jnp.argmin(jax.vmap(lambda h: plain.outer_loss(solve(h), h, outer_batch, None))(grid))]
    assert -7.0 < float(best) < 3.0
    assert abs(float(variables.hyperparams - best)) < 0.05


@pytest.mark.slow
def test_perturbations_are_averaged_over():
    """S samples are the mean of single ones at their keys, and no scale at all is the plain loss."""
    problem = responses.with_response(case().problem, RESPONSES["dense"])
    learned, h, key = trained("dense"), case().variables.hyperparams, jax.random.key(3)
    loss = lambda p, key: jax.jit(p.inner_loss)(learned, h, case().inner_batch, key)  # noqa: E731
    one, several = (responses.perturbed(problem, scale=0.3, num_samples=s) for s in (1, 4))
    mean = np.mean([loss(one, k) for k in jax.random.split(key, 4)])
    assert float(loss(several, key)) == pytest.approx(mean, rel=1e-12)
    assert float(loss(responses.perturbed(problem, scale=0.0), key)) == pytest.approx(
        float(problem.inner_loss(learned, h, case().inner_batch, None)), rel=1e-12
    )


def test_every_group_of_a_batch_has_its_own_perturbation():
    """Groups are consecutive parts of the batch; the outer loss stays as it is."""
    plain = hg.BilevelProblem(lambda w, h, b, k: jnp.mean(h * b), lambda w, h, b, k: h)
    problem = responses.perturbed(plain, scale=0.5, num_groups=3)
    key, batch = jax.random.key(0), jnp.eye(6)[2]  # one example counts: only its group's perturbation matters
    value = problem.inner_loss(jnp.zeros(1), jnp.array(2.0), batch, key)
    groups = [float(problem.inner_loss(jnp.zeros(1), jnp.array(2.0), jnp.eye(6)[i], key)) for i in range(6)]
    assert float(value) == groups[2]
    assert groups[0] == groups[1] != groups[2] == groups[3] != groups[4] == groups[5]
    assert float(problem.outer_loss(jnp.zeros(1), jnp.array(2.0), batch, None)) == 2.0
    with pytest.raises(ValueError, match="divides into 4 groups; got 6"):
        responses.perturbed(plain, scale=0.5, num_groups=4).inner_loss(jnp.zeros(1), jnp.array(2.0), batch, key)


def test_the_draw_and_the_loss_have_keys_of_their_own():
    """The keys by hand: one per sample, one per group of it, and of that one for the draw and one for the loss."""
    plain = hg.BilevelProblem(*[lambda w, h, b, key: (h, (h, jax.random.uniform(key)))] * 2, has_aux=True)
    h, key = jnp.array(2.0), jax.random.key(5)

    def by_hand(key, value):
        draw_key, loss_key = jax.random.split(key)
        return value(draw_key), jax.random.uniform(loss_key)

    gaussian = lambda key: h + 0.3 * jax.random.normal(jax.random.split(key, 1)[0], (), h.dtype)  # noqa: E731
    noisy = responses.perturbed(plain, scale=0.3)
    assert noisy.inner_loss(0.0, h, (), key)[1] == by_hand(key, gaussian)
    anywhere = responses.sampled(plain, lambda key, h: jax.random.uniform(key))
    assert anywhere.inner_loss(0.0, h, (), key)[1] == by_hand(key, jax.random.uniform)
    learned = responses.perturbed(plain, scale=responses.learned_scale())
    with_scale = responses.HyperparamsWithScale(h, jnp.log(0.3))
    np.testing.assert_allclose(learned.outer_loss(0.0, with_scale, (), key)[1], by_hand(key, gaussian), rtol=1e-12)

    several = responses.perturbed(plain, scale=0.3, num_samples=2, num_groups=3)
    got = several.inner_loss(0.0, h, jnp.zeros(6), key)[1]
    keys = [one for sample in jax.random.split(key, 2) for one in jax.random.split(sample, 3)]
    np.testing.assert_allclose(got, np.mean([by_hand(one, gaussian) for one in keys], 0), rtol=1e-12)


def test_the_centre_of_a_perturbed_loss_counts_as_a_constant():
    """w = θ + J (λ + σε − c): its derivative in λ is J, which vanishes if the centre c moves with λ."""
    loss = lambda w, h, b, key: jnp.sum(w)  # noqa: E731
    problem = responses.with_response(hg.BilevelProblem(loss, loss), responses.linear())
    learned = responses.LinearParams(jnp.ones(1), jnp.full((1, 1), 3.0), ())
    h, log_scale, key = jnp.array([0.7]), jnp.log(0.5), jax.random.key(2)
    fixed = responses.perturbed(problem, scale=0.5)
    assert float(jax.grad(fixed.inner_loss, argnums=1)(learned, h, (), key)[0]) == pytest.approx(3.0)
    scaled = responses.perturbed(problem, scale=responses.learned_scale(entropy=0.1))
    at = responses.HyperparamsWithScale(h, log_scale)
    value, slope = jax.value_and_grad(scaled.outer_loss, argnums=1)(learned, at, (), key)
    noise = (float(value) + 0.1 * (float(log_scale) + 0.5 * np.log(2 * np.pi * np.e)) - 1.0) / 3.0  # σε
    assert float(slope.hyperparams[0]) == pytest.approx(3.0)
    assert float(slope.log_scale) == pytest.approx(3.0 * noise - 0.1)


def test_the_perturbations_have_their_scale():
    h = {"a": jnp.zeros(3000), "b": jnp.ones(3000)}
    seen = hg.BilevelProblem(lambda w, h, b, k: jnp.std(h["a"]), lambda w, h, b, k: jnp.std(h["b"]))
    loss = responses.perturbed(seen, scale={"a": 0.2, "b": 0.0}).inner_loss
    assert float(loss(0.0, h, (), jax.random.key(0))) == pytest.approx(0.2, rel=0.05)  # 1/√6000 = 0.013, 4 of them
    center = hg.BilevelProblem(lambda w, h, b, k: jnp.mean(h["a"]) + jnp.std(h["b"]), seen.outer_loss)
    loss = responses.perturbed(center, scale={"a": 0.2, "b": 0.0}).inner_loss
    assert abs(float(loss(0.0, h, (), jax.random.key(0)))) < 4 * 0.2 / np.sqrt(3000)


def test_a_learned_scale_is_tuned_by_the_outer_loss_and_kept_up_by_its_entropy():
    """E g(h + σε) for g = ½ c h² is ½ c (h² + σ²); with the entropy term σ* = √(τ/c)."""
    curvature, tau = 3.0, 0.12
    plain = hg.BilevelProblem(
        lambda w, h, b, k: jnp.sum((w - h) ** 2), lambda w, h, b, k: 0.5 * curvature * jnp.sum(h**2)
    )
    problem = responses.perturbed(
        plain, scale=responses.learned_scale(entropy=tau, low=1e-3, high=10.0), num_samples=20_000
    )
    h = responses.HyperparamsWithScale(jnp.array([0.7]), jnp.array(np.log(0.3)))
    value, grad = jax.jit(jax.value_and_grad(problem.outer_loss, argnums=1))(jnp.zeros(1), h, (), jax.random.key(0))
    entropy = np.log(0.3 * np.sqrt(2 * np.pi * np.e))
    # The standard error of ½ c (h + σε)² over 20,000 samples is about c·h·σ/√20000 = 0.0045.
    assert float(value) == pytest.approx(0.5 * curvature * (0.49 + 0.09) - tau * entropy, abs=0.02)
    assert float(grad.hyperparams[0]) == pytest.approx(curvature * 0.7, abs=0.03)
    assert float(grad.log_scale) == pytest.approx(curvature * 0.09 - tau, abs=0.03)
    outer = jax.jit(lambda h: problem.outer_loss(jnp.zeros(1), h, (), jax.random.key(0)))
    differences = finite_differences(outer, h)
    assert relative_error(grad, differences) < 1e-7


def test_a_learned_scale_stays_inside_its_bounds_and_can_come_back():
    plain = hg.BilevelProblem(lambda w, h, b, k: 0.0, lambda w, h, b, k: b * jnp.mean(h**2))
    problem = responses.perturbed(plain, scale=responses.learned_scale(entropy=0.1, low=0.5, high=1.0))
    slope = jax.jit(jax.grad(problem.outer_loss, argnums=1))
    at = lambda s: responses.HyperparamsWithScale(jnp.zeros(50), jnp.array(s))  # noqa: E731
    wide, key = np.log(2.0), jax.random.key(0)
    assert float(slope(jnp.zeros(1), at(wide), 100.0, key).log_scale) > 0  # descent brings it back
    assert float(slope(jnp.zeros(1), at(wide), 0.0, key).log_scale) == 0.0  # the entropy does not push it further
    assert float(slope(jnp.zeros(1), at(np.log(0.1)), 100.0, key).log_scale) == 0.0
    assert float(slope(jnp.zeros(1), at(np.log(0.1)), 0.0, key).log_scale) < 0
    seen = hg.BilevelProblem(lambda w, h, b, k: jnp.std(h), plain.outer_loss)
    clipped = responses.perturbed(seen, scale=responses.learned_scale(low=0.5, high=1.0)).inner_loss
    assert float(clipped(0.0, responses.HyperparamsWithScale(jnp.zeros(4000), jnp.array(wide)), (), key)) < 1.1


@pytest.mark.slow
def test_a_global_hypernetwork_holds_the_response_over_a_range():
    """Trained on decays from a range, it gives weights near the closed form at both ends and between."""
    x, y = case().inner_batch
    plain = hg.BilevelProblem(
        lambda w, h, b, k: 0.5 * jnp.mean((b[0] @ w - b[1]) ** 2) + 0.5 * jnp.exp(h) * jnp.sum(w**2),
        lambda w, h, b, k: jnp.sum(w**2),
    )
    response = responses.hypernetwork(lambda size: _layers(16, size))
    problem = responses.with_response(plain, response)
    draw = lambda key, h: jax.random.uniform(key, h.shape, h.dtype, -4.0, 2.0)  # noqa: E731
    start = responses.init(problem, 0, jnp.zeros(6), jnp.array(0.0))
    learned = _learn(responses.sampled(problem, draw, num_samples=8), start, jnp.array(0.0), 2000)
    for h in (-4.0, -1.0, 2.0):
        exact = jnp.linalg.solve(x.T @ x / len(x) + jnp.exp(h) * jnp.eye(6), x.T @ y / len(x))
        got = response.apply(learned, jnp.array(h))
        best, reached = (float(plain.inner_loss(w, h, (x, y), None)) for w in (exact, got))
        assert reached < 1.02 * best


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda p: hg.reparameterize(_responding(p), hg.bijectors.exp()), ValueError, "reparameterize.*order"),
        (lambda p: responses.with_response(_responding(p), responses.linear()), ValueError, "with_response.*order"),
        (lambda p: responses.self_tuning(_responding(p)), ValueError, "self_tuning.*order"),
        (lambda p: responses.with_response(_noisy(p), responses.linear()), ValueError, "with_response.*order"),
        (lambda p: _noisy(_noisy(p)), ValueError, "not perturbed yet"),
        (lambda p: hg.reparameterize(_noisy(p), hg.bijectors.exp()), ValueError, "reparameterize.*order"),
        (lambda p: responses.perturbed(p, scale=-1.0), ValueError, "scale to be finite and >= 0"),
        (lambda p: responses.perturbed(p, scale="wide"), TypeError, "scale to be a number"),
        (lambda p: responses.perturbed(p, scale=()), ValueError, "at least one number"),
        (lambda p: responses.perturbed(p, scale=0.1, num_samples=0), ValueError, "num_samples"),
        (lambda p: responses.with_response(p, responses.linear), TypeError, "Response"),
        (lambda p: responses.init(p, 0, jnp.ones(1), jnp.ones(1)), ValueError, "over a response"),
        (lambda p: responses.init(_noisy(p), 0, jnp.ones(1), jnp.ones(1)), ValueError, "over a response"),
        (lambda p: responses.gated().init(None, jnp.ones(1), jnp.ones(1)), TypeError, "key"),
        (lambda p: responses.linear(rank=0), ValueError, "rank"),
        (lambda p: responses.linear(encoding=1.0), TypeError, "encoding"),
        (lambda p: responses.hypernetwork(3), TypeError, "module"),
        (lambda p: responses.hypernetwork(nn.Dense(3)).init(0, jnp.ones(4), jnp.ones(1)), ValueError, "4 weights"),
        (lambda p: responses.hypernetwork(lambda n: n).init(0, jnp.ones(4), jnp.ones(1)), TypeError, "module.size"),
        (lambda p: responses.hypernetwork(nnx.Linear(1, 4, rngs=nnx.Rngs(0))), TypeError, "flax.linen.Module"),
        (
            lambda p: _gated().apply(_gated().init(0, jnp.ones(1), jnp.ones(1)), jnp.ones(3)),
            ValueError,
            "with 1 entries",
        ),
        (lambda p: _bounded(jnp.ones(3)).init(0, jnp.ones(1), jnp.ones(2)), ValueError, r"low of shape \(\) or \(2,\)"),
        (lambda p: responses.init(_learned_scale(_responding(p)), 0, jnp.ones(1), jnp.ones(1)), TypeError, "WithScale"),
        (lambda p: _noisy(p).inner_loss(0.0, _with_scale(), (), jax.random.key(0)), TypeError, "without a scale"),
        (
            lambda p: _learned_scale(_silent(p)).outer_loss(0.0, _with_scale(), (), jax.random.key(0)),
            TypeError,
            "scalar",
        ),
        (lambda p: responses.learned_scale(low=1.0, high=0.5), ValueError, "high"),
        (lambda p: responses.magnitude_invariant(1.0, 1.0), ValueError, "low < high"),
        (lambda p: responses.sampled(p, 3), TypeError, "draw"),
        (
            lambda p: responses.deployable_params(hg.BilevelParams(jnp.ones(1), jnp.ones(1))),
            TypeError,
            "own call its apply",
        ),
        (lambda p: responses.optimizer_labels(jnp.ones(1)), TypeError, "made by hg.responses"),
        (lambda p: _noisy(p).inner_loss(jnp.ones(1), jnp.ones(1), (), None), TypeError, "key"),
        (lambda p: _gated().apply(jnp.ones(1), jnp.ones(1)), TypeError, "gated response parameters"),
        (
            lambda p: _learned_scale(p).inner_loss(0.0, jnp.ones(1), (), jax.random.key(0)),
            TypeError,
            "HyperparamsWithScale",
        ),
        (lambda p: hg.best_response(hg.direct(p))(jnp.ones(1), jnp.ones(1), (), key=None), ValueError, "response"),
        (lambda p: hg.direct(lambda: 0), TypeError, "BilevelProblem"),
    ],
)
def test_refusals(wrong, error, message):
    plain = hg.BilevelProblem(lambda w, h, b, k: jnp.sum((w - h) ** 2), lambda w, h, b, k: jnp.sum(w**2))
    with pytest.raises(error, match=f"(?s){message}"):
        wrong(plain)


def _responding(problem):
    return responses.with_response(problem, responses.linear())


def _noisy(problem):
    return responses.perturbed(problem, scale=0.1)


def _gated():
    return responses.gated()


def _bounded(low):
    return responses.linear(encoding=responses.magnitude_invariant(low, 2.0))


def _silent(problem):
    return hg.BilevelProblem(problem.inner_loss, lambda w, h, b, k: None)


def _with_scale():
    return responses.HyperparamsWithScale(jnp.ones(1), jnp.zeros(1))


def _learned_scale(problem):
    return responses.perturbed(problem, scale=responses.learned_scale())


def test_a_response_that_the_loss_holds_itself_needs_no_transform():
    """``direct`` is one gradient of the outer loss, whatever makes weights depend on hyperparameters."""
    problem = hg.BilevelProblem(lambda w, h, b, k: 0.0, lambda w, h, b, k: jnp.sum((w * jax.nn.softmax(h)) ** 2))
    w, h = jnp.arange(3.0), jnp.array([0.1, 0.2, 0.3])
    got = hg.hypergrad(hg.direct(problem))(w, h, (), (), key=None)
    assert relative_error(got, finite_differences(lambda h: problem.outer_loss(w, h, (), None), h)) < 1e-8
    unused = hg.BilevelProblem(problem.inner_loss, lambda w, h, b, k: jnp.sum(w**2))
    with pytest.raises(ValueError, match="enters neither"):
        hg.hypergrad(hg.direct(unused))(w, h, (), (), key=None)


def test_a_hyperparameter_that_no_response_can_learn_is_refused():
    """A learning rate enters neither loss; a rate that is only compared with random numbers does."""

    def inner(w, h, b, key):
        kept = jax.random.bernoulli(key, jax.nn.sigmoid(h["rate"]), b.shape)
        return jnp.sum((w - b * kept) ** 2)

    problem = responses.perturbed(
        responses.with_response(hg.BilevelProblem(inner, lambda w, h, b, k: jnp.sum(w**2)), responses.linear()),
        scale=0.1,
    )
    for extra, refused in (({}, False), ({"learning_rate": jnp.array(0.1)}, True)):
        h = {"rate": jnp.array(0.0), **extra}
        start = responses.init(problem, 0, jnp.ones(3), h)
        fn = hg.hypergrad(hg.direct(problem))
        if refused:
            with pytest.raises(ValueError, match=r"\['learning_rate'\].*enters neither.*hg.unrolled"):
                fn(start, h, jnp.ones(3), (), key=0)
        else:
            assert float(fn(start, h, jnp.ones(3), (), key=0)["rate"]) == 0.0  # nothing learned yet


@pytest.mark.slow
def test_weights_and_response_have_optimizers_of_their_own():
    problem = responses.perturbed(responses.with_response(case().problem, responses.gated()), scale=0.1)
    tx = hg.bilevel(
        hg.direct(problem),
        inner_optimizer=optax.partition(
            {"weights": optax.sgd(0.0), "response": optax.sgd(0.1)}, responses.optimizer_labels
        ),
        outer_optimizer=optax.sgd(0.1),
        window=3,
        every=lambda n: n > 1,
    )
    h = case().variables.hyperparams
    start = responses.init(problem, 0, *case().variables)
    variables = hg.BilevelParams(start, h)
    state, moved = tx.init(variables), []
    batches = jax.tree.map(lambda x: jnp.stack([x] * 3), case().inner_batch)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(None, state, variables, inner_batch=batches, outer_batch=case().outer_batch)
        variables = optax.apply_updates(variables, updates)
        moved.append(float(optax.tree.norm(updates.hyperparams)))
    assert moved[0] == 0.0 < moved[1]  # warm-up, then an outer step
    assert relative_error(variables.params.params, start.params) == 0.0
    assert relative_error(variables.params.gate, optax.tree.ones_like(start.gate)) > 0
    assert float(optax.tree.norm(variables.params.gate)) > 0
