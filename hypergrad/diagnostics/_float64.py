"""The user's losses in float64, whatever dtype they compute in: their rounding is left out, their random numbers stay.

    loss(float32 or bfloat16 arrays)  →  its jaxpr  →  each operation on float64 arrays

The jaxpr is made in the user's dtypes: masks and noise are those that training draws, and a model that is fixed to
float32 or bfloat16 needs no change. Integers, bits and keys are computed as they are. An operation that is not known
here (a callback, a kernel, a linear solve) gets its arguments in its own dtypes. Custom derivative rules and
``jax.checkpoint`` stay in force.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex_core

from hypergrad import dataflow
from hypergrad.problem import BilevelProblem
from hypergrad.types import Batch, Hyperparams, ModelState, Params, PyTree

__all__ = ["problem_in_float64", "to_float64"]

_CALLS = {"jit", "pjit", "closed_call", "core_call"}
_SCATTERS = {
    "scatter": lax.scatter,
    "scatter-add": lax.scatter_add,
    "scatter-sub": lax.scatter_sub,
    "scatter-mul": lax.scatter_mul,
    "scatter-min": lax.scatter_min,
    "scatter-max": lax.scatter_max,
}


def to_float64(values: PyTree) -> PyTree:
    """Return the tree with floating-point leaves in float64, complex ones in complex128."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, _wide(jnp.result_type(leaf))), values)


def problem_in_float64(
    problem: BilevelProblem, params: Params, hyperparams: Hyperparams, model_state: ModelState, *, x64: bool
) -> BilevelProblem:
    """Return the problem over float64 weights, hyperparameters and model state.

    The three that are given tell the user's dtypes; batches come in their own. ``x64`` is whether the user has
    ``jax_enable_x64`` set.
    """
    shapes = jax.eval_shape(lambda *given: given, params, hyperparams, model_state)

    def over(loss: Callable[..., Any]) -> Callable[..., Any]:
        def in_float64(params: Params, hyperparams: Hyperparams, batch: Batch, key: Any, *state: ModelState) -> Any:
            like = *shapes[:2], batch, key, *shapes[2:][: len(state)]
            return _Float64(x64).call(loss, like, (params, hyperparams, batch, key, *state))

        return in_float64

    changed: dict[str, Any] = {name: over(getattr(problem, name)) for name in ("inner_loss", "outer_loss")}
    if problem.residual is not None:
        changed["residual"] = over(problem.residual)
    response = problem.response
    if response is not None and response.weights is not None:
        weights = jax.eval_shape(response.weights, params, hyperparams)
        plain = jax.eval_shape(response.base_hyperparams, hyperparams)
        base = problem_in_float64(response.base_problem, weights, plain, model_state, x64=x64)
        changed["response"] = response._replace(base_problem=base)
    return dataclasses.replace(problem, **changed)


class _Float64:
    """An interpreter of jaxprs on float64 arrays."""

    def __init__(self, x64: bool) -> None:
        self._x64 = x64

    def call(self, fn: Callable[..., Any], like: PyTree, args: PyTree) -> Any:
        """Return ``fn(*args)`` in float64, traced for arguments like ``like``."""
        with jax.enable_x64(self._x64):
            shapes = jax.eval_shape(lambda *given: given, *like)  # weak types of Python numbers stay weak
            closed, result = jax.make_jaxpr(fn, return_shape=True)(*shapes)
        return jax.tree.unflatten(jax.tree.structure(result), self.run(closed, *jax.tree.leaves(args)))

    def run(self, closed: Any, *args: Any) -> list[Any]:
        """Evaluate a jaxpr, open or closed."""
        jaxpr: Any = dataflow.open_jaxpr(closed)
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, map(_widened, getattr(closed, "consts", ())), strict=True))
        values.update(zip(jaxpr.invars, map(_widened, args), strict=True))

        def read(v: Any) -> Any:
            return (
                _widened(jnp.asarray(v.val, jnp.result_type(v.aval))) if isinstance(v, jex_core.Literal) else values[v]
            )

        for eqn in jaxpr.eqns:
            values.update(
                zip(eqn.outvars, self._outputs(eqn, list(map(read, eqn.invars)), jaxpr.debug_info), strict=True)
            )
        return [read(v) for v in jaxpr.outvars]

    def _outputs(self, eqn: Any, values: list[Any], debug_info: Any) -> list[Any]:
        name, params, inner = eqn.primitive.name, eqn.params, dataflow.inner_jaxprs(eqn)
        if name == "scan":
            return self._scan(eqn, values)
        if name == "while":
            of_test, constants = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
            return lax.while_loop(
                lambda carry: self.run(params["cond_jaxpr"], *values[:of_test], *carry)[0],
                lambda carry: self.run(params["body_jaxpr"], *values[of_test:constants], *carry),
                values[constants:],
            )
        if name == "cond":
            branches = [lambda *args, branch=branch: self.run(branch, *args) for branch in params["branches"]]
            return lax.switch(values[0], branches, *values[1:])
        if "custom_jvp" in name:
            return self._with_forward_rule(eqn, debug_info)(*values)
        if "custom_vjp" in name:
            return self._with_reverse_rule(eqn, debug_info)(*values)
        if name in _CALLS:
            return self.run(_called(eqn), *values)
        if name in ("remat2", "remat", "checkpoint"):
            run = functools.partial(self.run, _called(eqn))
            return jax.checkpoint(run, policy=params["policy"], prevent_cse=params["prevent_cse"])(*values)
        if name.replace("_", "-") in _SCATTERS:
            kept = ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")
            return [_SCATTERS[name.replace("_", "-")](*values, **{key: params[key] for key in kept})]
        own = lambda: list(map(_widened, _in_own_dtypes(eqn, debug_info)(*values)))  # noqa: E731
        if inner or eqn.effects or name == "bitcast_convert_type" or name.startswith("random_"):
            return own()
        if name == "reduce_precision":
            return values
        wide = {key: _wide_parameter(key, value) for key, value in params.items()}
        found = eqn.primitive.bind(*values, **wide)
        found = list(found) if eqn.primitive.multiple_results else [found]
        fits = all(x.dtype == _wide(v.aval.dtype) for x, v in zip(found, eqn.outvars, strict=True) if _is_float(v.aval))
        return found if fits else own()  # a callback's result has the dtype that it was declared with

    def _scan(self, eqn: Any, values: list[Any]) -> list[Any]:
        _, constants, carry, slices = dataflow.scan_parts(eqn, values)

        def step(carry: list[Any], row: list[Any]) -> tuple[list[Any], list[Any]]:
            outputs = self.run(eqn.params["jaxpr"], *constants, *carry, *row)
            return outputs[: len(carry)], outputs[len(carry) :]

        final, stacked = lax.scan(step, carry, slices, length=eqn.params["length"], reverse=eqn.params["reverse"])
        return [*final, *stacked]

    def _with_forward_rule(self, eqn: Any, debug_info: Any) -> Callable[..., Any]:
        """Return a function with a ``custom_jvp`` rule, which is evaluated in float64 too."""
        moving = _moving(eqn)

        @jax.custom_jvp
        def call(*values: Any) -> list[Any]:
            return self.run(_called(eqn), *values)

        @call.defjvp
        def rule(values: Sequence[Any], tangents: Sequence[Any]) -> tuple[list[Any], list[Any]]:
            def own(values: Sequence[Any], tangents: Sequence[Any]) -> Any:
                return jax.jvp(
                    _of_some(_in_own_dtypes(eqn, debug_info), values, moving), [values[i] for i in moving], tangents
                )

            like = [v.aval for v in eqn.invars], [eqn.invars[i].aval for i in moving]
            return self.call(own, like, (values, [tangents[i] for i in moving]))

        return call

    def _with_reverse_rule(self, eqn: Any, debug_info: Any) -> Callable[..., Any]:
        """Return a function with a ``custom_vjp`` rule, which is evaluated in float64 too."""
        moving = _moving(eqn)

        @jax.custom_vjp
        def call(*values: Any) -> list[Any]:
            return self.run(_called(eqn), *values)

        def backward(values: Sequence[Any], cotangents: Sequence[Any]) -> tuple[Any, ...]:
            def own(values: Sequence[Any], cotangents: Sequence[Any]) -> Any:
                fn = _of_some(_in_own_dtypes(eqn, debug_info), values, moving)
                return jax.vjp(fn, *(values[i] for i in moving))[1](list(cotangents))

            like = [v.aval for v in eqn.invars], [v.aval for v in eqn.outvars]
            found = self.call(own, like, (values, cotangents))
            return tuple(_replaced([None] * len(values), moving, found))

        call.defvjp(lambda *values: (call(*values), values), backward)
        return call


def _called(eqn: Any) -> Any:
    """Return the jaxpr of the function that an equation calls, closed if it is."""
    return next(value for value in eqn.params.values() if hasattr(dataflow.open_jaxpr(value), "eqns"))


def _in_own_dtypes(eqn: Any, debug_info: Any) -> Callable[..., list[Any]]:
    """Return an equation, of a jaxpr with ``debug_info``, as a function of its inputs, cast to its own dtypes."""
    places = {v: i for i, v in enumerate(eqn.invars) if not isinstance(v, jex_core.Literal)}
    named = debug_info._replace(arg_names=("",) * len(places), result_paths=("",) * len(eqn.outvars))
    alone = jex_core.Jaxpr([], list(places), eqn.outvars, [eqn], eqn.effects, named)
    fn = jex_core.jaxpr_as_fun(jex_core.ClosedJaxpr(alone, []))

    def run(*values: Any) -> list[Any]:
        given = ((values[i], v.aval) for v, i in places.items())
        return list(fn(*(jnp.asarray(x, aval.dtype) if _is_float(aval) else x for x, aval in given)))

    return run


def _moving(eqn: Any) -> list[int]:
    """Return the places of the inputs that a derivative is taken of."""
    return [i for i, v in enumerate(eqn.invars) if _is_float(v.aval) and not isinstance(v, jex_core.Literal)]


def _of_some(fn: Callable[..., Any], values: Sequence[Any], places: Sequence[int]) -> Callable[..., Any]:
    """Return ``fn`` as a function of the inputs at ``places``, the others as in ``values``."""
    return lambda *some: fn(*_replaced(values, places, some))


def _replaced(values: Sequence[Any], places: Sequence[int], new: Sequence[Any]) -> list[Any]:
    result = list(values)
    for place, value in zip(places, new, strict=True):
        result[place] = value
    return result


def _wide_parameter(name: str, value: Any) -> Any:
    """Return a parameter of an operation in float64: a dtype is widened, a precision of products left to float64."""
    if name == "precision":
        return None
    is_dtype = isinstance(value, jnp.dtype) or (isinstance(value, type) and hasattr(value, "dtype"))
    return _wide(jnp.dtype(value)) if is_dtype else value


def _is_float(aval: Any) -> bool:
    return hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.inexact)


def _wide(dtype: Any) -> Any:
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jnp.dtype("complex128")
    return jnp.dtype("float64") if jnp.issubdtype(dtype, jnp.floating) else dtype


def _widened(value: Any) -> Any:
    return jnp.asarray(value, _wide(value.dtype)) if _is_float(value) else value
