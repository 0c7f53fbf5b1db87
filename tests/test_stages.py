"""Responses that nest: derivatives of any order, two stages, three levels, each against finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from tests.problems import batch_norm, finite_differences, logistic, network, relative_error, ridge, window_of

pytestmark = pytest.mark.usefixtures("x64")


def newton(slope, start):
    """Return the root of ``slope`` near ``start``, differentiable by finite differences only."""
    step = lambda w, _: (w - jnp.linalg.solve(jax.jacobian(slope)(w), slope(w)), None)  # noqa: E731
    return jax.lax.scan(step, start, None, length=20)[0]


def scalar_problem():
    """Return ½ a w² − w, so that w*(a) = 1/a."""
    inner = lambda w, a, batch, key: 0.5 * a * w**2 - w  # noqa: E731
    return hg.BilevelProblem(inner, inner)


@pytest.mark.slow
def test_derivatives_of_a_response_of_any_order():
    respond = hg.best_response(hg.implicit(scalar_problem(), hg.solvers.cg(3)))
    fn = lambda a: respond(jnp.array(0.5), a, (), key=None)  # noqa: E731
    a = jnp.array(2.0)
    assert float(fn(a)) == 0.5
    first, second, third = jax.grad(fn), jax.grad(jax.grad(fn)), jax.grad(jax.grad(jax.grad(fn)))
    np.testing.assert_allclose([first(a), second(a), third(a)], [-0.25, 0.25, -0.375], rtol=1e-12)
    np.testing.assert_allclose(jax.jvp(fn, (a,), (jnp.array(1.0),))[1], -0.25, rtol=1e-12)
    np.testing.assert_allclose(jax.hessian(fn)(a), 0.25, rtol=1e-12)
    starts = jnp.array([2.0, 4.0])
    batched = jax.vmap(jax.grad(lambda a: respond(1 / jax.lax.stop_gradient(a), a, (), key=None)))(starts)
    np.testing.assert_allclose(batched, -1 / starts**2, rtol=1e-12)


SOLVERS = {"cg": hg.solvers.cg(60, 1e-13), "dense": hg.solvers.dense(), "neumann": hg.solvers.neumann(4000)}


@pytest.mark.parametrize("name", ["dense", *(pytest.param(s, marks=pytest.mark.slow) for s in ("cg", "neumann"))])
def test_an_implicit_response_has_the_derivative_of_the_solution(name):
    base = ridge()
    respond = hg.best_response(hg.implicit(base.problem, SOLVERS[name]))
    weigh = jax.tree.map(lambda w: jnp.cos(jnp.arange(w.size, dtype=w.dtype)).reshape(w.shape), base.variables.params)

    @jax.jit
    def pair(params, hyper):
        return optax.tree.vdot(weigh, respond(params, hyper, base.inner_batch, key=None))

    assert relative_error(respond(*base.variables, base.inner_batch, key=None), base.variables.params) == 0.0
    wrt_params, wrt_hyper = jax.grad(pair, argnums=(0, 1))(*base.variables)
    assert optax.tree.norm(wrt_params) == 0.0
    truth = lambda h: optax.tree.vdot(weigh, base.response(h))  # noqa: E731
    assert relative_error(wrt_hyper, finite_differences(truth, base.variables.hyperparams)) < 1e-7


CONVERGED = {
    "cg_kept": hg.solvers.cg(60, 1e-13, reorthogonalize=True),
    "cg_jacobi": hg.solvers.cg(60, 1e-13, preconditioner=hg.preconditioners.jacobi()),
    "cg_nystrom": hg.solvers.cg(60, 1e-13, preconditioner=hg.preconditioners.nystrom(3)),
    "cg_damped": hg.solvers.cg(60, 1e-13, relative_damping=1e-13, warm_start=True),
    "recycled_cg": hg.solvers.recycled_cg(60, 4, 1e-13),
    "richardson": hg.solvers.richardson(4000, momentum=0.5),
    "gmres": hg.solvers.gmres(60, 30, 1e-13),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVERGED)
def test_second_derivatives_of_a_response_by_every_solver(name):
    """Hv of a function of the response, against that of the closed form."""
    base = ridge()
    weigh = jax.tree.map(lambda w: jnp.cos(jnp.arange(w.size, dtype=w.dtype)).reshape(w.shape), base.variables.params)
    diagonal = lambda w, h: jax.tree.map(lambda leaf: 1.0 + 0.1 * leaf**2, w)  # noqa: E731
    respond = hg.best_response(hg.implicit(base.problem, CONVERGED[name], diagonal=diagonal))

    def pair(h):
        return optax.tree.vdot(weigh, respond(base.variables.params, h, base.inner_batch, key=jax.random.key(0))) ** 2

    truth = lambda h: optax.tree.vdot(weigh, base.response(h)) ** 2  # noqa: E731
    direction = jax.tree.map(
        lambda h: jnp.sin(jnp.arange(h.size, dtype=h.dtype)).reshape(h.shape) + 0.5, base.variables.hyperparams
    )
    got, want = (
        jax.jit(lambda h, of=of: jax.jvp(jax.grad(of), (h,), (direction,)))(base.variables.hyperparams)
        for of in (pair, truth)
    )
    assert relative_error(got[0], want[0]) < 1e-9
    assert relative_error(got[1], want[1]) < 1e-7


@pytest.mark.slow
def test_the_outer_loss_of_a_response_gives_the_estimators_hypergradient():
    base = logistic()
    solver = hg.solvers.cg(60, 1e-12)
    respond = hg.best_response(hg.implicit(base.problem, solver))
    estimate = hg.hypergrad(hg.implicit(base.problem, solver))

    def outer(h):
        return base.problem.outer_loss(
            respond(base.variables.params, h, base.inner_batch, key=None), h, base.outer_batch, None
        )

    got = jax.jit(jax.grad(outer))(base.variables.hyperparams)
    want = estimate(*base.variables, base.inner_batch, base.outer_batch, key=None)
    assert relative_error(got, want) < 1e-9


def test_a_response_whose_solve_is_not_finite_has_no_finite_derivative():
    inner = lambda w, a, batch, key: jnp.where(a > 0, jnp.inf, 1.0) * (w - a) ** 2  # noqa: E731
    respond = hg.best_response(hg.implicit(hg.BilevelProblem(inner, inner), hg.solvers.cg(3)))
    assert not jnp.isfinite(jax.grad(lambda a: respond(jnp.array(1.0), a, (), key=None))(jnp.array(1.0)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode", [hg.reverse(), *(pytest.param(mode, marks=pytest.mark.slow) for mode in (hg.reverse(2), hg.forward()))]
)
def test_an_unrolled_response_is_differentiable_in_both(mode):
    base, length = logistic(), 5
    optimizer = optax.adam(0.05, eps_root=1e-8)
    respond = hg.best_response(hg.unrolled(base.problem, mode), optimizer)
    batches = window_of(base.inner_batch, length)
    weigh = jax.tree.map(lambda w: jnp.cos(jnp.arange(w.size, dtype=w.dtype)).reshape(w.shape), base.variables.params)

    @jax.jit
    def pair(params, hyper):
        return optax.tree.vdot(weigh, respond(params, hyper, batches, key=None))

    start = jax.tree.map(lambda w: w + 0.3, base.variables.params)
    wrt_params, wrt_hyper = jax.jit(jax.grad(pair, argnums=(0, 1)))(start, base.variables.hyperparams)
    at_hyper = lambda w: pair(w, base.variables.hyperparams)  # noqa: E731
    assert relative_error(wrt_params, finite_differences(at_hyper, start)) < 1e-6
    assert relative_error(wrt_hyper, finite_differences(lambda h: pair(start, h), base.variables.hyperparams)) < 1e-6
    forward = jax.jvp(at_hyper, (start,), (weigh,))[1]
    assert float(forward) == pytest.approx(float(optax.tree.vdot(wrt_params, weigh)), rel=1e-9)


@pytest.mark.slow
def test_steps_before_an_implicit_response():
    """With an optimizer: K steps first, then the response, and its derivative, where they end."""
    base, length = logistic(), 5
    estimator = hg.implicit(base.problem, hg.solvers.cg(60, 1e-12))
    start, hyper = jax.tree.map(lambda w: w + 0.3, base.variables.params), base.variables.hyperparams
    reached = start
    gradient = jax.jit(lambda w: jax.grad(base.problem.inner_loss)(w, hyper, base.inner_batch, None))
    for _ in range(length):
        reached = optax.tree.add_scale(reached, -0.3, gradient(reached))
    stepped, plain = hg.best_response(estimator, optax.sgd(0.3)), hg.best_response(estimator)

    def slope(respond, w, batch):
        total = lambda h: (optax.tree.sum(found := respond(w, h, batch, key=None)), found)  # noqa: E731
        return jax.jit(jax.grad(total, has_aux=True))(hyper)

    first, found = slope(stepped, start, window_of(base.inner_batch, length))
    second, _ = slope(plain, reached, base.inner_batch)
    assert relative_error(found, reached) < 1e-12
    assert relative_error(first, second) < 1e-8


def two_stages(fine_tuning_steps):
    """Return pre-training with one weight an example, judged after fine-tuning, with its solution at hand."""
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(12, 4))), jnp.asarray(rng.normal(size=12))
    xf, yf = jnp.asarray(rng.normal(size=(6, 4))), jnp.asarray(rng.normal(size=6))
    xv, yv = jnp.asarray(rng.normal(size=(8, 4))), jnp.asarray(rng.normal(size=8))

    def fit(w, batch):
        return jnp.mean(jnp.log(jnp.cosh(batch[0] @ w["w"] + w["b"] - batch[1])))

    def pretrain_loss(w, h, batch, key):
        error = jnp.log(jnp.cosh(batch[0] @ w["w"] + w["b"] - batch[1]))
        return jnp.mean(jax.nn.sigmoid(h["examples"]) * error) + 0.05 * optax.tree.norm(w, squared=True)

    finetune = hg.BilevelProblem(lambda w, rate, batch, key: fit(w, batch), lambda *args: fit(args[0], args[2]))
    respond = hg.best_response(hg.unrolled(finetune), lambda log_rate: optax.sgd(jnp.exp(log_rate), momentum=0.9))

    def outer_loss(w, h, batch, key):
        tuning, valid = batch
        tuned = respond(w, h["rate"], tuning, key=None) if fine_tuning_steps else w
        return fit(tuned, valid)

    problem = hg.BilevelProblem(pretrain_loss, outer_loss)
    hyper = {"examples": jnp.asarray(rng.normal(size=12)), "rate": jnp.array(-2.0)}
    batches = (x, y), (window_of((xf, yf), max(fine_tuning_steps, 1)), (xv, yv))
    flat, unravel = jax.flatten_util.ravel_pytree({"w": jnp.zeros(4), "b": jnp.zeros(())})

    @jax.jit
    def pretrained(h):
        return unravel(newton(jax.grad(lambda v: pretrain_loss(unravel(v), h, (x, y), None)), flat))

    @jax.jit
    def value(h):
        return outer_loss(pretrained(h), h, batches[1], None)

    return problem, hg.BilevelParams(pretrained(hyper), hyper), batches, value


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_two_stages_against_finite_differences(steps):
    problem, variables, batches, value = two_stages(steps)
    fn = jax.jit(functools.partial(hg.value_and_hypergrad(hg.implicit(problem, hg.solvers.cg(40, 1e-12))), key=None))
    (_, grad), info = fn(*variables, *batches)
    want = finite_differences(value, variables.hyperparams)
    assert relative_error(grad["examples"], want["examples"]) < 1e-5
    assert relative_error(grad["rate"], want["rate"]) < 1e-5
    assert bool(info.solver.converged)


@pytest.mark.slow
def test_a_second_stage_that_does_nothing_is_one_stage():
    """Fine-tuning at rate zero."""
    problem, variables, batches, _ = two_stages(3)
    still = {**variables.hyperparams, "rate": jnp.array(-jnp.inf)}
    plain, _, plain_batches, _ = two_stages(0)
    solver = hg.solvers.cg(40, 1e-12)
    grad = hg.hypergrad(hg.implicit(problem, solver))(variables.params, still, *batches, key=None)
    without = hg.BilevelProblem(
        lambda w, h, b, k: plain.inner_loss(w, {"examples": h}, b, k), lambda w, h, b, k: plain.outer_loss(w, h, b, k)
    )
    want = hg.hypergrad(hg.implicit(without, solver))(variables.params, still["examples"], *plain_batches, key=None)
    assert relative_error(grad["examples"], want) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("middle", ["implicit", "unrolled"])
def test_three_levels_against_finite_differences(middle):
    """Weights w solve level one at (λ, μ), λ solves level two at μ through w, μ is judged through both."""
    rng = np.random.default_rng(1)
    a, b = jnp.asarray(rng.normal(size=(9, 3))), jnp.asarray(rng.normal(size=9))
    c, d = jnp.asarray(rng.normal(size=(7, 3))), jnp.asarray(rng.normal(size=7))
    e, f = jnp.asarray(rng.normal(size=(8, 3))), jnp.asarray(rng.normal(size=8))
    soft = lambda r: jnp.mean(jnp.log(jnp.cosh(r)))  # noqa: E731

    def level_one(w, h, batch, key):
        return soft(a @ w - b) + 0.5 * jnp.sum(jnp.exp(h["decay"]) * w**2) + jnp.sum(jnp.tanh(h["pull"]) * w)

    first = hg.BilevelProblem(level_one, level_one)
    start = jnp.zeros(3)
    steps = 6
    if middle == "implicit":
        respond = hg.best_response(hg.implicit(first, hg.solvers.cg(30, 1e-13)))
        solve = lambda h: newton(jax.grad(lambda w: level_one(w, h, None, None)), start)  # noqa: E731
        given = solve  # where level one has been solved
        batch = ()
    else:
        respond = hg.best_response(hg.unrolled(first), optax.sgd(0.5))
        batch = jnp.arange(steps)

        def solve(h):
            w = start
            for _ in range(steps):
                w = w - 0.5 * jax.grad(level_one)(w, h, None, None)
            return w

        given = lambda h: start  # noqa: E731

    def judge(w, decay, mu):
        return soft(c @ w - d) + 0.3 * jnp.sum((decay - mu["center"]) ** 2)

    def level_two(params, mu, batch, key):
        """Take λ for weights; level one's own weights come with the batch, solved and held fixed."""
        w, steps = batch
        h = {"decay": params, "pull": mu["pull"]}
        return judge(respond(w, h, steps, key=None), params, mu)

    def level_three(params, mu, batch, key):
        w, steps = batch
        return soft(e @ respond(w, {"decay": params, "pull": mu["pull"]}, steps, key=None) - f)

    def decay_of(mu):
        slope = jax.grad(lambda v: judge(solve({"decay": v, "pull": mu["pull"]}), v, mu))
        return newton(slope, mu["center"])

    mu = {"center": jnp.array([-1.0, -0.5, 0.0]), "pull": jnp.array([0.3, -0.2, 0.1])}

    @jax.jit
    def value(mu):
        decay = decay_of(mu)
        return soft(e @ solve({"decay": decay, "pull": mu["pull"]}) - f)

    decay = jax.jit(decay_of)(mu)
    w = given({"decay": decay, "pull": mu["pull"]})
    problem = hg.BilevelProblem(level_two, level_three)
    fn = hg.value_and_hypergrad(hg.implicit(problem, hg.solvers.cg(20, 1e-12)))
    (got, grad), info = jax.jit(functools.partial(fn, key=None))(decay, mu, (w, batch), (w, batch))
    assert float(got) == pytest.approx(float(value(mu)), rel=1e-9)
    assert relative_error(grad, finite_differences(value, mu)) < 1e-6
    assert bool(info.solver.converged)


def test_a_stage_without_hyperparameters():
    problem = hg.BilevelProblem(lambda w, h, b, k: 0.5 * jnp.sum((w - b) ** 2), lambda w, h, b, k: jnp.sum(w))
    respond = hg.best_response(hg.unrolled(problem), optax.sgd(0.5))
    slope = jax.grad(lambda w: respond(w, (), jnp.ones(3), key=None))(jnp.array(2.0))
    assert float(slope) == pytest.approx(0.5**3)


@pytest.mark.slow
def test_stages_train_behind_bilevel():
    problem, variables, batches, value = two_stages(2)
    tx = hg.bilevel(
        hg.implicit(problem, hg.solvers.cg(20)),
        inner_optimizer=optax.sgd(0.5),
        outer_optimizer=optax.adam(0.1),
        every=20,
    )

    @jax.jit
    def train(variables, state):
        def step(carry, _):
            variables, state = carry
            updates, state = tx.update(None, state, variables, inner_batch=batches[0], outer_batch=batches[1])
            return (optax.apply_updates(variables, updates), state), None

        return jax.lax.scan(step, (variables, state), None, length=400)[0]

    before = float(value(variables.hyperparams))
    learned, _ = train(variables, tx.init(variables))
    assert float(value(learned.hyperparams)) < before - 0.01


@pytest.mark.slow
def test_stateful_problems_and_keys_reach_the_response():
    with jax.enable_x64(False):
        problem, variables, stats, batch = batch_norm()
        respond = hg.best_response(hg.implicit(problem, hg.solvers.cg(3)))
        fn = lambda h: optax.tree.sum(respond(variables.params, h, batch, key=None, model_state=stats))  # noqa: E731
        assert bool(jnp.isfinite(jax.grad(fn)(variables.hyperparams)))
        noisy = network(dropout=0.5)
        respond = jax.jit(hg.best_response(hg.unrolled(noisy.problem), optax.sgd(0.1)))
        runs = [respond(*noisy.variables, window_of(noisy.inner_batch, 2), key=jax.random.key(s)) for s in (0, 0, 1)]
        assert relative_error(runs[0], runs[1]) == 0.0
        assert relative_error(runs[0], runs[2]) > 0.0


def test_what_has_no_response_says_so():
    base = ridge()
    blind = hg.implicit(base.problem, hg.solvers.cg(3))._replace(best_response=None)
    with pytest.raises(TypeError, match="an estimator with a differentiable best response; got one without"):
        hg.best_response(blind)
    with pytest.raises(ValueError, match="an inner_optimizer for an estimator that differentiates inner steps"):
        hg.best_response(hg.unrolled(base.problem))
    short = hg.best_response(hg.unrolled(base.problem, hg.reverse(truncate=2)), optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"differentiated whole; got truncate=2 for 5 steps.*would be zero"):
        short(*base.variables, window_of(base.inner_batch, 5), key=None)
    with pytest.raises(TypeError, match="an Estimator; got BilevelProblem"):
        hg.best_response(base.problem)


@pytest.mark.parametrize("trainable", [None, {"a": True, "b": False}])
def test_the_derivative_of_an_implicit_response_in_the_weights_is_zero(trainable):
    """Also in those that are not solved for, though the solution depends on them."""
    inner = lambda w, h, batch, key: 0.5 * jnp.sum((w["a"] * w["b"] - h) ** 2) + 0.5 * jnp.sum(w["a"] ** 2)  # noqa: E731
    problem = hg.BilevelProblem(inner, lambda w, h, batch, key: jnp.sum(w["a"]))
    response = hg.best_response(hg.implicit(problem, hg.solvers.dense(), trainable=trainable))
    w, h = {"a": jnp.array([0.4]), "b": jnp.array([2.0])}, jnp.array([1.0])
    of_w, of_h = jax.grad(lambda w, h: jnp.sum(response(w, h, (), key=None)["a"]), argnums=(0, 1))(w, h)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(of_w))
    assert float(jnp.abs(of_h)[0]) > 0.1


@pytest.mark.slow
def test_a_response_that_is_trained_first_is_not_differentiated_through_its_training():
    loss = lambda w, h, batch, key: jnp.sum((w - h) ** 2)  # noqa: E731
    problem = hg.responses.with_response(hg.BilevelProblem(loss, loss), hg.responses.linear())
    problem = hg.responses.perturbed(problem, scale=0.5)
    h, rule = jnp.array([0.3, -0.2]), optax.sgd(0.1)
    first = params = hg.responses.init(problem, 0, jnp.ones(2), h, ())
    state, keys = rule.init(params), jax.random.split(jax.random.key(1), 5)
    for i in range(3):
        grads = jax.grad(problem.inner_loss)(params, h, (), jax.random.fold_in(keys[0], i))
        updates, state = rule.update(grads, state)
        params = optax.apply_updates(params, updates)

    trains = hg.best_response(hg.direct(problem), rule)
    steps = hg.IndexedBatch((), jnp.arange(3))
    wanted = lambda h: hg.best_response(hg.direct(problem))(params, h, (), key=1)  # noqa: E731
    found = lambda h: trains(first, h, steps, key=1)  # noqa: E731
    assert relative_error(found(h), wanted(h)) < 1e-6
    assert relative_error(jax.jacrev(found)(h), jax.jacrev(wanted)(h)) < 1e-6
    assert float(jnp.abs(jax.jacrev(wanted)(h)).max()) > 1e-3


@pytest.mark.slow
def test_reverse_mode_of_an_implicit_response_with_a_leaf_that_has_no_hyperparameter(x64):
    """A bias without decay: its row of the system has a constant zero on the right-hand side."""
    x = jax.random.normal(jax.random.key(0), (20, 3))
    y = x.sum(1) + 1

    def inner(w, decay, batch, key):
        return jnp.mean((x @ w["w"] + w["b"] - y) ** 2) + decay * jnp.sum(w["w"] ** 2)

    outer = lambda w, decay, batch, key: jnp.sum(w["w"] ** 2)  # noqa: E731
    problem, decay = hg.BilevelProblem(inner, outer), jnp.array(0.1)
    start = hg.BilevelParams({"w": jnp.zeros(3), "b": jnp.zeros(())}, decay)
    solved = hg.diagnostics.solve_inner(problem, start, ()).params
    respond = hg.best_response(hg.implicit(problem, hg.solvers.dense()))
    value = lambda decay: outer(respond(solved, decay, (), key=None), decay, (), None)  # noqa: E731
    exact = hg.hypergrad(hg.implicit(problem, hg.solvers.dense()))(solved, decay, (), (), key=None)
    assert float(jax.grad(value)(decay)) == pytest.approx(float(exact), rel=1e-10)
    assert float(jax.jacfwd(value)(decay)) == pytest.approx(float(exact), rel=1e-10)
