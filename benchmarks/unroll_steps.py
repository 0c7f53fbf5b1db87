"""What unrolled differentiation adds to training steps: candidates of ``step_cost.py``, library and by hand.

 1. a hypergradient through 10 steps (a checkpoint each) and through 50 (two levels of checkpoints);
 2. one call of a joint optimizer with a window of 10 steps on which an outer step is due, and one on which none is.

The unit is 10 plain steps in a scan. ``unroll_memory.py`` compares more ways to differentiate.
"""

import functools
from typing import Any

import handwritten_unroll
import jax
import jax.numpy as jnp
import optax
from candidates import Candidate, compile_candidate, library_problem
from networks import Network, Tree

import hypergrad as hg

WINDOW, NEVER = 10, 10**9
UNIT = "10 plain steps"


def candidates(
    network: Network,
    inner: optax.GradientTransformation,
    outer: optax.GradientTransformation,
    checkpoints: dict[int, int],
) -> dict[str, Candidate]:
    """Return the unit, hypergradients, and calls of a joint optimizer.

    Args:
      network: what to train.
      inner: optimizer of the weights.
      outer: optimizer of the decays, in a joint one.
      checkpoints: by number of steps, how many lie between the hand-written loop's checkpoints.
    """
    steps = handwritten_unroll.rollout(network, inner)
    start = network.params, inner.init(network.params), network.log_decays, network.window
    return {
        UNIT: compile_candidate(lambda params, state, *rest: steps(params, state, *rest), *start, carried=2),
        **_hypergradients(network, inner, checkpoints),
        **_joint(network, inner, outer),
    }


def _hypergradients(
    network: Network, inner: optax.GradientTransformation, checkpoints: dict[int, int]
) -> dict[str, Candidate]:
    found = {}
    for length, every in checkpoints.items():
        window = jax.tree.map(lambda x, n=length // WINDOW: jnp.concatenate([x] * n), network.window)
        at = network.params, network.log_decays, window, network.outer_batch
        mode = hg.reverse(unroll=network.unroll)
        fn = hg.value_and_hypergrad(hg.unrolled(library_problem(network), mode), inner_optimizer=inner)
        by_hand = handwritten_unroll.reverse(network, inner, checkpoint_every=every, unroll=network.unroll)
        found[f"unroll {length} library"] = compile_candidate(functools.partial(fn, key=None), *at)
        found[f"unroll {length} hand"] = compile_candidate(by_hand, *at)
    return found


def _joint(
    network: Network, inner: optax.GradientTransformation, outer: optax.GradientTransformation
) -> dict[str, Candidate]:
    estimator = hg.unrolled(library_problem(network), hg.reverse(unroll=network.unroll))
    pair = network.params, network.log_decays
    by_hand = inner.init(network.params), outer.init(network.log_decays), jnp.zeros((), jnp.int32)
    found = {}
    for name, every in (("joint unroll 10", 1), ("idle unroll 10", NEVER)):
        tx = hg.bilevel(estimator, inner_optimizer=inner, outer_optimizer=outer, window=WINDOW, every=every)
        variables = hg.BilevelParams(*pair)
        state = tx.init(variables)
        how: dict[str, Any] = {"checkpoint_every": 1, "unroll": network.unroll}
        hand = handwritten_unroll.joint_window(network, inner, outer, every, **how)
        data = network.window, network.outer_batch
        found[f"{name} library"] = compile_candidate(functools.partial(_call, tx), variables, state, *data, carried=2)
        found[f"{name} hand"] = compile_candidate(hand, pair, by_hand, *data, carried=2)
    return found


def _call(tx: Any, variables: Any, state: Any, window: Tree, outer_batch: Tree) -> Any:
    updates, state = tx.update(None, state, variables, inner_batch=window, outer_batch=outer_batch)
    return optax.apply_updates(variables, updates), state
