"""bfloat16 weights: hyperparameters, solver vectors and dot products stay float32, and the answer stays right."""

import jax
import jax.numpy as jnp
import optax
import pytest

import hypergrad as hg
from tests.problems import network, relative_error


@pytest.mark.slow
@pytest.mark.parametrize("window", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_dtypes_survive_joint_training(window):
    case = network(dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(case.variables.params)} == {jnp.dtype(jnp.bfloat16)}
    tx = hg.bilevel(
        hg.implicit(case.problem, hg.solvers.neumann(5)),
        inner_optimizer=optax.sgd(0.1),
        outer_optimizer=optax.adam(0.1),
        window=window,
    )
    batch = case.inner_batch if window == 1 else jax.tree.map(lambda x: jnp.stack([x] * window), case.inner_batch)
    state = tx.init(case.variables)
    updates, new_state = jax.jit(tx.update)(
        None, state, case.variables, inner_batch=batch, outer_batch=case.outer_batch
    )
    after = optax.apply_updates(case.variables, updates)
    dtypes = lambda tree: jax.tree.map(lambda x: x.dtype, tree)  # noqa: E731
    assert dtypes(after) == dtypes(case.variables)
    assert dtypes(new_state) == dtypes(state)
    assert {x.dtype for x in jax.tree.leaves(new_state.estimator)} == {jnp.dtype(jnp.float32)}
    assert {x.dtype for x in jax.tree.leaves(new_state.outer[0].mu)} == {jnp.dtype(jnp.float32)}
    assert not bool(new_state.info.skipped)


@pytest.mark.slow
def test_low_precision_hypergradient_is_near_the_float32_one():
    """The same weights, rounded to bfloat16: the hypergradient moves by a few of bfloat16's 2⁻⁸ roundings."""
    low, high = network(dtype=jnp.bfloat16), network(dtype=jnp.float32)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), low.variables.params)
    gradients = []
    for case, weights in ((low, low.variables.params), (high, params)):
        fn = hg.value_and_hypergrad(hg.implicit(case.problem, hg.solvers.neumann(20, 0.3)))
        batches = (high.inner_batch, high.outer_batch)
        (_, grad), info = jax.jit(fn)(weights, case.variables.hyperparams, *batches, key=None)
        assert float(info.solver.residual) < 1.0
        gradients.append(grad)
    assert relative_error(gradients[0], gradients[1]) < 0.05


def test_low_precision_hyperparameters_keep_their_dtype():
    case = network()
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), case.variables.hyperparams)
    fn = hg.hypergrad(hg.implicit(case.problem, hg.solvers.neumann(3, 0.1)))
    grad = jax.jit(fn)(case.variables.params, low, case.inner_batch, case.outer_batch, key=None)
    assert {x.dtype for x in jax.tree.leaves(grad)} == {jnp.dtype(jnp.bfloat16)}
