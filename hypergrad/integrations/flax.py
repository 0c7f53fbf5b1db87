"""A Flax ``TrainState`` that trains weights and hyperparameters.

    state = TrainState.create(apply_fn=model.apply, params=params, hyperparams=hyperparams, tx=hg.bilevel(...))
    state = state.apply_gradients(grads=grads, inner_batch=..., outer_batch=...)

``state.params`` are the weights, as in Flax's own. ``state.hyperparams`` are the hyperparameters, and
``state.info`` the ``HypergradInfo`` of the last outer step that was due.
"""

from typing import Any

import optax
from flax import struct
from flax.training import train_state

from hypergrad.drivers import BilevelState, BilevelTransformation, HypergradInfo, check_bilevel
from hypergrad.problem import BilevelParams
from hypergrad.types import Batch, Hyperparams, ModelState, Params, PyTree

__all__ = ["TrainState"]


class TrainState(train_state.TrainState):
    """``flax.training.train_state.TrainState`` whose ``tx`` is an ``hg.bilevel``.

    w ← tx's inner optimizer on every call, λ ← its outer optimizer where an outer step is due.

    Attributes:
      step: calls of ``apply_gradients`` so far.
      apply_fn: as in Flax, e.g. ``model.apply``.
      params: the weights.
      tx: a ``BilevelTransformation``.
      opt_state: its ``BilevelState``.
      hyperparams: the hyperparameters, unconstrained, as the optimizer moves them.

    Valid as ``tx`` is. The object is a pytree: jit, shard, save and restore it as Flax's own.

    >>> import hypergrad as hg, jax, jax.numpy as jnp, optax
    >>> from hypergrad.integrations.flax import TrainState
    >>> apply = lambda variables, x: x @ variables["params"]["w"]
    >>> error = lambda w, batch: jnp.mean((apply({"params": w}, batch[0]) - batch[1]) ** 2)
    >>> problem = hg.BilevelProblem(lambda w, decay, batch, key: error(w, batch) + hg.penalties.l2(w, jnp.exp(decay)),
    ...                             lambda w, decay, batch, key: error(w, batch))
    >>> tx = hg.bilevel(hg.implicit(problem), inner_optimizer=optax.adam(0.1), outer_optimizer=optax.adam(0.1))
    >>> params, batch = {"w": jnp.zeros(3)}, (jnp.eye(3), jnp.ones(3))
    >>> state = TrainState.create(apply_fn=apply, params=params, hyperparams=jnp.array(-3.0), tx=tx)
    >>> grads = jax.grad(problem.inner_loss)(*state.variables, batch, None)
    >>> state = state.apply_gradients(grads=grads, inner_batch=batch, outer_batch=batch)
    >>> state.params["w"].round(1).tolist(), int(state.info.step)
    ([0.10000000149011612, 0.10000000149011612, 0.10000000149011612], 1)

    Reference: the alternation of Lorraine, Vicol & Duvenaud, arXiv 1911.02590.
    """

    tx: BilevelTransformation = struct.field(pytree_node=False)  # pyright: ignore
    opt_state: BilevelState = struct.field(pytree_node=True)  # pyright: ignore
    hyperparams: Hyperparams = struct.field(pytree_node=True)

    @classmethod
    def create(  # type: ignore[override]
        cls,
        *,
        apply_fn: Any,
        params: Params,
        hyperparams: Hyperparams,
        tx: Any,
        inner_state: PyTree = None,
        model_state: ModelState = None,
        **kwargs: Any,
    ) -> "TrainState":
        """Return the first state.

        Args:
          apply_fn: as in Flax.
          params: the weights.
          hyperparams: the hyperparameters, unconstrained.
          tx: what ``hg.bilevel`` returned.
          inner_state: adopts the state of an inner optimizer that has run.
          model_state: of a stateful problem, e.g. the collection ``batch_stats``.
          **kwargs: further attributes of a subclass.

        Raises:
          ValueError, TypeError: as ``tx.init`` does.
        """
        variables = BilevelParams(params, hyperparams)
        opt_state = check_bilevel(tx).init(variables, inner_state=inner_state, model_state=model_state)
        return cls(
            step=0, apply_fn=apply_fn, params=params, hyperparams=hyperparams, tx=tx, opt_state=opt_state, **kwargs
        )

    def apply_gradients(  # type: ignore[override]
        self,
        *,
        grads: Params = None,
        inner_batch: Batch,
        outer_batch: Batch = None,
        solve_batch: Batch = None,
        model_state: ModelState = None,
        value: Any = None,
        **kwargs: Any,
    ) -> "TrainState":
        """Return the state after one call of ``tx.update``.

        Args:
          grads: gradient of the inner loss; None to have it computed from ``inner_batch``.
          inner_batch: of the inner loss.
          outer_batch: of the outer loss; may be None where no outer step is due.
          solve_batch: as for ``tx.update``.
          model_state: with ``grads`` of a stateful problem, what the inner loss returned.
          value: the inner loss, for the guard.
          **kwargs: attributes to replace, as in Flax.

        Raises:
          ValueError, TypeError: as ``tx.update`` does.
        """
        batches = {"inner_batch": inner_batch, "outer_batch": outer_batch, "solve_batch": solve_batch}
        updates, opt_state = self.tx.update(
            grads, self.opt_state, self.variables, **batches, model_state=model_state, value=value
        )
        updated: Any = optax.apply_updates(self.variables, updates)
        params, hyperparams = updated
        return self.replace(step=self.step + 1, params=params, hyperparams=hyperparams, opt_state=opt_state, **kwargs)

    @property
    def variables(self) -> BilevelParams:
        """Weights and hyperparameters, as losses and estimators take them."""
        return BilevelParams(self.params, self.hyperparams)

    @property
    def model_state(self) -> ModelState:
        """The model state of a stateful problem, e.g. batch statistics; () otherwise."""
        return self.opt_state.model_state

    @property
    def info(self) -> HypergradInfo:
        """Diagnostics of the last outer step that was due."""
        return self.opt_state.info
