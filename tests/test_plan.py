"""``hg.plan``: memory by part, before anything runs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import hypergrad as hg
from tests.problems import batch_norm, network

SHAPE = jax.ShapeDtypeStruct((256, 256), jnp.float32)
WEIGHTS = 4 * 256 * 256


def outer(params, decay, batch, key):
    for layer in params:
        batch = jnp.tanh(batch @ layer)
    return jnp.mean((batch - 1.0) ** 2)


def inner(params, decay, batch, key):
    return outer(params, decay, batch, key) + hg.penalties.l2(params, decay)


PROBLEM = hg.BilevelProblem(inner, outer)


def transformation(moments=None, solver=None, problem=PROBLEM, **options):
    """Return ``bilevel`` with Adam twice and two products."""
    return hg.bilevel(
        hg.implicit(problem, solver or hg.solvers.neumann(2, 0.1)),
        inner_optimizer=optax.adam(1e-3),
        outer_optimizer=optax.adam(1e-2, mu_dtype=moments),
        **options,
    )


def planned(tx=None, rows=8, layers=2, **options):
    """Return the plan of a small MLP, from shapes alone."""
    batch = jax.ShapeDtypeStruct((rows, 256), jnp.float32)
    variables = hg.BilevelParams([SHAPE] * layers, [SHAPE] * layers)
    tx = transformation() if tx is None else tx
    return hg.plan(tx, variables, **{"inner_batch": batch, "outer_batch": batch, **options})


def test_the_parts_are_those_of_the_variables_and_states():
    found = planned()
    assert found.weights == found.hyperparams == 2 * WEIGHTS
    for state in (found.inner_state, found.outer_state):
        assert state == 4 * WEIGHTS + 4  # two moments and a count
    assert found.batches == 2 * 8 * 256 * 4
    parts = found[2:-1]
    assert found.device_bytes == sum(parts)
    assert min(parts) >= 0
    assert found.per_weight == found.device_bytes / (2 * 256 * 256)
    shown = str(found).splitlines()
    assert shown[0] == f"{found.device_bytes:,} bytes per device, {found.per_weight:.1f} per weight"
    assert any(line.split() == [f"{found.weights:,}", "weights"] for line in shown)
    assert f"to save about {found.advice[0].saves:,}: {found.advice[0].change}" in shown


@pytest.mark.slow
def test_the_peak_is_that_of_the_compiled_step():
    """What the plan says before is what the compiled program of a user's step says, to the state's few scalars."""
    case, tx = network(), transformation()
    tx = hg.bilevel(hg.implicit(case.problem), inner_optimizer=optax.adam(1e-3), outer_optimizer=optax.adam(1e-2))
    state = tx.init(case.variables)

    def step(variables, state, inner_batch, outer_batch):
        updates, state = tx.update(None, state, variables, inner_batch=inner_batch, outer_batch=outer_batch)
        return optax.apply_updates(variables, updates), state

    given = case.variables, state, case.inner_batch, case.outer_batch
    memory = jax.jit(step, donate_argnums=(0, 1)).lower(*given).compile().memory_analysis()
    found = hg.plan(tx, case.variables, inner_batch=case.inner_batch, outer_batch=case.outer_batch)
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    used += max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)
    assert found.device_bytes == pytest.approx(used, abs=256)


@pytest.mark.parametrize(
    "which", ["outer_batch", *(pytest.param(x, marks=pytest.mark.slow) for x in ("inner_batch", "solve_batch"))]
)
def test_the_batch_that_takes_the_memory_is_advised_against(which):
    """Whichever of the three it is, and not the solver, which keeps few vectors."""
    large = {which: jax.ShapeDtypeStruct((4096, 256), jnp.float32)}
    found = planned(**large)
    assert found.activations > 2 * 4096 * 256 * 4
    assert found.vectors < 6 * found.weights
    first = found.advice[0]
    assert "halve the batches" in first.change
    assert not any("solver" in entry.change for entry in found.advice)
    less = planned(**{which: jax.ShapeDtypeStruct((2048, 256), jnp.float32)})
    assert found.device_bytes - less.device_bytes == pytest.approx(first.saves, rel=0.01)


@pytest.mark.parametrize("window", [None, 3])
def test_an_unroll(window):
    """An estimator is planned as ``value_and_hypergrad``; its steps are in ``vectors``."""
    batch = jax.ShapeDtypeStruct((3, 8, 256), jnp.float32)
    last = jax.ShapeDtypeStruct((8, 256), jnp.float32)
    variables = hg.BilevelParams([SHAPE] * 2, [SHAPE] * 2)
    if window is None:
        driver, options = hg.unrolled(PROBLEM), {"inner_optimizer": optax.sgd(0.1)}
    else:
        sgd = {"inner_optimizer": optax.sgd(0.1), "outer_optimizer": optax.sgd(0.1)}
        driver, options = hg.bilevel(hg.unrolled(PROBLEM), **sgd, window=window), {}
    found = hg.plan(driver, variables, inner_batch=batch, outer_batch=last, **options)
    assert found.vectors > 2 * found.weights  # a copy of the weights for each step
    assert found.inner_state == found.outer_state == 0


@pytest.mark.slow
def test_losses_with_keys_and_a_model_state():
    problem, variables, statistics, batch = batch_norm()
    optimizers = {"inner_optimizer": optax.sgd(0.1), "outer_optimizer": optax.sgd(0.1)}
    tx = hg.bilevel(hg.implicit(problem), **optimizers, key=0)
    found = hg.plan(tx, variables, inner_batch=batch, outer_batch=batch, model_state=statistics)
    assert found.device_bytes > sum(leaf.nbytes for leaf in jax.tree.leaves((batch, batch, variables)))
    dropped = network(dropout=0.5)
    fn = hg.plan(
        hg.implicit(dropped.problem),
        dropped.variables,
        inner_batch=dropped.inner_batch,
        outer_batch=dropped.outer_batch,
    )
    assert fn.outer_state == 0


@pytest.mark.slow
def test_bfloat16_moments_save_what_is_predicted():
    """With the default solver, whose vectors are the peak of the scratch memory."""
    solver = hg.solvers.cg(3, relative_damping=0.01, warm_start=True)
    found, less = (planned(transformation(moments, solver)) for moments in (None, jnp.bfloat16))
    advice = {entry.change: entry.saves for entry in found.advice}
    moments = next(saves for change, saves in advice.items() if "bfloat16" in change)
    assert found.device_bytes - less.device_bytes == pytest.approx(moments, rel=0.02)


@pytest.mark.slow
def test_the_advice_on_hyperparameters():
    """A decay per layer saves a copy of λ and the outer state."""
    solver = hg.solvers.cg(3, relative_damping=0.01, warm_start=True)
    found = planned(transformation(solver=solver))
    advice = {entry.change: entry.saves for entry in found.advice}
    fewer = next(saves for change, saves in advice.items() if "fewer hyperparameters" in change)
    variables = hg.BilevelParams([SHAPE] * 2, [jax.ShapeDtypeStruct((), jnp.float32)] * 2)
    batch = jax.ShapeDtypeStruct((8, 256), jnp.float32)
    layers = hg.plan(transformation(solver=solver), variables, inner_batch=batch, outer_batch=batch)
    assert found.device_bytes - layers.device_bytes == pytest.approx(fewer, rel=0.2)  # one penalty sums more


@pytest.mark.slow
def test_half_a_batch_of_indices():
    """An ``IndexedBatch`` has half of its rows, not half of its data."""
    rows, batch = jax.ShapeDtypeStruct((600, 256), jnp.float32), jax.ShapeDtypeStruct((512,), jnp.int32)
    found = planned(inner_batch=hg.IndexedBatch(rows, batch))
    assert found.activations >= 256 * 256 * 4
    entry = next(entry for entry in found.advice if "halve the batches" in entry.change)
    half = planned(rows=4, inner_batch=hg.IndexedBatch(rows, jax.ShapeDtypeStruct((256,), jnp.int32)))
    assert found.device_bytes - half.device_bytes == pytest.approx(entry.saves, rel=0.01)


@pytest.mark.slow
def test_bfloat16_moments_are_advised_where_they_would_save():
    """Not where they are in bfloat16, and not to an optimizer without moments."""
    momentum = optax.sgd(1e-2, momentum=0.9)
    other = hg.bilevel(hg.implicit(PROBLEM), inner_optimizer=optax.adam(1e-3), outer_optimizer=momentum)
    for tx in (transformation(jnp.bfloat16), other):
        advice = planned(tx).advice
        assert advice
        assert not any("bfloat16" in entry.change for entry in advice)


def test_advice_is_for_what_does_not_fit():
    found = planned()
    assert planned(device_bytes=found.device_bytes).advice == ()
    advice = planned(device_bytes=found.device_bytes // 6).advice
    assert [entry.saves for entry in advice] == sorted((entry.saves for entry in advice), reverse=True)
    assert any("over 8 times the devices" in entry.change for entry in advice)


@pytest.mark.slow
def test_a_loss_that_takes_one_batch_size_is_planned():
    """Half a batch, which tells what grows with it, raises: what the vectors take is not known, nor advised."""

    def one_size(params, decay, batch, key):
        assert batch.shape[0] == 8
        return inner(params, decay, batch, key)

    tx = transformation(problem=hg.BilevelProblem(one_size, outer))
    found, free = planned(tx), planned()
    assert found.activations == 0
    assert found.vectors == pytest.approx(free.vectors + free.activations, rel=0.05)
    found = planned(tx, outer_batch=jax.ShapeDtypeStruct((8192, 256), jnp.float32))
    assert found.vectors > 20 * found.weights
    assert not any("solver" in entry.change or "halve" in entry.change for entry in found.advice)


def test_a_budget_below_what_the_batches_take():
    """No mesh of the weights alone fits; the advice says so, with what the batches take, however little it saves."""
    found = planned(rows=8192, device_bytes=1_000_000)
    assert found.advice[-1].saves < found.device_bytes / 50
    entry = next(entry for entry in found.advice if "shard" in entry.change)
    whole = found.batches + found.activations
    assert entry.change.endswith(f"(not enough alone: batches and activations take {whole:,})")


def test_data_in_a_closure_are_not_taken_for_vectors_of_the_solver():
    rows = jnp.ones((2048, 256))
    problem = hg.BilevelProblem(*(lambda w, h, batch, key, loss=loss: loss(w, h, rows, key) for loss in (inner, outer)))
    found = planned(transformation(problem=problem), inner_batch=(), outer_batch=())
    assert found.vectors > 6 * found.weights
    assert found.advice
    assert not any("solver" in entry.change for entry in found.advice)


@pytest.mark.slow
def test_a_batch_with_a_longer_leaf_that_has_no_examples():
    problem = hg.BilevelProblem(
        *(lambda w, h, batch, key, loss=loss: loss(w, h, batch["x"], key) for loss in (inner, outer))
    )

    def plan(rows):
        shapes = {"x": (rows, 256), "counts": (5000,)}
        batch = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
        return planned(transformation(problem=problem), inner_batch=batch, outer_batch=batch)

    found = plan(2048)
    assert "halve the batches" in found.advice[0].change
    assert found.device_bytes - plan(1024).device_bytes == pytest.approx(found.advice[0].saves, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [4, 12])
def test_batches_on_a_mesh_are_cut_to_what_it_divides(rows):
    """Four rows on four devices stay; of twelve, three on each, two remain on each."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("d",))
    batch = jax.ShapeDtypeStruct((rows, 256), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("d")))
    whole = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    variables = hg.BilevelParams([whole] * 2, [whole] * 2)
    found = hg.plan(transformation(), variables, inner_batch=batch, outer_batch=batch)
    assert (found.activations > 0) == (rows == 12)
    assert found.batches == 2 * rows // 4 * 256 * 4


def test_advice_on_solvers_is_for_estimators_that_solve():
    evolving = hg.bilevel(
        hg.evolution(PROBLEM, sigma=0.1, num_pairs=2, persistent=True, horizon=8),
        inner_optimizer=optax.sgd(0.1),
        outer_optimizer=optax.adam(1e-2),
        window=2,
    )
    shapes = hg.BilevelParams([SHAPE], [SHAPE])
    batch = jax.ShapeDtypeStruct((2, 8, 256), jnp.float32)
    last = jax.ShapeDtypeStruct((8, 256), jnp.float32)
    found = hg.plan(evolving, shapes, inner_batch=batch, outer_batch=last).advice
    assert any("pairs" in entry.change for entry in found)
    assert not any("solver" in entry.change for entry in found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "window"),
    [
        (lambda half: hg.evolution(PROBLEM, sigma=0.1, num_pairs=4 // half), lambda half: 4),
        (
            lambda half: hg.evolution(PROBLEM, sigma=0.1, num_pairs=4 // half, persistent=True, horizon=8),
            lambda half: 4,
        ),
        (lambda half: hg.unrolled(PROBLEM), lambda half: 16 // half),
    ],
    ids=["pairs", "persistent pairs", "window"],
)
def test_half_of_what_an_estimator_keeps_saves_what_is_predicted(make, window):
    def plan(half):
        steps = window(half)
        optimizers = {"inner_optimizer": optax.adam(1e-3, eps_root=1e-8), "outer_optimizer": optax.adam(1e-2)}
        batch = jax.ShapeDtypeStruct((steps, 8, 256), jnp.float32)
        last = jax.ShapeDtypeStruct((8, 256), jnp.float32)
        return planned(hg.bilevel(make(half), **optimizers, window=steps), inner_batch=batch, outer_batch=last)

    found = plan(1)
    entry = next(entry for entry in found.advice if "num_pairs" in entry.change)
    assert found.device_bytes - plan(2).device_bytes == pytest.approx(entry.saves, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver",
    [
        hg.solvers.cg(3, relative_damping=0.01, warm_start=True),
        hg.solvers.cg(3, warm_start=True, preconditioner=hg.solvers.preconditioners.nystrom(5)),
        hg.solvers.gmres(5, restart=5),
        hg.solvers.recycled_cg(4, 6),
    ],
    ids=["warm start", "preconditioner", "restart", "basis"],
)
def test_the_solver_that_is_advised_saves_what_is_predicted(solver):
    """The words of the advice are run; it is true to two vectors, and the new solver is not told to keep less."""
    found = planned(transformation(solver=solver))
    entry = next(entry for entry in found.advice if "solver" in entry.change)
    advised = entry.change.split(": ")[1].split(" has")[0]
    less = planned(transformation(solver=eval(advised)))
    saved = found.device_bytes - less.device_bytes
    assert 0 < 0.95 * entry.saves <= saved <= entry.saves + 2 * found.weights
    assert not any("solver" in other.change for other in less.advice)


@pytest.mark.slow
def test_shards_hold_their_part():
    """On a mesh of four devices each holds a quarter of variables, states and vectors."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("d",))
    placed = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("d")))
    batch = jax.ShapeDtypeStruct((8, 256), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    variables = hg.BilevelParams([placed] * 2, [placed] * 2)
    found, whole = hg.plan(transformation(), variables, inner_batch=batch, outer_batch=batch), planned()
    assert found.weights == whole.weights // 4
    assert found.outer_state == whole.outer_state // 4 + 3  # the count is on each
    assert found.device_bytes < 0.5 * whole.device_bytes


@pytest.mark.slow
@pytest.mark.parametrize("swapped", [False, True])
def test_states_of_leaves_of_one_shape_have_the_shardings_of_their_leaves(swapped):
    """One leaf is split and one is whole; hyperparameters are the other way round."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("d",))
    split, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("d"), PartitionSpec()))
    order = [split, whole, whole][:: -1 if swapped else 1]
    places = hg.BilevelParams(order, order[::-1])
    variables = jax.tree.map(lambda place: jax.device_put(jnp.zeros((256, 256)), place), places)
    batch = jax.device_put(jnp.zeros((8, 256)), whole)
    tx = transformation(solver=hg.solvers.recycled_cg(2, 2))
    found, state = hg.plan(tx, variables, inner_batch=batch, outer_batch=batch), tx.init(variables)
    parts = (state.inner, found.inner_state), (state.outer, found.outer_state), (state.estimator, found.estimator_state)
    for part, planned_bytes in parts:
        assert planned_bytes == sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(part))


def test_refusals():
    variables = hg.BilevelParams([SHAPE], [SHAPE])
    batch = jax.ShapeDtypeStruct((8, 256), jnp.float32)
    batches = {"inner_batch": batch, "outer_batch": batch}
    with pytest.raises(TypeError, match=r"expected a hg\.bilevel or an estimator"):
        hg.plan(optax.adam(1e-3), variables, **batches)
    with pytest.raises(TypeError, match=r"no inner_optimizer beside a hg\.bilevel"):
        hg.plan(transformation(), variables, **batches, inner_optimizer=optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"no extra_args beside an estimator; got value"):
        hg.plan(hg.implicit(PROBLEM), variables, **batches, extra_args={"value": 1.0})
    with pytest.raises(ValueError, match="device_bytes"):
        hg.plan(transformation(), variables, **batches, device_bytes=0)
    with pytest.raises(TypeError, match="BilevelParams"):
        hg.plan(transformation(), [SHAPE], **batches)
