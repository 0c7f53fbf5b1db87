"""Dependence through loops, conditions and references; equal values merged; working precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core as jex_core

from hypergrad import dataflow


@pytest.mark.parametrize(
    ("fn", "want"),
    [
        (lambda x: {"a": x, "b": 1.0}, [1]),
        (lambda x: {"a": jnp.zeros(3), "b": x + 1}, [0]),
        (lambda x: {"a": jax.jit(lambda p, q: (p, q))(x, 1.0)[1], "b": 0.0}, [0, 1]),
        (lambda x: {"a": lax.fori_loop(0, 3, lambda _, c: c * x, 1.0), "b": x}, []),
        (lambda x: {"a": jax.checkpoint(jnp.sin)(x), "b": jax.nn.relu(x)}, []),
        (lambda x: {"a": lax.cond(x > 0, lambda: 1.0, lambda: 2.0), "b": x}, []),
    ],
    ids=["constant", "other", "through jit", "loop", "custom", "cond"],
)
def test_independent_leaves(fn, want):
    assert dataflow.independent_leaves(fn, jnp.array(0.5)) == want


def shifted(x):
    """Each round moves every value one place on: the third place depends on the first after two rounds."""
    body = lambda c, t: ((c[0], c[0] * t, c[1]), c[2])  # noqa: E731
    reached, stacked = lax.scan(body, (x[0], x[1], x[2].sum()), jnp.arange(4.0))
    return *reached, stacked


def apart(x):
    """Two values in one loop that have nothing to do with each other."""
    body = lambda c, t: ((c[0] * t, c[1] + x[1]), (c[0], t))  # noqa: E731
    return lax.scan(body, (x[0], 1.0), x[2])


def counted(x):
    """A while loop whose length depends on nothing, and one whose length depends on the first value."""
    fixed = lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * x[1]), (0, 1.0))[1]
    free = lax.while_loop(lambda c: c[0] < x[0], lambda c: (c[0] + 1, c[1] * x[1]), (0.0, 1.0))[1]
    return fixed, free


def chosen(x):
    """A condition on nothing marked, of which one branch swaps the values, and a condition on the first value."""
    one = lax.cond(jnp.arange(3).sum() > 0, lambda p, q: (p, 1.0), lambda p, q: (q, 1.0), x[0], x[1])
    return *one, lax.switch(x[0].astype(int), [lambda y: y, lambda y: y + 1.0, lambda y: 0.0], x[1])


def written(x):
    """A mutable array that gets the first value."""
    place = jax.new_ref(jnp.zeros(2))
    place[0] = x[0]
    return place[...], x[1] * 2.0


def written_in_a_loop(x):
    """A mutable array that each round reads before it is written."""
    place = jax.new_ref(jnp.zeros(()))

    def body(carry, _):
        found = place[...]
        place[...] = x[0] + 0.0
        return carry, found

    return lax.scan(body, x[1], None, length=2)


THREE = (jnp.array(0.5), jnp.array(1.5), jnp.arange(3.0))


@pytest.mark.parametrize(
    ("fn", "reached"),
    [
        (shifted, ["a", "a b", "a b c", "a b c"]),
        (apart, ["a c", "b", "a c", "c"]),
        (counted, ["b", "a b"]),
        (chosen, ["a b", "", "a b"]),
        (written, ["a", "b"]),
        (written_in_a_loop, ["b", "a b"]),
    ],
    ids=["shifted", "apart", "while", "cond", "reference", "reference in a loop"],
)
def test_marks_are_followed_through_control_flow(fn, reached):
    """The inputs a, b and c that each output may depend on."""
    depends = dataflow.dependence(fn, THREE)
    marks = [depends([i == j for j in range(3)]) for i in range(3)]
    found = [
        " ".join(name for name, mark in zip("abc", of_output, strict=True) if mark)
        for of_output in zip(*marks, strict=True)
    ]
    assert found == reached


@pytest.mark.parametrize("fn", [shifted, apart, counted, chosen, written, written_in_a_loop])
def test_a_leaf_without_a_mark_has_derivative_zero(fn):
    """Differences, as loops of unknown length have no reverse mode."""
    depends, base = dataflow.dependence(fn, THREE), jax.tree.leaves(fn(THREE))
    for i in range(3):
        moved = [x + 0.7 if i == j else x for j, x in enumerate(THREE)]
        changed = [bool(jnp.any(a != b)) for a, b in zip(base, jax.tree.leaves(fn(moved)), strict=True)]
        marked = depends([i == j for j in range(3)])
        assert all(mark or not change for mark, change in zip(marked, changed, strict=True))


def test_dependence_needs_shapes_only():
    like = jax.ShapeDtypeStruct((1000, 1000), jnp.float32)
    assert dataflow.independent_leaves(lambda x: (x @ x, jnp.zeros(2)), like) == [1]


def test_operations_are_found_in_branches_and_calls():
    fn = lambda x: lax.cond(x > 0, jax.jit(lambda y: jnp.sin(y)), lambda y: lax.stop_gradient(y), x)  # noqa: E731
    assert {"sin", "stop_gradient", "cond"} <= dataflow.operations(jax.make_jaxpr(fn)(0.5).jaxpr)


def repeated(a, b, c):
    """The same operations on three values, of which two may be equal, and something of them all."""
    each = [jnp.where(x > 0, jnp.sqrt(x) * 2.0, lax.fori_loop(0, 3, lambda _, y: y * 0.5, x)) for x in (a, b, c)]
    return *each, each[0] + each[1] + each[2]


def test_equal_values_are_computed_once():
    closed = jax.make_jaxpr(repeated)(1.0, 1.0, 3.0)
    merged, labels = dataflow.merge_equal(closed, ["same", "same", "other"])
    assert labels[0] == labels[1]
    assert len({*labels}) == 3
    assert len(merged.jaxpr.eqns) == pytest.approx(len(closed.jaxpr.eqns) * 2 / 3, abs=2)
    np.testing.assert_array_equal(jex_core.jaxpr_as_fun(merged)(1.0, 1.0, 3.0), repeated(1.0, 1.0, 3.0))
    apart, labels = dataflow.merge_equal(closed, [0, 1, 2])
    assert len(apart.jaxpr.eqns) == len(closed.jaxpr.eqns)
    assert len({*labels}) == 4


@pytest.mark.parametrize(
    "wrap",
    [jax.jit, lambda f: lambda *args: lax.cond(args[0] > 2.0, f, lambda *args: (*args, 0.0), *args)],
    ids=["jit", "cond"],
)
def test_equal_values_are_found_inside_calls_and_conditions(wrap):
    inside = jax.make_jaxpr(wrap(repeated))(1.0, 1.0, 3.0)
    for value in (1.0, 3.0):
        merged, labels = dataflow.merge_equal(inside, ["same", "same", "other"])
        assert labels[0] == labels[1]
        assert len({*labels}) == 3
        got = jex_core.jaxpr_as_fun(merged)(value, value, 2.0)
        np.testing.assert_array_equal(got, wrap(repeated)(value, value, 2.0))
    count = lambda closed: sum(1 for _ in dataflow._equations(closed.jaxpr.eqns))  # noqa: E731
    assert count(merged) < 0.8 * count(inside)


def test_what_differs_is_not_merged():
    def fn(x, y):
        other = jnp.array([1.0, 2.0]), jnp.array([1.0, 3.0])
        calls = jax.jit(lambda x: x * 2.0)(x), jax.jit(lambda x: x * 3.0)(y)
        branches = lax.cond(x.sum() < 0, lambda x, y: (4 * x, -y), lambda x, y: (4 * x, 4 * x), x, y)
        others = x[0] * other[0], y[0] * other[1], -x, y.astype(jnp.bfloat16), y
        return x + 1.0, y + 2.0, x.sum(0), y.sum(1), *others, *calls, *branches

    closed = jax.make_jaxpr(fn)(jnp.ones((2, 2)), jnp.ones((2, 2)))
    merged, labels = dataflow.merge_equal(closed, [0, 0])
    assert len({*labels}) == 13
    x = jnp.array([[1.0, -2.0], [3.0, -4.0]])
    for got, want in zip(jex_core.jaxpr_as_fun(merged)(x, x), fn(x, x), strict=True):
        np.testing.assert_array_equal(got, want)


def test_side_effects_are_kept(capfd):
    fn = lambda x, y: (jax.debug.print("seen {}", x), jax.debug.print("seen {}", y), x)[2]  # noqa: E731
    merged, _ = dataflow.merge_equal(jax.make_jaxpr(fn)(1.0, 1.0), [0, 0])
    jex_core.jaxpr_as_fun(merged)(1.0, 1.0)
    jax.effects_barrier()
    assert capfd.readouterr().out.count("seen") == 2


def test_working_precision():
    low = lambda x: jnp.sum(x.astype(jnp.bfloat16) ** 2).astype(jnp.float32)  # noqa: E731
    assert dataflow.working_precision(jnp.sum, jnp.ones(2)) == jnp.float32
    assert dataflow.working_precision(low, jnp.ones(2)) == jnp.bfloat16
    assert dataflow.working_precision(lambda x: (x.astype(jnp.bfloat16), x.sum())[1], jnp.ones(2)) == jnp.float32
