"""Data flow in a traced program: dependence of outputs on inputs, equal values, operations, working precision.

    y = fn(x):   ∂y_j/∂x_i = 0 by construction  where no path of the jaxpr leads from x_i to y_j

A jaxpr lists the primitive operations of a function. It is made from shapes, so nothing is computed and everything here
works under ``jit``. A hypergradient that is zero by construction is found this way and refused instead of returned.
"""

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core

from hypergrad import tree
from hypergrad.types import PyTree

__all__ = ["constants", "dependence", "independent_leaves", "inner_jaxprs", "merge_equal", "open_jaxpr", "operations"]
__all__ += ["scan_parts", "unmoved", "working_precision"]

_ZERO_IF_ANY = {"mul", "dot_general"}
_ZERO_IF_FIRST = {"div", "dynamic_slice", "gather", "reduce_sum", "integer_pow"}
_ZERO_IF_ALL = {
    *("abs", "add", "add_any", "concatenate", "convert_element_type", "copy", "cumsum", "dynamic_update_slice", "max"),
    *("min", "neg", "optimization_barrier", "pad", "reduce_max", "reduce_min", "reduce_precision", "reshape", "rev"),
    *("select_and_scatter_add", "sign", "slice", "sqrt", "square", "squeeze", "stop_gradient", "sub", "transpose"),
    *("broadcast_in_dim", "expand_dims", "split"),
}


def independent_leaves(fn: Callable[[PyTree], PyTree], argument: PyTree) -> list[int]:
    """Return the indices of output leaves of ``fn(argument)`` that cannot depend on ``argument``."""
    depends = dependence(fn, argument)([True] * len(jax.tree.leaves(argument)))
    return [i for i, d in enumerate(depends) if not d]


def dependence(fn: Callable[[PyTree], PyTree], argument: PyTree) -> Callable[[Sequence[bool]], list[bool]]:
    """Return a map from marks on the leaves of ``argument`` to marks on the leaves of ``fn(argument)``.

    A leaf of the output is marked if it may depend on a marked leaf of the argument; a leaf without a mark is
    independent for certain. Marks are followed through the jaxpr: through loops until no more marks are added, through
    the branches of a condition (whose index marks all outputs), and into functions called with the same inputs and
    outputs (jit, remat, custom derivatives). Any other operation marks all its outputs if one input is marked.

    Args:
      fn: a function of one pytree.
      argument: the pytree, or ``jax.ShapeDtypeStruct`` leaves in its place.
    """
    jaxpr = jax.make_jaxpr(fn)(argument).jaxpr
    return lambda marked: _follow(jaxpr, marked)


def unmoved(
    begin: Callable[[PyTree], PyTree], step: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]], start: PyTree
) -> list[bool]:
    """Return which leaves of the outputs no input can change, in any number of steps from ``begin(start)``.

    ``carry, output = step(carry, input)`` with inputs like ``start``. An output is unmoved if it is independent of all
    inputs, or zero by construction. Zeros are followed from constants: a product with a zero is zero, and so is a sum
    or a choice of zeros, also in loops, in the branches of a condition and in functions that are called, as long as all
    values are finite. Not every zero is found. A zero of the carry that a step passes on as it is counts as unknown:
    somebody may set it between two steps, as a rate that ``optax.inject_hyperparams`` keeps there.
    """
    first: Any = jax.make_jaxpr(begin)(start).jaxpr
    carry = jax.eval_shape(begin, start)
    body: Any = jax.make_jaxpr(step)(carry, start).jaxpr
    size, inputs = len(jax.tree.leaves(carry)), len(jax.tree.leaves(start))
    passed = [a is b for a, b in zip(body.outvars[:size], body.invars[:size], strict=True)]
    zeros = _follow_zeros(first, [False] * inputs)
    zeros = [zero and not same for zero, same in zip(zeros, passed, strict=True)]
    zero_outputs = _loop(_follow_zeros, all, body, [], zeros, [False] * inputs)[size:]
    moved = _loop(_follow, any, body, [], [False] * size, [True] * inputs)[size:]
    return [zero or not mark for mark, zero in zip(moved, zero_outputs, strict=True)]


def merge_equal(
    closed: jex_core.ClosedJaxpr, inputs: Sequence[Hashable]
) -> tuple[jex_core.ClosedJaxpr, list[Hashable]]:
    """Return the jaxpr with each value computed once, where inputs with equal labels have equal values.

    Two operations compute the same if their primitives, parameters and inputs are the same. Those with side effects
    are all kept.

    Args:
      closed: the jaxpr.
      inputs: one label per input.

    Returns:
      The jaxpr, and one label per output: outputs with equal labels have equal values.
    """
    jaxpr, firsts, same = closed.jaxpr, dict[Hashable, list[Any]](), dict[Any, Any]()
    for var, label in zip(jaxpr.invars, inputs, strict=True):
        same[var] = firsts.setdefault(("input", label), [var])[0]
    kept = []
    for eqn in jaxpr.eqns:
        eqn = eqn.replace(invars=[v if isinstance(v, jex_core.Literal) else same.get(v, v) for v in eqn.invars])
        parameters = tuple((name, _identity(value)) for name, value in sorted(eqn.params.items()))
        key = eqn.primitive, parameters, tuple(map(_identity, eqn.invars)), id(eqn) if eqn.effects else None
        outputs = firsts.setdefault(key, eqn.outvars)
        if outputs is eqn.outvars:
            eqn, outputs = _merge_inside(eqn)
            kept.append(eqn)
        same.update(zip(eqn.outvars, (same.get(v, v) for v in outputs), strict=True))
    outvars = [v if isinstance(v, jex_core.Literal) else same.get(v, v) for v in jaxpr.outvars]
    merged = jex_core.ClosedJaxpr(jaxpr.replace(eqns=kept, outvars=outvars), closed.consts)
    return merged, [_identity(v) for v in outvars]


def operations(jaxpr: Any) -> set[str]:
    """Return the names of all primitives in a jaxpr and in the jaxprs inside it."""
    return {eqn.primitive.name for eqn in _equations(jaxpr.eqns)}


def working_precision(fn: Callable[[PyTree], PyTree], argument: PyTree) -> Any:
    """Return the dtype of lowest precision that ``fn`` casts a wider floating-point value down to.

    This dtype limits the precision of the result. It is the widest dtype of the argument if there is no such cast.
    Equations of the outermost jaxpr that the result does not depend on are left out.
    """
    found = tree.wider(*(jnp.result_type(leaf) for leaf in jax.tree.leaves(argument)))
    jaxpr: Any = jax.make_jaxpr(fn)(argument).jaxpr
    needed, reached = {v for v in jaxpr.outvars if not isinstance(v, jex_core.Literal)}, []
    for eqn in reversed(jaxpr.eqns):
        if any(v in needed for v in eqn.outvars):
            needed.update(v for v in eqn.invars if not isinstance(v, jex_core.Literal))
            reached.append(eqn)
    for eqn in _equations(reached):
        if eqn.primitive.name == "convert_element_type":
            before, after = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
            floating = all(jnp.issubdtype(dtype, jnp.floating) for dtype in (before, after))
            if floating and before.itemsize > after.itemsize and jnp.finfo(after).eps > jnp.finfo(found).eps:
                found = after
    return found


def _equations(equations: Iterable[Any]) -> Iterator[Any]:
    """Yield equations, and those of the jaxprs inside them."""
    for eqn in equations:
        yield eqn
        for inner in inner_jaxprs(eqn):
            yield from _equations(inner.eqns)


def constants(closed: Any) -> list[Any]:
    """Return the arrays that a closed jaxpr holds, and those of the jaxprs inside it."""
    inside = [getattr(item, "consts", ()) for eqn in _equations(closed.jaxpr.eqns) for item in _parameters(eqn)]
    return [*closed.consts, *itertools.chain.from_iterable(inside)]


def inner_jaxprs(eqn: Any) -> list[Any]:
    """Return the jaxprs among the parameters of an equation, and in lists among them (the branches of a cond)."""
    inner = map(open_jaxpr, _parameters(eqn))
    return [jaxpr for jaxpr in inner if hasattr(jaxpr, "eqns")]


def _parameters(eqn: Any) -> list[Any]:
    lists = [p if isinstance(p, list | tuple) else [p] for p in eqn.params.values()]
    return [item for items in lists for item in items]


def _follow(jaxpr: Any, marked: Sequence[bool]) -> list[bool]:
    known = {v for v, m in zip(jaxpr.invars, marked, strict=True) if m}

    def is_marked(v: Any) -> bool:
        return not isinstance(v, jex_core.Literal) and v in known

    for eqn in jaxpr.eqns:
        inputs = [is_marked(v) for v in eqn.invars]
        if any(inputs):
            references = [v for v in eqn.invars if hasattr(v.aval, "inner_aval")]  # of mutable arrays: may be written
            outputs = [True] * len(eqn.outvars) if references else _outputs(eqn, inputs)
            known.update(references, (v for v, m in zip(eqn.outvars, outputs, strict=True) if m))
    return [is_marked(v) for v in jaxpr.outvars]


def _outputs(eqn: Any, inputs: list[bool]) -> list[bool]:
    """Return the marks of an equation's outputs, given those of its inputs."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return _loop(_follow, any, *scan_parts(eqn, inputs))
    if name == "while":
        of_test, constants = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        carry = _loop(_follow, any, open_jaxpr(params["body_jaxpr"]), inputs[of_test:constants], inputs[constants:], [])
        (goes_on,) = _follow(open_jaxpr(params["cond_jaxpr"]), inputs[:of_test] + carry)
        return [goes_on or mark for mark in carry]
    if name == "cond":
        branches = [_follow(open_jaxpr(branch), inputs[1:]) for branch in params["branches"]]
        return [inputs[0] or any(marks) for marks in zip(*branches, strict=True)]
    inner = inner_jaxprs(eqn)
    if [(len(jaxpr.invars), len(jaxpr.outvars)) for jaxpr in inner] == [(len(eqn.invars), len(eqn.outvars))]:
        return _follow(inner[0], inputs)
    return [True] * len(eqn.outvars)


def _follow_zeros(jaxpr: Any, zeros: Sequence[bool], numbers: Sequence[Any] = ()) -> list[bool]:
    """Return which outputs are zero, given which inputs are, and the inputs that are known numbers (None elsewhere)."""
    known = {v for v, zero in zip(jaxpr.invars, zeros, strict=True) if zero}
    values = {v: x for v, x in zip(jaxpr.invars, numbers, strict=False) if x is not None}

    def number(v: Any) -> Any:
        if isinstance(v, jex_core.Literal):
            return v.val if jnp.ndim(v.val) == 0 else None
        return values.get(v)

    def is_zero(v: Any) -> bool:
        return bool(number(v) == 0) if isinstance(v, jex_core.Literal) else v in known

    for eqn in jaxpr.eqns:
        given = [number(v) for v in eqn.invars]
        found = _zero_outputs(eqn, [is_zero(v) for v in eqn.invars], given)
        known.update(v for v, zero in zip(eqn.outvars, found, strict=True) if zero)
        if eqn.primitive.name in {"convert_element_type", "broadcast_in_dim"} and given[0] is not None:
            values[eqn.outvars[0]] = given[0]
    return [is_zero(v) for v in jaxpr.outvars]


def _zero_outputs(eqn: Any, zeros: list[bool], numbers: list[Any]) -> list[bool]:
    """Return which outputs of an equation are zero, given which inputs are, and which are known numbers."""
    name, params, inner = eqn.primitive.name, eqn.params, inner_jaxprs(eqn)
    if name in {"scan", "while"}:
        if name == "scan":
            body, constants, carry, slices = scan_parts(eqn, zeros)
        else:
            of_test, start = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
            body, constants, carry, slices = open_jaxpr(params["body_jaxpr"]), zeros[of_test:start], zeros[start:], []
        return _loop(_follow_zeros, all, body, constants, carry, slices)
    if name == "cond":
        branches = [_follow_zeros(open_jaxpr(branch), zeros[1:]) for branch in params["branches"]]
        return [all(found) for found in zip(*branches, strict=True)]
    if [(len(jaxpr.invars), len(jaxpr.outvars)) for jaxpr in inner] == [(len(eqn.invars), len(eqn.outvars))]:
        return _follow_zeros(inner[0], zeros, numbers)
    if name in {"max", "min"} and any(zeros):  # clipping keeps a zero between bounds on both sides of it
        bounds = [x for x, zero in zip(numbers, zeros, strict=True) if not zero]
        return [all(x is not None and (x <= 0 if name == "max" else x >= 0) for x in bounds)]
    every = (
        (name in _ZERO_IF_ANY and any(zeros))
        or (name in _ZERO_IF_FIRST and zeros[0] and params.get("y", 1) > 0)
        or (name in _ZERO_IF_ALL and all(zeros))
        or (name == "select_n" and all(zeros[1:]))
    )
    return [every] * len(eqn.outvars)


def scan_parts(eqn: Any, marks: list[Any]) -> tuple[Any, list[Any], list[Any], list[Any]]:
    """Return a scan's body, and its marks, or inputs, that are constants, carry and slices.

    Slices and what it stacks are told by rank: the parameters of a scan differ between versions of JAX.
    """
    body = open_jaxpr(eqn.params["jaxpr"])
    start = len(marks) - _stacked(eqn.invars, body.invars)
    constants = start - (len(eqn.outvars) - _stacked(eqn.outvars, body.outvars))
    return body, marks[:constants], marks[constants:start], marks[start:]


def open_jaxpr(closed_or_open: Any) -> Any:
    """Return the jaxpr of a closed one; what has none as it is."""
    return getattr(closed_or_open, "jaxpr", closed_or_open)


def _stacked(variables: Sequence[Any], of_body: Sequence[Any]) -> int:
    """Return how many variables have a leading axis that those of the loop's body lack."""
    return sum(len(v.aval.shape) > len(b.aval.shape) for v, b in zip(variables, of_body, strict=True))


def _loop(
    follow: Callable[[Any, Sequence[bool]], list[bool]],
    join: Callable[[Iterable[bool]], bool],
    body: Any,
    constants: list[bool],
    carry: list[bool],
    slices: list[bool],
) -> list[bool]:
    """Return the marks of a loop's carry and of what it stacks, after any number of rounds, none included.

    ``follow`` gives the marks of one round; ``join`` is ``any`` for marks that rounds add, ``all`` for those they take.
    """
    while True:
        outputs = follow(body, [*constants, *carry, *slices])
        joined = [join(pair) for pair in zip(carry, outputs, strict=False)]
        if joined == carry:
            return joined + outputs[len(carry) :]
        carry = joined


def _merge_inside(eqn: Any) -> tuple[Any, list[Any]]:
    """Return a call or condition merged inside, and for each of its outputs the first output that is equal to it."""
    if eqn.primitive.name not in {"jit", "pjit", "cond"} or len(eqn.outvars) < 2:
        return eqn, eqn.outvars
    name, skipped = ("branches", 1) if eqn.primitive.name == "cond" else ("jaxpr", 0)
    branches = eqn.params[name] if name == "branches" else [eqn.params[name]]
    labels = [_identity(v) for v in eqn.invars[skipped:]]
    merged, outputs = zip(*(merge_equal(branch, labels) for branch in branches), strict=True)
    firsts = dict[Any, Any]()
    equal = [firsts.setdefault(alike, v) for alike, v in zip(zip(*outputs, strict=True), eqn.outvars, strict=True)]
    return eqn.replace(params={**eqn.params, name: merged if name == "branches" else merged[0]}), equal


def _identity(value: Any) -> Hashable:
    """Return what is equal for two parameters or inputs of equations if, and only if, they are known to be the same."""
    if isinstance(value, jex_core.Literal):
        return str(value.val), str(value.aval)
    if isinstance(value, list | tuple):
        return tuple(map(_identity, value))
    if hasattr(open_jaxpr(value), "eqns"):
        return str(value), tuple(map(id, getattr(value, "consts", ())))
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value
