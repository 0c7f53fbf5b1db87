"""Self-tuning layers in an unmodified Flax Linen model, by intercepting its methods.

Every ``Dense``, ``DenseGeneral``, ``Conv`` and ``Embed`` (also those inside attention and recurrent cells) runs a
second time as an unbound clone with the response's weights. ``OptimizedLSTMCell`` multiplies by its weights itself and
is computed here. Layers are located by their path in the weights that the loss receives.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from hypergrad import tree, validate
from hypergrad.responses.layers._base import Gates, Run, active, current, describe_layer, named_leaves, pop_inputs
from hypergrad.types import Array

__all__ = ["intercepted"]

_KINDS = (nn.Dense, nn.DenseGeneral, nn.Conv, nn.Embed)
_OWN_WEIGHTS = (nn.WeightNorm, nn.SpectralNorm)  # their layer receives other weights than those in params


@contextlib.contextmanager
def intercepted(run: Run) -> Iterator[None]:
    """Run Linen modules called inside with the gates of ``run``."""
    with active(run), nn.intercept_methods(functools.partial(_intercept, run)):
        yield
    run.check()


def _intercept(run: Run, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    module = context.module
    if current() is not run or context.method_name == "setup" or module.scope is None or module.is_initializing():
        return next_fun(*args, **kwargs)
    outermost = run.depth == 0
    if outermost:
        run.prefix = _locate(run, module)
    with run.inside():
        output = next_fun(*args, **kwargs) if run.prefix is None else _layer(run, next_fun, args, kwargs, context)
    return run.record_output(output) if outermost and run.prefix is not None else output


def _layer(run: Run, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    module, method = context.module, context.method_name
    path = "/".join(word for word in (run.prefix, *module.path) if word)
    if isinstance(module, _OWN_WEIGHTS):
        with active(None):
            return next_fun(*args, **kwargs)
    if type(module).__call__ is nn.OptimizedLSTMCell.__call__ and method == "__call__":
        return _lstm(run, path, module, next_fun, *args, **kwargs)
    if not isinstance(module, _KINDS) or all(type(module).__call__ is not kind.__call__ for kind in _KINDS):
        return next_fun(*args, **kwargs)
    weights = nn.unbox(module.variables).get("params", {})
    embedding = isinstance(module, nn.Embed)
    name = "embedding" if embedding else "kernel"
    if method not in ("__call__", "attend") or name not in weights:
        return next_fun(*args, **kwargs)
    inputs, *rest = pop_inputs(args, kwargs)
    layer = describe_layer(weights[name], weights.get("bias"), module.features, embedding=embedding)
    gates = run.record_layer(path, layer)
    output = next_fun(inputs, *rest, **kwargs)
    if gates is None:
        return output
    clone = module.clone(parent=None, name=None, **({} if embedding else {"use_bias": False}))

    def product(weight: Array, inputs: Array) -> Any:
        with active(None):
            own = {name: weight.astype(weights[name].dtype)}
            return clone.apply({"params": own}, inputs, *rest, method=method, **kwargs)

    add = run.add_transposed if method == "attend" else run.add
    return add(path, output, inputs, gates, product)


def _lstm(run: Run, path: str, module: Any, next_fun: Any, carry: Any, inputs: Array) -> Any:
    """Compute an ``OptimizedLSTMCell`` whose eight matrices have gates, with one product per four matrices."""
    weights = nn.unbox(module.variables)["params"]
    gates = {}
    for name in ("ii", "if", "ig", "io", "hi", "hf", "hg", "ho"):
        layer = describe_layer(weights[name]["kernel"], weights[name].get("bias"), module.features, embedding=False)
        gates[name] = run.record_layer(f"{path}/{name}" if path else name, layer)
    if all(gate is None for gate in gates.values()):
        return next_fun(carry, inputs)
    cell, hidden = carry

    def product(kind: str, inputs: Array) -> Array:
        names = [kind + gate for gate in "ifgo"]
        layers = [weights[name] for name in names]
        kernel = jnp.concatenate([layer["kernel"] for layer in layers], -1)
        bias = jnp.concatenate([layer["bias"] for layer in layers], -1) if kind == "h" else None
        x, kernel, bias = promote_dtype(inputs, kernel, bias, dtype=module.dtype)
        output = x @ kernel
        output = output if bias is None else output + jnp.broadcast_to(bias, output.shape)
        own = [found for name in names if (found := gates[name]) is not None]
        if not own:
            return output
        if len(own) < len(names):
            fix = "Select all matrices of a cell with layers=..., or none."
            raise ValueError(validate.message(f"layers to select all or none of {path}", "a part", fix))
        return run.add(f"{path}/{kind}", output, x, _joined(own), lambda weight, x: x @ weight.astype(x.dtype))

    split = jnp.split(product("i", inputs) + product("h", hidden), 4, axis=-1)
    i, f, o = (module.gate_fn(split[k]) for k in (0, 1, 3))
    cell = f * cell + i * module.activation_fn(split[2])
    hidden = o * module.activation_fn(cell)
    return (cell, hidden), hidden


def _joined(gates: list[Gates]) -> Gates:
    def join(*parts: Any) -> Any:
        return () if isinstance(parts[0], tuple) else jnp.concatenate(parts, -1)

    return Gates(*(join(*parts) for parts in zip(*gates, strict=True)))


def _locate(run: Run, module: nn.Module) -> str | None:
    """Return the path in ``run.params`` of the weights of an outermost module's root; None: they are not in it.

    This is where the same array objects are. If the loss has changed the weights (a cast, weight drop), it is where a
    tree of the same structure and shapes is, provided that there is only one.
    """
    own = dict(named_leaves(module.variables.get("params", {})))
    nodes: dict[tuple[str, ...], dict[tuple[str, ...], Any]] = {}
    for path, leaf in named_leaves(run.params):
        for i in range(len(path) + 1 if own else 0):
            nodes.setdefault(path[:i], {})[path[i:]] = leaf
    alike, ids = [], {id(x) for x in own.values()}
    for path, node in nodes.items():
        fits = node.keys() == own.keys() and all(jnp.shape(node[name]) == jnp.shape(own[name]) for name in own)
        if not fits or path[len(path) - len(module.path) :] != module.path:
            continue
        root = "/".join(path[: len(path) - len(module.path)])
        if ids & {id(x) for x in node.values()}:
            run.roots.setdefault(root, set()).add("same")
            return root
        alike.append(root)
    traced = lambda values: any(tree.is_traced(x) for x in jax.tree.leaves(values))  # noqa: E731
    if traced(run.params) and not traced(own):  # constants: a model that is not trained
        return None
    if len(alike) > 1:
        fix = "Pass each model its part of params unchanged, or give the models parts of different structure."
        got = f"equal structures at {', '.join(map(repr, alike))}"
        raise ValueError(validate.message("one place in params for the weights of a model", got, fix))
    if not alike:
        return None
    run.roots.setdefault(alike[0], set()).add("alike")
    return alike[0]
