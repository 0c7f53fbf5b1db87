"""What depends on what in a traced program: dependence of outputs on inputs, operations, working precision.

A hypergradient that is zero by construction is found by following data through a jaxpr, at trace time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core

from hypergrad import tree
from hypergrad.types import PyTree


def independent_leaves(fn: Callable[[PyTree], PyTree], argument: PyTree) -> list[int]:
    """Return the indices of output leaves of ``fn(argument)`` that cannot depend on ``argument``."""
    depends = dependence(fn, argument)([True] * len(jax.tree.leaves(argument)))
    return [i for i, d in enumerate(depends) if not d]


def dependence(fn: Callable[[PyTree], PyTree], argument: PyTree) -> Callable[[Sequence[bool]], list[bool]]:
    """Return a map from marks on the leaves of ``argument`` to marks on those leaves of ``fn(argument)`` that depend
    on a marked one.

    Data is followed forward through the jaxpr, into nested jaxprs whose inputs and outputs match those of
    their equation one to one (jit, custom derivatives, remat); through any other equation each output counts
    as dependent on each input. So an unmarked leaf is independent for certain, and a marked one may be too.
    """
    jaxpr = jax.make_jaxpr(fn)(argument).jaxpr
    return lambda marked: _follow(jaxpr, marked)


def operations(jaxpr: Any) -> set[str]:
    """Return the names of all primitives in a jaxpr and in the jaxprs inside it."""
    return {eqn.primitive.name for eqn in _equations(jaxpr.eqns)}


def working_precision(fn: Callable[[PyTree], PyTree], argument: PyTree) -> Any:
    """Return the dtype of lowest precision that ``fn`` casts a wider floating-point value down to, on its way.

    The widest dtype of the argument where it casts none: what rounds the result of ``fn``. Equations of the outermost
    jaxpr that the result does not depend on are left out.
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
        for parameter in eqn.params.values():
            for item in parameter if isinstance(parameter, list | tuple) else [parameter]:
                inner: Any = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner.eqns)


def _follow(jaxpr: Any, marked: Sequence[bool]) -> list[bool]:
    known = {v for v, m in zip(jaxpr.invars, marked, strict=True) if m}

    def is_marked(v: Any) -> bool:
        return not isinstance(v, jex_core.Literal) and v in known

    for eqn in jaxpr.eqns:
        inputs = [is_marked(v) for v in eqn.invars]
        if not any(inputs):
            continue
        inner = _one_to_one(eqn)
        outputs = [True] * len(eqn.outvars) if inner is None else _follow(inner, inputs)
        known.update(v for v, m in zip(eqn.outvars, outputs, strict=True) if m)
    return [is_marked(v) for v in jaxpr.outvars]


def _one_to_one(eqn: Any) -> Any:
    """Return the equation's only sub-jaxpr if its arity is that of the equation, else None."""
    if eqn.primitive.name in {"scan", "while", "cond"}:
        return None
    inner = [getattr(p, "jaxpr", p) for p in eqn.params.values() if hasattr(getattr(p, "jaxpr", p), "eqns")]
    if len(inner) != 1:
        return None
    matches = len(inner[0].invars) == len(eqn.invars) and len(inner[0].outvars) == len(eqn.outvars)
    return inner[0] if matches else None
