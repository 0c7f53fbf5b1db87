"""Self-tuning layers in a Flax NNX model: the classes of its layers are replaced, its state keeps its structure.

NNX has no interceptor, so layers that are linear in their weights become subclasses that look up the active run;
without one they compute what the layer computes. Graph definitions differ, states do not: learned weights fit the given
model.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax.numpy as jnp
from flax import nnx

from hypergrad import validate
from hypergrad.responses.layers._base import Run, active, current, describe_layer, pop_inputs
from hypergrad.types import Array

__all__ = ["self_tunable"]


def self_tunable(model: Any) -> Any:
    """Return a copy of an NNX model whose layers can be self-tuned: ``Linear``, ``LinearGeneral``, ``Conv``, ``Embed``.

    Recurrent cells and attention consist of these. The copy computes what the model computes, and its state has the
    same structure; split it like the model: ``graphdef, params, rest = nnx.split(copy, nnx.Param, ...)``. Layers of a
    subclass of these four are not changed. For the linearised Delta-STN, call the model itself in the losses: if the
    losses call another method of the model, each layer is linearised separately.

    Args:
      model: a ``flax.nnx.Module``.

    Returns:
      The copy, for a loss of ``hg.responses.self_tuning``.

    Raises:
      TypeError: ``model`` is not an NNX module.
      ValueError: it has no such layer.

    >>> from flax import nnx
    >>> model = self_tunable(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    >>> type(model).__name__
    'SelfTuningLinear'

    Reference: MacKay et al., arXiv 1903.03088.
    """
    if not isinstance(model, nnx.Module):
        fix = "Pass e.g. MLP(rngs=nnx.Rngs(0)). A Linen model needs no change."
        raise TypeError(validate.message("a flax.nnx.Module", f"a {type(model).__name__}", fix))
    copy = nnx.clone(model)
    modules: list[tuple[Any, Any]] = [
        (path, module) for path, module in nnx.iter_modules(copy) if type(module) in _KINDS
    ]
    for path, module in modules:
        module.__class__ = _KINDS[type(module)]
        module.self_tuning_path = "/".join(map(str, path))
    if not modules:
        fix = f"Layers that can be tuned are {', '.join(kind.__name__ for kind in _KINDS)}, not subclasses of them."
        raise ValueError(validate.message("a model with a layer that is linear in its weights", "none", fix))
    if type(copy) not in _KINDS.values():
        copy.__class__ = _outermost(type(copy))
    return copy


def _respond(layer: Any, plain: Callable[..., Any], add: Callable[..., Array], args: Any, kwargs: Any) -> Any:
    """Run ``plain(layer, *args, **kwargs)``, with its response by ``add`` if a run is active."""
    run = current()
    if run is None:
        return plain(layer, *args, **kwargs)
    embeds = isinstance(layer, nnx.Embed)
    layer, name = cast(Any, layer), "embedding" if embeds else "kernel"
    features = layer.features if embeds else layer.out_features
    weight, bias = getattr(layer, name)[...], getattr(layer, "bias", None)
    bias = None if bias is None else bias[...]
    path, outermost = layer.self_tuning_path, run.depth == 0
    inputs, *rest = pop_inputs(args, kwargs)
    gates = run.record_layer(path, describe_layer(weight, bias, features, embedding=embeds))

    def product(other: Array, inputs: Array) -> Array:
        clone = nnx.clone(layer)  # split and merge would share the layer's own variables
        getattr(clone, name)[...] = other.astype(weight.dtype)
        if bias is not None:
            clone.bias[...] = jnp.zeros_like(bias)
        with active(None):
            return plain(clone, inputs, *rest, **kwargs)

    with run.inside():
        output = plain(layer, inputs, *rest, **kwargs)
        output = output if gates is None else add(run, path, output, inputs, gates, product)
    return run.record_output(output) if outermost else output


def _tunable(kind: type[Any]) -> type[Any]:
    """Return a subclass of a layer whose products have a response. (One base: ``__class__`` needs the same layout.)"""

    def method(name: str, add: Callable[..., Array]) -> Callable[..., Array]:
        plain = getattr(kind, name)

        @functools.wraps(plain)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return _respond(self, plain, add, args, kwargs)

        return call

    methods = {"__call__": method("__call__", Run.add)}
    if hasattr(kind, "attend"):
        methods["attend"] = method("attend", Run.add_transposed)
    doc = f"``nnx.{kind.__name__}`` with a response."
    return type(f"SelfTuning{kind.__name__}", (kind,), {"__doc__": doc, **methods})


_KINDS = {kind: _tunable(kind) for kind in (nnx.Linear, nnx.LinearGeneral, nnx.Conv, nnx.Embed)}


@functools.cache
def _outermost(kind: type[Any]) -> type[Any]:
    """Return a subclass whose calls are outermost calls of a run."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = current()
        if run is None or run.depth:
            return kind.__call__(self, *args, **kwargs)
        with run.inside():
            output = kind.__call__(self, *args, **kwargs)
        return run.record_output(output)

    return type(f"SelfTuning{kind.__name__}", (kind,), {"__call__": call, "__doc__": kind.__doc__})
