"""A run that saves each step with Orbax, and may be killed at any time and started again.

``python -m tests.killed_run DIRECTORY ROW``, with a row of the catalogue of estimators: prints the number of each step
that is saved, and at the end the variables.
"""

import pathlib
import sys

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp

import hypergrad as hg
from tests.catalogue import ESTIMATORS
from tests.two_processes import problem

STEPS = 30


def train(directory, row):
    """Resume from the newest step saved, if any, and return the bytes of all that the run ends with."""
    bilevel_problem, variables, batch = problem()
    tx = hg.bilevel(
        next(made for made in ESTIMATORS if made.name == row).make(bilevel_problem),
        inner_optimizer=optax.adam(1e-2, eps_root=1e-8),
        outer_optimizer=optax.adam(1e-1),
        window=1,
        every=3,
        key=5,
    )

    @jax.jit
    def step(variables, state):
        updates, state = tx.update(None, state, variables, inner_batch=batch, outer_batch=batch)
        return optax.apply_updates(variables, updates), state

    state = tx.init(variables)
    with ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
        if manager.latest_step() is not None:
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, (variables, state))
            variables, state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(like))
        while int(state.step) < STEPS:
            variables, state = step(variables, state)
            manager.save(int(state.step), args=ocp.args.StandardSave((variables, state)))
            manager.wait_until_finished()
            print(int(state.step), flush=True)
    return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((variables, state))).hex()


if __name__ == "__main__":
    print(train(pathlib.Path(sys.argv[1]).resolve(), sys.argv[2]))
