"""Self-tuning networks: layers of an unmodified Flax model learn how their outputs depend on the hyperparameters.

    y = W₀ x + b₀ + (V h̃) ⊙ (W₁ x) + (C h̃) ⊙ b₁        one row h̃ per example, two matrix products per layer

    STN      h̃ = λ + σε                                   one loss trains everything
    Δ-STN    h̃ = σε, the displacement from λ              W₀, b₀ ← SGD on L(net(x; 0); λ)
                                                          W₁, b₁, V, C ← SGD on L(o + ȯ; λ + σε)

with (o, ȯ) the model's outputs and their derivative along σε (one JVP). Δ-STN is centred, so ``params`` are the weights
to deploy, and linear in the response, so the noise of the perturbations does not reach the weights.

Reference: MacKay et al., Self-tuning networks, arXiv 1903.03088; Bae & Grosse, Delta-STN, arXiv 2010.13514.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hypergrad import validate
from hypergrad.problem import (
    BilevelParams,
    BilevelProblem,
    ResponseSpec,
    check_problem,
    evaluate_inner,
    refuse_residual,
    refuse_response,
)
from hypergrad.responses._base import broadcast_per_example, check_response_params, check_size, flat
from hypergrad.responses.layers import LayerInfo, LayerResponse, Run, displaced_weights, intercepted, weights_by_path
from hypergrad.types import Array, Batch, Hyperparams, Loss, ModelState, Params, PyTree

__all__ = [
    "CenteredParams",
    "SelfTuningVariant",
    "UncenteredParams",
    "delta_stn",
    "self_tuning",
    "stn",
]


class CenteredParams(NamedTuple):
    """The parameters of a centred self-tuning network (Δ-STN).

    Attributes:
      params: W₀, b₀ and all other weights of the model: those at the current hyperparameters.
      layers: W₁, b₁, V, C of each self-tuning layer, by its path in ``params``.
    """

    params: Params
    layers: dict[str, LayerResponse]

    def deployable_params(self, _hyperparams: Hyperparams, /) -> Params:
        """Return ``params``: the response is zero at the centre."""
        return self.params


class UncenteredParams(NamedTuple):
    """The parameters of an uncentred self-tuning network (STN).

    Attributes:
      params: W₀, b₀ and all other weights of the model: those at λ = 0.
      layers: W₁, b₁, V, C of each self-tuning layer, by its path in ``params``.
    """

    params: Params
    layers: dict[str, LayerResponse]

    def deployable_params(self, hyperparams: Hyperparams, /) -> Params:
        """Return W₀ + (V λ) ⊙ W₁, and the other weights."""
        return displaced_weights(self.params, self.layers, flat(hyperparams))


class SelfTuningVariant(NamedTuple):
    """A variant of self-tuning networks.

    Attributes:
      centered: h̃ is the displacement from the current hyperparameters.
      linearized: the response is trained on outputs that are linear in it.
      gate_std: initial standard deviation of V and C; 0 only for a centred variant.
    """

    centered: bool
    linearized: bool
    gate_std: float


def delta_stn(*, linearized: bool = True) -> SelfTuningVariant:
    """Return the variant Δ-STN: centred, initially V = 0 and, by default, linearised.

    An inner step costs about 2.5 plain ones for an MLP, more if elementwise operations take as long as products.
    Without the linearisation it costs about 2, and one loss trains both the response and the weights. Give the response
    its own optimizer: it starts at zero and learns slowly at the learning rate of the weights.

    >>> delta_stn().centered
    True

    Reference: Bae & Grosse, arXiv 2010.13514.
    """
    validate.flag("linearized", linearized)
    return SelfTuningVariant(centered=True, linearized=linearized, gate_std=0.0)


def stn(*, gate_std: float = 0.01) -> SelfTuningVariant:
    """Return the variant STN: uncentred, initially V ~ N(0, gate_std²). An inner step costs about 2 plain ones.

    >>> stn().centered
    False

    Reference: MacKay et al., arXiv 1903.03088.
    """
    validate.number("gate_std", gate_std, low=0.0, strict=True)
    return SelfTuningVariant(centered=False, linearized=False, gate_std=gate_std)


def self_tuning(
    problem: BilevelProblem,
    *,
    variant: SelfTuningVariant | None = None,
    per_example: PyTree = True,
    layers: Callable[[str], bool] | None = None,
) -> BilevelProblem:
    """Return the problem in which layers of the losses' own Flax model learn a response to the hyperparameters.

    y = W₀ x + b₀ + (V h̃) ⊙ (W₁ x) + (C h̃) ⊙ b₁ for each ``Dense``, ``DenseGeneral``, ``Conv``, ``Embed`` and cell of a
    recurrent network. A Linen model and the losses need no change; wrap an NNX model with ``self_tunable`` first.
    The inner variable is what ``hg.responses.init(problem, key, params, hyperparams, batch)`` returns.

    Args:
      problem: its losses run a model with weights ``params``, or a part of them; apply ``reparameterize`` before.
      variant: ``delta_stn()`` (None) or ``stn()``.
      per_example: tree prefix of bools over the hyperparameters. True: one perturbation per example, and both losses
        always receive that hyperparameter with a leading batch axis (a rate of shape () arrives as (B,)). False: one
        perturbation per batch, for hyperparameters that act on weights, such as decays: the loss receives weights that
        include that part of the response.
      layers: ``layers(path) -> bool``, which layers respond, e.g. ``lambda path: path != "head"``; None: all.

    Returns:
      A ``BilevelProblem`` for ``hg.direct``. Apply ``perturbed`` to it: otherwise nothing trains the response.

    Raises:
      TypeError: an argument of the wrong kind.
      ValueError: a problem that has a response or is perturbed. From ``init`` and the losses: no layer to tune, a layer
        whose outputs do not have the examples along their leading axis, weights of a layer that differ from those it
        runs with (as under ``nn.scan`` over layers), a batch whose arrays differ in their leading axis.

    Valid when the best response is close to one gate per output unit near λ, and the loss of each example depends on
    its own hyperparameters alone (batch statistics mix examples, an error of second order in σ). A penalty on weights
    sees the weights at the centre: mark its hyperparameters False in ``per_example``. Call the model on the batch, not
    under ``jax.vmap`` over examples. With the linearized variant, call the model directly in the loss: do not put the
    call inside a JAX transformation of your own (``jax.vmap``, ``jax.checkpoint``, ``lax.scan``, ...). The library may
    still jit and differentiate the loss. The response is trained on the outputs that the model returns, not on values
    stored with ``self.sow``, so if the loss penalizes activations, return them from the model. The value of its inner
    loss is the loss of the weights; the response contributes a gradient only. Models are located by the array objects
    of ``params``, or by their structure if the loss changes the arrays (a cast, weight drop): run a second model of the
    same structure under ``disable_self_tuning()``.

    >>> import flax.linen as nn, hypergrad as hg, jax, jax.numpy as jnp
    >>> model, x = nn.Dense(2), jnp.ones((4, 3))
    >>> loss = lambda w, h, x, key: (h * jnp.sum(model.apply({"params": w}, x) ** 2, 1)).mean()
    >>> problem = hg.responses.perturbed(self_tuning(hg.BilevelProblem(loss, loss)), scale=0.5)
    >>> params, h = model.init(jax.random.key(0), x)["params"], jnp.array(0.1)
    >>> hg.responses.init(problem, 0, params, h, x).layers[""].gate.shape
    (1, 2)

    Reference: MacKay et al., arXiv 1903.03088; Bae & Grosse, arXiv 2010.13514.
    """
    check_problem(problem)
    refuse_response("self_tuning", problem)
    refuse_residual("self_tuning", problem)
    variant = delta_stn() if variant is None else variant
    if not isinstance(variant, SelfTuningVariant):
        fix = "Pass hg.responses.delta_stn() or hg.responses.stn()."
        raise TypeError(validate.message("variant to be a SelfTuningVariant", validate.describe(variant), fix))
    for mark in jax.tree.leaves(per_example, is_leaf=lambda x: x is None):
        validate.flag("per_example", mark)
    if layers is not None and not callable(layers):
        fix = 'Pass layers(path) -> bool, e.g. lambda path: path != "head", or None for all layers.'
        raise TypeError(validate.message("layers to be callable", validate.describe(layers), fix))
    kind = CenteredParams if variant.centered else UncenteredParams
    base = dataclasses.replace(
        problem,
        inner_loss=_with_rows(problem.inner_loss, per_example),
        outer_loss=_with_rows(problem.outer_loss, per_example),
    )

    def unpack(response_params: Any, hyperparams: Hyperparams) -> tuple[Params, dict[str, LayerResponse]]:
        params, own = check_response_params("self-tuning", response_params, kind)
        size = flat(hyperparams).size
        for layer in own.values():
            check_size("self-tuning", size, layer.gate.shape[0])
        return params, own

    def weights(response_params: PyTree, hyperparams: Hyperparams) -> Params:
        params, own = unpack(response_params, hyperparams)
        moved = flat(hyperparams) - (flat(lax.stop_gradient(hyperparams)) if variant.centered else 0.0)
        return displaced_weights(params, own, moved)

    def unperturbed(loss: Loss) -> Loss:
        """Evaluate ``loss`` at the weights of the current hyperparameters: no layer needs to run twice."""

        def of_response(response_params: PyTree, hyperparams: Hyperparams, *rest: Any) -> Any:
            return loss(weights(response_params, hyperparams), hyperparams, *rest)

        return of_response

    def gated(loss: Loss, center: Hyperparams) -> Loss:
        """Evaluate ``loss`` with gates at hyperparameters that have their leading axes."""

        def of_response(response_params: PyTree, hyperparams: Hyperparams, *rest: Any) -> Any:
            params, own = unpack(response_params, center)
            rows, shared = _displacement(variant, per_example, hyperparams, center)
            return _run(loss, Run(displaced_weights(params, own, shared), own, rows), hyperparams, *rest)

        return of_response

    def linearized(loss: Loss, center: Hyperparams) -> Loss:
        """Train the weights on the loss at the centre, the response on the loss at linearised outputs."""

        def of_response(
            response_params: PyTree, hyperparams: Hyperparams, batch: Batch, key: Any, *state: ModelState
        ) -> Any:
            params, own = unpack(response_params, center)
            result = _with_rows(loss, per_example)(params, center, batch, key, *state)
            held = lax.stop_gradient(params)
            rows, shared = _displacement(variant, per_example, hyperparams, center)

            def run_again(run: Run) -> Any:
                # All evaluations draw the same random numbers on purpose.
                same_key = None if key is None else jax.random.clone(key)
                return _run(loss, run, hyperparams, batch, same_key, *state)

            def outputs(t: Array) -> list[Any]:
                here = displaced_weights(held, own, None if shared is None else t * shared)
                run = Run(here, own, rows, linear=t)
                run_again(run)
                return run.outputs

            start = jnp.zeros((), flat(center).dtype)
            at, slope = jax.jvp(outputs, (start,), (jnp.ones_like(start),))
            if not at:
                fix = "Call the model's own apply in the inner loss, or use delta_stn(linearized=False)."
                raise ValueError(validate.message("an inner loss that runs a Flax model", "no call of one", fix))
            replay = [jax.tree.map(_moved, o, do) for o, do in zip(at, slope, strict=True)]
            second = run_again(Run(displaced_weights(held, own, shared), own, replay=replay))
            extended = problem.has_aux or problem.stateful
            response_loss = second[0] if extended else second
            # Adds the response's gradient and zero: the value is the loss that trains the weights.
            change = response_loss - lax.stop_gradient(response_loss)
            return (result[0] + change, *result[1:]) if extended else result + change

        return of_response

    def start(key: Array | None, params: Params, hyperparams: Hyperparams, batch: Batch, state: ModelState) -> Any:
        found = _find_layers(base, params, hyperparams, batch, state)
        chosen = {path: layer for path, layer in found.items() if layers is None or layers(path)}
        if not chosen:
            fix = "Layers are nn.Dense, DenseGeneral, Conv, Embed and recurrent cells; NNX models need self_tunable."
            got = f"{', '.join(map(repr, found))}, of which layers() selected none" if found else "none"
            raise ValueError(validate.message("an inner loss that runs layers that can be tuned", got, fix))
        dtypes, size = _check_weights(params, chosen), flat(hyperparams).size
        keys = jax.random.split(validate.required_key(key), len(chosen))
        own = {
            path: _start(k, layer, dtypes[path], size, variant.gate_std)
            for k, (path, layer) in zip(keys, chosen.items(), strict=True)
        }
        return kind(jax.tree.map(jnp.copy, params), own)

    def losses_at(center: Hyperparams) -> tuple[Loss, Loss]:
        inner = (linearized if variant.linearized else gated)(problem.inner_loss, center)
        return inner, gated(problem.outer_loss, center)

    spec = ResponseSpec(init=start, weights=weights, losses_at=losses_at, base_problem=base, per_example=per_example)
    inner, outer = unperturbed(base.inner_loss), unperturbed(base.outer_loss)
    return dataclasses.replace(problem, inner_loss=inner, outer_loss=outer, response=spec)


def _run(loss: Loss, run: Run, hyperparams: Hyperparams, *rest: Any) -> Any:
    with intercepted(run):
        return loss(run.params, hyperparams, *rest)


def _moved(output: Any, slope: Any) -> Any:
    return output + slope if jnp.issubdtype(jnp.asarray(output).dtype, jnp.inexact) else output


def _with_rows(loss: Loss, per_example: PyTree) -> Loss:
    """Return the loss with a leading batch axis added to the hyperparameters that are marked in ``per_example``."""

    def of_rows(params: Params, hyperparams: Hyperparams, batch: Batch, key: Any, *state: ModelState) -> Any:
        marks = broadcast_per_example(per_example, hyperparams)
        size = validate.batch_size(batch) if any(jax.tree.leaves(marks)) else 0
        rows = lambda mark, h: jnp.broadcast_to(h, (size, *jnp.shape(h))) if mark else h  # noqa: E731
        return loss(params, jax.tree.map(rows, marks, hyperparams), batch, key, *state)

    return of_rows


def _displacement(
    variant: SelfTuningVariant, per_example: PyTree, hyperparams: Hyperparams, center: Hyperparams
) -> tuple[Array | None, Array | None]:
    """Return h̃ in two parts: one row per example (B, n) or None, and what all examples share (n,) or None."""
    marks = jax.tree.leaves(broadcast_per_example(per_example, center))
    dtype, count = flat(center).dtype, 1
    parts: list[Array] = []
    for h, c, mark in zip(jax.tree.leaves(hyperparams), jax.tree.leaves(center), marks, strict=True):
        origin = jnp.asarray(c if variant.centered else jnp.zeros_like(c), dtype)
        moved = jnp.asarray(h, dtype) - jnp.broadcast_to(origin, jnp.shape(h))
        count = jnp.shape(h)[0] if mark else count
        parts.append(moved.reshape(jnp.shape(h)[0] if mark else 1, jnp.size(c)))
    own = [part if mark else jnp.zeros((count, part.shape[1]), dtype) for part, mark in zip(parts, marks, strict=True)]
    shared = [jnp.zeros(part.shape[1], dtype) if mark else part[0] for part, mark in zip(parts, marks, strict=True)]
    return jnp.concatenate(own, 1) if any(marks) else None, None if all(marks) else jnp.concatenate(shared)


def _find_layers(
    problem: BilevelProblem, params: Params, hyperparams: Hyperparams, batch: Batch, state: ModelState
) -> dict[str, LayerInfo]:
    """Return the layers that the inner loss runs, by path, without computing anything."""
    if batch is None:
        fix = "Pass a training batch: hg.responses.init(problem, key, params, hyperparams, batch)."
        raise ValueError(validate.message("a batch, to trace the inner loss and find its layers", "None", fix))
    found: dict[str, LayerInfo] = {}

    def trace(at: BilevelParams, batch: Batch, state: ModelState) -> Any:
        run = Run(at.params, None)
        with intercepted(run):
            result = evaluate_inner(problem, at, batch, jax.random.key(0), state)
        found.update(run.found)
        return result

    jax.eval_shape(trace, BilevelParams(params, hyperparams), batch, state)
    return found


def _check_weights(params: Params, layers: dict[str, LayerInfo]) -> dict[str, Any]:
    """Return the dtype in ``params`` of each layer's weights; refuse layers that run with weights of other shapes."""
    leaves, places, dtypes = jax.tree.leaves(params), weights_by_path(params), {}
    for path, layer in layers.items():
        shape = jnp.shape(leaves[places[path][0]]) if path in places else None
        if shape != layer.weight.shape or (layer.bias is not None and layer.bias.shape != layer.features):
            got = f"{'no such array' if shape is None else f'shape {shape}'} in params"
            fix = "Layers under nn.scan or nn.vmap over weights cannot respond: leave them out with layers=..."
            raise ValueError(validate.message(f"layer {path} to run with weights {layer.weight.shape}", got, fix))
        dtypes[path] = jnp.asarray(leaves[places[path][0]]).dtype
    return dtypes


def _start(key: Array, layer: LayerInfo, dtype: Any, size: int, gate_std: float) -> LayerResponse:
    weight_key, bias_key, *gate_keys = jax.random.split(key, 4)
    std = 1.0 / math.sqrt(max(layer.fan_in, 1))
    gates = [gate_std * jax.random.normal(k, (size, *layer.features), dtype) for k in gate_keys]
    weight = std * jax.random.normal(weight_key, layer.weight.shape, dtype)
    if layer.bias is None:
        return LayerResponse(weight, (), gates[0], ())
    return LayerResponse(weight, std * jax.random.normal(bias_key, layer.bias.shape, dtype), *gates)
