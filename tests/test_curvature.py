"""Hessian and mixed products against dense second derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hypergrad import curvature, tree
from tests.problems import network, relative_error


def dense_blocks(fn, params, hyper):
    """Return the Hessian and the mixed block as matrices, with functions to and from vectors."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    flat_h, unravel_h = jax.flatten_util.ravel_pytree(hyper)
    in_vectors = lambda w, h: fn(unravel(w), unravel_h(h))  # noqa: E731
    hessian = jax.jit(jax.hessian(in_vectors))(flat, flat_h)
    mixed = jax.jit(jax.jacobian(jax.grad(in_vectors), argnums=1))(flat, flat_h)
    return hessian, mixed, unravel, unravel_h


def test_products_against_dense_blocks(x64):
    case = network(dtype=jnp.float64)
    fn = lambda w, h: case.problem.inner_loss(w, h, case.inner_batch, None)  # noqa: E731
    hessian, mixed, unravel, unravel_h = dense_blocks(fn, *case.variables)
    v = jnp.asarray(np.random.default_rng(0).normal(size=hessian.shape[0]))
    product = curvature.hvp(lambda w: fn(w, case.variables.hyperparams), case.variables.params)
    assert relative_error(jax.jit(product)(unravel(v)), unravel(hessian @ v)) < 1e-6  # cross-entropy in float32
    mixed_product = curvature.mixed_vjp(fn, *case.variables)
    assert relative_error(jax.jit(mixed_product)(unravel(v)), unravel_h(mixed.T @ v)) < 1e-6


@pytest.mark.parametrize(
    "wrap",
    [
        lambda f: f,
        jax.jit,
        jax.checkpoint,
        jax.vmap,
        lambda f: lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=1)[0],
        lambda f: lambda x: jax.lax.cond(x.sum() > 0, f, lambda y: y, x),
    ],
    ids=["plain", "jit", "checkpoint", "vmap", "scan", "cond"],
)
def test_products_pass_a_model_with_a_custom_vjp(wrap, x64):
    """Forward mode cannot: the products of such a model take another route to the same number."""

    @jax.custom_vjp
    def cubed(x):
        return x**3

    cubed.defvjp(lambda x: (x**3, x), lambda x, g: (3 * x**2 * g,))
    w, h = jnp.array([1.0, 2.0]), jnp.array(0.5)
    product = curvature.hvp(lambda w: h * jnp.sum(wrap(cubed)(w)), w)
    np.testing.assert_allclose(product(jnp.ones(2)), 3 * w)
    mixed = curvature.mixed_vjp(lambda w, h: h * jnp.sum(wrap(cubed)(w)), w, h)
    np.testing.assert_allclose(mixed(jnp.ones(2)), 3 * jnp.sum(w**2))
    turn = jnp.array([[1.0, 2.0], [0.0, 1.0]])
    push = curvature.residual_jvp(lambda w: turn @ wrap(cubed)(w), w)
    np.testing.assert_allclose(push(jnp.array([1.0, -1.0])), turn @ (3 * w**2 * jnp.array([1.0, -1.0])))


def test_products_of_low_precision_weights_are_float32():
    w = {"a": jnp.array([1.0, 2.0], jnp.bfloat16)}
    product = curvature.hvp(lambda w: jnp.sum(w["a"].astype(jnp.float32) ** 3), w)
    out = product({"a": jnp.ones(2, jnp.float32)})
    assert out["a"].dtype == jnp.float32
    np.testing.assert_allclose(out["a"], [6.0, 12.0])


def test_a_mixed_product_of_a_penalty_does_not_run_the_network():
    """Only elementwise work on the weights is left: no matrix product in the compiled program."""
    case = network()
    fn = lambda w, h: case.problem.inner_loss(w, h, case.inner_batch, None)  # noqa: E731
    run = jax.jit(lambda variables, q: curvature.mixed_vjp(fn, *variables)(q))
    text = run.lower(case.variables, case.variables.params).compile().as_text()
    assert " dot(" not in text
    assert "multiply" in text


def test_tree_operations(hard_mode):
    values = {"a": jnp.array([3.0, 4.0], jnp.bfloat16), "b": jnp.zeros((), jnp.float32)}
    wide = tree.promote(values)
    assert {x.dtype for x in jax.tree.leaves(wide)} == {jnp.dtype(jnp.float32)}
    assert float(tree.norm(wide)) == 5.0
    assert float(tree.max_abs(wide)) == 4.0
    assert float(tree.vdot({}, {})) == 0.0
    assert bool(tree.all_finite({}))
    assert not bool(tree.all_finite({"a": jnp.array([1.0, jnp.nan])}))
    assert tree.leaf_names({"a": [1, 2]}) == ["['a'][0]", "['a'][1]"]
    assert tree.wider(jnp.bfloat16, jnp.float16) == jnp.float32
    assert not tree.strip_weak_types({"a": jnp.asarray(1.0)})["a"].weak_type
    shared = jnp.ones(2)
    fresh = tree.unalias({"a": shared, "b": shared}, [])
    assert fresh["a"].unsafe_buffer_pointer() != fresh["b"].unsafe_buffer_pointer()
    assert optax.tree.norm(optax.tree.sub(fresh["a"], fresh["b"])) == 0.0
