"""What the benchmarks call: a compiled function with its arguments, and the library's problem for a network."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
from networks import Network, Tree

import hypergrad as hg


class Candidate(NamedTuple):
    """A compiled function with its arguments: the first ``carried`` of them are replaced by its results."""

    compiled: Any
    arguments: tuple[Any, ...]
    carried: int = 0
    compile_s: float = 0.0

    def thunk(self) -> harness.Thunk:
        """Return a function of no argument that calls it; carried arguments are fresh copies, for donation."""
        held = list(jax.tree.map(jnp.copy, self.arguments[: self.carried]))
        rest = self.arguments[self.carried :]

        def call() -> Any:
            result = self.compiled(*held, *rest)
            if self.carried:
                held[:] = result[: self.carried]
            return result

        call.held = held  # type: ignore[attr-defined]
        return call


def compile_candidate(fn: Callable[..., Any], *arguments: Any, carried: int = 0) -> Candidate:
    """Compile ``fn`` with its first ``carried`` arguments donated."""
    start = time.process_time()
    compiled = jax.jit(fn, donate_argnums=tuple(range(carried))).lower(*arguments).compile()
    return Candidate(compiled, arguments, carried, time.process_time() - start)


def library_problem(network: Network) -> hg.BilevelProblem:
    """Return the problem as the library's user writes it: decays, reparameterized to their logarithms."""

    def train_loss(params: Tree, decays: Tree, batch: Tree, _: Any) -> jax.Array:
        return network.cross_entropy(params, batch) + hg.penalties.l2(params, decays)

    def valid_loss(params: Tree, decays: Tree, batch: Tree, _: Any) -> jax.Array:
        del decays
        return network.cross_entropy(params, batch)

    return hg.reparameterize(hg.BilevelProblem(train_loss, valid_loss), hg.bijectors.exp())
