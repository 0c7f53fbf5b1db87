"""A run that is saved, restored and resumed equals one that never stopped, to the last bit."""

import pathlib
import signal
import subprocess
import sys

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import hypergrad as hg
from tests.catalogue import ESTIMATORS, SOLVERS
from tests.problems import batch_norm, ridge


@pytest.fixture(scope="module")
def training():
    """Return a stateful problem's transformation, variables and a compiled step."""
    problem, variables, stats, batch = batch_norm()
    tx = hg.bilevel(
        hg.implicit(problem, hg.solvers.neumann(5)),
        inner_optimizer=optax.adam(1e-2),
        outer_optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
        every=2,
        key=jax.random.key(7),
        model_state=stats,
    )

    @jax.jit
    def step(variables, state):
        updates, state = tx.update(None, state, variables, inner_batch=batch, outer_batch=batch)
        return optax.apply_updates(variables, updates), state

    return tx, variables, step


def through_msgpack(target, tree, _):
    """Save and restore with Flax."""
    return flax.serialization.from_bytes(target, flax.serialization.to_bytes(tree))


def through_orbax(target, tree, path):
    """Save and restore with Orbax."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "state", jax.tree.map(ocp.utils.to_shape_dtype_struct, target))


@pytest.mark.slow
@pytest.mark.parametrize("through", [pytest.param(through_msgpack, marks=pytest.mark.slow), through_orbax])
def test_resume_is_bit_identical(through, training, tmp_path):
    tx, variables, step = training
    state = tx.init(variables)
    for _ in range(3):
        variables, state = step(variables, state)
    fresh = tx.init(training[1])
    restored = through((training[1], fresh), (variables, state), tmp_path)
    assert jax.tree.structure(restored) == jax.tree.structure((variables, state))
    there, there_state = jax.tree.map(jnp.asarray, restored)
    for _ in range(3):
        variables, state = step(variables, state)
        there, there_state = step(there, there_state)
    for mine, theirs in zip(jax.tree.leaves((variables, state)), jax.tree.leaves((there, there_state)), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert int(there_state.step) == 6
    assert int(there_state.info.step) == 6


CARRIED = "unrolled_persistent", "evolution", "evolution_persistent", "partition"
SETTINGS = {
    "default": hg.implicit,
    **{row.name: lambda problem, row=row: hg.implicit(problem, row.make()) for row in SOLVERS if row.keeps_state},
    "cg_jacobi": lambda problem: hg.implicit(
        problem, hg.solvers.cg(3, preconditioner=hg.preconditioners.jacobi()), diagonal=lambda w, decay: decay
    ),
    "cg_nystrom": lambda problem: hg.implicit(
        problem, hg.solvers.cg(3, preconditioner=hg.preconditioners.nystrom(2, every=4))
    ),
    "neumann_nystrom": lambda problem: hg.implicit(
        problem, hg.solvers.neumann(5, preconditioner=hg.preconditioners.nystrom(2, every=4))
    ),
    **{row.name: row.make for row in ESTIMATORS if row.name in CARRIED},
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "default")) for n in SETTINGS])
def test_an_estimator_goes_on_where_its_state_was_saved(name):
    """Bitwise; a fresh state in place of the estimator's own changes the result, unless it keeps none."""
    example = ridge(dtype=jnp.float32)
    estimator = SETTINGS[name](example.problem)
    tx = hg.bilevel(estimator, inner_optimizer=optax.sgd(0.05), outer_optimizer=optax.adam(1e-2), window=1, key=3)

    @jax.jit
    def step(variables, state):
        batches = {"inner_batch": example.inner_batch, "outer_batch": example.outer_batch}
        updates, state = tx.update(None, state, variables, **batches)
        return optax.apply_updates(variables, updates), state

    def steps(variables, state):
        for _ in range(3):
            variables, state = step(variables, state)
        return variables, state

    fresh = example.variables, tx.init(example.variables)
    middle = steps(*fresh)
    wanted = steps(*middle)
    restored = jax.tree.map(jnp.asarray, through_msgpack(fresh, middle, None))
    found = steps(*restored)
    for mine, theirs in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    forgetful = steps(restored[0], restored[1]._replace(estimator=fresh[1].estimator))
    kept = jax.tree.leaves(forgetful[1].estimator)
    assert any((a != b).any() for a, b in zip(kept, jax.tree.leaves(wanted[1].estimator), strict=True)) == bool(kept)


@pytest.mark.slow
@pytest.mark.parametrize("row", ["implicit", *CARRIED])
def test_a_killed_run_goes_on_where_it_was_saved(row, tmp_path):
    """SIGKILL while a step is saved; the second process ends with the bits of a run that was never stopped."""
    command, whole = (
        [sys.executable, "-m", "tests.killed_run", str(tmp_path / name), row] for name in ("killed", "whole")
    )
    options = {"cwd": pathlib.Path(__file__).parents[1], "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **options) as first:
        for line in first.stdout:
            if int(line) == 7:
                first.kill()
                break
    assert first.wait() == -signal.SIGKILL
    *steps, result = subprocess.run(command, check=True, **options).stdout.split()
    assert 1 < int(steps[0]) < 12
    *all_steps, wanted = subprocess.run(whole, check=True, **options).stdout.split()
    assert steps == all_steps[-len(steps) :]
    assert result == wanted


def test_the_state_is_arrays_only(training):
    tx, variables, _ = training
    leaves = jax.tree.leaves(tx.init(variables))
    assert all(isinstance(leaf, jax.Array) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves)


LAYOUT = """
.step int32 ()
.inner[0].count int32 ()
.inner[0].mu['w'] float32 (3,)
.inner[0].nu['w'] float32 (3,)
.outer[0].count int32 ()
.outer[0].mu float32 ()
.outer[0].nu float32 ()
.estimator.solution['w'] float32 (3,)
.key uint32 (2,)
.model_state['mean'] float32 (3,)
.info.step int32 ()
.info.outer_loss float32 ()
.info.inner_loss float32 ()
.info.hypergrad_norm float32 ()
.info.skip_reason int32 ()
.info.num_skipped int32 ()
.info.method.num_products int32 ()
.info.method.residual float32 ()
.info.method.undamped_residual float32 ()
.info.method.damping float32 ()
.info.method.status int32 ()
"""


def test_the_layout_of_the_state():
    """Checkpoints rely on it: a change here is a change of the format."""

    def loss(w, h, batch, key, model_state):
        return jnp.sum(h * w["w"] ** 2), model_state

    tx = hg.bilevel(
        hg.implicit(hg.BilevelProblem(loss, loss, stateful=True), hg.solvers.cg(3, warm_start=True)),
        inner_optimizer=optax.adam(0.1),
        outer_optimizer=optax.adam(0.1),
        model_state={"mean": jnp.zeros(3)},
    )
    state = tx.init(hg.BilevelParams({"w": jnp.ones(3)}, jnp.zeros(())))
    paths, _ = jax.tree.flatten_with_path(state)
    found = [f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}" for path, leaf in paths]
    assert found == LAYOUT.strip().splitlines()
