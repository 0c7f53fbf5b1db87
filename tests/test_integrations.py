"""Adapters: a Flax TrainState, NNX modules with batch statistics and dropout, Equinox modules."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import hypergrad as hg
from tests.problems import finite_differences, relative_error
from tests.test_persistence import through_msgpack, through_orbax

X, Y = jax.random.normal(jax.random.key(0), (16, 4)), jnp.arange(16) % 3
TRAIN, VALID = (X[:8], Y[:8]), (X[8:], Y[8:])
OPTIMIZERS = {"inner_optimizer": optax.sgd(1e-2), "outer_optimizer": optax.adam(1e-1), "every": 2}


def cross_entropy(logits, labels):
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(3)(nn.tanh(nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x))))


def linen():
    """Return a stateful problem of a Linen model, its variables and statistics."""
    model = Normalized()
    start = model.init(jax.random.key(1), X, train=False)

    def inner(w, decay, batch, key, stats):
        logits, new = model.apply({"params": w, "batch_stats": stats}, batch[0], train=True, mutable=["batch_stats"])
        return cross_entropy(logits, batch[1]) + hg.penalties.l2(w, jax.tree.map(jnp.exp, decay)), new["batch_stats"]

    def outer(w, decay, batch, key, stats):
        logits = model.apply({"params": w, "batch_stats": stats}, batch[0], train=False)
        return cross_entropy(logits, batch[1]), stats

    problem = hg.BilevelProblem(inner, outer, stateful=True)
    return model, problem, start["params"], start["batch_stats"]


def train_state(stats_at_init=True):
    model, problem, params, stats = linen()
    tx = hg.bilevel(
        hg.implicit(problem, hg.solvers.cg(5, damping=1.0)), **OPTIMIZERS, model_state=None if stats_at_init else stats
    )
    decay = jax.tree.map(lambda w: jnp.full_like(w, -3.0), params)
    create = hg.integrations.flax.TrainState.create
    state = create(
        apply_fn=model.apply, params=params, hyperparams=decay, tx=tx, model_state=stats if stats_at_init else None
    )
    return problem, tx, stats, state


@jax.jit
def advance(state):
    return state.apply_gradients(inner_batch=TRAIN, outer_batch=VALID)


@pytest.mark.slow
def test_a_train_state_takes_the_steps_of_its_transformation():
    _, tx, stats, state = train_state()
    variables, own = state.variables, tx.init(state.variables, model_state=stats)
    for _ in range(4):
        state = advance(state)
        updates, own = jax.jit(tx.update)(None, own, variables, inner_batch=TRAIN, outer_batch=VALID)
        variables = optax.apply_updates(variables, updates)
    assert relative_error(state.variables, variables) < 1e-6
    assert relative_error(state.model_state, own.model_state) < 1e-6
    assert relative_error(state.hyperparams, train_state()[3].hyperparams) > 0.0
    assert int(state.info.step) == 4
    assert int(state.step) == 4


@pytest.mark.slow
def test_a_train_state_takes_given_gradients_and_replaces_attributes():
    class Counted(hg.integrations.flax.TrainState):
        seen: int = 0

    problem, tx, stats, plain = train_state()
    state = Counted.create(
        apply_fn=plain.apply_fn, params=plain.params, hyperparams=plain.hyperparams, tx=tx, model_state=stats, seen=1
    )

    def loss(params):
        return problem.inner_loss(params, state.hyperparams, TRAIN, None, state.model_state)

    (value, new), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    batches = {"inner_batch": TRAIN, "outer_batch": VALID}
    given = state.apply_gradients(grads=grads, model_state=new, value=value, seen=2, **batches)
    computed = plain.apply_gradients(**batches)
    assert relative_error(given.variables, computed.variables) < 1e-6
    assert given.seen == 2
    assert isinstance(given, Counted)
    logits = given.apply_fn({"params": given.params, "batch_stats": given.model_state}, X, train=False)
    assert logits.shape == (16, 3)


@pytest.mark.slow
@pytest.mark.parametrize("through", [through_msgpack, through_orbax])
def test_a_train_state_resumes_bit_identically(through, tmp_path):
    state = train_state()[3]
    for _ in range(3):
        state = advance(state)
    restored = through(train_state()[3], state, tmp_path)
    for _ in range(2):
        state, restored = advance(state), advance(restored)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(a, b)


def test_model_state_at_init_takes_the_place_of_that_of_bilevel():
    _, _, stats, early = train_state(stats_at_init=False)
    late = train_state()[3]
    assert relative_error(early.opt_state.model_state, late.opt_state.model_state) == 0.0
    other = jax.tree.map(lambda s: s + 1.0, stats)
    moved = early.tx.init(early.variables, model_state=other)
    assert relative_error(moved.model_state, other) == 0.0
    with pytest.raises(ValueError, match="model_state with the structure of bilevel's"):
        early.tx.init(early.variables, model_state={"mean": jnp.zeros(2)})


def test_a_train_state_wants_a_bilevel():
    with pytest.raises(TypeError, match=r"tx from hg.bilevel; got .*Pass tx=hg.bilevel"):
        hg.integrations.nnx.Optimizer(Net(nnx.Rngs(0)), optax.adam(1e-3), jnp.zeros(()))
    with pytest.raises(TypeError, match=r"tx from hg.bilevel; got .*Pass tx=hg.bilevel"):
        hg.integrations.flax.TrainState.create(
            apply_fn=None, params=jnp.ones(2), hyperparams=jnp.ones(2), tx=optax.adam(1e-3)
        )


class Net(nnx.Module):
    """Batch statistics, and two layers of dropout of the same shape."""

    def __init__(self, rngs, rate=0.5):
        self.first, self.norm = nnx.Linear(4, 6, rngs=rngs), nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.List([nnx.Dropout(rate, rngs=rngs) for _ in range(2)])
        self.last = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        x = jnp.tanh(self.norm(self.first(x)))
        for layer in self.dropout:
            x = layer(x)
        return self.last(x)


def train_loss(model, decay, batch, key):
    weights = hg.integrations.nnx.params(model)
    return cross_entropy(model(batch[0]), batch[1]) + hg.penalties.l2(weights, jax.tree.map(jnp.exp, decay))


def valid_loss(model, decay, batch, key):
    model.eval()
    return cross_entropy(model(batch[0]), batch[1])


def nnx_case(rate=0.5):
    model = Net(nnx.Rngs(0), rate)
    problem = hg.integrations.nnx.problem(model, train_loss, valid_loss)
    tx = hg.bilevel(hg.implicit(problem, hg.solvers.cg(5, damping=1.0)), **OPTIMIZERS, key=3)
    return model, problem, tx


@pytest.mark.slow
def test_an_nnx_optimizer_takes_the_steps_of_its_transformation():
    model, _, tx = nnx_case()
    decay = jax.tree.map(lambda w: jnp.full_like(w, -3.0), hg.integrations.nnx.params(model))
    variables = hg.BilevelParams(hg.integrations.nnx.params(model), decay)
    state = tx.init(variables, model_state=hg.integrations.nnx.model_state(model))
    optimizer = hg.integrations.nnx.Optimizer(model, tx, decay)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, inner_batch=TRAIN, outer_batch=VALID)

    for _ in range(4):
        step(model, optimizer)
        updates, state = jax.jit(tx.update)(None, state, variables, inner_batch=TRAIN, outer_batch=VALID)
        variables = optax.apply_updates(variables, updates)
    assert relative_error(hg.integrations.nnx.params(model), variables.params) < 1e-5
    assert relative_error(optimizer.hyperparams, variables.hyperparams) < 1e-5
    assert relative_error(hg.integrations.nnx.model_state(model), state.model_state) < 1e-5
    assert relative_error(optimizer.hyperparams, decay) > 0.0
    assert int(optimizer.info.step) == 4
    assert jax.tree.structure(optimizer.hyperparams) == jax.tree.structure(decay)


@pytest.mark.slow
@pytest.mark.parametrize("through", [through_msgpack, through_orbax])
def test_an_nnx_module_and_its_optimizer_resume_bit_identically(through, tmp_path):
    """Of a module with dropout, whose keys are saved as numbers, as Flax's own states are."""

    def start():
        model, _, tx = nnx_case()
        return model, hg.integrations.nnx.Optimizer(model, tx, jnp.array(-3.0))

    def is_key(leaf):
        return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)

    def numbers(both):
        tree = nnx.to_pure_dict(nnx.state(both))
        return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree)

    @nnx.jit
    def step(both):
        both[1].update(both[0], inner_batch=TRAIN, outer_batch=VALID)

    both, restored = start(), start()
    for _ in range(3):
        step(both)
    saved, state = through(numbers(restored), numbers(both), tmp_path), nnx.state(restored)
    wrap = lambda leaf, like: jax.random.wrap_key_data(leaf) if is_key(like) else leaf  # noqa: E731
    nnx.replace_by_pure_dict(state, jax.tree.map(wrap, saved, nnx.to_pure_dict(state)))
    nnx.update(restored, state)
    for _ in range(2):
        step(both)
        step(restored)
    for a, b in zip(jax.tree.leaves(numbers(both)), jax.tree.leaves(numbers(restored)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_an_nnx_optimizer_takes_gradients_and_the_statistics_of_their_forward_pass():
    """The user's own forward pass has written into the model; without dropout both ways agree."""
    (one, _, tx), (other, _, _) = nnx_case(0.0), nnx_case(0.0)
    given = hg.integrations.nnx.Optimizer(one, tx, jnp.array(-3.0))
    computed = hg.integrations.nnx.Optimizer(other, tx, jnp.array(-3.0))

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(train_loss)(model, optimizer.hyperparams, TRAIN, None)
        optimizer.update(model, grads, inner_batch=TRAIN, outer_batch=VALID, value=value)

    for _ in range(3):
        step(one, given)
        computed.update(other, inner_batch=TRAIN, outer_batch=VALID)
    assert relative_error(nnx.to_pure_dict(nnx.state(one, nnx.Param)), hg.integrations.nnx.params(other)) < 1e-5
    assert relative_error(*map(hg.integrations.nnx.model_state, (one, other))) < 1e-5
    assert float(given.hyperparams) == pytest.approx(float(computed.hyperparams), rel=1e-5)
    assert float(given.info.inner_loss) == pytest.approx(float(computed.info.inner_loss), rel=1e-5)


def test_dropout_of_an_nnx_problem_follows_its_key():
    model, problem, _ = nnx_case()
    at = hg.integrations.nnx.params(model), jnp.array(-3.0), TRAIN
    stats = hg.integrations.nnx.model_state(model)
    loss = lambda seed: float(problem.inner_loss(*at, jax.random.key(seed), stats)[0])  # noqa: E731
    assert loss(1) == loss(1)
    assert loss(1) != loss(2)
    seen = []

    def record(model, decay, batch, key):
        ones = jnp.ones((8, 6))
        seen.extend(layer(ones) for layer in model.dropout)
        return jnp.sum(ones)

    looking = hg.integrations.nnx.problem(model, record, valid_loss)
    looking.inner_loss(*at, jax.random.key(1), stats)
    assert bool(jnp.any(seen[0] != seen[1]))  # two layers of one shape, each with its own mask
    before = jax.tree.leaves(nnx.state(model))
    for a, b in zip(before, jax.tree.leaves(nnx.state(model)), strict=True):
        assert a is b


@pytest.mark.slow
def test_the_hypergradient_of_an_nnx_problem_against_finite_differences(x64):
    """Of the inner solution of a module with dropout, whose mask the key fixes."""
    model = nnx.Sequential(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), nnx.Linear(4, 1, param_dtype=float, rngs=nnx.Rngs(1)))
    x, y = X.astype(float), X[:, :1].astype(float) ** 2

    def inner(model, decay, batch, key):
        weights = hg.integrations.nnx.params(model)
        return jnp.mean((model(x[:8]) - y[:8]) ** 2) + hg.penalties.l2(weights, jax.tree.map(jnp.exp, decay))

    def outer(model, decay, batch, key):
        model.eval()
        return jnp.mean((model(x[8:]) - y[8:]) ** 2)

    problem, key = hg.integrations.nnx.problem(model, inner, outer), jax.random.key(5)

    weights = hg.integrations.nnx.params(model)
    keys = hg.Keys(*jax.random.split(key, len(hg.Keys._fields)))

    def solution(decay):
        flat, unravel = jax.flatten_util.ravel_pytree(weights)
        fn = lambda w: problem.inner_loss(unravel(w), decay, (), keys.solve)  # noqa: E731
        return unravel(-jnp.linalg.solve(jax.hessian(fn)(flat), jax.grad(fn)(0.0 * flat)))

    value = lambda decay: problem.outer_loss(solution(decay), decay, (), keys.outer)  # noqa: E731
    at = jnp.array(-2.0)
    got = hg.hypergrad(hg.implicit(problem, hg.solvers.dense()))(solution(at), at, (), (), key=key)
    assert relative_error(got, finite_differences(value, at)) < 1e-6


def test_an_outer_loss_in_training_mode_is_told():
    model, _, _ = nnx_case()
    at, stats = hg.integrations.nnx.params(model), hg.integrations.nnx.model_state(model)
    training = lambda model, decay, batch, key: cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    problem = hg.integrations.nnx.problem(model, train_loss, training)
    with pytest.warns(UserWarning, match="Begin it with model.eval"):
        problem.outer_loss(at, 0.0, VALID, jax.random.key(0), stats)


def test_an_nnx_module_without_state_is_a_stateless_problem():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    problem = hg.integrations.nnx.problem(model, train_loss, valid_loss)
    assert not problem.stateful
    assert hg.integrations.nnx.model_state(model) == ()
    with pytest.raises(TypeError, match=r"an nnx.Module"):
        hg.integrations.nnx.problem(lambda x: x, train_loss, valid_loss)


def test_a_filter_trains_a_part_of_an_nnx_module():
    model = Net(nnx.Rngs(0))
    last = nnx.All(nnx.Param, nnx.PathContains("last"))
    assert set(hg.integrations.nnx.params(model, wrt=last)) == {"last"}
    assert set(hg.integrations.nnx.model_state(model, wrt=last)) == {"first", "norm"}
    problem = hg.integrations.nnx.problem(model, valid_loss, valid_loss, wrt=last)
    assert problem.stateful
    stats = hg.integrations.nnx.model_state(model, wrt=last)
    value, same = problem.outer_loss(hg.integrations.nnx.params(model, wrt=last), 0.0, VALID, None, stats)
    assert jnp.isfinite(value)
    assert relative_error(same, stats) == 0.0


def test_an_equinox_module_is_tuned():
    model = eqx.nn.MLP(4, 3, 8, 1, key=jax.random.key(0))
    params, combine = hg.integrations.equinox.partition(model)
    want, static = eqx.partition(model, eqx.is_inexact_array)
    assert relative_error(params, want) == 0.0
    assert jax.tree.structure(combine(params)) == jax.tree.structure(eqx.combine(want, static))
    loss = lambda w, batch: cross_entropy(jax.vmap(combine(w))(batch[0]), batch[1])  # noqa: E731
    problem = hg.BilevelProblem(
        lambda w, decay, batch, key: loss(w, batch) + hg.penalties.l2(w, jax.tree.map(jnp.exp, decay)),
        lambda w, decay, batch, key: loss(w, batch),
    )
    tx = hg.bilevel(hg.implicit(problem, hg.solvers.cg(5, damping=1.0)), **OPTIMIZERS)
    start = variables = hg.BilevelParams(params, jax.tree.map(lambda w: jnp.full_like(w, -3.0), params))
    state = tx.init(variables)
    for _ in range(2):
        updates, state = tx.update(None, state, variables, inner_batch=TRAIN, outer_batch=VALID)
        variables = optax.apply_updates(variables, updates)
    assert relative_error(variables.hyperparams, start.hyperparams) > 0.0
    assert jax.vmap(combine(variables.params))(X).shape == (16, 3)


def test_an_equinox_module_is_tuned_in_part():
    model = eqx.nn.MLP(4, 3, 8, 1, key=jax.random.key(0))
    marks = eqx.tree_at(lambda m: m.layers[-1], jax.tree.map(lambda _: False, model), replace=True)
    params, combine = hg.integrations.equinox.partition(model, marks)
    assert len(jax.tree.leaves(params)) == 2
    assert relative_error(*(eqx.filter(m, eqx.is_array) for m in (combine(params), model))) == 0.0
    with pytest.raises(ValueError, match="prefix"):
        hg.integrations.equinox.partition({"a": jnp.ones(2)}, {"b": True})
