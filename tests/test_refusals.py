"""Every misuse raises our own error: expected, got, what to do; leaves are named by their path."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import hypergrad as hg
from tests.problems import batch_norm, network, window_of


@functools.cache
def case():
    """Return the shared problem."""
    return network()


def estimator():
    """Return a valid estimator."""
    return hg.implicit(case().problem, hg.solvers.neumann(3, 0.1))


def make(**kwargs):
    """Return a valid ``bilevel`` but for what a test replaces."""
    options = {"inner_optimizer": optax.sgd(0.1), "outer_optimizer": optax.sgd(0.1), **kwargs}
    return hg.bilevel(options.pop("estimator", estimator()), **options)


def update(tx, grads=None, variables=None, **kwargs):
    """Call ``update`` with valid arguments but for what a test replaces."""
    batches = {"inner_batch": case().inner_batch, "outer_batch": case().outer_batch, **kwargs}
    return tx.update(grads, tx.init(case().variables), variables or case().variables, **batches)


def unroll(problem, hyperparams, inner_optimizer=None, mode=None, steps=2):
    """Take one hypergradient through a few steps."""
    fn = hg.hypergrad(hg.unrolled(problem, mode), inner_optimizer or optax.sgd(0.1))
    return fn(case().variables.params, hyperparams, window_of(case().inner_batch, steps), case().outer_batch, key=None)


def evaluate(problem, params=None, hyperparams=None):
    """Take one hypergradient."""
    params = case().variables.params if params is None else params
    hyperparams = case().variables.hyperparams if hyperparams is None else hyperparams
    fn = hg.hypergrad(hg.implicit(problem, hg.solvers.neumann(3, 0.1)))
    return fn(params, hyperparams, case().inner_batch, case().outer_batch, key=None)


CONSTRUCTION = {
    "num_terms 0": (lambda: hg.solvers.neumann(0), ValueError, "num_terms to be at least 1; got 0"),
    "num_terms float": (lambda: hg.solvers.neumann(2.5), TypeError, "num_terms to be a Python int"),
    "num_terms bool": (lambda: hg.solvers.neumann(True), TypeError, "num_terms to be a Python int"),
    "step_size 0": (lambda: hg.solvers.neumann(3, 0.0), ValueError, "step_size to be finite and > 0; got 0"),
    "step_size < 0": (lambda: hg.solvers.neumann(3, -0.1), ValueError, "step_size to be finite and > 0; got -0.1"),
    "step_size nan": (lambda: hg.solvers.neumann(3, float("nan")), ValueError, "step_size"),
    "step_size tree": (lambda: hg.solvers.neumann(3, {"a": 1.0}), TypeError, "step_size to be a number"),
    "damping < 0": (lambda: hg.solvers.cg(3, damping=-1.0), ValueError, "damping to be finite and >= 0; got -1"),
    "max_products 0": (lambda: hg.solvers.cg(0), ValueError, "max_products to be at least 1"),
    "rtol < 0": (lambda: hg.solvers.cg(3, -1.0), ValueError, "rtol to be finite and >= 0"),
    "unroll 0": (lambda: hg.solvers.cg(3, unroll=0), ValueError, "unroll to be at least 1"),
    "foreign": (lambda: hg.solvers.from_callable(3), TypeError, "solve to be callable"),
    "smoothing": (lambda: hg.penalties.l1(jnp.ones(2), 1.0, smoothing=0.0), ValueError, "smoothing"),
    "interval": (lambda: hg.bijectors.interval(1.0, 1.0), ValueError, "high to be finite and > 1"),
    "interval inf": (lambda: hg.bijectors.interval(0.0, jnp.inf), ValueError, "high to be finite"),
    "loss": (lambda: hg.BilevelProblem(3, lambda: 0), TypeError, "inner_loss to be callable"),
    "has_aux": (lambda: hg.BilevelProblem(print, print, has_aux=1), TypeError, "has_aux to be a bool"),
    "problem": (lambda: hg.implicit(print, hg.solvers.cg(3)), TypeError, "a BilevelProblem; got builtin"),
    "solver": (lambda: hg.implicit(case().problem, hg.solvers.cg), TypeError, "solver to be a LinearSolver"),
    "bijector": (
        lambda: hg.reparameterize(case().problem, hg.bijectors.exp),
        TypeError,
        "Bijector values; got function.*parentheses",
    ),
    "estimator": (lambda: make(estimator=case().problem), TypeError, "an Estimator; got BilevelProblem"),
    "functional": (lambda: hg.hypergrad(case().problem), TypeError, "an Estimator"),
    "no optimizer": (lambda: hg.hypergrad(hg.unrolled(case().problem)), ValueError, "an inner_optimizer"),
    "unrolled": (lambda: hg.unrolled(print), TypeError, "a BilevelProblem; got builtin"),
    "mode": (lambda: hg.unrolled(case().problem, hg.reverse), TypeError, "mode to be an UnrollMode; got function"),
    "checkpoint_every 0": (lambda: hg.reverse(0), ValueError, "checkpoint_every to be at least 1; got 0"),
    "checkpoint_every 2.5": (lambda: hg.reverse(2.5), TypeError, "checkpoint_every to be a Python int"),
    "truncate 0": (lambda: hg.reverse(truncate=0), ValueError, "truncate to be at least 1; got 0"),
    "mixed": (lambda: hg.reverse(mixed="yes"), TypeError, "mixed to be a bool"),
    "unroll of reverse": (lambda: hg.reverse(unroll=0), ValueError, "unroll to be at least 1"),
    "unroll of forward": (lambda: hg.forward(unroll=2.0), TypeError, "unroll to be a Python int"),
    "schedule": (lambda: hg.optimizers.schedule(jnp.array(0.1)), ValueError, "schedule: .* leading axis K"),
    "schedules": (
        lambda: hg.optimizers.schedule([jnp.ones(2), jnp.ones(3)]),
        ValueError,
        r"schedule: .* leading axis K; got leading axes \[\(2,\), \(3,\)\]",
    ),
    "window 0": (lambda: make(window=0), ValueError, "window to be at least 1; got 0"),
    "window float": (lambda: make(window=2.0), TypeError, "window to be a Python int"),
    "every 0": (lambda: make(every=0), ValueError, "every to be at least 1; got 0"),
    "every str": (lambda: make(every="10"), TypeError, "every to be a Python int"),
    "inner": (lambda: make(inner_optimizer=0.1), TypeError, "inner_optimizer to be an optax"),
    "outer": (lambda: make(outer_optimizer=optax.sgd), TypeError, "outer_optimizer to be an optax"),
    "key": (lambda: make(key="seed"), TypeError, "key to be an int or a jax.random.key"),
    "key none": (lambda: make(key=None), TypeError, "key to be an int or a jax.random.key"),
    "model_state": (lambda: make(model_state={"mean": 0.0}), ValueError, "no model_state for a stateless problem"),
    "model_state array": (lambda: make(model_state=jnp.zeros(2)), ValueError, "no model_state for a stateless problem"),
}


@pytest.mark.parametrize("name", CONSTRUCTION)
def test_construction(name):
    build, error, match = CONSTRUCTION[name]
    with pytest.raises(error, match=match):
        build()


def test_a_stateful_problem_needs_its_model_state():
    problem, variables, stats, _ = batch_norm()
    tx = make(estimator=hg.implicit(problem, hg.solvers.cg(3)))
    with pytest.raises(ValueError, match="model_state for a stateful problem; got None"):
        tx.init(variables)
    assert tx.init(variables, model_state=stats).model_state.keys() == stats.keys()


def test_init_takes_bilevel_params_only():
    with pytest.raises(TypeError, match=r"a BilevelParams; got dict.*hg.BilevelParams"):
        make().init(case().variables.params)
    with pytest.raises(TypeError, match=r"hyperparams leaf \['count'\] of a floating dtype; got int32"):
        make().init(hg.BilevelParams(case().variables.params, {"count": jnp.array(3)}))
    with pytest.raises(TypeError, match=r"params leaf \['w'\] of a floating dtype; got complex64"):
        make().init(hg.BilevelParams({"w": jnp.array(1j)}, jnp.array(0.0)))
    with pytest.raises(TypeError, match=r"params leaf \['name'\] to be an array; got str"):
        make().init(hg.BilevelParams({"name": "adam"}, jnp.array(0.0)))
    with pytest.raises(ValueError, match="hyperparams with at least one array; got an empty tree"):
        make().init(hg.BilevelParams(case().variables.params, {}))


def test_update_names_what_is_missing():
    tx = make()
    with pytest.raises(ValueError, match="inner_batch for update; got None"):
        update(tx, inner_batch=None)
    with pytest.raises(ValueError, match=r"expected outer_batch; got None.*where an outer step is due"):
        update(tx, outer_batch=None)
    with pytest.raises(ValueError, match="params, the current BilevelParams, as third argument; got None"):
        tx.update(None, tx.init(case().variables), inner_batch=case().inner_batch, outer_batch=case().outer_batch)
    with pytest.raises(TypeError, match="a BilevelState; got tuple"):
        tx.update(None, (), case().variables, inner_batch=case().inner_batch, outer_batch=case().outer_batch)
    with pytest.raises(ValueError, match="no model_state for a stateless problem"):
        update(tx, model_state={"mean": jnp.zeros(3)})


def test_update_checks_structures():
    grads = jax.tree.map(jnp.zeros_like, case().variables.params)
    with pytest.raises(ValueError, match=r"grads with the structure.*\['Dense_0'\]\['kernel'\]"):
        update(make(), grads={"Dense_0": {"bias": grads["Dense_0"]["bias"]}, "Dense_1": grads["Dense_1"]})
    wrong = {**grads, "Dense_1": {**grads["Dense_1"], "bias": jnp.zeros(7)}}
    with pytest.raises(ValueError, match=r"grads leaf \['Dense_1'\]\['bias'\] of shape \(3,\); got shape \(7,\)"):
        update(make(), grads=wrong)
    wrong_hyper = case().variables._replace(hyperparams={"Dense_0": jnp.array(0.0)})
    with pytest.raises(ValueError, match="coefficients to be a tree prefix of params"):
        update(make(), variables=wrong_hyper)


def test_windows_are_checked():
    tx = make(window=3)
    x, y = case().inner_batch
    with pytest.raises(
        ValueError, match=r"inner_batch leaf \[0\] with a leading window axis of length 3; got shape \(16, 4\)"
    ):
        update(tx)
    with pytest.raises(
        ValueError, match=r"inner_batch leaf \[1\] with a leading window axis of length 3; got shape \(2"
    ):
        update(tx, inner_batch=(jnp.stack([x] * 3), jnp.stack([y] * 2)))
    with pytest.raises(ValueError, match=r"inner_batch leaf \[1\] .*length 3; got shape \(\)"):
        update(tx, inner_batch=(jnp.stack([x] * 3), jnp.array(1.0)))
    with pytest.raises(ValueError, match="grads=None with window=3"):
        update(tx, grads=case().variables.params, inner_batch=window_of((x, y), 3))
    with pytest.raises(ValueError, match=r"grads=None with window=1 and an estimator that takes the steps"):
        update(make(estimator=hg.unrolled(case().problem), window=1), grads=case().variables.params)
    fn = hg.hypergrad(estimator(), optax.sgd(0.1))
    with pytest.raises(ValueError, match="inner_batch with a common leading window axis; got a batch without leaves"):
        fn(*case().variables, (), case().outer_batch, key=None)


def test_every_must_return_a_scalar_bool():
    with pytest.raises(TypeError, match=r"every\(n\) to return a scalar bool; got"):
        update(make(every=lambda n: n))


def test_stateful_gradients_need_their_model_state():
    problem, variables, stats, batch = batch_norm()
    tx = make(estimator=hg.implicit(problem, hg.solvers.cg(3)), model_state=stats)
    state = tx.init(variables)
    with pytest.raises(ValueError, match="model_state with the grads of a stateful problem; got None"):
        tx.update(variables.params, state, variables, inner_batch=batch, outer_batch=batch)
    with pytest.raises(ValueError, match="model_state with the structure of the state's"):
        tx.update(variables.params, state, variables, inner_batch=batch, outer_batch=batch, model_state={})
    with pytest.raises(ValueError, match="model_state for a stateful problem; got None"):
        hg.hypergrad(hg.implicit(problem, hg.solvers.cg(3)))(*variables, batch, batch, key=None)


def loss_returning(value):
    """Return a loss of the given form; the true loss is in scope as ``loss``."""
    return hg.BilevelProblem(lambda w, h, b, k: value(case().problem.inner_loss(w, h, b, k)), case().problem.outer_loss)


def test_losses_are_checked():
    with pytest.raises(ValueError, match=r"inner_loss to return a scalar; got shape \(2,\).*Reduce it"):
        evaluate(loss_returning(lambda loss: jnp.stack([loss, loss])))
    with pytest.raises(TypeError, match=r"inner_loss to return a scalar; got tuple.*has_aux=True"):
        evaluate(loss_returning(lambda loss: (loss, {})))
    with pytest.raises(TypeError, match="inner_loss to return a float; got int32"):
        evaluate(loss_returning(lambda loss: loss.astype(jnp.int32)))
    with pytest.raises(TypeError, match=r"outer_loss to return \(scalar, aux\); got"):
        evaluate(
            hg.BilevelProblem(lambda *a: (case().problem.inner_loss(*a), ()), case().problem.outer_loss, has_aux=True)
        )
    problem, variables, stats, batch = batch_norm(has_aux=True)
    wrong = hg.BilevelProblem(problem.inner_loss, lambda *a: problem.inner_loss(*a)[0], stateful=True, has_aux=True)
    with pytest.raises(TypeError, match=r"outer_loss to return \(scalar, \(model_state, aux\)\)"):
        hg.hypergrad(hg.implicit(wrong, hg.solvers.cg(3)))(*variables, batch, batch, key=None, model_state=stats)


def test_keys_are_checked():
    fn = hg.hypergrad(estimator())
    args = (*case().variables, case().inner_batch, case().outer_batch)
    with pytest.raises(TypeError, match=r"key to be an int or a jax.random.key; got float"):
        fn(*args, key=0.5)
    with pytest.raises(TypeError, match=r"key to be an int or a jax.random.key; got ArrayImpl of dtype uint32"):
        fn(*args, key=jax.random.key_data(jax.random.key(1, impl="rbg")))
    with pytest.raises(ValueError, match=r"one random key; got keys of shape \(2,\)"):
        fn(*args, key=jax.random.split(jax.random.key(0)))


def zero_by_construction():
    """Name hyperparameters that enter nothing, and how."""
    base = case().problem

    def with_term(term):
        return lambda w, h, b, k: base.inner_loss(w, h["decay"], b, k) + term(w, h["odd"])

    outer = lambda w, h, b, k: base.outer_loss(w, h["decay"], b, k)  # noqa: E731
    return {
        "unused": (with_term(lambda w, odd: 0.0), outer),
        "additive": (with_term(lambda w, odd: odd**2), outer),
        "stopped": (with_term(lambda w, odd: jax.lax.stop_gradient(odd) * optax.tree.sum(w)), outer),
        "rounded": (with_term(lambda w, odd: jnp.floor(odd) * optax.tree.sum(w)), outer),
        "compared": (with_term(lambda w, odd: jnp.where(odd > 0, 1.0, 2.0) * optax.tree.sum(w)), outer),
        "in a jit": (with_term(jax.jit(lambda w, odd: odd**2 + 0.0 * optax.tree.sum(w))), outer),
    }


@pytest.mark.parametrize("name", list(zero_by_construction()))
def test_a_hyperparameter_that_enters_nothing(name):
    hyper = {"decay": case().variables.hyperparams, "odd": jnp.array(0.3)}
    with pytest.raises(ValueError, match=r"leaf \['odd'\], which enters neither.*learning rate.*hg.unrolled"):
        evaluate(hg.BilevelProblem(*zero_by_construction()[name]), hyperparams=hyper)
    with pytest.raises(ValueError, match=r"leaf \['odd'\], which enters neither.*Make inner_optimizer a function"):
        unroll(hg.BilevelProblem(*zero_by_construction()[name]), hyper)


def test_a_hyperparameter_of_the_outer_loss_alone_passes():
    base = case().problem
    problem = hg.BilevelProblem(
        lambda w, h, b, k: base.inner_loss(w, h["decay"], b, k),
        lambda w, h, b, k: base.outer_loss(w, h["decay"], b, k) + h["offset"] ** 2,
    )
    grad = evaluate(problem, hyperparams={"decay": case().variables.hyperparams, "offset": jnp.array(0.5)})
    assert float(grad["offset"]) == pytest.approx(1.0)


def rated():
    """Return the shared problem with a rate among the hyperparameters, and their values."""
    base = case().problem
    problem = hg.BilevelProblem(
        lambda w, h, b, k: base.inner_loss(w, h["decay"], b, k), lambda w, h, b, k: base.outer_loss(w, h["decay"], b, k)
    )
    return problem, {"decay": case().variables.hyperparams, "rate": jnp.array(0.1)}


@pytest.mark.slow
def test_an_unroll_that_a_hyperparameter_does_not_reach():
    problem, hyper = rated()
    with pytest.raises(ValueError, match=r"leaf \['rate'\], which enters neither.*Make inner_optimizer a function"):
        unroll(problem, hyper)
    with pytest.raises(ValueError, match=r"leaf \['decay'\].*'kernel'.*takes signs"):
        unroll(problem, hyper, lambda h: optax.lion(h["rate"]))
    only_state = lambda h: optax.trace(1.0 - h["rate"])  # noqa: E731
    assert float(unroll(problem, hyper, only_state, steps=2)["rate"]) != 0.0
    late = lambda h: optax.chain(  # noqa: E731
        optax.GradientTransformation(lambda p: p, lambda g, s, p: (s, optax.tree.scale(h["rate"], g)))
    )
    assert float(optax.tree.norm(unroll(problem, hyper, late, steps=2))) > 0.0
    with pytest.raises(ValueError, match=r"leaf .*\['rate'\], which enters neither"):
        unroll(problem, hyper, late, steps=1)  # one step writes the rate to the state, which nobody reads


@pytest.mark.slow
def test_optimizers_that_cannot_be_differentiated():
    problem, hyper = rated()
    by_name = lambda tree: jax.tree.map_with_path(lambda path, _: "ab"["kernel" in str(path)], tree)  # noqa: E731
    matrices = lambda tree: jax.tree.map(lambda w: w.ndim > 1, tree)  # noqa: E731
    optimizers = {
        "adam": lambda h: optax.adam(h["rate"]),
        "partition": lambda h: optax.partition({"a": optax.sgd(h["rate"]), "b": optax.adam(h["rate"])}, by_name),
        "masked": lambda h: optax.chain(optax.masked(optax.scale_by_adam(), matrices), optax.scale(h["rate"])),
    }
    for mode in (hg.reverse(), hg.forward()):
        for optimizer in optimizers.values():
            with pytest.raises(ValueError, match=r"exactly zero; got NaN.*eps_root=1e-8"):
                unroll(problem, hyper, optimizer, mode)
            with pytest.raises(ValueError, match=r"exactly zero; got NaN.*eps_root=1e-8"):
                jax.jit(lambda h, optimizer=optimizer, mode=mode: unroll(problem, h, optimizer, mode))(hyper)
    tx = make(estimator=hg.unrolled(problem), inner_optimizer=optimizers["adam"], window=1)
    variables = case().variables._replace(hyperparams=hyper)
    batches = {"inner_batch": case().inner_batch, "outer_batch": case().outer_batch}
    with pytest.raises(ValueError, match=r"exactly zero; got NaN.*eps_root=1e-8"):
        jax.jit(tx.update)(None, tx.init(variables), variables, **batches)
    respond = hg.best_response(hg.unrolled(problem), optimizers["adam"])
    with pytest.raises(ValueError, match=r"exactly zero; got NaN.*eps_root=1e-8"):
        jax.jit(lambda h: respond(case().variables.params, h, window_of(case().inner_batch, 2), key=None))(hyper)
    weights = jax.tree.map(lambda w: jnp.full(w.shape, 0.1), case().variables.params)
    by_weight = lambda h: optax.chain(  # noqa: E731
        optax.scale_by_adam(), hg.optimizers.scale_by_learning_rate(jax.tree.map(lambda r: r * h["rate"], weights))
    )
    with pytest.raises(ValueError, match=r"exactly zero; got NaN.*eps_root=1e-8"):
        unroll(problem, hyper, by_weight)
    for mode in (hg.reverse(), hg.forward()):
        with pytest.raises(ValueError, match=r"one with a stop_gradient in them.*scale_init_precond=False"):
            unroll(problem, hyper, lambda h: optax.lbfgs(h["rate"], linesearch=None), mode)
    with pytest.raises(TypeError, match=r"from gradients, state and params alone; got .*value_fn.*no line search"):
        unroll(problem, hyper, lambda h: optax.lbfgs(h["rate"]))


@pytest.mark.slow
def test_an_optimizer_that_closes_over_traced_values_is_not_tried():
    problem, hyper = rated()
    grad = jax.jit(lambda h, b1: unroll(problem, h, lambda h: optax.adam(h["rate"], b1=b1, eps_root=1e-8)))(hyper, 0.8)
    want = unroll(problem, hyper, lambda h: optax.adam(h["rate"], b1=0.8, eps_root=1e-8))
    assert float(grad["rate"]) == pytest.approx(float(want["rate"]), rel=1e-4)


def test_indexed_batches_are_checked():
    x, y = case().inner_batch
    indices = jnp.arange(6).reshape(2, 3)
    fn = hg.hypergrad(hg.unrolled(case().problem), optax.sgd(0.1))

    def at(batch):
        return fn(*case().variables, batch, case().outer_batch, key=None)

    with pytest.raises(ValueError, match=r"common leading axis N; got leading axes \[\(10,\), \(16,\)\]"):
        at(hg.IndexedBatch((x, y[:10]), indices))
    with pytest.raises(TypeError, match="indices of an integer dtype; got float32"):
        at(hg.IndexedBatch((x, y), indices * 1.0))
    with pytest.raises(TypeError, match="data of arrays; got an IndexedBatch inside it"):
        at(hg.IndexedBatch(hg.IndexedBatch((x, y), jnp.arange(5)), indices))


def test_forward_mode_is_for_few():
    problem, hyper = rated()
    many = {"decay": hyper["decay"], "rate": jnp.full(1001, 0.1)}
    with pytest.raises(ValueError, match=r"at most 1,000 hyperparameters in forward mode; got 1,0\d\d"):
        unroll(problem, many, lambda h: optax.sgd(h["rate"].mean()), hg.forward())


def test_pieces_of_optimizers_must_fit():
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}
    rate = hg.optimizers.scale_by_learning_rate({"a": 0.1})
    with pytest.raises(ValueError, match=r"scale_by_learning_rate: expected rates to be a tree prefix"):
        rate.update(params, rate.init(params))
    decay = hg.optimizers.add_decayed_weights({"a": 0.1, "b": jnp.ones(5)})
    with pytest.raises(ValueError, match=r"add_decayed_weights: .*\['b'\] that broadcast to its shape \(4,\)"):
        decay.update(params, decay.init(params), params)
    with pytest.raises(ValueError, match=r"params for optimizers.add_decayed_weights; got None"):
        decay.update(params, decay.init(params))


def test_a_leaf_without_entries_passes():
    base = case().problem
    problem = hg.BilevelProblem(
        lambda w, h, b, k: base.inner_loss(w, h["decay"], b, k) + h["none"].sum(),
        lambda w, h, b, k: base.outer_loss(w, h["decay"], b, k),
    )
    grad = evaluate(problem, hyperparams={"decay": case().variables.hyperparams, "none": jnp.zeros((0,))})
    assert grad["none"].shape == (0,)


def test_bijector_values_outside_their_range():
    with pytest.raises(ValueError, match=r"\['b'\] inside the bijector's range; got 0.*open interval"):
        hg.unconstrain(hg.bijectors.exp(), {"a": 1.0, "b": 0.0})
    with pytest.raises(ValueError, match=r"inside the bijector's range; got 1"):
        hg.unconstrain(hg.bijectors.sigmoid(), jnp.array([0.5, 1.0]))
    with pytest.raises(ValueError, match=r"bijectors to be a tree prefix of the hyperparameters"):
        hg.constrain({"a": hg.bijectors.exp()}, {"b": jnp.array(0.0)})
    with pytest.raises(TypeError, match=r"floating dtype; got int32"):
        hg.unconstrain(hg.bijectors.exp(), {"a": 1})
    with pytest.raises(TypeError, match=r"bijectors to be Bijector values; got"):
        hg.constrain({"a": jnp.exp}, {"a": jnp.array(0.0)})


def test_penalty_coefficients_must_fit():
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}
    with pytest.raises(ValueError, match=r"penalties.l2: expected coefficients to be a tree prefix"):
        hg.penalties.l2(params, {"a": 1.0})
    with pytest.raises(
        ValueError, match=r"penalties.l1: .* for \['b'\] that broadcast to its shape \(4,\); got shape \(5,\)"
    ):
        hg.penalties.l1(params, {"a": 1.0, "b": jnp.ones(5)})
    with pytest.raises(ValueError, match=r"for \['b'\].* got shape \(3, 4\)"):
        hg.penalties.l2(params, {"a": 1.0, "b": jnp.ones((3, 4))})
