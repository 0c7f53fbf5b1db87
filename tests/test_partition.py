"""Several estimators in one run: each leaf has what its estimator alone gives it, and the weights are trained once."""

import dataclasses
import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg

pytestmark = pytest.mark.usefixtures("x64")
RNG = np.random.default_rng(0)
X, XV = RNG.normal(size=(5, 16, 4)), RNG.normal(size=(16, 4))
TRUTH = np.array([1.0, -1.0, 0.5, 0.0])
Y, YV = X @ TRUTH + 0.3 * RNG.normal(size=(5, 16)), XV @ TRUTH + 0.3 * RNG.normal(size=16)
W = np.array([0.5, 0.0, 0.2, -0.1])
H = {
    "decay": np.array([-2.0, -1.0, 0.0, -3.0]),
    "rate": np.array(-2.0),
    "shift": {"outer": np.array(0.3)},
    "count": np.array(2.6),
}
LABELS = {"decay": "implicit", "rate": "unrolled", "shift": "direct", "count": "evolution"}


def error(w, batch, count):
    mask = jnp.arange(4) < jnp.round(count)
    return 0.5 * jnp.mean((batch[0] * mask @ w - batch[1]) ** 2)


def inner(w, h, batch, key):
    noise = 1e-2 * jnp.vdot(w, jax.random.normal(key, w.shape))
    return error(w, batch, h["count"]) + hg.penalties.l2(w, jnp.exp(h["decay"])) + noise


def outer(w, h, batch, key):
    return error(w, batch, h["count"]) * (1 + h["shift"]["outer"] ** 2)


PROBLEM = hg.BilevelProblem(inner, outer)


def estimators(problem):
    return {
        "implicit": hg.implicit(problem, hg.solvers.cg(20, 1e-12)),
        "unrolled": hg.unrolled(problem),
        "direct": hg.direct(problem),
        "evolution": hg.evolution(problem, sigma=0.5, num_pairs=3),
    }


def optimizer(h):
    return optax.sgd(jnp.exp(h["rate"]), momentum=0.9)


def batches():
    return (jnp.asarray(X), jnp.asarray(Y)), (jnp.asarray(XV), jnp.asarray(YV))


def evaluate(estimator, hyperparams, inner_optimizer, w=W):
    fn = hg.value_and_hypergrad(estimator, inner_optimizer)
    return fn(w, hyperparams, *batches(), key=3)


def alone(name):
    """Return the hypergradient of a problem in one leaf, the others written into the losses."""
    problem = hg.BilevelProblem(
        lambda w, own, b, k: inner(w, H | own, b, k), lambda w, own, b, k: outer(w, H | own, b, k)
    )
    estimator = estimators(problem)[LABELS[name]]
    return evaluate(estimator, {name: H[name]}, lambda own: optimizer(H | own))


def test_each_leaf_has_what_its_estimator_alone_gives():
    (value, grad), info = evaluate(hg.partition(estimators(PROBLEM), LABELS), H, optimizer)
    for name in H:
        (same, own), _ = alone(name)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), grad[name], own[name])
        assert float(value) == pytest.approx(float(same), rel=1e-12)
        assert float(optax.tree.norm(grad[name])) > 0
    assert set(info.method) == set(LABELS.values())
    assert info.method["evolution"].standard_error["count"] > 0
    assert bool(info.solver.converged)


def counted(make, calls):
    """Return an optimizer that notes each step it takes."""

    def with_count(h):
        tx = make(h)

        def update(updates, state, params=None, **extra):
            jax.debug.callback(lambda: calls.append(1))
            return tx.update(updates, state, params, **extra)

        return optax.GradientTransformationExtraArgs(tx.init, update)

    return with_count


def test_training_steps_are_taken_once():
    made, calls = estimators(PROBLEM) | {"unrolled": hg.unrolled(PROBLEM, hg.forward())}, []
    fn = hg.value_and_hypergrad(hg.partition(made, LABELS), counted(optimizer, calls))
    fn(W, H, *batches(), key=3)  # tries the optimizer, too
    jax.effects_barrier()
    calls.clear()
    fn(W, H, *batches(), key=3)
    jax.effects_barrier()
    assert len(calls) == 5 + 5  # five steps, and five that all particles take at once


def transformation():
    made = estimators(PROBLEM) | {"evolution": hg.evolution(PROBLEM, sigma=0.5, num_pairs=3, persistent=True)}
    made["implicit"] = hg.implicit(PROBLEM)
    return hg.bilevel(
        hg.partition(made, LABELS),
        inner_optimizer=optimizer,
        outer_optimizer=optax.adam(0.01),
        window=5,
        every=2,
        key=0,
    )


def steps(count, variables, state):
    tx = transformation()
    update = jax.jit(tx.update)
    for _ in range(count):
        updates, state = update(None, state, variables, inner_batch=batches()[0], outer_batch=batches()[1])
        variables = optax.apply_updates(variables, updates)
    return variables, state


@pytest.mark.slow
def test_a_run_learns_and_resumes_to_the_bit():
    begin = jax.tree.map(jnp.asarray, hg.BilevelParams(W, H))
    first = transformation().init(begin)
    whole = steps(6, begin, first)
    half = steps(3, begin, first)
    bytes_of = flax.serialization.to_bytes(half)
    restored = flax.serialization.from_bytes((begin, first), bytes_of)
    resumed = steps(3, *jax.tree.map(jnp.asarray, restored))
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert int(whole[1].info.num_skipped) == 0
    for name in H:
        assert float(optax.tree.norm(optax.tree.sub(whole[0].hyperparams[name], H[name]))) > 0


@pytest.mark.slow
def test_the_guard_looks_at_every_solve():
    made = estimators(PROBLEM)
    made["implicit"] = hg.implicit(PROBLEM, hg.solvers.neumann(30, 1e3))  # diverges
    (_, _), info = evaluate(hg.partition(made, LABELS), H, optimizer)
    assert hg.SkipReason(int(info.skip_reason)) == hg.SkipReason.SOLVE


def test_implicit_beside_a_learned_response_is_that_of_the_plain_problem():
    """The response gives w(λ); the decay's estimator sees these weights, and the problem of the response."""

    def noisy(w, h, batch, key):
        return error(w, batch, 4.0) + hg.penalties.l2(w, jnp.exp(h["decay"])) + 0.5 * h["ridge"] ** 2 * jnp.sum(w**2)

    base = hg.BilevelProblem(noisy, lambda w, h, b, k: error(w, b, 4.0))
    response = hg.responses.with_response(base, hg.responses.linear())
    learned = hg.responses.perturbed(response, scale=0.1)
    h = {"decay": H["decay"], "ridge": np.array(0.7)}
    params = hg.responses.init(learned, 0, jnp.asarray(W), jax.tree.map(jnp.asarray, h), None)
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), params)
    labels = {"decay": "ift", "ridge": "response"}
    made = {"ift": hg.implicit(base, hg.solvers.cg(20, 1e-12)), "response": hg.direct(learned)}
    data = (jnp.asarray(X[0]), jnp.asarray(Y[0])), batches()[1]
    grad = hg.hypergrad(hg.partition(made, labels))(params, h, *data, key=0)
    by_response = hg.hypergrad(made["response"])(params, h, *data, key=0)
    weights = learned.response.weights(params, jax.tree.map(jnp.asarray, h))
    by_ift = hg.hypergrad(made["ift"])(weights, h, *data, key=0)
    np.testing.assert_allclose(grad["ridge"], by_response["ridge"], rtol=1e-12)
    np.testing.assert_allclose(grad["decay"], by_ift["decay"], rtol=1e-10)
    tx = hg.bilevel(
        hg.partition(made, labels), inner_optimizer=optax.adam(0.01), outer_optimizer=optax.adam(0.01), key=0
    )
    variables = hg.BilevelParams(params, jax.tree.map(jnp.asarray, h))
    state = tx.init(variables)
    for _ in range(3):
        updates, state = tx.update(None, state, variables, inner_batch=data[0], outer_batch=data[1])
        variables = optax.apply_updates(variables, updates)
    assert int(state.info.num_skipped) == 0
    assert float(jnp.abs(variables.hyperparams["decay"] - h["decay"]).min()) > 0


@pytest.mark.slow
def test_priors_and_bijectors_pass_through():
    problem = hg.with_prior(PROBLEM, hg.priors.normal(H, 1.0), num_examples=10)
    problem = hg.reparameterize(
        problem, {**dict.fromkeys(["decay", "shift", "count"], hg.bijectors.identity()), "rate": hg.bijectors.exp()}
    )
    moved = jax.tree.map(lambda x: x + 0.1, H)
    moved["rate"] = np.array(0.1)

    def rate_in_numbers(h):
        return optax.sgd(0.1 * h["rate"], momentum=0.9)

    _, grad = evaluate(hg.partition(estimators(problem), LABELS), moved, rate_in_numbers)[0]
    prior_alone = jax.grad(problem.prior)(jax.tree.map(jnp.asarray, moved))
    without = hg.partition(estimators(dataclasses.replace(problem, prior=None)), LABELS)
    _, plain = evaluate(without, moved, rate_in_numbers)[0]
    for name in ("decay", "rate", "shift"):
        jax.tree.map(
            lambda a, b, c: np.testing.assert_allclose(a, b + c, rtol=1e-9), grad[name], plain[name], prior_alone[name]
        )


@pytest.mark.slow
def test_a_solve_batch_is_for_the_solve():
    fn = hg.value_and_hypergrad(hg.partition(estimators(PROBLEM), LABELS), optimizer)
    half = jax.tree.map(lambda x: x[0, :8], batches()[0])
    (_, grad), _ = fn(W, H, *batches(), key=3, solve_batch=half)
    (_, other), _ = fn(W, H, *batches(), key=3)
    assert float(jnp.abs(grad["decay"] - other["decay"]).max()) > 1e-6
    np.testing.assert_array_equal(grad["rate"], other["rate"])
    without = hg.partition({"direct": hg.direct(PROBLEM)}, "direct")
    own = {"shift": H["shift"]}
    problem = hg.BilevelProblem(lambda w, h, b, k: inner(w, H | h, b, k), lambda w, h, b, k: outer(w, H | h, b, k))
    without = hg.value_and_hypergrad(hg.partition({"direct": hg.direct(problem)}, "direct"), optax.sgd(0.1))
    with pytest.raises(ValueError, match="no solve_batch for direct"):
        without(W, own, *batches(), key=3, solve_batch=half)


def test_methods_with_steps_are_refused_over_plain_weights_beside_a_response():
    base = hg.BilevelProblem(lambda w, h, b, k: inner(w, h, b, k), outer)
    learned = hg.responses.perturbed(hg.responses.with_response(base, hg.responses.linear()), scale=0.1)
    with pytest.raises(ValueError, match=r"without inner steps.*'rates'"):
        hg.partition({"rates": hg.unrolled(base), "all": hg.direct(learned)}, "all")


@pytest.mark.parametrize(
    ("change", "labels", "words"),
    [
        ({}, {**LABELS, "rate": "momentum"}, r"\['rate'\]; got 'momentum'"),
        ({}, {**LABELS, "shift": "implicit"}, "none for 'direct'"),
        ({}, {"decay": "implicit"}, r"tree prefix of the hyperparameters; got no label for .*\['rate'\]"),
        ({}, {**LABELS, "momentum": "implicit"}, r"got a label for hyperparams leaf \['momentum'\]"),
        ({"second": hg.unrolled(PROBLEM)}, LABELS, "at most one estimator.*'unrolled', 'second'"),
        ({"direct": hg.direct(hg.BilevelProblem(inner, outer))}, LABELS, "another one for 'direct'"),
        ({}, {**LABELS, "rate": "implicit", "decay": "unrolled"}, r"\['rate'\], which enters neither"),
    ],
)
def test_what_cannot_be_is_refused_by_name(change, labels, words):
    with pytest.raises(ValueError, match=words):
        evaluate(hg.partition(estimators(PROBLEM) | change, labels), H, optimizer)


@pytest.mark.parametrize("given", [{}, [hg.implicit(PROBLEM)], {"a": PROBLEM}, {1: hg.implicit(PROBLEM)}])
def test_other_things_than_estimators_by_name_are_refused(given):
    with pytest.raises(TypeError, match="a dict from labels to estimators"):
        hg.partition(given, "a")


@pytest.mark.slow
def test_labels_may_be_a_function():
    by_name = lambda h: {name: LABELS[name] for name in h}  # noqa: E731
    (_, grad), _ = evaluate(hg.partition(estimators(PROBLEM), by_name), H, optimizer)
    (_, same), _ = evaluate(hg.partition(estimators(PROBLEM), LABELS), H, optimizer)
    jax.tree.map(np.testing.assert_array_equal, grad, same)


@pytest.mark.slow
def test_one_estimator_for_all_is_that_estimator():
    h = {"decay": H["decay"]}
    problem = hg.BilevelProblem(
        lambda w, own, b, k: inner(w, H | own, b, k), lambda w, own, b, k: outer(w, H | own, b, k)
    )
    evaluated = functools.partial(evaluate, hyperparams=h, inner_optimizer=optax.sgd(0.1))
    (_, grad), _ = evaluated(hg.partition({"all": hg.implicit(problem)}, "all"))
    (_, same), _ = evaluated(hg.implicit(problem))
    np.testing.assert_allclose(grad["decay"], same["decay"], rtol=1e-12)


def test_an_optimizer_without_a_derivative_at_zero_is_refused_as_alone():
    problem = hg.BilevelProblem(lambda w, h, b, k: 0.5 * jnp.sum(h["decay"] * w**2), lambda w, h, b, k: jnp.sum(w))
    parts = {"decay": hg.implicit(problem), "rate": hg.unrolled(problem)}
    tx = hg.bilevel(
        hg.partition(parts, {"decay": "decay", "rate": "rate"}),
        inner_optimizer=lambda h: optax.adam(h["rate"]),
        outer_optimizer=optax.sgd(0.1),
        window=2,
    )
    variables = hg.BilevelParams(jnp.ones(2), {"decay": jnp.ones(()), "rate": jnp.full((), 0.1)})
    with pytest.raises(ValueError, match="eps_root"):
        tx.update(None, tx.init(variables), variables, inner_batch=hg.IndexedBatch((), jnp.arange(2)), outer_batch=())
