"""What every estimator keeps to, a row of the catalogue each: alone and behind ``bilevel``."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from tests.catalogue import ESTIMATORS
from tests.problems import network, relative_error, window_of


def rows_with(*fast):
    """Return a mark of all rows, those that are not named slow."""
    return pytest.mark.parametrize(
        "row", [pytest.param(row, marks=[pytest.mark.slow] * (row.name not in fast), id=row.name) for row in ESTIMATORS]
    )


# One row of each family runs each time, and a single one of those where the wrapper matters more than the estimator.
rows = rows_with("implicit", "unrolled", "direct_gated")
single_row = rows_with("implicit")


@functools.cache
def case():
    """Return the shared problem: nested weights, data, decays one per weight."""
    return network()


@functools.cache
def start(row):
    """Return the variables that the row begins with."""
    return begin(row, case().problem, case().variables.hyperparams)


def begin(row, problem, hyperparams):
    """Return variables with response parameters in place of weights, where the row's problem has any."""
    made, params = row.make(problem).problem, case().variables.params
    if made.response is not None:
        params = hg.responses.init(made, 0, params, hyperparams, case().inner_batch)
        # As if it had learned something: centred responses begin at zero, with a hypergradient of zero.
        params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    return hg.BilevelParams(params, hyperparams)


def functional(row, problem=None, hyperparams=None):
    """Return the estimator's function and its arguments."""
    variables = start(row) if problem is None else begin(row, problem, hyperparams)
    estimator = row.make(problem or case().problem)
    trains = row.trains or estimator.train is not None or estimator.advance is not None
    inner_optimizer = optax.sgd(0.1) if trains else None
    batch = window_of(case().inner_batch, 3) if trains else case().inner_batch
    return hg.value_and_hypergrad(estimator, inner_optimizer), (*variables, batch, case().outer_batch)


@functools.cache
def evaluated(row):
    """Return the estimator's function, its arguments and its result."""
    fn, args = functional(row)
    return fn, args, fn(*args, key=0)


def transformation(row, **kwargs):
    """Return ``bilevel`` over the estimator, with an outer step on every second call."""
    options = {
        "inner_optimizer": optax.adam(1e-2, eps_root=1e-8),
        "outer_optimizer": optax.adam(1e-1),
        "window": 1,
        "every": 2,
        **kwargs,
    }
    return hg.bilevel(row.make(case().problem), **options)


def stepper(tx, *, window=1):
    """Return a training step without handed-in gradients, which must be traced once."""
    batch = case().inner_batch if window == 1 else window_of(case().inner_batch, window)
    traces = []

    def step(variables, state):
        traces.append(1)
        assert len(traces) == 1, "traced a second time"
        updates, state = tx.update(None, state, variables, inner_batch=batch, outer_batch=case().outer_batch)
        return optax.apply_updates(variables, updates), state

    return step


@functools.cache
def compiled(row, window=1):
    """Return the transformation and its compiled step: one compilation for all tests of a row and window."""
    tx = transformation(row, window=window)
    return tx, jax.jit(stepper(tx, window=window))


def four_calls(row, step, variables):
    """Return variables and state after four calls."""
    state = compiled(row)[0].init(variables)
    for _ in range(4):
        variables, state = step(variables, state)
    return variables, state


def copied(tree):
    """Return a tree of fresh buffers, which may be donated."""
    return jax.tree.map(jnp.copy, tree)


@rows
def test_structure_and_dtypes(row):
    _, _, ((value, grad), info) = evaluated(row)
    chex.assert_trees_all_equal_shapes_and_dtypes(grad, start(row).hyperparams)
    chex.assert_shape(value, ())
    assert float(info.outer_loss) == float(value)
    assert float(info.hypergrad_norm) == pytest.approx(float(optax.tree.norm(grad)), rel=1e-6)
    assert float(info.hypergrad_norm) > 0
    assert not bool(info.skipped)
    assert int(info.step) == -1


@rows
def test_jit_equals_eager(row):
    fn, args, ((_, eager), _) = evaluated(row)
    (_, jitted), _ = jax.jit(functools.partial(fn, key=0))(*args)
    assert relative_error(jitted, eager) < 1e-5


@rows
def test_vmap_equals_a_loop(row):
    fn, (params, hyper, inner_batch, outer_batch), _ = evaluated(row)
    shifts = jnp.array([0.0, 0.5])
    run = lambda s: fn(params, jax.tree.map(lambda x: x + s, hyper), inner_batch, outer_batch, key=0)[0][1]  # noqa: E731
    batched = jax.jit(jax.vmap(run))(shifts)
    for i in range(2):
        one = jax.tree.map(lambda x, i=i: x[i], batched)
        assert relative_error(one, run(shifts[i])) < 1e-4


@rows
@pytest.mark.parametrize("window", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_one_trace_and_a_state_that_keeps_its_form(row, window):
    tx, step = compiled(row, window)
    variables, state = start(row), tx.init(start(row))
    first = state
    for _ in range(4):
        variables, state = step(variables, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(first, state)
    assert not any(jnp.asarray(leaf).weak_type for leaf in jax.tree.leaves(first))
    assert int(state.step) == 4
    assert int(state.info.step) == 4
    chex.assert_trees_all_equal_shapes_and_dtypes(variables, start(row))
    assert relative_error(variables.hyperparams, start(row).hyperparams) > 0
    assert relative_error(variables.params, start(row).params) > 0


@pytest.mark.slow  # a scan runs in ``test_vmap_over_whole_runs``
@single_row
def test_scan_equals_a_loop_of_calls(row):
    tx, step = compiled(row)
    variables, _ = four_calls(row, step, start(row))
    again = stepper(tx)
    scan = jax.jit(lambda s: jax.lax.scan(lambda carry, _: (again(*carry), None), s, None, length=4)[0])
    scanned, scanned_state = scan((start(row), tx.init(start(row))))
    assert relative_error(scanned, variables) < 1e-5
    assert int(scanned_state.step) == 4


@single_row
def test_donated_buffers_change_nothing(row):
    tx, step = compiled(row)
    variables, _ = four_calls(row, step, start(row))
    mine, _ = four_calls(row, jax.jit(stepper(tx), donate_argnums=(0, 1)), copied(start(row)))
    assert relative_error(mine, variables) < row.rounding
    chex.assert_tree_all_finite(tx.init(start(row)))  # nothing that the closure keeps was deleted


@rows
def test_state_shares_no_buffer(row):
    variables = copied(start(row))
    tx = transformation(row)
    shared = (variables, tx.init(variables), tx.init(variables))
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(shared) if leaf.size]
    assert len(pointers) == len(set(pointers))


@single_row
def test_vmap_over_whole_runs(row):
    """Two runs from different hyperparameters at once equal two runs."""
    (tx, step), first = compiled(row), start(row)
    again = stepper(tx)

    def shifted(shift):
        return hg.BilevelParams(first.params, jax.tree.map(lambda x: x + shift, first.hyperparams))

    def run(shift):
        begun = shifted(shift), tx.init(shifted(shift))
        return jax.lax.scan(lambda carry, _: (again(*carry), None), begun, None, length=4)[0][0]

    shifts = jnp.array([0.0, 0.3])
    batched, (alone, _) = jax.jit(jax.vmap(run))(shifts), four_calls(row, step, shifted(shifts[1]))
    assert relative_error(jax.tree.map(lambda x: x[1], batched), alone) < 1e-4


@single_row
def test_a_batch_that_is_not_finite_keeps_the_hyperparameters(row):
    """And the outer state; the call after a bad outer batch takes its step."""
    tx, first = transformation(row, every=1, guard=hg.guard(max_residual=np.inf)), start(row)  # far from a solution
    inner, outer = case().inner_batch, case().outer_batch
    spoilt = lambda batch: (batch[0].at[0, 0].set(jnp.nan), batch[1])  # noqa: E731
    update = jax.jit(lambda state, ins, outs: tx.update(None, state, first, inner_batch=ins, outer_batch=outs))
    state = tx.init(first)
    for ins, outs, bad in (
        (inner, outer, False),
        (inner, spoilt(outer), True),
        (inner, outer, False),
        (spoilt(inner), outer, True),
    ):
        before, (updates, state) = state, update(state, ins, outs)
        assert bool(state.info.skipped) == bad
        assert (float(optax.tree.norm(updates.hyperparams)) == 0.0) == bad
        if bad:
            assert hg.SkipReason(int(state.info.skip_reason)) == hg.SkipReason.OUTER_LOSS  # NaN weights have it, too
            chex.assert_trees_all_equal(state.outer, before.outer)
    assert int(state.info.num_skipped) == 2


@single_row
def test_chains_with_optax_and_ignores_foreign_keywords(row):
    (tx, step), variables = compiled(row), start(row)
    chain = optax.chain(tx, optax.scale(0.5))
    batches = {"inner_batch": case().inner_batch, "outer_batch": case().outer_batch}
    update = jax.jit(lambda state: chain.update(None, state, variables, **batches, colour=jnp.array(3.0)))
    state, plain_state = chain.init(variables), tx.init(variables)
    for _ in range(2):
        updates, state = update(state)
        want, plain_state = step(variables, plain_state)
    assert relative_error(optax.apply_updates(variables, optax.tree.scale(2.0, updates)), want) < row.rounding
    assert int(optax.tree.get(state, "info").step) == 2


@single_row
def test_same_key_same_run(row):
    noisy = network(dropout=0.5)
    first = begin(row, noisy.problem, noisy.variables.hyperparams)
    options = {"inner_optimizer": optax.sgd(0.1), "outer_optimizer": optax.sgd(0.1), "window": 1}
    transformations = [hg.bilevel(row.make(noisy.problem), key=seed, **options) for seed in (0, 0, 1)]
    update = jax.jit(transformations[0].update)
    batches = {"inner_batch": noisy.inner_batch, "outer_batch": noisy.outer_batch}
    results = [update(None, tx.init(first), first, **batches)[0] for tx in transformations]  # the key is in the state
    assert relative_error(results[0], results[1]) == 0.0
    assert relative_error(results[0], results[2]) > 0.0


@rows
def test_a_leaf_that_enters_nothing_is_refused(row):
    base = case().problem
    problem = hg.BilevelProblem(
        lambda w, h, b, k: base.inner_loss(w, h["decay"], b, k), lambda w, h, b, k: base.outer_loss(w, h["decay"], b, k)
    )
    hyper = {"decay": case().variables.hyperparams, "rate": {"inner": jnp.array(0.1)}}
    fn, (params, _, *batches) = functional(row, problem, hyper)
    with pytest.raises(ValueError, match=r"\['rate'\]\['inner'\].*enters neither.*unrolled"):
        fn(params, hyper, *batches, key=0)


def test_rows_have_distinct_names():
    names = [row.name for row in ESTIMATORS]
    assert len(names) == len(set(names))
    assert np.all([callable(row.make) for row in ESTIMATORS])
