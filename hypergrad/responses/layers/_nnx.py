"""Self-tuning layers in a Flax NNX model, by module surgery: classes are swapped, the state stays what it was.

NNX has no interceptor, so layers that are linear in their weights become subclasses that look for a run under way, and
behave as before without one. Graph definitions differ, states do not: what is learned goes back into the model.
"""

import functools
from typing import Any

import jax.numpy as jnp
from flax import nnx

from hypergrad import validate
from hypergrad.responses.layers._base import Run, active, current, found_in
from hypergrad.types import Array


def self_tunable(model: Any) -> Any:
    """Return a copy of an NNX model whose layers can be self-tuned: ``Linear``, ``LinearGeneral``, ``Conv``, ``Embed``.

    Recurrent cells and attention are made of these. The copy computes what the model does, and its state has the same
    structure; split it where the model would be split: ``graphdef, params, rest = nnx.split(copy, nnx.Param, ...)``.
    Subclasses of these layers stay as they are. For the linearised Delta-STN call the model itself in the losses: of
    another of its methods each layer is linearised apart.

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
        raise TypeError(validate.message("a flax.nnx.Module", validate.describe(type(model).__name__), fix))
    copy, layers = nnx.clone(model), 0
    modules: list[tuple[Any, Any]] = list(nnx.iter_modules(copy))
    for path, module in modules:
        if type(module) in _KINDS:
            module.__class__ = _KINDS[type(module)]
            module.self_tuning_path = "/".join(map(str, path))
            layers += 1
    if not layers:
        fix = f"Layers that can be tuned are {', '.join(kind.__name__ for kind in _KINDS)}, not subclasses of them."
        raise ValueError(validate.message("a model with a layer that is linear in its weights", "none", fix))
    if type(copy) not in _KINDS.values():
        copy.__class__ = _outermost(type(copy))
    return copy


def _respond(layer: Any, plain: Any, way: str, inputs: Array, *args: Any) -> Array:
    run = current()
    if run is None:
        return plain(layer, inputs, *args)
    outermost = run.depth == 0
    with run.inside():
        output = _output(run, layer, plain, way, inputs, *args)
    return run.returned(output) if outermost else output


def _output(run: Run, layer: Any, plain: Any, way: str, inputs: Array, *args: Any) -> Array:
    embedding = isinstance(layer, nnx.Embed)
    name = "embedding" if embedding else "kernel"
    bias = getattr(layer, "bias", None)
    bias = None if bias is None or bias[...] is None else bias[...]
    path = layer.self_tuning_path
    features = layer.features if embedding else layer.out_features
    gates = run.gates_of(path, found_in(getattr(layer, name)[...], bias, features, embedding=embedding))
    output = plain(layer, inputs, *args)
    if gates is None:
        return output

    def again(weight: Array, inputs: Array) -> Array:
        clone = nnx.clone(layer)  # split and merge would share the layer's own variables
        getattr(clone, name)[...] = weight.astype(getattr(layer, name)[...].dtype)
        if bias is not None:
            clone.bias[...] = jnp.zeros_like(bias)
        with active(None):
            return plain(clone, inputs, *args)

    return getattr(run, way)(path, output, inputs, gates, again)


class SelfTuningLinear(nnx.Linear):
    """``nnx.Linear`` with a response. (One base: an object can change to a class of the same layout only.)"""

    def __call__(self, inputs: Array, *args: Any, **kwargs: Any) -> Array:
        """Apply the layer, with its response where a run is under way."""
        return _respond(self, functools.partial(nnx.Linear.__call__, **kwargs), "add", inputs, *args)


class SelfTuningLinearGeneral(nnx.LinearGeneral):
    """``nnx.LinearGeneral`` with a response."""

    def __call__(self, inputs: Array, *args: Any, **kwargs: Any) -> Array:
        """Apply the layer, with its response where a run is under way."""
        return _respond(self, functools.partial(nnx.LinearGeneral.__call__, **kwargs), "add", inputs, *args)


class SelfTuningConv(nnx.Conv):
    """``nnx.Conv`` with a response."""

    def __call__(self, inputs: Array, *args: Any, **kwargs: Any) -> Array:
        """Apply the layer, with its response where a run is under way."""
        return _respond(self, functools.partial(nnx.Conv.__call__, **kwargs), "add", inputs, *args)


class SelfTuningEmbed(nnx.Embed):
    """``nnx.Embed`` with a response."""

    def __call__(self, inputs: Array, *args: Any, **kwargs: Any) -> Array:
        """Look up the embedding, with its response where a run is under way."""
        return _respond(self, functools.partial(nnx.Embed.__call__, **kwargs), "add", inputs, *args)

    def attend(self, query: Array, *args: Any, **kwargs: Any) -> Array:
        """Multiply by the embedding, with its response where a run is under way."""
        return _respond(self, functools.partial(nnx.Embed.attend, **kwargs), "add_transposed", query, *args)


_KINDS: dict[type, type] = {
    nnx.Linear: SelfTuningLinear,
    nnx.LinearGeneral: SelfTuningLinearGeneral,
    nnx.Conv: SelfTuningConv,
    nnx.Embed: SelfTuningEmbed,
}


@functools.cache
def _outermost(kind: type) -> type:
    """Return a subclass whose calls are outermost calls of a run."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = current()
        if run is None or run.depth:
            return kind.__call__(self, *args, **kwargs)
        with run.inside():
            output = kind.__call__(self, *args, **kwargs)
        return run.returned(output)

    return type(f"SelfTuning{kind.__name__}", (kind,), {"__call__": call, "__doc__": kind.__doc__})
